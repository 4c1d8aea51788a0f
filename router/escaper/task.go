package escaper

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"wayout/selection"
)

// attemptOn is attempt on a task: the same socket, bound alike, as a bare
// descriptor, which gives the thread back while the connect is under way.
func (d *Direct) attemptOn(ctx context.Context, k Task, p *Path, src sources, to netip.AddrPort, until time.Time) (int, netip.AddrPort, error) {
	f := selection.FamilyOf(to.Addr())
	from := src.of(f)
	if !from.IsValid() { // no pin at all
		return -1, netip.AddrPort{}, p.familyError(f)
	}
	if t, ok := ctx.Deadline(); ok && t.Before(until) {
		until = t
	}
	fd, local, err := d.dialOn(k, p, from, to, until)
	if err != nil {
		if ctxErr := ctx.Err(); errors.Is(ctxErr, context.Canceled) || errors.Is(err, errGivenUp) {
			return -1, local, fail(context.Canceled, err, "path %s: connect to %s: given up", p.Name, to)
		}
		r, err := p.classify(err, from, to)
		p.count(r)
		d.observe(p, r, to, err)
		return -1, local, err
	}
	if err := p.verify(local, from); err != nil {
		resetFD(fd)
		return -1, local, err
	}
	p.count(ResultOK)
	d.observe(p, ResultOK, to, nil)
	return fd, local, nil
}

// errGivenUp: the task was told to end.
var errGivenUp = errors.New("given up")

// dialOn makes the connection, and asks the kernel for its local end.
func (d *Direct) dialOn(k Task, p *Path, from netip.Addr, to netip.AddrPort, until time.Time) (fd int, local netip.AddrPort, err error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, local, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	o := d.pin(p)
	if err := o.set(fd); err != nil {
		return fd, local, err
	}
	// Small messages are not to wait for one another's acknowledgement.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fd, local, os.NewSyscallError("setsockopt TCP_NODELAY", err)
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, 0))); err != nil {
		return fd, local, os.NewSyscallError("bind", err)
	}
	if err := connectOn(k, fd, to, until); err != nil {
		return fd, local, err
	}
	sa, err := syscall.Getsockname(fd) // package unix's asks for the protocol as well
	if err != nil {
		return fd, local, os.NewSyscallError("getsockname", err)
	}
	if local = fromSockaddr(sa); local == to {
		// A simultaneous open with itself, which happens towards one's own
		// host and a port that nobody listens on.
		return fd, local, os.NewSyscallError("connect", unix.ECONNREFUSED)
	}
	return fd, local, nil
}

func connectOn(k Task, fd int, to netip.AddrPort, until time.Time) error {
	switch err := unix.Connect(fd, sockaddr(to)); {
	case err == nil:
		return nil
	case !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR):
		return os.NewSyscallError("connect", err)
	}
	got, err := k.Wait(fd, unix.EPOLLOUT, until)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case err != nil:
		return errors.Join(errGivenUp, err)
	case got&(unix.EPOLLERR|unix.EPOLLHUP) == 0:
		return nil
	}
	no, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && no != 0 {
		err = unix.Errno(no)
	}
	if err == nil {
		err = unix.ECONNRESET // connected, and over already
	}
	return os.NewSyscallError("connect", err)
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func fromSockaddr(sa syscall.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *syscall.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// resetFD is reset for a bare descriptor.
func resetFD(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(fd)
}
