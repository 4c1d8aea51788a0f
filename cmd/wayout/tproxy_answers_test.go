package main_test

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"wayout/scripts/lab"
)

// unanswered fails the test when an uplink has a packet to one of some addresses.
func (g *gateway) unanswered(when string, at ...string) {
	g.t.Helper()
	for i, c := range g.up {
		for _, p := range settled(g.t, c) {
			if slices.Contains(at, p.Dst.Addr().String()) {
				g.t.Errorf("%s: isp%d has %s", when, i+1, p)
				break
			}
		}
	}
}

// TestTransparentStrangers: who says to be where the host knows no network, or on the
// network of an uplink, is not answered by that, in the name of whom it asked for.
func TestTransparentStrangers(t *testing.T) {
	const (
		stranger4, stranger6   = "172.20.0.9", "fd77::9"
		neighbour4, neighbour6 = "198.51.100.77", "2001:db8:100::77"
	)
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	for _, name := range []string{"all", "lan0"} { // of IPv6 there is no check at all
		if err := g.Host.Sysctl("net/ipv4/conf/"+name+"/rp_filter", "0"); err != nil {
			t.Fatal(err)
		}
	}
	g.start(uplinkConfig(lan(`divert: [tcp/443, udp/1500], select: {out: p6}`)))
	for _, a := range []string{stranger4 + "/32", stranger6 + "/128", neighbour4 + "/32", neighbour6 + "/128"} {
		if err := g.Client.AddAddr("eth0", netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{neighbour4 + "/32", neighbour6 + "/128"} {
		if err := g.ISP1.AddAddr("host0", netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	for from, port := range map[string]func(int) string{stranger4: at4, stranger6: at6, neighbour4: at4, neighbour6: at6} {
		if err := g.Client.Do(func() error {
			d := net.Dialer{Timeout: brief, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			if c, err := d.Dial("tcp", port(443)); err == nil {
				t.Errorf("%s is answered by %s", from, c.RemoteAddr())
				c.Close()
			}
			c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)})
			if err != nil {
				return err
			}
			defer c.Close()
			if got := sendOn(t, c, port(1500), "hello", brief); got != "nobody" {
				t.Errorf("%s is told %q", from, got)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	g.unanswered("all the time", stranger4, stranger6, neighbour4, neighbour6)
	// One that there is a way to is answered.
	for net, via := range map[string]string{stranger4 + "/32": lab.ClientAddr4, stranger6 + "/128": lab.ClientAddr6} {
		if err := g.Host.AddRoute(netip.MustParsePrefix(net), netip.MustParseAddr(via)); err != nil {
			t.Fatal(err)
		}
	}
	if got := g.dialFrom(stranger4, at4(443)); got != "origin "+p6Of4 {
		t.Errorf("behind a router: told %q", got)
	}
	if got := g.dialFrom(stranger6, at6(443)); got != "origin "+p6Of6 {
		t.Errorf("behind a router: told %q", got)
	}
}

// TestTransparentClientsGone: when the interface goes that clients are behind, what
// was still to be told to them stays here.
func TestTransparentClientsGone(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	g.start(uplinkConfig(lan(`divert: [tcp/443], select: {out: p6}`)))
	var far []*net.TCPConn
	for _, at := range everywhere(443) {
		c, err := g.Client.Dial(netip.MustParseAddrPort(at))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		far = append(far, c)
		if got := talk(c, "some words", patience); got == "nobody" {
			t.Fatalf("%s: told nothing", at)
		}
		if _, err := c.Write(make([]byte, 64<<10)); err != nil { // it all comes back
			t.Fatal(err)
		}
	}
	h := g.Host.Netlink()
	lan0, err := h.LinkByName("lan0")
	if err == nil {
		err = h.LinkSetDown(lan0)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range far {
		c.Close()
	}
	time.Sleep(2 * brief)                   // the kernel says it again
	if err := g.daemon.Kill(); err != nil { // and resets
		t.Fatal(err)
	}
	time.Sleep(brief)
	g.unanswered("the interface is down", lab.ClientAddr4, lab.ClientAddr6)
}

// TestTransparentNobodyRefuses: without a daemon nobody is refused in the name of
// others, who would learn of it by an uplink when they are in no network of the host's.
func TestTransparentNobodyRefuses(t *testing.T) {
	const stranger = "fd77::9"
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	g.start(uplinkConfig(lan(`divert: [tcp/443, udp/1500], select: {out: p6}`)))
	if err := g.Client.AddAddr("eth0", netip.MustParsePrefix(stranger+"/128")); err != nil {
		t.Fatal(err)
	}
	if got := g.dialFrom(lab.ClientAddr6, at6(443)); got != "origin "+p6Of6 {
		t.Errorf("served: told %q", got)
	}
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{stranger, lab.ClientAddr6} {
		if err := g.Client.Do(func() error {
			d := net.Dialer{Timeout: brief, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			var late net.Error
			if _, err := d.Dial("tcp", at6(443)); !errors.As(err, &late) || !late.Timeout() {
				t.Errorf("%s: error %v, want that nobody answers", from, err)
			}
			c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)})
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.WriteToUDPAddrPort([]byte("hello"), netip.MustParseAddrPort(at6(1500)))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(brief)
	g.unanswered("the daemon is gone", stranger, lab.ClientAddr6)
	g.run(lab.Program{})
	if got := g.dialFrom(lab.ClientAddr6, at6(443)); got != "origin "+p6Of6 {
		t.Errorf("served again: told %q", got)
	}
}
