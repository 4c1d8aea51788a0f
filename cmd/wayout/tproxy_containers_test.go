package main_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"wayout/scripts/lab"
)

// nft gives what runs the nft program on the host, with the words of a command, and
// gives what it printed.
func (g *gateway) nft() func(command string) string {
	g.t.Helper()
	program, err := exec.LookPath("nft")
	if err != nil {
		lab.Missing(g.t, "nft")
	}
	return func(command string) string {
		g.t.Helper()
		var out, errs strings.Builder
		cmd, err := g.Host.Start(lab.Program{Path: program, Args: strings.Fields(command), Stdout: &out, Stderr: &errs})
		if err != nil {
			g.t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			g.t.Fatalf("nft %s: %v: %s", command, err, &errs)
		}
		return out.String()
	}
}

// dockerRules are what Docker has in nftables, by itself or by iptables: containers
// are masqueraded, and port 443 of the host is published by the first one.
var dockerRules = []string{
	"add table FAMILY nat",
	"add chain FAMILY nat POSTROUTING { type nat hook postrouting priority 100 ; policy accept ; }",
	"add chain FAMILY nat PREROUTING { type nat hook prerouting priority -100 ; policy accept ; }",
	"add chain FAMILY nat OUTPUT { type nat hook output priority -100 ; policy accept ; }",
	"add rule FAMILY nat POSTROUTING FAMILY saddr NET oifname != docker0 masquerade",
	"add rule FAMILY nat POSTROUTING FAMILY saddr ONE FAMILY daddr ONE tcp dport 443 masquerade", // from itself, by the host
	"add rule FAMILY nat PREROUTING fib daddr type local tcp dport 443 dnat to ONE",
	"add rule FAMILY nat OUTPUT fib daddr type local tcp dport 443 dnat to ONE",
	"add table FAMILY filter",
	"add chain FAMILY filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
	"add rule FAMILY filter FORWARD oifname docker0 ct state related,established accept",
	"add rule FAMILY filter FORWARD iifname != docker0 oifname docker0 FAMILY daddr ONE tcp dport 443 accept",
	"add rule FAMILY filter FORWARD iifname docker0 accept",
}

// TestTransparentContainers: two containers on a bridge, with Docker's own rules, and
// configured as the document has it.
func TestTransparentContainers(t *testing.T) {
	g := newGateway(t)
	c, err := g.AddContainers()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	g.inside = []netip.Prefix{netip.MustParsePrefix(lab.BridgeNet4), netip.MustParsePrefix(lab.BridgeNet6)}
	one, two := g.as(c.One), g.as(c.Two)
	nft := g.nft()
	for _, f := range []struct{ name, net, one string }{{"ip", lab.BridgeNet4, lab.ContainerOne4}, {"ip6", lab.BridgeNet6, lab.ContainerOne6}} {
		for _, rule := range dockerRules {
			nft(strings.NewReplacer("FAMILY", f.name, "NET", f.net, "ONE", f.one).Replace(rule))
		}
	}
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		if err := g.Host.Sysctl("net/bridge/"+name, "1"); err != nil { // as Docker sets them
			t.Fatal(err)
		}
	}
	tell(t, g.Origin, "origin", everywhere(443, 22)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(443, 5353)...)
	tell(t, c.One, "one", "[::]:443", "[::]:80")
	tellDatagrams(t, c.One, "one", lab.ContainerOne4+":443", "["+lab.ContainerOne6+"]:443")
	tellDatagrams(t, g.Host, "host", lab.BridgeHost4+":443", "["+lab.BridgeHost6+"]:443")
	rules := nft("-s list ruleset")
	before := g.state()

	untouched := func(when string) {
		t.Helper()
		// On the bridge.
		for at, want := range map[string]string{lab.ContainerOne4 + ":443": "one " + lab.ContainerTwo4, "[" + lab.ContainerOne6 + "]:443": "one " + lab.ContainerTwo6} {
			two.dialAll(when, map[string]string{at: want})
			two.sendAll(when, map[string]string{at: want + " hello"})
		}
		// The host itself.
		two.sendAll(when, map[string]string{lab.BridgeHost4 + ":443": "host " + lab.ContainerTwo4 + " hello", "[" + lab.BridgeHost6 + "]:443": "host " + lab.ContainerTwo6 + " hello"})
		// The published port, from outside and from another container by the host.
		g.as(g.Origin).dialAll(when, map[string]string{lab.Primary1Of4 + ":443": "one 192.0.2.2", "[" + lab.Primary1Of6 + "]:443": "one 2001:db8:1::2"})
		two.dialAll(when, map[string]string{lab.Primary1Of4 + ":443": "one " + lab.ContainerTwo4, "[" + lab.Primary1Of6 + "]:443": "one " + lab.ContainerTwo6})
		// The rest is masqueraded.
		for _, c := range []*gateway{one, two} {
			c.dialAll(when, map[string]string{at4(22): "origin " + lab.Primary1Of4, at6(22): "origin " + lab.Primary1Of6})
			c.sendAll(when, map[string]string{at4(5353): "origin " + lab.Primary1Of4 + " hello", at6(5353): "origin " + lab.Primary1Of6 + " hello"})
		}
	}
	ways := func(when string) {
		t.Helper()
		for _, w := range []struct {
			c      *gateway
			v4, v6 string
		}{{one, "198.51.100.11", "2001:db8:100::11"}, {two, "203.0.113.7", "2001:db8:200::7"}} {
			w.c.dialAll(when, map[string]string{at4(443): "origin " + w.v4, at6(443): "origin " + w.v6})
			w.c.sendAll(when, map[string]string{at4(443): "origin " + w.v4 + " hello", at6(443): "origin " + w.v6 + " hello"})
		}
	}
	untouched("before")
	g.start(documented(t, "Containers"))
	ways("started")
	untouched("started")
	one.bulk(at4(443), "origin 198.51.100.11", 1<<20)
	two.bulk(at6(443), "origin 2001:db8:200::7", 1<<20)
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*gateway{one, two} {
		c.dialAll("killed", map[string]string{at4(443): "nobody", at6(443): "nobody"})
		c.sendAll("killed", map[string]string{at4(443): "nobody", at6(443): "nobody"})
	}
	untouched("killed")
	g.run(lab.Program{})
	ways("started again")
	// All ports: the answers of a published port are among them.
	g.replaceConfig(strings.Replace(documented(t, "Containers"), "tcp/443, ", "tcp/*, ", 1))
	ways("all ports")
	g.as(g.Origin).dialAll("a published port where all ports are diverted", map[string]string{lab.Primary1Of4 + ":443": "nobody"})
	// Who is no user of the group has no path.
	if err := c.Two.AddAddr("eth0", netip.MustParsePrefix("172.17.0.9/16")); err != nil {
		t.Fatal(err)
	}
	if told := two.dialFrom("172.17.0.9", at4(443)); told != "nobody" {
		t.Errorf("a container that nobody knows is told %q", told)
	}
	g.stop()
	g.wayout("clean")
	g.same("cleaned", before)
	untouched("cleaned")
	if now := nft("-s list ruleset"); now != rules {
		t.Errorf("Docker's rules were\n%s\nand are\n%s", rules, now)
	}
	g.kept("all the time", func(lab.Packet) bool { return true })
	for i, c := range g.up {
		for _, p := range settled(t, c) {
			if primary := p.Src.Addr().String(); !p.Out && p.Dst.Port() == 443 && (primary == lab.Primary1Of4 || primary == lab.Primary1Of6 || primary == lab.Primary2Of4) {
				t.Fatalf("isp%d has what is masqueraded and should be diverted: %s", i+1, p)
			}
		}
	}
}
