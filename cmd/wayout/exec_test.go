package main_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// buildDialler builds the program that knows nothing of paths, once, static.
var buildDialler = sync.OnceValues(func() (string, error) {
	at := filepath.Join(filepath.Dir(binary), "dialler")
	cmd := exec.Command("go", "build", "-o", at, "./testdata/dialler")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the dialler: %w\n%s", err, out)
	}
	return at, nil
})

// Where the origin says to each who it is.
const (
	whoPort = "4000"
	who4    = lab.OriginAddr4 + ":" + whoPort
	who6    = "[" + lab.OriginAddr6 + "]:" + whoPort
	who4in6 = "[::ffff:" + lab.OriginAddr4 + "]:" + whoPort
)

// pinScene is a kernel scene with an origin that tells each client who it is.
type pinScene struct {
	*kernelScene
	dialler string
}

func newPinScene(t *testing.T) *pinScene {
	t.Helper()
	k := newKernelScene(t)
	d, err := buildDialler()
	if err != nil {
		t.Fatal(err)
	}
	p := &pinScene{k, d}
	for _, at := range []string{who4, who6} {
		p.who(k.Origin, at)
	}
	return p
}

// who serves TCP and UDP: the answer to a line is the address that it came from.
func (p *pinScene) who(n *lab.NS, at string) {
	p.t.Helper()
	l, err := n.Listen(netip.MustParseAddrPort(at))
	if err != nil {
		p.t.Fatal(err)
	}
	var u net.PacketConn
	if err := n.Do(func() error {
		u, err = net.ListenPacket("udp", at)
		return err
	}); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { l.Close(); u.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				in := bufio.NewScanner(c)
				for in.Scan() {
					fmt.Fprintln(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
				}
			}()
		}
	}()
	go func() {
		b := make([]byte, 512)
		for {
			_, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo([]byte(from.(*net.UDPAddr).AddrPort().Addr().Unmap().String()+"\n"), from)
		}
	}()
}

// exec runs a command by a path, and gives what it printed.
func (p *pinScene) exec(path string, argv ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	return p.command(append([]string{"exec", "--config", p.config, "--path", path, "--"}, argv...)...)
}

// dial runs the dialler by a path, and gives its lines.
func (p *pinScene) dial(path string, argv ...string) []string {
	p.t.Helper()
	out, errs, code := p.exec(path, append([]string{p.dialler}, argv...)...)
	if code != 0 {
		p.t.Errorf("exec --path %s %v: exit %d: %s%s", path, argv, code, out, errs)
	}
	return strings.Fields(out)
}

// running is an exec that goes on.
type running struct {
	p     *pinScene
	cmd   *exec.Cmd
	stdin io.Closer

	mu   sync.Mutex
	out  []string
	errs strings.Builder
}

func (p *pinScene) begin(args ...string) *running {
	p.t.Helper()
	return p.run1(lab.Program{Path: binary, Args: append([]string{"exec", "--config", p.config}, args...)})
}

// run1 starts a program on the host.
func (p *pinScene) run1(program lab.Program) *running {
	p.t.Helper()
	in, feed, err := os.Pipe()
	if err != nil {
		p.t.Fatal(err)
	}
	defer in.Close()
	r, w := io.Pipe()
	x := &running{p: p, stdin: feed}
	program.Stdin, program.Stdout, program.Stderr = in, w, &x.errs
	x.cmd, err = p.Host.Start(program)
	if err != nil {
		p.t.Fatal(err)
	}
	go func() {
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			x.mu.Lock()
			x.out = append(x.out, lines.Text())
			x.mu.Unlock()
		}
	}()
	p.t.Cleanup(func() {
		feed.Close()
		_ = x.cmd.Process.Kill()
	})
	return x
}

func (x *running) lines() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.out)
}

// more waits for lines that were not there.
func (x *running) more(what string) {
	x.p.t.Helper()
	n := len(x.lines())
	eventually(x.p.t, what, func() bool { return len(x.lines()) > n+6 })
}

// cgroup is where its command is.
func (x *running) cgroup() string {
	x.p.t.Helper()
	var found string
	eventually(x.p.t, "exec has a cgroup", func() bool {
		all, err := filepath.Glob(filepath.Join(mountOf(x.p.t, "cgroup2"), ownCgroup(x.p.t), "wayout-exec-*"))
		if err != nil {
			x.p.t.Fatal(err)
		}
		for _, dir := range all {
			text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				continue
			}
			for pid := range strings.FieldsSeq(string(text)) {
				stat, err := os.ReadFile("/proc/" + pid + "/stat")
				if f := strings.Fields(string(stat)); err == nil && len(f) > 3 && f[3] == strconv.Itoa(x.cmd.Process.Pid) {
					found = dir
				}
			}
		}
		return found != ""
	})
	return found
}

// wait ends it by the end of its input.
func (x *running) wait() int {
	x.p.t.Helper()
	x.stdin.Close()
	state, err := x.cmd.Process.Wait()
	if err != nil {
		x.p.t.Fatal(err)
	}
	return state.ExitCode()
}

// nothingLeft fails when an exec has left a cgroup or pins.
func (p *pinScene) nothingLeft() {
	p.t.Helper()
	if out, errs, code := p.command("pin", "--config", p.config, "--json"); code == 0 && strings.Contains(out, control.ByExec) {
		p.t.Errorf("pins are left: %s%s", out, errs)
	}
	err := filepath.WalkDir(filepath.Join(mountOf(p.t, "bpf"), "wayout", p.instance()+"-pins"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), "wayout-exec-") {
			p.t.Errorf("%s is left", path)
		}
		return nil
	})
	if err != nil {
		p.t.Error(err)
	}
}

// instance is the name of the daemon's cgroup.
func (p *pinScene) instance() string { return filepath.Base(p.leaf()) }

// carriedOnly is carried, of packets that came from the host.
func (p *pinScene) carriedOnly(isp string, c *lab.Capture, allowed ...netip.Addr) {
	p.t.Helper()
	for _, pkt := range settled(p.t, c) {
		if (pkt.Proto == unix.IPPROTO_TCP || pkt.Proto == unix.IPPROTO_UDP) && !pkt.Out && !slices.Contains(allowed, pkt.Src.Addr()) {
			p.t.Errorf("%s has seen %s", isp, pkt)
		}
	}
}

// TestExecLeavesByThePath runs programs of several kinds, on several paths at
// once, in all the ways that they have to send.
func TestExecLeavesByThePath(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	nodes := uplinkNodes()
	var all sync.WaitGroup
	for _, n := range []uplinkNode{nodes[1], nodes[2], nodes[5]} {
		all.Go(func() {
			got := p.dial("out/"+n.id, "tcp", who4, "tcp", who6, "tcp", who4in6, "udp", who4, "udp", who6, "udp", who4in6, "conn", who4, "conn", who6, "conn", who4in6)
			v4, v6 := n.v4.String(), n.v6.String()
			if want := []string{v4, v6, v4, v4, v6, v4, v4, v6, v4}; !slices.Equal(got, want) {
				t.Errorf("by %s the origin saw %v, want %v", n.id, got, want)
			}
		})
	}
	all.Wait()
	for _, n := range []uplinkNode{nodes[1], nodes[5]} {
		p.curl(n)
		p.python(n)
		// A shell's children.
		out, errs, code := p.exec("out/"+n.id, "sh", "-c", p.dialler+" tcp "+who4+" & "+p.dialler+" udp "+who6+"; wait")
		got := strings.Fields(out)
		slices.Sort(got)
		want := []string{n.v4.String(), n.v6.String()}
		slices.Sort(want)
		if code != 0 || !slices.Equal(got, want) {
			t.Errorf("children: exit %d: %q %q", code, out, errs)
		}
	}
	eventually(t, "the path has counted", func() bool {
		s := p.paths()["out/p2"]
		return s.Bytes.Out > 0 && s.Bytes.In > 0 && s.Packets.Out > 0 && s.Connections.Made >= 6 && s.RTT.P50 > 0
	})
	if s := p.paths()["out/p3"]; s.Connections.Made != 3 || s.GuardDrops != 0 || s.Packets.In == 0 {
		t.Errorf("p3 has counted %+v", s)
	}
	if s := p.paths()["out/p4"]; s.Connections.Made != 0 || s.Packets.Out != 0 {
		t.Errorf("a path that nobody took has counted %+v", s)
	}
	p.carriedOnly("isp1", far[0], nodes[1].v4, nodes[1].v6, nodes[2].v4, nodes[2].v6)
	p.carriedOnly("isp2", far[1], nodes[5].v4, nodes[5].v6)
	p.nothingLeft()
}

func (p *pinScene) curl(n uplinkNode) {
	p.t.Helper()
	curl, err := exec.LookPath("curl")
	if err != nil {
		lab.Missing(p.t, "curl")
	}
	for _, target := range []string{target4, target6} {
		out, errs, code := p.exec("out/"+n.id, curl, "-sS", "--max-time", "20", "http://"+target+"/")
		if code != 0 || !strings.Contains(out, `"source":"`+n.source(target).String()+`"`) {
			p.t.Errorf("curl to %s by %s: exit %d: %s%s", target, n.id, code, out, errs)
		}
	}
	// Another of the host's addresses.
	out, errs, code := p.exec("out/"+n.id, curl, "-sS", "--max-time", "20", "--interface", lab.Primary1Of4, "http://"+target4+"/")
	if code == 0 {
		p.t.Errorf("curl from a foreign address: %s%s", out, errs)
	}
}

const pythonAsks = `
import errno, socket, sys
v4, v6 = sys.argv[1], sys.argv[2]
def ask(family, kind, to, bind=None, connect=True):
    s = socket.socket(family, kind)
    s.settimeout(20)
    try:
        if bind: s.bind(bind)
        if connect:
            s.connect(to)
            s.send(b"who\n")
        else:
            s.sendto(b"who\n", to)
        print(s.recv(512).decode().strip())
    except OSError as e:
        print(errno.errorcode.get(e.errno, e))
U, S = socket.SOCK_DGRAM, socket.SOCK_STREAM
ask(socket.AF_INET, S, (v4, 4000))
ask(socket.AF_INET6, S, (v6, 4000))
ask(socket.AF_INET, U, (v4, 4000), connect=False)
ask(socket.AF_INET6, U, (v6, 4000), connect=False)
ask(socket.AF_INET, U, (v4, 4000))
ask(socket.AF_INET6, U, ("::ffff:" + v4, 4000))
ask(socket.AF_INET, U, (v4, 4000), bind=("", 0), connect=False)
ask(socket.AF_INET, S, (v4, 4000), bind=("198.51.100.2", 0))
ask(socket.AF_INET6, U, (v6, 4000), bind=("2001:db8:100::2", 0))
`

func (p *pinScene) python(n uplinkNode) {
	p.t.Helper()
	python, err := exec.LookPath("python3")
	if err != nil {
		lab.Missing(p.t, "python3")
	}
	out, errs, code := p.exec("out/"+n.id, python, "-c", pythonAsks, lab.OriginAddr4, lab.OriginAddr6)
	v4, v6 := n.v4.String(), n.v6.String()
	if want := []string{v4, v6, v4, v6, v4, v4, v4, "EPERM", "EPERM"}; code != 0 || !slices.Equal(strings.Fields(out), want) {
		p.t.Errorf("python by %s: exit %d: %q %s, want %v", n.id, code, out, errs, want)
	}
}

// oneFamily is a configuration with paths of one family alone.
func oneFamily() string {
	return uplinkConfig("      - {id: four, ipv4: 198.51.100.21, uplink: isp1}\n      - {id: six, ipv6: \"2001:db8:200::21\", uplink: isp2}\n")
}

// TestExecRefuses has the errors of a process that asks for what its path is not,
// and loopback as it is without a pin.
func TestExecRefuses(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(oneFamily())
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	for _, at := range []string{"127.0.0.1:" + whoPort, "[::1]:" + whoPort} {
		p.who(p.Host, at)
	}
	no, foreign := strconv.Itoa(int(unix.EADDRNOTAVAIL)), strconv.Itoa(int(unix.EPERM))
	for _, c := range []struct {
		path string
		argv []string
		want []string
	}{
		{"four", []string{"tcp", who6, "udp", who6, "conn", who6, "tcp", who4, "udp", who4in6}, []string{no, no, no, "198.51.100.21", "198.51.100.21"}},
		{"six", []string{"tcp", who4, "udp", who4, "conn", who4, "tcp", who4in6, "tcp", who6}, []string{no, no, no, no, "2001:db8:200::21"}},
		{"p1", []string{"bind", lab.Primary1Of4, "tcp", who4, "udp", who4, "conn", who4}, []string{foreign, foreign, foreign}},
		{"p1", []string{"bind", lab.Egress6()[1].String(), "tcp", who6, "udp", who6, "conn", who6}, []string{foreign, foreign, foreign}},
		{"p1", []string{"bind", lab.Egress4()[0].String(), "tcp", who4, "udp", who4}, []string{lab.Egress4()[0].String(), lab.Egress4()[0].String()}},
		{"p1", []string{"tcp", "127.0.0.1:" + whoPort, "udp", "127.0.0.1:" + whoPort, "conn", "127.0.0.1:" + whoPort}, []string{"127.0.0.1", "127.0.0.1", "127.0.0.1"}},
		{"p1", []string{"tcp", "[::1]:" + whoPort, "udp", "[::1]:" + whoPort, "conn", "[::1]:" + whoPort}, []string{"::1", "::1", "::1"}},
		{"six", []string{"tcp", "127.0.0.1:" + whoPort, "tcp", "[::ffff:127.0.0.1]:" + whoPort}, []string{"127.0.0.1", "127.0.0.1"}},
	} {
		if got := p.dial("out/"+c.path, c.argv...); !slices.Equal(got, c.want) {
			t.Errorf("by %s %v: %v, want %v", c.path, c.argv, got, c.want)
		}
	}
	if s := p.paths()["out/p1"]; s.GuardDrops < 6 || s.Connections.Made != 1 {
		t.Errorf("p1 has counted %+v", s)
	}
	allowed := []netip.Addr{lab.Egress4()[0], netip.MustParseAddr("198.51.100.21"), netip.MustParseAddr("2001:db8:200::21")}
	p.carriedOnly("isp1", far[0], allowed...)
	p.carriedOnly("isp2", far[1], allowed...)
	p.nothingLeft()
}

// TestExecExitCodes are those of section 5 of the contract: the command's, a
// shell's, and 125.
func TestExecExitCodes(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	plain := filepath.Join(p.dir, "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	noInterpreter := filepath.Join(p.dir, "script")
	if err := os.WriteFile(noInterpreter, []byte("#!/none/such\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := p.command("drain", "out/p8", "--config", p.config); code != 0 {
		t.Fatal(errs)
	}
	for _, c := range []struct {
		code  int
		says  string
		args  []string
		plain bool // args are all
	}{
		{0, "", []string{"--path", "out/p1", "--", "true"}, false},
		{3, "", []string{"--path", "out/p1", "--", "sh", "-c", "exit 3"}, false},
		{2, "", []string{"--path", "out/p1", "sh", "-c", "exit 2"}, false},
		{137, "", []string{"--path", "out/p1", "--", "sh", "-c", "kill -9 $$"}, false},
		{127, "not found", []string{"--path", "out/p1", "--", "no-such-command"}, false},
		{127, "not found", []string{"--path", "out/p1", "--", "/no/such/command"}, false},
		{127, "no such file", []string{"--path", "out/p1", "--", noInterpreter}, false},
		{126, "permission denied", []string{"--path", "out/p1", "--", plain}, false},
		{126, "", []string{"--path", "out/p1", "--", p.dir}, false},
		{125, "no such path", []string{"--path", "out/none", "--", "true"}, false},
		{125, "draining", []string{"--path", "out/p8", "--", "true"}, false},
		{125, "usage", []string{"--", "true"}, false},
		{125, "usage", []string{"--path", "out/p1"}, false},
		{125, "nonsense", []string{"--nonsense"}, false},
		{125, "does not answer", []string{"exec", "--control", "/no/such/socket", "--path", "out/p1", "true"}, true},
		{125, "dns-server", []string{"--path", "out/p1", "--dns-server", "192.0.2.1", "--", "true"}, false},
		{125, "not this host's own", []string{"--path", "out/p1", "--dns", "--dns-server", "127.0.0.1", "--", "true"}, false},
	} {
		args := append([]string{"exec", "--config", p.config}, c.args...)
		if c.plain {
			args = c.args
		}
		out, errs, code := p.command(args...)
		if code != c.code || !strings.Contains(errs, c.says) || c.says == "" && code != 126 && errs != "" {
			t.Errorf("%v: exit %d, want %d: %q %q", c.args, code, c.code, out, errs)
		}
	}
	p.nothingLeft()
}

// TestExecPassesSignals on, and ends what outlives the command.
func TestExecPassesSignals(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	for s, want := range map[unix.Signal]int{unix.SIGUSR1: 7, unix.SIGTERM: 128 + 15, unix.SIGHUP: 128 + 1} {
		x := p.begin("--path", "out/p1", "--", p.dialler, "signal")
		eventually(t, "the command runs", func() bool { return len(x.lines()) > 0 })
		if err := x.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if code := x.wait(); code != want {
			t.Errorf("%v: exit %d, want %d: %s", s, code, want, &x.errs)
		}
	}
	out, errs, code := p.exec("out/p1", "sh", "-c", "cat /proc/self/cgroup; sleep 1000 >/dev/null 2>&1 & echo $!")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, errs)
	}
	lines := strings.Fields(out)
	pid, err := strconv.Atoi(lines[len(lines)-1])
	if err != nil {
		t.Fatalf("%q", out)
	}
	// Whoever has it for a child now may not have waited for it.
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("what outlived the command is %s", stat)
	}
	for _, l := range lines {
		if path, ok := strings.CutPrefix(l, "0::"); ok {
			if _, err := os.Stat(filepath.Join(mountOf(t, "cgroup2"), path)); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(path, "wayout-exec-") {
				t.Errorf("the cgroup %s is still there: %v", path, err)
			}
		}
	}
	p.nothingLeft()
}

// TestExecOutlivesDaemon kills the daemon while a command goes on: not a packet
// leaves from elsewhere, the next daemon takes it over without ending its
// connections, and with SIGTERM nothing leaves any more.
func TestExecOutlivesDaemon(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	six := uplinkNodes()[5]
	x := p.begin("--path", "out/p6", "--", p.dialler, "forever", who6, who4)
	held := p.begin("--path", "out/p6", "--", p.dialler, "hold", who4)
	x.more("it talks")
	eventually(t, "it is connected", func() bool { return len(held.lines()) > 0 })
	dir := x.cgroup()
	if err := p.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	x.more("it talks without a daemon")
	p.run(lab.Program{})
	x.more("it talks under the next")
	eventually(t, "the next daemon counts it", func() bool { return p.paths()["out/p6"].Connections.Made > 0 })
	if out, errs, code := p.command("pin", "--config", p.config); code != 0 || !strings.Contains(out, filepath.Base(dir)) {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	if _, errs, code := p.command("reload", "--config", p.config); code != 0 {
		t.Errorf("reload: exit %d: %s", code, errs)
	}
	x.more("it talks after a reload")
	if n := len(held.lines()); n != 1 {
		t.Errorf("the connection that was open has ended: %q", held.lines())
	}
	for _, l := range x.lines() {
		if l != six.v4.String() && l != six.v6.String() {
			t.Errorf("the origin saw %s", l)
		}
	}
	p.carriedOnly("isp1", far[0])
	p.carriedOnly("isp2", far[1], six.v4, six.v6)

	p.stop()
	n := len(far[1].Packets())
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("its cgroup has gone with the daemon: %v", err)
	}
	p.run(lab.Program{})
	x.more("it talks once there is a daemon again")
	p.carriedOnly("isp1", far[0])
	p.carriedOnly("isp2", far[1], six.v4, six.v6)
	if len(far[1].Packets()) <= n {
		t.Error("nothing was captured since")
	}
	if code := x.wait(); code != 0 {
		t.Errorf("exit %d: %s", code, &x.errs)
	}
	held.wait()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its cgroup is still there: %v", err)
	}
	p.nothingLeft()
}

// TestExecKilled leaves the command pinned; the daemon looks after the rest once
// it has ended.
func TestExecKilled(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	far := p.capture(p.ISP2, "host0")
	two := uplinkNodes()[1]
	x := p.begin("--path", "out/p2", "--", p.dialler, "forever", who4, who6)
	x.more("it talks")
	dir := x.cgroup()
	if err := x.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := x.cmd.Process.Wait(); err != nil { // the command still has the output
		t.Fatal(err)
	}
	x.more("it goes on")
	for _, l := range x.lines() {
		if l != two.v4.String() && l != two.v6.String() {
			t.Errorf("the origin saw %s", l)
		}
	}
	x.stdin.Close()
	eventually(t, "the daemon removes what is left", func() bool { _, err := os.Stat(dir); return errors.Is(err, fs.ErrNotExist) })
	p.carriedOnly("isp2", far)
	p.nothingLeft()
}

// TestExecAlone pins without a daemon, once the network is as wished.
func TestExecAlone(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.write(uplinkConfig(""))
	if _, errs, code := p.exec("out/p6", "true"); code != 125 || !strings.Contains(errs, "wayout apply") {
		t.Errorf("before apply: exit %d: %q", code, errs)
	}
	p.wayout("apply")
	six := uplinkNodes()[5]
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	got := p.dial("out/p6", "tcp", who4, "udp", who6, "conn", who4in6, "bind", lab.Primary2Of4, "tcp", who4)
	if want := []string{six.v4.String(), six.v6.String(), six.v4.String(), "1"}; !slices.Equal(got, want) {
		t.Errorf("the origin saw %v, want %v", got, want)
	}
	if _, errs, code := p.exec("out/none", "true"); code != 125 || !strings.Contains(errs, "no such path") {
		t.Errorf("an unknown path: exit %d: %q", code, errs)
	}
	// A daemon that starts takes it over, and clean waits for its end.
	x := p.begin("--path", "out/p6", "--", p.dialler, "forever", who4, who6)
	x.more("it talks")
	if _, errs, code := p.command("clean", "--config", p.config); code != 1 || !strings.Contains(errs, "wayout exec runs processes") {
		t.Errorf("clean: exit %d: %q", code, errs)
	}
	p.run(lab.Program{})
	x.more("it talks under a daemon")
	eventually(t, "the daemon counts it", func() bool { return p.paths()["out/p6"].Connections.Made > 0 })
	for _, l := range x.lines() {
		if l != six.v4.String() && l != six.v6.String() {
			t.Errorf("the origin saw %s", l)
		}
	}
	if code := x.wait(); code != 0 {
		t.Errorf("exit %d: %s", code, &x.errs)
	}
	p.carriedOnly("isp1", far[0])
	p.carriedOnly("isp2", far[1], six.v4, six.v6)
	p.nothingLeft()
	p.stop()
	p.wayout("clean")
}

// TestExecLosesItsAddress has its connections ended with it, and none from
// elsewhere.
func TestExecLosesItsAddress(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(strings.ReplaceAll(uplinkConfig(""), ", manage_addresses: true", ""))
	a := uplinkNodes()[5].v4
	if err := p.Host.AddAddr("eth1", lab.EgressPrefix(a)); err != nil {
		t.Fatal(err)
	}
	p.until("out/p6", func(s control.Path) bool { return s.State == "up" })
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	held := p.begin("--path", "out/p6", "--", p.dialler, "hold", who4)
	eventually(t, "it is connected", func() bool { return len(held.lines()) > 0 })
	x := p.begin("--path", "out/p6", "--", "sh", "-c", "read line; "+p.dialler+" tcp "+who4+" udp "+who4)
	x.cgroup()
	if err := p.Host.DelAddr("eth1", lab.EgressPrefix(a)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its connection is ended", func() bool { l := held.lines(); return len(l) == 2 && l[1] == strconv.Itoa(int(unix.ECONNABORTED)) })
	x.wait()
	no := strconv.Itoa(int(unix.EADDRNOTAVAIL))
	eventually(t, "it has said all", func() bool { return len(x.lines()) == 2 })
	if got := x.lines(); got[0] != no || got[1] == a.String() {
		t.Errorf("without its address: %v", got)
	}
	if _, errs, code := p.exec("out/p6", "true"); code != 125 || !strings.Contains(errs, "is down") {
		t.Errorf("a path that is down: exit %d: %s", code, errs)
	}
	held.wait()
	p.carriedOnly("isp1", far[0])
	p.carriedOnly("isp2", far[1], a)
}
