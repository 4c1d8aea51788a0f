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
