//go:build !race

package auth

import (
	"net/netip"
	"testing"
)

// Under the race detector a sync.Pool forgets on purpose, so that this is for other builds.
func TestCachedVerifyDoesNotAllocate(t *testing.T) {
	g := testGroup(t, Options{})
	ctx := t.Context()
	if _, err := g.Verify(ctx, "alice", "secret"); err != nil {
		t.Fatal(err)
	}
	n := testing.AllocsPerRun(1000, func() {
		if _, err := g.Verify(ctx, "alice", "secret"); err != nil {
			t.Fatal(err)
		}
	})
	if n >= 1 { // a collection may empty the pool once
		t.Fatalf("%v allocations in a hit", n)
	}
}

func TestParseBasicAllocatesTheTextAlone(t *testing.T) {
	n := testing.AllocsPerRun(1000, func() {
		if _, _, err := ParseBasic("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="); err != nil {
			t.Fatal(err)
		}
	})
	if n > 1 {
		t.Fatalf("%v allocations, want one for name and password", n)
	}
}

func TestNetworksAndMetersDoNotAllocate(t *testing.T) {
	g, err := NewGroup("team", []Credential{
		{User: User{Name: "cam", From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}}},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	m := NewMeter(Limits{Connections: 10, Rate: 1e9, Burst: 1e9}, nil)
	v4, v6 := netip.MustParseAddr("::ffff:10.1.2.3"), netip.MustParseAddr("2001:db8::1")
	n := testing.AllocsPerRun(1000, func() {
		for _, a := range [...]netip.Addr{v4, v6} {
			if u := g.From(a); u == nil || !Allows(u, a) {
				t.Fatal(a)
			}
		}
		if err := m.Begin(); err != nil {
			t.Fatal(err)
		}
		m.End()
	})
	if n != 0 {
		t.Fatalf("%v allocations", n)
	}
}
