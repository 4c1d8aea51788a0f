package main_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// foreign puts rules, routes and addresses of others on the host: beside ours
// in every number space, and with our protocol outside of it.
func (k *kernelScene) foreign() {
	k.t.Helper()
	for _, c := range []string{
		"rule add priority 100 from 10.9.0.0/16 lookup 900",
		"rule add priority 11900 fwmark 0x1/0xff lookup 11900 proto static", // in our place, not ours
		"rule add priority 11910 from 10.8.0.0/16 lookup 11950",
		"rule add priority 11899 from 10.7.0.0/16 lookup 11899 proto 119",
		"rule add priority 12156 from 10.6.0.0/16 lookup 12156 proto 119",
		"-6 rule add priority 100 from fd09::/16 lookup 900",
		"-6 rule add priority 11901 fwmark 0x2/0xff lookup 11901 proto static",
		"-6 rule add priority 12156 from fd06::/16 lookup 12156 proto 119",
		"route add 10.20.0.0/16 via " + lab.Gateway1Of4 + " proto 119",
		"route add 10.21.0.0/16 dev eth1 table 900 proto static",
		"route add default via " + lab.Gateway1Of4 + " table 11899 proto 119",
		"route add default via " + lab.Gateway2Of4 + " table 12156 proto 119",
		"route add 10.22.0.0/16 via " + lab.Gateway1Of4 + " table 11950 proto static",
		"route add local 10.23.0.0/16 dev lo table local proto 119 metric 5",
		"-6 route add fd20::/32 via " + lab.Gateway1Of6 + " proto 119",
		"-6 route add default via " + lab.Gateway1Of6 + " table 11899 proto 119",
		"-6 route add fd22::/32 dev eth1 table 11950 proto static",
		"addr add 198.51.100.99/24 dev eth0",
		"addr add 203.0.113.99/32 dev eth1 metric 11900 noprefixroute",
		"addr add 2001:db8:200::99/128 dev eth1 nodad",
		// A node's own address, that somebody else put there.
		"addr add " + lab.Egress4()[1].String() + "/24 dev eth0",
		"addr add " + lab.Egress6()[5].String() + "/64 dev eth1 nodad",
	} {
		k.ip(strings.Fields(c)...)
	}
}

// unchanged is what plan, apply and clean print when there is nothing to do.
const unchanged = ""

// TestPlanApplyClean compares what plan says with what apply does and with what
// the ip program makes of the commands; and clean leaves what was there.
func TestPlanApplyClean(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.foreign()
	k.write(uplinkConfig(""))
	before := k.state()

	if out := k.wayout("clean"); out != unchanged {
		t.Errorf("clean of a host without anything of ours:\n%s", out)
	}
	planned := k.wayout("plan")
	if planned == unchanged {
		t.Fatal("nothing is planned")
	}
	k.same("plan changes nothing", before)
	var asJSON struct {
		Commands []string `json:"commands"`
	}
	if err := json.Unmarshal([]byte(k.wayout("plan", "--json")), &asJSON); err != nil {
		t.Fatal(err)
	}
	commands := strings.Split(strings.TrimSpace(planned), "\n")
	if !slices.Equal(commands, asJSON.Commands) {
		t.Errorf("plan and plan --json differ: %q, %q", commands, asJSON.Commands)
	}

	if applied := k.wayout("apply"); applied != planned {
		t.Errorf("applied:\n%s\nplanned:\n%s", applied, planned)
	}
	after := k.state()
	// One line of the ip program's answers for each command but those that put
	// an address: the kernel adds its local route.
	lines := 0
	for _, q := range []string{rules4, rules6, routes4, routes6} {
		for _, l := range after.added(before, q) {
			if strings.Contains(l, "proto 119") {
				lines++
			}
		}
		if gone := before.added(after, q); len(gone) != 0 {
			t.Errorf("gone from ip %s: %q", q, gone)
		}
	}
	addresses := 0
	for _, c := range commands {
		if strings.HasPrefix(c, "ip addr add ") {
			addresses++
		}
	}
	if lines+addresses != len(commands) || addresses != 2*len(uplinkNodes())-2 {
		t.Errorf("%d commands, %d of them addresses, made %d rules and routes:\n%s%s", len(commands), addresses, lines, planned, before.difference(after))
	}
	if again := k.wayout("plan"); again != unchanged {
		t.Errorf("the second plan:\n%s", again)
	}
	if again := k.wayout("apply"); again != unchanged {
		t.Errorf("the second apply:\n%s", again)
	}
	k.same("apply twice", after)
	k.wayout("clean")
	k.same("clean", before)
	if again := k.wayout("clean"); again != unchanged {
		t.Errorf("the second clean:\n%s", again)
	}

	// The commands themselves come to the same.
	for _, c := range commands {
		k.run1(c)
	}
	if d := after.difference(k.state()); d != "" {
		t.Errorf("the commands by the ip program, beside apply:\n%s", d)
	}
	if left := k.wayout("plan"); left != unchanged {
		t.Errorf("planned after all of it was done by the ip program:\n%s", left)
	}
}

// run1 runs a command that wayout printed. An ip program that does not know
// protocols of addresses (before 6.4) is spared them.
func (k *kernelScene) run1(command string) {
	k.t.Helper()
	words := strings.Fields(command)[1:]
	_, err := k.tryIP(words...)
	if err != nil && words[0] == "addr" && strings.Contains(err.Error(), "garbage") {
		_, err = k.tryIP(strings.Fields(regexp.MustCompile(` proto \d+`).ReplaceAllString(command, ""))[1:]...)
	}
	if err != nil {
		k.t.Error(err)
	}
}

// TestForeignRouteInOurTable: what somebody else has in a table of ours is left
// alone, and said.
func TestForeignRouteInOurTable(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.write(uplinkConfig(""))
	k.ip(strings.Fields("route add 10.22.0.0/16 via " + lab.Gateway1Of4 + " table 11900 proto static")...)
	before := k.state()
	_, errs, code := k.command("apply", "--config", k.config)
	if code != 1 || !strings.Contains(errs, "11900") || !strings.Contains(errs, "10.22.0.0/16") {
		t.Errorf("exit %d: %s", code, errs)
	}
	k.wayout("clean")
	k.same("clean", before)
}

// TestServeMakesAndCleans goes through the lives of a daemon: each start makes
// the kernel as wished, each end but a kill makes it as it was, and clean does
// after a kill.
func TestServeMakesAndCleans(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.foreign()
	before := k.state()
	k.start(uplinkConfig(""))
	running := k.state()
	if before.difference(running) == "" {
		t.Fatal("the daemon has changed nothing")
	}
	nodes := uplinkNodes()
	k.works("first start", nodes[0], nodes[5])
	if out := k.wayout("plan"); out != unchanged {
		t.Errorf("planned while it runs:\n%s", out)
	}
	// What is a running daemon's is not cleaned behind its back.
	if out, errs, code := k.command("clean", "--config", k.config); code != 1 || !strings.HasPrefix(errs, "wayout: ") {
		t.Errorf("clean while it runs: exit %d %s%s", code, out, errs)
	}
	k.same("clean while it runs", running)
	leaf := k.leaf()
	k.stop()
	k.same("SIGTERM", before)
	k.gone(leaf)

	for _, end := range []struct {
		name string
		end  func()
	}{
		{"kill -9 and clean", func() { k.wayout("clean") }},
		{"kill -9, another start and SIGTERM", func() {
			k.run(lab.Program{})
			k.same("started again after kill -9", running)
			k.works("started again", nodes[1], nodes[6])
			k.stop()
		}},
		{"kill -9 with parts taken away, another start and SIGTERM", func() {
			k.ip("addr", "del", nodes[0].v4.String()+"/32", "dev", "eth0")
			k.ip("rule", "del", "priority", "11900", "proto", "119")
			k.ip("-6", "route", "flush", "table", "11901")
			k.run(lab.Program{})
			if d := (netState{rules4: sorted(running[rules4])}).difference(netState{rules4: sorted(k.ask1(rules4))}); d != "" {
				t.Errorf("started again after kill -9 and more:\n%s", d)
			}
			k.works("started again", nodes...)
			k.stop()
		}},
	} {
		k.run(lab.Program{})
		k.same(end.name+": started", running)
		leaf := k.leaf()
		if err := k.daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		k.same(end.name+": killed", running)
		end.end()
		k.same(end.name, before)
		k.gone(leaf)
	}
}

// TestKeepOnStop leaves everything in place, for the next start or clean.
func TestKeepOnStop(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	before := k.state()
	k.start("keep_on_stop: true\n" + uplinkConfig(""))
	running := k.state()
	leaf := k.leaf()
	dir, pins := k.pins(leaf)
	k.stop()
	k.same("SIGTERM with keep_on_stop", running)
	if _, left := k.pins(leaf); len(left) != len(pins) {
		t.Errorf("pins in %s: %v, were %v", dir, left, pins)
	}
	k.run(lab.Program{})
	k.same("started again", running)
	nodes := uplinkNodes()
	k.works("started again", nodes[0], nodes[4])
	k.stop()
	k.wayout("clean")
	k.same("clean", before)
	k.gone(leaf)
}

// TestPutBack takes away one by one what is wayout's: it is back within a
// second, and the log says so.
func TestPutBack(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	before := k.state()
	k.start(uplinkConfig(""))
	running := k.state()
	type loss struct {
		question string
		del      []string
	}
	var all []loss
	for _, q := range []string{rules4, rules6} {
		for _, l := range running.added(before, q) {
			priority, rest, _ := strings.Cut(l, ":")
			all = append(all, loss{q, append([]string{q[:2], "rule", "del", "priority", priority}, strings.Fields(rest)...)})
		}
	}
	for _, q := range []string{routes4, routes6} {
		for _, l := range running.added(before, q) {
			if strings.Contains(l, "proto 119") {
				all = append(all, loss{q, append([]string{q[:2], "route", "del"}, strings.Fields(l)...)})
			}
		}
	}
	nodes := uplinkNodes()
	for _, n := range []uplinkNode{nodes[0], nodes[7]} {
		link := []string{"eth0", "eth1"}[n.uplink]
		all = append(all, loss{addrs, []string{"addr", "del", n.v4.String() + "/32", "dev", link}},
			loss{addrs, []string{"addr", "del", n.v6.String() + "/128", "dev", link}})
	}
	if len(all) < 20 {
		t.Fatalf("only %d things to take away: %v", len(all), all)
	}
	var slowest time.Duration
	for _, l := range all {
		logged := strings.Count(k.daemon.Log(), "put back")
		began, clock := time.Now(), newFair(t)
		k.ip(l.del...)
		for want := sorted(running[l.question]); sorted(k.ask1(l.question)) != want; {
			if time.Since(began) > 10*time.Second {
				t.Fatalf("not put back after ip %s:\n%s", strings.Join(l.del, " "), running.difference(k.state()))
			}
		}
		took, own := clock.took()
		slowest = max(slowest, took)
		if own > time.Second {
			t.Errorf("ip %s: put back after %v", strings.Join(l.del, " "), took)
		}
		eventually(t, "the log says what was put back", func() bool { return strings.Count(k.daemon.Log(), "put back") > logged })
	}
	t.Logf("%d things put back, the slowest after %v", len(all), slowest)
	for _, n := range nodes {
		k.until("out/"+n.id, func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
	}
	k.works("after all of it", nodes...)
	k.stop()
	k.same("SIGTERM", before)
}

// ruleLines counts the host's rules of both families.
func (k *kernelScene) ruleLines() int {
	return strings.Count(k.ask1(rules4), "\n") + strings.Count(k.ask1(rules6), "\n")
}

// TestRulesByUplink: 200 nodes take as many rules as two.
func TestRulesByUplink(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	config := func(perUplink int) string {
		last := func(first string) netip.Addr {
			a := netip.MustParseAddr(first)
			for range perUplink - 1 {
				a = a.Next()
			}
			return a
		}
		return fmt.Sprintf(`%sescaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    nodes:
      - {ipv4: 198.51.100.100-%s, ipv6: "2001:db8:100::1:0-%s", uplink: isp1}
      - {ipv4: 203.0.113.100-%s, ipv6: "2001:db8:200::1:0-%s", uplink: isp2}
%s`, twoUplinks, last("198.51.100.100"), last("2001:db8:100::1:0"), last("203.0.113.100"), last("2001:db8:200::1:0"), openServer)
	}
	before := k.state()
	k.start(config(1))
	few := k.ruleLines()
	k.stop()
	k.start(config(100))
	if many := k.ruleLines(); many != few {
		t.Errorf("%d rules with 200 nodes, %d with two", many, few)
	}
	if n := strings.Count(k.ip("-o", "addr"), "noprefixroute"); n != 400 {
		t.Errorf("%d addresses were put there, want 400", n)
	}
	for _, a := range []string{"198.51.100.199", "203.0.113.150"} {
		if told := k.ask(lab.Ask{Header: egress(a)}); told.Status != 200 || told.Seen.Source != a {
			t.Errorf("%s: %d %q from %s", a, told.Status, told.Body, told.Seen.Source)
		}
	}
	k.stop()
	k.same("SIGTERM", before)
}

// serveBriefly runs a daemon that is to refuse by itself.
func (s *scene) serveBriefly() (stdout, stderr string, code int) {
	s.t.Helper()
	var out, errs strings.Builder
	cmd, err := s.Host.Start(lab.Program{Path: binary, Args: []string{"serve", "--config", s.config}, Stdout: &out, Stderr: &errs})
	if err != nil {
		s.t.Fatal(err)
	}
	end := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer end.Stop()
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() < 0 {
		s.t.Fatalf("it goes on: %v\n%s", err, &errs)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestSecondDaemon: daemons whose number spaces overlap do not run side by
// side, others do.
func TestSecondDaemon(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	before := k.state()
	first := func(numbers string) string { return "netcfg: {" + numbers + "}\n" + uplinkConfig("") }
	second := func(numbers string) string {
		return "netcfg: {" + numbers + "}\n" + strings.ReplaceAll(uplinkConfig(""), ":3128", ":3129")
	}
	k.start(first("mark_mask: 0xffff"))
	running := k.state()

	other := *k.scene
	other.dir = t.TempDir()
	other.config, other.socket = other.dir+"/wayout.yaml", other.dir+"/control.sock"
	for name, numbers := range map[string]string{
		"tables":     "mark_mask: 0xffff0000, rule_priority: 20000, table_base: 12155",
		"priorities": "mark_mask: 0xffff0000, rule_priority: 12155, table_base: 20000",
		"marks":      "mark_mask: 0x1fff000, rule_priority: 20000, table_base: 20000",
		"all":        "mark_mask: 0xffff",
	} {
		other.write(second(numbers))
		out, errs, code := other.serveBriefly()
		last := errs[strings.LastIndexByte(strings.TrimSpace(errs), '\n')+1:]
		if code != 1 || !strings.HasPrefix(last, "wayout: ") || !strings.Contains(last, fmt.Sprint(k.daemon.PID())) {
			t.Errorf("%s overlap: exit %d\n%s%s", name, code, out, errs)
		}
		k.same(name+" overlap", running)
		if _, errs, code := other.command("paths", "--config", other.config); code != 1 {
			t.Errorf("%s overlap: something answers on the second socket: %d %s", name, code, errs)
		}
	}
	k.works("beside daemons that refused", uplinkNodes()[0])

	apart := second("mark_mask: 0xffff0000, rule_priority: 20000, table_base: 20000")
	// Its own addresses, too: both would take them for theirs.
	for i, n := range uplinkNodes() {
		apart = strings.ReplaceAll(apart, n.v4.String()+",", fmt.Sprintf("%s%d,", n.v4.String()[:len(n.v4.String())-2], 61+i))
		apart = strings.ReplaceAll(apart, n.v6.String()+`"`, n.v6.String()+fmt.Sprintf(`:%d"`, i))
	}
	other.start(apart)
	for _, port := range []uint16{3128, 3129} {
		told := k.ask(lab.Ask{Proxy: proxyAt(port), Header: egress("p6")})
		want := netip.MustParseAddr("203.0.113.12")
		if port == 3129 {
			want = netip.MustParseAddr("203.0.113.66")
		}
		if told.Status != 200 || told.Seen.Source != want.String() {
			t.Errorf("by %d: %d %q from %s, want %s", port, told.Status, told.Body, told.Seen.Source, want)
		}
	}
	if err := other.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	k.same("the second is gone", running)
	k.works("after the second", uplinkNodes()...)
	k.stop()
	k.same("both are gone", before)
}

// TestApplyBesideDaemon: what a running daemon has is taken away by a reload alone.
// Something that is missing may be put back.
func TestApplyBesideDaemon(t *testing.T) {
	k := newKernelScene(t)
	k.start(uplinkConfig(openServer))
	if out := k.wayout("apply"); out != unchanged {
		t.Errorf("its own configuration:\n%s", out)
	}
	running := k.state()
	k.write(strings.Replace(uplinkConfig(openServer), "198.51.100.11,", "198.51.100.99,", 1))
	out, errs, code := k.command("apply", "--config", k.config)
	if code != 0 || strings.Contains(out, " del ") || !strings.Contains(out, "198.51.100.99") || !strings.Contains(out+errs, "wayout reload") {
		t.Errorf("another address: exit code %d: %s%s", code, out, errs)
	}
	for _, q := range []string{addrs, rules4, rules6, routes4, routes6} {
		if gone := running.added(k.state(), q); len(gone) != 0 {
			t.Errorf("gone from ip %s: %q", q, gone)
		}
	}
	if told := k.ask(lab.Ask{Target: target4, Header: egress("p1")}); told.Status != 200 || told.Seen.Source != "198.51.100.11" {
		t.Errorf("%d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
}
