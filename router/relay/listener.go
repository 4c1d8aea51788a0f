package relay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listener is a listening TCP socket that no poller of Go's watches.
type Listener struct {
	addr *net.TCPAddr
	at   netip.AddrPort

	mu sync.Mutex
	fd int // -1: closed
}

// NewListener takes the socket out of l, and closes l. What it accepts has
// TCP_NODELAY, which Linux lets accepted sockets inherit: that is one system
// call less for each of them.
func NewListener(l *net.TCPListener) (*Listener, error) {
	addr, _ := l.Addr().(*net.TCPAddr)
	fd := -1
	raw, err := l.SyscallConn()
	if err == nil {
		ctl := raw.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
		err = errors.Join(err, ctl)
	}
	err = errors.Join(err, l.Close())
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("relay: listener: %w", err)
	}
	return &Listener{addr: addr, at: unmap(addr.AddrPort()), fd: fd}, nil
}

// StandIn says that the kernel hands the listener connections to other addresses
// than its own (IP_TRANSPARENT), so that each is asked for its own. It is called
// before the listener accepts.
func (l *Listener) StandIn() { l.at = netip.AddrPortFrom(netip.IPv6Unspecified(), 0) }

// Control lends the socket's descriptor for a call.
func (l *Listener) Control(f func(fd uintptr)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd < 0 {
		return net.ErrClosed
	}
	f(uintptr(l.fd))
	return nil
}

// Addr returns the address it listens on, also when it is closed.
func (l *Listener) Addr() net.Addr { return l.addr }

// Share gives a second handle of the same socket.
func (l *Listener) Share() (*Listener, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd < 0 {
		return nil, net.ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(l.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fcntl: %w", err)
	}
	return &Listener{addr: l.addr, at: l.at, fd: fd}, nil
}

// Close closes the handle; the socket is closed with its last one. A second
// Close returns net.ErrClosed.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd < 0 {
		return net.ErrClosed
	}
	fd := l.fd
	l.fd = -1
	return unix.Close(fd)
}

// Accepted is a connection that a worker has accepted. Its descriptor is
// non-blocking.
type Accepted struct {
	FD            int
	Remote, Local netip.AddrPort
}

// Acceptor accepts on a listener, in every worker of its engine.
type Acceptor struct {
	e      *Engine
	l      *Listener
	serve  func(*Task, Accepted)
	errs   chan error
	active sync.WaitGroup // accepts under way

	mu     sync.Mutex
	closed bool
	slots  []uint32 // by worker
	in     []bool   // by worker: its epoll watches the listener
}

// Accept lets the workers accept from l. For each connection serve is called on
// a worker, as a Task; the descriptor is serve's to close or to hand on.
func (e *Engine) Accept(l *Listener, serve func(*Task, Accepted)) (*Acceptor, error) {
	a := &Acceptor{
		e: e, l: l, serve: serve, errs: make(chan error, len(e.workers)),
		slots: make([]uint32, len(e.workers)), in: make([]bool, len(e.workers)),
	}
	for i, w := range e.workers {
		w.mu.Lock()
		a.slots[i] = w.occupy(slot{from: a})
		w.mu.Unlock()
	}
	if err := a.Resume(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// Addr returns the listener's address.
func (a *Acceptor) Addr() net.Addr { return a.l.Addr() }

// Errors gives the errors of accept. A worker that met one accepts nothing more
// until Resume.
func (a *Acceptor) Errors() <-chan error { return a.errs }

// Resume lets the workers accept that have stopped.
func (a *Acceptor) Resume() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return net.ErrClosed
	}
	for i, w := range a.e.workers {
		if a.in[i] {
			continue
		}
		w.mu.Lock()
		err := ErrClosed
		if !w.closing {
			// One worker is woken for a connection, and not all.
			ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, Fd: int32(a.slots[i] << 1), Pad: int32(w.slots[a.slots[i]].gen)}
			err = unix.EpollCtl(w.ep, unix.EPOLL_CTL_ADD, a.l.fd, &ev)
		}
		w.mu.Unlock()
		if err != nil {
			return fmt.Errorf("relay: watch the listener on %s: %w", a.l.addr, err)
		}
		a.in[i] = true
	}
	return nil
}

// Close stops accepting, and closes the listener. Of what was accepted, serve
// has returned from, or waits in, each when Close returns. serve must not call it.
func (a *Acceptor) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		a.active.Wait()
		return nil
	}
	a.closed = true
	for i, w := range a.e.workers {
		w.mu.Lock()
		if a.in[i] && !w.closed {
			// A shared listener outlives its descriptor, and so would its events.
			_ = unix.EpollCtl(w.ep, unix.EPOLL_CTL_DEL, a.l.fd, nil)
		}
		w.vacate(a.slots[i])
		w.mu.Unlock()
	}
	a.mu.Unlock()
	a.active.Wait()
	return a.l.Close()
}

// accept takes one connection: if there are more, epoll says so again, to this
// worker or another. It ends what lookup began with active.
func (a *Acceptor) accept(w *worker) {
	defer a.active.Done()
	// Not package unix's, which asks the kernel for the protocol as well.
	fd, sa, err := syscall.Accept4(a.l.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch {
	case err == nil:
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
		return
	default:
		a.pause(w, err)
		return
	}
	c := Accepted{FD: fd, Remote: addrPort(sa), Local: a.l.at}
	if a.l.at.Addr().IsUnspecified() {
		sa, err := syscall.Getsockname(fd)
		if err != nil {
			_ = unix.Close(fd)
			return
		}
		c.Local = addrPort(sa)
	}
	w.begin(a.serve, c)
}

// pause takes the listener out of a worker's epoll.
func (a *Acceptor) pause(w *worker, err error) {
	for i := range a.e.workers {
		if a.e.workers[i] != w {
			continue
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.closed {
			return
		}
		_ = unix.EpollCtl(w.ep, unix.EPOLL_CTL_DEL, a.l.fd, nil)
		a.in[i] = false
		select {
		case a.errs <- err:
		default: // it has not been read since the last: nothing new
		}
	}
}

func unmap(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func addrPort(sa syscall.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *syscall.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
