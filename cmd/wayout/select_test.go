package main_test

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// ingress is a client's request to a server at an address of the client's
// choice.
type ingress struct {
	from      *lab.NS // nil: the client
	at        netip.AddrPort
	selection string
	six       bool // to the origin's IPv6 address
}

// askAt asks by a protocol at an address of the host.
func (s *scene) askAt(p protocol, i ingress) (got, error) {
	a := said{selection: i.selection, six: i.six}
	if i.from == nil {
		i.from = s.Client
	}
	if p == forward || p == tunnel {
		ask := lab.Ask{From: i.from, Proxy: i.at, Target: a.httpTarget(), Tunnel: p == tunnel}
		if i.selection != "" {
			ask.Header = egress(i.selection)
		}
		told, err := ask.Do()
		if err != nil || told.Status != http.StatusOK {
			return got{answer: fmt.Sprint(told.Status), header: told.Header}, err
		}
		return got{answer: "ok", source: seenAt(told.Seen)}, nil
	}
	c, err := i.from.Dial(i.at)
	if err != nil {
		return got{}, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return got{}, err
	}
	d := &client.Dialer{Extension: i.selection}
	if p == connect {
		bound, err := d.Handshake(context.Background(), c, a.httpTarget())
		if err != nil {
			return refusal(c, err)
		}
		seen, err := getThrough(c, a.httpTarget())
		return got{answer: "ok", source: seenAt(seen), bound: bound}, err
	}
	relay, err := d.Associate(context.Background(), c)
	if err != nil {
		return refusal(c, err)
	}
	if relay.Addr() != i.at.Addr() {
		return got{}, fmt.Errorf("asked at %s, the relay is %s", i.at, relay)
	}
	u, err := dialUDP(i.from, netip.AddrPort{}, relay)
	if err != nil {
		return got{}, err
	}
	defer u.Close()
	to := echo4
	if i.six {
		to = echo6
	}
	source, err := (&association{control: c, udp: u}).echoed(to, "hello")
	return got{answer: "ok", source: source}, err
}

// expect asks by all protocols at an address: want is the source, or the
// refusal of HTTP and of SOCKS.
func (s *scene) expect(i ingress, want netip.Addr, refused ...string) {
	s.t.Helper()
	for _, p := range protocols() {
		got, err := s.askAt(p, i)
		answer := "ok"
		if len(refused) > 0 {
			answer = refused[map[protocol]int{forward: 0, tunnel: 0, connect: 1, associate: 1}[p]]
		}
		if err != nil || got.answer != answer || got.source.Addr() != want || p == connect && got.bound != got.source {
			s.t.Errorf("%s at %s, %q: %s (told %s), %v; want %s from %s", p, i.at, i.selection, got, got.bound, err, answer, want)
		}
		if got.answer == "503" && got.header.Get("Retry-After") != "1" {
			s.t.Errorf("%s at %s: Retry-After %q", p, i.at, got.header.Get("Retry-After"))
		}
	}
}

const ingressServer = `server:
  - {name: any, type: mixed_proxy, listen: "[::]:3128", open: true, escaper: out, select: ingress_ip, path_selection_header: X-Egress-Path, socks_extension: true}
  - {name: four, type: mixed_proxy, listen: "0.0.0.0:3129", open: true, escaper: out, select: ingress_ip, path_selection_header: X-Egress-Path, socks_extension: true}
`

// TestSelectByIngress connects to each egress address of one wildcard listener:
// from the inner side, where the host's main routing leads, and by the uplinks
// from outside.
func TestSelectByIngress(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, config string
		outside      bool
		nobody       []string // addresses of the host that are no node's
	}{
		{"inside", outConfig(ingressServer), false, []string{lab.HostAddr4, lab.HostAddr6}},
		{"outside", uplinkConfig(ingressServer), true, []string{lab.Primary1Of4, lab.Primary2Of4, lab.Primary2Of6}},
		{"inside with uplinks", uplinkConfig(ingressServer), false, []string{lab.HostAddr4, lab.HostAddr6}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, true)
			s.t = t
			s.serveDatagrams(t)
			s.start(c.config)
			to := func(a netip.Addr, port uint16) ingress {
				i := ingress{at: netip.AddrPortFrom(a, port), six: a.Is6()}
				if c.outside {
					i.from = s.Origin
				}
				return i
			}
			v4, v6 := lab.Egress4(), lab.Egress6()
			for i := range v4 {
				s.expect(to(v4[i], 3128), v4[i])
				s.expect(to(v4[i], 3129), v4[i])
				s.expect(to(v6[i], 3128), v6[i])
			}
			// It is the weakest that chooses: the client's word is stronger.
			strong := to(v4[0], 3128)
			strong.selection = "p3"
			s.expect(strong, v4[2])
			// The address is that very one, which is of one family.
			for _, i := range []ingress{to(v4[1], 3128), to(v6[1], 3128)} {
				i.six = !i.six
				for _, p := range []protocol{forward, tunnel, connect} {
					got, err := s.askAt(p, i)
					if want := map[bool]string{true: "reply 0x08", false: "502"}[p == connect]; err != nil || got.answer != want {
						t.Errorf("%s at %s, to the other family: %s, %v, want %s", p, i.at, got, err, want)
					}
				}
			}
			for _, a := range c.nobody {
				i := to(netip.MustParseAddr(a), 3128)
				s.expect(i, netip.Addr{}, "503", "reply 0x01")
				i.selection = "p3" // the client knows better
				want := v4[2]
				if i.six {
					want = v6[2]
				}
				s.expect(i, want)
			}
			if _, errs, code := s.command("drain", "out/p2", "--config", s.config); code != 0 {
				t.Fatal(errs)
			}
			s.expect(to(v4[1], 3128), netip.Addr{}, "503", "reply 0x01")
		})
	}
}

// TestSelectByPort has a port for each node, and two more: those wrap.
func TestSelectByPort(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start(outConfig(`server:
  - {name: ports, type: mixed_proxy, listen: "0.0.0.0:20000-20010", open: true, escaper: out, select: port, path_selection_header: X-Egress-Path, socks_extension: true}
  - {name: two, type: mixed_proxy, listen: ["10.0.0.1:21000-21001", "10.0.0.1:22000-22001"], open: true, escaper: out, select: port}
`))
	for i := range 11 {
		want := netip.MustParseAddr(lab.Primary1Of4) // p9
		if i%9 < 8 {
			want = lab.Egress4()[i%9]
		}
		s.expect(ingress{at: proxyAt(uint16(20000 + i))}, want)
		if i%9 < 8 && i%3 == 0 {
			s.expect(ingress{at: proxyAt(uint16(20000 + i)), six: true}, lab.Egress6()[i%9])
		}
	}
	s.expect(ingress{at: proxyAt(20000), selection: "p3"}, lab.Egress4()[2])
	for i, port := range []uint16{21000, 21001, 22000, 22001} {
		s.expect(ingress{at: proxyAt(port)}, lab.Egress4()[i])
	}
	if c, err := s.Client.Dial(proxyAt(20011)); err == nil {
		c.Close()
		t.Error("there is a port beyond the range")
	}
	if _, errs, code := s.command("drain", "out/p4", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	s.expect(ingress{at: proxyAt(20003)}, netip.Addr{}, "503", "reply 0x01")
}

// TestSelectMapAcrossEscapers has a server's map that goes through a route.
func TestSelectMapAcrossEscapers(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start(outConfig(`  - {name: other, type: direct_fixed, bind_ip: ["203.0.113.11", "203.0.113.12"]}
  - {name: chain, type: route_select, next: [out, other]}
server:
  - {name: ids, type: mixed_proxy, listen: "10.0.0.1:3128", open: true, escaper: chain, select: {chain: other, other: "203.0.113.12"}}
  - {name: numbers, type: mixed_proxy, listen: "10.0.0.1:3129", open: true, escaper: chain, select: '{"chain": 1, "out": 0}'}
  - {name: more, type: mixed_proxy, listen: "10.0.0.1:3130", open: true, escaper: out, select: {out: p4}}
`))
	s.expect(ingress{at: proxyAt(3128)}, lab.Egress4()[5])
	s.expect(ingress{at: proxyAt(3129)}, netip.MustParseAddr(lab.Primary1Of4))
	s.expect(ingress{at: proxyAt(3130)}, lab.Egress4()[3])
}
