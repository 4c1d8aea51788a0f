// Package hop is what is said to a next-hop proxy, the peer, on a connection
// that has been made to it: CONNECT to an HTTP proxy, in the clear or within
// TLS, and SOCKS5, with credentials and with the selection that is handed on.
//
// What comes of it is a [Stream]: a bare socket, whose descriptor a relay can
// take. A TLS peer's is one end of a pair of sockets; the other is pumped to and
// from the TLS connection.
package hop

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"wayout/router/socks/client"
)

// Kind is how a peer is spoken to.
type Kind uint8

// The kinds of peers.
const (
	HTTP   Kind = iota + 1 // CONNECT (RFC 9110, section 9.3.6)
	HTTPS                  // the same, within TLS
	SOCKS5                 // RFC 1928, RFC 1929
)

// String returns the word of the configuration: http, https or socks5.
func (k Kind) String() string {
	switch k {
	case HTTP:
		return "http"
	case HTTPS:
		return "https"
	case SOCKS5:
		return "socks5"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Target is where the peer is to connect to: exactly one of Host and Addr, and
// a port. The peer resolves names.
type Target struct {
	Host string
	Addr netip.Addr
	Port uint16
}

// String returns host:port, with brackets around an IPv6 address.
func (t Target) String() string { return t.socks().String() }

func (t Target) socks() client.Addr {
	return client.Addr{Host: t.Host, IP: t.Addr.Unmap(), Port: t.Port}
}

// ErrTarget: the target cannot be told to a peer.
var ErrTarget = errors.New("bad target")

func (t Target) check() error {
	const most = 255
	switch {
	case t.Addr.IsValid() == (t.Host != ""):
		return fail(ErrTarget, nil, "the target is one of a name and an address, got %q and %s", t.Host, t.Addr)
	case t.Addr.Zone() != "":
		return fail(ErrTarget, nil, "the target %s has a zone", t.Addr)
	case len(t.Host) > most:
		return fail(ErrTarget, nil, "the target's name has %d bytes, %d at most", len(t.Host), most)
	case strings.ContainsFunc(t.Host, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`:/?#[]@\"<>`, r) }):
		return fail(ErrTarget, nil, "the target %q is no name", t.Host)
	case t.Port == 0:
		return fail(ErrTarget, nil, "the target %s has no port", t)
	}
	return nil
}

// Stream is a connected stream socket, bare: a *net.TCPConn, or of a TLS peer the
// end of a pair, whose holder says by End how it ended.
type Stream interface {
	net.Conn
	syscall.Conn
	CloseRead() error
	CloseWrite() error
}

// Peer is a next-hop proxy. Its methods may be called from many goroutines.
type Peer struct {
	Kind Kind
	Name string // host:port as configured; HTTPS: the host that the certificate is for, unless TLS says
	// Username and Password are the credentials; both empty: none.
	Username, Password string
	// TLS is for HTTPS; nil: the system's roots. Verification cannot be off, and
	// versions before 1.2 are not spoken.
	TLS *tls.Config
	// SelectionHeader is the field that hands a selection to an HTTP peer; empty:
	// the peer takes none. A SOCKS5 peer gets it by method 0xE9.
	SelectionHeader string
	// Timeout bounds Connect and Associate, from the call on; 0: only the
	// context does.
	Timeout time.Duration

	// Buffers is shared by the peers of kind HTTPS; nil: none are kept.
	Buffers *Buffers

	tune tuning
}

// Check says what is wrong with the peer as it is configured, or returns nil.
func (p *Peer) Check() error {
	if _, err := p.host(); err != nil {
		return err
	}
	switch p.Kind {
	case HTTP, HTTPS:
		return p.checkHTTP()
	case SOCKS5:
		const most = 255
		if (p.Username == "") != (p.Password == "") || len(p.Username) > most || len(p.Password) > most {
			return fmt.Errorf("user name and password for SOCKS5 are 1 to %d bytes each", most)
		}
		return nil
	}
	return fmt.Errorf("unknown kind of peer %d", p.Kind)
}

func (p *Peer) checkHTTP() error {
	switch {
	case p.Username == "" && p.Password != "":
		return errors.New("a password without a user name")
	case strings.Contains(p.Username, ":"): // RFC 7617, section 2
		return errors.New("a user name for HTTP cannot hold a colon")
	case strings.ContainsFunc(p.Username+p.Password, isControl):
		return errors.New("a control character in the user name or password")
	case !isToken(p.SelectionHeader) && p.SelectionHeader != "":
		return fmt.Errorf("%q is no name of a header field", p.SelectionHeader)
	case strings.EqualFold(p.SelectionHeader, "Host"), strings.EqualFold(p.SelectionHeader, "Proxy-Authorization"):
		return fmt.Errorf("the field %s has another meaning", p.SelectionHeader)
	case p.Kind == HTTPS && p.TLS != nil && p.TLS.InsecureSkipVerify:
		return errors.New("TLS without verification")
	}
	return nil
}

// host is that of the peer's name.
func (p *Peer) host() (string, error) {
	host, port, err := net.SplitHostPort(p.Name)
	if err == nil && host == "" {
		err = errors.New("no host")
	}
	if err != nil {
		return "", fmt.Errorf("peer %q: %w", p.Name, err)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("peer %q: a port is 1 to 65535", p.Name)
	}
	return host, nil
}

// Connect asks the peer, on a new connection to it, for a tunnel. A selection
// that is not empty is handed on, or it is an error: what the peer has not been
// told, or says that it does not take, is never dropped. (Whether an HTTP proxy
// looks at the field, nobody can tell.)
//
// It returns the stream to relay and, first of what comes from it, the bytes
// that the peer has sent ahead. conn belongs to Connect: it is the stream, or
// the stream's end is its end, or there was an error and it is closed. Whoever
// closes it meanwhile ends the stream as a reset does.
//
// An error is one of this package's sentinels, a [*Refused], context.Canceled,
// or what the system says of a connection.
func (p *Peer) Connect(ctx context.Context, conn *net.TCPConn, to Target, selection string) (s Stream, early []byte, err error) {
	s, early, err = p.connect(ctx, conn, to, selection)
	if err != nil {
		_ = conn.Close()
		return nil, nil, fmt.Errorf("peer %s: connect to %s: %w", p.Name, to, err)
	}
	return s, early, nil
}

func (p *Peer) connect(ctx context.Context, conn *net.TCPConn, to Target, selection string) (s Stream, early []byte, err error) {
	if err := to.check(); err != nil {
		return nil, nil, err
	}
	var within *secured
	err = p.converse(ctx, conn, func() (err error) {
		switch p.Kind {
		case HTTP:
			early, err = p.askHTTP(conn, to, selection)
		case HTTPS:
			if within, err = p.secure(conn); err == nil {
				early, err = p.askHTTP(within, to, selection)
			}
		case SOCKS5:
			err = p.askSOCKS(ctx, conn, to, selection)
		}
		return err
	})
	switch {
	case err != nil:
		return nil, nil, err
	case within == nil:
		return conn, early, nil
	}
	// Not before: the conversation's deadlines are over.
	pair, err := within.bridge(p.Buffers, p.tune)
	if err != nil {
		return nil, nil, err
	}
	return pair, early, nil
}

// converse bounds what talk does on conn by the context and the timeout.
func (p *Peer) converse(ctx context.Context, conn *net.TCPConn, talk func() error) error {
	if err := p.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return explain(err)
	}
	var until time.Time
	if p.Timeout > 0 {
		until = time.Now().Add(p.Timeout)
	}
	if d, ok := ctx.Deadline(); ok && (until.IsZero() || d.Before(until)) {
		until = d
	}
	if err := conn.SetDeadline(until); err != nil {
		return err
	}
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		_ = conn.SetDeadline(longAgo()) // fails on a closed one, where nobody waits
	})
	err := talk()
	if !stop() {
		<-cut
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		return explain(err)
	}
	return conn.SetDeadline(time.Time{})
}

// longAgo is a deadline that has passed.
func longAgo() time.Time { return time.Unix(1, 0) }

// authorization is the value of Proxy-Authorization (RFC 7617).
func (p *Peer) authorization() string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(p.Username+":"+p.Password))
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }
