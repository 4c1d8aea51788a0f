package main_test

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

func isICMP(p lab.Packet) bool {
	return p.Proto == unix.IPPROTO_ICMP || p.Proto == unix.IPPROTO_ICMPV6
}

// TestTransparentUnreachable: what a client's ICMP says of a flow that it has left
// does not leave the host, with the daemon or without; its own pings do, as before. An
// origin that says that nobody is there says so of the path's address.
func TestTransparentUnreachable(t *testing.T) {
	g := newGateway(t)
	g.start(uplinkConfig(lan(`divert: ["udp/1500-1999"], select: {out: p6}`)))
	at := g.capture(g.Client, "eth0")
	errorsOut := 0
	for _, a := range []string{at4(1500), at6(1500)} {
		server := datagramsAt(t, g.Origin, a)
		f := g.flowAt(a)
		seen := f.say(server, "hello")
		if err := f.c.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := server.WriteToUDPAddrPort([]byte("too late"), seen); err != nil {
			t.Fatal(err)
		}
		errorsOut++
		eventually(t, "the client says that nobody is there any more", func() bool {
			n := 0
			for _, p := range settled(t, at) {
				if p.Out && isICMP(p) && p.Dst.Addr() == f.to.Addr() {
					n++
				}
			}
			return n == 1
		})
	}
	// Nobody at the origin.
	g.sendAll("nobody is there", map[string]string{at4(1700): "nobody", at6(1700): "nobody"})
	mustAwait(t, g.up[1], "the origin says so", func(p lab.Packet) bool {
		return p.Out && p.Proto == unix.IPPROTO_ICMP && p.Dst.Addr() == netip.MustParseAddr(p6Of4)
	})
	for _, p := range settled(t, at) {
		if !p.Out && isICMP(p) && p.Src.Addr() != netip.MustParseAddr(lab.HostAddr6) && !p.Src.Addr().IsLinkLocalUnicast() && !p.Dst.Addr().IsMulticast() {
			t.Errorf("the client is told %s", p)
		}
	}
	g.kept("ICMP about what was diverted", isICMP)
}

// TestTransparentSmallLAN: behind the client there is a network whose packets are
// smaller, which only ICMP tells who answers it.
func TestTransparentSmallLAN(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", at4(1500))
	far := lab.TestNS(t, "far")
	if err := errors.Join(
		lab.Veth(g.Client, "far0", far, "eth0"), g.Client.Forward(), g.Client.SetMTU("far0", 1300),
		g.Client.AddAddr("far0", netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")),
		far.AddAddr("eth0", netip.MustParsePrefix("10.9.0.2/24"), netip.MustParsePrefix("fd09::2/64")),
		far.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("10.9.0.1")), far.AddRoute(netip.MustParsePrefix("::/0"), netip.MustParseAddr("fd09::1")),
		g.Host.AddRoute(netip.MustParsePrefix("10.9.0.0/24"), netip.MustParseAddr(lab.ClientAddr4)),
		g.Host.AddRoute(netip.MustParsePrefix("fd09::/64"), netip.MustParseAddr(lab.ClientAddr6)),
	); err != nil {
		t.Fatal(err)
	}
	g.inside = append(g.inside, netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64"))
	g.start(uplinkConfig(lan(`divert: ["tcp/443", "udp/1500"], select: {out: p6}`)))
	f := g.as(far)
	say := make([]byte, 1260)
	for i := range say {
		say[i] = 'x'
	}
	// The answer has more than was said. Nothing was learned yet of the way back.
	if told, want := f.send(at4(1500), string(say), patience), "origin "+p6Of4+" "+string(say); told != want {
		t.Errorf("told %d bytes, want %d", len(told), len(want))
	}
	f.bulk(at4(443), "origin "+p6Of4, 1<<20)
	f.bulk(at6(443), "origin "+p6Of6, 1<<20)
	f.kept("all the time", func(lab.Packet) bool { return true })
}
