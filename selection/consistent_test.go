package selection_test

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"wayout/selection"
)

func placeKeys(t testing.TB, p *selection.Pool, n int) []int {
	t.Helper()
	at := make([]int, n)
	for k := range at {
		at[k] = mustPick(t, p, uint64(k))
	}
	return at
}

func TestJumpShares(t *testing.T) {
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{3}, 16),
		"unequal": {1, 2, 3, 0, 10, 1, 100},
		"many":    unequal(100, 9),
		"heavy":   {65535, 1, 40000, 0, 65535},
	} {
		t.Run(name, func(t *testing.T) {
			sharesByWeight(t, selection.Jump, weights)
		})
	}
}

// When the last node goes, only its keys move, spread over the rest by weight;
// when another goes, the keys of the nodes before it stay. They all come back.
func TestJumpDisturbance(t *testing.T) {
	const keys = 8_000
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{1}, 10),
		"unequal": {4, 1, 3, 0, 2, 7, 1, 4},
		"common":  {4, 2, 6, 2, 1}, // without the last, the weights have a divisor
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, selection.Options{Policy: selection.Jump}, weighted(weights...)...)
			before := placeKeys(t, p, keys)
			for down := range weights {
				p.SetUsable(down, 0)
				p.Publish()
				to := make([]int, len(weights))
				for k, at := range placeKeys(t, p, keys) {
					switch {
					case at == down:
						t.Fatalf("node %d is down and was picked", down)
					case before[k] == down:
						to[at]++
					case before[k] < down && at != before[k]:
						t.Fatalf("node %d down: key %d went from %d to %d", down, k, before[k], at)
					}
				}
				if down == len(weights)-1 {
					rest := slices.Clone(weights)
					rest[down] = 0
					chiSquare(t, to, rest)
				}
				p.SetUsable(down, selection.V4)
				p.Publish()
			}
			if !slices.Equal(placeKeys(t, p, keys), before) {
				t.Error("keys did not return")
			}
		})
	}
}

// A node added at the end draws its share of the keys, and no key moves between
// the others.
func TestJumpGrowth(t *testing.T) {
	const keys = 20_000
	weights := []uint16{1, 2, 1, 3, 1, 1, 2, 4}
	before := placeKeys(t, newPool(t, selection.Options{Policy: selection.Jump}, weighted(weights[:1]...)...), keys)
	for n := 2; n <= len(weights); n++ {
		p := newPool(t, selection.Options{Policy: selection.Jump}, weighted(weights[:n]...)...)
		after := placeKeys(t, p, keys)
		counts := make([]int, n)
		for k, at := range after {
			if at != before[k] && at != n-1 {
				t.Fatalf("%d nodes: key %d went from %d to %d", n, k, before[k], at)
			}
			counts[at]++
		}
		chiSquare(t, counts, weights[:n])
		before = after
	}
}

// points returns the number of points that a node's weight gives it.
func points(weights []uint16, i int) float64 {
	sum, n := 0, 0
	for _, w := range weights {
		sum += int(w)
		n += int(min(w, 1))
	}
	return 160 * float64(n) * float64(weights[i]) / float64(sum)
}

// Shares are those of the weights, to within the chance of the points: with n
// of them a share is off by a part of 1/sqrt(n) on average, and here by six
// times that and the rounding of n at most.
func ketamaShares(t *testing.T, counts []int, weights []uint16) {
	t.Helper()
	total, sum := 0, 0
	for i, n := range counts {
		total += n
		sum += int(weights[i])
	}
	for i, n := range counts {
		if weights[i] == 0 {
			if n != 0 {
				t.Errorf("node %d of weight 0: picked %d times", i, n)
			}
			continue
		}
		want := float64(total) * float64(weights[i]) / float64(sum)
		part := 6/math.Sqrt(points(weights, i)) + 0.5/points(weights, i)
		if bound := part*want + 6*math.Sqrt(want); math.Abs(float64(n)-want) > bound {
			t.Errorf("node %d of weight %d: %d picks, want %.0f to within %.0f", i, weights[i], n, want, bound)
		}
	}
}

func TestKetamaShares(t *testing.T) {
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{3}, 16),
		"two":     {1, 3},
		"unequal": {1, 2, 3, 0, 10, 1, 20},
		"many":    unequal(100, 9),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, selection.Options{Policy: selection.Ketama}, weighted(weights...)...)
			sequential, users := make([]int, len(weights)), make([]int, len(weights))
			for k := range uint64(50_000) {
				sequential[mustPick(t, p, k)]++
				users[mustPick(t, p, selection.KeyString(fmt.Sprint("user", k)))]++
			}
			ketamaShares(t, sequential, weights)
			ketamaShares(t, users, weights)
		})
	}
}

// Taking a node down moves its keys and no others, its share of all, each to
// one of several nodes, and they return with it.
func TestKetamaDisturbance(t *testing.T) {
	const keys = 8_000
	for name, weights := range map[string][]uint16{
		"equal":   slices.Repeat([]uint16{1}, 20),
		"unequal": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, selection.Options{Policy: selection.Ketama}, weighted(weights...)...)
			before := placeKeys(t, p, keys)
			moved := make([]int, len(weights))
			for down := range weights {
				p.SetUsable(down, 0)
				p.Publish()
				heirs := map[int]bool{}
				for k, at := range placeKeys(t, p, keys) {
					switch {
					case at == down:
						t.Fatalf("node %d is down and was picked", down)
					case before[k] == down:
						heirs[at] = true
						moved[down]++
					case at != before[k]:
						t.Fatalf("node %d down: key %d went from %d to %d", down, k, before[k], at)
					}
				}
				if len(heirs) < 5 {
					t.Errorf("node %d down: its keys went to %v only", down, heirs)
				}
				p.SetUsable(down, selection.V4)
				p.Publish()
			}
			ketamaShares(t, moved, weights)
			if !slices.Equal(placeKeys(t, p, keys), before) {
				t.Error("keys did not return")
			}
		})
	}
}

// A key's node depends on IDs and weights, not on the order of the nodes; and a
// new node of the mean weight takes keys and moves no others.
func TestKetamaReload(t *testing.T) {
	const keys = 5_000
	nodes := manyNodes(11)
	turned := slices.Clone(nodes)
	slices.Reverse(turned)
	full := newPool(t, selection.Options{Policy: selection.Ketama}, nodes...)
	fewer := newPool(t, selection.Options{Policy: selection.Ketama}, nodes[:10]...)
	other := newPool(t, selection.Options{Policy: selection.Ketama}, turned...)
	for k := range uint64(keys) {
		i, j, o := mustPick(t, full, k), mustPick(t, fewer, k), mustPick(t, other, k)
		if nodes[i].ID != turned[o].ID {
			t.Fatalf("key %d: %s and, in the other order, %s", k, nodes[i].ID, turned[o].ID)
		}
		if i != j && i != 10 {
			t.Fatalf("key %d went from %d to %d when node 10 came", k, j, i)
		}
	}
}

// A weight too small for a point still has one, and a large pool has a smaller
// ring: all nodes take part.
func TestKetamaExtremes(t *testing.T) {
	p := newPool(t, selection.Options{Policy: selection.Ketama}, weighted(65535, 1)...)
	counts := make([]int, 2)
	for k := range uint64(50_000) {
		counts[mustPick(t, p, k)]++
	}
	if counts[1] == 0 || counts[1] > 50_000/20 {
		t.Errorf("%d picks of the light node", counts[1])
	}
	const n = 7_000
	p = newPool(t, selection.Options{Policy: selection.Ketama}, manyNodes(n)...)
	seen := make([]bool, n)
	for k := range uint64(30 * n) {
		seen[mustPick(t, p, k)] = true
	}
	if i := slices.Index(seen, false); i >= 0 {
		t.Errorf("node %d was never picked", i)
	}
}

// Where keys go is part of what users see: it must be the same in every
// version, and does not change by publishing what is so already.
func TestConsistentStable(t *testing.T) {
	for policy, want := range map[selection.Policy]string{selection.Jump: "3430432335", selection.Ketama: "3330535332"} {
		p := newPool(t, selection.Options{Policy: policy}, weighted(1, 1, 2, 5, 1, 3)...)
		for range 2 {
			var got strings.Builder
			for _, key := range []uint64{
				0, 1, 1 << 63, selection.KeyString(""), selection.KeyString("alice"), selection.KeyString("bob"), selection.KeyString("example.net"),
				selection.KeyAddr(addr("192.0.2.1")), selection.KeyAddr(addr("192.0.2.2")), selection.KeyAddr(addr("2001:db8::1")),
			} {
				fmt.Fprintf(&got, "%d", mustPick(t, p, key))
			}
			if got.String() != want {
				t.Errorf("%v: nodes %s, want %s", policy, got.String(), want)
			}
			p.Publish()
		}
	}
}
