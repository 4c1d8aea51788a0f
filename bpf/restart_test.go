package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// childEnv makes the test binary be a daemon: see child.
const childEnv = "WAYOUT_BPF_TEST_CHILD"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := child(spec); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child stands for a daemon: it takes the leaf and pins that spec names
// ("LEAF PINDIR IFINDEX"), opens a connection by path 3, says so, and waits to
// be killed.
func child(spec string) error {
	f := strings.Fields(spec)
	leaf, err := MakeLeaf(f[0])
	if err != nil {
		return err
	}
	l, err := NewLayout(DefaultMask)
	if err != nil {
		return err
	}
	p, err := Load(Options{Layout: l, Paths: 4, Cgroup: leaf.Path(), PinDir: f[1]})
	if err != nil {
		return err
	}
	g := Guard{V4: pfx(right4 + "/32"), V6: pfx(right6 + "/128")}
	if _, err := fmt.Sscan(f[2], &g.IfIndex); err != nil {
		return err
	}
	if err := p.SetPath(3, g); err != nil {
		return err
	}
	m, err := l.Mark(ClassPath, 1, 3)
	if err != nil {
		return err
	}
	a := ask{network: "tcp4", src: right4, mark: m}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(right4)}, Control: a.control}
	conn, err := d.Dial(a.network, a.far())
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "0 -1\n"); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// bpffs mounts a bpf file system of the test's own.
func bpffs(t testing.TB) string {
	t.Helper()
	lab.Require(t)
	dir := t.TempDir()
	must(t, unix.Mount("bpf", dir, "bpf", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	return dir
}

// sendUnmarked sends a datagram without a mark on the host.
func (w *wire) sendUnmarked(t *testing.T) error {
	t.Helper()
	s, err := w.packet(ask{network: "udp4", src: wrong4})
	must(t, err)
	defer s.Close()
	_, err = s.WriteTo([]byte("x"), &net.UDPAddr{IP: net.ParseIP(far4), Port: udpPort})
	return err
}

// TestGuardOutlivesTheLoader lets go of the programs, loads them again over
// the pins, and closes them: the guard is never away in between.
func TestGuardOutlivesTheLoader(t *testing.T) {
	w := newWire(t)
	pins := filepath.Join(bpffs(t), "wayout", "test")
	o := Options{Layout: w.layout, Paths: 4, Cgroup: w.leaf.Path(), PinDir: pins}
	p, err := Load(o)
	must(t, err)
	must(t, p.SetPath(1, w.guard()))
	must(t, p.Leave())
	if err := w.sendUnmarked(t); !errors.Is(err, unix.EPERM) {
		t.Fatalf("without the loader a datagram without a mark: %v", err)
	}
	c, err := w.dial(ask{network: "tcp4", src: right4, mark: mark(t, w.layout, ClassPath, 1, 1)}, 0)
	must(t, err) // what may pass still does
	defer c.Close()

	// All the while that programs are replaced something tries to get through.
	var tries, passed atomic.Int64
	var all sync.WaitGroup
	stop := make(chan struct{})
	s, err := w.packet(ask{network: "udp4", src: wrong4})
	must(t, err)
	defer s.Close()
	all.Go(func() {
		to := &net.UDPAddr{IP: net.ParseIP(far4), Port: udpPort}
		for {
			select {
			case <-stop:
				return
			default:
			}
			tries.Add(1)
			if _, err := s.WriteTo([]byte("x"), to); !errors.Is(err, unix.EPERM) {
				passed.Add(1)
			}
		}
	})
	for range 5 {
		p, err = Load(o)
		must(t, err)
		if got := p.Inherited(); !slices.Equal(got, []uint32{1}) {
			t.Errorf("inherited %v", got)
		}
		must(t, p.Leave())
	}
	p, err = Load(o)
	must(t, err)
	before := tries.Load()
	eventually(t, "it has been tried since", func() bool { return tries.Load() > before })
	close(stop)
	all.Wait()
	if passed.Load() != 0 {
		t.Errorf("%d of %d datagrams without a mark have passed", passed.Load(), tries.Load())
	}
	t.Logf("%d tries", tries.Load())
	if p.Unmarked() == 0 {
		t.Error("the new programs have counted nothing")
	}
	w.nothingFrom(t, wrong4)

	must(t, p.Close())
	must(t, p.Close())
	if _, err := os.Stat(pins); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pins are still there: %v", err)
	}
	if err := w.sendUnmarked(t); err != nil {
		t.Errorf("after Close a datagram without a mark: %v", err)
	}
	if err := p.SetPath(1, w.guard()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a path after Close: %v", err)
	}
	if got := p.Read(1); got.Made != 1 {
		t.Errorf("counters after Close: %+v", got)
	}
}

// TestKilledDaemon kills a daemon with an open connection and starts the next:
// its leaf is free again, the guard holds in between, and the number of the
// connection that the kernel is still closing is known until that is done.
func TestKilledDaemon(t *testing.T) {
	w := newWire(t)
	pins := filepath.Join(bpffs(t), "wayout", "test")
	must(t, w.leaf.Remove()) // the daemon is not to start below it
	name := leafName() + "-daemon"
	out, stdout := io.Pipe()
	in, stdin := io.Pipe()
	defer stdin.Close()
	cmd, err := w.host.Start(lab.Program{
		Path: "/proc/self/exe", Stdin: in, Stdout: stdout, Stderr: os.Stderr,
		Env: append(os.Environ(), childEnv+"="+fmt.Sprintf("%s %s %d", name, pins, w.eth[0])),
	})
	must(t, err)
	said, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	if said != "ready\n" {
		t.Fatalf("the daemon said %q", said)
	}
	if l, err := MakeLeaf(name); !errors.Is(err, ErrLeafBusy) {
		t.Fatalf("the leaf of a running daemon: %+v, %v", l, err)
	}
	if err := Clean(pins); !errors.Is(err, ErrLeafBusy) {
		t.Fatalf("clean while it runs: %v", err)
	}
	heal := lose(t, w.far, 1) // the end of the connection goes unanswered
	must(t, cmd.Process.Kill())
	in.Close()
	_ = cmd.Wait() // says that it was killed

	w.leaf, err = MakeLeaf(name)
	must(t, err)
	if err := w.sendUnmarked(t); !errors.Is(err, unix.EPERM) {
		t.Errorf("before the programs are loaded again, a datagram without a mark: %v", err)
	}
	before, err := PinnedNumbers(pins, w.layout)
	if err != nil || !slices.Equal(before, []uint32{3}) {
		t.Errorf("pinned are %v, %v", before, err)
	}
	p, err := Load(Options{Layout: w.layout, Paths: 4, Cgroup: w.leaf.Path(), PinDir: pins})
	must(t, err)
	t.Cleanup(func() { must(t, p.Close()) })
	if got := p.Inherited(); !slices.Equal(got, []uint32{3}) {
		t.Fatalf("inherited %v", got)
	}
	if c := p.Read(3); c.Made != 1 || c.Open() != 1 {
		t.Errorf("of the killed daemon's connection is known %+v", c)
	}
	heal()
	w.hold <- struct{}{} // the far side closes too
	eventually(t, "the kernel has closed the connection", func() bool {
		c := p.Read(3)
		return c.Open() == 0
	})
	if c := p.Read(3); c.GuardDrops() != 0 {
		t.Errorf("packets of the connection were dropped: %+v", c)
	}
	must(t, p.ClearPath(3))
	must(t, p.SetPath(3, w.guard()))
	if c := p.Read(3); c != (Counters{}) {
		t.Errorf("a number that is used again starts from %+v", c)
	}
}

func TestCleanAfterAKilledDaemon(t *testing.T) {
	w := newWire(t)
	root := bpffs(t)
	pins := filepath.Join(root, "test")
	must(t, Clean(pins)) // nothing is there
	p, err := Load(Options{Layout: w.layout, Paths: 1, Cgroup: w.leaf.Path(), PinDir: pins})
	must(t, err)
	must(t, p.Leave())
	path := w.leaf.Path()
	must(t, join(w.leaf.parent)) // as if the process had ended
	must(t, Clean(pins))
	for _, gone := range []string{pins, path} {
		if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", gone, err)
		}
	}
	must(t, os.Mkdir(path, 0o755)) // for the leaf's own cleanup
}

// TestPinsOfAnotherCgroup starts a daemon elsewhere than before: the programs
// that were pinned go once the new ones stand.
func TestPinsOfAnotherCgroup(t *testing.T) {
	w := newWire(t)
	pins := filepath.Join(bpffs(t), "test")
	other := filepath.Join(w.leaf.parent, leafName()+"-other")
	must(t, os.Mkdir(other, 0o755))
	defer os.Remove(other)
	old, err := Load(Options{Layout: w.layout, Paths: 1, Cgroup: other, PinDir: pins})
	must(t, err)
	must(t, old.SetPath(1, w.guard()))
	must(t, old.Leave())
	p := w.load(t, Options{Paths: 1, PinDir: pins})
	if err := w.sendUnmarked(t); !errors.Is(err, unix.EPERM) {
		t.Errorf("a datagram without a mark: %v", err)
	}
	must(t, p.Close())
	if err := w.sendUnmarked(t); err != nil {
		t.Errorf("after Close: %v", err)
	}
	must(t, join(other))
	if err := w.sendUnmarked(t); err != nil {
		t.Errorf("in the other cgroup: %v", err)
	}
	must(t, join(w.leaf.Path()))
}

// TestPinsOfAnotherLayout does not read numbers by a layout that they are not of.
func TestPinsOfAnotherLayout(t *testing.T) {
	w := newWire(t)
	pins := filepath.Join(bpffs(t), "test")
	p, err := Load(Options{Layout: testLayout(t, 0xffffff), Paths: 1, Cgroup: w.leaf.Path(), PinDir: pins})
	must(t, err)
	must(t, p.SetPath(1, w.guard()))
	must(t, p.Leave())
	for _, dir := range []string{pins, pins + "-not-there"} {
		if got, err := PinnedNumbers(dir, w.layout); err != nil || len(got) != 0 {
			t.Errorf("pinned in %s are %v, %v", dir, got, err)
		}
	}
	p = w.load(t, Options{Paths: 1, PinDir: pins})
	if got := p.Inherited(); len(got) != 0 {
		t.Errorf("inherited %v", got)
	}
}

// TestInheritedNumberIsUsed gives a path a number of the run before: it starts
// anew.
func TestInheritedNumberIsUsed(t *testing.T) {
	w := newWire(t)
	o := Options{Layout: w.layout, Paths: 1, Cgroup: w.leaf.Path(), PinDir: filepath.Join(bpffs(t), "test")}
	p, err := Load(o)
	must(t, err)
	must(t, p.SetPath(1, w.guard()))
	a := ask{network: "udp4", src: right4, mark: mark(t, w.layout, ClassPath, 1, 1)}
	c, err := w.dial(a, 0)
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte("x"))
	must(t, err)
	must(t, p.Leave())
	p, err = Load(o)
	must(t, err)
	defer p.Close()
	if got := p.Read(1); got.PacketsOut != 1 {
		t.Errorf("carried over: %+v", got)
	}
	must(t, p.SetPath(1, w.guard()))
	if got := p.Read(1); got.PacketsOut != 0 {
		t.Errorf("a path of this run starts from %+v", got)
	}
	_, err = c.Write([]byte("x"))
	must(t, err)
	must(t, p.SetPath(1, w.guard()))
	if got := p.Read(1); got.PacketsOut != 1 {
		t.Errorf("set again: %+v", got)
	}
}

// TestTablesGrow sets a number beyond the tables while traffic runs: nothing
// counted is lost, and the guard neither drops what is right nor lets wrong by.
func TestTablesGrow(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 1})
	c, err := w.dial(ask{network: "udp4", src: right4, mark: mark(t, w.layout, ClassPath, 1, 1)}, 0)
	must(t, err)
	defer c.Close()
	stop := make(chan struct{})
	var sent uint64
	var all sync.WaitGroup
	all.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := c.Write([]byte("x")); err != nil {
				t.Errorf("while the tables grow: %v", err)
				return
			}
			sent++
		}
	})
	for _, num := range []uint32{2, 5, 300, 70000, w.layout.MaxPath()} {
		must(t, p.SetPath(num, w.guard()))
		before := p.Read(1).PacketsOut
		eventually(t, "it goes on", func() bool { return p.Read(1).PacketsOut > before })
	}
	close(stop)
	all.Wait()
	if got := p.Read(1).PacketsOut; got != sent {
		t.Errorf("%d packets are counted, %d were sent", got, sent)
	}
	if got := p.Read(1); got.GuardDrops() != 0 {
		t.Errorf("the guard dropped: %+v", got)
	}
	if _, err := w.dial(ask{network: "tcp4", src: right4, mark: mark(t, w.layout, ClassPath, 1, w.layout.MaxPath())}, 0); err != nil {
		t.Error(err)
	}
	if err := p.SetPath(w.layout.MaxPath()+1, w.guard()); !errors.Is(err, ErrNumber) {
		t.Errorf("a number that no mark holds: %v", err)
	}
	if err := p.SetPath(0, w.guard()); !errors.Is(err, ErrNumber) {
		t.Errorf("number 0: %v", err)
	}
}

// TestSetPathChangesTheGuard keeps counters when a number that is in force
// gets another guard.
func TestSetPathChangesTheGuard(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 1})
	m := mark(t, w.layout, ClassPath, 1, 1)
	a := ask{network: "udp4", src: right4, mark: m}
	c, err := w.dial(a, 0)
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte("x"))
	must(t, err)
	must(t, p.SetPath(1, w.guard())) // the same
	must(t, p.SetPath(1, Guard{V4: pfx(wrong4 + "/32")}))
	if _, err := c.Write([]byte("x")); !errors.Is(err, unix.EPERM) {
		t.Errorf("from the address that was right: %v", err)
	}
	if got := p.Read(1); got.PacketsOut != 1 || got.DropSource != 1 {
		t.Errorf("counted %+v", got)
	}
}

func TestLoadRefuses(t *testing.T) {
	w := newWire(t)
	root, err := FindCgroup2()
	must(t, err)
	below := filepath.Join(w.leaf.Path(), "below")
	for _, c := range []struct {
		name string
		o    Options
		err  error
	}{
		{"no layout", Options{Cgroup: w.leaf.Path()}, ErrMask},
		{"too many paths", Options{Layout: w.layout, Paths: 1 << 20, Cgroup: w.leaf.Path()}, ErrNumber},
		{"a cgroup of others", Options{Layout: w.layout, Cgroup: root}, ErrShared},
		{"no cgroup", Options{Layout: w.layout, Cgroup: t.TempDir()}, ErrCgroup},
		{"no directory", Options{Layout: w.layout, Cgroup: below}, os.ErrNotExist},
		{"pins on no bpf file system", Options{Layout: w.layout, Cgroup: w.leaf.Path(), PinDir: t.TempDir()}, ErrNotBPFFS},
	} {
		if p, err := Load(c.o); !errors.Is(err, c.err) {
			t.Errorf("%s: %v, %v", c.name, p, err)
		}
	}
	must(t, os.Mkdir(below, 0o755))
	defer os.Remove(below)
	if p, err := Load(Options{Layout: w.layout, Cgroup: w.leaf.Path()}); !errors.Is(err, ErrShared) {
		t.Errorf("a cgroup with another below: %v, %v", p, err)
	}
}

func TestLeaf(t *testing.T) {
	lab.Require(t)
	own, err := ownCgroup()
	must(t, err)
	for _, name := range []string{"", ".", "..", "a/b", "/a"} {
		if l, err := MakeLeaf(name); err == nil {
			t.Errorf("%q makes %s", name, l.Path())
		}
	}
	l, err := MakeLeaf(leafName())
	must(t, err)
	if got, err := ownCgroup(); err != nil || got != l.Path() || filepath.Dir(got) != own {
		t.Errorf("in %s, %v, started in %s", got, err, own)
	}
	if again, err := MakeLeaf(leafName()); !errors.Is(err, ErrLeafBusy) {
		t.Errorf("a second of the name: %v, %v", again, err)
	}
	must(t, l.Remove())
	if got, err := ownCgroup(); err != nil || got != own {
		t.Errorf("back in %s, %v, started in %s", got, err, own)
	}
	// What a killed daemon leaves is taken over.
	must(t, os.Mkdir(l.Path(), 0o755))
	l, err = MakeLeaf(leafName())
	must(t, err)
	must(t, l.Remove())
	if _, err := os.Stat(l.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the leaf is still there: %v", err)
	}
}

// TestProbe holds that the whole of it is there where the tests can load.
func TestProbe(t *testing.T) {
	lab.Require(t)
	for _, f := range Probe() {
		t.Logf("%v %s (Linux %s, for %s): %v", f.OK, f.Name, f.Since, f.Need, f.Err)
		if f.OK != (f.Err == nil) || f.Name == "" || f.Since == "" || f.Need == "" || f.Remedy == "" {
			t.Errorf("not whole: %+v", f)
		}
		if !f.OK && f.Need == NeedAll {
			t.Errorf("%s: %v", f.Name, f.Err)
		}
	}
}

func TestBPFFSIsFound(t *testing.T) {
	dir := bpffs(t)
	if got, err := BPFFS(true); err != nil || got != dir {
		t.Errorf("found %q, %v, want %q", got, err, dir)
	}
}

// BenchmarkTables is what 65,000 paths cost: loaded, set at once, read one.
func BenchmarkTables(b *testing.B) {
	lab.Require(b)
	l := testLayout(b, DefaultMask)
	leaf, err := MakeLeaf(leafName())
	if err != nil {
		b.Fatal(err)
	}
	defer leaf.Remove()
	const paths = 65000
	all := make([]Entry, paths)
	for i := range all {
		all[i] = Entry{Num: uint32(i + 1), Guard: Guard{V4: pfx("192.0.2.7/32"), V6: pfx("2001:db8::7/128")}}
	}
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			start := time.Now()
			p, err := Load(Options{Layout: l, Paths: paths, Cgroup: leaf.Path()})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(time.Since(start).Seconds()*1e3, "ms/load")
			if err := p.SetPaths(all); err != nil {
				b.Fatal(err)
			}
			if err := p.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	p, err := Load(Options{Layout: l, Paths: paths, Cgroup: leaf.Path()})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	b.Run("setAll", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := p.SetPaths(all); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.Read(4711)
		}
	})
}
