package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router"
	"wayout/router/config"
)

// Verdicts of a finding.
const (
	verdictOK      = "ok"
	verdictAdvice  = "advice"  // works, and would work better
	verdictBlocker = "blocker" // does not work
	verdictUnknown = "unknown" // could not be looked at
)

// finding is one thing that doctor looked at.
type finding struct {
	Name    string `json:"name"`
	Verdict string `json:"verdict"`
	Found   string `json:"found,omitempty"`
	Remedy  string `json:"remedy,omitempty"`
}

// doctor says what this host allows and lacks, with the remedy for each.
func doctor(e *env, args []string) error {
	f := newFlags(e, "doctor").withControl().withJSON()
	prove := f.String("prove-guard", "", "have the running daemon try to leave by this `path` with a wrong source,\nto the address:port that is given as the argument; the kernel has to refuse it")
	if err := f.Parse(args); err != nil {
		return parseError(err)
	}
	if *prove != "" {
		return proveGuard(e, f, *prove)
	}
	if _, err := f.parse(f.Args()); err != nil {
		return err
	}
	c, err := f.loadConfig()
	if err != nil {
		return err
	}
	if c == nil {
		c = config.Default(nil)
	}
	found, err := examine(c)
	if err != nil {
		return err
	}
	blocked := false
	for _, x := range found {
		blocked = blocked || x.Verdict == verdictBlocker
	}
	if *f.json {
		err = json.NewEncoder(e.stdout).Encode(map[string]any{"ok": !blocked, "findings": found})
	} else {
		for _, x := range found {
			fmt.Fprintf(e.stdout, "%-8s %s", x.Verdict, x.Name)
			if x.Found != "" {
				fmt.Fprintf(e.stdout, ": %s", x.Found)
			}
			fmt.Fprintln(e.stdout)
			if x.Remedy != "" {
				fmt.Fprintf(e.stdout, "         remedy: %s\n", x.Remedy)
			}
		}
	}
	if blocked {
		return errors.Join(err, &exitError{code: exitFailed})
	}
	return err
}

// proveGuard asks the daemon for a deliberately wrong attempt.
func proveGuard(e *env, f *flags, path string) error {
	f.form = " --prove-guard PATH"
	rest, err := f.parse(f.Args(), "ADDRESS:PORT")
	if err != nil {
		return err
	}
	target, err := netip.ParseAddrPort(rest[0])
	if err != nil {
		return usageError("the target is an address and a port, got %q", rest[0])
	}
	client, err := f.client()
	if err != nil {
		return err
	}
	ctx := context.Background()
	p, err := client.Prove(ctx, path, target)
	if err != nil {
		return explainPath(ctx, client, path, err)
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(p)
	}
	fmt.Fprintf(e.stdout, "the kernel refused %s to connect and to send to %s from %s\n", p.Path, p.Target, p.Source)
	return nil
}

// examine looks at everything. It changes nothing.
func examine(c *config.Config) ([]finding, error) {
	layout := router.NetLayout(c)
	k, err := netcfg.Open(netcfg.Options{Layout: layout})
	if err != nil {
		return nil, err
	}
	all, err := examineWith(k, c, layout)
	return all, errors.Join(err, k.Close())
}

func examineWith(k *netcfg.Netlink, c *config.Config, layout netcfg.Layout) ([]finding, error) {
	s, err := k.Sysctls()
	if err != nil {
		return nil, err
	}
	snapshot, err := k.Read()
	if err != nil {
		return nil, err
	}
	nat, err := k.NAT()
	if err != nil {
		return nil, err
	}
	rights, err := examineRights()
	if err != nil {
		return nil, err
	}
	all := append([]finding{rights}, examineFeatures(bpf.Probe(), c.Accounting)...)
	files, err := examineFiles()
	if err != nil {
		return nil, err
	}
	all = append(all, files)
	all = append(all, examineSysctls(s)...)
	all = append(all, examineReversePath(s, c)...)
	for _, r := range snapshot.ForeignRules(layout) {
		if r.MarkMatches {
			all = append(all, finding{
				"foreign rule that matches our marks", verdictBlocker, r.Rule.String(),
				fmt.Sprintf("leave its bits out of netcfg.mark_mask (now 0x%x)", layout.MarkMask),
			})
			continue
		}
		all = append(all, finding{
			"foreign rule ahead of ours", verdictAdvice, r.Rule.String(),
			fmt.Sprintf("if it takes packets of the paths, set netcfg.rule_priority below its priority (now %d)", layout.RulePriority),
		})
	}
	for _, r := range nat.Rules {
		all = append(all, finding{
			"source address translation on the way out", verdictAdvice, r,
			"exempt the paths' addresses from it: it would change the address that a path promises",
		})
	}
	for _, u := range nat.Unknown {
		all = append(all, finding{Name: "source address translation on the way out", Verdict: verdictUnknown, Found: u})
	}
	return all, nil
}

// examineRights looks for the right that nothing runs without.
func examineRights() (finding, error) {
	x := finding{Name: "right to mark sockets and to change the network", Verdict: verdictOK}
	ok, err := router.Privileged()
	if err == nil && !ok {
		x.Verdict, x.Found = verdictBlocker, "this process lacks CAP_NET_ADMIN"
		x.Remedy = "run as root, or give the unit AmbientCapabilities=CAP_NET_ADMIN CAP_BPF"
	}
	return x, err
}

// examineFeatures says what counters and guard lack. What is missing for one
// and the same reason is one finding.
func examineFeatures(features []bpf.Feature, accounting bool) []finding {
	var all []finding
	type group struct{ at, more int }
	why := map[string]group{} // by reason
	for _, p := range features {
		x := finding{Name: p.Name, Verdict: verdictOK}
		if p.OK {
			all = append(all, x)
			continue
		}
		if g, ok := why[p.Err.Error()]; ok {
			g.more++
			why[p.Err.Error()] = g
			continue
		}
		x.Verdict, x.Remedy = verdictBlocker, p.Remedy
		if p.Need != bpf.NeedAll || !accounting {
			x.Verdict = verdictAdvice
		}
		x.Found = fmt.Sprintf("%v (Linux %s; needed for %s)", p.Err, p.Since, p.Need)
		if errors.Is(p.Err, bpf.ErrNotMounted) { // its text holds the remedy
			x.Found = fmt.Sprintf("%v (Linux %s; needed for %s)", bpf.ErrNotMounted, p.Since, p.Need)
			if name := execNetns(); name != "" {
				x.Remedy = "in `ip netns exec` /sys is a new mount: use `nsenter --net=/run/netns/" + name + "`"
			}
		}
		why[p.Err.Error()] = group{at: len(all)}
		all = append(all, x)
	}
	for _, g := range why {
		if g.more > 0 {
			all[g.at].Name += fmt.Sprintf(", and %d more", g.more)
		}
	}
	return all
}

// execNetns names the network namespace that this process was put in by
// `ip netns exec`, which mounts a /sys of that name over the host's, and with
// that hides what is mounted below; "" when it was not.
func execNetns() string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		// ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER
		before, after, _ := strings.Cut(line, " - ")
		b, a := strings.Fields(before), strings.Fields(after)
		if len(b) < 5 || len(a) < 2 || b[4] != "/sys" || a[0] != "sysfs" {
			continue
		}
		if _, err := os.Stat("/run/netns/" + a[1]); err == nil {
			return a[1]
		}
	}
	return ""
}

// enoughFiles is how many descriptors a busy egress router wants: two for each
// tunnel.
const enoughFiles = 65536

func examineFiles() (finding, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return finding{}, fmt.Errorf("read the file limit: %w", err)
	}
	x := finding{"file limit", verdictOK, strconv.FormatUint(l.Max, 10), ""}
	if l.Max < enoughFiles {
		x.Verdict, x.Remedy = verdictAdvice, fmt.Sprintf("LimitNOFILE=1048576 in the unit; %d files are about %d tunnels", l.Max, l.Max/2)
	}
	return x, nil
}

func examineSysctls(s netcfg.Sysctls) []finding {
	ports := finding{Name: s.PortRange.Name, Verdict: verdictOK, Found: s.PortRange.Value}
	if w := strings.Fields(s.PortRange.Value); len(w) == 2 {
		low, err1 := strconv.Atoi(w[0])
		high, err2 := strconv.Atoi(w[1])
		if err1 == nil && err2 == nil && high-low < 40000 {
			ports.Verdict = verdictAdvice
			ports.Remedy = "sysctl net.ipv4.ip_local_port_range=\"1025 65535\": so many connections fit between one address and one destination"
		}
	}
	reuse := finding{Name: s.TimeWaitReuse.Name, Verdict: verdictOK, Found: s.TimeWaitReuse.Value}
	if s.TimeWaitReuse.Set && s.TimeWaitReuse.Value != "1" {
		reuse.Verdict = verdictAdvice
		reuse.Remedy = "sysctl net.ipv4.tcp_tw_reuse=1: a port in TIME_WAIT can be used again after a second, not after a minute"
	}
	all := []finding{ports, reuse}
	if s.Timestamps.Set && s.Timestamps.Value == "0" {
		all = append(all, finding{s.Timestamps.Name, verdictAdvice, "0", "sysctl net.ipv4.tcp_timestamps=1: tcp_tw_reuse needs them"})
	}
	if s.Conntrack.Set {
		all = append(all, finding{
			"connection tracking is loaded", verdictAdvice, s.Conntrack.Value + " of " + s.ConntrackMax.Value + " entries",
			"see that net.netfilter.nf_conntrack_max is above the connections to be held, or exempt them",
		})
	}
	return all
}

// examineReversePath looks at the interfaces of the uplinks: with the strict
// check the answer to a packet that left by a rule of ours may be dropped.
func examineReversePath(s netcfg.Sysctls, c *config.Config) []finding {
	var all []finding
	for _, u := range c.Uplinks {
		strict := s.ReversePath[u.Interface] == 1
		x := finding{Name: "reverse path check of " + u.Interface, Verdict: verdictOK, Found: "off or loose"}
		if strict {
			x.Found = "strict"
			if s.SrcValidMark.Value != "1" {
				x.Found = "strict; the rules by source prefix that wayout adds satisfy it for addresses of the interface's own networks"
				x.Verdict = verdictAdvice
				x.Remedy = "sysctl net.ipv4.conf." + u.Interface + ".rp_filter=2 if the path has addresses of other networks"
			}
		}
		all = append(all, x)
	}
	return all
}
