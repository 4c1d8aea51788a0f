package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"wayout/bpf"
)

// fix is a change that is safe to make: it lasts until the next boot, and
// nothing that works stops working by it.
type fix struct {
	setting string // what is changed
	want    string
	lasting string // what to write where, to have it after the next boot
	read    func() (string, error)
	write   func() error
}

// lastingFile is where settings stand that are to last (sysctl.d(5)).
const lastingFile = "/etc/sysctl.d/90-wayout.conf"

// setSysctl is the fix of a setting, by its path below /proc/sys.
func setSysctl(path, want string) *fix {
	name := sysctlName(path)
	return &fix{
		setting: name, want: want,
		lasting: fmt.Sprintf("write `%s = %s` into %s", name, want, lastingFile),
		read: func() (string, error) {
			v := procSys.value(path)
			if v == "" {
				return "", errors.New("it cannot be read")
			}
			return v, nil
		},
		write: func() error { return os.WriteFile(filepath.Join(string(procSys), path), []byte(want), 0o644) },
	}
}

// notMounted is what is read of a file system that is not there.
const notMounted = "not mounted"

// mountBPF is the fix of a missing bpf file system.
func mountBPF() *fix {
	const point = "/sys/fs/bpf"
	return &fix{
		setting: "bpf file system", want: "mounted at " + point,
		lasting: "serve mounts it at each start; without serve, write `bpf " + point + " bpf mode=700,nosuid,nodev,noexec 0 0` into /etc/fstab",
		read: func() (string, error) {
			at, err := bpf.BPFFS(false)
			if errors.Is(err, bpf.ErrNotMounted) {
				return notMounted, nil
			}
			return "mounted at " + at, err
		},
		write: func() error {
			_, err := bpf.BPFFS(true)
			return err
		},
	}
}

// treatment is what --fix did.
type treatment struct {
	Fixed  []fixed `json:"fixed"`
	Failed []left  `json:"failed"`
	Left   []left  `json:"left"` // to be done by hand
}

// fixed is a change that was made and that reads back as made.
type fixed struct {
	Name    string `json:"name"`
	Setting string `json:"setting"`
	Old     string `json:"old"`
	New     string `json:"new"`
	Lasting string `json:"lasting"`
}

// left is what is as it was.
type left struct {
	Name   string `json:"name"`
	Error  string `json:"error,omitempty"`
	Remedy string `json:"remedy"`
}

// treat makes the fixes of findings. What has none and is a warning or worse
// is left: rules, firewalls, units and configurations are their owner's.
func treat(findings []finding) treatment {
	t := treatment{Fixed: []fixed{}, Failed: []left{}, Left: []left{}}
	for _, x := range findings {
		if x.fix == nil {
			if x.Level == levelWarning || x.Level == levelBlocker {
				t.Left = append(t.Left, left{Name: x.Name, Remedy: x.Remedy})
			}
			continue
		}
		done, err := x.fix.do()
		if err != nil {
			t.Failed = append(t.Failed, left{Name: x.Name, Error: err.Error(), Remedy: x.Remedy})
			continue
		}
		done.Name = x.Name
		t.Fixed = append(t.Fixed, done)
	}
	return t
}

// do makes the change and reads it back.
func (f *fix) do() (fixed, error) {
	old, err := f.read()
	if err != nil {
		return fixed{}, fmt.Errorf("read %s: %w", f.setting, err)
	}
	if err := f.write(); err != nil {
		return fixed{}, fmt.Errorf("set %s: %w", f.setting, err)
	}
	now, err := f.read()
	if err != nil {
		return fixed{}, fmt.Errorf("read %s back: %w", f.setting, err)
	}
	if now != f.want {
		return fixed{}, fmt.Errorf("%s was set to %q and reads %q", f.setting, f.want, now)
	}
	return fixed{Setting: f.setting, Old: old, New: now, Lasting: f.lasting}, nil
}

func (t *treatment) print(w io.Writer) {
	for _, x := range t.Fixed {
		fmt.Fprintf(w, "fixed: %s: %s, was %s; until the next boot: to make it last, %s\n", x.Setting, x.New, x.Old, x.Lasting)
	}
	for _, x := range t.Failed {
		fmt.Fprintf(w, "failed: %s: %s; by hand: %s\n", x.Name, x.Error, x.Remedy)
	}
	for _, x := range t.Left {
		fmt.Fprintf(w, "left: %s; by hand: %s\n", x.Name, x.Remedy)
	}
}
