package escaper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"wayout/selection"
)

// attempt makes one connection from the source of the target's family to one
// address, and counts how it ended. An attempt that ctx's cancelling
// ends (another won the race, or nobody waits) is not counted.
func (d *Direct) attempt(ctx context.Context, p *Path, src sources, to netip.AddrPort) (*net.TCPConn, error) {
	f := selection.FamilyOf(to.Addr())
	from := src.of(f)
	// The typed dialer takes a zero Addr for the wildcard address
	// (golang/go#81620), which would be no pin at all.
	if !from.IsValid() {
		return nil, p.familyError(f)
	}
	network := "tcp4"
	if f == selection.V6 {
		network = "tcp6"
	}
	o := d.pin(p)
	// Keepalive is off here: who holds the connection decides about it, once.
	dialer := net.Dialer{KeepAlive: -1, Control: o.control}
	c, err := dialer.DialTCP(ctx, network, netip.AddrPortFrom(from, 0), to)
	if err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, fail(context.Canceled, err, "path %s: connect to %s: given up", p.Name, to)
		}
		r, err := p.classify(err, from, to)
		p.count(r)
		d.observe(p, r, to, err)
		return nil, err
	}
	local := localAddr(c)
	if err := p.verify(local, from); err != nil {
		reset(c)
		return nil, err
	}
	p.count(ResultOK)
	d.observe(p, ResultOK, to, nil)
	return c, nil
}

// pin returns what is set on the sockets of a path.
func (d *Direct) pin(p *Path) pin {
	o := pin{mark: p.Mark, ports: d.sockets.ports}
	if p.BindToDevice {
		o.device = p.Interface
	}
	o.free = p.Net4.IsValid() || p.Net6.IsValid()
	return o
}

// verify compares the local end of a new connection with the address that it
// was bound to. Nothing is known to make them differ; if something does, no
// byte leaves.
func (p *Path) verify(local netip.AddrPort, from netip.Addr) error {
	if local.Addr() == from || from.IsUnspecified() {
		return nil
	}
	p.count(ResultLocal)
	return fail(ErrGuarded, nil, "path %s: connected from %s in place of %s", p.Name, local.Addr(), from)
}

// localAddr returns what net asked the kernel when it connected.
func localAddr(c *net.TCPConn) netip.AddrPort { return addrPort(c.LocalAddr()) }

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().WithZone("").Unmap(), ap.Port())
}

// classify says what a failed attempt means. The same error number means
// different things of different system calls: EADDRNOTAVAIL of bind is an
// address that is not there, of connect a range of ports that is used up.
func (p *Path) classify(err error, from netip.Addr, to netip.AddrPort) (Result, error) {
	var sys *os.SyscallError
	var no syscall.Errno
	call := ""
	if errors.As(err, &sys) {
		call = sys.Syscall
	}
	errors.As(err, &no)
	switch no {
	case syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM:
		return ResultLocal, fail(ErrResources, err, "path %s: connect to %s: %s", p.Name, to, no)
	}
	switch {
	case call == "bind" && no == syscall.EADDRNOTAVAIL:
		return ResultLocal, fail(selection.ErrBind, err, "path %s: cannot bind %s: it is not on this host", p.Name, from)
	case call == "bind", call == "socket", strings.HasPrefix(call, "setsockopt"):
		return ResultLocal, fail(selection.ErrBind, err, "path %s: cannot bind %s: %s: %s", p.Name, from, call, no)
	case isTimeout(err), no == syscall.ETIMEDOUT:
		return ResultTimeout, fail(ErrTimeout, err, "path %s: connect to %s: timed out", p.Name, to)
	}
	switch no {
	case syscall.EADDRNOTAVAIL, syscall.EADDRINUSE, syscall.EAGAIN:
		return ResultLocal, fail(selection.ErrPorts, err, "path %s: the ports of %s towards %s are used up", p.Name, from, to)
	case syscall.EPERM:
		return ResultLocal, fail(ErrGuarded, err, "path %s: connect from %s to %s: refused by the kernel's guard", p.Name, from, to)
	case syscall.ECONNREFUSED:
		return ResultRefused, fail(ErrRefused, err, "path %s: connect to %s: refused", p.Name, to)
	case syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE:
		return ResultReset, fail(ErrReset, err, "path %s: connect to %s: reset", p.Name, to)
	case syscall.ENODEV:
		return ResultLocal, fail(selection.ErrBind, err, "path %s: interface %s: %s", p.Name, p.Interface, no)
	case 0:
		return ResultUnreachable, fail(ErrUnreachable, err, "path %s: connect to %s: %v", p.Name, to, err)
	}
	// What is left is what a route or an ICMP message says: no route,
	// prohibited, host down, network down, protocol unreachable.
	return ResultUnreachable, fail(ErrUnreachable, err, "path %s: connect to %s: %s", p.Name, to, no)
}

func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

// telling orders failures by how much they say of the target: when several
// addresses were tried, the most telling failure stands for them all.
func telling(err error) int {
	for i, kind := range [...]error{ErrRefused, ErrReset, ErrTimeout, ErrUnreachable, selection.ErrPorts, selection.ErrBind} {
		if errors.Is(err, kind) {
			return -i
		}
	}
	return -100
}

// race dials a list of addresses as RFC 8305 says: one after the other, each
// begun when the one before has failed, or has had delay to answer; the first
// to connect wins, and the others are given up. The caller's own goroutine
// does the work as long as no attempt takes longer than delay.
type race struct {
	ctx    context.Context
	cancel context.CancelFunc
	d      *Direct
	p      *Path
	src    sources
	list   []netip.AddrPort
	done   chan struct{} // closed when there is a winner, or no hope of one

	mu      sync.Mutex
	next    int // in list
	running int // runs that are under way, and those that a timer may begin
	over    bool
	conn    *net.TCPConn
	err     error
}

// connect dials the addresses, at least one, until ctx ends.
func (d *Direct) connect(ctx context.Context, p *Path, src sources, list []netip.AddrPort) (*net.TCPConn, error) {
	if len(list) == 1 {
		return d.attempt(ctx, p, src, list[0])
	}
	// The list is the caller's, on its stack; the last attempts may outlive it.
	r := &race{d: d, p: p, src: src, list: append([]netip.AddrPort(nil), list...), done: make(chan struct{}), running: 1}
	r.ctx, r.cancel = context.WithCancel(ctx)
	defer r.cancel()
	r.run()
	<-r.done
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn != nil {
		return r.conn, nil
	}
	return nil, r.err
}

// run makes attempts until one connects, another run has taken over, or the
// list is at its end.
func (r *race) run() {
	for {
		to, more := r.take()
		if !to.IsValid() {
			return
		}
		var successor *time.Timer
		if more {
			successor = time.AfterFunc(r.d.delay, r.run)
		}
		c, err := r.d.attempt(r.ctx, r.p, r.src, to)
		taken := successor != nil && !successor.Stop()
		r.settle(c, err, more && !taken)
		if c != nil || taken {
			r.leave()
			return
		}
	}
}

// take returns the next address, and whether there are more behind it, in
// which case the run that a timer will begin for them is counted. When nothing
// is to be dialled any more it ends the caller's run.
func (r *race) take() (to netip.AddrPort, more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over || r.next == len(r.list) || r.ctx.Err() != nil || expired(r.ctx) {
		r.leaveLocked()
		return netip.AddrPort{}, false
	}
	to = r.list[r.next]
	r.next++
	if r.next < len(r.list) {
		r.running++
		return to, true
	}
	return to, false
}

// settle notes how an attempt ended. unbegun says that the run counted for its
// timer will never begin.
func (r *race) settle(c *net.TCPConn, err error, unbegun bool) {
	r.mu.Lock()
	if unbegun {
		r.running--
	}
	won := c != nil && !r.over
	switch {
	case won:
		r.conn, r.over = c, true
		close(r.done)
	case err != nil && !r.over && (r.err == nil || telling(err) > telling(r.err)):
		r.err = err
	}
	r.mu.Unlock()
	switch {
	case won:
		r.cancel()
	case c != nil: // a second winner
		_ = c.Close()
		r.p.counters.closed.Add(1)
	}
}

func (r *race) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaveLocked()
}

// leaveLocked ends a run. The last one ends the race.
func (r *race) leaveLocked() {
	r.running--
	if r.running > 0 || r.over {
		return
	}
	r.over = true
	if r.err == nil {
		r.err = ended(r.ctx, r.p)
	}
	close(r.done)
}

// ended is the error of a dial that ctx ended before any attempt did.
func ended(ctx context.Context, p *Path) error {
	if err := ctx.Err(); errors.Is(err, context.Canceled) {
		return fail(context.Canceled, err, "path %s: connect: given up", p.Name)
	}
	return fail(ErrTimeout, context.DeadlineExceeded, "path %s: connect: timed out", p.Name)
}

func expired(ctx context.Context) bool {
	at, ok := ctx.Deadline()
	return ok && !time.Now().Before(at)
}

// interleave orders addresses for a race: IPv6 first, unless the strategy says
// otherwise, then the families in turn, each in the order of its answers (RFC
// 8305 section 4). Addresses past the list's capacity are left out: a name with
// more has others that fail.
func interleave(list []netip.AddrPort, s Strategy, v4, v6 []netip.Addr, port uint16) []netip.AddrPort {
	order := [...][]netip.Addr{v6, v4}
	if s == V4First {
		order = [...][]netip.Addr{v4, v6}
	}
	for i := 0; i < len(v4) || i < len(v6); i++ {
		for _, from := range order {
			if i < len(from) && len(list) < cap(list) {
				list = append(list, netip.AddrPortFrom(from[i], port))
			}
		}
	}
	return list
}

// deadline is a context that ends at a time, without the timer that
// context.WithDeadline would cost each dial: net sets the time on the socket,
// and the socket's own timer does the work.
type deadline struct {
	context.Context
	at   time.Time
	open chan struct{} // never closed
}

func (d *Direct) withDeadline(ctx context.Context, at time.Time) context.Context {
	if t, ok := ctx.Deadline(); ok && t.Before(at) {
		return ctx
	}
	return &deadline{Context: ctx, at: at, open: d.open}
}

func (d *deadline) Deadline() (time.Time, bool) { return d.at, true }

// Done is never nil, because net looks at the deadline only of a context that
// can end.
func (d *deadline) Done() <-chan struct{} {
	if c := d.Context.Done(); c != nil {
		return c
	}
	return d.open
}

// AfterFunc spares package context the goroutine that waits for Done.
func (d *deadline) AfterFunc(f func()) (stop func() bool) {
	if d.Context.Done() == nil {
		return func() bool { return true }
	}
	return context.AfterFunc(d.Context, f)
}

// dialFor opens the sockets by which a path's own resolver asks: bound, marked
// and guarded as all that leaves by the path. A server of a family that the
// path lacks cannot be asked.
func (d *Direct) dialFor(p *Path) DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		to, err := netip.ParseAddrPort(addr)
		if err != nil {
			return nil, fmt.Errorf("name server %s: %w", addr, err)
		}
		f := selection.FamilyOf(to.Addr())
		c := choice{d: d, p: p}
		src := c.sources(&Request{})
		from := src.of(f)
		if !from.IsValid() {
			return nil, fail(ErrDNS, nil, "path %s has no address for %s", p.Name, f) // the target's family is another matter
		}
		o := d.pin(p)
		dialer := net.Dialer{KeepAlive: -1, Control: o.control}
		dialer.SetMultipathTCP(false)
		if network == "udp" {
			dialer.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		} else {
			dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
		return dialer.DialContext(ctx, network, to.String())
	}
}
