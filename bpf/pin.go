package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Exit is by what alone the processes of a pinned cgroup leave the host: a
// path. The zero Exit is none: then they reach the host itself and nothing
// else.
type Exit struct {
	Num    uint32 // of the path, whose guard judges
	Mark   uint32 // of its sockets
	V4, V6 netip.Addr
	Device string // interface that sockets are bound to, "" for none
}

// Conns are the TCP connections of a pinned cgroup's processes; those to the
// host itself are not among them.
type Conns struct {
	Tried, Made, Failed, Closed uint64
}

// Pin is a cgroup, with all below it, whose processes leave by one path. Its
// programs are attached to that cgroup and pinned in the bpf file system:
// without us they go on as they are.
type Pin struct {
	p      *Programs
	dir    string
	cgroup uint64
	exit   Exit
	conns  *ebpf.Map
	links  map[string]link.Link
}

const (
	pinAbout  = "about"
	aboutSize = 8 << 10 // holds a cgroup's path, the name of its path and what else there is to say
)

// hooks lists a pin's programs in the order of attachment: first what drops.
func (o *pinObjects) hooks() []hook {
	return []hook{
		{"egress", ebpf.AttachCGroupInetEgress, o.Egress},
		{"sock_create", ebpf.AttachCGroupInetSockCreate, o.SockCreate},
		{"connect4", ebpf.AttachCGroupInet4Connect, o.Connect4},
		{"connect6", ebpf.AttachCGroupInet6Connect, o.Connect6},
		{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, o.Sendmsg4},
		{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, o.Sendmsg6},
		{"post_bind4", ebpf.AttachCGroupInet4PostBind, o.PostBind4},
		{"post_bind6", ebpf.AttachCGroupInet6PostBind, o.PostBind6},
		{"ingress", ebpf.AttachCGroupInetIngress, o.Ingress},
		{"sockops", ebpf.AttachCGroupSockOps, o.TcpEvents},
	}
}

// LoadTables loads the tables of guards and counters for pins alone, without a
// daemon's cgroup and without pinning the tables themselves: only Layout and
// Paths of o count.
func LoadTables(o Options) (*Programs, error) {
	if o.Layout.Mask == 0 {
		return nil, fmt.Errorf("load eBPF tables: no layout: %w", ErrMask)
	}
	t, err := loadTables(o.Layout, entries(min(uint32(o.Paths), o.Layout.MaxPath())), false)
	if err != nil {
		return nil, err
	}
	return &Programs{
		o: Options{Layout: o.Layout}, t: t,
		links: map[string]link.Link{}, foreign: map[uint32]bool{}, late: map[uint32]Counters{}, pins: map[*Pin]bool{},
	}, nil
}

// Pin holds the processes of a cgroup, and of all below it, to an exit. When it
// returns without an error whatever they send from then on leaves by it, or not
// at all; what sockets that are older send from elsewhere is dropped.
//
// dir is a directory of the pin's own, below the bpf file system; it is made.
// about is kept there for FindPins, at most 8 KiB without zero bytes. Programs
// that an earlier run has pinned there to this very cgroup are replaced one by
// one, each atomically; those of a cgroup that is gone are let go.
func (p *Programs) Pin(cgroup, dir string, about []byte, to Exit) (*Pin, error) {
	id, err := cgroupID(cgroup)
	if err != nil {
		return nil, err
	}
	if err := makePinDir(dir); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fmt.Errorf("pin %s: %w", cgroup, os.ErrClosed)
	}
	pin := &Pin{p: p, dir: dir, cgroup: id, exit: to, links: map[string]link.Link{}}
	objects, err := loadExit(p.t, to, nil)
	if err != nil {
		return nil, fmt.Errorf("pin %s: %w", cgroup, err)
	}
	defer closeObjects(objects)
	if err := errors.Join(pin.keep(objects), writeAbout(dir, about)); err != nil {
		return nil, fmt.Errorf("pin %s: %w", cgroup, errors.Join(err, pin.close()))
	}
	if err := pin.attach(cgroup, objects); err != nil {
		return nil, fmt.Errorf("pin %s: %w", cgroup, errors.Join(err, pin.close()))
	}
	p.pins[pin] = true
	return pin, nil
}

// makePinDir makes the directory of a pin and those between it and the bpf file
// system.
func makePinDir(dir string) error {
	top := dir
	for {
		if _, err := os.Stat(top); err == nil {
			break
		}
		if top == filepath.Dir(top) {
			return fmt.Errorf("directory of pins %s: %w", dir, os.ErrNotExist)
		}
		top = filepath.Dir(top)
	}
	if err := onBPFFS(top); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of a pin: %w", err)
	}
	return nil
}

// attach takes over the pinned link of each hook, or makes one. What is new goes
// again with an error.
func (pin *Pin) attach(cgroup string, objects *pinObjects) (err error) {
	var fresh []string
	defer func() {
		if err != nil {
			err = errors.Join(err, unpin(pin.dir, fresh...))
		}
	}()
	for _, h := range objects.hooks() {
		l, at, err := pinnedLink(filepath.Join(pin.dir, h.name))
		if err != nil {
			return err
		}
		if l != nil && at == pin.cgroup {
			pin.links[h.name] = l
			if err := l.Update(h.prog); err != nil {
				return fmt.Errorf("replace program %s: %w", h.name, plain(err))
			}
			continue
		}
		if l != nil {
			if err := l.Close(); err != nil { // of a cgroup that is gone; its pin is replaced
				return fmt.Errorf("close link %s: %w", h.name, err)
			}
		}
		l, err = link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: h.at, Program: h.prog})
		if err != nil {
			return fmt.Errorf("attach %s to cgroup %s: %w", h.name, cgroup, plain(err))
		}
		pin.links[h.name] = l
		if err := pinAt(pin.dir, h.name, l); err != nil {
			return err
		}
		fresh = append(fresh, h.name)
	}
	return nil
}

// Point holds the processes to another exit from its return on. Each program is
// replaced atomically, not all of them at once: what falls in between is
// dropped. So it is after an error, until the next Point.
func (pin *Pin) Point(to Exit) error {
	pin.p.mu.Lock()
	defer pin.p.mu.Unlock()
	if !pin.p.pins[pin] {
		return fmt.Errorf("point a pin to another path: %w", os.ErrClosed)
	}
	pin.exit = to
	return pin.reload(pin.p.t)
}

// reload replaces the programs by those of its exit, on tables.
func (pin *Pin) reload(t *tables) error {
	objects, err := loadExit(t, pin.exit, pin.conns)
	if err != nil {
		return err
	}
	defer closeObjects(objects)
	for _, h := range objects.hooks() {
		// Without its cgroup, which may have gone a moment ago, a link has nobody left.
		if err := pin.links[h.name].Update(h.prog); err != nil && !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("replace program %s: %w", h.name, plain(err))
		}
	}
	return nil
}

// Exit is where the pin points to.
func (pin *Pin) Exit() Exit {
	pin.p.mu.RLock()
	defer pin.p.mu.RUnlock()
	return pin.exit
}

// Cgroup is what the kernel calls the cgroup.
func (pin *Pin) Cgroup() uint64 { return pin.cgroup }

// Conns reads what the processes' connections have been since Pin. An error
// stands for none: the map is ours and there.
func (pin *Pin) Conns() Conns {
	pin.p.mu.RLock()
	defer pin.p.mu.RUnlock()
	var c pinConns
	if err := pin.conns.Lookup(uint32(0), &c); err != nil {
		return Conns{}
	}
	return Conns{Tried: c.Tried, Made: c.Made, Failed: c.Failed, Closed: c.Closed}
}

// Remove lets the processes go wherever they like. Sockets that they have keep
// mark and address.
func (pin *Pin) Remove() error {
	pin.p.mu.Lock()
	defer pin.p.mu.Unlock()
	return errors.Join(RemovePin(pin.dir), pin.close())
}

// Leave lets go of the pin; what is pinned goes on without us.
func (pin *Pin) Leave() error {
	pin.p.mu.Lock()
	defer pin.p.mu.Unlock()
	return pin.close()
}

func (pin *Pin) close() error {
	delete(pin.p.pins, pin)
	var errs []error
	for name, l := range pin.links {
		if err := l.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close link %s: %w", name, err))
		}
		delete(pin.links, name)
	}
	if pin.conns != nil {
		errs = append(errs, pin.conns.Close())
	}
	return errors.Join(errs...)
}

// keep holds on to the map of the counts, which outlives the programs.
func (pin *Pin) keep(objects *pinObjects) (err error) {
	pin.conns, err = objects.Conns.Clone()
	return err
}

// loadExit loads a pin's programs on tables. conns is the map to count in, or
// nil for a new one.
func loadExit(t *tables, to Exit, conns *ebpf.Map) (*pinObjects, error) {
	spec, err := loadPin()
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	vars, err := to.constants()
	if err != nil {
		return nil, err
	}
	for name, v := range vars {
		if err := spec.Variables[name].Set(v); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	// Taken from the tables, whatever the object says of their size.
	replace := map[string]*ebpf.Map{pinMapGuards: t.Guards, pinMapSlots: t.Slots}
	spec.Maps[pinMapGuards].MaxEntries, spec.Maps[pinMapSlots].MaxEntries = t.size, t.size
	if conns != nil {
		replace[pinMapConns] = conns
	}
	var objects pinObjects
	if err := spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{MapReplacements: replace}); err != nil {
		return nil, fmt.Errorf("load eBPF programs: %w", plain(err))
	}
	return &objects, nil
}

// closeObjects lets go of what links and pins hold by themselves. The maps are
// copies of the handles they replace.
func closeObjects(o *pinObjects) { _ = o.Close() }

// constants gives the programs' view of the exit.
func (to Exit) constants() (map[string]any, error) {
	vars := map[string]any{
		pinVarPath: to.Num, pinVarPathMark: to.Mark,
		pinVarHas4: uint32(0), pinVarHas6: uint32(0), pinVarHasRetval: uint32(0),
	}
	if to.V4.IsValid() {
		if !to.V4.Is4() {
			return nil, fmt.Errorf("exit: %s is not IPv4", to.V4)
		}
		a := to.V4.As4()
		vars[pinVarHas4], vars[pinVarAddr4] = uint32(1), binary.NativeEndian.Uint32(a[:])
	}
	if to.V6.IsValid() {
		if !to.V6.Is6() || to.V6.Is4In6() {
			return nil, fmt.Errorf("exit: %s is not IPv6", to.V6)
		}
		a := to.V6.As16()
		var words [4]uint32
		for i := range words {
			words[i] = binary.NativeEndian.Uint32(a[4*i:])
		}
		vars[pinVarHas6], vars[pinVarAddr6] = uint32(1), words
	}
	var name [16]byte // IFNAMSIZ, with a zero at the end
	if copy(name[:15], to.Device) < len(to.Device) {
		return nil, fmt.Errorf("exit: interface %q: name too long", to.Device)
	}
	vars[pinVarDevice] = [2]uint64{binary.NativeEndian.Uint64(name[:8]), binary.NativeEndian.Uint64(name[8:])}
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval) == nil {
		vars[pinVarHasRetval] = uint32(1)
	}
	return vars, nil
}

// FoundPin is a pin that an earlier run, or another process, has left.
type FoundPin struct {
	Dir    string
	About  []byte // what Pin was told; nil when that cannot be read
	Cgroup uint64 // 0: gone
}

// FindPins lists the pins whose directories are in dir. It changes nothing.
func FindPins(dir string) ([]FoundPin, error) {
	names, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	var all []FoundPin
	for _, n := range names {
		if !n.IsDir() {
			continue
		}
		f := FoundPin{Dir: filepath.Join(dir, n.Name())}
		l, id, err := pinnedLink(filepath.Join(f.Dir, "egress"))
		if err != nil {
			return nil, err
		}
		if l != nil {
			f.Cgroup = id
			if err := l.Close(); err != nil {
				return nil, fmt.Errorf("close link: %w", err)
			}
		}
		if f.About, err = readAbout(f.Dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		all = append(all, f)
	}
	return all, nil
}

// RemovePin detaches the programs that are pinned in the directory of a pin,
// whoever holds them, and removes the directory. One that is not there is no
// error.
func RemovePin(dir string) error {
	var errs []error
	for _, h := range (&pinObjects{}).hooks() {
		errs = append(errs, detach(filepath.Join(dir, h.name)), unpin(dir, h.name, h.name+"-new"))
	}
	errs = append(errs, unpin(dir, pinAbout, pinAbout+"-new"))
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove the directory of a pin: %w", err))
	}
	return errors.Join(errs...)
}

// detach ends a pinned link at once: without it the kernel takes its time.
func detach(path string) error {
	l, _, err := pinnedLink(path)
	if l == nil || err != nil {
		return err
	}
	if err := l.Detach(); err != nil {
		return errors.Join(fmt.Errorf("detach %s: %w", path, plain(err)), l.Close())
	}
	return l.Close()
}

// writeAbout pins a map that holds a text: the bpf file system has no files of
// another kind.
func writeAbout(dir string, text []byte) error {
	if len(text) > aboutSize {
		return fmt.Errorf("%d bytes about a pin, at most %d are kept", len(text), aboutSize)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: pinAbout, Type: ebpf.Array, KeySize: 4, ValueSize: aboutSize, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("make a map: %w", plain(err))
	}
	defer m.Close()
	padded := make([]byte, aboutSize)
	copy(padded, text)
	if err := m.Put(uint32(0), padded); err != nil {
		return fmt.Errorf("write about a pin: %w", err)
	}
	return pinAt(dir, pinAbout, m)
}

func readAbout(dir string) ([]byte, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinAbout), nil)
	if err != nil {
		return nil, fmt.Errorf("read about a pin: %w", plain(err))
	}
	defer m.Close()
	text, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, fmt.Errorf("read about a pin: %w", err)
	}
	text, _, _ = bytes.Cut(text, []byte{0})
	return text, nil
}
