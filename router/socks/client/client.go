// Package client speaks SOCKS5 as a client (RFC 1928, RFC 1929), with the
// extension that says which egress path a connection takes.
//
// The extension is authentication method 0xE9. When the server chooses it the
// client sends
//
//	VER=1 | LEN (2 bytes, big endian, 1 to 4096) | PAYLOAD | NMETHODS | METHODS
//
// and the server answers
//
//	VER=1 | STATUS | METHOD
//
// STATUS is 0, or 1 when PAYLOAD cannot be read, after which the server closes.
// METHOD is the authentication method, one of METHODS, that the connection goes
// on with as if it had been chosen in the beginning, or 0xFF when none will do.
// PAYLOAD is what the path selection header of an HTTP request holds.
package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// Versions, methods and commands of the protocol.
const (
	version     = 5
	versionAuth = 1 // of the sub-negotiations: RFC 1929, and the extension

	methodNone      = 0x00
	methodPassword  = 0x02
	methodExtension = 0xe9
	methodNoneFits  = 0xff

	commandConnect   = 1
	commandAssociate = 3
)

// MaxExtension is the length of the longest payload of the extension.
const MaxExtension = 4096

// What a server may refuse before it looks at a request.
var (
	// ErrMethod: the server takes none of the methods that it was offered. With
	// an extension that is also a server that does not have it: a selection is
	// never dropped.
	ErrMethod = errors.New("the proxy accepts no authentication method that was offered")
	// ErrAuth: the server does not accept the user name and password.
	ErrAuth = errors.New("the proxy refuses the user name and password")
	// ErrSelection: the server cannot read the extension's payload.
	ErrSelection = errors.New("the proxy cannot read the path selection")
	// ErrProtocol: what the server says is not SOCKS5.
	ErrProtocol = errors.New("the proxy does not speak SOCKS5")
)

// ReplyError is the reply of a server that does not do what was asked (RFC
// 1928, section 6).
type ReplyError struct{ Code byte }

func (e *ReplyError) Error() string {
	var why string
	switch e.Code {
	case 1:
		why = "general failure"
	case 2:
		why = "not allowed"
	case 3:
		why = "network unreachable"
	case 4:
		why = "host unreachable"
	case 5:
		why = "connection refused"
	case 6:
		why = "TTL expired"
	case 7:
		why = "command not supported"
	case 8:
		why = "address type not supported"
	default:
		why = "unknown reason"
	}
	return fmt.Sprintf("the proxy replies 0x%02x: %s", e.Code, why)
}

// Dialer connects through a SOCKS5 server. Its methods may be called from many
// goroutines.
type Dialer struct {
	Proxy              string // host:port of the server
	Username, Password string // 1 to 255 bytes each; both empty: none
	Extension          string // which path, 1 to MaxExtension bytes; empty: off

	// Dial connects to the server; nil: a net.Dialer does.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// DialContext connects to addr through the server. The network is "tcp"; names
// are resolved by the server.
func (d *Dialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if network != "tcp" {
		return nil, fmt.Errorf("socks: dial: %w", net.UnknownNetworkError(network))
	}
	dial := d.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	conn, err := dial(ctx, "tcp", d.Proxy)
	if err != nil {
		return nil, err
	}
	if _, err := d.Handshake(ctx, conn, addr); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// Handshake asks for a tunnel to target (host:port) on a new connection to the
// server, and returns the address that the server says it connects from: the
// zero AddrPort when that is a name. Nothing beyond the reply is read. After an
// error, that of ctx included, the connection is of no use.
func (d *Dialer) Handshake(ctx context.Context, conn net.Conn, target string) (bound netip.AddrPort, err error) {
	to, err := ParseTarget(target)
	if err != nil {
		return netip.AddrPort{}, err
	}
	a, err := d.ask(ctx, conn, commandConnect, to)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("socks: connect to %s: %w", target, err)
	}
	return a.AddrPort(), nil
}

// Associate asks for a relay of datagrams on a new connection to the server,
// and returns where datagrams go, with their headers (see AppendHeader). The
// association lasts as long as the connection, on which nothing more is said.
func (d *Dialer) Associate(ctx context.Context, conn net.Conn) (relay netip.AddrPort, err error) {
	// The port that datagrams will come from is not known yet: zero (RFC 1928,
	// section 4).
	a, err := d.ask(ctx, conn, commandAssociate, Addr{IP: netip.IPv4Unspecified()})
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("socks: associate: %w", err)
	}
	relay = a.AddrPort()
	if relay.IsValid() && relay.Addr().IsUnspecified() {
		// What servers behind an address translation say.
		far, err := netip.ParseAddrPort(conn.RemoteAddr().String())
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("socks: associate: %w", err)
		}
		relay = netip.AddrPortFrom(far.Addr().Unmap().WithZone(""), relay.Port())
	}
	if !relay.IsValid() {
		return netip.AddrPort{}, fmt.Errorf("socks: associate: %w: the relay has no IP address", ErrProtocol)
	}
	return relay, nil
}

func (d *Dialer) check() error {
	const most = 255
	switch {
	case (d.Username == "") != (d.Password == ""), len(d.Username) > most, len(d.Password) > most:
		return fmt.Errorf("user name and password are 1 to %d bytes each", most)
	case len(d.Extension) > MaxExtension:
		return fmt.Errorf("extension of %d bytes, %d at most", len(d.Extension), MaxExtension)
	}
	return nil
}

// ask says one command and returns the address of the reply.
func (d *Dialer) ask(ctx context.Context, conn net.Conn, command byte, to Addr) (a Addr, err error) {
	if err := d.check(); err != nil {
		return a, err
	}
	if err := ctx.Err(); err != nil {
		return a, err
	}
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		_ = conn.SetDeadline(time.Unix(1, 0)) // fails on a closed one, where nobody waits
	})
	a, err = d.talk(conn, command, to)
	if !stop() {
		<-cut
		return a, errors.Join(ctx.Err(), err)
	}
	return a, err
}

func (d *Dialer) talk(conn net.Conn, command byte, to Addr) (a Addr, err error) {
	var buf [3 + MaxAddr]byte
	methods := []byte{methodNone}
	if d.Username != "" {
		methods = append(methods, methodPassword)
	}
	method, err := d.negotiate(conn, methods)
	if err != nil {
		return a, err
	}
	if method == methodPassword {
		if err := d.authenticate(conn); err != nil {
			return a, err
		}
	}
	out, err := AppendAddr(append(buf[:0], version, command, 0), to)
	if err != nil {
		return a, err
	}
	if _, err := conn.Write(out); err != nil {
		return a, err
	}
	return readReply(conn, buf[:])
}

// negotiate comes to one of the methods.
func (d *Dialer) negotiate(conn net.Conn, methods []byte) (method byte, err error) {
	offer := methods
	if d.Extension != "" {
		offer = []byte{methodExtension} // nothing else, or it might be passed over
	}
	if method, err = choice(conn, offer); err != nil || method != methodExtension {
		return method, err
	}
	out := binary.BigEndian.AppendUint16([]byte{versionAuth}, uint16(len(d.Extension)))
	out = append(out, d.Extension...)
	out = append(append(out, byte(len(methods))), methods...)
	if _, err := conn.Write(out); err != nil {
		return 0, err
	}
	var in [3]byte
	switch n, err := io.ReadFull(conn, in[:]); {
	case n >= 2 && in[0] == versionAuth && in[1] != 0: // METHOD may be missing
		return 0, ErrSelection
	case err != nil:
		return 0, err
	case in[0] != versionAuth:
		return 0, fmt.Errorf("%w: version %d of the extension", ErrProtocol, in[0])
	}
	return in[2], within(in[2], methods)
}

// choice says the greeting and reads which method the server chooses.
func choice(conn net.Conn, methods []byte) (byte, error) {
	out := append([]byte{version, byte(len(methods))}, methods...)
	if _, err := conn.Write(out); err != nil {
		return 0, err
	}
	var in [2]byte
	if _, err := io.ReadFull(conn, in[:]); err != nil {
		return 0, err
	}
	if in[0] != version {
		return 0, fmt.Errorf("%w: version %d", ErrProtocol, in[0])
	}
	return in[1], within(in[1], methods)
}

func within(method byte, methods []byte) error {
	for _, m := range methods {
		if m == method {
			return nil
		}
	}
	if method == methodNoneFits {
		return ErrMethod
	}
	return fmt.Errorf("%w: it chooses method 0x%02x, which was not offered", ErrProtocol, method)
}

// authenticate says user name and password (RFC 1929).
func (d *Dialer) authenticate(conn net.Conn) error {
	out := append([]byte{versionAuth, byte(len(d.Username))}, d.Username...)
	out = append(append(out, byte(len(d.Password))), d.Password...)
	if _, err := conn.Write(out); err != nil {
		return err
	}
	var in [2]byte
	if _, err := io.ReadFull(conn, in[:]); err != nil {
		return err
	}
	// Some servers answer with their SOCKS version.
	if in[1] != 0 {
		return ErrAuth
	}
	return nil
}

// readReply reads exactly a reply. buf has room for one.
func readReply(conn net.Conn, buf []byte) (a Addr, err error) {
	const head, first = 3, 5 // with the first byte of the address, its length is known
	if _, err := io.ReadFull(conn, buf[:2]); err != nil {
		return a, err
	}
	switch {
	case buf[0] != version:
		return a, fmt.Errorf("%w: version %d", ErrProtocol, buf[0])
	case buf[1] != 0:
		return a, &ReplyError{Code: buf[1]} // whatever else there is of it
	}
	if _, err := io.ReadFull(conn, buf[2:first]); err != nil {
		return a, err
	}
	size := 0
	switch buf[head] {
	case typeIPv4:
		size = 4 + 2
	case typeIPv6:
		size = 16 + 2
	case typeDomain:
		size = 1 + int(buf[head+1]) + 2
	default:
		return a, fmt.Errorf("%w: address type %d", ErrProtocol, buf[head])
	}
	if _, err := io.ReadFull(conn, buf[first:head+1+size]); err != nil {
		return a, err
	}
	a, n, err := ParseAddr(buf[head : head+1+size])
	if err == nil && n == 0 {
		err = ErrProtocol
	}
	if err != nil {
		return a, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return a, nil
}
