package config_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"wayout/router/config"
	"wayout/selection"
)

// route is a file of an escaper r with these words on line 1, and of escapers that it may name.
func route(words string) string {
	return "escaper: [{name: r, " + words + "},\n" +
		" {name: out, type: direct_fixed, bind_ip: 192.0.2.1},\n" +
		" {name: dyn, type: direct_float}]\n"
}

// proxy is the same for an escaper p of peers.
func proxy(typ, words string) string {
	return "escaper: [{name: p, type: " + typ + ", " + words + "},\n" +
		" {name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1}, {id: net, ipv4: 198.51.100.0/24}]},\n" +
		" {name: dyn, type: direct_float}]\n"
}

func userOf(words string) string {
	return "escaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1}, {name: dyn, type: direct_float}," +
		" {name: r, type: route_select, index: strict, next: [out, dyn]}, {name: p, type: proxy_socks5, nodes: [{id: p1, addr: 'x:1'}]}]\n" +
		"user_group: [{name: g, users: [{name: u, " + words + "}]}]\n"
}

func serverOf(words string) string {
	return "escaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1}, {name: two, type: direct_fixed, bind_ip: 192.0.2.1}," +
		" {name: r, type: route_mapping, next: [out]}]\n" +
		"server: [{name: s, " + words + "}]\n"
}

func TestRouteMistakes(t *testing.T) {
	const (
		up  = "type: route_upstream, default_next: out, "
		cl  = "type: route_client, default_next: out, "
		two = "is matched already, see line 1"
	)
	dns := func(words string) string { return "resolver: [{name: d, type: dns, " + words + "}]" }
	tests := []struct {
		name, text string
		want       []string
	}{
		// Keys of types.
		{"a key of another type", route("type: route_select, next: [out], default_next: out, cache: /x"), []string{
			`1: escaper[0].default_next: is not a key of route_select, got "default_next"`,
			`1: escaper[0].cache: is not a key of route_select, got "cache"`,
		}},
		{"nodes of a route", route("type: route_failover, next: [out], nodes: []"), []string{`1: escaper[0].nodes: is not a key of route_failover, got "nodes"`}},
		{"next of a direct", "escaper: [{name: a, type: direct_fixed, bind_ip: 192.0.2.1, next: [a]}]", []string{`1: escaper[0].next: is not a key of direct_fixed, got "next"`}},
		{"nothing of what is needed", route("type: route_upstream"), []string{`1: escaper[0].default_next: is required, got ""`}},
		{"no next", route("type: route_mapping"), []string{`1: escaper[0].next: is required, got ""`}},
		{"no peers", proxy("proxy_http", "pass_selection: on"), []string{`1: escaper[0].nodes: is required, got ""`}},
		{"near another type's key", route("type: route_select, next: [out], cach: /x"), []string{`1: escaper[0].cach: unknown key, got "cach"`}},
		{"server for a system resolver", "resolver: [{name: s, type: system, server: 192.0.2.1}]", []string{`1: resolver[0].server: is not a key of system, got "server"`}},
		{"no server", "resolver: [{name: d, type: dns}]", []string{`1: resolver[0].server: is required, got ""`}},
		{"HTTP's keys", serverOf("type: socks_proxy, listen: 127.0.0.1:1, escaper: out, path_selection_header: X-A, report_egress: on, rsp_header_max_count: 8"), []string{
			`2: server[0].path_selection_header: is not a key of socks_proxy, got "path_selection_header"`,
			`2: server[0].report_egress: is not a key of socks_proxy, got "report_egress"`,
			`2: server[0].rsp_header_max_count: is not a key of socks_proxy, got "rsp_header_max_count"`,
		}},
		{"SOCKS's keys", serverOf("type: http_proxy, listen: 127.0.0.1:1, escaper: out, socks_extension: on, udp_idle_timeout: 5s"), []string{
			`2: server[0].socks_extension: is not a key of http_proxy, got "socks_extension"`,
			`2: server[0].udp_idle_timeout: is not a key of http_proxy, got "udp_idle_timeout"`,
		}},

		// Resolvers.
		{"name servers", dns("server: [192.0.2.53, name.example, '192.0.2.53:53', '192.0.2.1:0', '[::1', 0.0.0.0, 'fe80::1', '::ffff:192.0.2.1']"), []string{
			`1: resolver[0].server[1]: want the address of a name server, IP or IP:PORT, got "name.example"`,
			`1: resolver[0].server[2]: is given twice, got "192.0.2.53:53"`,
			`1: resolver[0].server[3]: a port is 1 to 65535, got "192.0.2.1:0"`,
			`1: resolver[0].server[4]: want the address of a name server, IP or IP:PORT, got "[::1"`,
			`1: resolver[0].server[5]: the unspecified address is not one to send from or to, got "0.0.0.0"`,
			`1: resolver[0].server[6]: a link-local address needs its interface, as in fe80::1%eth0, got "fe80::1"`,
			`1: resolver[0].server[7]: write the IPv4 address as 192.0.2.1, got "::ffff:192.0.2.1"`,
		}},
		{"no name servers", dns("server: []"), []string{`1: resolver[0].server: want at least one address, got "[...]"`}},
		{"bind", dns("server: 192.0.2.1, bind: eth0"), []string{`1: resolver[0].bind: want path, got "eth0"`}},
		{"serve_stale", dns("server: 192.0.2.1, serve_stale: 8d"), []string{`1: resolver[0].serve_stale: is out of range 0s to 7d, got "8d"`}},
		{"hosts", dns("server: 192.0.2.1,\n hosts: {a.b: 192.0.2.1, A.B.: 192.0.2.2, 'a b': 192.0.2.1, x: [], y: ['::1', '::1', z], 1.2: 192.0.2.1, -a: 192.0.2.1, bücher: 192.0.2.1, [q]: 192.0.2.1}"), []string{
			`2: resolver[0].hosts.A.B.: is given twice, first on line 2, got "A.B."`,
			`2: resolver[0].hosts."a b": want a host name: labels of letters, digits, - and _ between dots, got "a b"`,
			`2: resolver[0].hosts.x: want at least one address, got "[...]"`,
			`2: resolver[0].hosts.y[1]: is given twice, got "::1"`,
			`2: resolver[0].hosts.y[2]: want an IP address, got "z"`,
			`2: resolver[0].hosts.1.2: a host name does not end in a number, got "1.2"`,
			`2: resolver[0].hosts.-a: want a host name: labels of letters, digits, - and _ between dots, got "-a"`,
			`2: resolver[0].hosts.bücher: want a host name in its ASCII form (xn--...), got "bücher"`,
			`2: resolver[0].hosts: a key has to be a host name, got "[...]"`,
		}},
		{"hosts, a list", dns("server: 192.0.2.1, hosts: [a]"), []string{`1: resolver[0].hosts: want a map of names and addresses, got "[...]"`}},

		// Routes.
		{"next, unknown", route("type: route_select, next: [out, {escaper: nope, weight: 2}, nope2]"), []string{
			`1: escaper[0].next[1].escaper: no escaper has this name, got "nope"`,
			`1: escaper[0].next[2]: no escaper has this name, got "nope2"`,
		}},
		{"next, empty", route("type: route_select, next: []"), []string{`1: escaper[0].next: want at least one escaper, got "[...]"`}},
		{"next, a word", route("type: route_select, next: out"), []string{`1: escaper[0].next: want a list, got "out"`}},
		{"next, twice", route("type: route_mapping, next: [out, dyn, {escaper: out}]"), []string{`1: escaper[0].next[2].escaper: is given twice, first on line 1, got "out"`}},
		{"next, no escaper", route("type: route_mapping, next: [{weight: 2}]"), []string{`1: escaper[0].next[0].escaper: is required, got ""`}},
		{"next, weight", route("type: route_select, next: [{escaper: out, weight: 65536}]"), []string{`1: escaper[0].next[0].weight: is out of range 0 to 65535, got "65536"`}},
		{"next, weight where there is none", route("type: route_failover, next: [{escaper: out, weight: 2}]"), []string{
			`1: escaper[0].next[0].weight: a route_failover takes its escapers in order: it has no weights, got "2"`,
		}},
		{"next, both names", route("type: route_select, next: [out], next_nodes: [out]"), []string{
			`1: escaper[0].next_nodes: means the same as next on line 1: give one of them, got "next_nodes"`,
		}},
		{"hosts of a rule", route(up + "exact_match: [{next: out, hosts: ['a b', '::ffff:1.2.3.4', x]}, {next: dyn, hosts: X.}]"), []string{
			`1: escaper[0].exact_match[0].hosts[0]: want a host name: labels of letters, digits, - and _ between dots, got "a b"`,
			`1: escaper[0].exact_match[0].hosts[1]: write the IPv4 address as 1.2.3.4, got "::ffff:1.2.3.4"`,
			`1: escaper[0].exact_match[1].hosts: ` + two + `, got "X."`,
		}},
		{"one address, two spellings", route(up + "exact_match: [{next: out, hosts: ['2001:db8::1', '2001:DB8:0::1']}]"), []string{
			`1: escaper[0].exact_match[0].hosts[1]: ` + two + `, got "2001:DB8:0::1"`,
		}},
		{"a rule that leads nowhere", route(up + "exact_match: [{hosts: [x]}, {next: nope, hosts: [y]}, {next: out}, {next: out, hosts: []}]"), []string{
			`1: escaper[0].exact_match[0].next: is required, got ""`,
			`1: escaper[0].exact_match[2].hosts: is required, got ""`,
			`1: escaper[0].exact_match[3].hosts: want at least one, got "[...]"`,
			`1: escaper[0].exact_match[1].next: no escaper has this name, got "nope"`,
		}},
		{"another rule's list", route(up + "child_match: [{next: out, hosts: [x]}]"), []string{
			`1: escaper[0].child_match[0].hosts: unknown key, got "hosts"`,
			`1: escaper[0].child_match[0].domains: is required, got ""`,
		}},
		{"domains", route(up + "suffix_match: [{next: out, domains: [192.0.2.1, .example.org, example.org, EXAMPLE.org]}]"), []string{
			`1: escaper[0].suffix_match[0].domains[0]: a host name does not end in a number, got "192.0.2.1"`,
			`1: escaper[0].suffix_match[0].domains[1]: want a host name: labels of letters, digits, - and _ between dots, got ".example.org"`,
			`1: escaper[0].suffix_match[0].domains[3]: ` + two + `, got "EXAMPLE.org"`,
		}},
		{"subnets", route(up + "subnet_match: [{next: out, subnets: [10.0.0.0/8, 10.1.2.3/16, private, 10.0.0.0/8]}, {next: dyn, subnets: 10.0.0.0/8}]"), []string{
			`1: escaper[0].subnet_match[0].subnets[1]: has bits beyond its length, perhaps 10.1.0.0/16, got "10.1.2.3/16"`,
			`1: escaper[0].subnet_match[0].subnets[2]: want a network or an address, got "private"`,
			`1: escaper[0].subnet_match[0].subnets[3]: is given twice, got "10.0.0.0/8"`,
			`1: escaper[0].subnet_match[1].subnets: ` + two + `, got "10.0.0.0/8"`,
		}},
		{"regexes", route(up + "regex_match: [{next: out, regexes: ['(', 'a)|(b', '', 'a', 'a']}]"), []string{
			"1: escaper[0].regex_match[0].regexes[0]: missing closing ): `(`, got \"(\"",
			"1: escaper[0].regex_match[0].regexes[1]: unexpected ): `a)|(b`, got \"a)|(b\"",
			`1: escaper[0].regex_match[0].regexes[2]: is empty, got ""`,
			`1: escaper[0].regex_match[0].regexes[4]: ` + two + `, got "a"`,
		}},
		{"users of a rule", route(cl+"user_match: [{next: out, users: [u, v, 'a:b']}]") + "user_group: [{name: g, users: [{name: u, from: 10.0.0.0/8}]}]", []string{
			`1: escaper[0].user_match[0].users[2]: a user name holds no colon, got "a:b"`,
			`1: escaper[0].user_match[0].users[1]: no user has this name, got "v"`,
		}},
		{"to itself", route("type: route_select, next: [out, r]"), []string{`1: escaper[0].next[1]: an escaper may not route to itself, got "r"`}},
		{"default to itself", route("type: route_client, default_next: r"), []string{`1: escaper[0].default_next: an escaper may not route to itself, got "r"`}},
		{"cycle", "escaper:\n - {name: a, type: route_select, next: [b]}\n - {name: b, type: route_upstream, exact_match: [{next: c, hosts: x}], default_next: out}\n" +
			" - {name: c, type: route_failover, next: [out,\n    {escaper: b}]}\n - {name: out, type: direct_fixed, bind_ip: 192.0.2.1}", []string{
			`5: escaper[2].next[1].escaper: routes in a circle: b -> c -> b, got "b"`,
		}},
		{"two cycles", "escaper:\n - {name: a, type: route_select, next: [b, c]}\n - {name: b, type: route_select, next: [a]}\n - {name: c, type: route_select, next: [a]}", []string{
			`3: escaper[1].next[0]: routes in a circle: a -> b -> a, got "a"`,
			`4: escaper[2].next[0]: routes in a circle: a -> c -> a, got "a"`,
		}},
		{"resolve_strategy", "escaper: [{name: a, type: direct_float, resolve_strategy: ipv4}]", []string{
			`1: escaper[0].resolve_strategy: want any, ipv4_only, ipv6_only, ipv4_first or ipv6_first, got "ipv4"`,
		}},
		{"cache", "escaper: [{name: a, type: direct_float, cache: dyn.json}]", []string{`1: escaper[0].cache: want the whole path of a file, from /, got "dyn.json"`}},
		{"the pins of a direct_float", "uplink: [{name: u, interface: eth0}]\nescaper: [{name: a, type: direct_float, interface: eth1, uplink: u}]", []string{
			`2: escaper[0].interface: contradicts uplink u, whose interface is eth0, got "eth1"`,
		}},

		// Peers.
		{"no addr", proxy("proxy_http", "nodes: [{id: a}]"), []string{`1: escaper[0].nodes[0].addr: is required, got ""`}},
		{"addr", proxy("proxy_http", "nodes: [{addr: x}, {addr: 'x:0'}, {addr: 'x y:1'}, {addr: '2001:db8::1:80'}, {addr: 'x:65536'}, {addr: '0.0.0.0:1'}, {addr: ':1'}]"), []string{
			`1: escaper[0].nodes[0].addr: want HOST:PORT, with an IPv6 address in brackets, got "x"`,
			`1: escaper[0].nodes[1].addr: a port is 1 to 65535, got "x:0"`,
			`1: escaper[0].nodes[2].addr: want a host name: labels of letters, digits, - and _ between dots, got "x y:1"`,
			`1: escaper[0].nodes[3].addr: want HOST:PORT, with an IPv6 address in brackets, got "2001:db8::1:80"`,
			`1: escaper[0].nodes[4].addr: a port is 1 to 65535, got "x:65536"`,
			`1: escaper[0].nodes[5].addr: the unspecified address is not one to send from or to, got "0.0.0.0:1"`,
			`1: escaper[0].nodes[6].addr: want a host name: labels of letters, digits, - and _ between dots, got ":1"`,
		}},
		{"an address that is no name", proxy("proxy_http", "nodes: [{addr: '[2001:db8::1]:80'}]"), []string{`1: escaper[0].nodes[0].id: is required where addr is no name, got ""`}},
		{"one ID", proxy("proxy_http", "nodes: [{id: a, addr: 'x:1'}, {id: a, addr: 'x:2'}, {addr: 'x:3'}, {addr: 'X:3'}]"), []string{
			`1: escaper[0].nodes[1].id: is the ID of the node on line 1 too, got "a"`,
			`1: escaper[0].nodes[3].addr: is the ID of the node on line 1 too, got "X:3"`,
		}},
		{"empty list", proxy("proxy_socks5", "nodes: []"), []string{`1: escaper[0].nodes: want at least one node, got "[...]"`}},
		{"an address node", proxy("proxy_socks5", "nodes: [{id: a, ipv4: 192.0.2.1}]"), []string{
			`1: escaper[0].nodes[0].ipv4: unknown key, got "ipv4"`,
			`1: escaper[0].nodes[0].addr: is required, got ""`,
		}},
		{"credentials", proxy("proxy_http", "nodes: [{addr: 'a:1', username: u}, {addr: 'a:2', password: secret}, {addr: 'a:3', username: 'a:b', password: ''}, {addr: 'a:4', username: \"a\\nb\", password: [secret]}]"), []string{
			`1: escaper[0].nodes[2].password: is empty, got "(hidden)"`,
			`1: escaper[0].nodes[3].username: holds a control character, got "(hidden)"`,
			`1: escaper[0].nodes[3].password: want a single value, got "(hidden)"`,
			`1: escaper[0].nodes[0].password: is required beside username, got ""`,
			`1: escaper[0].nodes[1].username: is required beside password, got ""`,
			`1: escaper[0].nodes[2].username: must hold no colon: Basic authentication ends the name there, got "(hidden)"`,
		}},
		{"paths", proxy("proxy_socks5", "nodes: [{addr: 'a:1', path: out/b}, {addr: 'a:2', path: nope/a}, {addr: 'a:3', path: dyn/x}, {addr: 'a:4', path: p/x}, {addr: 'a:5', path: out}, {addr: 'a:6', path: out/198.51.100.7}]"), []string{
			`1: escaper[0].nodes[4].path: want ESCAPER/ID, got "out"`,
			`1: escaper[0].nodes[0].path: escaper out has no node with the ID b, got "out/b"`,
			`1: escaper[0].nodes[1].path: no escaper has the name nope, got "nope/a"`,
			`1: escaper[0].nodes[2].path: a path of a direct_float may not exist: want one of a direct_fixed, got "dyn/x"`,
			`1: escaper[0].nodes[3].path: want a path of a direct_fixed, and p is a proxy_socks5, got "p/x"`,
			`1: escaper[0].nodes[5].path: escaper out has no node with the ID 198.51.100.7, got "out/198.51.100.7"`,
		}},
		{"TLS of a plain proxy", proxy("proxy_http", "nodes: [{addr: 'a:1'}], tls_name: x"), []string{`1: escaper[0].tls_name: is not a key of proxy_http, got "tls_name"`}},
		{"header of SOCKS", proxy("proxy_socks5", "nodes: [{addr: 'a:1'}], path_selection_header: X-A"), []string{
			`1: escaper[0].path_selection_header: is not a key of proxy_socks5, got "path_selection_header"`,
		}},

		// Users.
		{"from", userOf("from: [10.0.0.0/8, 10.1.2.3/8, private, 10.0.0.0/8]"), []string{
			`2: user_group[0].users[0].from[1]: has bits beyond its length, perhaps 10.0.0.0/8, got "10.1.2.3/8"`,
			`2: user_group[0].users[0].from[2]: want a network or an address, got "private"`,
			`2: user_group[0].users[0].from[3]: is given twice, got "10.0.0.0/8"`,
		}},
		{"from nowhere", userOf("from: []"), []string{`2: user_group[0].users[0].from: want at least one network, got "[...]"`}},
		{"one network, two users", userOf("from: [10.0.0.0/8, 192.0.2.1]}, {name: v, from: 192.0.2.1/32}, {name: w, password: '" + hash + "', from: 192.0.2.1"), []string{
			`2: user_group[0].users[1].from: is a network of the user on line 2 too, got "192.0.2.1/32"`,
		}},
		{"limits", userOf("from: 10.0.0.0/8, limits: {connections: 0, rate: 0/s, bandwidth: 100}"), []string{
			`2: user_group[0].users[0].limits.connections: is out of range 1 to 1000000000, got "0"`,
			`2: user_group[0].users[0].limits.rate: is out of range 1 to 1000000000, got "0/s"`,
			`2: user_group[0].users[0].limits.bandwidth: is out of range 8kbit/s to 1000Gbit/s, got "100"`,
		}},
		{"rate", userOf("from: 10.0.0.0/8, limits: {rate: 5/d, bandwidth: 5MB}"), []string{
			`2: user_group[0].users[0].limits.rate: want a rate such as 200/s, 60/m or 1000/h, got "5/d"`,
			`2: user_group[0].users[0].limits.bandwidth: want a bandwidth such as 100Mbit/s, 500kbit/s or 1Gbit/s, got "5MB"`,
		}},
		{"egress_path, routes and peers", userOf("from: 10.0.0.0/8, egress_path: {r: nope, p: p2}}, {name: v, from: 10.1.0.0/16, egress_path: {r: 3}"), []string{
			`2: user_group[0].users[0].egress_path.r: is no node of escaper r (1 to 2 by index, or the name of a next escaper), got "nope"`,
			`2: user_group[0].users[0].egress_path.p: is no node of escaper p (1 to 1 by index, or an ID), got "p2"`,
			`2: user_group[0].users[1].egress_path.r: is no node of escaper r (1 to 2 by index, or the name of a next escaper), got "3"`,
		}},
		{"inline", userOf("from: 10.0.0.0/8, egress_path: {dyn: {ip: x, expire: soon, uplink: nope, Ip: y, [a]: b, id: a, id: b}}"), []string{
			`2: user_group[0].users[0].egress_path.dyn: a key has to be a word, got "[...]"`,
			`2: user_group[0].users[0].egress_path.dyn.id: is given twice, first on line 2, got "id"`,
			`2: user_group[0].users[0].egress_path.dyn.ip: want an IP address, got "x"`,
			`2: user_group[0].users[0].egress_path.dyn.expire: want RFC 3339, as 2026-01-31T12:00:00Z, got "soon"`,
			`2: user_group[0].users[0].egress_path.dyn.Ip: write the key as ip, got "y"`,
			`2: user_group[0].users[0].egress_path.dyn.uplink: no uplink has this name, got "nope"`,
		}},
		{"inline, as JSON", userOf(`from: 10.0.0.0/8, egress_path: '{"dyn": {"ip": "x", "a": 1}, "out": {"ip": "192.0.2.1"}, "nope": {"ip": "192.0.2.1"}, "dyn": 1}'`), []string{
			`2: user_group[0].users[0].egress_path: dyn: a: want a string, got "1", got "{\"dyn\": {\"ip\": \"x\", \"a\": 1}, \"out\": {\"ip\": \"192.0.2.1\"}, \"nope\": {\"ip\": \"192.0.2..."`,
			`2: user_group[0].users[0].egress_path: dyn: ip: want an IP address, got "x", got "{\"dyn\": {\"ip\": \"x\", \"a\": 1}, \"out\": {\"ip\": \"192.0.2.1\"}, \"nope\": {\"ip\": \"192.0.2..."`,
			`2: user_group[0].users[0].egress_path: "dyn" is given twice, got "{\"dyn\": {\"ip\": \"x\", \"a\": 1}, \"out\": {\"ip\": \"192.0.2.1\"}, \"nope\": {\"ip\": \"192.0.2..."`,
			`2: user_group[0].users[0].egress_path.nope: no escaper has this name, got "nope"`,
			`2: user_group[0].users[0].egress_path.out: a node itself is for a direct_float, and out is a direct_fixed, got "{...}"`,
		}},
		{"inline, link-local", userOf("from: 10.0.0.0/8, egress_path: {dyn: {ip: 'fe80::1'}}"), []string{
			`2: user_group[0].users[0].egress_path.dyn: a link-local address needs an uplink, got "fe80::1"`,
		}},

		// Servers.
		{"select", serverOf("type: http_proxy, listen: 127.0.0.1:1, escaper: out, select: best"), []string{`2: server[0].select: want ingress_ip, port or a map of escapers, got "best"`}},
		{"select, one port", serverOf("type: http_proxy, listen: 127.0.0.1:1, escaper: out, select: port"), []string{
			`2: server[0].select: needs a range of ports in listen, or several of them, got "port"`,
		}},
		{"select, unknown", serverOf("type: http_proxy, listen: 127.0.0.1:1, escaper: r, select: {out: 192.0.2.9, nope: 1, two: 1}"), []string{
			`2: server[0].select.out: is no node of escaper out (1 to 1 by index, or an ID or address), got "192.0.2.9"`,
			`2: server[0].select.nope: no escaper has this name, got "nope"`,
			`2: server[0].select.two: no request of this server passes this escaper: it begins at r, got "two"`,
		}},
		{"select, a node itself", serverOf("type: http_proxy, listen: 127.0.0.1:1, escaper: out, select: {out: {ip: 192.0.2.1}}"), []string{
			`2: server[0].select.out: want the ID or address of a node, or its index as a number, got "{...}"`,
		}},
		{"username_params without users", serverOf("type: socks_proxy, listen: 127.0.0.1:1, escaper: out, username_params: on"), []string{
			`2: server[0].username_params: needs a user_group: without one nobody has a user name, got "on"`,
		}},
		{"ranges of ports", serverOf("type: http_proxy, escaper: out, listen: ['127.0.0.1:5-4', '127.0.0.1:0-4', '127.0.0.1:1-65536', '127.0.0.1:1-', '127.0.0.1:-1', '127.0.0.1:1-2-3']"), []string{
			`2: server[0].listen[0]: the range ends before it begins, got "127.0.0.1:5-4"`,
			`2: server[0].listen[1]: a range of ports begins at 1 or above, got "127.0.0.1:0-4"`,
			`2: server[0].listen[2]: a port is 0 to 65535, got "127.0.0.1:1-65536"`,
			`2: server[0].listen[3]: want IP:PORT, or :PORT for all addresses, got "127.0.0.1:1-"`,
			`2: server[0].listen[4]: want IP:PORT, or :PORT for all addresses, got "127.0.0.1:-1"`,
			`2: server[0].listen[5]: want IP:PORT, or :PORT for all addresses, got "127.0.0.1:1-2-3"`,
		}},
		{"ranges that meet", serverOf("type: http_proxy, escaper: out, listen: ['127.0.0.1:10-20', '127.0.0.1:15-30', '127.0.0.1:25']"), []string{
			`2: server[0].listen[1]: is listened on by server[0].listen[0] (line 2) already, got "127.0.0.1:15-30"`,
		}},
		{"too many ports", serverOf("type: http_proxy, escaper: out, listen: ['127.0.0.1:1-65535', '127.0.0.2:1-2']"), []string{
			`2: server[0].listen[1]: the file listens on more than 65536 ports, got "127.0.0.2:1-2"`,
		}},
		{"metrics on a range", "metrics: {listen: '127.0.0.1:1-2'}", []string{`1: metrics.listen: want one port, got "127.0.0.1:1-2"`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantMistakes(t, tt.text, tt.want...) })
	}
}

func TestPrefixMistakes(t *testing.T) {
	node := func(words string) string {
		return "escaper:\n- name: out\n  type: direct_fixed\n  nodes:\n  - {id: a, ipv4: 192.0.2.1}\n  - {id: b, ipv4: 10.0.0.0/16, ipv6: '2001:db8:1::/48'}\n  - {" + words + "}\n"
	}
	bind := func(list string) string { return "escaper: [{name: out, type: direct_fixed, bind_ip: [" + list + "]}]" }
	tests := []struct {
		name, text string
		want       []string
	}{
		{"too short", node("id: c, ipv4: 10.0.0.0/7, ipv6: '2001:db8::/47'"), []string{
			`7: escaper[0].nodes[2].ipv4: a prefix is at most a /8, got "10.0.0.0/7"`,
			`7: escaper[0].nodes[2].ipv6: a prefix is at most a /48, got "2001:db8::/47"`,
		}},
		{"host bits", node("id: c, ipv6: '2001:db8::1/64'"), []string{`7: escaper[0].nodes[2].ipv6: has bits beyond its length, perhaps 2001:db8::/64, got "2001:db8::1/64"`}},
		{"mapped", node("id: c, ipv6: '::ffff:10.0.0.0/120'"), []string{`7: escaper[0].nodes[2].ipv6: write the IPv4 prefix as IPv4, got "::ffff:10.0.0.0/120"`}},
		{"nothing to send from", node("id: c, ipv4: 224.0.0.0/8"), []string{`7: escaper[0].nodes[2].ipv4: a multicast address is not one to send from or through, got "224.0.0.0/8"`}},
		{"broadcast", node("id: c, ipv4: 255.255.255.0/24"), []string{`7: escaper[0].nodes[2].ipv4: the broadcast address is not one to send from or through, got "255.255.255.0/24"`}},
		{"unspecified", node("id: c, ipv6: '::/48'"), []string{`7: escaper[0].nodes[2].ipv6: the unspecified address is not one to send from or to, got "::/48"`}},
		{"family", node("id: c, ipv4: '2001:db8::/64'"), []string{`7: escaper[0].nodes[2].ipv4: want an IPv4 address, got "2001:db8::/64"`}},
		{"beside a range", node("id: c, ipv4: 192.0.2.8-192.0.2.9, ipv6: '2001:db8::/64'"), []string{
			`7: escaper[0].nodes[2].ipv6: 1 addresses beside 2 in ipv4: they have to be as many, got "2001:db8::/64"`,
		}},
		{"around an address", node("id: c, ipv4: 192.0.2.0/24"), []string{`7: escaper[0].nodes[2].ipv4: holds an address of the node on line 5, got "192.0.2.0/24"`}},
		{"an address inside", node("id: c, ipv4: 10.0.3.4"), []string{`7: escaper[0].nodes[2].ipv4: is inside 10.0.0.0/16 of the node on line 6, got "10.0.3.4"`}},
		{"a range inside, once", node("ipv6: '2001:db8:1::1-2001:db8:1::99'"), []string{
			`7: escaper[0].nodes[2].ipv6: is inside 2001:db8:1::/48 of the node on line 6, got "2001:db8:1::1-2001:db8:1::99"`,
		}},
		{"inside", node("id: c, ipv4: 10.0.3.0/24"), []string{`7: escaper[0].nodes[2].ipv4: overlaps with 10.0.0.0/16 of the node on line 6, got "10.0.3.0/24"`}},
		{"around", node("id: c, ipv4: 10.0.0.0/8"), []string{`7: escaper[0].nodes[2].ipv4: overlaps with 10.0.0.0/16 of the node on line 6, got "10.0.0.0/8"`}},
		{"the same", node("ipv6: '2001:db8:1::/48'"), []string{`7: escaper[0].nodes[2].ipv6: overlaps with 2001:db8:1::/48 of the node on line 6, got "2001:db8:1::/48"`}},
		{"the same, without IDs", bind("10.0.0.0/24, 10.0.0.0/24"), []string{`1: escaper[0].bind_ip[1]: overlaps with 10.0.0.0/24 of the node on line 1, got "10.0.0.0/24"`}},
		{"bind_ip", bind("10.0.0.7, 10.0.0.0/24, 10.0.1.0/24, 10.0.1.1-10.0.1.5"), []string{
			`1: escaper[0].bind_ip[1]: holds an address of the node on line 1, got "10.0.0.0/24"`,
			`1: escaper[0].bind_ip[3]: is inside 10.0.1.0/24 of the node on line 1, got "10.0.1.1-10.0.1.5"`,
		}},
		{"an ID inside another's", node("id: 10.0.0.9, ipv4: 192.0.2.9"), []string{`7: escaper[0].nodes[2].id: is an address inside 10.0.0.0/16 of the node on line 6, got "10.0.0.9"`}},
		{"an ID inside its own", node("id: 192.0.3.9, ipv4: 192.0.3.0/24"), []string{`7: escaper[0].nodes[2].id: is an address inside 192.0.3.0/24 of the node on line 7, got "192.0.3.9"`}},
		{"an ID like a prefix", node("id: 192.0.3.0/24, ipv4: 192.0.3.0/24"), []string{
			`7: escaper[0].nodes[2].id: want letters, digits and . _ : - with a letter or digit first, got "192.0.3.0/24"`,
		}},
		{"link-local", node("id: c, ipv6: 'fe80::/64'"), []string{`7: escaper[0].nodes[2].ipv6: a link-local address needs an interface or an uplink, got "fe80::/64"`}},
		{"neighbour", "escaper: [{name: a, type: direct_fixed, bind_ip: 192.0.2.1, neighbour: on}]", []string{`1: escaper[0].neighbour: want auto, answer or off, got "on"`}},
		{"no address of a prefix", node("id: c, ipv4: 192.0.3.0/24") + "user_group: [{name: g, users: [{name: u, from: 10.0.0.0/8, egress_path: {out: 192.0.4.1}}]}]", []string{
			`8: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 3 by index, or an ID or address), got "192.0.4.1"`,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantMistakes(t, tt.text, tt.want...) })
	}
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestPrefixNodes(t *testing.T) {
	tests := []struct {
		name, escaper string
		want          []config.Node
	}{
		{"both families", "nodes: [{ipv4: 203.0.113.0/24, ipv6: '2001:DB8::/64', weight: 3}]", []config.Node{
			{ID: "203.0.113.0/24", Net4: prefix("203.0.113.0/24"), Net6: prefix("2001:db8::/64"), Weight: 3},
		}},
		{"the longest and the shortest", "nodes: [{id: a, ipv4: 192.0.2.4/30, ipv6: '2001:db8::10/124'}, {id: b, ipv4: 10.0.0.0/8, ipv6: '2001:db8:1::/48'}]", []config.Node{
			{ID: "a", Net4: prefix("192.0.2.4/30"), Net6: prefix("2001:db8::10/124"), Weight: 1},
			{ID: "b", Net4: prefix("10.0.0.0/8"), Net6: prefix("2001:db8:1::/48"), Weight: 1},
		}},
		{"an address and a prefix", "nodes: [{ipv4: 192.0.2.1, ipv6: '2001:db8::/64'}, {ipv6: '2001:db8:1::/64'}]", []config.Node{
			{ID: "192.0.2.1", IPv4: addr("192.0.2.1"), Net6: prefix("2001:db8::/64"), Weight: 1},
			{ID: "2001:db8:1::/64", Net6: prefix("2001:db8:1::/64"), Weight: 1},
		}},
		{"spelled out", "nodes: [{id: p, ipv4: 192.0.2.2/31}, {ipv4: 192.0.2.9/32}, {ipv6: '2001:db8::2/127'}, {id: s, ipv6: '2001:db8::9/128'}]", []config.Node{
			{ID: "p/192.0.2.2", IPv4: addr("192.0.2.2"), Weight: 1},
			{ID: "p/192.0.2.3", IPv4: addr("192.0.2.3"), Weight: 1},
			{ID: "192.0.2.9", IPv4: addr("192.0.2.9"), Weight: 1},
			{ID: "2001:db8::2", IPv6: addr("2001:db8::2"), Weight: 1},
			{ID: "2001:db8::3", IPv6: addr("2001:db8::3"), Weight: 1},
			{ID: "s", IPv6: addr("2001:db8::9"), Weight: 1},
		}},
		{"bind_ip", "bind_ip: [192.0.2.1, 10.0.0.0/24, '2001:db8::/64', 192.0.2.2/31], uplink: isp1", []config.Node{
			{ID: "192.0.2.1", IPv4: addr("192.0.2.1"), Uplink: "isp1", Weight: 1},
			{ID: "10.0.0.0/24", Net4: prefix("10.0.0.0/24"), Uplink: "isp1", Weight: 1},
			{ID: "2001:db8::/64", Net6: prefix("2001:db8::/64"), Uplink: "isp1", Weight: 1},
			{ID: "192.0.2.2", IPv4: addr("192.0.2.2"), Uplink: "isp1", Weight: 1},
			{ID: "192.0.2.3", IPv4: addr("192.0.2.3"), Uplink: "isp1", Weight: 1},
		}},
		{"neighbours", "nodes: [{id: a, ipv4: 10.0.0.0/24}, {id: b, ipv4: 10.0.1.0/24}, {id: c, ipv4: 10.0.2.0}, {id: d, ipv4: 9.255.255.255}]", []config.Node{
			{ID: "a", Net4: prefix("10.0.0.0/24"), Weight: 1},
			{ID: "b", Net4: prefix("10.0.1.0/24"), Weight: 1},
			{ID: "c", IPv4: addr("10.0.2.0"), Weight: 1},
			{ID: "d", IPv4: addr("9.255.255.255"), Weight: 1},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, nodesOf(t, tt.escaper), compare()...); diff != "" {
				t.Fatalf("-want +got:\n%s", diff)
			}
		})
	}
}

// An address of a prefix can be selected, in any spelling, and so can the prefix by its ID; so can what comes later.
func TestSelectable(t *testing.T) {
	escapers := "escaper: [{name: out, type: direct_fixed, nodes: [{ipv4: 203.0.113.0/24}, {id: six, ipv6: '2001:db8::/64'}, {id: a, ipv4: 192.0.2.1}]}," +
		" {name: dyn, type: direct_float, index: strict}, {name: r, type: route_failover, next: [out, dyn]}," +
		" {name: c, type: route_client, subnet_match: [{next: dyn, subnets: 10.0.0.0/8}], default_next: r}," +
		" {name: p, type: proxy_http, nodes: [{addr: 'x:1'}, {id: two, addr: '[2001:db8::1]:1', path: out/203.0.113.0/24}]}]\n"
	for _, entry := range []string{
		"out: 203.0.113.77", "out: '::ffff:203.0.113.0'", "out: 203.0.113.0/24", "out: 2001:DB8::42", "out: six", "out: a", "out: 0",
		"dyn: anything", "dyn: 77", "r: out", "r: dyn", "r: 2", "c: dyn", "c: r", "c: 1", "p: x:1", "p: two", "p: 7",
	} {
		c := parse(t, escapers+"user_group: [{name: g, users: [{name: u, from: 10.0.0.0/8, egress_path: {"+entry+"}}]}]")
		if l := c.UserGroups[0].Users[0].EgressPath; len(l) != 1 {
			t.Errorf("%s is %v", entry, l)
		}
	}
}

func TestNextNames(t *testing.T) {
	c := parse(t, "escaper: [{name: a, type: direct_float}, {name: b, type: direct_float}, {name: c, type: direct_float},"+
		" {name: up, type: route_upstream, regex_match: [{next: c, regexes: x}], child_match: [{next: b, domains: x}, {next: a, domains: y}], default_next: b},"+
		" {name: list, type: route_mapping, next: [c, a]}]")
	for i, want := range []string{"", "", "", "b a c", "c a"} {
		if got := strings.Join(c.Escapers[i].NextNames(), " "); got != want {
			t.Errorf("%s: %q, want %q", c.Escapers[i].Name, got, want)
		}
	}
	// A route dials nothing, and so it has none of what is for dialling.
	if r := c.Escapers[4]; r.Resolver != "" || r.ConnectTimeout != 0 || r.ResolveStrategy != "" {
		t.Errorf("a route: %+v", r)
	}
}

func TestInlineOfUsers(t *testing.T) {
	want := map[string]config.Inline{"dyn": {
		ID: "2001:db8::1", V6: addr("2001:db8::1"), Uplink: "isp1", Expire: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
		Labels: map[string]string{"isp": "64512"},
	}}
	for _, words := range []string{
		`egress_path: {dyn: {ip: "2001:db8::1", uplink: isp1, expire: 2030-01-02T03:04:05Z, isp: 64512}, out: 1}`,
		`egress_path: '{"dyn": {"ip": "2001:db8::1", "uplink": "isp1", "expire": "2030-01-02T03:04:05Z", "isp": "64512"}, "out": 1}'`,
		`egress_path_id_map: '{"out":1,"dyn":{"ipv6":"2001:db8::1","isp":"64512","uplink":"isp1","expire":"2030-01-02T04:04:05+01:00"}}'`,
	} {
		c := parse(t, "uplink: [{name: isp1, interface: eth0}]\n"+userOf("from: 10.0.0.0/8, "+words))
		u := c.UserGroups[0].Users[0]
		if diff := cmp.Diff(want, u.Inline, compare()...); diff != "" {
			t.Errorf("%s: -want +got:\n%s", words, diff)
		}
		if diff := cmp.Diff(selection.Layer{{Escaper: "out", Value: selection.Index(1)}}, u.EgressPath, compare()...); diff != "" {
			t.Errorf("%s: the rest: -want +got:\n%s", words, diff)
		}
	}
	if u := parse(t, userOf("from: 10.0.0.0/8, egress_path: {out: 1}")).UserGroups[0].Users[0]; u.Inline != nil {
		t.Errorf("none: %v", u.Inline)
	}
}

func TestLimitValues(t *testing.T) {
	for word, want := range map[string]config.Rate{
		"200/s": {Count: 200, Per: time.Second}, "7": {Count: 7, Per: time.Second}, "60/m": {Count: 60, Per: time.Minute},
		"60 / min": {Count: 60, Per: time.Minute}, "1/h": {Count: 1, Per: time.Hour},
	} {
		c := parse(t, userOf("from: 10.0.0.0/8, limits: {rate: "+word+"}"))
		if got := c.UserGroups[0].Users[0].Limits.Rate; got != want {
			t.Errorf("%s is %+v", word, got)
		}
	}
	for word, want := range map[string]uint64{
		"100Mbit/s": 100_000_000, "500kbit": 500_000, "1 Gbit/s": 1_000_000_000, "8000": 8000, "9000bit/s": 9000, "1000Gbit/s": 1_000_000_000_000,
	} {
		c := parse(t, serverOf("type: http_proxy, listen: 127.0.0.1:1, escaper: out, limits: {bandwidth: "+word+"}"))
		if got := c.Servers[0].Limits; got != (config.Limits{Bandwidth: want}) {
			t.Errorf("%s is %+v", word, got)
		}
	}
}

func TestSelectValues(t *testing.T) {
	for word, want := range map[string]config.Select{
		"ingress_ip": {Mode: "ingress_ip"}, "port": {Mode: "port"},
		"{out: 1}":                 {Mode: "map", Map: selection.Layer{{Escaper: "out", Value: selection.Index(1)}}},
		`'{"out": "192.0.2.1"}'`:   {Mode: "map", Map: selection.Layer{{Escaper: "out", Value: selection.ID("192.0.2.1")}}},
		"{r: out, out: 192.0.2.1}": {Mode: "map", Map: selection.Layer{{Escaper: "r", Value: selection.ID("out")}, {Escaper: "out", Value: selection.ID("192.0.2.1")}}},
	} {
		c := parse(t, serverOf("type: mixed_proxy, listen: ['127.0.0.1:7', '127.0.0.1:9-10'], escaper: r, select: "+word))
		if diff := cmp.Diff(want, c.Servers[0].Select, compare()...); diff != "" {
			t.Errorf("%s: -want +got:\n%s", word, diff)
		}
		if got := fmt.Sprint(c.Servers[0].Listen); got != "[127.0.0.1:7 127.0.0.1:9 127.0.0.1:10]" {
			t.Errorf("listens on %s", got)
		}
	}
}

// As many prefixes and addresses as a file may have are held against each other.
func TestManyPrefixes(t *testing.T) {
	var b strings.Builder
	b.WriteString("escaper:\n- name: out\n  type: direct_fixed\n  nodes:\n")
	const n = 1 << 16
	for i := range n {
		if i%2 == 0 {
			fmt.Fprintf(&b, "  - {ipv4: 10.%d.%d.0/24}\n", i>>9, i>>1&255)
		} else {
			fmt.Fprintf(&b, "  - {ipv4: 11.%d.%d.1}\n", i>>8, i&255)
		}
	}
	c := parse(t, b.String())
	if len(c.Escapers[0].Nodes) != n {
		t.Fatalf("%d nodes", len(c.Escapers[0].Nodes))
	}
	b.WriteString("  - {ipv4: 10.127.255.9}\n  - {id: x, ipv4: 11.0.1.0/24}\n")
	wantMistakes(t, b.String(),
		`65541: escaper[0].nodes[65536].ipv4: is inside 10.127.255.0/24 of the node on line 65539, got "10.127.255.9"`,
		`65542: escaper[0].nodes[65537].ipv4: holds an address of the node on line 6, got "11.0.1.0/24"`)
}
