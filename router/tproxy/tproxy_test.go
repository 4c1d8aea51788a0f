package tproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/scripts/lab"
	"wayout/selection"
)

const patience = 30 * time.Second

// log keeps what is observed.
type log struct {
	mu  sync.Mutex
	all []escaper.Record
	has chan struct{}
}

func newLog() *log { return &log{has: make(chan struct{}, 1000)} }

func (r *log) observe(rec *escaper.Record) {
	r.mu.Lock()
	r.all = append(r.all, *rec)
	r.mu.Unlock()
	r.has <- struct{}{}
}

// next waits for one more.
func (r *log) next(t *testing.T) escaper.Record {
	t.Helper()
	select {
	case <-r.has:
	case <-time.After(patience):
		t.Fatal("no record")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.all[0]
	r.all = r.all[1:]
	return rec
}

func engine(t *testing.T) *relay.Engine {
	t.Helper()
	e, err := relay.New(relay.Options{Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func noPacket(context.Context, *escaper.Request) (escaper.PacketConn, error) {
	return nil, errors.New("no datagrams here")
}

// serveStream serves a listener on all addresses, so that no connection is to
// its own one.
func serveStream(t *testing.T, o Options) string {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	bare, err := relay.NewListener(l.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, o, bare)
}

func serveOn(t *testing.T, o Options, l *relay.Listener) string {
	t.Helper()
	if o.OpenPacket == nil {
		o.OpenPacket = noPacket
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return fmt.Sprintf("127.0.0.1:%d", l.Addr().(*net.TCPAddr).Port)
}

func group(t *testing.T, users ...auth.User) *auth.Group {
	t.Helper()
	var all []auth.Credential
	for _, u := range users {
		all = append(all, auth.Credential{User: u})
	}
	g, err := auth.NewGroup("team", all, auth.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// hearing connects and waits to be told something; the error is that it is not.
func hearing(at string) error {
	c, err := net.DialTimeout("tcp", at, patience)
	if err != nil {
		return err // a reset may be that early
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

// TestStreamRefused: who is refused is reset, and the record says why. Nothing is
// dialled that the door does not open.
func TestStreamRefused(t *testing.T) {
	e := engine(t)
	near := group(t, auth.User{Name: "near", From: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}})
	far := group(t, auth.User{Name: "far", From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	full := auth.NewMeter(auth.Limits{Connections: 1}, nil)
	if err := full.Begin(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		o      Options
		status int
		user   string
	}{
		{"the door", Options{Group: near}, http.StatusServiceUnavailable, "near"},
		{"a stranger", Options{Group: far}, http.StatusProxyAuthRequired, ""},
		{"a full server", Options{Meter: full}, http.StatusTooManyRequests, ""},
		{"no means", Options{Admit: func() error { return errors.New("files") }}, http.StatusServiceUnavailable, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seen := newLog()
			o := tt.o
			o.Name, o.Escaper, o.Relay, o.Observe, o.Prompt = "lan", "out", e, seen.observe, true
			o.Selection = selection.Layer{{Escaper: "out", Value: selection.ID("a")}}
			o.Open = func(_ context.Context, r *escaper.Request) (*escaper.Conn, error) {
				if r.Server != "lan" || r.Escaper != "out" || len(r.Selection.Server) != 1 || r.Target.Addr != netip.MustParseAddr("127.0.0.1") || r.User != tt.user {
					t.Errorf("the door is asked for %+v", r)
				}
				return nil, escaper.ErrClosed
			}
			at := serveStream(t, o)
			if err := hearing(at); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("not reset: %v", err)
			}
			rec := seen.next(t)
			if rec.Status != tt.status || rec.Method != "TPROXY" || rec.Target != at || rec.Err == nil || rec.User != tt.user {
				t.Errorf("%+v", rec)
			}
		})
	}
	if full.Open() != 1 {
		t.Errorf("the meter counts %d", full.Open())
	}
}

// TestStreamSniff: the name is known when the door is asked, without a byte being
// read; who says nothing, or nothing that is known, goes on without.
func TestStreamSniff(t *testing.T) {
	e := engine(t)
	hello := helloOf(t, "www.example.com")
	names := make(chan string, 1)
	o := Options{Name: "lan", Escaper: "out", Relay: e, Prompt: true, Open: func(_ context.Context, r *escaper.Request) (*escaper.Conn, error) {
		names <- r.Name
		return nil, escaper.ErrClosed
	}}
	long, short := o, o
	long.Sniff, short.Sniff = patience, 20*time.Millisecond
	atLong, atShort := serveStream(t, long), serveStream(t, short)
	for _, tt := range []struct {
		name, at string
		parts    []string
		end      bool
		want     string
	}{
		{"at once", atLong, []string{string(hello)}, false, "www.example.com"},
		{"in parts", atLong, []string{string(hello[:1]), string(hello[1:9]), string(hello[9:100]), string(hello[100:])}, false, "www.example.com"},
		{"HTTP in parts", atLong, []string{"GET / HTTP/1.1\r\nHo", "st: a.example\r\n", "\r\n"}, false, "a.example"},
		{"something else", atLong, []string{"SSH-2.0-x\r\n"}, false, ""},
		{"the end in the middle", atLong, []string{string(hello[:50])}, true, ""},
		{"the end at once", atLong, nil, true, ""},
		{"nothing", atShort, nil, false, ""},
		{"not all of it in time", atShort, []string{string(hello[:50])}, false, ""},
	} {
		c, err := net.Dial("tcp", tt.at)
		if err != nil {
			t.Fatal(err)
		}
		for i, p := range tt.parts {
			if i > 0 {
				time.Sleep(5 * time.Millisecond) // so that they come apart, mostly
			}
			if _, err := io.WriteString(c, p); err != nil {
				t.Fatal(err)
			}
		}
		if tt.end {
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case got := <-names:
			if got != tt.want {
				t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
			}
		case <-time.After(patience):
			t.Errorf("%s: the door is not asked", tt.name)
		}
		c.Close()
	}
}

// TestOwnListener: who connects to the listener itself is refused.
func TestOwnListener(t *testing.T) {
	lab.Require(t)
	l, err := ListenStream(selection.V4, 0x40000000)
	if err != nil {
		t.Fatal(err)
	}
	seen := newLog()
	at := serveOn(t, Options{Relay: engine(t), Observe: seen.observe, Prompt: true, Open: func(context.Context, *escaper.Request) (*escaper.Conn, error) {
		t.Error("the door is asked")
		return nil, escaper.ErrClosed
	}}, l)
	if err := hearing(at); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("not reset: %v", err)
	}
	if rec := seen.next(t); rec.Status != http.StatusForbidden || !errors.Is(rec.Err, errOwn) {
		t.Errorf("%+v", rec)
	}
}

// packets is a PacketConn whose far side is the test.
type packets struct {
	r    *escaper.Request
	sent chan string
	in   chan packet
	end  chan struct{}
	once sync.Once
	kill chan func(error)
}

type packet struct {
	from    netip.AddrPort
	payload string
}

func (p *packets) Send(_ context.Context, to escaper.Target, b []byte) error {
	if to != p.r.Target {
		return fmt.Errorf("sent to %s", to)
	}
	p.sent <- string(b)
	return nil
}

func (p *packets) Receive(b []byte) (int, netip.AddrPort, error) {
	select {
	case d := <-p.in:
		return copy(b, d.payload), d.from, nil
	case <-p.end:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (p *packets) Source(selection.Family) netip.AddrPort {
	return netip.MustParseAddrPort("192.0.2.1:7")
}
func (p *packets) Close() error         { p.once.Do(func() { close(p.end) }); return nil }
func (p *packets) OnKill(f func(error)) { p.kill <- f }

// flows is a Datagrams in a test, whose datagrams the test makes itself.
type flows struct {
	*Datagrams
	t      *testing.T
	seen   *log
	opened chan *packets
	gate   chan error // nil: at once
}

func newFlows(t *testing.T, change func(*Options)) *flows {
	t.Helper()
	lab.Require(t)
	s, err := OpenSockets(0x40000000)
	if err != nil {
		t.Fatal(err)
	}
	f := &flows{t: t, seen: newLog(), opened: make(chan *packets, 100)}
	o := Options{
		Name: "lan", Escaper: "out", Relay: engine(t), FlowIdle: time.Hour, Observe: f.seen.observe, Prompt: true,
		Open: func(context.Context, *escaper.Request) (*escaper.Conn, error) { return nil, escaper.ErrClosed },
		OpenPacket: func(_ context.Context, r *escaper.Request) (escaper.PacketConn, error) {
			if f.gate != nil {
				if err := <-f.gate; err != nil {
					return nil, err
				}
			}
			p := &packets{r: r, sent: make(chan string, 100), in: make(chan packet, 100), end: make(chan struct{}), kill: make(chan func(error), 1)}
			f.opened <- p
			return p, nil
		},
	}
	if change != nil {
		change(&o)
	}
	if f.Datagrams, err = NewDatagrams(o, s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

var destination1 = netip.MustParseAddrPort("127.0.0.9:4242") //nolint:gochecknoglobals // of tests alone

func (f *flows) say(client, to netip.AddrPort, words ...string) {
	for _, w := range words {
		f.pass(flowKey{client, to}, []byte(w))
	}
}

func (f *flows) open() *packets {
	f.t.Helper()
	select {
	case p := <-f.opened:
		return p
	case <-time.After(patience):
		f.t.Fatal("no flow was opened")
		return nil
	}
}

func (p *packets) hears(t *testing.T, words ...string) {
	t.Helper()
	for _, w := range words {
		select {
		case got := <-p.sent:
			if got != w {
				t.Errorf("sent %q, want %q", got, w)
			}
		case <-time.After(patience):
			t.Fatalf("%q is not sent", w)
		}
	}
}

func client(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), uint16(n))
}

// TestFlow: datagrams keep their order, answers come from the destination and
// from nobody else, and the record has both.
func TestFlow(t *testing.T) {
	f := newFlows(t, nil)
	f.gate = make(chan error)
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	me := c.LocalAddr().(*net.UDPAddr).AddrPort()
	f.say(me, destination1, "one", "two")
	f.gate <- nil
	p := f.open()
	f.say(me, destination1, "three")
	p.hears(t, "one", "two", "three")
	if p.r.Client != me || p.r.Server != "lan" || p.r.Escaper != "out" {
		t.Errorf("asked for by %+v", p.r)
	}
	large := strings.Repeat("x", 20000)
	p.in <- packet{netip.MustParseAddrPort("127.0.0.8:4242"), "from another host"}
	p.in <- packet{netip.MustParseAddrPort("127.0.0.9:4243"), "from another port"}
	p.in <- packet{destination1, "odd"}
	p.in <- packet{destination1, large}
	b := make([]byte, 65535)
	_ = c.SetDeadline(time.Now().Add(patience))
	for _, want := range []string{"odd", large} {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil || from != destination1 || string(b[:n]) != want {
			t.Fatalf("%d bytes from %s, %v", n, from, err)
		}
	}
	(<-p.kill)(selection.ErrDown)
	rec := f.seen.next(t)
	if rec.Method != "UDP" || rec.Target != destination1.String() || rec.Status != http.StatusOK || !errors.Is(rec.Err, selection.ErrDown) ||
		rec.BytesOut != 11 || rec.BytesIn != 20003 || rec.Dropped != 2 {
		t.Errorf("%+v", rec)
	}
	if n := f.Open(); n != 0 {
		t.Errorf("%d flows are open", n)
	}
}

// TestFlowsAreBounded: over their number the one ends that was silent longest,
// answers counted.
func TestFlowsAreBounded(t *testing.T) {
	f := newFlows(t, func(o *Options) { o.Flows = 3 })
	var all []*packets
	for n := range 3 {
		f.say(client(n+1), destination1, "hello")
		all = append(all, f.open())
	}
	// The first has an answer, the second says more: the third is the eldest.
	heard := f.flows[flowKey{client(1), destination1}]
	before := flowOf(heard).last.Load()
	all[0].in <- packet{destination1, "answer"}
	for end := time.Now().Add(patience); flowOf(heard).last.Load() == before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the answer is not passed on")
		}
	}
	f.say(client(2), destination1, "more")
	f.say(client(4), destination1, "hello")
	f.open()
	if rec := f.seen.next(t); rec.Client != client(3) || !errors.Is(rec.Err, errEvicted) {
		t.Errorf("%+v", rec)
	}
	if n := f.Open(); n != 3 {
		t.Errorf("%d flows are open", n)
	}
}

// TestFlowsEnd: silent ones do, and those that are refused ask once and not
// again.
func TestFlowsEnd(t *testing.T) {
	f := newFlows(t, func(o *Options) { o.FlowIdle = 200 * time.Millisecond })
	f.say(client(1), destination1, "hello")
	f.open().hears(t, "hello")
	if rec := f.seen.next(t); rec.Client != client(1) || rec.Status != http.StatusOK || rec.Err != nil {
		t.Errorf("%+v", rec)
	}
	f.gate = make(chan error, 100)
	f.gate <- escaper.ErrProhibited
	f.say(client(2), destination1, "hello")
	if rec := f.seen.next(t); rec.Client != client(2) || rec.Status != http.StatusForbidden || rec.Dropped != 1 {
		t.Errorf("%+v", rec)
	}
	f.say(client(2), destination1, "hello", "hello")
	if n := f.Open(); n != 1 {
		t.Errorf("%d flows are open", n)
	}
	for end := time.Now().Add(patience); f.Open() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("what was refused stays")
		}
	}
	if len(f.opened) != 0 || len(f.seen.has) != 0 {
		t.Error("what was refused asked again")
	}
	f.Quiesce()
	f.say(client(3), destination1, "hello")
	if n := f.Open(); n != 0 {
		t.Errorf("%d flows began after Quiesce", n)
	}
}

// TestFlowSniff: a flow waits for the name in QUIC, and for nothing in other
// protocols; the datagrams go out as they came.
func TestFlowSniff(t *testing.T) {
	f := newFlows(t, func(o *Options) { o.Sniff = patience })
	hello := quicHello(t, "quic.example")
	id := []byte("12345678")
	first := string(seal(t, quicV1, id, 0, append(cryptoFrame(0, hello[:100]), make([]byte, 50)...)))
	second := string(seal(t, quicV1, id, 1, cryptoFrame(100, hello[100:])))
	f.say(client(1), destination1, first, second)
	p := f.open()
	p.hears(t, first, second)
	if p.r.Name != "quic.example" {
		t.Errorf("the name is %q", p.r.Name)
	}
	f.say(client(2), destination1, "a query")
	if p = f.open(); p.r.Name != "" {
		t.Errorf("the name is %q", p.r.Name)
	}
	p.hears(t, "a query")
}

// TestFlowsReload: flows go on by what they began with, new ones begin by the
// new.
func TestFlowsReload(t *testing.T) {
	f := newFlows(t, nil)
	f.say(client(1), destination1, "one")
	old := f.open()
	o := *f.o.Load()
	o.Escaper = "other"
	if err := f.Use(o); err != nil {
		t.Fatal(err)
	}
	f.say(client(1), destination1, "two")
	old.hears(t, "one", "two")
	f.say(client(2), destination1, "one")
	if p := f.open(); p.r.Escaper != "other" || old.r.Escaper != "out" {
		t.Errorf("%s and %s", old.r.Escaper, p.r.Escaper)
	}
}

func TestChecksum(t *testing.T) {
	for text, want := range map[string]uint16{"": 0, "\x01": 0x0100, "\x01\x02": 0x0102, "\xff\xff\x00\x01": 1, "\x12\x34\x56": 0x6834} {
		if got := fold(sum(0, []byte(text))); got != want {
			t.Errorf("sum of %x is %#x, want %#x", text, got, want)
		}
	}
	if got := fold(sum(0xffff0000, slices.Repeat([]byte{0xff}, 65536))); got != 0xffff {
		t.Errorf("%#x", got)
	}
}

func TestOptions(t *testing.T) {
	open := func(context.Context, *escaper.Request) (*escaper.Conn, error) { return nil, escaper.ErrClosed }
	for _, o := range []Options{{}, {Open: open}, {Open: open, OpenPacket: noPacket}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
}
