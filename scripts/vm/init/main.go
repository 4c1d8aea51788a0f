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
	var modules []string
	flag.Func("module", "a module to load", func(s string) error {
		modules = append(modules, s)
		return nil
	})
	test := flag.String("test", "", "tests of package bpf to run")
	flag.Parse()
	if err := furnish(modules); err != nil {
		return err
	}
	release, err := kernel()
	if err != nil {
		return err
	}
	tell("Linux %s", release)
	err = tryAll(release)
	if *test != "" {
		err = errors.Join(err, runTests(*test))
	}
	return err
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

// runTests runs the test binary, whose lines are told as they come.
func runTests(pattern string) error {
	cmd := exec.Command("/bpf.test", "-test.v", "-test.run="+pattern)
	cmd.Env = []string{"WAYOUT_TEST_LIVE=1", "HOME=/tmp", "PATH=/"}
	cmd.Stdout, cmd.Stderr = lines{}, lines{}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tests of package bpf: %w", err)
	}
	return nil
}

// lines tells what is written to it.
type lines struct{}

func (lines) Write(b []byte) (int, error) {
	tell("%s", b)
	return len(b), nil
}
