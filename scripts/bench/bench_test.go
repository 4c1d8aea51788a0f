package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"wayout/scripts/lab"
)

// The parts are processes of their own, of the test's program here.
func TestMain(m *testing.M) {
	if is, err := part(os.Args); is {
		exit(err)
	}
	code := m.Run()
	if built != "" {
		if err := os.RemoveAll(filepath.Dir(built)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// built is the program that is measured, once a test has asked for it.
var built string

func build(t *testing.T) string {
	t.Helper()
	if built != "" {
		return built
	}
	dir, err := os.MkdirTemp("", "bench-test-")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "wayout")
	if out, err := exec.Command("go", "build", "-o", name, "wayout/cmd/wayout").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	built = name
	return name
}

func tiny(t *testing.T) options {
	t.Helper()
	return options{
		wayout: build(t), rounds: 2, peers: []string{"wayout", "direct"}, base: "wayout",
		idle: 60, scale: 0.01, out: filepath.Join(t.TempDir(), "o.json"), log: io.Discard,
	}
}

// results runs and gives what the file and the tables say.
func results(t *testing.T, o options) (got output, tables string) {
	t.Helper()
	var told bytes.Buffer
	if err := run(t.Context(), o, &told); err != nil {
		t.Fatalf("%v\n%s", err, &told)
	}
	text, err := os.ReadFile(o.out)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	return got, told.String()
}

func TestRun(t *testing.T) {
	lab.Require(t)
	o := tiny(t)
	t.Setenv("TMPDIR", t.TempDir())
	o.modes = []string{"connect", "socks5", "http"}
	got, tables := results(t, o)
	if len(got.Samples) != 12 || len(got.Summary) != 6 {
		t.Fatalf("%d samples and %d rows of 2 peers, 3 modes, 2 rounds:\n%+v", len(got.Samples), len(got.Summary), got)
	}
	for _, s := range got.Samples {
		if s.Failed != "" || s.Errors > 0 || s.Ops == 0 || s.Checked < s.Ops || s.Wrong > 0 {
			t.Errorf("%+v", s)
		}
		if cpu := s.CPU > 0; cpu != (s.Peer == "wayout") {
			t.Errorf("CPU of %s is %v", s.Peer, s.CPU)
		}
	}
	for _, want := range []string{"connect: new tunnel", "socks5: new SOCKS5 tunnel", "| wayout", "| direct", "0 of "} {
		if !strings.Contains(tables, want) {
			t.Errorf("no %q in\n%s", want, tables)
		}
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Diverted connections leave by the daemon's addresses, its CPU is counted, and
// the host forwards again when it has ended.
func TestDiverted(t *testing.T) {
	lab.Require(t)
	o := tiny(t)
	o.modes, o.peers = []string{"connect", "http", "down-1", "pingpong"}, []string{"wayout-tproxy", "direct"}
	got, _ := results(t, o)
	if len(got.Samples) != 14 {
		t.Errorf("%d samples of 2 peers, 4 modes of which one has no diverted peer, and 2 rounds", len(got.Samples))
	}
	for _, s := range got.Samples {
		if s.Failed != "" || s.Errors > 0 || s.Ops+s.Bytes == 0 || s.Checked == 0 || s.Wrong > 0 {
			t.Errorf("%+v", s)
		}
		if cpu := s.CPU > 0; cpu != (s.Peer == "wayout-tproxy") {
			t.Errorf("CPU of %s is %v", s.Peer, s.CPU)
		}
	}
}

// Another build stands beside the usual one, and its rate is told as a ratio.
func TestOtherBuild(t *testing.T) {
	lab.Require(t)
	o := tiny(t)
	o.other, o.modes, o.peers, o.rounds = o.wayout, []string{"connect"}, []string{"wayout", "wayout-other"}, 1
	got, _ := results(t, o)
	for _, r := range got.Summary {
		if r.ToBase.N != 1 || r.Faster.N != 1 || (r.Peer == "wayout") != (r.ToBase.Median == 1) || (r.Peer == "wayout") != (r.Faster.Median == 1) {
			t.Errorf("%+v", r)
		}
	}
}

func TestHeldTunnels(t *testing.T) {
	lab.Require(t)
	o := tiny(t)
	o.modes, o.rounds = []string{"idle", "ports"}, 1
	got, tables := results(t, o)
	held := map[string]float64{}
	for _, r := range got.Summary {
		held[r.Peer+" "+r.Mode] = r.Held.Median
	}
	if held["wayout idle"] != 60 || held["wayout ports"] != 750 || len(held) != 2 {
		t.Errorf("%v\n%s", held, tables)
	}
}

// A proxy that leaves by another address than the one asked for must not go
// unseen.
func TestWrongSourceIsAnError(t *testing.T) {
	lab.Require(t)
	o := tiny(t)
	o.modes, o.peers, o.rounds = []string{"connect"}, []string{"wayout"}, 1
	b, err := newBench(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.close(); err != nil {
			t.Error(err)
		}
	}()
	b.proxies[0].header = "X-Nothing: %s" // so that its policy chooses
	s, err := b.measure(t.Context(), b.proxies[0], b.modes[0], viaConnect, nil)
	if err != nil || s.Failed != "" {
		t.Fatal(err, s.Failed)
	}
	if s.Wrong == 0 || !slices.Contains(egressAddrs(), s.WrongAs) {
		t.Errorf("%d of %d wrong, %q", s.Wrong, s.Checked, s.WrongAs)
	}
	b.out.Samples = []sample{s}
	if err := b.verdict(t.Context()); !errors.Is(err, errWrong) {
		t.Errorf("verdict: %v", err)
	}
}

func TestInterruptedRunEnds(t *testing.T) {
	lab.Require(t)
	o := tiny(t)
	o.scale, o.modes, o.out = 1, []string{"pingpong"}, ""
	ctx, stop := context.WithCancel(t.Context())
	o.log = writerFunc(func(p []byte) (int, error) { stop(); return len(p), nil }) // after the first sample
	if err := run(ctx, o, io.Discard); err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Fatalf("%v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestCPUOfAGroup has two ways of counting tell of the same work.
func TestCPUOfAGroup(t *testing.T) {
	lab.Require(t)
	mount, err := cgroupMount()
	if err != nil || mount == "" {
		t.Fatal("no cgroup v2:", err)
	}
	g, err := newGroup(mount, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.end(); err != nil {
			t.Error(err)
		}
	}()
	dir, err := os.Open(g.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ns := lab.TestNS(t, "cpu")
	// A child that works, and one that has ended when it is counted.
	const script = `i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; (i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done); echo done; sleep 60`
	cmd, err := ns.Start(lab.Program{Path: "/bin/sh", Args: []string{"-c", script}, Stdout: w, Cgroup: dir})
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	tree := &group{PID: cmd.Process.Pid}
	a, errA := g.cpu()
	b, errB := tree.cpu()
	if errA != nil || errB != nil || a < 0.05 || b < a-0.1 || b > a+0.1 {
		t.Errorf("by cgroup %.3f s (%v), by processes %.3f s (%v)", a, errA, b, errB)
	}
	f, err := tree.footprint()
	if err != nil || f.PssKB == 0 || f.Files == 0 || f.Threads == 0 {
		t.Errorf("%+v, %v", f, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // killed
}

// Each peer takes part in the modes that it can: SOCKS5 tunnels are compared with
// SOCKS5 tunnels.
func TestVia(t *testing.T) {
	want := map[string]map[string]string{
		"connect": {
			"direct": viaDirect, "wayout": viaConnect, "squid": viaConnect, "tinyproxy": viaConnect,
			"dante": viaSOCKS, "microsocks": viaSOCKS, "haproxy-tcp": viaRelay, "nginx-stream": viaRelay,
			"wayout-tproxy": viaDivert, "wayout-other": viaConnect,
		},
		"socks5": {
			"direct": viaDirect, "wayout": viaSOCKS, "dante": viaSOCKS, "microsocks": viaSOCKS,
			"haproxy-tcp": viaRelay, "nginx-stream": viaRelay,
		},
		"http": {
			"direct": viaDirect, "wayout": viaHTTP, "squid": viaHTTP, "tinyproxy": viaHTTP,
			"haproxy-http": viaHTTP, "haproxy-tcp": viaRelay, "nginx-stream": viaRelay, "wayout-other": viaHTTP,
		},
		"idle": {
			"wayout": viaConnect, "squid": viaConnect, "tinyproxy": viaConnect, "dante": viaSOCKS, "microsocks": viaSOCKS,
			"haproxy-tcp": viaRelay, "nginx-stream": viaRelay, "wayout-tproxy": viaDivert, "wayout-other": viaConnect,
		},
		"ports": {
			"wayout": viaConnect, "squid": viaConnect, "tinyproxy": viaConnect, "dante": viaSOCKS, "microsocks": viaSOCKS,
			"wayout-other": viaConnect,
		},
	}
	for _, m := range modes(1, 100) {
		if want[m.name] == nil {
			continue
		}
		for _, p := range allPeers() {
			if got := p.via(&m); got != want[m.name][p.name] {
				t.Errorf("%s in %s by %q, want %q", p.name, m.name, got, want[m.name][p.name])
			}
		}
		delete(want, m.name)
	}
	if len(want) > 0 {
		t.Errorf("no such modes: %v", want)
	}
}

func TestTemplates(t *testing.T) {
	v := &vars{
		Dir: "/d", Listen: "192.0.2.1", Port: 1, SOCKSPort: 2, Source: "192.0.2.2", Sources: []string{"192.0.2.2", "192.0.2.3"},
		Origin: "192.0.2.4:80", OriginPort: 80, Inner: "in0", Files: 100, Conns: 40, CPUs: 2,
	}
	for _, p := range allPeers() {
		for _, text := range slices.Concat([]string{p.config}, p.args, p.after) {
			if filled, err := v.fill(text); err != nil || strings.Contains(filled, "<no value>") {
				t.Errorf("%s: %v in %q", p.name, err, text)
			}
		}
		if (p.file == "") != (p.config == "") {
			t.Errorf("%s: a file and its text go together", p.name)
		}
	}
}

func TestSummary(t *testing.T) {
	m := mode{name: "x", unit: "CPU us", scale: 1e6, job: job{Kind: "tunnel"}}
	b := &bench{o: options{rounds: 3, base: "a"}, modes: []mode{m}}
	for i, cpu := range []float64{1, 2, 4} { // the machine is slower in each round
		b.out.Samples = append(
			b.out.Samples,
			sample{Peer: "a", Mode: "x", Round: i + 1, result: result{Ops: 1e6, Seconds: cpu, CPU: cpu}},
			sample{Peer: "b", Mode: "x", Round: i + 1, result: result{Ops: 1e6, Seconds: cpu, CPU: 1.5 * cpu}},
		)
	}
	b.proxies = []*proxy{{peer: &peer{name: "b"}}, {peer: &peer{name: "a"}}}
	rows := b.summarize()
	if len(rows) != 2 || rows[0].Peer != "a" || rows[1].Peer != "b" {
		t.Fatalf("%+v", rows)
	}
	if r := rows[1]; r.CPU != (spread{3, 3, 1.5, 6}) || r.ToBase != (spread{3, 1.5, 1.5, 1.5}) {
		t.Errorf("%+v", r)
	}
}

func TestReadCalls(t *testing.T) {
	got, err := readCalls(`% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000600           6       100           read
 40.00    0.000400           4        50         7 accept4
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           6       150         7 total
`)
	if err != nil || !slices.Equal(got, []calls{{"read", 100}, {"accept4", 50}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := readCalls("strace: attach: Operation not permitted\n"); err == nil {
		t.Fatal("no table, and no error")
	}
}

func TestFlame(t *testing.T) {
	root, err := fold(strings.NewReader(`wayout
	ffffffff81634135 tcp_sendmsg+0x365
	           fce67 write+0x7
	           fce60 main.<serve>

wayout
	           fce67 read+0x9
	           fce60 main.<serve>
`))
	if err != nil {
		t.Fatal(err)
	}
	serve := root.calls["main.<serve>"]
	if root.count != 2 || serve == nil || serve.count != 2 || serve.calls["write"].calls["tcp_sendmsg"].count != 1 {
		t.Fatalf("%+v", root)
	}
	if k := serve.calls["write"]; k.kernel || !k.calls["tcp_sendmsg"].kernel {
		t.Error("kernel and user space are mixed up")
	}
	var svg bytes.Buffer
	root.draw(&svg, "a & b")
	boxes := 0
	for d := xml.NewDecoder(&svg); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "g" {
			boxes++
		}
	}
	if boxes != 5 {
		t.Errorf("%d frames drawn", boxes)
	}
	if _, err := fold(strings.NewReader("")); err == nil {
		t.Error("no samples, and no error")
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0.123: "0.12", 12.34: "12.3", 1234.5: "1234"} {
		if got := number(v); got != want {
			t.Errorf("%s for %s", got, fmt.Sprint(v))
		}
	}
}
