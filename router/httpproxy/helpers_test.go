package httpproxy_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/router/relay"
	"wayout/router/resolve"
	"wayout/selection"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

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
// (127.0.0.2), out/c (127.0.0.3), out/off (127.0.0.4, down), out/six (::1 only
// on its own escaper).
type rig struct {
	tb      testing.TB
	server  *httpproxy.Server
	addr    string
	table   *escaper.Table
	served  chan error
	mu      sync.Mutex
	records []escaper.Record
	seen    chan struct{}
}

func newRig(tb testing.TB, change func(*httpproxy.Options)) *rig {
	tb.Helper()
	filter, err := escaper.NewFilter(nil, []string{"loopback"}, []string{"127.9.0.0/16"})
	if err != nil {
		tb.Fatal(err)
	}
	d, err := escaper.NewDirect(escaper.Options{
		Name:   "out",
		Filter: filter, Resolver: names{}, EnableSelection: true, Policy: selection.Serial,
		Idle: escaper.NewIdle(64, 1024, time.Minute), ConnectTimeout: 5 * time.Second,
		Nodes: []escaper.NodeOptions{
			{ID: "a", V4: netip.MustParseAddr("127.0.0.1"), Weight: 1},
			{ID: "b", V4: netip.MustParseAddr("127.0.0.2"), Weight: 1},
			{ID: "c", V4: netip.MustParseAddr("127.0.0.3"), Weight: 1},
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
	}
	table.Path("out/off").SetFamilyState(selection.V4, escaper.Down, "address gone")
	table.Publish()
	door := escaper.NewDoor(table)
	engine, err := relay.New(relay.Options{Workers: 1})
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{tb: tb, table: table, served: make(chan error, 1), seen: make(chan struct{}, 1)}
	o := httpproxy.Options{
		Name: "web", Escaper: "out", SelectionHeader: "X-Egress-Path",
		Open: door.Open, Relay: engine, Observe: r.observe,
	}
	if change != nil {
		change(&o)
	}
	if r.server, err = httpproxy.New(o); err != nil {
		tb.Fatal(err)
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	r.addr = l.Addr().String()
	bare, err := relay.NewListener(l)
	if err != nil {
		tb.Fatal(err)
	}
	go func() { r.served <- r.server.Serve(bare) }()
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

// wire is a raw client.
type wire struct {
	tb testing.TB
	*net.TCPConn
	br *bufio.Reader
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
	return &wire{tb: tb, TCPConn: c.(*net.TCPConn), br: bufio.NewReader(c)}
}

func (w *wire) send(s string) {
	w.tb.Helper()
	if _, err := io.WriteString(w.TCPConn, s); err != nil {
		w.tb.Fatalf("send: %v", err)
	}
}

// response reads one whole response to a request with the method.
func (w *wire) response(method string) (*http.Response, string) {
	w.tb.Helper()
	res, err := http.ReadResponse(w.br, &http.Request{Method: method})
	if err != nil {
		w.tb.Fatalf("response: %v", err)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.tb.Fatalf("response body: %v (after %q)", err, b)
	}
	return res, string(b)
}

// expect reads exactly these bytes.
func (w *wire) expect(s string) {
	w.tb.Helper()
	b := make([]byte, len(s))
	n, err := io.ReadFull(w.br, b)
	if string(b[:n]) != s {
		w.tb.Fatalf("got %q (%v), want %q", b[:n], err, s)
	}
}

// ended tells that the proxy closes the connection with nothing more to read.
func (w *wire) ended() {
	w.tb.Helper()
	b, err := io.ReadAll(w.br)
	if err != nil || len(b) > 0 {
		w.tb.Fatalf("at the end: %q, %v", b, err)
	}
}

// origin is an http server that says what it saw.
func origin(tb testing.TB, h http.HandlerFunc) string {
	tb.Helper()
	s := httptest.NewServer(h)
	tb.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// whoami answers with the client's address and the path.
func whoami(w http.ResponseWriter, r *http.Request) {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	_, _ = io.Copy(io.Discard, r.Body)
	_, _ = io.WriteString(w, host+" "+r.URL.RequestURI())
}

// script is a raw origin: f gets each connection, with its number.
func script(tb testing.TB, f func(n int, w *wire)) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(2 * patience))
				f(n, &wire{tb: tb, TCPConn: c.(*net.TCPConn), br: bufio.NewReader(c)})
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// head reads one head as it stands, up to its empty line; "" at the end.
func (w *wire) head() string {
	var b strings.Builder
	for {
		line, err := w.br.ReadString('\n')
		b.WriteString(line)
		if err != nil || line == "\r\n" {
			return b.String()
		}
	}
}

func (w *wire) say(s string) { _, _ = io.WriteString(w.TCPConn, s) }

// client is net/http's client behind the proxy.
func (r *rig) client(user *url.Userinfo) *http.Client {
	t := &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: r.addr, User: user}),
		MaxIdleConns:    64,
		IdleConnTimeout: time.Minute,
	}
	r.tb.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

func group(tb testing.TB, users ...auth.User) *auth.Group {
	tb.Helper()
	// bcrypt at its least cost, of "secret".
	const hash = "$2a$04$g.yx1OfOprMqm3sT0oGFcOaPxgBQaTp9Kx0TD1jh672cPqKeABM0e"
	var list []auth.Credential
	for _, u := range users {
		c := auth.Credential{User: u, Hash: hash}
		if u.Name == "net" { // known by its networks alone
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
