package main_test

import (
	"bufio"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"wayout/scripts/lab"
)

// TestTransparentInterfaceToCome: an interface that is not there keeps nothing from
// one that is.
func TestTransparentInterfaceToCome(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	tell(t, g.Host, "host", "[::]:443", "[::]:1080")
	config := strings.ReplaceAll(lan(`divert: [tcp/443, tcp/1080, udp/1500], select: {out: p6}`), "interface: lan0", "interface: [lan9, lan0]") +
		"  - {name: all, type: socks_proxy, listen: \"" + lab.RoutedNet4 + ":1080\", open: true, escaper: out}\n"
	g.start(uplinkConfig("  - {name: whole, type: direct_fixed, nodes: [{id: all, ipv4: \"" + lab.RoutedNet4 + "\", uplink: isp1}]}\n" + config))
	works := func(when string) {
		t.Helper()
		g.dialAll(when, map[string]string{at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6, lab.HostAddr4 + ":443": "host " + lab.ClientAddr4})
		g.sendAll(when, map[string]string{at4(1500): "origin " + p6Of4 + " hello", at6(1500): "origin " + p6Of6 + " hello"})
	}
	works("one of two interfaces is there")
	// A prefix of the host's own on a port that is diverted too: its listener has it.
	c, err := g.Client.Dial(netip.MustParseAddrPort("192.0.2.200:1080"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte{5, 1, 0}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2)
	if _, err := c.Read(b); err != nil || b[0] != 5 || b[1] != 0 {
		t.Errorf("the listener on a prefix answers %v, %v", b, err)
	}
	c.Close()

	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	g.dialAll("killed", map[string]string{at4(443): "nobody", at6(443): "nobody", lab.HostAddr4 + ":443": "host " + lab.ClientAddr4})
	g.run(lab.Program{})
	works("started again")
	g.kept("all the time", toPort(443))
}

// renew makes the interface between client and host anew, by another number.
func (g *gateway) renew() {
	g.t.Helper()
	h := g.Host.Netlink()
	old, err := h.LinkByName("lan0")
	if err == nil {
		err = h.LinkDel(old)
	}
	if err == nil {
		err = lab.Veth(g.Client, "eth0", g.Host, "lan0")
	}
	if err != nil {
		g.t.Fatal(err)
	}
	for _, a := range []struct {
		ns   *lab.NS
		link string
		addr string
	}{{g.Host, "lan0", lab.HostAddr4 + "/24"}, {g.Host, "lan0", lab.HostAddr6 + "/64"}, {g.Client, "eth0", lab.ClientAddr4 + "/24"}, {g.Client, "eth0", lab.ClientAddr6 + "/64"}} {
		if err := a.ns.AddAddr(a.link, netip.MustParsePrefix(a.addr)); err != nil {
			g.t.Fatal(err)
		}
	}
	for _, r := range [][2]string{{"0.0.0.0/0", lab.HostAddr4}, {"::/0", lab.HostAddr6}} {
		if err := g.Client.AddRoute(netip.MustParsePrefix(r[0]), netip.MustParseAddr(r[1])); err != nil {
			g.t.Fatal(err)
		}
	}
}

// TestTransparentInterfaceAnew: an interface that goes and comes again, by another
// number, opens no way to the host's own listeners, with a daemon or without.
func TestTransparentInterfaceAnew(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	tell(t, g.Host, "host", "[::]:443")
	tellDatagrams(t, g.Host, "host", "[::]:1500")
	g.start(uplinkConfig(lan(`divert: [tcp/443, udp/1500], select: {out: p6}`)))
	works := func(when string) {
		t.Helper()
		g.dialAll(when, map[string]string{at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6, "[" + lab.HostAddr6 + "]:443": "host " + lab.ClientAddr6})
		g.sendAll(when, map[string]string{at4(1500): "origin " + p6Of4 + " hello", at6(1500): "origin " + p6Of6 + " hello"})
	}
	works("started")
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	g.renew()
	g.dialAll("anew and without a daemon", map[string]string{at4(443): "nobody", at6(443): "nobody", "[" + lab.HostAddr6 + "]:443": "host " + lab.ClientAddr6})
	g.sendAll("anew and without a daemon", map[string]string{at4(1500): "nobody", at6(1500): "nobody", lab.HostAddr4 + ":1500": "host " + lab.ClientAddr4 + " hello"})
	g.run(lab.Program{})
	works("started again")
	for range 3 {
		g.renew()
		// Until the daemon hears of it nobody answers.
		for at, want := range map[string]string{at6(443): "origin " + p6Of6, "[" + lab.HostAddr6 + "]:443": "host " + lab.ClientAddr6} {
			var told string
			eventually(t, "anew with a daemon: "+at+" is answered", func() bool {
				told = g.dial(at, brief)
				return told != "nobody"
			})
			if told != want {
				t.Errorf("anew with a daemon: %s is answered by %q", at, told)
			}
		}
		works("anew with a daemon")
	}
	g.kept("all the time", toPort(443))
	g.kept("all the time", toPort(1500))
}

// TestTransparentOwnAddresses: what is the host's own is known anew when it changes
// by ourselves: addresses that a stop takes away are nobody's, and those that apply
// puts there are the host's.
func TestTransparentOwnAddresses(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Host, "host", "[::]:443")
	tellDatagrams(t, g.Host, "host", "[::]:1500")
	g.start(uplinkConfig(lan(`divert: [tcp/443, udp/1500], select: {out: p6}`)))
	g.stop()
	// They would be answered now, since no rule sends the answers to an uplink.
	g.dialAll("stopped", map[string]string{"[" + p2Of6 + "]:443": "nobody", "[" + p6Of6 + "]:443": "nobody", lab.HostAddr4 + ":443": "host " + lab.ClientAddr4})
	g.sendAll("stopped", map[string]string{p2Of4 + ":1500": "nobody"})
	g.wayout("apply")
	g.dialAll("applied", map[string]string{
		"[" + lab.HostAddr6 + "]:443": "host " + lab.ClientAddr6, "[" + p2Of6 + "]:443": "host " + lab.ClientAddr6, p6Of4 + ":443": "host " + lab.ClientAddr4,
	})
}

// TestTransparentOwnAtStart: addresses that the daemon has just put on an interface
// are the host's own while it still waits for those of IPv6 to become usable.
func TestTransparentOwnAtStart(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Host, "host", "[::]:443")
	for name, value := range map[string]string{"accept_dad": "1", "dad_transmits": "100"} { // for longer than it waits
		if err := g.Host.Sysctl("net/ipv6/conf/eth0/"+name, value); err != nil {
			t.Fatal(err)
		}
	}
	g.write(uplinkConfig(lan(`divert: tcp/443, select: {out: p6}`)))
	// It says when it does not wait any more.
	r, w := io.Pipe()
	waited := make(chan struct{})
	go func() {
		in := bufio.NewScanner(r)
		for in.Scan() && !strings.Contains(in.Text(), "addresses are not usable yet") {
		}
		close(waited)
		_, _ = io.Copy(io.Discard, r)
	}()
	type started struct {
		d   *lab.Daemon
		err error
	}
	ready := make(chan started, 1)
	go func() {
		d, err := lab.StartDaemon(g.Host, lab.Program{Path: binary, Args: []string{"serve", "--config", g.config}, Stderr: w})
		ready <- started{d, err}
	}()
	eventually(t, "the host answers", func() bool { return g.dial(p2Of4+":443", brief) == "host "+lab.ClientAddr4 })
	select {
	case <-waited:
		t.Error("the host answers when the daemon is ready, and not before")
	default:
	}
	s := <-ready
	if s.err != nil {
		t.Fatal(s.err)
	}
	g.watchOver(s.d)
}

// TestTransparentApplyBesideDaemon: apply with another configuration than the
// daemon's leaves what is diverted to the daemon.
func TestTransparentApplyBesideDaemon(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443, 444)...)
	tell(t, g.Host, "host", "[::]:443", "[::]:444")
	g.start(uplinkConfig(lan(`divert: tcp/443, rest: drop, select: {out: p6}`)))
	before := g.state()
	for _, other := range []string{lan(`divert: tcp/444, select: {out: p6}`), lan(`divert: tcp/443, select: {out: p6}`), lan(`divert: tcp/*, rest: drop, select: {out: p2}`), ""} {
		g.write(uplinkConfig(other))
		if _, errs, code := g.command("apply", "--config", g.config); code != 1 || !strings.Contains(errs, "wayout reload") {
			t.Errorf("apply of %q: exit code %d: %s", other, code, errs)
		}
		g.same("applied", before)
	}
	g.dialAll("applied", map[string]string{at4(443): "origin " + p6Of4, at6(443): "origin " + p6Of6, at6(444): "nobody"})
	g.kept("all the time", func(p lab.Packet) bool { return p.Dst.Port() == 443 || p.Dst.Port() == 444 })
	// Another selection changes no rule.
	g.write(uplinkConfig(lan(`divert: tcp/443, rest: drop, select: {out: p2}`)))
	g.wayout("apply")
	g.same("applied", before)
}

// TestTransparentAnotherConfiguration: a daemon that starts with other ports than the
// last one had leaves none of them to the host's own listeners, nor does apply.
func TestTransparentAnotherConfiguration(t *testing.T) {
	g := newGateway(t)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500, 1600)...)
	tellDatagrams(t, g.Host, "host", "[::]:1500", "[::]:1600")
	configs := []string{uplinkConfig(lan(`divert: udp/1500, select: {out: p6}`)), uplinkConfig(lan(`divert: udp/1600, select: {out: p6}`))}
	g.start(configs[0])
	stop := make(chan struct{})
	var all sync.WaitGroup
	for _, at := range everywhere(1500, 1600) {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// Little patience, so that there are many.
				if told := g.send(at, "hello", brief/100); strings.HasPrefix(told, "host") {
					t.Errorf("%s is answered by %q", at, told)
					return
				}
			}
		})
	}
	for i := range 8 {
		if err := g.daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		g.write(configs[(i+1)%2])
		if i%4 > 1 {
			g.wayout("apply")
		}
		g.run(lab.Program{})
	}
	close(stop)
	all.Wait()
	g.sendAll("in the end", map[string]string{at4(1500): "origin " + p6Of4 + " hello", at6(1500): "origin " + p6Of6 + " hello"})
}
