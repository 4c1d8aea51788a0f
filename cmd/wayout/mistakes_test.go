package main_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// brokenConfig has a mistake on each line that a mark names.
const brokenConfig = `control: {socket: /run/wayout-test.sock}
log: {format: xml, level: info}                                     #1
drain_timeout: soon                                                 #2
acounting: on                                                       #3
uplink:
  - {name: isp1, interface: eth0, gateway4: "2001:db8::1"}          #4
escaper:
  - name: out
    type: direct_fixed
    pick_policy: fastest                                            #5
    nodes:
      - {id: a, ipv4: 198.51.100.11}
      - {id: a, ipv4: 198.51.100.12}                                #6
      - {id: b, ipv4: 198.51.100.11}                                #7
      - {id: c, ipv4: 198.51.100.13, uplink: isp9}                  #8
      - {id: 198.51.100.11, ipv4: 198.51.100.14}                    #9
      - {id: d, ipv4: 198.51.100.15, weight: 65536}                 #10
user_group:
  - name: team
    users:
      - {name: alice, password: secret, egress_path: {out: zz}}     #11 #12
      - {name: alice, password: "$2y$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy"} #13
server:
  - {name: web, type: http_proxy, listen: 0.0.0.0:3128, escaper: out}          #14
  - {name: two, type: http_proxy, listen: 127.0.0.1:3128, escaper: uot}        #15 #16
  - {name: six, type: tproxy, interface: lan0, escaper: out}                   #17
`

// TestAllMistakesAtOnce reads a file with many, by each command that reads
// one.
func TestAllMistakesAtOnce(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "wayout.yaml")
	write(t, file, brokenConfig)
	var want []string
	for i, line := range strings.Split(brokenConfig, "\n") {
		for range strings.Count(line, " #") {
			want = append(want, fmt.Sprintf("%s:%d: ", file, i+1))
		}
	}
	form := regexp.MustCompile(`^` + regexp.QuoteMeta(file) + `:\d+: [a-z0-9_]+(\[\d+\]|\.[A-Za-z0-9_.-]+)*: [^:]+.*, got ".*"$`)
	judge := func(what string, lines []string) {
		t.Helper()
		if len(lines) != len(want) {
			t.Errorf("%s: %d mistakes, want %d:\n%s", what, len(lines), len(want), strings.Join(lines, "\n"))
			return
		}
		for i, line := range lines {
			if !strings.HasPrefix(line, want[i]) || !form.MatchString(line) {
				t.Errorf("%s: %q, want %sKEY: what is wrong, got \"value\"", what, line, want[i])
			}
		}
		if all := strings.Join(lines, "\n"); strings.Contains(all, "secret") {
			t.Errorf("%s shows the password:\n%s", what, all)
		}
	}
	for _, verb := range []string{"check", "serve", "paths", "plan", "apply", "clean", "doctor"} {
		out, errs, code := wayout(t, "", verb, "--config", file)
		if code != 2 || out != "" {
			t.Errorf("%s: %d %q", verb, code, out)
		}
		judge(verb, strings.Split(strings.TrimSuffix(errs, "\n"), "\n"))
	}
	out, errs, code := wayout(t, "", "check", "--json", "--config", file)
	found := decodeFaults(t, out)
	if code != 2 || errs != "" || found.OK {
		t.Errorf("check --json: %d %q %q", code, out, errs)
	}
	var lines []string
	for _, f := range found.Errors {
		lines = append(lines, fmt.Sprintf("%s:%d: %s: %s", f.File, f.Line, f.Key, f.Message))
	}
	judge("check --json", lines)
}

// faults is what check prints with --json.
type faults struct {
	OK     bool `json:"ok"`
	Errors []struct {
		File    string `json:"file"`
		Line    int    `json:"line"`
		Key     string `json:"key"`
		Message string `json:"message"`
	} `json:"errors"`
}

func decodeFaults(t *testing.T, text string) (f faults) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil || f.Errors == nil || strings.Count(text, "\n") != 1 {
		t.Errorf("%q: %v", text, err)
	}
	return f
}

// TestSingleMistakes has one mistake a row, in a file that is good but for it.
func TestSingleMistakes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const (
		head   = "control: {socket: /run/wayout-test.sock}\n"
		out    = "escaper: [{name: out, type: direct_fixed, bind_ip: [198.51.100.11, 198.51.100.12]}]\n"
		server = "server: [{name: web, type: http_proxy, listen: 127.0.0.1:3128, escaper: out}]\n"
		bcrypt = "$2y$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy"
	)
	node := func(nodes string) string {
		return head + "escaper:\n  - name: out\n    type: direct_fixed\n    nodes:\n" + nodes + server
	}
	user := func(keys string) string {
		return head + out + "user_group:\n  - name: team\n    users:\n      - {name: alice, " + keys + "}\n" + server
	}
	hash := func(text string) string { return user(`password: "` + text + `"`) }
	with := func(lines string) string { return head + out + server + lines }
	front := func(keys string) string {
		return head + out + "server:\n  - {name: web, type: http_proxy, listen: 127.0.0.1:3128, escaper: out, " + keys + "}\n"
	}
	if o, errs, code := checkText(t, dir, head+out+server); code != 0 || o != "ok\n" || errs != "" {
		t.Fatalf("the good file: %d %q %q", code, o, errs)
	}
	for _, c := range []struct{ name, text, want string }{
		{"empty file", "", `1: `},
		{"no map", "- a\n", `1: (the file): want a map of keys and values, got "[...]"`},
		{"not YAML", head + "escaper: [\n", `2: not YAML: `},
		{"tab", head + "escaper:\n\t- {}\n", `3: not YAML: `},
		{"two documents", with("---\n"), `4: `},
		{"not UTF-8", with("log: {format: \xff}\n"), `4: not YAML: the text is not UTF-8`},
		{"unknown key", with("colour: red\n"), `4: colour: unknown key, got "colour"`},
		{"mistyped key", with("meterics: {listen: 127.0.0.1:1}\n"), `4: meterics: unknown key`},
		{"unknown key within", with("log:\n  formt: json\n"), `5: log.formt: unknown key`},
		{"repeated key", with(head), `4: control: is given twice, first on line 1, got "control"`},
		{
			"both names of a key", user("password: '" + bcrypt + "', egress_path: {out: 1}, egress_path_id_map: {out: 1}"),
			`6: user_group[0].users[0].egress_path_id_map: means the same as egress_path on line 6: give one of them, got "egress_path_id_map"`,
		},
		{"pin to no path", with("pin: [{cgroup: /a, path: out/none}]\n"), `4: pin[0].path: no node of escaper out has the ID none, got "out/none"`},
		{"unknown type", head + "escaper:\n  - {name: out, type: direct, bind_ip: 192.0.2.1}\n" + server, `3: escaper[0].type: want direct_fixed, direct_float, route_select, route_mapping, route_failover, route_upstream, route_client, proxy_http, proxy_https, proxy_socks5 or proxy_float, got "direct"`},
		{"switch", with("accounting: perhaps\n"), `4: accounting: want on, off, true or false, got "perhaps"`},
		{"duration", with("drain_timeout: -1s\n"), `4: drain_timeout: want a time such as 500ms, 30s, 5m or 2h, got "-1s"`},
		{"duration out of range", with("drain_timeout: 2d\n"), `4: drain_timeout: is out of range 0s to 24h, got "2d"`},
		{"number", with("netcfg: {table_base: many}\n"), `4: netcfg.table_base: want a whole number from `},
		{"list in place of a value", with("drain_timeout: [1s]\n"), `4: drain_timeout: want a single value, got "[...]"`},
		{"value in place of a list", head + "escaper: none\n", `2: escaper: want a list, got "none"`},
		{"no value", with("drain_timeout:\n"), `4: drain_timeout: has no value, got ""`},

		{"no name", head + "escaper:\n  - {type: direct_fixed, bind_ip: 192.0.2.1}\n", `3: escaper[0].name: is required, got ""`},
		{"name of digits", node("      - {id: 12, ipv4: 198.51.100.11}\n"), `6: escaper[0].nodes[0].id: must not be all digits, got "12"`},
		{"name with a slash", node("      - {id: a/b, ipv4: 198.51.100.11}\n"), `6: escaper[0].nodes[0].id: want letters, digits and . _ : - with a letter or digit first, got "a/b"`},
		{
			"repeated escaper", head + "escaper:\n  - {name: out, type: direct_fixed, bind_ip: 192.0.2.1}\n  - {name: out, type: direct_fixed, bind_ip: 192.0.2.2}\n" + server,
			`4: escaper[1].name: is taken, see line 3, got "out"`,
		},
		{"repeated ID", node("      - {id: a, ipv4: 198.51.100.11}\n      - {id: a, ipv4: 198.51.100.12}\n"), `7: escaper[0].nodes[1].id: is the ID of the node on line 6 too, got "a"`},
		{"repeated address", node("      - {id: a, ipv4: 198.51.100.11}\n      - {id: b, ipv4: 198.51.100.11}\n"), `7: escaper[0].nodes[1].ipv4: address 198.51.100.11 is on the node on line 6 too, got "198.51.100.11"`},
		{"ID that is another's address", node("      - {id: a, ipv4: 198.51.100.11}\n      - {id: 198.51.100.11, ipv4: 198.51.100.12}\n"), `7: escaper[0].nodes[1].id: is the address of the node on line 6, got "198.51.100.11"`},
		{"IPv6 in ipv4", node("      - {id: a, ipv4: \"2001:db8::1\"}\n"), `6: escaper[0].nodes[0].ipv4: want an IPv4 address, got "2001:db8::1"`},
		{"no address", node("      - {id: a, ipv4: 198.51.100}\n"), `6: escaper[0].nodes[0].ipv4: want an IP address, got "198.51.100"`},
		{"weight", node("      - {id: a, ipv4: 198.51.100.11, weight: -1}\n"), `6: escaper[0].nodes[0].weight: is out of range 0 to 65535, got "-1"`},
		{"uplink that is none", node("      - {id: a, ipv4: 198.51.100.11, uplink: isp1}\n"), `6: escaper[0].nodes[0].uplink: no uplink has this name, got "isp1"`},
		{
			"pins that contradict", head + "uplink: [{name: isp1, interface: eth0}]\nescaper:\n  - name: out\n    type: direct_fixed\n    nodes:\n      - {id: a, ipv4: 198.51.100.11, uplink: isp1, interface: eth1}\n" + server,
			`7: escaper[0].nodes[0].interface: contradicts uplink isp1, whose interface is eth0, got "eth1"`,
		},
		{"nodes and bind_ip", head + "escaper:\n  - name: out\n    type: direct_fixed\n    bind_ip: 192.0.2.1\n    nodes: [{id: a, ipv4: 192.0.2.2}]\n" + server, `5: escaper[0].bind_ip: give nodes or bind_ip, not both, got "192.0.2.1"`},
		{"no nodes", head + "escaper:\n  - {name: out, type: direct_fixed}\n" + server, `3: escaper[0].nodes: is required, or else bind_ip or interface, got ""`},
		{"class of networks", head + "escaper:\n  - name: out\n    type: direct_fixed\n    bind_ip: 192.0.2.1\n    egress_network_filter:\n      deny:\n        - publik\n" + server, `8: escaper[0].egress_network_filter.deny[0]: want a network`},

		{"escaper that is none", strings.Replace(with(""), "escaper: out}", "escaper: uot}", 1), `3: server[0].escaper: no escaper has this name, got "uot"`},
		{"user group that is none", front("user_group: team"), `4: server[0].user_group: no user_group has this name, got "team"`},
		{
			"open proxy", head + out + "server:\n  - {name: web, type: http_proxy, listen: [127.0.0.1:3128, 192.0.2.1:3128], escaper: out}\n",
			`4: server[0].listen[1]: without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant, got "192.0.2.1:3128"`,
		},
		{"no port", head + out + "server:\n  - {name: web, type: http_proxy, listen: 127.0.0.1, escaper: out}\n", `4: server[0].listen: want IP:PORT, or :PORT for all addresses, got "127.0.0.1"`},
		{"listener twice", with("metrics: {listen: 127.0.0.1:3128}\n"), `3: server[0].listen: is listened on by metrics.listen (line 4) already, got "127.0.0.1:3128"`},
		{"header that requests need", front("path_selection_header: Host"), `4: server[0].path_selection_header: is a header that requests need, got "Host"`},
		{"header of the connection", front("path_selection_header: Proxy-Authorization"), `4: server[0].path_selection_header: is a header between client and proxy with a meaning of its own, got "Proxy-Authorization"`},
		{"header that is no name", front("path_selection_header: \"X Path\""), `4: server[0].path_selection_header: want a header name`},
		{"header that reports", front("path_selection_header: X-Egress-IP"), `4: server[0].path_selection_header: `},

		{"plain password", hash("secret"), `6: user_group[0].users[0].password: plain text is refused: put what wayout hash-password prints here, got "(hidden)"`},
		{"another hash", hash("$6$abc$def"), `6: user_group[0].users[0].password: want an argon2id or bcrypt hash, got "(hidden)"`},
		{"bcrypt cut short", hash(bcrypt[:59]), `6: user_group[0].users[0].password: a bcrypt hash has 60 characters, got "(hidden)"`},
		{"name with a colon", strings.Replace(hash(bcrypt), "name: alice", "name: \"a:b\"", 1), `6: user_group[0].users[0].name: must hold no colon: Basic authentication ends the name there, got "a:b"`},
		{"map to an unknown escaper", user("password: '" + bcrypt + "', egress_path: {in: a}"), `6: user_group[0].users[0].egress_path.in: no escaper has this name, got "in"`},
		{"map to an unknown node", user("password: '" + bcrypt + "', egress_path: {out: a}"), `6: user_group[0].users[0].egress_path.out: is no node of escaper out (1 to 2 by index, or an ID or address), got "a"`},
		{"map that is no JSON", user("password: '" + bcrypt + "', egress_path: '{out: a}'"), `6: user_group[0].users[0].egress_path: want a map of escapers, or a string that holds one as a JSON object`},
		{"pattern", user("password: '" + bcrypt + "', allow_path: [out]"), `6: user_group[0].users[0].allow_path[0]: want ESCAPER/ID`},

		// What only those who use the values know: the line and the key are
		// wanted all the same.
		{"mark of too few bits", with("netcfg: {mark_mask: 0x1}\n"), `4: netcfg.mark_mask: `},
		{"table of the host's", with("netcfg: {table_base: 100}\n"), `4: netcfg.table_base: `},
		{"priorities behind the main table", with("netcfg: {rule_priority: 32765}\n"), `4: netcfg.rule_priority: `},
		{"bcrypt that takes hours", hash(strings.Replace(bcrypt, "$10$", "$31$", 1)), `6: user_group[0].users[0].password: `},
		{"argon2id that takes all memory", hash("$argon2id$v=19$m=99999999,t=2,p=1$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAA"), `6: user_group[0].users[0].password: `},
		{"argon2id without a salt", hash("$argon2id$v=19$m=19456,t=2,p=1$!$AAAAAAAAAAAAAAAAAAAAAA"), `6: user_group[0].users[0].password: `},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o, errs, code := checkText(t, t.TempDir(), c.text)
			if code != 2 || o != "" {
				t.Errorf("%d %q", code, o)
			}
			_, rest, ok := strings.Cut(errs, "wayout.yaml:")
			if lines := strings.Count(errs, "\n"); !ok || lines != 1 || !strings.HasPrefix(rest, c.want) {
				t.Errorf("got %q,\nwant %q", errs, "wayout.yaml:"+c.want)
			}
			if strings.Contains(errs, "c2FsdHNhbHRzYWx0") || strings.Contains(errs, "secret") {
				t.Errorf("the password is shown: %q", errs)
			}
		})
	}
	for _, missing := range []string{filepath.Join(dir, "none.yaml"), dir} {
		o, errs, code := wayout(t, "", "check", "--config", missing)
		if code != 2 || o != "" {
			t.Errorf("%s: %d %q", missing, code, o)
		}
		sentence(t, missing, errs)
	}
}

func checkText(t *testing.T, dir, text string) (stdout, stderr string, code int) {
	t.Helper()
	file := filepath.Join(dir, "wayout.yaml")
	write(t, file, text)
	return wayout(t, "", "check", "--config", file)
}
