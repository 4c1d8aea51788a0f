package main_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// Ports of the origin beside the web server's.
const (
	talkPort   = 7001 // talks as asked, and closes first
	holdPort   = 7002 // answers by HTTP, and closes after the proxy has
	closedPort = 9    // of the host too
)

// wire is a kernelScene whose interfaces carry whole packets, watched on the
// host: what the interface counts, what a capture sees of it, and what wayout
// says have to be the same.
type wire struct {
	*kernelScene
	up     [2]*lab.Capture
	lan    *lab.Capture
	resent uint64 // the namespace's RetransSegs at the beginning
}

func newWire(t *testing.T) *wire {
	t.Helper()
	w := &wire{kernelScene: newKernelScene(t)}
	for _, l := range []struct {
		n    *lab.NS
		link string
	}{{w.Host, "eth0"}, {w.Host, "eth1"}, {w.Host, "lan0"}, {w.ISP1, "host0"}, {w.ISP2, "host0"}} {
		if err := l.n.WholePackets(l.link); err != nil {
			t.Fatal(err)
		}
	}
	w.up = [2]*lab.Capture{w.capture(w.Host, "eth0"), w.capture(w.Host, "eth1")}
	w.lan = w.capture(w.Host, "lan0")
	w.resent = w.retransSegs()
	for _, a := range []string{lab.OriginAddr4, lab.OriginAddr6} {
		w.serve(net.JoinHostPort(a, strconv.Itoa(talkPort)), w.talkBack)
		w.serve(net.JoinHostPort(a, strconv.Itoa(holdPort)), w.hold)
	}
	w.start("metrics: {listen: \"" + lab.HostAddr4 + ":9180\"}\n" + uplinkConfig(""))
	return w
}

func (w *wire) retransSegs() uint64 {
	w.t.Helper()
	v, err := w.Host.TCPCounter("RetransSegs")
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// serve hands each connection of the origin to f, on a goroutine of its own.
func (w *wire) serve(at string, f func(*net.TCPConn)) {
	l := w.listen(at)
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go f(c)
		}
	}()
}

// talkBack reads "SEND WANT\n" and SEND bytes, answers with WANT bytes, and
// closes first.
func (w *wire) talkBack(c *net.TCPConn) {
	defer c.Close()
	r := bufio.NewReader(c)
	var send, want int64
	if _, err := fmt.Fscanf(r, "%d %d\n", &send, &want); err != nil {
		return
	}
	if _, err := io.CopyN(io.Discard, r, send); err != nil {
		return
	}
	_, _ = c.Write(make([]byte, want))
}

// hold answers one request with a response that ends the connection, and closes
// once its acknowledgement of the proxy's FIN has passed: the proxy's socket is
// in TIME_WAIT then, where no program of a cgroup sees it.
func (w *wire) hold(c *net.TCPConn) {
	defer c.Close()
	r := bufio.NewReader(c)
	req, err := http.ReadRequest(r)
	if err != nil {
		return
	}
	req.Body.Close()
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"); err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, r)
	near := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	far := c.LocalAddr().(*net.TCPAddr).AddrPort()
	var fin uint32
	up := w.up[0]
	for _, n := range uplinkNodes() {
		if n.uplink == 1 && (near.Addr() == n.v4 || near.Addr() == n.v6) {
			up = w.up[1]
		}
	}
	mustAwait(w.t, up, "the acknowledgement of the proxy's FIN", func(p lab.Packet) bool {
		switch {
		case p.Src == near && p.Dst == far && p.Flags&lab.FIN != 0:
			fin = p.Seq + uint32(p.Payload) + 1
		case p.Src == far && p.Dst == near && p.Flags&lab.FIN == 0 && fin != 0 && p.Ack == fin:
			return true
		}
		return false
	})
}

// tunnel opens a tunnel by a path.
func (w *wire) tunnel(id, target string) (*net.TCPConn, *bufio.Reader, int, error) {
	c, err := w.Client.Dial(proxyAt(3128))
	if err != nil {
		return nil, nil, 0, err
	}
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, nil, 0, err
	}
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %s\r\n\r\n", target, id)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		c.Close()
		return nil, nil, 0, err
	}
	return c, r, resp.StatusCode, nil
}

// talk has one conversation through a tunnel, in which the origin closes first.
func (w *wire) talk(id, host string, send, want int) error {
	c, r, status, err := w.tunnel(id, net.JoinHostPort(host, strconv.Itoa(talkPort)))
	if err != nil {
		return err
	}
	defer c.Close()
	if status != http.StatusOK {
		return fmt.Errorf("status %d", status)
	}
	fmt.Fprintf(c, "%d %d\n", send, want)
	if _, err := c.Write(make([]byte, send)); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, r)
	if err == nil && n != int64(want) {
		err = fmt.Errorf("%d bytes came back, want %d", n, want)
	}
	return err
}

// lose drops one packet of n at random, in both directions, on the far side of
// an interface of the host.
func lose(t *testing.T, n *lab.NS, one int32) {
	t.Helper()
	const next, drop = -1, 2 // TCX_NEXT, TCX_DROP
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.FnGetPrandomU32.Call(),
			asm.Mod.Imm32(asm.R0, one),
			asm.JEq.Imm(asm.R0, 0, "drop"),
			asm.Mov.Imm(asm.R0, next),
			asm.Return(),
			asm.Mov.Imm(asm.R0, drop).WithSymbol("drop"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	l, err := n.Netlink().LinkByName("host0")
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		if err := n.Do(func() error {
			tcx, err := link.AttachTCX(link.TCXOptions{Interface: l.Attrs().Index, Program: prog, Attach: at})
			if err == nil {
				t.Cleanup(func() { tcx.Close() })
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// flow is one direction of an interface, by what its packets are.
type flow struct {
	paths map[netip.Addr]lab.Traffic // what the kernel can count for a path, by the path's address
	// What no program of a cgroup sees: ARP and ICMPv6 (neighbour discovery,
	// multicast listeners); resets by the kernel and the segments that they
	// answer; what a socket in TIME_WAIT gets and says.
	neighbours, resets, timeWait lab.Traffic
}

func (f flow) unseen() lab.Traffic { return f.neighbours.Plus(f.resets).Plus(f.timeWait) }

func (f flow) all() lab.Traffic {
	sum := f.unseen()
	for _, t := range f.paths {
		sum = sum.Plus(t)
	}
	return sum
}

// sort tells the packets of the host's capture apart.
func sort(pkts []lab.Packet) (in, out flow) {
	in.paths, out.paths = map[netip.Addr]lab.Traffic{}, map[netip.Addr]lab.Traffic{}
	type ends struct{ near, far netip.AddrPort }
	ended := map[ends]uint32{} // what the far side has to acknowledge of a FIN
	waits := map[ends]bool{}   // the near socket is in TIME_WAIT
	answered := map[int]bool{} // by a reset of the kernel
	for i, p := range pkts {
		if p.Proto == unix.IPPROTO_TCP && p.Out && p.Flags&lab.RST != 0 && (p.Flags&lab.ACK == 0 || p.Seq == 0) {
			answered[i] = true
			for j := i - 1; j >= 0; j-- {
				q := pkts[j]
				if !q.Out && q.Src == p.Dst && q.Dst == p.Src {
					answered[j] = true
					break
				}
			}
		}
	}
	for i, p := range pkts {
		f, e := &in, ends{p.Dst, p.Src}
		if p.Out {
			f, e = &out, ends{p.Src, p.Dst}
		}
		if p.Proto != unix.IPPROTO_TCP {
			f.neighbours.Add(p.Length)
			continue
		}
		if e.far.Port() == holdPort && !p.Out && p.Flags&lab.FIN == 0 && ended[e] != 0 && p.Ack == ended[e] {
			path := f.paths[e.near.Addr()]
			path.Add(p.Length) // the socket was not in TIME_WAIT yet
			f.paths[e.near.Addr()] = path
			waits[e] = true
			continue
		}
		switch {
		case answered[i]:
			f.resets.Add(p.Length)
		case waits[e]:
			f.timeWait.Add(p.Length)
		default:
			path := f.paths[e.near.Addr()]
			path.Add(p.Length)
			f.paths[e.near.Addr()] = path
		}
		if p.Out && p.Flags&lab.FIN != 0 {
			ended[e] = p.Seq + uint32(p.Payload) + 1
		}
	}
	return in, out
}

// resentOnLAN counts the segments that the host sent again to clients, which
// the namespace's counter has among those of the paths.
func (w *wire) resentOnLAN() uint64 {
	type flow struct{ src, dst netip.AddrPort }
	end := map[flow]uint32{}
	var n uint64
	for _, p := range settled(w.t, w.lan) {
		length := uint32(p.Payload)
		if p.Flags&(lab.SYN|lab.FIN) != 0 {
			length++
		}
		if p.Proto != unix.IPPROTO_TCP || !p.Out || length == 0 || p.Flags&lab.RST != 0 {
			continue
		}
		f := flow{p.Src, p.Dst}
		last, known := end[f]
		if known && int32(p.Seq-last) < 0 {
			n++
			continue
		}
		end[f] = p.Seq + length
	}
	return n
}

// told is `paths --json`.
func (w *wire) told() map[string]control.Path {
	w.t.Helper()
	var all control.Paths
	if err := json.Unmarshal([]byte(w.wayout("paths", "--json")), &all); err != nil {
		w.t.Fatal(err)
	}
	m := map[string]control.Path{}
	for _, p := range all.Paths {
		m[p.Path] = p
	}
	return m
}

// agree compares interface, capture and wayout once all is quiet, and gives the
// two interfaces' flows.
func (w *wire) agree() (in, out [2]flow) {
	w.t.Helper()
	nodes := uplinkNodes()
	// compare says what differs.
	compare := func(report func(format string, args ...any)) bool {
		same := true
		differ := func(format string, args ...any) {
			same = false
			report(format, args...)
		}
		for i, c := range w.up {
			pkts := c.Packets()
			in[i], out[i] = sort(pkts)
			truthIn, truthOut, err := c.Truth()
			if err != nil {
				w.t.Fatal(err)
			}
			if in[i].all() != truthIn || out[i].all() != truthOut {
				differ("isp%d: captured %v in and %v out, the interface has %v and %v", i+1, in[i].all(), out[i].all(), truthIn, truthOut)
			}
			told := w.told()
			var sumIn, sumOut lab.Traffic
			for _, n := range nodes[4*i : 4*i+4] {
				p := told["out/"+n.id]
				gotIn, gotOut := lab.Traffic{Packets: p.Packets.In, Bytes: p.Bytes.In}, lab.Traffic{Packets: p.Packets.Out, Bytes: p.Bytes.Out}
				wantIn, wantOut := in[i].paths[n.v4].Plus(in[i].paths[n.v6]), out[i].paths[n.v4].Plus(out[i].paths[n.v6])
				if gotIn != wantIn || gotOut != wantOut {
					differ("%s says %v in and %v out, on the wire are %v and %v", n.id, gotIn, gotOut, wantIn, wantOut)
				}
				sumIn, sumOut = sumIn.Plus(gotIn), sumOut.Plus(gotOut)
			}
			if sumIn.Plus(in[i].unseen()) != truthIn || sumOut.Plus(out[i].unseen()) != truthOut {
				differ("isp%d: paths and what cannot be seen are %v in and %v out, the interface has %v and %v",
					i+1, sumIn.Plus(in[i].unseen()), sumOut.Plus(out[i].unseen()), truthIn, truthOut)
			}
		}
		return same
	}
	for end := time.Now().Add(20 * time.Second); !compare(func(string, ...any) {}); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			compare(w.t.Errorf)
			for i, c := range w.up {
				for _, p := range c.Packets() {
					w.t.Logf("isp%d %s", i+1, p)
				}
			}
			break
		}
	}
	for i := range w.up {
		w.t.Logf("isp%d in: paths %v, neighbours %v, resets %v, TIME_WAIT %v", i+1, in[i].all().Minus(in[i].unseen()), in[i].neighbours, in[i].resets, in[i].timeWait)
		w.t.Logf("isp%d out: paths %v, neighbours %v, resets %v, TIME_WAIT %v", i+1, out[i].all().Minus(out[i].unseen()), out[i].neighbours, out[i].resets, out[i].timeWait)
	}
	var resent uint64
	for name, p := range w.told() {
		resent += p.Retransmits
		if p.GuardDrops != 0 {
			w.t.Errorf("%s: %d guard drops", name, p.GuardDrops)
		}
	}
	lan := w.resentOnLAN()
	if total := w.retransSegs() - w.resent; resent+lan != total {
		w.t.Errorf("%d retransmits by paths and %d to clients, the kernel says %d", resent, lan, total)
	}
	w.t.Logf("%d retransmits by paths, %d to clients", resent, lan)
	return in, out
}

// TestCountersEqualTheInterface has all kinds of traffic by several paths.
func TestCountersEqualTheInterface(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	var wg sync.WaitGroup
	for _, id := range []string{"p1", "p2", "p5"} {
		for _, host := range []string{lab.OriginAddr4, lab.OriginAddr6} {
			wg.Go(func() {
				if err := w.talk(id, host, 300_000, 200_000); err != nil {
					t.Errorf("%s to %s: %v", id, host, err)
				}
			})
		}
	}
	wg.Wait()
	// Two requests, of which the second takes the first's connection, unless it
	// comes before that has been put by. The origin knows.
	var kept uint64
	for first := 0; kept < 2; {
		told := w.ask(lab.Ask{Header: egress("p6")})
		if told.Status != 200 {
			t.Errorf("p6: %d %s", told.Status, told.Body)
		}
		if told.Seen.Conn == first {
			break
		}
		first = told.Seen.Conn
		kept++
	}
	// The proxy closes first.
	for _, id := range []string{"p3", "p7"} {
		for _, host := range []string{lab.OriginAddr4, lab.OriginAddr6} {
			if told := w.ask(lab.Ask{Header: egress(id), Target: net.JoinHostPort(host, strconv.Itoa(holdPort))}); told.Status != 200 {
				t.Errorf("%s: %d %s", id, told.Status, told.Body)
			}
		}
	}
	// Refused by the origin.
	if told := w.ask(lab.Ask{Header: egress("p4"), Target: net.JoinHostPort(lab.OriginAddr4, strconv.Itoa(closedPort)), Tunnel: true}); told.Status != 502 {
		t.Errorf("p4: %d %s", told.Status, told.Body)
	}
	// A tunnel that stays open.
	c, _, status, err := w.tunnel("p8", net.JoinHostPort(lab.OriginAddr6, strconv.Itoa(talkPort)))
	if err != nil || status != http.StatusOK {
		t.Fatalf("p8: %d, %v", status, err)
	}
	defer c.Close()
	// Connections from the far side that nobody accepts: the kernel resets.
	for i, isp := range []*lab.NS{w.ISP1, w.ISP2} {
		n := uplinkNodes()[4*i]
		for _, a := range []netip.Addr{n.v4, n.v6} {
			if c, err := isp.Dial(netip.AddrPortFrom(a, closedPort)); err == nil {
				c.Close()
				t.Errorf("%s accepts", a)
			}
		}
	}
	want := map[string]control.Connections{
		"out/p1": {Made: 2, Closed: 2}, "out/p2": {Made: 2, Closed: 2}, "out/p5": {Made: 2, Closed: 2},
		"out/p3": {Made: 2, Closed: 2}, "out/p7": {Made: 2, Closed: 2},
		"out/p4": {Failed: 1}, "out/p6": {Made: kept, Open: int64(kept)}, "out/p8": {Made: 1, Open: 1},
	}
	connections := func() (wrong []string) {
		for name, p := range w.told() {
			if p.Connections != want[name] {
				wrong = append(wrong, fmt.Sprintf("%s: %+v, want %+v", name, p.Connections, want[name]))
			}
		}
		return wrong
	}
	for end := time.Now().Add(10 * time.Second); len(connections()) > 0 && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	for _, wrong := range connections() {
		t.Error(wrong)
	}
	in, out := w.agree()
	for i := range in {
		if in[i].timeWait.Packets != 2 || out[i].timeWait.Packets != 2 || out[i].resets.Packets != 2 || in[i].resets.Packets != 2 || out[i].neighbours.Packets == 0 {
			t.Errorf("isp%d has not seen what it should: %+v, %+v", i+1, in[i], out[i])
		}
	}
	if p := w.told()["out/p1"]; p.RTT.P50 <= 0 || p.RTT.P99 < p.RTT.P50 {
		t.Errorf("round trips of p1: %+v", p.RTT)
	}
	w.metricsAgree()
	c.Close()
	w.until("out/p8", func(p control.Path) bool { return p.Connections == control.Connections{Made: 1, Closed: 1} })
}

// metricsAgree compares /metrics with `paths --json` while all is quiet.
func (w *wire) metricsAgree() {
	w.t.Helper()
	text := w.get(netip.MustParseAddrPort(lab.HostAddr4+":9180"), "/metrics")
	value := func(name, id, more string) float64 {
		for l := range strings.Lines(text) {
			if strings.HasPrefix(l, name+"{") && strings.Contains(l, `path="`+id+`"`) && strings.Contains(l, more) {
				v, err := strconv.ParseFloat(strings.Fields(l)[1], 64)
				if err != nil {
					w.t.Fatal(err)
				}
				return v
			}
		}
		w.t.Errorf("%s of %s with %s is not in the metrics", name, id, more)
		return -1
	}
	for _, p := range w.told() {
		for _, c := range []struct {
			name, more string
			want       float64
		}{
			{"wayout_path_bytes_total", `direction="in"`, float64(p.Bytes.In)},
			{"wayout_path_bytes_total", `direction="out"`, float64(p.Bytes.Out)},
			{"wayout_path_packets_total", `direction="in"`, float64(p.Packets.In)},
			{"wayout_path_packets_total", `direction="out"`, float64(p.Packets.Out)},
			{"wayout_path_retransmits_total", "", float64(p.Retransmits)},
			{"wayout_path_connections_open", "", float64(p.Connections.Open)},
			{"wayout_path_connections_total", `result="ok"`, float64(p.Connections.Made)},
			{"wayout_path_connections_total", `result="refused"`, float64(p.Connections.Failed)},
			{"wayout_path_guard_drops_total", "", 0},
			{"wayout_path_up", "", 1},
		} {
			if got := value(c.name, p.ID, c.more); got != c.want {
				w.t.Errorf("%s of %s with %s is %v, paths says %v", c.name, p.ID, c.more, got, c.want)
			}
		}
	}
}

// TestCountersEqualTheInterfaceUnderLoss loses one packet of fifty on both
// uplinks.
func TestCountersEqualTheInterfaceUnderLoss(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	lose(t, w.ISP1, 50)
	lose(t, w.ISP2, 50)
	var wg sync.WaitGroup
	for _, id := range []string{"p1", "p2", "p5", "p6"} {
		for _, host := range []string{lab.OriginAddr4, lab.OriginAddr6} {
			wg.Go(func() {
				if err := w.talk(id, host, 400_000, 200_000); err != nil {
					t.Errorf("%s to %s: %v", id, host, err)
				}
			})
		}
	}
	wg.Wait()
	w.agree()
	for name, p := range w.told() {
		used := strings.Contains("out/p1 out/p2 out/p5 out/p6", name)
		if used && (p.Retransmits == 0 || p.Connections != control.Connections{Made: 2, Closed: 2}) || !used && p.Retransmits != 0 {
			t.Errorf("%s: %d retransmits, %+v", name, p.Retransmits, p.Connections)
		}
	}
}
