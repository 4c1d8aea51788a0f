package socks_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/socks"
	"wayout/router/socks/client"
	"wayout/selection"
)

// packets is a PacketConn that leaves by 127.0.0.2 and ::1. Names end in
// ".test"; slow.test is resolved when release is closed.
type packets struct {
	four, six *net.UDPConn
	in        chan packet
	done      chan struct{}
	release   chan struct{}
	once      sync.Once
	wg        sync.WaitGroup

	mu   sync.Mutex
	kill func(error)
}

type packet struct {
	b    []byte
	from netip.AddrPort
	err  error
}

func newPackets(tb testing.TB) *packets {
	p := &packets{in: make(chan packet, 16), done: make(chan struct{}), release: make(chan struct{})}
	p.four, p.six = udp(tb, "127.0.0.2"), udp(tb, "::1")
	for _, c := range []*net.UDPConn{p.four, p.six} {
		p.wg.Go(func() {
			for {
				b := make([]byte, 1<<16)
				n, from, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				p.give(packet{b: b[:n], from: netip.AddrPortFrom(from.Addr().Unmap(), from.Port())})
			}
		})
	}
	return p
}

func (p *packets) give(x packet) {
	select {
	case p.in <- x:
	case <-p.done:
	}
}

func udp(tb testing.TB, at string) *net.UDPConn {
	tb.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(at)})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return c
}

func (p *packets) Send(ctx context.Context, to escaper.Target, b []byte) error {
	a := to.Addr
	switch to.Host {
	case "":
	case "slow.test":
		select {
		case <-p.release:
		case <-ctx.Done():
			return ctx.Err()
		}
		a = netip.MustParseAddr("127.0.0.1")
	case "origin.test":
		a = netip.MustParseAddr("127.0.0.1")
	default:
		return escaper.ErrDNS
	}
	if a == netip.MustParseAddr("127.9.0.1") {
		return escaper.ErrProhibited
	}
	c := p.four
	if a.Is6() {
		c = p.six
	}
	_, err := c.WriteToUDPAddrPort(b, netip.AddrPortFrom(a, to.Port))
	return err
}

func (p *packets) Receive(b []byte) (int, netip.AddrPort, error) {
	select {
	case x := <-p.in:
		return copy(b, x.b), x.from, x.err
	case <-p.done:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (p *packets) Source(f selection.Family) netip.AddrPort {
	c := p.four
	if f == selection.V6 {
		c = p.six
	}
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func (p *packets) Close() error {
	p.once.Do(func() {
		close(p.done)
		_, _ = p.four.Close(), p.six.Close()
		p.wg.Wait()
	})
	return nil
}

func (p *packets) OnKill(f func(error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kill = f
}

func (p *packets) killer() func(error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kill
}

// peer answers each datagram with who sent it, a space and what it said.
func peer(tb testing.TB, at string) netip.AddrPort {
	tb.Helper()
	c := udp(tb, at)
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(append([]byte(from.Addr().Unmap().String()+" "), b[:n]...), from)
		}
	})
	tb.Cleanup(func() {
		_ = c.Close()
		wg.Wait()
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// assoc is a client with an association.
type assoc struct {
	*wire
	udp   *net.UDPConn
	relay netip.AddrPort
}

const associate = "\x05\x03\x00"

// udpRig is a rig with associations, of which the last one's far side is in far.
func udpRig(tb testing.TB, change func(*socks.Options)) (r *proxy, far func() *packets) {
	var mu sync.Mutex
	var last *packets
	r = newProxy(tb, func(o *socks.Options) {
		o.OpenPacket = func(_ context.Context, q *escaper.Request) (escaper.PacketConn, error) {
			if v, _, ok := q.Selection.For("out"); ok && v.String() == "off" {
				return nil, selection.ErrDown
			}
			q.Choice = escaper.Choice{Path: "out/b"}
			mu.Lock()
			defer mu.Unlock()
			last = newPackets(tb)
			return last, nil
		}
		o.ListenPacket = func(at netip.AddrPort) (*net.UDPConn, error) {
			return net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		}
		if change != nil {
			change(o)
		}
	})
	return r, func() *packets {
		mu.Lock()
		defer mu.Unlock()
		return last
	}
}

func (r *proxy) associate(u *net.UDPConn, from string) *assoc {
	r.TB.Helper()
	w := r.dial()
	w.send(hello + associate + from)
	w.expect(fine + "\x05\x00\x00\x01")
	b := w.take(6)
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte([]byte(b))), uint16(b[4])<<8|uint16(b[5]))
	if err := u.SetDeadline(time.Now().Add(6 * patience)); err != nil {
		r.TB.Fatal(err)
	}
	return &assoc{wire: w, udp: u, relay: to}
}

const anywhere = "\x01\x00\x00\x00\x00\x00\x00"

func (a *assoc) say(b string) {
	a.tb.Helper()
	if _, err := a.udp.WriteToUDPAddrPort([]byte(b), a.relay); err != nil {
		a.tb.Fatal(err)
	}
}

func (a *assoc) hear() (from client.Addr, payload string) {
	a.tb.Helper()
	b := make([]byte, 1<<16)
	n, src, err := a.udp.ReadFromUDPAddrPort(b)
	if err != nil {
		a.tb.Fatal(err)
	}
	if src != a.relay {
		a.tb.Errorf("a datagram comes from %s, not from %s", src, a.relay)
	}
	from, p, err := client.ParseHeader(b[:n])
	if err != nil {
		a.tb.Fatalf("%x: %v", b[:n], err)
	}
	return from, string(p)
}

const plain = "\x00\x00\x00" // the beginning of a header

func TestAssociation(t *testing.T) {
	r, _ := udpRig(t, nil)
	four, six := peer(t, "127.0.0.1"), peer(t, "::1")
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	if a.relay.Addr().String() != "127.0.0.1" {
		t.Errorf("the relay is at %s", a.relay)
	}
	for _, c := range []struct{ to, from, want string }{
		{addr(t, four.String()), four.String(), "127.0.0.2 "},
		{addr(t, six.String()), six.String(), "::1 "},
		{domain("origin.test", four.Port()), four.String(), "127.0.0.2 "},
		{domain("127.0.0.1", four.Port()), four.String(), "127.0.0.2 "},
	} {
		for _, payload := range []string{"hello", "", strings.Repeat("x", 60000)} {
			a.say(plain + c.to + payload)
			if from, got := a.hear(); from.String() != c.from || got != c.want+payload {
				t.Errorf("%q of %d bytes: got %.40q (%d) from %s", c.to, len(payload), got, len(got), from)
			}
		}
	}
	_ = a.Close()
	rec := r.Record(0)
	const out = 4 * (5 + 60000)
	in := int64(out + 9*len("127.0.0.2 ") + 3*len("::1 "))
	if rec.Method != "UDP" || rec.Status != 200 || rec.Err != nil || rec.BytesOut != out || rec.BytesIn != in || rec.Dropped != 0 ||
		rec.Source.Addr().String() != "127.0.0.2" || rec.Choice.Path != "out/b" {
		t.Errorf("record %+v", rec)
	}
}

// TestAssociationEchoes: nothing is lost or changes places between one client
// and one peer that wait for each other.
func TestAssociationEchoes(t *testing.T) {
	r, _ := udpRig(t, nil)
	to := addr(t, peer(t, "127.0.0.1").String())
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	for i := range 3000 {
		want := "127.0.0.2 " + octet(i) + octet(i>>8)
		a.say(plain + to + want[len("127.0.0.2 "):])
		if _, got := a.hear(); got != want {
			t.Fatalf("datagram %d: %q", i, got)
		}
	}
}

// TestAssociationDrops: what is wrong with a datagram ends that one alone.
func TestAssociationDrops(t *testing.T) {
	r, far := udpRig(t, nil)
	to := addr(t, peer(t, "127.0.0.1").String())
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	other := *a
	other.udp = udp(t, "127.0.0.3")
	other.say(plain + to + "another's")
	bad := []string{
		"", "\x00", plain, plain + "\x01",
		"\x00\x00\x01" + to + "fragment", "\x00\x00\x80" + to + "last fragment",
		plain + "\x02\x7f\x00\x00\x01\x00\x50", plain + "\x03\x00\x00\x50",
		plain + addr(t, "127.0.0.1:0") + "x", plain + domain("a b", 80) + "x", plain + domain("127.1", 80) + "x",
		plain + addr(t, "127.9.0.1:80") + "prohibited",
		plain + domain("none.test", 80) + "no such name",
	}
	for _, b := range bad {
		a.say(b)
	}
	a.say(plain + to + "first")
	if _, got := a.hear(); got != "127.0.0.2 first" {
		t.Fatalf("got %q", got)
	}
	// Now it has its port, and another one of the same host is not it.
	second := *a
	second.udp = udp(t, "127.0.0.1")
	second.say(plain + to + "another's")
	far().give(packet{err: errors.New("an error that passes")})
	a.say(plain + to + "second")
	if _, got := a.hear(); got != "127.0.0.2 second" {
		t.Fatalf("got %q", got)
	}
	_ = a.Close()
	if rec := r.Record(0); rec.Dropped != int64(len(bad))+3 || rec.BytesOut != int64(len("firstsecond")) {
		t.Errorf("%d bad, record %+v", len(bad), rec)
	}
}

// TestAssociationOwner: a port that the request names is the only one.
func TestAssociationOwner(t *testing.T) {
	r, _ := udpRig(t, nil)
	to := addr(t, peer(t, "127.0.0.1").String())
	for _, host := range []string{"127.0.0.1", "0.0.0.0"} {
		u := udp(t, "127.0.0.1")
		named := netip.AddrPortFrom(netip.MustParseAddr(host), u.LocalAddr().(*net.UDPAddr).AddrPort().Port())
		a := r.associate(u, addr(t, named.String()))
		other := *a
		other.udp = udp(t, "127.0.0.1")
		other.say(plain + to + "another's")
		a.say(plain + to + "mine")
		if _, got := a.hear(); got != "127.0.0.2 mine" {
			t.Errorf("%s: got %q", named, got)
		}
	}
	// The address behind a translation names no port here.
	a := r.associate(udp(t, "127.0.0.1"), addr(t, "192.0.2.1:7"))
	a.say(plain + to + "mine")
	if _, got := a.hear(); got != "127.0.0.2 mine" {
		t.Errorf("got %q", got)
	}
}

// TestAssociationNobody: what comes before the client has spoken has nowhere to
// go.
func TestAssociationNobody(t *testing.T) {
	r, far := udpRig(t, nil)
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	far().give(packet{b: []byte("x"), from: netip.MustParseAddrPort("127.0.0.1:7")})
	if !within(func() bool { return len(far().in) == 0 }) {
		t.Fatal("nobody receives")
	}
	_ = a.Close()
	if rec := r.Record(0); rec.BytesIn != 0 {
		t.Errorf("record %+v", rec)
	}
}

// TestSlowName: a name that is not resolved yet holds up no other target, and
// what is sent to it keeps its order.
func TestSlowName(t *testing.T) {
	r, far := udpRig(t, nil)
	at := peer(t, "127.0.0.1")
	slow, to := domain("slow.test", at.Port()), addr(t, at.String())
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	const n = 20
	for i := range n {
		a.say(plain + slow + octet('a'+i))
	}
	a.say(plain + to + "quick")
	if _, got := a.hear(); got != "127.0.0.2 quick" {
		t.Fatalf("got %q", got)
	}
	a.say(plain + domain("origin.test", at.Port()) + "quick too")
	if _, got := a.hear(); got != "127.0.0.2 quick too" {
		t.Fatalf("got %q", got)
	}
	close(far().release)
	for i := range n {
		if _, got := a.hear(); got != "127.0.0.2 "+octet('a'+i) {
			t.Fatalf("datagram %d: got %q", i, got)
		}
	}
}

// TestManySlowNames: what waits is bounded, and goes with the association.
func TestManySlowNames(t *testing.T) {
	r, _ := udpRig(t, nil)
	to := addr(t, peer(t, "127.0.0.1").String())
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	const n = 20
	for range n { // in turn, so that no socket's buffer overflows
		a.say(plain + domain("slow.test", 80) + strings.Repeat("x", 60000))
		a.say(plain + to + "quick")
		a.hear()
	}
	_ = a.Close()
	if rec := r.Record(0); rec.Dropped != n {
		t.Errorf("record %+v", rec)
	}
}

func TestAssociationEnds(t *testing.T) {
	gone := errors.New("address gone")
	for name, c := range map[string]struct {
		end  func(r *proxy, a *assoc, far *packets)
		want error
	}{
		"the client closes":             {func(_ *proxy, a *assoc, _ *packets) { _ = a.Close() }, nil},
		"the client ends its half":      {func(_ *proxy, a *assoc, _ *packets) { _ = a.CloseWrite() }, nil},
		"the path goes":                 {func(_ *proxy, _ *assoc, far *packets) { far.killer()(gone) }, gone},
		"the server stops":              {func(r *proxy, _ *assoc, _ *packets) { r.cut() }, escaper.ErrClosed},
		"the socket is of no use":       {func(_ *proxy, _ *assoc, far *packets) { far.fail(gone) }, gone},
		"the client says what it wants": {func(_ *proxy, a *assoc, _ *packets) { a.send("junk"); _ = a.Close() }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, far := udpRig(t, nil)
			to := addr(t, peer(t, "127.0.0.1").String())
			a := r.associate(udp(t, "127.0.0.1"), anywhere)
			a.say(plain + to + "x")
			a.hear()
			c.end(r, a, far())
			if rec := r.Record(0); !errors.Is(rec.Err, c.want) || c.want == nil && rec.Err != nil || rec.Status != 200 {
				t.Errorf("record %+v", rec)
			}
			if !within(func() bool { return r.server.Open() == 0 }) {
				t.Error("it is open still")
			}
			select {
			case <-far().done:
			default:
				t.Error("its far side is open still")
			}
		})
	}
}

func (r *proxy) cut() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = r.server.Shutdown(ctx)
}

// fail lets Receive fail for good.
func (p *packets) fail(err error) {
	p.wg.Go(func() {
		for {
			select {
			case p.in <- packet{err: err}:
			case <-p.done:
				return
			}
		}
	})
}

func TestAssociationIdle(t *testing.T) {
	r, _ := udpRig(t, func(o *socks.Options) { o.Timeouts.UDPIdle = time.Second })
	to := addr(t, peer(t, "127.0.0.1").String())
	a := r.associate(udp(t, "127.0.0.1"), anywhere)
	began := time.Now()
	for range 10 {
		a.say(plain + to + "x")
		a.hear()
		time.Sleep(150 * time.Millisecond) // under the limit, and over it in all
	}
	if _, err := io.ReadAll(a.TCPConn); err != nil {
		t.Errorf("the control connection: %v", err)
	}
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("it ends after %v", took)
	}
	if rec := r.Record(0); !errors.Is(rec.Err, relay.ErrIdle) || rec.BytesOut != 10 {
		t.Errorf("record %+v", rec)
	}
}

func TestAssociationRefused(t *testing.T) {
	fault := errors.New("no address")
	r, far := udpRig(t, func(o *socks.Options) {
		o.Extension = true
		o.ListenPacket = func(netip.AddrPort) (*net.UDPConn, error) { return nil, fault }
	})
	w := r.dial()
	w.send("\x05\x01\xe9" + extension("off", "\x00") + associate + anywhere)
	w.expect("\x05\xe9\x01\x00\x00" + refused(1))
	w.ended()
	w = r.dial()
	w.send(hello + associate + anywhere)
	w.expect(fine + refused(1))
	w.ended()
	if rec := r.Record(0); rec.Status != 503 || rec.Method != "UDP" {
		t.Errorf("record %+v", rec)
	}
	if rec := r.Record(1); rec.Status != 503 || !errors.Is(rec.Err, fault) {
		t.Errorf("record %+v", rec)
	}
	select {
	case <-far().done:
	default:
		t.Error("the far side of what was refused is open")
	}
	// BIND is refused all the same.
	w = r.dial()
	w.send(hello + "\x05\x02\x00" + anywhere)
	w.expect(fine + refused(7))
	w.ended()
}

// TestAssociateByClient: what the client package says is understood.
func TestAssociateByClient(t *testing.T) {
	r, _ := udpRig(t, nil)
	at := peer(t, "127.0.0.1")
	w := r.dial()
	to, err := new(client.Dialer).Associate(t.Context(), w.TCPConn)
	if err != nil {
		t.Fatal(err)
	}
	a := &assoc{wire: w, udp: udp(t, "127.0.0.1"), relay: to}
	_ = a.udp.SetDeadline(time.Now().Add(patience))
	b, err := client.AppendHeader(nil, client.AddrOf(at))
	if err != nil {
		t.Fatal(err)
	}
	a.say(string(slices.Concat(b, []byte("hi"))))
	if _, got := a.hear(); got != "127.0.0.2 hi" {
		t.Errorf("got %q", got)
	}
}
