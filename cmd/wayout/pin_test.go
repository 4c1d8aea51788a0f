package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// service is a cgroup as a service manager makes them, and its processes.
type service struct {
	p      *pinScene
	cgroup string // below the mount
	dir    string
}

var services atomic.Int32

// newService names a cgroup, below one of its own; make makes it.
func (p *pinScene) newService() *service {
	p.t.Helper()
	s := &service{p: p, cgroup: fmt.Sprintf("/wayout-test-%d-%d.slice/a.service", os.Getpid(), services.Add(1))}
	s.dir = filepath.Join(mountOf(p.t, "cgroup2"), s.cgroup)
	p.t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(s.dir, "cgroup.kill"), []byte("1"), 0)
		eventually(p.t, "the cgroup can be removed", func() bool {
			_ = os.Remove(s.dir)
			err := os.Remove(filepath.Dir(s.dir))
			return err == nil || errors.Is(err, fs.ErrNotExist)
		})
	})
	return s
}

func (s *service) make() {
	s.p.t.Helper()
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		s.p.t.Fatal(err)
	}
}

func (s *service) remove() {
	s.p.t.Helper()
	if err := os.Remove(s.dir); err != nil {
		s.p.t.Fatal(err)
	}
}

// begin runs the dialler in it.
func (s *service) begin(argv ...string) *running {
	s.p.t.Helper()
	dir, err := os.Open(s.dir)
	if err != nil {
		s.p.t.Fatal(err)
	}
	defer dir.Close()
	return s.p.run1(lab.Program{Path: s.p.dialler, Args: argv, Cgroup: dir})
}

// dial runs it to its end.
func (s *service) dial(argv ...string) []string {
	s.p.t.Helper()
	x := s.begin(argv...)
	x.wait()
	var lines []string
	// The last of its output may come after its end.
	eventually(s.p.t, "the dialler has said all", func() bool { lines = x.lines(); return len(lines) == len(argv)/2 })
	return lines
}

func (p *pinScene) pins2() map[string]control.Pin {
	p.t.Helper()
	out, errs, code := p.command("pin", "--config", p.config, "--json")
	var all control.Pins
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 0 || all.Version != control.PinsVersion {
		p.t.Fatalf("pins: exit %d: %v: %s%s", code, err, out, errs)
	}
	m := map[string]control.Pin{}
	for _, x := range all.Pins {
		m[x.Cgroup] = x
	}
	return m
}

func (p *pinScene) untilPin(s *service, state string) {
	p.t.Helper()
	var last string
	eventually(p.t, s.cgroup+" is "+state, func() bool {
		x := p.pins2()[s.cgroup]
		last = fmt.Sprintf("%+v", x)
		return x.State == state
	}, &last)
}

func (p *pinScene) ok(args ...string) string {
	p.t.Helper()
	out, errs, code := p.command(append(args, "--config", p.config)...)
	if code != 0 {
		p.t.Errorf("%v: exit %d: %s%s", args, code, out, errs)
	}
	return out
}

// TestPinRunningProcesses pins a cgroup whose processes talk already: from then on
// they leave by the path, or not at all.
func TestPinRunningProcesses(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	s := p.newService()
	s.make()
	six, one := uplinkNodes()[5], uplinkNodes()[0]
	x := s.begin("forever", who4, who6)
	x.more("it talks")
	held := []*running{s.begin("hold", who4), s.begin("hold", who6)}
	for _, h := range held {
		eventually(t, "it is connected", func() bool { return len(h.lines()) > 0 })
	}
	// Of several addresses the kernel takes which it likes.
	free := func(when string, lines []string) {
		t.Helper()
		for _, l := range lines {
			if l == six.v4.String() || l == six.v6.String() || l == one.v4.String() || l == one.v6.String() {
				t.Errorf("%s the origin saw %s", when, l)
			}
		}
	}
	free("before the pin", x.lines())
	if out := p.ok("pin", s.cgroup, "out/p6", "--kill"); !strings.Contains(out, "is pinned to out/p6") || !strings.Contains(out, "connections ended: ") {
		t.Errorf("pin says %q", out)
	}
	for _, h := range held {
		eventually(t, "its connection is ended", func() bool { l := h.lines(); return len(l) == 2 && l[1] == strconv.Itoa(int(unix.ECONNABORTED)) })
		h.wait()
	}
	// What was sent before is on its way.
	x.more("it talks by the path")
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	n := len(x.lines())
	x.more("it talks by the path")
	by := func(node uplinkNode, lines []string) {
		t.Helper()
		for _, l := range lines {
			if l != node.v4.String() && l != node.v6.String() {
				t.Errorf("the origin saw %s, want %s", l, node.id)
			}
		}
	}
	by(six, x.lines()[n:])
	p.carriedOnly("isp1", far[0])
	p.carriedOnly("isp2", far[1], six.v4, six.v6)
	if s := p.paths()["out/p6"]; s.Connections.Made == 0 || s.Packets.Out == 0 {
		t.Errorf("the path has counted %+v", s)
	}

	// To another path, and to none.
	p.ok("pin", s.cgroup, "out/p1")
	x.more("it talks by another")
	n = len(x.lines())
	x.more("it talks by another")
	by(one, x.lines()[n:])
	if pins := p.pins2(); pins[s.cgroup].Path != "out/p1" || pins[s.cgroup].By != control.ByCommand || len(pins) != 1 {
		t.Errorf("pins: %+v", pins)
	}
	p.ok("unpin", s.cgroup)
	x.more("it talks as before")
	n = len(x.lines())
	x.more("it talks as before")
	free("unpinned", x.lines()[n:])
	if pins := p.pins2(); len(pins) != 0 {
		t.Errorf("pins: %+v", pins)
	}
	x.wait()
}

// TestPinRefuses what cannot be pinned.
func TestPinRefuses(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	s := p.newService()
	for _, c := range []struct {
		says string
		args []string
	}{
		{"no such cgroup", []string{"pin", s.cgroup, "out/p1"}},
		{"no such path", []string{"pin", s.cgroup, "out/none"}},
		{"begins with /", []string{"pin", "a.service", "out/p1"}},
		{"every process of the host", []string{"pin", "/", "out/p1"}},
		{"it holds wayout itself", []string{"pin", "/" + strings.TrimPrefix(strings.TrimPrefix(p.leaf(), mountOf(t, "cgroup2")), "/"), "out/p1"}},
		{"no such cgroup is pinned", []string{"unpin", s.cgroup}},
	} {
		if out, errs, code := p.command(append(c.args, "--config", p.config)...); code != 1 || !strings.Contains(errs, c.says) {
			t.Errorf("%v: exit %d: %s%s, want %q", c.args, code, out, errs, c.says)
		}
	}
	if _, errs, code := p.command("pin", s.cgroup, "--config", p.config); code != 2 || !strings.Contains(errs, "CGROUP PATH") {
		t.Errorf("one argument: exit %d: %s", code, errs)
	}
	s.make()
	p.ok("pin", s.dir, "out/p1") // its directory stands for it
	if _, errs, code := p.command("pin", filepath.Dir(s.cgroup), "out/p1", "--config", p.config); code != 1 || !strings.Contains(errs, "pinned twice") {
		t.Errorf("one around it: exit %d: %s", code, errs)
	}
	// A command in a pinned cgroup cannot have another path.
	dir, err := os.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var errs strings.Builder
	cmd, err := p.Host.Start(lab.Program{Path: binary, Args: []string{"exec", "--config", p.config, "--path", "out/p2", "--", "true"}, Stderr: &errs, Cgroup: dir})
	if err != nil {
		t.Fatal(err)
	}
	if state, err := cmd.Process.Wait(); err != nil || state.ExitCode() != 125 {
		t.Errorf("exec within a pinned cgroup: %v, %v", state, err)
	}
	_ = cmd.Wait() // for its output
	if !strings.Contains(errs.String(), "pinned twice") {
		t.Errorf("exec within a pinned cgroup says %q", errs.String())
	}
}

// TestPinsOfTheConfiguration wait for their cgroup, come back with it, follow a
// reload, hold after kill -9 and go with SIGTERM.
func TestPinsOfTheConfiguration(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	s := p.newService()
	nodes := uplinkNodes()
	pinTo := func(path string) string {
		return uplinkConfig("") + "pin: [{cgroup: " + s.cgroup + ", path: " + path + "}]\n"
	}
	p.start(pinTo("out/p6"))
	p.untilPin(s, control.PinWaiting)
	by := func(when string, n uplinkNode) {
		t.Helper()
		if got := s.dial("tcp", who4, "udp", who6, "conn", who4); got[0] != n.v4.String() || got[1] != n.v6.String() || got[2] != n.v4.String() {
			t.Errorf("%s: the origin saw %v, want %s", when, got, n.id)
		}
	}
	for range 3 { // made anew, its parent too
		s.make()
		p.untilPin(s, control.PinInForce)
		by("made", nodes[5])
		s.remove()
		p.untilPin(s, control.PinWaiting)
		if err := os.Remove(filepath.Dir(s.dir)); err != nil {
			t.Fatal(err)
		}
	}
	s.make()
	p.untilPin(s, control.PinInForce)
	p.write(pinTo("out/p2"))
	p.ok("reload")
	by("reloaded", nodes[1])
	if out := p.ok("unpin", s.cgroup); !strings.Contains(out, "is not pinned") {
		t.Errorf("unpin says %q", out)
	}
	if got := s.dial("tcp", who4); got[0] != lab.Primary1Of4 {
		t.Errorf("unpinned: the origin saw %v", got)
	}
	p.ok("reload")
	by("reloaded again", nodes[1])

	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	if err := p.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	by("without a daemon", nodes[1])
	p.run(lab.Program{})
	by("under the next", nodes[1])
	p.carriedOnly("isp1", far[0], nodes[1].v4, nodes[1].v6)
	p.carriedOnly("isp2", far[1])
	if pins := p.pins2(); pins[s.cgroup].By != control.ByConfig || pins[s.cgroup].Connections.Made == 0 {
		t.Errorf("pins: %+v", pins)
	}
	p.write(uplinkConfig(""))
	p.ok("reload")
	if got := s.dial("tcp", who4); got[0] != lab.Primary1Of4 || len(p.pins2()) != 0 {
		t.Errorf("no longer in the configuration: the origin saw %v, pins %v", got, p.pins2())
	}
	p.write(pinTo("out/p2"))
	p.ok("reload")
	p.stop()
	if got := s.dial("tcp", who4); got[0] != lab.Primary1Of4 {
		t.Errorf("after the stop: the origin saw %v", got)
	}
	p.noPins(s)
	p.write(pinTo("out/p2"))
	p.run(lab.Program{})
	if err := p.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	p.wayout("clean")
	p.noPins(s)
}

// noPins fails when there is a link to a cgroup.
func (p *pinScene) noPins(s *service) {
	p.t.Helper()
	if dir, pins := p.pins(s.dir); len(pins) != 0 {
		p.t.Errorf("pins in %s: %v", dir, pins)
	}
}

// TestPinKeptOnStop holds on: keep_on_stop is for that, and a reload may bring it.
func TestPinKeptOnStop(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	s := p.newService()
	s.make()
	p.start(uplinkConfig(""))
	p.ok("pin", s.cgroup, "out/p6")
	p.write("keep_on_stop: true\n" + uplinkConfig(""))
	p.ok("reload")
	p.stop()
	six := uplinkNodes()[5]
	for _, when := range []string{"stopped", "started again"} {
		if got := s.dial("tcp", who4, "udp", who6); got[0] != six.v4.String() || got[1] != six.v6.String() {
			t.Errorf("%s: the origin saw %v", when, got)
		}
		if when == "stopped" {
			p.run(lab.Program{})
		}
	}
	if pins := p.pins2(); pins[s.cgroup].By != control.ByCommand || pins[s.cgroup].Path != "out/p6" {
		t.Errorf("pins: %+v", pins)
	}
	p.stop()
	p.wayout("clean")
	p.noPins(s)
}

// TestPinnedServer answers from where it was asked, if that is the path's or the
// host's own, and nowhere else.
func TestPinnedServer(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	p.start(uplinkConfig(""))
	s := p.newService()
	s.make()
	p.ok("pin", s.cgroup, "out/p1")
	x := s.begin("serve", ":4001")
	eventually(t, "it serves", func() bool { return len(x.lines()) > 0 })
	one := uplinkNodes()[0]
	for _, at := range []netip.Addr{one.v4, one.v6} {
		c, err := p.Origin.Dial(netip.AddrPortFrom(at, 4001))
		if err != nil {
			t.Errorf("at %s: %v", at, err)
			continue
		}
		c.Close()
	}
	for _, at := range []string{"127.0.0.1", "::1"} {
		c, err := p.Host.Dial(netip.AddrPortFrom(netip.MustParseAddr(at), 4001))
		if err != nil {
			t.Errorf("at %s: %v", at, err)
			continue
		}
		c.Close()
	}
	before := p.paths()["out/p1"].GuardDrops
	var fd int
	err := p.Origin.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr(lab.Primary1Of4).As4(), Port: 4001})
	})
	if !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	eventually(t, "the answer is dropped", func() bool { return p.paths()["out/p1"].GuardDrops > before })
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0); n != 0 || err != nil {
		t.Errorf("a foreign address answers: %d, %v", n, err)
	}
	x.wait()
}
