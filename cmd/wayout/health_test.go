package main_test

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// healthConfig is escaper out with p1 and p2 by isp1, as more has it, escaper
// spare with p5 by isp2, and a route that fails over from one to the other.
func healthConfig(nodes, more string) string {
	v4 := lab.Egress4()
	if nodes == "" {
		nodes = fmt.Sprintf("[{id: p1, ipv4: %s, uplink: isp1}, {id: p2, ipv4: %s, uplink: isp1}]", v4[0], v4[1])
	}
	return twoUplinks + fmt.Sprintf(`metrics: {listen: "10.0.0.1:9180"}
http_forward_upstream_keepalive: {enable: off}
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    nodes: %s
%s
  - {name: spare, type: direct_fixed, nodes: [{id: p5, ipv4: %s, uplink: isp2}]}
  - {name: safe, type: route_failover, next: [out, spare]}
server:
  - {name: web, type: http_proxy, listen: "%s:3128", open: true, escaper: safe, path_selection_header: X-Egress-Path}
  - {name: pinned, type: http_proxy, listen: "%s:3129", open: true, escaper: out, path_selection_header: X-Egress-Path}
`, nodes, more, v4[4], lab.HostAddr4, lab.HostAddr4)
}

// swallow has isp1 take packets and pass none on, without a word.
func (s *scene) swallow(on bool) {
	s.t.Helper()
	value := "1"
	if on {
		value = "0"
	}
	if err := s.ISP1.Sysctl("net/ipv4/ip_forward", value); err != nil {
		s.t.Fatal(err)
	}
}

func state(word string) func(control.Path) bool {
	return func(p control.Path) bool { return p.State == word }
}

// by sends a request to the failing-over server and wants it to come from one
// of some paths.
func (s *scene) by(want ...int) {
	s.t.Helper()
	told := s.ask(lab.Ask{})
	if told.Status == 200 {
		for _, i := range want {
			if told.Seen.Source == lab.Egress4()[i-1].String() {
				return
			}
		}
	}
	s.t.Errorf("%d %q from %s, want it from %v", told.Status, told.Body, told.Seen.Source, want)
}

// pinned selects a path of out.
func (s *scene) pinned(id string) lab.Told {
	s.t.Helper()
	return s.ask(lab.Ask{Proxy: proxyAt(3129), Header: egress(id)})
}

// TestProbesFollowAnUplink: an uplink that swallows packets turns its paths
// down; policies and a failover go round them, a selection gets the reason and
// no other path; and they come back.
func TestProbesFollowAnUplink(t *testing.T) {
	s := newScene(t, false)
	s.start(healthConfig("", `    probe: {tcp: "`+target4+`", interval: 1s, timeout: 900ms, fall: 2, rise: 2}`))
	s.until("out/p1", state("up"))
	s.until("out/p2", state("up"))
	s.by(1, 2)
	if up := s.scrape(t)[`wayout_path_up{escaper="out",path="p1"}`]; up != 1 {
		t.Errorf("wayout_path_up is %v", up)
	}
	for round := range 2 {
		s.swallow(true)
		s.until("out/p1", state("down"))
		s.until("out/p2", state("down"))
		p := s.paths()["out/p1"]
		if p.Reason != "probe tcp "+target4+": connect to "+target4+": timed out" {
			t.Errorf("round %d: the reason is %q", round, p.Reason)
		}
		if up := s.scrape(t)[`wayout_path_up{escaper="out",path="p1"}`]; up != 0 {
			t.Errorf("round %d: wayout_path_up is %v", round, up)
		}
		// Policies take note within a moment; a request in between gets an
		// honest 503 or goes round.
		s.daemon.Await(func(log string) bool {
			return strings.Count(log, `msg="path changed" path=out/p1 state=down`) == round+1 && strings.Count(log, `msg="path changed" path=out/p2 state=down`) == round+1
		})
		for range 5 {
			s.by(5)
		}
		if told := s.pinned("p1"); told.Status != 503 || !strings.Contains(told.Body, p.Reason) || told.Header.Get("Retry-After") != "1" {
			t.Errorf("round %d: selected: %d %q", round, told.Status, told.Body)
		}
		s.swallow(false)
		s.until("out/p1", state("up"))
		s.until("out/p2", state("up"))
		s.daemon.Await(func(log string) bool {
			return strings.Count(log, `msg="path up" path=out/p1`) >= round+1 && strings.Count(log, `msg="path up" path=out/p2`) >= round+1
		})
		for range 5 {
			s.by(1, 2)
		}
		if told := s.pinned("p1"); told.Status != 200 || told.Seen.Source != lab.Egress4()[0].String() {
			t.Errorf("round %d: selected again: %d %q", round, told.Status, told.Body)
		}
	}
	if d := s.paths()["out/p1"].GuardDrops; d != 0 {
		t.Errorf("%d packets stopped by the guard", d)
	}
}

// TestProbeComparesPublicAddress: a path that targets see under another address
// than the operator says is down, and says which.
func TestProbeComparesPublicAddress(t *testing.T) {
	s := newScene(t, false)
	v4 := lab.Egress4()
	nodes := fmt.Sprintf("[{id: p1, ipv4: %s, uplink: isp1, eip: %s}, {id: p2, ipv4: %s, uplink: isp1, eip: 192.0.2.200}]", v4[0], v4[0], v4[1])
	s.start(healthConfig(nodes, `    probe: {http: "http://`+target4+`/ip", interval: 1s, timeout: 900ms, eip: on}`))
	s.until("out/p1", state("up"))
	s.until("out/p2", func(p control.Path) bool {
		return p.State == "down" && p.Reason == fmt.Sprintf("probe http://%s/ip: the public address is %s, and the eip of the node 192.0.2.200", target4, v4[1])
	})
	if told := s.pinned("p2"); told.Status != 503 || !strings.Contains(told.Body, "192.0.2.200") {
		t.Errorf("selected: %d %q", told.Status, told.Body)
	}
	if told := s.pinned("p1"); told.Status != 200 || told.Seen.Source != v4[0].String() {
		t.Errorf("the other one: %d %q", told.Status, told.Body)
	}
}

// TestPassiveHealth: requests that fail turn a path down, and one that succeeds
// after the hold turns it up.
func TestPassiveHealth(t *testing.T) {
	s := newScene(t, false)
	s.start(healthConfig("", "    connect_timeout: 500ms\n    health: {failures: 3, destinations: 2, window: 5m, hold: 2s}"))
	s.until("out/p1", state("up"))
	s.swallow(true)
	for i, target := range []string{target4, "192.0.2.2:80", target4} {
		if got := s.paths()["out/p1"].State; got != "up" {
			t.Errorf("after %d failures: %s", i, got)
		}
		if told := s.ask(lab.Ask{Proxy: proxyAt(3129), Header: egress("p1"), Target: target}); told.Status != 504 {
			t.Errorf("%d %q", told.Status, told.Body)
		}
	}
	s.until("out/p1", func(p control.Path) bool { return p.State != "up" })
	if told := s.pinned("p1"); told.Status != 503 && told.Status != 504 { // 504: the hold was over, and it was the trial
		t.Errorf("%d %q", told.Status, told.Body)
	}
	if got := s.paths()["out/p2"].State; got != "up" {
		t.Errorf("the other path is %s", got)
	}
	s.swallow(false)
	s.until("out/p1", func(p control.Path) bool {
		return p.State == "probing" && strings.Contains(p.Reason, "on trial by one request at a time")
	})
	if told := s.pinned("p1"); told.Status != 200 || told.Seen.Source != lab.Egress4()[0].String() {
		t.Errorf("the trial: %d %q", told.Status, told.Body)
	}
	s.until("out/p1", state("up"))
}

// TestFailoverGoesBack: without a probe it is the requests that find out that
// an escaper can be used again.
func TestFailoverGoesBack(t *testing.T) {
	s := newScene(t, false)
	nodes := fmt.Sprintf("[{id: p1, ipv4: %s, uplink: isp1}]", lab.Egress4()[0])
	s.start(healthConfig(nodes, "    connect_timeout: 500ms\n    health: {failures: 1, destinations: 1, hold: 1s}"))
	s.until("out/p1", state("up"))
	s.by(1)
	s.swallow(true)
	if told := s.ask(lab.Ask{}); told.Status != 504 {
		t.Errorf("%d %q", told.Status, told.Body)
	}
	s.until("out/p1", func(p control.Path) bool { return p.State != "up" })
	s.daemon.Await(func(log string) bool { return strings.Contains(log, "path=out/p1 state=down") })
	if told := s.ask(lab.Ask{}); told.Status != 200 && told.Status != 504 || told.Status == 200 && told.Seen.Source != lab.Egress4()[4].String() {
		t.Errorf("%d %q from %s", told.Status, told.Body, told.Seen.Source)
	}
	s.swallow(false)
	for end := time.Now().Add(time.Minute); ; {
		told := s.ask(lab.Ask{})
		if told.Status != 200 {
			t.Errorf("%d %q", told.Status, told.Body)
		}
		if told.Seen.Source == lab.Egress4()[0].String() {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it does not go back; the path: %+v", s.paths()["out/p1"])
		}
	}
	s.until("out/p1", state("up"))
}

// TestPortsRunOut has 500 ports for each path, and more connections to one
// target than that.
func TestPortsRunOut(t *testing.T) {
	s := newScene(t, true)
	if err := s.Host.Sysctl("net/ipv4/ip_local_port_range", "40000 40499"); err != nil {
		t.Fatal(err)
	}
	v4 := lab.Egress4()
	s.start(fmt.Sprintf(`metrics: {listen: "10.0.0.1:9180"}
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    pick_policy: serial
    spill: on
    nodes: [{id: p1, ipv4: %s}, {id: p2, ipv4: %s}]
`, v4[0], v4[1]) + openServer)
	l := s.listen(lab.OriginAddr4 + ":7")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	t.Cleanup(func() { l.Close() })
	tunnel := func(header string) (net.Conn, string) {
		c, err := s.Client.Dial(proxyAt(3128))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "CONNECT %s:7 HTTP/1.1\r\nHost: x\r\n%s\r\n", lab.OriginAddr4, header)
		b := make([]byte, 4096)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return c, string(b[:n])
	}
	from := map[string]int{}
	for range 700 {
		_, answer := tunnel("")
		if !strings.HasPrefix(answer, "HTTP/1.1 200 ") {
			t.Fatalf("after %v: %q", from, answer)
		}
		for _, a := range v4[:2] {
			if strings.Contains(answer, a.String()+"\r\n") {
				from[a.String()]++
			}
		}
	}
	if one, two := from[v4[0].String()], from[v4[1].String()]; one > 500 || one < 300 || one+two != 700 {
		t.Errorf("sources: %v", from)
	}
	// The selected path has some left, or it says so; it is never another.
	refused := ""
	for range 500 {
		if _, answer := tunnel("X-Egress-Path: p1\r\n"); strings.HasPrefix(answer, "HTTP/1.1 503 ") {
			refused = answer
			break
		} else if !strings.Contains(answer, v4[0].String()+"\r\n") {
			t.Fatalf("selected: %q", answer)
		}
	}
	if !strings.Contains(refused, "connection_limit_reached") {
		t.Errorf("selected: %q", refused)
	}
	if !s.daemon.Await(func(log string) bool {
		return strings.Contains(log, `msg="ports are running out" path=out/p1 source=`+v4[0].String()+" target="+lab.OriginAddr4+":7")
	}) {
		t.Error("nothing in the log")
	}
	const metric = `wayout_path_ports{escaper="out",path="p1",state="in_use"}`
	var all map[string]float64
	for end := time.Now().Add(time.Minute); all[metric] != 500; all = s.scrape(t) {
		if time.Now().After(end) {
			t.Fatalf("%s is %v", metric, all[metric])
		}
		s.until("out/p1", state("up")) // a look at the paths takes its time
	}
	if left := all[`wayout_path_ports_exhaustion_seconds{escaper="out",path="p1"}`]; left != 0 {
		t.Errorf("they are used up in %v s", left)
	}
}
