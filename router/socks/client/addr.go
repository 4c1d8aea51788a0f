package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
)

// Addr is an address as SOCKS5 writes it (RFC 1928, section 5): an IP address,
// or a name for the other side to resolve. Exactly one of Host and IP is set.
type Addr struct {
	Host string // 1 to 255 bytes
	IP   netip.Addr
	Port uint16
}

// ParseTarget reads host:port, where an IP address is written as such
// ("192.0.2.1:80", "[2001:db8::1]:80") and all else is a name.
func ParseTarget(s string) (Addr, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return Addr{}, fmt.Errorf("socks: target: %w", err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return Addr{}, fmt.Errorf("socks: target %q: the port is a number up to 65535", s)
	}
	a := Addr{Host: host, Port: uint16(n)}
	if ip, err := netip.ParseAddr(host); err == nil {
		a.Host, a.IP = "", ip
	}
	return a, a.check()
}

// AddrOf is the Addr of an IP address and port.
func AddrOf(ap netip.AddrPort) Addr { return Addr{IP: ap.Addr(), Port: ap.Port()} }

// AddrPort returns the IP address, unmapped, and the port: the zero AddrPort
// for a name.
func (a Addr) AddrPort() netip.AddrPort {
	if !a.IP.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.IP.Unmap(), a.Port)
}

// String gives host:port, with brackets around an IPv6 address.
func (a Addr) String() string {
	if a.IP.IsValid() {
		return netip.AddrPortFrom(a.IP, a.Port).String()
	}
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

const maxHost = 255

// ErrAddr says that an address cannot be written in SOCKS5, or that its bytes
// cannot be read.
var ErrAddr = errors.New("bad address")

// ErrAddrType says that an address is of a type that is none of IPv4, IPv6 and
// domain name. It is an ErrAddr too.
var ErrAddrType = fmt.Errorf("%w: unknown address type", ErrAddr)

func (a Addr) check() error {
	switch {
	case a.IP.IsValid() && a.Host != "":
		return fmt.Errorf("%w: both a name and an IP address", ErrAddr)
	case a.IP.Zone() != "":
		return fmt.Errorf("%w: %s has a zone", ErrAddr, a.IP)
	case !a.IP.IsValid() && (a.Host == "" || len(a.Host) > maxHost):
		return fmt.Errorf("%w: a name is 1 to %d bytes, got %d", ErrAddr, maxHost, len(a.Host))
	}
	return nil
}

// Address types.
const (
	typeIPv4   = 1
	typeDomain = 3
	typeIPv6   = 4
)

// MaxAddr is the length of the longest address on the wire.
const MaxAddr = 1 + 1 + maxHost + 2

// AppendAddr appends ATYP, address and port. An IPv4 address that is mapped
// into IPv6 is written as IPv4.
func AppendAddr(b []byte, a Addr) ([]byte, error) {
	if err := a.check(); err != nil {
		return b, err
	}
	switch ip := a.IP.Unmap(); {
	case ip.Is4():
		q := ip.As4()
		b = append(append(b, typeIPv4), q[:]...)
	case ip.Is6():
		q := ip.As16()
		b = append(append(b, typeIPv6), q[:]...)
	default:
		b = append(append(b, typeDomain, byte(len(a.Host))), a.Host...)
	}
	return binary.BigEndian.AppendUint16(b, a.Port), nil
}

// ParseAddr reads ATYP, address and port from the beginning of b and returns
// how many bytes they take: 0 when b ends before they do. The error is
// ErrAddrType, or ErrAddr for a name of no bytes.
func ParseAddr(b []byte) (a Addr, n int, err error) {
	if len(b) == 0 {
		return Addr{}, 0, nil
	}
	begin, size := 1, 0
	switch b[0] {
	case typeIPv4:
		size = 4
	case typeIPv6:
		size = 16
	case typeDomain:
		if len(b) < 2 {
			return Addr{}, 0, nil
		}
		begin, size = 2, int(b[1])
		if size == 0 {
			return Addr{}, 0, fmt.Errorf("%w: empty name", ErrAddr)
		}
	default:
		return Addr{}, 0, ErrAddrType
	}
	end := begin + size
	if len(b) < end+2 {
		return Addr{}, 0, nil
	}
	if b[0] == typeDomain {
		a.Host = string(b[begin:end])
	} else {
		a.IP, _ = netip.AddrFromSlice(b[begin:end]) // 4 or 16 bytes always are one
	}
	a.Port = binary.BigEndian.Uint16(b[end:])
	return a, end + 2, nil
}

// ErrFragment says that a datagram is a fragment (RFC 1928, section 7), which
// nobody reassembles.
var ErrFragment = errors.New("fragmented datagram")

// MaxHeader is the length of the longest header of a datagram.
const MaxHeader = 3 + MaxAddr

// AppendHeader appends the header that a datagram has between a client and a
// SOCKS5 server (RFC 1928, section 7): to a target, or from a sender.
func AppendHeader(b []byte, a Addr) ([]byte, error) {
	n := len(b)
	out, err := AppendAddr(append(b, 0, 0, 0), a)
	if err != nil {
		return out[:n], err
	}
	return out, nil
}

// ParseHeader takes the header off a datagram. payload refers to b. The error
// is ErrFragment or wraps ErrAddr. The two reserved bytes are not looked at.
func ParseHeader(b []byte) (a Addr, payload []byte, err error) {
	const reserved = 2
	if len(b) > reserved && b[reserved] != 0 {
		return Addr{}, nil, ErrFragment
	}
	if len(b) <= reserved+1 {
		return Addr{}, nil, fmt.Errorf("%w: datagram of %d bytes", ErrAddr, len(b))
	}
	a, n, err := ParseAddr(b[reserved+1:])
	switch {
	case err != nil:
		return Addr{}, nil, err
	case n == 0:
		return Addr{}, nil, fmt.Errorf("%w: the datagram ends in its header", ErrAddr)
	}
	return a, b[reserved+1+n:], nil
}
