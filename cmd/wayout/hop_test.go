package main_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// The next-hop proxy is a second daemon on isp2, whose two paths are addresses
// that the origin has a way back to.
const (
	hopHTTP   = lab.Gateway2Of4 + ":3128"
	hopHTTP6  = "[" + lab.Gateway2Of6 + "]:3128"
	hopSOCKS  = lab.Gateway2Of4 + ":1080"
	hopFirst  = "203.0.113.201"
	hopSecond = "203.0.113.202"
	hopFirst6 = "2001:db8:200::201"
)

// hops is a scene with a second daemon, which asks for a user unless it is on
// its open port (3129), and a view of who comes to it.
type hops struct {
	*scene
	far  *lab.Daemon
	wire *lab.Capture
}

func hopScene(t *testing.T) *hops {
	t.Helper()
	s := newScene(t, true)
	if err := s.ISP2.AddAddr("host0", netip.MustParsePrefix(hopFirst+"/32"), netip.MustParsePrefix(hopSecond+"/32"), netip.MustParsePrefix(hopFirst6+"/128")); err != nil {
		t.Fatal(err)
	}
	for dst, via := range map[string]string{
		"198.51.100.0/24": lab.Primary2Of4, "2001:db8:100::/48": lab.Primary2Of6, "0.0.0.0/0": "192.0.2.6", "::/0": "2001:db8:2::2",
	} {
		if err := s.ISP2.AddRoute(netip.MustParsePrefix(dst), netip.MustParseAddr(via)); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(s.dir, "far.yaml")
	config := fmt.Sprintf(`control: {socket: %s}
drain_timeout: 100ms
escaper:
  - name: far
    type: direct_fixed
    enable_path_selection: true
    pick_policy: serial
    nodes:
      - {id: q1, ipv4: %s, ipv6: %q}
      - {id: q2, ipv4: %s}
user_group:
  - {name: hops, users: [{name: hop, password: %q}]}
server:
  - {name: web, type: http_proxy, listen: [%q, %q], user_group: hops, escaper: far, path_selection_header: X-Egress-Path}
  - {name: socks, type: socks_proxy, listen: %q, user_group: hops, escaper: far, socks_extension: true}
  - {name: plain, type: mixed_proxy, listen: "203.0.113.1:3129", open: true, escaper: far}
`, filepath.Join(s.dir, "far.sock"), hopFirst, hopFirst6, hopSecond, hashOf(t, "hop-secret"), hopHTTP, hopHTTP6, hopSOCKS)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := lab.StartDaemon(s.ISP2, lab.Program{Path: binary, Args: []string{"serve", "--config", file}})
	if err != nil {
		t.Fatal(err)
	}
	s.watchOver(d)
	c, err := s.ISP2.Capture("host0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return &hops{s, d, c}
}

// came counts, by the address that they come from, the connections to the
// next-hop proxy, and the datagrams.
func (h *hops) came() map[string]int {
	all := map[string]int{}
	for _, p := range h.wire.Packets() {
		to := p.Dst.Addr().String()
		opens := p.Proto == unix.IPPROTO_TCP && p.Flags&(lab.SYN|lab.ACK) == lab.SYN || p.Proto == unix.IPPROTO_UDP
		if !p.Out && opens && (to == lab.Gateway2Of4 || to == lab.Gateway2Of6) {
			all[p.Src.Addr().String()]++
		}
	}
	return all
}

// hopConfig is escaper out with p1 to p9, and escapers of next-hop proxies over
// them, each with a server of its own.
func hopConfig(more string) string {
	const creds = "username: hop, password: hop-secret, "
	web := func(name string, port int) string {
		return fmt.Sprintf("  - {name: s-%s, type: mixed_proxy, listen: \"10.0.0.1:%d\", open: true, escaper: %s, path_selection_header: X-Egress-Path, socks_extension: true, report_egress: true}\n", name, port, name)
	}
	return outConfig(`  - name: ph
    type: proxy_http
    enable_path_selection: true
    pick_policy: serial
    nodes:
      - {id: h1, addr: "` + hopHTTP + `", ` + creds + `path: out/p5}
      - {id: h2, addr: "` + hopHTTP + `", ` + creds + `path: out/p1}
      - {id: h6, addr: "` + hopHTTP6 + `", ` + creds + `path: out/p6}
      - {id: any, addr: "` + hopHTTP + `", ` + creds + `}
      - {id: open, addr: "203.0.113.1:3129", path: out/p7}
      - {id: wrong, addr: "` + hopHTTP + `", username: hop, password: guessed, path: out/p5}
      - {id: nobody, addr: "` + hopHTTP + `", path: out/p5}
      - {id: closed, addr: "203.0.113.1:9", path: out/p5}
      - {id: family, addr: "` + hopHTTP6 + `", path: out/p9}
  - name: ps
    type: proxy_socks5
    enable_path_selection: true
    pass_selection: true
    pick_policy: serial
    nodes:
      - {id: s1, addr: "` + hopSOCKS + `", ` + creds + `path: out/p5}
      - {id: s2, addr: "` + hopSOCKS + `", ` + creds + `path: out/p1}
      - {id: open, addr: "203.0.113.1:3129", path: out/p7}
      - {id: wrong, addr: "` + hopSOCKS + `", username: hop, password: guessed, path: out/p5}
      - {id: nobody, addr: "` + hopSOCKS + `", path: out/p5}
      - {id: closed, addr: "203.0.113.1:9", path: out/p5}
  - {name: pass, type: proxy_http, enable_path_selection: true, pass_selection: true, nodes: [{id: h1, addr: "` + hopHTTP + `", ` + creds + `path: out/p5}]}
` + more + "server:\n" + web("out", 3128) + web("ph", 3201) + web("ps", 3202) + web("pass", 3203))
}

func TestHops(t *testing.T) {
	t.Parallel()
	s := hopScene(t)
	s.start(hopConfig(""))
	v4, v6 := lab.Egress4(), lab.Egress6()
	for _, c := range []struct {
		selectionCase
		from string // what the next hop has to have seen
	}{
		{selectionCase{name: "HTTP, the first", port: 3201, source: hopFirst, proxy: `egress-path="ph/h1"`}, v4[4].String()},
		{selectionCase{name: "HTTP, a path of another uplink", port: 3201, header: egress("h2"), source: hopFirst}, v4[0].String()},
		{selectionCase{name: "HTTP over IPv6", port: 3201, header: egress("h6"), source: hopFirst}, v6[5].String()},
		{selectionCase{name: "HTTP over IPv6 to an IPv6 origin", port: 3201, header: egress("h6"), target: target6, source: hopFirst6}, v6[5].String()},
		{selectionCase{name: "HTTP over IPv4 to an IPv6 origin", port: 3201, header: egress("1"), target: target6, source: hopFirst6}, v4[4].String()},
		{selectionCase{name: "HTTP by main routing", port: 3201, header: egress("any"), source: hopFirst}, lab.Primary2Of4},
		{selectionCase{name: "HTTP without credentials", port: 3201, header: egress("open"), source: hopFirst}, v4[6].String()},
		{selectionCase{name: "HTTP, wrong credentials", port: 3201, header: egress("wrong"), status: 502}, ""},
		{selectionCase{name: "HTTP, credentials that lack", port: 3201, header: egress("nobody"), status: 502}, ""},
		{selectionCase{name: "HTTP, nobody there", port: 3201, header: egress("closed"), status: 502, proxy: "connection_refused"}, ""},
		{selectionCase{name: "HTTP, of a family that the path lacks", port: 3201, header: egress("family"), status: 502, proxy: "destination_ip_unroutable"}, ""},
		{selectionCase{name: "the peers' address is no selection", port: 3201, header: egress(v4[4].String()), status: 400}, ""},
		{selectionCase{name: "unknown ID", port: 3201, header: egress("p5"), status: 400}, ""},
		{selectionCase{name: "forbidden target", port: 3201, target: "127.0.0.1:80", status: 403}, ""},
		{selectionCase{name: "the far side refuses", port: 3201, target: lab.OriginAddr4 + ":81", status: 502, proxy: "connection_refused"}, v4[4].String()},
		{selectionCase{name: "a path of the escaper behind is not addressed", port: 3201, header: egress(`{"out": "p1"}`), status: 400}, ""},
		{selectionCase{name: "what is not passed on is unknown", port: 3201, header: egress(`{"far": "q2"}`), status: 400}, ""},

		{selectionCase{name: "SOCKS, the first", port: 3202, source: hopFirst, proxy: `egress-path="ps/s1"`}, v4[4].String()},
		{selectionCase{name: "SOCKS, another path", port: 3202, header: egress("s2"), source: hopFirst}, v4[0].String()},
		{selectionCase{name: "SOCKS without credentials", port: 3202, header: egress("open"), source: hopFirst}, v4[6].String()},
		{selectionCase{name: "SOCKS to an IPv6 origin", port: 3202, header: egress("s1"), target: target6, source: hopFirst6}, v4[4].String()},
		{selectionCase{name: "SOCKS, wrong credentials", port: 3202, header: egress("wrong"), status: 502}, ""},
		{selectionCase{name: "SOCKS, credentials that lack", port: 3202, header: egress("nobody"), status: 502}, ""},
		{selectionCase{name: "SOCKS, nobody there", port: 3202, header: egress("closed"), status: 502, proxy: "connection_refused"}, ""},
		{selectionCase{name: "SOCKS, the far side refuses", port: 3202, target: lab.OriginAddr4 + ":81", status: 502, proxy: "connection_refused"}, v4[4].String()},

		{selectionCase{name: "SOCKS, passed on", port: 3202, header: egress(`{"far": "q2"}`), source: hopSecond}, v4[4].String()},
		{selectionCase{name: "SOCKS, both", port: 3202, header: egress(`{"far": 2, "ps": "s2"}`), source: hopSecond}, v4[0].String()},
		{selectionCase{name: "SOCKS, passed on and refused", port: 3202, header: egress(`{"far": "q9"}`), status: 403}, ""}, // 0x02 is all that SOCKS has for it
		{selectionCase{name: "HTTP, passed on", port: 3203, header: egress(`{"far": "q2"}`), source: hopSecond}, v4[4].String()},
		{selectionCase{name: "HTTP, own and passed on", port: 3203, header: egress(`{"pass": 1, "far": "` + hopSecond + `"}`), source: hopSecond}, v4[4].String()},
		{selectionCase{name: "HTTP, nothing to pass on", port: 3203, header: egress("h1"), source: hopFirst}, v4[4].String()},
		{selectionCase{name: "HTTP, passed on and refused", port: 3203, header: egress(`{"far": "q9"}`), status: 502}, ""},
	} {
		for _, tunnel := range []bool{false, true} {
			before := s.came()
			c.check(s.scene, tunnel)
			if c.from == "" {
				continue
			}
			eventually(t, c.name+": the next hop was asked from "+c.from, func() bool {
				// A request on a kept connection was asked from there before.
				return s.came()[c.from] > before[c.from] || !tunnel && before[c.from] > 0
			})
		}
	}
	for a := range s.came() {
		switch a {
		case v4[4].String(), v4[0].String(), v6[5].String(), lab.Primary2Of4, v4[6].String():
		default:
			t.Errorf("the next hop was asked from %s", a)
		}
	}
	paths := s.paths()
	for path, want := range map[string]string{"ph/h1": v4[4].String(), "ph/h2": v4[0].String(), "ps/s1": v4[4].String(), "ph/any": ""} {
		p := paths[path]
		if deref(p.IPv4) != want || p.State != "up" || p.Connections.Made == 0 || p.GuardDrops != 0 {
			t.Errorf("%s: %q, %s, %+v, %d drops", path, deref(p.IPv4), p.State, p.Connections, p.GuardDrops)
		}
		if p.Packets.Out == 0 || p.Packets.In == 0 {
			t.Errorf("%s: packets %+v", path, p.Packets)
		}
	}
	if p := paths["ph/closed"]; p.Connections.Failed != 2 || p.Connections.Made != 0 {
		t.Errorf("ph/closed: %+v", p.Connections)
	}

	// The path that leads there goes, and with it the peer.
	if err := s.Host.DelAddr("eth1", lab.EgressPrefix(v4[4])); err != nil {
		t.Fatal(err)
	}
	s.until("ph/h1", func(p control.Path) bool { return strings.Contains(p.Reason, v4[4].String()) })
	selectionCase{name: "without its path", port: 3201, header: egress("h1"), status: 503}.check(s.scene, true)
	selectionCase{name: "without its path, the policy goes on", port: 3202, source: hopFirst}.check(s.scene, false)
	if err := s.Host.AddAddr("eth1", lab.EgressPrefix(v4[4])); err != nil {
		t.Fatal(err)
	}
	s.until("ph/h1", func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
	selectionCase{name: "back again", port: 3201, header: egress("h1"), source: hopFirst}.check(s.scene, true)
}

// TestHopKeepAlive: kept connections through peers are those of one user and
// target, and keep to their path.
func TestHopKeepAlive(t *testing.T) {
	t.Parallel()
	s := hopScene(t)
	s.start(hopConfig(""))
	for _, port := range []uint16{3201, 3202} {
		c := s.httpClient("http://" + proxyAt(port).String())
		conns := map[string]int{}
		for i := range 30 {
			path := fmt.Sprint(i%2 + 1)
			seen, status, err := get(t.Context(), c, target4, path)
			if err != nil || status != 200 || seen.Source != hopFirst {
				t.Fatalf("%d %v from %s", status, err, seen.Source)
			}
			if was := conns[path]; was != 0 && was != seen.Conn {
				t.Errorf("port %d, path %s: connection %d and then %d", port, path, was, seen.Conn)
			}
			conns[path] = seen.Conn
		}
		if conns["1"] == conns["2"] {
			t.Errorf("port %d: two paths share a connection", port)
		}
	}
	// What was asked for with a selection is nobody else's.
	c := s.httpClient("http://" + proxyAt(3203).String())
	second, status, err := get(t.Context(), c, target4, `{"far": "q2"}`)
	if err != nil || status != 200 || second.Source != hopSecond {
		t.Fatalf("%d %v from %s", status, err, second.Source)
	}
	for range 3 {
		if seen, _, err := get(t.Context(), c, target4, ""); err != nil || seen.Source != hopFirst {
			t.Errorf("without a selection: %v, from %s", err, seen.Source)
		}
	}
}

// TestHopByPrefix: a path to the peer that is a prefix has an address for each
// session, and one for each request without.
func TestHopByPrefix(t *testing.T) {
	t.Parallel()
	s := hopScene(t)
	if err := s.ISP2.AddRoute(routed6, netip.MustParseAddr(lab.Primary2Of6)); err != nil {
		t.Fatal(err)
	}
	s.start(fmt.Sprintf(`escaper:
  - {name: out, type: direct_fixed, neighbour: off, nodes: [{id: six, ipv6: %q}]}
  - {name: ph, type: proxy_http, nodes: [{id: h, addr: %q, username: hop, password: hop-secret, path: out/six}]}
user_group:
  - {name: team, users: [{name: alice, password: %q}]}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: ph}
  - {name: named, type: http_proxy, listen: "10.0.0.1:3130", user_group: team, username_params: true, escaper: ph}
`, routed6, hopHTTP6, hashOf(t, "secret")))
	ask := func(c *http.Client) lab.Seen {
		t.Helper()
		seen, status, err := get(t.Context(), c, target4, "")
		if err != nil || status != 200 {
			t.Fatalf("%d %v", status, err)
		}
		return seen
	}
	c := s.httpClient("http://10.0.0.1:3128")
	for range 5 {
		ask(c)
	}
	eventually(t, "each request has come to the next hop from an address of its own", func() bool { return len(s.came()) == 5 })
	a, b := s.httpClient("http://alice-session-a:secret@10.0.0.1:3130"), s.httpClient("http://alice-session-b:secret@10.0.0.1:3130")
	ofA, ofB := ask(a), ask(b)
	if again := ask(a); again.Conn != ofA.Conn || ofA.Conn == ofB.Conn {
		t.Errorf("session a has connections %d and %d, session b %d", ofA.Conn, again.Conn, ofB.Conn)
	}
	eventually(t, "each session has come from an address of its own", func() bool { return len(s.came()) == 7 })
	for from := range s.came() {
		if !routed6.Contains(netip.MustParseAddr(from)) {
			t.Errorf("the next hop was asked from %s", from)
		}
	}
}

// TestHopDatagrams: associations through a SOCKS5 peer.
func TestHopDatagrams(t *testing.T) {
	t.Parallel()
	s := hopScene(t)
	const at4, at6 = lab.OriginAddr4 + ":5353", "[" + lab.OriginAddr6 + "]:5353"
	s.serveDatagrams(t, at4, at6)
	s.start(hopConfig(""))
	for _, c := range []struct{ extension, target, from string }{
		{"", at4, hopFirst},
		{"s2", at4, hopFirst},
		{"s1", at6, hopFirst6},
		{`{"far": "q2"}`, at4, hopSecond},
	} {
		a, err := s.associateBy(client.Dialer{Extension: c.extension}, 3202)
		if err != nil {
			t.Fatalf("%q: %v", c.extension, err)
		}
		first := a.mustEcho(t, c.target, "who am I")
		if again := a.mustEcho(t, c.target, "who am I"); first.Addr().String() != c.from || again != first {
			t.Errorf("%q: datagrams come from %s and %s, want %s", c.extension, first, again, c.from)
		}
	}
	if from := s.came(); from[lab.Egress4()[4].String()] == 0 || len(from) != 2 {
		t.Errorf("the next hop was asked from %v", from)
	}
	// A peer of HTTP carries none, and one that refuses is none.
	for _, c := range []struct {
		port      uint16
		extension string
	}{{3201, ""}, {3202, "wrong"}, {3202, "closed"}} {
		var reply *client.ReplyError
		if _, err := s.associateBy(client.Dialer{Extension: c.extension}, c.port); !errors.As(err, &reply) || reply.Code == 0 {
			t.Errorf("port %d, %q: %v", c.port, c.extension, err)
		}
	}
	// The association ends with the peer.
	a, err := s.associateBy(client.Dialer{}, 3202)
	if err != nil {
		t.Fatal(err)
	}
	a.mustEcho(t, at4, "who am I")
	if err := s.far.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.control.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var timeout net.Error
	if _, err := a.control.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the association outlives its peer: %v", err)
	}
	selectionCase{name: "the peer is down", port: 3202, status: 502, proxy: "connection_refused"}.check(s.scene, true)
}

// authority makes a certificate for a name, signed by an authority of the
// test's own, whose certificate it writes to a file.
func authority(t *testing.T, file, name string) tls.Certificate {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	caKey, ownKey := key(), key()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of a test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	signed := func(c *x509.Certificate, k *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &k.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed(ca, caKey)})
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	own := signed(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ownKey)
	return tls.Certificate{Certificate: [][]byte{own}, PrivateKey: ownKey}
}

// hopProxy is an HTTP proxy of the test's own, in the origin's namespace.
type hopProxy struct {
	mu   sync.Mutex
	from []string // who connected
	said []http.Header
}

func (p *hopProxy) seen() (from []string, said []http.Header) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.from...), append([]http.Header(nil), p.said...)
}

// serve speaks with one client: it connects to the origin for CONNECT.
func (p *hopProxy) serve(s *scene, c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	req, err := http.ReadRequest(r)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.from = append(p.from, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().String())
	p.said = append(p.said, req.Header)
	p.mu.Unlock()
	if req.Method != http.MethodConnect {
		fmt.Fprint(c, "HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
		return
	}
	to, err := netip.ParseAddrPort(req.Host)
	if err != nil {
		fmt.Fprint(c, "HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n")
		return
	}
	up, err := s.Origin.Dial(to)
	if err != nil {
		fmt.Fprint(c, "HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n")
		return
	}
	defer up.Close()
	fmt.Fprint(c, "HTTP/1.1 200 Yes\r\n\r\n")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(up, r)
		_ = up.CloseWrite()
	}()
	_, _ = io.Copy(c, up)
	if t, ok := c.(*tls.Conn); ok {
		_ = t.CloseWrite()
	}
	c.Close()
	<-done
}

// serveTLS serves at an address of the origin, within TLS, until the test ends.
func (p *hopProxy) serveTLS(s *scene, at string, own tls.Certificate) {
	s.t.Helper()
	l := s.listen(at)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { p.serve(s, tls.Server(c, &tls.Config{Certificates: []tls.Certificate{own}})) })
		}
	})
	s.t.Cleanup(func() { l.Close(); s.daemon.Stop(); serving.Wait() }) //nolint:errcheck // the scene's own cleanup looks at how it ended
}

// TestHopTLS: a peer within TLS is who its certificate says, or is not spoken
// to.
func TestHopTLS(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	ca, other := filepath.Join(s.dir, "ca.pem"), filepath.Join(s.dir, "other.pem")
	own := authority(t, ca, "hop.test")
	authority(t, other, "hop.test")
	p := &hopProxy{}
	p.serveTLS(s, lab.OriginAddr4+":3443", own)
	silent := s.listen(lab.OriginAddr4 + ":3444")
	t.Cleanup(func() { silent.Close() })
	node := func(name, file, tlsName, more string) string {
		return fmt.Sprintf("  - {name: %s, type: proxy_https, enable_path_selection: true, tls_ca: %q, tls_name: %s, %snodes: [{id: a, addr: \"%s:3443\", username: u, password: \"p:w\", path: out/p3}, {id: b, addr: \"%s:3444\", path: out/p3}]}\n",
			name, file, tlsName, more, lab.OriginAddr4, lab.OriginAddr4)
	}
	web := func(name string, port int) string {
		return fmt.Sprintf("  - {name: s-%s, type: http_proxy, listen: \"10.0.0.1:%d\", open: true, escaper: %s, path_selection_header: X-Egress-Path}\n", name, port, name)
	}
	s.start(outConfig(node("good", ca, "hop.test", "pass_selection: true, path_selection_header: X-Way, peer_negotiation_timeout: 1s, ") +
		node("name", ca, "else.test", "") + node("sign", other, "hop.test", "") +
		"server:\n" + web("good", 3201) + web("name", 3202) + web("sign", 3203)))
	for i, c := range []selectionCase{
		{name: "good", port: 3201, header: egress("a")},
		{name: "good, with a selection to pass on", port: 3201, header: egress(`{"good": "a", "there": "x", "more": 3}`)},
		{name: "of another name", port: 3202, header: egress("a"), status: 502},
		{name: "by another authority", port: 3203, header: egress("a"), status: 502},
		{name: "silent", port: 3201, header: egress("b"), status: 504, proxy: "connection_timeout"},
	} {
		if c.status == 0 {
			c.source = lab.OriginAddr4
		}
		for _, tunnel := range []bool{true, false} {
			c.check(s, tunnel)
			_, said := p.seen()
			if i > 1 {
				continue
			}
			got := said[len(said)-1]
			if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("u:p:w")); got.Get("Proxy-Authorization") != want {
				t.Errorf("%s: credentials %q", c.name, got.Get("Proxy-Authorization"))
			}
			if want := []string{"", `{"more":3,"there":"x"}`}[i]; got.Get("X-Way") != want {
				t.Errorf("%s: the selection that was passed on is %q, want %q", c.name, got.Get("X-Way"), want)
			}
			if got.Get("X-Egress-Path") != "" {
				t.Errorf("%s: the peer got the client's own header", c.name)
			}
		}
	}
	from, _ := p.seen()
	for _, a := range from {
		if a != lab.Egress4()[2].String() {
			t.Errorf("the peer was asked from %s", a)
		}
	}
	// A body of some size, both ways, through TLS.
	echo := s.listen(lab.OriginAddr4 + ":7")
	t.Cleanup(func() { echo.Close() })
	go func() {
		c, err := echo.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	}()
	w := s.dial(t, 3201)
	w.say("CONNECT " + lab.OriginAddr4 + ":7 HTTP/1.1\r\nHost: x\r\nX-Egress-Path: a\r\n\r\n")
	if h := w.head(); !strings.HasPrefix(h, "HTTP/1.1 200 ") {
		t.Fatal(h)
	}
	text := strings.Repeat("all that there is to say. ", 40_000)
	go func() {
		_, _ = io.WriteString(w, text)
		_ = w.CloseWrite()
	}()
	w.expect(text)
	w.ended()
}
