package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Packet is one packet that a Capture saw on its interface.
type Packet struct {
	Out       bool   // the interface has sent it; else it came in
	EtherType uint16 // unix.ETH_P_IP, ETH_P_IPV6, ETH_P_ARP
	Length    int    // without the Ethernet header: IP with all of its headers
	Proto     uint8  // of IP; an IPv6 hop-by-hop header is looked behind
	Src, Dst  netip.AddrPort

	// Of TCP. Payload is of UDP too.
	Flags    uint8
	Seq, Ack uint32
	Payload  int
}

// Flags of TCP.
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// String is the packet in one line.
func (p Packet) String() string {
	dir := "in"
	if p.Out {
		dir = "out"
	}
	switch p.Proto {
	case unix.IPPROTO_TCP:
		flags := ""
		for i, c := range "FSRP." {
			if p.Flags&(1<<i) != 0 {
				flags += string(c)
			}
		}
		return fmt.Sprintf("%s TCP %s > %s %s seq %d ack %d payload %d", dir, p.Src, p.Dst, flags, p.Seq, p.Ack, p.Payload)
	case unix.IPPROTO_UDP:
		return fmt.Sprintf("%s UDP %s > %s payload %d", dir, p.Src, p.Dst, p.Payload)
	}
	return fmt.Sprintf("%s ethertype 0x%04x protocol %d %s > %s length %d", dir, p.EtherType, p.Proto, p.Src.Addr(), p.Dst.Addr(), p.Length)
}

// Capture is a packet socket (packet(7)) on one interface, and all that it has
// seen since it was opened, in both directions.
type Capture struct {
	ns   *NS
	link string
	f    *os.File
	done chan struct{}

	// What the interface had counted when the capture began.
	in, out Traffic

	mu   sync.Mutex
	pkts []Packet
	more chan struct{} // closed and made anew with each packet
}

// captureBuffer is enough for what a test sends while the reader waits for a
// core.
const captureBuffer = 256 << 20

// Capture watches an interface of the namespace until Close. What a tcx program
// drops on the way in has been seen; what it drops on the way out has not.
func (n *NS) Capture(link string) (*Capture, error) {
	// A packet that comes between the first count and the socket would belong
	// to only one of the two.
	for {
		c, quiet, err := n.capture(link)
		if err != nil {
			return nil, fmt.Errorf("capture on %s %s: %w", n.Name, link, err)
		}
		if quiet {
			go c.read()
			return c, nil
		}
		if err := c.f.Close(); err != nil {
			return nil, err
		}
	}
}

func (n *NS) capture(link string) (_ *Capture, quiet bool, err error) {
	c := &Capture{ns: n, link: link, done: make(chan struct{}), more: make(chan struct{})}
	if c.in, c.out, err = n.Truth(link); err != nil {
		return nil, false, err
	}
	l, err := n.nl.LinkByName(link)
	if err != nil {
		return nil, false, err
	}
	err = n.Do(func() error {
		// Without a protocol nothing is queued before the socket is bound.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: swap(unix.ETH_P_ALL), Ifindex: l.Attrs().Index}),
		)
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		c.f = os.NewFile(uintptr(fd), "capture")
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	in, out, err := n.Truth(link)
	if err != nil {
		return nil, false, errors.Join(err, c.f.Close())
	}
	return c, in == c.in && out == c.out, nil
}

// swap turns a 16-bit number of the host into one of the network, and back.
func swap(v uint16) uint16 { return v<<8 | v>>8 }

func (c *Capture) read() {
	defer close(c.done)
	raw, err := c.f.SyscallConn()
	if err != nil {
		return
	}
	b := make([]byte, 256) // headers; the length is told apart from them
	for {
		var n int
		var from unix.Sockaddr
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			n, from, failed = unix.Recvfrom(int(fd), b, unix.MSG_TRUNC)
			return !errors.Is(failed, unix.EAGAIN)
		})
		if errors.Is(failed, unix.ENETDOWN) || errors.Is(failed, unix.EINTR) {
			continue // the interface went down; it may come back
		}
		if err != nil || failed != nil {
			return
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		p := decode(swap(ll.Protocol), b[:min(n, len(b))], n)
		p.Out = ll.Pkttype == unix.PACKET_OUTGOING
		c.mu.Lock()
		c.pkts = append(c.pkts, p)
		close(c.more)
		c.more = make(chan struct{})
		c.mu.Unlock()
	}
}

// decode reads the headers of a packet of length n, of which b is the
// beginning. What it does not know it leaves at zero.
func decode(ethertype uint16, b []byte, n int) Packet {
	p := Packet{EtherType: ethertype, Length: n}
	var src, dst netip.Addr
	var l4 []byte
	switch {
	case ethertype == unix.ETH_P_IP && len(b) >= 20:
		p.Proto = b[9]
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		l4 = b[min(int(b[0]&15)*4, len(b)):]
	case ethertype == unix.ETH_P_IPV6 && len(b) >= 40:
		p.Proto = b[6]
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		l4 = b[40:]
		if p.Proto == unix.IPPROTO_HOPOPTS && len(l4) >= 8 { // as MLD has it
			p.Proto = l4[0]
			l4 = l4[min((int(l4[1])+1)*8, len(l4)):]
		}
	}
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	tcp, udp := p.Proto == unix.IPPROTO_TCP, p.Proto == unix.IPPROTO_UDP
	if (tcp || udp) && len(l4) >= 8 {
		p.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(l4))
		p.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(l4[2:]))
		p.Payload = n - (len(b) - len(l4)) - 8
	}
	if tcp && len(l4) >= 20 {
		p.Seq, p.Ack, p.Flags = binary.BigEndian.Uint32(l4[4:]), binary.BigEndian.Uint32(l4[8:]), l4[13]
		p.Payload = n - (len(b) - len(l4)) - int(l4[12]>>4)*4
	}
	return p
}

// Packets are all that were seen until here, in order.
func (c *Capture) Packets() []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pkts[:len(c.pkts):len(c.pkts)]
}

// Take gives the packets that were seen since the last Take, and forgets them,
// so that a capture may go on for long; it waits until there are some. Those who
// take do not ask for Packets and do not Await.
func (c *Capture) Take(ctx context.Context) ([]Packet, error) {
	for {
		c.mu.Lock()
		pkts, more := c.pkts, c.more
		c.pkts = nil
		c.mu.Unlock()
		if len(pkts) > 0 {
			return pkts, nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Truth is what the interface itself has counted since the capture began, less
// the Ethernet headers. It is the truth of the wire only with WholePackets on
// both ends of the pair.
func (c *Capture) Truth() (in, out Traffic, err error) {
	if in, out, err = c.ns.Truth(c.link); err != nil {
		return in, out, err
	}
	return in.Minus(c.in), out.Minus(c.out), nil
}

// Await waits for a packet, seen already or yet to come, for which is is true.
func (c *Capture) Await(ctx context.Context, is func(Packet) bool) error {
	for i := 0; ; {
		c.mu.Lock()
		pkts, more := c.pkts[:len(c.pkts):len(c.pkts)], c.more
		c.mu.Unlock()
		for ; i < len(pkts); i++ {
			if is(pkts[i]) {
				return nil
			}
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fmt.Errorf("none of %d captured packets: %w", i, ctx.Err())
		}
	}
}

// Close ends the capture. The error says when it has lost packets: then what it
// has not seen proves nothing.
func (c *Capture) Close() error {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return err
	}
	var lost error
	err = raw.Control(func(fd uintptr) {
		s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
		if err != nil {
			lost = err
		} else if s.Drops != 0 {
			lost = fmt.Errorf("the capture lost %d of %d packets", s.Drops, s.Packets)
		}
	})
	err = errors.Join(err, lost, c.f.Close())
	<-c.done
	return err
}
