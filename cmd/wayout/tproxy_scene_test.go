package main_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// gateway is a scene in which the client's traffic is diverted. The host forwards
// what is not. Of the paths, p1 to p4 leave by isp1 and p5 to p8 by isp2.
type gateway struct {
	*kernelScene
	up     []*lab.Capture // at the far ends of the uplinks
	inside []netip.Prefix // whose addresses are not to be seen there
}

// brief is for what must not come about.
const brief = 400 * time.Millisecond

func newGateway(t *testing.T) *gateway {
	t.Helper()
	g := newForwarder(t)
	g.up = []*lab.Capture{g.capture(g.ISP1, "host0"), g.capture(g.ISP2, "host0")}
	return g
}

// newForwarder is a gateway whose uplinks nobody watches yet.
func newForwarder(t *testing.T) *gateway {
	t.Helper()
	return gatewayOf(t, newKernelScene(t), "10.0.0.0/24", "fd00::/64")
}

// gatewayOf has a scene's host forward, and cleans up in the end.
func gatewayOf(t *testing.T, k *kernelScene, inside ...string) *gateway {
	t.Helper()
	g := &gateway{kernelScene: k}
	for _, n := range inside {
		g.inside = append(g.inside, netip.MustParsePrefix(n))
	}
	if err := g.Host.Forward(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // whatever the test has come to, after the daemon's stop
		if missing(g.config) {
			return
		}
		if _, errs, code := g.command("clean", "--config", g.config); code != 0 {
			t.Errorf("clean: %s", errs)
		}
	})
	return g
}

// as is the same gateway as another client sees it.
func (g *gateway) as(client *lab.NS) *gateway {
	k, s, w := *g.kernelScene, *g.scene, *g.World
	w.Client, s.World, k.scene = client, &w, &s
	return &gateway{&k, g.up, g.inside}
}

// lan is a tproxy server, with more of its keys.
func lan(more string) string {
	return "server:\n  - {name: lan, type: tproxy, interface: lan0, escaper: out, " + more + "}\n"
}

// tell serves a listener at n: each connection is told what its server is called
// and where it comes from, and then gets back what it says.
func tell(t *testing.T, n *lab.NS, name string, at ...string) {
	t.Helper()
	for _, at := range at {
		l, err := n.Listen(netip.MustParseAddrPort(at))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					if _, err := fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr().(*net.TCPAddr).IP); err == nil {
						_, _ = io.Copy(c, c)
					}
				}()
			}
		}()
	}
}

// tellDatagrams is the same for datagrams: the answer is name, source and what
// was said.
func tellDatagrams(t *testing.T, n *lab.NS, name string, at ...string) {
	t.Helper()
	for _, at := range at {
		var c *net.UDPConn
		if err := n.Do(func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			b := make([]byte, 65535)
			for {
				n, from, err := c.ReadFromUDPAddrPort(b)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					_, _ = c.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %s %s", name, from.Addr().Unmap(), b[:n]), from)
				}
			}
		}()
	}
}

// dial connects from the client and gives the first word that it is told: who
// answers, and whom that sees; "nobody" when that does not come about.
func (g *gateway) dial(at string, within time.Duration) string {
	g.t.Helper()
	var told string
	if err := g.Client.Do(func() error {
		c, err := net.DialTimeout("tcp", at, within)
		if err != nil {
			told = "nobody"
			return nil
		}
		defer c.Close()
		if got := c.RemoteAddr().String(); got != at {
			g.t.Errorf("connected to %s, not to %s", got, at)
		}
		told = talk(c, "some words", within)
		return nil
	}); err != nil {
		g.t.Fatal(err)
	}
	return told
}

// dialFrom is dial from a source of the client's.
func (g *gateway) dialFrom(source, at string) string {
	g.t.Helper()
	told := "nobody"
	if c, err := g.Client.DialFrom(netip.MustParseAddr(source), netip.MustParseAddrPort(at)); err == nil {
		told = talk(c, "some words", patience)
		c.Close()
	}
	return told
}

// talk hears the greeting, says something, and wants it back.
func talk(c net.Conn, say string, within time.Duration) string {
	_ = c.SetDeadline(time.Now().Add(within))
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil {
		return "nobody"
	}
	told := strings.TrimSuffix(string(b[:n]), "\n")
	if _, err := io.WriteString(c, say); err != nil {
		return told + ", and then " + err.Error()
	}
	if _, err := io.ReadFull(c, b[:len(say)]); err != nil || string(b[:len(say)]) != say {
		return fmt.Sprintf("%s, and then %q, %v", told, b[:len(say)], err)
	}
	return told
}

// ask sends a datagram from the client, again and again until there is an answer
// or the time is over, and gives the answer. It has to come from where the
// datagram went.
func (g *gateway) send(at, say string, within time.Duration) string {
	g.t.Helper()
	var told string
	if err := g.Client.Do(func() error {
		c, err := net.ListenUDP("udp", nil)
		if err != nil {
			return err
		}
		defer c.Close()
		told = sendOn(g.t, c, at, say, within)
		return nil
	}); err != nil {
		g.t.Fatal(err)
	}
	return told
}

func sendOn(t *testing.T, c *net.UDPConn, at, say string, within time.Duration) string {
	to := netip.MustParseAddrPort(at)
	b := make([]byte, 65535)
	for end := time.Now().Add(within); time.Now().Before(end); {
		if _, err := c.WriteToUDPAddrPort([]byte(say), to); err != nil {
			continue // what ICMP said of the last one
		}
		_ = c.SetReadDeadline(time.Now().Add(min(within, time.Second)))
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			continue
		}
		if from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); from != to {
			t.Errorf("asked %s, answered by %s", to, from)
		}
		return string(b[:n])
	}
	return "nobody"
}

// fromClient says whether a packet is a client's own, to somebody beyond the
// host: it was forwarded.
func (g *gateway) fromClient(p lab.Packet) bool {
	return !p.Out && slices.ContainsFunc(g.inside, func(n netip.Prefix) bool { return n.Contains(p.Src.Addr()) })
}

// kept fails the test when a packet of the client's has left the host, of which
// is says that it must not have.
func (g *gateway) kept(when string, is func(lab.Packet) bool) {
	g.t.Helper()
	for i, c := range g.up {
		for _, p := range settled(g.t, c) {
			if g.fromClient(p) && is(p) {
				g.t.Errorf("%s: isp%d has %s", when, i+1, p)
				return
			}
		}
	}
}

// forwarded waits until a packet of the client's leaves that is so.
func (g *gateway) forwarded(what string, is func(lab.Packet) bool) {
	g.t.Helper()
	mustAwait(g.t, g.up[0], what, func(p lab.Packet) bool { return g.fromClient(p) && is(p) })
}

func toPort(port uint16) func(lab.Packet) bool {
	return func(p lab.Packet) bool { return p.Dst.Port() == port }
}

func udpOf(p lab.Packet) bool { return p.Proto == unix.IPPROTO_UDP || p.Proto == 44 }

// wantAll compares what is told with what is to be told, side by side.
func wantAll(t *testing.T, when string, ask func(string) string, answers map[string]string) {
	t.Helper()
	var wg sync.WaitGroup
	for at, want := range answers {
		wg.Go(func() {
			if got := ask(at); got != want {
				t.Errorf("%s: %s answers %q, want %q", when, at, got, want)
			}
		})
	}
	wg.Wait()
}

func (g *gateway) dialAll(when string, answers map[string]string) {
	g.t.Helper()
	wantAll(g.t, when, func(at string) string { return g.dial(at, within(answers[at])) }, answers)
}

func (g *gateway) sendAll(when string, answers map[string]string) {
	g.t.Helper()
	wantAll(g.t, when, func(at string) string { return g.send(at, "hello", within(answers[at])) }, answers)
}

func within(answer string) time.Duration {
	if answer == "nobody" {
		return brief
	}
	return patience
}

func at4(port int) string { return fmt.Sprintf("%s:%d", lab.OriginAddr4, port) }
func at6(port int) string { return fmt.Sprintf("[%s]:%d", lab.OriginAddr6, port) }

// everywhere are both of the origin's addresses, at a port.
func everywhere(ports ...int) []string {
	var all []string
	for _, p := range ports {
		all = append(all, at4(p), at6(p))
	}
	return all
}

// replaceConfig writes another configuration and has the daemon read it.
func (g *gateway) replaceConfig(config string) {
	g.t.Helper()
	g.write(config)
	if out, errs, code := g.command("reload", "--control", g.socket); code != 0 {
		g.t.Fatalf("reload: %s%s", out, errs)
	}
}

func missing(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, os.ErrNotExist)
}

// flow gives what sends on one socket of the client's.
func (g *gateway) flow(at string) func(say string) string {
	g.t.Helper()
	var c *net.UDPConn
	if err := g.Client.Do(func() (err error) {
		c, err = net.ListenUDP("udp", nil)
		return err
	}); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return func(say string) string {
		g.t.Helper()
		return sendOn(g.t, c, at, say, patience)
	}
}

// clsact names the filters on what comes in by an interface of the host, and the
// queueing discipline that they are of.
func (g *gateway) clsact(name string) (all []string) {
	g.t.Helper()
	h := g.Host.Netlink()
	link, err := h.LinkByName(name)
	if err != nil {
		g.t.Fatal(err)
	}
	qdiscs, err := h.QdiscList(link)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Handle == netlink.MakeHandle(0xffff, 0) {
			all = append(all, q.Type())
		}
	}
	if all == nil {
		return nil
	}
	filters, err := h.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name != "" {
			all = append(all, b.Name)
		}
	}
	return all
}
