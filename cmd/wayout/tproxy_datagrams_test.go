package main_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// TestTransparentDNS: dig, which knows of no proxy, is answered by the server that
// it asks, over TCP where the answer is too long for a datagram.
func TestTransparentDNS(t *testing.T) {
	dig, err := exec.LookPath("dig")
	if err != nil {
		lab.Missing(t, "dig")
	}
	g := newGateway(t)
	names := &nameServer{}
	g.serveNames(names)
	g.start(uplinkConfig(lan(`divert: ["udp/53", "tcp/53"], select: {out: p6}, sniff: true`)))
	for _, tt := range []struct{ server, name, from, networks string }{
		{lab.OriginAddr4, "small4.test", p6Of4, "udp"},
		{lab.OriginAddr6, "small6.test", p6Of6, "udp"},
		{lab.OriginAddr4, "big4.test", p6Of4, "udp tcp"},
		{lab.OriginAddr6, "big6.test", p6Of6, "udp tcp"},
	} {
		var out strings.Builder
		cmd, err := g.Client.Start(lab.Program{
			Path: dig, Args: []string{"+tries=3", "+time=10", "+nocookie", "@" + tt.server, tt.name, "A"}, Stdout: &out, Stderr: &out,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), lab.OriginAddr4) || !strings.Contains(out.String(), "SERVER: "+tt.server+"#53") {
			t.Errorf("dig %s at %s: %v\n%s", tt.name, tt.server, err, &out)
		}
		var networks []string
		for _, q := range names.of(tt.name + ".") {
			if q.from != netip.MustParseAddr(tt.from) {
				t.Errorf("%s was asked for from %s, want %s", tt.name, q.from, tt.from)
			}
			if !slices.Contains(networks, q.network) { // a datagram may be sent again
				networks = append(networks, q.network)
			}
		}
		if got := strings.Join(networks, " "); got != tt.networks {
			t.Errorf("%s was asked for by %q, want %q", tt.name, got, tt.networks)
		}
	}
	g.kept("all the time", toPort(53))
}

// gameServer sends each player who has said hello its state over and over, unasked,
// and answers what they say.
type gameServer struct {
	c    *net.UDPConn
	mu   sync.Mutex
	from map[string]netip.AddrPort // of each player, by name
}

const perSecond = 60

func (g *gateway) serveGame(at string, states int) *gameServer {
	g.t.Helper()
	s := &gameServer{c: datagramsAt(g.t, g.Origin, at), from: map[string]netip.AddrPort{}}
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := s.c.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			name, _, _ := strings.Cut(string(b[:n]), " ")
			_, _ = s.c.WriteToUDPAddrPort(fmt.Appendf(nil, "echo %s", b[:n]), from)
			s.mu.Lock()
			_, known := s.from[name]
			s.from[name] = from
			s.mu.Unlock()
			if known {
				continue
			}
			go func() {
				tick := time.NewTicker(time.Second / perSecond)
				defer tick.Stop()
				for i := range states {
					<-tick.C
					if _, err := s.c.WriteToUDPAddrPort(fmt.Appendf(nil, "state %s %d", name, i), from); err != nil {
						return
					}
				}
			}()
		}
	}()
	return s
}

// TestTransparentGame: many players of one server, each with datagrams both ways all
// the time: all of them come, in order, and to whom they are meant for.
func TestTransparentGame(t *testing.T) {
	const players, moves = 12, 90
	g := newGateway(t)
	server := g.serveGame(at4(1500), moves)
	g.start(uplinkConfig(lan(`divert: ["udp/1500"], select: {out: p6}`)))
	var wg sync.WaitGroup
	for i := range players {
		wg.Go(func() {
			name := fmt.Sprintf("player%d", i)
			if err := play(datagramsAt(t, g.Client, "0.0.0.0:0"), name, at4(1500), moves); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	wg.Wait()
	ports := map[uint16]bool{}
	server.mu.Lock()
	defer server.mu.Unlock()
	for name, from := range server.from {
		if from.Addr() != netip.MustParseAddr(p6Of4) {
			t.Errorf("%s comes from %s", name, from)
		}
		ports[from.Port()] = true
	}
	if len(ports) != players {
		t.Errorf("%d players have %d ports", players, len(ports))
	}
	g.kept("all the time", toPort(1500))
}

// play says so many things, one after the other, and wants each back and as many
// states besides.
func play(c *net.UDPConn, name, at string, moves int) error {
	to := netip.MustParseAddrPort(at)
	// The first move opens the flow; until there is an answer it may be lost.
	b := make([]byte, 2048)
	for said := 0; ; said++ {
		if said == 20 {
			return errors.New("no answer to hello")
		}
		if _, err := c.WriteToUDPAddrPort([]byte(name+" hello"), to); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		if n, _, err := c.ReadFromUDPAddrPort(b); err == nil && string(b[:n]) == "echo "+name+" hello" {
			break
		}
	}
	go func() {
		tick := time.NewTicker(time.Second / perSecond)
		defer tick.Stop()
		for i := range moves {
			<-tick.C
			if _, err := c.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %d", name, i), to); err != nil {
				return
			}
		}
	}()
	next := map[string]int{}
	for next["echo"] < moves || next["state"] < moves {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return fmt.Errorf("after %v: %w", next, err)
		}
		if from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); from != to {
			return fmt.Errorf("%q comes from %s", b[:n], from)
		}
		if string(b[:n]) == "echo "+name+" hello" {
			continue // said again
		}
		kind, _, _ := strings.Cut(string(b[:n]), " ")
		if want := fmt.Sprintf("%s %s %d", kind, name, next[kind]); string(b[:n]) != want {
			return fmt.Errorf("told %q, want %q", b[:n], want)
		}
		next[kind]++
	}
	return nil
}

// TestTransparentManyServers: one socket that speaks with many servers hears each
// from where it is, and none from where it has not spoken to.
func TestTransparentManyServers(t *testing.T) {
	const servers = 48
	g := newGateway(t)
	for i := range servers {
		tellDatagrams(t, g.Origin, fmt.Sprintf("server%d", i), everywhere(1500+i)...)
	}
	g.start(uplinkConfig(lan(`divert: ["udp/1500-1999"], select: {out: p6}`)))
	c := datagramsAt(t, g.Client, "[::]:0")
	for i := range servers {
		for at, source := range map[string]string{at4(1500 + i): p6Of4, at6(1500 + i): p6Of6} {
			if told, want := sendOn(t, c, at, "hello", patience), fmt.Sprintf("server%d %s hello", i, source); told != want {
				t.Errorf("%s answers %q, want %q", at, told, want)
			}
		}
	}
	// Somebody else at the origin's address, and somebody else altogether, to where
	// the flow's datagrams come from.
	home := datagramsAt(t, g.Origin, at4(1999))
	flow := g.flowAt(at4(1999))
	seen := flow.say(home, "hello")
	for _, from := range []string{at4(1998), "192.0.2.6:1999"} {
		if _, err := datagramsAt(t, g.Origin, from).WriteToUDPAddrPort([]byte("stranger"), seen); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := home.WriteToUDPAddrPort([]byte("friend"), seen); err != nil {
		t.Fatal(err)
	}
	if told := flow.hear(); told != "friend" {
		t.Errorf("told %q", told)
	}
}

// clientFlow is a socket of the client's, to one server.
type clientFlow struct {
	t  *testing.T
	c  *net.UDPConn
	to netip.AddrPort
}

func (g *gateway) flowAt(at string) *clientFlow {
	g.t.Helper()
	return &clientFlow{g.t, datagramsAt(g.t, g.Client, "0.0.0.0:0"), netip.MustParseAddrPort(at)}
}

// say sends until the server has it, and gives where from.
func (f *clientFlow) say(server *net.UDPConn, what string) netip.AddrPort {
	f.t.Helper()
	b := make([]byte, 2048)
	for range 20 {
		if _, err := f.c.WriteToUDPAddrPort([]byte(what), f.to); err != nil {
			f.t.Fatal(err)
		}
		_ = server.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, from, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				break
			}
			if string(b[:n]) == what {
				return netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			}
		}
	}
	f.t.Fatalf("%q does not get to the server", what)
	return netip.AddrPort{}
}

// hear gives the next datagram.
func (f *clientFlow) hear() string {
	f.t.Helper()
	b := make([]byte, 65535)
	_ = f.c.SetReadDeadline(time.Now().Add(patience))
	n, from, err := f.c.ReadFromUDPAddrPort(b)
	if err != nil {
		return err.Error()
	}
	if from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); from != f.to {
		f.t.Errorf("%q comes from %s", b[:n], from)
	}
	return string(b[:n])
}

// TestTransparentFlowsEnd: a flow lasts while anything passes, either way, and no
// longer; and there are no more than so many, of which the most silent one ends.
func TestTransparentFlowsEnd(t *testing.T) {
	g := newGateway(t)
	const flows = 4
	server := datagramsAt(t, g.Origin, at4(1500))
	g.start(uplinkConfig(lan(fmt.Sprintf(`divert: ["udp/1500"], select: {out: p6}, udp_idle_timeout: 3s, udp_flows: %d`, flows))))
	open := func(n int64) {
		t.Helper()
		g.until("out/p6", func(p control.Path) bool { return p.Connections.Open == n })
	}
	one := g.flowAt(at4(1500))
	seen := one.say(server, "hello")
	open(1)
	// The server's datagrams alone keep it.
	pace := time.NewTicker(500 * time.Millisecond)
	defer pace.Stop()
	for i := range 8 {
		<-pace.C
		if _, err := server.WriteToUDPAddrPort(fmt.Appendf(nil, "news %d", i), seen); err != nil {
			t.Fatal(err)
		}
		if told, want := one.hear(), fmt.Sprintf("news %d", i); told != want {
			t.Fatalf("told %q, want %q", told, want)
		}
	}
	if now := one.say(server, "again"); now != seen {
		t.Errorf("a flow came from %s and comes from %s", seen, now)
	}
	open(0) // silent
	if _, err := server.WriteToUDPAddrPort([]byte("too late"), seen); err != nil {
		t.Fatal(err)
	}
	after := one.say(server, "and again")
	if after == seen {
		t.Errorf("after its end it is the same flow still: %s", after)
	}
	if _, err := server.WriteToUDPAddrPort([]byte("in time"), after); err != nil {
		t.Fatal(err)
	}
	if told := one.hear(); told != "in time" {
		t.Errorf("told %q, want what came to the new flow alone", told)
	}
	open(0)

	// More than there may be.
	var all []*clientFlow
	var at []netip.AddrPort
	for i := range flows + 1 {
		all = append(all, g.flowAt(at4(1500)))
		at = append(at, all[i].say(server, fmt.Sprintf("flow %d", i)))
	}
	g.until("out/p6", func(p control.Path) bool {
		if p.Connections.Open > flows {
			t.Errorf("%d flows", p.Connections.Open)
		}
		return p.Connections.Open == flows
	})
	for i := range all { // the newest first
		if i < flows {
			if now := all[flows-i].say(server, fmt.Sprintf("flow %d again", flows-i)); now != at[flows-i] {
				t.Errorf("flow %d came from %s and comes from %s", flows-i, at[flows-i], now)
			}
		}
	}
	if now := all[0].say(server, "flow 0 again"); now == at[0] {
		t.Errorf("the flow that was silent the longest is still there: %s", now)
	}
}

// TestTransparentSmallUplink: where the uplink carries less in a packet than the
// client's network, what is larger gets through all the same, and from the path's
// address in all its parts.
func TestTransparentSmallUplink(t *testing.T) {
	g := newGateway(t)
	for ns, links := range map[*lab.NS][]string{g.Host: {"eth0", "eth1"}, g.ISP1: {"host0"}, g.ISP2: {"host0"}} {
		for _, link := range links {
			if err := ns.SetMTU(link, 1400); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Beyond the provider it gets smaller still, which only ICMP tells.
	if err := errors.Join(g.ISP2.SetMTU("up0", 1300), g.Origin.SetMTU("isp2", 1300)); err != nil {
		t.Fatal(err)
	}
	tell(t, g.Origin, "origin", everywhere(443)...)
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	for _, path := range []struct{ id, v4, v6 string }{{"p2", p2Of4, p2Of6}, {"p6", p6Of4, p6Of6}} {
		config := uplinkConfig(lan(fmt.Sprintf(`divert: ["udp/*", "tcp/443"], select: {out: %s}`, path.id)))
		if g.daemon == nil {
			g.start(config)
		} else {
			g.replaceConfig(config)
		}
		for _, size := range []int{1250, 1320, 1372, 1452, 1472, 60000} {
			say := strings.Repeat("x", size)
			for at, source := range map[string]string{at4(1500): path.v4, at6(1500): path.v6} {
				ask := g.send
				if size <= 1452 {
					ask = g.sendWhole // as QUIC probes what the path carries
				}
				if told := ask(at, say, patience); told != "origin "+source+" "+say {
					t.Errorf("%s, %d bytes to %s: told %.40q (%d bytes)", path.id, size, at, told, len(told))
				}
			}
		}
		for at, source := range map[string]string{at4(443): path.v4, at6(443): path.v6} {
			g.bulk(at, "origin "+source, 2<<20)
		}
	}
	for i, c := range g.up {
		for _, p := range settled(t, c) {
			a := p.Src.Addr()
			own := slices.Contains([]string{p2Of4, p2Of6, p6Of4, p6Of6}, a.String())
			if !p.Out && !own && !a.IsLinkLocalUnicast() && a.IsValid() && !a.IsUnspecified() && p.Proto != unix.IPPROTO_ICMPV6 && p.EtherType != unix.ETH_P_ARP {
				t.Fatalf("isp%d has %s", i+1, p)
			}
		}
	}
}

// sendWhole is send for datagrams that must not be cut up on their way.
func (g *gateway) sendWhole(at, say string, within time.Duration) string {
	g.t.Helper()
	c := datagramsAt(g.t, g.Client, "[::]:0")
	raw, err := c.SyscallConn()
	if err == nil {
		ctl := raw.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE),
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE))
		})
		err = errors.Join(err, ctl)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return sendOn(g.t, c, at, say, within)
}

// bulk sends so many bytes through a connection and wants them back.
func (g *gateway) bulk(at, greeting string, size int) {
	g.t.Helper()
	c, err := g.Client.Dial(netip.MustParseAddrPort(at))
	if err != nil {
		g.t.Error(err)
		return
	}
	defer c.Close()
	if told := talk(c, "some words", patience); told != greeting {
		g.t.Errorf("%s says %q, want %q", at, told, greeting)
		return
	}
	data := make([]byte, size)
	_, _ = rand.Read(data) // never fails
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- err
	}()
	back := make([]byte, size)
	_, err = io.ReadFull(c, back)
	if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(data, back) {
		g.t.Errorf("%d bytes through %s: %v", size, at, err)
	}
}
