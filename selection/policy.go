package selection

import (
	"fmt"
	"math"
	"math/bits"
	"sync/atomic"
)

// Policy says which node carries a request that selects none.
type Policy uint8

// The policies. All skip nodes of weight 0.
const (
	// Random draws by weight: one random number and one table entry a pick,
	// whatever the number of nodes.
	Random Policy = iota
	// Serial takes the first usable node in the configured order.
	Serial
	// RoundRobin takes turns by weight. Each run of as many picks as the
	// weights (without their common divisor) add up to has every node exactly
	// as often as its weight says, and well spread. A pick is one atomic
	// addition and at most one binary search. See table.
	RoundRobin
	// Rendezvous hashes the key with each ID, by weight: when a node goes, only
	// its keys move, and they come back with it. A pick goes through all nodes,
	// at a few nanoseconds each.
	Rendezvous
	// LeastConn takes the node with the fewest open connections per weight,
	// ties at random. A pick goes through all usable nodes, at a few nanoseconds
	// each.
	LeastConn
	// Jump is jump consistent hashing over as many buckets as the weights of the
	// usable nodes add up to, a node's buckets in a row and the nodes in their
	// order. Shares are exact and a pick takes a step for each doubling of the
	// buckets, but only the end of the order is a good place for a change: when
	// the last node goes, only its keys move, and when one is added there, only
	// keys to it. When another goes, the keys of all nodes after it may move,
	// too; none of those before it do. IDs do not count.
	Jump
	// Ketama puts points of each node, hashed from its ID, on a ring, and takes
	// the node of the first point at or after the key: one binary search. When a
	// node goes, only its keys move, each to the next point, and they come back
	// with it. Shares are those of the weights but for chance: a node of n
	// points is off by a part of about 1/sqrt(n), and n is 160 for a node of
	// mean weight (less in pools of over 6,553 nodes), 1 at least. The mean is
	// that of all nodes, usable or not: state moves no point of another node;
	// a new configuration of another mean does move a few.
	Ketama

	policies // the number of them
)

// String returns the word that configurations use.
func (p Policy) String() string {
	switch p {
	case Random:
		return "random"
	case Serial:
		return "serial"
	case RoundRobin:
		return "round_robin"
	case Rendezvous:
		return "rendezvous"
	case LeastConn:
		return "least_conn"
	case Jump:
		return "jump"
	case Ketama:
		return "ketama"
	}
	return fmt.Sprintf("policy(%d)", uint8(p))
}

// ParsePolicy reads a policy's word.
func ParsePolicy(s string) (Policy, error) {
	for p := range policies {
		if p.String() == s {
			return p, nil
		}
	}
	return 0, fmt.Errorf("unknown policy %s, want random, serial, round_robin, rendezvous, jump, ketama or least_conn", quote(s))
}

// table is what a policy picks from: the members, and what is worked out from
// their weights so that a pick is short. It does not change once published,
// save for the ticket counter.
type table struct {
	members []int32

	columns []column // Random by unequal weights

	// RoundRobin. Equal weights go through members. Otherwise rounds holds the
	// whole smooth sequence where it is short, and where it is not, picks step
	// over the line of cumulated weights by a stride near the golden section of
	// its length and prime to it: each point of the line is visited once a
	// round, so shares are exact, and the visits of a node lie evenly apart.
	turn   *turn
	rounds []int32
	ends   []uint64 // of Jump, too: its buckets
	stride uint64

	ring ring // Ketama
}

// turn is a ticket counter on a cache line of its own.
type turn struct {
	next atomic.Uint64
	_    [56]byte
}

// column is one of the equally likely columns of an alias table: below cut (of
// 2^64) it stands for own, else for other.
type column struct {
	cut        uint64
	own, other int32
}

func (p *Pool) build(members []int32, tn *turn) *table {
	t := &table{members: members, turn: tn}
	if len(members) == 0 {
		return t
	}
	switch p.policy {
	case Random:
		if !p.equal(members) {
			t.columns = p.alias(members)
		}
	case RoundRobin:
		if !p.equal(members) {
			p.schedule(t)
		}
	case Jump:
		t.ends = p.cumulate(members, 1)
	case Ketama:
		t.ring = p.ring.only(members, len(p.ids))
	}
	return t
}

// equal reports whether all members weigh the same.
func (p *Pool) equal(members []int32) bool {
	for _, i := range members[1:] {
		if p.weights[i] != p.weights[members[0]] {
			return false
		}
	}
	return true
}

// alias builds Vose's alias table in whole numbers, so that no share is off by
// a rounding: weights times the number of columns against the sum of weights.
func (p *Pool) alias(members []int32) []column {
	n := len(members)
	var sum uint64
	for _, i := range members {
		sum += uint64(p.weights[i])
	}
	cols := make([]column, n)
	part := make([]uint64, n)
	small := make([]int32, 0, n)
	large := make([]int32, 0, n)
	for c, i := range members {
		cols[c] = column{own: i, other: i}
		part[c] = uint64(p.weights[i]) * uint64(n)
		if part[c] < sum {
			small = append(small, int32(c))
		} else {
			large = append(large, int32(c))
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		cols[s].other = members[l]
		cols[s].cut, _ = bits.Div64(part[s], 0, sum) // part/sum of 2^64
		part[l] -= sum - part[s]
		if part[l] < sum {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	return cols
}

// random turns 64 random bits into a member: the high half of their product
// with the number of columns is the column, the low half the height in it.
func (t *table) random(r uint64) int {
	if t.columns == nil {
		c, _ := bits.Mul64(r, uint64(len(t.members)))
		return int(t.members[c])
	}
	c, height := bits.Mul64(r, uint64(len(t.columns)))
	col := &t.columns[c]
	if height < col.cut {
		return int(col.own)
	}
	return int(col.other)
}

// maxSteps bounds the work that building a smooth sequence takes, members times
// length: about a millisecond.
const maxSteps = 1 << 20

// schedule prepares round robin by unequal weights.
func (p *Pool) schedule(t *table) {
	var sum, div uint64
	for _, i := range t.members {
		w := uint64(p.weights[i])
		sum += w
		div = gcd(div, w)
	}
	sum /= div
	if sum*uint64(len(t.members)) <= maxSteps {
		t.rounds = p.smooth(t.members, int64(sum), int64(div))
		return
	}
	t.ends = p.cumulate(t.members, div)
	t.stride = uint64(float64(sum) / math.Phi)
	for gcd(t.stride, sum) != 1 {
		t.stride++
	}
}

// cumulate returns the ends of the members' stretches on the line of their
// weights, each divided by div.
func (p *Pool) cumulate(members []int32, div uint64) []uint64 {
	ends := make([]uint64, len(members))
	var end uint64
	for k, i := range members {
		end += uint64(p.weights[i]) / div
		ends[k] = end
	}
	return ends
}

// memberAt returns the member whose stretch of the line of weights holds a
// point: the first whose end lies above it.
func (t *table) memberAt(point uint64) int {
	low, high := 0, len(t.ends)-1
	for low < high {
		mid := int(uint(low+high) >> 1)
		if t.ends[mid] > point {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return int(t.members[low])
}

// smooth returns one round of the smooth weighted sequence: at each step all
// members gain their weight, and the richest, the first of them on a tie, is
// taken and pays the sum.
func (p *Pool) smooth(members []int32, sum, div int64) []int32 {
	weight := make([]int64, len(members))
	for k, i := range members {
		weight[k] = int64(p.weights[i]) / div
	}
	credit := make([]int64, len(members))
	rounds := make([]int32, sum)
	for r := range rounds {
		best := 0
		for k, w := range weight {
			credit[k] += w
			if credit[k] > credit[best] {
				best = k
			}
		}
		credit[best] -= sum
		rounds[r] = members[best]
	}
	return rounds
}

func (t *table) roundRobin() int {
	ticket := t.turn.next.Add(1) - 1
	switch {
	case t.rounds != nil:
		return int(t.rounds[ticket%uint64(len(t.rounds))])
	case t.ends == nil:
		return int(t.members[ticket%uint64(len(t.members))])
	}
	sum := t.ends[len(t.ends)-1]
	hi, lo := bits.Mul64(ticket%sum, t.stride)
	return t.memberAt(bits.Rem64(hi, lo, sum))
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// leastConn goes through the members once. The k-th of equals takes the place
// of the one before it with a chance of 1/k, which makes all equally likely.
// Counters may move meanwhile; each is read once.
func (p *Pool) leastConn(t *table) int {
	best := t.members[0]
	open, weight := p.open[best].Load(), int64(p.weights[best])
	var ties, seed uint64 = 1, 0 // one random number serves all ties, mixed with their count
	for _, i := range t.members[1:] {
		o, w := p.open[i].Load(), int64(p.weights[i])
		switch a, b := o*weight, open*w; {
		case a < b:
			best, open, weight, ties = i, o, w, 1
		case a == b:
			if seed == 0 {
				seed = p.rand()
			}
			ties++
			if hit, _ := bits.Mul64(mix(seed+ties), ties); hit == 0 {
				best, open, weight = i, o, w
			}
		}
	}
	return int(best)
}
