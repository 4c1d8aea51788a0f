package escaper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
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

// PickKey says what the hashing policies hash.
type PickKey uint8

// The keys.
const (
	KeyClientIP PickKey = iota
	KeyUser
	KeyHost // the target as asked for, a name in lower case
)

// ParsePickKey reads a pick_key's word.
func ParsePickKey(s string) (PickKey, error) {
	switch s {
	case "client_ip":
		return KeyClientIP, nil
	case "user":
		return KeyUser, nil
	case "host":
		return KeyHost, nil
	}
	return 0, fmt.Errorf("unknown pick key %q, want client_ip, user or host", s)
}

// Options is a direct escaper as configured.
type Options struct {
	Name            string
	Nodes           []NodeOptions
	Policy          selection.Policy
	PickKey         PickKey
	StrictIndex     bool
	EnableSelection bool // enable_path_selection: clients may choose

	Filter   *Filter  // nil: the defaults, knowing nothing of the host
	Resolver Resolver // nil: names cannot be reached
	Sockets  *Sockets // nil: NewSockets(0, 0)
	Idle     *Idle    // nil: no connection is kept idle

	ConnectTimeout time.Duration // of all attempts of one request together; 0: 10 s
	AttemptDelay   time.Duration // RFC 8305's connection attempt delay; 0: 250 ms

	// Prior is the escaper of the same name before a reload: a path that has
	// kept its ID, addresses and interface keeps its state, counters and
	// connections.
	Prior *Direct

	Rand func() uint64    // see selection.Options
	Now  func() time.Time // for Status.Since; nil: time.Now
}

// Direct is an escaper whose nodes are egress paths of this host.
type Direct struct {
	name    string
	paths   []*Path
	pool    *selection.Pool
	given   selection.Family // that any path has
	key     PickKey
	enabled bool

	filter   *Filter
	resolver Resolver
	sockets  *Sockets
	idlers   *Idle
	timeout  time.Duration
	delay    time.Duration
	now      func() time.Time
	open     chan struct{} // never closed; see deadline

	mu sync.Mutex // orders changes of the paths' states

	usable atomic.Pointer[usable] // as last published
}

// usable is what the published states of all paths come to.
type usable struct {
	any selection.Family // what some path can be used by
	// alike: every path was given the same families, and can be used by all of
	// them or by none. Then any path that the policy picks reaches what another
	// would have reached.
	alike bool
}

// NewDirect returns the escaper. Its paths are in state probing until
// SetFamilyState says what is known of them.
func NewDirect(o Options) (*Direct, error) {
	d := &Direct{
		name: o.Name, key: o.PickKey, enabled: o.EnableSelection,
		filter: o.Filter, resolver: o.Resolver, sockets: o.Sockets, idlers: o.Idle,
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
		nodes[i] = selection.Node{ID: n.ID, V4: n.V4, V6: n.V6, Unbound: n.Unbound, Weight: n.Weight}
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
		if old := prior[n.ID]; old != nil && old.sameAs(p) {
			p.ledger = old.ledger
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

// check says what makes a path impossible.
func (p *Path) check() error {
	switch {
	case p.BindToDevice && p.Interface == "":
		return errors.New("bind to device without an interface")
	case p.Unbound != 0 && !p.BindToDevice:
		return errors.New("neither an address nor an interface to bind to")
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

func (p *Path) sameAs(q *Path) bool {
	return p.V4 == q.V4 && p.V6 == q.V6 && p.Unbound == q.Unbound &&
		p.Interface == q.Interface && p.BindToDevice == q.BindToDevice && p.Uplink == q.Uplink
}

// unknown is the state of a path that nothing is known of.
func (p *Path) unknown(now time.Time) *state {
	s := &state{since: now}
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		if p.Given()&f != 0 {
			s.side(f).cond = Probing
		}
	}
	return s
}

// Name returns the escaper's name.
func (d *Direct) Name() string { return d.name }

// Paths returns the paths in their configured order. The slice is not to be
// changed.
func (d *Direct) Paths() []*Path { return d.paths }

// change publishes a path's changed state. It reports whether it differs.
func (d *Direct) change(p *Path, f func(*state)) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := p.state.Load()
	s := *old
	f(&s)
	if s == *old {
		return false
	}
	if s.word() != old.word() {
		s.since = d.now()
	}
	p.state.Store(&s)
	return true
}

// Publish lets the policy take note of all states set so far. It goes through
// all paths: it is for after a batch of changes, not after each.
func (d *Direct) Publish() {
	d.mu.Lock()
	defer d.mu.Unlock()
	u := &usable{alike: true}
	for i, p := range d.paths {
		f := p.state.Load().usable()
		u.any |= f
		u.alike = u.alike && p.Given() == d.paths[0].Given() && (f == 0 || f == p.Given())
		d.pool.SetUsable(i, f)
	}
	d.pool.Publish()
	d.usable.Store(u)
}

// pickKey returns the key of a request for the hashing policies. It is the same
// in every process.
func (d *Direct) pickKey(r *Request) uint64 {
	switch d.key {
	case KeyUser:
		return selection.KeyString(r.User)
	case KeyHost:
		if r.Target.Addr.IsValid() {
			return selection.KeyAddr(r.Target.Addr)
		}
		return selection.KeyString(strings.ToLower(r.Target.Host))
	}
	return selection.KeyAddr(r.Client.Addr())
}
