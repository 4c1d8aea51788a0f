package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// MaxDivertEntries is how many entries a Diversion may have (divert.c): those of two
// configurations, of which one takes the other's place, and of what rules lead here
// besides.
const MaxDivertEntries = 384

// ErrInterfaceUnknown says that the kernel does not tell the programs by which interface
// a connection comes in (before 5.17), where that makes a difference.
var ErrInterfaceUnknown = errors.New("the kernel does not say by which interface a connection comes in (Linux 5.17)")

// AnyPort is the last port of an entry without ports, whose first is 0.
const AnyPort = 1<<16 - 1

// What a Diverter is for, as Feature.Need.
const (
	NeedDivert    = "servers of type tproxy, and prefixes in listen"
	NeedFragments = "servers of type tproxy"
)

// DivertEntry is one thing that is taken. Of two that match a packet the first
// one decides; those of an interface go before those of a Prefix.
type DivertEntry struct {
	// Interface is the index of the one that packets come in by, for any address
	// but the host's own. 0: packets from anywhere for the addresses of Prefix.
	//
	// What comes in for others by an interface that SetLinks does not know is dropped,
	// where an entry of any interface has its port.
	Interface uint32
	Prefix    netip.Prefix

	// Absent stands for an interface that is not there yet.
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

	// Mark and Mask of the sockets that answer clients: ICMP errors about answers get
	// it as well, for a rule to lead them here.
	Mark, Mask uint32
}

// Diverter hands to sockets of ours what the kernel delivers on this host for
// others (see netcfg), and drops the fragments that its rules cannot see the
// ports of. The latter takes a link to the interface (tcx, Linux 6.6), or an Ingress.
//
// Its programs are pinned, or an Ingress keeps them, and hold when the process ends,
// however it does: then there are no sockets, and what is theirs is dropped. The next
// Diverter of the same directory takes them over, each by one atomic update.
//
// All methods may be called concurrently, but Set has to be called in the
// network namespace that NewDiverter was called in.
type Diverter struct {
	mu      sync.Mutex
	dir     string
	in      Ingress
	ns      *os.File
	objs    *divertObjects // nil before the first Set
	lookup  link.Link
	edges   map[uint32]link.Link // by interface index
	filters map[uint32]bool      // interfaces that have one by in
	own     map[netip.Prefix]bool
	links   map[uint32]bool
	drops   *ebpf.Map // what the programs count, one set of them after the other; nil before the first Set
	closed  bool
}

// Names of the pins.
const (
	pinDivert    = "divert"
	pinFragments = "fragments-" // and an interface's index
)

// NewDiverter opens what an earlier run has left pinned in a directory, which is
// made when it is not there, in a bpf file system. What is pinned stays as it is
// until Set. Nothing else may use the directory, whose last element is unique to the
// daemon on its host: programs in the Ingress are known by it. The Ingress is of the
// network namespace of the calling thread; without one, nil, only links will do.
func NewDiverter(dir string, in Ingress) (_ *Diverter, err error) {
	d := &Diverter{dir: dir, in: in, edges: map[uint32]link.Link{}, filters: map[uint32]bool{}, own: map[netip.Prefix]bool{}, links: map[uint32]bool{}}
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
	if in == nil {
		return d, nil
	}
	indexes, err := in.Ingresses(divertFilter(dir))
	if err != nil {
		return nil, err
	}
	for _, index := range indexes {
		d.filters[uint32(index)] = true
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
	if strings.HasPrefix(name, pinDrops) {
		return d.adoptDrops(name)
	}
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
	if err := d.count(v.Entries); err != nil {
		return err
	}
	objs, err := loadCounting(v, d.drops)
	if err != nil {
		return err
	}
	if err := errors.Join(putOwn(objs, nil, d.own), putLinks(objs, nil, d.links)); err != nil {
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
	return errors.Join(err, d.countOnly(v.Entries))
}

// loadDiversion loads the programs with their entries and sockets.
func loadDiversion(v Diversion) (*divertObjects, error) { return loadCounting(v, nil) }

// loadCounting is loadDiversion with the map to count in; nil: one of their own.
func loadCounting(v Diversion, drops *ebpf.Map) (_ *divertObjects, err error) {
	if len(v.Entries) > MaxDivertEntries {
		return nil, fmt.Errorf("divert: %d entries, at most %d are possible", len(v.Entries), MaxDivertEntries)
	}
	var entries [MaxDivertEntries]divertEntry
	for i, e := range v.Entries {
		if e.Server < 0 || e.Server >= len(v.Sockets) {
			return nil, fmt.Errorf("divert: entry %d is for server %d of %d", i, e.Server, len(v.Sockets))
		}
		entries[i] = e.encode()
	}
	byInterface := tellsInterface()
	if !byInterface {
		if err := v.oneServerEach(); err != nil {
			return nil, err
		}
	}
	objs, err := loadEntries(v, entries, drops, byInterface)
	if err != nil {
		return nil, err
	}
	var any Socket
	for i, s := range v.Sockets {
		for j, one := range [socketsOf]Socket{s.TCP4, s.TCP6, s.UDP4, s.UDP6} {
			if one == nil {
				continue
			}
			if err := putSocket(objs.Sockets, uint32(socketsOf*i+j), one); err != nil {
				return nil, errors.Join(err, objs.Close())
			}
			any = one
		}
	}
	if any != nil {
		if err := putSocket(objs.Sockets, v.alive(), any); err != nil {
			return nil, errors.Join(err, objs.Close())
		}
	}
	return objs, nil
}

// alive is the place of a socket, whichever, that is there while somebody serves.
func (v Diversion) alive() uint32 { return uint32(socketsOf * len(v.Sockets)) }

// tellsInterface asks the kernel for a program that looks at the interface of a
// connection. An error that is no verdict says nothing of that: it comes again with the
// programs themselves.
func tellsInterface() bool {
	const ingressIfindex = 64 // of struct bpf_sk_lookup
	p, err := ebpf.NewProgramWithOptions(&ebpf.ProgramSpec{
		Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.LoadMem(asm.R0, asm.R1, ingressIfindex, asm.Word), asm.Mov.Imm(asm.R0, 1), asm.Return()},
	}, ebpf.ProgramOptions{LogDisabled: true})
	if err != nil {
		return !errors.Is(err, unix.EACCES)
	}
	return p.Close() == nil
}

// loadEntries loads the programs; byInterface says whether they tell interfaces apart.
func loadEntries(v Diversion, entries [MaxDivertEntries]divertEntry, drops *ebpf.Map, byInterface bool) (*divertObjects, error) {
	spec, err := loadDivert()
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	for name, value := range map[string]any{
		divertVarEntries: entries, divertVarCount: uint32(len(v.Entries)), divertVarByInterface: boolValue(byInterface),
		divertVarAnswersMark: v.Mark, divertVarAnswersMask: v.Mask, divertVarAlive: v.alive(),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	spec.Maps[divertMapSockets].MaxEntries = v.alive() + 1
	objs, o := &divertObjects{}, &ebpf.CollectionOptions{}
	if drops != nil {
		o.MapReplacements = map[string]*ebpf.Map{divertMapDropped: drops}
	}
	if err := spec.LoadAndAssign(objs, o); err != nil {
		return nil, fmt.Errorf("load the diverting programs: %w", plain(err))
	}
	return objs, nil
}

// oneServerEach is an error when two servers take the same ports of different
// interfaces. The rules that lead packets here go by the interface, so that without
// looking at it nothing else is taken; but one server would get what is the other's.
func (v Diversion) oneServerEach() error {
	for i, a := range v.Entries {
		for _, b := range v.Entries[:i] {
			if a.Server != b.Server && a.Interface != b.Interface && a.Protocol == b.Protocol &&
				a.First <= b.Last && b.First <= a.Last && a.takesOthers() && b.takesOthers() {
				return fmt.Errorf("%w: port %d of two interfaces is for two servers", ErrInterfaceUnknown, max(a.First, b.First))
			}
		}
	}
	return nil
}

// takesOthers says whether it is about other addresses than the host's.
func (e DivertEntry) takesOthers() bool { return e.Interface != 0 || e.Absent }

// socketsOf is how many sockets a server may have, and noInterface an index that
// none has.
const (
	socketsOf   = 4
	noInterface = 1<<32 - 1
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
	case e.Absent:
		out.Others, out.Ifindex = 1, noInterface
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
		return fmt.Errorf("attach the diverting program: %w", plain(err))
	}
	if err := pinAt(d.dir, pinDivert, l); err != nil {
		return errors.Join(err, l.Close())
	}
	d.lookup = l
	return nil
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

// SetLinks says which interfaces are there, by their indexes. It is called after the
// Set that knows them: see DivertEntry.
func (d *Diverter) SetLinks(indexes []uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	links := make(map[uint32]bool, len(indexes))
	for _, i := range indexes {
		links[i] = true
	}
	if d.objs != nil {
		if err := putLinks(d.objs, d.links, links); err != nil {
			return err
		}
	}
	d.links = links
	return nil
}

// putLinks turns one set of interfaces into another.
func putLinks(objs *divertObjects, from, to map[uint32]bool) error {
	for i := range to {
		if from[i] {
			continue
		}
		if err := objs.Known.Put(i, uint32(1)); err != nil {
			return fmt.Errorf("know interface %d: %w", i, plain(err))
		}
	}
	for i := range from {
		if to[i] {
			continue
		}
		if err := objs.Known.Delete(i); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget interface %d: %w", i, plain(err))
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
	if d.drops != nil {
		errs = append(errs, d.drops.Close())
	}
	if d.ns != nil {
		errs = append(errs, d.ns.Close())
	}
	return errors.Join(errs...)
}

// CleanDivert ends what a Diverter has left in a directory, which it removes, and
// in the Ingress. The rules that lead packets here have to be gone before.
func CleanDivert(dir string, in Ingress) error {
	names, err := divertPins(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if strings.HasPrefix(name, pinDrops) {
			continue
		}
		errs = append(errs, detachPinned(filepath.Join(dir, name)))
	}
	errs = append(errs, CleanIngress(in, divertFilter(dir)))
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
