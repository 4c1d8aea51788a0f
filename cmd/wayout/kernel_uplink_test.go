package main_test

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// TestTwoUplinks sends by each path of two uplinks, whose addresses wayout has
// put there itself, and looks at both far sides.
func TestTwoUplinks(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	for _, link := range []string{"eth0", "eth1"} {
		if err := k.Host.Sysctl("net/ipv6/conf/"+link+"/accept_dad", "1"); err != nil {
			t.Fatal(err)
		}
	}
	before := k.state()
	far := []*lab.Capture{k.capture(k.ISP1, "host0"), k.capture(k.ISP2, "host0")}
	k.start(uplinkConfig(""))

	// Ready: duplicate address detection is over.
	if out := k.ip("-6", "addr", "show", "tentative"); out != "" {
		t.Errorf("ready with tentative addresses:\n%s", out)
	}
	nodes := uplinkNodes()
	k.works("at once", nodes...)
	detected := map[netip.Addr]bool{}
	for i, name := range []string{"isp1", "isp2"} {
		own := nodes[4*i : 4*i+4]
		pkts := settled(t, far[i])
		carried(t, name, pkts, sources(own)...)
		for _, p := range pkts {
			// A neighbour solicitation from the unspecified address.
			if p.Proto == unix.IPPROTO_ICMPV6 && p.Src.Addr().IsUnspecified() {
				detected[p.Dst.Addr()] = true
			}
		}
		for _, n := range own {
			if !detected[solicited(n.v6)] {
				t.Errorf("no duplicate address detection of %s was seen", n.v6)
			}
		}
	}

	// What wayout put there: the addresses alone, without their networks.
	lines := k.ip("-o", "addr")
	for _, n := range nodes {
		link := []string{"eth0", "eth1"}[n.uplink]
		for _, p := range []string{n.v4.String() + "/32", n.v6.String() + "/128"} {
			found := false
			for l := range strings.Lines(lines) {
				found = found || strings.Contains(l, link+" ") && strings.Contains(l, p+" ") && strings.Contains(l, "noprefixroute")
			}
			if !found {
				t.Errorf("no %s on %s with noprefixroute in\n%s", p, link, lines)
			}
		}
	}
	k.stop()
	k.same("after SIGTERM", before)
}

// solicited is the solicited-node multicast address (RFC 4291, 2.7.1).
func solicited(a netip.Addr) netip.Addr {
	b := netip.MustParseAddr("ff02::1:ff00:0").As16()
	w := a.As16()
	copy(b[13:], w[13:])
	return netip.AddrFrom16(b)
}

// TestUplinkDown takes uplinks away in every way there is: their paths refuse,
// nothing of theirs leaves by the other one, and they work again with their
// interface. Routing alone has to see to that, and the guard must not mind.
func TestUplinkDown(t *testing.T) {
	for _, accounting := range []string{"on", "off"} {
		t.Run("accounting "+accounting, func(t *testing.T) {
			t.Parallel()
			uplinkDown(t, "accounting: "+accounting+"\n"+uplinkConfig(""))
		})
	}
}

func uplinkDown(t *testing.T, config string) {
	k := newKernelScene(t)
	k.start(config)
	nodes := uplinkNodes()
	k.works("at first", nodes...)
	links := []string{"eth0", "eth1"}
	isps := []*lab.NS{k.ISP1, k.ISP2}
	back := func(i int) {
		for _, n := range nodes[4*i : 4*i+4] {
			k.until("out/"+n.id, func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
		}
	}
	for _, c := range []struct {
		name     string
		uplink   int
		down, up func() error
	}{
		{"link down", 1, func() error { return k.Host.Down("eth1") }, func() error { return k.Host.Up("eth1") }},
		// The one that main routing leads out by.
		{"link of the default route down", 0, func() error { return k.Host.Down("eth0") }, func() error { return k.Host.Up("eth0") }},
		{"carrier lost", 1, func() error { return k.ISP2.Down("host0") }, func() error {
			// Its IPv6 addresses went with it.
			return errors.Join(k.ISP2.Up("host0"), k.ISP2.AddAddr("host0", netip.MustParsePrefix(lab.Gateway2Of6+"/64")))
		}},
		{"interface deleted", 1, func() error { return k.Host.DelLink("eth1") }, func() error {
			return errors.Join(lab.Veth(k.Host, "eth1", k.ISP2, "host0"),
				k.ISP2.AddAddr("host0", netip.MustParsePrefix(lab.Gateway2Of4+"/24"), netip.MustParsePrefix(lab.Gateway2Of6+"/64")),
				k.Host.AddAddr("eth1", netip.MustParsePrefix(lab.Primary2Of4+"/24")))
		}},
	} {
		other := 1 - c.uplink
		here, there := nodes[4*c.uplink:4*c.uplink+4], nodes[4*other:4*other+4]
		watch, err := isps[other].Capture("host0")
		if err != nil {
			t.Fatal(err)
		}
		clock := newFair(t)
		if err := c.down(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		for _, n := range here {
			k.until("out/"+n.id, func(p control.Path) bool { return p.State == "down" && strings.Contains(p.Reason, links[c.uplink]) })
		}
		// The kernel itself tells of a lost carrier after up to a second.
		if took, own := clock.took(); own > 2*time.Second || own > time.Second && c.name != "carrier lost" {
			t.Errorf("%s: noticed after %v", c.name, took)
		}
		k.refuses(c.name, here...)
		k.works(c.name+", the other uplink", there...)
		// The policy takes what is left.
		for range 8 {
			if told := k.ask(lab.Ask{}); told.Status != 200 {
				t.Errorf("%s: the policy: %d %q", c.name, told.Status, told.Body)
			}
		}
		var want []netip.Addr
		for _, n := range there {
			want = append(want, n.v4, n.v6)
		}
		carried(t, c.name+": the other uplink", settled(t, watch), want...)
		if err := watch.Close(); err != nil {
			t.Error(err)
		}
		if err := c.up(); err != nil {
			t.Fatalf("%s, back: %v", c.name, err)
		}
		back(c.uplink)
		k.works(c.name+", back", here...)
		if t.Failed() {
			return
		}
	}
}

// TestGatewayRouteGoes deletes the way out of an uplink's table over and over,
// while requests by its paths are running: each goes by its own uplink or
// nowhere.
func TestGatewayRouteGoes(t *testing.T) {
	for _, accounting := range []string{"on", "off"} {
		t.Run("accounting "+accounting, func(t *testing.T) {
			t.Parallel()
			gatewayRouteGoes(t, "accounting: "+accounting+"\n"+uplinkConfig(""))
		})
	}
}

func gatewayRouteGoes(t *testing.T, config string) {
	k := newKernelScene(t)
	k.start(config)
	nodes := uplinkNodes()
	isp1, isp2 := k.capture(k.ISP1, "host0"), k.capture(k.ISP2, "host0")
	gateways := []netip.Addr{netip.MustParseAddr(lab.Gateway2Of4), netip.MustParseAddr(lab.Gateway2Of6)}

	stop, deleted := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		var since time.Time // when the routes were first seen again
		for {
			var there []netlink.Route
			for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
				all, err := k.Host.Netlink().RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
				if err != nil {
					t.Error(err)
				}
				for _, r := range all {
					if r.Table != unix.RT_TABLE_MAIN && r.Gw != nil && r.Gw.Equal(gateways[i].AsSlice()) {
						there = append(there, r)
					}
				}
			}
			// Once they are there again, they stay long enough for what is under way to
			// get through when it is sent again.
			switch {
			case len(there) == 0:
				since = time.Time{}
			case since.IsZero():
				since = time.Now()
			case time.Since(since) >= 40*time.Millisecond:
				for _, r := range there {
					if k.Host.Netlink().RouteDel(&r) == nil {
						n++
					}
				}
				since = time.Time{}
			}
			select {
			case <-stop:
				deleted <- n
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	ended := sync.OnceValue(func() int { close(stop); return <-deleted })
	defer ended()
	statuses := map[int]int{}
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		for _, n := range nodes[4:] {
			for _, target := range []string{target4, target6} {
				told := k.ask(lab.Ask{Header: egress(n.id), Target: target})
				statuses[told.Status]++
				switch told.Status {
				case 200:
					if told.Seen.Source != n.source(target).String() {
						t.Errorf("%s to %s left by %s", n.id, target, told.Seen.Source)
					}
				case 502, 503: // the table's unreachable default, or known to be down
				default:
					t.Errorf("%s to %s: %d %q", n.id, target, told.Status, told.Body)
				}
			}
		}
	}
	n := ended()
	t.Logf("%d routes deleted, answers %v", n, statuses)
	if n < 4 || statuses[503]+statuses[502] == 0 {
		t.Error("the routes were not gone while it was asked")
	}
	carried(t, "isp1", settled(t, isp1))
	for _, p := range settled(t, isp2) {
		if p.Proto == unix.IPPROTO_TCP && !p.Out && p.Src.Addr() == netip.MustParseAddr(lab.Primary2Of4) {
			t.Errorf("isp2 carries %s", p)
		}
	}
	for _, n := range nodes[4:] {
		k.until("out/"+n.id, func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
	}
	k.works("after it", nodes...)
}
