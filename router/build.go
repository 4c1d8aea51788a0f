package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/router/auth"
	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/resolve"
	"wayout/selection"
)

// plan is all that a configuration comes to before anything touches the
// system: it is checked by being built.
type plan struct {
	config    *config.Config
	layout    bpf.Layout
	resolvers map[string]*resolve.Resolver
	groups    map[string]*auth.Group
	uplinks   map[string]uplink
	host      *escaper.Host
	table     *escaper.Table
	door      *escaper.Door   // of table, closed until the plan is in force
	client    uint32          // mark of listeners and what they accept
	control   uint32          // mark of the daemon's own traffic
	devices   []string        // interfaces that paths have to leave by
	unbound   []*escaper.Path // paths that have only an interface
	taken     []uint32        // path numbers that the plan before does not have
}

// uplink is an uplink with its number, which its table and its mark are made
// from. Numbers are positions in the configuration, from 1.
type uplink struct {
	config.Uplink
	number uint32
}

// build makes the parts of a configuration. Nothing is opened; the sysctl of
// the local ports is read. What is the same in the plan before, which may be
// nil, is taken over: resolvers with their caches, the numbers of uplinks and
// paths.
func (r *Router) build(c *config.Config, layout bpf.Layout, prior *plan) (_ *plan, err error) {
	p := &plan{
		config: c, layout: layout, host: &escaper.Host{}, door: &escaper.Door{},
		resolvers: map[string]*resolve.Resolver{}, groups: map[string]*auth.Group{}, uplinks: map[string]uplink{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.discard(p, prior))
		}
	}()
	if p.client, err = layout.Mark(bpf.ClassClient, 0, 0); err != nil {
		return nil, err
	}
	if p.control, err = layout.Mark(bpf.ClassControl, 0, 0); err != nil {
		return nil, err
	}
	p.numberUplinks(prior)
	for _, rc := range c.Resolvers {
		if prior != nil && prior.resolvers[rc.Name] != nil {
			p.resolvers[rc.Name] = prior.resolvers[rc.Name]
			continue
		}
		p.resolvers[rc.Name] = resolve.New(resolve.Options{Dial: marked(p.control), Log: r.log})
	}
	gate := auth.NewGate(0)
	for _, g := range c.UserGroups {
		if p.groups[g.Name], err = buildGroup(g, gate); err != nil {
			return nil, err
		}
	}
	if err := r.buildEscapers(p, prior); err != nil {
		return nil, err
	}
	return p, nil
}

// discard lets go of a plan that does not come into force.
func (r *Router) discard(p, prior *plan) error {
	errs := []error{p.close(prior)}
	for _, n := range p.taken {
		errs = append(errs, r.numbers.Release(n), r.numbers.Free(n))
	}
	return errors.Join(errs...)
}

// numberUplinks keeps the numbers that uplinks have, because their tables and
// the marks of open sockets hold them, and gives the others the lowest free.
func (p *plan) numberUplinks(prior *plan) {
	used := map[uint32]bool{}
	if prior != nil {
		for name, u := range prior.uplinks {
			p.uplinks[name] = u
			used[u.number] = true
		}
	}
	next := uint32(1)
	for _, u := range p.config.Uplinks {
		if _, ok := p.uplinks[u.Name]; ok {
			continue
		}
		for used[next] {
			next++
		}
		p.uplinks[u.Name] = uplink{u, next}
		used[next] = true
	}
}

// close lets go of what build made and the other plan, which may be nil, does
// not use.
func (p *plan) close(other *plan) error {
	for name, r := range p.resolvers {
		if other == nil || other.resolvers[name] != r {
			r.Close()
		}
	}
	return nil
}

func buildGroup(g config.UserGroup, gate *auth.Gate) (*auth.Group, error) {
	users := make([]auth.Credential, len(g.Users))
	for i, u := range g.Users {
		users[i] = auth.Credential{
			User: auth.User{Name: u.Name, Selection: u.EgressPath, Allow: u.Allow},
			Hash: u.Password,
		}
	}
	return auth.NewGroup(g.Name, users, auth.Options{Gate: gate})
}

func (r *Router) buildEscapers(p, prior *plan) error {
	sockets, err := escaper.NewSockets(0, 0)
	if err != nil {
		return err
	}
	var idle *escaper.Idle
	if k := p.config.Keepalive; k.Enable {
		idle = escaper.NewIdle(k.MaxPerKey, k.Max, k.IdleExpire)
	}
	var all []*escaper.Direct
	for i := range p.config.Escapers {
		e := &p.config.Escapers[i]
		o := escaper.Options{
			Name: e.Name, Policy: e.PickPolicy, StrictIndex: e.StrictIndex, EnableSelection: e.EnablePathSelection,
			Resolver: p.resolvers[e.Resolver], Sockets: sockets, Idle: idle,
			ConnectTimeout: e.ConnectTimeout, AttemptDelay: e.HappyEyeballs.ConnectionAttemptDelay,
		}
		if o.PickKey, err = escaper.ParsePickKey(e.PickKey); err != nil {
			return err
		}
		if o.Filter, err = escaper.NewFilter(p.host, rules(e.Filter.Allow), rules(e.Filter.Deny)); err != nil {
			return fmt.Errorf("escaper %s: %w", e.Name, err)
		}
		if prior != nil {
			o.Prior = prior.table.Escaper(e.Name)
		}
		if o.Nodes, err = r.buildNodes(p, e, o.Prior); err != nil {
			return fmt.Errorf("escaper %s: %w", e.Name, err)
		}
		d, err := escaper.NewDirect(o)
		if err != nil {
			return err
		}
		all = append(all, d)
	}
	if p.table, err = escaper.NewTable(all...); err != nil {
		return err
	}
	for _, path := range p.table.Paths() {
		if d := p.device(path); d != "" && !slices.Contains(p.devices, d) {
			p.devices = append(p.devices, d)
		}
		if path.Unbound != 0 {
			p.unbound = append(p.unbound, path)
		}
	}
	return nil
}

func rules(list []config.Rule) []string {
	words := make([]string, len(list))
	for i, r := range list {
		if words[i] = string(r.Class); r.Class == config.ClassNone {
			words[i] = r.Prefix.String()
		}
	}
	return words
}

func (r *Router) buildNodes(p *plan, e *config.Escaper, prior *escaper.Direct) ([]escaper.NodeOptions, error) {
	before := map[string]*escaper.Path{}
	if prior != nil {
		for _, path := range prior.Paths() {
			before[path.ID] = path
		}
	}
	nodes := make([]escaper.NodeOptions, len(e.Nodes))
	for i, n := range e.Nodes {
		o := escaper.NodeOptions{
			ID: n.ID, V4: n.IPv4, V6: n.IPv6, Interface: n.Interface, BindToDevice: n.Interface != "",
			Uplink: n.Uplink, Weight: n.Weight,
		}
		if !o.V4.IsValid() && !o.V6.IsValid() {
			o.Unbound = selection.V4 | selection.V6
		}
		var err error
		if old := before[n.ID]; old != nil && samePath(old.NodeOptions, o) {
			o.Number = old.Number
		} else if o.Number, err = r.numbers.Take(); err != nil {
			return nil, fmt.Errorf("node %s: %w", n.ID, err)
		} else {
			p.taken = append(p.taken, o.Number)
		}
		if o.Mark, err = p.layout.Mark(bpf.ClassPath, p.uplinks[n.Uplink].number, o.Number); err != nil {
			return nil, fmt.Errorf("node %s: %w", n.ID, err)
		}
		nodes[i] = o
	}
	return nodes, nil
}

// samePath says whether two paths are one: then its number, its connections and
// its counters go on.
func samePath(a, b escaper.NodeOptions) bool {
	a.Number, a.Mark, a.Weight = b.Number, b.Mark, b.Weight
	return a == b
}

// marked makes a dial function whose sockets carry a mark.
func marked(mark uint32) func(context.Context, string, string) (net.Conn, error) {
	d := &net.Dialer{KeepAlive: -1, Control: func(_, _ string, raw syscall.RawConn) error { return setMark(raw, mark) }}
	d.SetMultipathTCP(false)
	return d.DialContext
}

func setMark(raw syscall.RawConn, mark uint32) error {
	var err error
	ctl := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)) })
	if err != nil {
		err = fmt.Errorf("set SO_MARK (it needs CAP_NET_ADMIN): %w", err)
	}
	return errors.Join(ctl, err)
}

// deferAccept is how long the kernel holds back a connection on which the
// client has said nothing yet, in seconds: in HTTP the client speaks first.
const deferAccept = 10

// listen opens a marked listener. What it accepts inherits the mark. proxy
// marks a port on which the client speaks first.
func listen(at netip.AddrPort, mark uint32, proxy bool) (*net.TCPListener, error) {
	lc := net.ListenConfig{
		KeepAlive: -1, // four system calls on each accepted connection
		Control: func(_, _ string, raw syscall.RawConn) error {
			if err := setMark(raw, mark); err != nil || !proxy {
				return err
			}
			var err error
			ctl := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, deferAccept)
			})
			return errors.Join(ctl, err)
		},
	}
	lc.SetMultipathTCP(false)
	network := "tcp"
	if at.Addr().Is4() {
		network = "tcp4"
	}
	l, err := lc.Listen(context.Background(), network, at.String())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", at, err)
	}
	return l.(*net.TCPListener), nil
}

// listenBare opens a listener for a front end, which accepts in the relay.
func listenBare(at netip.AddrPort, mark uint32) (*relay.Listener, error) {
	l, err := listen(at, mark, true)
	if err != nil {
		return nil, err
	}
	bare, err := relay.NewListener(l)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", at, err)
	}
	return bare, nil
}
