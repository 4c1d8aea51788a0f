package selection

import (
	"cmp"
	"math"
	"slices"
)

// ranking is what weighted rendezvous hashing goes through: all nodes of weight
// above 0, usable or not, by weight and then position. It does not change.
type ranking struct {
	members []int32
	hashes  []uint64 // of the members' IDs
	classes []class
}

// class is a run of members of one weight, up to end.
type class struct {
	weight float64
	end    int
}

func rank(weights []uint16, hashes []uint64) ranking {
	var r ranking
	for i, w := range weights {
		if w > 0 {
			r.members = append(r.members, int32(i))
		}
	}
	slices.SortStableFunc(r.members, func(a, b int32) int { return cmp.Compare(weights[a], weights[b]) })
	r.hashes = make([]uint64, len(r.members))
	for k, i := range r.members {
		r.hashes[k] = hashes[i]
		w := float64(weights[i])
		if last := len(r.classes) - 1; last >= 0 && r.classes[last].weight == w {
			r.classes[last].end = k + 1
		} else {
			r.classes = append(r.classes, class{weight: w, end: k + 1})
		}
	}
	return r
}

// pick is weighted rendezvous hashing among the nodes of which may, by node,
// has a family in want; -1 when there is none. Each node draws a number u in
// (0, 1) from the key and its ID, and the least -ln(1-u)/weight wins: the first
// to come of clocks that run at the nodes' weights, hence exact shares, and a
// node's draw depends on nothing but the key and its own ID and weight. Within
// one weight the least u wins, so that a logarithm is needed only once a class,
// and there only when u, which it is never below, might win.
func (r *ranking) pick(key uint64, may []Family, want Family) int {
	key = mix(key)
	first, firstTime := -1, math.Inf(1)
	from := 0
	for ci := range r.classes {
		c := &r.classes[ci]
		best, least := -1, uint64(math.MaxUint64)
		for k, h := range r.hashes[from:c.end] {
			// What may be picked is looked up only for the few that win so far.
			if x := mix(key ^ h); (x < least || best < 0) && may[r.members[from+k]]&want != 0 {
				best, least = from+k, x
			}
		}
		from = c.end
		if best < 0 {
			continue
		}
		u := (float64(least) + 0.5) / (1 << 64)
		if u/c.weight >= firstTime {
			continue
		}
		if time := -math.Log1p(-u) / c.weight; time < firstTime {
			first, firstTime = int(r.members[best]), time
		}
	}
	return first
}

// jump is the jump consistent hash of Lamping and Veach. The key's bucket jumps
// ahead as buckets are added one by one; a generator seeded with the key draws
// the next jump directly. The last jump that stays below the number of buckets
// counts. Numbers are floating because a jump may exceed 64 bits.
func (t *table) jump(key uint64) int {
	key = mix(key)
	buckets := float64(t.ends[len(t.ends)-1])
	bucket, next := 0.0, 0.0
	for next < buckets {
		bucket = next
		key = key*2862933555777941757 + 1
		draw := float64(key>>33+1) / (1 << 31) // in (0, 1]
		next = math.Floor((bucket + 1) / draw)
	}
	return t.memberAt(uint64(bucket))
}

// ring is the points of Ketama, ascending, and the node of each.
type ring struct {
	points []uint64
	nodes  []int32
}

const (
	meanPoints = 160     // of a node of mean weight
	maxPoints  = 1 << 20 // of a ring, about: 12 MiB
)

// newRing places the points of all nodes of weight above 0. The k-th point of a
// node depends on nothing but its ID: another weight or mean adds or takes the
// last ones.
func newRing(weights []uint16, hashes []uint64) ring {
	var sum, n uint64
	for _, w := range weights {
		sum += uint64(w)
		n += uint64(min(w, 1))
	}
	type point struct {
		at   uint64
		node int32
	}
	total := min(n*meanPoints, maxPoints)
	all := make([]point, 0, total+n)
	for i, w := range weights {
		if w == 0 {
			continue
		}
		own := max((uint64(w)*total+sum/2)/sum, 1)
		for k := range own {
			all = append(all, point{at: mix(hashes[i] ^ mix(k)), node: int32(i)})
		}
	}
	slices.SortFunc(all, func(a, b point) int {
		if a.at == b.at {
			return cmp.Compare(a.node, b.node)
		}
		return cmp.Compare(a.at, b.at)
	})
	r := ring{points: make([]uint64, len(all)), nodes: make([]int32, len(all))}
	for k, p := range all {
		r.points[k], r.nodes[k] = p.at, p.node
	}
	return r
}

// only returns the ring with the points of the members alone, of so many nodes.
func (r ring) only(members []int32, nodes int) ring {
	in := make([]bool, nodes)
	for _, i := range members {
		in[i] = true
	}
	n := 0
	for _, i := range r.nodes {
		if in[i] {
			n++
		}
	}
	if n == len(r.nodes) {
		return r
	}
	part := ring{points: make([]uint64, 0, n), nodes: make([]int32, 0, n)}
	for k, i := range r.nodes {
		if in[i] {
			part.points = append(part.points, r.points[k])
			part.nodes = append(part.nodes, i)
		}
	}
	return part
}

// pick returns the node of the first point at or after the key's, going round.
func (r ring) pick(key uint64) int {
	k, _ := slices.BinarySearch(r.points, mix(key))
	if k == len(r.points) {
		k = 0
	}
	return int(r.nodes[k])
}
