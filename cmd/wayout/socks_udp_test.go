package main_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"wayout/router/control"
	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// udpScene is the usual scene with SOCKS on 1100, HTTP on 3100 and echoes of
// datagrams.
func udpScene(t *testing.T, settings string) (*scene, *datagramEcho) {
	t.Helper()
	s := outScene(t, fronts(selects+settings+"open: true, escaper: out"))
	return s, s.serveDatagrams(t)
}

// mustAssociate asks for an association that has to be granted.
func (s *scene) mustAssociate(t *testing.T, a said) *association {
	t.Helper()
	as, err := s.associate(a)
	if err != nil {
		t.Fatalf("%+v: %v", a, err)
	}
	t.Cleanup(as.Close)
	return as
}

// mustEcho sends a datagram that has to come back, and gives the source that it
// was seen to have.
func (a *association) mustEcho(t *testing.T, to, payload string) netip.AddrPort {
	t.Helper()
	source, err := a.echoed(to, payload)
	if err != nil {
		t.Fatalf("%s to %s: %v", payload, to, err)
	}
	return source
}

// TestAssociationOfManyDatagrams sends 10,000 datagrams by one association, of
// both families in turn: all come back, and each had the one source that the
// association has in its family.
func TestAssociationOfManyDatagrams(t *testing.T) {
	t.Parallel()
	s, echo := udpScene(t, "")
	a := s.mustAssociate(t, said{selection: "p3"})
	if want := netip.MustParseAddr(lab.HostAddr4); a.relay.Addr() != want {
		t.Errorf("the relay is %s, want an address of the server that was asked", a.relay)
	}
	sources := map[string]netip.AddrPort{echo4: a.mustEcho(t, echo4, "first"), echo6: a.mustEcho(t, echo6, "first")}
	if v4, v6 := sources[echo4].Addr(), sources[echo6].Addr(); v4 != lab.Egress4()[2] || v6 != lab.Egress6()[2] {
		t.Fatalf("the sources are %v", sources)
	}
	echo.all()

	const total, window = 10_000, 40
	resent := 0
	for begin := 0; begin < total; begin += window {
		waiting := map[string]string{} // payload -> to
		for i := begin; i < begin+window; i++ {
			// Of different sizes, up to what no link has to cut up.
			waiting[fmt.Sprintf("%d %s", i, strings.Repeat("x", i%1100))] = []string{echo4, echo6}[i%2]
		}
		for len(waiting) > 0 {
			for payload, to := range waiting {
				if err := a.send(to, []byte(payload)); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.udp.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			for len(waiting) > 0 {
				from, b, err := a.receive()
				if errors.Is(err, os.ErrDeadlineExceeded) {
					resent += len(waiting)
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				seen, payload, _ := strings.Cut(string(b), " ")
				to, ok := waiting[payload]
				if !ok {
					continue // sent twice, or the first
				}
				if from.String() != to || seen != sources[to].String() {
					t.Fatalf("%.8s to %s came back from %s, and was seen from %s", payload, to, from, seen)
				}
				delete(waiting, payload)
			}
		}
	}
	if resent > total/100 {
		t.Errorf("%d of %d datagrams got lost on the way", resent, total)
	}
	for _, d := range echo.all() {
		if d.source != sources[echo4] && d.source != sources[echo6] {
			t.Fatalf("a datagram came from %s", d.source)
		}
	}
	path := s.paths()["out/p3"]
	if path.Packets.Out < total || path.Packets.In < total || path.Connections.Open != 1 {
		t.Errorf("the path has counted %+v and %+v", path.Packets, path.Connections)
	}
}

// TestDNSByAssociation asks a name server, which tells who has asked, by
// address and by name, and by every kind of selection.
func TestDNSByAssociation(t *testing.T) {
	t.Parallel()
	s := selectionScene(t)
	for _, at := range []string{lab.OriginAddr4, "[" + lab.OriginAddr6 + "]"} {
		s.serveWhoAsks(t, at+":53")
	}
	id := uint16(0)
	for _, c := range []struct {
		said
		path int
	}{
		{said{selection: "p1"}, 1},
		{said{selection: "2"}, 2},
		{said{selection: lab.Egress4()[2].String()}, 3},
		{said{selection: `{"out":"p4"}`}, 4},
		{said{front: frontUsers, user: "alice-path-p5", password: "secret"}, 5},
		{said{front: frontUsers, user: "alice-path-out~6-session-x", password: "secret"}, 6},
		{said{front: frontUsers, user: "bob", password: "secret"}, 2},
		{said{front: frontAlways}, 7},
		{said{front: frontPolicy}, 8},
		{said{front: frontKnown}, 5},
	} {
		a := s.mustAssociate(t, c.said)
		for _, to := range []string{lab.OriginAddr4 + ":53", "[" + lab.OriginAddr6 + "]:53", name4 + ":53", name6 + ":53"} {
			want := lab.Egress4()[c.path-1]
			if strings.Contains(to, "six") || strings.HasPrefix(to, "[") {
				want = lab.Egress6()[c.path-1]
				if c.selection == lab.Egress4()[2].String() {
					continue // that very address, which has no IPv6
				}
			}
			id++
			if who := a.whoAsks(t, to, id); who != want {
				t.Errorf("%+v to %s: asked by %s, want %s", c.said, to, who, want)
			}
		}
		a.Close()
	}
}

// serveWhoAsks runs a name server at the origin that tells each who asks its
// address, as a TXT record.
func (s *scene) serveWhoAsks(t *testing.T, at string) {
	t.Helper()
	var pc net.PacketConn
	err := s.Origin.Do(func() (err error) {
		pc, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	started, done := make(chan struct{}), make(chan error, 1)
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		m := new(dns.Msg).SetReply(req)
		m.Answer = append(m.Answer, &dns.TXT{
			Hdr: dns.RR_Header{Name: req.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET},
			Txt: []string{w.RemoteAddr().String()},
		})
		_ = w.WriteMsg(m) // who asked may have gone
	})}
	go func() { done <- srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() {
		if err := errors.Join(srv.Shutdown(), <-done); err != nil {
			t.Error(err)
		}
	})
}

// whoAsks asks the name server by an association.
func (a *association) whoAsks(t *testing.T, to string, id uint16) netip.Addr {
	t.Helper()
	q := new(dns.Msg).SetQuestion("who.test.", dns.TypeTXT)
	q.Id = id
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := a.send(to, b); err != nil {
			t.Fatal(err)
		}
		if err := a.udp.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for {
			_, b, err := a.receive()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			m := new(dns.Msg)
			if err == nil {
				err = m.Unpack(b)
			}
			if err != nil {
				t.Fatal(err)
			}
			if m.Id == id && len(m.Answer) == 1 {
				return netip.MustParseAddrPort(m.Answer[0].(*dns.TXT).Txt[0]).Addr().Unmap()
			}
		}
	}
	t.Fatalf("no answer of %s", to)
	return netip.Addr{}
}

// only checks what the origin has seen since it was asked last.
func (e *datagramEcho) only(t *testing.T, what string, source netip.Addr, payloads ...string) {
	t.Helper()
	for _, d := range e.all() {
		if d.source.Addr() != source || !slices.Contains(payloads, d.payload) {
			t.Errorf("%s: the origin got %q from %s", what, d.payload, d.source)
		}
	}
}

// TestDroppedDatagrams sends what no association passes on, each time with a
// good datagram behind it: that comes back, and nothing else has left.
func TestDroppedDatagrams(t *testing.T) {
	t.Parallel()
	s, echo := udpScene(t, "")
	// Somebody on the host itself, whom nobody is to reach.
	var near *net.UDPConn
	err := s.Host.Do(func() (err error) {
		near, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("[::]:7")))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	p1 := lab.Egress4()[0]

	a := s.mustAssociate(t, said{selection: "p1"})
	raw := func(b []byte) func() error {
		return func() error {
			_, err := a.udp.Write(b)
			return err
		}
	}
	target, err := client.ParseTarget(echo4)
	if err != nil {
		t.Fatal(err)
	}
	good, err := client.AppendHeader(nil, target)
	if err != nil {
		t.Fatal(err)
	}
	changed := func(i int, v byte) []byte {
		b := append(slices.Clone(good), "bad"...)
		b[i] = v
		return b
	}
	for name, send := range map[string]func() error{
		"a fragment":                  raw(changed(2, 1)),
		"the last fragment":           raw(changed(2, 0x81)),
		"an unknown address type":     raw(changed(3, 2)),
		"half a header":               raw(good[:6]),
		"nothing":                     raw(nil),
		"port 0":                      raw(append(slices.Clone(good[:8]), 0, 0, 'b', 'a', 'd')),
		"to loopback":                 func() error { return a.send("127.0.0.1:7", []byte("bad")) },
		"to IPv6 loopback":            func() error { return a.send("[::1]:7", []byte("bad")) },
		"to loopback by name":         func() error { return a.send("localhost:7", []byte("bad")) },
		"to a mapped address":         func() error { return a.send("[::ffff:127.0.0.1]:7", []byte("bad")) },
		"to the host":                 func() error { return a.send(lab.HostAddr4+":7", []byte("bad")) },
		"to the host's other address": func() error { return a.send(lab.Primary2Of4+":7", []byte("bad")) },
		"to link-local":               func() error { return a.send("169.254.169.254:7", []byte("bad")) },
		"to all":                      func() error { return a.send("255.255.255.255:7", []byte("bad")) },
		"to the relay itself":         func() error { return a.send(a.relay.String(), []byte("bad")) },
	} {
		if err := send(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		source := a.mustEcho(t, echo4, "after "+name)
		if source.Addr() != p1 {
			t.Errorf("after %s: from %s", name, source)
		}
		echo.only(t, name, p1, "after "+name)
	}
	// A name is resolved beside: what was sent to it may still be on its way.
	if err := near.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1500)
	if n, from, err := near.ReadFromUDPAddrPort(b); err == nil {
		t.Errorf("the host got %q from %s", b[:n], from)
	}

	// A family that the path lacks, or that was not selected.
	for _, selection := range []string{"p9", p1.String()} {
		a := s.mustAssociate(t, said{selection: selection})
		if err := a.send(echo6, []byte("bad")); err != nil {
			t.Fatal(err)
		}
		want := p1
		if selection == "p9" {
			want = netip.MustParseAddr(lab.Primary1Of4)
		}
		if source := a.mustEcho(t, echo4, "four"); source.Addr() != want {
			t.Errorf("%s: from %s", selection, source)
		}
		echo.only(t, selection, want, "four")
	}
}

// TestForeignDatagrams sends to a client's association from elsewhere.
func TestForeignDatagrams(t *testing.T) {
	t.Parallel()
	s, echo := udpScene(t, "")
	other := netip.MustParseAddr("10.0.0.3")
	if err := s.Client.AddAddr("eth0", netip.PrefixFrom(other, 24)); err != nil {
		t.Fatal(err)
	}
	p1 := lab.Egress4()[0]
	a := s.mustAssociate(t, said{selection: "p1"})
	socket := func(from netip.Addr) *association {
		u, err := dialUDP(s.Client, netip.AddrPortFrom(from, 0), a.relay)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { u.Close() })
		return &association{udp: u}
	}
	stranger, neighbour := socket(other), socket(netip.MustParseAddr(lab.ClientAddr4))

	// Before the client's own first one, and after.
	for _, when := range []string{"before", "after"} {
		if err := stranger.send(echo4, []byte("stranger "+when)); err != nil {
			t.Fatal(err)
		}
		if when == "after" {
			if err := neighbour.send(echo4, []byte("another port")); err != nil {
				t.Fatal(err)
			}
		}
		if source := a.mustEcho(t, echo4, "own "+when); source.Addr() != p1 {
			t.Errorf("%s: from %s", when, source)
		}
		echo.only(t, when, p1, "own "+when)
	}
	for name, x := range map[string]*association{"the stranger": stranger, "the neighbour": neighbour} {
		if err := x.udp.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, b, err := x.receive(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s got %q, %v", name, b, err)
		}
	}
	// The other way round: the association is the stranger's, the socket is not.
	b := s.mustAssociate(t, said{selection: "p2", from: other})
	if err := b.send(echo4, []byte("wrong")); err != nil {
		t.Fatal(err)
	}
	a.mustEcho(t, echo4, "last")
	echo.only(t, "another client's association", p1, "last")
}

// ends waits for the end of an association's control connection.
func (a *association) ends(t *testing.T) {
	t.Helper()
	b, err := io.ReadAll(a.control)
	if len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the control connection says %x, %v", b, err)
	}
}

// TestAssociationEnds has its three ends: the client, idleness, and the path's
// address.
func TestAssociationEnds(t *testing.T) {
	t.Parallel()
	const idle = time.Second
	s, echo := udpScene(t, "[socks: udp_idle_timeout: 1s,] ")
	closed := func(p control.Path) bool { return p.Connections.Open == 0 }

	t.Run("client", func(t *testing.T) {
		a := s.mustAssociate(t, said{selection: "p1"})
		a.mustEcho(t, echo4, "hello")
		a.control.Close()
		s.until("out/p1", closed)
		echo.all()
		// The relay's port is closed: what comes there is refused, or lost.
		_ = a.send(echo4, []byte("too late"))
		if err := a.udp.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, b, err := a.receive(); err == nil {
			t.Errorf("after its end the association answers %q", b)
		}
		echo.only(t, "after the end", netip.Addr{})
	})
	t.Run("idle", func(t *testing.T) {
		a := s.mustAssociate(t, said{selection: "p1"})
		var last time.Time
		for begun := time.Now(); time.Since(begun) < 2*idle; {
			last = time.Now()
			a.mustEcho(t, echo4, "alive")
		}
		a.ends(t)
		if took := time.Since(last); took < idle {
			t.Errorf("it ended %v after its last datagram", took)
		}
		s.until("out/p1", closed)
	})
	for i, link := range map[int]string{2: "eth0", 6: "eth1"} {
		for _, addr := range []netip.Addr{lab.Egress4()[i-1], lab.Egress6()[i-1]} {
			t.Run(addr.String(), func(t *testing.T) {
				a := s.mustAssociate(t, said{selection: fmt.Sprint("p", i)})
				a.mustEcho(t, echo4, "hello")
				a.mustEcho(t, echo6, "hello")
				echo.all()
				var stop atomic.Bool
				var sender sync.WaitGroup
				sender.Go(func() {
					for !stop.Load() {
						// Some are lost: it is the address that goes.
						_ = a.send(echo4, []byte("x"))
						_ = a.send(echo6, []byte("x"))
						time.Sleep(time.Millisecond)
					}
				})
				if err := s.Host.DelAddr(link, lab.EgressPrefix(addr)); err != nil {
					t.Fatal(err)
				}
				a.ends(t)
				stop.Store(true)
				sender.Wait()
				for _, d := range echo.all() {
					if from := d.source.Addr(); from != lab.Egress4()[i-1] && from != lab.Egress6()[i-1] {
						t.Fatalf("a datagram left by %s", from)
					}
				}
				if err := s.Host.AddAddr(link, lab.EgressPrefix(addr)); err != nil {
					t.Fatal(err)
				}
				s.until(fmt.Sprint("out/p", i), func(p control.Path) bool { return p.State == "up" && p.Reason == "" && closed(p) })
			})
		}
	}
}

// TestPortsUsedUp leaves an address two ports: what is beyond is refused in all
// protocols, and nobody else's address is taken.
func TestPortsUsedUp(t *testing.T) {
	t.Parallel()
	s, _ := udpScene(t, "")
	s.serveEcho()
	if err := s.Host.Sysctl("net/ipv4/ip_local_port_range", "50000 50001"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c, err := s.control(said{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := (&client.Dialer{Extension: "p1"}).Handshake(t.Context(), c, lab.OriginAddr4+":7"); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []protocol{forward, tunnel, connect} {
		got, err := s.say(p, said{selection: "p1", target: lab.OriginAddr4 + ":7"})
		if want := map[bool]string{true: "reply 0x01", false: "503"}[p == connect]; err != nil || got.answer != want {
			t.Errorf("%s: %s, %v, want %s", p, got, err, want)
		}
		if got.header != nil && got.kind != "connection_limit_reached" {
			t.Errorf("%s: Proxy-Status has %s", p, got.kind)
		}
	}
	for range 2 {
		s.mustAssociate(t, said{selection: "p2"})
	}
	if got, err := s.say(associate, said{selection: "p2"}); err != nil || got.answer != "reply 0x01" {
		t.Errorf("%s, %v", got, err)
	}
}
