package bpf

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotMounted says that a file system that is needed is not mounted here.
var ErrNotMounted = errors.New("not mounted")

// mount is one line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	root  string // the directory of the file system that is mounted
	point string // where
	fs    string // type
}

// mounts lists the mounts that this process sees, oldest first.
func mounts() ([]mount, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMounts(string(text)), nil
}

// parseMounts leaves out lines that are not of the form.
func parseMounts(text string) []mount {
	var all []mount
	for line := range strings.Lines(text) {
		// ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		if !ok {
			continue
		}
		b, a := strings.Fields(before), strings.Fields(after)
		if len(b) < 6 || len(a) < 1 {
			continue
		}
		all = append(all, mount{root: unescape(b[3]), point: unescape(b[4]), fs: a[0]})
	}
	return all
}

// unescape turns \040 and its like (space, tab, newline, backslash) back.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if c, ok := octal(s[i:]); ok {
			b.WriteByte(c)
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func octal(s string) (byte, bool) {
	if len(s) < 4 || s[0] != '\\' {
		return 0, false
	}
	v := 0
	for _, d := range []byte(s[1:4]) {
		if d < '0' || d > '7' {
			return 0, false
		}
		v = v*8 + int(d-'0')
	}
	return byte(v), v < 256
}

// lastOf is the newest mount of a type: what lies on top.
func lastOf(all []mount, fs string) (mount, bool) {
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].fs == fs {
			return all[i], true
		}
	}
	return mount{}, false
}

// BPFFS finds where the BPF file system is mounted, which pins live in. With
// create it is mounted at /sys/fs/bpf when it is nowhere, as systemd does, and
// stays. Otherwise the error wraps ErrNotMounted.
func BPFFS(create bool) (string, error) {
	all, err := mounts()
	if err != nil {
		return "", err
	}
	if m, ok := lastOf(all, "bpf"); ok {
		return m.point, nil
	}
	const point = "/sys/fs/bpf"
	if !create {
		return "", fmt.Errorf("bpf file system: %w: mount -t bpf bpf %s", ErrNotMounted, point)
	}
	if err := unix.Mount("bpf", point, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil {
		return "", fmt.Errorf("mount the bpf file system at %s: %w", point, err)
	}
	return point, nil
}
