package main_test

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"wayout/scripts/lab"
)

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

func egress(value string) []string { return []string{"X-Egress-Path: " + value} }

func basic(user, password string) string {
	return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func hashOf(t *testing.T, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

// selectionCase is a row of section 3: what is asked, and either the source
// that the origin has to see or the refusal.
type selectionCase struct {
	name   string
	port   uint16
	header []string
	target string
	source string
	status int
	proxy  string // what Proxy-Status has to hold
}

func (c selectionCase) check(s *scene, tunnel bool) {
	s.t.Helper()
	ask := lab.Ask{Header: c.header, Target: c.target, Tunnel: tunnel}
	if c.port != 0 {
		ask.Proxy = proxyAt(c.port)
	}
	told, err := s.try(ask)
	if err != nil {
		s.t.Errorf("%s: %v", c.name, err)
		return
	}
	want := c.status
	if want == 0 {
		want = http.StatusOK
	}
	if told.Status != want || told.Seen.Source != c.source {
		s.t.Errorf("%s (tunnel %v): %d %q, the origin saw %q; want %d and %q", c.name, tunnel, told.Status, told.Body, told.Seen.Source, want, c.source)
	}
	status := strings.Join(told.Header.Values("Proxy-Status"), ", ")
	if !strings.Contains(status, c.proxy) || (c.status != 0 && c.status != 407 && !strings.HasPrefix(status, "wayout; error=")) {
		s.t.Errorf("%s: Proxy-Status %q, want %q in it", c.name, status, c.proxy)
	}
	if c.status != 0 && told.Body == "" {
		s.t.Errorf("%s: the refusal has no text", c.name)
	}
	if c.status == 503 && told.Header.Get("Retry-After") != "1" {
		s.t.Errorf("%s: Retry-After %q", c.name, told.Header.Get("Retry-After"))
	}
	if c.status == 407 && !strings.HasPrefix(told.Header.Get("Proxy-Authenticate"), "Basic") {
		s.t.Errorf("%s: Proxy-Authenticate %q", c.name, told.Header.Get("Proxy-Authenticate"))
	}
}

func TestHeaderSelection(t *testing.T) {
	more := `  - {name: wild, type: direct_fixed, bind_ip: ["203.0.113.11", "203.0.113.12"]}
  - {name: strict, type: direct_fixed, enable_path_selection: true, index: strict, bind_ip: ["203.0.113.11-203.0.113.13"]}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: out, path_selection_header: X-Egress-Path, report_egress: true}
  - {name: off, type: http_proxy, listen: "10.0.0.1:3129", open: true, escaper: wild, path_selection_header: X-Egress-Path}
  - {name: strict, type: http_proxy, listen: "10.0.0.1:3130", open: true, escaper: strict, path_selection_header: x-my-path}
`
	s := outScene(t, more)
	v4, v6 := lab.Egress4(), lab.Egress6()
	long := strings.Repeat("x", 4097)
	for _, c := range []selectionCase{
		{name: "index 1", header: egress("1"), source: v4[0].String(), proxy: `egress-path="out/p1"; egress-ip="` + v4[0].String() + `"`},
		{name: "index 8", header: egress("8"), source: v4[7].String()},
		{name: "index 0 is the last", header: egress("0"), source: lab.Primary1Of4},
		{name: "leading zeros", header: egress("007"), source: v4[6].String()},
		{name: "index wraps", header: egress("11"), source: v4[1].String()},
		{name: "the largest index", header: egress("18446744073709551615"), source: v4[(18446744073709551615-1)%9].String()},
		{name: "id", header: egress("p3"), source: v4[2].String()},
		{name: "value with spaces around", header: egress("  p3 \t"), source: v4[2].String()},
		{name: "header name in another case", header: []string{"x-EGRESS-path: p3"}, source: v4[2].String()},
		{name: "equal copies", header: []string{"X-Egress-Path: p3", "X-Egress-Path: p3"}, source: v4[2].String()},
		{name: "address", header: egress(v4[5].String()), source: v4[5].String()},
		{name: "mapped address", header: egress("::ffff:" + v4[5].String()), source: v4[5].String()},
		{name: "IPv6 address, other spelling", header: egress("2001:DB8:0100:0:0:0:0:12"), target: target6, source: v6[1].String()},
		{name: "map by id", header: egress(`{"out": "p4"}`), source: v4[3].String()},
		{name: "map by index", header: egress(`{"out": 2}`), source: v4[1].String()},
		{name: "IPv6 origin", header: egress("p2"), target: target6, source: v6[1].String()},

		{name: "empty", header: egress(""), status: 400, proxy: "http_request_error"},
		{name: "copies that differ", header: []string{"X-Egress-Path: p3", "X-Egress-Path: p4"}, status: 400},
		{name: "over 64 bits", header: egress("18446744073709551616"), status: 400},
		{name: "signed index is an id", header: egress("+1"), status: 400},
		{name: "negative index is an id", header: egress("-1"), status: 400},
		{name: "not split at commas", header: egress("p3, p4"), status: 400},
		{name: "id in another case", header: egress("P3"), status: 400},
		{name: "unknown id", header: egress("p33"), status: 400, proxy: `p33`},
		{name: "address of no node", header: egress("198.51.100.200"), status: 400},
		{name: "over 4 KiB", header: egress(long), status: 400},
		{name: "broken JSON", header: egress(`{"out": "p4"`), status: 400},
		{name: "duplicate key", header: egress(`{"out": "p4", "out": "p4"}`), status: 400},
		{name: "null", header: egress(`{"out": null}`), status: 400},
		{name: "bool", header: egress(`{"out": true}`), status: 400},
		{name: "array", header: egress(`{"out": ["p4"]}`), status: 400},
		{name: "inner object", header: egress(`{"out": {"id": "p4"}}`), status: 400},
		{name: "fraction", header: egress(`{"out": 1.0}`), status: 400},
		{name: "exponent", header: egress(`{"out": 1e0}`), status: 400},
		{name: "negative number", header: egress(`{"out": -1}`), status: 400},
		{name: "number over 64 bits in a map", header: egress(`{"out": 18446744073709551616}`), status: 400},
		{name: "unknown escaper", header: egress(`{"in": "p4"}`), status: 400},
		{name: "escaper that the request does not pass", header: egress(`{"strict": 1}`), status: 400},
		{name: "no IPv6 of its own", header: egress("p9"), target: target6, status: 502, proxy: "destination_ip_unroutable"},
		{name: "IPv4 address for an IPv6 origin", header: egress(v4[1].String()), target: target6, status: 502},
		{name: "the host itself", target: "10.0.0.1:80", status: 403, proxy: "destination_ip_prohibited"},
		{name: "loopback", target: "127.0.0.1:80", status: 403},
		{name: "mapped loopback", target: "[::ffff:127.0.0.1]:80", status: 403},
		{name: "NAT64 of link-local", target: "[64:ff9b::169.254.169.254]:80", status: 403},
		{name: "nobody listens", target: lab.OriginAddr4 + ":81", status: 502, proxy: "connection_refused"},

		{name: "no selection where it is off", port: 3129, header: egress("1"), status: 400},
		{name: "empty map where it is off", port: 3129, header: nil, source: ""},
		{name: "strict index", port: 3130, header: []string{"X-My-Path: 3"}, source: v4[6].String()},
		{name: "strict index 0", port: 3130, header: []string{"X-My-Path: 0"}, status: 400},
		{name: "strict index above", port: 3130, header: []string{"X-My-Path: 4"}, status: 400},
	} {
		for _, tunnel := range []bool{false, true} {
			if c.name == "empty map where it is off" {
				told := s.ask(lab.Ask{Proxy: proxyAt(3129), Header: egress("{}"), Tunnel: tunnel})
				if told.Status != 200 || !strings.HasPrefix(told.Seen.Source, "203.0.113.1") {
					t.Errorf("%s: %d, %q", c.name, told.Status, told.Seen.Source)
				}
				continue
			}
			c.check(s, tunnel)
		}
	}
	// What left, left by a path's address and nothing else.
	ours := map[string]bool{lab.Primary1Of4: true}
	for i := range v4 {
		ours[v4[i].String()], ours[v6[i].String()] = true, true
	}
	for a, n := range s.origin.Sources() {
		if !ours[a.String()] {
			t.Errorf("%d requests came from %s", n, a)
		}
	}
}

func TestHeaderIsRemoved(t *testing.T) {
	s := outScene(t, "")
	told := s.ask(lab.Ask{Header: []string{"X-Egress-Path: p1", "x-egress-path: p1", "X-Other: stays", "Proxy-Authorization: Basic YTpi", "Proxy-Connection: keep-alive"}})
	if told.Status != 200 {
		t.Fatalf("%d %s", told.Status, told.Body)
	}
	for _, h := range []string{"X-Egress-Path", "Proxy-Authorization", "Proxy-Connection", "X-Forwarded-For", "Via"} {
		if v, ok := told.Seen.Header[http.CanonicalHeaderKey(h)]; ok {
			t.Errorf("the origin got %s: %v", h, v)
		}
	}
	if told.Seen.Header.Get("X-Other") != "stays" {
		t.Errorf("the origin got %v", told.Seen.Header)
	}
	if told.Header.Get("X-Egress-IP") != lab.Egress4()[0].String() {
		t.Errorf("X-Egress-IP: %q", told.Header.Get("X-Egress-IP"))
	}
}

func TestUsers(t *testing.T) {
	h := hashOf(t, "secret")
	more := fmt.Sprintf(`  - {name: other, type: direct_fixed, bind_ip: [203.0.113.14]}
user_group:
  - name: team
    users:
      - {name: alice, password: %q, allow_path: ["out/p1", "out/p[2]", "out/*4"]}
      - {name: bob, password: %q, egress_path: {out: p2}}
      - {name: carol, password: %q, egress_path_id_map: '{"out": 6, "other": "203.0.113.14"}'}
      - {name: dave, password: %q, allow_path: []}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", user_group: team, escaper: out, path_selection_header: X-Egress-Path}
`, h, h, h, h)
	more = strings.Replace(more, `"out/p[2]", `, "", 1)
	s := outScene(t, more)
	v4 := lab.Egress4()
	with := func(auth string, values ...string) []string {
		all := []string{auth}
		for _, v := range values {
			all = append(all, "X-Egress-Path: "+v)
		}
		return all
	}
	for _, c := range []selectionCase{
		{name: "no credentials", header: egress("p1"), status: 407},
		{name: "wrong password", header: with(basic("alice", "wrong"), "p1"), status: 407},
		{name: "unknown user", header: with(basic("mallory", "secret"), "p1"), status: 407},
		{name: "authentication before a malformed selection", header: with(basic("alice", "wrong"), `{`), status: 407},
		{name: "broken credentials", header: with("Proxy-Authorization: Basic !!!", "p1"), status: 407},
		{name: "another scheme", header: with("Proxy-Authorization: Bearer abc", "p1"), status: 407},
		{name: "allowed", header: with(basic("alice", "secret"), "p1"), source: v4[0].String()},
		{name: "allowed by a pattern", header: with(basic("alice", "secret"), "p4"), source: v4[3].String()},
		{name: "an index is turned into its ID first", header: with(basic("alice", "secret"), "4"), source: v4[3].String()},
		{name: "an address as well", header: with(basic("alice", "secret"), v4[3].String()), source: v4[3].String()},
		{name: "not allowed", header: with(basic("alice", "secret"), "p2"), status: 403, proxy: "http_request_denied"},
		{name: "not allowed by index", header: with(basic("alice", "secret"), "2"), status: 403},
		{name: "not allowed by address", header: with(basic("alice", "secret"), v4[1].String()), status: 403},
		{name: "unknown comes before not allowed", header: with(basic("alice", "secret"), "p77"), status: 400},
		{name: "nothing is allowed", header: with(basic("dave", "secret"), "p1"), status: 403},
		{name: "mapped", header: with(basic("bob", "secret")), source: v4[1].String()},
		{name: "the operator's map is stronger", header: with(basic("bob", "secret"), "p5"), source: v4[1].String()},
		{name: "the operator's map is stronger, malformed stays malformed", header: with(basic("bob", "secret"), "{"), status: 400},
		{name: "mapped by index, in a string", header: with(basic("carol", "secret")), source: v4[5].String()},
	} {
		for _, tunnel := range []bool{false, true} {
			c.check(s, tunnel)
		}
	}
	// Dave chooses nothing: the policy is not bound by what he may choose.
	if told := s.ask(lab.Ask{Header: []string{basic("dave", "secret")}}); told.Status != 200 {
		t.Errorf("dave without a selection: %d %s", told.Status, told.Body)
	}
}

// TestOneConnectionManyPaths sends 400 requests with alternating selections
// over one kept-alive client connection, then the same pipelined.
func TestOneConnectionManyPaths(t *testing.T) {
	s := outScene(t, "")
	v4 := lab.Egress4()
	const n = 400
	for _, pipelined := range []bool{false, true} {
		conn, err := s.Client.Dial(proxyAt(3128))
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		request := func(i int) string {
			return fmt.Sprintf("GET http://%s/%d HTTP/1.1\r\nHost: %s\r\nX-Egress-Path: %d\r\n\r\n", target4, i, target4, i%8+1)
		}
		expect := func(i int) {
			t.Helper()
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("answer %d: %v", i, err)
			}
			var seen lab.Seen
			if err := json.NewDecoder(resp.Body).Decode(&seen); err != nil {
				t.Fatalf("answer %d: %v", i, err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatal(err)
			}
			if seen.Source != v4[i%8].String() || seen.Path != fmt.Sprintf("/%d", i) {
				t.Fatalf("request %d left by %s as %s, want %s", i, seen.Source, seen.Path, v4[i%8])
			}
		}
		if pipelined {
			go func() {
				for i := range n {
					if _, err := io.WriteString(conn, request(i)); err != nil {
						return // the reader sees it
					}
				}
			}()
			for i := range n {
				expect(i)
			}
		} else {
			for i := range n {
				if _, err := io.WriteString(conn, request(i)); err != nil {
					t.Fatal(err)
				}
				expect(i)
			}
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
