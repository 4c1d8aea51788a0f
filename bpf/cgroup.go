package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Sentinels of cgroups.
var (
	// ErrLeafBusy says that another process is in the leaf cgroup: another
	// daemon has the same name.
	ErrLeafBusy = errors.New("cgroup holds another process")
	// ErrCgroup says that the process' own cgroup cannot be used.
	ErrCgroup = errors.New("own cgroup cannot be used")
)

// FindCgroup2 finds where the cgroup v2 hierarchy is mounted (with cgroup v1
// beside it that is not /sys/fs/cgroup). Where there is none the error wraps
// ErrNotMounted.
func FindCgroup2() (string, error) {
	m, err := cgroup2()
	return m.point, err
}

func cgroup2() (mount, error) {
	all, err := mounts()
	if err != nil {
		return mount{}, err
	}
	m, ok := lastOf(all, "cgroup2")
	if !ok {
		return mount{}, fmt.Errorf("cgroup v2: %w: mount -t cgroup2 none /sys/fs/cgroup/unified", ErrNotMounted)
	}
	return m, nil
}

// ownCgroup is the directory of the cgroup v2 that this process is in.
func ownCgroup() (string, error) {
	m, err := cgroup2()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("read own cgroup: %w", err)
	}
	return cgroupDir(m, string(text))
}

// cgroupDir turns the text of /proc/PID/cgroup into a directory below the
// mount. The line of v2 starts with "0::"; its path is that of the hierarchy,
// of which a container may have mounted only a part.
func cgroupDir(m mount, text string) (string, error) {
	for line := range strings.Lines(text) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if !ok {
			continue
		}
		if strings.HasSuffix(path, " (deleted)") {
			return "", fmt.Errorf("%w: %q has been removed", ErrCgroup, path)
		}
		rest, ok := strings.CutPrefix(path, strings.TrimSuffix(m.root, "/"))
		if !ok || rest != "" && rest[0] != '/' || strings.HasPrefix(rest, "/..") {
			return "", fmt.Errorf("%w: %q is outside of what is mounted at %s (%q)", ErrCgroup, path, m.point, m.root)
		}
		return filepath.Join(m.point, rest), nil
	}
	return "", fmt.Errorf("%w: the process is in no cgroup of version 2", ErrCgroup)
}

// Leaf is a cgroup that holds this process and nothing else, so that the
// programs see the sockets of no other.
type Leaf struct {
	path   string
	parent string
	dir    *os.File // locked while we live
}

// MakeLeaf makes a cgroup of that name below the one this process is in, and
// moves the process there. To be called before any socket is made: a socket
// stays with the cgroup that it was made in.
//
// The name is the instance's: with the same name after a crash the leaf that
// is still there is taken over, and with it the programs that are pinned to it,
// so that they hold from the first socket on. When another process is in it the
// error wraps ErrLeafBusy. Leaves of other names are left alone.
//
// The cgroup v2 rule against processes in inner nodes does not bite: a leaf
// has no controllers enabled below it, whatever its parents have.
func MakeLeaf(name string) (*Leaf, error) {
	if name == "" || name != filepath.Base(name) || name == "." || name == ".." {
		return nil, fmt.Errorf("cgroup %q: not a name", name)
	}
	own, err := ownCgroup()
	if err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", name, err)
	}
	if filepath.Base(own) == name { // started again by a process that was in it
		return enter(&Leaf{path: own, parent: filepath.Dir(own)})
	}
	l := &Leaf{path: filepath.Join(own, name), parent: own}
	if err := os.Mkdir(l.path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make a cgroup below our own (a service needs Delegate=yes): %w", err)
	}
	return enter(l)
}

// enter moves the process into the leaf once it is known to be free.
func enter(l *Leaf) (_ *Leaf, err error) {
	l.dir, err = os.Open(l.path)
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	defer func() {
		if err != nil {
			l.dir.Close()
		}
	}()
	// Two daemons of one name that start together both find it empty.
	if err := unix.Flock(int(l.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLeafBusy
		}
		return nil, fmt.Errorf("lock cgroup %s: %w", l.path, err)
	}
	pids, err := processes(l.path)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		if pid != os.Getpid() {
			return nil, fmt.Errorf("%w: process %d in %s", ErrLeafBusy, pid, l.path)
		}
	}
	if err := join(l.path); err != nil {
		return nil, err
	}
	return l, nil
}

// Path is the leaf's directory.
func (l *Leaf) Path() string { return l.path }

// Remove moves the process back to where it was started and removes the leaf.
// That detaches whatever program is attached to it: sockets that are still open
// are then neither counted nor guarded. An error leaves the leaf for the next
// MakeLeaf of its name.
func (l *Leaf) Remove() error {
	defer l.dir.Close()
	if err := join(l.parent); err != nil {
		return err
	}
	if err := os.Remove(l.path); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

// join moves this process, with all its threads.
func join(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("move into cgroup %s: %w", dir, err)
	}
	return nil
}

func processes(dir string) ([]int, error) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("processes of cgroup %s: %w", dir, err)
	}
	var pids []int
	for _, f := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(f) // 0: of a PID namespace we do not see
		if err != nil {
			return nil, fmt.Errorf("processes of cgroup %s: %w", dir, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// cgroupID is what the kernel calls the cgroup of a directory: its inode.
func cgroupID(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("cgroup %s: %w", dir, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("cgroup %s: %w: not of version 2", dir, ErrCgroup)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, fmt.Errorf("cgroup %s: %w", dir, err)
	}
	return st.Ino, nil
}

// findCgroup looks for the cgroup with an ID; "" when there is none.
func findCgroup(id uint64) (string, error) {
	root, err := FindCgroup2()
	if err != nil {
		return "", err
	}
	var found string
	err = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) { // went while we walked
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil //nolint:nilerr // went while we walked
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Ino == id {
			found = path
			return filepath.SkipAll
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("look for cgroup %d: %w", id, err)
	}
	return found, nil
}
