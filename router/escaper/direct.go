package escaper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"wayout/router/resolve"
	"wayout/selection"
)

// Resolver gives a name's addresses: *resolve.Resolver, or a fake that stands
// for the network. The escaper does not change the slices of an Answer.
type Resolver interface {
	Lookup(ctx context.Context, host string, want selection.Family) (resolve.Answer, error)
	// Ready reports whether Lookup would not have to wait.
	Ready(host string, want selection.Family) bool
}

// DialFunc opens a socket by which a name server is asked, as package resolve
// wants it.
type DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// Options is a direct escaper as configured.
type Options struct {
	Name            string
	Nodes           []NodeOptions
	Policy          selection.Policy
	PickKey         PickKey
	StrictIndex     bool
	EnableSelection bool // enable_path_selection: clients may choose

	Filter   *Filter   // nil: the defaults, knowing nothing of the host
	Resolver Resolver  // nil: names cannot be reached
	Strategy Strategy  // which families of a name are asked for, and tried first
	Sockets  *Sockets  // nil: NewSockets(0, 0)
	Idle     *Idle     // nil: no connection is kept idle
	Sessions *Sessions // nil: the escaper's own

	// Bound makes a resolver whose queries leave by the sockets that dial
	// opens. When it is set, names are resolved by the path that the request
	// takes, and Resolver only resolves the names of peers.
	Bound func(DialFunc) Resolver

	// Peers says that the nodes are next-hop proxies: every node has a Peer.
	Peers bool
	// Passive and Probe say what turns paths down and up besides the kernel's
	// state; nil: nothing does. They need Health.
	Passive *Passive
	Probe   *Probe
	Health  *Health
	// Spill: where the policy has picked a path whose ports towards the target
	// are used up, or nearly so, it picks another.
	Spill bool
	// PassSelection: what the client selected of escapers that this host does
	// not have goes on to the peer.
	PassSelection bool

	ConnectTimeout time.Duration // of all attempts of one request together; 0: 10 s
	AttemptDelay   time.Duration // RFC 8305's connection attempt delay; 0: 250 ms

	// Prior is the escaper of the same name before a reload: a path that has
	// kept its ID, addresses and interface keeps its state, counters and
	// connections.
	Prior *Direct

	Rand func() uint64    // see selection.Options
	Now  func() time.Time // for Status.Since; nil: time.Now
}

// Direct is an escaper whose nodes are egress paths: addresses of this host, or
// proxies that carry requests on.
type Direct struct {
	step
	paths []*Path
	given selection.Family // that any path has

	filter   *Filter
	resolver Resolver
	strategy Strategy
	bound    func(DialFunc) Resolver
	peers    bool
	passive  *Passive
	probe    *Probe
	health   *Health
	spill    bool
	pass     bool
	sockets  *Sockets
	idlers   *Idle
	timeout  time.Duration
	delay    time.Duration
	now      func() time.Time
	open     chan struct{} // never closed; see deadline

	last  atomic.Pointer[state] // the last one that a path has come to
	mu    sync.Mutex            // orders Publish, and guards what follows
	timer *time.Timer           // of the next path to expire; nil: none does

	datagrams datagramBuffers

	begun   sync.Once
	retired bool // it is in no table any more
}

// NewDirect returns the escaper. Its paths are in state probing until
// SetFamilyState says what is known of them.
func NewDirect(o Options) (*Direct, error) {
	d := &Direct{
		step:    step{name: o.Name, key: o.PickKey, enabled: o.EnableSelection, sessions: o.Sessions},
		bound:   o.Bound,
		peers:   o.Peers,
		passive: o.Passive, probe: o.Probe, health: o.Health, spill: o.Spill,
		pass:   o.PassSelection,
		filter: o.Filter, strategy: o.Strategy, resolver: o.Resolver, sockets: o.Sockets, idlers: o.Idle,
		timeout: o.ConnectTimeout, delay: o.AttemptDelay, now: o.Now, open: make(chan struct{}),
	}
	if d.timeout <= 0 {
		d.timeout = 10 * time.Second
	}
	if d.delay <= 0 {
		d.delay = 250 * time.Millisecond
	}
	if d.now == nil {
		d.now = time.Now
	}
	if d.sessions == nil {
		d.sessions = NewSessions()
	}
	if (d.passive != nil || d.probe != nil) && d.health == nil {
		return nil, fmt.Errorf("escaper %s: nobody watches over its paths' health", o.Name)
	}
	var err error
	if d.filter == nil {
		if d.filter, err = NewFilter(nil, nil, nil); err != nil {
			return nil, fmt.Errorf("escaper %s: %w", o.Name, err)
		}
	}
	if d.sockets == nil {
		if d.sockets, err = NewSockets(0, 0); err != nil {
			return nil, fmt.Errorf("escaper %s: %w", o.Name, err)
		}
	}
	if err := d.build(&o); err != nil {
		return nil, fmt.Errorf("escaper %s: %w", o.Name, err)
	}
	return d, nil
}

func (d *Direct) build(o *Options) error {
	nodes := make([]selection.Node, len(o.Nodes))
	for i, n := range o.Nodes {
		nodes[i] = selection.Node{ID: n.ID, V4: n.V4, V6: n.V6, Net4: n.Net4, Net6: n.Net6, Unbound: n.Unbound, Weight: n.Weight, Unlisted: n.Unlisted}
		if d.peers {
			// The addresses are those that lead to the peer: no target has to
			// be of their family, and no client selects by them.
			nodes[i] = selection.Node{ID: n.ID, Unbound: selection.V4 | selection.V6, Weight: n.Weight}
		}
	}
	pool, err := selection.NewPool(nodes, selection.Options{Policy: o.Policy, StrictIndex: o.StrictIndex, Rand: o.Rand})
	if err != nil {
		return err
	}
	d.pool = pool
	prior := map[string]*Path{}
	if o.Prior != nil {
		for _, p := range o.Prior.paths {
			prior[p.ID] = p
		}
	}
	now := d.now()
	all := make([]Path, len(o.Nodes)) // one allocation for tens of thousands
	d.paths = make([]*Path, len(o.Nodes))
	for i, n := range o.Nodes {
		p := &all[i]
		*p = Path{NodeOptions: n, Escaper: o.Name, Name: o.Name + "/" + n.ID, d: d, node: i}
		if err := p.check(); err != nil {
			return fmt.Errorf("node %s: %w", n.ID, err)
		}
		if (p.Peer != nil) != d.peers {
			return fmt.Errorf("node %s: a peer belongs to a node of a proxy escaper, and to none else", n.ID)
		}
		if old := prior[n.ID]; old != nil && old.Same(&n) {
			p.ledger = old.ledger
			d.adopt(p, old.d)
		} else {
			p.ledger = &ledger{}
			st := p.unknown(now)
			// A changed path is a new one, but what the operator said of its
			// name holds.
			st.draining = old != nil && old.state.Load().draining
			p.state.Store(st)
		}
		d.paths[i] = p
		d.given |= p.Given()
	}
	d.Publish()
	return nil
}

// begin starts what goes on by itself in an escaper that comes into force, and
// takes note of its paths' times: those of an earlier table, whose states its
// paths have taken over, hold no longer.
func (d *Direct) begin() {
	now := d.now()
	for _, p := range d.paths {
		if !p.over(now) && p.state.Load().expired {
			d.change(p, func(s *state) { s.expired = false })
		}
	}
	d.Publish()
	d.lapse()
}

// lapse marks the paths whose time is over, and comes back when the next one's
// is.
func (d *Direct) lapse() {
	now := d.now()
	var next time.Time
	changed := false
	for _, p := range d.paths {
		switch {
		case p.Expire.IsZero():
		case p.lapse(now):
			changed = true
		case next.IsZero() || p.Expire.Before(next):
			next = p.Expire
		}
	}
	if changed {
		d.Publish()
	}
	if next.IsZero() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.retired {
		d.timer = time.AfterFunc(max(next.Sub(now), time.Millisecond), d.lapse)
	}
}

// retire ends what goes on by itself in an escaper that is in no table any more.
func (d *Direct) retire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.retired = true
	if d.timer != nil {
		d.timer.Stop()
	}
}

// check says what makes a path impossible.
func (p *Path) check() error {
	switch {
	case p.BindToDevice && p.Interface == "":
		return errors.New("bind to device without an interface")
	case p.AnySource && p.Peer == nil:
		return errors.New("any source, and no peer")
	case p.Unbound != 0 && !p.BindToDevice && !p.AnySource:
		return errors.New("neither an address nor an interface to bind to")
	case p.V4.IsValid() && p.Net4.IsValid(), p.V6.IsValid() && p.Net6.IsValid():
		return errors.New("both an address and a prefix of one family")
	case p.Given() == 0:
		return errors.New("no address")
	}
	for _, a := range [...]netip.Addr{p.V4, p.V6} {
		if a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("%s is no source address", a)
		}
	}
	return nil
}

// Same reports whether two nodes of one ID are one path, whose connections and
// counters go on: what its sockets are bound to is the same.
func (o *NodeOptions) Same(q *NodeOptions) bool {
	return o.V4 == q.V4 && o.V6 == q.V6 && o.Net4 == q.Net4 && o.Net6 == q.Net6 &&
		o.Unbound == q.Unbound && o.AnySource == q.AnySource &&
		o.Interface == q.Interface && o.BindToDevice == q.BindToDevice && o.Uplink == q.Uplink &&
		(o.Peer == nil) == (q.Peer == nil) && (o.Peer == nil || o.Peer.o == q.Peer.o)
}

// unknown is the state of a path that nothing is known of.
func (p *Path) unknown(now time.Time) *state {
	s := &state{since: now}
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		if p.Given()&f == 0 {
			continue
		}
		s.side(f).cond = Probing
		if p.d.judged(f) {
			s.side(f).health, s.side(f).why = unproved, f.String()+" has not been probed yet"
		}
	}
	return s
}

// Paths returns the paths in their configured order. The slice is not to be
// changed.
func (d *Direct) Paths() []*Path { return d.paths }

// By returns the paths that leave by some addresses, each at least once.
func (d *Direct) By(addrs []netip.Addr) []*Path {
	var all []*Path
	if !d.peers {
		for _, a := range addrs {
			if i, known := d.pool.Owner(a); known {
				all = append(all, d.paths[i])
			}
		}
		return all
	}
	if len(addrs) == 0 {
		return nil
	}
	// They are none of the pool's, and may be those of many.
	of := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		of[a] = true
	}
	for _, p := range d.paths {
		if of[p.V4] || of[p.V6] {
			all = append(all, p)
		}
	}
	return all
}

// change publishes a path's changed state. It reports whether it differs. f may
// be called more than once: a reload's new escaper and the old one change the
// states of the paths that they share.
func (d *Direct) change(p *Path, f func(*state)) bool {
	for {
		old := p.state.Load()
		s := *old
		f(&s)
		if s == *old {
			return false
		}
		if s.word() != old.word() {
			s.since = d.now().Truncate(time.Millisecond)
		}
		// Tens of thousands of paths change together: they share what they have
		// become.
		next := d.last.Load()
		if next == nil || *next != s {
			next = &s
			d.last.Store(next)
		}
		if p.state.CompareAndSwap(old, next) {
			return true
		}
	}
}

// Publish lets the policy take note of all states set so far. It goes through
// all paths: it is for after a batch of changes, not after each.
func (d *Direct) Publish() {
	d.publish()
	d.publishParents()
}

func (d *Direct) publish() {
	d.mu.Lock()
	defer d.mu.Unlock()
	u := &usable{alike: true}
	now := d.now()
	for i, p := range d.paths {
		s := p.state.Load()
		f := s.usable()
		t := s.trial() // for the one request that may try it
		if p.over(now) {
			f, t = 0, 0
		}
		if p.Peer != nil && p.Peer.addr.IsValid() { // by the other family it is not reached
			f, t = f&selection.FamilyOf(p.Peer.addr), t&selection.FamilyOf(p.Peer.addr)
		}
		u.sure |= f
		f |= t
		u.any |= f
		u.alike = u.alike && p.Given() == d.paths[0].Given() && (f == 0 || f == p.Given())
		if d.peers && f != 0 {
			if u.sure != 0 {
				u.sure = selection.V4 | selection.V6
			}
			f = selection.V4 | selection.V6
			u.any = f
		}
		d.pool.SetUsable(i, f)
	}
	d.pool.Publish()
	d.up.Store(u)
}
