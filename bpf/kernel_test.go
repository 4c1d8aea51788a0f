package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// skb is struct __sk_buff, as far as BPF_PROG_TEST_RUN lets one set it.
type skb struct {
	Len, PktType, Mark   uint32
	QueueMapping, Proto  uint32
	VLAN                 [3]uint32
	Priority             uint32
	IngressIfindex       uint32
	Ifindex              uint32
	TCIndex              uint32
	CB                   [5]uint32
	Hash, TCClass        uint32
	Data, DataEnd, NAPI  uint32
	Family               uint32
	Remote4, Local4      uint32
	Remote6, Local6      [4]uint32
	RemotePort, LocPort  uint32
	DataMeta             uint32
	FlowKeys, Tstamp     uint64
	WireLen, GSOSegs     uint32
	SK                   uint64
	GSOSize, TstampTypes uint32
	HWTstamp             uint64
}

// frame is an Ethernet frame around a packet: the kernel's test run reads the
// protocol from it and hands the program what is inside.
func frame(proto uint16, ip []byte, l4 []byte, payload int) []byte {
	f := make([]byte, 14, 14+len(ip)+len(l4)+payload)
	binary.BigEndian.PutUint16(f[12:], proto)
	f = append(append(f, ip...), l4...)
	return append(f, make([]byte, payload)...)
}

func ip4(src string, proto byte, options int) []byte {
	h := make([]byte, 20+options)
	h[0] = 0x40 | byte(len(h)/4)
	h[9] = proto
	a := netip.MustParseAddr(src).As4()
	copy(h[12:], a[:])
	return h
}

func ip6(src string, next byte) []byte {
	h := make([]byte, 40)
	h[0], h[6] = 0x60, next
	a := netip.MustParseAddr(src).As16()
	copy(h[8:], a[:])
	return h
}

func tcp(options int) []byte {
	h := make([]byte, 20+options)
	h[12] = byte(len(h)/4) << 4
	return h
}

func udp() []byte { return make([]byte, 8) }

func testLayout(tb testing.TB, mask uint32) Layout {
	tb.Helper()
	l, err := NewLayout(mask)
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func testTables(tb testing.TB, l Layout, size uint32) *tables {
	tb.Helper()
	lab.Require(tb)
	t, err := loadTables(l, size, true)
	if err != nil {
		var v *ebpf.VerifierError
		if errors.As(err, &v) {
			tb.Fatalf("%+v", v)
		}
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := t.Close(); err != nil {
			tb.Error(err)
		}
	})
	return t
}

func (t *tables) set(tb testing.TB, num uint32, g Guard) {
	tb.Helper()
	e, err := g.encode()
	if err != nil {
		tb.Fatal(err)
	}
	t.put(num, e)
}

func run(tb testing.TB, p *ebpf.Program, data []byte, ctx skb) uint32 {
	tb.Helper()
	ret, err := p.Run(&ebpf.RunOptions{Data: data, Context: ctx})
	if err != nil {
		tb.Fatal(err)
	}
	return ret
}

func mark(tb testing.TB, l Layout, c Class, uplink, path uint32) uint32 {
	tb.Helper()
	m, err := l.Mark(c, uplink, path)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestStructsAreThePrograms(t *testing.T) {
	if got := unsafe.Sizeof(kernelGuard{}); got != guardSize {
		t.Errorf("a guard is %d bytes, not %d", got, guardSize)
	}
	if got := unsafe.Offsetof(kernelGuard{}.Flags); got != flagsAt {
		t.Errorf("flags are at %d, not %d", got, flagsAt)
	}
	if got := unsafe.Sizeof(kernelCounters{}); got != slotSize {
		t.Errorf("a slot is %d bytes, not %d", got, slotSize)
	}
	if got := unsafe.Offsetof(kernelCounters{}.Rtt); got != 16*8 {
		t.Errorf("the histogram is at %d", got)
	}
	if got := len(kernelCounters{}.Rtt); got != RTTBuckets {
		t.Errorf("%d buckets, not %d", got, RTTBuckets)
	}
	if got := unsafe.Sizeof(skb{}); got != 192 {
		t.Errorf("the test's __sk_buff is %d bytes", got)
	}
}

func TestGuardDecides(t *testing.T) {
	const path, other = 5, 6
	for _, mask := range []uint32{DefaultMask, 0xffffffff, 0xff003fff, 0x1ff00} {
		t.Run(fmt.Sprintf("%#x", mask), func(t *testing.T) {
			l := testLayout(t, mask)
			k := testTables(t, l, 8)
			k.set(t, path, Guard{V4: pfx("192.0.2.7/32"), V6: pfx("2001:db8::7/128")})
			k.set(t, other, Guard{V4: pfx("198.51.100.0/25"), V6: pfx("2001:db8:beef:8000::/49"), IfIndex: 4711})
			k.set(t, 3, Guard{V4: pfx("192.0.2.7/32")})
			k.set(t, 2, Guard{V4: pfx("0.0.0.0/0"), IfIndex: 1})
			k.set(t, 4, Guard{V4: pfx("192.0.2.7/32")})
			k.disable(4)
			of := func(n uint32) uint32 { return mark(t, l, ClassPath, 1, n) }
			v4 := func(a string) []byte { return frame(0x0800, ip4(a, 6, 0), tcp(0), 10) }
			v6 := func(a string) []byte { return frame(0x86dd, ip6(a, 17), udp(), 10) }
			one := func(f func(c *Counters) uint64) func(k *tables, n uint32) bool {
				return func(k *tables, n uint32) bool { c := k.slot(n); return f(&c) == 1 }
			}
			counted := one(func(c *Counters) uint64 { return c.PacketsOut })
			source := one(func(c *Counters) uint64 { return c.DropSource })
			unknown := one(func(c *Counters) uint64 { return c.DropUnknown })
			for _, c := range []struct {
				name string
				mark uint32
				data []byte
				pass uint32
				slot uint32
				want func(k *tables, n uint32) bool
			}{
				{"right IPv4", of(path), v4("192.0.2.7"), 1, path, counted},
				{"wrong IPv4", of(path), v4("192.0.2.8"), 0, path, source},
				{"right IPv6", of(path), v6("2001:db8::7"), 1, path, counted},
				{"wrong IPv6, first word", of(path), v6("2002:db8::7"), 0, path, source},
				{"wrong IPv6, last word", of(path), v6("2001:db8::8"), 0, path, source},
				{"other uplink's bits do not matter", mark(t, l, ClassPath, l.MaxUplink(), path), v4("192.0.2.7"), 1, path, counted},
				{"bits of others do not matter", of(path) | ^l.Mask, v4("192.0.2.7"), 1, path, counted},
				{"first of prefix", of(other), v4("198.51.100.0"), 1, other, counted},
				{"last of prefix", of(other), v4("198.51.100.127"), 1, other, counted},
				{"after the prefix", of(other), v4("198.51.100.128"), 0, other, source},
				{"last of IPv6 prefix", of(other), v6("2001:db8:beef:ffff:ffff:ffff:ffff:ffff"), 1, other, counted},
				{"before the IPv6 prefix", of(other), v6("2001:db8:beef:7fff:ffff:ffff:ffff:ffff"), 0, other, source},
				{"family that the path lacks", of(3), v6("2001:db8::7"), 0, 3, source},
				{"any source", of(2), v4("203.0.113.99"), 1, 2, counted},
				{"neither IPv4 nor IPv6", of(path), frame(0x0806, make([]byte, 28), nil, 0), 0, path, source},
				{"number without a guard", of(1), v4("192.0.2.7"), 0, 1, unknown},
				{"guard taken out of force", of(4), v4("192.0.2.7"), 0, 4, unknown},
				{"number beyond the table", of(9), v4("192.0.2.7"), 0, 0, unknown},
				{"number 0", deposit(uint32(ClassPath), l.ClassMask), v4("192.0.2.7"), 0, 0, unknown},
				{"no mark", 0, v4("192.0.2.7"), 0, 0, one(func(c *Counters) uint64 { return c.unmarked })},
				{"a mark of others", ^l.Mask | l.PathMask, v4("192.0.2.7"), 0, 0, one(func(c *Counters) uint64 { return c.unmarked })},
				{"client's side", mark(t, l, ClassClient, 0, 0), v4("192.0.2.8"), 1, 0, nil},
				{"control", mark(t, l, ClassControl, 0, 0), v6("2001:db8::8"), 1, 0, nil},
			} {
				t.Run(c.name, func(t *testing.T) {
					for n := range k.size {
						k.clearSlot(n)
					}
					if got := run(t, k.Egress, c.data, skb{Mark: c.mark}); got != c.pass {
						t.Errorf("verdict %d, want %d", got, c.pass)
					}
					if c.want != nil && !c.want(k, c.slot) {
						t.Errorf("number %d has counted %+v", c.slot, k.slot(c.slot))
					}
					k.clearSlot(c.slot)
					for n := range k.size {
						if c := k.slot(n); c != (Counters{}) {
							t.Errorf("number %d has counted %+v", n, c)
						}
					}
				})
			}
		})
	}
}

func TestGuardOfInterface(t *testing.T) {
	n := lab.TestNS(t, "host")
	peer := lab.TestNS(t, "peer")
	for _, v := range []string{"eth0", "eth1"} {
		if err := lab.Veth(n, v, peer, v); err != nil {
			t.Fatal(err)
		}
	}
	index := func(name string) uint32 {
		l, err := n.Netlink().LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(l.Attrs().Index)
	}
	l := testLayout(t, DefaultMask)
	k := testTables(t, l, 4)
	k.set(t, 1, Guard{V4: pfx("192.0.2.7/32"), IfIndex: index("eth0")})
	m := mark(t, l, ClassPath, 1, 1)
	for _, c := range []struct {
		link, src string
		pass      uint32
	}{
		{"eth0", "192.0.2.7", 1},
		{"eth1", "192.0.2.7", 0},
		{"lo", "192.0.2.7", 1}, // to the host itself
		{"lo", "127.0.0.1", 0},
	} {
		err := n.Do(func() error {
			ctx := skb{Mark: m, Ifindex: index(c.link)}
			ret, err := k.Egress.Run(&ebpf.RunOptions{Data: frame(0x0800, ip4(c.src, 6, 0), tcp(0), 0), Context: ctx})
			if err == nil && ret != c.pass {
				t.Errorf("%s from %s: verdict %d, want %d", c.link, c.src, ret, c.pass)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if c := k.slot(1); c.DropInterface != 1 || c.DropSource != 1 || c.PacketsOut != 2 {
		t.Errorf("counted %+v", c)
	}
}

func TestCountsWhatTheWireHas(t *testing.T) {
	l := testLayout(t, DefaultMask)
	k := testTables(t, l, 2)
	k.set(t, 1, Guard{V4: pfx("192.0.2.7/32"), V6: pfx("2001:db8::7/128")})
	m := mark(t, l, ClassPath, 0, 1)
	v4 := func(proto byte, options int) []byte { return ip4("192.0.2.7", proto, options) }
	v6 := func(next byte) []byte { return ip6("2001:db8::7", next) }
	jumbo := append(v6(0), 6, 0, 0xc2, 4, 0, 1, 0, 0)
	for _, c := range []struct {
		name            string
		data            []byte
		segs, size      uint32
		packets, octets uint64
	}{
		{"plain TCP", frame(0x0800, v4(6, 0), tcp(12), 100), 0, 0, 1, 152},
		{"one segment", frame(0x0800, v4(6, 0), tcp(12), 100), 1, 0, 1, 152},
		{"three segments", frame(0x0800, v4(6, 0), tcp(12), 300), 3, 100, 3, 300 + 3*52},
		{"IP options", frame(0x0800, v4(6, 8), tcp(12), 300), 3, 100, 3, 300 + 3*60},
		{"three of IPv6", frame(0x86dd, v6(6), tcp(20), 300), 3, 100, 3, 300 + 3*80},
		{"UDP segments", frame(0x86dd, v6(17), udp(), 250), 3, 100, 3, 250 + 3*48},
		{"segments not numbered", frame(0x0800, v4(17, 0), udp(), 250), 0, 100, 3, 250 + 3*28},
		{"BIG TCP", frame(0x86dd, jumbo, tcp(0), 300), 3, 100, 3, 300 + 3*60},
		{"other hop-by-hop options", frame(0x86dd, append(v6(0), 6, 0, 5, 2, 0, 0, 1, 0), tcp(0), 300), 3, 100, 3, 40 + 8 + 20 + 300},
		{"not segmented by us", frame(0x0800, v4(1, 0), nil, 300), 3, 100, 3, 320},
	} {
		t.Run(c.name, func(t *testing.T) {
			k.clearSlot(1)
			ctx := skb{Mark: m, GSOSegs: c.segs, GSOSize: c.size}
			for _, p := range []*ebpf.Program{k.Egress, k.Ingress} {
				if got := run(t, p, c.data, ctx); got != 1 {
					t.Fatalf("verdict %d", got)
				}
			}
			want := Counters{BytesIn: c.octets, BytesOut: c.octets, PacketsIn: c.packets, PacketsOut: c.packets}
			if got := k.slot(1); got != want {
				t.Errorf("counted %+v, want %+v", got, want)
			}
		})
	}
}

func TestIngressCountsPathsOnly(t *testing.T) {
	l := testLayout(t, DefaultMask)
	k := testTables(t, l, 2)
	data := frame(0x0800, ip4("203.0.113.1", 6, 0), tcp(0), 0)
	for _, m := range []uint32{0, mark(t, l, ClassClient, 0, 0), mark(t, l, ClassControl, 0, 0), mark(t, l, ClassPath, 1, 2)} {
		if got := run(t, k.Ingress, data, skb{Mark: m}); got != 1 {
			t.Errorf("mark %#x: verdict %d", m, got)
		}
	}
	for n := range k.size {
		if c := k.slot(n); c != (Counters{}) {
			t.Errorf("number %d has counted %+v", n, c)
		}
	}
	// What still comes in for a path out of force is its traffic all the same.
	if got := run(t, k.Ingress, data, skb{Mark: mark(t, l, ClassPath, 1, 1)}); got != 1 {
		t.Errorf("verdict %d", got)
	}
	if c := k.slot(1); c.PacketsIn != 1 || c.BytesIn != 40 {
		t.Errorf("counted %+v", c)
	}
}

func BenchmarkPacket(b *testing.B) {
	l := testLayout(b, DefaultMask)
	k := testTables(b, l, 65536)
	k.set(b, 4711, Guard{V4: pfx("192.0.2.7/32"), V6: pfx("2001:db8::7/128"), IfIndex: 1})
	m := mark(b, l, ClassPath, 1, 4711)
	v4 := frame(0x0800, ip4("192.0.2.7", 6, 0), tcp(12), 1000)
	v6 := frame(0x86dd, ip6("2001:db8::7", 6), tcp(12), 1000)
	for _, c := range []struct {
		name string
		prog *ebpf.Program
		data []byte
		ctx  skb
	}{
		{"egress4", k.Egress, v4, skb{Mark: m}},
		{"egress6", k.Egress, v6, skb{Mark: m}},
		{"egress4gso", k.Egress, v4, skb{Mark: m, GSOSegs: 10, GSOSize: 100}},
		{"egressClient", k.Egress, v4, skb{Mark: mark(b, l, ClassClient, 0, 0)}},
		{"egressDrop", k.Egress, v6, skb{Mark: 0}},
		{"ingress4", k.Ingress, v4, skb{Mark: m}},
		{"ingressClient", k.Ingress, v4, skb{Mark: mark(b, l, ClassClient, 0, 0)}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			const repeat = 100000
			for b.Loop() {
				o := &ebpf.RunOptions{Data: c.data, Context: c.ctx, Repeat: repeat}
				if _, err := c.prog.Run(o); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/repeat, "ns/packet")
		})
	}
}

// withRights runs f on a thread that has only these capabilities.
func withRights(f func() error, caps ...int) error {
	c := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread goes with its rights
		var data [2]unix.CapUserData
		for _, n := range caps {
			data[n/32].Effective |= 1 << (n % 32)
			data[n/32].Permitted |= 1 << (n % 32)
		}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
			c <- err
			return
		}
		c <- f()
	}()
	return <-c
}

// before says whether the kernel is older than one.
func before(tb testing.TB, major, minor uint32) bool {
	tb.Helper()
	version, err := features.LinuxVersionCode()
	must(tb, err)
	return version < major<<16|minor<<8
}

// wantsPerfmon says whether the verifier may refuse the programs without CAP_PERFMON:
// 6.14 does, 6.17 does not; those between have not been tried.
func wantsPerfmon(tb testing.TB) bool {
	tb.Helper()
	return before(tb, 6, 17)
}

// TestLeastRights loads the programs with three capabilities, and with two on
// the kernels that take them so; without CAP_PERFMON the verifier allows less.
// With one it says which is missing.
func TestLeastRights(t *testing.T) {
	lab.Require(t)
	load := func() error {
		k, err := loadTables(testLayout(t, DefaultMask), 1, false)
		if err != nil {
			return err
		}
		pin, err := loadExit(k, Exit{Num: 1, V4: pfx("192.0.2.1/32").Addr(), V6: pfx("2001:db8::1/128").Addr(), Device: "eth0"}, nil)
		if err != nil {
			return errors.Join(err, k.Close())
		}
		return errors.Join(pin.Close(), k.Close())
	}
	if err := withRights(load, unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON); err != nil {
		t.Errorf("with CAP_PERFMON: %+v", err)
	}
	err := withRights(load, unix.CAP_BPF, unix.CAP_NET_ADMIN)
	told := errors.Is(err, unix.EACCES) && strings.Contains(err.Error(), "lacks CAP_PERFMON")
	if err != nil && (!wantsPerfmon(t) || !told) {
		t.Errorf("without CAP_PERFMON: %+v", err)
	}
	refused := func() error { return plain(unix.EACCES) }
	if err := withRights(refused, unix.CAP_BPF); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "lacks CAP_PERFMON") {
		t.Errorf("the verifier's refusal is told as %q", err)
	}
	if err := withRights(refused, unix.CAP_PERFMON); err != unix.EACCES { //nolint:errorlint // the very same
		t.Errorf("with CAP_PERFMON the verifier's refusal is told as %q", err)
	}
	for has, want := range map[int]string{unix.CAP_BPF: "lacks CAP_NET_ADMIN", unix.CAP_NET_ADMIN: "lacks CAP_BPF"} {
		err := withRights(load, has)
		if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "MEMLOCK") {
			t.Errorf("with capability %d alone: %v", has, err)
		}
	}
}
