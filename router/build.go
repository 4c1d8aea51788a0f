package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/auth"
	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/resolve"
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
	door      *escaper.Door           // of table, closed until the plan is in force
	client    uint32                  // mark of listeners and what they accept
	control   uint32                  // mark of the daemon's own traffic
	answers   netcfg.Mark             // of sockets that answer diverted clients
	fixed     map[string]*config.Node // by path, while the plan is built
	holdings  map[*escaper.Direct]*holding
	told      *netcfg.Snapshot // of which host knows
	sockets   *escaper.Sockets
	idle      *escaper.Idle // nil: no connection is kept
	taken     []uint32      // path numbers that the plan before does not have
	published publications
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
	p.answers.Value, p.answers.Mask = layout.Answers()
	p.numberUplinks(prior)
	for i := range c.Resolvers {
		rc := &c.Resolvers[i]
		if prior != nil && prior.resolvers[rc.Name] != nil && reflect.DeepEqual(findResolver(prior.config, rc.Name), rc) {
			p.resolvers[rc.Name] = prior.resolvers[rc.Name]
			continue
		}
		p.resolvers[rc.Name] = resolve.New(resolve.Options{
			Dial: marked(p.control), Log: r.log,
			Servers: rc.Server, Static: rc.Hosts, Timeout: rc.Timeout, ServeStale: rc.ServeStale, QueryCase: rc.QueryCase && rc.Type == "dns",
		})
	}
	r.takePublished(p, prior)
	gate := auth.NewGate(0)
	for _, g := range c.UserGroups {
		if p.groups[g.Name], err = r.buildGroup(g, gate); err != nil {
			return nil, err
		}
	}
	if err := r.buildEscapers(p, prior); err != nil {
		return nil, err
	}
	p.config, p.fixed = withoutNodes(c), nil
	return p, nil
}

// withoutNodes is a configuration as far as a running daemon needs it: of tens of
// thousands of nodes, the paths that were made of them are enough.
func withoutNodes(c *config.Config) *config.Config {
	out := *c
	out.Escapers = slices.Clone(c.Escapers)
	for i := range out.Escapers {
		out.Escapers[i].Nodes, out.Escapers[i].BindIP = nil, nil
	}
	return &out
}

// discard lets go of a plan that does not come into force.
func (r *Router) discard(p, prior *plan) error {
	return errors.Join(p.close(prior), r.giveBack(p))
}

// giveBack frees the numbers that a plan has taken for its paths.
func (r *Router) giveBack(p *plan) error {
	var errs []error
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

func (r *Router) buildGroup(g config.UserGroup, gate *auth.Gate) (*auth.Group, error) {
	users := make([]auth.Credential, len(g.Users))
	for i := range g.Users {
		u := &g.Users[i]
		users[i] = auth.Credential{
			User: auth.User{
				Name: u.Name, Selection: egressPath(u), Allow: u.Allow, From: u.From,
				Meter: r.meters.of("user "+g.Name+" "+u.Name, u.Limits),
			},
			Hash: u.Password,
		}
	}
	return auth.NewGroup(g.Name, users, auth.Options{Gate: gate})
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
// marks a port on which the client speaks first; more may set further options.
func listen(at netip.AddrPort, mark uint32, proxy bool, more ...func(lender) error) (*net.TCPListener, error) {
	lc := net.ListenConfig{
		KeepAlive: -1, // four system calls on each accepted connection
		Control: func(_, _ string, raw syscall.RawConn) error {
			for _, f := range more {
				if err := f(raw); err != nil {
					return err
				}
			}
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

// listenPacket opens the client's side of a UDP association.
func listenPacket(at netip.AddrPort, mark uint32) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return errors.Join(setMark(raw, mark), freebind(raw))
	}}
	network := "udp6"
	if at.Addr().Is4() {
		network = "udp4"
	}
	c, err := lc.ListenPacket(context.Background(), network, at.String())
	if err != nil {
		return nil, fmt.Errorf("listen for datagrams on %s: %w", at, err)
	}
	return c.(*net.UDPConn), nil
}

// lender lends a socket's descriptor for a call.
type lender interface{ Control(func(fd uintptr)) error }

// letBy lets another socket have a part of a listener's addresses and its port, when
// both allow it, or does so no more.
func letBy(l lender, yes bool) error {
	value := 0
	if yes {
		value = 1
	}
	var err error
	ctl := l.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, value) })
	if err = errors.Join(ctl, err); err != nil {
		return fmt.Errorf("set SO_REUSEPORT: %w", err)
	}
	return nil
}

// freebind lets a socket have an address of a whole prefix, which IPv6 takes for
// nobody's (AnyIP). One flag serves both families.
func freebind(raw syscall.RawConn) error {
	var err error
	ctl := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
	if err = errors.Join(ctl, err); err != nil {
		return fmt.Errorf("set IP_FREEBIND: %w", err)
	}
	return nil
}

// listenBare opens a listener for a front end, which accepts in the relay.
func listenBare(at netip.AddrPort, mark uint32, more ...func(lender) error) (*relay.Listener, error) {
	l, err := listen(at, mark, true, more...)
	if err != nil {
		return nil, err
	}
	bare, err := relay.NewListener(l)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", at, err)
	}
	return bare, nil
}
