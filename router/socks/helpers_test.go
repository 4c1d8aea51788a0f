package socks_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/resolve"
	"wayout/router/socks"
	"wayout/router/socks/client"
	"wayout/selection"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what has to happen.
const patience = 10 * time.Second

// names stands for the network's name servers.
type names struct{}

// Ready makes tasks leave their worker for each name.
func (names) Ready(string, selection.Family) bool { return false }

func (names) Lookup(_ context.Context, host string, _ selection.Family) (resolve.Answer, error) {
	switch host {
	case "origin.test":
		return resolve.Answer{V4: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, nil
	case "slow.test":
		return resolve.Answer{}, &resolve.Error{Host: host, Kind: resolve.ErrTimeout}
	}
	return resolve.Answer{}, &resolve.Error{Host: host, Kind: resolve.ErrNotFound}
}

// rig is a proxy with the real door: paths out/a (127.0.0.1 and ::1), out/b
// (127.0.0.2), out/off (127.0.0.4, down).
type rig struct {
	tb      testing.TB
	server  *socks.Server
	addr    string
	table   *escaper.Table
	engine  *relay.Engine
	served  chan error
	mu      sync.Mutex
	records []escaper.Record
	seen    chan struct{}
}

func newRig(tb testing.TB, change func(*socks.Options)) *rig {
	tb.Helper()
	filter, err := escaper.NewFilter(nil, []string{"loopback"}, []string{"127.9.0.0/16"})
	if err != nil {
		tb.Fatal(err)
	}
	d, err := escaper.NewDirect(escaper.Options{
		Name:   "out",
		Filter: filter, Resolver: names{}, EnableSelection: true, Policy: selection.Serial,
		ConnectTimeout: 5 * time.Second,
		Nodes: []escaper.NodeOptions{
			{ID: "a", V4: netip.MustParseAddr("127.0.0.1"), V6: netip.MustParseAddr("::1"), Weight: 1},
			{ID: "b", V4: netip.MustParseAddr("127.0.0.2"), Weight: 1},
			{ID: "off", V4: netip.MustParseAddr("127.0.0.4"), Weight: 1},
		},
	})
	if err != nil {
		tb.Fatal(err)
	}
	table, err := escaper.NewTable(d)
	if err != nil {
		tb.Fatal(err)
	}
	for _, p := range table.Paths() {
		p.SetFamilyState(selection.V4, escaper.Up, "")
		p.SetFamilyState(selection.V6, escaper.Up, "")
	}
	table.Path("out/off").SetFamilyState(selection.V4, escaper.Down, "address gone")
	table.Publish()
	door := escaper.NewDoor(table)
	engine, err := relay.New(relay.Options{Workers: 1, Tick: 5 * time.Millisecond})
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{tb: tb, table: table, engine: engine, served: make(chan error, 1), seen: make(chan struct{}, 1)}
	o := socks.Options{Name: "socks", Escaper: "out", Open: door.Open, Relay: engine, Observe: r.observe}
	if change != nil {
		change(&o)
	}
	if r.server, err = socks.New(o); err != nil {
		tb.Fatal(err)
	}
	l := listener(tb, "127.0.0.1")
	r.addr = l.Addr().String()
	go func() { r.served <- r.server.Serve(l) }()
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		if err := r.server.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			tb.Errorf("shutdown: %v", err)
		}
		if err := <-r.served; err != nil {
			tb.Errorf("serve: %v", err)
		}
		if n := r.server.Open(); n != 0 {
			tb.Errorf("%d connections outlive the server", n)
		}
		if err := engine.Close(); err != nil {
			tb.Errorf("engine: %v", err)
		}
		door.Swap(nil)
	})
	return r
}

func listener(tb testing.TB, at string) *relay.Listener {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(at)})
	if err != nil {
		tb.Fatal(err)
	}
	bare, err := relay.NewListener(l)
	if err != nil {
		tb.Fatal(err)
	}
	return bare
}

func (r *rig) observe(rec *escaper.Record) {
	r.mu.Lock()
	r.records = append(r.records, *rec)
	r.mu.Unlock()
	select {
	case r.seen <- struct{}{}:
	default:
	}
}

// record waits for the n-th record.
func (r *rig) record(n int) escaper.Record {
	r.tb.Helper()
	end := time.After(patience)
	for {
		r.mu.Lock()
		have := len(r.records)
		if have > n {
			rec := r.records[n]
			r.mu.Unlock()
			return rec
		}
		r.mu.Unlock()
		select {
		case <-r.seen:
		case <-end:
			r.tb.Fatalf("no record %d, only %d", n, have)
		}
	}
}

// within waits for something that nothing tells of.
func within(ok func() bool) bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return true
		}
	}
	return false
}

// wire is a raw client.
type wire struct {
	tb testing.TB
	*net.TCPConn
}

func (r *rig) dial() *wire {
	r.tb.Helper()
	return dial(r.tb, r.addr)
}

func dial(tb testing.TB, addr string) *wire {
	tb.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * patience)); err != nil {
		tb.Fatal(err)
	}
	return &wire{tb: tb, TCPConn: c.(*net.TCPConn)}
}

func (w *wire) send(s string) {
	w.tb.Helper()
	if _, err := io.WriteString(w.TCPConn, s); err != nil {
		w.tb.Fatalf("send: %v", err)
	}
}

// expect reads exactly these bytes.
func (w *wire) expect(s string) {
	w.tb.Helper()
	if got := w.take(len(s)); got != s {
		w.tb.Fatalf("got %q, want %q", got, s)
	}
}

// take reads up to n bytes, fewer at the end.
func (w *wire) take(n int) string {
	b := make([]byte, n)
	n, _ = io.ReadFull(w.TCPConn, b)
	return string(b[:n])
}

// ended tells that the proxy closes the connection with nothing more to read.
func (w *wire) ended() {
	w.tb.Helper()
	b, err := io.ReadAll(w.TCPConn)
	if err != nil || len(b) > 0 {
		w.tb.Fatalf("at the end: %q, %v", b, err)
	}
}

// origin echoes, after it has said on a line who connects to it.
func origin(tb testing.TB, at string) netip.AddrPort {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(at)})
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(3 * patience))
				_, _ = fmt.Fprintf(c, "%s\n", c.RemoteAddr())
				_, _ = io.Copy(c, c)
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// banner reads who the origin says that we are.
func (w *wire) banner() netip.AddrPort {
	w.tb.Helper()
	line, err := bufio.NewReaderSize(oneByte{w.TCPConn}, 16).ReadString('\n')
	if err != nil {
		w.tb.Fatalf("banner: %v after %q", err, line)
	}
	return netip.MustParseAddrPort(strings.TrimSuffix(line, "\n"))
}

// oneByte reads nothing ahead.
type oneByte struct{ io.Reader }

func (o oneByte) Read(b []byte) (int, error) { return o.Reader.Read(b[:1]) }

// addr writes an address as SOCKS5 does.
func addr(tb testing.TB, target string) string {
	tb.Helper()
	a, err := client.ParseTarget(target)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := client.AppendAddr(nil, a)
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

// domain writes a host as a domain name, whatever it is.
func domain(host string, port uint16) string {
	return "\x03" + octet(len(host)) + host + string([]byte{byte(port >> 8), byte(port)})
}

const (
	hello = "\x05\x01\x00"
	fine  = "\x05\x00"
)

func connect(a string) string { return "\x05\x01\x00" + a }

// reply4 is a SOCKS4 reply without an address.
const reply4 = "\x00\x5b\x00\x00\x00\x00\x00\x00"

// refused is a SOCKS5 reply without an address.
func refused(code byte) string { return "\x05" + octet(int(code)) + "\x00\x01\x00\x00\x00\x00\x00\x00" }

func credentials(name, password string) string {
	return "\x01" + octet(len(name)) + name + octet(len(password)) + password
}

func extension(payload, methods string) string {
	return "\x01" + string([]byte{byte(len(payload) >> 8), byte(len(payload))}) + payload + octet(len(methods)) + methods
}

// good proves that the next connection is served.
func (r *rig) good(handshake string, answer int) {
	r.tb.Helper()
	w := r.dial()
	w.send(handshake)
	if got := w.take(answer); len(got) != answer {
		r.tb.Fatalf("the next good connection gets %q", got)
	}
	w.banner()
	w.send("ping")
	w.expect("ping")
	_ = w.Close()
}

func group(tb testing.TB, users ...auth.User) *auth.Group {
	tb.Helper()
	// bcrypt at its least cost, of "secret".
	const hash = "$2a$04$g.yx1OfOprMqm3sT0oGFcOaPxgBQaTp9Kx0TD1jh672cPqKeABM0e"
	var list []auth.Credential
	for _, u := range users {
		c := auth.Credential{User: u, Hash: hash}
		if strings.HasPrefix(u.Name, "net") {
			c.Hash = ""
		}
		list = append(list, c)
	}
	g, err := auth.NewGroup("team", list, auth.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	return g
}

func octet(n int) string { return string([]byte{byte(n)}) }
