package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// MaxDivertEntries is how many entries a Diversion may have (divert.c).
const MaxDivertEntries = 128

// AnyPort is the last port of an entry without ports, whose first is 0.
const AnyPort = 1<<16 - 1

// NeedDivert is what a Diverter is for, as Feature.Need.
const NeedDivert = "servers of type tproxy, and prefixes in listen"

// DivertEntry is one thing that is taken. Of two that match a packet the first
// one decides.
type DivertEntry struct {
	// Interface is the index of the one that packets come in by, for any address
	// but the host's own. 0: packets from anywhere for the addresses of Prefix.
	Interface uint32
	Prefix    netip.Prefix

	// Absent stands for an interface that is not there yet: packets for any address
	// but the host's own are dropped, whatever they come in by.
	Absent bool

	Protocol    uint8  // unix.IPPROTO_TCP or IPPROTO_UDP
	First, Last uint16 // ports, both included; 0 and AnyPort: none in particular
	Server      int    // whose sockets take it, a position in Diversion.Sockets
}

// Socket lends its descriptor, as a syscall.RawConn does.
type Socket interface {
	Control(f func(fd uintptr)) error
}

// DivertSockets are the sockets of a server: listeners of TCP, and unconnected
// sockets of UDP, with IP_TRANSPARENT. Where one is nil, what is for it is
// dropped.
type DivertSockets struct{ TCP4, TCP6, UDP4, UDP6 Socket }

// Diversion is all that a Diverter does.
type Diversion struct {
	Entries []DivertEntry
	Sockets []DivertSockets
}

// Diverter hands to sockets of ours what the kernel delivers on this host for
// others (see netcfg), and drops the fragments that its rules cannot see the
// ports of. It needs Linux 6.6.
//
// Its programs are pinned, and hold when the process ends, however it does:
// then there are no sockets, and what is theirs is dropped. The next Diverter of
// the same directory takes them over, each by one atomic update.
//
// All methods may be called concurrently, but Set has to be called in the
// network namespace that NewDiverter was called in.
type Diverter struct {
	mu     sync.Mutex
	dir    string
	ns     *os.File
	objs   *divertObjects // nil before the first Set
	lookup link.Link
	edges  map[uint32]link.Link // by interface index
	own    map[netip.Prefix]bool
	closed bool
}

// Names of the pins.
const (
	pinDivert    = "divert"
	pinFragments = "fragments-" // and an interface's index
)

// NewDiverter opens what an earlier run has left pinned in a directory, which is
// made when it is not there, in a bpf file system. What is pinned stays as it is
// until Set. Nothing else may use the directory.
func NewDiverter(dir string) (_ *Diverter, err error) {
	d := &Diverter{dir: dir, edges: map[uint32]link.Link{}, own: map[netip.Prefix]bool{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of pins: %w", err)
	}
	if err := onBPFFS(dir); err != nil {
		return nil, err
	}
	names, err := divertPins(dir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := d.adopt(name); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// divertPins lists the pins in a directory; none when it is not there.
func divertPins(dir string) ([]string, error) {
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list the pins: %w", err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names, nil
}

// adopt takes over a pinned link, if it is attached to this network namespace,
// or to an interface that is there (the lookup's link, which comes first, says of
// which namespace those are). Else it is of no use, and removed.
func (d *Diverter) adopt(name string) error {
	path := filepath.Join(d.dir, name)
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", path, plain(err))
	}
	info, err := l.Info()
	if err != nil {
		return errors.Join(fmt.Errorf("pinned link %s: %w", path, plain(err)), l.Close())
	}
	if name == pinDivert {
		if n := info.NetNs(); n != nil && d.is(uint64(n.NetnsInode)) {
			d.lookup = l
			return nil
		}
	} else if text, ok := strings.CutPrefix(name, pinFragments); ok {
		index, err := strconv.ParseUint(text, 10, 32)
		if t := info.TCX(); err == nil && t != nil && uint64(t.Ifindex) == index && d.lookup != nil {
			d.edges[uint32(index)] = l
			return nil
		}
	}
	return errors.Join(l.Close(), unpin(d.dir, name))
}

// is says whether an inode is that of our network namespace.
func (d *Diverter) is(ino uint64) bool {
	var st unix.Stat_t
	return unix.Fstat(int(d.ns.Fd()), &st) == nil && st.Ino == ino
}

// Set puts a Diversion in the place of the one before: for each connection or
// datagram there is one of the two, never neither. Interfaces that have gone
// meanwhile are left out. With an error before the last step the old one stays
// in force; an interface on which no fragments can be dropped is an error too.
func (d *Diverter) Set(v Diversion) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("divert: %w", os.ErrClosed)
	}
	objs, err := loadDiversion(v)
	if err != nil {
		return err
	}
	if err := putOwn(objs, nil, d.own); err != nil {
		return errors.Join(err, objs.Close())
	}
	if err := d.install(objs); err != nil {
		return errors.Join(err, objs.Close())
	}
	old := d.objs
	d.objs = objs
	err = d.watch(v.Entries)
	if old != nil {
		err = errors.Join(err, old.Close())
	}
	return err
}

// loadDiversion loads the programs with their entries and sockets.
func loadDiversion(v Diversion) (_ *divertObjects, err error) {
	if len(v.Entries) > MaxDivertEntries {
		return nil, fmt.Errorf("divert: %d entries, at most %d are possible", len(v.Entries), MaxDivertEntries)
	}
	spec, err := loadDivert()
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	var entries [MaxDivertEntries]divertEntry
	for i, e := range v.Entries {
		if e.Server < 0 || e.Server >= len(v.Sockets) {
			return nil, fmt.Errorf("divert: entry %d is for server %d of %d", i, e.Server, len(v.Sockets))
		}
		entries[i] = e.encode()
	}
	if err := spec.Variables[divertVarEntries].Set(entries); err != nil {
		return nil, fmt.Errorf("set %s: %w", divertVarEntries, err)
	}
	if err := spec.Variables[divertVarCount].Set(uint32(len(v.Entries))); err != nil {
		return nil, fmt.Errorf("set %s: %w", divertVarCount, err)
	}
	spec.Maps[divertMapSockets].MaxEntries = uint32(max(1, socketsOf*len(v.Sockets)))
	objs := &divertObjects{}
	if err := spec.LoadAndAssign(objs, nil); err != nil {
		return nil, tooOldToDivert(fmt.Errorf("load the diverting programs: %w", plain(err)))
	}
	for i, s := range v.Sockets {
		for j, one := range [socketsOf]Socket{s.TCP4, s.TCP6, s.UDP4, s.UDP6} {
			if one == nil {
				continue
			}
			if err := putSocket(objs.Sockets, uint32(socketsOf*i+j), one); err != nil {
				return nil, errors.Join(err, objs.Close())
			}
		}
	}
	return objs, nil
}

// socketsOf is how many sockets a server may have, and noSocket is where none is.
const (
	socketsOf = 4
	noSocket  = 1 << 31
)

func putSocket(m *ebpf.Map, at uint32, s Socket) error {
	var err error
	ctl := s.Control(func(fd uintptr) { err = m.Put(at, uint64(fd)) })
	if err = errors.Join(ctl, err); err != nil {
		return fmt.Errorf("divert to a socket: %w", plain(err))
	}
	return nil
}

func (e DivertEntry) encode() divertEntry {
	out := divertEntry{
		Ifindex: e.Interface, Socket: uint32(socketsOf * e.Server),
		First: e.First, Last: e.Last, Protocol: e.Protocol,
	}
	switch {
	case e.Interface != 0:
		out.Others = 1
	case e.Absent: // matches all addresses
		out.Others, out.Socket = 1, noSocket
	default:
		p := mapped(e.Prefix)
		out.Addr = words(p.Masked().Addr().As16())
		var mask [16]byte
		ones(mask[:], p.Bits())
		out.Mask = words(mask)
	}
	return out
}

// mapped is a prefix as IPv6, with IPv4 in ::ffff:0:0/96.
func mapped(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4() {
		return netip.PrefixFrom(netip.AddrFrom16(p.Addr().As16()), 96+p.Bits())
	}
	return p
}

func words(b [16]byte) (w [4]uint32) {
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

// tooOldToDivert tells the one error that is the kernel's age.
func tooOldToDivert(err error) error {
	if errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("%w: diverting needs Linux 6.6: %w", ErrNoTCX, err)
	}
	return err
}

// install puts the lookup's program in force.
func (d *Diverter) install(objs *divertObjects) error {
	if d.lookup != nil {
		if err := d.lookup.Update(objs.Divert); err != nil {
			return fmt.Errorf("replace the diverting program: %w", plain(err))
		}
		return nil
	}
	l, err := link.AttachNetNs(int(d.ns.Fd()), objs.Divert)
	if err != nil {
		return tooOldToDivert(fmt.Errorf("attach the diverting program: %w", plain(err)))
	}
	if err := pinAt(d.dir, pinDivert, l); err != nil {
		return errors.Join(err, l.Close())
	}
	d.lookup = l
	return nil
}

// watch puts the program for fragments on the interfaces of entries, and takes
// it off others.
func (d *Diverter) watch(entries []DivertEntry) error {
	want := map[uint32]bool{}
	var errs []error
	for _, e := range entries {
		if e.Interface == 0 || want[e.Interface] {
			continue
		}
		want[e.Interface] = true
		if err := d.watchOn(e.Interface); err != nil {
			errs = append(errs, err)
		}
	}
	for index, l := range maps.Clone(d.edges) {
		if !want[index] {
			delete(d.edges, index)
			errs = append(errs, unpin(d.dir, edgePin(index)), l.Close())
		}
	}
	return errors.Join(errs...)
}

func edgePin(index uint32) string { return pinFragments + strconv.FormatUint(uint64(index), 10) }

func (d *Diverter) watchOn(index uint32) error {
	name := edgePin(index)
	if l := d.edges[index]; l != nil {
		err := l.Update(d.objs.Fragments)
		if err == nil {
			return nil
		}
		delete(d.edges, index)
		if !errors.Is(err, unix.ENOLINK) { // its interface has gone
			return errors.Join(fmt.Errorf("replace the program for fragments: %w", plain(err)), l.Close())
		}
		if err := errors.Join(unpin(d.dir, name), l.Close()); err != nil {
			return err
		}
	}
	l, err := attachFragments(index, d.objs.Fragments)
	if errors.Is(err, unix.ENODEV) {
		return nil // nothing comes in by it either
	}
	if err != nil {
		return err
	}
	if err := pinAt(d.dir, name, l); err != nil {
		return errors.Join(err, l.Close())
	}
	d.edges[index] = l
	return nil
}

// attachFragments puts the program before others of its kind, whose verdict may be
// the last.
func attachFragments(index uint32, prog *ebpf.Program) (link.Link, error) {
	l, err := link.AttachTCX(link.TCXOptions{Interface: int(index), Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return nil, tooOldToDivert(fmt.Errorf("attach the program for fragments to interface %d: %w", index, plain(err)))
	}
	return l, nil
}

// SetOwn says which addresses are the host's own: what comes in for them is left
// alone. Prefixes with false take a part out of a shorter one.
func (d *Diverter) SetOwn(own map[netip.Prefix]bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.objs != nil {
		if err := putOwn(d.objs, d.own, own); err != nil {
			return err
		}
	}
	d.own = maps.Clone(own)
	return nil
}

// putOwn turns one set of addresses into another.
func putOwn(objs *divertObjects, from, to map[netip.Prefix]bool) error {
	for p, yes := range to {
		if was, there := from[p]; there && was == yes {
			continue
		}
		if err := objs.Own.Put(netKey(p), boolValue(yes)); err != nil {
			return fmt.Errorf("divert nothing for %s: %w", p, plain(err))
		}
	}
	for p := range from {
		if _, there := to[p]; there {
			continue
		}
		if err := objs.Own.Delete(netKey(p)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("divert what is for %s: %w", p, plain(err))
		}
	}
	return nil
}

func netKey(p netip.Prefix) *divertNet {
	p = mapped(p)
	return &divertNet{Bits: uint32(p.Bits()), Addr: words(p.Addr().As16())}
}

// Close lets go of everything but what is pinned, which goes on dropping.
func (d *Diverter) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	var errs []error
	if d.lookup != nil {
		errs = append(errs, d.lookup.Close())
	}
	for _, index := range slices.Sorted(maps.Keys(d.edges)) {
		errs = append(errs, d.edges[index].Close())
	}
	if d.objs != nil {
		errs = append(errs, d.objs.Close())
	}
	if d.ns != nil {
		errs = append(errs, d.ns.Close())
	}
	return errors.Join(errs...)
}

// Diverts says whether anything is pinned in a Diverter's directory.
func Diverts(dir string) (bool, error) {
	names, err := divertPins(dir)
	return len(names) > 0, err
}

// CleanDivert ends what a Diverter has pinned in a directory, and removes that.
// The rules that lead packets here have to be gone before.
func CleanDivert(dir string) error {
	names, err := divertPins(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, detachPinned(filepath.Join(dir, name)))
	}
	err = errors.Join(append(errs, unpin(dir, names...))...)
	if rm := os.Remove(dir); rm != nil && !errors.Is(rm, os.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("remove the directory of pins: %w", rm))
	}
	return err
}

// detachPinned detaches a program at once. The end of its last pin would do so
// some time later.
func detachPinned(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", path, plain(err))
	}
	if err = l.Detach(); errors.Is(err, unix.ENOLINK) { // with its interface or namespace
		err = nil
	}
	return errors.Join(err, l.Close())
}

// ProbeDivert tries what a Diverter needs of the kernel and changes nothing.
func ProbeDivert() Feature {
	f := Feature{
		Name: "diverted traffic", Since: "6.6", Need: NeedDivert,
		Remedy: "run a newer kernel",
	}
	missing, err := missingRights()
	if err == nil && len(missing) > 0 {
		return feature(f, errNoRights)
	}
	if err != nil {
		return feature(f, err)
	}
	objs, err := loadDiversion(Diversion{})
	if err != nil {
		return feature(f, err)
	}
	defer objs.Close()
	// Older kernels take the programs and cannot attach that for fragments. No
	// interface has that number; a kernel with tcx looks for it and says so.
	l, err := attachFragments(math.MaxInt32, objs.Fragments)
	if err == nil {
		return feature(f, l.Close())
	}
	if errors.Is(err, unix.ENODEV) {
		err = nil
	}
	return feature(f, err)
}
