package escaper

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"wayout/router/resolve"
	"wayout/selection"
)

// maxAttempts is how many addresses of a name one request tries.
const maxAttempts = 12

// downError says why p cannot be used for any of the families in want.
func (p *Path) downError(s *state, want selection.Family) error {
	why := s.reason(want)
	switch {
	case s.expired:
		return selection.Refuse(selection.ErrDown, "path %s has expired (%s)", p.Name, p.Expire.UTC().Format(time.RFC3339))
	case s.draining:
		return selection.Refuse(selection.ErrDown, "path %s is draining", p.Name)
	case why == "":
		return selection.Refuse(selection.ErrDown, "path %s is down", p.Name)
	case s.up() != 0:
		return selection.Refuse(selection.ErrDown, "path %s is down for %s: %s", p.Name, want, why)
	}
	return selection.Refuse(selection.ErrDown, "path %s is %s: %s", p.Name, s.word(), why)
}

// familyError says that p, or the address selected of it, cannot serve f.
func (p *Path) familyError(f selection.Family) error {
	return selection.Refuse(selection.ErrFamily, "path %s has no address for %s", p.Name, f)
}

func (c *choice) familyError(f selection.Family) error {
	if !c.selected {
		return c.noPath("no path is up for " + f.String())
	}
	if c.addr.IsValid() {
		return selection.Refuse(selection.ErrFamily, "path %s was selected by its address %s, and the target is %s", c.p.Name, c.addr, f)
	}
	return c.p.familyError(f)
}

// noPath says that the policy has nothing to pick from, whether its paths are
// down or were never given the family: to the outside it is one. It is
// selection.ErrDown too, which is what the metrics count it as.
func (c *choice) noPath(why string) error {
	return fail(ErrNoPath, selection.ErrDown, "escaper %s: %s", c.d.name, why)
}

// usable returns the families of some that a chosen path can be used by now:
// those of want that are up, and those that the request is the one to try. A
// probe goes by all that the kernel can send by.
func (c *choice) usable(of selection.Family) selection.Family {
	s := c.p.state.Load()
	of &= c.want
	if c.probe {
		return s.present() & of
	}
	f := s.usable() & of
	if t := s.trial() & of; t != 0 && c.try() {
		f |= t
		c.tried |= t
	}
	return f
}

// try makes the request the one that tries its path. It reports whether it is.
func (c *choice) try() bool {
	if !c.trying && !c.tested {
		c.trying = c.p.trying.CompareAndSwap(false, true)
	}
	return c.trying
}

// settle ends the request's trial of its path, if it is one, by what came of it.
func (c *choice) settle(err error) {
	if c.trying {
		c.trying = false
		c.d.settle(c.p, c.tried, err)
	}
}

// open takes the request out by the choice. Where the policy chose and the path
// has no ports left, and the escaper says so, it is another path.
func (c *choice) open(ctx context.Context, r *Request) (conn *Conn, err error) {
	first := *c
	for {
		conn, err = c.openOnce(ctx, r)
		c.settle(err)
		if err == nil || !c.passesBy(&first, r, err) {
			return conn, err
		}
	}
}

// passesBy reports whether to choose again, as from first, because the path that
// the policy chose has no ports left.
func (c *choice) passesBy(first *choice, r *Request, err error) bool {
	switch {
	case !c.d.spill, first.p != nil, c.p == nil, !errors.Is(err, selection.ErrPorts):
		return false
	case r.Selection.Session.Strict && r.Selection.Session.Name != "", len(c.full) == maxSpill:
		return false
	}
	full, deadline := append(c.full, c.p.node), c.deadline
	*c = *first
	c.full, c.deadline, c.last = full, deadline, err
	return true
}

// maxSpill is how many paths without ports one request passes by.
const maxSpill = 8

// openOnce opens by one path. The order is the contract's: path down,
// destination filter, resolver, family, bind.
func (c *choice) openOnce(ctx context.Context, r *Request) (*Conn, error) {
	if err := c.ready(); err != nil {
		return nil, err
	}
	if c.d.peers {
		return c.openPeer(ctx, r)
	}
	if r.Target.Addr.IsValid() {
		return c.openAddr(ctx, r)
	}
	return c.openName(ctx, r)
}

// ready checks the row of paths that are down.
func (c *choice) ready() error {
	if c.p != nil {
		c.p.lapse(c.d.now())
	}
	switch {
	case !c.over.IsZero():
		return selection.Refuse(selection.ErrDown, "path %s has expired (%s)", c.p.Name, c.over.UTC().Format(time.RFC3339))
	case c.p != nil && !c.may():
		return c.p.downError(c.p.state.Load(), c.want)
	case c.addr.IsValid() && c.p.isReserved(c.addr):
		return selection.Refuse(selection.ErrDown, "path %s: %s is not for use: it is a gateway's, or its link's own", c.p.Name, c.addr)
	case c.p == nil && c.d.up.Load().any == 0:
		return c.noPath("no path is up")
	}
	return nil
}

// may reports whether the chosen path can be used by some family, if only to
// try it.
func (c *choice) may() bool {
	s := c.p.state.Load()
	if c.probe {
		return s.present()&c.want != 0
	}
	f := s.usable()
	if !c.tested {
		f |= s.trial()
	}
	return f&c.want != 0
}

// aim checks a target that is an address, and picks a path for it.
func (c *choice) aim(r *Request, to netip.Addr) error {
	f := selection.FamilyOf(to)
	if c.p != nil && c.want&f != 0 && c.usable(f) == 0 {
		return c.p.downError(c.p.state.Load(), f)
	}
	if err := c.check(to, r.Target.Port); err != nil {
		return err
	}
	if c.p == nil {
		if err := c.pick(r, f, netip.AddrPortFrom(to, r.Target.Port)); err != nil {
			return err
		}
	}
	if c.want&f == 0 {
		return c.familyError(f)
	}
	return nil
}

// openAddr is open for a literal target: its family is known from the start.
func (c *choice) openAddr(ctx context.Context, r *Request) (*Conn, error) {
	to := r.Target.Addr.Unmap()
	f := selection.FamilyOf(to)
	if err := c.aim(r, to); err != nil {
		return nil, err
	}
	if conn := c.reuse(r, f); conn != nil {
		return conn, nil
	}
	list := [1]netip.AddrPort{netip.AddrPortFrom(to, r.Target.Port)}
	return c.dial(ctx, r, list[:])
}

// check asks the filter about a target. The target of a probe is the operator's.
func (c *choice) check(to netip.Addr, port uint16) error {
	if c.probe {
		return nil
	}
	return c.d.filter.Check(to, port)
}

// pick lets the policy choose among the paths that are up for a family of
// want. Its refusals are one to the outside: no path is up. to is where the
// request goes, as far as that is known.
func (c *choice) pick(r *Request, want selection.Family, to netip.AddrPort) error {
	node, err := c.d.pick(r, want)
	if err != nil {
		return c.noPath(err.Error())
	}
	if !c.has(node, want) || c.crowded(to) {
		if err := c.pickOther(r, want, to); err != nil {
			return err
		}
	}
	r.Choice.Path = c.p.Name
	return nil
}

// maxRepicks is how often a request picks again when others take the paths that
// are on trial before it.
const maxRepicks = 4

// pickOther is for when the policy's pick cannot be used, or has few ports left
// towards the target; then it is still better than none.
func (c *choice) pickOther(r *Request, want selection.Family, to netip.AddrPort) error {
	first := c.p
	for range maxRepicks {
		node, err := c.d.pickAmong(r, want, func(n int) bool { return c.offers(n, want, to) })
		if err != nil {
			break
		}
		if c.has(node, want) {
			return nil
		}
	}
	switch {
	case c.has(first.node, want):
		return nil
	case c.last != nil:
		return c.last
	}
	return c.noPath("path " + first.ID + " is not up, and no other for " + want.String())
}

// has makes the choice a path, and reports whether it can be used by a family
// of want now.
func (c *choice) has(node int, want selection.Family) bool {
	c.settle(nil) // of another path
	c.p, c.tried = c.d.paths[node], 0
	if c.want = c.p.Given(); c.d.peers {
		c.want = selection.V4 | selection.V6
	}
	if c.p.lapse(c.d.now()) {
		c.d.Publish() // its time was over before the timer's
		return false
	}
	if c.d.peers {
		want = c.want
	}
	return !slices.Contains(c.full, node) && c.usable(want) != 0
}

// offers reports whether a path is worth picking.
func (c *choice) offers(node int, want selection.Family, to netip.AddrPort) bool {
	p := c.d.paths[node]
	s := p.state.Load()
	f := s.usable()
	if !c.tested && !p.trying.Load() {
		f |= s.trial()
	}
	switch {
	case f == 0, f&want == 0 && !c.d.peers, slices.Contains(c.full, node):
		return false
	}
	return !c.d.spill || !p.Crowded(to)
}

// crowded reports whether few ports are left towards a target, where that
// matters.
func (c *choice) crowded(to netip.AddrPort) bool { return c.d.spill && c.p.Crowded(to) }

// openName is open for a name. Where the families of its addresses make no
// difference to the policy, the path is picked first: then an idle connection
// serves without resolving.
func (c *choice) openName(ctx context.Context, r *Request) (*Conn, error) {
	if c.p == nil && (c.d.up.Load().alike || c.d.bound != nil) {
		if err := c.pick(r, c.want, netip.AddrPort{}); err != nil {
			return nil, err
		}
	}
	if c.p != nil {
		if conn := c.reuse(r, c.p.state.Load().usable()&c.want); conn != nil {
			return conn, nil
		}
	}
	a, err := c.lookup(ctx, r, c.want)
	if err != nil {
		return nil, err
	}
	conn, err := c.openAnswer(ctx, r, a)
	if err == nil || a.Pending == 0 || ctx.Err() != nil {
		return conn, err
	}
	// The family that was late is waited for after all: it is all that is left.
	if r.Task != nil {
		r.Task.Leave()
	}
	late, lerr := c.resolver().Lookup(ctx, r.Target.Host, a.Pending)
	if lerr != nil {
		return nil, err
	}
	conn, lerr = c.openAnswer(ctx, r, late)
	if lerr != nil && telling(lerr) <= telling(err) {
		return nil, err
	}
	return conn, lerr
}

// openAnswer dials the addresses of a name that the filter lets through and
// the path can reach.
func (c *choice) openAnswer(ctx context.Context, r *Request, a resolve.Answer) (*Conn, error) {
	var four, six [maxAttempts]netip.Addr
	v4, v6 := four[:0], six[:0]
	var denied error
	for _, from := range [...][]netip.Addr{a.V4, a.V6} {
		for _, addr := range from {
			addr = addr.WithZone("").Unmap()
			switch why := c.check(addr, r.Target.Port); {
			case why != nil && denied == nil:
				denied = why
			case why != nil:
			case addr.Is4() && len(v4) < maxAttempts:
				v4 = append(v4, addr)
			case addr.Is6() && len(v6) < maxAttempts:
				v6 = append(v6, addr)
			}
		}
	}
	has := families(v4, v6)
	switch {
	case has == 0 && denied != nil:
		return nil, denied
	case has == 0:
		return nil, fail(ErrDNS, nil, "resolve %s: no address", r.Target.Host)
	}
	if c.p == nil {
		to := netip.AddrPort{}
		if len(v4)+len(v6) == 1 {
			to = netip.AddrPortFrom(append(v4, v6...)[0], r.Target.Port)
		}
		if err := c.pick(r, has, to); err != nil {
			return nil, err
		}
		if conn := c.reuse(r, c.p.state.Load().usable()&c.want); conn != nil {
			return conn, nil
		}
	}
	u := c.usable(has)
	switch {
	case has&c.want == 0:
		return nil, c.familyError(has)
	case has&u == 0:
		return nil, c.p.downError(c.p.state.Load(), has&c.want)
	}
	if u&selection.V4 == 0 {
		v4 = nil
	}
	if u&selection.V6 == 0 {
		v6 = nil
	}
	var list [maxAttempts]netip.AddrPort
	return c.dial(ctx, r, interleave(list[:0], c.d.strategy, v4, v6, r.Target.Port))
}

// lookup resolves the target's name for the families in want. When it has
// addresses of the other family only, it says so, because then it is not the
// name that is at fault; those addresses are never dialled.
func (c *choice) lookup(ctx context.Context, r *Request, want selection.Family) (resolve.Answer, error) {
	both := c.d.strategy.families()
	want &= both
	if want == 0 {
		return resolve.Answer{}, c.familyError(both)
	}
	names := c.resolver()
	if names == nil {
		return resolve.Answer{}, fail(ErrDNS, nil, "resolve %s: escaper %s has no resolver", r.Target.Host, c.d.name)
	}
	if r.Task != nil && !names.Ready(r.Target.Host, want) {
		r.Task.Leave()
	}
	a, err := names.Lookup(ctx, r.Target.Host, want)
	if err == nil {
		return a, nil
	}
	if errors.Is(err, resolve.ErrNotFound) && want != both {
		if r.Task != nil {
			r.Task.Leave()
		}
		if other, oerr := names.Lookup(ctx, r.Target.Host, both&^want); oerr == nil {
			return other, nil
		}
	}
	switch {
	case errors.Is(err, resolve.ErrTimeout), isTimeout(err):
		return a, fail(ErrDNSTimeout, err, "%s", err)
	case errors.Is(err, context.Canceled):
		return a, fail(context.Canceled, err, "%s", err)
	}
	return a, fail(ErrDNS, err, "%s", err)
}

// reuse returns an idle connection for the request, from one of the path's
// addresses of the families in f, or nil.
func (c *choice) reuse(r *Request, f selection.Family) *Conn {
	if !r.Reuse || c.d.idlers == nil {
		return nil
	}
	for _, one := range [...]selection.Family{selection.V6, selection.V4} {
		if f&one == 0 {
			continue
		}
		src := c.sources(r)
		if src.fresh&one != 0 {
			continue // an address of its own is what the request is for
		}
		key := keyOf(r, src.of(one))
		for {
			l := c.p.take(&key)
			if l == nil {
				break
			}
			// The rules, or the host's addresses, may have changed since it
			// was dialled.
			if c.d.peers || c.check(l.remote.Addr(), l.remote.Port()) == nil {
				return l.conn(c.p, true)
			}
			if l.strike() {
				_ = l.tcp.Close()
			}
		}
	}
	return nil
}

// families returns the families of which there are addresses.
func families(v4, v6 []netip.Addr) selection.Family {
	var f selection.Family
	if len(v4) > 0 {
		f |= selection.V4
	}
	if len(v6) > 0 {
		f |= selection.V6
	}
	return f
}

// dial connects to the first of the addresses that answers, and puts the
// connection on the path's books.
func (c *choice) dial(ctx context.Context, r *Request, list []netip.AddrPort) (*Conn, error) {
	if c.deadline.IsZero() { // it is one for all dials of a request
		c.deadline = time.Now().Add(c.d.timeout)
	}
	l := &link{ledger: c.p.ledger, fd: -1, pool: c.d.pool, node: c.p.node}
	l.pool.Opened(l.node) // before the connect, so that least_conn sees those under way
	if err := l.connect(ctx, c, r, list); err != nil {
		l.pool.Closed(l.node)
		return nil, err
	}
	f := selection.FamilyOf(l.remote.Addr())
	if src := c.sources(r); r.Reuse && src.fresh&f == 0 && c.d.idlers != nil {
		l.kept = &kept{idlers: c.d.idlers, key: keyOf(r, src.of(f))}
	}
	if err := l.admit(c.p); err != nil {
		return nil, err
	}
	return l.conn(c.p, false), nil
}

// admit puts a new connection on the path's books, or ends it.
func (l *link) admit(p *Path) error {
	err := l.enter(p)
	if err == nil {
		return nil
	}
	l.abandon(p)
	if l.tcp != nil {
		reset(l.tcp)
	} else {
		resetFD(l.fd)
	}
	return err
}

// abandon takes back the count of a connection that comes to nothing after it
// was made.
func (l *link) abandon(p *Path) {
	l.pool.Closed(l.node)
	p.counters.closed.Add(1)
}

// connect makes the connection: on the request's task, where there is one and
// nothing to race.
func (l *link) connect(ctx context.Context, c *choice, r *Request, list []netip.AddrPort) (err error) {
	if r.Task != nil && len(list) == 1 {
		l.remote = list[0]
		l.fd, l.source, err = c.d.attemptOn(ctx, r.Task, c.p, c.sources(r), l.remote, c.deadline)
		return err
	}
	if r.Task != nil {
		r.Task.Leave()
	}
	tcp, err := c.d.connect(c.d.withDeadline(ctx, c.deadline), c.p, c.sources(r), list)
	if err == nil {
		l.tcp, l.source, l.remote = tcp, localAddr(tcp), addrPort(tcp.RemoteAddr())
	}
	return err
}

func (l *link) conn(p *Path, reused bool) *Conn {
	return &Conn{TCP: l.tcp, FD: l.fd, Path: p, Source: l.source, Remote: l.remote, Reused: reused, link: l}
}

// resolver returns what resolves the target's name: where it is to be asked by
// the request's path, a resolver of the path's own.
func (c *choice) resolver() Resolver {
	if c.d.bound == nil || c.p == nil {
		return c.d.resolver
	}
	was := c.p.names.Load()
	if was != nil && was.parent == c.d.resolver {
		return was.own
	}
	now := &ownNames{parent: c.d.resolver, own: c.d.bound(c.d.dialFor(c.p))}
	if !c.p.names.CompareAndSwap(was, now) {
		now.end() // another request was first
		return c.p.names.Load().own
	}
	return now.own
}
