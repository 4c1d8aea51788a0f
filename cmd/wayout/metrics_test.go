package main_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"wayout/scripts/lab"
)

// scrape reads the metrics: from name{labels} to value, the labels as they
// are printed.
func (s *scene) scrape(t *testing.T) map[string]float64 {
	t.Helper()
	w := s.dial(t, 9180)
	w.say("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	resp, body := w.answer("GET")
	if resp.StatusCode != 200 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
		t.Fatalf("/metrics: %s, %s", resp.Status, resp.Header.Get("Content-Type"))
	}
	all := map[string]float64{}
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		v, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64)
		if i < 0 || err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all[line[:i]] = v
	}
	return all
}

// family gives the metrics of a name that are not zero.
func family(all map[string]float64, name string) map[string]float64 {
	m := map[string]float64{}
	for k, v := range all {
		if rest, ok := strings.CutPrefix(k, name+"{"); ok && v != 0 {
			m[strings.TrimSuffix(rest, "}")] = v
		}
	}
	return m
}

func equalCounts(t *testing.T, what string, got, want map[string]float64) {
	t.Helper()
	for _, k := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %s is %v, and nothing of the kind was done", what, k, got[k])
		}
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%s: %s is %v, want %v", what, k, got[k], want[k])
		}
	}
}

// counted is one request with what it has to count for, and what the access
// log has to say of it.
type counted struct {
	name   string
	port   uint16
	ask    lab.Ask
	raw    string // in place of ask: a head that is sent as it is
	status int

	selection string // labels of wayout_selection_total; "": it did not come to that
	result    string // of the attempt to connect: PATH RESULT
	log       map[string]any
}

// TestCountersAndAccessLog sends a known set of requests and compares every
// count, and every line of the access log.
func TestCountersAndAccessLog(t *testing.T) {
	t.Parallel()
	h := hashOf(t, "secret")
	s := newScene(t, true)
	s.holes(t)
	s.start(fmt.Sprintf(`metrics: {listen: "10.0.0.1:9180"}
http_forward_upstream_keepalive: {enable: off}
`+strings.Replace(outConfig("  - {name: closed, type: direct_fixed, bind_ip: [203.0.113.14], connect_timeout: 200ms}\n"+
		`user_group:
  - name: team
    users:
      - {name: alice, password: %q, allow_path: ["out/p1", "out/p2", "out/p9", "out/none"]}
      - {name: bob, password: %q, egress_path: {out: p5}}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: out, path_selection_header: X-Egress-Path}
  - {name: users, type: http_proxy, listen: "10.0.0.1:3129", user_group: team, escaper: out, path_selection_header: X-Egress-Path}
  - {name: closed, type: http_proxy, listen: "10.0.0.1:3130", open: true, escaper: closed, path_selection_header: X-Egress-Path}
`), "type: direct_fixed\n", "type: direct_fixed\n    connect_timeout: 200ms\n", 1), h, h))
	if _, errs, code := s.command("drain", "out/p3", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	v4 := lab.Egress4()
	alice, bob := basic("alice", "secret"), basic("bob", "secret")
	header := func(value string) lab.Ask { return lab.Ask{Header: egress(value)} }
	as := func(user string, values ...string) lab.Ask {
		a := lab.Ask{Header: []string{user}}
		for _, v := range values {
			a.Header = append(a.Header, "X-Egress-Path: "+v)
		}
		return a
	}
	to := func(a lab.Ask, target string) lab.Ask { a.Target = target; return a }
	tunnel := func(a lab.Ask) lab.Ask { a.Tunnel = true; return a }
	sel := func(source, result string) string { return fmt.Sprintf("result=%q,source=%q", result, source) }
	cases := []counted{
		{name: "by ID", ask: header("p1"), status: 200, selection: sel("header", "ok"), result: "p1 ok", log: map[string]any{
			"server": "web", "user": "", "method": "GET", "target": target4, "selection": "p1", "selection_source": "header",
			"path": "out/p1", "source_ip": v4[0].String(), "upstream_reused": false, "bytes_out": 0.0,
		}},
		{name: "by ID again", ask: header("p1"), status: 200, selection: sel("header", "ok"), result: "p1 ok"},
		{name: "by index", ask: header("2"), status: 200, selection: sel("header", "ok"), result: "p2 ok", log: map[string]any{"selection": "2", "path": "out/p2"}},
		{name: "by map, a tunnel", ask: tunnel(header(`{"out":"p4"}`)), status: 200, selection: sel("header", "ok"), result: "p4 ok", log: map[string]any{
			"method": "CONNECT", "target": target4, "selection": "p4", "path": "out/p4", "source_ip": v4[3].String(),
		}},
		{name: "by address, IPv6", ask: to(header(lab.Egress6()[0].String()), target6), status: 200, selection: sel("header", "ok"), result: "p1 ok", log: map[string]any{
			"target": target6, "source_ip": lab.Egress6()[0].String(),
		}},
		{
			name: "a body", raw: "POST http://" + target4 + "/ HTTP/1.1\r\nHost: x\r\nX-Egress-Path: p2\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello, world", status: 200,
			selection: sel("header", "ok"), result: "p2 ok", log: map[string]any{"method": "POST", "bytes_out": 12.0},
		},
		{name: "an empty map chooses nothing", port: 3130, ask: header("{}"), status: 200, selection: sel("policy", "ok"), result: "203.0.113.14 ok", log: map[string]any{"selection_source": "policy"}},
		{name: "the policy", port: 3130, ask: lab.Ask{}, status: 200, selection: sel("policy", "ok"), result: "203.0.113.14 ok", log: map[string]any{
			"server": "closed", "selection": "", "selection_source": "policy", "path": "closed/203.0.113.14",
		}},
		{name: "the operator", port: 3129, ask: as(bob), status: 200, selection: sel("user", "ok"), result: "p5 ok", log: map[string]any{
			"user": "bob", "selection": "p5", "selection_source": "user", "path": "out/p5",
		}},
		{name: "the operator before the client", port: 3129, ask: as(bob, "p6"), status: 200, selection: sel("user", "ok"), result: "p5 ok", log: map[string]any{"path": "out/p5", "selection_source": "user"}},
		{name: "allowed", port: 3129, ask: as(alice, "p2"), status: 200, selection: sel("header", "ok"), result: "p2 ok", log: map[string]any{"user": "alice"}},

		{name: "malformed", ask: header("{"), status: 400, selection: sel("header", "malformed"), log: map[string]any{"selection": "{", "selection_source": "header", "path": "", "error": "*"}},
		{name: "copies that differ", ask: lab.Ask{Header: []string{"X-Egress-Path: p1", "X-Egress-Path: p2"}}, status: 400, selection: sel("header", "malformed"), log: map[string]any{"error": "*"}},
		{name: "unknown ID", ask: header("p77"), status: 400, selection: sel("header", "unknown"), log: map[string]any{"selection": "p77", "selection_source": "header", "error": "*"}},
		{name: "unknown escaper", ask: header(`{"in":1}`), status: 400, selection: sel("header", "unknown"), log: map[string]any{"error": "*"}},
		{name: "escaper that is not passed", ask: header(`{"closed":1}`), status: 400, selection: sel("header", "unknown"), log: map[string]any{"error": "*"}},
		{name: "where it is off", port: 3130, ask: header("1"), status: 400, selection: sel("header", "disabled"), log: map[string]any{"error": "*"}},
		{name: "not allowed", port: 3129, ask: as(alice, "p4"), status: 403, selection: sel("header", "forbidden"), log: map[string]any{"user": "alice", "selection": "p4", "error": "*"}},
		{name: "drained", ask: header("p3"), status: 503, selection: sel("header", "down"), log: map[string]any{"selection": "p3", "path": "out/p3", "error": "*"}},
		{name: "drained, a tunnel", ask: tunnel(header("p3")), status: 503, selection: sel("header", "down"), log: map[string]any{"method": "CONNECT", "error": "*"}},
		{name: "no family", ask: to(header("p9"), target6), status: 502, selection: sel("header", "family"), log: map[string]any{"path": "out/p9", "error": "*"}},

		{name: "refused", ask: to(header("p2"), lab.OriginAddr4+":9"), status: 502, selection: sel("header", "ok"), result: "p2 refused", log: map[string]any{"path": "out/p2", "error": "*"}},
		{name: "unreachable", ask: to(header("p2"), unreachable4+":80"), status: 502, selection: sel("header", "ok"), result: "p2 unreachable", log: map[string]any{"error": "*"}},
		{name: "a black hole", ask: to(header("p2"), blackhole4+":80"), status: 504, selection: sel("header", "ok"), result: "p2 timeout", log: map[string]any{"error": "*"}},

		{name: "no credentials", port: 3129, ask: lab.Ask{}, status: 407, log: map[string]any{"server": "users", "user": "", "error": "*"}},
		{name: "a wrong password", port: 3129, ask: as(basic("alice", "x"), "p1"), status: 407, log: map[string]any{"user": "", "error": "*"}},
		{name: "a wrong password, a tunnel", port: 3129, ask: tunnel(as(basic("alice", "x"))), status: 407, log: map[string]any{"error": "*"}},
		{name: "origin-form", raw: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", status: 400, log: map[string]any{"method": "GET", "target": "", "path": "", "error": "*"}},
		{name: "no HTTP", raw: "\x16\x03\x01\r\n\r\n", status: 400, log: map[string]any{"method": "", "error": "*"}},
	}
	requests, selections, attempts := map[string]float64{}, map[string]float64{}, map[string]float64{}
	server := map[uint16]string{0: "web", 3129: "users", 3130: "closed"}
	line := regexp.MustCompile(`(?m)^\{.*"msg":"request".*\}$`)
	for i, c := range cases {
		if c.raw != "" {
			w := s.dial(t, 3128)
			w.say(c.raw)
			if resp, body := w.answer("GET"); resp.StatusCode != c.status {
				t.Fatalf("%s: %s %q, want %d", c.name, resp.Status, body, c.status)
			}
		} else {
			if c.port != 0 {
				c.ask.Proxy = proxyAt(c.port)
			}
			if told := s.ask(c.ask); told.Status != c.status {
				t.Fatalf("%s: %d %q, want %d", c.name, told.Status, told.Body, c.status)
			}
		}
		// The line may come after the answer, and that of a tunnel comes with
		// its end.
		if !s.daemon.Await(func(log string) bool { return len(line.FindAllString(log, -1)) > i }) {
			t.Fatalf("%s: no line in the access log", c.name)
		}
		requests[fmt.Sprintf("code=\"%d\",server=%q", c.status, server[c.port])]++
		if c.selection != "" {
			selections[c.selection]++
		}
		if path, result, ok := strings.Cut(c.result, " "); ok {
			escaper := "out"
			if c.port == 3130 {
				escaper = "closed"
			}
			attempts[fmt.Sprintf("escaper=%q,path=%q,result=%q", escaper, path, result)]++
		}
	}

	all := s.scrape(t)
	equalCounts(t, "requests", family(all, "wayout_requests_total"), requests)
	equalCounts(t, "selections", family(all, "wayout_selection_total"), selections)
	equalCounts(t, "authentication failures", family(all, "wayout_auth_failures_total"), map[string]float64{`server="users"`: 3})
	equalCounts(t, "connections", family(all, "wayout_path_connections_total"), attempts)
	equalCounts(t, "open connections", family(all, "wayout_path_connections_open"), nil)
	equalCounts(t, "guard drops", family(all, "wayout_path_guard_drops_total"), nil)
	equalCounts(t, "reloads", family(all, "wayout_config_reload_total"), nil)
	up := map[string]float64{`escaper="closed",path="203.0.113.14"`: 1}
	for _, i := range []int{1, 2, 4, 5, 6, 7, 8, 9} {
		up[fmt.Sprintf(`escaper="out",path="p%d"`, i)] = 1
	}
	equalCounts(t, "paths that are up", family(all, "wayout_path_up"), up)
	// Each series of the contract is there from the start, also at zero.
	for _, key := range []string{
		`wayout_path_up{escaper="out",path="p3"}`, `wayout_path_connections_open{escaper="out",path="p1"}`, `wayout_auth_failures_total{server="web"}`,
		`wayout_config_reload_total{result="ok"}`, `wayout_config_reload_total{result="error"}`, `wayout_path_guard_drops_total{escaper="",path=""}`,
		`wayout_selection_total{result="bind",source="server"}`, `wayout_selection_total{result="ok",source="socks"}`, `wayout_selection_total{result="ok",source="username"}`,
		`wayout_path_retransmits_total{escaper="out",path="p1"}`, `wayout_path_rtt_seconds_count{escaper="out",path="p8"}`,
	} {
		if _, ok := all[key]; !ok {
			t.Errorf("no %s", key)
		}
	}
	for _, result := range []string{"ok", "refused", "timeout", "unreachable", "reset", "local"} {
		if _, ok := all[fmt.Sprintf(`wayout_path_connections_total{escaper="out",path="p8",result=%q}`, result)]; !ok {
			t.Errorf("no connections_total with result %s", result)
		}
	}
	// The kernel has counted where something went, and nowhere else.
	for _, name := range []string{"wayout_path_bytes_total", "wayout_path_packets_total"} {
		for path, used := range map[string]bool{"p1": true, "p2": true, "p4": true, "p5": true, "p3": false, "p6": false, "p9": false} {
			for _, direction := range []string{"in", "out"} {
				v, ok := all[fmt.Sprintf(`%s{direction=%q,escaper="out",path=%q}`, name, direction, path)]
				if !ok || (v > 0) != used {
					t.Errorf("%s of %s, %s: %v, %v", name, path, direction, v, ok)
				}
			}
		}
	}
	if n := all[`wayout_path_rtt_seconds_count{escaper="out",path="p1"}`]; n < 1 {
		t.Errorf("no round-trip times")
	}

	lines := line.FindAllString(s.daemon.Log(), -1)
	if len(lines) != len(cases) {
		t.Fatalf("%d lines of %d requests", len(lines), len(cases))
	}
	for i, c := range cases {
		accessLine(t, c, lines[i])
	}
}

// accessLine checks one line of the access log.
func accessLine(t *testing.T, c counted, text string) {
	t.Helper()
	var got map[string]any
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%s: %v in %q", c.name, err, text)
	}
	want := map[string]any{"status": float64(c.status), "level": "INFO", "msg": "request"}
	maps.Copy(want, c.log)
	for key, v := range want {
		if have, ok := got[key]; !ok || v != "*" && have != v || v == "*" && have == "" {
			t.Errorf("%s: %s is %#v, want %#v, in %s", c.name, key, have, v, text)
		}
	}
	keys := []string{
		"time", "start", "server", "client", "user", "method", "target", "selection", "selection_source", "path",
		"status", "bytes_in", "bytes_out", "duration", "upstream_reused",
	}
	if c.status == http.StatusOK {
		keys = append(keys, "source_ip", "source_port")
		if _, bad := got["error"]; bad {
			t.Errorf("%s: an error in %s", c.name, text)
		}
		if n, _ := got["bytes_in"].(float64); n < 100 {
			t.Errorf("%s: bytes_in in %s", c.name, text)
		}
		if n, _ := got["source_port"].(float64); n < 1 {
			t.Errorf("%s: source_port in %s", c.name, text)
		}
	}
	for _, key := range keys {
		if _, ok := got[key]; !ok {
			t.Errorf("%s: no %s in %s", c.name, key, text)
		}
	}
	if client, err := netip.ParseAddrPort(fmt.Sprint(got["client"])); err != nil || client.Addr().String() != lab.ClientAddr4 {
		t.Errorf("%s: client %v", c.name, got["client"])
	}
	if d, ok := got["duration"].(float64); !ok || d <= 0 || d > 60 {
		t.Errorf("%s: duration %v", c.name, got["duration"])
	}
	for _, key := range []string{"time", "start"} {
		if at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(got[key])); err != nil || time.Since(at) > time.Hour {
			t.Errorf("%s: %s %v", c.name, key, got[key])
		}
	}
	if strings.Contains(text, "secret") {
		t.Errorf("%s: the password is in %s", c.name, text)
	}
}

// TestReuseInLog shows the upstream connection that serves again, and the open
// connections while there are some.
func TestReuseInLog(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(monitored(""))
	w := s.dial(t, 3128)
	for range 3 {
		w.say(requestTo("GET", target4) + "X-Egress-Path: p1\r\n\r\n")
		if resp, body := w.answer("GET"); resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
	}
	tunnel := s.echoTunnel(t)
	all := s.scrape(t)
	if n := all[`wayout_path_connections_total{escaper="out",path="p1",result="ok"}`]; n < 1 || n > 2 { // the tunnel's path is the policy's choice
		t.Errorf("%v connections by p1 for three requests", n)
	}
	open := 0.0
	for _, n := range family(all, "wayout_path_connections_open") {
		open += n
	}
	if open != 2 {
		t.Errorf("%v connections are open, want the idle one and the tunnel's", open)
	}
	s.daemon.Await(func(log string) bool { return strings.Count(log, `"msg":"request"`) == 3 })
	log := s.daemon.Log()
	if n := strings.Count(log, `"upstream_reused":true`); n != 2 {
		t.Errorf("%d of three requests by a connection that had served before:\n%s", n, log)
	}
	if n := strings.Count(log, `"method":"CONNECT"`); n != 0 {
		t.Errorf("an open tunnel is in the log already")
	}
	tunnel.Close()
	if !s.daemon.Await(func(log string) bool { return strings.Count(log, `"method":"CONNECT"`) == 1 }) {
		t.Error("the tunnel that has ended is not in the log")
	}
}

// TestMetricsAbsent has no listener unless there is one in the file, and no
// counters of the kernel's without eBPF.
func TestMetricsAbsent(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(monitored("accounting: off\n"))
	if !strings.Contains(s.daemon.Log(), "accounting") {
		t.Error("nothing is said of accounting: off")
	}
	if told := s.ask(lab.Ask{Header: egress("p1")}); told.Status != 200 || told.Seen.Source != lab.Egress4()[0].String() {
		t.Errorf("%d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
	all := s.scrape(t)
	if all[`wayout_path_connections_total{escaper="out",path="p1",result="ok"}`] != 1 {
		t.Error("no connection was counted")
	}
	for k := range all {
		if strings.HasPrefix(k, "wayout_path_bytes_total") || strings.HasPrefix(k, "wayout_path_guard_drops_total") {
			t.Errorf("%s without a kernel that counts", k)
		}
	}
}
