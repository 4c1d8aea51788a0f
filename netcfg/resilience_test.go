package netcfg_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/netcfg"
)

// lines is a log that tests can wait on.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// TestWatchAgain: a subscription that breaks is made again, in the same namespace,
// and what changed meanwhile is seen.
func TestWatchAgain(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0 type veth peer name far0")
	ip(t, "link set up0 up")
	ip(t, "link set far0 up")
	var log lines
	w, until := watch(t, netcfg.WatchOptions{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	get := state("192.0.2.1", "")
	for i := range 3 {
		w.BreakSubscription()
		ip(t, "addr add 192.0.2.1/32 dev up0")
		until("added", func(s *netcfg.Snapshot) bool { return get(s) == "present" })
		ip(t, "addr del 192.0.2.1/32 dev up0")
		until("removed", func(s *netcfg.Snapshot) bool { return strings.HasPrefix(get(s), "absent") })
		if got := strings.Count(log.String(), "made again"); got != i+1 {
			t.Errorf("after %d breaks the log says %d times that it was made again:\n%s", i+1, got, log.String())
		}
	}
}

// TestWatchOverrun: when events are lost, everything is read.
func TestWatchOverrun(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0 type veth peer name far0")
	ip(t, "link set up0 up")
	ip(t, "link set far0 up")
	var log lines
	w, until := watch(t, netcfg.WatchOptions{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err := w.ShrinkBuffer(); err != nil {
		t.Fatal(err)
	}
	k := open(t, netcfg.Options{})
	link, _ := read(t, k).Link("up0")
	n := 0
	for !strings.Contains(log.String(), "faster than they were read") {
		if n++; n > 60000 {
			t.Fatal("no event was lost")
		}
		a := netcfg.Address{Addr: netip.AddrFrom4([4]byte{10, 3, byte(n >> 8), byte(n)}), Prefix: 32, LinkIndex: link.Index, Metric: 11900}
		if err := k.Do(netcfg.Op{Kind: netcfg.KindAddress, Addr: a}); err != nil {
			t.Fatal(err)
		}
	}
	took := until("all of them", func(s *netcfg.Snapshot) bool {
		st, _ := s.Has(netip.AddrFrom4([4]byte{10, 3, byte(n >> 8), byte(n)}), "up0")
		return st == netcfg.Present
	})
	t.Logf("events lost at address %d, seen %v later", n, took)
	if took > time.Second {
		t.Error("too late")
	}
}

// TestCarryOver: an interrupted list takes nothing away that no event took away.
func TestCarryOver(t *testing.T) {
	addr := func(s string, link int) netcfg.Address {
		return netcfg.Address{Addr: netip.MustParseAddr(s), Prefix: 32, LinkIndex: link}
	}
	eth0 := []netcfg.Link{{Index: 2, Name: "eth0", Admin: true, Up: true}}
	old := netcfg.NewSnapshot(append(eth0, netcfg.Link{Index: 3, Name: "eth1"}), []netcfg.Address{
		addr("192.0.2.1", 2), addr("192.0.2.2", 2), addr("192.0.2.3", 2), addr("192.0.2.4", 3),
	}, nil, nil)
	part := netcfg.NewSnapshot(eth0, []netcfg.Address{addr("192.0.2.1", 2), addr("192.0.2.9", 2)}, nil, nil)
	got := part.CarryOver(old, addr("192.0.2.3", 2))
	if s, want := fmt.Sprint(got.OwnAddrs()), "[192.0.2.1 192.0.2.2 192.0.2.9]"; s != want {
		t.Errorf("got %s, want %s: .3 went by an event, .4 with its interface", s, want)
	}
	if len(part.AddressList()) != 2 || len(old.AddressList()) != 4 {
		t.Error("the snapshots it was made from are not what they were")
	}
}

func TestHas(t *testing.T) {
	p := netip.MustParseAddr
	s := netcfg.NewSnapshot([]netcfg.Link{
		{Index: 1, Name: "lo", Admin: true, Up: true, Loopback: true},
		{Index: 2, Name: "eth0", Admin: true, Up: true},
		{Index: 3, Name: "eth1", Admin: true, Reason: "interface eth1 has no carrier"},
		{Index: 4, Name: "eth2", Reason: "interface eth2 is down"},
	}, []netcfg.Address{
		{Addr: p("192.0.2.1"), LinkIndex: 2},
		{Addr: p("192.0.2.3"), LinkIndex: 3},
		{Addr: p("192.0.2.4"), LinkIndex: 4},
		{Addr: p("192.0.2.5"), LinkIndex: 9},
		{Addr: p("2001:db8::1"), LinkIndex: 2, Tentative: true},
		{Addr: p("2001:db8::1"), LinkIndex: 4},
		{Addr: p("2001:db8::2"), LinkIndex: 2, DadFailed: true},
		{Addr: p("2001:db8::3"), LinkIndex: 2, Deprecated: true},
		{Addr: p("fe80::1"), LinkIndex: 2, LinkScope: true},
	}, []netcfg.Route{
		{Family: netcfg.IPv4, Table: netcfg.TableLocal, Type: netcfg.RouteLocal, Dst: netip.MustParsePrefix("10.60.0.0/24"), LinkIndex: 1},
	}, nil)
	for _, tt := range []struct{ addr, ifname, want string }{
		{"192.0.2.1", "", "present"},
		{"::ffff:192.0.2.1", "eth0", "present"},
		{"fe80::1%eth0", "eth0", "present"},
		{"2001:db8::3", "eth0", "present"}, // deprecated is for new choices, not for ours
		{"10.60.0.255", "eth0", "present"},
		{"10.60.0.255", "eth2", "linkdown: interface eth2 is down"},
		{"192.0.2.9", "eth0", "absent: address 192.0.2.9 is not on any interface"},
		{"192.0.2.1", "eth9", "linkdown: interface eth9 does not exist"},
		{"192.0.2.3", "", "linkdown: interface eth1 has no carrier"},
		{"192.0.2.3", "eth1", "linkdown: interface eth1 has no carrier"},
		{"192.0.2.3", "eth0", "present"}, // it can be bound, and packets leave by eth0
		{"192.0.2.4", "eth0", "linkdown: interface eth2 is down"},
		{"192.0.2.5", "", "linkdown: the interface of address 192.0.2.5 (number 9) is not known"},
		{"2001:db8::1", "eth0", "tentative: address 2001:db8::1 is tentative (duplicate address detection)"},
		{"2001:db8::2", "eth0", "dadfailed: address 2001:db8::2 is used by another host (duplicate address detection)"},
	} {
		if got := state(tt.addr, tt.ifname)(s); got != tt.want {
			t.Errorf("%s on %q: %s, want %s", tt.addr, tt.ifname, got, tt.want)
		}
	}
	if got := fmt.Sprint(s.LocalPrefixes()); got != "[10.60.0.0/24]" {
		t.Errorf("local prefixes %s", got)
	}
}

// BenchmarkDiff is a reconciliation with nothing to do, 65,000 managed addresses.
func BenchmarkDiff(b *testing.B) {
	k := host()
	u := isp1()
	for i := range 65000 {
		u.Addresses = append(u.Addresses, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	w := want(u, isp2())
	s := k.snapshot()
	for _, o := range netcfg.Diff(s, w).Ops {
		switch o.Kind {
		case netcfg.KindAddress:
			k.addrs = append(k.addrs, o.Addr)
		case netcfg.KindRoute:
			k.routes = append(k.routes, o.Route)
		case netcfg.KindRule:
			k.rules = append(k.rules, o.Rule)
		}
	}
	s = k.snapshot()
	b.ReportAllocs()
	for b.Loop() {
		if p := netcfg.Diff(s, w); !p.Empty() {
			b.Fatal(p.Commands()[0])
		}
	}
}

func BenchmarkHas(b *testing.B) {
	s := host().snapshot()
	a := netip.MustParseAddr("198.51.100.5")
	b.ReportAllocs()
	for b.Loop() {
		if st, _ := s.Has(a, "eth0"); st != netcfg.Present {
			b.Fatal(st)
		}
	}
}

// BenchmarkRead reads the namespace that the tests run in, as it is.
func BenchmarkRead(b *testing.B) {
	k, err := netcfg.Open(netcfg.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = k.Close() }()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.Read(); err != nil {
			b.Fatal(err)
		}
	}
}
