package selection

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
)

// Node is one thing that an escaper may choose.
type Node struct {
	ID     string
	V4, V6 netip.Addr // the zero Addr: none of that family

	// Unbound are families that the node serves without an address of its own:
	// those of a bare interface or of a next escaper. 0 for a node that serves
	// only the families of its addresses.
	Unbound Family

	// Weight is the node's share when a policy picks; 0 means never by policy,
	// still by selection.
	Weight uint16
}

func (n *Node) given() Family { return FamilyOf(n.V4) | FamilyOf(n.V6) | n.Unbound&(V4|V6) }

// Options says how a Pool selects and picks.
type Options struct {
	Policy      Policy
	StrictIndex bool // an index out of 1 to Len is an error and does not wrap

	// Rand returns 64 random bits; it must be safe for concurrent use. nil is
	// math/rand/v2's generator.
	Rand func() uint64
}

// Pool holds the nodes of one escaper. Resolve finds the node that a selection
// names, Pick the one that the policy takes. Both may be called by any number
// of goroutines, beside SetUsable and Publish; they take no lock and, unless
// they fail, allocate nothing.
type Pool struct {
	nodes   []Node
	weights []uint16
	hashes  []uint64 // of the IDs
	byWt    []int32  // the nodes by weight, then position
	byID    map[string]int32
	byAddr  map[netip.Addr]int32
	given   Family // what any node has
	policy  Policy
	strict  bool
	rand    func() uint64

	mu     sync.Mutex // for usable; never taken by Pick
	usable []Family

	tables atomic.Pointer[[wants]*table]
	turns  [wants]turn // round robin's tickets, by what is wanted; they outlive tables
	open   []atomic.Int64
}

// wants is the number of sets of families; a Family indexes arrays of it.
const wants = int(V4|V6) + 1

// NewPool returns a pool of these nodes, in this order, of which none is usable
// until SetUsable and Publish say so. It may be empty. Errors: an empty or
// duplicate ID, an ID that is another node's address, one address on two nodes,
// an address in the wrong family's place or with a zone, an unknown policy.
func NewPool(nodes []Node, o Options) (*Pool, error) {
	if o.Policy >= policies {
		return nil, fmt.Errorf("make pool: unknown policy %d", o.Policy)
	}
	p := &Pool{
		nodes:   slices.Clone(nodes),
		weights: make([]uint16, len(nodes)),
		hashes:  make([]uint64, len(nodes)),
		byWt:    make([]int32, len(nodes)),
		byID:    make(map[string]int32, len(nodes)),
		byAddr:  make(map[netip.Addr]int32, len(nodes)),
		policy:  o.Policy,
		strict:  o.StrictIndex,
		rand:    o.Rand,
		usable:  make([]Family, len(nodes)),
		open:    make([]atomic.Int64, len(nodes)),
	}
	if p.rand == nil {
		p.rand = rand.Uint64
	}
	for i := range p.nodes {
		if err := p.add(i); err != nil {
			return nil, fmt.Errorf("make pool: node %d: %w", i+1, err)
		}
	}
	for i := range p.nodes {
		id := p.nodes[i].ID
		if owner, ok := p.byAddr[parseAddr(id)]; ok && int(owner) != i {
			return nil, fmt.Errorf("make pool: node %d: id %s is the address of node %d", i+1, quote(id), owner+1)
		}
	}
	slices.SortStableFunc(p.byWt, func(a, b int32) int { return cmp.Compare(p.weights[a], p.weights[b]) })
	p.Publish()
	return p, nil
}

// add checks node i and enters it into the indexes.
func (p *Pool) add(i int) error {
	n := &p.nodes[i]
	switch {
	case n.ID == "":
		return errors.New("empty id")
	case n.V4.IsValid() && !n.V4.Is4():
		return fmt.Errorf("%s is not an IPv4 address", n.V4)
	case n.V6.IsValid() && (!n.V6.Is6() || n.V6.Is4In6() || n.V6.Zone() != ""):
		return fmt.Errorf("%s is not an IPv6 address without a zone", n.V6)
	}
	if other, dup := p.byID[n.ID]; dup {
		return fmt.Errorf("id %s is also that of node %d", quote(n.ID), other+1)
	}
	p.byID[n.ID] = int32(i)
	for _, a := range [...]netip.Addr{n.V4, n.V6} {
		if !a.IsValid() {
			continue
		}
		if other, dup := p.byAddr[a]; dup {
			return fmt.Errorf("address %s is also that of node %d", a, other+1)
		}
		p.byAddr[a] = int32(i)
	}
	p.given |= n.given()
	p.weights[i] = n.Weight
	p.hashes[i] = KeyString(n.ID)
	p.byWt[i] = int32(i)
	return nil
}

// Len returns the number of nodes, usable or not.
func (p *Pool) Len() int { return len(p.nodes) }

// Resolve returns the position, from 0, of the node that v names, usable or
// not. When v is an address of that node, addr is the address, unmapped, and
// fam its family: the request is pinned to that very address, also where the
// address happens to be the node's ID. Otherwise fam is 0. Errors wrap
// ErrUnknown and say what was asked.
func (p *Pool) Resolve(v Value) (node int, fam Family, addr netip.Addr, err error) {
	n := uint64(len(p.nodes))
	switch v.kind {
	case kindIndex:
		switch {
		case n == 0:
			return 0, 0, netip.Addr{}, Refuse(ErrUnknown, "index %d: there are no nodes", v.index)
		case v.index-1 < n: // 0 goes round to the top and is not below n
			return int(v.index - 1), 0, netip.Addr{}, nil
		case p.strict:
			return 0, 0, netip.Addr{}, Refuse(ErrUnknown, "index %d is out of range 1 to %d (strict)", v.index, n)
		case v.index == 0:
			return int(n - 1), 0, netip.Addr{}, nil
		}
		return int((v.index - 1) % n), 0, netip.Addr{}, nil
	case kindID:
		if v.addr.IsValid() {
			// NewPool saw to it that no other node has it as its ID.
			if i, ok := p.byAddr[v.addr]; ok {
				return int(i), FamilyOf(v.addr), v.addr, nil
			}
		}
		i, ok := p.byID[v.id]
		switch {
		case ok:
			return int(i), 0, netip.Addr{}, nil
		case v.addr.IsValid():
			return 0, 0, netip.Addr{}, Refuse(ErrUnknown, "address %s belongs to no node", v.addr)
		}
		return 0, 0, netip.Addr{}, Refuse(ErrUnknown, "unknown id %s", quote(v.id))
	}
	return 0, 0, netip.Addr{}, Refuse(ErrUnknown, "nothing selected")
}

// SetUsable says by which families a node can be used at the moment: 0 for a
// node that is down. Families that the node was never given do not count. It
// takes effect with Publish.
func (p *Pool) SetUsable(node int, fam Family) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usable[node] = fam & p.nodes[node].given()
}

// Publish makes all that SetUsable said since the last time take effect at
// once: it builds the policy's tables, in time proportional to the number of
// nodes (a few milliseconds for 65,536), and swaps one pointer. Picks under way
// end with the tables they began with.
func (p *Pool) Publish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ts [wants]*table
	for want := V4 | V6; want > 0; want-- {
		members := p.members(want)
		// As a rule all nodes have the same families: one table does for all,
		// and so does one counter, so that round robin is one round.
		if both := ts[V4|V6]; both != nil && slices.Equal(both.members, members) {
			ts[want] = both
			continue
		}
		ts[want] = p.build(members, &p.turns[want])
	}
	p.tables.Store(&ts)
}

// members returns the nodes that a policy may pick for want, in the order that
// the policy goes through them.
func (p *Pool) members(want Family) []int32 {
	m := make([]int32, 0, len(p.nodes))
	take := func(i int32) {
		if p.weights[i] > 0 && p.usable[i]&want != 0 {
			m = append(m, i)
		}
	}
	if p.policy == Rendezvous {
		for _, i := range p.byWt {
			take(i)
		}
		return m
	}
	for i := range p.nodes {
		take(int32(i))
	}
	return m
}

// Pick returns the position of the node that the policy takes among those of
// weight above 0 that are usable by at least one of the families in want, the
// families that the target has. key is what the hashing policies hash; others
// ignore it. The error is ErrFamily when no node was ever given such a family,
// else ErrDown.
func (p *Pool) Pick(want Family, key uint64) (node int, err error) {
	want &= V4 | V6
	t := p.tables.Load()[want]
	if t == nil || len(t.members) == 0 {
		return 0, p.none(want)
	}
	switch p.policy {
	case Serial:
		return int(t.members[0]), nil
	case RoundRobin:
		return t.roundRobin(), nil
	case Rendezvous:
		return t.rendezvous(key), nil
	case LeastConn:
		return p.leastConn(t), nil
	}
	return t.random(p.rand()), nil
}

// none says why there is nothing to pick.
func (p *Pool) none(want Family) error {
	switch {
	case want == 0:
		return Refuse(ErrFamily, "the target has no address family")
	case len(p.nodes) > 0 && p.given&want == 0:
		return Refuse(ErrFamily, "no path has an address for %s", want)
	}
	return Refuse(ErrDown, "no path is up for %s", want)
}

// Opened counts a connection that begins on a node, for LeastConn.
func (p *Pool) Opened(node int) { p.open[node].Add(1) }

// Closed takes back one Opened.
func (p *Pool) Closed(node int) { p.open[node].Add(-1) }

// Open returns the number of connections open on a node.
func (p *Pool) Open(node int) int64 { return p.open[node].Load() }
