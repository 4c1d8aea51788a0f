package netcfg_test

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"wayout/netcfg"
)

// watch starts a watcher in the test's namespace and gives a function that waits
// until a snapshot satisfies ok and says how long that took.
func watch(t *testing.T, opt netcfg.WatchOptions) (*netcfg.Watcher, func(what string, ok func(*netcfg.Snapshot) bool) time.Duration) {
	t.Helper()
	changes := make(chan *netcfg.Snapshot, 10000)
	opt.OnChange = func(s *netcfg.Snapshot) { changes <- s }
	ctx, cancel := context.WithCancel(context.Background())
	w, err := netcfg.Watch(ctx, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		<-w.Done()
	})
	if first := <-changes; first != w.Snapshot() {
		t.Error("the first snapshot was not announced before Watch returned")
	}
	return w, func(what string, ok func(*netcfg.Snapshot) bool) time.Duration {
		t.Helper()
		began := time.Now()
		if ok(w.Snapshot()) {
			return 0
		}
		timeout := time.After(10 * time.Second)
		for {
			select {
			case <-changes: // or an older one that nobody waited for
				if ok(w.Snapshot()) {
					return time.Since(began)
				}
			case <-timeout:
				t.Fatalf("%s: no snapshot says so after 10 s", what)
			}
		}
	}
}

func state(addr, ifname string) func(*netcfg.Snapshot) string {
	return func(s *netcfg.Snapshot) string {
		st, reason := s.Has(netip.MustParseAddr(addr), ifname)
		return strings.TrimSuffix(st.String()+": "+reason, ": ")
	}
}

func TestWatchAddresses(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0 type veth peer name far0")
	ip(t, "link set up0 up")
	ip(t, "link set far0 up")
	_, until := watch(t, netcfg.WatchOptions{})

	steps := []struct {
		do, addr, ifname, want string
	}{
		{"addr add 198.51.100.7/24 dev up0", "198.51.100.7", "up0", "present"},
		{"addr add 2001:db8::7/64 dev up0 nodad", "2001:db8::7", "up0", "present"},
		{"link set far0 down", "198.51.100.7", "up0", "linkdown: interface up0 has no carrier"},
		{"link set far0 up", "198.51.100.7", "", "present"},
		{"addr del 198.51.100.7/24 dev up0", "198.51.100.7", "up0", "absent: address 198.51.100.7 is not on any interface"},
		{"addr add 198.51.100.7/24 dev up0", "::ffff:198.51.100.7", "up0", "present"},
		{"link set up0 down", "198.51.100.7", "up0", "linkdown: interface up0 is down"},
		{"link set lo up", "2001:db8::7", "", "absent: address 2001:db8::7 is not on any interface"}, // IPv6 goes with the interface
		{"link set up0 up", "198.51.100.7", "", "present"},
		{"addr add 192.0.2.9/32 dev lo", "192.0.2.9", "up0", "present"},
		{"link set up0 name up1", "192.0.2.9", "up0", "linkdown: interface up0 does not exist"},
		{"route add local 203.0.113.0/24 dev lo", "203.0.113.200", "up1", "present"},
		{"route del local 203.0.113.0/24 dev lo", "203.0.113.200", "up1", "absent: address 203.0.113.200 is not on any interface"},
		{"-6 route add local 2001:db8:60::/64 dev lo", "2001:db8:60::abcd", "", "present"},
		{"link del up1", "198.51.100.7", "", "absent: address 198.51.100.7 is not on any interface"},
	}
	for _, s := range steps {
		ip(t, s.do)
		get := state(s.addr, s.ifname)
		took := until(fmt.Sprintf("after `ip %s`, %s on %q: want %q", s.do, s.addr, s.ifname, s.want),
			func(snap *netcfg.Snapshot) bool { return get(snap) == s.want })
		if took > time.Second {
			t.Errorf("ip %s: noticed after %v", s.do, took)
		}
	}
}

func TestWatchTentative(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0 type veth peer name far0")
	ip(t, "link set up0 up")
	ip(t, "link set far0 up")
	w, until := watch(t, netcfg.WatchOptions{})
	get := state("2001:db8::7", "up0")
	ip(t, "addr add 2001:db8::7/64 dev up0")
	until("tentative", func(s *netcfg.Snapshot) bool {
		return get(s) == "tentative: address 2001:db8::7 is tentative (duplicate address detection)"
	})
	if slices.Contains(w.Snapshot().GlobalAddrs(), netip.MustParseAddr("2001:db8::7")) {
		t.Error("a tentative address is offered for use")
	}
	until("no longer tentative", func(s *netcfg.Snapshot) bool { return get(s) == "present" })

	// Two hosts with one address: the other end has it first.
	ip(t, "addr add 2001:db8::8/64 dev far0 nodad")
	ip(t, "addr add 2001:db8::8/64 dev up0")
	until("duplicate", func(s *netcfg.Snapshot) bool {
		for _, a := range s.Addrs[netip.MustParseAddr("2001:db8::8")] {
			if a.DadFailed {
				return true
			}
		}
		return false
	})
}

func TestWatchRoutesAndRules(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0 type veth peer name far0")
	ip(t, "link set up0 up")
	ip(t, "link set far0 up")
	ip(t, "addr add 198.51.100.7/24 dev up0")
	ip(t, "addr add 2001:db8::7/64 dev up0 nodad")
	_, until := watch(t, netcfg.WatchOptions{})
	steps := []struct {
		do string
		ok func(*netcfg.Snapshot) bool
	}{
		{"route add default via 198.51.100.1", func(s *netcfg.Snapshot) bool { return s.DefaultRoute(netcfg.IPv4) }},
		{"route del default", func(s *netcfg.Snapshot) bool { return !s.DefaultRoute(netcfg.IPv4) }},
		{"-6 route add default via 2001:db8::1", func(s *netcfg.Snapshot) bool { return s.DefaultRoute(netcfg.IPv6) }},
		{"route add default via 198.51.100.1 table 77", func(s *netcfg.Snapshot) bool { return s.HasDefault(netcfg.IPv4, 77) }},
		{"route add unreachable default table 78", func(s *netcfg.Snapshot) bool {
			return len(s.Routes) > 0 && !s.HasDefault(netcfg.IPv4, 78) && s.HasRoute(netcfg.Route{
				Family: netcfg.IPv4, Table: 78, Type: netcfg.RouteUnreachable, Protocol: 3, Dst: netip.MustParsePrefix("0.0.0.0/0"),
			})
		}},
		{"rule add from 192.0.2.0/24 fwmark 0x10/0xf0 lookup 77 priority 900", func(s *netcfg.Snapshot) bool {
			return slices.ContainsFunc(s.Rules, func(r netcfg.Rule) bool {
				return r.String() == "900: from 192.0.2.0/24 fwmark 0x10/0xf0 lookup 77"
			})
		}},
		// Down and up again: the IPv4 default has gone, without an event of its own.
		{"route add default via 198.51.100.1", func(s *netcfg.Snapshot) bool { return s.DefaultRoute(netcfg.IPv4) }},
		{"link set up0 down", func(s *netcfg.Snapshot) bool {
			return !s.DefaultRoute(netcfg.IPv4) && !s.DefaultRoute(netcfg.IPv6) && !s.HasDefault(netcfg.IPv4, 77)
		}},
	}
	for _, s := range steps {
		ip(t, s.do)
		if took := until("ip "+s.do, s.ok); took > time.Second {
			t.Errorf("ip %s: noticed after %v", s.do, took)
		}
	}
}

// TestWatchBurst: thousands of changes lead to few reads, and the last one counts.
func TestWatchBurst(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0 type veth peer name far0")
	ip(t, "link set up0 up")
	ip(t, "link set far0 up")
	ip(t, "addr add 192.0.2.1/32 dev up0")
	w, until := watch(t, netcfg.WatchOptions{})

	const n = 2000
	batch := func(verb string) {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "addr %s 10.9.%d.%d/32 dev up0\n", verb, i/250, i%250+1)
		}
		cmd := exec.Command("ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(b.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ip -batch: %v\n%s", err, out)
		}
	}
	kept := func(s *netcfg.Snapshot) {
		t.Helper()
		if st, reason := s.Has(netip.MustParseAddr("192.0.2.1"), "up0"); st != netcfg.Present {
			t.Errorf("an untouched address was given up meanwhile: %s", reason)
		}
	}
	batch("add")
	took := until("all added", func(s *netcfg.Snapshot) bool { kept(s); return len(s.Addrs) >= n+2 })
	t.Logf("%d addresses added, seen %v after the last", n, took)
	if took > time.Second {
		t.Error("too late")
	}
	batch("del")
	took = until("all removed", func(s *netcfg.Snapshot) bool { kept(s); return len(s.Addrs) < 10 })
	t.Logf("%d addresses removed, seen %v after the last", n, took)
	if took > time.Second {
		t.Error("too late")
	}
	if got := len(w.Snapshot().OwnAddrs()); got > 10 {
		t.Errorf("%d addresses left", got)
	}
}

// TestRefresh: a snapshot says how old it is, and one that is asked for comes even
// when nothing has changed.
func TestRefresh(t *testing.T) {
	inNamespace(t)
	ip(t, "link set lo up")
	w, until := watch(t, netcfg.WatchOptions{})
	for range 3 {
		asked := time.Now()
		if !w.Snapshot().Since().Before(asked) {
			t.Fatal("the snapshot is from the future")
		}
		w.Refresh()
		until("newer than it was asked for", func(s *netcfg.Snapshot) bool { return !s.Since().Before(asked) })
	}
	// What is read in part is as old as its oldest part.
	asked := time.Now()
	ip(t, "addr add 192.0.2.7/32 dev lo")
	until("the address", func(s *netcfg.Snapshot) bool { return state("192.0.2.7", "")(s) == "present" })
	if !w.Snapshot().Since().Before(asked) {
		t.Error("interfaces that were not read again are taken to be new")
	}
}

func TestGlobalAddrs(t *testing.T) {
	inNamespace(t)
	for _, line := range []string{
		"link add up0 type veth peer name far0", "link add up1 type veth peer name far1",
		"link set up0 up", "link set far0 up", "link set up1 up", // far1 stays down: up1 has no carrier
		"addr add 198.51.100.9/24 dev up0", "addr add 198.51.100.8/24 dev up0", "addr add 169.254.3.3/16 dev up0 scope link",
		"addr add 192.0.2.1/32 dev lo", "addr add 203.0.113.1/24 dev up1",
		"addr add 2001:db8::2/64 dev up0 nodad", "addr add 2001:db8::1/64 dev up0 nodad", "addr add fd00::1/64 dev far0 nodad",
		"addr add 2001:db8::3/64 dev up0 nodad preferred_lft 0",
	} {
		ip(t, line)
	}
	s, err := netcfg.Read()
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(s.GlobalAddrs())
	// far0 was made with up0 and has the lower number.
	if want := "[198.51.100.8 198.51.100.9 fd00::1 2001:db8::1 2001:db8::2]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := fmt.Sprint(s.Broadcasts()); got != "[]" {
		t.Errorf("broadcast addresses %s, want none", got)
	}
	for _, own := range []string{"127.0.0.1", "::1", "169.254.3.3", "203.0.113.1"} {
		if !slices.Contains(s.OwnAddrs(), netip.MustParseAddr(own)) {
			t.Errorf("%s is not among the host's own addresses", own)
		}
	}
}
