package netcfg_test

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

// TestMoved: what differs between two snapshots is said by address, and whether
// anything else does.
func TestMoved(t *testing.T) {
	t.Parallel()
	links := func(up bool) []netcfg.Link { return []netcfg.Link{{Index: 1, Name: "eth0", Admin: up, Up: up}} }
	at := func(list ...string) []netcfg.Address {
		var out []netcfg.Address
		for _, s := range list {
			a := netip.MustParseAddr(s)
			out = append(out, netcfg.Address{Addr: a, Prefix: a.BitLen(), LinkIndex: 1})
		}
		return out
	}
	tentative := at("192.0.2.1", "2001:db8::1")
	tentative[1].Tentative = true
	twice := append(at("192.0.2.1", "192.0.2.1", "2001:db8::1"), at("198.51.100.1")...)
	twice[1].LinkIndex = 2
	route := []netcfg.Route{{Family: netcfg.IPv4, Table: unix.RT_TABLE_MAIN, Type: netcfg.RouteUnicast, Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("192.0.2.254"), LinkIndex: 1}}
	base := netcfg.NewSnapshot(links(true), at("192.0.2.1", "2001:db8::1"), nil, nil)
	for _, c := range []struct {
		name string
		now  *netcfg.Snapshot
		want []string
		more bool
	}{
		{"the same", base, nil, false},
		{"equal", netcfg.NewSnapshot(links(true), at("2001:db8::1", "192.0.2.1"), nil, nil), nil, false},
		{"more", netcfg.NewSnapshot(links(true), at("192.0.2.0", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"), nil, nil), []string{"192.0.2.0", "192.0.2.2", "2001:db8::2"}, false},
		{"fewer", netcfg.NewSnapshot(links(true), at("2001:db8::1"), nil, nil), []string{"192.0.2.1"}, false},
		{"others", netcfg.NewSnapshot(links(true), at("192.0.2.9"), nil, nil), []string{"192.0.2.1", "192.0.2.9", "2001:db8::1"}, false},
		{"none", netcfg.NewSnapshot(links(true), nil, nil, nil), []string{"192.0.2.1", "2001:db8::1"}, false},
		{"a flag", netcfg.NewSnapshot(links(true), tentative, nil, nil), []string{"2001:db8::1"}, false},
		{"a second place", netcfg.NewSnapshot(links(true), twice, nil, nil), []string{"192.0.2.1", "198.51.100.1"}, false},
		{"an interface", netcfg.NewSnapshot(links(false), at("192.0.2.1", "2001:db8::1"), nil, nil), nil, true},
		{"a route", netcfg.NewSnapshot(links(true), at("192.0.2.1", "2001:db8::1"), route, nil), nil, true},
	} {
		moved, more := c.now.Moved(base)
		var got []string
		for _, a := range moved {
			got = append(got, a.String())
		}
		if !slices.Equal(got, c.want) || more != c.more {
			t.Errorf("%s: %v, %v; want %v, %v", c.name, got, more, c.want, c.more)
		}
		if back, _ := base.Moved(c.now); !slices.Equal(back, moved) {
			t.Errorf("%s, the other way round: %v, want %v", c.name, back, moved)
		}
	}
	if _, more := base.Moved(nil); !more {
		t.Error("nothing differs from no snapshot")
	}
}
