package socks_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"wayout/router/escaper"
	"wayout/router/socks"
	"wayout/router/socks/client"
	"wayout/scripts/lab/rig"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = rig.Patience

// proxy is a server with paths out/a (127.0.0.1 and ::1), out/b (127.0.0.2), out/off
// (127.0.0.4, down).
type proxy struct {
	*rig.Rig
	server *socks.Server
}

func newProxy(tb testing.TB, change func(*socks.Options)) *proxy {
	tb.Helper()
	r := &proxy{Rig: rig.New(tb, rig.Options{
		Nodes: []escaper.NodeOptions{rig.Node("a", "127.0.0.1", "::1"), rig.Node("b", "127.0.0.2", ""), rig.Node("off", "127.0.0.4", "")},
		Tick:  5 * time.Millisecond,
	})}
	r.Down("out/off")
	o := socks.Options{Name: "socks", Escaper: "out", Open: r.Door.Open, Relay: r.Engine, Observe: r.Observe}
	if change != nil {
		change(&o)
	}
	var err error
	if r.server, err = socks.New(o); err != nil {
		tb.Fatal(err)
	}
	r.Serve(r.server)
	return r
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

func (r *proxy) dial() *wire {
	r.TB.Helper()
	return dial(r.TB, r.Addr)
}

func dial(tb testing.TB, addr string) *wire {
	tb.Helper()
	return &wire{tb: tb, TCPConn: rig.Dial(tb, addr)}
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
func (r *proxy) good(handshake string, answer int) {
	r.TB.Helper()
	w := r.dial()
	w.send(handshake)
	if got := w.take(answer); len(got) != answer {
		r.TB.Fatalf("the next good connection gets %q", got)
	}
	w.banner()
	w.send("ping")
	w.expect("ping")
	_ = w.Close()
}

func octet(n int) string { return string([]byte{byte(n)}) }
