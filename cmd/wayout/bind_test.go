package main_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"wayout/scripts/lab"
)

// refuseBinds has the kernel refuse (EPERM) to the processes of a cgroup, and of
// those below, to bind to an IPv4 address, until it is called off.
func refuseBinds(t *testing.T, cgroup string, a netip.Addr) (stop func()) {
	t.Helper()
	const userIP4 = 4 // in struct bpf_sock_addr
	b := a.As4()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Bind, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, userIP4, asm.Word),
			asm.Mov.Imm(asm.R0, 1),
			asm.LoadImm(asm.R2, int64(b[3])<<24|int64(b[2])<<16|int64(b[1])<<8|int64(b[0]), asm.DWord), // as it lies in memory, on amd64 and arm64
			asm.JNE.Reg(asm.R1, asm.R2, "other"),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return().WithSymbol("other"),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Bind, Program: prog})
	if err != nil {
		t.Fatal(errors.Join(err, prog.Close()))
	}
	stop = func() {
		if err := errors.Join(l.Close(), prog.Close()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	}
	return stop
}

// TestCannotBind has the kernel refuse a bind to an address that is there: the
// request gets the contract's answer, by each protocol, and leaves by no other
// address.
func TestCannotBind(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	echo := s.serveDatagrams(t)
	dir, err := os.MkdirTemp(filepath.Join(mountOf(t, "cgroup2"), ownCgroup(t)), "wayout-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the daemon's end
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	group, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	s.write(outConfig(`metrics: {listen: "10.0.0.1:9180"}` + "\n" + fronts(selects+"open: true, escaper: out")))
	s.run(lab.Program{Cgroup: group})

	p1 := lab.Egress4()[0]
	stop := refuseBinds(t, dir, p1)
	v := verdict{"503", "proxy_internal_error", "reply 0x01", "reply 0x01"}
	for _, p := range protocols() {
		got, err := s.say(p, said{selection: "p1"})
		if want := v.want(p, said{}); err != nil || got.answer != want {
			t.Errorf("%s: %s, %v, want %s", p, got, err, want)
		}
		if (p == forward || p == tunnel) && got.kind != v.kind {
			t.Errorf("%s: Proxy-Status says %q, want %q", p, got.kind, v.kind)
		}
		if got, err := s.say(p, said{selection: "p2"}); err != nil || got.source.Addr() != lab.Egress4()[1] {
			t.Errorf("%s by another path: %s, %v", p, got, err)
		}
	}
	echo.only(t, "p1 cannot be bound", lab.Egress4()[1], "hello")
	// The other family of the path is as it was, and its state is the kernel's.
	if got, err := s.say(connect, said{selection: "p1", six: true}); err != nil || got.source.Addr() != lab.Egress6()[0] {
		t.Errorf("by IPv6: %s, %v", got, err)
	}
	if p := s.paths()["out/p1"]; p.State != "up" {
		t.Errorf("p1 is %s (%s)", p.State, p.Reason)
	}
	if n := s.scrape(t)[`wayout_selection_total{result="bind",source="header"}`]; n != 2 {
		t.Errorf("%v selections by header met a bind that failed, want 2", n)
	}
	stop()
	for _, p := range protocols() {
		if got, err := s.say(p, said{selection: "p1"}); err != nil || got.source.Addr() != p1 {
			t.Errorf("%s once it may be bound: %s, %v", p, got, err)
		}
	}
}
