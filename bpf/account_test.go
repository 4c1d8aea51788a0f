package bpf

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// tally is packets and bytes of IP.
type tally struct{ packets, bytes uint64 }

func (a *tally) add(p pkt) { a.packets++; a.bytes += uint64(p.length) }

// wholePackets makes an interface carry no GSO packets, so that its own
// counters are the truth of the wire.
func wholePackets(t *testing.T, n *lab.NS) {
	t.Helper()
	l, err := n.Netlink().LinkByName("eth0")
	must(t, err)
	must(t, n.Netlink().LinkSetGSOMaxSegs(l, 1))
}

// truth is what the host's eth0 has counted, less the Ethernet headers.
func (w *wire) truth(t *testing.T) (in, out tally) {
	t.Helper()
	l, err := w.host.Netlink().LinkByName("eth0")
	must(t, err)
	s := l.Attrs().Statistics
	in = tally{s.RxPackets, s.RxBytes - 14*s.RxPackets}
	out = tally{s.TxPackets, s.TxBytes - 14*s.TxPackets}
	return in, out
}

// snmpRetransmits is the host namespace's own count of segments sent again.
func (w *wire) snmpRetransmits(t *testing.T) uint64 {
	t.Helper()
	var v uint64
	must(t, w.host.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if f[0] != "Tcp:" {
				continue
			}
			if names == nil {
				names = f
				continue
			}
			for i, n := range names {
				if n == "RetransSegs" {
					v, err = strconv.ParseUint(f[i], 10, 64)
					return err
				}
			}
		}
		return fmt.Errorf("no RetransSegs in %s", text)
	}))
	return v
}

// unseen is what no program on a cgroup can see, by the capture.
type unseen struct {
	// ARP and all of ICMPv6 (neighbour discovery, MLD, router solicitations).
	neighbours tally
	// Resets of the kernel itself, for segments that have no socket, and the
	// segments that they answer.
	resets tally
	// The last acknowledgement of connections that were in TIME_WAIT, by the
	// host's ports of them.
	timeWait tally
}

// unseenOf goes through the capture; active are the ports of the host whose
// sockets were in TIME_WAIT before the far side's FIN came.
func unseenOf(all []pkt, fromHost bool, active map[uint16]bool) (u unseen) {
	ended := map[uint16]bool{}
	for _, p := range all {
		if p.fromHost && p.flags&finFlag != 0 {
			ended[p.srcPort] = true
		}
		if p.fromHost != fromHost {
			continue
		}
		near := p.srcPort
		if !fromHost {
			near = p.dstPort
		}
		switch {
		case p.proto != unix.IPPROTO_TCP && p.proto != unix.IPPROTO_UDP:
			u.neighbours.add(p)
		case p.proto == unix.IPPROTO_TCP && near == closedPort:
			u.resets.add(p)
		case p.proto == unix.IPPROTO_TCP && active[near] && fromHost && ended[near] && p.flags&finFlag == 0:
			u.timeWait.add(p)
		case p.proto == unix.IPPROTO_TCP && active[near] && !fromHost && ended[near] && p.flags&finFlag != 0:
			u.timeWait.add(p)
		}
	}
	return u
}

// finished says whether the far side has acknowledged the FIN of a port of the
// host, and sent none itself.
func finished(all []pkt, port uint16) bool {
	var end uint32
	for _, p := range all {
		switch {
		case p.fromHost && p.srcPort == port && p.flags&finFlag != 0:
			end = p.seq + uint32(p.payload) + 1
		case !p.fromHost && p.dstPort == port && p.flags&(finFlag|ackFlag) == ackFlag && end != 0 && p.ack == end:
			return true
		}
	}
	return false
}

// closedPort is a port of the host that nothing listens on.
const closedPort = 9

// agree waits until the wire is quiet and compares: the interface's count is
// the path's, and what no program can see.
func (w *wire) agree(t *testing.T, p *Programs, active map[uint16]bool) {
	t.Helper()
	eventually(t, "all connections closed", func() bool {
		c := p.Read(1)
		return c.Open() == 0 && c.Connecting() == 0
	})
	var in, out tally
	eventually(t, "the capture has all that the interface counted", func() bool {
		in, out = w.truth(t)
		return uint64(len(w.seen.all())) == in.packets+out.packets
	})
	c := p.Read(1)
	for _, d := range []struct {
		name     string
		truth    tally
		counted  tally
		fromHost bool
	}{
		{"out", out, tally{c.PacketsOut, c.BytesOut}, true},
		{"in", in, tally{c.PacketsIn, c.BytesIn}, false},
	} {
		u := unseenOf(w.seen.all(), d.fromHost, active)
		t.Logf("%s: interface %d, path %d, neighbours %d, resets %d, TIME_WAIT %d", d.name, d.truth, d.counted, u.neighbours, u.resets, u.timeWait)
		sum := tally{
			d.counted.packets + u.neighbours.packets + u.resets.packets + u.timeWait.packets,
			d.counted.bytes + u.neighbours.bytes + u.resets.bytes + u.timeWait.bytes,
		}
		if sum != d.truth {
			t.Errorf("%s: the path's and what is not seen are %d, the interface has %d", d.name, sum, d.truth)
		}
		if u.timeWait.packets != uint64(len(active)) {
			t.Errorf("%s: %d packets of %d sockets in TIME_WAIT", d.name, u.timeWait.packets, len(active))
		}
	}
	if c.GuardDrops() != 0 || p.Unmarked() != 0 {
		t.Errorf("the guard dropped: %+v, unmarked %d", c, p.Unmarked())
	}
	if got, want := c.Retransmits, w.snmpRetransmits(t); got != want {
		t.Errorf("%d retransmits, the kernel says %d", got, want)
	}
	if c.RTT == [RTTBuckets]uint64{} || c.RTTSum <= 0 {
		t.Errorf("round trips: %+v", c)
	}
}

// traffic is conversations of both families, half of them at once.
func (w *wire) traffic(t *testing.T, m uint32, conns, send, want int) {
	t.Helper()
	var all sync.WaitGroup
	for i := range conns {
		a := ask{network: "tcp4", src: right4, mark: m}
		if i%2 == 1 {
			a = ask{network: "tcp6", src: right6, mark: m}
		}
		all.Go(func() {
			c, err := w.dial(a, time.Minute)
			if err == nil {
				err = talk(c, send, want)
			}
			if err != nil {
				t.Errorf("conversation: %v", err)
			}
		})
	}
	for network, src := range map[string]string{"udp4": right4, "udp6": right6} {
		c, err := w.dial(ask{network: network, src: src, mark: m}, 0)
		must(t, err)
		for range 50 {
			_, err := c.Write(make([]byte, 700))
			must(t, err)
		}
		// Open until the end: an answer without a socket belongs to no path.
		t.Cleanup(func() { c.Close() })
	}
	all.Wait()
}

func TestCountersEqualTheInterface(t *testing.T) {
	w := newWire(t)
	wholePackets(t, w.host)
	wholePackets(t, w.far)
	p := w.load(t, Options{Paths: 1})
	m := mark(t, w.layout, ClassPath, 1, 1)
	w.traffic(t, m, 4, 1<<20, 1<<19)

	// One connection of each family that we close first: once the far side has
	// acknowledged our FIN the socket is in TIME_WAIT for the programs, and
	// what follows is not seen.
	active := map[uint16]bool{}
	for network, src := range map[string]string{"tcp4": right4, "tcp6": right6} {
		c, err := w.dial(ask{network: network, src: src, mark: m}, 0)
		must(t, err)
		port := c.LocalAddr().(*net.TCPAddr).AddrPort().Port()
		active[port] = true
		_, err = fmt.Fprintf(c, "100 -1\n%s", make([]byte, 100))
		must(t, err)
		must(t, c.Close())
		w.seen.await(t, "the acknowledgement of our FIN", func(all []pkt) bool { return finished(all, port) })
		w.hold <- struct{}{}
		w.seen.await(t, "our acknowledgement of the far side's FIN", func(all []pkt) bool {
			fin := false
			for _, p := range all {
				if fin && p.fromHost && p.srcPort == port {
					return true
				}
				fin = fin || !p.fromHost && p.dstPort == port && p.flags&finFlag != 0
			}
			return false
		})
	}
	// A connect to a port of ours that nothing listens on.
	err := w.far.Do(func() error {
		d := net.Dialer{Control: ask{mark: mark(t, w.layout, ClassControl, 0, 0)}.control}
		c, err := d.Dial("tcp4", net.JoinHostPort(right4, strconv.Itoa(closedPort)))
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil {
		t.Fatal("something listens on the closed port")
	}
	w.agree(t, p, active)
	c := p.Read(1)
	if c.Tried != 6 || c.Made != 6 || c.Failed != 0 || c.Closed != 6 {
		t.Errorf("connections: %+v", c)
	}
}

func TestCountersEqualTheInterfaceUnderLoss(t *testing.T) {
	w := newWire(t)
	wholePackets(t, w.host)
	wholePackets(t, w.far)
	lose(t, w.far, 50)
	p := w.load(t, Options{Paths: 1})
	w.traffic(t, mark(t, w.layout, ClassPath, 1, 1), 4, 1<<20, 1<<19)
	w.agree(t, p, nil)
	if c := p.Read(1); c.Retransmits == 0 || c.Made != 4 || c.Closed != 4 {
		t.Errorf("counted %+v", c)
	}
}

// lose makes the far end drop one packet of so many at random, after the
// capture on the way in and before it on the way out, until stop is called.
func lose(t *testing.T, n *lab.NS, one int32) (stop func()) {
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
	must(t, err)
	t.Cleanup(func() { prog.Close() })
	l, err := n.Netlink().LinkByName("eth0")
	must(t, err)
	var links []link.Link
	stop = func() {
		for _, l := range links {
			l.Close()
		}
		links = nil
	}
	t.Cleanup(stop)
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		must(t, n.Do(func() error {
			tcx, err := link.AttachTCX(link.TCXOptions{Interface: l.Attrs().Index, Program: prog, Attach: at})
			if err == nil {
				links = append(links, tcx)
			}
			return err
		}))
	}
	return stop
}

// TestCountersUnderGSO compares with what TCP itself says that it sent: the
// interface counts GSO packets, not those of the wire.
func TestCountersUnderGSO(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 2})
	for network, c := range map[string]struct {
		src    string
		num    uint32
		header uint64 // IP and TCP with timestamps; the SYN has 8 bytes more
	}{
		"tcp4": {right4, 1, 20 + 32},
		"tcp6": {right6, 2, 40 + 32},
	} {
		must(t, p.SetPath(c.num, w.guard()))
		conn, err := w.dial(ask{network: network, src: c.src, mark: mark(t, w.layout, ClassPath, 1, c.num)}, 0)
		must(t, err)
		const size = 8 << 20
		_, err = fmt.Fprintf(conn, "%d 1\n", size)
		must(t, err)
		_, err = conn.Write(make([]byte, size))
		must(t, err)
		_, err = conn.Read(make([]byte, 1)) // it has all
		must(t, err)
		raw, err := conn.(syscall.Conn).SyscallConn()
		must(t, err)
		var info *unix.TCPInfo
		eventually(t, "no acknowledgement is under way", func() bool {
			must(t, raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }))
			must(t, err)
			got := p.Read(c.num)
			return uint64(info.Segs_out) == got.PacketsOut && uint64(info.Segs_in) == got.PacketsIn
		})
		got := p.Read(c.num)
		if want := info.Bytes_sent + uint64(info.Segs_out)*c.header + 8; got.BytesOut != want {
			t.Errorf("%s: %d bytes out, TCP says %d (%d segments)", network, got.BytesOut, want, info.Segs_out)
		}
		t.Logf("%s: %d segments, %d bytes", network, got.PacketsOut, got.BytesOut)
		must(t, conn.Close())
	}
	gso := false
	for _, pk := range w.seen.all() {
		gso = gso || pk.length > 1500
	}
	if !gso {
		t.Error("there was no GSO packet on the interface")
	}
}

// TestConnectionsThatFail sees a refusal counted as failed, and one given up.
func TestConnectionsThatFail(t *testing.T) {
	w := newWire(t)
	p := w.load(t, Options{Paths: 1})
	control := ask{mark: mark(t, w.layout, ClassPath, 1, 1)}.control
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(right4)}, Control: control, Timeout: 100 * time.Millisecond}
	for _, to := range []string{net.JoinHostPort(far4, strconv.Itoa(closedPort)), "198.51.100.99:80"} {
		must(t, w.host.Do(func() error {
			c, err := d.Dial("tcp4", to)
			if err == nil {
				c.Close()
				t.Errorf("%s answers", to)
			}
			return nil
		}))
	}
	if c := p.Read(1); c.Tried != 2 || c.Failed != 2 || c.Made != 0 || c.Closed != 0 || c.Open() != 0 || c.Connecting() != 0 {
		t.Errorf("counted %+v", c)
	}
}
