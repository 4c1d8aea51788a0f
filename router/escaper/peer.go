package escaper

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"wayout/router/escaper/hop"
	"wayout/router/resolve"
	"wayout/selection"
)

// PeerOptions is a next-hop proxy as configured.
type PeerOptions struct {
	Kind               string // proxy_http, proxy_https or proxy_socks5
	Addr               string // host:port
	Username, Password string
	SelectionHeader    string        // of proxy_http and proxy_https: what hands a selection on
	TLSName            string        // of proxy_https: whose certificate it has to be; "": the host of Addr
	TLSCA              string        // of proxy_https: file of the authorities, PEM; "": those of the host
	Timeout            time.Duration // of the conversation with the peer

	authorities [sha256.Size]byte // of TLSCA's content
}

// Peer is a next-hop proxy. Those of the same options are the same, so that a
// reload that changes nothing keeps their paths.
type Peer struct {
	o     PeerOptions
	host  string
	addr  netip.Addr // the host, where it is an address
	port  uint16
	roots *x509.CertPool // of TLSCA
}

// Authorities reads files of certificates, each once.
type Authorities struct{ files map[string]authorities }

type authorities struct {
	sum  [sha256.Size]byte
	pool *x509.CertPool
}

// NewAuthorities has read none yet.
func NewAuthorities() *Authorities { return &Authorities{map[string]authorities{}} }

// Read says what keeps a file from being one.
func (a *Authorities) Read(file string) error {
	_, err := a.read(file)
	return err
}

func (a *Authorities) read(file string) (authorities, error) {
	if was, ok := a.files[file]; ok {
		return was, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return authorities{}, err
	}
	read := authorities{sha256.Sum256(pem), x509.NewCertPool()}
	if !read.pool.AppendCertsFromPEM(pem) {
		return authorities{}, fmt.Errorf("no certificate in %s", file)
	}
	a.files[file] = read
	return read, nil
}

// NewPeer checks a peer's options and reads the file that they name, unless it is
// among those that were read.
func NewPeer(o PeerOptions, read *Authorities) (*Peer, error) {
	p := &Peer{}
	host, port, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return nil, fmt.Errorf("peer %s: %w", o.Addr, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("peer %s: a port is 1 to 65535", o.Addr)
	}
	p.port, p.host = uint16(n), host
	if a, err := netip.ParseAddr(host); err == nil {
		p.addr = a.WithZone("").Unmap()
	}
	if o.TLSCA != "" {
		a, err := read.read(o.TLSCA)
		if err != nil {
			return nil, fmt.Errorf("peer %s: tls_ca: %w", o.Addr, err)
		}
		o.authorities, p.roots = a.sum, a.pool
	}
	p.o = o
	h, err := p.hop()
	if err == nil {
		err = h.Check()
	}
	if err != nil {
		return nil, fmt.Errorf("peer %s: %w", o.Addr, err)
	}
	return p, nil
}

// Datagrams reports whether the peer carries datagrams.
func (p *Peer) Datagrams() bool { return p.o.Kind == "proxy_socks5" }

// hop is the one who speaks to the peer.
func (p *Peer) hop() (*hop.Peer, error) {
	h := &hop.Peer{
		Name: p.o.Addr, Username: p.o.Username, Password: p.o.Password,
		SelectionHeader: p.o.SelectionHeader, Timeout: p.o.Timeout,
	}
	switch p.o.Kind {
	case "proxy_http":
		h.Kind = hop.HTTP
	case "proxy_socks5":
		h.Kind = hop.SOCKS5
	case "proxy_https":
		h.Kind = hop.HTTPS
		h.TLS = &tls.Config{ServerName: p.o.TLSName, MinVersion: tls.VersionTLS12, RootCAs: p.roots}
		if h.TLS.ServerName == "" {
			h.TLS.ServerName = p.host
		}
	default:
		return nil, fmt.Errorf("unknown kind %q", p.o.Kind)
	}
	return h, nil
}

// openPeer takes the request out by a next-hop proxy.
func (c *choice) openPeer(ctx context.Context, r *Request) (*Conn, error) {
	if r.Target.Addr.IsValid() {
		// A name is the peer's to resolve, and so the peer's to judge.
		if err := c.check(r.Target.Addr, r.Target.Port); err != nil {
			return nil, err
		}
	}
	if c.p == nil {
		if err := c.pick(r, c.want, netip.AddrPort{}); err != nil {
			return nil, err
		}
	}
	handed, err := c.handOn(r)
	if err != nil {
		return nil, err
	}
	if handed == "" { // a connection that was asked for with a selection is that selection's
		if conn := c.reusePeer(r); conn != nil {
			return conn, nil
		}
	}
	if r.Task != nil {
		r.Task.Leave()
	}
	l, h, err := c.dialPeer(ctx, r)
	if err != nil {
		return nil, err
	}
	stream, early, err := h.Connect(ctx, l.tcp.(*net.TCPConn), hop.Target{Host: r.Target.Host, Addr: r.Target.Addr, Port: r.Target.Port}, handed)
	if err != nil {
		l.abandon(c.p)
		return nil, peerError(c.p, err)
	}
	l.tcp = stream
	if by, ok := c.kept(r); ok && r.Reuse && handed == "" && c.d.idlers != nil {
		l.kept = &kept{idlers: c.d.idlers, key: keyOf(r, by)}
	}
	if err := l.admit(c.p); err != nil {
		return nil, err
	}
	conn := l.conn(c.p, false)
	conn.Early = early
	return conn, nil
}

// dialPeer connects to the peer by the path.
func (c *choice) dialPeer(ctx context.Context, r *Request) (*link, *hop.Peer, error) {
	peer := c.p.Peer
	h := c.p.hop.Load()
	if h == nil {
		made, err := peer.hop()
		if err != nil {
			return nil, nil, fail(selection.ErrBind, err, "path %s: %v", c.p.Name, err)
		}
		c.p.hop.Store(made)
		h = made
	}
	list, err := c.peerAddrs(ctx)
	if err != nil {
		return nil, nil, err
	}
	l := &link{ledger: c.p.ledger, fd: -1, pool: c.d.pool, node: c.p.node}
	l.pool.Opened(l.node)
	src := c.sources(r)
	tcp, err := c.d.connect(c.d.withDeadline(ctx, time.Now().Add(c.d.timeout)), c.p, src, list)
	if err != nil {
		l.pool.Closed(l.node)
		return nil, nil, err
	}
	l.tcp, l.source, l.remote = tcp, localAddr(tcp), addrPort(tcp.RemoteAddr())
	return l, h, nil
}

// peerAddrs lists the peer's addresses that the path can reach now.
func (c *choice) peerAddrs(ctx context.Context) ([]netip.AddrPort, error) {
	peer, usable := c.p.Peer, c.usable(selection.V4|selection.V6)
	var v4, v6 []netip.Addr
	switch {
	case peer.addr.Is4():
		v4 = []netip.Addr{peer.addr}
	case peer.addr.IsValid():
		v6 = []netip.Addr{peer.addr}
	case c.d.resolver == nil:
		return nil, fail(ErrDNS, nil, "path %s: resolve %s: escaper %s has no resolver", c.p.Name, peer.host, c.d.name)
	default:
		a, err := c.d.resolver.Lookup(ctx, peer.host, c.d.strategy.families())
		switch {
		case errors.Is(err, context.Canceled):
			return nil, fail(context.Canceled, err, "%s", err)
		case errors.Is(err, resolve.ErrTimeout), isTimeout(err):
			return nil, fail(ErrDNSTimeout, err, "path %s: %s", c.p.Name, err)
		case err != nil:
			return nil, fail(ErrDNS, err, "path %s: %s", c.p.Name, err)
		}
		v4, v6 = a.V4, a.V6
	}
	has := families(v4, v6)
	if has&c.p.Given() == 0 {
		return nil, c.p.peerFamilyError(has)
	}
	if has&usable == 0 {
		return nil, c.p.downError(c.p.state.Load(), has&c.p.Given())
	}
	if usable&selection.V4 == 0 {
		v4 = nil
	}
	if usable&selection.V6 == 0 {
		v6 = nil
	}
	return interleave(make([]netip.AddrPort, 0, maxAttempts), c.d.strategy, v4, v6, peer.port), nil
}

// peerFamilyError says that the path has no address that reaches its peer, which
// has only those of f.
func (p *Path) peerFamilyError(f selection.Family) error {
	return fail(ErrUnreachable, nil, "path %s has no address for %s, and the peer %s no other", p.Name, f, p.Peer.o.Addr)
}

// kept returns the address by which a request's connection to its peer is told
// apart from others of the path: that of the session, where each has its own.
// false: the connection is for the request alone.
func (c *choice) kept(r *Request) (netip.Addr, bool) {
	f := selection.FamilyOf(c.p.Peer.addr)
	if f == 0 {
		f = selection.V4 | selection.V6 // of a name, it may be either
	}
	switch src := c.sources(r); {
	case src.fresh&f != 0:
		return netip.Addr{}, false
	case f&selection.V6 != 0 && c.p.Net6.IsValid():
		return src.v6, true
	case f&selection.V4 != 0 && c.p.Net4.IsValid():
		return src.v4, true
	}
	return netip.Addr{}, true
}

// reusePeer returns an idle connection that the peer has made for the same user
// and target.
func (c *choice) reusePeer(r *Request) *Conn {
	if !r.Reuse || c.d.idlers == nil {
		return nil
	}
	by, ok := c.kept(r)
	if !ok {
		return nil
	}
	key := keyOf(r, by)
	if l := c.p.take(&key); l != nil {
		return l.conn(c.p, true)
	}
	return nil
}

// handOn is what of the client's selection goes on to the peer: what is said of
// escapers that this host does not have.
func (c *choice) handOn(r *Request) (string, error) {
	if !c.d.pass {
		return "", nil
	}
	out := map[string]any{}
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		if !src.ByClient() || c.t.escapers[e.Escaper] != nil {
			return true
		}
		if i, is := e.Value.Index(); is {
			out[e.Escaper] = i
		} else {
			out[e.Escaper] = e.Value.String()
		}
		return true
	})
	if len(out) == 0 {
		return "", nil
	}
	text, err := json.Marshal(out)
	if err != nil {
		return "", fail(selection.ErrMalformed, err, "the selection cannot be handed on: %v", err)
	}
	return string(text), nil
}

// peerError says what the peer's answer means for the request.
func peerError(p *Path, err error) error {
	var refused *hop.Refused
	kind := ErrUnreachable
	switch {
	case errors.Is(err, context.Canceled):
		kind = context.Canceled
	case errors.Is(err, hop.ErrTimeout):
		kind = ErrTimeout
	case errors.Is(err, hop.ErrEnded):
		kind = ErrReset
	case errors.As(err, &refused):
		switch refused.Reason() {
		case hop.ReasonRefused:
			kind = ErrRefused
		case hop.ReasonTimeout:
			kind = ErrTimeout
		case hop.ReasonDNS:
			kind = ErrDNS
		case hop.ReasonDNSTimeout:
			kind = ErrDNSTimeout
		case hop.ReasonProhibited:
			kind = ErrProhibited
		}
	}
	return fail(kind, err, "path %s: %s", p.Name, err)
}

// openPeerPacket takes an association out by a next-hop proxy.
func (c *choice) openPeerPacket(ctx context.Context, r *Request) (PacketConn, error) {
	if !c.p.Peer.Datagrams() {
		return nil, fail(ErrNoDatagrams, nil, "path %s: a peer of type %s carries no datagrams", c.p.Name, c.p.Peer.o.Kind)
	}
	handed, err := c.handOn(r)
	if err != nil {
		return nil, err
	}
	l, h, err := c.dialPeer(ctx, r)
	if err != nil {
		return nil, err
	}
	at, err := h.Associate(ctx, l.tcp.(*net.TCPConn), handed)
	if err != nil {
		l.abandon(c.p)
		return nil, peerError(c.p, err)
	}
	f := selection.FamilyOf(at.Addr())
	src := c.sources(r)
	if !src.of(f).IsValid() {
		_ = l.tcp.Close()
		l.abandon(c.p)
		return nil, fail(ErrUnreachable, nil, "path %s: the peer's relay %s is of a family that the path lacks", c.p.Name, at)
	}
	sock, err := c.d.listenPacket(c.p, f, src.of(f))
	if err != nil {
		_ = l.tcp.Close()
		l.abandon(c.p)
		return nil, err
	}
	p := &peerDatagrams{c: c, link: l, sock: sock, at: at}
	l.kill = p.end
	if err := l.admit(c.p); err != nil {
		return nil, errors.Join(err, sock.udp.Close())
	}
	go p.watch()
	return p, nil
}

// peerDatagrams is a PacketConn by a SOCKS5 peer.
type peerDatagrams struct {
	c      *choice
	link   *link // the control connection: the association lasts as long
	sock   *datagramSocket
	at     netip.AddrPort // the peer's relay
	killed atomic.Pointer[error]
	closed atomic.Bool
}

// watch ends the association with its control connection.
func (p *peerDatagrams) watch() {
	var b [1]byte
	for {
		if _, err := p.link.tcp.Read(b[:]); err != nil {
			break
		}
	}
	p.end(fail(ErrReset, nil, "path %s: the peer ended the association", p.c.p.Name))
}

func (p *peerDatagrams) end(err error) {
	if p.closed.Load() {
		return
	}
	p.killed.CompareAndSwap(nil, &err)
	_ = p.Close()
}

// Source implements PacketConn: what the peer is reached from.
func (p *peerDatagrams) Source(f selection.Family) netip.AddrPort {
	if p.sock.f != f {
		return netip.AddrPort{}
	}
	return p.sock.from
}

// Send implements PacketConn. A name is the peer's to resolve.
func (p *peerDatagrams) Send(_ context.Context, to Target, b []byte) error {
	if to.Addr.IsValid() {
		if err := p.c.d.filter.Check(to.Addr, to.Port); err != nil {
			return err
		}
	}
	buf := p.c.d.datagrams.get()
	defer p.c.d.datagrams.pool.Put(buf)
	out, err := hop.Wrap((*buf)[:0], hop.Target{Host: to.Host, Addr: to.Addr, Port: to.Port}, b)
	if err != nil {
		return fail(ErrUnreachable, err, "path %s: %v", p.c.p.Name, err)
	}
	if _, err := p.sock.udp.WriteToUDPAddrPort(out, p.at); err != nil {
		if why := p.killed.Load(); why != nil {
			return *why
		}
		return fail(ErrUnreachable, err, "path %s: send to %s: %v", p.c.p.Name, p.at, err)
	}
	return nil
}

// Receive implements PacketConn. What does not come from the peer is none of
// the association's.
func (p *peerDatagrams) Receive(b []byte) (int, netip.AddrPort, error) {
	buf := p.c.d.datagrams.get()
	defer p.c.d.datagrams.pool.Put(buf)
	for {
		n, from, err := p.sock.receive(*buf)
		if err != nil {
			if why := p.killed.Load(); why != nil {
				return 0, netip.AddrPort{}, *why
			}
			return 0, netip.AddrPort{}, fmt.Errorf("path %s: receive: %w", p.c.p.Name, err)
		}
		if from != p.at {
			continue
		}
		origin, payload, err := hop.Unwrap((*buf)[:n])
		if err != nil || !origin.Addr.IsValid() {
			continue
		}
		return copy(b, payload), netip.AddrPortFrom(origin.Addr, origin.Port), nil
	}
}

// OnKill implements PacketConn.
func (p *peerDatagrams) OnKill(f func(error)) {
	if err := p.link.onKill(func(err error) { p.killed.CompareAndSwap(nil, &err); f(err) }); err != nil {
		f(err)
	}
}

// Close implements PacketConn. A second one does nothing.
func (p *peerDatagrams) Close() error {
	if p.closed.Swap(true) {
		return nil
	}
	p.link.strike()
	return errors.Join(p.sock.udp.Close(), p.link.tcp.Close())
}
