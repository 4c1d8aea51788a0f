package main_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// question is one query that the lab's name server got.
type question struct {
	key     string // "A name."
	from    netip.Addr
	network string // udp or tcp
	spelled string // the name as it was written
}

// nameServer answers at the origin, by both families, UDP and TCP, and remembers
// who asked. Every name below test. that has no records of its own has those of
// the origin.
type nameServer struct {
	records map[string][]string // "A name." -> addresses, none: the name has no such record

	mu    sync.Mutex
	asked []question
	mute  bool // every answer is a failure
}

func (n *nameServer) ServeDNS(w dns.ResponseWriter, req *dns.Msg) {
	q := req.Question[0]
	name := strings.ToLower(q.Name)
	from, err := netip.ParseAddrPort(w.RemoteAddr().String())
	if err != nil {
		panic(err) // what the package gives is an address
	}
	got := question{dns.TypeToString[q.Qtype] + " " + name, from.Addr().Unmap(), w.RemoteAddr().Network(), q.Name}
	n.mu.Lock()
	n.asked = append(n.asked, got)
	mute := n.mute
	n.mu.Unlock()
	m := new(dns.Msg).SetReply(req)
	m.RecursionAvailable = true
	list, own := n.records[got.key]
	if !own {
		list = map[uint16][]string{dns.TypeA: {lab.OriginAddr4}, dns.TypeAAAA: {lab.OriginAddr6}}[q.Qtype]
	}
	ttl := 60
	if strings.HasPrefix(name, "short") {
		ttl = 1
	}
	switch {
	case mute:
		m.Rcode, list = dns.RcodeServerFailure, nil
	case strings.HasPrefix(name, "big") && got.network == "udp":
		m.Truncated, list = true, nil
	}
	for _, a := range list {
		rr, err := dns.NewRR(fmt.Sprintf("%s %d IN %s %s", q.Name, ttl, dns.TypeToString[q.Qtype], a))
		if err != nil {
			panic(err) // a mistake in the test's own text
		}
		m.Answer = append(m.Answer, rr)
	}
	_ = w.WriteMsg(m) // who asked may have gone
}

// of lists the questions for a name.
func (n *nameServer) of(name string) []question {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(n.asked), func(q question) bool { return !strings.HasSuffix(q.key, " "+name) })
}

func (n *nameServer) setMute(on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mute = on
}

// serveNames starts the server.
func (s *scene) serveNames(n *nameServer) {
	s.t.Helper()
	for _, a := range []string{lab.OriginAddr4, lab.OriginAddr6} {
		at := netip.AddrPortFrom(netip.MustParseAddr(a), 53)
		var pc *net.UDPConn
		if err := s.Origin.Do(func() (err error) {
			pc, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			return err
		}); err != nil {
			s.t.Fatal(err)
		}
		for _, srv := range []*dns.Server{{PacketConn: pc}, {Listener: s.listen(at.String())}} {
			started, done := make(chan struct{}), make(chan error, 1)
			srv.Handler, srv.NotifyStartedFunc = n, func() { close(started) }
			go func() { done <- srv.ActivateAndServe() }()
			<-started
			s.t.Cleanup(func() {
				if err := srv.Shutdown(); err != nil {
					s.t.Error(err)
				}
				if err := <-done; err != nil {
					s.t.Error(err)
				}
			})
		}
	}
}

// boundConfig is uplinkConfig whose escaper's names are asked for by the path of
// the request, at an IPv4 server; out6 asks an IPv6 one.
func boundConfig() string {
	resolvers := `resolver:
  - {name: own4, type: dns, server: ["` + lab.OriginAddr4 + `:53"], bind: path}
  - {name: own6, type: dns, server: ["[` + lab.OriginAddr6 + `]:53"], bind: path}
`
	more := fmt.Sprintf(`  - name: out6
    type: direct_fixed
    resolver: own6
    enable_path_selection: true
    nodes:
      - {id: both, ipv4: 198.51.100.21, ipv6: "2001:db8:100::21", uplink: isp1}
      - {id: four, ipv4: 198.51.100.22, uplink: isp1}
      - {id: net, ipv6: %q, uplink: isp1}
server:
  - {name: web, type: mixed_proxy, listen: "10.0.0.1:3128", open: true, escaper: out, path_selection_header: X-Egress-Path, socks_extension: true}
  - {name: six, type: http_proxy, listen: "10.0.0.1:3129", open: true, escaper: out6, path_selection_header: X-Egress-Path}
`, routed6)
	return resolvers + strings.Replace(uplinkConfig(more), "type: direct_fixed\n", "type: direct_fixed\n    resolver: own4\n", 1)
}

// TestResolverByPath: queries leave by the path, with the path's own address,
// and nothing of them leaves otherwise.
func TestResolverByPath(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	n := &nameServer{records: map[string][]string{}}
	for i := range 16 {
		n.records[fmt.Sprintf("AAAA four.policy%d.test.", i)] = nil
	}
	k.serveNames(n)
	k.serveDatagrams(t, lab.OriginAddr4+":5353")
	ups := []*lab.Capture{k.capture(k.Host, "eth0"), k.capture(k.Host, "eth1")}
	k.start(boundConfig())
	all := uplinkNodes()
	for _, p := range all {
		for _, tunnel := range []bool{false, true} {
			name := fmt.Sprintf("%s-%v.test", p.id, tunnel)
			told := k.ask(lab.Ask{Target: name + ":80", Header: egress(p.id), Tunnel: tunnel})
			if told.Status != 200 || told.Seen.Source != p.v6.String() {
				t.Errorf("%s: %d %s from %s", name, told.Status, told.Body, told.Seen.Source)
			}
			got := n.of(name + ".")
			if len(got) == 0 && tunnel {
				continue
			}
			if len(got) != 2 {
				t.Errorf("%s was asked for %d times: %v", name, len(got), got)
			}
			for _, q := range got {
				if q.from != p.v4 {
					t.Errorf("%s: asked from %s, want %s", q.key, q.from, p.v4)
				}
			}
		}
	}
	// Answers are remembered for each path alone.
	for _, id := range []string{"p1", "p1", "p6", "p6"} {
		k.ask(lab.Ask{Target: "kept.test:80", Header: egress(id), Tunnel: true})
	}
	from := map[netip.Addr]int{}
	for _, q := range n.of("kept.test.") {
		from[q.from]++
	}
	if len(from) != 2 || from[all[0].v4] != 2 || from[all[5].v4] != 2 {
		t.Errorf("one name, by two paths, twice each: asked %v", from)
	}
	// The policy's path is picked first, and is the query's too.
	for i := range 16 {
		name := fmt.Sprintf("four.policy%d.test", i)
		told := k.ask(lab.Ask{Target: name + ":80", Tunnel: i%2 == 0})
		for _, q := range n.of(name + ".") {
			if told.Status != 200 || q.from.String() != told.Seen.Source {
				t.Errorf("%s: asked from %s, the request came from %q (%d %s)", q.key, q.from, told.Seen.Source, told.Status, told.Body)
			}
		}
	}
	// By TCP where an answer is cut off.
	if told := k.ask(lab.Ask{Target: "big.test:80", Header: egress("p7"), Tunnel: true}); told.Status != 200 {
		t.Errorf("big.test: %d %s", told.Status, told.Body)
	}
	networks := map[string]int{}
	for _, q := range n.of("big.test.") {
		networks[q.network]++
		if q.from != all[6].v4 {
			t.Errorf("%s by %s: asked from %s, want %s", q.key, q.network, q.from, all[6].v4)
		}
	}
	if networks["udp"] != 2 || networks["tcp"] != 2 {
		t.Errorf("big.test was asked for by %v", networks)
	}
	// Datagrams' names as well.
	a, err := k.associateBy(client.Dialer{Extension: "p3"}, 3128)
	if err != nil {
		t.Fatal(err)
	}
	if got := a.mustEcho(t, "datagram.test:5353", "who am I"); got.Addr() != all[2].v4 {
		t.Errorf("the datagram came from %s", got)
	}
	for _, q := range n.of("datagram.test.") {
		if q.from != all[2].v4 {
			t.Errorf("%s: asked from %s, want %s", q.key, q.from, all[2].v4)
		}
	}

	// A server of the other family.
	told := k.ask(lab.Ask{Target: "six.test:80", Proxy: proxyAt(3129), Header: egress("both")})
	for _, q := range n.of("six.test.") {
		if told.Status != 200 || q.from.String() != "2001:db8:100::21" {
			t.Errorf("%s: asked from %s; %d %s", q.key, q.from, told.Status, told.Body)
		}
	}
	selectionCase{name: "a path that cannot reach its server", port: 3129, header: egress("four"), target: "none.test:80", status: 502, proxy: "dns_error"}.check(k.scene, true)
	if got := n.of("none.test."); len(got) != 0 {
		t.Errorf("asked all the same: %v", got)
	}
	told = k.ask(lab.Ask{Target: "net.test:80", Proxy: proxyAt(3129), Header: egress("net")})
	if told.Status != 200 || len(n.of("net.test.")) == 0 {
		t.Errorf("by a prefix: %d %s", told.Status, told.Body)
	}
	for _, q := range n.of("net.test.") {
		if !routed6.Contains(q.from) {
			t.Errorf("%s: asked from %s", q.key, q.from)
		}
	}

	// By the interfaces' own view: each query by the uplink of its source.
	for i, c := range ups {
		for _, p := range settled(t, c) {
			if !p.Out || p.Dst.Port() != 53 {
				continue
			}
			src, ok := p.Src.Addr(), false
			for _, node := range all {
				ok = ok || node.uplink == i && src == node.v4
			}
			if !ok && (i != 0 || src.String() != "2001:db8:100::21" && !routed6.Contains(src)) {
				t.Errorf("uplink %d carries %s", i+1, p)
			}
		}
	}
	mixed := false
	n.mu.Lock()
	for _, q := range n.asked {
		mixed = mixed || q.network == "udp" && q.spelled != strings.ToLower(q.spelled)
	}
	n.mu.Unlock()
	if !mixed {
		t.Error("no query mixes the case of its letters")
	}
}

// TestResolvers: what is known without asking, which families are asked for, and
// what is given when no server answers.
func TestResolvers(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	n := &nameServer{records: map[string][]string{"AAAA four.test.": nil, "A six.test.": nil}}
	s.serveNames(n)
	v4, v6 := lab.Egress4()[0].String(), lab.Egress6()[0].String()
	var b strings.Builder
	fmt.Fprintf(&b, `resolver:
  - {name: own, type: dns, server: ["%s"], timeout: 2s, hosts: {pinned.test: %s, both.pinned.test: [%s, %q]}}
  - {name: stale, type: dns, server: ["%s"], timeout: 2s, serve_stale: 1h}
  - {name: two, type: dns, server: ["%s:54", "%s"], timeout: 2s}
escaper:
`, lab.OriginAddr4, lab.OriginAddr4, lab.OriginAddr4, lab.OriginAddr6, lab.OriginAddr4, lab.OriginAddr4, lab.OriginAddr4)
	ports := map[string]uint16{}
	web := "server:\n"
	for i, c := range []struct{ name, resolver, strategy string }{
		{"any", "own", "any"},
		{"only4", "own", "ipv4_only"},
		{"only6", "own", "ipv6_only"},
		{"first4", "own", "ipv4_first"},
		{"first6", "own", "ipv6_first"},
		{"stale", "stale", "ipv4_only"},
		{"two", "two", "ipv4_only"},
	} {
		ports[c.name] = uint16(3201 + i)
		fmt.Fprintf(&b, "  - {name: %s, type: direct_fixed, resolver: %s, resolve_strategy: %s, nodes: [{id: p, ipv4: %s, ipv6: %q}]}\n", c.name, c.resolver, c.strategy, v4, v6)
		web += fmt.Sprintf("  - {name: s-%s, type: http_proxy, listen: \"10.0.0.1:%d\", open: true, escaper: %s}\n", c.name, ports[c.name], c.name)
	}
	s.start(b.String() + web)
	for _, c := range []struct {
		escaper, host string
		source        string
		status        int
		asked         []string // types
	}{
		{"any", "a.test", v6, 0, []string{"A", "AAAA"}},
		{"any", "four.test", v4, 0, nil},
		{"only4", "b.test", v4, 0, []string{"A"}},
		{"only4", "six.test", "", 502, nil},
		{"only6", "c.test", v6, 0, []string{"AAAA"}},
		{"only6", "four.test", "", 502, nil},
		{"first4", "d.test", v4, 0, []string{"A", "AAAA"}},
		{"first4", "six.test", v6, 0, nil},
		{"first6", "e.test", v6, 0, []string{"A", "AAAA"}},
		{"first6", "four.test", v4, 0, nil},
		{"any", "pinned.test", v4, 0, []string{}},
		{"any", "both.pinned.test", v6, 0, []string{}},
		{"only6", "pinned.test", "", 502, []string{}},
		{"two", "f.test", v4, 0, []string{"A"}}, // nobody listens at the first server
	} {
		selectionCase{name: c.escaper + " " + c.host, port: ports[c.escaper], target: c.host + ":80", source: c.source, status: c.status}.check(s, true)
		if c.asked == nil {
			continue
		}
		types := []string{}
		for _, q := range n.of(c.host + ".") {
			types = append(types, strings.Fields(q.key)[0])
		}
		slices.Sort(types)
		if !slices.Equal(types, c.asked) {
			t.Errorf("%s %s: asked for %v, want %v", c.escaper, c.host, types, c.asked)
		}
	}

	// Stale answers, where they are wanted, once the servers fail.
	for _, e := range []string{"stale", "only4"} {
		if told := s.ask(lab.Ask{Proxy: proxyAt(ports[e]), Target: "short." + e + ".test:80", Tunnel: true}); told.Status != 200 {
			t.Fatalf("%s: %d %s", e, told.Status, told.Body)
		}
	}
	n.setMute(true)
	for _, c := range []struct {
		escaper string
		status  int
	}{{"only4", 502}, {"stale", 200}} {
		name := "short." + c.escaper + ".test"
		before := len(n.of(name + "."))
		var told lab.Told
		eventually(t, "the answer's time is over", func() bool {
			told = s.ask(lab.Ask{Proxy: proxyAt(ports[c.escaper]), Target: name + ":80", Tunnel: true})
			return len(n.of(name+".")) > before
		})
		if told.Status != c.status {
			t.Errorf("%s: %d %s", name, told.Status, told.Body)
		}
	}
	n.setMute(false)
	eventually(t, "the servers are asked again", func() bool {
		return s.ask(lab.Ask{Proxy: proxyAt(ports["only4"]), Target: "short.only4.test:80", Tunnel: true}).Status == 200
	})
}
