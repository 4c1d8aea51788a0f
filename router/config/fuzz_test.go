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
			if e.Resolver == "" || e.Name == "" || len(e.Nodes) == 0 {
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
