package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A knock is what a client of the diverted hunt says once, by a bare socket on
// a thread that stays in the client's namespace: a hundred thousand of them have to
// cost little.
type knock struct {
	udp      bool
	from     netip.Addr // of the client
	to       netip.AddrPort
	say      []byte
	patience time.Duration
	reset    bool // how a connection ends: by a reset, and by a FIN

	ports *atomic.Uint32 // of clients of UDP, each in turn; nil: any
}

// network names the protocol.
func (k knock) network() string {
	if k.udp {
		return "UDP"
	}
	return "TCP"
}

// An answer is what a client was told: by whom, and whom that saw.
type answer struct {
	name string // of who answers; the origin's is the address and port that it is asked at
	seen netip.Addr
}

// errNobody says that there was no answer in time, nor an error.
var errNobody = errors.New("nobody answers")

// open makes the client's socket.
func (k knock) open() (int, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if k.from.Is6() {
		family = unix.AF_INET6
	}
	if k.udp {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if !k.udp {
		err = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	}
	if err == nil {
		err = k.bind(fd)
	}
	if err != nil {
		return -1, errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
	}
	return fd, nil
}

// bind gives the client its address, and of UDP a port that was not in use for long:
// what comes by the same two ends belongs to the same flow.
func (k knock) bind(fd int) error {
	for {
		port := uint16(0)
		if k.udp && k.ports != nil {
			port = uint16(10000 + k.ports.Add(1)%50000)
		}
		err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(k.from, port)))
		if port == 0 || !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
	}
}

// sockaddr is an address for the kernel.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// address is one from the kernel.
func address(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	return netip.AddrPort{}
}

// awaitFD waits for an event of a descriptor.
func awaitFD(fd int, event int16, end time.Time) error {
	for {
		left := time.Until(end)
		if left <= 0 {
			return errNobody
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: event}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
		if n > 0 {
			return nil
		}
	}
}

// once asks by a socket of its own.
func (k knock) once() (answer, error) {
	fd, err := k.open()
	if err != nil {
		return answer{}, err
	}
	defer unix.Close(fd)
	if k.udp {
		return k.datagram(fd)
	}
	end := time.Now().Add(k.patience)
	if err := k.connect(fd, end); err != nil {
		return answer{}, err
	}
	if k.reset {
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	a, rest, err := k.greeted(fd, end)
	if err != nil {
		return a, err
	}
	return a, echoed(fd, rest, k.say, end)
}

func (k knock) connect(fd int, end time.Time) error {
	err := unix.Connect(fd, sockaddr(k.to))
	if errors.Is(err, unix.EINPROGRESS) {
		if err := awaitFD(fd, unix.POLLOUT, end); err != nil {
			return err
		}
		var no int
		if no, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && no != 0 {
			err = unix.Errno(no)
		}
	}
	return os.NewSyscallError("connect", err)
}

// greeted says what there is to say, and hears the line of who answers and what
// comes with it.
func (k knock) greeted(fd int, end time.Time) (answer, []byte, error) {
	if err := writeFD(fd, k.say); err != nil {
		return answer{}, nil, err
	}
	var got []byte
	for {
		line, rest, whole := bytes.Cut(got, []byte("\n"))
		if whole {
			a, err := parseAnswer(string(line))
			return a, rest, err
		}
		more, err := readFD(fd, end)
		if err != nil {
			return answer{}, nil, err
		}
		got = append(got, more...)
	}
}

// echoed wants what was said to come back.
func echoed(fd int, got, say []byte, end time.Time) error {
	for len(got) < len(say) {
		more, err := readFD(fd, end)
		if err != nil {
			return err
		}
		got = append(got, more...)
	}
	if !bytes.Equal(got, say) {
		return fmt.Errorf("%w: %q, and %q comes back", errGarbled, say, got)
	}
	return nil
}

// errGarbled says that what came back is not what was sent.
var errGarbled = errors.New("garbled")

func writeFD(fd int, b []byte) error {
	n, err := unix.Write(fd, b)
	if err == nil && n != len(b) {
		err = io.ErrShortWrite
	}
	return os.NewSyscallError("write", err)
}

func readFD(fd int, end time.Time) ([]byte, error) {
	b := make([]byte, 1024)
	for {
		n, err := unix.Read(fd, b)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if err := awaitFD(fd, unix.POLLIN, end); err != nil {
				return nil, err
			}
		case err != nil:
			return nil, os.NewSyscallError("read", err)
		case n == 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return b[:n], nil
		}
	}
}

// sendAgain is when a datagram counts as lost.
const sendAgain = 500 * time.Millisecond

// datagram asks by a socket that may have asked before. The answer has to come
// from where the datagram went.
func (k knock) datagram(fd int) (answer, error) {
	b := make([]byte, 2048)
	for end := time.Now().Add(k.patience); time.Now().Before(end); {
		if err := unix.Sendto(fd, k.say, 0, sockaddr(k.to)); err != nil {
			return answer{}, os.NewSyscallError("sendto", err)
		}
		for until := time.Now().Add(min(sendAgain, k.patience)); ; {
			if awaitFD(fd, unix.POLLIN, until) != nil {
				break // it is sent again
			}
			n, from, err := unix.Recvfrom(fd, b, 0)
			if errors.Is(err, unix.EAGAIN) {
				continue // a checksum that was wrong
			}
			if err != nil {
				return answer{}, os.NewSyscallError("recvfrom", err)
			}
			if at := address(from); at != k.to {
				return answer{}, fmt.Errorf("%w: asked %s, answered by %s", errGarbled, k.to, at)
			}
			words := strings.SplitN(string(b[:n]), " ", 3)
			if len(words) == 3 && words[2] != string(k.say) {
				continue // to what was asked before, twice
			}
			return parseAnswer(strings.Join(words[:min(2, len(words))], " "))
		}
	}
	return answer{}, errNobody
}

func parseAnswer(line string) (answer, error) {
	name, seen, _ := strings.Cut(line, " ")
	a, err := netip.ParseAddr(seen)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %q", errGarbled, line)
	}
	return answer{name, a.Unmap()}, nil
}
