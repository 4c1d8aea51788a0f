package main_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"wayout/scripts/lab"
)

// fixDocument is what `doctor --fix --json` prints.
type fixDocument struct {
	OK       bool `json:"ok"`
	Findings []struct {
		Name, Level, Found, Means, Remedy string
	} `json:"findings"`
	Fixed []struct {
		Name, Setting, Old, New, Lasting string
	} `json:"fixed"`
	Failed []struct {
		Name, Error, Remedy string
	} `json:"failed"`
	Left []struct {
		Name, Error, Remedy string
	} `json:"left"`
}

// level is that of the finding of a name.
func (d fixDocument) level(name string) string {
	for _, f := range d.Findings {
		if f.Name == name {
			return f.Level
		}
	}
	return ""
}

// readSysctl reads a setting of the host's namespace.
func (s *scene) readSysctl(path string) string {
	s.t.Helper()
	var text []byte
	err := s.Host.Do(func() (err error) {
		text, err = os.ReadFile("/proc/sys/" + path)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(text)), " ")
}

// TestDoctorFix breaks what doctor mends, in a namespace of its own.
func TestDoctorFix(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.write(outConfig("uplink: [{name: isp1, interface: eth0, gateway4: " + lab.Gateway1Of4 + "}, {name: isp2, interface: eth1, gateway4: " + lab.Gateway2Of4 + "}]\n"))
	const ports, reuse = "net/ipv4/ip_local_port_range", "net/ipv4/tcp_tw_reuse"
	const strict, loose = "net/ipv4/conf/eth0/rp_filter", "net/ipv4/conf/eth1/rp_filter"
	broken := map[string]string{ports: "40000 41000", reuse: "0", strict: "1", loose: "2", "net/ipv4/conf/all/rp_filter": "0", "net/ipv4/tcp_timestamps": "0"}
	outside, err := os.ReadFile("/proc/sys/" + reuse)
	if err != nil {
		t.Fatal(err)
	}
	breakIt := func() {
		t.Helper()
		for path, v := range broken {
			if err := s.Host.Sysctl(path, v); err != nil {
				t.Fatal(err)
			}
		}
	}
	fix := func(args ...string) (fixDocument, int) {
		t.Helper()
		out, errs, code := s.command(append([]string{"doctor", "--fix", "--json", "--config", s.config}, args...)...)
		var d fixDocument
		dec := json.NewDecoder(strings.NewReader(out))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&d); err != nil || errs != "" || d.OK != (code == 0) || d.Fixed == nil || d.Failed == nil || d.Left == nil {
			t.Fatalf("%d %q %q %v", code, out, errs, err)
		}
		return d, code
	}
	breakIt()
	// Without --fix nothing changes.
	if out, errs, code := s.command("doctor", "--config", s.config); code != 0 || strings.Contains(out, "fixed:") {
		t.Errorf("%d %q %q", code, out, errs)
	}
	for path, want := range broken {
		if got := s.readSysctl(path); got != want {
			t.Errorf("doctor alone has made %s %q", path, got)
		}
	}
	d, code := fix()
	var did []string
	for _, f := range d.Fixed {
		did = append(did, f.Setting+": "+f.Old+" > "+f.New)
		if !strings.Contains(f.Lasting, "/etc/sysctl.d/") || !strings.Contains(f.Lasting, f.Setting+" = "+f.New) {
			t.Errorf("to make it last: %q", f.Lasting)
		}
	}
	want := []string{
		"net.ipv4.ip_local_port_range: 40000 41000 > 32768 60999",
		"net.ipv4.tcp_tw_reuse: 0 > 1",
		"net.ipv4.conf.eth0.rp_filter: 1 > 2",
	}
	if !slices.Equal(did, want) || len(d.Failed) != 0 || code != 0 {
		t.Errorf("fixed %q, failed %+v, exit code %d", did, d.Failed, code)
	}
	for path, want := range map[string]string{ports: "32768 60999", reuse: "1", strict: "2", loose: "2", "net/ipv4/tcp_timestamps": "0"} {
		if got := s.readSysctl(path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if d.level("net.ipv4.tcp_tw_reuse") != "ok" || d.level("reverse path check of eth0") != "ok" {
		t.Errorf("the findings are of before: %+v", d.Findings)
	}
	// What is not safe is left, and its remedy named.
	if !slices.ContainsFunc(d.Left, func(l struct{ Name, Error, Remedy string }) bool {
		return l.Name == "net.ipv4.tcp_timestamps" && strings.Contains(l.Remedy, "tcp_timestamps=1")
	}) {
		t.Errorf("left %+v", d.Left)
	}
	// Twice is once.
	if d, code := fix(); len(d.Fixed) != 0 || code != 0 {
		t.Errorf("again: %d %+v", code, d.Fixed)
	}

	// As text, with a blocker that it does not touch.
	breakIt()
	mask := uint32(0xffff)
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Mark, rule.Mask, rule.Table = netlink.FAMILY_V4, 100, 1, &mask, 77
	if err := s.Host.Netlink().RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	out, errs, code := s.command("doctor", "--fix", "--config", s.config)
	for _, line := range []string{
		"fixed: net.ipv4.tcp_tw_reuse: 1, was 0; until the next boot: to make it last, write `net.ipv4.tcp_tw_reuse = 1` into /etc/sysctl.d/90-wayout.conf\n",
		"fixed: net.ipv4.conf.eth0.rp_filter: 2, was 1;",
		"left: foreign rule that matches our marks; by hand: leave its bits out of netcfg.mark_mask",
		"blocker  foreign rule that matches our marks: ",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q in\n%s", line, out)
		}
	}
	if rules, err := s.Host.Netlink().RuleListFiltered(netlink.FAMILY_V4, rule, netlink.RT_FILTER_PRIORITY); err != nil || len(rules) != 1 {
		t.Errorf("the rule of somebody else: %v, %v", rules, err)
	}
	if code != 1 || errs != "" {
		t.Errorf("with a blocker left: %d %q", code, errs)
	}
	if _, err := os.Stat("/etc/sysctl.d/90-wayout.conf"); err == nil {
		t.Error("something persistent was written")
	}
	if now, err := os.ReadFile("/proc/sys/" + reuse); err != nil || string(now) != string(outside) {
		t.Errorf("this host's own setting is %q, was %q: %v", now, outside, err)
	}
	out, errs, code = s.command("doctor", "--fix", "--prove-guard", "out/p1", target4)
	if code != 2 || out != "" {
		t.Errorf("two commands at once: %d %q", code, out)
	}
	sentence(t, "two commands at once", errs)
}

// runApart runs the program in the host's network namespace, with mounts of its
// own that a shell command makes first.
func (s *scene) runApart(mounts string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		lab.Missing(s.t, "unshare")
	}
	var out, errs strings.Builder
	cmd, err := s.Host.Start(lab.Program{
		Path: unshare, Args: append([]string{"--mount", "--propagation", "private", "sh", "-c", mounts + ` && exec "$@"`, "sh", binary}, args...),
		Stdout: &out, Stderr: &errs,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return out.String(), errs.String(), exit.ExitCode()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return out.String(), errs.String(), 0
}

// TestDoctorFixMounts: a bpf file system that is missing is mounted, in mounts
// of our own; a setting that cannot be written is a failure, and said so.
func TestDoctorFixMounts(t *testing.T) {
	t.Parallel()
	s := newScene(t, false)
	s.write(outConfig(""))
	if err := s.Host.Sysctl("net/ipv4/tcp_tw_reuse", "1"); err != nil {
		t.Fatal(err)
	}
	const gone = "while umount /sys/fs/bpf 2>/dev/null; do :; done"
	out, errs, code := s.runApart(gone, "doctor", "--config", s.config)
	if code != 0 || !strings.Contains(out, "warning  bpf file system mounted: not mounted\n") {
		t.Errorf("%d %q\n%s", code, errs, out)
	}
	out, errs, code = s.runApart(gone, "doctor", "--fix", "--config", s.config)
	if code != 0 || !strings.Contains(out, "fixed: bpf file system: mounted at /sys/fs/bpf, was not mounted;") || !strings.Contains(out, "ok       bpf file system mounted\n") {
		t.Errorf("%d %q\n%s", code, errs, out)
	}
	if err := s.Host.Sysctl("net/ipv4/tcp_tw_reuse", "2"); err != nil {
		t.Fatal(err)
	}
	const readOnly = "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys"
	out, errs, code = s.runApart(readOnly, "doctor", "--fix", "--config", s.config)
	if code != 1 || errs != "" || !strings.Contains(out, "failed: net.ipv4.tcp_tw_reuse: set net.ipv4.tcp_tw_reuse: ") || strings.Contains(out, "fixed: net.ipv4.tcp_tw_reuse") {
		t.Errorf("%d %q\n%s", code, errs, out)
	}
}
