// Command vm boots a Linux kernel in a virtual machine and says which of the
// eBPF objects it takes, what becomes of a connection under them, and whether
// that is what the documentation promises of a kernel of that age. The machine
// is emulated in software, has no disk and no network, and needs no rights: all
// of its user space is one program (init), started from memory.
//
// With -test the tests of package bpf run in it as well.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/vm/say"
)

// options are what the command line says.
type options struct {
	kernel  string
	modules string
	test    string
	timeout time.Duration
	verbose bool
}

func main() {
	var o options
	flag.StringVar(&o.kernel, "kernel", "", "the kernel's image (vmlinuz)")
	flag.StringVar(&o.modules, "modules", "", "modules (.ko) to load before all else, in this order, with commas between them")
	flag.StringVar(&o.test, "test", "", "run the tests of package bpf that match; those with interfaces want the module veth")
	flag.DurationVar(&o.timeout, "timeout", 5*time.Minute, "how long the machine may run")
	flag.BoolVar(&o.verbose, "v", false, "print the kernel's messages too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1) //nolint:gocritic // nothing is left for stop to do
	}
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	if o.kernel == "" {
		return errors.New("-kernel is missing; make vm fetches one")
	}
	dir, err := os.MkdirTemp("", "wayout-vm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	image, args, err := userSpace(ctx, dir, o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return boot(ctx, o, image, args, out)
}

// userSpace makes the archive that the kernel starts from, and says what to tell
// init.
func userSpace(ctx context.Context, dir string, o options) (image string, args []string, err error) {
	files := []file{{name: "init", from: filepath.Join(dir, "init")}}
	if err := build(ctx, "build", "-o", files[0].from, "wayout/scripts/vm/init"); err != nil {
		return "", nil, err
	}
	for module := range strings.SplitSeq(o.modules, ",") {
		if module == "" {
			continue
		}
		name := filepath.Base(module)
		files = append(files, file{name: name, from: module})
		args = append(args, "-module=/"+name)
	}
	if o.test != "" {
		tests := file{name: "bpf.test", from: filepath.Join(dir, "bpf.test")}
		if err := build(ctx, "test", "-c", "-o", tests.from, "wayout/bpf"); err != nil {
			return "", nil, err
		}
		files = append(files, tests)
		args = append(args, "-test="+o.test)
	}
	image = filepath.Join(dir, "initramfs")
	return image, args, writeArchive(image, files)
}

// build has go make a program that needs no library at run time.
func build(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}

// boot runs the machine until it powers itself off, and prints what init says.
func boot(ctx context.Context, o options, image string, args []string, out io.Writer) error {
	const qemu = "qemu-system-x86_64"
	cmd := exec.CommandContext(ctx, qemu,
		"-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1024",
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", o.kernel, "-initrd", image,
		// What follows the dashes is for init. With panic=-1 a panic ends the machine.
		"-append", strings.Join(append([]string{"console=ttyS0", "panic=-1", "--"}, args...), " "))
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	console, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w (Debian has it in qemu-system-x86)", err)
	}
	verdict, readErr := follow(console, o.verbose, out)
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("the machine was stopped: %w", context.Cause(ctx))
	case err != nil:
		return fmt.Errorf("%s: %w\n%s", qemu, err, complaints.Bytes())
	case readErr != nil:
		return fmt.Errorf("read the machine's console: %w", readErr)
	case verdict == "":
		return errors.New("the machine ended without a verdict; -v shows the kernel's messages")
	case verdict != say.Good:
		return errors.New("not as documented, see above")
	}
	return nil
}

// follow prints the lines of init, or all, and returns its verdict.
func follow(console io.Reader, all bool, out io.Writer) (verdict string, err error) {
	lines := bufio.NewScanner(console)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		text, ours := strings.CutPrefix(line, say.Mark)
		switch {
		case ours && (text == say.Good || text == say.Bad):
			verdict = text
		case ours:
			fmt.Fprintln(out, text)
		case all:
			fmt.Fprintln(out, line)
		}
	}
	return verdict, lines.Err()
}
