package bpf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// pinScene is a wire whose host has this process in a pinned cgroup: path 1 has
// the right addresses, path 2 the wrong ones.
type pinScene struct {
	*wire
	progs *Programs
	pin   *Pin
	dir   string
}

func newPinScene(t testing.TB, bpffs string) *pinScene {
	t.Helper()
	s := &pinScene{wire: newWire(t), dir: filepath.Join(bpffs, "test-pins", "one")}
	var err error
	s.progs, err = LoadTables(Options{Layout: s.layout, Paths: 2})
	must(t, err)
	t.Cleanup(func() { must(t, s.progs.Close()) })
	must(t, s.progs.SetPath(1, s.guard()))
	must(t, s.progs.SetPath(2, Guard{V4: pfx(wrong4 + "/32"), V6: pfx(wrong6 + "/128"), IfIndex: s.eth[0]}))
	s.pin, err = s.progs.Pin(s.leaf.Path(), s.dir, []byte("about"), s.exit(t, 1))
	must(t, err)
	t.Cleanup(func() { must(t, RemovePin(s.dir)) })
	return s
}

func (s *pinScene) exit(t testing.TB, num uint32) Exit {
	e := Exit{Num: num, Mark: mark(t, s.layout, ClassPath, 1, num)}
	e.V4, e.V6 = netip.MustParseAddr(right4), netip.MustParseAddr(right6)
	if num == 2 {
		e.V4, e.V6 = netip.MustParseAddr(wrong4), netip.MustParseAddr(wrong6)
	}
	return e
}

// try is what a process does with one socket that it makes itself.
type try struct {
	domain, typ int
	bind        string // address:port, "" for none
	device      string
	connect     bool // else sendto
	to          string
}

func (c try) String() string {
	verb := map[bool]string{true: "connect", false: "sendto"}[c.connect]
	return strings.TrimSpace(fmt.Sprintf("domain %d type %d %s %s from %s %s", c.domain, c.typ, verb, c.to, c.bind, c.device))
}

// sockaddr makes what a socket of a domain takes: mapped where it has to be.
func (c try) sockaddr(at string) unix.Sockaddr {
	a := netip.MustParseAddrPort(at)
	if c.domain == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// do runs it on the host. The socket stays open until the test ends, so that no
// two have the same port.
func (c try) do(t testing.TB, w *wire) (from netip.AddrPort, sockMark int, err error) {
	t.Helper()
	err = w.host.Do(func() error {
		fd, err := unix.Socket(c.domain, c.typ|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		if c.device != "" {
			must(t, unix.BindToDevice(fd, c.device))
		}
		if c.bind != "" {
			if err := unix.Bind(fd, c.sockaddr(c.bind)); err != nil {
				return fmt.Errorf("bind: %w", err)
			}
		}
		if c.connect {
			if err := unix.Connect(fd, c.sockaddr(c.to)); err != nil {
				return fmt.Errorf("connect: %w", err)
			}
			_, err = unix.Write(fd, []byte("x"))
		} else {
			err = unix.Sendto(fd, []byte("x"), 0, c.sockaddr(c.to))
		}
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
		sockMark, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		must(t, err)
		sa, err := unix.Getsockname(fd)
		must(t, err)
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			from = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			from = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		}
		return nil
	})
	return from, sockMark, err
}

const (
	toTCP4, toUDP4 = far4 + ":7001", far4 + ":7002"
	toTCP6, toUDP6 = "[" + far6 + "]:7001", "[" + far6 + "]:7002"
)

// tries are all the ways of a process that leave by the path's address.
func tries() []try {
	const map4 = "[::ffff:" + far4 + "]:"
	in, in6, tcp, udp := unix.AF_INET, unix.AF_INET6, unix.SOCK_STREAM, unix.SOCK_DGRAM
	return []try{
		{domain: in, typ: tcp, connect: true, to: toTCP4},
		{domain: in6, typ: tcp, connect: true, to: toTCP6},
		{domain: in6, typ: tcp, connect: true, to: map4 + "7001"},
		{domain: in, typ: udp, connect: true, to: toUDP4},
		{domain: in6, typ: udp, connect: true, to: toUDP6},
		{domain: in6, typ: udp, connect: true, to: map4 + "7002"},
		{domain: in, typ: udp, to: toUDP4},
		{domain: in6, typ: udp, to: toUDP6},
		{domain: in6, typ: udp, to: map4 + "7002"},
		{domain: in, typ: udp, bind: "0.0.0.0:0", to: toUDP4},
		{domain: in6, typ: udp, bind: "[::]:0", to: toUDP6},
		{domain: in6, typ: udp, bind: "[::]:0", to: map4 + "7002"},
		{domain: in, typ: tcp, device: "eth0", connect: true, to: toTCP4},
		{domain: in6, typ: udp, device: "eth0", to: toUDP6},
	}
}

func (s *pinScene) leavesBy(t *testing.T, exit Exit) {
	t.Helper()
	for _, c := range tries() {
		from, m, err := c.do(t, s.wire)
		if err != nil {
			t.Errorf("%s: %v", c, err)
			continue
		}
		want := exit.V4
		if netip.MustParseAddrPort(c.to).Addr().Unmap().Is6() {
			want = exit.V6
		}
		if c.connect && from.Addr() != want {
			t.Errorf("%s: the socket is bound to %s, want %s", c, from, want)
		}
		if uint32(m) != exit.Mark {
			t.Errorf("%s: the mark is %#x, want %#x", c, m, exit.Mark)
		}
		s.seen.await(t, c.String(), func(all []pkt) bool {
			return slices.ContainsFunc(all, func(p pkt) bool { return p.fromHost && p.srcPort == from.Port() && p.src == want })
		})
	}
}

// TestPinnedProcessesLeaveByThePath has a process that knows nothing of its path
// make sockets in every way.
func TestPinnedProcessesLeaveByThePath(t *testing.T) {
	s := newPinScene(t, bpffs(t))
	s.leavesBy(t, s.exit(t, 1))
	// Foreign addresses and interfaces.
	in, in6, tcp, udp := unix.AF_INET, unix.AF_INET6, unix.SOCK_STREAM, unix.SOCK_DGRAM
	for _, c := range []try{
		{domain: in, typ: tcp, bind: wrong4 + ":0", connect: true, to: toTCP4},
		{domain: in, typ: tcp, bind: "198.51.100.2:0", connect: true, to: toTCP4},
		{domain: in6, typ: tcp, bind: "[" + wrong6 + "]:0", connect: true, to: toTCP6},
		{domain: in6, typ: tcp, bind: "[::ffff:" + wrong4 + "]:0", connect: true, to: toTCP4},
		{domain: in, typ: udp, bind: wrong4 + ":0", to: toUDP4},
		{domain: in6, typ: udp, bind: "[" + wrong6 + "]:0", to: toUDP6},
		{domain: in, typ: tcp, device: "eth1", connect: true, to: toTCP4},
		{domain: in, typ: udp, device: "eth1", to: toUDP4},
		{domain: in6, typ: udp, device: "eth1", connect: true, to: toUDP6},
	} {
		if _, _, err := c.do(t, s.wire); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v, want EPERM", c, err)
		}
	}
	// A port that is bound without an address is bound to no address later.
	for _, c := range []try{
		{domain: in, typ: udp, bind: "0.0.0.0:0", connect: true, to: toUDP4},
		{domain: in6, typ: tcp, bind: "[::]:0", connect: true, to: toTCP6},
	} {
		if _, _, err := c.do(t, s.wire); !errors.Is(err, lacking(t)) {
			t.Errorf("%s: %v, want %v", c, err, lacking(t))
		}
	}
	s.loopback(t)
	c := s.progs.Read(1)
	if c.PacketsOut == 0 || c.PacketsIn == 0 || c.Made != 4 || c.Tried != 4 || c.GuardDrops() == 0 || c.DropSource != 0 {
		t.Errorf("counted %+v", c)
	}
	if n := s.pin.Conns(); n.Made != 4 || n.Tried != 4 {
		t.Errorf("connections %+v", n)
	}
	if got := s.progs.Read(2); got != (Counters{}) {
		t.Errorf("the other path has %+v", got)
	}
	s.pinMarker(t, right4, right6)
	for _, p := range s.seen.all() {
		if p.fromHost && (p.proto == unix.IPPROTO_TCP || p.proto == unix.IPPROTO_UDP) && p.src.String() != right4 && p.src.String() != right6 {
			t.Errorf("the far side has seen %+v", p)
		}
	}
}

// pinMarker sends by the path and waits for it on the far side.
func (s *pinScene) pinMarker(t *testing.T, sources ...string) {
	t.Helper()
	for i, c := range []try{{domain: unix.AF_INET, typ: unix.SOCK_DGRAM, to: toUDP4}, {domain: unix.AF_INET6, typ: unix.SOCK_DGRAM, to: toUDP6}} {
		from, _, err := c.do(t, s.wire)
		must(t, err)
		s.seen.await(t, "the marker", func(all []pkt) bool {
			return slices.ContainsFunc(all, func(p pkt) bool {
				return p.fromHost && p.srcPort == from.Port() && p.src.String() == sources[i]
			})
		})
	}
}

// loopback has listeners on the wildcard and connections to them stay as they
// would be.
func (s *pinScene) loopback(t *testing.T) {
	t.Helper()
	before := s.progs.Read(1)
	for _, c := range []struct {
		domain          int
		listen, to, src string
	}{
		{unix.AF_INET, "0.0.0.0:0", "127.0.0.1", "127.0.0.1"},
		{unix.AF_INET, "127.0.0.3:0", "127.0.0.3", "127.0.0.1"},
		{unix.AF_INET6, "[::]:0", "::1", "::1"},
		{unix.AF_INET6, "[::]:0", "::ffff:127.0.0.1", "127.0.0.1"},
	} {
		for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			var port int
			must(t, s.host.Do(func() error {
				fd, err := unix.Socket(c.domain, typ|unix.SOCK_CLOEXEC, 0)
				must(t, err)
				t.Cleanup(func() { unix.Close(fd) })
				must(t, unix.Bind(fd, try{domain: c.domain}.sockaddr(c.listen)))
				if typ == unix.SOCK_STREAM {
					must(t, unix.Listen(fd, 8))
				}
				sa, err := unix.Getsockname(fd)
				must(t, err)
				switch sa := sa.(type) {
				case *unix.SockaddrInet4:
					port = sa.Port
				case *unix.SockaddrInet6:
					port = sa.Port
				}
				return nil
			}))
			to := netip.AddrPortFrom(netip.MustParseAddr(c.to), uint16(port)).String()
			from, _, err := try{domain: c.domain, typ: typ, connect: true, to: to}.do(t, s.wire)
			if err != nil || from.Addr().String() != c.src {
				t.Errorf("connect type %d to %s on %s: from %s, %v", typ, to, c.listen, from, err)
			}
			if typ == unix.SOCK_DGRAM {
				if _, _, err := (try{domain: c.domain, typ: typ, to: to}).do(t, s.wire); err != nil {
					t.Errorf("sendto %s on %s: %v", to, c.listen, err)
				}
			}
		}
	}
	if after := s.progs.Read(1); after.PacketsOut != before.PacketsOut || after.PacketsIn != before.PacketsIn || after.Tried != before.Tried {
		t.Errorf("the path has counted loopback traffic: %+v, before %+v", after, before)
	}
}

// lacking is the error for what a path lacks; programs have a say in that since 5.18.
func lacking(t *testing.T) error {
	t.Helper()
	if before(t, 5, 18) {
		return unix.EPERM
	}
	return unix.EADDRNOTAVAIL
}

// TestPinLacksAFamily has EADDRNOTAVAIL for it, and the guard's word when the
// pin leads nowhere.
func TestPinLacksAFamily(t *testing.T) {
	s := newPinScene(t, bpffs(t))
	only := map[int]Exit{unix.AF_INET6: s.exit(t, 1), unix.AF_INET: s.exit(t, 1)}
	e := only[unix.AF_INET6]
	e.V6 = netip.Addr{}
	only[unix.AF_INET6] = e
	e = only[unix.AF_INET]
	e.V4 = netip.Addr{}
	only[unix.AF_INET] = e
	for lacks, exit := range only {
		must(t, s.pin.Point(exit))
		for _, c := range tries() {
			family := unix.AF_INET6
			if netip.MustParseAddrPort(c.to).Addr().Unmap().Is4() {
				family = unix.AF_INET
			}
			_, _, err := c.do(t, s.wire)
			if family == lacks && !errors.Is(err, lacking(t)) || family != lacks && err != nil {
				t.Errorf("without family %d, %s: %v", lacks, c, err)
			}
		}
	}
	must(t, s.pin.Point(Exit{}))
	for _, c := range tries() {
		if _, _, err := c.do(t, s.wire); !errors.Is(err, unix.EPERM) {
			t.Errorf("pinned to nothing, %s: %v", c, err)
		}
	}
	s.loopback(t)
	// An address that has gone.
	e = s.exit(t, 1)
	e.V4 = netip.MustParseAddr("198.51.100.99")
	must(t, s.pin.Point(e))
	if _, _, err := tries()[0].do(t, s.wire); !errors.Is(err, lacking(t)) {
		t.Errorf("from an address that the host lacks: %v", err)
	}
}

// TestPinPointsElsewhere moves a pin to another path, grows the tables under it,
// and lets another run take it over.
func TestPinPointsElsewhere(t *testing.T) {
	s := newPinScene(t, bpffs(t))
	old, err := s.packet(ask{network: "udp4"})
	must(t, err)
	defer old.Close()
	must(t, s.pin.Point(s.exit(t, 2)))
	if got := s.pin.Exit(); got != s.exit(t, 2) {
		t.Errorf("it points to %+v", got)
	}
	s.leavesBy(t, s.exit(t, 2))
	must(t, s.progs.SetPath(100, s.guard())) // the tables have room for 3
	s.leavesBy(t, s.exit(t, 2))
	if c := s.progs.Read(2); c.Made != 8 || s.pin.Conns().Made != 8 {
		t.Errorf("%+v, %+v", c, s.pin.Conns())
	}
	// A daemon that is killed leaves it; the next has tables of its own.
	must(t, s.progs.Close())
	s.pinMarker(t, wrong4, wrong6)
	found, err := FindPins(filepath.Dir(s.dir))
	must(t, err)
	id, err := CgroupID(s.leaf.Path())
	must(t, err)
	if len(found) != 1 || found[0].Dir != s.dir || string(found[0].About) != "about" || found[0].Cgroup != id || id != s.pin.Cgroup() {
		t.Errorf("found %+v", found)
	}
	p, err := LoadTables(Options{Layout: s.layout, Paths: 8})
	must(t, err)
	defer p.Close()
	must(t, p.SetPath(7, s.guard()))
	e := s.exit(t, 1)
	e.Num, e.Mark = 7, mark(t, s.layout, ClassPath, 1, 7)
	pin, err := p.Pin(s.leaf.Path(), s.dir, []byte("again"), e)
	must(t, err)
	s.leavesBy(t, e)
	if c := p.Read(7); c.Made != 4 {
		t.Errorf("%+v", c)
	}
	must(t, pin.Remove())
	if left, err := os.ReadDir(filepath.Dir(s.dir)); err != nil || len(left) != 0 {
		t.Errorf("pins are left: %v, %v", left, err)
	}
	if _, _, err := (try{domain: unix.AF_INET, typ: unix.SOCK_DGRAM, bind: "198.51.100.2:0", to: toUDP4}).do(t, s.wire); err != nil {
		t.Errorf("once the pin is removed: %v", err)
	}
}

// TestTablesGrowWithoutACgroup: a cgroup that goes while it is pinned is in nobody's
// way.
func TestTablesGrowWithoutACgroup(t *testing.T) {
	s := newPinScene(t, bpffs(t))
	must(t, s.leaf.Remove())
	for _, l := range s.pin.links { // the kernel severs them some time later
		eventually(t, "a link without a cgroup", func() bool {
			info, err := l.Info()
			must(t, err)
			return info.Cgroup().CgroupId == 0
		})
	}
	must(t, s.progs.SetPath(100, s.guard())) // the tables have room for 3
	must(t, s.pin.Remove())
	var err error
	s.leaf, err = MakeLeaf(leafName()) // which the end removes
	must(t, err)
}

// TestPinIsForOlderSocketsToo has sockets that were made before the pin.
func TestPinIsForOlderSocketsToo(t *testing.T) {
	s := newPinScene(t, bpffs(t))
	must(t, s.pin.Remove())
	conn, err := s.dial(ask{network: "tcp4", src: wrong4}, 0)
	must(t, err)
	defer conn.Close()
	u, err := s.packet(ask{network: "udp4"})
	must(t, err)
	defer u.Close()
	d, err := s.dial(ask{network: "udp4", src: wrong4}, 0)
	must(t, err)
	defer d.Close()
	s.marker(t)
	n := len(s.seen.all())
	pin, err := s.progs.Pin(s.leaf.Path(), s.dir, nil, s.exit(t, 1))
	must(t, err)
	defer pin.Leave()
	if _, err := d.Write([]byte("x")); !errors.Is(err, unix.EPERM) {
		t.Errorf("a datagram from where the socket was bound: %v", err)
	}
	if _, err := conn.Write([]byte("1 1\nx")); err != nil {
		t.Errorf("TCP says nothing to that: %v", err)
	}
	eventually(t, "its segments are dropped", func() bool { return s.progs.Read(1).DropSource > 1 })
	to := netip.MustParseAddrPort(toUDP4)
	if _, err := u.WriteTo([]byte("x"), addrOf(to)); err != nil {
		t.Errorf("a datagram of an older socket: %v", err)
	}
	s.pinMarker(t, right4, right6)
	for _, p := range s.seen.all()[n:] {
		if p.fromHost && (p.proto == unix.IPPROTO_TCP || p.proto == unix.IPPROTO_UDP) && p.src.String() != right4 && p.src.String() != right6 {
			t.Errorf("the far side has seen %+v", p)
		}
	}
}

func TestPinIsRefused(t *testing.T) {
	lab.Require(t)
	p, err := LoadTables(Options{Layout: testLayout(t, DefaultMask), Paths: 1})
	must(t, err)
	defer p.Close()
	root, err := FindCgroup2()
	must(t, err)
	fs := bpffs(t)
	if _, err := p.Pin(filepath.Join(root, "none-such"), filepath.Join(fs, "x"), nil, Exit{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a cgroup that is not there: %v", err)
	}
	g, err := MakeGroup()
	must(t, err)
	defer func() { must(t, g.End(t.Context())) }()
	if _, err := p.Pin(g.Path(), filepath.Join(t.TempDir(), "x"), nil, Exit{}); !errors.Is(err, ErrNotBPFFS) {
		t.Errorf("pins on no bpf file system: %v", err)
	}
	for name, e := range map[string]Exit{
		"IPv6 as IPv4": {V4: netip.MustParseAddr("::1")},
		"IPv4 as IPv6": {V6: netip.MustParseAddr("192.0.2.1")},
		"mapped":       {V6: netip.MustParseAddr("::ffff:192.0.2.1")},
		"long device":  {Device: "sixteen-letters!"},
	} {
		if _, err := p.Pin(g.Path(), filepath.Join(fs, "z", "y"), nil, e); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if _, err := p.Pin(g.Path(), filepath.Join(fs, "z", "y"), make([]byte, aboutSize+1), Exit{}); err == nil {
		t.Error("a long text is taken")
	}
	if left, err := FindPins(filepath.Join(fs, "z")); err != nil || len(left) != 1 || left[0].Cgroup != 0 {
		t.Errorf("after refusals there are %+v, %v", left, err) // the directory alone
	}
	if none, err := FindPins(filepath.Join(fs, "none")); err != nil || none != nil {
		t.Errorf("%v, %v", none, err)
	}
}

func addrOf(a netip.AddrPort) net.Addr { return net.UDPAddrFromAddrPort(a) }
