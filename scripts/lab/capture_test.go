package lab

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCaptureIsTheTruth compares the three: what was said, what the capture saw
// and what the interface counted.
func TestCaptureIsTheTruth(t *testing.T) {
	a, b := TestNS(t, "a"), TestNS(t, "b")
	if err := Veth(a, "x", b, "y"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.WholePackets("x"), b.WholePackets("y")); err != nil {
		t.Fatal(err)
	}
	c, err := b.Capture("y")
	if err != nil {
		t.Fatal(err)
	}
	const size = 100_000
	for _, p := range []string{"192.0.2.%/24", "2001:db8::%/64"} {
		near, far := prefix(p, "1"), prefix(p, "2")
		if err := errors.Join(a.AddAddr("x", near), b.AddAddr("y", far)); err != nil {
			t.Fatal(err)
		}
		l, err := b.Listen(netip.AddrPortFrom(far.Addr(), 80))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			conn, err := l.Accept()
			if err == nil {
				_, _ = io.Copy(io.Discard, conn)
				conn.Close()
			}
		}()
		conn, err := a.Dial(netip.AddrPortFrom(far.Addr(), 80))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // io.EOF is never wrapped
			t.Fatalf("%d, %v", n, err)
		}
		conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := c.Await(ctx, func(p Packet) bool { return p.Out && p.Flags&FIN != 0 && p.Src.Addr() == far.Addr() }); err != nil {
			t.Fatal(err)
		}
		// A loaded machine sends segments twice: each byte counts once.
		payload, next := 0, uint32(0)
		for _, p := range c.Packets() {
			if p.Proto != unix.IPPROTO_TCP || p.Src.Addr() != near.Addr() {
				continue
			}
			if p.Out || p.Dst != netip.AddrPortFrom(far.Addr(), 80) {
				t.Errorf("seen as %s", p)
			}
			if p.Flags&SYN != 0 {
				next = p.Seq + 1
				continue
			}
			if fresh := int32(p.Seq + uint32(p.Payload) - next); p.Payload > 0 && fresh > 0 {
				payload += int(fresh)
				next += uint32(fresh)
			}
		}
		if payload != size {
			t.Errorf("%s: %d bytes were seen, %d sent", near, payload, size)
		}
	}
	// The capture comes to what the interface says, as soon as all is read.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		in, out, err := c.Truth()
		if err != nil {
			t.Fatal(err)
		}
		var seenIn, seenOut Traffic
		for _, p := range c.Packets() {
			if p.Out {
				seenOut.Add(p.Length)
			} else {
				seenIn.Add(p.Length)
			}
		}
		if in == seenIn && out == seenOut {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("seen %v and %v, counted %v and %v", seenIn, seenOut, in, out)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func prefix(form, host string) netip.Prefix {
	for i := range form {
		if form[i] == '%' {
			return netip.MustParsePrefix(form[:i] + host + form[i+1:])
		}
	}
	panic(form)
}

func TestDecode(t *testing.T) {
	v4 := []byte{
		0x45, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
		0x1f, 0x90, 0, 80, 0, 0, 0, 7, 0, 0, 0, 9, 0x50, 0x12, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4,
	}
	got := decode(unix.ETH_P_IP, v4, len(v4))
	want := Packet{
		EtherType: unix.ETH_P_IP, Length: 44, Proto: unix.IPPROTO_TCP, Flags: SYN | ACK, Seq: 7, Ack: 9, Payload: 4,
		Src: netip.MustParseAddrPort("192.0.2.1:8080"), Dst: netip.MustParseAddrPort("192.0.2.2:80"),
	}
	if got != want {
		t.Errorf("%s, want %s", got, want)
	}
	// An IPv6 packet with a hop-by-hop header before ICMPv6.
	mld := make([]byte, 56)
	mld[0], mld[6], mld[40] = 0x60, unix.IPPROTO_HOPOPTS, unix.IPPROTO_ICMPV6
	if p := decode(unix.ETH_P_IPV6, mld, len(mld)); p.Proto != unix.IPPROTO_ICMPV6 || p.Src.Port() != 0 {
		t.Errorf("%s", p)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(uint16(unix.ETH_P_IP), []byte{0x4f}, 60)
	f.Add(uint16(unix.ETH_P_IPV6), make([]byte, 60), 9000)
	f.Add(uint16(unix.ETH_P_ARP), make([]byte, 28), 28)
	f.Fuzz(func(t *testing.T, ethertype uint16, b []byte, n int) {
		if p := decode(ethertype, b, n); p.Length != n || p.String() == "" {
			t.Errorf("%s", p)
		}
	})
}
