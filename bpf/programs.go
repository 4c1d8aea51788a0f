package bpf

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// ErrShared says that a cgroup is not a leaf that holds this process alone.
var ErrShared = errors.New("cgroup is not ours alone")

// Options say what to load and where to attach it.
type Options struct {
	Layout Layout
	// Paths is the number of paths to make room for. More is never an error
	// up to Layout.MaxPath: the tables grow, in place, when a number needs it.
	Paths int
	// Cgroup is the directory of a leaf of our own (Leaf.Path).
	Cgroup string
	// PinDir is a directory, made when it is not there, in a bpf file system
	// (BPFFS), one for each instance; "" pins nothing, and then the guard ends
	// with the process.
	PinDir string
}

// Entry is a path number and the guard of its path.
type Entry struct {
	Num   uint32
	Guard Guard
}

// Programs are the loaded programs, attached to a cgroup. All methods may be
// called concurrently.
type Programs struct {
	mu        sync.RWMutex
	o         Options
	t         *tables
	links     map[string]link.Link
	late      map[uint32]Counters // counted by replaced programs while they were replaced
	inherited []uint32
	foreign   map[uint32]bool // inherited numbers that no path of this run has had
	pins      map[*Pin]bool
	closed    bool
}

// Load loads the programs and attaches them. When it returns without an error
// every socket of the cgroup is guarded, and no path number is in force yet.
//
// With pins of an earlier run in PinDir, the programs that are attached are
// replaced one by one, each atomically: at no moment is the cgroup without a
// guard. The guards of the earlier run's paths stay in force for those of its
// sockets that the kernel is still closing: see Inherited. Programs pinned to
// another cgroup (the daemon was started elsewhere) are let go once ours stand.
func Load(o Options) (*Programs, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	old, err := openPinned(o)
	if err != nil {
		return nil, err
	}
	if old != nil {
		defer old.Close()
	}
	inherited := liveNumbers(old)
	last := uint32(o.Paths + len(inherited))
	for _, num := range inherited {
		last = max(last, num)
	}
	p := &Programs{o: o, inherited: inherited, foreign: map[uint32]bool{}, late: map[uint32]Counters{}, links: map[string]link.Link{}, pins: map[*Pin]bool{}}
	for _, num := range inherited {
		p.foreign[num] = true
	}
	if p.t, err = loadTables(o.Layout, entries(min(last, o.Layout.MaxPath())), false); err != nil {
		return nil, err
	}
	carried := carry(old, p.t, inherited)
	if err := p.attach(); err != nil {
		return nil, errors.Join(err, p.t.Close())
	}
	p.addLate(old, inherited, carried)
	if err := p.pinTables(); err != nil {
		return nil, errors.Join(err, p.Leave())
	}
	return p, nil
}

func (o Options) check() error {
	if o.Layout.Mask == 0 {
		return fmt.Errorf("load eBPF programs: no layout: %w", ErrMask)
	}
	if o.Paths < 0 || uint64(o.Paths) > uint64(o.Layout.MaxPath()) {
		return fmt.Errorf("load eBPF programs: %d paths, the mask %#x allows %d: %w", o.Paths, o.Layout.Mask, o.Layout.MaxPath(), ErrNumber)
	}
	if _, err := cgroupID(o.Cgroup); err != nil {
		return err
	}
	return onlyOurs(o.Cgroup)
}

// onlyOurs keeps the programs, which drop what has no mark, away from the
// processes of others.
func onlyOurs(dir string) error {
	pids, err := processes(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if pid != os.Getpid() {
			return fmt.Errorf("%w: %s holds process %d", ErrShared, dir, pid)
		}
	}
	children, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", dir, err)
	}
	for _, c := range children {
		if c.IsDir() {
			return fmt.Errorf("%w: %s has a cgroup %s below it", ErrShared, dir, c.Name())
		}
	}
	return nil
}

// hook is a program and where it is attached; the name is its pin's too.
type hook struct {
	name string
	at   ebpf.AttachType
	prog *ebpf.Program
}

// hooks lists the programs in the order of attachment: first what drops.
func (t *tables) hooks() []hook {
	return []hook{
		{"egress", ebpf.AttachCGroupInetEgress, t.Egress},
		{"connect4", ebpf.AttachCGroupInet4Connect, t.Connect4},
		{"connect6", ebpf.AttachCGroupInet6Connect, t.Connect6},
		{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, t.Sendmsg4},
		{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, t.Sendmsg6},
		{"ingress", ebpf.AttachCGroupInetIngress, t.Ingress},
		{"sockops", ebpf.AttachCGroupSockOps, t.TcpEvents},
	}
}

// attach takes over the pinned link of each hook, or makes one.
func (p *Programs) attach() error {
	id, err := cgroupID(p.o.Cgroup)
	if err != nil {
		return err
	}
	var fresh []string
	for _, h := range p.t.hooks() {
		l, err := p.adopt(h, id)
		if l == nil && err == nil {
			l, err = p.attachNew(h)
			fresh = append(fresh, h.name)
		}
		if err != nil {
			// What was taken over keeps dropping; what is new goes.
			return errors.Join(err, p.unpin(fresh...), p.closeLinks())
		}
		p.links[h.name] = l
	}
	return nil
}

// adopt puts the program into the link that an earlier run pinned. Without
// such a link on this very cgroup it returns nil.
func (p *Programs) adopt(h hook, cgroup uint64) (link.Link, error) {
	l, at, err := p.pinnedLink(h.name)
	if l == nil || err != nil {
		return nil, err
	}
	if at != cgroup {
		return nil, l.Close() // its pin is replaced by the new one's
	}
	if err := l.Update(h.prog); err != nil {
		return nil, errors.Join(fmt.Errorf("replace the pinned program %s: %w", h.name, plain(err)), l.Close())
	}
	return l, nil
}

func (p *Programs) attachNew(h hook) (link.Link, error) {
	l, err := link.AttachCgroup(link.CgroupOptions{Path: p.o.Cgroup, Attach: h.at, Program: h.prog})
	if err != nil {
		return nil, fmt.Errorf("attach %s to cgroup %s: %w", h.name, p.o.Cgroup, plain(err))
	}
	if err := p.pin(h.name, l); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// SetPath puts the guard of a path in force under its number: from then on
// its sockets may send. With a number that is not in force, or was only in an
// earlier run, its counters start from zero. When the number is in force for another guard, the change leaves
// no moment with a mixture of both. Numbers out of range wrap ErrNumber.
func (p *Programs) SetPath(num uint32, g Guard) error {
	return p.SetPaths([]Entry{{num, g}})
}

// SetPaths is SetPath for many: all of them, or with an error none.
func (p *Programs) SetPaths(all []Entry) error {
	encoded := make([][guardSize]byte, len(all))
	var last uint32
	for i, e := range all {
		if e.Num == 0 || e.Num > p.o.Layout.MaxPath() {
			return fmt.Errorf("guard of path number %d, the mask allows 1 to %d: %w", e.Num, p.o.Layout.MaxPath(), ErrNumber)
		}
		var err error
		if encoded[i], err = e.Guard.encode(); err != nil {
			return fmt.Errorf("path number %d: %w", e.Num, err)
		}
		last = max(last, e.Num)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("guard of a path: %w", os.ErrClosed)
	}
	if last >= p.t.size {
		if err := p.grow(last); err != nil {
			return fmt.Errorf("make room for path number %d: %w", last, err)
		}
	}
	for i, e := range all {
		switch {
		case !p.t.live(e.Num) || p.foreign[e.Num]:
			p.t.disable(e.Num)
			p.t.clearSlot(e.Num)
			delete(p.late, e.Num)
			delete(p.foreign, e.Num)
		case p.t.guard(e.Num) == encoded[i]:
			continue
		}
		p.t.put(e.Num, encoded[i])
	}
	return nil
}

// ClearPath takes a number out of force: sockets that still have it can send
// nothing. Its counters stay readable until the number is set again. A path
// that is down for a while keeps its guard; this is for a number whose last
// socket is gone. A number that is not in force is no error.
func (p *Programs) ClearPath(num uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("clear path number %d: %w", num, os.ErrClosed)
	}
	if num == 0 || num > p.o.Layout.MaxPath() {
		return fmt.Errorf("clear path number %d: %w", num, ErrNumber)
	}
	if num < p.t.size {
		p.t.disable(num)
	}
	return nil
}

// Inherited lists the numbers that were in force in the run before, when it
// ended without Close. Sockets of the killed process that the kernel is still
// closing carry them, so they are not to be used (Numbers.Hold, before the
// first Take: see PinnedNumbers) until Read says that none is left; then
// ClearPath and Numbers.Free. A path that is given one all the same is judged
// and counted rightly, but what is left of the old sockets is dropped or
// counted as its own.
func (p *Programs) Inherited() []uint32 { return slices.Clone(p.inherited) }

// Read gives the counters of a number, without a system call. A number that
// was never set has none.
func (p *Programs) Read(num uint32) Counters {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if num >= p.t.size {
		return Counters{}
	}
	c := p.t.slot(num)
	if late, ok := p.late[num]; ok {
		c.add(&late)
	}
	return c
}

// Unmarked counts what belongs to no path and was stopped: packets, connects
// and datagrams of sockets without a mark of ours, or with a number that is
// beyond the tables.
func (p *Programs) Unmarked() uint64 {
	c := p.Read(0)
	return c.unmarked + c.GuardDrops()
}

// grow replaces programs and tables by larger ones. Nothing that was counted
// is lost and the guard stands throughout.
func (p *Programs) grow(last uint32) error {
	t, err := loadTables(p.o.Layout, entries(last), false)
	if err != nil {
		return err
	}
	old := p.t
	all := make([]uint32, old.size)
	for i := range all {
		all[i] = uint32(i)
	}
	carried := carry(old, t, all)
	if err := p.use(t); err != nil {
		// Programs of both are attached; each drops by its own table, so put
		// the old ones back.
		return errors.Join(err, p.use(old), t.Close())
	}
	p.t = t
	p.addLate(old, all, carried)
	return errors.Join(p.pinTables(), old.Close())
}

// use has every attached program replaced by that of tables. It goes on after an
// error.
func (p *Programs) use(t *tables) error {
	var errs []error
	for _, h := range t.hooks() {
		l := p.links[h.name]
		if l == nil { // LoadTables
			continue
		}
		if err := l.Update(h.prog); err != nil {
			errs = append(errs, fmt.Errorf("replace program %s: %w", h.name, plain(err)))
		}
	}
	for pin := range p.pins {
		if err := pin.reload(t); err != nil {
			errs = append(errs, fmt.Errorf("programs of a pin: %w", err))
		}
	}
	return errors.Join(errs...)
}

// carry copies the guards that are in force and the counters of numbers into
// tables that are not in use yet, and returns what the counters were where they
// were not zero.
func carry(from, to *tables, nums []uint32) map[uint32]Counters {
	carried := make(map[uint32]Counters)
	for _, num := range nums {
		if from.live(num) {
			to.put(num, from.guard(num))
		}
		if c := from.copySlot(to, num); c != (Counters{}) {
			carried[num] = c
		}
	}
	return carried
}

// addLate adds what the old programs counted after their tables were copied.
func (p *Programs) addLate(old *tables, nums []uint32, carried map[uint32]Counters) {
	if old == nil {
		return
	}
	settle()
	for _, num := range nums {
		late, before := old.slot(num), carried[num]
		late.sub(&before)
		if late != (Counters{}) {
			sum := p.late[num]
			sum.add(&late)
			p.late[num] = sum
		}
	}
}

// liveNumbers lists the numbers in force; old may be nil.
func liveNumbers(t *tables) []uint32 {
	if t == nil {
		return nil
	}
	var nums []uint32
	for num := range t.size {
		if t.live(num) {
			nums = append(nums, num)
		}
	}
	return nums
}

// Close detaches the programs, removes the pins and lets go of everything.
// What was counted stays readable.
func (p *Programs) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	err := p.removePins()
	return errors.Join(err, p.let())
}

// Leave lets go of everything but keeps what is pinned: the guard goes on
// without us. Without a PinDir it is the same as Close.
func (p *Programs) Leave() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	return p.let()
}

// let leaves the pins of cgroups attached, as the last of their Leave.
func (p *Programs) let() error {
	p.closed = true
	errs := []error{p.closeLinks()}
	for pin := range p.pins {
		errs = append(errs, pin.close())
	}
	return errors.Join(append(errs, p.t.Close())...)
}

func (p *Programs) closeLinks() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(p.links)) {
		if err := p.links[name].Close(); err != nil {
			errs = append(errs, fmt.Errorf("close link %s: %w", name, err))
		}
		delete(p.links, name)
	}
	return errors.Join(errs...)
}
