package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

var (
	routed4 = netip.MustParsePrefix(lab.RoutedNet4)
	routed6 = netip.MustParsePrefix(lab.RoutedNet6)
	shared4 = netip.MustParsePrefix(lab.SharedNet4)
	shared6 = netip.MustParsePrefix(lab.SharedNet6)
)

// prefixConfig has a prefix of each family that is routed to the host, in
// escaper out, and one of each that is on its link, in escaper link, with how
// neighbours are answered there. at is what the nodes say besides ("uplink:
// isp1"). Clients choose by header (3128, and 3129 for link), by user name
// (3130) and by SOCKS (1080).
func prefixConfig(t *testing.T, uplinks, at, neighbour string) string {
	t.Helper()
	if at != "" {
		at = ", " + at
	}
	h := hashOf(t, "secret")
	return fmt.Sprintf(`metrics: {listen: "10.0.0.1:9180"}
%s
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    connect_timeout: 20s
    nodes:
      - {id: six, ipv6: %q%s}
      - {id: four, ipv4: %q%s}
  - name: link
    type: direct_fixed
    enable_path_selection: true
    neighbour: %s
    connect_timeout: 20s
    nodes:
      - {id: both, ipv4: %q, ipv6: %q%s}
user_group:
  - name: team
    users:
      - {name: alice, password: %q}
      - {name: bob, password: %q}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: out, path_selection_header: X-Egress-Path, report_egress: true}
  - {name: near, type: http_proxy, listen: "10.0.0.1:3129", open: true, escaper: link, path_selection_header: X-Egress-Path, report_egress: true}
  - {name: named, type: http_proxy, listen: "10.0.0.1:3130", user_group: team, username_params: true, escaper: out, path_selection_header: X-Egress-Path}
  - {name: socks, type: socks_proxy, listen: "10.0.0.1:1080", user_group: team, username_params: true, socks_extension: true, escaper: out}
`, uplinks, routed6, at, routed4, at, neighbour, shared4, shared6, at, h, h)
}

// oneUplink is isp1 with nothing to manage.
const oneUplink = `uplink:
  - {name: isp1, interface: eth0, gateway4: ` + lab.Gateway1Of4 + `, gateway6: "` + lab.Gateway1Of6 + `"}`

// get sends one forward request by a client that keeps its connections, and
// gives what the origin saw.
func get(ctx context.Context, c *http.Client, target, path string) (seen lab.Seen, status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+target+"/", nil)
	if err != nil {
		return seen, 0, err
	}
	if path != "" {
		req.Header.Set("X-Egress-Path", path)
	}
	resp, err := c.Do(req)
	if err != nil {
		return seen, 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return seen, resp.StatusCode, err
	}
	return seen, resp.StatusCode, json.Unmarshal(b, &seen)
}

// draw sends n requests, some at a time, and counts the sources that the origin
// saw. All have to be of the prefix.
func (s *scene) draw(port uint16, target string, n int, of netip.Prefix) map[string]int {
	s.t.Helper()
	const workers = 8
	c := s.httpClient("http://" + proxyAt(port).String())
	sources := map[string]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for range (n + w) / workers {
				seen, status, err := get(s.t.Context(), c, target, "")
				if err != nil || status != http.StatusOK {
					s.t.Errorf("%s: %d, %v", of, status, err)
					return
				}
				if a, err := netip.ParseAddr(seen.Source); err != nil || !of.Contains(a) {
					s.t.Errorf("%s is not of %s", seen.Source, of)
				}
				mu.Lock()
				sources[seen.Source]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return sources
}

// TestPrefixSources: each request has a source of its own, on a prefix that is
// routed to the host and on one whose addresses are asked for on the link.
func TestPrefixSources(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ uplinks, at, neighbour string }{
		// Without an interface of its own a prefix is answered where an address
		// says that it is on the link.
		"main routing": {"", "", "auto"},
		"by an uplink": {oneUplink, "uplink: isp1", "answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, true)
			if c.neighbour == "auto" {
				a := netip.PrefixFrom(shared6.Addr().Next().Next(), 64)
				if err := s.Host.AddAddr("eth0", a); err != nil {
					t.Fatal(err)
				}
			}
			s.start(prefixConfig(t, c.uplinks, c.at, c.neighbour))

			const n = 1000
			if got := s.draw(3128, target6, n, routed6); len(got) != n {
				t.Errorf("%d sources of a routed prefix in %d requests", len(got), n)
			}
			// The kernel's table of neighbours is one for all namespaces, and
			// bounded: it is emptied in between.
			all := map[string]int{}
			for range 5 {
				for a, times := range s.draw(3129, target6, n/5, shared6) {
					all[a] += times
				}
				if err := s.ISP1.ForgetNeighbours("host0"); err != nil {
					t.Fatal(err)
				}
			}
			if len(all) != n {
				t.Errorf("%d sources of a prefix on the link in %d requests", len(all), n)
			}
			// Of 128 addresses: all but a few, and never the link's broadcast.
			for _, p := range []struct {
				port uint16
				of   netip.Prefix
			}{{3128, routed4}, {3129, shared4}} {
				got := s.draw(p.port, target4, 300, p.of)
				if len(got) < 90 {
					t.Errorf("%d sources of %s in 300 requests", len(got), p.of)
				}
				if got["198.51.100.255"] != 0 {
					t.Error("the link's broadcast address was used")
				}
			}

			paths := s.paths()
			for path, want := range map[string][2]string{
				"out/six":   {"", routed6.String()},
				"out/four":  {routed4.String(), ""},
				"link/both": {shared4.String(), shared6.String()},
			} {
				p := paths[path]
				if deref(p.IPv4) != want[0] || deref(p.IPv6) != want[1] || p.State != "up" || p.Reason != "" {
					t.Errorf("%s: %q %q, %s %q", path, deref(p.IPv4), deref(p.IPv6), p.State, p.Reason)
				}
				if p.GuardDrops != 0 || p.Connections.Failed != 0 || p.Connections.Made < 300 {
					t.Errorf("%s: %d drops, %+v", path, p.GuardDrops, p.Connections)
				}
				if p.Packets.Out < 4*p.Connections.Made || p.Packets.In < 4*p.Connections.Made || p.Bytes.In < 100*p.Connections.Made {
					t.Errorf("%s: %+v packets and %+v bytes of %d connections", path, p.Packets, p.Bytes, p.Connections.Made)
				}
			}
			metrics := s.metrics()
			for line := range strings.Lines(metrics) {
				if strings.HasPrefix(line, "wayout_path_guard_drops_total") && !strings.HasSuffix(line, " 0\n") {
					t.Errorf("the guard dropped: %s", line)
				}
			}
			if !strings.Contains(metrics, `wayout_path_guard_drops_total{escaper="out",path="six"} 0`) {
				t.Error("no counter of the guard for the prefix")
			}
		})
	}
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// TestPrefixAddresses: the very address that is asked for, in every way of
// asking, and one for a session.
func TestPrefixAddresses(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(prefixConfig(t, oneUplink, "uplink: isp1", "answer"))
	const very = "2001:db8:100:beef:1:2:3:4"
	as := func(user string, more ...string) []string { return append([]string{basic(user, "secret")}, more...) }
	for _, c := range []selectionCase{
		{name: "header", header: egress(very), target: target6, source: very, proxy: `egress-path="out/six"; egress-ip="` + very + `"`},
		{name: "header, other spelling", header: egress("2001:0DB8:100:BEEF:0001:2:3:4"), target: target6, source: very},
		{name: "header, map", header: egress(`{"out": "` + very + `"}`), target: target6, source: very},
		{name: "first of the prefix", header: egress("2001:db8:100:beef::"), target: target6, source: "2001:db8:100:beef::"},
		{name: "last of the prefix", header: egress("2001:db8:100:beef:ffff:ffff:ffff:ffff"), target: target6, source: "2001:db8:100:beef:ffff:ffff:ffff:ffff"},
		{name: "IPv4", header: egress("192.0.2.200"), source: "192.0.2.200"},
		{name: "IPv4, mapped", header: egress("::ffff:192.0.2.201"), source: "192.0.2.201"},
		{name: "on the link", port: 3129, header: egress("2001:db8:100:cafe::77"), target: target6, source: "2001:db8:100:cafe::77"},
		{name: "on the link, IPv4", port: 3129, header: egress("198.51.100.177"), source: "198.51.100.177"},
		{name: "user name, ip", port: 3130, header: as("alice-ip-2001_db8_100_beef__7"), target: target6, source: "2001:db8:100:beef::7"},
		{name: "user name, ip, IPv4", port: 3130, header: as("alice-ip-192.0.2.202"), source: "192.0.2.202"},
		{name: "user name, path and ip", port: 3130, header: as("alice-path-six-ip-2001_db8_100_beef__8"), target: target6, source: "2001:db8:100:beef::8"},
		{name: "user name, index and ip", port: 3130, header: as("alice-path-1-ip-2001_db8_100_beef__9"), target: target6, source: "2001:db8:100:beef::9"},
		{name: "user name with a session, the very address", port: 3130, header: as("alice-session-x-ip-2001_db8_100_beef__a"), target: target6, source: "2001:db8:100:beef::a"},
		{name: "the header is stronger than the user name", port: 3130, header: as("alice-ip-2001_db8_100_beef__7", "X-Egress-Path: "+very), target: target6, source: very},

		{name: "outside of all", header: egress("2001:db8:100:bee0::1"), target: target6, status: 400},
		{name: "of another escaper", header: egress("2001:db8:100:cafe::1"), target: target6, status: 400},
		{name: "IPv6 address for an IPv4 target", header: egress(very), status: 502, proxy: "destination_ip_unroutable"},
		{name: "IPv4 address for an IPv6 target", header: egress("192.0.2.200"), target: target6, status: 502},
		{name: "a path of the other family", header: egress("six"), status: 502},
		{name: "dual-stack, by its address", port: 3129, header: egress("198.51.100.177"), target: target6, status: 502},
		{name: "path, and an address that is not its own", port: 3130, header: as("alice-path-four-ip-2001_db8_100_beef__8"), target: target6, status: 400},
		{name: "the prefix is no ID", header: egress(routed6.String()), target: target6, status: 400},
	} {
		for _, tunnel := range []bool{false, true} {
			c.check(s, tunnel)
		}
	}

	// Sessions: one address each, the same for tunnels and forward requests.
	of := map[string]string{}
	for _, name := range []string{"alice-session-a", "alice-session-b", "bob-session-a", "alice-path-six-session-a"} {
		for i := range 6 {
			told := s.ask(lab.Ask{Proxy: proxyAt(3130), Header: as(name), Target: target6, Tunnel: i%2 == 0})
			if told.Status != 200 || of[name] != "" && of[name] != told.Seen.Source {
				t.Errorf("%s: %d %s from %s, before it was %s", name, told.Status, told.Body, told.Seen.Source, of[name])
			}
			of[name] = told.Seen.Source
		}
	}
	distinct := map[string]bool{of["alice-session-a"]: true, of["alice-session-b"]: true, of["bob-session-a"]: true}
	if len(distinct) != 3 {
		t.Errorf("three sessions have %d addresses: %v", len(distinct), of)
	}
	if of["alice-path-six-session-a"] != of["alice-session-a"] {
		t.Errorf("the session by its path's name has another address: %v", of)
	}
}

// TestPrefixKeepAlive: kept connections serve the very address that they have,
// and none that is meant to be fresh.
func TestPrefixKeepAlive(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(prefixConfig(t, "", "", "off"))
	c := s.httpClient("http://10.0.0.1:3128")
	conns := map[string]int{}
	fresh := map[string]bool{}
	for i := range 60 {
		path, want := "", ""
		switch i % 4 {
		case 0:
			path, want = "2001:db8:100:beef::a", "2001:db8:100:beef::a"
		case 1:
			path, want = "2001:db8:100:beef::b", "2001:db8:100:beef::b"
		case 2:
			path = "six"
		}
		seen, status, err := get(t.Context(), c, target6, path)
		if err != nil || status != 200 {
			t.Fatalf("%d %v", status, err)
		}
		switch {
		case want == "":
			if fresh[seen.Source] || conns[seen.Source] != 0 {
				t.Errorf("%s had been used before", seen.Source)
			}
			fresh[seen.Source] = true
		case seen.Source != want:
			t.Errorf("request %d left by %s, want %s", i, seen.Source, want)
		case conns[want] != 0 && conns[want] != seen.Conn:
			t.Errorf("the connection from %s is not kept", want)
		}
		if want != "" {
			conns[want] = seen.Conn
		}
	}
	// A session's connection is kept for the session.
	named := s.httpClient("http://alice-session-k:secret@10.0.0.1:3130")
	first, _, err := get(t.Context(), named, target6, "")
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := get(t.Context(), s.httpClient("http://alice-session-l:secret@10.0.0.1:3130"), target6, "")
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := get(t.Context(), named, target6, "")
	if err != nil {
		t.Fatal(err)
	}
	if again.Source != first.Source || again.Conn != first.Conn || other.Conn == first.Conn || other.Source == first.Source {
		t.Errorf("a session's connection was %s %d, another session's %s %d, then %s %d",
			first.Source, first.Conn, other.Source, other.Conn, again.Source, again.Conn)
	}
}

// TestPrefixDatagrams: an association has one address for as long as it lives.
func TestPrefixDatagrams(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start(prefixConfig(t, oneUplink, "uplink: isp1", "answer"))
	alice := func(params, extension string) client.Dialer {
		return client.Dialer{Username: "alice" + params, Password: "secret", Extension: extension}
	}
	sources := map[netip.Addr]bool{}
	for range 5 {
		a, err := s.associateBy(alice("-path-six", ""), 1080)
		if err != nil {
			t.Fatal(err)
		}
		first := a.mustEcho(t, echo6, "who am I")
		if again := a.mustEcho(t, echo6, "who am I"); again != first || !routed6.Contains(first.Addr()) {
			t.Errorf("an association's datagrams come from %s and %s", first, again)
		}
		sources[first.Addr()] = true
	}
	if len(sources) != 5 {
		t.Errorf("five associations have %d addresses", len(sources))
	}
	for _, c := range []struct {
		d            client.Dialer
		target, from string
	}{
		{alice("-ip-2001_db8_100_beef__55", ""), echo6, "2001:db8:100:beef::55"},
		{alice("", "2001:db8:100:beef::56"), echo6, "2001:db8:100:beef::56"},
		{alice("-ip-192.0.2.203", ""), echo4, "192.0.2.203"},
	} {
		a, err := s.associateBy(c.d, 1080)
		if err != nil {
			t.Errorf("%s: %v", c.from, err)
			continue
		}
		if got := a.mustEcho(t, c.target, "who am I"); got.Addr().String() != c.from {
			t.Errorf("datagrams come from %s, want %s", got, c.from)
		}
	}
	var of [2]netip.Addr
	for i := range of {
		a, err := s.associateBy(alice("-session-u", ""), 1080)
		if err != nil {
			t.Fatal(err)
		}
		target, p := echo6, routed6
		if !p.Contains(sessionPath(s)) {
			target, p = echo4, routed4
		}
		if of[i] = a.mustEcho(t, target, "who am I").Addr(); !p.Contains(of[i]) {
			t.Errorf("a session's datagrams come from %s", of[i])
		}
	}
	if of[0] != of[1] {
		t.Errorf("a session's associations come from %s and %s", of[0], of[1])
	}
	if p := s.paths()["out/six"]; p.GuardDrops != 0 || p.Packets.Out < 12 || p.Packets.In < 12 {
		t.Errorf("%d drops, %+v packets", p.GuardDrops, p.Packets)
	}
	if err := s.daemon.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// sessionPath is an address of the path that alice's session u is bound to,
// when both families will do.
func sessionPath(s *scene) netip.Addr {
	s.t.Helper()
	out, errs, code := s.command("explain", "--config", s.config, "--server", "socks", "--username", "alice-session-u", "--json", "any.test:53")
	var v struct {
		SourceIP string `json:"source_ip"`
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != 0 {
		s.t.Fatalf("explain: %d %s%s %v", code, out, errs, err)
	}
	return netip.MustParseAddr(v.SourceIP)
}
