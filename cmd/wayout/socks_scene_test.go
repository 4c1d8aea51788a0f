package main_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// Targets of datagrams: the origin's echo, see serveDatagrams.
const (
	echo4 = lab.OriginAddr4 + ":7"
	echo6 = "[" + lab.OriginAddr6 + "]:7"
)

// patience bounds what is waited for by a SOCKS client.
const patience = 30 * time.Second

// fronts is a server section: for each text of settings an http_proxy on 3100
// and a socks_proxy on 1100, counted up, with the same settings. What only HTTP
// or only SOCKS has stands between brackets: [http: ...] [socks: ...].
func fronts(settings ...string) string {
	var b strings.Builder
	b.WriteString("server:\n")
	for i, text := range settings {
		for _, f := range []struct {
			kind string
			port int
		}{{"http", 3100 + i}, {"socks", 1100 + i}} {
			own := text
			for _, kind := range []string{"http", "socks"} {
				for {
					before, rest, ok := strings.Cut(own, "["+kind+": ")
					if !ok {
						break
					}
					inside, after, _ := strings.Cut(rest, "]")
					if kind != f.kind {
						inside = ""
					}
					own = before + inside + after
				}
			}
			fmt.Fprintf(&b, "  - {name: %s%d, type: %s_proxy, listen: [\"%s:%d\", \"[%s]:%d\"], %s}\n",
				f.kind, i, f.kind, lab.HostAddr4, f.port, lab.HostAddr6, f.port, own)
		}
	}
	return b.String()
}

// selects are the settings of a front by which clients may say all that they can.
const selects = "[http: path_selection_header: X-Egress-Path,] [socks: socks_extension: true,] "

// protocol is a way to ask for something.
type protocol string

const (
	forward   protocol = "HTTP"
	tunnel    protocol = "HTTP CONNECT"
	connect   protocol = "SOCKS5 CONNECT"
	associate protocol = "UDP ASSOCIATE"
)

func protocols() []protocol { return []protocol{forward, tunnel, connect, associate} }

// said is a request as its client says it, in whichever protocol.
type said struct {
	front          int    // of fronts
	selection      string // the header's value, or the extension's payload; "": neither
	user, password string // the name with its parameters; "": no credentials
	six            bool   // to the origin's IPv6 address
	target         string // in place of the origin
	from           netip.Addr
}

// got is what came of it.
type got struct {
	// answer is "ok" or the refusal: an HTTP status, or of SOCKS "status 1",
	// "authentication", "method", "reply 0x02"; "dropped" of a datagram.
	answer string
	source netip.AddrPort // that the origin saw
	bound  netip.AddrPort // that SOCKS told
	kind   string         // the error's type in Proxy-Status
	header http.Header    // of an HTTP refusal
}

func (g got) String() string { return fmt.Sprintf("%s from %s", g.answer, g.source) }

// say sends a request and gives what came of it.
func (s *scene) say(p protocol, a said) (got, error) {
	switch p {
	case forward, tunnel:
		return s.sayHTTP(a, p == tunnel)
	case connect:
		return s.sayConnect(a)
	}
	return s.sayAssociate(a)
}

func (a said) httpTarget() string {
	switch {
	case a.target != "":
		return a.target
	case a.six:
		return target6
	}
	return target4
}

func (s *scene) sayHTTP(a said, through bool) (got, error) {
	ask := lab.Ask{Proxy: proxyAt(uint16(3100 + a.front)), Target: a.httpTarget(), Tunnel: through}
	if a.selection != "" {
		ask.Header = append(ask.Header, "X-Egress-Path: "+a.selection)
	}
	if a.user != "" {
		ask.Header = append(ask.Header, basic(a.user, a.password))
	}
	told, err := s.try(ask)
	if err != nil {
		return got{}, err
	}
	if told.Status != http.StatusOK {
		_, kind, _ := strings.Cut(told.Header.Get("Proxy-Status"), "wayout; error=")
		kind, _, _ = strings.Cut(kind, ";")
		return got{answer: fmt.Sprint(told.Status), kind: kind, header: told.Header}, nil
	}
	return got{answer: "ok", source: seenAt(told.Seen)}, nil
}

func seenAt(s lab.Seen) netip.AddrPort {
	a, err := netip.ParseAddr(s.Source)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, s.Port)
}

// dialer is the client that speaks for a.
func (a said) dialer() *client.Dialer {
	return &client.Dialer{Extension: a.selection, Username: a.user, Password: a.password}
}

// control opens a connection to a's SOCKS server.
func (s *scene) control(a said) (*net.TCPConn, error) {
	at := proxyAt(uint16(1100 + a.front))
	var c *net.TCPConn
	var err error
	if a.from.IsValid() {
		c, err = s.Client.DialFrom(a.from, at)
	} else {
		c, err = s.Client.Dial(at)
	}
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(patience))
}

// refusal puts the error of a SOCKS client into a word. The server has to close.
func refusal(c net.Conn, err error) (got, error) {
	var g got
	var reply *client.ReplyError
	switch {
	case errors.As(err, &reply):
		g.answer = fmt.Sprintf("reply 0x%02x", reply.Code)
	case errors.Is(err, client.ErrSelection):
		g.answer = "status 1"
	case errors.Is(err, client.ErrAuth):
		g.answer = "authentication"
	case errors.Is(err, client.ErrMethod):
		g.answer = "method"
	default:
		return g, err
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		return g, fmt.Errorf("after %s the server does not close: %w", g.answer, err)
	}
	return g, nil
}

func (s *scene) sayConnect(a said) (got, error) {
	c, err := s.control(a)
	if err != nil {
		return got{}, err
	}
	defer c.Close()
	bound, err := a.dialer().Handshake(context.Background(), c, a.httpTarget())
	if err != nil {
		return refusal(c, err)
	}
	seen, err := getThrough(c, a.httpTarget())
	return got{answer: "ok", source: seenAt(seen), bound: bound}, err
}

// getThrough asks the origin at the other end of a tunnel what it sees.
func getThrough(c net.Conn, target string) (seen lab.Seen, err error) {
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", target); err != nil {
		return seen, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return seen, err
	}
	defer resp.Body.Close()
	return seen, json.NewDecoder(resp.Body).Decode(&seen)
}

// association is the client's end of a UDP association.
type association struct {
	control *net.TCPConn
	udp     *net.UDPConn
	relay   netip.AddrPort
}

// associate asks for an association.
func (s *scene) associate(a said) (*association, error) {
	c, err := s.control(a)
	if err != nil {
		return nil, err
	}
	as, err := s.associateOn(c, a.dialer())
	if err != nil {
		g, err2 := refusal(c, err)
		c.Close()
		if err2 != nil {
			return nil, err2
		}
		return nil, refusedError(g.answer)
	}
	return as, nil
}

// associateBy asks for one by a dialer, at a port of the host. The error is the
// dialer's.
func (s *scene) associateBy(d client.Dialer, port uint16) (*association, error) {
	s.t.Helper()
	c, err := s.Client.Dial(proxyAt(port))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		s.t.Fatal(err)
	}
	a, err := s.associateOn(c, &d)
	if err == nil {
		s.t.Cleanup(a.Close)
	}
	return a, err
}

func (s *scene) associateOn(c *net.TCPConn, d *client.Dialer) (*association, error) {
	relay, err := d.Associate(context.Background(), c)
	if err != nil {
		return nil, err
	}
	u, err := dialUDP(s.Client, netip.AddrPort{}, relay)
	if err != nil {
		return nil, err
	}
	return &association{c, u, relay}, nil
}

// refusedError is the answer to who asked for an association.
type refusedError string

func (e refusedError) Error() string { return "refused: " + string(e) }

// dialUDP opens a namespace's socket, connected to the relay.
func dialUDP(ns *lab.NS, from, relay netip.AddrPort) (u *net.UDPConn, err error) {
	var local *net.UDPAddr
	if from.IsValid() {
		local = net.UDPAddrFromAddrPort(from)
	}
	err = ns.Do(func() (err error) {
		u, err = net.DialUDP("udp", local, net.UDPAddrFromAddrPort(relay))
		return err
	})
	if err != nil {
		return nil, err
	}
	return u, u.SetDeadline(time.Now().Add(patience))
}

func (a *association) Close() {
	a.udp.Close()
	a.control.Close()
}

// send sends one datagram.
func (a *association) send(to string, payload []byte) error {
	target, err := client.ParseTarget(to)
	if err != nil {
		return err
	}
	b, err := client.AppendHeader(nil, target)
	if err != nil {
		return err
	}
	_, err = a.udp.Write(append(b, payload...))
	return err
}

// receive gives one datagram, and who the relay says has sent it.
func (a *association) receive() (from netip.AddrPort, payload []byte, err error) {
	b := make([]byte, 1<<16)
	n, err := a.udp.Read(b)
	if err != nil {
		return from, nil, err
	}
	addr, payload, err := client.ParseHeader(b[:n])
	return addr.AddrPort(), payload, err
}

// echoed sends a datagram to an echo of serveDatagrams, and gives the source
// that it saw. A datagram may get lost: it is sent again.
func (a *association) echoed(to, payload string) (source netip.AddrPort, err error) {
	defer a.udp.SetReadDeadline(time.Now().Add(patience))
	for range 10 {
		if err := a.send(to, []byte(payload)); err != nil {
			return source, err
		}
		if err := a.udp.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			return source, err
		}
		for {
			from, b, err := a.receive()
			if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				break
			}
			if err != nil {
				return source, err
			}
			seen, back, _ := strings.Cut(string(b), " ")
			if back != payload {
				continue // of an earlier one
			}
			if is, err := netip.ParseAddrPort(to); err == nil && from != is { // a name has no address to compare
				return source, fmt.Errorf("the answer of %s came as %s's", to, from)
			}
			return netip.ParseAddrPort(seen)
		}
	}
	return source, errors.New("no answer to ten datagrams")
}

func (s *scene) sayAssociate(a said) (got, error) {
	as, err := s.associate(a)
	if r := refusedError(""); errors.As(err, &r) {
		return got{answer: string(r)}, nil
	}
	if err != nil {
		return got{}, err
	}
	defer as.Close()
	to := echo4
	if a.six {
		to = echo6
	}
	source, err := as.echoed(to, "hello")
	return got{answer: "ok", source: source}, err
}

// datagramsSeen is what an echo has received, by source and payload.
type datagramEcho struct {
	seen chan datagramSeen
}

type datagramSeen struct {
	source  netip.AddrPort
	payload string
}

// serveDatagrams runs echoes at the origin, on echo4 and echo6 unless others are
// given: each datagram comes back behind the source that it was seen to have. What
// was seen is told until nobody looks.
func (s *scene) serveDatagrams(t *testing.T, places ...string) *datagramEcho {
	t.Helper()
	e := &datagramEcho{make(chan datagramSeen, 1<<15)}
	if len(places) == 0 {
		places = []string{echo4, echo6}
	}
	for _, at := range places {
		var u *net.UDPConn
		err := s.Origin.Do(func() (err error) {
			u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := u.SetReadBuffer(4 << 20); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.serve(u)
		}()
		t.Cleanup(func() {
			u.Close()
			<-done
		})
	}
	return e
}

func (e *datagramEcho) serve(u *net.UDPConn) {
	b := make([]byte, 1<<16)
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		select {
		case e.seen <- datagramSeen{from, string(b[:n])}:
		default:
		}
		_, _ = u.WriteToUDPAddrPort([]byte(from.String()+" "+string(b[:n])), from)
	}
}

// all gives what was seen until here.
func (e *datagramEcho) all() []datagramSeen {
	var all []datagramSeen
	for {
		select {
		case d := <-e.seen:
			all = append(all, d)
		default:
			return all
		}
	}
}

// connect4 asks a SOCKS4 server for a tunnel; with a name it is SOCKS4a.
func connect4(c net.Conn, target string) (code byte, bound netip.AddrPort, err error) {
	to, err := client.ParseTarget(target)
	if err != nil {
		return 0, bound, err
	}
	b := []byte{4, 1, byte(to.Port >> 8), byte(to.Port)}
	if to.IP.Is4() {
		b = append(append(b, to.IP.AsSlice()...), "me\x00"...)
	} else {
		b = append(append(b, 0, 0, 0, 1), "me\x00"+to.Host+"\x00"...)
	}
	if _, err := c.Write(b); err != nil {
		return 0, bound, err
	}
	var in [8]byte
	if _, err := io.ReadFull(c, in[:]); err != nil {
		return 0, bound, err
	}
	if in[0] != 0 {
		return 0, bound, fmt.Errorf("version %d in a SOCKS4 reply", in[0])
	}
	return in[1], netip.AddrPortFrom(netip.AddrFrom4([4]byte(in[4:])), uint16(in[2])<<8|uint16(in[3])), nil
}
