package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Feature is one thing that counters and guard need of the host.
type Feature struct {
	Name   string
	OK     bool
	Err    error  // why not, or why it cannot be known; nil when OK
	Since  string // kernel that brought it
	Need   string // what does not work without it
	Remedy string // what to do about it
}

// What Feature.Need says.
const (
	NeedAll   = "accounting and guard"
	NeedStart = "a guard that holds while the daemon restarts"
	NeedSpeed = "counting at the price that the documentation names"
	NeedPin   = "wayout exec and pin"
)

// errNoRights stands for probes that cannot be made.
var errNoRights = errors.New("cannot be tried without the right to use bpf()")

// Probe tries what Load and Pin need and changes nothing: among it the whole, the
// programs themselves, given to the kernel's verifier.
func Probe() []Feature {
	all := []Feature{
		probeCgroup2(),
		probeLeaf(),
		probeRights(),
	}
	trial := probeKernel
	if !all[len(all)-1].OK {
		trial = func(*tables) error { return errNoRights }
	}
	all = append(all, probeFeatures(trial)...)
	return append(all, probeBPFFS(), probeJIT())
}

// feature completes a Feature by what its probe found.
func feature(f Feature, err error) Feature {
	f.OK, f.Err = err == nil, err
	return f
}

// withRights completes a Feature by a probe that needs bpf().
func (f Feature) withRights(probe func() error) Feature {
	missing, err := missingRights()
	switch {
	case err != nil:
		return feature(f, err)
	case len(missing) > 0:
		return feature(f, errNoRights)
	}
	return feature(f, probe())
}

func probeCgroup2() Feature {
	_, err := FindCgroup2()
	return feature(Feature{
		Name: "cgroup v2 mounted", Since: "4.5", Need: NeedAll,
		Remedy: "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd.unified_cgroup_hierarchy=1",
	}, err)
}

func probeLeaf() Feature {
	own, err := ownCgroup()
	if err == nil {
		if err = unix.Access(own, unix.W_OK); err != nil {
			err = fmt.Errorf("write to %s: %w", own, err)
		}
	}
	return feature(Feature{
		Name: "a cgroup of our own can be made", Since: "4.5", Need: NeedAll,
		Remedy: "run as root, or set Delegate=yes in the unit; in a container mount cgroup v2 writable",
	}, err)
}

func probeRights() Feature {
	missing, err := missingRights()
	if err == nil && len(missing) == 0 {
		err = plain(features.HaveMapType(ebpf.Array))
	} else if err == nil {
		err = plain(unix.EPERM)
	}
	return feature(Feature{
		Name: "right to use bpf()", Since: "5.8", Need: NeedAll,
		Remedy: "run as root, or give the unit AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON",
	}, err)
}

// probeKernel loads the programs without attaching them.
func probeKernel(t *tables) error {
	l, err := NewLayout(DefaultMask)
	if err != nil {
		return err
	}
	loaded, err := loadTables(l, 1, false)
	if err != nil {
		return err
	}
	*t = *loaded
	return nil
}

func probeFeatures(trial func(*tables) error) []Feature {
	var t tables
	loaded := trial(&t)
	defer t.Close()
	all := []Feature{}
	for _, f := range []struct {
		name, since, need string
		probe             func() error
	}{
		{"programs on a cgroup's packets", "4.10", NeedAll, func() error { return features.HaveProgramType(ebpf.CGroupSKB) }},
		{"the socket's mark in them", "5.1", NeedAll, func() error {
			return features.HaveProgramHelper(ebpf.CGroupSKB, asm.FnSkFullsock)
		}},
		{"programs on a cgroup's connects", "4.17", NeedAll, func() error { return features.HaveProgramType(ebpf.CGroupSockAddr) }},
		{"programs on TCP events", "5.3", NeedAll, func() error { return features.HaveProgramType(ebpf.SockOps) }},
		{"counters read without system calls", "5.5", NeedAll, func() error { return features.HaveMapFlag(features.BPF_F_MMAPABLE) }},
		{"links of programs to cgroups", "5.7", NeedStart, func() error {
			if loaded != nil {
				return errors.New("cannot be tried without the programs")
			}
			return probeLink(t.Egress)
		}},
		{"wayout's programs", "5.15", NeedAll, func() error { return loaded }},
		{"wayout's programs that pin processes", "5.15", NeedPin, func() error {
			if loaded != nil {
				return errors.New("cannot be tried without the others")
			}
			return probePin(&t)
		}},
	} {
		err, remedy := loaded, "get the right to use bpf() first"
		if !errors.Is(loaded, errNoRights) {
			err, remedy = plain(f.probe()), "run a newer kernel"
		}
		all = append(all, feature(Feature{Name: f.name, Since: f.since, Need: f.need, Remedy: remedy}, err))
	}
	return all
}

// probePin loads a pin's programs without attaching them.
func probePin(t *tables) error {
	o, err := loadExit(t, Exit{}, nil)
	if err != nil {
		return err
	}
	return o.Close()
}

// probeLink asks for a link to what is no cgroup: a kernel that knows such
// links says that the descriptor is bad.
func probeLink(prog *ebpf.Program) error {
	dir, err := os.Open("/")
	if err != nil {
		return fmt.Errorf("probe links: %w", err)
	}
	defer dir.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInetEgress})
	if err == nil {
		return l.Close()
	}
	if errors.Is(err, unix.EBADF) {
		return nil
	}
	return err
}

func probeBPFFS() Feature {
	_, err := BPFFS(false)
	return feature(Feature{
		Name: "bpf file system mounted", Since: "4.4", Need: NeedStart,
		Remedy: "mount -t bpf bpf /sys/fs/bpf (serve does it, given the right to)",
	}, err)
}

func probeJIT() Feature {
	const name = "/proc/sys/net/core/bpf_jit_enable"
	text, err := os.ReadFile(name)
	switch {
	case errors.Is(err, os.ErrNotExist): // not of this namespace, or compiled in for good
		err = nil
	case err == nil && len(text) > 0 && text[0] == '0':
		err = fmt.Errorf("%s is 0", name)
	}
	return feature(Feature{
		Name: "eBPF compiler in the kernel", Since: "4.1", Need: NeedSpeed,
		Remedy: "sysctl net.core.bpf_jit_enable=1",
	}, err)
}
