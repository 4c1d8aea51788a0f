package main_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"wayout/scripts/lab"
)

// TestSOCKSMetrics sends a known set of requests by HTTP and SOCKS, and
// compares every count.
func TestSOCKSMetrics(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start("metrics: {listen: \"10.0.0.1:9180\"}\n" + selectionConfig(t))
	if _, errs, code := s.command("drain", "out/p8", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	requests, selections, failures := map[string]float64{}, map[string]float64{}, map[string]float64{}
	lines := 0
	for _, c := range []struct {
		name string
		said
		source, result string // of wayout_selection_total; "": it does not come to that
		code           int
	}{
		{"extension", said{selection: "p1"}, "client", "ok", 200},
		{"extension, IPv6", said{selection: "p1", six: true}, "client", "ok", 200},
		{"unknown", said{selection: "p77"}, "client", "unknown", 400},
		{"not passed", said{selection: `{"strict":1}`}, "client", "unknown", 400},
		{"malformed", said{selection: "{"}, "client", "malformed", 400},
		{"down", said{selection: "p8"}, "client", "down", 503},
		{"off", said{front: frontPolicy, selection: "s1"}, "client", "disabled", 400},
		{"policy", said{front: frontPolicy}, "policy", "ok", 200},
		{"server", said{front: frontAlways}, "server", "ok", 200},
		{"operator", said{front: frontUsers, user: "bob"}, "user", "ok", 200},
		{"operator of a network", said{front: frontKnown}, "user", "ok", 200},
		{"user name", said{front: frontUsers, user: "alice-path-p3"}, "username", "ok", 200},
		{"session", said{front: frontUsers, user: "alice-session-x"}, "username", "ok", 200},
		{"user name, malformed", said{front: frontUsers, user: "alice-path-p3-path-p3"}, "username", "malformed", 400},
		{"user name, path and ip", said{front: frontUsers, user: "alice-path-p3-ip-192.0.2.1"}, "username", "malformed", 400},
		{"user name, unknown", said{front: frontUsers, user: "alice-path-p77"}, "username", "unknown", 400},
		{"user name, forbidden", said{front: frontUsers, user: "carol-path-p2"}, "username", "forbidden", 403},
		{"extension, forbidden", said{front: frontUsers, user: "carol", selection: "p2"}, "client", "forbidden", 403},
		{"wrong password", said{front: frontUsers, user: "alice", password: "wrong"}, "", "", 407},
		{"wrong password, with parameters", said{front: frontUsers, user: "alice-path-p1", password: "wrong"}, "", "", 407},
		{"unknown user", said{front: frontUsers, user: "mallory"}, "", "", 407},
		{"no credentials", said{front: frontUsers}, "", "", 407},
	} {
		if c.user != "" && c.password == "" {
			c.password = "secret"
		}
		for _, p := range protocols() {
			if p == associate && c.six {
				continue
			}
			if _, err := s.say(p, c.said); err != nil {
				t.Fatalf("%s, %s: %v", c.name, p, err)
			}
			kind, source := "socks", c.source
			if p == forward || p == tunnel {
				kind = "http"
			}
			if source == "client" {
				source = map[string]string{"socks": "socks", "http": "header"}[kind]
			}
			server := kind + strconv.Itoa(c.front)
			requests[fmt.Sprintf("code=\"%d\",server=%q", c.code, server)]++
			if source != "" {
				selections[fmt.Sprintf("result=%q,source=%q", c.result, source)]++
			} else {
				failures[fmt.Sprintf("server=%q", server)]++
			}
			// A request is counted when it is over, which its client may see first.
			lines++
			if !s.daemon.Await(func(log string) bool { return strings.Count(log, `"msg":"request"`) >= lines }) {
				t.Fatalf("%s, %s: no line in the access log", c.name, p)
			}
		}
	}
	// The family of a target: of a datagram there is none to be refused.
	for _, p := range []protocol{forward, connect} {
		if _, err := s.say(p, said{selection: "p9", six: true}); err != nil {
			t.Fatal(err)
		}
		lines++
	}
	requests[`code="502",server="http0"`]++
	requests[`code="502",server="socks0"`]++
	selections[`result="family",source="header"`]++
	selections[`result="family",source="socks"`]++
	if !s.daemon.Await(func(log string) bool { return strings.Count(log, `"msg":"request"`) >= lines }) {
		t.Fatal("a line in the access log is missing")
	}
	all := s.scrape(t)
	equalCounts(t, "requests", family(all, "wayout_requests_total"), requests)
	equalCounts(t, "selections", family(all, "wayout_selection_total"), selections)
	equalCounts(t, "authentication failures", family(all, "wayout_auth_failures_total"), failures)
	equalCounts(t, "guard drops", family(all, "wayout_path_guard_drops_total"), nil)
	if n := all[`wayout_path_connections_open{escaper="out",path="p1"}`]; n != 2 { // which HTTP keeps, one a family
		t.Errorf("%v connections are open by p1", n)
	}
	if log := s.daemon.Log(); strings.Contains(log, `"secret"`) || strings.Contains(log, "wrong") {
		t.Error("a password is in the log")
	}
	for _, words := range []string{
		`"server":"socks0","client":"` + lab.ClientAddr4, `"method":"UDP"`, `"selection_source":"socks"`, `"selection":"session x"`, `"user":"carol"`,
	} {
		if !strings.Contains(s.daemon.Log(), words) {
			t.Errorf("the access log has no %s", words)
		}
	}
}
