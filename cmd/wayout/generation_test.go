package main_test

import (
	"bufio"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// TestRequestKeepsItsConfiguration begins a request, reloads, and ends it: who
// the user is, what his map says and which paths there are all come from the
// configuration that the request began with.
func TestRequestKeepsItsConfiguration(t *testing.T) {
	s := newScene(t, true)
	config := func(path string, nodes ...int) string {
		var b strings.Builder
		b.WriteString("escaper:\n  - {name: out, type: direct_fixed, nodes: [")
		for _, i := range nodes {
			fmt.Fprintf(&b, "{id: p%d, ipv4: %s}, ", i, lab.Egress4()[i-1])
		}
		fmt.Fprintf(&b, "]}\nuser_group:\n  - {name: team, users: [{name: alice, password: %q, egress_path: {out: %s}}]}\n", hashOf(t, "secret"), path)
		b.WriteString("server:\n  - {name: web, type: http_proxy, listen: \"10.0.0.1:3128\", user_group: team, escaper: out}\n")
		return b.String()
	}
	s.start(config("1", 1))
	conn, err := s.Client.Dial(proxyAt(3128))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET http://%s/ HTTP/1.1\r\nHost: x\r\n%s\r\n", target4, basic("alice", "secret"))
	s.reload(config("2", 6, 1)) // 1 is the sixth path now, 2 the first
	fmt.Fprint(conn, "\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	if n := s.origin.Sources()[lab.Egress4()[0]]; n != 1 {
		t.Errorf("the request left by %v", s.origin.Sources())
	}
}

// TestUsersOfTwoGroupsShareNothing: two users of one name in two groups never
// meet on one connection to an origin.
func TestUsersOfTwoGroupsShareNothing(t *testing.T) {
	s := newScene(t, true)
	h := hashOf(t, "secret")
	s.start(fmt.Sprintf(`escaper:
  - {name: out, type: direct_fixed, bind_ip: [198.51.100.11]}
user_group:
  - {name: one, users: [{name: alice, password: %q}]}
  - {name: two, users: [{name: alice, password: %q}]}
server:
  - {name: a, type: http_proxy, listen: "10.0.0.1:3128", user_group: one, escaper: out}
  - {name: b, type: http_proxy, listen: "10.0.0.1:3129", user_group: two, escaper: out}
`, h, h))
	conns := map[int]uint16{}
	for range 3 {
		for _, port := range []uint16{3128, 3129} {
			told := s.ask(lab.Ask{Proxy: proxyAt(port), Header: []string{basic("alice", "secret")}})
			if told.Status != 200 {
				t.Fatal(told.Status)
			}
			if was, met := conns[told.Seen.Conn]; met && was != port {
				t.Errorf("connection %d to the origin served both groups", told.Seen.Conn)
			}
			conns[told.Seen.Conn] = port
		}
	}
	if len(conns) != 2 {
		t.Errorf("%d connections for two users", len(conns))
	}
}

// TestInterfaceOnly: a path without an address uses one of its interface, and
// none of another interface when there is none left.
func TestInterfaceOnly(t *testing.T) {
	s := newScene(t, true)
	s.start(fmt.Sprintf(`uplink:
  - {name: isp2, interface: eth1, gateway4: %s, gateway6: %q}
escaper:
  - {name: out, type: direct_fixed, interface: eth1, uplink: isp2}
%s`, lab.Gateway2Of4, lab.Gateway2Of6, openServer))
	for target, prefix := range map[string]string{target4: "203.0.113.", target6: "2001:db8:200::"} {
		told := s.ask(lab.Ask{Target: target})
		if told.Status != 200 || !strings.HasPrefix(told.Seen.Source, prefix) {
			t.Errorf("%s: %d %q from %s", target, told.Status, told.Body, told.Seen.Source)
		}
	}
	path := "out/eth1"
	// An interface that was down has lost its IPv6 addresses.
	if err := s.Host.Down("eth1"); err != nil {
		t.Fatal(err)
	}
	s.until(path, func(p control.Path) bool { return p.State == "down" })
	if err := s.Host.Up("eth1"); err != nil {
		t.Fatal(err)
	}
	s.until(path, func(p control.Path) bool { return p.State == "up" && strings.Contains(p.Reason, "no IPv6 address") })
	if told := s.ask(lab.Ask{Target: target6}); told.Status != 503 {
		t.Errorf("without an IPv6 address: %d from %s", told.Status, told.Seen.Source)
	}
	if told := s.ask(lab.Ask{}); told.Status != 200 || !strings.HasPrefix(told.Seen.Source, "203.0.113.") {
		t.Errorf("IPv4: %d %q from %s", told.Status, told.Body, told.Seen.Source)
	}
}

// TestDrainOutlivesReload: what the operator said of a path holds for its name.
func TestDrainOutlivesReload(t *testing.T) {
	s := newScene(t, true)
	s.start(nodes(1, 2))
	if _, errs, code := s.command("drain", "out/p1", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	changed := strings.Replace(nodes(1, 2), fmt.Sprintf(", ipv6: %q", lab.Egress6()[0]), "", 1)
	s.reload(changed)
	if p := s.paths()["out/p1"]; p.State != "draining" || p.IPv6 != nil {
		t.Errorf("%+v", p)
	}
}
