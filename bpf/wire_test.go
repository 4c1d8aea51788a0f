package bpf

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// The host's addresses on eth0, of which each path has one, and the far side's.
const (
	right4, right6   = "198.51.100.11", "2001:db8:100::11"
	wrong4, wrong6   = "198.51.100.12", "2001:db8:100::12"
	far4, far6       = "198.51.100.1", "2001:db8:100::1"
	tcpPort, udpPort = 7001, 7002
)

// wire is a host and what is at the far end of its eth0, watched there; eth1
// leads nowhere. This process is in a leaf cgroup of its own; the far side's
// sockets were made before, so that no program sees them.
type wire struct {
	host, far *lab.NS
	eth       [2]uint32 // indices of the host's interfaces
	seen      *capture
	leaf      *Leaf
	layout    Layout
	hold      chan struct{} // lets the server close, one connection each
}

func leafName() string { return fmt.Sprintf("wayout-test-%d", os.Getpid()) }

func newWire(t testing.TB) *wire {
	t.Helper()
	w := &wire{host: lab.TestNS(t, "host"), far: lab.TestNS(t, "far"), layout: testLayout(t, DefaultMask), hold: make(chan struct{})}
	for i, name := range []string{"eth0", "eth1"} {
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "far-" + name}
		must(t, w.host.Netlink().LinkAdd(pair))
		index, err := w.host.Netlink().LinkByName(name)
		must(t, err)
		w.eth[i] = uint32(index.Attrs().Index)
	}
	w.movePeers(t) // before they are up: the capture is to see the first packet
	var err error
	w.seen, err = newCapture(w.far, "eth0")
	must(t, err)
	t.Cleanup(func() { w.seen.close(t) })
	for _, n := range []*lab.NS{w.host, w.far} {
		must(t, errors.Join(n.Up("eth0"), n.Up("eth1")))
	}
	must(t, w.host.AddAddr("eth0", pfx("198.51.100.2/24"), pfx(right4+"/24"), pfx(wrong4+"/24"),
		pfx("2001:db8:100::2/64"), pfx(right6+"/64"), pfx(wrong6+"/64")))
	must(t, w.far.AddAddr("eth0", pfx(far4+"/24"), pfx(far6+"/64")))
	w.serve(t)
	t.Cleanup(func() { close(w.hold) })
	w.leaf, err = MakeLeaf(leafName())
	must(t, err)
	t.Cleanup(func() { must(t, w.leaf.Remove()) })
	return w
}

func (w *wire) movePeers(t testing.TB) {
	t.Helper()
	for _, name := range []string{"eth0", "eth1"} {
		peer, err := w.host.Netlink().LinkByName("far-" + name)
		must(t, err)
		must(t, w.far.Do(func() error {
			ns, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer ns.Close()
			return w.host.Netlink().LinkSetNsFd(peer, int(ns.Fd()))
		}))
		there, err := w.far.Netlink().LinkByName("far-" + name)
		must(t, err)
		must(t, w.far.Netlink().LinkSetName(there, name))
	}
}

// load loads the programs; path 1 has the right addresses on eth0.
func (w *wire) load(t testing.TB, o Options) *Programs {
	t.Helper()
	o.Layout, o.Cgroup = w.layout, w.leaf.Path()
	p, err := Load(o)
	must(t, err)
	t.Cleanup(func() { must(t, p.Close()) })
	must(t, p.SetPath(1, w.guard()))
	return p
}

func (w *wire) guard() Guard {
	return Guard{V4: pfx(right4 + "/32"), V6: pfx(right6 + "/128"), IfIndex: w.eth[0]}
}

// serve answers on the far side: TCP by answer, datagrams by an echo.
func (w *wire) serve(t testing.TB) {
	t.Helper()
	for _, a := range []string{far4, far6} {
		at := netip.AddrPortFrom(netip.MustParseAddr(a), tcpPort)
		l, err := w.far.Listen(at)
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go w.answer(c)
			}
		}()
		var u net.PacketConn
		must(t, w.far.Do(func() error {
			u, err = net.ListenPacket("udp", net.JoinHostPort(a, strconv.Itoa(udpPort)))
			return err
		}))
		t.Cleanup(func() { u.Close() })
		go func() {
			b := make([]byte, 2048)
			for {
				n, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo(b[:n], from)
			}
		}()
	}
}

// answer serves one connection: "SEND WANT\n", SEND bytes; WANT bytes back, and
// the server closes first. With WANT -1 it sends nothing, and closes after the
// client's end of file once the test says so.
func (w *wire) answer(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return
	}
	a, b, _ := strings.Cut(strings.TrimSpace(line), " ")
	send, _ := strconv.ParseInt(a, 10, 64)
	want, _ := strconv.ParseInt(b, 10, 64)
	if _, err := io.CopyN(io.Discard, r, send); err != nil {
		return
	}
	if want < 0 {
		_, _ = io.Copy(io.Discard, r)
		<-w.hold
		return
	}
	_, _ = c.Write(make([]byte, want))
}

// talk has one conversation in which the far side closes first, so that no
// socket of ours comes to TIME_WAIT.
func talk(c net.Conn, send, want int) error {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "%d %d\n", send, want); err != nil {
		return err
	}
	if _, err := c.Write(make([]byte, send)); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, c)
	if err == nil && n != int64(want) {
		err = fmt.Errorf("%d bytes came back, want %d", n, want)
	}
	return err
}

// ask is a socket to be made on the host.
type ask struct {
	network, src, device string // src "": unbound
	mark                 uint32
}

func (a ask) far() string {
	host, port := far4, tcpPort
	if strings.HasSuffix(a.network, "6") {
		host = far6
	}
	if strings.HasPrefix(a.network, "udp") {
		port = udpPort
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}

func (a ask) control(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(a.mark))
		// So that addresses of local routes can be bound, and those of nobody.
		err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1))
		if a.device != "" {
			err = errors.Join(err, unix.BindToDevice(int(fd), a.device))
		}
	}), err)
}

func (w *wire) dial(a ask, timeout time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Control: a.control, Timeout: timeout}
	if a.src != "" {
		ip := net.IP(netip.MustParseAddr(a.src).AsSlice())
		d.LocalAddr = &net.TCPAddr{IP: ip}
		if strings.HasPrefix(a.network, "udp") {
			d.LocalAddr = &net.UDPAddr{IP: ip}
		}
	}
	err = w.host.Do(func() error {
		c, err = d.Dial(a.network, a.far())
		return err
	})
	return c, err
}

// packet makes an unconnected datagram socket on the host.
func (w *wire) packet(a ask) (c net.PacketConn, err error) {
	l := net.ListenConfig{Control: a.control}
	err = w.host.Do(func() error {
		c, err = l.ListenPacket(context.Background(), a.network, net.JoinHostPort(a.src, "0"))
		return err
	})
	return c, err
}

// marker sends a datagram that may pass and waits until the far side's capture
// has it: whatever was sent before has been captured then.
func (w *wire) marker(t testing.TB) {
	t.Helper()
	for network, src := range map[string]string{"udp4": "198.51.100.2", "udp6": "2001:db8:100::2"} {
		c, err := w.dial(ask{network: network, src: src, mark: mark(t, w.layout, ClassControl, 0, 0)}, 0)
		must(t, err)
		_, err = c.Write([]byte("marker"))
		must(t, err)
		port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		c.Close()
		w.seen.await(t, "the marker", func(all []pkt) bool {
			for _, p := range all {
				if p.fromHost && p.proto == unix.IPPROTO_UDP && p.srcPort == port {
					return true
				}
			}
			return false
		})
	}
}

// nothingFrom fails when the far side has seen a packet from an address.
func (w *wire) nothingFrom(t testing.TB, sources ...string) {
	t.Helper()
	w.marker(t)
	for _, p := range w.seen.all() {
		for _, s := range sources {
			if p.fromHost && p.src == netip.MustParseAddr(s) && p.proto != unix.IPPROTO_ICMPV6 {
				t.Errorf("the far side has seen %+v", p)
			}
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until it is so.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// pkt is one packet that a capture saw. The length is that of IP.
type pkt struct {
	fromHost         bool
	ethertype        uint16
	proto            byte
	src, dst         netip.Addr
	srcPort, dstPort uint16
	seq, ack         uint32
	flags            byte
	payload, length  int
}

const (
	finFlag = 1
	ackFlag = 16
)

// capture is an AF_PACKET socket, and all that it has seen.
type capture struct {
	f    *os.File
	done chan struct{}
	mu   sync.Mutex
	pkts []pkt
	more chan struct{} // closed and made anew with each packet
}

func newCapture(n *lab.NS, dev string) (*capture, error) {
	c := &capture{done: make(chan struct{}), more: make(chan struct{})}
	err := n.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		c.f = os.NewFile(uintptr(fd), "capture")
		l, err := n.Netlink().LinkByName(dev)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Attrs().Index}),
		)
	})
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	go c.read()
	return c, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *capture) read() {
	defer close(c.done)
	raw, err := c.f.SyscallConn()
	if err != nil {
		return
	}
	b := make([]byte, 256)
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), b, unix.MSG_TRUNC)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		if errors.Is(rerr, unix.ENETDOWN) {
			continue // bound before the interface was up
		}
		if err != nil || rerr != nil {
			return
		}
		ll := from.(*unix.SockaddrLinklayer)
		p := parse(htons(ll.Protocol), b[:min(n, len(b))], n)
		p.fromHost = ll.Pkttype != unix.PACKET_OUTGOING
		c.mu.Lock()
		c.pkts = append(c.pkts, p)
		close(c.more)
		c.more = make(chan struct{})
		c.mu.Unlock()
	}
}

func parse(ethertype uint16, b []byte, n int) pkt {
	p := pkt{ethertype: ethertype, length: n}
	var l4 []byte
	switch {
	case ethertype == unix.ETH_P_IP && len(b) >= 20:
		p.proto = b[9]
		p.src, p.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		l4 = b[int(b[0]&15)*4:]
	case ethertype == unix.ETH_P_IPV6 && len(b) >= 40:
		p.proto = b[6]
		p.src, p.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		l4 = b[40:]
		if p.proto == 0 && len(l4) >= 8 { // hop-by-hop options: MLD
			p.proto = l4[0]
		}
	}
	if (p.proto == unix.IPPROTO_TCP || p.proto == unix.IPPROTO_UDP) && len(l4) >= 8 {
		p.srcPort, p.dstPort = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	}
	if p.proto == unix.IPPROTO_TCP && len(l4) >= 20 {
		p.seq, p.ack, p.flags = binary.BigEndian.Uint32(l4[4:]), binary.BigEndian.Uint32(l4[8:]), l4[13]
		p.payload = n - (len(b) - len(l4)) - int(l4[12]>>4)*4
	}
	return p
}

func (c *capture) all() []pkt {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pkts[:len(c.pkts):len(c.pkts)]
}

func (c *capture) await(t testing.TB, what string, is func([]pkt) bool) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		c.mu.Lock()
		pkts, more := c.pkts[:len(c.pkts):len(c.pkts)], c.more
		c.mu.Unlock()
		if is(pkts) {
			return
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("not seen within 30 s: %s", what)
		}
	}
}

func (c *capture) close(t testing.TB) {
	raw, err := c.f.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil || s.Drops != 0 {
			t.Errorf("the capture lost packets: %+v, %v", s, err)
		}
	}))
	c.f.Close()
	<-c.done
}
