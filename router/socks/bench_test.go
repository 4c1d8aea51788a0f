package socks_test

import (
	"io"
	"net"
	"testing"

	"wayout/router/socks"
)

// BenchmarkConnect is a tunnel with one exchange in it, from dial to close: all
// four ends in this process.
func BenchmarkConnect(b *testing.B) {
	r := newProxy(b, func(o *socks.Options) { o.Observe = nil })
	to := connect(addr(b, origin(b, "127.0.0.1").String()))
	buf := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			b.Fatal(err)
		}
		for _, m := range []message{{hello, 2}, {to, 10}} {
			if _, err := io.WriteString(c, m.say); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf[:m.answer]); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := c.Read(buf); err != nil { // the origin's line
			b.Fatal(err)
		}
		// No TIME_WAIT: the ports of the host are few.
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
}
