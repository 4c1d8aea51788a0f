package bpf

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// TestFragmentsNeverSlip sends fragments of what is diverted to a host that would
// forward them: while the programs are replaced, after their process has gone, when
// the next takes over, and when others have taken them off. After the end they are
// forwarded.
func TestFragmentsNeverSlip(t *testing.T) {
	w := newDivertWorld(t)
	if err := w.Host.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	upstream, err := w.ISP1.Capture("host0")
	if err != nil {
		t.Fatal(err)
	}
	defer upstream.Close()
	const whole = 5000 // a port that is not diverted
	ours := func(p lab.Packet) bool {
		return p.Proto == unix.IPPROTO_UDP && p.Src.Addr().String() == lab.ClientAddr4
	}
	var diverted, other *net.UDPConn
	must(t, w.Client.Do(func() error {
		dial := func(port int) *net.UDPConn {
			c, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.ParseIP(lab.OriginAddr4), Port: port})
			must(t, err)
			t.Cleanup(func() { c.Close() })
			return c
		}
		diverted, other = dial(1500), dial(whole)
		return nil
	}))
	send := func() {
		t.Helper()
		if _, err := diverted.Write(make([]byte, 4000)); err != nil {
			t.Fatal(err)
		}
	}
	// A datagram that is forwarded comes last: then all before it has been seen.
	marks := 0
	none := func(when string) {
		t.Helper()
		marks++
		_, err := other.Write(make([]byte, marks))
		must(t, err)
		is := func(p lab.Packet) bool { return ours(p) && p.Dst.Port() == whole && p.Payload == marks }
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := upstream.Await(ctx, is); err != nil {
			t.Fatalf("%s: the mark: %v", when, err)
		}
		for _, p := range upstream.Packets() {
			if ours(p) && p.Dst.Port() != whole {
				t.Fatalf("%s: forwarded is %s", when, p)
			}
		}
	}

	w.set()
	stop, sent := make(chan struct{}), make(chan int)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				sent <- n
				return
			default:
			}
			if _, err := diverted.Write(make([]byte, 4000)); err != nil {
				t.Error(err)
			}
		}
	}()
	const replaced = 50
	for range replaced {
		w.set()
	}
	close(stop)
	if n := <-sent; n < replaced {
		t.Errorf("%d datagrams for %d replacements", n, replaced)
	}
	none("while the program is replaced")

	must(t, w.d.Close())
	send()
	none("after the process")

	w.open()
	send()
	none("taken over")
	w.set()
	byFilter := len(w.d.filters) == 1
	if byFilter { // of links others cannot
		must(t, w.Host.Netlink().QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: int(w.lan), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}}))
	}
	var want []uint32
	if byFilter {
		want = []uint32{w.lan}
	}
	for range 2 {
		if got, err := w.d.Restore(); err != nil || !slices.Equal(got, want) {
			t.Errorf("put back on %v, want %v; error %v", got, want, err)
		}
		want = nil
	}
	send()
	none("taken off and put back")

	must(t, w.d.Close())
	must(t, CleanDivert(w.dir, w.in))
	if got, err := w.in.Ingresses(divertFilter(w.dir)); err != nil || len(got) != 0 {
		t.Errorf("after the end there is a program on %v, error %v", got, err)
	}
	// The rules of this world still take the ports; only fragments go by.
	send()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := upstream.Await(ctx, func(p lab.Packet) bool {
		return ours(p) && p.Dst.Addr() == netip.MustParseAddr(lab.OriginAddr4) && p.Dst.Port() != whole
	}); err != nil {
		t.Errorf("after the end: %v", err)
	}
}

// TestFragmentsOfPriorityTags: a frame that has a priority and no VLAN (IEEE 802.1p) is
// the interface's own, and so are the fragments in it.
func TestFragmentsOfPriorityTags(t *testing.T) {
	w := newDivertWorld(t)
	must(t, w.Host.Sysctl("net/ipv4/ip_forward", "1"))
	upstream, err := w.ISP1.Capture("host0")
	must(t, err)
	defer upstream.Close()
	w.set()
	lan, err := w.Host.Netlink().LinkByIndex(int(w.lan))
	must(t, err)
	client, err := w.Client.Netlink().LinkByName("eth0")
	must(t, err)
	payload := make([]byte, 64)
	send := func(id, frag uint16, tags ...uint16) {
		t.Helper()
		b := append(slices.Clone([]byte(lan.Attrs().HardwareAddr)), client.Attrs().HardwareAddr...)
		for _, tci := range tags {
			b = append(binary.BigEndian.AppendUint16(b, unix.ETH_P_8021Q), byte(tci>>8), byte(tci))
		}
		h := ip4(lab.ClientAddr4, unix.IPPROTO_UDP, 0)
		h[8] = 64
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
		to := netip.MustParseAddr(lab.OriginAddr4).As4()
		copy(h[16:], to[:])
		binary.BigEndian.PutUint16(h[4:], id)
		binary.BigEndian.PutUint16(h[6:], frag)
		var sum uint32
		for i := 0; i < len(h); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(h[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
		b = append(binary.BigEndian.AppendUint16(b, unix.ETH_P_IP), h...)
		inject(t, w.Client, "eth0", append(b, payload...))
	}
	const prio, off = 5 << 13, 185
	send(1, off)
	send(2, off, prio)
	send(3, off, prio, prio)
	send(4, 0, prio) // no port that is diverted
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ours := func(p lab.Packet) bool {
		return p.Proto == unix.IPPROTO_UDP && p.Src.Addr().String() == lab.ClientAddr4
	}
	if err := upstream.Await(ctx, ours); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	n := 0
	for _, p := range upstream.Packets() {
		if ours(p) {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d packets are forwarded, want the whole one alone", n)
	}
}
