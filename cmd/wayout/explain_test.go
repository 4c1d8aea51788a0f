package main_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// explained is what explain --json says.
type explained struct {
	Version   int      `json:"version"`
	OK        bool     `json:"ok"`
	Server    string   `json:"server"`
	Target    string   `json:"target"`
	Selection string   `json:"selection"`
	By        string   `json:"selection_source"`
	Chain     []string `json:"chain"`
	Path      string   `json:"path"`
	SourceIP  *string  `json:"source_ip"`
	MayVary   bool     `json:"may_vary"`
	Steps     []string `json:"steps"`
	Status    int      `json:"status"`
	Error     string   `json:"error"`
}

func (s *scene) explain(args ...string) (v explained, code int) {
	s.t.Helper()
	out, errs, code := s.command(append([]string{"explain", "--config", s.config, "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &v); err != nil || errs != "" {
		s.t.Fatalf("explain %q: exit %d, %q %q: %v", args, code, out, errs, err)
	}
	if v.Version != 1 || v.OK != (code == 0) || v.OK != (v.Status == 200) || v.OK != (v.Error == "") {
		s.t.Errorf("explain %q: exit %d and %+v", args, code, v)
	}
	return v, code
}

// explainConfig has a bit of everything.
func explainConfig(t *testing.T) string {
	t.Helper()
	v4, v6 := lab.Egress4(), lab.Egress6()
	h := hashOf(t, "secret")
	return fmt.Sprintf(`escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    pick_policy: serial
    egress_network_filter: {deny: ["192.0.2.77/32"]}
    nodes:
      - {id: p1, ipv4: %s, ipv6: %q}
      - {id: p2, ipv4: %s, ipv6: %q}
      - {id: p3, ipv4: %s}
      - {id: lost, ipv4: 203.0.113.99}
      - {id: six, ipv6: %q}
  - {name: strict, type: direct_fixed, enable_path_selection: true, index: strict, bind_ip: [%s]}
  - {name: off, type: direct_fixed, bind_ip: [%s]}
  - {name: dice, type: direct_fixed, enable_path_selection: true, bind_ip: [%s, %s]}
  - {name: route, type: route_select, enable_path_selection: true, pick_policy: round_robin, next: [out, dice, off]}
  - {name: up, type: route_upstream, enable_path_selection: true, default_next: out, exact_match: [{next: dice, hosts: [dice.test]}]}
  - {name: dyn, type: direct_float, enable_path_selection: true, cache: %q}
  - {name: peer, type: proxy_http, nodes: [{id: h, addr: "203.0.113.1:3128", path: out/p1}]}
user_group:
  - name: team
    users:
      - {name: alice, password: %q, allow_path: ["out/p1"]}
      - {name: bob, password: %q, egress_path: {out: p2}}
server:
`, v4[0], v6[0], v4[1], v6[1], v4[2], routed6, v4[4], v4[5], v4[6], v4[7], t.TempDir()+"/dyn.json", h, h) +
		explainServer("out", 3201, "") + explainServer("strict", 3202, "") + explainServer("off", 3203, "") + explainServer("dice", 3204, "") +
		explainServer("route", 3205, "") + explainServer("up", 3206, "") + explainServer("dyn", 3207, "") + explainServer("peer", 3208, "") +
		`  - {name: named, type: http_proxy, listen: "10.0.0.1:3209", user_group: team, username_params: true, escaper: out, path_selection_header: X-Egress-Path}
  - {name: at, type: http_proxy, listen: ["198.51.100.12:3210", "10.0.0.1:3210"], open: true, escaper: out, select: ingress_ip}
  - {name: map, type: http_proxy, listen: "10.0.0.1:3211", open: true, escaper: out, path_selection_header: X-Egress-Path, select: {out: p3}}
  - {name: deaf, type: http_proxy, listen: "10.0.0.1:3212", open: true, escaper: out}
`
}

func explainServer(escaper string, port int, more string) string {
	return fmt.Sprintf("  - {name: %s, type: http_proxy, listen: \"10.0.0.1:%d\", open: true, escaper: %s, path_selection_header: X-Egress-Path%s}\n", escaper, port, escaper, more)
}

// TestExplain compares what explain says with what the daemon does.
func TestExplain(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(explainConfig(t))
	for _, c := range []struct {
		name         string
		server, port string // of the daemon
		header       string
		user         string // with parameters, or ""
		target       string
		status       int // of explain and of the daemon; 0: 200
		path         string
		by           string
		varies       bool
	}{
		{name: "policy", server: "out", path: "out/p1", by: "policy"},
		{name: "header", server: "out", header: "p2", path: "out/p2", by: "header"},
		{name: "index", server: "out", header: "2", path: "out/p2", by: "header"},
		{name: "index that wraps", server: "out", header: "7", path: "out/p2", by: "header"},
		{name: "address", server: "out", header: lab.Egress6()[1].String(), target: target6, path: "out/p2", by: "header"},
		{name: "address inside a prefix", server: "out", header: "2001:db8:100:beef::3", target: target6, path: "out/six", by: "header"},
		{name: "a prefix, at random", server: "out", header: "six", target: target6, path: "out/six", by: "header", varies: true},
		{name: "map", server: "out", header: `{"out": "p3"}`, path: "out/p3", by: "header"},
		{name: "empty map", server: "out", header: "{}", path: "out/p1", by: "policy"},
		{name: "policy at random", server: "dice", path: "", by: "policy", varies: true},
		{name: "route by policy", server: "route", path: "", by: "policy", varies: true},
		{name: "route by selection", server: "route", header: `{"route": "out", "out": "p2"}`, path: "out/p2", by: "header"},
		{name: "route by default", server: "up", header: `{"out": "p2"}`, path: "out/p2", by: "header"},
		{name: "fixed map of the server", server: "map", path: "out/p3", by: "server"},
		{name: "header over the server's map", server: "map", header: "p1", path: "out/p1", by: "header"},
		{name: "ingress_ip of no node", server: "at", status: 503},
		{name: "user's map", server: "named", user: "bob", path: "out/p2", by: "user"},
		{name: "user's map over the header", server: "named", user: "bob", header: "p3", path: "out/p2", by: "user"},
		{name: "user name", server: "named", user: "alice-path-p1", path: "out/p1", by: "username"},
		{name: "user name and address", server: "named", user: "alice-path-p1-ip-" + lab.Egress4()[0].String(), path: "out/p1", by: "username"},
		{name: "session", server: "named", user: "alice-session-s", path: "", by: "username"},

		{name: "malformed", server: "out", header: "{", status: 400},
		{name: "malformed number", server: "out", header: "18446744073709551616", status: 400},
		{name: "malformed user name", server: "named", user: "alice-lifetime-3", status: 400},
		{name: "path and another's address", server: "named", user: "alice-path-p1-ip-" + lab.Egress4()[1].String(), status: 400},
		{name: "unknown escaper", server: "out", header: `{"in": 1}`, status: 400},
		{name: "unknown ID", server: "out", header: "p9", status: 400},
		{name: "address of no node", server: "out", header: "203.0.113.98", status: 400},
		{name: "strict index", server: "strict", header: "2", status: 400},
		{name: "not passed", server: "out", header: `{"dice": 1}`, status: 400},
		{name: "disabled", server: "off", header: "1", status: 400},
		{name: "disabled behind a route", server: "route", header: `{"route": "off", "off": 1}`, status: 400},
		{name: "forbidden", server: "named", user: "alice-path-p2", status: 403},
		{name: "forbidden by header", server: "named", user: "alice", header: "3", status: 403},
		{name: "down", server: "out", header: "lost", status: 503},
		{name: "no node at all", server: "dyn", status: 503},
		{name: "family", server: "out", header: "p3", target: target6, status: 502},
		{name: "family of the address", server: "out", header: lab.Egress4()[0].String(), target: target6, status: 502},
		{name: "destination", server: "out", header: "p1", target: "192.0.2.77:80", status: 403},
		{name: "destination, the host itself", server: "out", target: "127.0.0.1:80", status: 403},
		{name: "down comes before the destination", server: "out", header: "lost", target: "127.0.0.1:80", status: 503},
		{name: "unknown user", server: "named", user: "mallory", status: 407},
	} {
		target := c.target
		if target == "" {
			target = target4
		}
		args := []string{"--server", c.server}
		var header []string
		if c.header != "" {
			args, header = append(args, "--header", c.header), egress(c.header)
		}
		if c.user != "" {
			args, header = append(args, "--username", c.user), append(header, basic(c.user, "secret"))
		}
		if c.server == "at" {
			args = append(args, "--local", lab.HostAddr4)
		}
		v, _ := s.explain(append(args, target)...)
		want := c.status
		if want == 0 {
			want = 200
		}
		if v.Status != want || v.Server != c.server || v.Target != target {
			t.Errorf("%s: %+v, want %d", c.name, v, want)
		}
		port := uint16(3201 + slices.Index([]string{"out", "strict", "off", "dice", "route", "up", "dyn", "peer", "named", "at", "map"}, c.server))
		told := s.ask(lab.Ask{Proxy: proxyAt(port), Header: header, Target: target, Tunnel: true})
		if told.Status != want {
			t.Errorf("%s: the daemon says %d %q, explain %d %q", c.name, told.Status, told.Body, v.Status, v.Error)
		}
		if c.status != 0 {
			if c.status != 407 && told.Body != "wayout: "+v.Error {
				t.Errorf("%s: the daemon says %q, explain %q", c.name, told.Body, v.Error)
			}
			continue
		}
		if v.By != c.by || c.path != "" && v.Path != c.path || v.MayVary != c.varies || len(v.Steps) < 2 || v.SourceIP == nil {
			t.Errorf("%s: %+v", c.name, v)
			continue
		}
		if v.Chain[0] != map[bool]string{true: "out", false: c.server}[slices.Contains([]string{"named", "at", "map"}, c.server)] || v.Chain[len(v.Chain)-1]+"/" != v.Path[:strings.Index(v.Path, "/")+1] {
			t.Errorf("%s: the way is %v, and the path %s", c.name, v.Chain, v.Path)
		}
		if !c.varies && told.Seen.Source != *v.SourceIP {
			t.Errorf("%s: the origin saw %s, explain says %s", c.name, told.Seen.Source, *v.SourceIP)
		}
		if c.varies && strings.Contains(c.name, "prefix") && !routed6.Contains(netip.MustParseAddr(*v.SourceIP)) {
			t.Errorf("%s: explain says %s", c.name, *v.SourceIP)
		}
	}

	// By an ingress address, by a name, by a peer.
	if v, _ := s.explain("--server", "at", "--local", lab.Egress4()[1].String(), target4); v.Path != "out/p2" || v.By != "server" || *v.SourceIP != lab.Egress4()[1].String() {
		t.Errorf("by an ingress address: %+v", v)
	}
	if v, _ := s.explain("--server", "at", target4); v.Path != "out/p2" {
		t.Errorf("by the server's first listener: %+v", v)
	}
	if v, _ := s.explain("--server", "up", "dice.test:443"); !slices.Equal(v.Chain, []string{"up", "dice"}) || v.Target != "dice.test:443" {
		t.Errorf("by a name: %+v", v)
	}
	if v, _ := s.explain("--server", "peer", "any.test"); v.Path != "peer/h" || v.SourceIP == nil || *v.SourceIP != lab.Egress4()[0].String() {
		t.Errorf("by a peer of IPv4: %+v", v)
	}
	if v, code := s.explain("--server", "deaf", "--header", "p1", target4); code != 1 || v.Status != 400 {
		t.Errorf("a header for a server that reads none: %+v", v)
	}
	if v, _ := s.explain("--server", "named", "--user", "bob", target4); v.Path != "out/p2" || v.By != "user" {
		t.Errorf("--user: %+v", v)
	}
	// In words.
	out, errs, code := s.command("explain", "--config", s.config, "--server", "out", "--header", "p2", target4)
	if code != 0 || errs != "" || !strings.Contains(out, "path out/p2, source "+lab.Egress4()[1].String()+"\n") {
		t.Errorf("in words: %d %q %q", code, out, errs)
	}
	out, errs, code = s.command("explain", "--config", s.config, "--server", "out", "--header", "p9", target4)
	if code != 1 || errs != "" || !strings.Contains(out, "refused with 400: ") || !strings.Contains(out, "p9") {
		t.Errorf("a refusal in words: %d %q %q", code, out, errs)
	}
	for name, args := range map[string][]string{
		"no target":      {"explain", "--config", s.config},
		"a bad target":   {"explain", "--config", s.config, "x:y:z"},
		"port 0":         {"explain", "--config", s.config, "x.test:0"},
		"a bad client":   {"explain", "--config", s.config, "--client", "me", target4},
		"no such config": {"explain", "--config", s.config + "x", target4},
	} {
		if out, errs, code := s.command(args...); code != 2 || out != "" || errs == "" {
			t.Errorf("%s: %d %q %q", name, code, out, errs)
		}
	}
	if _, errs, code := s.command("explain", "--config", s.config, "--server", "nobody", target4); code == 0 || !strings.Contains(errs, "nobody") {
		t.Errorf("no such server: %d %q", code, errs)
	}
}

// TestExplainAlone: explain needs no daemon, takes what apply would add to be
// there, changes nothing and sends nothing.
func TestExplainAlone(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	n := &nameServer{records: map[string][]string{"A inside.test.": {"127.0.0.1"}, "AAAA inside.test.": nil, "AAAA four.test.": nil}}
	k.serveNames(n)
	k.write("resolver: [{name: own, type: dns, server: [\"" + lab.OriginAddr4 + ":53\"], timeout: 5s}]\n" +
		strings.Replace(uplinkConfig(""), "type: direct_fixed\n", "type: direct_fixed\n    resolver: own\n", 1))
	before := k.state()
	ups := []*lab.Capture{k.capture(k.Host, "eth0"), k.capture(k.Host, "eth1"), k.capture(k.Host, "lan0")}
	quiet := func(when string) {
		t.Helper()
		for _, c := range ups {
			for _, p := range settled(t, c) {
				if p.Out && (p.Proto == unix.IPPROTO_TCP || p.Proto == unix.IPPROTO_UDP) {
					t.Errorf("%s: sent %s", when, p)
				}
			}
		}
	}
	for _, p := range uplinkNodes() {
		if v, _ := k.explain("--header", p.id, target6); v.Path != "out/"+p.id || *v.SourceIP != p.v6.String() {
			t.Errorf("%s: %+v", p.id, v)
		}
	}
	if v, _ := k.explain("--header", "p1", "four.test:80"); v.Path != "out/p1" || !slices.ContainsFunc(v.Steps, func(s string) bool { return strings.Contains(s, "not resolved") }) {
		t.Errorf("a name: %+v", v)
	}
	quiet("without --resolve")
	k.same("explain changes nothing", before)

	if v, _ := k.explain("--resolve", "--header", "p1", "four.test:80"); v.Path != "out/p1" || *v.SourceIP != lab.Egress4()[0].String() {
		t.Errorf("a name that is resolved: %+v", v)
	}
	if v, code := k.explain("--resolve", "--header", "p1", "inside.test:80"); code != 1 || v.Status != 403 || !strings.Contains(v.Error, "127.0.0.1") {
		t.Errorf("a name that leads inside: %+v", v)
	}
	if len(n.of("four.test.")) == 0 {
		t.Error("nobody was asked for four.test")
	}
	for _, c := range ups {
		for _, p := range settled(t, c) {
			if p.Out && (p.Proto == unix.IPPROTO_TCP || p.Proto == unix.IPPROTO_UDP) && p.Dst.Port() != 53 {
				t.Errorf("with --resolve: sent %s", p)
			}
		}
	}
	k.same("explain --resolve changes nothing", before)

	// What the host lacks and apply would not add is down.
	if err := k.Host.Down("eth1"); err != nil {
		t.Fatal(err)
	}
	if v, code := k.explain("--header", "p5", target4); code != 1 || v.Status != 503 {
		t.Errorf("without its interface: %+v", v)
	}
	if v, _ := k.explain("--header", "p1", target4); v.Path != "out/p1" {
		t.Errorf("by the other interface: %+v", v)
	}
	if _, err := control.NewClient(k.socket).Paths(t.Context()); err == nil {
		t.Error("somebody listens at the control socket")
	}
}
