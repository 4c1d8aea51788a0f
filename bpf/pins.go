package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// ErrNotBPFFS says that a pin directory is on no bpf file system.
var ErrNotBPFFS = errors.New("not on a bpf file system")

// Names of the pinned tables; those of the links are the hooks'.
const (
	pinGuards = "guards"
	pinSlots  = "counters"
)

// pinner is a link or a map.
type pinner interface{ Pin(string) error }

// pin pins under a name in PinDir, in place of what is there: the last step is
// one rename. The bpf file system has no names with a dot.
func (p *Programs) pin(name string, o pinner) error {
	if p.o.PinDir == "" {
		return nil
	}
	return pinAt(p.o.PinDir, name, o)
}

func pinAt(dir, name string, o pinner) error {
	at := filepath.Join(dir, name)
	tmp := at + "-new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	if err := o.Pin(tmp); err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	if err := os.Rename(tmp, at); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", name, err), os.Remove(tmp))
	}
	return nil
}

func (p *Programs) pinTables() error {
	return errors.Join(p.pin(pinGuards, p.t.Guards), p.pin(pinSlots, p.t.Slots))
}

// unpin removes pins by name; one that is not there is no error.
func (p *Programs) unpin(names ...string) error {
	if p.o.PinDir == "" {
		return nil
	}
	return unpin(p.o.PinDir, names...)
}

func unpin(dir string, names ...string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("unpin: %w", err))
		}
	}
	return errors.Join(errs...)
}

// removePins removes every pin of ours and the directory.
func (p *Programs) removePins() error {
	if p.o.PinDir == "" {
		return nil
	}
	return removePins(p.o.PinDir)
}

func removePins(dir string) error {
	var errs []error
	for _, name := range pinNames() {
		errs = append(errs, unpin(dir, name, name+"-new"))
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove the directory of pins: %w", err))
	}
	return errors.Join(errs...)
}

func pinNames() []string {
	names := []string{pinGuards, pinSlots}
	for _, h := range (&tables{}).hooks() {
		names = append(names, h.name)
	}
	return names
}

// openPinned makes PinDir ready and opens the tables that an earlier run left
// there. There may be none, or some of another version or mark layout, whose
// numbers mean nothing to us: then it returns nil.
func openPinned(o Options) (*tables, error) {
	if o.PinDir == "" {
		return nil, nil
	}
	if err := onBPFFS(filepath.Dir(o.PinDir)); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := onBPFFS(filepath.Dir(filepath.Dir(o.PinDir))); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(o.PinDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of pins: %w", err)
	}
	t, err := adoptTables(filepath.Join(o.PinDir, pinGuards), filepath.Join(o.PinDir, pinSlots), o.Layout)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errOtherTables) {
		return nil, nil
	}
	if err != nil {
		return nil, plain(err)
	}
	return t, nil
}

// PinnedNumbers reads, and changes nothing, which path numbers are in force in
// the tables that an earlier run left pinned in a directory: what Inherited
// will say after Load, for who takes numbers before. Without pins, or with those
// of another mark layout, there are none.
func PinnedNumbers(dir string, l Layout) ([]uint32, error) {
	t, err := adoptTables(filepath.Join(dir, pinGuards), filepath.Join(dir, pinSlots), l)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errOtherTables) {
		return nil, nil
	}
	if err != nil {
		return nil, plain(err)
	}
	return liveNumbers(t), t.Close()
}

func onBPFFS(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("directory of pins %s: %w", dir, err)
	}
	if uint32(fs.Type) != unix.BPF_FS_MAGIC {
		return fmt.Errorf("directory of pins %s: %w", dir, ErrNotBPFFS)
	}
	return nil
}

// pinnedLink opens a pinned link and says which cgroup it is attached to; 0
// when that cgroup is gone. Where nothing is pinned the link is nil.
func (p *Programs) pinnedLink(name string) (link.Link, uint64, error) {
	if p.o.PinDir == "" {
		return nil, 0, nil
	}
	return pinnedLink(filepath.Join(p.o.PinDir, name))
}

func pinnedLink(path string) (link.Link, uint64, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open pinned link %s: %w", path, plain(err))
	}
	info, err := l.Info()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("pinned link %s: %w", path, plain(err)), l.Close())
	}
	c := info.Cgroup()
	if c == nil {
		return nil, 0, errors.Join(fmt.Errorf("pinned link %s: %w: not of a cgroup", path, ErrCgroup), l.Close())
	}
	return l, c.CgroupId, nil
}

// Clean removes what a daemon that was killed left behind: the pins in dir,
// with which the programs are detached, and the leaf cgroup that they were
// attached to when no process is in it. When a process is in it the daemon
// lives: nothing is touched and the error wraps ErrLeafBusy. Where there are no
// pins nothing is done.
func Clean(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	leaf, err := pinnedLeaf(dir)
	if err != nil {
		return err
	}
	if leaf != "" {
		pids, err := processes(leaf)
		if err != nil {
			return err
		}
		if len(pids) > 0 {
			return fmt.Errorf("%w: process %d in %s", ErrLeafBusy, pids[0], leaf)
		}
	}
	if err := removePins(dir); err != nil {
		return err
	}
	if leaf == "" {
		return nil
	}
	if err := os.Remove(leaf); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

// pinnedLeaf is the cgroup that the pinned programs are attached to, or "".
func pinnedLeaf(dir string) (string, error) {
	for _, h := range (&tables{}).hooks() {
		l, id, err := pinnedLink(filepath.Join(dir, h.name))
		if err != nil {
			return "", err
		}
		if l == nil {
			continue
		}
		if err := l.Close(); err != nil {
			return "", fmt.Errorf("close link: %w", err)
		}
		if id != 0 {
			return findCgroup(id)
		}
	}
	return "", nil
}
