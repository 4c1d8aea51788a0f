// Command init is all of the user space of a machine that scripts/vm boots: it
// gives each eBPF object to the kernel, tells what became of it and powers off.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/vm/say"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: only for the first process of a machine (scripts/vm)")
		os.Exit(2)
	}
	verdict := say.Good
	if err := run(); err != nil {
		tell("%v", err)
		verdict = say.Bad
	}
	tell("%s", verdict)
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	tell("power off: %v", err) // and what follows, the end of process 1, is a panic
}

// tell prints a text, each line with the mark.
func tell(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	var b bytes.Buffer
	for line := range strings.Lines(text) {
		b.WriteString(say.Mark + strings.TrimRight(line, "\n") + "\n")
	}
	_, _ = os.Stdout.Write(b.Bytes())
}

func run() error {
	var modules, tests []string
	list := func(to *[]string) func(string) error {
		return func(s string) error {
			*to = append(*to, s)
			return nil
		}
	}
	flag.Func("module", "a module to load", list(&modules))
	flag.Func("test", "a test binary, =, and which of its tests to run", list(&tests))
	flag.Parse()
	if err := furnish(modules); err != nil {
		return err
	}
	release, err := kernel()
	if err != nil {
		return err
	}
	tell("Linux %s", release)
	// Below 5.11 it bounds eBPF; what else such a kernel lacks is to be seen.
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		return fmt.Errorf("lift the bound of locked memory: %w", err)
	}
	errs := []error{tryAll(release), runDoctor()}
	for _, test := range tests {
		binary, pattern, _ := strings.Cut(test, "=")
		errs = append(errs, runTests(binary, pattern))
	}
	return errors.Join(errs...)
}

// furnish makes of the bare file system what a Linux host looks like.
func furnish(modules []string) error {
	for _, m := range []struct{ fs, at string }{
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"cgroup2", "/sys/fs/cgroup"},
		{"bpf", "/sys/fs/bpf"},
		{"tracefs", "/sys/kernel/tracing"},
		{"devtmpfs", "/dev"},
		{"tmpfs", "/run"},
		{"tmpfs", "/tmp"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fs, m.at, m.fs, 0, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.fs, m.at, err)
		}
	}
	for name, content := range map[string]string{
		"/etc/resolv.conf": "nameserver 127.0.0.1\n",
		"/etc/hosts":       "127.0.0.1 localhost\n::1 localhost\n",
	} {
		if err := errors.Join(os.MkdirAll("/etc", 0o755), os.WriteFile(name, []byte(content), 0o600)); err != nil {
			return err
		}
	}
	for _, name := range modules {
		if err := loadModule(name); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// runDoctor tells what the program itself says of the kernel: all that is not well,
// of the host among it.
func runDoctor() error {
	const config = `server: [{name: lan, type: tproxy, interface: eth0, divert: tcp/443, escaper: out}]
escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1}]}]
`
	if err := os.WriteFile("/tmp/wayout.yaml", []byte(config), 0o600); err != nil {
		return err
	}
	cmd := exec.Command("/bin/wayout", "doctor", "--config", "/tmp/wayout.yaml")
	text, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "ok ") {
			tell("doctor: %s", line)
		}
	}
	if x := (*exec.ExitError)(nil); errors.As(err, &x) && x.ExitCode() == 1 {
		return nil // there is a blocker, which it has told
	}
	return err
}

// runTests runs a test binary, whose lines are told as they come.
func runTests(binary, pattern string) error {
	cmd := exec.Command(binary, "-test.v", "-test.run="+pattern)
	cmd.Dir = "/tmp"
	cmd.Env = []string{"WAYOUT_TEST_LIVE=1", "WAYOUT_TEST_BINARY=/bin/wayout", "HOME=/tmp", "PATH=/bin"}
	cmd.Stdout, cmd.Stderr = lines{}, lines{}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tests %s: %w", pattern, err)
	}
	return nil
}

// lines tells what is written to it.
type lines struct{}

func (lines) Write(b []byte) (int, error) {
	tell("%s", b)
	return len(b), nil
}
