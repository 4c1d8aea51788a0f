package selection_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"wayout/selection"
)

// A session's key is part of what users see: it must be the same in every
// version. And no two sessions may run into each other.
func TestKeySession(t *testing.T) {
	if got, want := selection.KeySession("alice", "out", "s1", 0), uint64(0xe6adac589a1deff0); got != want {
		t.Errorf("KeySession = %#x, want %#x", got, want)
	}
	if got, want := selection.KeySession("", "", "", 1<<63), uint64(0xa58e1e0f9566d87); got != want {
		t.Errorf("KeySession = %#x, want %#x", got, want)
	}
	seen := map[uint64]string{}
	for _, s := range [][3]string{
		{"", "", ""},
		{"a", "", ""},
		{"", "a", ""},
		{"", "", "a"},
		{"a", "b", "c"},
		{"ab", "", "c"},
		{"a", "bc", ""},
		{"", "abc", ""},
		{"abc", "", ""},
		{"a\x00", "b", "c"},
		{"a", "\x00b", "c"},
		{"a", "b\x00\x00\x00\x00\x00\x00\x00\x01", "c"},
	} {
		for generation := range uint64(3) {
			key, name := selection.KeySession(s[0], s[1], s[2], generation<<(generation*20)), fmt.Sprintf("%q %d", s, generation)
			if other, dup := seen[key]; dup {
				t.Errorf("%s and %s have one key", name, other)
			}
			seen[key] = name
		}
	}
}

func pickSession(t testing.TB, p *selection.Pool, name string, strict bool) int {
	t.Helper()
	i, err := p.PickSession(selection.V4, selection.KeySession("alice", "out", name, 0), strict)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func placeSessions(t *testing.T, p *selection.Pool, n int, strict bool) []int {
	t.Helper()
	at := make([]int, n)
	for k := range at {
		at[k] = pickSession(t, p, fmt.Sprint(k), strict)
	}
	return at
}

func TestSessionShares(t *testing.T) {
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{1}, 16),
		"unequal": {1, 2, 3, 0, 10, 1, 100},
		"many":    unequal(100, 9),
	} {
		for _, strict := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/strict=%v", name, strict), func(t *testing.T) {
				p := newPool(t, selection.Options{}, weighted(weights...)...)
				counts := make([]int, len(weights))
				for _, at := range placeSessions(t, p, 30_000, strict) {
					counts[at]++
				}
				chiSquare(t, counts, weights)
			})
		}
	}
}

// Under every policy, a path that goes down moves its own sessions, 1/N of all
// where weights are equal, spread over the rest by weight; and they come back.
func TestSessionDisturbance(t *testing.T) {
	const sessions = 2_000
	for _, policy := range allPolicies() {
		for name, weights := range map[string][]uint16{
			"equal":   slices.Repeat([]uint16{1}, 10),
			"unequal": {1, 2, 3, 4, 5, 1, 2, 3, 4, 5},
		} {
			t.Run(policy.String()+"/"+name, func(t *testing.T) {
				p := newPool(t, selection.Options{Policy: policy}, weighted(weights...)...)
				before := placeSessions(t, p, sessions, false)
				moved := make([]int, len(weights))
				for down := range weights {
					p.SetUsable(down, 0)
					p.Publish()
					to := make([]int, len(weights))
					for k, at := range placeSessions(t, p, sessions, false) {
						switch {
						case at == down:
							t.Fatalf("node %d is down and was picked", down)
						case before[k] == down:
							to[at]++
							moved[down]++
						case at != before[k]:
							t.Fatalf("node %d down: session %d went from %d to %d", down, k, before[k], at)
						}
					}
					rest := slices.Clone(weights)
					rest[down] = 0
					chiSquare(t, to, rest)
					p.SetUsable(down, selection.V4)
					p.Publish()
				}
				chiSquare(t, moved, weights) // 1/N, or what the weights say
				if !slices.Equal(placeSessions(t, p, sessions, false), before) {
					t.Error("sessions did not return")
				}
			})
		}
	}
}

// The policy rendezvous and sessions share one hash: a key has one node.
func TestSessionIsRendezvous(t *testing.T) {
	p := newPool(t, selection.Options{Policy: selection.Rendezvous}, weighted(1, 2, 3, 1, 0, 5)...)
	for k := range uint64(1000) {
		i, err := p.PickSession(selection.V4, k, false)
		if want := mustPick(t, p, k); err != nil || i != want {
			t.Fatalf("PickSession(%d) = %d, %v, want %d", k, i, err, want)
		}
	}
}

// A strict session has its node whatever is up, and fails rather than move.
func TestSessionStrict(t *testing.T) {
	const sessions = 1_000
	p := newPool(t, selection.Options{}, weighted(1, 2, 3, 0, 4)...)
	before := placeSessions(t, p, sessions, true)
	if !slices.Equal(before, placeSessions(t, p, sessions, false)) {
		t.Error("with all nodes up, strict sessions are elsewhere")
	}
	const down = 2
	p.SetUsable(down, 0)
	p.Publish()
	refused := 0
	for k, want := range before {
		i, err := p.PickSession(selection.V4, selection.KeySession("alice", "out", fmt.Sprint(k), 0), true)
		switch {
		case want == down:
			if !errors.Is(err, selection.ErrDown) || err.Error() != `path "n2", which the session is bound to, is not up for IPv4` {
				t.Fatalf("session %d of a node that is down: %d, %v", k, i, err)
			}
			refused++
		case err != nil || i != want:
			t.Fatalf("session %d: %d, %v, want %d", k, i, err, want)
		}
	}
	if refused == 0 {
		t.Error("no session was on the node")
	}
}

// Strict sessions count what was given, the others what is usable, family by
// family.
func TestSessionFamilies(t *testing.T) {
	const v4, v6, both = selection.V4, selection.V6, selection.V4 | selection.V6
	p := newPool(t, selection.Options{},
		node("four", "192.0.2.1", ""), node("six", "", "2001:db8::1"), node("dual", "192.0.2.2", "2001:db8::2"), prefixNode("net", "", "2001:db8:1::/64"))
	seen := func(want selection.Family, strict bool) string {
		at := map[string]bool{}
		for k := range uint64(200) {
			if i, err := p.PickSession(want, k, strict); err != nil {
				at[selection.Result(err)] = true
			} else {
				at[fmt.Sprint(i)] = true
			}
		}
		var s []string
		for word := range at {
			s = append(s, word)
		}
		slices.Sort(s)
		return strings.Join(s, " ")
	}
	expect := func(step string, want selection.Family, loose, strict string) {
		t.Helper()
		if got := seen(want, false); got != loose {
			t.Errorf("%s: for %v: %s, want %s", step, want, got, loose)
		}
		if got := seen(want, true); got != strict {
			t.Errorf("%s: strict for %v: %s, want %s", step, want, got, strict)
		}
	}
	expect("all up", v4, "0 2", "0 2")
	expect("all up", v6, "1 2 3", "1 2 3")
	expect("all up", both, "0 1 2 3", "0 1 2 3")
	expect("all up", 0, "family", "family")
	p.SetUsable(2, v6)
	p.Publish()
	expect("dual lost IPv4", v4, "0", "0 down")
	expect("dual lost IPv4", both, "0 1 2 3", "0 1 2 3")
	p.SetUsable(0, 0)
	p.Publish()
	expect("no IPv4", v4, "down", "down")
	expect("no IPv4", both, "1 2 3", "1 2 3 down")

	p = newPool(t, selection.Options{}, node("four", "192.0.2.1", ""))
	expect("never IPv6", v6, "family", "family")
	zero := node("zero", "192.0.2.1", "")
	zero.Weight = 0
	p = newPool(t, selection.Options{}, zero)
	expect("weight 0 only", v4, "down", "down")
	p = newPool(t, selection.Options{})
	expect("no nodes", v4, "down", "down")
}

func TestSessionAllocs(t *testing.T) {
	nodes := manyNodes(300)
	nodes[7].Weight = 9
	p := newPool(t, selection.Options{}, nodes...)
	p.SetUsable(3, 0)
	p.Publish()
	var generation uint64
	n := testing.AllocsPerRun(100, func() {
		generation++
		key := selection.KeySession("alice", "out", "s", generation)
		if i, err := p.PickSession(selection.V4, key, false); err != nil || i == 3 {
			t.Fatalf("PickSession = %d, %v", i, err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
	n = testing.AllocsPerRun(100, func() {
		if _, err := p.PickSession(selection.V4, 5, true); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("strict: %v allocations", n)
	}
}

// Sessions beside a writer: a node that is down all the while is never picked.
func TestPublishWhilePickingSessions(t *testing.T) {
	p := newPool(t, selection.Options{}, manyNodes(8)...)
	const dead, flapping = 0, 1
	p.SetUsable(dead, 0)
	p.Publish()
	done := make(chan struct{})
	var wg sync.WaitGroup
	for g := range uint64(2) {
		wg.Go(func() {
			for k := g; ; k += 2 {
				select {
				case <-done:
					return
				default:
				}
				if i, err := p.PickSession(selection.V4, k, false); err != nil || i == dead {
					t.Errorf("PickSession = %d, %v", i, err)
					return
				}
				if i, err := p.PickSession(selection.V4, k, true); err == nil && i == dead || err != nil && !errors.Is(err, selection.ErrDown) {
					t.Errorf("strict PickSession = %d, %v", i, err)
					return
				}
			}
		})
	}
	for i := range 500 {
		p.SetUsable(flapping, selection.Family(i)&selection.V4)
		p.Publish()
	}
	close(done)
	wg.Wait()
}
