//go:build !race

package auth

import "testing"

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
