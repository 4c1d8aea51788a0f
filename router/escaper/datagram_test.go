package escaper_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/selection"
)

// TestAssociationEndsWithEitherAddress: an association with a source in each
// family ends when either goes, and is not granted while either is gone.
func TestAssociationEndsWithEitherAddress(t *testing.T) {
	gone := errors.New("gone")
	for _, which := range []string{"127.0.0.11", "::1"} {
		d := direct(t, escaper.Options{Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.11"), V6: addr("::1"), Weight: 1}}})
		p, err := door(t, d).OpenPacket(t.Context(), &escaper.Request{Escaper: "out"})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range []selection.Family{selection.V4, selection.V6} {
			if !p.Source(f).IsValid() {
				t.Errorf("no source for %s", f)
			}
		}
		told := make(chan error, 1)
		p.OnKill(func(err error) { told <- err })
		path := d.Paths()[0]
		if n := path.Kill(netip.MustParsePrefix("127.0.0.12/32"), gone); n != 0 {
			t.Errorf("another address ends %d", n)
		}
		a := addr(which)
		path.SetFamilyState(selection.FamilyOf(a), escaper.Down, "gone")
		if n := path.Kill(netip.PrefixFrom(a, a.BitLen()), gone); n != 1 {
			t.Errorf("%s ends %d associations", a, n)
		}
		select {
		case err := <-told:
			if !errors.Is(err, gone) {
				t.Errorf("%s: %v", a, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: nobody was told", a)
		}
		if err := p.Close(); err != nil {
			t.Errorf("%s: close: %v", a, err)
		}
		if n := path.Counters().Open; n != 0 {
			t.Errorf("%s: %d are open", a, n)
		}
	}
}
