package main_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// TestGatewayInFiveMinutes goes through docs/gateway.md as a newcomer does.
func TestGatewayInFiveMinutes(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(443)...)
	g.dialAll("before the first start", map[string]string{at4(443): "nobody"})
	g.forwarded("a connection before the first start", toPort(443))
	since := make([]int, len(g.up))
	for i, c := range g.up {
		since[i] = len(settled(t, c))
	}

	g.write(documented(t, "A gateway in five minutes"))
	if out := g.wayout("doctor"); !strings.Contains(out, "ok       diverted traffic") || !strings.Contains(out, "ok       traffic from lan0") || strings.Contains(out, "redirects") {
		t.Errorf("1. doctor:\n%s", out)
	}
	if out := g.wayout("plan"); !strings.Contains(out, "iif lan0 ipproto tcp dport 443 lookup") {
		t.Errorf("2. plan:\n%s", out)
	}
	g.run(lab.Program{})
	seen := map[string]bool{}
	eventually(t, "3. both paths are shown", func() bool {
		told := g.dial(at4(443), patience)
		if told != "origin 198.51.100.11" && told != "origin 203.0.113.7" {
			t.Fatalf("3. told %q", told)
		}
		seen[told] = true
		return len(seen) == 2
	})
	g.dialAll("3. IPv6", map[string]string{at6(443): "origin 2001:db8:100::11"})
	g.sendAll("UDP", map[string]string{at6(443): "origin 2001:db8:100::11 hello"})
	if out := g.wayout("paths"); !strings.Contains(out, "out/a ") || !strings.Contains(out, "out/b ") {
		t.Errorf("4. paths:\n%s", out)
	}

	// "TCP that cannot be connected is reset": nobody is there, and a family that no
	// path has.
	g.isReset("nobody is there", lab.OriginAddr4+":81", strings.Replace(documented(t, "A gateway in five minutes"), "tcp/80,", "tcp/80-81,", 1))
	g.isReset("no IPv6", at6(443), strings.Replace(documented(t, "A gateway in five minutes"), `, ipv6: "2001:db8:100::11"`, "", 1))

	// By the destination.
	g.replaceConfig(strings.NewReplacer("server:\n", fmt.Sprintf(`  - {name: one, type: direct_fixed, uplink: isp1, bind_ip: 198.51.100.21}
  - {name: there, type: route_upstream, subnet_match: [{next: one, subnets: [%s/32]}], default_next: out}
server:
`, lab.OriginAddr4), "escaper: out}", "escaper: there}").Replace(documented(t, "A gateway in five minutes")))
	g.dialAll("by the destination", map[string]string{at4(443): "origin 198.51.100.21", at6(443): "origin 2001:db8:100::11"})

	// Behind a firewall, with the very command.
	nft := g.nft()
	nft("add table inet filter")
	nft("add chain inet filter input { type filter hook input priority 0 ; policy drop ; }")
	nft("add rule inet filter input meta l4proto { icmp, ipv6-icmp } accept")
	nft("add rule inet filter input ct state established accept")
	g.dialAll("a policy that drops input", map[string]string{at4(443): "nobody"})
	nft(g.documentedCommand("nft "))
	g.dialAll("with the documented rule", map[string]string{at4(443): "origin 198.51.100.21"})

	for i, c := range g.up {
		for _, p := range settled(t, c)[since[i]:] {
			if g.fromClient(p) && slices.Contains([]uint16{80, 81, 443}, p.Dst.Port()) {
				t.Errorf("isp%d has %s", i+1, p)
			}
		}
	}
}

// isReset connects under another configuration, and wants the connection to be reset.
func (g *gateway) isReset(when, at, config string) {
	g.t.Helper()
	g.replaceConfig(config)
	c, err := g.Client.Dial(netip.MustParseAddrPort(at))
	if err == nil {
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		g.t.Errorf("%s: %v, want a reset", when, err)
	}
}

// documentedCommand is the first line of docs/gateway.md that begins with a program's name,
// without that.
func (g *gateway) documentedCommand(program string) string {
	g.t.Helper()
	text, err := os.ReadFile("../../docs/gateway.md")
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, program); ok {
			return strings.TrimSpace(rest)
		}
	}
	g.t.Fatalf("docs/gateway.md has no %s", program)
	return ""
}

// TestWildcardPage: the configurations of the document for one listener.
func TestWildcardPage(t *testing.T) {
	g := newGateway(t)
	block := documented(t, "One listener, many addresses")
	g.start(block)
	leaves := func(when, proxy, want string) {
		t.Helper()
		told, err := lab.Ask{From: g.Origin, Proxy: netip.MustParseAddrPort(proxy), Target: target4, SOCKS: &client.Dialer{}}.Do()
		if err != nil || told.Seen.Source != want {
			t.Errorf("%s: by %s: %v, %+v", when, proxy, err, told)
		}
	}
	leaves("the address", "198.51.100.7:1080", "198.51.100.7")
	leaves("the address", "198.51.100.99:1080", "198.51.100.99")
	g.stop()
	text, err := os.ReadFile("../../docs/gateway.md")
	if err != nil {
		t.Fatal(err)
	}
	_, ports, _ := strings.Cut(string(text), "With a range of ports")
	_, ports, _ = strings.Cut(ports, "```yaml\n")
	ports, _, _ = strings.Cut(ports, "```")
	for _, a := range []string{"198.51.100.11/24", "198.51.100.12/24"} {
		if err := g.Host.AddAddr("eth0", netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	g.start(ports)
	leaves("the port", "198.51.100.2:2001", "198.51.100.11")
	leaves("the port", "198.51.100.11:2002", "198.51.100.12")
}

// TestTransparentLate: an interface that is not there yet is held from the start, and
// served once it comes.
func TestTransparentLate(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tell(t, g.Host, "host", "[::]:443")
	late := lab.TestNS(t, "late")
	appears := func() {
		t.Helper()
		err := errors.Join(lab.Veth(late, "eth0", g.Host, "late0"),
			late.AddAddr("eth0", netip.MustParsePrefix("10.9.0.2/24")), g.Host.AddAddr("late0", netip.MustParsePrefix("10.9.0.1/24")),
			late.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("10.9.0.1")))
		if err != nil {
			t.Fatal(err)
		}
	}
	g.inside = append(g.inside, netip.MustParsePrefix("10.9.0.0/24"))
	l := g.as(late)
	g.start(uplinkConfig("server:\n  - {name: lan, type: tproxy, interface: [lan0, late0], escaper: out, divert: tcp/443, select: {out: p6}}\n"))
	appears()
	eventually(t, "the new interface is served", func() bool { return l.dial(at4(443), within("nobody")) == "origin "+p6Of4 })
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := g.Host.DelLink("late0"); err != nil {
		t.Fatal(err)
	}
	appears()
	l.dialAll("killed, and another interface of the name", map[string]string{at4(443): "nobody", "10.9.0.1:443": "host 10.9.0.2"})
	g.run(lab.Program{})
	l.dialAll("started again", map[string]string{at4(443): "origin " + p6Of4})
	l.kept("all the time", toPort(443))
}
