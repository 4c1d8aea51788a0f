package main_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"wayout/scripts/lab"
)

// quicOrigin speaks QUIC at the origin: each stream is told where its connection
// comes from, and gets back what it says.
type quicOrigin struct {
	hybrid atomic.Int64 // clients that offer X25519MLKEM768, whose key share takes over a thousand bytes
}

// serveQUIC serves at addresses of the origin until the end of the test.
func (g *gateway) serveQUIC(at ...string) *quicOrigin {
	g.t.Helper()
	o := &quicOrigin{}
	conf := &tls.Config{Certificates: []tls.Certificate{selfSigned(g.t)}, NextProtos: []string{"echo"}}
	conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(h.SupportedCurves, tls.X25519MLKEM768) {
			o.hybrid.Add(1)
		}
		return nil, nil //nolint:nilnil // documented: as it is
	}
	for _, at := range at {
		tr := &quic.Transport{Conn: datagramsAt(g.t, g.Origin, at)}
		l, err := tr.Listen(conf, &quic.Config{MaxIdleTimeout: patience})
		if err != nil {
			g.t.Fatal(err)
		}
		g.t.Cleanup(func() { l.Close(); tr.Close() })
		go func() {
			for {
				c, err := l.Accept(context.Background())
				if err != nil {
					return
				}
				go echoStreams(c)
			}
		}()
	}
	return o
}

func echoStreams(c *quic.Conn) {
	for {
		s, err := c.AcceptStream(context.Background())
		if err != nil {
			return
		}
		go func() {
			defer s.Close()
			if _, err := fmt.Fprintf(s, "%s\n", c.RemoteAddr()); err == nil {
				_, _ = io.Copy(s, s)
			}
		}()
	}
}

// datagramsAt opens a socket in a namespace.
func datagramsAt(t *testing.T, n *lab.NS, at string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	if err := n.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// dialQUIC connects from the client.
func (g *gateway) dialQUIC(at, name string, protos []string, v quic.Version) *quic.Conn {
	g.t.Helper()
	tr := &quic.Transport{Conn: datagramsAt(g.t, g.Client, "[::]:0")}
	g.t.Cleanup(func() { tr.Close() })
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	defer cancel()
	c, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)),
		&tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: protos},
		&quic.Config{Versions: []quic.Version{v}, MaxIdleTimeout: patience, KeepAlivePeriod: time.Second})
	if err != nil {
		g.t.Fatalf("QUIC to %s at %s: %v", name, at, err)
	}
	return c
}

// quicStream opens a stream and reads whom the origin sees.
func (g *gateway) quicStream(c *quic.Conn) (*quic.Stream, *bufio.Reader, netip.AddrPort) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	defer cancel()
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		g.t.Fatal(err)
	}
	if err := s.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		g.t.Fatal(err)
	}
	// The other side knows of a stream once something is said on it.
	if _, err := io.WriteString(s, "+"); err != nil {
		g.t.Fatal(err)
	}
	r := bufio.NewReader(s)
	line, err := r.ReadString('\n')
	if err != nil {
		g.t.Fatal(err)
	}
	seen, err := netip.ParseAddrPort(strings.TrimSpace(line))
	if err != nil {
		g.t.Fatal(err)
	}
	if b, err := r.ReadByte(); err != nil || b != '+' {
		g.t.Fatalf("told %q, %v", b, err)
	}
	return s, r, seen
}

// TestTransparentQUIC: QUIC as programs speak it leaves by the path that its
// server name says, carries megabytes each way, and outlives reloads.
func TestTransparentQUIC(t *testing.T) {
	g := newGateway(t)
	o := g.serveQUIC(everywhere(443)...)
	config := uplinkConfig(`  - name: by-name
    type: route_upstream
    child_match: [{next: one, domains: [one.example]}]
    default_next: out
  - {name: one, type: direct_fixed, uplink: isp2, bind_ip: [203.0.113.21, "2001:db8:200::21"]}
server:
  - {name: lan, type: tproxy, interface: lan0, divert: "udp/443", escaper: by-name, select: {out: p3}, sniff: true, sniff_timeout: 10s}
`)
	g.start(config)
	many := []string{"echo"}
	for i := range 150 {
		many = append(many, fmt.Sprintf("a-protocol-that-nobody-speaks-%d", i))
	}
	for _, tt := range []struct {
		at, name, want string
		protos         []string
		version        quic.Version
	}{
		{at4(443), "www.one.example", "203.0.113.21", many[:1], quic.Version1},
		{at6(443), "www.ONE.example", "2001:db8:200::21", many[:1], quic.Version1},
		{at4(443), "one.example", "203.0.113.21", many[:1], quic.Version2},
		{at6(443), "one.example", "2001:db8:200::21", many, quic.Version1}, // over several datagrams, whatever its key shares are
		{at4(443), "other.example", "198.51.100.13", many[:1], quic.Version1},
		{at4(443), "", "198.51.100.13", many, quic.Version2},
	} {
		c := g.dialQUIC(tt.at, tt.name, tt.protos, tt.version)
		s, r, seen := g.quicStream(c)
		if seen.Addr() != netip.MustParseAddr(tt.want) {
			t.Errorf("QUIC %s to %s, called %q: the origin sees %s, want %s", tt.version, tt.at, tt.name, seen, tt.want)
		}
		g.echoes(s, r, 2<<20, nil)
		_ = c.CloseWithError(0, "")
	}
	if o.hybrid.Load() == 0 {
		t.Error("no client has offered a key share that takes several datagrams")
	}

	c := g.dialQUIC(at4(443), "one.example", many[:1], quic.Version1)
	defer c.CloseWithError(0, "")
	s, r, before := g.quicStream(c)
	g.echoes(s, r, 4<<20, func() {
		g.replaceConfig(strings.Replace(config, "203.0.113.21", "203.0.113.22", 1))
	})
	if _, _, seen := g.quicStream(c); seen != before {
		t.Errorf("a connection that came from %s comes from %s after a reload", before, seen)
	}
	if _, _, seen := g.quicStream(g.dialQUIC(at4(443), "one.example", many[:1], quic.Version1)); seen.Addr() != netip.MustParseAddr("203.0.113.22") {
		t.Errorf("after the reload a new connection comes from %s", seen)
	}
	g.kept("all the time", toPort(443))
}

// echoes sends so many bytes and wants them back, both at once. In the middle
// something happens.
func (g *gateway) echoes(s *quic.Stream, r io.Reader, size int, meanwhile func()) {
	g.t.Helper()
	data := make([]byte, size)
	_, _ = rand.Read(data) // never fails
	sent := make(chan error, 1)
	half := make(chan struct{})
	go func() {
		_, err := s.Write(data[:size/2])
		<-half
		if err == nil {
			_, err = s.Write(data[size/2:])
		}
		sent <- err
	}()
	back := make([]byte, size)
	_, err := io.ReadFull(r, back[:size/4])
	if meanwhile != nil && err == nil {
		meanwhile()
	}
	close(half)
	if err == nil {
		_, err = io.ReadFull(r, back[size/4:])
	}
	if err != nil {
		g.t.Fatalf("of %d bytes: %v", size, err)
	}
	if err := <-sent; err != nil {
		g.t.Fatal(err)
	}
	if !bytes.Equal(data, back) {
		g.t.Error("what comes back is not what was sent")
	}
}
