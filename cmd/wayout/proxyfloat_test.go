package main_test

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// peerScene is a scene of next-hop proxies, whose escaper dyn has those that are
// published.
type peerScene struct {
	*hops
	cache string
}

// hopOpen is the next-hop proxy that asks for no user, HTTP and SOCKS.
const hopOpen = "203.0.113.1:3129"

func newPeerScene(t *testing.T) *peerScene {
	t.Helper()
	h := hopScene(t)
	h.serveEcho()
	return &peerScene{h, filepath.Join(h.dir, "cache", "dyn.json")}
}

func (s *peerScene) peerConfig(more string) string {
	h := hashOf(s.t, "secret")
	return outConfig(fmt.Sprintf(`  - {name: dyn, type: proxy_float, enable_path_selection: true, cache: %q%s}
  - {name: shut, type: proxy_float}
  - {name: safe, type: route_failover, next: [dyn, out]}
user_group:
  - name: team
    users:
      - {name: alice, password: %q, allow_path: ["dyn/a*"]}
      - {name: op, password: %q, egress_path: {dyn: b}}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: dyn, path_selection_header: X-Egress-Path, report_egress: true}
  - {name: named, type: http_proxy, listen: "10.0.0.1:3130", user_group: team, escaper: dyn, path_selection_header: X-Egress-Path}
  - {name: failover, type: http_proxy, listen: "10.0.0.1:3131", open: true, escaper: safe}
  - {name: shut, type: http_proxy, listen: "10.0.0.1:3132", open: true, escaper: shut, path_selection_header: X-Egress-Path}
metrics: {listen: "10.0.0.1:9180"}
`, s.cache, more, h, h))
}

func (s *peerScene) publishTo(escaper, text string) error {
	_, err := control.NewClient(s.socket).Publish(s.t.Context(), escaper, []byte(text))
	return err
}

func (s *peerScene) mustPublish(nodes ...string) {
	s.t.Helper()
	if err := s.publishTo("dyn", "["+strings.Join(nodes, ",\n")+"]"); err != nil {
		s.t.Fatal(err)
	}
}

// asked counts the connections to the next-hop proxy's ports, by the address that they
// come from and the port.
func (s *peerScene) asked(from netip.Addr, at string) int {
	n := 0
	for _, p := range s.wire.Packets() {
		if !p.Out && p.Proto == unix.IPPROTO_TCP && p.Flags&(lab.SYN|lab.ACK) == lab.SYN && p.Src.Addr() == from && p.Dst.String() == at {
			n++
		}
	}
	return n
}

const hopCreds = `"username": "hop", "password": "hop-secret"`

func node(id, kind, at, more string) string {
	return fmt.Sprintf(`{"id": %q, "type": %q, "addr": %q%s}`, id, kind, at, more)
}

func by(path string) string { return fmt.Sprintf(`, "path": %q`, path) }

func TestPublishPeers(t *testing.T) {
	t.Parallel()
	s := newPeerScene(t)
	s.start(s.peerConfig(""))
	v4 := lab.Egress4()
	s.asks("nothing is published", 3128, nil, "", 503)
	s.asks("an index of nothing", 3128, egress("1"), "", 400)
	if told := s.ask(lab.Ask{Proxy: proxyAt(3131)}); told.Status != 200 || told.Seen.Source == hopFirst {
		t.Errorf("nothing is published, the next of a failover: %d by %s", told.Status, told.Seen.Source)
	}
	file := filepath.Join(s.dir, "peers.json")
	a, b := node("a", "http", hopHTTP, ", "+hopCreds+by("out/p5")), node("b", "socks5", hopSOCKS, ", "+hopCreds+by("out/p1")+`, "weight": 0, "isp": "hidden-isp"`)
	c := fmt.Sprintf(`{"type": "http", "addr": %q, "path": "out/p7"}`, hopOpen)
	if err := os.WriteFile(file, []byte("["+a+","+b+","+c+"]"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := s.command("publish", "--config", s.config, "dyn", file); code != 0 || out != "dyn: 3 nodes\n" || errs != "" {
		t.Fatalf("publish: %d %q %q", code, out, errs)
	}
	for _, x := range []struct {
		name, value, from string
		at                string
	}{
		{"by ID", "a", v4[4].String(), hopHTTP},
		{"by index", "2", v4[0].String(), hopSOCKS},
		{"by index, the last", "0", v4[6].String(), hopOpen},
		{"by an ID that is its address", hopOpen, v4[6].String(), hopOpen},
		{"by a map", `{"dyn": "b"}`, v4[0].String(), hopSOCKS},
	} {
		from := netip.MustParseAddr(x.from)
		before := s.asked(from, x.at)
		s.asks(x.name, 3128, egress(x.value), hopFirst, 0)
		eventually(t, x.name+": the next hop was asked from "+x.from, func() bool { return s.asked(from, x.at) > before })
	}
	for _, x := range []struct {
		name   string
		port   uint16
		header []string
		source string
		status int
	}{
		{"unknown ID", 3128, egress("x"), "", 400},
		{"a local path", 3128, egress("p5"), "", 400},
		{"a peer's address alone is no selection", 3128, egress(lab.Gateway2Of4), "", 400},
		{"the user's map", 3130, []string{basic("op", "secret")}, hopFirst, 0},
		{"what the user may choose", 3130, append(egress("a"), basic("alice", "secret")), hopFirst, 0},
		{"what the user may not choose", 3130, append(egress("2"), basic("alice", "secret")), "", 403},
		{"a failover", 3131, nil, hopFirst, 0},
	} {
		s.asks(x.name, x.port, x.header, x.source, x.status)
	}
	if err := s.publishTo("shut", "["+a+"]"); err != nil {
		t.Fatal(err)
	}
	s.asks("where clients may not choose", 3132, egress("a"), "", 400)
	s.asks("where clients do not choose", 3132, nil, hopFirst, 0)
	paths := s.paths()
	if p := paths["dyn/a"]; p.State != "up" || deref(p.IPv4) != v4[4].String() || p.Connections.Made == 0 || p.Packets.Out == 0 || p.GuardDrops != 0 {
		t.Errorf("dyn/a: %+v", p)
	}
	if p := paths["dyn/b"]; p.Weight != 0 {
		t.Errorf("dyn/b weighs %d", p.Weight)
	}
	if m := s.metrics(); !strings.Contains(m, `wayout_path_up{escaper="dyn",path="a"} 1`) || strings.Contains(m, "hidden-isp") {
		t.Error("metrics do not have dyn/a, or have a label of its publication")
	}
	if out, errs, code := s.command("explain", "--config", s.config, "--server", "web", "--header", "b", target4); code != 0 || !strings.Contains(out, "dyn/b") {
		t.Errorf("explain: %d %s%s", code, out, errs)
	}
	if _, errs, code := s.command("drain", "dyn/a", "--config", s.config); code != 0 {
		t.Error(errs)
	}
	s.asks("draining", 3128, egress("a"), "", 503)
	if _, errs, code := s.command("undrain", "dyn/a", "--config", s.config); code != 0 {
		t.Error(errs)
	}

	// What goes on and what does not, when others are published.
	stays, moved, gone := s.echo("a"), s.echo("b"), s.echo(hopOpen)
	before := s.paths()["dyn/a"]
	from := s.asked(v4[0], hopOpen)
	s.mustPublish(node("n", "http", hopOpen, ""), a, node("b", "socks5", hopOpen, by("out/p1")))
	s.asks("new, by main routing", 3128, egress("1"), hopFirst, 0)
	s.asks("gone", 3128, egress(hopOpen), "", 400)
	s.asks("with another address", 3128, egress("b"), hopFirst, 0)
	eventually(t, "the other address is asked", func() bool { return s.asked(v4[0], hopOpen) > from })
	for name, c := range map[string]net.Conn{"stays": stays, "has moved": moved, "is gone": gone} {
		if err := echoes(c); err != nil {
			t.Errorf("a tunnel by a node that %s: %v", name, err)
		}
	}
	after := s.paths()["dyn/a"]
	if after.Connections.Made < before.Connections.Made || after.Connections.Open < 1 || after.Bytes.Out < before.Bytes.Out || !after.Since.Equal(before.Since) {
		t.Errorf("the books of a node that stays: %+v before, %+v after", before, after)
	}
	if p := s.paths()["dyn/b"]; p.Connections.Made > 2 {
		t.Errorf("the books of a node with another address: %+v", p.Connections)
	}

	// Credentials: the next request has the new ones, also for a kept connection.
	client := s.httpClient("http://" + proxyAt(3128).String())
	if _, status, err := get(t.Context(), client, target4, "a"); err != nil || status != 200 {
		t.Fatalf("%d %v", status, err)
	}
	s.mustPublish(node("a", "http", hopHTTP, `, "username": "hop", "password": "no-longer"`+by("out/p5")))
	if _, status, err := get(t.Context(), client, target4, "a"); err != nil || status != 502 {
		t.Errorf("with a password that is wrong now: %d %v", status, err)
	}
	s.mustPublish(a)
	if _, status, err := get(t.Context(), client, target4, "a"); err != nil || status != 200 {
		t.Errorf("with the right one again: %d %v", status, err)
	}
	if err := echoes(stays); err != nil {
		t.Errorf("a tunnel that is older than the credentials: %v", err)
	}

	// The local path goes, and with it what leads by it.
	if err := s.Host.DelAddr("eth1", lab.EgressPrefix(v4[4])); err != nil {
		t.Fatal(err)
	}
	s.until("dyn/a", func(p control.Path) bool { return strings.Contains(p.Reason, v4[4].String()) })
	s.asks("without its local path", 3128, egress("a"), "", 503)
	s.mustPublish(a, node("e", "http", hopHTTP, ", "+hopCreds+by("out/p5")))
	s.asks("published while its local path is down", 3128, egress("e"), "", 503)
	if err := s.Host.AddAddr("eth1", lab.EgressPrefix(v4[4])); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "e"} {
		s.until("dyn/"+id, func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
		s.asks("with it again", 3128, egress(id), hopFirst, 0)
	}
	if log := s.daemon.Log(); strings.Contains(log, "hop-secret") || strings.Contains(log, "no-longer") {
		t.Error("a password is in the log")
	}
}

// TestPublishPeersRefused: a publication that is broken, or leads by what there is
// not, changes nothing and shows no password.
func TestPublishPeersRefused(t *testing.T) {
	t.Parallel()
	s := newPeerScene(t)
	s.start(s.peerConfig(""))
	good := "[" + node("a", "http", hopHTTP, ", "+hopCreds+by("out/p5")) + "]"
	if err := s.publishTo("dyn", good); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(s.cache); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the cache file: %v, %v", st, err)
	}
	tunnel := s.echo("a")
	for _, c := range []struct{ name, text, says string }{
		{"empty", "", "ends too early"},
		{"the nodes of a direct_float", `[{"ip": "198.51.100.13"}]`, "node 1: ip: is no key"},
		{"no type", `[{"addr": "192.0.2.9:1080"}]`, "node 1: type: is required"},
		{"URLs", `["http://hop:hop-secret@192.0.2.9:1080"]`, "node 1: want a JSON object"},
		{"misspelt", `[` + node("x", "http", hopHTTP, `, "username": "hop", "pasword": "hop-secret"`) + `]`, "node 1: password: is required"},
		{"unknown path", `[` + node("a", "http", hopHTTP, "") + `,` + node("x", "http", hopHTTP, by("out/p99")) + `]`, "node 2: path: there is no path out/p99"},
		{"unknown escaper", `[` + node("x", "http", hopHTTP, by("none/p1")) + `]`, "node 1: path: there is no path none/p1"},
		{"a path of itself", `[` + node("x", "http", hopHTTP, by("dyn/a")) + `]`, "want a path of a direct_fixed, and dyn is a proxy_float"},
		{"no such authorities", `[` + node("x", "https", hopHTTP, `, "tls_ca": "/nonexistent/ca.pem"`) + `]`, "node 1: tls_ca: open /nonexistent/ca.pem"},
		{"an ID twice", `[` + node("x", "http", hopHTTP, "") + `,` + node("x", "http", hopOpen, "") + `]`, "node 2: id"},
	} {
		err := s.publishTo("dyn", c.text)
		if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "hop-secret") {
			t.Errorf("%s: %v, want %q in it", c.name, err, c.says)
		}
	}
	if err := s.publishTo("out", good); err == nil || !strings.Contains(err.Error(), "no direct_float or proxy_float") {
		t.Errorf("to a direct_fixed: %v", err)
	}
	if now, err := os.ReadFile(s.cache); err != nil || string(now) != good {
		t.Errorf("the cache file is %q, %v", now, err)
	}
	s.asks("what was published", 3128, egress("a"), hopFirst, 0)
	s.asks("what was not", 3128, egress("x"), "", 400)
	if err := echoes(tunnel); err != nil {
		t.Error(err)
	}

	// A configuration without a path that a node leads by is refused.
	config := s.peerConfig("")
	s.write(strings.Replace(config, "{id: p5,", "{id: p55,", 1))
	if _, errs, code := s.command("reload", "--config", s.config); code != 1 || !strings.Contains(errs, "node a: there is no path out/p5") {
		t.Errorf("reload without the path of a published node: %d %q", code, errs)
	}
	s.asks("after a reload that was refused", 3128, egress("a"), hopFirst, 0)
	if log := s.daemon.Log(); strings.Contains(log, "hop-secret") {
		t.Error("a password is in the log")
	}
}

// TestPublishPeersCache: what was published is there again after a restart and a
// reload, and goes when its time is over.
func TestPublishPeersCache(t *testing.T) {
	t.Parallel()
	s := newPeerScene(t)
	s.start(s.peerConfig(""))
	s.mustPublish(
		node("a", "socks5", hopSOCKS, ", "+hopCreds+by("out/p5")),
		node("old", "http", hopOpen, `, "expire": "2020-01-01T00:00:00Z"`))
	check := func(when string) {
		t.Helper()
		s.asks(when, 3128, egress("a"), hopFirst, 0)
		s.asks(when+", expired", 3128, egress("old"), "", 503)
		s.asks(when+", the policy", 3128, nil, hopFirst, 0)
	}
	check("at first")
	tunnel := s.echo("a")
	s.reload(s.peerConfig(", pass_selection: true, pick_policy: serial"))
	check("after a reload")
	if err := echoes(tunnel); err != nil {
		t.Errorf("a tunnel, after a reload: %v", err)
	}
	if err := s.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.run(lab.Program{})
	check("after kill -9")
	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	// Its path is gone meanwhile: nothing of it is taken up.
	s.write(strings.Replace(s.peerConfig(""), "{id: p5,", "{id: p55,", 1))
	s.run(lab.Program{})
	if log := s.daemon.Log(); !strings.Contains(log, "published nodes cannot be taken up") || !strings.Contains(log, "there is no path out/p5") || strings.Contains(log, "hop-secret") {
		t.Errorf("the log: %s", log)
	}
	s.asks("of another configuration", 3128, egress("a"), "", 400)

	at := time.Now().Add(1500 * time.Millisecond)
	expire := fmt.Sprintf(`, "expire": %q`, at.UTC().Format(time.RFC3339Nano))
	s.mustPublish(node("a", "http", hopOpen, expire), node("b", "http", hopHTTP, ", "+hopCreds))
	tunnel = s.echo("a")
	for {
		told := s.ask(lab.Ask{Header: egress("a")})
		now := time.Now()
		if told.Status == 503 && strings.Contains(told.Body, "expired") {
			if now.Before(at) {
				t.Errorf("expired %v too early", at.Sub(now))
			}
			break
		}
		if told.Status != 200 || now.After(at.Add(30*time.Second)) {
			t.Fatalf("%v after its time: %d %s", now.Sub(at), told.Status, told.Body)
		}
	}
	s.until("dyn/a", func(p control.Path) bool { return p.State == "expired" })
	s.asks("still counted", 3128, egress("2"), hopFirst, 0)
	if err := echoes(tunnel); err != nil {
		t.Errorf("an open connection of an expired node: %v", err)
	}
}

// TestPublishPeersTLS: a published node is reached within TLS, by the name and the
// authorities that it or its escaper says, and its probe goes by it.
func TestPublishPeersTLS(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	ca, other := filepath.Join(s.dir, "ca.pem"), filepath.Join(s.dir, "other.pem")
	own := authority(t, ca, "hop.test")
	authority(t, other, "hop.test")
	p := &hopProxy{}
	p.serveTLS(s, lab.OriginAddr4+":3443", own)
	s.start(outConfig(fmt.Sprintf("  - {name: dyn, type: proxy_float, enable_path_selection: true, cache: %q, tls_ca: %q, tls_name: hop.test, probe: {tcp: %q, interval: 200ms, timeout: 200ms, rise: 1}}\n", filepath.Join(s.dir, "dyn.json"), ca, target4) +
		strings.Replace(openServer, "escaper: out", "escaper: dyn", 1)))
	at := lab.OriginAddr4 + ":3443"
	ps := &peerScene{hops: &hops{scene: s}}
	ps.mustPublish(
		node("a", "https", at, `, "username": "u", "password": "p:w"`+by("out/p3")),
		node("name", "https", at, `, "tls_name": "else.test"`),
		node("sign", "https", at, fmt.Sprintf(`, "tls_ca": %q`, other)))
	s.until("dyn/a", func(p control.Path) bool { return p.State == "up" })
	s.asks("by the escaper's authorities", 3128, egress("a"), lab.OriginAddr4, 0)
	_, said := p.seen()
	if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("u:p:w")); said[len(said)-1].Get("Proxy-Authorization") != want {
		t.Errorf("credentials %q", said[len(said)-1].Get("Proxy-Authorization"))
	}
	from, _ := p.seen()
	for _, a := range from {
		if a != lab.Egress4()[2].String() {
			t.Errorf("the proxy was asked from %s", a)
		}
	}
	for _, id := range []string{"name", "sign"} {
		s.until("dyn/"+id, func(p control.Path) bool { return p.State == "down" && strings.Contains(p.Reason, "certificate") })
		s.asks("not who it should be", 3128, egress(id), "", 503)
	}

	// Without a file that a published node needs a reload is refused, and a start is
	// one without nodes.
	if err := os.Rename(other, other+".away"); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.command("reload", "--config", s.config); code != 1 || !strings.Contains(errs, "node sign: ") || !strings.Contains(errs, other) {
		t.Errorf("reload without the authorities of a published node: %d %q", code, errs)
	}
	s.asks("after a reload that was refused", 3128, egress("a"), lab.OriginAddr4, 0)
	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	s.run(lab.Program{})
	if log := s.daemon.Log(); !strings.Contains(log, "published nodes cannot be taken up") || !strings.Contains(log, "node 3: tls_ca: open "+other) {
		t.Errorf("the log: %s", log)
	}
	s.asks("without nodes", 3128, egress("a"), "", 400)
}
