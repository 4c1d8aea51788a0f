package selection_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/selection"
)

// manyNodes returns n IPv4 nodes n0, n1... of weight 1.
func manyNodes(n int) []selection.Node {
	nodes := make([]selection.Node, n)
	for i := range nodes {
		nodes[i] = selection.Node{
			ID:     fmt.Sprintf("n%d", i),
			V4:     netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}),
			Weight: 1,
		}
	}
	return nodes
}

func weighted(weights ...uint16) []selection.Node {
	nodes := manyNodes(len(weights))
	for i, w := range weights {
		nodes[i].Weight = w
	}
	return nodes
}

// unequal returns n weights from 0 to most, always the same ones.
func unequal(n int, most uint16) []uint16 {
	r := rand.New(rand.NewPCG(1, 2))
	w := make([]uint16, n)
	for i := range w {
		w[i] = uint16(r.UintN(uint(most) + 1))
	}
	return w
}

func seeded() func() uint64 { return rand.NewPCG(3, 4).Uint64 }

func mustPick(t testing.TB, p *selection.Pool, key uint64) int {
	t.Helper()
	i, err := p.Pick(selection.V4, key)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// chiSquare fails when counts are further from the weights than chance brings
// them once in some millions: chi-square against its mean plus six deviations.
func chiSquare(t *testing.T, counts []int, weights []uint16) {
	t.Helper()
	total, sum := 0, 0
	for i, n := range counts {
		total += n
		sum += int(weights[i])
	}
	var chi, df float64
	for i, n := range counts {
		if weights[i] == 0 {
			if n != 0 {
				t.Errorf("node %d of weight 0: picked %d times", i, n)
			}
			continue
		}
		want := float64(total) * float64(weights[i]) / float64(sum)
		chi += (float64(n) - want) * (float64(n) - want) / want
		df++
	}
	df--
	if bound := df + 6*math.Sqrt(2*df) + 12; chi > bound {
		t.Errorf("chi-square %.1f over %.0f degrees, bound %.1f; counts %v", chi, df, bound, counts[:min(len(counts), 16)])
	}
}

func TestRandomShares(t *testing.T) {
	for name, weights := range map[string][]uint16{
		"equal":   {1, 1, 1, 1, 1, 1, 1},
		"two":     {1, 3},
		"zero":    {0, 5, 0, 1, 2},
		"extreme": {65535, 1, 1000, 30},
		"many":    unequal(1000, 9),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, selection.Options{Rand: seeded()}, weighted(weights...)...)
			counts := make([]int, len(weights))
			for range 100_000 {
				counts[mustPick(t, p, 0)]++
			}
			chiSquare(t, counts, weights)
		})
	}
}

// With random numbers that are evenly spaced and not random at all, each share
// is right to within the number of pieces that its range lies in.
func TestRandomExact(t *testing.T) {
	const draws = 1 << 18
	for name, weights := range map[string][]uint16{
		"few":     {5, 1, 1},
		"extreme": {1, 65535, 2, 40000},
		"many":    unequal(200, 65535),
	} {
		t.Run(name, func(t *testing.T) {
			var next uint64
			p := newPool(t, selection.Options{Rand: func() uint64 {
				next += 1 << 64 / draws
				return next
			}}, weighted(weights...)...)
			counts := make([]int, len(weights))
			sum := 0
			for i := range weights {
				sum += int(weights[i])
			}
			for range draws {
				counts[mustPick(t, p, 0)]++
			}
			for i, n := range counts {
				want := float64(draws) * float64(weights[i]) / float64(sum)
				if math.Abs(float64(n)-want) > float64(len(weights)) {
					t.Errorf("node %d of weight %d: %d picks, want %.1f", i, weights[i], n, want)
				}
			}
		})
	}
}

// The generator that is used when none is given works, too.
func TestRandomDefault(t *testing.T) {
	p := newPool(t, selection.Options{}, manyNodes(4)...)
	if got := picks(t, p, selection.V4); got != "0 1 2 3" { // misses one with a chance of 1e-49
		t.Errorf("picks %s", got)
	}
}

func sequence(t *testing.T, p *selection.Pool, n int) string {
	t.Helper()
	var b strings.Builder
	for range n {
		b.WriteByte(byte('a' + mustPick(t, p, 0)))
	}
	return b.String()
}

func TestRoundRobinSequence(t *testing.T) {
	for _, c := range []struct {
		weights []uint16
		want    string
	}{
		{[]uint16{1}, "aaaa"},
		{[]uint16{1, 1, 1}, "abcabcabc"},
		{[]uint16{7, 7, 7, 7}, "abcdabcd"},
		{[]uint16{2, 1}, "abaaba"},
		{[]uint16{5, 1, 1}, "aabacaaaabacaa"},
		{[]uint16{50, 10, 10}, "aabacaaaabacaa"},
		{[]uint16{2, 1, 1}, "abcaabca"},
		{[]uint16{1, 0, 1}, "acacac"},
		{[]uint16{4, 2, 0, 1}, "abadabaabadaba"},
	} {
		p := newPool(t, selection.Options{Policy: selection.RoundRobin}, weighted(c.weights...)...)
		if got := sequence(t, p, len(c.want)); got != c.want {
			t.Errorf("weights %v: %s, want %s", c.weights, got, c.want)
		}
	}
}

func TestRoundRobinState(t *testing.T) {
	p := newPool(t, selection.Options{Policy: selection.RoundRobin}, manyNodes(4)...)
	got := sequence(t, p, 5)
	p.Publish() // no change: the round goes on
	got += sequence(t, p, 3)
	if want := "abcdabcd"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	p.SetUsable(1, 0)
	p.Publish()
	if got := sequence(t, p, 6); strings.Count(got, "a") != 2 || strings.Count(got, "c") != 2 || strings.Count(got, "d") != 2 {
		t.Errorf("without b: %s", got)
	}
	// Targets of one family and of both take turns in one round.
	p.SetUsable(1, selection.V4)
	p.Publish()
	seen := map[int]int{}
	for i := range 8 {
		n, err := p.Pick(selection.V4|selection.Family(i%2)*selection.V6, 0)
		if err != nil {
			t.Fatal(err)
		}
		seen[n]++
	}
	for i := range 4 {
		if seen[i] != 2 {
			t.Errorf("node %d was picked %d times of 8", i, seen[i])
		}
	}
}

// One round gives every node exactly its weight, evenly spread, whether the
// sequence is laid out or walked.
func TestRoundRobinShares(t *testing.T) {
	for name, weights := range map[string][]uint16{
		"laid out":       {5, 1, 3, 9, 0, 2},
		"laid out, many": unequal(500, 6),
		"walked":         unequal(3000, 3),
		"walked, heavy":  {65535, 1, 2, 30011, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18},
		"walked, common": {60000, 20, 40, 30020, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20, 50000, 50000, 50000, 50000, 50000, 50000},
		"two":            {65535, 65534},
	} {
		t.Run(name, func(t *testing.T) {
			sum, div := 0, 0
			for _, w := range weights {
				sum += int(w)
				for a, b := int(w), div; ; a, b = b, a%b {
					if b == 0 {
						div = a
						break
					}
				}
			}
			sum /= div
			p := newPool(t, selection.Options{Policy: selection.RoundRobin}, weighted(weights...)...)
			for round := range 2 {
				counts, last := make([]int, len(weights)), make([]int, len(weights))
				for k := range sum {
					i := mustPick(t, p, 0)
					if counts[i]++; counts[i] > 1 {
						mean := float64(sum*div) / float64(weights[i])
						if gap := k - last[i]; float64(gap) > 3*mean+1 {
							t.Fatalf("node %d of weight %d: %d picks apart, %.1f on average", i, weights[i], gap, mean)
						}
					}
					last[i] = k
				}
				for i, n := range counts {
					if n != int(weights[i])/div {
						t.Errorf("round %d: node %d of weight %d: %d picks of %d", round, i, weights[i], n, sum)
					}
				}
			}
		})
	}
}

func TestSerial(t *testing.T) {
	nodes := manyNodes(4)
	nodes[0].Weight = 0
	nodes[3].Weight = 100
	p := newPool(t, selection.Options{Policy: selection.Serial}, nodes...)
	for _, step := range []struct{ down, want int }{{0, 1}, {1, 2}, {2, 3}} {
		p.SetUsable(step.down, 0)
		p.Publish()
		for k := range uint64(10) {
			if got := mustPick(t, p, k); got != step.want {
				t.Fatalf("node %d down: picked %d, want %d", step.down, got, step.want)
			}
		}
	}
	p.SetUsable(1, selection.V4)
	p.Publish()
	if got := mustPick(t, p, 0); got != 1 {
		t.Errorf("node 1 is back: picked %d", got)
	}
}

func TestRendezvousShares(t *testing.T) {
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{3}, 16),
		"unequal": {1, 2, 3, 0, 10, 1, 100},
		"many":    unequal(100, 9),
	} {
		t.Run(name, func(t *testing.T) {
			sharesByWeight(t, selection.Rendezvous, weights)
		})
	}
}

// sharesByWeight has keys in a row, and those of addresses in a row, shared out by
// the weights.
func sharesByWeight(t *testing.T, policy selection.Policy, weights []uint16) {
	t.Helper()
	p := newPool(t, selection.Options{Policy: policy}, weighted(weights...)...)
	sequential, addrs := make([]int, len(weights)), make([]int, len(weights))
	for k := range uint64(50_000) {
		sequential[mustPick(t, p, k)]++
		a := netip.AddrFrom4([4]byte{192, byte(k >> 16), byte(k >> 8), byte(k)})
		addrs[mustPick(t, p, selection.KeyAddr(a))]++
	}
	chiSquare(t, sequential, weights)
	chiSquare(t, addrs, weights)
}

// Taking a node down moves its keys and no others, and they return with it.
func TestRendezvousDisturbance(t *testing.T) {
	const keys = 8_000
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{1}, 20),
		"unequal": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, selection.Options{Policy: selection.Rendezvous}, weighted(weights...)...)
			place := func() []int {
				at := make([]int, keys)
				for k := range at {
					at[k] = mustPick(t, p, uint64(k))
				}
				return at
			}
			before := place()
			for down := range weights {
				p.SetUsable(down, 0)
				p.Publish()
				to := make([]int, len(weights))
				for k, at := range place() {
					switch {
					case at == down:
						t.Fatalf("node %d is down and was picked", down)
					case before[k] == down:
						to[at]++
					case at != before[k]:
						t.Fatalf("node %d down: key %d went from %d to %d", down, k, before[k], at)
					}
				}
				rest := slices.Clone(weights)
				rest[down] = 0
				chiSquare(t, to, rest) // the keys that moved spread by weight
				p.SetUsable(down, selection.V4)
				p.Publish()
			}
			if !slices.Equal(place(), before) {
				t.Error("keys did not return")
			}
		})
	}
}

// A key's node depends on IDs and weights, not on the order of the nodes.
func TestRendezvousOrder(t *testing.T) {
	nodes := weighted(1, 2, 3, 1, 2, 3, 7)
	turned := slices.Clone(nodes)
	slices.Reverse(turned)
	a := newPool(t, selection.Options{Policy: selection.Rendezvous}, nodes...)
	b := newPool(t, selection.Options{Policy: selection.Rendezvous}, turned...)
	for k := range uint64(5000) {
		if i, j := mustPick(t, a, k), mustPick(t, b, k); nodes[i].ID != turned[j].ID {
			t.Fatalf("key %d: %s and %s", k, nodes[i].ID, turned[j].ID)
		}
	}
}

// Where keys go is part of what users see: it must be the same in every version.
func TestRendezvousStable(t *testing.T) {
	p := newPool(t, selection.Options{Policy: selection.Rendezvous}, weighted(1, 1, 2, 5, 1, 3)...)
	var got strings.Builder
	for _, key := range []uint64{
		0, 1, 1 << 63, selection.KeyString(""), selection.KeyString("alice"), selection.KeyString("bob"), selection.KeyString("example.net"),
		selection.KeyAddr(addr("192.0.2.1")), selection.KeyAddr(addr("192.0.2.2")), selection.KeyAddr(addr("2001:db8::1")),
	} {
		fmt.Fprintf(&got, "%d", mustPick(t, p, key))
	}
	if want := "1333305355"; got.String() != want {
		t.Errorf("nodes %s, want %s", got.String(), want)
	}
	if got, want := selection.KeyString("alice"), uint64(0x1a046f573e1e5475); got != want {
		t.Errorf("KeyString = %#x, want %#x", got, want)
	}
	if got, want := selection.KeyAddr(addr("192.0.2.1")), uint64(0xd0a2398e4643ddf4); got != want {
		t.Errorf("KeyAddr = %#x, want %#x", got, want)
	}
	if selection.KeyAddr(addr("192.0.2.1")) != selection.KeyAddr(addr("::ffff:192.0.2.1")) {
		t.Error("a mapped address has another key")
	}
}

func TestLeastConn(t *testing.T) {
	weights := []uint16{1, 2, 4, 1}
	p := newPool(t, selection.Options{Policy: selection.LeastConn, Rand: seeded()}, weighted(weights...)...)
	// Held connections end up in the weights' proportion, whatever the ties.
	for range 800 {
		p.Opened(mustPick(t, p, 0))
	}
	for i, w := range weights {
		if got, want := p.Open(i), int64(100*int(w)); got != want {
			t.Errorf("node %d of weight %d has %d open, want %d", i, w, got, want)
		}
	}
	p.Closed(1)
	if got := mustPick(t, p, 0); got != 1 {
		t.Errorf("picked %d, want 1: it has 199 of weight 2", got)
	}
	p.SetUsable(1, 0)
	p.Publish()
	p.Closed(3)
	p.Closed(2)
	if got := mustPick(t, p, 0); got != 3 {
		t.Errorf("picked %d, want 3: 99/1 is less than 399/4", got)
	}
}

func TestLeastConnTies(t *testing.T) {
	p := newPool(t, selection.Options{Policy: selection.LeastConn, Rand: seeded()}, manyNodes(12)...)
	p.Opened(0)
	p.Opened(5)
	weights := slices.Repeat([]uint16{1}, 12)
	weights[0], weights[5] = 0, 0 // busier than the rest
	counts := make([]int, 12)
	for range 100_000 {
		counts[mustPick(t, p, 0)]++
	}
	chiSquare(t, counts, weights)
}
