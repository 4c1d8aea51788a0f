package httpproxy_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/scripts/lab/rig"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

const patience = rig.Patience

// proxy is a server with paths out/a to out/c (127.0.0.1 to 127.0.0.3) and out/off
// (127.0.0.4, down).
type proxy struct {
	*rig.Rig
	server *httpproxy.Server
}

func newProxy(tb testing.TB, change func(*httpproxy.Options)) *proxy {
	tb.Helper()
	r := &proxy{Rig: rig.New(tb, rig.Options{
		Nodes: []escaper.NodeOptions{
			rig.Node("a", "127.0.0.1", ""), rig.Node("b", "127.0.0.2", ""), rig.Node("c", "127.0.0.3", ""), rig.Node("off", "127.0.0.4", ""),
		},
		Idle: escaper.NewIdle(64, 1024, time.Minute),
	})}
	r.Down("out/off")
	o := httpproxy.Options{
		Name: "web", Escaper: "out", SelectionHeader: "X-Egress-Path",
		Open: r.Door.Open, Relay: r.Engine, Observe: r.Observe,
	}
	if change != nil {
		change(&o)
	}
	var err error
	if r.server, err = httpproxy.New(o); err != nil {
		tb.Fatal(err)
	}
	r.Serve(r.server)
	return r
}

// wire is a raw client.
type wire struct {
	tb testing.TB
	*net.TCPConn
	br *bufio.Reader
}

func (r *proxy) dial() *wire {
	r.TB.Helper()
	return dial(r.TB, r.Addr)
}

func dial(tb testing.TB, addr string) *wire {
	tb.Helper()
	c := rig.Dial(tb, addr)
	return &wire{tb: tb, TCPConn: c, br: bufio.NewReader(c)}
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
func (r *proxy) client(user *url.Userinfo) *http.Client {
	t := &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: r.Addr, User: user}),
		MaxIdleConns:    64,
		IdleConnTimeout: time.Minute,
	}
	r.TB.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}
