package router

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/router/escaper"
)

// errLeak: what must never happen did.
var errLeak = errors.New("the guard let it out")

// proveGuard makes two deliberately wrong attempts: a connection and a
// datagram with the mark of a path and the address of another. It says how the
// kernel refused them; if it did not, that is the error.
func (r *Router) proveGuard(name string, target netip.AddrPort) (control.Proof, error) {
	now := r.current.Load()
	if now == nil {
		return control.Proof{}, escaper.ErrClosed
	}
	t := now.table
	p := t.Path(name)
	if p == nil {
		return control.Proof{}, fmt.Errorf("%w: %q", control.ErrUnknownPath, name)
	}
	if !r.accounted() {
		return control.Proof{}, errors.New("accounting is off: nothing guards")
	}
	wrong, err := anotherSource(t, p, target.Addr().Is4())
	if err != nil {
		return control.Proof{}, err
	}
	proof := control.Proof{Path: name, Source: wrong.String(), Target: target.String()}
	for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
		if err := wrongDial(typ, p.Mark, wrong, target); err != nil {
			return proof, fmt.Errorf("%s from %s to %s: %w", name, wrong, target, err)
		}
	}
	r.log.Warn("guard proved", "path", name, "source", wrong, "target", target)
	return proof, nil
}

// anotherSource finds an address that is not the path's own.
func anotherSource(t *escaper.Table, p *escaper.Path, v4 bool) (netip.Addr, error) {
	for _, o := range t.Paths() {
		a := o.V6
		if v4 {
			a = o.V4
		}
		if a.IsValid() && a != p.V4 && a != p.V6 && o.Status().State == escaper.StateUp {
			return a, nil
		}
	}
	return netip.Addr{}, errors.New("no other path has an address of the target's family to be wrong with")
}

// wrongDial succeeds when the kernel refuses.
func wrongDial(typ int, mark uint32, source netip.Addr, target netip.AddrPort) (err error) {
	domain := unix.AF_INET6
	if source.Is4() {
		domain = unix.AF_INET
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return os.NewSyscallError("setsockopt SO_MARK", err)
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(source, 0))); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if typ == unix.SOCK_DGRAM {
		err = unix.Sendto(fd, []byte("wayout"), 0, sockaddr(target))
	} else {
		err = unix.Connect(fd, sockaddr(target))
	}
	if errors.Is(err, unix.EPERM) {
		return nil
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("it failed for another reason than the guard: %w", err)
	}
	return errLeak
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
