package main_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wayout/scripts/lab"
)

// TestTransparentChoice: the path goes by the client's network, and by the name
// that the client calls its destination.
func TestTransparentChoice(t *testing.T) {
	g := newGateway(t)
	for _, a := range []string{"10.0.0.77/24", "10.0.0.99/24"} {
		if err := g.Client.AddAddr("eth0", netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	tell(t, g.Origin, "origin", everywhere(22)...)
	g.start(uplinkConfig(`  - name: by-name
    type: route_upstream
    child_match: [{next: one, domains: [one.example]}]
    exact_match: [{next: two, hosts: [plain.example]}]
    default_next: out
  - {name: one, type: direct_fixed, uplink: isp1, bind_ip: 198.51.100.21}
  - {name: two, type: direct_fixed, uplink: isp2, bind_ip: 203.0.113.21}
user_group:
  - name: rooms
    users:
      - {name: room7, from: 10.0.0.77, egress_path: {out: p7}}
      - {name: others, from: [10.0.0.0/26, "fd00::/64"], egress_path: {out: p3}}
server:
  - {name: lan, type: tproxy, interface: lan0, divert: "tcp/1-1000", escaper: by-name, user_group: rooms, sniff: true}
`))
	from := func(source, at string, say func(net.Conn) error) string {
		t.Helper()
		var told string
		err := g.Client.Do(func() error {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: patience}
			c, err := d.Dial("tcp", at)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			if err := say(c); err != nil {
				return err
			}
			b, err := io.ReadAll(c)
			told = string(b)
			return err
		})
		if err != nil {
			told = err.Error()
		}
		return told
	}
	// The origin's HTTP server says whom it sees.
	get := func(host string) func(net.Conn) error {
		return func(c net.Conn) error {
			_, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host)
			return err
		}
	}
	for _, tt := range []struct{ source, host, want string }{
		{"10.0.0.2", "other.example", "198.51.100.13"},
		{"10.0.0.2", "www.ONE.example:80", "198.51.100.21"},
		{"10.0.0.2", "plain.example", "203.0.113.21"},
		{"10.0.0.77", "other.example", "203.0.113.13"},
		{"10.0.0.77", "plain.example", "203.0.113.21"},
	} {
		if told := from(tt.source, target4, get(tt.host)); !strings.Contains(told, tt.want) {
			t.Errorf("%s asks for %s: %q, want %s in it", tt.source, tt.host, told, tt.want)
		}
	}
	// The name is not dialled, whatever it is.
	if !strings.Contains(g.daemon.Log(), `"name":"plain.example"`) {
		t.Errorf("no record of a name:\n%s", g.daemon.Log())
	}
	// Who is in no network is reset.
	if told := from("10.0.0.99", target4, get("one.example")); !strings.Contains(told, "reset") {
		t.Errorf("a stranger is told %q", told)
	}
	// A server that speaks first is not waited for in vain.
	g.dialAll("a server that speaks first", map[string]string{at4(22): "origin 198.51.100.13"})
	// TLS.
	seen := make(chan string, 1)
	l := g.listen(at4(443))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			seen <- c.RemoteAddr().(*net.TCPAddr).IP.String()
			c.Close()
		}
	}()
	for name, want := range map[string]string{"a.one.example": "198.51.100.21", "plain.example": "203.0.113.21", "nobody.example": "198.51.100.13"} {
		from("10.0.0.2", at4(443), func(c net.Conn) error {
			return tls.Client(c, &tls.Config{ServerName: name}).HandshakeContext(context.Background())
		})
		if got := <-seen; got != want {
			t.Errorf("TLS to %s leaves from %s, want %s", name, got, want)
		}
	}
}

// TestListenOnPrefix: one listener stands for every address of a prefix, and the
// address that a client connects to is the one that it leaves by.
func TestListenOnPrefix(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Host, "host", "[::]:3128")
	config := func(listen string) string {
		return fmt.Sprintf(`%sescaper:
  - {name: out, type: direct_fixed, enable_path_selection: true, nodes: [{id: all, ipv4: %q, uplink: isp1}]}
server:
  - {name: web, type: http_proxy, listen: [%s], open: true, escaper: out, select: ingress_ip}
`, twoUplinks, lab.RoutedNet4, listen)
	}
	g.start(config(`"` + lab.RoutedNet4 + `:3128-3130"`))
	works := func(when string, ports ...uint16) {
		t.Helper()
		for i, port := range ports {
			for _, a := range []string{"192.0.2.129", "192.0.2.200", "192.0.2.254"} {
				// From the far side of the uplink, where the prefix is known.
				told, err := lab.Ask{From: g.Origin, Proxy: netip.AddrPortFrom(netip.MustParseAddr(a), port), Target: target4, Tunnel: i%2 == 1}.Do()
				if err != nil {
					t.Fatal(err)
				}
				if told.Status != 200 || told.Seen.Source != a {
					t.Errorf("%s: by %s:%d: %d %q from %s", when, a, port, told.Status, told.Body, told.Seen.Source)
				}
			}
		}
	}
	works("started", 3128, 3129, 3130)
	g.dialAll("what is not in the prefix is the host's", map[string]string{lab.HostAddr4 + ":3128": "host " + lab.ClientAddr4})
	g.replaceConfig(config(`"` + lab.RoutedNet4 + `:3130", "127.0.0.1:3131"`))
	works("another port", 3130)
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if told, err := (lab.Ask{From: g.Origin, Proxy: netip.MustParseAddrPort("192.0.2.200:3130"), Target: target4}).Do(); err == nil {
		t.Errorf("killed, and answered: %+v", told)
	}
	g.dialAll("killed", map[string]string{lab.HostAddr4 + ":3128": "host " + lab.ClientAddr4})
	g.run(lab.Program{})
	works("started again", 3130)
	g.stop()
}

// TestTransparentFirewall: the rules of the host's own firewall are what they
// were, and go on to count.
func TestTransparentFirewall(t *testing.T) {
	g := newGateway(t)
	nft := g.nft()
	tell(t, g.Origin, "origin", everywhere(443, 444, 22)...)
	tell(t, g.Host, "host", "[::]:23", "[::]:24")
	for _, line := range []string{
		"add table inet fw",
		"add chain inet fw coming { type filter hook input priority 0; policy accept; }",
		"add chain inet fw passing { type filter hook forward priority 0; policy accept; }",
		"add chain inet fw going { type filter hook output priority 0; policy accept; }",
		"add rule inet fw coming iifname lan0 tcp dport { 22, 23 } reject with tcp reset",
		"add rule inet fw passing tcp dport 444 drop",
		"add rule inet fw going ip saddr " + p6Of4 + " tcp dport 443 reject",
	} {
		nft(line)
	}
	before := nft("-s list ruleset")
	g.start(uplinkConfig(lan(`divert: ["tcp/443", "tcp/22"], select: {out: p6}`)))
	g.dialAll("behind a firewall", map[string]string{
		at4(22): "nobody", at6(443): "origin " + p6Of6, at4(443): "nobody",
		lab.HostAddr4 + ":23": "nobody", lab.HostAddr4 + ":24": "host " + lab.ClientAddr4,
		at6(444): "nobody",
	})
	for _, port := range []uint16{443, 444, 22} {
		g.kept("behind a firewall", toPort(port))
	}
	if after := nft("-s list ruleset"); after != before {
		t.Errorf("the rules were\n%s\nand are\n%s", before, after)
	}
	g.stop()
	if after := nft("-s list ruleset"); after != before {
		t.Errorf("the rules were\n%s\nand are, after the stop,\n%s", before, after)
	}
}

// TestTransparentKilled: connections and datagrams go on while the daemon is
// killed and started again, and whatever reaches the origin comes from the path.
func TestTransparentKilled(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	tell(t, g.Host, "host", "[::]:443")
	tellDatagrams(t, g.Host, "host", "[::]:1500")
	g.start(uplinkConfig(lan(`divert: ["tcp/443", "udp/1500"], select: {out: p6}, sniff: true, sniff_timeout: 10ms`)))
	wants := map[string]string{at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6}
	datagrams := map[string]string{at4(1500): "origin " + p6Of4 + " hello", at6(1500): "origin " + p6Of6 + " hello"}
	var good atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	again := func(ask func(string, time.Duration) string, at, want string) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				switch told := ask(at, 2*time.Second); {
				case told == want:
					good.Add(1)
				case told != "nobody" && !strings.HasPrefix(told, want+", and then"): // cut in the middle
					t.Errorf("%s is answered by %q, want %q", at, told, want)
					return
				}
			}
		})
	}
	for at, want := range wants {
		again(g.dial, at, want)
	}
	for at, want := range datagrams {
		again(func(at string, d time.Duration) string { return g.send(at, "hello", d) }, at, want)
	}
	const kills, between = 3, 150
	for i := range kills + 1 {
		enough := good.Load() + between
		eventually(t, "the clients get on", func() bool { return good.Load() >= enough || t.Failed() })
		if i == kills {
			break
		}
		if err := g.daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		g.run(lab.Program{})
	}
	close(stop)
	wg.Wait()
	g.kept("all the time", toPort(443))
	g.kept("all the time", toPort(1500))
	for i, c := range g.up {
		for _, p := range settled(t, c) {
			if port := p.Dst.Port(); !p.Out && (port == 443 || port == 1500) && p.Src.Addr() != netip.MustParseAddr(p6Of4) && p.Src.Addr() != netip.MustParseAddr(p6Of6) {
				t.Fatalf("isp%d has %s", i+1, p)
			}
		}
	}
}
