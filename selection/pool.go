package selection

import (
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

	// Net4 and Net6 are whole prefixes, each in the place of the address of its
	// family: masked, and of more than one address. The zero Prefix: none.
	Net4, Net6 netip.Prefix

	// Unbound are families that the node serves without an address of its own:
	// those of a bare interface or of a next escaper. 0 for a node that serves
	// only the families of its addresses.
	Unbound Family

	// Weight is the node's share when a policy picks; 0 means never by policy,
	// still by selection.
	Weight uint16

	// Unlisted nodes have no index: they come after all that have one, and do
	// not count.
	Unlisted bool
}

func (n *Node) given() Family {
	f := FamilyOf(n.V4) | FamilyOf(n.V6) | n.Unbound&(V4|V6)
	if n.Net4.IsValid() {
		f |= V4
	}
	if n.Net6.IsValid() {
		f |= V6
	}
	return f
}

// Options says how a Pool selects and picks.
type Options struct {
	Policy      Policy
	StrictIndex bool // an index out of 1 to Len is an error and does not wrap

	// Rand returns 64 random bits; it must be safe for concurrent use. nil is
	// math/rand/v2's generator.
	Rand func() uint64
}

// Pool holds the nodes of one escaper. Resolve finds the node that a selection
// names, PickSession the one of a session, Pick the one that the policy takes.
// All may be called by any number of goroutines, beside SetUsable and Publish;
// they take no lock and, unless they fail, allocate nothing.
type Pool struct {
	ids     []string
	weights []uint16
	hashes  []uint64 // of the IDs
	byID    map[string]int32
	byAddr  map[netip.Addr]int32
	nets    nets
	givens  []Family // what each node was given
	given   Family   // what any node was given
	ranking ranking
	ring    ring // of Ketama
	listed  int  // the nodes that have an index
	policy  Policy
	strict  bool
	rand    func() uint64

	mu     sync.Mutex // for usable; never taken by Pick
	usable []Family

	state atomic.Pointer[state]
	turns [wants]turn // round robin's tickets, by what is wanted; they outlive tables
	open  []atomic.Int64
}

// state is what Publish publishes. It does not change, save for the ticket
// counters.
type state struct {
	tables [wants]*table // of the policy, by what is wanted; nil for nothing
	usable []Family
}

// wants is the number of sets of families; a Family indexes arrays of it.
const wants = int(V4|V6) + 1

// NewPool returns a pool of these nodes, in this order, of which none is usable
// until SetUsable and Publish say so. It may be empty. Errors: an empty or
// duplicate ID, an ID that is another node's address or prefix, one address on
// two nodes, an address or prefix inside another node's prefix, an address or
// prefix in the wrong family's place, an address with a zone, a prefix with
// host bits, of one address, or beside an address of its family, an unknown
// policy.
func NewPool(nodes []Node, o Options) (*Pool, error) {
	if o.Policy >= policies {
		return nil, fmt.Errorf("make pool: unknown policy %d", o.Policy)
	}
	p := &Pool{
		ids:     make([]string, len(nodes)),
		weights: make([]uint16, len(nodes)),
		hashes:  make([]uint64, len(nodes)),
		byID:    make(map[string]int32, len(nodes)),
		byAddr:  make(map[netip.Addr]int32, len(nodes)),
		givens:  make([]Family, len(nodes)),
		policy:  o.Policy,
		strict:  o.StrictIndex,
		rand:    o.Rand,
		usable:  make([]Family, len(nodes)),
		open:    make([]atomic.Int64, len(nodes)),
	}
	if p.rand == nil {
		p.rand = rand.Uint64
	}
	for i := range nodes {
		if err := p.add(i, &nodes[i]); err != nil {
			return nil, fmt.Errorf("make pool: node %d: %w", i+1, err)
		}
	}
	for i := range nodes {
		if err := p.overlap(i, &nodes[i]); err != nil {
			return nil, fmt.Errorf("make pool: node %d: %w", i+1, err)
		}
	}
	for i := range nodes {
		switch {
		case nodes[i].Unlisted:
		case p.listed < i:
			return nil, fmt.Errorf("make pool: node %d: comes after one that is unlisted", i+1)
		default:
			p.listed++
		}
	}
	p.ranking = rank(p.weights, p.hashes)
	if p.policy == Ketama {
		p.ring = newRing(p.weights, p.hashes)
	}
	p.Publish()
	return p, nil
}

// add checks node i and enters it into the indexes.
func (p *Pool) add(i int, n *Node) error {
	p.ids[i] = n.ID
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
	p.givens[i] = n.given()
	p.given |= p.givens[i]
	p.weights[i] = n.Weight
	p.hashes[i] = KeyString(n.ID)
	return p.addNets(i, n)
}

// Len returns the number of nodes, usable or not.
func (p *Pool) Len() int { return len(p.ids) }

// Position returns that of the node of an ID, from 0.
func (p *Pool) Position(id string) (node int, known bool) {
	i, known := p.byID[id]
	return int(i), known
}

// Resolve returns the position, from 0, of the node that v names, usable or
// not. When v is an address of that node, addr is the address, unmapped, and
// fam its family: the request is pinned to that very address, also where the
// address happens to be the node's ID. Each address inside a node's prefix is
// that node's. Otherwise fam is 0. Errors wrap ErrUnknown and say what was
// asked; when the node is known and the address that At pins is not its own, or
// v names it by another address already, they wrap ErrMismatch.
func (p *Pool) Resolve(v Value) (node int, fam Family, addr netip.Addr, err error) {
	switch v.kind {
	case kindIndex:
		node, err = p.byIndex(v.index)
	case kindID:
		node, addr, err = p.byName(v)
	case kindAddress:
		node, addr, err = p.byAddress(v.addr)
	case kindInline:
		n := v.inline.Value()
		node, addr, err = p.byAddress(n.addr())
	default:
		err = Refuse(ErrUnknown, "nothing selected")
	}
	if err != nil {
		return 0, 0, netip.Addr{}, err
	}
	if v.pin.IsValid() {
		if owner, ok := p.owner(v.pin); !ok || owner != node || addr.IsValid() && addr != v.pin {
			return 0, 0, netip.Addr{}, Refuse(ErrMismatch, "address %s is not that of path %s", quote(v.pin.String()), quote(v.name()))
		}
		addr = v.pin
	}
	return node, FamilyOf(addr), addr, nil
}

func (p *Pool) byIndex(i uint64) (int, error) {
	n := uint64(p.listed)
	switch {
	case n == 0:
		return 0, Refuse(ErrUnknown, "index %d: there are no nodes", i)
	case i-1 < n: // 0 goes round to the top and is not below n
		return int(i - 1), nil
	case p.strict:
		return 0, Refuse(ErrUnknown, "index %d is out of range 1 to %d (strict)", i, n)
	case i == 0:
		return int(n - 1), nil
	}
	return int((i - 1) % n), nil
}

func (p *Pool) byName(v Value) (int, netip.Addr, error) {
	// NewPool saw to it that no other node has the address as its ID.
	if i, ok := p.owner(v.addr); ok {
		return i, v.addr, nil
	}
	if i, ok := p.byID[v.id]; ok {
		return int(i), netip.Addr{}, nil
	}
	if v.addr.IsValid() {
		return p.byAddress(v.addr)
	}
	return 0, netip.Addr{}, Refuse(ErrUnknown, "unknown id %s", quote(v.id))
}

func (p *Pool) byAddress(a netip.Addr) (int, netip.Addr, error) {
	if i, ok := p.owner(a); ok {
		return i, a, nil
	}
	if !a.IsValid() {
		return 0, netip.Addr{}, Refuse(ErrUnknown, "no address selected")
	}
	return 0, netip.Addr{}, Refuse(ErrUnknown, "address %s belongs to no node", a)
}

// Owner returns the position of the node that an address belongs to, as its own or
// inside its prefix.
func (p *Pool) Owner(a netip.Addr) (node int, known bool) { return p.owner(a) }

// owner returns the node that owns an address, as its own or inside its prefix.
func (p *Pool) owner(a netip.Addr) (int, bool) {
	i, ok := p.byAddr[a]
	if !ok {
		_, i, ok = p.nets.find(a, maxBits)
	}
	return int(i), ok
}

// SetUsable says by which families a node can be used at the moment: 0 for a
// node that is down. Families that the node was never given do not count. It
// takes effect with Publish.
func (p *Pool) SetUsable(node int, fam Family) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usable[node] = fam & p.givens[node]
}

// Publish makes all that SetUsable said since the last time take effect at
// once: it builds the policy's tables, in time proportional to the number of
// nodes (a few milliseconds for 65,536), and swaps one pointer. Picks under way
// end with the tables they began with.
func (p *Pool) Publish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &state{usable: slices.Clone(p.usable)}
	for want := V4 | V6; want > 0; want-- {
		members := p.members(want)
		// As a rule all nodes have the same families: one table does for all,
		// and so does one counter, so that round robin is one round.
		if both := s.tables[V4|V6]; both != nil && slices.Equal(both.members, members) {
			s.tables[want] = both
			continue
		}
		s.tables[want] = p.build(members, &p.turns[want])
	}
	p.state.Store(s)
}

// members returns the nodes that a policy may pick for want, in their order.
func (p *Pool) members(want Family) []int32 {
	m := make([]int32, 0, len(p.ids))
	for i := range p.ids {
		if p.weights[i] > 0 && p.usable[i]&want != 0 {
			m = append(m, int32(i))
		}
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
	s := p.state.Load()
	t := s.tables[want]
	if t == nil || len(t.members) == 0 {
		return 0, p.none(want)
	}
	switch p.policy {
	case Serial:
		return int(t.members[0]), nil
	case RoundRobin:
		return t.roundRobin(), nil
	case Rendezvous:
		return p.ranking.pick(key, s.usable, want), nil // finds one, as there are members
	case LeastConn:
		return p.leastConn(t), nil
	case Jump:
		return t.jump(key), nil
	case Ketama:
		return t.ring.pick(key), nil
	}
	return t.random(p.rand()), nil
}

// none says why there is nothing to pick.
func (p *Pool) none(want Family) error {
	switch {
	case want == 0:
		return Refuse(ErrFamily, "the target has no address family")
	case len(p.ids) > 0 && p.given&want == 0:
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

// Policy returns the pool's policy.
func (p *Pool) Policy() Policy { return p.policy }
