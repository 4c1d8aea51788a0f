package main_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"wayout/scripts/lab"
)

// The fronts of selectionScene.
const (
	frontOpen   = iota // everybody, escaper out
	frontUsers         // the team, escaper out
	frontFixed         // the team, select {out: p7}
	frontChain         // the team, escaper chain: a route to out and to shut
	frontShut          // the team, escaper shut, which does not let clients choose
	frontStrict        // the team, escaper strict
	frontLocked        // the team, a route that does not let clients choose
	frontPolicy        // everybody, escaper shut, which has one path
	frontKnown         // whom the lan group knows by his network, with {out: p5}
	frontAlways        // everybody, select {out: p7}
)

// Names of the origin's addresses, in the daemon's hosts file.
const (
	name4 = "four.test"
	name6 = "six.test"
)

// selectionScene has all means to say which path, in HTTP and SOCKS alike.
func selectionScene(t *testing.T) *scene {
	t.Helper()
	s := newScene(t, true)
	s.write(selectionConfig(t))
	s.run(lab.Program{Files: map[string]string{"/etc/hosts": lab.OriginAddr4 + " " + name4 + "\n" + lab.OriginAddr6 + " " + name6 + "\n"}})
	s.serveDatagrams(t)
	if _, errs, code := s.command("drain", "out/p8", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	return s
}

func selectionConfig(t *testing.T) string {
	t.Helper()
	h := hashOf(t, "secret")
	team := selects + "user_group: team, username_params: true, escaper: "
	return outConfig(fmt.Sprintf(`  - {name: shut, type: direct_fixed, nodes: [{id: s1, ipv4: 203.0.113.14, ipv6: "2001:db8:200::14"}]}
  - {name: strict, type: direct_fixed, enable_path_selection: true, index: strict, bind_ip: ["203.0.113.11", "203.0.113.12"]}
  - {name: chain, type: route_select, enable_path_selection: true, next: [{escaper: out, weight: 1}, {escaper: shut, weight: 0}]}
  - {name: locked, type: route_select, next: [out, shut]}
user_group:
  - name: team
    users:
      - {name: alice, password: %[1]q}
      - {name: bob, password: %[1]q, egress_path: {out: p2}}
      - {name: carol, password: %[1]q, allow_path: ["out/p1", "out/*4", "chain/out"]}
      - {name: dave, password: %[1]q, egress_path: {chain: shut}}
      - {name: a-b, password: %[1]q, egress_path: {out: 6}}
  - name: lan
    users:
      - {name: nobody, from: ["0.0.0.0/0"], egress_path: {out: p1}}
      - {name: client, from: ["10.0.0.0/24", "fd00::/64"], egress_path: {out: p5}}
`, h) + fronts(selects+"open: true, escaper: out", team+"out", team+"out, select: {out: p7}", team+"chain", team+"shut", team+"strict", team+"locked",
		selects+"open: true, escaper: shut", selects+"user_group: lan, escaper: out", selects+"open: true, escaper: out, select: {out: p7}"))
}

// verdict is what a bad selection gets, by protocol.
type verdict struct{ http, kind, socks, udp string }

func verdicts() map[string]verdict {
	return map[string]verdict{
		// "malformed" of SOCKS is by the source: see said.malformed.
		"malformed":   {"400", "http_request_error", "", ""},
		"unknown":     {"400", "http_request_error", "reply 0x02", "reply 0x02"},
		"forbidden":   {"403", "http_request_denied", "reply 0x02", "reply 0x02"},
		"down":        {"503", "destination_unavailable", "reply 0x01", "reply 0x01"},
		"family":      {"502", "destination_ip_unroutable", "reply 0x08", "dropped"},
		"credentials": {"407", "http_request_denied", "authentication", "authentication"},
	}
}

// want is what a refused request is answered in a protocol. A malformed
// selection is a STATUS of the extension, and an authentication failure of the
// user name.
func (v verdict) want(p protocol, a said) string {
	switch {
	case p == forward || p == tunnel:
		return v.http
	case v.socks == "" && !strings.Contains(a.user, "-"):
		return "status 1"
	case v.socks == "":
		return "authentication"
	case p == associate:
		return v.udp
	}
	return v.socks
}

// sayCase is a request, and either the source that the origin has to see or one
// of verdicts.
type sayCase struct {
	name string
	said
	source string
	bad    string
	only   protocol // "": all
}

func (c sayCase) check(s *scene) {
	s.t.Helper()
	switch {
	case c.user == "":
	case c.bad == "credentials":
		c.password = "wrong"
	default:
		c.password = "secret"
	}
	for _, p := range protocols() {
		if c.only != "" && c.only != p {
			continue
		}
		if p == associate && verdicts()[c.bad].udp == "dropped" {
			continue // datagrams have families, associations have not: see TestAssociationFamilies
		}
		got, err := s.say(p, c.said)
		if err != nil {
			s.t.Errorf("%s, %s: %v", c.name, p, err)
			continue
		}
		if c.bad != "" {
			v := verdicts()[c.bad]
			if want := v.want(p, c.said); got.answer != want {
				s.t.Errorf("%s, %s: %s, want %s", c.name, p, got, want)
			}
			if got.header != nil && got.kind != v.kind {
				s.t.Errorf("%s, %s: Proxy-Status has %q, want %q", c.name, p, got.kind, v.kind)
			}
			if got.answer == "503" && got.header.Get("Retry-After") != "1" {
				s.t.Errorf("%s, %s: Retry-After %q", c.name, p, got.header.Get("Retry-After"))
			}
			continue
		}
		if got.answer != "ok" || got.source.Addr().String() != c.source {
			s.t.Errorf("%s, %s: %s, want %s", c.name, p, got, c.source)
		}
		if p == connect && got.bound != got.source {
			s.t.Errorf("%s: the reply tells %s, and the origin saw %s", c.name, got.bound, got.source)
		}
	}
}

// TestEverySelection says every kind of selection in HTTP and in SOCKS, for TCP
// and for UDP: the origin sees the same source.
func TestEverySelection(t *testing.T) {
	t.Parallel()
	s := selectionScene(t)
	v4, v6 := lab.Egress4(), lab.Egress6()
	for _, six := range []bool{false, true} {
		of := func(i int) string {
			if six {
				return v6[i-1].String()
			}
			return v4[i-1].String()
		}
		under := func(i int) string { return strings.ReplaceAll(of(i), ":", "_") }
		by := func(selection string) said { return said{selection: selection, six: six} }
		as := func(front int, user string) said { return said{front: front, user: user, six: six} }
		both := func(front int, user, selection string) said {
			return said{front: front, user: user, selection: selection, six: six}
		}
		for _, c := range []sayCase{
			{name: "index", said: by("3"), source: of(3)},
			{name: "index with zeros", said: by("003"), source: of(3)},
			{name: "index above", said: by("12"), source: of(3)},
			{name: "ID", said: by("p4"), source: of(4)},
			{name: "address", said: by(of(5)), source: of(5)},
			{name: "address in full", said: by(netip.MustParseAddr(of(5)).StringExpanded()), source: of(5)},
			{name: "map of ID", said: by(`{"out":"p6"}`), source: of(6)},
			{name: "map of index", said: by(`{"out": 7}`), source: of(7)},
			{name: "map of address", said: by(`{"out":"` + of(1) + `"}`), source: of(1)},

			{name: "with credentials", said: both(frontUsers, "alice", "p4"), source: of(4)},
			{name: "path by ID", said: as(frontUsers, "alice-path-p3"), source: of(3)},
			{name: "path by index", said: as(frontUsers, "alice-path-5"), source: of(5)},
			{name: "path of an escaper", said: as(frontUsers, "alice-path-out~p5"), source: of(5)},
			{name: "path of an escaper by index", said: as(frontUsers, "alice-path-out~2"), source: of(2)},
			{name: "ip", said: as(frontUsers, "alice-ip-"+under(6)), source: of(6)},
			{name: "path and its ip", said: as(frontUsers, "alice-path-p6-ip-"+under(6)), source: of(6)},
			{name: "ip and then its path", said: as(frontUsers, "alice-ip-"+under(6)+"-path-p6"), source: of(6)},
			{name: "path and session", said: as(frontUsers, "alice-path-p6-session-x-lifetime-10-strict-on"), source: of(6)},
			{name: "a BASE with a dash", said: as(frontUsers, "a-b"), source: of(6)},
			{name: "a BASE with a dash, and parameters that are weaker", said: as(frontUsers, "a-b-path-p1"), source: of(6)},

			{name: "operator's map", said: as(frontUsers, "bob"), source: of(2)},
			{name: "operator before client", said: both(frontUsers, "bob", "p5"), source: of(2)},
			{name: "operator before client, whatever he names", said: both(frontUsers, "bob", "nobody"), source: of(2)},
			{name: "operator before user name", said: as(frontUsers, "bob-path-p5"), source: of(2)},
			{name: "operator before all", said: both(frontFixed, "bob-path-p5", "p6"), source: of(2)},
			{name: "client before user name", said: both(frontUsers, "alice-path-p5", "p6"), source: of(6)},
			{name: "client before server", said: both(frontFixed, "alice", "p6"), source: of(6)},
			{name: "user name before server", said: as(frontFixed, "alice-path-p5"), source: of(5)},
			{name: "server", said: as(frontFixed, "alice"), source: of(7)},
			{name: "server, an empty map", said: both(frontFixed, "alice", "{}"), source: of(7)},
			{name: "server before session", said: as(frontFixed, "alice-session-x"), source: of(7)},
			{name: "allowed", said: both(frontUsers, "carol", "p1"), source: of(1)},
			{name: "allowed by a pattern", said: as(frontUsers, "carol-path-4"), source: of(4)},
			{name: "operator's server is not bound by what is allowed", said: as(frontFixed, "carol"), source: of(7)},

			{name: "route by ID", said: both(frontChain, "alice", `{"chain":"out","out":"p3"}`), source: of(3)},
			{name: "route by index", said: both(frontChain, "alice", `{"chain":1,"out":3}`), source: of(3)},
			{name: "route by policy", said: both(frontChain, "alice", `{"out":"p3"}`), source: of(3)},
			{name: "route by name alone", said: both(frontChain, "alice", "shut"), source: of(8)},
			{name: "escaper by escaper", said: both(frontChain, "alice-path-out~p5", `{"chain":"out"}`), source: of(5)},
			{name: "escaper by escaper, the client's other one stronger", said: both(frontChain, "alice-path-out~p5", `{"chain":"out","out":"p4"}`), source: of(4)},
			{name: "user name of the chain's", said: as(frontChain, "alice-path-out~p5"), source: of(5)},
			{name: "user name of the route", said: as(frontChain, "alice-path-shut"), source: of(8)},
			{name: "operator of the route", said: as(frontChain, "dave"), source: of(8)},
			{name: "operator of the route, client of the same", said: both(frontChain, "dave", `{"chain":"out"}`), source: of(8)},
			{name: "operator of the path behind a route", said: both(frontChain, "bob", `{"chain":"out","out":"p4"}`), source: of(2)},
			{name: "allowed on the way", said: both(frontChain, "carol", `{"chain":"out","out":"p4"}`), source: of(4)},

			{name: "policy", said: as(frontShut, "alice"), source: of(8)},
			{name: "policy, no users", said: said{front: frontPolicy, six: six}, source: of(8)},
			{name: "policy, an empty map where selection is off", said: both(frontShut, "alice", "{}"), source: of(8)},
		} {
			c.check(s)
		}
	}
	ours := map[netip.Addr]bool{}
	for i := range v4 {
		ours[v4[i]], ours[v6[i]] = true, true
	}
	for a, n := range s.origin.Sources() {
		if !ours[a] {
			t.Errorf("%d requests came from %s", n, a)
		}
	}
}

// TestBadSelections goes through the table of what a bad selection gets: HTTP,
// SOCKS and UDP refuse in the same cases.
func TestBadSelections(t *testing.T) {
	t.Parallel()
	s := selectionScene(t)
	v4, v6 := lab.Egress4(), lab.Egress6()
	by := func(selection string) said { return said{selection: selection} }
	as := func(user string) said { return said{front: frontUsers, user: user} }
	at := func(front int, user, selection string) said {
		return said{front: front, user: user, selection: selection}
	}
	six := func(a said) said { a.six = true; return a }
	under := func(a netip.Addr) string { return strings.ReplaceAll(a.String(), ":", "_") }
	before := s.origin.Sources()
	for _, c := range []sayCase{
		{name: "broken map", said: by("{"), bad: "malformed"},
		{name: "number over 64 bits", said: by("18446744073709551616"), bad: "malformed"},
		{name: "duplicate key", said: by(`{"out":1,"out":1}`), bad: "malformed"},
		{name: "null", said: by(`{"out":null}`), bad: "malformed"},
		{name: "fraction", said: by(`{"out":1.0}`), bad: "malformed"},
		{name: "inner object", said: by(`{"out":{"ip":"198.51.100.11"}}`), bad: "malformed"},
		{name: "only spaces", said: by("   "), bad: "malformed"},
		{name: "malformed, and the operator decides", said: at(frontUsers, "bob", "{"), bad: "malformed"},
		{name: "malformed where selection is off", said: at(frontPolicy, "", "{"), bad: "malformed"},

		{name: "empty value", said: as("alice-path--session-x"), bad: "malformed"},
		{name: "twice", said: as("alice-path-p1-path-p1"), bad: "malformed"},
		{name: "twice, by an alias", said: as("alice-session-x-sid-x"), bad: "malformed"},
		{name: "lifetime without session", said: as("alice-lifetime-10"), bad: "malformed"},
		{name: "strict without session", said: as("alice-strict-on"), bad: "malformed"},
		{name: "strict of another word", said: as("alice-session-x-strict-yes"), bad: "malformed"},
		{name: "lifetime 0", said: as("alice-session-x-lifetime-0"), bad: "malformed"},
		{name: "no address", said: as("alice-ip-p1"), bad: "malformed"},
		{name: "a character", said: as("alice-session-a+b"), bad: "malformed"},
		{name: "a long value", said: as("alice-session-" + strings.Repeat("x", 65)), bad: "malformed"},
		{name: "index over 64 bits", said: as("alice-path-18446744073709551616"), bad: "malformed"},
		{name: "path with another's ip", said: as("alice-path-p1-ip-" + v4[1].String()), bad: "malformed"},
		{name: "path with nobody's ip", said: as("alice-path-p1-ip-192.0.2.9"), bad: "malformed"},
		{name: "path with another's IPv6", said: as("alice-path-p1-ip-" + under(v6[1])), bad: "malformed"},
		{name: "malformed, and the operator decides", said: as("bob-path-p1-path-p1"), bad: "malformed"},

		{name: "wrong password", said: at(frontUsers, "alice", "p1"), bad: "credentials"},
		{name: "wrong password before what is malformed", said: as("alice-path-p1-path-p1"), bad: "credentials"},
		{name: "wrong password before what is unknown", said: at(frontUsers, "alice", "nobody"), bad: "credentials"},
		{name: "nothing behind the key is the name", said: as("alice-path"), bad: "credentials"},
		{name: "keys have one case", said: as("alice-PATH-p1"), bad: "credentials"},
		{name: "unknown user with parameters", said: as("mallory-path-p1"), bad: "credentials"},

		{name: "unknown escaper", said: by(`{"in":1}`), bad: "unknown"},
		{name: "unknown ID", said: by("p77"), bad: "unknown"},
		{name: "ID in another case", said: by("P1"), bad: "unknown"},
		{name: "signed", said: by("+1"), bad: "unknown"},
		{name: "address of no node", said: by("198.51.100.99"), bad: "unknown"},
		{name: "IPv6 address of no node", said: by("2001:db8:100::99"), bad: "unknown"},
		{name: "address of another escaper's node", said: at(frontStrict, "alice", v4[0].String()), bad: "unknown"},
		{name: "strict index 0", said: at(frontStrict, "alice", "0"), bad: "unknown"},
		{name: "strict index above", said: at(frontStrict, "alice", "3"), bad: "unknown"},
		{name: "an escaper that is not passed", said: by(`{"strict":1}`), bad: "unknown"},
		{name: "a good one and one that is not passed", said: by(`{"out":"p1","strict":1}`), bad: "unknown"},
		{name: "the branch that is not taken", said: at(frontChain, "alice", `{"chain":"shut","out":"p1"}`), bad: "unknown"},
		{name: "selection is off", said: at(frontShut, "alice", "s1"), bad: "unknown"},
		{name: "selection is off on the way", said: at(frontChain, "alice", `{"chain":"shut","shut":"s1"}`), bad: "unknown"},
		{name: "the route has it off", said: at(frontLocked, "alice", `{"locked":"out"}`), bad: "unknown"},
		{name: "unknown before off", said: at(frontShut, "alice", "s2"), bad: "unknown"},
		{name: "path unknown", said: as("alice-path-p77"), bad: "unknown"},
		{name: "ip of no node", said: as("alice-ip-198.51.100.99"), bad: "unknown"},
		{name: "path of an unknown escaper", said: as("alice-path-in~p1"), bad: "unknown"},
		{name: "path of an escaper that is not passed", said: as("alice-path-strict~1"), bad: "unknown"},
		{name: "path where selection is off", said: at(frontShut, "alice-path-s1", ""), bad: "unknown"},
		{name: "path, strict index", said: at(frontStrict, "alice-path-3", ""), bad: "unknown"},

		{name: "not allowed", said: at(frontUsers, "carol", "p2"), bad: "forbidden"},
		{name: "not allowed by index", said: at(frontUsers, "carol", "2"), bad: "forbidden"},
		{name: "not allowed by address", said: at(frontUsers, "carol", v6[1].String()), bad: "forbidden"},
		{name: "not allowed in a map", said: at(frontUsers, "carol", `{"out":"p2"}`), bad: "forbidden"},
		{name: "path not allowed", said: as("carol-path-p2"), bad: "forbidden"},
		{name: "ip not allowed", said: as("carol-ip-" + v4[1].String()), bad: "forbidden"},
		{name: "a route not allowed", said: at(frontChain, "carol", "shut"), bad: "forbidden"},
		{name: "unknown before not allowed", said: at(frontUsers, "carol", "p77"), bad: "unknown"},
		{name: "not allowed before down", said: at(frontUsers, "carol", "p8"), bad: "forbidden"},

		{name: "draining", said: by("p8"), bad: "down"},
		{name: "draining by index", said: by("8"), bad: "down"},
		{name: "draining by address", said: by(v4[7].String()), bad: "down"},
		{name: "draining by user name", said: as("alice-path-p8"), bad: "down"},
		{name: "down before the filter", said: said{selection: "p8", target: "127.0.0.1:80"}, bad: "down"},

		{name: "no family", said: six(by("p9")), bad: "family"},
		{name: "no family of the address", said: six(by(v4[0].String())), bad: "family"},
		{name: "no family by user name", said: six(as("alice-path-p9")), bad: "family"},
		{name: "no family of the ip", said: six(as("alice-ip-" + v4[0].String())), bad: "family"},
		{name: "no family of the path's ip", said: six(as("alice-path-p1-ip-" + v4[0].String())), bad: "family"},
		{name: "IPv4 to an IPv6 address", said: by(v6[0].String()), bad: "family"},
	} {
		c.check(s)
	}
	for a, n := range s.origin.Sources() {
		if n != before[a] {
			t.Errorf("%d requests came from %s, and all were to be refused", n-before[a], a)
		}
	}
	// The destination is judged after the selection, and alike.
	for _, target := range []string{"127.0.0.1:80", "[::1]:80", lab.HostAddr4 + ":80", "[::ffff:127.0.0.1]:80"} {
		for _, p := range []protocol{forward, tunnel, connect} {
			got, err := s.say(p, said{selection: "p1", target: target})
			if err != nil || got.answer != map[bool]string{true: "reply 0x02", false: "403"}[p == connect] {
				t.Errorf("%s to %s: %s, %v", p, target, got, err)
			}
		}
	}
	for _, c := range []struct{ target, http, socks string }{
		{lab.OriginAddr4 + ":81", "502", "reply 0x05"},
	} {
		for _, p := range []protocol{forward, tunnel, connect} {
			got, err := s.say(p, said{selection: "p1", target: c.target})
			if want := map[bool]string{true: c.socks, false: c.http}[p == connect]; err != nil || got.answer != want {
				t.Errorf("%s to %s: %s, %v, want %s", p, c.target, got, err, want)
			}
		}
	}
}
