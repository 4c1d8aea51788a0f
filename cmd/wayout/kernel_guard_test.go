package main_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// dialEnv makes this program, run again by a test, a process that goes into a
// cgroup and dials: "CGROUP NETWORK ADDRESS".
const dialEnv = "WAYOUT_TEST_DIAL"

// dialFromCgroup prints the error number of the dial, 0 for none.
func dialFromCgroup(what string) int {
	f := strings.Fields(what)
	err := os.WriteFile(filepath.Join(f[0], "cgroup.procs"), []byte("0"), 0)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	conn, err := net.DialTimeout(f[1], f[2], 5*time.Second)
	var errno syscall.Errno
	if err != nil && !errors.As(err, &errno) {
		fmt.Println(err)
		return 1
	}
	if err == nil {
		conn.Close()
	}
	fmt.Print(int(errno))
	return 0
}

// leaf is the directory of the daemon's cgroup.
func (k *kernelScene) leaf() string {
	k.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", k.daemon.PID()))
	if err != nil {
		k.t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(l), "0::"); ok {
			return filepath.Join(mountOf(k.t, "cgroup2"), path)
		}
	}
	k.t.Fatalf("no cgroup v2 in %s", text)
	return ""
}

func mountOf(t *testing.T, fs string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		if f := strings.Fields(l); f[2] == fs {
			return f[1]
		}
	}
	t.Fatalf("no %s is mounted", fs)
	return ""
}

// pin is a link to a program, as it is pinned.
type pin struct {
	link    link.ID
	program uint32
}

// pins lists the links below bpffs that are attached to a cgroup, by name, and
// the directory that they are in.
func (k *kernelScene) pins(cgroup string) (dir string, pins map[string]pin) {
	k.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(cgroup, &st); err != nil {
		k.t.Fatal(err)
	}
	pins = map[string]pin{}
	// Other tests' pins come and go meanwhile.
	_ = filepath.WalkDir(filepath.Join(mountOf(k.t, "bpf"), "wayout"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // it has gone
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return nil //nolint:nilerr // a map, or gone
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return nil //nolint:nilerr // not of a kind that tells
		}
		if c := info.Cgroup(); c != nil && c.CgroupId == st.Ino {
			dir = filepath.Dir(path)
			pins[filepath.Base(path)] = pin{info.ID, uint32(info.Program)}
		}
		return nil
	})
	return dir, pins
}

// gone fails the test when a daemon has left its cgroup or pins of its name.
func (k *kernelScene) gone(leaf string) {
	k.t.Helper()
	if _, err := os.Stat(leaf); !errors.Is(err, fs.ErrNotExist) {
		k.t.Errorf("cgroup %s is still there: %v", leaf, err)
	}
	dir := filepath.Join(mountOf(k.t, "bpf"), "wayout", filepath.Base(leaf))
	if left, err := os.ReadDir(dir); !errors.Is(err, fs.ErrNotExist) {
		k.t.Errorf("pins are still in %s: %v, %v", dir, left, err)
	}
}

// dialIn dials from a process that goes into a cgroup of the host.
func (k *kernelScene) dialIn(cgroup, network, address string) syscall.Errno {
	k.t.Helper()
	var out, errs strings.Builder
	cmd, err := k.Host.Start(lab.Program{
		Path: "/proc/self/exe", Env: append(os.Environ(), dialEnv+"="+strings.Join([]string{cgroup, network, address}, " ")),
		Stdout: &out, Stderr: &errs,
	})
	if err != nil {
		k.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		k.t.Fatalf("%v: %s%s", err, &out, &errs)
	}
	n, err := strconv.Atoi(out.String())
	if err != nil {
		k.t.Fatalf("%q: %s", &out, &errs)
	}
	return syscall.Errno(n)
}

// TestGuardOutlivesDaemon kills the daemon: what it pinned holds, the next one
// takes it over without a gap, and it goes with SIGTERM or clean.
func TestGuardOutlivesDaemon(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.start(uplinkConfig(""))
	leaf := k.leaf()
	if text, err := os.ReadFile(leaf + "/cgroup.procs"); err != nil || strings.TrimSpace(string(text)) != strconv.Itoa(k.daemon.PID()) {
		t.Errorf("the daemon is not alone in %s: %q, %v", leaf, text, err)
	}
	if filepath.Dir(leaf) != filepath.Clean(mountOf(t, "cgroup2")+ownCgroup(t)) {
		t.Errorf("%s is not below the cgroup that the daemon was started in", leaf)
	}
	dir, pins := k.pins(leaf)
	for _, name := range []string{"egress", "ingress", "connect4", "connect6", "sendmsg4", "sendmsg6", "sockops"} {
		if _, ok := pins[name]; !ok {
			t.Errorf("%s is not pinned in %q: %v", name, dir, pins)
		}
	}
	// Another process has no place in there, least of all without a mark.
	k.refusedIn(leaf, "while the daemon runs")

	if err := k.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, left := k.pins(leaf); fmt.Sprint(left) != fmt.Sprint(pins) {
		t.Errorf("after kill -9 there are %v, were %v", left, pins)
	}
	k.refusedIn(leaf, "after kill -9")

	k.run(lab.Program{})
	if again := k.leaf(); again != leaf {
		t.Errorf("the next start is in %s, not in %s", again, leaf)
	}
	_, adopted := k.pins(leaf)
	for name, p := range pins {
		if adopted[name].link != p.link || adopted[name].program == p.program {
			t.Errorf("%s: the next start has %v of %v: not the same link with a program of its own", name, adopted[name], p)
		}
	}
	k.refusedIn(leaf, "after the next start")
	k.works("after the next start", uplinkNodes()...)
	k.stop()
	k.gone(leaf)

	k.run(lab.Program{})
	if err := k.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	k.wayout("clean")
	k.gone(leaf)
}

func ownCgroup(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(l), "0::"); ok {
			return path
		}
	}
	return ""
}

// refusedIn dials without a mark from the daemon's cgroup, and from outside of
// it.
func (k *kernelScene) refusedIn(leaf, when string) {
	k.t.Helper()
	for network, target := range map[string]string{"tcp4": target4, "tcp6": target6} {
		if errno := k.dialIn(leaf, network, target); errno != unix.EPERM {
			k.t.Errorf("%s: an unmarked dial to %s from %s: %v, want EPERM", when, target, leaf, errno)
		}
		if errno := k.dialIn(filepath.Dir(leaf), network, target); errno != 0 {
			k.t.Errorf("%s: a dial to %s from outside: %v", when, target, errno)
		}
	}
}

// TestWrongDial has the daemon dial with a path's mark and another's source:
// the kernel refuses, counts it, and nothing reaches the wire.
func TestWrongDial(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.start("metrics: {listen: \"" + lab.HostAddr4 + ":9180\"}\n" + uplinkConfig(""))
	far := []*lab.Capture{k.capture(k.ISP1, "host0"), k.capture(k.ISP2, "host0")}
	const port = 4242
	drops := func(path string) uint64 { return k.paths()[path].GuardDrops }
	for _, c := range []struct{ path, target string }{
		{"out/p1", lab.OriginAddr4}, {"out/p6", lab.OriginAddr4}, {"out/p2", lab.OriginAddr6}, {"out/p8", lab.OriginAddr6},
	} {
		before := drops(c.path)
		out, errs, code := k.command("doctor", "--config", k.config, "--prove-guard", c.path, net.JoinHostPort(c.target, strconv.Itoa(port)))
		if code != 0 || !strings.Contains(out, "refused") {
			t.Errorf("%s to %s: exit %d: %s%s", c.path, c.target, code, out, errs)
		}
		if after := drops(c.path); after <= before {
			t.Errorf("%s: guard drops were %d, are %d", c.path, before, after)
		}
	}
	nodes := uplinkNodes()
	k.works("beside it", nodes[0], nodes[5])
	for i, f := range far {
		for _, p := range settled(t, f) {
			if p.Dst.Port() == port || p.Src.Port() == port {
				t.Errorf("isp%d has seen %s", i+1, p)
			}
		}
	}
	text := k.get(netip.MustParseAddrPort(lab.HostAddr4+":9180"), "/metrics")
	for _, id := range []string{"p1", "p6", "p2", "p8"} {
		var v float64
		for l := range strings.Lines(text) {
			if strings.HasPrefix(l, "wayout_path_guard_drops_total{") && strings.Contains(l, `escaper="out"`) && strings.Contains(l, `path="`+id+`"`) {
				v, _ = strconv.ParseFloat(strings.Fields(l)[1], 64)
			}
		}
		if v < 1 {
			t.Errorf("wayout_path_guard_drops_total of %s is %v", id, v)
		}
	}
	if !strings.Contains(text, `wayout_path_guard_drops_total{escaper="",path=""} 0`) {
		t.Error("unmarked packets were dropped, or are not told")
	}
	if _, errs, code := k.command("doctor", "--config", k.config, "--prove-guard", "out/p77", target4); code != 1 || !strings.Contains(errs, "p77") {
		t.Errorf("an unknown path: exit %d %q", code, errs)
	}
}

// TestAccountingOff runs without eBPF, and says so.
func TestAccountingOff(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.start("accounting: off\nmetrics: {listen: \"" + lab.HostAddr4 + ":9180\"}\n" + uplinkConfig(""))
	if !strings.Contains(k.daemon.Log(), "accounting is off") {
		t.Error("nothing is said")
	}
	own := filepath.Join(mountOf(t, "cgroup2"), ownCgroup(t))
	if leaf := k.leaf(); leaf != own {
		t.Errorf("the daemon is in %s, was started in %s", leaf, own)
	}
	nodes := uplinkNodes()
	k.works("without accounting", nodes[0], nodes[7])
	if p := k.paths()["out/p1"]; p.Bytes.In != 0 || p.Packets.Out != 0 || p.Connections.Made == 0 {
		t.Errorf("%+v", p)
	}
	// What is not counted is not told as a count of zero.
	if text := k.get(netip.MustParseAddrPort(lab.HostAddr4+":9180"), "/metrics"); strings.Contains(text, "\nwayout_path_bytes_total{") {
		t.Error("the metrics have a number of bytes")
	}
	if _, errs, code := k.command("doctor", "--config", k.config, "--prove-guard", "out/p1", target4); code != 1 || !strings.Contains(errs, "accounting") {
		t.Errorf("the guard is proved: exit %d %q", code, errs)
	}
}

// get reads a resource by HTTP from the client's namespace.
func (k *kernelScene) get(at netip.AddrPort, path string) string {
	k.t.Helper()
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return k.Client.Dial(at) }}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get("http://" + at.String() + path)
	if err != nil {
		k.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		k.t.Fatalf("%s: %s %v", path, resp.Status, err)
	}
	return string(text)
}
