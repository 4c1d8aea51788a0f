package config_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"wayout/router/config"
	"wayout/selection"
)

func FuzzParse(f *testing.F) {
	example, err := os.ReadFile(filepath.Join("testdata", "example.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	for _, s := range []string{
		"", "~", "a", "- a", "{", "a: [", "a: &a [*a]", "server: &s [*s]", "? a\n: b", "a: *b", "\x00", "\xff\xfe", "%YAML 9.9\n---\n",
		"a: 1\n---\nb: 2", "log: !!set {level: info}", "log: {<<: {level: info}}", "&k log: {level: info}\n*k : {}", "accounting: !!binary b24=",
		"escaper: [{name: out, type: direct_fixed, bind_ip: 10.0.0.0-10.0.1.0}]",
		"escaper: [{name: out, type: direct_fixed, nodes: [{id: 192.0.2.9, ipv4: 192.0.2.1}, {ipv4: 192.0.2.9}]}]",
		"escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1-192.0.2.3, ipv6: '2001:db8::1-2001:db8::3'}, {interface: x, id: b}]}]",
		"user_group: [{name: g, users: [{name: u, password: x, egress_path: {out: 1, *a : 2}}]}]",
		"escaper: [{name: out, type: direct_fixed, bind_ip: [10.0.0.0/24, 10.0.0.7, 10.0.0.0/30, '2001:db8::/64', 192.0.2.0/31]}]",
		"escaper: [{name: a, type: route_select, next: [b, {escaper: a, weight: 0}]}, {name: b, type: route_failover, next: [a]}]",
		"escaper: [{name: a, type: route_upstream, exact_match: [{next: f, hosts: [x.y, 192.0.2.1]}], regex_match: [{next: f, regexes: ['(']}], default_next: f}, {name: f, type: direct_float}]",
		"escaper: [{name: a, type: route_client, user_match: [{next: p, users: u}], subnet_match: [{next: p, subnets: 10.0.0.0/8}], default_next: p}, {name: p, type: proxy_https, tls_name: X, nodes: [{addr: '[2001:db8::1]:1'}, {addr: 'x:1', username: a, password: b, path: q/r}]}]",
		"escaper: [{name: f, type: direct_float}]\nuser_group: [{name: g, users: [{name: u, from: 10.0.0.0/8, egress_path: {f: {ip: 192.0.2.1, expire: 2030-01-01T00:00:00Z, a: b}}}]}]",
		"escaper: [{name: f, type: direct_float}]\nuser_group: [{name: g, users: [{name: u, from: 10.0.0.0/8, egress_path: '{\"f\": {\"ip\": \"192.0.2.1\"}, \"f\": 1}', limits: {rate: 1/h, bandwidth: 9kbit}}]}]",
		"escaper: [{name: f, type: direct_float}]\nserver: [{name: s, type: socks_proxy, listen: '127.0.0.1:1-9', select: port, escaper: f}, {name: m, type: mixed_proxy, listen: [':0'], open: on, select: '{\"f\":1}', escaper: f}]",
		"resolver: [{name: r, type: dns, server: [::1, '[::1]:5', 192.0.2.1:53], hosts: {a: 1.2.3.4, A.: [::1], '': []}, query_case: off}]",
		"#\n # \n\t#", "a: |\n  x\n # c\n b: 1", "drain_timeout: 1e309", "netcfg: {mark_mask: 0x}",
	} {
		f.Add([]byte(s))
	}
	line := regexp.MustCompile(`^w\.yaml:[1-9][0-9]*: .`)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse("w.yaml", data)
		if err != nil {
			var list config.Errors
			if c != nil || !errors.As(err, &list) || len(list) == 0 {
				t.Fatalf("want Errors alone, got %v, %v", c, err)
			}
			for _, e := range list {
				if s := e.Error(); !line.MatchString(s) || strings.ContainsAny(s, "\n\r") {
					t.Fatalf("not a line of its own with file and line: %q", s)
				}
				if e.Line > strings.Count(string(data), "\n")+strings.Count(string(data), "\r")+strings.Count(string(data), "\u2028")+
					strings.Count(string(data), "\u2029")+strings.Count(string(data), "\u0085")+1 {
					t.Fatalf("beyond the file: %s", e)
				}
			}
			return
		}
		for _, e := range c.Escapers {
			var members int
			switch {
			case e.Float():
				members = 1 // that come later
			case strings.HasPrefix(e.Type, "route_"):
				members = len(e.NextNames())
			default:
				members = len(e.Nodes) + len(e.Peers)
			}
			if e.Name == "" || members == 0 || (e.Resolver == "") != strings.HasPrefix(e.Type, "route_") {
				t.Fatalf("half an escaper: %+v", e)
			}
			nodes := make([]selection.Node, len(e.Nodes))
			for i, n := range e.Nodes {
				nodes[i] = selection.Node{ID: n.ID, V4: n.IPv4, V6: n.IPv6, Weight: n.Weight}
			}
			if _, err := selection.NewPool(nodes, selection.Options{}); err != nil {
				t.Fatalf("nodes that are accepted make no pool: %v", err)
			}
		}
	})
}

// many is a file with n nodes of one line each; share is how many nodes in a row have one address.
func many(n, share int) []byte {
	var b strings.Builder
	b.WriteString("uplink: [{name: isp1, interface: eth0}]\nescaper:\n  - name: out\n    type: direct_fixed\n    nodes:\n")
	for i := range n {
		a := i - i%share
		fmt.Fprintf(&b, "      - {id: n-%d, ipv4: 10.%d.%d.%d, uplink: isp1}\n", i, a>>16, a>>8&255, a&255)
	}
	return []byte(b.String())
}

// However many mistakes there are, all of them are told.
func TestManyMistakes(t *testing.T) {
	_, err := config.Parse("w.yaml", many(20000, 2))
	var list config.Errors
	if !errors.As(err, &list) || len(list) != 10000 {
		t.Fatalf("%d mistakes, want 10000", len(list))
	}
}

func BenchmarkParse65000Nodes(b *testing.B) {
	data := many(65000, 1)
	b.ReportAllocs()
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		c, err := config.Parse("w.yaml", data)
		if err != nil || len(c.Escapers[0].Nodes) != 65000 {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseRange(b *testing.B) {
	data := []byte("escaper: [{name: out, type: direct_fixed, bind_ip: 10.0.0.0-10.0.255.255}]")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := config.Parse("w.yaml", data); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseExample(b *testing.B) {
	data, err := os.ReadFile(filepath.Join("testdata", "example.yaml"))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := config.Parse("w.yaml", data); err != nil {
			b.Fatal(err)
		}
	}
}
