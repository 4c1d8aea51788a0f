package main_test

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// In both of the prefixes that are the host's own.
var wildcards = []string{"192.0.2.129", "192.0.2.200", "192.0.2.254", "2001:db8:100:beef::7", "2001:db8:100:beef:ffff:ffff:ffff:ffff"}

// wildcardConfig has each kind of proxy on whole prefixes, behind a tproxy that takes
// the same ports of others' addresses. ports is what is listened on for socks.
func wildcardConfig(ports string) string {
	nets := func(ports string) string {
		return fmt.Sprintf(`listen: ["%s:%s", "[%s]:%s"], open: true`, lab.RoutedNet4, ports, lab.RoutedNet6, ports)
	}
	var nodes strings.Builder
	for _, n := range uplinkNodes() {
		fmt.Fprintf(&nodes, "      - {id: %s, ipv4: %s, ipv6: %q, uplink: isp%d}\n", n.id, n.v4, n.v6, n.uplink+1)
	}
	return twoUplinks + fmt.Sprintf(`escaper:
  - {name: out, type: direct_fixed, nodes: [{id: all, ipv4: %q, ipv6: %q, uplink: isp1}]}
  - name: eight
    type: direct_fixed
    nodes:
%sserver:
  - {name: lan, type: tproxy, interface: lan0, divert: "tcp/1-9999", escaper: eight, select: {eight: p6}}
  - {name: socks, type: socks_proxy, %s, escaper: out, select: ingress_ip}
  - {name: any, type: mixed_proxy, %s, escaper: out, select: ingress_ip}
  - {name: web, type: http_proxy, %s, escaper: out, select: ingress_ip}
  - {name: ports, type: mixed_proxy, %s, escaper: eight, select: port}
`, lab.RoutedNet4, lab.RoutedNet6, &nodes, nets(ports), nets("8080"), nets("3128-3129"), nets("2001-2008"))
}

// TestWildcard: proxies that stand at every address of a prefix, and at many ports,
// with one listener; where a client connects to says where it leaves.
func TestWildcard(t *testing.T) {
	g := newGateway(t)
	echo := g.serveDatagrams(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tell(t, g.Host, "host", "[::]:1080")
	g.start(wildcardConfig("1080-1089"))
	target := func(at netip.Addr) string {
		if at.Is4() {
			return target4
		}
		return target6
	}
	// From the LAN, whose ports are diverted, and from beyond the uplink.
	for from, ns := range map[string]*lab.NS{"the LAN": g.Client, "outside": g.Origin} {
		for _, a := range wildcards {
			at := netip.MustParseAddr(a)
			for _, ask := range []lab.Ask{
				{Proxy: netip.AddrPortFrom(at, 1080), SOCKS: &client.Dialer{}},
				{Proxy: netip.AddrPortFrom(at, 1089), SOCKS: &client.Dialer{}},
				{Proxy: netip.AddrPortFrom(at, 8080), SOCKS: &client.Dialer{}},
				{Proxy: netip.AddrPortFrom(at, 8080), Tunnel: true},
				{Proxy: netip.AddrPortFrom(at, 3128)},
				{Proxy: netip.AddrPortFrom(at, 3129), Tunnel: true},
			} {
				ask.From, ask.Target = ns, target(at)
				told, err := ask.Do()
				if err != nil || told.Seen.Source != a {
					t.Fatalf("from %s by %s: %v, %+v", from, ask.Proxy, err, told)
				}
			}
			// By the port.
			for i, n := range uplinkNodes() {
				ask := lab.Ask{From: ns, Proxy: netip.AddrPortFrom(at, uint16(2001+i)), Target: target(at), Tunnel: i%2 == 0}
				if told, err := ask.Do(); err != nil || told.Seen.Source != n.source(ask.Target).String() {
					t.Fatalf("from %s by %s: %v, %+v", from, ask.Proxy, err, told)
				}
			}
			g.wildcardDatagrams(ns, at, echo)
		}
		for _, port := range []uint16{1080, 8080} {
			if told, err := socks4(ns, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.200"), port), at4(443)); err != nil || told != "origin 192.0.2.200" {
				t.Errorf("SOCKS4 from %s: %q, %v", from, told, err)
			}
		}
	}
	// An address can do nothing for the other family.
	told, err := lab.Ask{From: g.Client, Proxy: netip.MustParseAddrPort("192.0.2.200:1080"), Target: target6, SOCKS: &client.Dialer{}}.Do()
	if err != nil || told.Reply != 0x08 {
		t.Errorf("to the other family: %v, %+v", err, told)
	}
	others := map[string]string{lab.HostAddr4 + ":1080": "host " + lab.ClientAddr4, "[" + lab.HostAddr6 + "]:1080": "host " + lab.ClientAddr6}
	g.dialAll("what is not in the prefixes is the host's", others)
	g.dialAll("what is nobody's is diverted", map[string]string{at4(443): "origin " + p6Of4})

	g.replaceConfig(wildcardConfig("1085-1090"))
	for _, tt := range []struct{ at, want string }{{"192.0.2.200:1090", "192.0.2.200"}, {"192.0.2.129:1085", "192.0.2.129"}} {
		told, err := lab.Ask{From: g.Client, Proxy: netip.MustParseAddrPort(tt.at), Target: target4, SOCKS: &client.Dialer{}}.Do()
		if err != nil || told.Seen.Source != tt.want {
			t.Errorf("other ports: by %s: %v, %+v", tt.at, err, told)
		}
	}
	// Not from the LAN: what the host itself says from a path's address leaves by its uplink.
	g.as(g.Origin).dialAll("a port that is not listened on any more is the host's", map[string]string{"192.0.2.200:1080": "host 192.0.2.2"})
	g.stop()
}

// wildcardDatagrams asks for an association at an address: the relay that it is told
// of is at that very address, works, and sends from it.
func (g *gateway) wildcardDatagrams(ns *lab.NS, at netip.Addr, echo *datagramEcho) {
	g.t.Helper()
	c, err := ns.Dial(netip.AddrPortFrom(at, 1080))
	if err != nil {
		g.t.Error(err)
		return
	}
	defer c.Close()
	relay, err := (&client.Dialer{}).Associate(context.Background(), c)
	if err != nil {
		g.t.Errorf("an association at %s: %v", at, err)
		return
	}
	if relay.Addr() != at {
		g.t.Errorf("the relay of an association at %s is %s", at, relay)
	}
	u, err := dialUDP(ns, netip.AddrPort{}, relay)
	if err != nil {
		g.t.Error(err)
		return
	}
	a := &association{c, u, relay}
	defer a.Close()
	to := echo4
	if at.Is6() {
		to = echo6
	}
	if seen := a.mustEcho(g.t, to, "hello"); seen.Addr() != at {
		g.t.Errorf("datagrams of an association at %s come from %s", at, seen)
	}
	echo.all()
}

// socks4 connects by SOCKS4 and gives what is told at the far end.
func socks4(ns *lab.NS, proxy netip.AddrPort, to string) (string, error) {
	c, err := ns.Dial(proxy)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	at := netip.MustParseAddrPort(to)
	ask := append([]byte{4, 1, byte(at.Port() >> 8), byte(at.Port())}, at.Addr().AsSlice()...)
	if _, err := c.Write(append(ask, 0)); err != nil {
		return "", err
	}
	var reply [8]byte
	if _, err := io.ReadFull(c, reply[:]); err != nil {
		return "", err
	}
	if reply[1] != 0x5a {
		return "", fmt.Errorf("refused: %x", reply)
	}
	return talk(c, "some words", patience), nil
}
