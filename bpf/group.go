package bpf

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// groupPrefix begins the names of cgroups that hold one command's processes.
const groupPrefix = "wayout-exec-"

// Group is a cgroup made for the processes of one command.
type Group struct {
	path string
	dir  *os.File
}

// MakeGroup makes a cgroup below the one that this process is in, with a name
// that no other has.
func MakeGroup() (*Group, error) {
	own, err := ownCgroup()
	if err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	g := &Group{path: filepath.Join(own, groupPrefix+strings.ToLower(rand.Text()))}
	if err := os.Mkdir(g.path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup below our own (it has to be writable): %w", err)
	}
	if g.dir, err = os.Open(g.path); err != nil {
		return nil, errors.Join(fmt.Errorf("open cgroup: %w", err), os.Remove(g.path))
	}
	return g, nil
}

// Path is the cgroup's directory.
func (g *Group) Path() string { return g.path }

// Name is the last part of Path.
func (g *Group) Name() string { return filepath.Base(g.path) }

// FD is a descriptor of the directory, to start a process in it.
func (g *Group) FD() int { return int(g.dir.Fd()) }

// End kills what is left in the cgroup and in those below it, waits until it is
// gone and removes them all. It needs Linux 5.14.
func (g *Group) End(ctx context.Context) error {
	return errors.Join(EndGroup(ctx, g.path), g.dir.Close())
}

// EndGroup is Group.End for the cgroup of another process.
func EndGroup(ctx context.Context, path string) error {
	if !strings.HasPrefix(filepath.Base(path), groupPrefix) {
		return fmt.Errorf("end cgroup %s: %w: not one that was made for a command", path, ErrCgroup)
	}
	if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil {
		if errors.Is(err, os.ErrNotExist) && gone(path) {
			return nil
		}
		return fmt.Errorf("end the processes of cgroup %s: %w", path, err)
	}
	if err := awaitEmpty(ctx, path); err != nil {
		return err
	}
	return removeTree(path)
}

func gone(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, os.ErrNotExist)
}

// Populated says whether a process is in a cgroup or below it; false for one
// that is not there.
func Populated(path string) (bool, error) {
	text, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("events of cgroup %s: %w", path, err)
	}
	return populated(string(text)), nil
}

// populated reads cgroup.events (cgroups(7)).
func populated(text string) bool {
	return slices.Contains(strings.Split(text, "\n"), "populated 1")
}

// awaitEmpty waits until no process is left. The kernel tells of each change by
// POLLPRI.
func awaitEmpty(ctx context.Context, path string) error {
	f, err := os.Open(filepath.Join(path, "cgroup.events"))
	if err != nil {
		return fmt.Errorf("events of cgroup %s: %w", path, err)
	}
	defer f.Close()
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("wait for cgroup %s: %w", path, os.NewSyscallError("eventfd", err))
	}
	defer unix.Close(wake)
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-told // it writes to what is about to be closed
		}
	}()
	b := make([]byte, 4096)
	for {
		n, err := f.ReadAt(b, 0)
		if n == 0 {
			return fmt.Errorf("events of cgroup %s: %w", path, err)
		}
		if !populated(string(b[:n])) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("processes are left in cgroup %s: %w", path, err)
		}
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for cgroup %s: %w", path, os.NewSyscallError("poll", err))
		}
	}
}

// removeTree removes a cgroup and all below it, the innermost first.
func removeTree(path string) error {
	children, err := os.ReadDir(path)
	if err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	for _, c := range children {
		if c.IsDir() {
			if err := removeTree(filepath.Join(path, c.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

// CgroupID is what the kernel calls the cgroup of a directory, 0 when there is
// none.
func CgroupID(dir string) (uint64, error) {
	id, err := cgroupID(dir)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	return id, err
}

// CgroupTree lists what the kernel calls a cgroup and all below it; nothing for
// one that is not there.
func CgroupTree(dir string) ([]uint64, error) {
	id, err := CgroupID(dir)
	if id == 0 || err != nil {
		return nil, err
	}
	all := []uint64{id}
	children, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cgroup %s: %w", dir, err)
	}
	for _, c := range children {
		if c.IsDir() {
			below, err := CgroupTree(filepath.Join(dir, c.Name()))
			if err != nil {
				return nil, err
			}
			all = append(all, below...)
		}
	}
	return all, nil
}
