package config_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"wayout/router/config"
)

// mistakes returns what Parse says, a line each.
func mistakes(t *testing.T, text string) []string {
	t.Helper()
	c, err := config.Parse("w.yaml", []byte(text))
	if err == nil {
		t.Fatalf("no mistake found in:\n%s", text)
	}
	var list config.Errors
	if c != nil || !errors.As(err, &list) {
		t.Fatalf("want no Config and Errors, got %v, %T", c, err)
	}
	return strings.Split(err.Error(), "\n")
}

func wantMistakes(t *testing.T, text string, want ...string) {
	t.Helper()
	got := mistakes(t, text)
	for i := range want {
		want[i] = "w.yaml:" + want[i]
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("in:\n%s\ngot:\n%s\nwant:\n%s", text, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestSyntax(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"empty", "", "1: the file is empty"},
		{"comments alone", "# nothing\n", "1: the file is empty"},
		{"null", "~\n", "1: the file is empty"},
		{"a list", "- a\n", `1: (the file): want a map of keys and values, got "[...]"`},
		{"a word", "wayout\n", `1: (the file): want a map of keys and values, got "wayout"`},
		{"flow list not closed", "a: 1\nb: [1, 2\nc: 3\n", "2: not YAML: did not find expected ',' or ']'"},
		{"flow map not closed", "a: 1\nb: {x: 1\nc: 3\n", "2: not YAML: did not find expected ',' or '}'"},
		{"indented too far", "a: 1\n b: 2\n", "2: not YAML: mapping values are not allowed in this context"},
		{"indented too little", "log:\n    level: info\n    format: text\n  x: 1\naccounting: on\n", "4: not YAML: did not find expected key"},
		{"a map after a list", "- a\nb: c\n", "2: not YAML: the indentation does not fit the lines above"},
		{"an item that is indented too little", "a:\n  - b: c\n    d: e\n   f: g\n", "4: not YAML: the indentation does not fit the lines above"},
		{"tab", "a: 1\nb:\n\t- c\n", "3: not YAML: a tab: indent with spaces"},
		{"tab after a deeper line", "a:\n  b: 1\n\tc: 2\nd: 3\n", "3: not YAML: a tab: indent with spaces"},
		{"tab after spaces", "a:\n  b: 1\n \tc: 2\n", "3: not YAML: a tab: indent with spaces"},
		{"a character that means nothing", "a: 1\nb: @x\n", "2: not YAML: found character that cannot start any token"},
		{"quote not closed", "a: 1\nb: \"open\nc: 2\nd: 3\n", "2: not YAML: a quote that is opened here is not closed"},
		{"quote not closed on the first line", "a: 'open\nb: 2\nc: 3\n", "1: not YAML: a quote that is opened here is not closed"},
		{"quote not closed on the only line", "a: 'open", "1: not YAML: a quote that is opened here is not closed"},
		{"quote not closed on the last line", "a: 1\nb: 'open\n", "2: not YAML: a quote that is opened here is not closed"},
		{"unknown anchor", "log: {level: info}\naccounting: *x\n", "2: not YAML: unknown anchor 'x' referenced"},
		{"no colon", "a: 1\nb\nc: 2\n", "2: not YAML: could not find expected ':'"},
		{"bracket alone", "a: 1\n\n\nb: ]\n", "4: not YAML: did not find expected node content"},
		{"escape", "a: \"\\q\"\n", "1: not YAML: found unknown escape character"},
		{"control character", "a: 1\nb: \x01\n", `2: not YAML: a control character, got "\x01"`},
		{"NUL", "a: 1\n\x00", `2: not YAML: a control character, got "\x00"`},
		{"Latin-1", "a: 1\nb: f\xfcr\n", `2: not YAML: the text is not UTF-8, got "\xfc"`},
		{"UTF-16", "\xff\xfea\x00", `1: not YAML: the text is not UTF-8, got "\xff"`},
		{"two documents", "accounting: on\n---\naccounting: off\n", "2: a second YAML document begins here, and a file holds one"},
		{"second document broken", "accounting: on\n---\na: [\n", "3: not YAML: did not find expected node content"},
		{"directive", "%YAML 3.0\n---\na: 1\n", "1: not YAML: found incompatible YAML document"},
		{"nested too deep", strings.Repeat("[", 20000), "1: not YAML: exceeded max depth of 10000"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantMistakes(t, tt.text, tt.want) })
	}
}

// Each mistake alone, at the end of a file that is good: $E is an escaper with three nodes, $S the start of a server.
func TestMistakes(t *testing.T) {
	const (
		resolver = "resolver: [{name: sys, type: system}]\n"
		uplink   = "uplink: [{name: isp1, interface: eth0}, {name: isp2, interface: eth1}]\n"
		escaper  = "escaper: [{name: out, type: direct_fixed, nodes: [{id: fra-1, ipv4: 192.0.2.1}, {id: fra-2, ipv4: 192.0.2.2, ipv6: '2001:db8::2'}]}]\n"
		server   = "server: [{name: web, type: http_proxy, escaper: out, listen: 127.0.0.1:3128"
		esc      = "escaper: [{name: out, type: direct_fixed, "
		node     = uplink + esc + "nodes: [{id: a, ipv4: 192.0.2.1}, {"
		lan      = escaper + "server: [{name: lan, type: tproxy, escaper: out, "
		user     = escaper + "user_group: [{name: team, users: [{name: alice, password: '" + hash + "', "
		second   = `is listened on by server[0].listen (line 2) already`
	)
	tests := []struct {
		name, text string
		want       []string // w.yaml: goes before each
	}{
		// Keys and types.
		{"unknown key", "acounting: on", []string{`1: acounting: unknown key (perhaps accounting is meant), got "acounting"`}},
		{"unknown key, nothing near", "frobnicate: on", []string{`1: frobnicate: unknown key, got "frobnicate"`}},
		{"unknown key inside", "log:\n  level: info\n  colour: red", []string{`3: log.colour: unknown key, got "colour"`}},
		{"unknown key in a list", escaper + "server:\n- name: web\n  type: http_proxy\n  listn: 127.0.0.1:1\n  escaper: out", []string{
			`3: server[0].listen: is required, got ""`,
			`5: server[0].listn: unknown key (perhaps listen is meant), got "listn"`,
		}},
		{"nodes that are published", "escaper: [{name: dyn, type: proxy_float, cache: x, nodes: [{addr: 'a:1'}], uplink: u}]\nserver: [{name: web, type: http_proxy, escaper: dyn, listen: 127.0.0.1:1}]", []string{
			`1: escaper[0].cache: want the whole path of a file, from /, got "x"`,
			`1: escaper[0].nodes: is not a key of proxy_float, got "nodes"`,
			`1: escaper[0].uplink: is not a key of proxy_float, got "uplink"`,
		}},
		{"unknown type", esc[:len(esc)-14] + "direct_fixd, bind_ip: 192.0.2.1}]", []string{`1: escaper[0].type: want direct_fixed, direct_float, route_select, route_mapping, route_failover, route_upstream, route_client, proxy_http, proxy_https, proxy_socks5 or proxy_float, got "direct_fixd"`}},
		{"unknown policy", esc + "bind_ip: 192.0.2.1, pick_policy: best}]", []string{
			`1: escaper[0].pick_policy: want random, serial, round_robin, rendezvous, least_conn, jump or ketama, got "best"`,
		}},
		{"index", esc + "bind_ip: 192.0.2.1, index: round}]", []string{`1: escaper[0].index: want wrap or strict, got "round"`}},
		{"pick_key", esc + "bind_ip: 192.0.2.1, pick_key: port}]", []string{`1: escaper[0].pick_key: want client_ip, user or host, got "port"`}},
		{"duplicate key", "accounting: on\nlog: {}\naccounting: off", []string{`3: accounting: is given twice, first on line 1, got "accounting"`}},
		{"merge key", "log: &l {level: info}\nescaper:\n- <<: *l\n  name: out\n  type: direct_fixed\n  bind_ip: 192.0.2.1", []string{
			`3: escaper[0].<<: merge keys are not supported: write the keys out, got "<<"`,
		}},
		{"a key that is a list", "[a]: 1\nlog: {}", []string{`1: (the file): a key has to be a word, got "[...]"`}},
		{"a list for a map", "log: [info]", []string{`1: log: want a map of keys and values, got "[...]"`}},
		{"a map for a list", "server: {name: web}", []string{`1: server: want a list, got "{...}"`}},
		{"a word for a list", "server: web", []string{`1: server: want a list, got "web"`}},
		{"a list for a word", "control: {socket: [a]}", []string{`1: control.socket: want a single value, got "[...]"`}},
		{"nothing", "metrics:\nlog: {level: }", []string{
			`1: metrics: want a map of keys and values, got ""`,
			`2: log.level: has no value, got ""`,
		}},
		{"tag", "accounting: !secret on", []string{`1: accounting: the YAML tag !secret is not supported, got "on"`}},
		{"set for a map", "log: !!set {level: info}", []string{`1: log: want a map of keys and values, got "{...}"`}},
		{"switch", "accounting: maybe", []string{`1: accounting: want on, off, true or false, got "maybe"`}},
		{"switch in quotes", "accounting: 'on'", []string{`1: accounting: want on, off, true or false, without quotes, got "on"`}},
		{"number as a switch", "accounting: 1", []string{`1: accounting: want on, off, true or false, got "1"`}},
		{"level", "log: {level: loud}", []string{`1: log.level: want debug, info, warn or error, got "loud"`}},
		{"format", "log: {format: xml}", []string{`1: log.format: want text or json, got "xml"`}},
		{"duration", "drain_timeout: soon", []string{`1: drain_timeout: want a time such as 500ms, 30s, 5m or 2h, got "soon"`}},
		{"duration without unit at the end", "drain_timeout: 1m30", []string{`1: drain_timeout: want a time such as 500ms, 30s, 5m or 2h, got "1m30"`}},
		{"negative duration", "drain_timeout: -1s", []string{`1: drain_timeout: want a time such as 500ms, 30s, 5m or 2h, got "-1s"`}},
		{"NaN", "drain_timeout: .nan", []string{`1: drain_timeout: want a time such as 500ms, 30s, 5m or 2h, got ".nan"`}},
		{"huge duration", "drain_timeout: 1e300", []string{`1: drain_timeout: want a time such as 500ms, 30s, 5m or 2h, got "1e300"`}},
		{"duration out of range", "drain_timeout: 25h", []string{`1: drain_timeout: is out of range 0s to 24h, got "25h"`}},
		{"size", escaper + server + ", req_header_max_size: big}]", []string{`2: server[0].req_header_max_size: want a size such as 4096, 32KiB or 1MiB, got "big"`}},
		{"size out of range", escaper + server + ", req_header_max_size: 2MiB}]", []string{`2: server[0].req_header_max_size: is out of range 1KiB to 1MiB, got "2MiB"`}},
		{"size overflows", escaper + server + ", req_header_max_size: 9223372036854775807KiB}]", []string{
			`2: server[0].req_header_max_size: want a size such as 4096, 32KiB or 1MiB, got "9223372036854775807KiB"`,
		}},
		{"number", escaper + server + ", req_header_max_count: many}]", []string{`2: server[0].req_header_max_count: want a whole number from 8 to 4096, got "many"`}},
		{"number out of range", escaper + server + ", req_header_max_count: 5}]", []string{`2: server[0].req_header_max_count: is out of range 8 to 4096, got "5"`}},
		{"socket path", "control: {socket: " + strings.Repeat("x", 108) + "}", []string{
			`1: control.socket: is over the 107 bytes that a socket's path may have, got "` + strings.Repeat("x", 80) + `..."`,
		}},
		{"empty socket path", "control: {socket: ''}", []string{`1: control.socket: is empty, got ""`}},
		{"mask", "netcfg: {mark_mask: 0x1ffffffff}", []string{`1: netcfg.mark_mask: is out of range 1 to 4294967295, got "0x1ffffffff"`}},
		{"no mask", "netcfg: {mark_mask: 0}", []string{`1: netcfg.mark_mask: is out of range 1 to 4294967295, got "0"`}},
		{"octal", "netcfg: {rule_priority: 0100}", []string{`1: netcfg.rule_priority: want a whole number from 1 to 32510, got "0100"`}},
		{"priority behind main", "netcfg: {rule_priority: 32766}", []string{`1: netcfg.rule_priority: is out of range 1 to 32510, got "32766"`}},
		{"priorities reach main's", "netcfg: {rule_priority: 32511}", []string{`1: netcfg.rule_priority: is out of range 1 to 32510, got "32511"`}},
		{"tables of the host", "netcfg: {table_base: 255}", []string{`1: netcfg.table_base: is out of range 256 to 4294967039, got "255"`}},
		{"tables beyond the last", "netcfg: {table_base: 4294967040}", []string{`1: netcfg.table_base: is out of range 256 to 4294967039, got "4294967040"`}},
		{"mask too small", "accounting: on\nnetcfg: {table_base: 300, mark_mask: 0xff}", []string{`2: netcfg.mark_mask: has 8 bits set, and a mark needs at least 9, got "0xff"`}},
		{"metrics on a bare port", "metrics: {listen: 9180}", []string{
			`1: metrics.listen: a port alone is not enough: want IP:PORT, or :PORT for all addresses, where everyone who can connect is answered, got "9180"`,
		}},

		// Names and references.
		{"name missing", "resolver: [{type: system}]", []string{`1: resolver[0].name: is required, got ""`}},
		{"name empty", "resolver: [{name: '', type: system}]", []string{`1: resolver[0].name: is empty, got ""`}},
		{"name with a slash", "resolver: [{name: a/b, type: system}]", []string{
			`1: resolver[0].name: want letters, digits and . _ : - with a letter or digit first, got "a/b"`,
		}},
		{"name begins with a dash", "resolver: [{name: -a, type: system}]", []string{
			`1: resolver[0].name: want letters, digits and . _ : - with a letter or digit first, got "-a"`,
		}},
		{"name all digits", "resolver: [{name: 007, type: system}]", []string{`1: resolver[0].name: must not be all digits, got "007"`}},
		{"duplicate resolver", resolver + "server: []\nuplink: []\nescaper: []\nuser_group: [{name: g, users: []},\n {name: g, users: []}]", []string{
			`6: user_group[1].name: is taken, see line 5, got "g"`,
		}},
		{"duplicate escaper", escaper[:len(escaper)-2] + ",\n {name: out, type: direct_fixed, bind_ip: 192.0.2.1}]", []string{`2: escaper[1].name: is taken, see line 1, got "out"`}},
		{"duplicate server", escaper + server + "}, {name: web, type: http_proxy, escaper: out, listen: 127.0.0.1:3129}]", []string{`2: server[1].name: is taken, see line 2, got "web"`}},
		{"duplicate uplink", "uplink: [{name: a, interface: x}, {name: a, interface: y}]", []string{`1: uplink[1].name: is taken, see line 1, got "a"`}},
		{"duplicate user", user + "}, {name: alice, password: '" + hash + "'}]}]", []string{`2: user_group[0].users[1].name: is taken, see line 2, got "alice"`}},
		{"unknown escaper", server + "}]", []string{`1: server[0].escaper: no escaper has this name, got "out"`}},
		{"names are case-sensitive", strings.Replace(escaper, "out", "Out", 1) + server + "}]", []string{`2: server[0].escaper: no escaper has this name, got "out"`}},
		{"unknown user group", escaper + server + ", user_group: team}]", []string{`2: server[0].user_group: no user_group has this name, got "team"`}},
		{"unknown resolver", esc + "bind_ip: 192.0.2.1, resolver: sys}]", []string{`1: escaper[0].resolver: no resolver has this name, got "sys"`}},
		{"unknown uplink", esc + "bind_ip: 192.0.2.1, uplink: isp1}]", []string{`1: escaper[0].uplink: no uplink has this name, got "isp1"`}},
		{"unknown uplink of a node", esc + "nodes: [{id: a, ipv4: 192.0.2.1, uplink: isp1}]}]", []string{`1: escaper[0].nodes[0].uplink: no uplink has this name, got "isp1"`}},

		// Uplinks.
		{"interface name", "uplink: [{name: a, interface: eth/0}]", []string{
			`1: uplink[0].interface: want the name of a network interface: 1 to 15 bytes without slash, colon and space, got "eth/0"`,
		}},
		{"interface name too long", "uplink: [{name: a, interface: abcdefghijklmnop}]", []string{
			`1: uplink[0].interface: want the name of a network interface: 1 to 15 bytes without slash, colon and space, got "abcdefghijklmnop"`,
		}},
		{"gateway", "uplink: [{name: a, interface: eth0, gateway4: gw}]", []string{`1: uplink[0].gateway4: want an IP address, got "gw"`}},
		{"gateway of the other family", "uplink: [{name: a, interface: eth0, gateway4: '2001:db8::1'}]", []string{
			`1: uplink[0].gateway4: want an address of the other family, IPv4, got "2001:db8::1"`,
		}},
		{"unspecified gateway", "uplink: [{name: a, interface: eth0, gateway6: '::'}]", []string{
			`1: uplink[0].gateway6: the unspecified address is not one to send from or to, got "::"`,
		}},

		// Nodes.
		{"no nodes", esc + "resolver: sys}]\n" + resolver, []string{`1: escaper[0].nodes: is required, or else bind_ip or interface, got ""`}},
		{"an empty list of nodes", esc + "nodes: []}]", []string{`1: escaper[0].nodes: want at least one node, got "[...]"`}},
		{"empty bind_ip", esc + "bind_ip: []}]", []string{`1: escaper[0].bind_ip: want at least one address, got "[...]"`}},
		{"nodes and bind_ip", esc + "nodes: [{id: a, ipv4: 192.0.2.1}], bind_ip: 192.0.2.2}]", []string{`1: escaper[0].bind_ip: give nodes or bind_ip, not both, got "192.0.2.2"`}},
		{"a node without an address", node + "id: b}]}]", []string{`2: escaper[0].nodes[1].ipv4: is required, or else ipv6 or interface, got ""`}},
		{"a node without address and ID", node + "interface: eth0}]}]", []string{`2: escaper[0].nodes[1].id: is required for a node without an address, got ""`}},
		{"not an address", node + "id: b, ipv4: 192.0.2.300}]}]", []string{`2: escaper[0].nodes[1].ipv4: want an IP address, got "192.0.2.300"`}},
		{"ipv4 with IPv6", node + "id: b, ipv4: '2001:db8::1'}]}]", []string{`2: escaper[0].nodes[1].ipv4: want an IPv4 address, got "2001:db8::1"`}},
		{"ipv6 with IPv4", node + "id: b, ipv6: 192.0.2.2}]}]", []string{`2: escaper[0].nodes[1].ipv6: want an IPv6 address, got "192.0.2.2"`}},
		{"mapped", node + "id: b, ipv6: '::ffff:192.0.2.2'}]}]", []string{`2: escaper[0].nodes[1].ipv6: write the IPv4 address as 192.0.2.2, got "::ffff:192.0.2.2"`}},
		{"unspecified", node + "id: b, ipv4: 0.0.0.0}]}]", []string{`2: escaper[0].nodes[1].ipv4: the unspecified address is not one to send from or to, got "0.0.0.0"`}},
		{"multicast", node + "id: b, ipv6: 'ff02::1'}]}]", []string{`2: escaper[0].nodes[1].ipv6: a multicast address is not one to send from or through, got "ff02::1"`}},
		{"broadcast", node + "id: b, ipv4: 255.255.255.255}]}]", []string{
			`2: escaper[0].nodes[1].ipv4: the broadcast address is not one to send from or through, got "255.255.255.255"`,
		}},
		{"zone", node + "id: b, ipv6: 'fe80::1%eth0'}]}]", []string{
			`2: escaper[0].nodes[1].ipv6: an address has no zone here: give the interface by its own key, got "fe80::1%eth0"`,
		}},
		{"link-local alone", node + "id: b, ipv6: 'fe80::1'}]}]", []string{`2: escaper[0].nodes[1].ipv6: a link-local address needs an interface or an uplink, got "fe80::1"`}},
		{"an address with a length", node + "id: b, ipv4: 198.51.100.11/24}]}]", []string{
			`2: escaper[0].nodes[1].ipv4: has bits beyond its length, perhaps 198.51.100.0/24, got "198.51.100.11/24"`,
		}},
		{"a slash and no length", node + "id: b, ipv4: 198.51.100.11/x}]}]", []string{
			`2: escaper[0].nodes[1].ipv4: want an address, FIRST-LAST or a prefix, got "198.51.100.11/x"`,
		}},
		{"range backwards", node + "id: b, ipv4: 192.0.2.9-192.0.2.3}]}]", []string{`2: escaper[0].nodes[1].ipv4: the range ends before it begins, got "192.0.2.9-192.0.2.3"`}},
		{"range of two families", node + "id: b, ipv4: '192.0.2.9-2001:db8::1'}]}]", []string{
			`2: escaper[0].nodes[1].ipv4: the ends of a range have to be of one family, got "192.0.2.9-2001:db8::1"`,
		}},
		{"range too long", node + "id: b, ipv4: 10.0.0.0-10.1.0.0}]}]", []string{`2: escaper[0].nodes[1].ipv4: a range has at most 65536 addresses, got "10.0.0.0-10.1.0.0"`}},
		{"range far too long", node + "id: b, ipv6: '2001:db8::-2001:db9::'}]}]", []string{`2: escaper[0].nodes[1].ipv6: a range has at most 65536 addresses, got "2001:db8::-2001:db9::"`}},
		{"ranges of unequal lengths", node + "id: b, ipv4: 192.0.2.2-192.0.2.4, ipv6: '2001:db8::1'}]}]", []string{
			`2: escaper[0].nodes[1].ipv6: 1 addresses beside 3 in ipv4: they have to be as many, got "2001:db8::1"`,
		}},
		{"too many nodes", esc + "bind_ip: [" + strings.Join([]string{"10.0.0.0-10.0.255.255", "10.1.0.0-10.1.255.255", "10.2.0.0-10.2.255.255", "10.3.0.0-10.3.255.255", "10.4.0.1"}, ", ") + "]}]", []string{
			`1: escaper[0].bind_ip[4]: the file has more than 262144 nodes, got "10.4.0.1"`,
		}},
		{"weight", node + "id: b, ipv4: 192.0.2.2, weight: 65536}]}]", []string{`2: escaper[0].nodes[1].weight: is out of range 0 to 65535, got "65536"`}},
		{"negative weight", node + "id: b, ipv4: 192.0.2.2, weight: -1}]}]", []string{`2: escaper[0].nodes[1].weight: is out of range 0 to 65535, got "-1"`}},
		{"fractional weight", node + "id: b, ipv4: 192.0.2.2, weight: 1.5}]}]", []string{`2: escaper[0].nodes[1].weight: want a whole number from 0 to 65535, got "1.5"`}},
		{"quoted weight", node + "id: b, ipv4: 192.0.2.2, weight: '2'}]}]", []string{`2: escaper[0].nodes[1].weight: want a whole number, without quotes, got "2"`}},
		{"ID all digits", node + "id: 12, ipv4: 192.0.2.2}]}]", []string{`2: escaper[0].nodes[1].id: must not be all digits, got "12"`}},
		{"ID with a slash", node + "id: a/b, ipv4: 192.0.2.2}]}]", []string{
			`2: escaper[0].nodes[1].id: want letters, digits and . _ : - with a letter or digit first, got "a/b"`,
		}},
		{"duplicate ID", node + "id: a, ipv4: 192.0.2.2}]}]", []string{`2: escaper[0].nodes[1].id: is the ID of the node on line 2 too, got "a"`}},
		{"duplicate address", node + "id: b, ipv4: 192.0.2.1}]}]", []string{`2: escaper[0].nodes[1].ipv4: address 192.0.2.1 is on the node on line 2 too, got "192.0.2.1"`}},
		{"duplicate address, another spelling", uplink + esc + "bind_ip:\n  ['2001:db8::1',\n   '2001:DB8:0::1']}]", []string{
			`4: escaper[0].bind_ip[1]: address 2001:db8::1 is on the node on line 3 too, got "2001:DB8:0::1"`,
		}},
		{"duplicate address in a range", node + "ipv4: 192.0.2.0-192.0.2.9}]}]", []string{
			`2: escaper[0].nodes[1].ipv4: address 192.0.2.1 is on the node on line 2 too, got "192.0.2.0-192.0.2.9"`,
		}},
		{"ID is another's address", node + "id: 192.0.2.1, ipv4: 192.0.2.2}]}]", []string{`2: escaper[0].nodes[1].id: is the address of the node on line 2, got "192.0.2.1"`}},
		{"ID is a later one's address, mapped", uplink + esc + "nodes: [{id: '2001:DB8::9', ipv4: 192.0.2.1}, {id: b, ipv6: '2001:db8::9'}]}]", []string{
			`2: escaper[0].nodes[0].id: is the address of the node on line 2, got "2001:DB8::9"`,
		}},
		{"ID is the address of a node without an ID", uplink + esc + "nodes: [{id: 192.0.2.9, ipv4: 192.0.2.1},\n {ipv4: 192.0.2.9}]}]", []string{
			`2: escaper[0].nodes[0].id: is the address of the node on line 3, got "192.0.2.9"`,
		}},
		{"the same, the other way round", uplink + esc + "nodes: [{ipv4: 192.0.2.9},\n {id: 192.0.2.9, ipv4: 192.0.2.1}]}]", []string{
			`3: escaper[0].nodes[1].id: is the ID of the node on line 2 too, got "192.0.2.9"`,
		}},
		{"interface against uplink", node + "id: b, ipv4: 192.0.2.2, uplink: isp1, interface: eth1}]}]", []string{
			`2: escaper[0].nodes[1].interface: contradicts uplink isp1, whose interface is eth0, got "eth1"`,
		}},
		{"uplink against the escaper's interface", uplink + esc + "interface: eth0, nodes: [{id: a, ipv4: 192.0.2.1}, {id: b, ipv4: 192.0.2.2, uplink: isp2}]}]", []string{
			`2: escaper[0].nodes[1].uplink: contradicts the escaper's interface eth0: the uplink's is eth1, got "isp2"`,
		}},
		{"the escaper's own pins, once", uplink + esc + "interface: eth1, uplink: isp1, nodes: [{id: a, ipv4: 192.0.2.1}, {id: b, ipv4: 192.0.2.2}]}]", []string{
			`2: escaper[0].interface: contradicts uplink isp1, whose interface is eth0, got "eth1"`,
		}},
		{"the escaper's own pins, bind_ip", uplink + esc + "interface: eth1, uplink: isp1, bind_ip: 192.0.2.1}]", []string{
			`2: escaper[0].interface: contradicts uplink isp1, whose interface is eth0, got "eth1"`,
		}},
		{"filter", esc + "bind_ip: 192.0.2.1, egress_network_filter: {deny: [privat]}}]", []string{
			`1: escaper[0].egress_network_filter.deny[0]: want a network, an address, or private, loopback, linklocal, multicast or self, got "privat"`,
		}},
		{"filter with host bits", esc + "bind_ip: 192.0.2.1, egress_network_filter: {allow: 10.1.2.3/16}}]", []string{
			`1: escaper[0].egress_network_filter.allow: has bits beyond its length, perhaps 10.1.0.0/16, got "10.1.2.3/16"`,
		}},
		{"filter, mapped", esc + "bind_ip: 192.0.2.1, egress_network_filter: {allow: ['::ffff:10.0.0.0/104']}}]", []string{
			`1: escaper[0].egress_network_filter.allow[0]: write the IPv4 network as IPv4, got "::ffff:10.0.0.0/104"`,
		}},

		// Users.
		{"plain password", escaper + "user_group: [{name: team, users: [{name: alice, password: hunter2}]}]", []string{
			`2: user_group[0].users[0].password: plain text is refused: put what wayout hash-password prints here, got "(hidden)"`,
		}},
		{"plain password like a number", escaper + "user_group: [{name: team, users: [{name: alice, password: 123456}]}]", []string{
			`2: user_group[0].users[0].password: plain text is refused: put what wayout hash-password prints here, got "(hidden)"`,
		}},
		{"empty password", escaper + "user_group: [{name: team, users: [{name: alice, password: }]}]", []string{
			`2: user_group[0].users[0].password: has no value, got "(hidden)"`,
		}},
		{"another hash", escaper + "user_group: [{name: team, users: [{name: alice, password: '$6$a$b'}]}]", []string{
			`2: user_group[0].users[0].password: want an argon2id or bcrypt hash, got "(hidden)"`,
		}},
		{"hash cut", escaper + "user_group: [{name: team, users: [{name: alice, password: '$2y$10$N9qo8uLOickgx2ZMR'}]}]", []string{
			`2: user_group[0].users[0].password: a bcrypt hash has 60 characters, got "(hidden)"`,
		}},
		{"hash without quotes", escaper + "user_group: [{name: team, users: [{name: alice, password: $argon2id$v=19$m=65536,t=3,p=1$c2FsdA$aGFzaA}]}]", []string{
			`2: user_group[0].users[0].password: the hash is cut at its first comma: within {} it needs quotes, got "(hidden)"`,
		}},
		{"hash of another form", escaper + "user_group: [{name: team, users: [{name: alice, password: '$argon2id$v=19$m=65536,t=3,p=1$c2FsdA'}]}]", []string{
			`2: user_group[0].users[0].password: an argon2id hash has the form $argon2id$v=19$m=M,t=T,p=P$SALT$HASH, got "(hidden)"`,
		}},
		{"names that are parameters", escaper + "user_group:\n- name: team\n  users:\n  - {name: alice-path-1, password: '" + hash + "'}\n  - {name: a-sid-, password: '" + hash + "'}\n" +
			"  - {name: alice-path, password: '" + hash + "'}\n  - {name: b-path-1, from: 10.0.0.0/8}\n- name: other\n  users: [{name: alice-path-1, password: '" + hash + "'}]\n" +
			"server:\n- {name: one, type: http_proxy, listen: 127.0.0.1:1, escaper: out, user_group: team}\n- {name: two, type: socks_proxy, listen: 127.0.0.1:2, escaper: out, user_group: team, username_params: on}", []string{
			`5: user_group[0].users[0].name: server two reads -path-1 as parameters (username_params): nobody can log in by this name, got "alice-path-1"`,
			`6: user_group[0].users[1].name: server two reads -sid- as parameters (username_params): nobody can log in by this name, got "a-sid-"`,
		}},
		{"hash as a key", escaper + "user_group: [{name: team, users: [{name: alice, password: '" + hash + "', p=1$c2FsdA$aGFzaA: }]}]", []string{
			`2: user_group[0].users[0].(hidden): unknown key, got "(hidden)"`,
		}},
		{"hash in the wrong place", strings.Replace(user, "alice", "'$argon2id$v=19$m=65536,t=3,p=1$c2FsdA$aGFzaA'", 1) + "egress_path: '$2y$10$N9qo8uLOickgx2ZMR'}]}]", []string{
			`2: user_group[0].users[0].name: want letters, digits and . _ : - with a letter or digit first, got "(hidden)"`,
			`2: user_group[0].users[0].egress_path: want a map of escapers, or a string that holds one as a JSON object, got "(hidden)"`,
		}},
		{"password missing", escaper + "user_group: [{name: team, users: [{name: alice}]}]", []string{`2: user_group[0].users[0].password: is required, or else from, got ""`}},
		{"users missing", "user_group: [{name: team}]", []string{`1: user_group[0].users: is required, got ""`}},
		{"colon in a user name", strings.Replace(user, "alice", "'a:b'", 1) + "}]}]", []string{
			`2: user_group[0].users[0].name: must hold no colon: Basic authentication ends the name there, got "a:b"`,
		}},
		{"egress_path, unknown escaper", user + "egress_path: {outt: fra-2}}]}]", []string{`2: user_group[0].users[0].egress_path.outt: no escaper has this name, got "outt"`}},
		{"egress_path, unknown ID", user + "egress_path:\n  {out: fra-3}}]}]", []string{
			`3: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 2 by index, or an ID or address), got "fra-3"`,
		}},
		{"egress_path, address of no node", user + "egress_path: {out: 192.0.2.3}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 2 by index, or an ID or address), got "192.0.2.3"`,
		}},
		{"egress_path, digits in quotes are an ID", user + "egress_path: {out: '1'}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 2 by index, or an ID or address), got "1"`,
		}},
		{"egress_path, strict index", strings.Replace(user, "nodes:", "index: strict, nodes:", 1) + "egress_path: {out: 3}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 2 by index, or an ID or address), got "3"`,
		}},
		{"egress_path, strict index 0", strings.Replace(user, "nodes:", "index: strict, nodes:", 1) + `egress_path: '{"out":0}'}]}]`, []string{
			`2: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 2 by index, or an ID or address), got "0"`,
		}},
		{"egress_path, JSON with an unknown escaper", user + `egress_path: '{"out": 1, "x y": "a"}'}]}]`, []string{
			`2: user_group[0].users[0].egress_path."x y": no escaper has this name, got "x y"`,
		}},
		{"egress_path, both names", user + "egress_path: {out: 1}, egress_path_id_map: {out: 1}}]}]", []string{
			`2: user_group[0].users[0].egress_path_id_map: means the same as egress_path on line 2: give one of them, got "egress_path_id_map"`,
		}},
		{"egress_path, list", user + "egress_path: [out]}]}]", []string{
			`2: user_group[0].users[0].egress_path: want a map of escapers, or a string that holds one as a JSON object, got "[...]"`,
		}},
		{"egress_path, nothing", user + "egress_path: }]}]", []string{`2: user_group[0].users[0].egress_path: has no value, got ""`}},
		{"egress_path, nothing for an escaper", user + "egress_path: {out: }}]}]", []string{`2: user_group[0].users[0].egress_path.out: has no value, got ""`}},
		{"egress_path, boolean", user + "egress_path: {out: true}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: want the ID or address of a node, or its index as a number (put an ID that looks like something else in quotes), got "true"`,
		}},
		{"egress_path, inner map", user + "egress_path: {out: {id: fra-2}}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out.ip: is required, or else ipv4 or ipv6, got ""`,
			`2: user_group[0].users[0].egress_path.out: a node itself is for a direct_float, and out is a direct_fixed, got "{...}"`,
		}},
		{"egress_path, negative", user + "egress_path: {out: -1}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: an index is a whole number without sign and leading zeros; put an ID in quotes, got "-1"`,
		}},
		{"egress_path, fraction", user + "egress_path: {out: 1.0}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: an index is a whole number without sign and leading zeros; put an ID in quotes, got "1.0"`,
		}},
		{"egress_path, 65 bits", user + "egress_path: {out: 18446744073709551616}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: an index has at most 64 bits, got "18446744073709551616"`,
		}},
		{"egress_path, twice", user + "egress_path: {out: 1, out: 2}}]}]", []string{
			`2: user_group[0].users[0].egress_path.out: is given twice, first on line 2, got "out"`,
		}},
		{"allow_path", user + "allow_path: [fra-2]}]}]", []string{
			`2: user_group[0].users[0].allow_path[0]: want ESCAPER/ID, with * for any run of characters within a segment, got "fra-2"`,
		}},
		{"allow_path, an escaper that is none", user + "allow_path: ['out/*', 'nope/*', '*ope/x', 'Out/fra-1']}]}]", []string{
			`2: user_group[0].users[0].allow_path[1]: matches nothing: no escaper has the name nope, got "nope/*"`,
			`2: user_group[0].users[0].allow_path[3]: matches nothing: no escaper has the name Out, got "Out/fra-1"`,
		}},
		{"allow_path, a word", user + "allow_path: out/*}]}]", []string{`2: user_group[0].users[0].allow_path: want a list, got "out/*"`}},
		{"allow_path, nothing", user + "allow_path: }]}]", []string{`2: user_group[0].users[0].allow_path: want a list, got ""`}},

		// Servers.
		{"no type", "server: [{name: web}]", []string{
			`1: server[0].type: is required, got ""`,
			`1: server[0].escaper: is required, got ""`,
		}},
		{"a key of other servers in a tproxy", lan + `interface: lan0, divert: tcp/1, listen: "127.0.0.1:1"}]`, []string{`2: server[0].listen: is not a key of tproxy, got "listen"`}},
		{"a key of a tproxy in another server", escaper + server + ", divert: tcp/443}]", []string{`2: server[0].divert: is not a key of http_proxy, got "divert"`}},
		{"a tproxy without everything", escaper + "server: [{name: lan, type: tproxy}]", []string{
			`2: server[0].escaper: is required, got ""`,
			`2: server[0].interface: is required, got ""`,
			`2: server[0].divert: is required, got ""`,
		}},
		{"divert of no protocol", lan + "interface: lan0, divert: [443, tcp, sctp/9, tcp/, tcp/0, tcp/1-, udp/9-8, tcp/70000, tcp/0x50, TCP/80]}]", []string{
			`2: server[0].divert[0]: want tcp/PORT, udp/PORT, LOW-HIGH in the place of PORT, or * for all ports, got "443"`,
			`2: server[0].divert[1]: want tcp/PORT, udp/PORT, LOW-HIGH in the place of PORT, or * for all ports, got "tcp"`,
			`2: server[0].divert[2]: want tcp/PORT, udp/PORT, LOW-HIGH in the place of PORT, or * for all ports, got "sctp/9"`,
			`2: server[0].divert[3]: want a port, or LOW-HIGH, got "tcp/"`,
			`2: server[0].divert[4]: a port is 1 to 65535, got "tcp/0"`,
			`2: server[0].divert[5]: want a port, or LOW-HIGH, got "tcp/1-"`,
			`2: server[0].divert[6]: the range ends before it begins, got "udp/9-8"`,
			`2: server[0].divert[7]: a port is 1 to 65535, got "tcp/70000"`,
			`2: server[0].divert[8]: want a port, or LOW-HIGH, got "tcp/0x50"`,
			`2: server[0].divert[9]: want tcp/PORT, udp/PORT, LOW-HIGH in the place of PORT, or * for all ports, got "TCP/80"`,
		}},
		{"divert of nothing", lan + "interface: [], divert: []}]", []string{
			`2: server[0].interface: want at least one, got "[...]"`,
			`2: server[0].divert: want at least one, got "[...]"`,
		}},
		{"interfaces", lan + "interface: [lan0, a/b, lan0], divert: tcp/443}]", []string{
			`2: server[0].interface[1]: want the name of a network interface: 1 to 15 bytes without slash, colon and space, got "a/b"`,
			`2: server[0].interface[2]: is given twice, first on line 2, got "lan0"`,
			`2: server[0].divert: is taken by server[0].divert (line 2) already, got "tcp/443"`,
		}},
		{"two that take the same", lan + "interface: [lan0, lan1], divert: [tcp/80-443, udp/443]}, {name: b, type: tproxy, escaper: out, interface: lan1, divert: [udp/1-442, tcp/443]}]", []string{
			`2: server[1].divert[1]: is taken by server[0].divert[0] (line 2) already, got "tcp/443"`,
		}},
		{"one that takes the same twice", lan + "interface: lan0, divert: [tcp/443, tcp/*]}]", []string{
			`2: server[0].divert[1]: is taken by server[0].divert[0] (line 2) already, got "tcp/*"`,
		}},
		{"the rest of one interface", lan + "interface: lan0, divert: tcp/1, rest: drop}, {name: b, type: tproxy, escaper: out, interface: lan0, divert: tcp/2}]", []string{
			`2: server[1]: contradicts server lan, whose rest is drop, on interface lan0, got "{...}"`,
		}},
		{"a rest of its own", lan + "interface: lan0, divert: tcp/1, rest: keep}]", []string{`2: server[0].rest: want forward or drop, got "keep"`}},
		{"select of a tproxy", lan + "interface: lan0, divert: tcp/1, select: ingress_ip}]", []string{
			`2: server[0].select: a tproxy has a map of escapers alone: its clients connect to no address of its own, got "ingress_ip"`,
		}},
		{"users of a tproxy", user + "from: 10.0.0.0/8}]}]\nserver: [{name: lan, type: tproxy, escaper: out, interface: lan0, divert: tcp/1, user_group: team}]", []string{
			`3: server[0].user_group: has no user who is known by from alone: diverted clients give no password, got "team"`,
		}},
		{"a prefix to listen on", escaper + "server: [{name: web, type: http_proxy, escaper: out, open: true, listen: ['198.51.100.1/25:1080', '198.51.100.0/25', '[198.51.100.0/25]:1', '2001:db8::/64:1', '::/0:1', '[::/0]:1', '0.0.0.0/0:1', '224.0.0.0/8:1', '198.51.100.0/25:0', '[2001:db8::/64]:1080-1079']}]", []string{
			`2: server[0].listen[0]: has bits beyond its length, perhaps 198.51.100.0/25, got "198.51.100.1/25:1080"`,
			`2: server[0].listen[1]: want PREFIX:PORT, with an IPv6 prefix in brackets, got "198.51.100.0/25"`,
			`2: server[0].listen[2]: want PREFIX:PORT, with an IPv6 prefix in brackets, got "[198.51.100.0/25]:1"`,
			`2: server[0].listen[3]: want PREFIX:PORT, with an IPv6 prefix in brackets, got "2001:db8::/64:1"`,
			`2: server[0].listen[4]: want PREFIX:PORT, with an IPv6 prefix in brackets, got "::/0:1"`,
			`2: server[0].listen[5]: a prefix of all addresses is written :PORT, got "[::/0]:1"`,
			`2: server[0].listen[6]: a prefix of all addresses is written :PORT, got "0.0.0.0/0:1"`,
			`2: server[0].listen[7]: a multicast address cannot be listened on, got "224.0.0.0/8:1"`,
			`2: server[0].listen[8]: a port is 1 to 65535, got "198.51.100.0/25:0"`,
			`2: server[0].listen[9]: the range ends before it begins, got "[2001:db8::/64]:1080-1079"`,
		}},
		{"prefixes that overlap", escaper + "server: [{name: web, type: http_proxy, escaper: out, open: true, listen: ['198.51.100.0/25:1080', '198.51.100.0/24:1000-1080', '198.51.0.0/16:9']}]", []string{
			`2: server[0].listen[1]: is taken by server[0].listen[0] (line 2) already, got "198.51.100.0/24:1000-1080"`,
		}},
		{"listeners in a prefix", "metrics: {listen: '198.51.100.9:1081'}\n" + escaper + "server: [{name: web, type: http_proxy, escaper: out, open: true, listen: ['198.51.100.0/25:1080-1081', ':1080', '203.0.113.1:1081']}, {name: more, type: socks_proxy, escaper: out, open: true, listen: '[2001:db8::/64]:1081'}, {name: one, type: http_proxy, escaper: out, open: true, listen: '[2001:db8::7]:1081'}]", []string{
			`3: server[0].listen[0]: holds 198.51.100.9:1081, which is listened on by metrics.listen (line 1), got "198.51.100.0/25:1080-1081"`,
			`3: server[1].listen: holds [2001:db8::7]:1081, which is listened on by server[2].listen (line 3), got "[2001:db8::/64]:1081"`,
		}},
		{"an open prefix", escaper + "server: [{name: web, type: http_proxy, escaper: out, listen: '198.51.100.0/25:1080'}]", []string{
			`2: server[0].listen: without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant, got "198.51.100.0/25:1080"`,
		}},
		{"prefixes and addresses by port", escaper + "server: [{name: web, type: http_proxy, escaper: out, open: true, select: port, listen: ['198.51.100.0/25:1080', '127.0.0.1:1']}]", []string{
			`2: server[0].listen[0]: select: port counts the ports of prefixes or of single addresses, and here are both, got "198.51.100.0/25:1080"`,
		}},
		{"listen on a name", escaper + strings.Replace(server, "127.0.0.1", "localhost", 1) + "}]", []string{
			`2: server[0].listen: want IP:PORT, or :PORT for all addresses, got "localhost:3128"`,
		}},
		{"listen without a port", escaper + strings.Replace(server, ":3128", "", 1) + "}]", []string{
			`2: server[0].listen: want IP:PORT, or :PORT for all addresses, got "127.0.0.1"`,
		}},
		{"listen on port 65536", escaper + strings.Replace(server, ":3128", ":65536", 1) + "}]", []string{`2: server[0].listen: a port is 0 to 65535, got "127.0.0.1:65536"`}},
		{"listen, empty list", escaper + strings.Replace(server, "127.0.0.1:3128", "[]", 1) + "}]", []string{`2: server[0].listen: want at least one address, got "[...]"`}},
		{"open proxy", escaper + strings.Replace(server, "127.0.0.1:3128", "['127.0.0.1:3128', '192.0.2.1:3128']", 1) + "}]", []string{
			`2: server[0].listen[1]: without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant, got "192.0.2.1:3128"`,
		}},
		{"open proxy on all addresses", escaper + strings.Replace(server, "127.0.0.1:3128", "':3128'", 1) + "}]", []string{
			`2: server[0].listen: without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant, got ":3128"`,
		}},
		{"open proxy, said not to be", escaper + strings.Replace(server, "127.0.0.1:3128", "0.0.0.0:0", 1) + ", open: false}]", []string{
			`2: server[0].listen: without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant, got "0.0.0.0:0"`,
		}},
		{"one address, two servers", escaper + server + "}, {name: b, type: http_proxy, escaper: out, listen: 127.0.0.1:3128}]", []string{`2: server[1].listen: ` + second + `, got "127.0.0.1:3128"`}},
		{"one address twice", escaper + strings.Replace(server, "127.0.0.1:3128", "['127.0.0.1:3128', '127.0.0.1:3128']", 1) + "}]", []string{
			`2: server[0].listen[1]: is listened on by server[0].listen[0] (line 2) already, got "127.0.0.1:3128"`,
		}},
		{"all IPv4 addresses and one", escaper + server + "}, {name: b, type: http_proxy, escaper: out, open: on, listen: 0.0.0.0:3128}]", []string{`2: server[1].listen: ` + second + `, got "0.0.0.0:3128"`}},
		{"all addresses and one", escaper + server + "}, {name: b, type: http_proxy, escaper: out, open: on, listen: ':3128'}]", []string{`2: server[1].listen: ` + second + `, got ":3128"`}},
		{"one and all addresses", escaper + strings.Replace(server, "127.0.0.1:3128", "'[::]:3128', open: on", 1) + "}, {name: b, type: http_proxy, escaper: out, listen: 127.0.0.1:3128}]", []string{
			`2: server[1].listen: ` + second + `, got "127.0.0.1:3128"`,
		}},
		{"metrics and a server", escaper + server + "}]\nmetrics: {listen: 127.0.0.1:3128}", []string{
			`2: server[0].listen: is listened on by metrics.listen (line 3) already, got "127.0.0.1:3128"`,
		}},
		{"header name", escaper + server + ", path_selection_header: 'X Egress'}]", []string{
			"2: server[0].path_selection_header: want a header name: 1 to 64 letters, digits and !#$%&'*+-.^_`|~, got \"X Egress\"",
		}},
		{"hop-by-hop header", escaper + server + ", path_selection_header: proxy-authorization}]", []string{
			`2: server[0].path_selection_header: is a header between client and proxy with a meaning of its own, got "proxy-authorization"`,
		}},
		{"header that is needed", escaper + server + ", egress_path_selection_header: HOST}]", []string{
			`2: server[0].egress_path_selection_header: is a header that requests need, got "HOST"`,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantMistakes(t, tt.text, tt.want...) })
	}
}

// A node's mistake does not hide a user's, nor make one.
func TestUserOfBrokenEscaper(t *testing.T) {
	file := func(node, value string) string {
		return "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1}," + node + "]}]\n" +
			"user_group: [{name: g, users: [{name: u, password: '" + hash + "', egress_path: {out: " + value + "}}]}]\n"
	}
	for _, tt := range []struct {
		node, value string
		found       bool
	}{
		{"{id: a, ipv4: 192.0.2.2}", "z", true},
		{"{id: a, ipv4: 192.0.2.2}", "192.0.2.9", true},
		{"{id: a, ipv4: 192.0.2.2}", "a", false},
		{"{id: a, ipv4: 192.0.2.2}", "192.0.2.2", false},
		{"{id: a, ipv4: 192.0.2.2}", "2", false},
		{"{id: b, ipv4: 192.0.2.1}", "b", false},
		{"{id: b, ipv4: bad}", "b", false},
		{"{id: b, ipv4: bad}", "z", true},
		{"{id: b, ipv4: bad}", "192.0.2.9", false},
		{"{id: /, ipv4: 192.0.2.2}", "z", false},
		{"{id: /, ipv4: 192.0.2.2}", "192.0.2.2", false},
		{"{id: /, ipv4: 192.0.2.2}", "192.0.2.3", true},
		{"{ipv4: bad}", "192.0.2.9", false},
	} {
		got := mistakes(t, file(tt.node, tt.value))
		if found := strings.Contains(strings.Join(got, "\n"), "egress_path"); found != tt.found {
			t.Errorf("%s, egress_path %s: %q", tt.node, tt.value, got)
		}
	}
}

// A short file that its aliases make large.
func TestAliasBombs(t *testing.T) {
	var b strings.Builder
	b.WriteString("escaper:\n- {name: e0, type: direct_fixed, nodes: &n [")
	for i := range 2000 {
		fmt.Fprintf(&b, "{id: n%d, interface: eth0},", i)
	}
	b.WriteString("]}\n")
	for i := range 400 {
		fmt.Fprintf(&b, "- {name: f%d, type: direct_fixed, nodes: *n}\n", i)
	}
	got := mistakes(t, b.String())
	if len(got) != 1 || !strings.Contains(got[0], "aliases make the file too large") {
		t.Errorf("nodes by alias: %.300q", got)
	}

	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'z'; c++ {
		bomb += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1)
	}
	if got := mistakes(t, bomb); len(got) != 25 { // unknown keys are not followed
		t.Errorf("%d mistakes, want 25", len(got))
	}
	wantMistakes(t, "server: &s [*s]\n", `1: server[0]: want a map of keys and values, got "[...]"`)
	wantMistakes(t, "server: &s [{name: *s}]\n",
		`1: server[0].name: want a single value, got "[...]"`, `1: server[0].type: is required, got ""`,
		`1: server[0].escaper: is required, got ""`)
}

// Ten mistakes of a file are ten lines, in the order of the file.
func TestAllAtOnce(t *testing.T) {
	wantMistakes(t, `# a file with ten mistakes
control: {sockt: /run/w.sock}
accounting: perhaps
resolver:
  - {name: sys, type: system}
escaper:
  - name: out
    type: direct_fixed
    resolver: sis
    pick_policy: best
    nodes:
      - {id: fra-1, ipv4: 198.51.100.11, uplink: isp9}
      - {id: fra-1, ipv4: 198.51.100.12}
      - {id: fra-3, ipv4: 198.51.100.11}
user_group:
  - name: team
    users:
      - {name: alice, password: secret, egress_path: {out: fra-9}}
server:
  - name: web
    type: http_proxy
    listen: 0.0.0.0:3128
    escaper: out
`,
		`2: control.sockt: unknown key (perhaps socket is meant), got "sockt"`,
		`3: accounting: want on, off, true or false, got "perhaps"`,
		`9: escaper[0].resolver: no resolver has this name, got "sis"`,
		`10: escaper[0].pick_policy: want random, serial, round_robin, rendezvous, least_conn, jump or ketama, got "best"`,
		`12: escaper[0].nodes[0].uplink: no uplink has this name, got "isp9"`,
		`13: escaper[0].nodes[1].id: is the ID of the node on line 12 too, got "fra-1"`,
		`14: escaper[0].nodes[2].ipv4: address 198.51.100.11 is on the node on line 12 too, got "198.51.100.11"`,
		`18: user_group[0].users[0].password: plain text is refused: put what wayout hash-password prints here, got "(hidden)"`,
		`18: user_group[0].users[0].egress_path.out: is no node of escaper out, got "fra-9"`,
		`22: server[0].listen: without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant, got "0.0.0.0:3128"`,
	)
}
