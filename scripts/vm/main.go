// Command vm boots a Linux kernel in a virtual machine and says which of the
// eBPF objects it takes, what becomes of a connection under them, and whether
// that is what the documentation promises of a kernel of that age. The machine
// is emulated in software, has no disk and no network, and needs no rights: all
// of its user space is one program (init), started from memory.
//
// With -test some tests of a package run in it as well, on interfaces and namespaces
// of its own; those that ask the program ip find it there.
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
	root    string
	modules string
	tests   []string
	timeout time.Duration
	verbose bool
}

// Modules that are loaded where they are no part of the kernel itself.
const usualModules = "veth,sch_ingress,cls_bpf,tcp_diag,udp_diag"

func main() {
	var o options
	flag.StringVar(&o.root, "root", "", "the `directory` that the kernel's packages were unpacked into")
	flag.StringVar(&o.modules, "modules", usualModules, "names of `modules` to load, with commas between them")
	flag.Func("test", "`package=regexp`: run the tests of a package that match (bpf, netcfg, cmd/wayout); may be repeated", func(s string) error {
		if _, _, ok := strings.Cut(s, "="); !ok {
			return errors.New("want package=regexp")
		}
		o.tests = append(o.tests, s)
		return nil
	})
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
	if o.root == "" {
		return errors.New("-root is missing; make vm fetches a kernel")
	}
	kernel, err := openTree(o.root)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "wayout-vm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	image, args, err := userSpace(ctx, dir, kernel, o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return boot(ctx, o, kernel.image, image, args, out)
}

// userSpace makes the archive that the kernel starts from, and says what to tell
// init.
func userSpace(ctx context.Context, dir string, kernel *tree, o options) (image string, args []string, err error) {
	files := []file{
		{name: "init", from: filepath.Join(dir, "init")},
		{name: "bin/wayout", from: filepath.Join(dir, "wayout")},
	}
	for i, pkg := range []string{"wayout/scripts/vm/init", "wayout/cmd/wayout"} {
		if err := build(ctx, "build", "-o", files[i].from, pkg); err != nil {
			return "", nil, err
		}
	}
	modules, err := kernel.load(ctx, dir, strings.Split(o.modules, ","))
	if err != nil {
		return "", nil, err
	}
	for _, m := range modules {
		args = append(args, "-module=/"+m.name)
	}
	files = append(files, modules...)
	for i, one := range o.tests {
		pkg, pattern, _ := strings.Cut(one, "=")
		tests := file{name: fmt.Sprintf("tests/%d", i), from: filepath.Join(dir, fmt.Sprintf("tests-%d", i))}
		if err := build(ctx, "test", "-c", "-o", tests.from, "wayout/"+pkg); err != nil {
			return "", nil, err
		}
		files = append(files, tests)
		args = append(args, "-test=/"+tests.name+"="+pattern)
	}
	if len(o.tests) > 0 {
		ip, err := program("ip")
		if err != nil {
			return "", nil, err
		}
		files = append(files, ip...)
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
func boot(ctx context.Context, o options, kernel, image string, args []string, out io.Writer) error {
	const qemu = "qemu-system-x86_64"
	cmd := exec.CommandContext(ctx, qemu,
		// With cmpxchg16b qemu 7.2 breaks the allocator of newer kernels now and then.
		"-accel", "tcg", "-cpu", "max,-cx16", "-smp", "2", "-m", "2048",
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", kernel, "-initrd", image,
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
