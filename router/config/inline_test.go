package config_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"wayout/router/config"
)

func TestParsePublication(t *testing.T) {
	got, err := config.ParsePublication([]byte(` [
  {"ip": "198.51.100.7"},
  {"ipv4": "198.51.100.8", "ipv6": "2001:DB8::8", "id": "two", "uplink": "isp1", "expire": "2030-01-02T05:04:05+02:00"},
  {"ip": "2001:db8::9", "ipv4": "198.51.100.9", "isp": "a b", "area": "Zürich", "eip": "203.0.113.9"},
  {"ip": "2001:db8::a"}
]
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []config.Inline{
		{ID: "198.51.100.7", V4: addr("198.51.100.7")},
		{
			ID: "two", V4: addr("198.51.100.8"), V6: addr("2001:db8::8"), Uplink: "isp1",
			Expire: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
		},
		{
			ID: "198.51.100.9", V4: addr("198.51.100.9"), V6: addr("2001:db8::9"),
			Labels: map[string]string{"isp": "a b", "area": "Zürich", "eip": "203.0.113.9"},
		},
		{ID: "2001:db8::a", V6: addr("2001:db8::a")},
	}
	if diff := cmp.Diff(want, got, compare()...); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, err := config.ParsePublication([]byte("[]")); err != nil || got == nil || len(got) != 0 {
		t.Errorf("an empty array: %v, %v", got, err)
	}
	if got, err := config.ParsePublication(publication(1 << 16)); err != nil || len(got) != 1<<16 {
		t.Errorf("the largest: %d, %v", len(got), err)
	}
}

// publication is an array of n nodes.
func publication(n int) []byte {
	var b strings.Builder
	b.WriteByte('[')
	for i := range n {
		if i > 0 {
			b.WriteString(",\n")
		}
		fmt.Fprintf(&b, `{"ip": "10.%d.%d.%d"}`, i>>16, i>>8&255, i&255)
	}
	b.WriteByte(']')
	return []byte(b.String())
}

func TestBadPublications(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string
	}{
		{"empty", "", []string{"not JSON: the text ends too early"}},
		{"an object", `{"ip": "192.0.2.1"}`, []string{"want a JSON array of nodes"}},
		{"a word", `null`, []string{"want a JSON array of nodes"}},
		{"cut", `[{"ip": "192.0.2.1"}`, []string{"not JSON: the text ends too early"}},
		{"cut inside", `[{"ip": "192.`, []string{"not JSON: the text ends too early"}},
		{"more behind it", "[]\n\n[]", []string{"line 3: something follows the array"}},
		{"a word behind it", "[]x", []string{"line 1: something follows the array"}},
		{"Latin-1", "[{\"ip\": \"192.0.2.1\", \"a\": \"\xfc\"}]", []string{"not JSON: the text is not UTF-8"}},
		{"no objects", `["192.0.2.1", 7, [], null]`, []string{
			`node 1: want a JSON object, got "\"192.0.2.1\""`, `node 2: want a JSON object, got "7"`,
			`node 3: want a JSON object, got "[]"`, `node 4: want a JSON object, got "null"`,
		}},
		{"no address", `[{"id": "a"}, {}]`, []string{"node 1: ip: is required, or else ipv4 or ipv6", "node 2: ip: is required, or else ipv4 or ipv6"}},
		{"date", `[{"ip": "192.0.2.1", "expire": "x"}, {"ip": "192.0.2.2", "expire": "2030-01-01"}]`, []string{
			`node 1: expire: want RFC 3339, as 2026-01-31T12:00:00Z, got "x"`,
			`node 2: expire: want RFC 3339, as 2026-01-31T12:00:00Z, got "2030-01-01"`,
		}},
		{"a date that would be none", `[{"ip": "192.0.2.1", "expire": "0001-01-01T00:00:00Z"}]`, []string{`node 1: expire: is out of range, got "0001-01-01T00:00:00Z"`}},
		{"types", `[{"ip": 7, "expire": 1893456000, "weight": 2, "up": true, "x": null, "y": {}}]`, []string{
			`node 1: ip: want a string, got "7"`, `node 1: expire: want a string, got "1893456000"`, `node 1: weight: want a string, got "2"`,
			`node 1: up: want a string, got "true"`, `node 1: x: want a string, got "null"`, `node 1: y: want a string, got "{}"`,
		}},
		{"one family twice", `[{"ip": "192.0.2.1", "ipv4": "192.0.2.2"}, {"ip": "2001:db8::1", "ipv6": "2001:db8::1"}]`, []string{
			`node 1: ipv4: the node has an IPv4 address already, got "192.0.2.2"`,
			`node 2: ipv6: the node has an IPv6 address already, got "2001:db8::1"`,
		}},
		{"families", `[{"ipv4": "2001:db8::1"}, {"ipv6": "192.0.2.1"}]`, []string{
			`node 1: ipv4: want an IPv4 address, got "2001:db8::1"`, `node 2: ipv6: want an IPv6 address, got "192.0.2.1"`,
		}},
		{"addresses", `[{"ip": "0.0.0.0"}, {"ip": "::ffff:192.0.2.1"}, {"ip": "fe80::1%eth0"}, {"ip": "224.0.0.1"}, {"ip": "10.0.0.0/24"}]`, []string{
			`node 1: ip: the unspecified address is not one to send from or to, got "0.0.0.0"`,
			`node 2: ip: write the IPv4 address as 192.0.2.1, got "::ffff:192.0.2.1"`,
			`node 3: ip: an address has no zone here: give the interface by its own key, got "fe80::1%eth0"`,
			`node 4: ip: a multicast address is not one to send from or through, got "224.0.0.1"`,
			`node 5: ip: want an IP address, got "10.0.0.0/24"`,
		}},
		{"names", `[{"ip": "192.0.2.1", "id": "7"}, {"ip": "192.0.2.2", "id": "a/b", "uplink": ""}]`, []string{
			`node 1: id: must not be all digits, got "7"`,
			`node 2: id: want letters, digits and . _ : - with a letter or digit first, got "a/b"`,
			`node 2: uplink: is empty, got ""`,
		}},
		{"key twice", `[{"ip": "192.0.2.1", "ip": "192.0.2.1"}, {"a": "1", "ip": "192.0.2.2", "a": "2"}]`, []string{
			"node 1: ip: is given twice", "node 2: a: is given twice",
		}},
		{"key in another case", `[{"ip": "192.0.2.1", "Expire": "2030-01-01T00:00:00Z"}]`, []string{
			`node 1: Expire: write the key as expire, got "2030-01-01T00:00:00Z"`,
		}},
		{"labels", `[{"ip": "192.0.2.1", "a b": "x", "c": "\u0007", "d": "\ud800", "": "x"}]`, []string{
			`node 1: "a b": the name of a label: want letters, digits and . _ : - with a letter or digit first, got "x"`,
			`node 1: c: a label holds printable text, got "\a"`,
			`node 1: d: a label holds printable text, got "�"`,
			`node 1: "": the name of a label: is empty, got "x"`,
		}},
		{"long label", `[{"ip": "192.0.2.1", "a": "` + strings.Repeat("x", 256) + `"}]`, []string{
			`node 1: a: a label has at most 255 bytes, got "` + strings.Repeat("x", 80) + `..."`,
		}},
		{"IDs", `[{"ip": "192.0.2.1", "id": "a"}, {"ip": "192.0.2.2", "id": "a"}, {"ip": "192.0.2.3", "id": "192.0.2.4"}, {"ip": "192.0.2.4"}]`, []string{
			`node 2: id: is the ID of node 1 too, got "a"`,
			`node 3: id: is the address of node 4, got "192.0.2.4"`,
			`node 4: id: is the ID of node 3 too, got "192.0.2.4"`,
		}},
		{"addresses of two", `[{"ip": "192.0.2.1"}, {"ip": "192.0.2.1"}, {"id": "c", "ipv6": "2001:db8::1"}, {"id": "d", "ipv4": "192.0.2.9", "ip": "2001:DB8:0::1"}]`, []string{
			`node 2: address 192.0.2.1 is on node 1 too`,
			`node 4: address 2001:db8::1 is on node 3 too`,
		}},
		{"too many", string(publication(1<<16 + 1)), []string{"a publication has at most 65536 nodes"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			nodes, err := config.ParsePublication([]byte(tt.text))
			if err == nil || nodes != nil {
				t.Fatalf("got %v, %v", nodes, err)
			}
			if got, want := err.Error(), strings.Join(tt.want, "\n"); got != want {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// What is not JSON is said by the library, and where by us.
func TestBrokenPublication(t *testing.T) {
	for text, want := range map[string]string{
		"[\n{\"ip\": \"192.0.2.1\"}\n{}]": "line 3: not JSON: ",
		"[\n{\"ip\": 'x'}]":               "line 2: not JSON: ",
		"[{},\n\n]":                       "line 3: not JSON: ",
		"ip: 192.0.2.1":                   "line 1: not JSON: ",
	} {
		if nodes, err := config.ParsePublication([]byte(text)); nodes != nil || err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func FuzzParsePublication(f *testing.F) {
	for _, s := range []string{
		"", "[]", "[{}]", "[[]]", "null", `[{"ip":"192.0.2.1"}]`, `[{"ip":"192.0.2.1"},{"ip":"192.0.2.1"}]`, `[{"ip":"::1","ip":"::2"}]`,
		`[{"ip":"192.0.2.1","ipv6":"2001:db8::1","id":"a","uplink":"u","expire":"2030-01-01T00:00:00Z","isp":"x"}]`,
		`[{"id":"192.0.2.2","ip":"192.0.2.1"},{"ip":"192.0.2.2"}]`, `[{"ip":"192.0.2.1","a":"\ud83d"}]`, "[{\"ip\":\"\xff\"}]", "[] x", "[{\"a\":1e999}]",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		nodes, err := config.ParsePublication(data)
		if err != nil {
			if nodes != nil || err.Error() == "" {
				t.Fatalf("nodes beside an error, or an empty one: %v, %q", nodes, err)
			}
			return
		}
		ids, addrs := map[string]int{}, map[netip.Addr]int{}
		for i, n := range nodes {
			if n.V4.IsValid() && !n.V4.Is4() || n.V6.IsValid() && (!n.V6.Is6() || n.V6.Is4In6() || n.V6.Zone() != "") || n.ID == "" {
				t.Fatalf("not a node: %+v", n)
			}
			if _, ok := ids[n.ID]; ok {
				t.Fatalf("two nodes are %q", n.ID)
			}
			ids[n.ID] = i
			found := false
			for _, a := range [...]netip.Addr{n.V4, n.V6} {
				if !a.IsValid() {
					continue
				}
				if _, ok := addrs[a]; ok {
					t.Fatalf("two nodes have %s", a)
				}
				addrs[a], found = i, true
			}
			if !found {
				t.Fatalf("no address: %+v", n)
			}
		}
		for id, i := range ids {
			if a, err := netip.ParseAddr(id); err == nil {
				if owner, ok := addrs[a.Unmap()]; ok && owner != i {
					t.Fatalf("node %d is called by the address of node %d", i, owner)
				}
			}
		}
	})
}
