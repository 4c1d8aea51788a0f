package httpproxy_test

import (
	"io"
	"net"
	"testing"

	"wayout/router/httpproxy"
)

const (
	benchReply  = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 64\r\n\r\n0123456789012345678901234567890123456789012345678901234567890123"
	benchTunnel = "HTTP/1.1 200 Connection established\r\n\r\n"
)

// static is an origin that answers each read with the same reply, and costs as
// little as an origin can.
func static(b *testing.B) string {
	return script(b, func(_ int, w *wire) {
		buf := make([]byte, 4096)
		reply := []byte(benchReply)
		for {
			if _, err := w.Read(buf); err != nil {
				return
			}
			if _, err := w.Write(reply); err != nil {
				return
			}
		}
	})
}

// quiet keeps the test's own records out of the figures.
func quiet(o *httpproxy.Options) { o.Observe = nil }

// BenchmarkForward is one kept client connection and one kept origin
// connection: all four ends in this process.
func BenchmarkForward(b *testing.B) {
	r := newProxy(b, quiet)
	w := r.dial()
	req := []byte("GET http://" + static(b) + "/ HTTP/1.1\r\nHost: x\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		exchange(b, w, req, buf, len(benchReply))
	}
}

// BenchmarkDirect is the same without a proxy: what the two ends cost.
func BenchmarkDirect(b *testing.B) {
	at := static(b)
	w := dial(b, at)
	req := []byte("GET / HTTP/1.1\r\nHost: " + at + "\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		exchange(b, w, req, buf, len(benchReply))
	}
}

func exchange(b *testing.B, w *wire, req, buf []byte, want int) {
	b.Helper()
	if _, err := w.Write(req); err != nil {
		b.Fatal(err)
	}
	if n, err := io.ReadAtLeast(w.TCPConn, buf, want); err != nil || n != want {
		b.Fatalf("%d bytes, %v", n, err)
	}
}

// BenchmarkConnect is a tunnel with one exchange in it, from dial to close.
func BenchmarkConnect(b *testing.B) {
	r := newProxy(b, quiet)
	at := static(b)
	connect := []byte("CONNECT " + at + " HTTP/1.1\r\nHost: " + at + "\r\n\r\n")
	get := []byte("GET / HTTP/1.1\r\nHost: " + at + "\r\n\r\n")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			b.Fatal(err)
		}
		w := &wire{tb: b, TCPConn: c.(*net.TCPConn)}
		exchange(b, w, connect, buf, len(benchTunnel))
		exchange(b, w, get, buf, len(benchReply))
		// No TIME_WAIT: the ports of the host are few.
		_ = w.SetLinger(0)
		_ = c.Close()
	}
}
