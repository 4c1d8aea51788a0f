package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/scripts/lab"
)

const tcxNext, tcxRedirect = 0xffffffff, 7

func ourMAC() net.HardwareAddr   { return net.HardwareAddr{2, 0xa1, 0xb2, 0xc3, 0xd4, 0xe5} }
func theirMAC() net.HardwareAddr { return net.HardwareAddr{2, 0x11, 0x22, 0x33, 0x44, 0xff} }

// onesSum is the checksum of RFC 1071 over an ICMPv6 message.
func onesSum(src, dst netip.Addr, message []byte) uint16 {
	a, b := src.As16(), dst.As16()
	all := append(append([]byte{}, a[:]...), b[:]...)
	all = binary.BigEndian.AppendUint32(all, uint32(len(message)))
	all = append(append(all, 0, 0, 0, 58), message...)
	if len(all)%2 == 1 {
		all = append(all, 0)
	}
	var sum uint32
	for i := 0; i < len(all); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(all[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// ask6 is a neighbour solicitation.
type ask6 struct {
	src, dst, target string // dst "": the target's solicited-node group
	options          []byte
	hop, typ, code   byte // 0: 255, 135 and 0
	spoil            func(frame []byte) []byte
}

func sourceOption() []byte { return append([]byte{1, 1}, theirMAC()...) }

func solicitedNode(target netip.Addr) netip.Addr {
	t := target.As16()
	return netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
}

func (a ask6) frame() []byte {
	src, target := netip.MustParseAddr(a.src), netip.MustParseAddr(a.target)
	dst := solicitedNode(target)
	if a.dst != "" {
		dst = netip.MustParseAddr(a.dst)
	}
	d, s, t := dst.As16(), src.As16(), target.As16()
	message := append(append([]byte{135, a.code, 0, 0, 0, 0, 0, 0}, t[:]...), a.options...)
	hop := byte(255)
	if a.hop != 0 {
		hop = a.hop
	}
	if a.typ != 0 {
		message[0] = a.typ
	}
	binary.BigEndian.PutUint16(message[2:], onesSum(src, dst, message))
	f := append([]byte{0x33, 0x33}, d[12:]...)
	if !dst.IsMulticast() {
		f = make([]byte, 6) // the loopback interface's, to which the kernel's test run brings it
	}
	f = append(append(bytes.Clone(f), theirMAC()...), 0x86, 0xdd, 0x60, 0, 0, 0)
	f = binary.BigEndian.AppendUint16(f, uint16(len(message)))
	f = append(append(append(append(f, 58, hop), s[:]...), d[:]...), message...)
	if a.spoil != nil {
		f = a.spoil(f)
	}
	return f
}

// checkAnswer says what is wrong with an advertisement.
func checkAnswer(f []byte, src, target string) error {
	s, t := netip.MustParseAddr(src), netip.MustParseAddr(target)
	sb, tb := s.As16(), t.As16()
	want := append(append(append([]byte{}, theirMAC()...), ourMAC()...), 0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255)
	want = append(append(want, tb[:]...), sb[:]...)
	message := append(append([]byte{136, 0, 0, 0, 0x60, 0, 0, 0}, tb[:]...), append([]byte{2, 1}, ourMAC()...)...)
	binary.BigEndian.PutUint16(message[2:], onesSum(t, s, message))
	if want = append(want, message...); !bytes.Equal(f, want) {
		return fmt.Errorf("answer\n%x\nwant\n%x", f, want)
	}
	return nil
}

func testResponder(tb testing.TB, prefixes []netip.Prefix, except ...netip.Addr) *Responder {
	tb.Helper()
	lab.Require(tb)
	r, err := loadResponderWith(ResponderOptions{MAC: ourMAC(), Prefixes: prefixes, Except: except})
	if err != nil {
		var v *ebpf.VerifierError
		if errors.As(err, &v) {
			tb.Fatalf("%+v", v)
		}
		tb.Fatal(err)
	}
	tb.Cleanup(func() { must(tb, r.Close()) })
	return r
}

// try gives the verdict on a frame and the frame as the program left it.
func (r *Responder) try(tb testing.TB, f []byte) (uint32, []byte) {
	tb.Helper()
	o := ebpf.RunOptions{Data: f, DataOut: make([]byte, 4096)}
	ret, err := r.objs.Answer.Run(&o)
	must(tb, err)
	return ret, o.DataOut
}

func TestResponderDecides(t *testing.T) {
	r := testResponder(t, []netip.Prefix{pfx("2001:db8:cafe::/64"), pfx("2001:db8:f00::/48"), pfx("2001:db8:1::7/128")},
		netip.MustParseAddr("2001:db8:cafe::1"), netip.MustParseAddr("198.51.100.1"))
	const in, router = "2001:db8:cafe::abcd:1234", "fe80::1"
	at := func(off int, v ...byte) func([]byte) []byte {
		return func(f []byte) []byte { copy(f[off:], v); return f }
	}
	cut := func(n int) func([]byte) []byte { return func(f []byte) []byte { return f[:len(f)-n] } }
	for _, c := range []struct {
		name   string
		ask    ask6
		answer bool
	}{
		{"multicast", ask6{src: router, target: in, options: sourceOption()}, true},
		{"unicast", ask6{src: router, target: in, dst: in}, true},
		{"from a global address", ask6{src: "2001:db8:100::1", target: in, options: sourceOption()}, true},
		{"from an address of the prefix", ask6{src: "2001:db8:cafe::1", target: in, options: sourceOption()}, true},
		{"first of the prefix", ask6{src: router, target: "2001:db8:cafe::"}, true},
		{"last of the prefix", ask6{src: router, target: "2001:db8:cafe:0:ffff:ffff:ffff:ffff"}, true},
		{"in the longer one", ask6{src: router, target: "2001:db8:f00:77::7"}, true},
		{"a single address", ask6{src: router, target: "2001:db8:1::7"}, true},
		{"options that are not known", ask6{src: router, target: in, options: append(sourceOption(), 14, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)}, true},
		{"as many options as there may be", ask6{src: router, target: in, options: bytes.Repeat(sourceOption(), 32)}, true},
		{"padded by the link", ask6{src: router, target: in, spoil: func(f []byte) []byte { return append(f, make([]byte, 20)...) }}, true},

		{"duplicate address detection", ask6{src: "::", target: in}, false},
		{"the gateway", ask6{src: router, target: "2001:db8:cafe::1"}, false},
		{"before the prefix", ask6{src: router, target: "2001:db8:cafd:ffff::1"}, false},
		{"after the prefix", ask6{src: router, target: "2001:db8:cafe:1::"}, false},
		{"beside the single address", ask6{src: router, target: "2001:db8:1::6"}, false},
		{"link-local target", ask6{src: router, target: "fe80::2"}, false},
		{"hop limit", ask6{src: router, target: in, hop: 254}, false},
		{"another type", ask6{src: router, target: in, typ: 136}, false},
		{"a code", ask6{src: router, target: in, code: 1}, false},
		{"wrong checksum", ask6{src: router, target: in, spoil: at(56, 1, 2)}, false},
		{"wrong byte in an option", ask6{src: router, target: in, options: sourceOption(), spoil: at(14+40+24+5, 0x77)}, false},
		{"to all nodes", ask6{src: router, target: in, dst: "ff02::1"}, false},
		{"to the group of another", ask6{src: router, target: in, dst: "ff02::1:ff00:1"}, false},
		{"to another address", ask6{src: router, target: in, dst: "2001:db8:cafe::2"}, false},
		{"from multicast", ask6{src: "ff02::2", target: in}, false},
		{"from a frame to many", ask6{src: router, target: in, spoil: at(6, 0x33)}, false},
		{"option of length 0", ask6{src: router, target: in, options: []byte{1, 0, 1, 2, 3, 4, 5, 6}}, false},
		{"option beyond the end", ask6{src: router, target: in, options: []byte{1, 2, 1, 2, 3, 4, 5, 6}}, false},
		{"half an option", ask6{src: router, target: in, options: []byte{1, 1, 2, 3}}, false},
		{"too many options", ask6{src: router, target: in, options: bytes.Repeat(sourceOption(), 33)}, false},
		{"cut in the option", ask6{src: router, target: in, options: sourceOption(), spoil: cut(1)}, false},
		{"cut in the target", ask6{src: router, target: in, spoil: cut(8)}, false},
		{"cut after the header", ask6{src: router, target: in, spoil: cut(24)}, false},
		{"to another host's MAC", ask6{src: router, target: in, dst: in, spoil: at(0, 2, 9, 9, 9, 9, 9)}, false},
		{"length too short", ask6{src: router, target: in, spoil: at(18, 0, 16)}, false},
		{"UDP", ask6{src: router, target: in, spoil: at(20, 17)}, false},
		{"hop-by-hop header", ask6{src: router, target: in, spoil: at(20, 0)}, false},
		{"version 4 within", ask6{src: router, target: in, spoil: at(14, 0x45)}, false},
		{"IPv4", ask6{src: router, target: in, spoil: at(12, 0x08, 0x00)}, false},
		{"VLAN", ask6{src: router, target: in, spoil: func(f []byte) []byte {
			return append(append(bytes.Clone(f[:12]), 0x81, 0, 0, 7), f[12:]...)
		}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, before := c.ask.frame(), r.Answered()
			ret, out := r.try(t, f)
			if !c.answer {
				if ret != tcxNext || !bytes.Equal(out, f) || r.Answered() != before {
					t.Errorf("verdict %d, %d answered, frame\n%x\nwas\n%x", int32(ret), r.Answered()-before, out, f)
				}
				return
			}
			if ret != tcxRedirect || r.Answered() != before+1 {
				t.Fatalf("verdict %d, %d answered", int32(ret), r.Answered()-before)
			}
			if err := checkAnswer(out, c.ask.src, c.ask.target); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestResponderOfRandomPackets: whatever comes, what is not answered goes on as it
// was, and only whole solicitations for the prefix are answered.
func TestResponderOfRandomPackets(t *testing.T) {
	r := testResponder(t, []netip.Prefix{pfx("2001:db8:cafe::/64")})
	rnd := rand.New(rand.NewPCG(1, 2))
	good := ask6{src: "fe80::1", target: "2001:db8:cafe::7", options: sourceOption()}.frame()
	const ipEnd = 14 + 40 // the kernel's test run takes no shorter ones
	for i := range 20000 {
		f := bytes.Clone(good)
		switch i % 3 {
		case 0: // one bit
			f[rnd.IntN(len(f))] ^= 1 << rnd.IntN(8)
		case 1: // some bytes, and an end
			for range 1 + rnd.IntN(8) {
				f[rnd.IntN(len(f))] = byte(rnd.Uint32())
			}
			f = f[:ipEnd+rnd.IntN(len(f)-ipEnd+1)]
		case 2: // all
			f = f[:ipEnd+rnd.IntN(len(f)-ipEnd+1)]
			for j := range f {
				f[j] = byte(rnd.Uint32())
			}
		}
		ret, out := r.try(t, f)
		if ret == tcxNext {
			if !bytes.Equal(out, f) {
				t.Fatalf("changed and let go:\n%x\nwas\n%x", out, f)
			}
			continue
		}
		// Not of the checksum's span are the frame's header, and of the IP header
		// the traffic class and the flow label.
		same := bytes.Clone(f)
		copy(same[:12], good)
		copy(same[14:18], good[14:])
		if ret != tcxRedirect || !bytes.Equal(same, good) || f[14]>>4 != 6 {
			t.Fatalf("verdict %d on\n%x", int32(ret), f)
		}
	}
	if r.Answered() == 0 {
		t.Error("nothing was answered, although the frame's addresses may be any")
	}
}

func TestResponderSet(t *testing.T) {
	r := testResponder(t, nil)
	answers := func(target string) bool {
		ret, _ := r.try(t, ask6{src: "fe80::1", target: target}.frame())
		return ret == tcxRedirect
	}
	addr := netip.MustParseAddr
	for _, c := range []struct {
		prefixes []netip.Prefix
		except   []netip.Addr
		yes, no  []string
		list     string
	}{
		{nil, nil, nil, []string{"2001:db8:a::1", "2001:db8:b::1"}, "[]"},
		{[]netip.Prefix{pfx("2001:db8:a::9/64")}, nil, []string{"2001:db8:a::1"}, []string{"2001:db8:b::1"}, "[2001:db8:a::/64]"},
		{
			[]netip.Prefix{pfx("2001:db8:a::/64"), pfx("2001:db8:b::/64")},
			[]netip.Addr{addr("2001:db8:a::1"), addr("fe80::1%eth0"), addr("198.51.100.1")},
			[]string{"2001:db8:a::2", "2001:db8:b::1"},
			[]string{"2001:db8:a::1"},
			"[2001:db8:a::/64 2001:db8:b::/64]",
		},
		{
			[]netip.Prefix{pfx("2001:db8:a::1/128"), pfx("2001:db8:a::2/128")},
			[]netip.Addr{addr("2001:db8:a::2")},
			[]string{"2001:db8:a::1"},
			[]string{"2001:db8:a::2", "2001:db8:a::3", "2001:db8:b::1"},
			"[2001:db8:a::1/128]",
		},
		{[]netip.Prefix{pfx("2001:db8::/32")}, nil, []string{"2001:db8:a::1", "2001:db8:a::2", "2001:db8:b::1"}, []string{"2001:db9::1"}, "[2001:db8::/32]"},
		{nil, nil, nil, []string{"2001:db8:a::1"}, "[]"},
	} {
		must(t, r.Set(c.prefixes, c.except))
		for _, a := range c.yes {
			if !answers(a) {
				t.Errorf("%s: %s is not answered for", c.list, a)
			}
		}
		for _, a := range c.no {
			if answers(a) {
				t.Errorf("%s: %s is answered for", c.list, a)
			}
		}
		if got := fmt.Sprint(r.Prefixes()); got != c.list {
			t.Errorf("prefixes %s, want %s", got, c.list)
		}
	}
	n := r.Answered()
	for _, bad := range []netip.Prefix{pfx("192.0.2.0/24"), pfx("::ffff:192.0.2.0/120"), {}} {
		if err := r.Set([]netip.Prefix{bad}, nil); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
	must(t, r.Close())
	if err := r.Set(nil, nil); err == nil || r.Answered() != n {
		t.Errorf("after Close: error %v, %d answered, were %d", err, r.Answered(), n)
	}
}

func TestResponderRefuses(t *testing.T) {
	lab.Require(t)
	for name, o := range map[string]ResponderOptions{
		"no interface":      {MAC: ourMAC()},
		"no such interface": {MAC: ourMAC(), Interface: 1 << 30},
		"no MAC":            {Interface: 1},
		"long MAC":          {Interface: 1, MAC: make(net.HardwareAddr, 8)},
		"IPv4":              {Interface: 1, MAC: ourMAC(), Prefixes: []netip.Prefix{pfx("192.0.2.0/24")}},
	} {
		if r, err := NewResponder(o); err == nil {
			t.Errorf("%s is taken", name)
			must(t, r.Close())
		}
	}
	err := noTCX(fmt.Errorf("attach: %w", ebpf.ErrNotSupported))
	if !errors.Is(err, ErrNoTCX) || !strings.Contains(err.Error(), "want 6.6") || !strings.Contains(err.Error(), "(Linux ") {
		t.Errorf("an old kernel is told as %q", err)
	}
	if other := noTCX(unix.EPERM); !errors.Is(other, unix.EPERM) || errors.Is(other, ErrNoTCX) {
		t.Errorf("a refusal is told as %q", other)
	}
	if f := ProbeResponder(netcfg.TryIngress); !f.OK {
		t.Errorf("the probe says %v", f.Err)
	}
	rights := func(caps ...int) error {
		return withRights(func() error { return ProbeResponder(netcfg.TryIngress).Err }, caps...)
	}
	if err := rights(unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON); err != nil {
		t.Errorf("with CAP_PERFMON: %+v", err)
	}
	if err := rights(unix.CAP_BPF, unix.CAP_NET_ADMIN); err != nil && (!wantsPerfmon(t) || !strings.Contains(err.Error(), "lacks CAP_PERFMON")) {
		t.Errorf("with CAP_BPF and CAP_NET_ADMIN: %+v", err)
	}
	if err := rights(unix.CAP_NET_ADMIN); !errors.Is(err, errNoRights) {
		t.Errorf("without CAP_BPF: %v", err)
	}
}

// TestSharedPrefix: on a link where the upstream asks for every address, a thousand
// random ones of the prefix go out and are answered. The host forwards nothing.
func TestSharedPrefix(t *testing.T) {
	lab.Require(t)
	w, err := lab.NewWorld(false)
	must(t, err)
	defer func() { must(t, w.Close()) }()
	for _, name := range []string{"net/ipv6/conf/all/forwarding", "net/ipv6/conf/eth0/forwarding", "net/ipv6/conf/eth0/proxy_ndp"} {
		must(t, w.Host.Sysctl(name, "0"))
	}
	shared := pfx(lab.SharedNet6)
	must(t, w.Host.AddLocal(shared))
	at := netip.AddrPortFrom(netip.MustParseAddr(lab.OriginAddr6), 7001)
	l, err := w.Origin.Listen(at)
	must(t, err)
	defer l.Close()
	seen := make(chan netip.Addr, 1)
	go func() {
		defer close(seen)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			seen <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
			c.Close()
		}
	}()
	eth0, err := w.Host.Netlink().LinkByName("eth0")
	must(t, err)
	var r *Responder
	var in *netcfg.Netlink
	except := netip.MustParseAddr("2001:db8:100:cafe::bad")
	must(t, w.Host.Do(func() error {
		if in, err = netcfg.Open(netcfg.Options{StateDir: t.TempDir()}); err != nil {
			return err
		}
		r, err = NewResponder(ResponderOptions{
			Interface: eth0.Attrs().Index, MAC: eth0.Attrs().HardwareAddr,
			Prefixes: []netip.Prefix{shared}, Except: []netip.Addr{except},
			Ingress: in, Name: "wayout-test-neighbours",
		})
		return err
	}))
	defer func() { must(t, in.Close()) }()
	defer func() { must(t, r.Close()) }()
	if got := allMulti(t, w.Host, eth0.Attrs().Index); got != 1 && !before(t, 6, 0) {
		t.Errorf("the interface is asked %d times to take in all multicast, want once", got)
	}

	rnd := rand.New(rand.NewPCG(3, 4))
	const count = 1000
	sources := make(map[netip.Addr]bool, count)
	for len(sources) < count {
		a := shared.Addr().As16()
		binary.BigEndian.PutUint64(a[8:], rnd.Uint64())
		src := netip.AddrFrom16(a)
		sources[src] = true
		c, err := w.Host.DialFrom(src, at)
		must(t, err)
		if got := <-seen; got != src {
			t.Fatalf("the origin saw %s, want %s", got, src)
		}
		c.Close()
		if len(sources)%100 == 0 {
			must(t, w.ISP1.ForgetNeighbours("host0"))
		}
	}
	if n := r.Answered(); n < count {
		t.Errorf("%d answered, want %d at least", n, count)
	}
	t.Logf("%d answered", r.Answered())

	// Another host's address is not answered for: the upstream's kernel says so.
	must(t, w.ISP1.Sysctl("net/ipv6/neigh/host0/mcast_solicit", "1"))
	n := r.Answered()
	if c, err := w.ISP1.Dial(netip.AddrPortFrom(except, 7001)); !errors.Is(err, unix.EHOSTUNREACH) {
		if err == nil {
			c.Close()
		}
		t.Errorf("the exception: %v", err)
	}
	// Nor is a host kept from an address by duplicate address detection, nor one
	// asked for behind a VLAN tag; frames that end anywhere are no answer's reason.
	other := shared.Addr().Next()
	for _, f := range [][]byte{
		ask6{src: "::", target: other.String()}.frame(),
		ask6{src: "fe80::1", target: other.String(), spoil: func(f []byte) []byte {
			return append(append(bytes.Clone(f[:12]), 0x81, 0, 0, 7), f[12:]...)
		}}.frame(),
	} {
		inject(t, w.ISP1, "host0", f)
	}
	whole := ask6{src: "fe80::1", target: other.String()}.frame()
	for end := 14; end < len(whole); end++ {
		inject(t, w.ISP1, "host0", whole[:end])
	}
	// The last one is answered, so that what came before has been seen.
	inject(t, w.ISP1, "host0", whole)
	eventually(t, "an answer", func() bool { return r.Answered() > n })
	if got := r.Answered(); got != n+1 {
		t.Errorf("%d answered, want 1", got-n)
	}

	must(t, r.Close())
	if got := allMulti(t, w.Host, eth0.Attrs().Index); got != 0 {
		t.Error("the interface still takes in all multicast")
	}
	if c, err := w.ISP1.Dial(netip.AddrPortFrom(shared.Addr().Next().Next(), 7001)); !errors.Is(err, unix.EHOSTUNREACH) {
		if err == nil {
			c.Close()
		}
		t.Errorf("after Close: %v", err)
	}
}

// allMulti is how often an interface has been asked to take in all multicast; 0
// where the kernel does not tell (before 6.0).
func allMulti(t *testing.T, n *lab.NS, index int) (count uint32) {
	t.Helper()
	const iflaAllMulti = 61 // IFLA_ALLMULTI, Linux 6.0
	must(t, n.Do(func() error {
		rib, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
		if err != nil {
			return err
		}
		messages, err := syscall.ParseNetlinkMessage(rib)
		if err != nil {
			return err
		}
		for _, m := range messages {
			if m.Header.Type != unix.RTM_NEWLINK {
				continue
			}
			attrs, err := syscall.ParseNetlinkRouteAttr(&m)
			if err != nil {
				return err
			}
			for _, a := range attrs {
				if a.Attr.Type == iflaAllMulti && binary.NativeEndian.Uint32(m.Data[4:]) == uint32(index) {
					count = binary.NativeEndian.Uint32(a.Value)
					return nil
				}
			}
		}
		if before(t, 6, 0) {
			return nil
		}
		return fmt.Errorf("interface %d: not told", index)
	}))
	return count
}

// inject sends a frame.
func inject(t *testing.T, n *lab.NS, dev string, frame []byte) {
	t.Helper()
	l, err := n.Netlink().LinkByName(dev)
	must(t, err)
	must(t, n.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Protocol: htons(unix.ETH_P_IPV6)}), unix.Close(fd))
	}))
}

func BenchmarkResponder(b *testing.B) {
	r := testResponder(b, []netip.Prefix{pfx("2001:db8:cafe::/64")})
	for name, f := range map[string][]byte{
		"TCP": frame(0x86dd, ip6("2001:db8::7", 6), tcp(12), 1000),
		"DAD": ask6{src: "::", target: "2001:db8:cafe::7"}.frame(),
	} {
		b.Run(name, func(b *testing.B) {
			const repeat = 100000
			for b.Loop() {
				if _, err := r.objs.Answer.Run(&ebpf.RunOptions{Data: f, Repeat: repeat}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/repeat, "ns/packet")
		})
	}
}

// Prefixes gives what is answered for, in order.
func (r *Responder) Prefixes() []netip.Prefix {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []netip.Prefix
	for p, yes := range r.set {
		if yes {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}
