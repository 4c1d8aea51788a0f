package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
)

// levels is the findings in short: a level and a name each, with a + where
// there is a fix. It checks what every finding has to have.
func levels(t *testing.T, all []finding) string {
	t.Helper()
	var words []string
	for _, x := range all {
		if x.Level != levelOK && x.Level != levelNote && (x.Means == "" || x.Remedy == "") {
			t.Errorf("no meaning or no remedy: %+v", x)
		}
		mark := ""
		if x.fix != nil {
			mark = "+"
		}
		words = append(words, x.Level+mark+" "+x.Name)
	}
	return strings.Join(words, "; ")
}

func TestRelease(t *testing.T) {
	for release, want := range map[string]string{
		"6.18.44-fc": "ok", "5.15.0": "ok", "5.14.0-503.el9": "warning", "4.19": "warning", "10.0": "ok", "": "note", "six": "note",
	} {
		if x := examineRelease(release); x.Level != want {
			t.Errorf("%q: %+v", release, x)
		}
	}
}

func TestKernelFeatures(t *testing.T) {
	both := []byte("\x00BPF_PROG_TYPE_SK_LOOKUP\x00x\x00BPF_TCX_INGRESS\x00")
	for _, tt := range []struct {
		release string
		btf     []byte
		want    string // of IFA_PROTO, sk_lookup, tcx
	}{
		{"6.6.1", both, "ok ok ok"},
		{"5.14.0-el9", both, "note ok ok"}, // what was brought to an old kernel is found
		{"6.6.1", []byte("\x00XBPF_TCX_INGRESS\x00BPF_PROG_TYPE_SK_LOOKUPX\x00"), "ok note note"},
		{"6.6.1", nil, "ok ok ok"},
		{"6.5.0", nil, "ok ok note"},
		{"5.8.0", nil, "note note note"},
		{"", nil, "note note note"},
	} {
		fs := kernelFeatures(tt.release, tt.btf)
		if got := strings.Join([]string{fs[1].finding().Level, fs[3].finding().Level, fs[4].finding().Level}, " "); len(fs) != 5 || got != tt.want {
			t.Errorf("%q %q: got %s, want %s", tt.release, tt.btf, got, tt.want)
		}
	}
	x := kernelFeature{name: "f", since: "6.6", level: levelWarning, means: "m", how: "tried"}
	if got := x.finding(); got.Level != levelWarning || got.Means != "m" || got.Remedy != "run Linux 6.6 or newer" || got.Found != "tried, missing" {
		t.Errorf("%+v", got)
	}
	x.err = unix.EPERM
	if got := x.finding(); got.Level != levelNote || !strings.Contains(got.Found, "cannot be tried") {
		t.Errorf("%+v", got)
	}
}

// TestProbes compares what is tried with what the kernel's version promises.
func TestProbes(t *testing.T) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	major, minor, _ := parseRelease(unix.ByteSliceToString(u.Release[:]))
	if has, err := probePortRange(); err != nil || has != since2(major, minor, 6, 3) {
		t.Errorf("IP_LOCAL_PORT_RANGE on %d.%d: %v, %v", major, minor, has, err)
	}
	if has, err := probeDestroy(); os.Geteuid() == 0 && err != nil || os.Geteuid() != 0 && (has || !errors.Is(err, unix.EPERM)) {
		t.Errorf("INET_DIAG_DESTROY: %v, %v", has, err)
	}
}

// sysDir is a /proc/sys with some settings.
func sysDir(t *testing.T, settings map[string]string) sysctlDir {
	t.Helper()
	root := t.TempDir()
	for name, v := range settings {
		file := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(v+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return sysctlDir(root)
}

func TestRights(t *testing.T) {
	c := &config.Config{Servers: []config.Server{
		{Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:3128"), netip.MustParseAddrPort("127.0.0.1:0")}},
		{Listen: []netip.AddrPort{netip.MustParseAddrPort("[::]:80")}},
	}}
	for _, tt := range []struct {
		first string
		want  uint16
	}{{"1024", 80}, {"", 80}, {"80", 0}, {"81", 80}, {"0", 0}, {"4000", 3128}} {
		settings := map[string]string{}
		if tt.first != "" {
			settings["net/ipv4/ip_unprivileged_port_start"] = tt.first
		}
		if got := lowPort(sysDir(t, settings), c); got != tt.want {
			t.Errorf("from %q: %d, want %d", tt.first, got, tt.want)
		}
	}
	const all = 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_SYS_ADMIN
	for _, tt := range []struct {
		effective uint32
		low       uint16
		want      string
	}{
		{all, 80, "ok right to listen on low ports; ok right to mount"},
		{0, 0, "note right to listen on low ports; note right to mount"},
		{1 << unix.CAP_SYS_ADMIN, 80, "blocker right to listen on low ports; ok right to mount"},
		{^uint32(all), 80, "blocker right to listen on low ports; note right to mount"},
	} {
		if got := levels(t, examineMoreRights(tt.effective, tt.low)); got != tt.want {
			t.Errorf("%x, %d: %s", tt.effective, tt.low, got)
		}
	}
}

func TestFeatures(t *testing.T) {
	off := errors.New("off")
	features := []bpf.Feature{
		{Name: "a", OK: true},
		{Name: "b", Err: off, Need: bpf.NeedAll, Since: "5.15", Remedy: "r"},
		{Name: "c", Err: off, Need: bpf.NeedAll, Since: "5.15", Remedy: "r"},
		{Name: "d", Err: errors.New("slow"), Need: bpf.NeedSpeed, Since: "4.1", Remedy: "r"},
		{Name: bpfFileSystem, Err: fmt.Errorf("fs: %w: mount", bpf.ErrNotMounted), Need: bpf.NeedStart, Since: "4.4", Remedy: "mount"},
	}
	want := "ok a; blocker b, and 1 more; warning d; warning+ " + bpfFileSystem
	if got := levels(t, examineFeatures(features, true)); got != want {
		t.Errorf("got %s", got)
	}
	if got := levels(t, examineFeatures(features, false)); got != strings.Replace(want, "blocker", "warning", 1) {
		t.Errorf("without accounting: %s", got)
	}
	// The fix is for the finding that bpf.Probe makes.
	if !slices.ContainsFunc(bpf.Probe(), func(f bpf.Feature) bool { return f.Name == bpfFileSystem }) {
		t.Error("no feature of the name " + bpfFileSystem)
	}
}

func TestSysctlFindings(t *testing.T) {
	set := func(name, v string) netcfg.Sysctl { return netcfg.Sysctl{Name: name, Value: v, Set: true} }
	for _, tt := range []struct {
		ports, reuse, stamps, count string
		want                        string
	}{
		{"1025 65535", "1", "1", "", "ok range; ok reuse"},
		{"32768 60999", "2", "1", "", "note range; warning+ reuse"},
		{"40000 60999", "0", "0", "", "warning+ range; warning+ reuse; warning stamps"},
		{"32769 60999", "1", "1", "", "warning+ range; ok reuse"},
		{"odd", "1", "1", "79999", "ok range; ok reuse; note connection tracking"},
		{"1025 65535", "1", "1", "80000", "ok range; ok reuse; warning connection tracking"},
		{"1025 65535", "1", "1", "?", "ok range; ok reuse; note connection tracking"},
	} {
		s := netcfg.Sysctls{PortRange: set("range", tt.ports), TimeWaitReuse: set("reuse", tt.reuse), Timestamps: set("stamps", tt.stamps)}
		if tt.count != "" {
			s.Conntrack, s.ConntrackMax = set("count", tt.count), set("max", "100000")
		}
		if got := levels(t, examineSysctls(s)); got != tt.want {
			t.Errorf("%+v: got %s", tt, got)
		}
	}
	if got := levels(t, examineSysctls(netcfg.Sysctls{PortRange: netcfg.Sysctl{Name: "range"}, TimeWaitReuse: netcfg.Sysctl{Name: "reuse"}})); got != "ok range; ok reuse" {
		t.Errorf("a kernel without: %s", got)
	}
	for text, want := range map[string]int{"1 1": 1, "32768 60999": fewPorts, "5 4": 0, "x 4": 0, "": 0, "1 2 3": 0} {
		if n, ok := portsIn(text); ok != (want > 0) || ok && n != want {
			t.Errorf("%q: %d %v", text, n, ok)
		}
	}
}

func TestReversePathFindings(t *testing.T) {
	c := &config.Config{Uplinks: []config.Uplink{{Interface: "a"}, {Interface: "b.5"}, {Interface: "c"}, {Interface: "d"}}}
	s := netcfg.Sysctls{ReversePath: map[string]int{"a": 0, "b.5": 1, "c": 2}}
	all := examineReversePath(s, c)
	if got, want := levels(t, all), "ok reverse path check of a; warning+ reverse path check of b.5; ok reverse path check of c; note reverse path check of d"; got != want {
		t.Errorf("got %s", got)
	}
	if want := "sysctl -w net/ipv4/conf/b.5/rp_filter=2"; all[1].Remedy != want {
		t.Errorf("remedy %q, want %q", all[1].Remedy, want)
	}
	s.SrcValidMark.Value = "1"
	if got := levels(t, examineReversePath(s, c)); strings.Contains(got, "warning") {
		t.Errorf("with src_valid_mark: %s", got)
	}
}

func TestIPv6Findings(t *testing.T) {
	six := netip.MustParseAddr("2001:db8::1")
	c := func(gateway netip.Addr, nodes ...config.Node) *config.Config {
		return &config.Config{
			Uplinks:  []config.Uplink{{Name: "isp1", Interface: "e0", Gateway6: gateway}, {Name: "isp2", Interface: "e1"}},
			Escapers: []config.Escaper{{Nodes: nodes}},
		}
	}
	wanted := config.Node{IPv6: six, Uplink: "isp1"}
	conf := func(more ...string) map[string]string {
		m := map[string]string{"all/disable_ipv6": "0", "e0/disable_ipv6": "0", "e0/forwarding": "0", "e0/accept_ra": "1", "e1/disable_ipv6": "1"}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		out := map[string]string{}
		for k, v := range m {
			out["net/ipv6/conf/"+k] = v
		}
		return out
	}
	for name, tt := range map[string]struct {
		settings map[string]string
		c        *config.Config
		want     string
	}{
		"well":                    {conf(), c(netip.Addr{}, wanted), "ok IPv6; ok router advertisements of e0"},
		"by an interface":         {conf(), c(netip.Addr{}, config.Node{IPv6: six, Interface: "e1"}), "ok IPv6; warning IPv6 of e1"},
		"nobody wants it":         {conf("e0/disable_ipv6", "1"), c(netip.Addr{}, config.Node{IPv4: six}), "ok IPv6"},
		"off, and nobody cares":   {conf("all/disable_ipv6", "1"), c(netip.Addr{}), "note IPv6"},
		"off":                     {conf("all/disable_ipv6", "1"), c(netip.Addr{}, wanted), "warning IPv6"},
		"none":                    {nil, c(netip.Addr{}, wanted), "warning IPv6"},
		"off on the interface":    {conf("e0/disable_ipv6", "1"), c(netip.Addr{}, wanted), "ok IPv6; warning IPv6 of e0"},
		"forwarding":              {conf("e0/forwarding", "1"), c(netip.Addr{}, wanted), "ok IPv6; warning router advertisements of e0"},
		"forwarding, own gateway": {conf("e0/forwarding", "1"), c(six, wanted), "ok IPv6; note router advertisements of e0"},
		"forwarding, accepted":    {conf("e0/forwarding", "1", "e0/accept_ra", "2"), c(netip.Addr{}, wanted), "ok IPv6; ok router advertisements of e0"},
		"forwarding, unwanted":    {conf("e0/forwarding", "1", "e0/accept_ra", "0"), c(netip.Addr{}, wanted), "ok IPv6; ok router advertisements of e0"},
	} {
		if got := levels(t, examineIPv6(sysDir(t, tt.settings), tt.c)); got != tt.want {
			t.Errorf("%s: got %s", name, got)
		}
	}
}

func TestNATFindings(t *testing.T) {
	const name = "source address translation on the way out"
	for want, nat := range map[string]netcfg.NAT{
		"ok " + name:                         {},
		"warning " + name:                    {Rules: []string{"ip nat post: masquerade"}},
		"warning " + name + "; note " + name: {Rules: []string{"r"}, Unknown: []string{"u"}},
	} {
		if got := levels(t, examineNAT(nat)); got != want {
			t.Errorf("%+v: %s", nat, got)
		}
	}
}

// TestFix: a fix counts when it reads back, and what has none is left.
func TestFix(t *testing.T) {
	value := "2"
	good := &fix{setting: "s", want: "1", lasting: "l", read: func() (string, error) { return value, nil }, write: func() error { value = "1"; return nil }}
	deaf := &fix{setting: "s", want: "1", read: func() (string, error) { return "0", nil }, write: func() error { return nil }}
	barred := &fix{setting: "s", want: "1", read: func() (string, error) { return "0", nil }, write: func() error { return unix.EACCES }}
	blind := &fix{setting: "s", want: "1", read: func() (string, error) { return "", unix.ENOENT }, write: func() error { t.Error("written blindly"); return nil }}
	got := treat([]finding{
		{Name: "fine", Level: levelOK},
		{Name: "good", Level: levelWarning, fix: good},
		{Name: "deaf", Level: levelWarning, Remedy: "r", fix: deaf},
		{Name: "barred", Level: levelWarning, fix: barred},
		{Name: "blind", Level: levelWarning, fix: blind},
		{Name: "note", Level: levelNote, Remedy: "r"},
		{Name: "rule", Level: levelBlocker, Remedy: "r"},
		{Name: "nat", Level: levelWarning, Remedy: "r"},
	})
	if want := (fixed{"good", "s", "2", "1", "l"}); len(got.Fixed) != 1 || got.Fixed[0] != want {
		t.Errorf("fixed %+v", got.Fixed)
	}
	var failed, left []string
	for _, x := range got.Failed {
		failed = append(failed, x.Name+": "+x.Error)
	}
	for _, x := range got.Left {
		left = append(left, x.Name)
	}
	if want := []string{`deaf: s was set to "1" and reads "0"`, "barred: set s: permission denied", "blind: read s: no such file or directory"}; !slices.Equal(failed, want) {
		t.Errorf("failed %q", failed)
	}
	if want := []string{"rule", "nat"}; !slices.Equal(left, want) {
		t.Errorf("left %q", left)
	}
	d := diagnosis{treatment: &treatment{}}
	if d.judge(); !d.OK {
		t.Error("nothing was wrong")
	}
	d.treatment = &got
	if d.judge(); d.OK {
		t.Error("a fix failed")
	}
	d = diagnosis{Findings: []finding{{Level: levelWarning}, {Level: levelBlocker}}}
	if d.judge(); d.OK {
		t.Error("there is a blocker")
	}
}

func TestUnit(t *testing.T) {
	c := &config.Config{Accounting: true, DrainTimeout: 30 * time.Second}
	shipped, err := os.ReadFile("../../scripts/wayout.service")
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		unit string
		want string // the finding without its level; more with |
	}{
		"as shipped":     {string(shipped), ""},
		"bare":           {"[Service]\nDelegate=yes\n", ""},
		"no delegation":  {"[Service]\n", "warning Delegate is off"},
		"delegation off": {"[Service]\nDelegate=no\n", "warning Delegate is off"},
		"delegated":      {"[Service]\nDelegate=cpu memory\n", ""},
		"few files":      {"[Service]\nDelegate=yes\nLimitNOFILE=1024:4096\n", "warning LimitNOFILE=1024:4096"},
		"enough files":   {"[Service]\nDelegate=yes\nLimitNOFILE=1024:infinity\n", ""},
		"odd files":      {"[Service]\nDelegate=yes\nLimitNOFILE=many\n", "warning LimitNOFILE=many"},
		"few tasks":      {"[Service]\nDelegate=yes\nTasksMax=10\n", "warning TasksMax=10"},
		"stopped early":  {"[Service]\nDelegate=yes\nTimeoutStopSec=10\n", "warning it is killed 10s after SIGTERM, and drain_timeout is 30s"},
		"stopped never":  {"[Service]\nDelegate=yes\nTimeoutStopSec=infinity\n", ""},
		"no rights":      {"[Service]\nDelegate=yes\nCapabilityBoundingSet=CAP_NET_RAW\n", "blocker the daemon lacks CAP_NET_ADMIN|blocker the daemon lacks CAP_BPF"},
		"rights taken":   {"[Service]\nDelegate=yes\nCapabilityBoundingSet=~CAP_NET_ADMIN CAP_SYS_TIME\n", "blocker the daemon lacks CAP_NET_ADMIN"},
		"others taken":   {"[Service]\nDelegate=yes\nCapabilityBoundingSet=~CAP_SYS_TIME\n", ""},
		"another user":   {"[Service]\nDelegate=yes\nUser=wayout\n", "blocker the daemon lacks CAP_NET_ADMIN|blocker the daemon lacks CAP_BPF"},
		"with rights":    {"[Service]\nDelegate=yes\nUser=wayout\nAmbientCapabilities=CAP_NET_ADMIN\nAmbientCapabilities=CAP_BPF\n", ""},
		"closed up": {
			"[Service]\nDelegate=yes\nProtectControlGroups=true\nProtectKernelTunables=1\nPrivateNetwork=on\nRestrictAddressFamilies=AF_INET AF_INET6\n",
			"blocker ProtectControlGroups=true|warning ProtectKernelTunables=1|blocker PrivateNetwork=on|blocker RestrictAddressFamilies= is without AF_NETLINK",
		},
		"taken back":      {"[Service]\nDelegate=yes\nPrivateNetwork=yes\nPrivateNetwork=\n", ""},
		"another section": {"[Unit]\nPrivateNetwork=yes\n[Service]\nDelegate=yes\n[Install]\nUser=x\n", ""},
		"continued":       {"[Service]\nDelegate=\\\n# why\n yes\nRestrictAddressFamilies=AF_UNIX AF_INET \\\n  AF_INET6 AF_NETLINK\n;PrivateNetwork=yes\n", ""},
	} {
		u := unit{}
		u.parse(tt.unit)
		var got []string
		for _, x := range u.examine(c) {
			levels(t, []finding{x})
			got = append(got, x.Level+" "+x.Found)
		}
		if s := strings.Join(got, "|"); s != tt.want {
			t.Errorf("%s: got %s, want %s", name, s, tt.want)
		}
	}
	// Without accounting nothing of eBPF is missed.
	u := unit{}
	u.parse("[Service]\nCapabilityBoundingSet=CAP_NET_ADMIN\nProtectControlGroups=yes\n")
	if got := u.examine(&config.Config{}); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

func TestUnitFiles(t *testing.T) {
	root := t.TempDir()
	put := func(file, text string) {
		t.Helper()
		file = filepath.Join(root, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	c := &config.Config{}
	look := func() string {
		t.Helper()
		all, err := examineUnit(root, c)
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, x := range all {
			found = append(found, x.Level+" "+x.Found)
		}
		return strings.Join(found, "|")
	}
	if got := look(); got != "" {
		t.Errorf("without a unit: %q", got)
	}
	put("etc/systemd/system/wayout.service.d/10-a.conf", "[Service]\nPrivateNetwork=yes\n")
	if got := look(); got != "" {
		t.Errorf("a drop-in alone is no unit: %q", got)
	}
	put("usr/lib/systemd/system/wayout.service", "[Service]\nTasksMax=1\n")
	if got := look(); got != "warning TasksMax=1|blocker PrivateNetwork=yes" {
		t.Errorf("with a drop-in: %q", got)
	}
	put("usr/lib/systemd/system/wayout.service.d/10-a.conf", "[Service]\nTasksMax=2\n") // hidden by the one in etc
	put("usr/lib/systemd/system/wayout.service.d/20-b.conf", "[Service]\nTasksMax=3\nPrivateNetwork=no\n")
	if got := look(); got != "warning TasksMax=3" {
		t.Errorf("with two: %q", got)
	}
	put("etc/systemd/system/wayout.service", "[Service]\n")
	put("usr/lib/systemd/system/wayout.service.d/20-b.conf", "[Service]\nPrivateNetwork=no\n")
	if got, want := look(), "ok "+filepath.Join(root, "etc/systemd/system/wayout.service"); got != want {
		t.Errorf("with a stronger one: %q", got)
	}
}

func TestSpan(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"40": 40 * time.Second, "40s": 40 * time.Second, "1min 30s": 90 * time.Second, "2 h": 2 * time.Hour, "500ms": 500 * time.Millisecond, "0": 0,
		"1m5": 65 * time.Second, "infinity": -1, "": -1, "4 parsecs": -1, "-3": -1, "99999999999": -1,
	} {
		if d, ok := span(text); ok != (want >= 0) || ok && d != want {
			t.Errorf("%q: %v %v", text, d, ok)
		}
	}
}

func FuzzUnit(f *testing.F) {
	f.Add("[Service]\nDelegate=yes\nTimeoutStopSec=1min 30s\nLimitNOFILE=1:2\nCapabilityBoundingSet=~CAP_BPF\n")
	f.Add("[Service]\nA=\\\n\\\n#\n b\n[x\n=\n")
	f.Add("[Service]\nTimeoutStopSec=9223372036h\nTasksMax=-1\nRestrictAddressFamilies=~\n")
	f.Fuzz(func(t *testing.T, text string) {
		u := unit{}
		u.parse(text)
		for key, values := range u {
			if strings.Contains(key, "\n") || slices.Contains(values, "") {
				t.Errorf("%q: %q", key, values)
			}
		}
		for _, x := range u.examine(&config.Config{Accounting: true, DrainTimeout: time.Minute}) {
			if x.Level == levelOK || x.Means == "" {
				t.Errorf("%+v", x)
			}
		}
		if d, ok := span(text); ok && d < 0 {
			t.Errorf("%q: %v", text, d)
		}
	})
}

func FuzzRelease(f *testing.F) {
	f.Add("6.18.44-fc")
	f.Add("5")
	f.Fuzz(func(t *testing.T, release string) {
		if major, minor, ok := parseRelease(release); ok && (major < 0 || minor < 0) {
			t.Errorf("%d.%d", major, minor)
		}
		if x := examineRelease(release); x.Level == levelBlocker {
			t.Errorf("%+v", x)
		}
	})
}
