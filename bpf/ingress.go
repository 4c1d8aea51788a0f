package bpf

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Programs on what comes in by an interface are attached by links (tcx) where the
// kernel has them: these are pinned and updated as all others here. Else an Ingress
// does it. The verdicts of the programs mean the same in both (kernel.h).

// ErrNoTCX says that the kernel has no links of programs to interfaces (tcx, Linux
// 6.6) and that there is no Ingress.
var ErrNoTCX = errors.New("no tcx in this kernel")

// Ingress puts programs on what comes in by interfaces of one network namespace,
// where the kernel has no links for that. They stay when the process ends; netcfg has
// one. A name is given to one program on an interface, and begins with "wayout-".
type Ingress interface {
	// SetIngress puts a program, by its descriptor, in the place of the one of that
	// name by one atomic step, else before others. The error wraps unix.ENODEV where
	// there is no such interface.
	SetIngress(index int, name string, prog int) error

	// UnsetIngress takes it off. That it is not there is no error.
	UnsetIngress(index int, name string) error

	// Ingresses lists the interfaces that have it.
	Ingresses(name string) ([]int, error)
}

// CleanIngress takes the programs of a name off all interfaces.
func CleanIngress(in Ingress, name string) error {
	if in == nil {
		return nil
	}
	indexes, err := in.Ingresses(name)
	errs := []error{err}
	for _, index := range indexes {
		errs = append(errs, in.UnsetIngress(index, name))
	}
	return errors.Join(errs...)
}

// attachTCX puts a program before others of its kind, whose verdict may be the last.
// The error wraps ErrNoTCX where it is the kernel's age.
func attachTCX(index int, prog *ebpf.Program) (link.Link, error) {
	if !withTCX {
		return nil, noTCX(ebpf.ErrNotSupported)
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return nil, noTCX(fmt.Errorf("interface %d: %w", index, plain(err)))
	}
	return l, nil
}

// noTCX tells the one error that is the kernel's age.
func noTCX(err error) error {
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	release := "unknown"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Errorf("%w (Linux %s, want 6.6): %w", ErrNoTCX, release, err)
}

// remedyIngress is what to do where a program goes on an interface in neither way.
const remedyIngress = "run Linux 6.6 or newer, or one with the modules sch_ingress and cls_bpf"

// probeIngress tries both ways.
func probeIngress(prog *ebpf.Program, tryIngress func(prog int) error) error {
	// No interface has that number; a kernel with tcx looks for it and says so.
	l, err := attachTCX(math.MaxInt32, prog)
	switch {
	case err == nil:
		return l.Close()
	case errors.Is(err, unix.ENODEV):
		return nil
	case errors.Is(err, ErrNoTCX) && tryIngress != nil:
		if other := tryIngress(prog.FD()); other != nil {
			return errors.Join(err, other)
		}
		return nil
	}
	return err
}
