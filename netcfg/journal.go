package netcfg

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// DefaultStateDir holds the lists of our addresses on kernels without IFA_PROTO.
const DefaultStateDir = "/run/wayout"

// journal is the list of the addresses that we put on interfaces, for kernels
// that cannot mark them. It is a text file, one line an event, "+" written before
// an address is added and "-" after it is removed:
//
//   - BOOT-ID NETNS INTERFACE-NUMBER INTERFACE ADDRESS
//
// A line of another boot or network namespace means nothing: the kernel state that
// it spoke of is gone. For the same reason nothing is synced to disk.
type journal struct {
	path      string
	boot, net string

	mu   sync.Mutex
	live map[journalKey]bool
	name map[journalKey]string
}

// openJournal reads what the last daemon of this Layout left. Nothing is written
// until an address is.
func openJournal(opt Options, ns *os.File) (*journal, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return nil, fmt.Errorf("identify the network namespace: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read the boot id: %w", err)
	}
	j := &journal{
		boot: strings.TrimSpace(string(boot)),
		net:  fmt.Sprintf("%d:%d", st.Dev, st.Ino),
		live: make(map[journalKey]bool),
		name: make(map[journalKey]string),
	}
	j.path = filepath.Join(opt.StateDir, fmt.Sprintf("addresses-%d-%d", opt.Layout.TableBase, st.Ino))
	b, err := os.ReadFile(j.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the list of our addresses: %w", err)
	}
	j.parse(string(b))
	return j, nil
}

// parse replays lines. A line that was cut short by a crash is skipped: the
// address it names was not added yet.
func (j *journal) parse(text string) {
	sc := bufio.NewScanner(strings.NewReader(text))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) != 6 || f[1] != j.boot || f[2] != j.net {
			continue
		}
		link, errLink := strconv.Atoi(f[3])
		addr, errAddr := netip.ParseAddr(f[5])
		if errLink != nil || errAddr != nil {
			continue
		}
		k := journalKey{link, addr}
		switch f[0] {
		case "+":
			j.live[k], j.name[k] = true, f[4]
		case "-":
			delete(j.live, k)
			delete(j.name, k)
		}
	}
}

// entries gives a copy of the list; a nil journal has none.
func (j *journal) entries() map[journalKey]bool {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return maps.Clone(j.live)
}

// add writes an address down before it is added.
func (j *journal) add(link int, ifname string, addr netip.Addr) error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	k := journalKey{link, addr}
	if j.live[k] {
		return nil
	}
	if err := j.append(j.line("+", k, ifname)); err != nil {
		return err
	}
	j.live[k], j.name[k] = true, ifname
	return nil
}

// remove strikes an address out after it was removed, and the file with the last.
func (j *journal) remove(link int, addr netip.Addr) error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	k := journalKey{link, addr}
	if !j.live[k] {
		return nil
	}
	line := j.line("-", k, j.name[k])
	delete(j.live, k)
	delete(j.name, k)
	if len(j.live) > 0 {
		return j.append(line)
	}
	if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the list of our addresses: %w", err)
	}
	return nil
}

// prune drops the entries whose address the kernel has no longer, so that one
// which somebody else adds later is not taken for ours.
func (j *journal) prune(have []Address) error {
	if j == nil {
		return nil
	}
	there := make(map[journalKey]bool, len(have))
	for _, a := range have {
		there[journalKey{a.LinkIndex, a.Addr}] = true
	}
	gone := slices.Collect(maps.Keys(j.entries()))
	var errs []error
	for _, k := range gone {
		if !there[k] {
			errs = append(errs, j.remove(k.link, k.addr))
		}
	}
	return errors.Join(errs...)
}

func (j *journal) line(verb string, k journalKey, ifname string) string {
	return fmt.Sprintf("%s %s %s %d %s %s\n", verb, j.boot, j.net, k.link, ifname, k.addr)
}

// append writes one line with one write, so that a crash leaves whole lines.
func (j *journal) append(line string) error {
	if err := os.MkdirAll(filepath.Dir(j.path), 0o755); err != nil {
		return fmt.Errorf("make the directory for the list of our addresses: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the list of our addresses: %w", err)
	}
	_, err = f.WriteString(line)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the list of our addresses: %w", err)
	}
	return nil
}
