package tproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
	"wayout/selection"
)

// receiveBuffer is for the sockets that all datagrams of a server come to, in
// bytes. The kernel takes what it allows.
const receiveBuffer = 4 << 20

// loopback is where the sockets are bound that the kernel hands everything to:
// nobody from outside can connect to them by their own addresses.
func loopback(f selection.Family) (network, at string) {
	if f == selection.V4 {
		return "4", "127.0.0.1:0"
	}
	return "6", "[::1]:0"
}

// control makes a Control function of socket options.
func control(mark uint32, more func(fd int) error) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		ctl := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
			// For IPv6 too: it is one flag of the socket.
			err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
			if more != nil {
				err = errors.Join(err, more(int(fd)))
			}
		})
		if err = errors.Join(ctl, err); err != nil {
			return fmt.Errorf("set socket options (it needs CAP_NET_ADMIN): %w", err)
		}
		return nil
	}
}

// ListenStream opens a listener that can stand for any address of a family.
func ListenStream(f selection.Family, mark uint32) (*relay.Listener, error) {
	network, at := loopback(f)
	// Without TCP_DEFER_ACCEPT: in many protocols the server speaks first.
	lc := net.ListenConfig{KeepAlive: -1, Control: control(mark, nil)}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp"+network, at)
	if err != nil {
		return nil, fmt.Errorf("listen for diverted connections: %w", err)
	}
	bare, err := relay.NewListener(l.(*net.TCPListener))
	if err != nil {
		return nil, fmt.Errorf("listen for diverted connections: %w", err)
	}
	bare.StandIn()
	return bare, nil
}

// listenDatagrams opens a socket that can stand for any address of a family, and
// is told which one a datagram was for.
func listenDatagrams(f selection.Family, mark uint32) (*net.UDPConn, error) {
	network, at := loopback(f)
	lc := net.ListenConfig{Control: control(mark, func(fd int) error {
		// The size is a wish.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
		}
		if f == selection.V4 {
			return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1)
		}
		return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1)
	})}
	c, err := lc.ListenPacket(context.Background(), "udp"+network, at)
	if err != nil {
		return nil, fmt.Errorf("listen for diverted datagrams: %w", err)
	}
	return c.(*net.UDPConn), nil
}

// destination reads from control messages where a datagram was sent to; the zero
// AddrPort when they do not say.
func destination(oob []byte) netip.AddrPort {
	for len(oob) >= unix.SizeofCmsghdr {
		head, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			break
		}
		oob = rest
		switch {
		case head.Level == unix.SOL_IP && head.Type == unix.IP_ORIGDSTADDR && len(data) >= unix.SizeofSockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(data[4:8])), binary.BigEndian.Uint16(data[2:]))
		case head.Level == unix.SOL_IPV6 && head.Type == unix.IPV6_ORIGDSTADDR && len(data) >= unix.SizeofSockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(data[8:24])).Unmap(), binary.BigEndian.Uint16(data[2:]))
		}
	}
	return netip.AddrPort{}
}

// Sockets are what a Datagrams works with.
type Sockets struct {
	near    []*net.UDPConn     // that all datagrams come to, one of each family
	answers map[bool]*answerer // by whether they are of IPv4
}

// OpenSockets opens them, for IPv4 and, where the host has it, for IPv6.
func OpenSockets(mark uint32) (*Sockets, error) {
	s := &Sockets{answers: map[bool]*answerer{}}
	for _, f := range []selection.Family{selection.V4, selection.V6} {
		if f == selection.V6 && !HasIPv6() {
			continue
		}
		c, err := listenDatagrams(f, mark)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.near = append(s.near, c)
		a, err := newAnswerer(f == selection.V4, mark)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.answers[f == selection.V4] = a
	}
	return s, nil
}

// Near lends the sockets that diverted datagrams are to be handed to: nil where
// there is none of a family.
func (s *Sockets) Near() (v4, v6 syscall.RawConn) {
	for _, c := range s.near {
		raw, err := c.SyscallConn()
		switch {
		case err != nil: // it is closed
		case c.LocalAddr().(*net.UDPAddr).IP.To4() != nil:
			v4 = raw
		default:
			v6 = raw
		}
	}
	return v4, v6
}

// Close closes them.
func (s *Sockets) Close() error {
	var errs []error
	for _, c := range s.near {
		errs = append(errs, c.Close())
	}
	for _, a := range s.answers {
		errs = append(errs, a.close())
	}
	return errors.Join(errs...)
}

// HasIPv6 says whether this network namespace has IPv6.
func HasIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}
