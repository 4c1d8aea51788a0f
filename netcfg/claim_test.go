package netcfg_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"wayout/netcfg"
)

// What makes the test program another one.
const (
	claimEnv    = "WAYOUT_TEST_CLAIM"
	strangerEnv = "WAYOUT_TEST_STRANGER"
)

// TestMain is also the other daemon, one that claims a Layout and then waits, and
// the stranger, one that takes the names of claims.
func TestMain(m *testing.M) {
	if os.Getenv(strangerEnv) != "" {
		for _, name := range []string{"@wayout-netcfg/11900/11900/ff0000/1", "@wayout-netcfg/lock"} {
			if _, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"}); err != nil {
				panic(err)
			}
		}
		fmt.Println("ready")
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	spec := os.Getenv(claimEnv)
	if spec == "" {
		os.Exit(m.Run())
	}
	var l netcfg.Layout
	if _, err := fmt.Sscanf(spec, "%d/%d/%x", &l.TableBase, &l.RulePriority, &l.MarkMask); err != nil {
		panic(err)
	}
	k, err := netcfg.Open(netcfg.Options{Layout: l})
	if err == nil {
		_, err = k.Claim()
	}
	fmt.Printf("claimed: %v\n", err)
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

// otherDaemon claims in another process of the calling thread's namespace and gives
// its answer.
func otherDaemon(t *testing.T, l netcfg.Layout) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d/%d/%x", claimEnv, l.TableBase, l.RulePriority, l.MarkMask))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, strings.TrimPrefix(start(t, cmd), "claimed: ")
}

// start runs a program that says one line and then waits for its input to end, at
// the end of the test at the latest.
func start(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

func TestClaim(t *testing.T) {
	inNamespace(t)
	first := layout() // 11900, 11900, 0xff0000
	cmd, answer := otherDaemon(t, first)
	if answer != "<nil>" {
		t.Fatalf("the first daemon: %s", answer)
	}
	for _, tt := range []struct {
		l    netcfg.Layout
		want string // "" when it may run
	}{
		{first, "routing tables 11900 to 12155"},
		{netcfg.Layout{TableBase: 12155, RulePriority: 20000, MarkMask: 0xff}, "routing tables 11900 to 12155"},
		{netcfg.Layout{TableBase: 11645, RulePriority: 20000, MarkMask: 0xff}, "routing tables 11900 to 12155"},
		{netcfg.Layout{TableBase: 20000, RulePriority: 12155, MarkMask: 0xff}, "rule priorities 11900 to 12155"},
		{netcfg.Layout{TableBase: 20000, RulePriority: 11645, MarkMask: 0xff}, "rule priorities 11900 to 12155"},
		{netcfg.Layout{TableBase: 20000, RulePriority: 20000, MarkMask: 0x1ffff}, "mark mask 0xff0000"},
		{netcfg.Layout{TableBase: 12156, RulePriority: 12156, MarkMask: 0xff00ffff}, ""},
		{netcfg.Layout{TableBase: 11644, RulePriority: 11644, MarkMask: 0xff}, ""},
	} {
		k := open(t, netcfg.Options{Layout: tt.l})
		c, err := k.Claim()
		if tt.want == "" {
			if err != nil {
				t.Errorf("%+v: %v", tt.l, err)
				continue
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			continue
		}
		full := fmt.Sprintf("process %d has %s", cmd.Process.Pid, tt.want)
		if !isErr(err, netcfg.ErrClaimed) || !strings.Contains(err.Error(), full) {
			t.Errorf("%+v: got error %v, want one with %q", tt.l, err, full)
		}
	}

	// Another namespace is another host.
	far := elsewhere(t)
	far.do(func() {
		c, err := open(t, netcfg.Options{}).Claim()
		if err != nil {
			t.Fatalf("in another namespace: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})

	// kill -9 leaves nothing.
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	k := open(t, netcfg.Options{})
	c, err := k.Claim()
	if err != nil {
		t.Fatalf("after kill -9: %v", err)
	}
	if _, err := k.Claim(); !isErr(err, netcfg.ErrClaimed) {
		t.Errorf("twice in one process: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if c, err = k.Claim(); err != nil {
		t.Fatalf("after Close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestClaimAtOnce: of many that start together with overlapping numbers one wins.
func TestClaimAtOnce(t *testing.T) {
	inNamespace(t)
	var all sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 8 {
		k := open(t, netcfg.Options{Layout: netcfg.Layout{TableBase: 11900 + uint32(i), RulePriority: 11900, MarkMask: 1}})
		all.Go(func() {
			// The claim itself finds its way into k's namespace.
			c, err := k.Claim()
			if err != nil {
				if !isErr(err, netcfg.ErrClaimed) {
					t.Errorf("daemon %d: %v", i, err)
				}
				return
			}
			mu.Lock()
			won++
			mu.Unlock()
			t.Cleanup(func() { _ = c.Close() })
		})
	}
	all.Wait()
	if won != 1 {
		t.Errorf("%d daemons have the numbers, want 1", won)
	}
}

// TestClaimStrangers: names that anybody could take do not keep the daemon out, but
// for those that it cannot tell from another daemon's.
func TestClaimStrangers(t *testing.T) {
	inNamespace(t)
	for _, name := range []string{"@wayout-netcfg/", "@wayout-netcfg/x/y/z/1", "@wayout-netcfg/11900/11900/ff0000", "@wayout-netcfg/99999999999/1/1/1"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
	}
	// A user without rights who claims everything, and holds the lock.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), strangerEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if answer := start(t, cmd); answer != "ready" {
		t.Fatalf("the other user: %s", answer)
	}
	c, err := open(t, netcfg.Options{}).Claim()
	if err != nil {
		t.Fatalf("another user keeps the daemon out: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
