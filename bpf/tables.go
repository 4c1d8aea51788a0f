package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Sizes and places in the programs' structs (kernel.c), which the objects' own
// types confirm in a test.
const (
	guardSize  = 48
	flagsAt    = 44
	slotSize   = 256
	guardSet   = 1 << 0
	guardV4    = 1 << 1
	guardV6    = 1 << 2
	tableMagic = 0x77796f31 // of slot 0, which is no path's: changes with the structs
)

// Guard is what the sockets of a path may send. A family without a prefix is
// not allowed at all; a prefix of length 0 allows any source of its family,
// and an unbound one. IfIndex 0 allows any interface. Traffic to the host
// itself, by the loopback interface, may go there whatever IfIndex says.
type Guard struct {
	V4, V6  netip.Prefix
	IfIndex uint32
}

// encode gives the kernel's form.
func (g Guard) encode() ([guardSize]byte, error) {
	var e [guardSize]byte
	flags := uint32(guardSet)
	if g.V4.IsValid() {
		if !g.V4.Addr().Is4() {
			return e, fmt.Errorf("guard: %s is not IPv4", g.V4)
		}
		flags |= guardV4
		a := g.V4.Masked().Addr().As4()
		copy(e[0:4], a[:])
		ones(e[4:8], g.V4.Bits())
	}
	if g.V6.IsValid() {
		if !g.V6.Addr().Is6() || g.V6.Addr().Is4In6() {
			return e, fmt.Errorf("guard: %s is not IPv6", g.V6)
		}
		flags |= guardV6
		a := g.V6.Masked().Addr().As16()
		copy(e[8:24], a[:])
		ones(e[24:40], g.V6.Bits())
	}
	if flags == guardSet {
		return e, errors.New("guard: neither an IPv4 nor an IPv6 prefix")
	}
	binary.NativeEndian.PutUint32(e[40:44], g.IfIndex)
	binary.NativeEndian.PutUint32(e[flagsAt:], flags)
	return e, nil
}

// ones sets the first n bits.
func ones(mask []byte, n int) {
	for i := range mask {
		mask[i] = byte(uint16(0xff00) >> min(8, max(0, n-8*i)))
	}
}

// tables is one load of the programs with the two arrays that they work on,
// both mapped into our memory.
type tables struct {
	kernelObjects
	guards, slots *ebpf.Memory
	size          uint32
}

// entries is the size of tables that hold numbers up to last: a power of two.
func entries(last uint32) uint32 { return 1 << bits.Len32(last) }

// loadTables loads programs and empty tables. With testRun the packet's mark
// stands for the socket's; see kernel.c.
func loadTables(l Layout, size uint32, testRun bool) (_ *tables, err error) {
	spec, err := loadKernel()
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	low, lowMask, high, highMask := l.shifts()
	test := uint32(0)
	if testRun {
		test = 1
	}
	for name, v := range map[string]uint32{
		kernelVarClassMask: l.ClassMask,
		kernelVarClassPath: deposit(uint32(ClassPath), l.ClassMask),
		kernelVarLowShift:  low,
		kernelVarLowMask:   lowMask,
		kernelVarHighShift: high,
		kernelVarHighMask:  highMask,
		kernelVarTestRun:   test,
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	spec.Maps[kernelMapGuards].MaxEntries = size
	spec.Maps[kernelMapSlots].MaxEntries = size
	t := &tables{size: size}
	if err := spec.LoadAndAssign(&t.kernelObjects, nil); err != nil {
		return nil, fmt.Errorf("load eBPF programs: %w", plain(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if err := t.mapMemory(t.Guards, t.Slots); err != nil {
		return nil, err
	}
	t.put(0, meta(l))
	return t, nil
}

// adoptTables opens the pinned tables of an earlier run, to read them.
func adoptTables(guards, slots string, l Layout) (_ *tables, err error) {
	t := &tables{}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if t.Guards, err = ebpf.LoadPinnedMap(guards, nil); err != nil {
		return nil, fmt.Errorf("open pinned guards: %w", err)
	}
	if t.Slots, err = ebpf.LoadPinnedMap(slots, nil); err != nil {
		return nil, fmt.Errorf("open pinned counters: %w", err)
	}
	t.size = t.Guards.MaxEntries()
	if t.Guards.ValueSize() != guardSize || t.Slots.ValueSize() != slotSize || t.Slots.MaxEntries() != t.size {
		return nil, errOtherTables
	}
	if err := t.mapMemory(t.Guards, t.Slots); err != nil {
		return nil, err
	}
	if t.guard(0) != meta(l) {
		return nil, errOtherTables
	}
	return t, nil
}

// errOtherTables says that pinned tables are of another form or mark layout.
var errOtherTables = errors.New("pinned tables of another version or mark mask")

// meta is what stands in the guard of number 0, never in force: the form of
// the tables and the layout that the numbers are of.
func meta(l Layout) [guardSize]byte {
	var e [guardSize]byte
	binary.NativeEndian.PutUint32(e[0:4], tableMagic)
	binary.NativeEndian.PutUint32(e[4:8], l.Mask)
	return e
}

func (t *tables) mapMemory(guards, slots *ebpf.Map) (err error) {
	if t.guards, err = guards.Memory(); err != nil {
		return fmt.Errorf("map guards: %w", err)
	}
	if t.slots, err = slots.Memory(); err != nil {
		return fmt.Errorf("map counters: %w", err)
	}
	return nil
}

// Close lets go of maps and programs; the kernel keeps what is attached or
// pinned. The mapped memory stays readable until it is collected.
func (t *tables) Close() error {
	var errs []error
	for _, c := range []io.Closer{
		t.Egress, t.Ingress, t.Connect4, t.Connect6, t.Sendmsg4, t.Sendmsg6, t.TcpEvents, t.Guards, t.Slots,
	} {
		errs = append(errs, c.Close()) // nil programs and maps close without an error
	}
	return errors.Join(errs...)
}

// guard reads an entry. Reading within the table cannot fail.
func (t *tables) guard(num uint32) (e [guardSize]byte) {
	_, _ = t.guards.ReadAt(e[:], int64(num)*guardSize)
	return e
}

func (t *tables) live(num uint32) bool {
	e := t.guard(num)
	return num != 0 && binary.NativeEndian.Uint32(e[flagsAt:])&guardSet != 0
}

// put replaces an entry so that at no moment a mixture of two is in force:
// first the old is taken out of force, the flags come last.
func (t *tables) put(num uint32, e [guardSize]byte) {
	off := int64(num) * guardSize
	t.disable(num)
	_, _ = t.guards.WriteAt(e[:flagsAt], off)
	_, _ = t.guards.WriteAt(e[flagsAt:], off+flagsAt)
}

// disable takes an entry out of force: all packets of the number are dropped.
func (t *tables) disable(num uint32) {
	_, _ = t.guards.WriteAt(make([]byte, guardSize-flagsAt), int64(num)*guardSize+flagsAt)
}

// slot reads the counters of a number. Each is read whole; together they are
// no snapshot.
func (t *tables) slot(num uint32) Counters {
	var b [slotSize]byte
	_, _ = t.slots.ReadAt(b[:], int64(num)*slotSize)
	return decode(&b)
}

func decode(b *[slotSize]byte) Counters {
	v := func(i int) uint64 { return binary.NativeEndian.Uint64(b[8*i:]) }
	c := Counters{
		BytesIn: v(0), BytesOut: v(1), PacketsIn: v(2), PacketsOut: v(3),
		Retransmits: v(4), Tried: v(5), Made: v(6), Failed: v(7), Closed: v(8),
		DropSource: v(9), DropInterface: v(10), DropUnknown: v(11), Refused: v(12),
		unmarked: v(13), RTTSum: time.Duration(v(14)) * time.Microsecond,
	}
	for i := range c.RTT {
		c.RTT[i] = v(16 + i)
	}
	return c
}

// copySlot carries the counters of a number over to tables that are not yet in
// use, and returns what was carried.
func (t *tables) copySlot(to *tables, num uint32) Counters {
	var b [slotSize]byte
	_, _ = t.slots.ReadAt(b[:], int64(num)*slotSize)
	_, _ = to.slots.WriteAt(b[:], int64(num)*slotSize)
	return decode(&b)
}

// clearSlot makes counters start from zero. No socket may have the number.
func (t *tables) clearSlot(num uint32) {
	_, _ = t.slots.WriteAt(make([]byte, slotSize), int64(num)*slotSize)
}

// settle waits until no CPU runs a program that has been replaced: the kernel
// answers membarrier(MEMBARRIER_CMD_GLOBAL) with a grace period of RCU. Where
// it cannot, a count or two of that instant may be missed.
func settle() {
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, 1, 0, 0)
}
