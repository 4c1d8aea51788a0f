package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// wayout runs the program where the test itself is.
func wayout(t *testing.T, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.Command(binary, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return out.String(), errs.String(), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), 0
}

// sentence checks that an error is told as one line for people.
func sentence(t *testing.T, what, stderr string) {
	t.Helper()
	if !strings.HasPrefix(stderr, "wayout: ") || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "goroutine ") {
		t.Errorf("%s: %q is not one line that begins with wayout:", what, stderr)
	}
}

func verbNames() []string {
	return []string{
		"serve", "check", "explain", "paths", "top", "drain", "undrain", "publish", "pin", "unpin", "reload",
		"plan", "apply", "clean", "doctor", "hash-password", "version",
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"help"}, {"--help"}, {"-h"}} {
		out, errs, code := wayout(t, "", args...)
		if code != 0 || errs != "" {
			t.Errorf("%v: %d %q", args, code, errs)
		}
		for _, verb := range verbNames() {
			if !regexp.MustCompile(`(?m)^  ` + verb + ` .*[a-z]`).MatchString(out) {
				t.Errorf("%v says nothing of %s", args, verb)
			}
		}
	}
	if out, errs, code := wayout(t, ""); code != 2 || out != "" || !strings.Contains(errs, "usage: wayout COMMAND") {
		t.Errorf("without a command: %d %q %q", code, out, errs)
	}
	for _, word := range []string{"sevre", "", "-x", "--json", "execute"} {
		out, errs, code := wayout(t, "", word)
		if code != 2 || out != "" {
			t.Errorf("unknown command %q: %d %q", word, code, out)
		}
		sentence(t, "unknown command", errs)
	}
	for _, verb := range verbNames() {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			if _, errs, code := wayout(t, "", verb, "--help"); code != 0 || !strings.Contains(errs, "wayout "+verb) {
				t.Errorf("--help: %d %q", code, errs)
			}
			if out, errs, code := wayout(t, "", verb, "--no-such-flag"); code != 2 || out != "" || !strings.Contains(errs, "no-such-flag") {
				t.Errorf("unknown flag: %d %q %q", code, out, errs)
			}
			out, errs, code := wayout(t, "", verb, "one", "two", "three")
			if code != 2 || out != "" {
				t.Errorf("too many arguments: %d %q", code, out)
			}
			sentence(t, "too many arguments", errs)
			if strings.HasSuffix(verb, "drain") || verb == "unpin" {
				out, errs, code = wayout(t, "", verb)
				if code != 2 || out != "" {
					t.Errorf("no argument: %d %q", code, out)
				}
				sentence(t, "no argument", errs)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	if out, errs, code := wayout(t, "", "version"); code != 0 || errs != "" || !strings.HasPrefix(out, "wayout ") {
		t.Errorf("%d %q %q", code, out, errs)
	}
	var v map[string]string
	out, _, code := wayout(t, "", "version", "--json")
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != 0 || v["version"] == "" {
		t.Errorf("%d %q %v", code, out, err)
	}
}

// TestNoDaemon asks where nobody answers: no file, a file that nobody listens
// on, and one that is no socket.
func TestNoDaemon(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config := filepath.Join(dir, "wayout.yaml")
	write(t, config, "control: {socket: "+filepath.Join(dir, "none.sock")+"}\nescaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1}]\n")
	plain := filepath.Join(dir, "plain")
	write(t, plain, "")
	stale := filepath.Join(dir, "stale.sock")
	staleSocket(t, stale)
	for _, where := range [][]string{
		{"--config", config},
		{"--control", filepath.Join(dir, "none.sock")},
		{"--control", filepath.Join(dir, "no", "such", "directory.sock")},
		{"--control", plain},
		{"--control", stale},
	} {
		for _, verb := range [][]string{{"paths"}, {"paths", "--json"}, {"paths", "--watch"}, {"top", "--once"}, {"top", "--json"}, {"reload"}, {"drain", "out/p1"}, {"undrain", "out/p1"}} {
			out, errs, code := wayout(t, "", append(verb, where...)...)
			if code != 1 || out != "" || !strings.Contains(errs, filepath.Base(where[1])) && where[0] == "--control" {
				t.Errorf("%v %v: %d %q %q", verb, where, code, out, errs)
			}
			sentence(t, "no daemon", errs)
		}
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// staleSocket leaves the file of a unix socket on which nobody listens.
func staleSocket(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
}

// TestReference looks for every key that the contract has and this version
// reads.
func TestReference(t *testing.T) {
	t.Parallel()
	out, errs, code := wayout(t, "", "check", "--reference")
	if code != 0 || errs != "" {
		t.Fatalf("%d %q", code, errs)
	}
	known := map[string]bool{}
	for line := range strings.Lines(out) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if len(cells) < 5 {
			continue
		}
		known[strings.TrimSpace(cells[0])] = strings.TrimSpace(cells[1]) != "" && len(strings.TrimSpace(cells[4])) > 5
	}
	for _, key := range strings.Fields(`
		control.socket metrics.listen log.format log.level accounting keep_on_stop drain_timeout
		netcfg.mark_mask netcfg.table_base netcfg.rule_priority resolver[].name resolver[].type
		uplink[].name uplink[].interface uplink[].gateway4 uplink[].gateway6 uplink[].manage_addresses
		escaper[].name escaper[].type escaper[].resolver escaper[].enable_path_selection escaper[].pick_policy escaper[].pick_key
		escaper[].index escaper[].egress_network_filter.deny escaper[].egress_network_filter.allow escaper[].nodes[].id
		escaper[].nodes[].ipv4 escaper[].nodes[].ipv6 escaper[].nodes[].uplink escaper[].nodes[].weight escaper[].nodes[].interface
		escaper[].bind_ip escaper[].interface escaper[].uplink
		user_group[].name user_group[].users[].name user_group[].users[].password user_group[].users[].egress_path user_group[].users[].allow_path
		server[].name server[].type server[].listen server[].escaper server[].user_group server[].open server[].path_selection_header server[].report_egress`) {
		if !known[key] {
			t.Errorf("the reference has no row, or an empty one, for %s", key)
		}
	}
	for _, word := range []string{"egress_path_id_map", "least_conn", "wrap", "/run/wayout/control.sock"} {
		if !strings.Contains(out, word) {
			t.Errorf("the reference says nothing of %s", word)
		}
	}
	out, _, code = wayout(t, "", "check", "--reference", "--json")
	if code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("--reference --json: %d, and this is no JSON: %.80q", code, out)
	}
}

func TestCheckLive(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.write(outConfig("uplink: [{name: isp1, interface: eth0, gateway4: " + lab.Gateway1Of4 + "}]\n"))
	// wantFound checks what --live finds, in both forms.
	wantFound := func(what string, words ...string) {
		t.Helper()
		out, errs, code := s.command("check", "--live", "--config", s.config)
		if errs != "" {
			t.Errorf("%s: %q", what, errs)
		}
		text, _, jsonCode := s.command("check", "--live", "--json", "--config", s.config)
		j := decodeFaults(t, text)
		if jsonCode != code || j.OK != (len(words) == 0) {
			t.Errorf("%s: %d %q", what, jsonCode, text)
		}
		var messages []string
		for _, f := range j.Errors {
			messages = append(messages, f.Message)
		}
		if len(words) == 0 {
			if code != 0 || out != "ok\n" || len(messages) != 0 {
				t.Errorf("%s: %d %q %q", what, code, out, messages)
			}
			return
		}
		lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
		if code != 1 || len(lines) != len(words) || !slices.Equal(lines, messages) {
			t.Errorf("%s: %d %q %q", what, code, lines, messages)
			return
		}
		for i, word := range words {
			for _, w := range strings.Fields(word) {
				if !strings.Contains(lines[i], w) {
					t.Errorf("%s: %q, want %q in it", what, lines[i], w)
				}
			}
		}
	}
	wantFound("all is there")
	gone4, gone6 := lab.Egress4()[1], lab.Egress6()[5]
	if err := errors.Join(s.Host.DelAddr("eth0", lab.EgressPrefix(gone4)), s.Host.DelAddr("eth1", lab.EgressPrefix(gone6))); err != nil {
		t.Fatal(err)
	}
	wantFound("two addresses are missing", "out/p2 "+gone4.String(), "out/p6 "+gone6.String())
	// Without --live it is as good as ever.
	if out, errs, code := s.command("check", "--config", s.config); code != 0 || out != "ok\n" {
		t.Errorf("check: %d %q %q", code, out, errs)
	}
	if err := errors.Join(s.Host.AddAddr("eth0", lab.EgressPrefix(gone4)), s.Host.AddAddr("eth1", lab.EgressPrefix(gone6))); err != nil {
		t.Fatal(err)
	}
	wantFound("they are back")
	s.write(`uplink: [{name: isp1, interface: eth0}, {name: isp2, interface: eth7}]
escaper:
  - {name: out, type: direct_fixed, nodes: [{id: a, ipv4: 198.51.100.11, interface: eth0}, {id: b, ipv4: 203.0.113.11, interface: eth0}, {id: c, interface: eth8}]}
` + openServer)
	wantFound("interfaces are missing", "isp2 eth7", "out/c eth8")
	if err := s.Host.Down("eth0"); err != nil {
		t.Fatal(err)
	}
	wantFound("an interface is down", "isp1 eth0 down", "isp2 eth7", "out/a eth0 down", "out/b eth0 down", "out/c eth8")
}

// TestHashPassword makes a hash by the command, puts it into a configuration
// and logs in with it.
func TestHashPassword(t *testing.T) {
	t.Parallel()
	const good = "  correct hörse: battery staple "
	var hashes []string
	for _, stdin := range []string{good + "\n", good, good + "\r\n", good + "\nanother line\n"} {
		out, errs, code := wayout(t, stdin, "hash-password")
		if code != 0 || errs != "" {
			t.Fatalf("%q: %d %q", stdin, code, errs)
		}
		lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
		hashes = append(hashes, lines[len(lines)-1])
	}
	out, _, code := wayout(t, good, "hash-password", "--json")
	var j map[string]string
	if err := json.Unmarshal([]byte(out), &j); err != nil || code != 0 || len(j) != 1 {
		t.Fatalf("--json: %d %q %v", code, out, err)
	}
	hashes = append(hashes, j["hash"])
	var users strings.Builder
	for i, h := range hashes {
		if !strings.HasPrefix(h, "$argon2id$v=19$") || strings.ContainsAny(h, " \"'") {
			t.Errorf("%q", h)
		}
		if slices.Index(hashes, h) != i {
			t.Errorf("the same hash twice: no salt")
		}
		fmt.Fprintf(&users, "      - {name: u%d, password: %q}\n", i, h)
	}
	for _, stdin := range []string{"", "\n", "\r\n", strings.Repeat("x", 5000), "nul\x00\n", "a\ttab\n"} {
		if out, errs, code := wayout(t, stdin, "hash-password"); code == 0 || out != "" {
			t.Errorf("%.10q: %d %q", stdin, code, out)
		} else {
			sentence(t, "hash-password", errs)
		}
	}
	s := outScene(t, "user_group:\n  - name: team\n    users:\n"+users.String()+
		`server: [{name: web, type: http_proxy, listen: "10.0.0.1:3128", user_group: team, escaper: out, path_selection_header: X-Egress-Path}]`+"\n")
	for i := range hashes {
		name := fmt.Sprintf("u%d", i)
		for range 2 { // the second time from the cache
			if told := s.ask(lab.Ask{Header: []string{basic(name, good)}}); told.Status != 200 {
				t.Errorf("%s: %d %s", name, told.Status, told.Body)
			}
		}
	}
	for _, wrong := range []string{strings.TrimSpace(good), good + " ", strings.ToUpper(good)} {
		if told := s.ask(lab.Ask{Header: []string{basic("u0", wrong)}}); told.Status != 407 {
			t.Errorf("with %q: %d", wrong, told.Status)
		}
	}
}

// TestHashPasswordOnTerminal types the password on a terminal, which must not
// show it.
func TestHashPasswordOnTerminal(t *testing.T) {
	t.Parallel()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err := errors.Join(err, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	echoes := func() bool {
		t.Helper()
		term, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return term.Lflag&unix.ECHO != 0
	}
	var out, errs strings.Builder
	cmd := exec.Command(binary, "hash-password")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); echoes(); {
		if time.Since(begun) > 20*time.Second {
			_ = cmd.Process.Kill()
			t.Fatal("the terminal goes on showing what is typed")
		}
	}
	if _, err := master.WriteString("typed secret\n"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.HasPrefix(out.String(), "$argon2id$") || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("%v, %q, %q", err, out.String(), errs.String())
	}
	if !strings.HasPrefix(errs.String(), "Password: ") {
		t.Errorf("prompted by %q", errs.String())
	}
	if !echoes() {
		t.Error("the terminal stays blind")
	}
}

// ours lists the rules, routes and addresses in the host that bear our mark.
func (s *scene) ours(t *testing.T) []string {
	t.Helper()
	const protocol = 119
	var all []string
	nl := s.Host.Netlink()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := nl.RuleList(family)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			if r.Protocol == protocol {
				all = append(all, "rule "+r.String())
			}
		}
		routes, err := nl.RouteListFiltered(family, &netlink.Route{Protocol: protocol, Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			all = append(all, "route "+r.String())
		}
	}
	links, err := nl.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		addrs, err := nl.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			ip, _ := netip.AddrFromSlice(a.IP)
			if ip = ip.Unmap(); slices.Contains(lab.Egress4(), ip) || slices.Contains(lab.Egress6(), ip) {
				all = append(all, fmt.Sprintf("address %s on %s", a.IPNet, l.Attrs().Name))
			}
		}
	}
	return all
}

// TestNetworkDocuments reads what plan, apply and clean print, in both forms.
func TestNetworkDocuments(t *testing.T) {
	t.Parallel()
	s := newScene(t, false)
	s.write(`uplink: [{name: isp1, interface: eth0, gateway4: ` + lab.Gateway1Of4 + `, manage_addresses: true}, {name: isp9, interface: eth9}]
escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 198.51.100.11, uplink: isp1}, {id: b, ipv4: 203.0.113.11, uplink: isp9}]}]
` + openServer)
	// documents runs a command both ways: --json first or last, because what
	// comes second finds the work done.
	documents := func(verb string, jsonFirst bool) {
		t.Helper()
		var c struct {
			Commands []string `json:"commands"`
			Notes    []string `json:"notes"`
		}
		asJSON := func() {
			out, errs, code := s.command(verb, "--json", "--config", s.config)
			dec := json.NewDecoder(strings.NewReader(out))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&c); err != nil || code != 0 || errs != "" || c.Commands == nil || strings.Count(out, "\n") != 1 {
				t.Errorf("%s --json: %d %q %q %v", verb, code, out, errs, err)
			}
		}
		if jsonFirst {
			asJSON()
		}
		out, errs, code := s.command(verb, "--config", s.config)
		if !jsonFirst {
			asJSON()
		}
		if code != 0 {
			t.Errorf("%s: %d %q", verb, code, errs)
		}
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "ip ") {
				t.Errorf("%s: %q is no ip command", verb, line)
			}
		}
		// What cannot be had is told beside what can.
		wantNotes := verb != "clean"
		if told := strings.Contains(errs, "wayout: ") && strings.Contains(errs, "eth9"); told != wantNotes || (len(c.Notes) > 0) != wantNotes {
			t.Errorf("%s: notes %q %q", verb, errs, c.Notes)
		}
		switch verb {
		case "plan":
			if want := strings.Join(c.Commands, "\n") + "\n"; out != want || len(c.Commands) == 0 {
				t.Errorf("plan\n%s\nand as JSON\n%s", out, want)
			}
		default:
			if done := len(c.Commands) > 0; done != jsonFirst || (out != "") == jsonFirst {
				t.Errorf("%s twice: %q, then %q", verb, c.Commands, out)
			}
		}
	}
	documents("plan", true)
	documents("apply", true)
	documents("clean", true)
	documents("apply", false)
	documents("clean", false)
	if got := s.ours(t); len(got) != 0 {
		t.Errorf("clean left %q", got)
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.write(outConfig("uplink: [{name: isp1, interface: eth0, gateway4: " + lab.Gateway1Of4 + "}]\n"))
	type report struct {
		OK       bool `json:"ok"`
		Findings []struct {
			Name   string `json:"name"`
			Level  string `json:"level"`
			Found  string `json:"found"`
			Means  string `json:"means"`
			Remedy string `json:"remedy"`
		} `json:"findings"`
	}
	examine := func() (r report) {
		t.Helper()
		out, errs, code := s.command("doctor", "--json", "--config", s.config)
		dec := json.NewDecoder(strings.NewReader(out))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&r); err != nil || errs != "" || r.OK != (code == 0) || code > 1 || len(r.Findings) < 5 {
			t.Fatalf("%d %q %q %v", code, out, errs, err)
		}
		text, _, textCode := s.command("doctor", "--config", s.config)
		if textCode != code {
			t.Errorf("exit code %d with --json, %d without", code, textCode)
		}
		for _, f := range r.Findings {
			if !slices.Contains([]string{"ok", "note", "warning", "blocker"}, f.Level) || f.Name == "" {
				t.Errorf("%+v", f)
			}
			if (f.Remedy == "" || f.Means == "") && (f.Level == "warning" || f.Level == "blocker") {
				t.Errorf("no meaning or no remedy: %+v", f)
			}
			if !strings.Contains(text, f.Name) {
				t.Errorf("only in the JSON: %+v", f)
			}
		}
		return r
	}
	if r := examine(); !r.OK {
		t.Errorf("a blocker on a host that the other tests run on: %+v", r.Findings)
	}
	// Somebody else's rule on our mark.
	mask := uint32(0xffff)
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Mark, rule.Mask, rule.Table = netlink.FAMILY_V4, 100, 1, &mask, 77
	if err := s.Host.Netlink().RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	r := examine()
	blockers := 0
	for _, f := range r.Findings {
		if f.Level == "blocker" {
			blockers++
			if !strings.Contains(f.Found, "fwmark") || !strings.Contains(f.Remedy, "mark_mask") {
				t.Errorf("%+v", f)
			}
		}
	}
	if r.OK || blockers != 1 {
		t.Errorf("with a foreign rule: %+v", r)
	}
	// Nothing was changed.
	if got := s.ours(t); len(got) != 16 {
		t.Errorf("doctor changed something: %q", got)
	}
}
