package bpf

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestWrongDialIsRefusedAtOnce makes every wrong connect and datagram that the
// hooks before routing can know, and sees EPERM, the count and no packet.
func TestWrongDialIsRefusedAtOnce(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 4})
	must(t, p.SetPath(2, Guard{V4: pfx(right4 + "/32"), IfIndex: w.eth[0]})) // no IPv6
	must(t, p.SetPath(3, Guard{V4: pfx("0.0.0.0/0"), V6: pfx("::/0"), IfIndex: w.eth[0]}))
	path := func(n uint32) uint32 { return mark(t, w.layout, ClassPath, 1, n) }
	for _, c := range []struct {
		name string
		ask  ask
		num  uint32 // under which a refusal is counted
		ok   bool
	}{
		{"right IPv4", ask{network: "tcp4", src: right4, mark: path(1)}, 1, true},
		{"right IPv6", ask{network: "tcp6", src: right6, mark: path(1)}, 1, true},
		{"right device", ask{network: "tcp4", src: right4, device: "eth0", mark: path(1)}, 1, true},
		{"wrong IPv4", ask{network: "tcp4", src: wrong4, mark: path(1)}, 1, false},
		{"wrong IPv6", ask{network: "tcp6", src: wrong6, mark: path(1)}, 1, false},
		{"not bound", ask{network: "tcp4", mark: path(1)}, 1, false},
		{"not bound, IPv6", ask{network: "tcp6", mark: path(1)}, 1, false},
		{"other device", ask{network: "tcp4", src: right4, device: "eth1", mark: path(1)}, 1, false},
		{"family that the path lacks", ask{network: "tcp6", src: right6, mark: path(2)}, 2, false},
		{"not bound, path of any address", ask{network: "tcp6", mark: path(3)}, 3, true},
		{"path without a guard", ask{network: "tcp4", src: right4, mark: path(4)}, 4, false},
		{"number beyond the tables", ask{network: "tcp4", src: right4, mark: path(4711)}, 0, false},
		{"no mark", ask{network: "tcp4", src: right4}, 0, false},
		{"a mark of others", ask{network: "tcp6", src: right6, mark: 0x40000}, 0, false},
		{"control", ask{network: "tcp4", src: wrong4, mark: mark(t, w.layout, ClassControl, 0, 0)}, 0, true},
		{"right datagram", ask{network: "udp4", src: right4, mark: path(1)}, 1, true},
		{"wrong datagram", ask{network: "udp4", src: wrong4, mark: path(1)}, 1, false},
		{"wrong datagram, IPv6", ask{network: "udp6", src: wrong6, mark: path(1)}, 1, false},
		{"datagram without a mark", ask{network: "udp6", src: right6}, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := p.Read(c.num)
			start := time.Now()
			conn, err := w.dial(c.ask, 20*time.Second)
			if c.ok {
				must(t, err)
				must(t, conn.Close())
				return
			}
			if !errors.Is(err, unix.EPERM) {
				t.Fatalf("dial: %v", err)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("the refusal took %s", took)
			}
			after := p.Read(c.num)
			if after.Refused != before.Refused+1 {
				t.Errorf("refused went from %d to %d", before.Refused, after.Refused)
			}
			if after.GuardDrops() != before.GuardDrops()+1 {
				t.Errorf("guard drops went from %d to %d", before.GuardDrops(), after.GuardDrops())
			}
		})
	}
	for _, c := range []struct {
		name string
		ask  ask
		num  uint32
		ok   bool
	}{
		{"right", ask{network: "udp4", src: right4, mark: path(1)}, 1, true},
		{"right IPv6", ask{network: "udp6", src: right6, mark: path(1)}, 1, true},
		{"wrong", ask{network: "udp4", src: wrong4, mark: path(1)}, 1, false},
		{"wrong IPv6", ask{network: "udp6", src: wrong6, mark: path(1)}, 1, false},
		{"not bound", ask{network: "udp4", src: "0.0.0.0", mark: path(1)}, 1, false},
		{"no mark", ask{network: "udp4", src: right4}, 0, false},
	} {
		t.Run("unconnected datagram, "+c.name, func(t *testing.T) {
			before := p.Read(c.num).Refused
			s, err := w.packet(c.ask)
			must(t, err)
			defer s.Close()
			to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(c.ask.far()))
			_, err = s.WriteTo([]byte("x"), to)
			if c.ok {
				must(t, err)
			} else if !errors.Is(err, unix.EPERM) {
				t.Errorf("write: %v", err)
			} else if got := p.Read(c.num).Refused; got != before+1 {
				t.Errorf("refused went from %d to %d", before, got)
			}
		})
	}
	if got, want := p.Unmarked(), uint64(5); got != want {
		t.Errorf("%d unmarked, want %d", got, want)
	}
	w.marker(t)
	for _, pk := range w.seen.all() {
		if pk.fromHost && pk.src == netip.MustParseAddr(wrong4) && pk.proto == unix.IPPROTO_TCP {
			return // of control, which may
		}
	}
	t.Error("the capture has not seen what may pass")
}

// TestPrefixGuard: a path that is a whole prefix may send from each of its addresses
// and from no other, nor before it has bound one, in the hooks before routing and in
// the packet's.
func TestPrefixGuard(t *testing.T) {
	const net4, net6 = "203.0.113.128/25", "2001:db8:beef::/64"
	w := newWire(t)
	// The host has more, so that nothing but the guard stops it.
	const all4, all6 = "203.0.112.0/22", "2001:db8:beee::/47"
	must(t, errors.Join(
		w.host.AddLocal(pfx(all4)), w.far.AddRoute(pfx(all4), netip.MustParseAddr("198.51.100.2")),
		w.host.AddLocal(pfx(all6)), w.far.AddRoute(pfx(all6), netip.MustParseAddr("2001:db8:100::2")),
	))
	p := w.load(t, Options{Paths: 2})
	must(t, p.SetPath(2, Guard{V4: pfx(net4), V6: pfx(net6), IfIndex: w.eth[0]}))
	m := mark(t, w.layout, ClassPath, 1, 2)
	right := map[string][]string{
		"4": {"203.0.113.128", "203.0.113.129", "203.0.113.200", "203.0.113.255"},
		"6": {"2001:db8:beef::", "2001:db8:beef::1", "2001:db8:beef:0:123:4567:89ab:cdef", "2001:db8:beef:0:ffff:ffff:ffff:ffff"},
	}
	wrong := map[string][]string{
		"4": {"203.0.113.127", "203.0.114.128", right4, ""},
		"6": {"2001:db8:beee:ffff:ffff:ffff:ffff:ffff", "2001:db8:beef:1::", right6, ""},
	}
	// send writes from an unconnected socket that is bound to any address, or to the
	// source, with the source named by the message (IP_PKTINFO) when it is bound to any.
	send := func(family, src string, named bool) error {
		a := ask{network: "udp" + family, src: src, mark: m}
		if named {
			a.src = ""
		}
		s, err := w.packet(a)
		if err != nil {
			return err
		}
		defer s.Close()
		var control []byte
		if named && family == "4" {
			control = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: netip.MustParseAddr(src).As4()})
		} else if named {
			control = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: netip.MustParseAddr(src).As16()})
		}
		_, _, err = s.(*net.UDPConn).WriteMsgUDPAddrPort([]byte("x"), control, netip.MustParseAddrPort(a.far()))
		return err
	}
	for _, family := range []string{"4", "6"} {
		for _, src := range right[family] {
			for _, network := range []string{"tcp", "udp"} {
				c, err := w.dial(ask{network: network + family, src: src, mark: m}, time.Minute)
				if err != nil {
					t.Errorf("%s from %s: %v", network, src, err)
					continue
				}
				if network == "udp" {
					if _, err := c.Write([]byte("x")); err != nil {
						t.Errorf("write from %s: %v", src, err)
					}
				}
				must(t, c.Close())
			}
			for _, named := range []bool{false, true} {
				if err := send(family, src, named); err != nil {
					t.Errorf("a datagram from %s (named: %v): %v", src, named, err)
				}
			}
		}
		if c := p.Read(2); c.GuardDrops() != 0 || c.PacketsOut == 0 {
			t.Errorf("IPv%s: counted %+v", family, c)
		}
	}
	asked := p.Read(2).Refused
	for _, family := range []string{"4", "6"} {
		for _, src := range wrong[family] {
			for _, network := range []string{"tcp", "udp"} {
				c, err := w.dial(ask{network: network + family, src: src, mark: m}, time.Minute)
				if !errors.Is(err, unix.EPERM) {
					t.Errorf("%s from %q: %v", network, src, err)
				}
				if err == nil {
					c.Close()
				}
				asked++
			}
			for _, named := range []bool{false, true}[:1+min(1, len(src))] {
				if err := send(family, src, named); !errors.Is(err, unix.EPERM) {
					t.Errorf("a datagram from %q (named: %v): %v", src, named, err)
				}
				asked++
			}
		}
	}
	if got := p.Read(2).Refused; got != asked {
		t.Errorf("%d refused, want %d", got, asked)
	}

	// The packet's own hook, without those before it.
	for _, name := range []string{"connect4", "connect6", "sendmsg4", "sendmsg6"} {
		must(t, p.links[name].Close())
	}
	drops := p.Read(2).DropSource
	for family, list := range wrong {
		for _, src := range list[:3] {
			if err := send(family, src, false); !errors.Is(err, unix.EPERM) {
				t.Errorf("a datagram's packet from %q: %v", src, err)
			}
			drops++
		}
		for _, src := range right[family] {
			if err := send(family, src, false); err != nil {
				t.Errorf("a datagram's packet from %s: %v", src, err)
			}
		}
	}
	if got := p.Read(2).DropSource; got != drops {
		t.Errorf("%d packets dropped, want %d", got, drops)
	}
	w.nothingFrom(t, "203.0.113.127", "203.0.114.128", "2001:db8:beee:ffff:ffff:ffff:ffff:ffff", "2001:db8:beef:1::")
}

// TestEgressDrops shows the guard on packets, without the hooks that refuse
// before it, and for what changes after a connection stands.
func TestEgressDrops(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 4})
	m := mark(t, w.layout, ClassPath, 1, 1)
	open := map[string]net.Conn{}
	for network, src := range map[string]string{"tcp4": right4, "tcp6": right6, "udp4": right4, "udp6": right6} {
		c, err := w.dial(ask{network: network, src: src, mark: m}, 0)
		must(t, err)
		defer c.Close()
		open[network] = c
	}
	for _, name := range []string{"connect4", "connect6", "sendmsg4", "sendmsg6"} {
		must(t, p.links[name].Close())
	}
	before := p.Read(1)
	for network, src := range map[string]string{"tcp4": wrong4, "tcp6": wrong6} {
		var timeout net.Error
		c, err := w.dial(ask{network: network, src: src, mark: m}, 50*time.Millisecond)
		if err == nil {
			c.Close()
			t.Errorf("%s from %s connects", network, src)
		} else if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s from %s: %v", network, src, err)
		}
	}
	for network, src := range map[string]string{"udp4": wrong4, "udp6": wrong6} {
		c, err := w.dial(ask{network: network, src: src, mark: m}, 0)
		must(t, err)
		if _, err := c.Write([]byte("x")); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s from %s: %v", network, src, err)
		}
		c.Close()
	}
	after := p.Read(1)
	if got := after.DropSource - before.DropSource; got < 4 {
		t.Errorf("%d packets dropped, want one of each at least", got)
	}
	w.nothingFrom(t, wrong4, wrong6)

	// A datagram without a mark, one by another interface, and one of a path
	// that has been cleared.
	unmarked := p.Unmarked()
	c, err := w.dial(ask{network: "udp4", src: wrong4}, 0)
	must(t, err)
	defer c.Close()
	if _, err := c.Write([]byte("x")); !errors.Is(err, unix.EPERM) {
		t.Errorf("a datagram without a mark: %v", err)
	}
	if got := p.Unmarked(); got != unmarked+1 {
		t.Errorf("unmarked went from %d to %d", unmarked, got)
	}
	must(t, p.SetPath(2, Guard{V4: pfx(wrong4 + "/32"), IfIndex: w.eth[1]}))
	c, err = w.dial(ask{network: "udp4", src: wrong4, mark: mark(t, w.layout, ClassPath, 1, 2)}, 0)
	must(t, err)
	defer c.Close()
	if _, err := c.Write([]byte("x")); !errors.Is(err, unix.EPERM) {
		t.Errorf("a datagram by another interface: %v", err)
	}
	if got := p.Read(2); got.DropInterface != 1 || got.PacketsOut != 0 {
		t.Errorf("counted %+v", got)
	}
	must(t, p.ClearPath(1))
	for _, network := range []string{"udp4", "udp6"} {
		if _, err := open[network].Write([]byte("x")); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s of a path that has been cleared: %v", network, err)
		}
	}
	if got := p.Read(1).DropUnknown; got < 2 {
		t.Errorf("%d packets of no path in force, want 2 at least", got)
	}
	w.nothingFrom(t, wrong4, wrong6)
}

// TestClientSideIsLeftAlone accepts a connection in the daemon's own cgroup:
// the accepted socket and the SYN-ACK before it go by the listener's mark.
func TestClientSideIsLeftAlone(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 1})
	for _, c := range []struct {
		name string
		mark uint32
		ok   bool
	}{
		{"marked", mark(t, w.layout, ClassClient, 0, 0), true},
		{"not marked", 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var l net.Listener
			must(t, w.host.Do(func() error {
				lc := net.ListenConfig{Control: ask{mark: c.mark}.control}
				lc.SetMultipathTCP(false)
				var err error
				l, err = lc.Listen(t.Context(), "tcp4", net.JoinHostPort(right4, "0"))
				return err
			}))
			defer l.Close()
			before := p.Unmarked()
			var conn net.Conn
			err := w.far.Do(func() error {
				// The client's socket is in our cgroup as well.
				d := net.Dialer{Timeout: 300 * time.Millisecond, Control: ask{mark: mark(t, w.layout, ClassControl, 0, 0)}.control}
				if c.ok {
					d.Timeout = 20 * time.Second
				}
				var err error
				conn, err = d.Dial("tcp4", l.Addr().String())
				return err
			})
			if !c.ok {
				if err == nil {
					conn.Close()
					t.Error("a listener without a mark has answered")
				}
				if p.Unmarked() == before {
					t.Error("its SYN-ACK is not counted")
				}
				return
			}
			must(t, err)
			defer conn.Close()
			accepted, err := l.Accept()
			must(t, err)
			defer accepted.Close()
			_, err = accepted.Write([]byte("hello"))
			must(t, err)
			b := make([]byte, 5)
			_, err = conn.Read(b)
			must(t, err)
			if got := p.Unmarked(); got != before || string(b) != "hello" {
				t.Errorf("%q came, unmarked went from %d to %d", b, before, got)
			}
		})
	}
	if c := p.Read(1); c != (Counters{}) {
		t.Errorf("a path has counted %+v", c)
	}
}
