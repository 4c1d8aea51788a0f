package escaper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"wayout/selection"
)

// OpenPacket gives a request that has no target yet the sockets for datagrams
// of the path that is selected for it or, when none is, that the policy picks.
// Targets are judged one by one, by PacketConn.Send. It refuses what Open would
// refuse, and fills r.Choice.
//
// A request whose target is an address gets a socket for that family alone, and
// is refused when that target is.
func (d *Door) OpenPacket(ctx context.Context, r *Request) (PacketConn, error) {
	t := d.table.Load()
	if t == nil {
		return nil, ErrClosed
	}
	r.Choice = Choice{}
	c, err := t.choose(r, true) // a datagram proves nothing
	if err != nil {
		return nil, err
	}
	first := c
	for {
		p, err := c.openPacketOnce(ctx, r)
		if err == nil || !c.passesBy(&first, r, err) {
			return p, err
		}
	}
}

// openPacketOnce opens by one path.
func (c *choice) openPacketOnce(ctx context.Context, r *Request) (PacketConn, error) {
	if err := c.ready(); err != nil {
		return nil, err
	}
	if to := r.Target.Addr; to.IsValid() && !c.d.peers {
		if err := c.aim(r, to.Unmap()); err != nil {
			return nil, err
		}
	}
	if c.p == nil {
		if err := c.pick(r, c.want, AllDatagrams()); err != nil {
			return nil, err
		}
	}
	if c.d.peers {
		return c.openPeerPacket(ctx, r)
	}
	return c.openPacket(r)
}

// datagrams is a PacketConn by an address of this host: a socket for each
// family that the path can be used by.
type datagrams struct {
	c      *choice
	socks  []*datagramSocket
	link   *link
	killed atomic.Pointer[error]

	// With two sockets, both are read by goroutines of their own.
	in      chan datagram
	done    chan struct{}
	readers sync.WaitGroup
	closed  sync.Once
}

type datagramSocket struct {
	f    selection.Family
	udp  *net.UDPConn
	raw  syscall.RawConn
	from netip.AddrPort
}

// datagram is one that a socket has received, in a buffer of the pool.
type datagram struct {
	buf  *[]byte
	n    int
	from netip.AddrPort
	err  error
}

// maxDatagram is the largest payload of UDP, jumbograms aside.
const maxDatagram = 65535

// datagramBuffers are shared by all associations.
type datagramBuffers struct{ pool sync.Pool }

func (p *datagramBuffers) get() *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, maxDatagram)
	return &b
}

func (c *choice) openPacket(r *Request) (PacketConn, error) {
	p := &datagrams{c: c, done: make(chan struct{})}
	src := c.sources(r)
	u := c.usable(c.want)
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		other := r.Target.Addr.IsValid() && selection.FamilyOf(r.Target.Addr) != f
		if u&f == 0 || !src.of(f).IsValid() || other {
			continue
		}
		s, err := c.d.listenPacket(c.p, f, src.of(f))
		if err != nil {
			return nil, errors.Join(err, p.closeSockets())
		}
		p.socks = append(p.socks, s)
	}
	if len(p.socks) == 0 {
		return nil, c.p.downError(c.p.state.Load(), c.want)
	}
	if err := p.enter(); err != nil {
		return nil, errors.Join(err, p.closeSockets())
	}
	if len(p.socks) > 1 {
		p.in = make(chan datagram)
		for _, s := range p.socks {
			p.readers.Go(func() { p.read(s) })
		}
	}
	return p, nil
}

// enter puts the association on the path's books as one connection.
func (p *datagrams) enter() error {
	c := p.c
	p.link = &link{ledger: c.p.ledger, fd: -1, source: p.socks[0].from, pool: c.d.pool, node: c.p.node}
	if len(p.socks) > 1 {
		p.link.second = p.socks[1].from.Addr()
	}
	p.link.kill = p.end
	p.link.pool.Opened(p.link.node)
	c.p.count(ResultOK)
	if err := p.link.enter(c.p); err != nil {
		p.link.pool.Closed(p.link.node)
		c.p.counters.closed.Add(1)
		return err
	}
	return nil
}

// listenPacket opens a UDP socket that is bound to the path.
func (d *Direct) listenPacket(p *Path, f selection.Family, from netip.Addr) (*datagramSocket, error) {
	o := d.pin(p)
	o.port = true
	network := "udp4"
	if f == selection.V6 {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error { return o.control("", "", raw) }}
	c, err := lc.ListenPacket(context.Background(), network, netip.AddrPortFrom(from, 0).String())
	if err != nil {
		p.count(ResultLocal)
		return nil, p.classifyPacket(err, from)
	}
	udp := c.(*net.UDPConn)
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	local := netip.AddrPortFrom(at.Addr().WithZone("").Unmap(), at.Port())
	if err := p.verify(local, from); err != nil {
		return nil, errors.Join(err, udp.Close())
	}
	raw, err := udp.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, udp.Close())
	}
	return &datagramSocket{f: f, udp: udp, raw: raw, from: local}, nil
}

// classifyPacket says what a UDP socket that could not be opened means.
func (p *Path) classifyPacket(err error, from netip.Addr) error {
	var no syscall.Errno
	errors.As(err, &no)
	switch no {
	case syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM:
		return fail(ErrResources, err, "path %s: open a datagram socket: %s", p.Name, no)
	case syscall.EADDRINUSE, syscall.EAGAIN:
		return fail(selection.ErrPorts, err, "path %s: the ports of %s are used up", p.Name, from)
	case syscall.EADDRNOTAVAIL:
		return fail(selection.ErrBind, err, "path %s: cannot bind %s: it is not on this host", p.Name, from)
	}
	return fail(selection.ErrBind, err, "path %s: cannot bind %s: %s", p.Name, from, no)
}

// Source implements PacketConn.
func (p *datagrams) Source(f selection.Family) netip.AddrPort {
	for _, s := range p.socks {
		if s.f == f {
			return s.from
		}
	}
	return netip.AddrPort{}
}

// Send implements PacketConn.
func (p *datagrams) Send(ctx context.Context, to Target, b []byte) error {
	addr, err := p.target(ctx, to)
	if err != nil {
		return err
	}
	f := selection.FamilyOf(addr)
	for _, s := range p.socks {
		if s.f != f {
			continue
		}
		if _, err := s.udp.WriteToUDPAddrPort(b, netip.AddrPortFrom(addr, to.Port)); err != nil {
			return p.sendError(err, addr, to.Port)
		}
		return nil
	}
	if p.c.want&f != 0 {
		return p.c.p.downError(p.c.p.state.Load(), f)
	}
	return p.c.p.familyError(f)
}

func (p *datagrams) sendError(err error, to netip.Addr, port uint16) error {
	if why := p.killed.Load(); why != nil {
		return *why
	}
	at := netip.AddrPortFrom(to, port)
	var no syscall.Errno
	switch {
	case errors.Is(err, net.ErrClosed):
		return ErrClosed
	case errors.As(err, &no) && no == syscall.EPERM:
		return fail(ErrGuarded, err, "path %s: send to %s: refused by the kernel's guard", p.c.p.Name, at)
	}
	return fail(ErrUnreachable, err, "path %s: send to %s: %v", p.c.p.Name, at, err)
}

// target finds the address of a datagram's target, and asks the filter about
// that very address.
func (p *datagrams) target(ctx context.Context, to Target) (netip.Addr, error) {
	c := p.c
	if to.Addr.IsValid() {
		a := to.Addr.WithZone("").Unmap()
		return a, c.d.filter.Check(a, to.Port)
	}
	var have selection.Family
	for _, s := range p.socks {
		have |= s.f
	}
	r := &Request{Target: to}
	a, err := c.lookup(ctx, r, have)
	if err != nil {
		return netip.Addr{}, err
	}
	// There is no racing of datagrams: IPv4 first, unless the strategy says
	// otherwise, because it is what every host has.
	order := [...][]netip.Addr{a.V4, a.V6}
	if c.d.strategy == V6First {
		order = [...][]netip.Addr{a.V6, a.V4}
	}
	denied, other := error(nil), netip.Addr{}
	for _, list := range order {
		for _, addr := range list {
			addr = addr.WithZone("").Unmap()
			err := c.d.filter.Check(addr, to.Port)
			switch {
			case err == nil && have&selection.FamilyOf(addr) != 0:
				return addr, nil
			case err == nil:
				other = addr
			case denied == nil:
				denied = err
			}
		}
	}
	switch {
	case other.IsValid():
		return other, nil // Send knows what to say of its family
	case denied != nil:
		return netip.Addr{}, denied
	}
	return netip.Addr{}, fail(ErrDNS, nil, "resolve %s: no address", to.Host)
}

// read hands on what one of two sockets receives.
func (p *datagrams) read(s *datagramSocket) {
	for {
		g := datagram{buf: p.c.d.datagrams.get()}
		g.n, g.from, g.err = s.receive(*g.buf)
		select {
		case p.in <- g:
		case <-p.done:
			return
		}
		if g.err != nil {
			return
		}
	}
}

// receive reads one datagram. What an ICMP message says of an earlier one is no
// end.
func (s *datagramSocket) receive(b []byte) (int, netip.AddrPort, error) {
	for {
		n, from, err := s.udp.ReadFromUDPAddrPort(b)
		if err == nil {
			return n, netip.AddrPortFrom(from.Addr().WithZone("").Unmap(), from.Port()), nil
		}
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, netip.AddrPort{}, err
		}
		var no syscall.Errno
		if !errors.As(err, &no) {
			return 0, netip.AddrPort{}, err
		}
		switch no {
		case syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EMSGSIZE, syscall.EPROTO, syscall.EACCES, syscall.ENOPROTOOPT:
		default:
			return 0, netip.AddrPort{}, err
		}
	}
}

// Receive implements PacketConn.
func (p *datagrams) Receive(b []byte) (int, netip.AddrPort, error) {
	var g datagram
	if p.in == nil {
		g.n, g.from, g.err = p.socks[0].receive(b)
	} else {
		select {
		case g = <-p.in:
			g.n = copy(b, (*g.buf)[:g.n])
			p.c.d.datagrams.pool.Put(g.buf)
		case <-p.done:
			g.err = net.ErrClosed
		}
	}
	if g.err == nil {
		return g.n, g.from, nil
	}
	if why := p.killed.Load(); why != nil {
		return 0, netip.AddrPort{}, *why
	}
	return 0, netip.AddrPort{}, fmt.Errorf("path %s: receive: %w", p.c.p.Name, g.err)
}

// AwaitReceive blocks until Receive has something to give, or an error to
// tell, for who takes a buffer only then.
func (p *datagrams) AwaitReceive() error {
	if p.in != nil {
		return nil
	}
	err := p.socks[0].raw.Read(func(fd uintptr) bool {
		one := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(one[:], 0)
		return n != 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
	if why := p.killed.Load(); why != nil {
		return *why
	}
	return err
}

// end is what the path's books call when its address has gone.
func (p *datagrams) end(err error) {
	p.killed.Store(&err)
	_ = p.Close()
}

// OnKill implements PacketConn.
func (p *datagrams) OnKill(f func(error)) {
	if err := p.link.onKill(func(err error) { p.killed.Store(&err); f(err) }); err != nil {
		f(err)
	}
}

// Close implements PacketConn. A second one does nothing.
func (p *datagrams) Close() error {
	var err error
	p.closed.Do(func() {
		close(p.done)
		err = p.closeSockets()
		p.link.strike()
		p.readers.Wait()
	})
	return err
}

func (p *datagrams) closeSockets() error {
	var errs []error
	for _, s := range p.socks {
		errs = append(errs, s.udp.Close())
	}
	return errors.Join(errs...)
}
