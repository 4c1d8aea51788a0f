package escaper

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Sockets says how the sockets of paths are made, beyond what each path says.
// One serves every escaper.
type Sockets struct {
	// ports is IP_LOCAL_PORT_RANGE's value, high<<16 | low. 0: the kernel, one
	// before 6.3, has no such option.
	ports uint32
	count int // of the ports, whoever chooses them
}

// NewSockets reads net.ipv4.ip_local_port_range (in the network namespace of
// the calling thread) and probes what the kernel can do. Sockets take their
// ports from low to high as far as the sysctl allows; 0 and 0 mean the
// sysctl's own range. It is set on every socket even then: without it the
// kernel looks for a port half of the range after the other, and a connect to
// one destination takes milliseconds once half of its ports are in use. A range
// that the sysctl's does not touch is an error, because the kernel would ignore
// it.
func NewSockets(low, high uint16) (*Sockets, error) {
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read local port range: %w", err)
	}
	lo, hi, err := parsePorts(string(b))
	if err != nil {
		return nil, fmt.Errorf("read local port range: %s: %w", file, err)
	}
	if low == 0 && high == 0 {
		low, high = lo, hi
	}
	if max(low, lo) > min(high, hi) {
		return nil, fmt.Errorf("local ports %d to %d lie outside those of the host, %d to %d (net.ipv4.ip_local_port_range)", low, high, lo, hi)
	}
	s := &Sockets{
		ports: uint32(min(high, hi))<<16 | uint32(max(low, lo)),
		count: int(min(high, hi)) - int(max(low, lo)) + 1,
	}
	ok, err := s.probe()
	if err != nil {
		return nil, fmt.Errorf("probe socket options: %w", err)
	}
	if !ok {
		s.ports, s.count = 0, int(hi)-int(lo)+1
	}
	return s, nil
}

// Ports returns how many local ports the sockets of one address have towards
// one target.
func (s *Sockets) Ports() int { return s.count }

// PortRange returns the local ports that sockets use, and false when the
// kernel lacks IP_LOCAL_PORT_RANGE (6.3) and uses the sysctl's.
func (s *Sockets) PortRange() (low, high uint16, ok bool) {
	return uint16(s.ports), uint16(s.ports >> 16), s.ports != 0
}

func parsePorts(s string) (low, high uint16, err error) {
	words := strings.Fields(s)
	if len(words) != 2 {
		return 0, 0, fmt.Errorf("want two numbers, got %q", s)
	}
	for i, p := range [...]*uint16{&low, &high} {
		n, err := strconv.ParseUint(words[i], 10, 16)
		if err != nil {
			return 0, 0, fmt.Errorf("want two numbers, got %q", s)
		}
		*p = uint16(n)
	}
	return low, high, nil
}

// probe reports whether the kernel has IP_LOCAL_PORT_RANGE.
func (s *Sockets) probe() (ok bool, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, os.NewSyscallError("socket", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	switch err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(s.ports)); {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOPROTOOPT):
		return false, nil
	default:
		return false, os.NewSyscallError("setsockopt IP_LOCAL_PORT_RANGE", err)
	}
}

// pin is what is set on a path's socket between its making and its bind. A
// field for each option keeps a path's bind from depending on anything else.
type pin struct {
	mark   uint32
	device string // SO_BINDTODEVICE, "" for none
	ports  uint32
	free   bool // IP_FREEBIND: the source is of a prefix that is local as a whole
	port   bool // the bind takes a port: of UDP, which has one for all destinations
}

// control is the net.Dialer's hook.
func (p *pin) control(_, _ string, raw syscall.RawConn) error {
	var err error
	ctl := raw.Control(func(fd uintptr) { err = p.set(int(fd)) })
	if ctl != nil {
		return ctl
	}
	return err
}

// set sets the options. SOL_IP serves IPv6 sockets as well. A pin that cannot
// be set fails the dial.
func (p *pin) set(fd int) error {
	if p.mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(p.mark)); err != nil {
			return os.NewSyscallError("setsockopt SO_MARK", err)
		}
	}
	if p.device != "" {
		if err := unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, p.device); err != nil {
			return os.NewSyscallError("setsockopt SO_BINDTODEVICE", err)
		}
	}
	if p.free {
		// IPv6 binds to no address that is on no interface without it, also when
		// a local route covers it; IPv4 does.
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1); err != nil {
			return os.NewSyscallError("setsockopt IP_FREEBIND", err)
		}
	}
	// A bind reserves a port for all destinations unless it is left to connect
	// to find one (Linux 4.2).
	if !p.port {
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
		}
	}
	if p.ports != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(p.ports)); err != nil {
			return os.NewSyscallError("setsockopt IP_LOCAL_PORT_RANGE", err)
		}
	}
	return nil
}
