package config_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"wayout/router/config"
)

func TestParsePeers(t *testing.T) {
	t.Parallel()
	got, err := config.ParsePeers([]byte(` [
  {"type": "socks5", "addr": "192.0.2.9:1080"},
  {"type": "http", "addr": "Proxy.Example:3128", "id": "two", "username": "u", "password": "p:\"w\u00e4rd", "path": "out/fra-1",
   "weight": 0, "expire": "2030-01-02T05:04:05+02:00", "isp": "a b", "area": "Zürich", "eip": "203.0.113.9"},
  {"type": "proxy_https", "addr": "[2001:DB8::1]:3129", "id": "s", "tls_name": "Proxy.Example", "tls_ca": "/etc/ca.pem",
   "weight": "7", "eip": ["203.0.113.9", "2001:db8::9"]}
] `))
	if err != nil {
		t.Fatal(err)
	}
	want := []config.PublishedPeer{
		{Kind: "proxy_socks5", Peer: config.Peer{ID: "192.0.2.9:1080", Addr: "192.0.2.9:1080", Weight: 1}},
		{
			Kind: "proxy_http",
			Peer: config.Peer{
				ID: "two", Addr: "proxy.example:3128", Username: "u", Password: `p:"wärd`, Path: "out/fra-1",
				EIP: []netip.Addr{addr("203.0.113.9")},
			},
			Expire: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC), Labels: map[string]string{"isp": "a b", "area": "Zürich"},
		},
		{
			Kind:    "proxy_https",
			Peer:    config.Peer{ID: "s", Addr: "[2001:db8::1]:3129", Weight: 7, EIP: []netip.Addr{addr("203.0.113.9"), addr("2001:db8::9")}},
			TLSName: "proxy.example", TLSCA: "/etc/ca.pem",
		},
	}
	if diff := cmp.Diff(want, got, compare()...); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, err := config.ParsePeers([]byte("[]")); err != nil || got == nil || len(got) != 0 {
		t.Errorf("an empty array: %v, %v", got, err)
	}
}

func TestBadPeers(t *testing.T) {
	t.Parallel()
	const ok = `"type": "http", "addr": "a.example:1"`
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"empty", "", []string{"not JSON: the text ends too early"}},
		{"more behind it", "[]\n\n[]", []string{"line 3: something follows the array"}},
		{"an object", "{" + ok + "}", []string{"want a JSON array of nodes"}},
		{"URLs", `["http://u:secret@a.example:1", 1]`, []string{"node 1: want a JSON object", "node 2: want a JSON object"}},
		{"nothing", `[{}]`, []string{"node 1: type: is required", "node 1: addr: is required"}},
		{"type", `[{"type": "HTTP", "addr": "a.example:1"}, {"type": 1, "addr": "b.example:1"}]`, []string{
			`node 1: type: want http, https or socks5, got "HTTP"`, `node 2: type: want a string, got "1"`,
		}},
		{"addr", `[{"type": "http", "addr": "a.example"}, {"type": "http", "addr": "u:secret@a.example:1"}, {"type": "http", "addr": "0.0.0.0:1"}, {"type": "http", "addr": "a:0"}]`, []string{
			`node 1: addr: want HOST:PORT, with an IPv6 address in brackets, got "a.example"`,
			`node 2: addr: want HOST:PORT, with an IPv6 address in brackets, got "(hidden)"`,
			`node 3: addr: the unspecified address is not one to send from or to, got "0.0.0.0:1"`,
			`node 4: addr: a port is 1 to 65535, got "a:0"`,
		}},
		{"half of the credentials", `[{` + ok + `, "username": "secret"}, {` + ok + `, "id": "b", "password": "secret"}]`, []string{
			"node 1: password: is required beside username", "node 2: username: is required beside password",
		}},
		{"credentials", `[{` + ok + `, "username": "a:secret", "password": ""}, {` + ok + `, "id": "b", "username": "secret\u0007", "password": 123456}]`, []string{
			`node 1: password: is empty, got "(hidden)"`,
			`node 1: username: must hold no colon: Basic authentication ends the name there, got "(hidden)"`,
			`node 2: username: holds a control character, got "(hidden)"`,
			`node 2: password: want a string, got "(hidden)"`,
		}},
		{"a colon for SOCKS", `[{"type": "socks5", "addr": "a.example:1", "username": "a:b", "password": "secret", "weight": -1}]`, []string{
			`node 1: weight: want a whole number from 0 to 65535, got "-1"`,
		}},
		{"keys that are called otherwise", `[{` + ok + `, "user": "secret", "Password": "secret", "ip": "192.0.2.1", "uplink": "isp1"}]`, []string{
			`node 1: user: is no key: credentials are username and password, got "(hidden)"`,
			`node 1: Password: write the key as password, got "(hidden)"`,
			`node 1: ip: is no key: where the proxy listens is addr, HOST:PORT, got "(hidden)"`,
			`node 1: uplink: is no key: the way to the proxy is path, ESCAPER/ID of a direct_fixed, got "(hidden)"`,
		}},
		{"a key twice", `[{` + ok + `, "password": "secret", "password": "secret", "username": "u"}]`, []string{`node 1: password: is given twice`}},
		{"an ID twice", `[{` + ok + `}, {` + ok + `}, {` + ok + `, "id": "x"}, {` + ok + `, "id": "x"}]`, []string{
			`node 2: id: is the ID of node 1 too, got "a.example:1"`, `node 4: id: is the ID of node 3 too, got "x"`,
		}},
		{"an ID that is none", `[{` + ok + `, "id": "12"}, {"type": "http", "addr": "[::1]:1"}]`, []string{
			`node 1: id: must not be all digits, got "12"`, `node 2: id: is required where addr is no name`,
		}},
		{"expire", `[{` + ok + `, "expire": "tomorrow"}]`, []string{`node 1: expire: want RFC 3339, as 2026-01-31T12:00:00Z, got "tomorrow"`}},
		{"path", `[{` + ok + `, "path": "fra-1"}]`, []string{`node 1: path: want ESCAPER/ID, got "fra-1"`}},
		{"weight", `[{` + ok + `, "weight": 65536}, {` + ok + `, "id": "b", "weight": 1.5}, {` + ok + `, "id": "c", "weight": null}]`, []string{
			`node 1: weight: want a whole number from 0 to 65535, got "65536"`, `node 2: weight: want a whole number from 0 to 65535, got "1.5"`,
			`node 3: weight: want a whole number from 0 to 65535, got "null"`,
		}},
		{"eip", `[{` + ok + `, "eip": "x"}, {` + ok + `, "id": "b", "eip": ["192.0.2.1", "192.0.2.2"]}, {` + ok + `, "id": "c", "eip": []}, {` + ok + `, "id": "d", "eip": [1]}]`, []string{
			`node 1: eip: want an IP address, got "x"`,
			`node 2: eip: there is an address of this family already, got "[\"192.0.2.1\", \"192.0.2.2\"]"`,
			`node 3: eip: want at least one address, got "[]"`,
			`node 4: eip: want an address, or a list of one of each family, got "[1]"`,
		}},
		{"TLS of others", `[{` + ok + `, "tls_name": "a"}, {"type": "https", "addr": "a.example:2", "tls_ca": "ca.pem"}]`, []string{
			"node 1: tls_name: is for a proxy of type https", `node 2: tls_ca: want the whole path of a file, from /, got "ca.pem"`,
		}},
		{"labels", `[{` + ok + `, "a b": "c", "x": 1}]`, []string{
			`node 1: "a b": the name of a label: want letters, digits and . _ : - with a letter or digit first, got "(hidden)"`,
			`node 1: x: want a string, got "(hidden)"`,
		}},
	} {
		nodes, err := config.ParsePeers([]byte(c.text))
		if err == nil || nodes != nil {
			t.Errorf("%s: %v, no error", c.name, nodes)
			continue
		}
		if diff := cmp.Diff(c.want, strings.Split(err.Error(), "\n")); diff != "" {
			t.Errorf("%s: -want +got:\n%s", c.name, diff)
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: a credential shows: %v", c.name, err)
		}
	}
}

// FuzzPublication reads what is published, of both kinds, and holds what is made
// of it to what encoding/json makes of it.
func FuzzPublication(f *testing.F) {
	for _, s := range []string{
		"", "[]", " [ ] ", "[{}]", "[{},]", "[[]]", "null", "[][]", "[null, 1, true, \"x\", []]", "[{\"\\u0069p\": \"192.0.2.1\"}]",
		`[{"ip": "192.0.2.1"}, {"ipv4": "192.0.2.2", "ipv6": "2001:db8::2", "id": "b", "uplink": "isp1", "expire": "2030-01-01T00:00:00Z", "isp": "x"}]`,
		`[{"type":"http","addr":"a.example:1","username":"u","password":"pass\\word\"","path":"out/fra-1","weight":3,"eip":["192.0.2.1","2001:db8::1"]}]`,
		`[{"type":"https","addr":"[::2]:1","id":"x","tls_name":"a","tls_ca":"/x","weight":"0","label":"\ud83d\ude00"},{"type":"socks5","addr":"192.0.2.1:1080"}]`,
		`[{"a":{"b":[1,2,{"c":"]}"}]},"weight":1e3}]`, "[{\"type\":\"http\" , \"addr\"\n:\"a:1\"\t}]", "[1 ]", "[\"\\\\\"]", "{\"a\":1}", "[{\"a\":1}}]",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var whole []json.RawMessage
		valid := utf8.Valid(b) && json.Unmarshal(b, &whole) == nil && whole != nil
		nodes, err := config.ParsePublication(b)
		checkPublication(t, valid, len(whole), len(nodes), err)
		for i := range nodes {
			var object map[string]string
			if e := json.Unmarshal(whole[i], &object); e != nil {
				t.Fatalf("node %d is taken, %s: %v", i+1, whole[i], e)
			}
			n := &nodes[i]
			if id, given := object["id"]; n.ID == "" || given && id != n.ID || object["uplink"] != n.Uplink || !n.V4.IsValid() && !n.V6.IsValid() {
				t.Fatalf("node %d is %+v, of %s", i+1, n, whole[i])
			}
			for k, v := range n.Labels {
				if object[k] != v {
					t.Fatalf("node %d: label %q is %q, of %s", i+1, k, v, whole[i])
				}
			}
		}
		peers, err := config.ParsePeers(b)
		checkPublication(t, valid, len(whole), len(peers), err)
		ids := map[string]bool{}
		for i := range peers {
			var object map[string]any
			if e := json.Unmarshal(whole[i], &object); e != nil {
				t.Fatalf("node %d is taken, %s: %v", i+1, whole[i], e)
			}
			p := &peers[i]
			text := func(key string) string { s, _ := object[key].(string); return s }
			if p.ID == "" || ids[p.ID] || text("username") != p.Username || text("password") != p.Password || text("path") != p.Path {
				t.Fatalf("node %d is %+v, of %s", i+1, p, whole[i])
			}
			ids[p.ID] = true
			if w, is := object["weight"].(float64); is && int(w) != int(p.Weight) {
				t.Fatalf("node %d weighs %d, of %s", i+1, p.Weight, whole[i])
			}
		}
		if again, err := config.ParsePeers(b); len(peers) > 0 && (err != nil || !reflect.DeepEqual(peers, again)) {
			t.Fatal("read twice, it is two things")
		}
	})
}

// checkPublication: what is no array of so many is refused, with lines of errors.
func checkPublication(t *testing.T, valid bool, want, got int, err error) {
	t.Helper()
	switch {
	case err == nil && (!valid || want != got):
		t.Fatalf("taken, %d nodes of %d", got, want)
	case err != nil && got != 0:
		t.Fatalf("%d nodes beside an error", got)
	case err != nil && valid:
		for _, line := range strings.Split(err.Error(), "\n") {
			var n int
			if _, e := fmt.Sscanf(line, "node %d: ", &n); e != nil || n < 1 || n > want {
				t.Fatalf("no mistake of a node: %q", line)
			}
		}
	}
}
