package main_test

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// documented is the first configuration under a heading of docs/gateway.md, to the
// letter.
func documented(t *testing.T, heading string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/gateway.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "# "+heading+"\n")
	_, rest, open := strings.Cut(rest, "```yaml\n")
	block, _, closed := strings.Cut(rest, "```\n")
	if !found || !open || !closed {
		t.Fatalf("docs/gateway.md: no configuration under %q", heading)
	}
	return block
}

// selecting is a configuration whose server selects a node of out.
func selecting(t *testing.T, config, node string) string {
	t.Helper()
	more := strings.Replace(config, "escaper: out\n", "escaper: out\n    select: {out: "+node+"}\n", 1)
	if more = strings.Replace(more, "escaper: out}\n", "escaper: out, select: {out: "+node+"}}\n", 1); more == config {
		t.Fatalf("no server of escaper out in\n%s", config)
	}
	return more
}

// stick is a gateway with one interface for both of its sides.
type stick struct {
	*gateway
	neighbour *gateway // who has the router as its gateway
}

func newStick(t *testing.T) *stick {
	t.Helper()
	lab.Require(t)
	w, err := lab.NewStick()
	if err != nil {
		t.Fatal(err)
	}
	k := kernelSceneOf(t, sceneIn(t, w.World, w.Close))
	g := gatewayOf(t, k, lab.StickClient4+"/32", lab.StickClient6+"/128")
	g.up = []*lab.Capture{g.capture(g.ISP1, "eth0")}
	return &stick{g, g.as(w.Neighbour)}
}

// TestTransparentStick: with one interface for clients and gateway, configured as
// the document has it.
func TestTransparentStick(t *testing.T) {
	s := newStick(t)
	// As the document wants it: else the host tells its clients a shorter way.
	for _, name := range []string{"all", "eth0"} {
		if err := s.Host.Sysctl("net/ipv4/conf/"+name+"/send_redirects", "0"); err != nil {
			t.Fatal(err)
		}
	}
	tell(t, s.Origin, "origin", everywhere(443, 22)...)
	tellDatagrams(t, s.Origin, "origin", everywhere(443, 5353)...)
	tell(t, s.Host, "host", "[::]:443")
	tellDatagrams(t, s.Host, "host", "[::]:443")
	neighbour4, neighbour6 := lab.StickNeighbour4+":443", "["+lab.StickNeighbour6+"]:443"
	tell(t, s.neighbour.Client, "neighbour", neighbour4, neighbour6)
	tellDatagrams(t, s.neighbour.Client, "neighbour", neighbour4, neighbour6)
	client4, client6 := lab.StickClient4+":443", "["+lab.StickClient6+"]:443"
	tell(t, s.Client, "client", client4, client6)
	tellDatagrams(t, s.Client, "client", client4, client6)
	before := s.state()

	untouched := func(when string) {
		t.Helper()
		for at, want := range map[string]string{
			lab.StickHost4 + ":443": "host " + lab.StickClient4, "[" + lab.StickHost6 + "]:443": "host " + lab.StickClient6,
			neighbour4: "neighbour " + lab.StickClient4, neighbour6: "neighbour " + lab.StickClient6,
		} {
			s.dialAll(when, map[string]string{at: want})
			s.sendAll(when, map[string]string{at: want + " hello"})
		}
		for at, want := range map[string]string{
			client4: "client " + lab.StickNeighbour4, client6: "client " + lab.StickNeighbour6,
			at4(443): "origin " + lab.StickNeighbour4, at6(443): "origin " + lab.StickNeighbour6,
		} {
			s.neighbour.dialAll(when, map[string]string{at: want})
			s.neighbour.sendAll(when, map[string]string{at: want + " hello"})
		}
		// Who is asked from outside answers, and is not taken for a client's target.
		outside := s.as(s.Origin)
		if told := outside.dial(lab.StickHost4+":443", patience); told != "host 192.0.2.2" {
			t.Errorf("%s: from outside the host answers %q", when, told)
		}
		if told := outside.dial(client4, patience); told != "client 192.0.2.2" {
			t.Errorf("%s: from outside the client answers %q", when, told)
		}
	}
	for i, node := range []string{"a", "b"} {
		config := selecting(t, documented(t, "Router on a stick"), node)
		if i == 0 {
			s.start(config)
		} else {
			s.replaceConfig(config)
		}
		v4, v6 := map[string]string{"a": "192.168.1.51", "b": "192.168.1.52"}[node], map[string]string{"a": "2001:db8:168::51", "b": "2001:db8:168::52"}[node]
		s.dialAll(node, map[string]string{at4(443): "origin " + v4, at6(443): "origin " + v6})
		s.sendAll(node, map[string]string{at4(443): "origin " + v4 + " hello", at6(443): "origin " + v6 + " hello"})
		s.bulk(at4(443), "origin "+v4, 1<<20)
		s.bulk(at6(443), "origin "+v6, 1<<20)
	}
	untouched("diverted")
	// The rest goes on as before: the origin knows the way to the client.
	s.dialAll("not diverted", map[string]string{at4(22): "origin " + lab.StickClient4, at6(22): "origin " + lab.StickClient6})
	s.sendAll("not diverted", map[string]string{at4(5353): "origin " + lab.StickClient4 + " hello"})
	s.dialAll("after what is not diverted", map[string]string{at4(443): "origin 192.168.1.52", at6(443): "origin 2001:db8:168::52"})

	// To the neighbour, by way of the host.
	detour := netip.MustParsePrefix(lab.StickNeighbour4 + "/32")
	if err := s.Client.AddRoute(detour, netip.MustParseAddr(lab.StickHost4)); err != nil {
		t.Fatal(err)
	}
	s.dialAll("a neighbour by way of the host", map[string]string{neighbour4: "neighbour 192.168.1.52"})
	if err := s.Client.DelRoute(detour, netip.MustParseAddr(lab.StickHost4)); err != nil {
		t.Fatal(err)
	}

	if err := s.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.dialAll("killed", map[string]string{at4(443): "nobody", at6(443): "nobody"})
	s.sendAll("killed", map[string]string{at4(443): "nobody", at6(443): "nobody"})
	untouched("killed")
	s.run(lab.Program{})
	s.dialAll("started again", map[string]string{at4(443): "origin 192.168.1.52", at6(443): "origin 2001:db8:168::52"})
	s.stop()
	s.dialAll("stopped", map[string]string{at4(443): "nobody", at6(443): "nobody"})
	s.wayout("clean")
	s.same("cleaned", before)
	s.kept("all the time", func(p lab.Packet) bool {
		// What the client sends to the origin, but not its answers to who has asked it.
		return p.Dst.Port() == 443 && (p.Proto == unix.IPPROTO_UDP || p.Proto == unix.IPPROTO_TCP)
	})
	for _, p := range settled(t, s.up[0]) {
		if origin := p.Dst.Addr() == netip.MustParseAddr(lab.OriginAddr4); origin && !p.Out && p.Dst.Port() == 443 && p.Src.Addr() == netip.MustParseAddr(lab.StickHost4) {
			t.Fatalf("the host's own address shows: %s", p)
		}
	}
}

// TestTransparentRedirects: the host tells clients of a shorter way where it forwards
// on a stick, as any router does, and never for what is diverted. doctor says what
// comes of it, and ends it.
func TestTransparentRedirects(t *testing.T) {
	s := newStick(t)
	tell(t, s.Origin, "origin", everywhere(443)...)
	// Linux's own settings, whatever this machine has.
	for _, conf := range []string{"all", "eth0"} {
		if err := errors.Join(s.Host.Sysctl("net/ipv4/conf/"+conf+"/send_redirects", "1"),
			s.Client.Sysctl("net/ipv4/conf/"+conf+"/accept_redirects", "1")); err != nil {
			t.Fatal(err)
		}
	}
	at := s.capture(s.Client, "eth0")
	redirected := func(p lab.Packet) bool {
		return !p.Out && p.Proto == unix.IPPROTO_ICMP && p.Src.Addr() == netip.MustParseAddr(lab.StickHost4)
	}
	s.start(selecting(t, documented(t, "Router on a stick"), "a"))
	s.dialAll("diverted", map[string]string{at4(443): "origin 192.168.1.51", at6(443): "origin 2001:db8:168::51"})
	for _, p := range settled(t, at) {
		if redirected(p) {
			t.Errorf("for what is diverted the client is told %s", p)
		}
	}
	if out := s.wayout("doctor"); !strings.Contains(out, "warning  net.ipv4.conf.all.send_redirects: 1") || !strings.Contains(out, "warning  net.ipv4.conf.eth0.send_redirects: 1") {
		t.Errorf("doctor says nothing of redirects:\n%s", out)
	}
	// The very reason for the warning: the client leaves the host out, once it knows
	// where the router is.
	tell(t, s.ISP1, "router", lab.StickRouter4+":443")
	s.dialAll("the router itself", map[string]string{lab.StickRouter4 + ":443": "router " + lab.StickClient4})
	tellDatagrams(t, s.Origin, "origin", at4(5353))
	eventually(t, "a client that is told of a shorter way takes it", func() bool {
		s.sendAll("not diverted", map[string]string{at4(5353): "origin " + lab.StickClient4 + " hello"})
		return s.dial(at4(443), patience) == "origin "+lab.StickClient4
	})
	mustAwait(t, at, "a redirect", redirected)

	if out := s.wayout("doctor", "--fix"); !strings.Contains(out, "fixed: net.ipv4.conf.all.send_redirects: 0, was 1") || !strings.Contains(out, "fixed: net.ipv4.conf.eth0.send_redirects: 0, was 1") {
		t.Errorf("doctor does not end redirects:\n%s", out)
	}
	everything, gateway := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(lab.StickHost4)
	if err := errors.Join(s.Client.DelRoute(everything, gateway), s.Client.AddRoute(everything, gateway)); err != nil { // forgets what it was told
		t.Fatal(err)
	}
	told := len(settled(t, at))
	for range 5 {
		s.sendAll("not diverted", map[string]string{at4(5353): "origin " + lab.StickClient4 + " hello"})
		s.dialAll("diverted, without redirects", map[string]string{at4(443): "origin 192.168.1.51"})
	}
	for _, p := range settled(t, at)[told:] {
		if redirected(p) {
			t.Errorf("the client is still told %s", p)
		}
	}
}
