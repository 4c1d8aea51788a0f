package netcfg_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/scripts/lab"
)

// TestRoutedBlock: what the host itself says from an address of a routed block (the
// reset of a closed port, that of a socket which was ended, that of one which has gone,
// the ICMP error of a closed UDP port) leaves by the block's uplink, though table main
// leads by the other one. Packet captures on both are the judges.
func TestRoutedBlock(t *testing.T) {
	host, near, far := lab.TestNS(t, "host"), lab.TestNS(t, "isp1"), lab.TestNS(t, "isp2")
	must(t, errors.Join(lab.Veth(host, "eth0", near, "far0"), lab.Veth(host, "eth1", far, "far1")))
	add := func(n *lab.NS, link string, list ...string) {
		t.Helper()
		for _, s := range list {
			must(t, n.AddAddr(link, netip.MustParsePrefix(s)))
		}
	}
	route := func(n *lab.NS, dst, via string) {
		t.Helper()
		must(t, n.AddRoute(netip.MustParsePrefix(dst), netip.MustParseAddr(via)))
	}
	add(host, "eth0", "198.51.100.5/24", "2001:db8:100::5/64")
	add(host, "eth1", "203.0.113.5/28", "2001:db8:200::5/64")
	add(near, "far0", "198.51.100.1/24", "2001:db8:100::1/64")
	add(far, "far1", "203.0.113.1/28", "2001:db8:200::1/64")
	route(host, "0.0.0.0/0", "198.51.100.1")
	route(host, "::/0", "2001:db8:100::1")
	route(far, "192.0.2.0/28", "203.0.113.5") // the block
	route(far, "2001:db8:f::/64", "2001:db8:200::5")
	// The client is behind both uplinks.
	add(near, "lo", "192.0.2.77/32", "2001:db8:77::77/128")
	add(far, "lo", "192.0.2.77/32", "2001:db8:77::77/128")

	var k *netcfg.Netlink
	must(t, host.Do(func() (err error) {
		k, err = netcfg.Open(netcfg.Options{Layout: layout()})
		return err
	}))
	defer func() { must(t, k.Close()) }()
	apply(t, k, want(isp1NoAddrs(), with(isp2(), func(u *netcfg.Uplink) {
		u.Gateway6, u.ManageAddresses = netip.MustParseAddr("2001:db8:200::1"), true
		u.Addresses = addrs("192.0.2.2", "192.0.2.3", "192.0.2.9", "2001:db8:f::9")
	})))

	wrong, err := host.Capture("eth0")
	must(t, err)
	right, err := host.Capture("eth1")
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	awaits := func(what string, is func(lab.Packet) bool) {
		t.Helper()
		if err := right.Await(ctx, func(p lab.Packet) bool { return p.Out && is(p) }); err != nil {
			t.Fatalf("%s did not leave by eth1: %v; by eth0 went %v", what, err, wrong.Packets())
		}
	}
	for _, c := range []struct{ client, block string }{{"192.0.2.77", "192.0.2.3"}, {"192.0.2.77", "192.0.2.9"}, {"2001:db8:77::77", "2001:db8:f::9"}} {
		client, block := netip.MustParseAddr(c.client), netip.MustParseAddr(c.block)
		reset := func(from, to netip.AddrPort) func(lab.Packet) bool {
			return func(p lab.Packet) bool { return p.Flags&lab.RST != 0 && p.Src == from && p.Dst == to }
		}

		// A closed port. The refusal that comes to the client is the first witness.
		closed := netip.AddrPortFrom(block, 9)
		must(t, far.Do(func() error {
			d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 0))}
			if _, err := d.Dial("tcp", closed.String()); !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("dial %s: got error %w, want a refusal", closed, err)
			}
			return nil
		}))
		awaits("the reset of a closed port", func(p lab.Packet) bool { return p.Flags&lab.RST != 0 && p.Src == closed })

		// A closed UDP port.
		must(t, far.Do(func() error {
			conn, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(client, 0)), net.UDPAddrFromAddrPort(closed))
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }()
			if _, err := conn.Write([]byte("x")); err != nil {
				return err
			}
			if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("read after a datagram to %s: got error %w, want a refusal", closed, err)
			}
			return nil
		}))
		awaits("an ICMP error", func(p lab.Packet) bool {
			return (p.Proto == unix.IPPROTO_ICMP || p.Proto == unix.IPPROTO_ICMPV6) && p.Src.Addr() == block
		})

		// A path's connection that is cut: the socket's own reset has the mark, what
		// the peer sends before it has heard of that is answered without one.
		server, err := far.Listen(netip.AddrPortFrom(client, 0))
		must(t, err)
		var conn net.Conn
		must(t, host.Do(func() (err error) {
			d := net.Dialer{
				Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(block, 0)),
				Control: func(_, _ string, raw syscall.RawConn) (err error) {
					return errors.Join(raw.Control(func(fd uintptr) {
						err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x20000)
					}), err)
				},
			}
			conn, err = d.Dial("tcp", server.Addr().String())
			return err
		}))
		seen, err := server.Accept()
		must(t, err)
		from, to := conn.LocalAddr().(*net.TCPAddr).AddrPort(), conn.RemoteAddr().(*net.TCPAddr).AddrPort()
		if n, err := k.EndSockets(ctx, netcfg.Mark{Value: 0x20000, Mask: 0xff0000}); n != 1 || err != nil {
			t.Errorf("%d sockets ended, error %v, want 1", n, err)
		}
		awaits("the reset of an ended socket", reset(from, to))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("the process reads error %v, want ECONNABORTED", err)
		}
		_ = conn.Close()
		_ = seen.Close()
		_ = server.Close()

		// A connection that the host knows nothing of: an ACK without a socket.
		strayPort := netip.AddrPortFrom(block, 11)
		must(t, far.Do(func() error { return stray(client, strayPort) }))
		awaits("the reset of a socket that has gone", func(p lab.Packet) bool { return p.Flags&lab.RST != 0 && p.Src == strayPort })
	}
	for _, p := range wrong.Packets() {
		if p.Out && (netip.MustParsePrefix("192.0.2.0/28").Contains(p.Src.Addr()) || netip.MustParsePrefix("2001:db8:f::/64").Contains(p.Src.Addr())) {
			t.Errorf("left by eth0: %s", p)
		}
	}
	must(t, errors.Join(right.Close(), wrong.Close()))
}

// stray sends from one address to another as if there were a connection: a socket that
// is put together by hand (TCP_REPAIR) says so of itself.
func stray(from netip.Addr, to netip.AddrPort) error {
	l := loopback{family: unix.AF_INET, addr: from}
	if from.Is6() {
		l.family = unix.AF_INET6
	}
	fd, err := unix.Socket(l.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	repair := func(on int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, on) }
	if err := errors.Join(repair(1), unix.Bind(fd, l.at(0))); err != nil {
		return err
	}
	l.addr = to.Addr()
	if err := errors.Join(unix.Connect(fd, l.at(int(to.Port()))), repair(0)); err != nil {
		return err
	}
	if _, err := unix.Write(fd, []byte("x")); err != nil && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		return err
	}
	return nil
}
