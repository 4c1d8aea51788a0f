package netcfg_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/scripts/lab"
)

// reach connects from src ("": any) with a mark to an address where nothing listens:
// a refusal says that a host answered.
func reach(src, dst string, port int, mark int) error {
	d := net.Dialer{Timeout: 10 * time.Second, Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark),
			)
		}), err)
	}}
	if src != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(src)}
	}
	c, err := d.Dial("tcp", net.JoinHostPort(dst, fmt.Sprint(port)))
	if err == nil {
		_ = c.Close()
	}
	return err
}

// TestGatewayInPrefix: with a node that is the whole prefix of its uplink's link, the
// gateway in it is reached and reaches the host, and so does what lies behind it;
// with uplinks and without, and on the way from one to the other.
func TestGatewayInPrefix(t *testing.T) {
	const gw4, gw6 = "198.51.100.1", "2001:db8:100::1"
	inNamespace(t)
	plumb(t)
	ip(t, "rule del priority 9")
	ip(t, "addr del 198.51.100.99/32 dev lan0")
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	far := elsewhere(t)
	var listeners []net.Listener // of the far side
	ip(t, fmt.Sprintf("link set far0 netns %d", far.thread))
	far.do(func() {
		for _, line := range []string{
			"link set lo up", "link set far0 up", "addr add 198.51.100.1/24 dev far0", "addr add 2001:db8:100::1/64 dev far0 nodad",
			"addr add 192.0.2.77/32 dev lo", "addr add 2001:db8:9::77/128 dev lo nodad",
		} {
			ip(t, line)
		}
		for _, a := range []string{gw4, gw6, "192.0.2.77", "2001:db8:9::77"} {
			l, err := net.Listen("tcp", net.JoinHostPort(a, "7001"))
			if err != nil {
				t.Fatal(err)
			}
			listeners = append(listeners, l)
		}
	})
	server, err := net.Listen("tcp", ":7002") // of the host, on any address
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range append(listeners, server) {
		defer func() { _ = l.Close() }()
	}
	k := open(t, netcfg.Options{})
	both := prefixes("198.51.100.0/24", "2001:db8:100::/64")
	inUplink := want(with(isp1NoAddrs(), func(u *netcfg.Uplink) { u.Local = both }), isp2())
	alone := netcfg.Want{Layout: layout(), Local: both}
	works := func(when string, mark int) {
		t.Helper()
		ip(t, "neigh flush dev eth0")
		far.do(func() { ip(t, "neigh flush dev far0") })
		for _, c := range []struct{ src, dst string }{
			{"", gw4},
			{"", gw6},
			{"", "192.0.2.77"},
			{"", "2001:db8:9::77"},
			{"198.51.100.77", gw4},
			{"198.51.100.200", "192.0.2.77"},
			{"2001:db8:100::2", gw6},
			{"2001:db8:100::5", "2001:db8:9::77"},
		} {
			if c.src == "2001:db8:100::2" { // nobody answers for it on the link: an address stands for the answer
				ip(t, "addr add 2001:db8:100::2/128 dev eth0 nodad noprefixroute")
			}
			if err := reach(c.src, c.dst, 7001, mark); err != nil {
				t.Errorf("%s: from %q to %s: %v", when, c.src, c.dst, err)
			}
			if c.src == "2001:db8:100::2" {
				ip(t, "addr del 2001:db8:100::2/128 dev eth0")
			}
		}
		ip(t, "neigh flush dev eth0")
		far.do(func() {
			ip(t, "neigh flush dev far0")
			// The kernel answers ARP for every address of a local route.
			for _, a := range []string{"198.51.100.5", "2001:db8:100::5", "198.51.100.3", "198.51.100.254"} {
				if err := reach("", a, 7002, 0); err != nil {
					t.Errorf("%s: from the gateway to %s: %v", when, a, err)
				}
			}
		})
	}
	apply(t, k, alone)
	works("without uplinks", 0)
	apply(t, k, inUplink)
	works("no mark", 0)
	works("by its uplink", 0x10000)
	if err := reach("", gw4, 7001, 0x20000); err == nil {
		t.Error("with the other uplink's mark the gateway is reached by the wrong interface")
	}
	for _, cmd := range []string{"route get " + gw4, "route get " + gw6} {
		if out := ip(t, cmd); !strings.Contains(out, "dev eth0") || strings.Contains(out, "local") {
			t.Errorf("ip %s: %s", cmd, out)
		}
	}
	s := read(t, k)
	for _, p := range both {
		if st, reason := s.HasLocal(p); st != netcfg.Present {
			t.Errorf("%s is %s (%s)", p, st, reason)
		}
	}
	for addr, want := range map[string]string{
		gw4: "absent: address 198.51.100.1 is not on any interface", gw6: "absent: address 2001:db8:100::1 is not on any interface",
		"198.51.100.2": "present", "2001:db8:100::2": "present",
	} {
		if got := state(addr, "eth0")(s); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}

	// With arp_ignore the kernel answers no more for what is on no interface.
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/eth0/arp_ignore", []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	far.do(func() {
		ip(t, "neigh flush dev far0")
		if err := reach("", "198.51.100.5", 7002, 0); err != nil {
			t.Errorf("arp_ignore: the interface's own address: %v", err)
		}
		if err := reach("", "198.51.100.4", 7002, 0); err == nil {
			t.Error("arp_ignore is of no account for local routes")
		}
	})
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/eth0/arp_ignore", []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}

	// What the exceptions are for: without them the host takes itself for the gateway.
	ip(t, "route del throw 198.51.100.1/32 table local")
	ip(t, "-6 route del throw 2001:db8:100::1/128 table local")
	for _, cmd := range []string{"route get " + gw4, "route get " + gw6} {
		if out := ip(t, cmd); !strings.HasPrefix(out, "local ") {
			t.Errorf("without exceptions: ip %s: %s", cmd, out)
		}
	}
	if err := reach("", gw4, 7002, 0); err != nil {
		t.Errorf("without exceptions the host's own server does not answer as the gateway: %v", err)
	}
	apply(t, k, inUplink)
	works("put back", 0x10000)
	apply(t, k, alone)
	works("without uplinks again", 0)
	apply(t, k, want())
	if left := ip(t, "route show table local proto 119") + ip(t, "-6 route show table local proto 119"); strings.Contains(left, "198.51") || strings.Contains(left, "2001") {
		t.Errorf("after clean there is\n%s", left)
	}
}

// TestPrefixesOfWorld: with the strictest reverse path check every address of a prefix
// that is routed by an uplink, or on its link (IPv4), goes out by it and is answered;
// what has no mark goes the same way.
func TestPrefixesOfWorld(t *testing.T) {
	lab.Require(t)
	w, err := lab.NewWorld(false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	// The main routing of the host leads elsewhere, so that nothing works by chance.
	for _, r := range [][3]string{{"0.0.0.0/0", lab.Gateway1Of4, lab.Gateway2Of4}, {"::/0", lab.Gateway1Of6, lab.Gateway2Of6}} {
		dst := netip.MustParsePrefix(r[0])
		if err := errors.Join(w.Host.DelRoute(dst, netip.MustParseAddr(r[1])), w.Host.AddRoute(dst, netip.MustParseAddr(r[2]))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Host.Sysctl("net/ipv4/conf/all/rp_filter", "1"); err != nil {
		t.Fatal(err)
	}
	u := isp1NoAddrs()
	u.Gateway4, u.Gateway6 = netip.MustParseAddr(lab.Gateway1Of4), netip.MustParseAddr(lab.Gateway1Of6)
	u.Local = prefixes(lab.RoutedNet4, lab.RoutedNet6, lab.SharedNet4)
	wish := want(u)
	origins := map[bool]string{true: lab.OriginAddr4, false: lab.OriginAddr6}
	sources := make(map[string]bool)
	for _, a := range origins {
		l, err := w.Origin.Listen(netip.AddrPortFrom(netip.MustParseAddr(a), 7001))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
	}
	capture, err := w.ISP2.Capture("host0")
	if err != nil {
		t.Fatal(err)
	}
	err = w.Host.Do(func() error {
		k, err := netcfg.Open(netcfg.Options{Layout: layout()})
		if err != nil {
			return err
		}
		defer func() { _ = k.Close() }()
		apply(t, k, wish)
		s := read(t, k)
		for _, p := range u.Local {
			reserved := make(map[netip.Addr]bool)
			for _, a := range wish.Reserved(s, p) {
				reserved[a] = true
			}
			a := p.Addr()
			for range 128 {
				if !reserved[a] {
					sources[a.String()] = true
					if err := reach(a.String(), origins[a.Is4()], 7001, 0x10000); err != nil {
						return fmt.Errorf("from %s: %w", a, err)
					}
				}
				a = a.Next()
			}
			// A packet of no socket has no mark.
			out, err := exec.Command("ip", "route", "get", origins[p.Addr().Is4()], "from", p.Addr().Next().Next().String()).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "dev eth0") {
				t.Errorf("without a mark from %s: %s, error %v", p, out, err)
			}
			if got, want := s.OnLink(p, "eth0"), p.String() == lab.SharedNet4; got != want {
				t.Errorf("%s is on the link of eth0: %v", p, got)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(sources); n != 3*128-1 { // all but the link's broadcast address
		t.Errorf("%d sources", n)
	}
	for _, p := range capture.Packets() {
		if sources[p.Src.Addr().String()] {
			t.Errorf("by the wrong uplink: %s", p)
		}
	}
	if err := capture.Close(); err != nil {
		t.Error(err)
	}
}

func TestReserved(t *testing.T) {
	k := host()
	k.routes = append(k.routes, netcfg.Route{
		Family: netcfg.IPv6, Table: 700, Type: netcfg.RouteUnicast, Protocol: 3, Dst: netip.MustParsePrefix("::/0"),
		Gateway: netip.MustParseAddr("2001:db8:100:7::1"), LinkIndex: 2,
	}, connected(netip.MustParsePrefix("2001:db8:100:6::/127"), 4))
	w := want(isp1(), with(isp2(), func(u *netcfg.Uplink) { u.Gateway4 = netip.MustParseAddr("203.0.113.14") }))
	for p, want := range map[string]string{
		"198.51.100.0/24":     "[198.51.100.0 198.51.100.1 198.51.100.255]",
		"198.51.100.128/25":   "[198.51.100.255]",
		"198.51.100.64/26":    "[]",
		"203.0.113.0/24":      "[203.0.113.0 203.0.113.14 203.0.113.15]",
		"10.60.0.0/24":        "[]",
		"2001:db8:100::/64":   "[2001:db8:100:: 2001:db8:100::1]",
		"2001:db8:100::/48":   "[2001:db8:100:: 2001:db8:100::1 2001:db8:100:7::1]",
		"2001:db8:100:6::/64": "[]",
	} {
		if got := fmt.Sprint(w.Reserved(k.snapshot(), netip.MustParsePrefix(p))); got != want {
			t.Errorf("%s: %s, want %s", p, got, want)
		}
	}
}

func TestHasLocal(t *testing.T) {
	route := func(typ netcfg.RouteType, table uint32, dst string) netcfg.Route {
		r := netcfg.Route{Family: netcfg.IPv4, Table: table, Type: typ, Dst: netip.MustParsePrefix(dst)}
		if r.Dst.Addr().Is6() {
			r.Family = netcfg.IPv6
		}
		return r
	}
	s := netcfg.NewSnapshot(nil, nil, []netcfg.Route{
		route(netcfg.RouteLocal, netcfg.TableLocal, "10.60.0.0/16"),
		route(netcfg.RouteThrow, netcfg.TableLocal, "10.60.7.0/24"),
		route(netcfg.RouteLocal, netcfg.TableLocal, "10.60.7.8/29"),
		route(netcfg.RouteLocal, netcfg.TableLocal, "2001:db8:beef::/64"),
		route(netcfg.RouteLocal, netcfg.TableMain, "2001:db8:cafe::/64"),
		route(netcfg.RouteUnicast, netcfg.TableLocal, "192.0.2.1/32"),
	}, nil)
	for p, want := range map[string]netcfg.State{
		"10.60.0.0/16": netcfg.Present, "10.60.200.0/24": netcfg.Present, "10.60.7.9/32": netcfg.Present, "10.0.0.0/8": netcfg.Absent,
		"10.61.0.0/16": netcfg.Absent, "2001:db8:beef::/64": netcfg.Present, "2001:db8:beef::/63": netcfg.Absent,
		"2001:db8:cafe::/64": netcfg.Absent, "192.0.2.1/32": netcfg.Absent,
	} {
		st, reason := s.HasLocal(netip.MustParsePrefix(p))
		if st != want || (reason == "") != (want == netcfg.Present) {
			t.Errorf("%s: %s (%s), want %s", p, st, reason, want)
		}
	}
	for a, want := range map[string]netcfg.State{
		"10.60.1.1": netcfg.Present, "10.60.7.1": netcfg.Absent, "10.60.7.9": netcfg.Present, "192.0.2.1": netcfg.Absent,
		"2001:db8:beef::9": netcfg.Present, "2001:db8:cafe::9": netcfg.Absent,
	} {
		if st, _ := s.Has(netip.MustParseAddr(a), ""); st != want {
			t.Errorf("%s: %s, want %s", a, st, want)
		}
	}
}

func TestOnLink(t *testing.T) {
	k := host()
	if err := netcfg.Diff(k.snapshot(), want(isp1())).Apply(k); err != nil {
		t.Fatal(err)
	}
	k.links = append(k.links, netcfg.Link{Index: 5, Name: "tun0", Admin: true, Up: true})
	k.routes = append(k.routes, connected(netip.MustParsePrefix("128.0.0.0/1"), 5))
	s := k.snapshot()
	for _, tt := range []struct {
		prefix, link string
		want         bool
	}{
		{"198.51.100.0/24", "eth0", true},
		{"198.51.100.128/25", "eth0", true},
		{"198.51.100.0/24", "eth1", false},
		{"198.51.100.0/24", "eth9", false},
		{"203.0.113.0/24", "eth1", true}, // a part of it
		{"10.60.0.0/24", "eth0", false},
		{"2001:db8:100::/64", "eth0", true},
		{"2001:db8:100:1::/64", "eth0", false},
		{"2001:db8:100::/48", "eth0", true},
		{"2001:db8:100::/64", "lan0", false},
		{"198.51.100.0/24", "tun0", false},
	} {
		if got := s.OnLink(netip.MustParsePrefix(tt.prefix), tt.link); got != tt.want {
			t.Errorf("%s on %s: %v", tt.prefix, tt.link, got)
		}
	}
}
