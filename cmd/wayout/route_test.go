package main_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// Ports of routeConfig's servers.
const (
	portSelect = 3201 + iota
	portMapping
	portFailover
	portUpstream
	portClient
	portTop
	portShut
	portHalf
	portPolicy
	portNamed
	portStrict
)

// routeConfig has two escapers of paths, one (p1 to p4) and two (p5 to p8), and
// routes over them, each with a server of its own.
func routeConfig(t *testing.T) string {
	t.Helper()
	v4, v6 := lab.Egress4(), lab.Egress6()
	h := hashOf(t, "secret")
	var b strings.Builder
	b.WriteString("escaper:\n")
	for k, name := range []string{"one", "two"} {
		fmt.Fprintf(&b, "  - name: %s\n    type: direct_fixed\n    enable_path_selection: true\n    nodes:\n", name)
		for i := range 4 {
			fmt.Fprintf(&b, "      - {id: p%d, ipv4: %s, ipv6: %q}\n", 4*k+i+1, v4[4*k+i], v6[4*k+i])
		}
	}
	fmt.Fprintf(&b, `  - {name: four, type: direct_fixed, bind_ip: [%s]}
  - {name: select, type: route_select, enable_path_selection: true, next: [{escaper: one, weight: 1}, {escaper: two, weight: 0}]}
  - {name: nth, type: route_mapping, enable_path_selection: true, next: [one, two]}
  - {name: nth-strict, type: route_mapping, enable_path_selection: true, index: strict, next: [one, two]}
  - {name: safe, type: route_failover, enable_path_selection: true, next: [one, two]}
  - name: up
    type: route_upstream
    enable_path_selection: true
    exact_match:
      - {next: one, hosts: [exact.test, "192.0.2.80"]}
    child_match:
      - {next: two, domains: [child.test]}
      - {next: one, domains: [deep.child.test]}
    regex_match:
      - {next: two, regexes: ['r[0-9]+\.test']}
    subnet_match:
      - {next: two, subnets: ["2001:db8:80::/48"]}
      - {next: one, subnets: ["2001:db8:80::80/128"]}
    default_next: one
  - name: who
    type: route_client
    enable_path_selection: true
    user_match:
      - {next: two, users: [bob]}
    subnet_match:
      - {next: one, subnets: [10.0.0.0/24]}
      - {next: two, subnets: [10.0.0.3/32]}
    default_next: two
  - {name: top, type: route_select, enable_path_selection: true, next: [{escaper: safe, weight: 1}, {escaper: nth, weight: 0}]}
  - {name: shut, type: route_select, next: [one, two]}
  - {name: policy, type: route_select, pick_policy: round_robin, enable_path_selection: true, next: [one, two]}
  - {name: half, type: route_failover, enable_path_selection: true, next: [four, two]}
user_group:
  - name: team
    users:
      - {name: alice, password: %q, allow_path: ["select/one", "one/p2", "two/*"]}
      - {name: bob, password: %q}
server:
`, lab.Primary1Of4, h, h)
	for i, name := range []string{"select", "nth", "safe", "up", "who", "top", "shut", "half", "policy"} {
		fmt.Fprintf(&b, "  - {name: s-%s, type: http_proxy, listen: \"10.0.0.1:%d\", open: true, escaper: %s, path_selection_header: X-Egress-Path, report_egress: true}\n", name, portSelect+i, name)
	}
	fmt.Fprintf(&b, "  - {name: named, type: http_proxy, listen: \"10.0.0.1:%d\", user_group: team, username_params: true, escaper: select, path_selection_header: X-Egress-Path}\n", portNamed)
	fmt.Fprintf(&b, "  - {name: s-strict, type: http_proxy, listen: \"10.0.0.1:%d\", open: true, escaper: nth-strict, path_selection_header: X-Egress-Path}\n", portStrict)
	fmt.Fprintf(&b, "  - {name: who-named, type: http_proxy, listen: \"10.0.0.1:%d\", user_group: team, escaper: who}\n", portStrict+1)
	return b.String()
}

// leaves says which paths requests like this one leave by, in 12 tries. All have
// to succeed.
func (s *scene) leaves(port uint16, target string, header ...string) []string {
	s.t.Helper()
	var seen []string
	for i := range 12 {
		told := s.ask(lab.Ask{Proxy: proxyAt(port), Target: target, Header: header, Tunnel: i%2 == 1})
		if told.Status != 200 {
			s.t.Errorf("port %d, %v: %d %s", port, header, told.Status, told.Body)
			continue
		}
		a := netip.MustParseAddr(told.Seen.Source)
		path := "four"
		if i := slices.Index(lab.Egress4(), a); i >= 0 {
			path = fmt.Sprintf("p%d", i+1)
		} else if i := slices.Index(lab.Egress6(), a); i >= 0 {
			path = fmt.Sprintf("p%d", i+1)
		} else if told.Seen.Source != lab.Primary1Of4 {
			path = told.Seen.Source
		}
		if !slices.Contains(seen, path) {
			seen = append(seen, path)
		}
	}
	slices.Sort(seen)
	return seen
}

// only fails the test unless all of got are among these.
func only(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	for _, p := range got {
		if !slices.Contains(want, p) {
			t.Errorf("%s: left by %s, want %v", what, p, want)
		}
	}
}

var (
	ofOne = []string{"p1", "p2", "p3", "p4"}
	ofTwo = []string{"p5", "p6", "p7", "p8"}
)

func TestRoutes(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	v4 := lab.Egress4()
	src := func(p int) string { return v4[p-1].String() }
	z := &zone{records: map[string][]string{}}
	for _, n := range []string{"exact", "child", "a.child", "deep.child", "x.deep.child", "childless", "notchild", "r7", "r7x", "xr7", "else"} {
		z.records["A "+n+".test."] = []string{lab.OriginAddr4}
	}
	s.names(t, z, "", routeConfig(t))

	for _, c := range []selectionCase{
		{name: "select by ID, then the path", port: portSelect, header: egress(`{"select": "two", "two": "p6"}`), source: src(6)},
		{name: "a bare value is the server's escaper's", port: portSelect, header: egress("p1"), status: 400},
		{name: "select by index, wrapping", port: portSelect, header: egress(`{"select": 4, "two": 1}`), source: src(5)},
		{name: "the path alone, the route's weight", port: portSelect, header: egress(`{"one": "p3"}`), source: src(3)},
		{name: "the path of an escaper that the policy never takes", port: portSelect, header: egress(`{"two": "p5"}`), status: 400, proxy: "http_request_error"},
		{name: "two paths, and the request passes one", port: portSelect, header: egress(`{"one": "p1", "two": "p5"}`), status: 400},
		{name: "an escaper of another chain", port: portSelect, header: egress(`{"four": 1}`), status: 400},
		{name: "an escaper that does not exist", port: portSelect, header: egress(`{"five": 1}`), status: 400},
		{name: "no such next escaper", port: portSelect, header: egress(`{"select": "four"}`), status: 400},
		{name: "a path's ID, where an escaper's name belongs", port: portSelect, header: egress(`{"select": "p1"}`), status: 400},
		{name: "an address, where an escaper's name belongs", port: portSelect, header: egress(`{"select": "` + src(1) + `"}`), status: 400},

		{name: "mapping by index", port: portMapping, header: egress(`{"nth": 2, "two": "p8"}`), source: src(8)},
		{name: "mapping, 0 is the last", port: portMapping, header: egress(`{"nth": 0, "two": 1}`), source: src(5)},
		{name: "mapping, wrapping", port: portMapping, header: egress(`{"nth": 3, "one": 1}`), source: src(1)},
		{name: "mapping, strict", port: portStrict, header: egress(`{"nth-strict": 2, "two": 1}`), source: src(5)},
		{name: "mapping, strict and out of range", port: portStrict, header: egress("3"), status: 400},
		{name: "mapping, strict and 0", port: portStrict, header: egress("0"), status: 400},

		{name: "failover, selected", port: portFailover, header: egress(`{"safe": "two", "two": "p7"}`), source: src(7)},
		{name: "a chain of three", port: portTop, header: egress(`{"top": "safe", "safe": "two", "two": 3}`), source: src(7)},
		{name: "a chain of three, the last two", port: portTop, header: egress(`{"safe": "two", "two": "p8"}`), source: src(8)},
		{name: "a chain of three, another branch", port: portTop, header: egress(`{"top": "nth", "nth": 2, "two": "p6"}`), source: src(6)},
		{name: "a chain of three, a branch that is not passed", port: portTop, header: egress(`{"top": "nth", "safe": "two"}`), status: 400},

		{name: "selection is off at the route", port: portShut, header: egress("one"), status: 400},
		{name: "selection is off at the route, a map", port: portShut, header: egress(`{"shut": "one", "one": "p1"}`), status: 400},
		{name: "selection is off behind the route", port: portHalf, header: egress(`{"half": "four", "four": 1}`), status: 400},

		{name: "allowed route and path", port: portNamed, header: append(egress(`{"select": "one", "one": "p2"}`), basic("alice", "secret")), source: src(2)},
		{name: "allowed route, forbidden path", port: portNamed, header: append(egress(`{"select": "one", "one": "p3"}`), basic("alice", "secret")), status: 403, proxy: "http_request_denied"},
		{name: "forbidden route, allowed path", port: portNamed, header: append(egress(`{"select": "two", "two": "p5"}`), basic("alice", "secret")), status: 403},
		{name: "forbidden route by index", port: portNamed, header: append(egress("2"), basic("alice", "secret")), status: 403},
		{name: "unknown comes before forbidden", port: portNamed, header: append(egress(`{"select": "two", "one": "p9"}`), basic("alice", "secret")), status: 400},
		{name: "not passed comes before forbidden", port: portNamed, header: append(egress(`{"select": "two", "one": "p2"}`), basic("alice", "secret")), status: 400},
		{name: "by user name", port: portNamed, header: []string{basic("bob-path-two", "secret")}, source: ""},
		{name: "by user name, another escaper of the chain", port: portNamed, header: []string{basic("bob-path-one~p4", "secret")}, source: src(4)},
		{name: "by user name and header together", port: portNamed, header: append(egress(`{"two": "p5"}`), basic("bob-path-two", "secret")), source: src(5)},
	} {
		if c.name == "by user name" {
			only(t, c.name, s.leaves(c.port, target4, c.header...), ofTwo...)
			continue
		}
		for _, tunnel := range []bool{false, true} {
			c.check(s, tunnel)
		}
	}

	only(t, "select, by weight", s.leaves(portSelect, target4), ofOne...)
	only(t, "a session, by weight", s.leaves(portNamed, target4, basic("bob-session-x", "secret")), ofOne...)
	if got := s.leaves(portNamed, target4, basic("bob-session-x", "secret")); len(got) != 1 {
		t.Errorf("a session leaves by %v", got)
	}
	only(t, "failover", s.leaves(portFailover, target4), ofOne...)
	rr := s.leaves(portPolicy, target4)
	if !slices.ContainsFunc(rr, func(p string) bool { return slices.Contains(ofOne, p) }) || !slices.ContainsFunc(rr, func(p string) bool { return slices.Contains(ofTwo, p) }) {
		t.Errorf("round_robin over two escapers leaves by %v", rr)
	}

	for _, c := range []struct {
		name, target string
		want         []string
	}{
		{"exact host", "exact.test:80", ofOne},
		{"exact host in capitals with its dot", "EXACT.test.:80", ofOne},
		{"exact address", target4, ofOne},
		{"domain itself", "child.test:80", ofTwo},
		{"below a domain", "a.child.test:80", ofTwo},
		{"the longer suffix", "x.deep.child.test:80", ofOne},
		{"no label of the domain", "notchild.test:80", ofOne},
		{"regex", "r7.test:80", ofTwo},
		{"regex of a part", "r7x.test:80", ofOne},
		{"regex of another part", "xr7.test:80", ofOne},
		{"default", "else.test:80", ofOne},
		{"network, the longest prefix", target6, ofOne},
	} {
		only(t, "upstream: "+c.name, s.leaves(portUpstream, c.target), c.want...)
	}
	// Rules give way to who selects.
	selectionCase{name: "upstream, selected", port: portUpstream, header: egress(`{"up": "two", "two": "p6"}`), source: src(6)}.check(s, false)
	selectionCase{name: "upstream, the other branch", port: portUpstream, header: egress(`{"two": "p6"}`), status: 400}.check(s, false)

	only(t, "client network", s.leaves(portClient, target4), ofOne...)
	if err := s.Client.AddAddr("eth0", netip.MustParsePrefix("10.0.0.3/24")); err != nil {
		t.Fatal(err)
	}
	c, err := s.Client.DialFrom(netip.MustParseAddr("10.0.0.3"), proxyAt(portClient))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := newPeer(t, c, nil)
	w.say(requestTo("GET", target4) + "\r\n")
	if resp, body := w.answer("GET"); resp.StatusCode != 200 || !slices.ContainsFunc(v4[4:], func(a netip.Addr) bool { return strings.Contains(body, `"`+a.String()+`"`) }) {
		t.Errorf("client by the longer prefix: %s %s", resp.Status, body)
	}
	only(t, "user", s.leaves(portStrict+1, target4, basic("bob", "secret")), ofTwo...)
	only(t, "another user, by the network", s.leaves(portStrict+1, target4, basic("alice", "secret")), ofOne...)
}

// TestFailover: what cannot be used is left to the next, and taken again when
// it is back.
func TestFailover(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(routeConfig(t))
	v4 := lab.Egress4()
	client := control.NewClient(s.socket)
	drain := func(on bool, ids ...string) {
		t.Helper()
		for _, id := range ids {
			if err := client.Drain(t.Context(), "one/"+id, on); err != nil {
				t.Fatal(err)
			}
		}
	}
	drain(true, "p1", "p2", "p3")
	only(t, "one path is left", s.leaves(portFailover, target4), "p4")
	drain(true, "p4")
	only(t, "all are draining", s.leaves(portFailover, target4), ofTwo...)
	only(t, "two routes deep", s.leaves(portTop, target4), ofTwo...)
	selectionCase{name: "who selects the first gets no other", port: portFailover, header: egress("one"), status: 503, proxy: "destination_unavailable"}.check(s, false)
	selectionCase{name: "who selects a path of the first, which is not passed", port: portFailover, header: egress(`{"one": "p1"}`), status: 400}.check(s, false)
	selectionCase{name: "who selects the path that is draining", port: portFailover, header: egress(`{"safe": "one", "one": "p1"}`), status: 503}.check(s, false)
	selectionCase{name: "weights: the policy of the route has no other", port: portSelect, status: 503}.check(s, false)
	drain(false, "p2")
	only(t, "back again", s.leaves(portFailover, target4), "p2")
	drain(false, "p1", "p3", "p4")

	// The IPv4 addresses of the first go: IPv6 stays with it.
	for _, a := range v4[:4] {
		if err := s.Host.DelAddr("eth0", lab.EgressPrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 4 {
		s.until(fmt.Sprintf("one/p%d", i+1), func(p control.Path) bool { return strings.Contains(p.Reason, v4[i].String()) })
	}
	only(t, "IPv4 addresses are gone", s.leaves(portFailover, target4), ofTwo...)
	only(t, "IPv6 is as it was", s.leaves(portFailover, target6), ofOne...)
	for _, a := range v4[:4] {
		if err := s.Host.AddAddr("eth0", lab.EgressPrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 4 {
		s.until(fmt.Sprintf("one/p%d", i+1), func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
	}
	only(t, "IPv4 addresses are back", s.leaves(portFailover, target4), ofOne...)

	// An escaper that was never given the target's family is passed by.
	only(t, "IPv4 alone", s.leaves(portHalf, target4), "four")
	only(t, "IPv4 alone, for IPv6", s.leaves(portHalf, target6), ofTwo...)
	selectionCase{name: "IPv4 alone, selected for IPv6", port: portHalf, header: egress("four"), target: target6, status: 503}.check(s, false)
}

// TestRouteMistakes: what no route can be is said at load, in one go.
func TestRouteMistakes(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	for name, c := range map[string]struct{ escapers, says string }{
		"a circle of two": {`
  - {name: a, type: route_select, next: [b]}
  - {name: b, type: route_failover, next: [a]}`, "circle"},
		"a circle of one":       {"\n  - {name: a, type: route_select, next: [a]}", "itself"},
		"a circle by a default": {"\n  - {name: a, type: route_upstream, default_next: b}\n  - {name: b, type: route_client, default_next: a}", "circle"},
		"nobody":                {"\n  - {name: a, type: route_select, next: [nobody]}", "nobody"},
		"nobody by a rule":      {"\n  - {name: a, type: route_upstream, default_next: out, exact_match: [{next: nobody, hosts: [x.test]}]}", "nobody"},
		"nothing":               {"\n  - {name: a, type: route_select, next: []}", "at least one"},
		"twice":                 {"\n  - {name: a, type: route_select, next: [out, out]}", "twice"},
		"no regex":              {"\n  - {name: a, type: route_upstream, default_next: out, regex_match: [{next: out, regexes: ['(']}]}", "regex"},
	} {
		s.write("escaper:\n  - {name: out, type: direct_fixed, bind_ip: [" + lab.Primary1Of4 + "]}" + c.escapers + "\n" +
			"server:\n  - {name: web, type: http_proxy, listen: 127.0.0.1:3128, escaper: a}\n")
		out, errs, code := s.command("check", "--config", s.config)
		if code != 2 || out != "" || !strings.Contains(errs, c.says) || !strings.HasPrefix(errs, s.config+":") {
			t.Errorf("%s: %d %q %q", name, code, out, errs)
		}
	}
}
