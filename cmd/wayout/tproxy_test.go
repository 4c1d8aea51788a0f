package main_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"wayout/scripts/lab"
)

// What p6 and p2 are to the origin.
const (
	p6Of4, p6Of6 = "203.0.113.12", "2001:db8:200::12"
	p2Of4, p2Of6 = "198.51.100.12", "2001:db8:100::12"
)

// TestTransparent: who is behind the host reaches what it means to, by a path of
// ours, and nothing else of it changes.
func TestTransparent(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443, 22, 8000)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(53, 1500, 1999, 5353)...)
	tell(t, g.Host, "host", "[::]:443", "0.0.0.0:22")
	tellDatagrams(t, g.Host, "host", "[::]:1500")
	g.start(uplinkConfig(lan(`divert: ["tcp/443", "tcp/22", "udp/53", "udp/1000-2000"], select: {out: p6}, sniff: true`)))

	g.dialAll("diverted", map[string]string{
		at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6, at4(22): "origin " + p6Of4, at6(22): "origin " + p6Of6,
	})
	g.sendAll("diverted", map[string]string{
		at4(53): "origin " + p6Of4 + " hello", at6(53): "origin " + p6Of6 + " hello",
		at4(1500): "origin " + p6Of4 + " hello", at6(1999): "origin " + p6Of6 + " hello",
	})
	g.dialAll("to the host itself", map[string]string{
		lab.HostAddr4 + ":443": "host " + lab.ClientAddr4, "[" + lab.HostAddr6 + "]:443": "host " + lab.ClientAddr6,
		lab.HostAddr4 + ":22": "host " + lab.ClientAddr4,
		// By the addresses of uplinks too, their paths' among them.
		lab.Primary1Of4 + ":443": "host " + lab.ClientAddr4, "[" + lab.Primary2Of6 + "]:443": "host " + lab.ClientAddr6,
		p6Of4 + ":443": "host " + lab.ClientAddr4, "[" + p2Of6 + "]:443": "host " + lab.ClientAddr6,
	})
	g.sendAll("to the host itself", map[string]string{
		lab.HostAddr4 + ":1500": "host " + lab.ClientAddr4 + " hello", "[" + lab.HostAddr6 + "]:1500": "host " + lab.ClientAddr6 + " hello",
	})
	// A neighbour on an uplink's own network, whose prefix has a rule of its own.
	tell(t, g.ISP2, "isp2", lab.Gateway2Of4+":443", "["+lab.Gateway2Of6+"]:443")
	g.dialAll("to an uplink's network", map[string]string{
		lab.Gateway2Of4 + ":443": "isp2 " + p6Of4, "[" + lab.Gateway2Of6 + "]:443": "isp2 " + p6Of6,
	})
	// Nobody is there: the client learns it.
	g.dialAll("to nobody", map[string]string{at4(443)[:len(at4(443))-3] + "22222": "nobody"})

	g.dialAll("not diverted, and nobody knows the way back", map[string]string{at4(8000): "nobody", at6(8000): "nobody"})
	g.forwarded("a connection that is not diverted", toPort(8000))
	g.sendAll("not diverted", map[string]string{at4(5353): "nobody"})
	g.forwarded("a datagram that is not diverted", toPort(5353))
	for _, port := range []uint16{443, 22, 53, 1500, 1999} {
		g.kept("all the time", toPort(port))
	}
	if log := g.daemon.Log(); !strings.Contains(log, `"method":"TPROXY","target":"`+at4(443)+`"`) || !strings.Contains(log, `"path":"out/p6"`) {
		t.Errorf("no record of a diverted connection:\n%s", log)
	}
}

// TestTransparentFailsClosed: without the daemon what is diverted goes nowhere and
// nobody else answers, however it ended, until clean.
func TestTransparentFailsClosed(t *testing.T) {
	g := newGateway(t)
	before := g.state()
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	tell(t, g.Host, "host", "[::]:443")
	tellDatagrams(t, g.Host, "host", "[::]:1500")
	config := uplinkConfig(lan(`divert: ["tcp/443", "udp/1500"], select: {out: p6}`))
	works := func(when string) {
		t.Helper()
		g.dialAll(when, map[string]string{at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6})
		g.sendAll(when, map[string]string{at4(1500): "origin " + p6Of4 + " hello", at6(1500): "origin " + p6Of6 + " hello"})
	}
	stopped := func(when string) {
		t.Helper()
		g.dialAll(when, map[string]string{
			at4(443): "nobody", at6(443): "nobody",
			lab.HostAddr4 + ":443": "host " + lab.ClientAddr4, "[" + lab.HostAddr6 + "]:443": "host " + lab.ClientAddr6,
		})
		g.sendAll(when, map[string]string{at4(1500): "nobody", at6(1500): "nobody"})
		g.kept(when, toPort(443))
		g.kept(when, toPort(1500))
	}
	g.write(config)
	// As a unit that runs before the network does it.
	g.wayout("apply")
	stopped("applied")
	g.run(lab.Program{})
	works("started")
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	stopped("killed")
	g.run(lab.Program{})
	works("started again")
	g.wayout("apply") // is nothing to a daemon that runs
	works("applied beside the daemon")
	g.stop()
	stopped("stopped")
	t.Logf("lan0 has %v", g.clsact("lan0")) // nothing where the kernel has tcx
	g.wayout("clean")
	g.same("cleaned", before)
	if left := g.clsact("lan0"); len(left) > 0 {
		t.Errorf("cleaned: lan0 has %v", left)
	}
	g.dialAll("cleaned", map[string]string{at4(443): "nobody"})
	g.forwarded("a connection", toPort(443))
}

// TestTransparentFragments: no fragment of what is diverted slips by.
func TestTransparentFragments(t *testing.T) {
	g := newGateway(t)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500, 1501)...)
	tellDatagrams(t, g.Host, "host", "[::]:1500")
	large := strings.Repeat("large ", 1000)
	g.start(uplinkConfig(lan(`divert: ["udp/1500"], select: {out: p6}`)))
	ask := func(within string) func(string) string {
		return func(at string) string {
			if within == "nobody" {
				return g.send(at, large, brief)
			}
			return g.send(at, large, patience)
		}
	}
	wantAll(t, "fragments", ask("nobody"), map[string]string{at4(1500): "nobody", at6(1500): "nobody", at4(1501): "nobody"})
	g.kept("fragments", udpOf)
	wantAll(t, "fragments to the host", ask(""), map[string]string{
		lab.HostAddr4 + ":1500": "host " + lab.ClientAddr4 + " " + large, "[" + lab.HostAddr6 + "]:1500": "host " + lab.ClientAddr6 + " " + large,
	})
	g.sendAll("whole", map[string]string{at4(1500): "origin " + p6Of4 + " hello", at6(1500): "origin " + p6Of6 + " hello"})

	// All of the protocol: then they are put together here.
	g.replaceConfig(uplinkConfig(lan(`divert: ["udp/*"], select: {out: p2}`)))
	wantAll(t, "fragments of all that is UDP", ask(""), map[string]string{
		at4(1500): "origin " + p2Of4 + " " + large, at6(1501): "origin " + p2Of6 + " " + large,
	})
	g.kept("all the time", udpOf)
}

// TestTransparentRest: rest: drop leaves nothing to be forwarded.
func TestTransparentRest(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443, 444)...)
	tell(t, g.Host, "host", "[::]:444")
	g.start(uplinkConfig(lan(`divert: tcp/443, rest: drop, select: {out: p6}`)))
	g.dialAll("rest: drop", map[string]string{
		at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6, at4(444): "nobody", at6(444): "nobody",
		lab.HostAddr4 + ":444": "host " + lab.ClientAddr4,
	})
	g.sendAll("rest: drop", map[string]string{at4(53): "nobody"})
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	g.dialAll("killed", map[string]string{at4(443): "nobody", at6(444): "nobody", lab.HostAddr4 + ":444": "host " + lab.ClientAddr4})
	g.kept("all the time", func(p lab.Packet) bool { return p.Dst.Addr().Is4() || !p.Dst.Addr().IsMulticast() })
}

// TestTransparentReload: what is diverted and how changes under a running
// daemon; connections and flows live on.
func TestTransparentReload(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443, 8080)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	tell(t, g.Host, "host", "[::]:443")
	g.start(uplinkConfig(lan(`divert: ["tcp/443", "udp/1500"], select: {out: p6}`)))
	long, err := g.Client.Dial(netip.MustParseAddrPort(at4(443)))
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()
	if told := talk(long, "before", patience); told != "origin "+p6Of4 {
		t.Fatalf("told %q", told)
	}
	flow := g.flow(at4(1500))
	if told := flow("one"); told != "origin "+p6Of4+" one" {
		t.Fatalf("told %q", told)
	}
	g.replaceConfig(uplinkConfig(lan(`divert: ["tcp/443", "tcp/8080", "udp/1500"], select: {out: p2}`)))
	g.dialAll("another path and port", map[string]string{at4(443): "origin " + p2Of4, at6(8080): "origin " + p2Of6})
	g.sendAll("another path", map[string]string{at6(1500): "origin " + p2Of6 + " hello"})
	if told := flow("two"); told != "origin "+p6Of4+" two" {
		t.Errorf("the flow that was there is told %q", told)
	}
	if _, err := fmt.Fprint(long, "after"); err != nil {
		t.Error(err)
	}
	b := make([]byte, 5)
	if _, err := long.Read(b); err != nil || string(b) != "after" {
		t.Errorf("the connection that was there: %q, %v", b, err)
	}
	g.kept("until here", toPort(443))
	g.kept("until here", toPort(8080))

	// A port less: it is forwarded, and never the host's own.
	g.replaceConfig(uplinkConfig(lan(`divert: ["tcp/8080"], select: {out: p2}`)))
	g.dialAll("a port less", map[string]string{at6(8080): "origin " + p2Of6, at4(443): "nobody"})
	g.forwarded("what is not diverted any more", toPort(443))
	if out, errs, code := g.command("reload", "--control", g.socket); code != 0 {
		t.Errorf("%s%s", out, errs)
	}
	g.write(uplinkConfig(lan(`divert: ["tcp/8080", "tcp/443"], select: {out: nope}`)))
	if _, _, code := g.command("reload", "--control", g.socket); code != 1 {
		t.Errorf("a bad configuration: exit code %d", code)
	}
	g.dialAll("after a bad configuration", map[string]string{at4(8080): "origin " + p2Of4, lab.HostAddr4 + ":443": "host " + lab.ClientAddr4})

	// No tproxy at all.
	g.replaceConfig(uplinkConfig(""))
	g.dialAll("no tproxy", map[string]string{at4(8080): "nobody", lab.HostAddr4 + ":443": "host " + lab.ClientAddr4})
	g.forwarded("what is not diverted any more", toPort(8080))
}
