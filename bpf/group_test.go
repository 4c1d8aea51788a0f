package bpf

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"wayout/scripts/lab"
)

// TestGroupEnds has processes in a group and below it; all of them are gone
// when it has ended.
func TestGroupEnds(t *testing.T) {
	lab.Require(t)
	g, err := MakeGroup()
	must(t, err)
	below := filepath.Join(g.Path(), "a", "b")
	must(t, os.MkdirAll(below, 0o755))
	dir, err := os.Open(below)
	must(t, err)
	defer dir.Close()
	var all []*exec.Cmd
	for _, fd := range []int{g.FD(), int(dir.Fd())} {
		c := exec.Command("sleep", "1000")
		c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
		must(t, c.Start())
		all = append(all, c)
	}
	if is, err := Populated(g.Path()); err != nil || !is {
		t.Errorf("populated: %v, %v", is, err)
	}
	ids, err := CgroupTree(g.Path())
	must(t, err)
	id, err := CgroupID(below)
	must(t, err)
	if len(ids) != 3 || !slices.Contains(ids, id) {
		t.Errorf("the tree is %v, with %d in it", ids, id)
	}
	must(t, g.End(t.Context()))
	for _, c := range all {
		exit := (*exec.ExitError)(nil)
		if err := c.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("a process ended by %v", err)
		}
	}
	if !gone(g.Path()) {
		t.Errorf("%s is still there", g.Path())
	}
	if is, err := Populated(g.Path()); err != nil || is {
		t.Errorf("one that is gone is populated: %v, %v", is, err)
	}
	if id, err := CgroupID(g.Path()); id != 0 || err != nil {
		t.Errorf("one that is gone is %d, %v", id, err)
	}
	if ids, err := CgroupTree(g.Path()); len(ids) != 0 || err != nil {
		t.Errorf("one that is gone has %v, %v", ids, err)
	}
	must(t, EndGroup(t.Context(), g.Path())) // once more is no error
}

// TestGroupWaitsForItsEnd waits for a process that is not killed, and is told to
// wait no longer.
func TestGroupWaitsForItsEnd(t *testing.T) {
	lab.Require(t)
	g, err := MakeGroup()
	must(t, err)
	defer func() { must(t, g.End(t.Context())) }()
	c := exec.Command("sleep", "1000")
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: g.FD()}
	must(t, c.Start())
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error)
	go func() { waited <- awaitEmpty(ctx, g.Path()) }()
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		t.Errorf("told to wait no longer: %v", err)
	}
	go func() { waited <- awaitEmpty(t.Context(), g.Path()) }()
	must(t, c.Process.Kill())
	_ = c.Wait() // it says that it was killed
	must(t, <-waited)
}

// TestEndGroupIsForGroupsAlone keeps other cgroups' processes alive.
func TestEndGroupIsForGroupsAlone(t *testing.T) {
	if err := EndGroup(t.Context(), "/sys/fs/cgroup/system.slice"); !errors.Is(err, ErrCgroup) {
		t.Error(err)
	}
}

func TestPopulated(t *testing.T) {
	for text, want := range map[string]bool{
		"populated 1\nfrozen 0\n": true, "populated 0\nfrozen 0\n": false, "frozen 0\npopulated 1\n": true, "": false,
		"unpopulated 1\n": false,
	} {
		if populated(text) != want {
			t.Errorf("%q is populated: %v", text, !want)
		}
	}
}
