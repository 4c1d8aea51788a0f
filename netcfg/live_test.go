package netcfg_test

import (
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// inNamespace moves the test to a network namespace of its own, which ends with the
// test: its goroutine keeps a thread that nobody else gets. The program ip
// (iproute2) is the judge of these tests, beside the package's own reading.
func inNamespace(t *testing.T) {
	t.Helper()
	lab.Require(t)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	ip(t, "link set lo up")
}

// ip runs the ip program on the words of line in the calling thread's namespace.
func ip(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %s: %v\n%s", line, err, out)
	}
	return string(out)
}

// place is a second network namespace of a test.
type place struct {
	t      *testing.T
	thread int // as `ip link set ... netns` takes it
	work   chan func()
	idle   chan struct{}
}

// elsewhere makes one. It ends with the test.
func elsewhere(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, work: make(chan func()), idle: make(chan struct{})}
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		p.thread = unix.Gettid()
		failed <- err
		defer close(p.idle) // also when f ends the goroutine
		for f := range p.work {
			f()
			p.idle <- struct{}{}
		}
	}()
	if err := <-failed; err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { close(p.work) })
	return p
}

// do runs f there. When f fails the test at once, so does do.
func (p *place) do(f func()) {
	p.t.Helper()
	p.work <- f
	if _, ok := <-p.idle; !ok {
		p.t.FailNow()
	}
}
