package escaper

import (
	"context"
	"errors"
	"net/netip"
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

func (c *choice) familyError(r *Request, f selection.Family) error {
	if r.Choice.Source == selection.SourcePolicy {
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

// usable returns the families that a chosen path can be used by now: those of
// want that are up.
func (c *choice) usable() selection.Family { return c.p.state.Load().usable() & c.want }

// open takes the request out by the choice. The order is the contract's: path
// down, destination filter, resolver, family, bind.
func (c *choice) open(ctx context.Context, r *Request) (*Conn, error) {
	switch {
	case c.p != nil && c.usable() == 0:
		return nil, c.p.downError(c.p.state.Load(), c.want)
	case c.p == nil && c.d.usable.Load().any == 0:
		return nil, c.noPath("no path is up")
	}
	if r.Target.Addr.IsValid() {
		return c.openAddr(ctx, r)
	}
	return c.openName(ctx, r)
}

// openAddr is open for a literal target: its family is known from the start.
func (c *choice) openAddr(ctx context.Context, r *Request) (*Conn, error) {
	to := r.Target.Addr.Unmap()
	f := selection.FamilyOf(to)
	if c.p != nil && c.want&f != 0 && c.usable()&f == 0 {
		return nil, c.p.downError(c.p.state.Load(), f)
	}
	if err := c.d.filter.Check(to, r.Target.Port); err != nil {
		return nil, err
	}
	if c.p == nil {
		if err := c.pick(r, f); err != nil {
			return nil, err
		}
	}
	if c.want&f == 0 {
		return nil, c.familyError(r, f)
	}
	if conn := c.reuse(r, f); conn != nil {
		return conn, nil
	}
	list := [1]netip.AddrPort{netip.AddrPortFrom(to, r.Target.Port)}
	return c.dial(ctx, r, list[:])
}

// pick lets the policy choose among the paths that are up for a family of
// want. Its refusals are one to the outside: no path is up.
func (c *choice) pick(r *Request, want selection.Family) error {
	node, err := c.d.pool.Pick(want, c.d.pickKey(r))
	if err != nil {
		return c.noPath(err.Error())
	}
	c.p = c.d.paths[node]
	c.want = c.p.Given()
	r.Choice.Path = c.p.Name
	return nil
}

// openName is open for a name. Where the families of its addresses make no
// difference to the policy, the path is picked first: then an idle connection
// serves without resolving.
func (c *choice) openName(ctx context.Context, r *Request) (*Conn, error) {
	if c.p == nil && c.d.usable.Load().alike {
		if err := c.pick(r, c.want); err != nil {
			return nil, err
		}
	}
	if c.p != nil {
		if conn := c.reuse(r, c.usable()); conn != nil {
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
	late, lerr := c.d.resolver.Lookup(ctx, r.Target.Host, a.Pending)
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
			switch why, _ := c.d.filter.verdict(addr, r.Target.Port); {
			case why != "" && denied == nil:
				denied = c.d.filter.Check(addr, r.Target.Port)
			case why != "":
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
		if err := c.pick(r, has); err != nil {
			return nil, err
		}
		if conn := c.reuse(r, c.usable()); conn != nil {
			return conn, nil
		}
	}
	u := c.usable()
	switch {
	case has&c.want == 0:
		return nil, c.familyError(r, has)
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
	return c.dial(ctx, r, interleave(list[:0], v4, v6, r.Target.Port))
}

// lookup resolves the target's name for the families in want. When it has
// addresses of the other family only, it says so, because then it is not the
// name that is at fault; those addresses are never dialled.
func (c *choice) lookup(ctx context.Context, r *Request, want selection.Family) (resolve.Answer, error) {
	const both = selection.V4 | selection.V6
	if c.d.resolver == nil {
		return resolve.Answer{}, fail(ErrDNS, nil, "resolve %s: escaper %s has no resolver", r.Target.Host, c.d.name)
	}
	if r.Task != nil && !c.d.resolver.Ready(r.Target.Host, want) {
		r.Task.Leave()
	}
	a, err := c.d.resolver.Lookup(ctx, r.Target.Host, want)
	if err == nil {
		return a, nil
	}
	if errors.Is(err, resolve.ErrNotFound) && want != both {
		if r.Task != nil {
			r.Task.Leave()
		}
		if other, oerr := c.d.resolver.Lookup(ctx, r.Target.Host, both&^want); oerr == nil {
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
		key := keyOf(r, c.p.source(one))
		for {
			l := c.p.take(&key)
			if l == nil {
				break
			}
			// The rules, or the host's addresses, may have changed since it
			// was dialled.
			if c.d.filter.Check(l.remote.Addr(), l.remote.Port()) == nil {
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
	if r.Reuse {
		l.idlers = c.d.idlers
		l.key = keyOf(r, c.p.source(selection.FamilyOf(l.remote.Addr())))
	}
	if err := l.enter(c.p); err != nil {
		l.pool.Closed(l.node)
		c.p.counters.closed.Add(1)
		if l.tcp != nil {
			reset(l.tcp)
		} else {
			resetFD(l.fd)
		}
		return nil, err
	}
	return l.conn(c.p, false), nil
}

// connect makes the connection: on the request's task, where there is one and
// nothing to race.
func (l *link) connect(ctx context.Context, c *choice, r *Request, list []netip.AddrPort) (err error) {
	if r.Task != nil && len(list) == 1 {
		l.remote = list[0]
		l.fd, l.source, err = c.d.attemptOn(ctx, r.Task, c.p, l.remote, c.deadline)
		return err
	}
	if r.Task != nil {
		r.Task.Leave()
	}
	tcp, err := c.d.connect(c.d.withDeadline(ctx, c.deadline), c.p, list)
	if err == nil {
		l.tcp, l.source, l.remote = tcp, localAddr(tcp), addrPort(tcp.RemoteAddr())
	}
	return err
}

func (l *link) conn(p *Path, reused bool) *Conn {
	return &Conn{TCP: l.tcp, FD: l.fd, Path: p, Source: l.source, Remote: l.remote, Reused: reused, link: l}
}
