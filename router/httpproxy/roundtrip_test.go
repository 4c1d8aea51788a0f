package httpproxy

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// pair is two ends of one TCP connection.
func pair(tb testing.TB) (a, b *net.TCPConn) {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if a, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr)); err != nil {
		tb.Fatal(err)
	}
	if b, err = l.AcceptTCP(); err != nil {
		tb.Fatal(err)
	}
	return a, b
}

// FuzzForward sends a client's bytes through head, target, body and the
// writing of the request, and reads what an origin would get with net/http:
// one request, the same, with nothing behind it, whatever the client said.
func FuzzForward(f *testing.F) {
	for _, s := range [][4]string{
		{"GET", "/", "", ""},
		{"GET", "/x?y", "Connection: keep-alive\r\n", "GET /smuggled HTTP/1.1\r\nHost: b\r\n\r\n"},
		{"POST", "/", "Content-Length: 3\r\n", "abcGET /smuggled HTTP/1.1\r\n\r\n"},
		{"POST", ":8080/", "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"},
		{"POST", "/", "Transfer-Encoding: chunked\r\nTE: trailers\r\n", "3\r\nabc\r\n1;x\r\n\n\r\n0\r\nT: 1\r\nHost: z\r\n\r\nGET / HTTP/1.1\r\n\r\n"},
		{"GET", "?q", "X-Egress-Path: 1\r\nConnection: X, upgrade, keep-alive\r\nX: 1\r\nUpgrade: websocket\r\n", ""},
		{"OPTIONS", "", "Max-Forwards: 3\r\nExpect: 100-continue\r\nProxy-Authorization: x\r\nKeep-Alive: 1\r\n", ""},
	} {
		f.Add(s[0], s[1], s[2], s[3], false)
	}
	f.Add("PUT", "/", "Content-Length: 0\r\n", "", true)
	near, far := pair(f)
	f.Cleanup(func() {
		_ = near.Close()
		_ = far.Close()
	})
	f.Fuzz(func(t *testing.T, method, target, fields, body string, old bool) {
		version := " HTTP/1.1\r\nHost: a\r\n"
		if old {
			version = " HTTP/1.0\r\n"
		}
		in := []byte(method + " http://a" + target + version + fields + "\r\n" + body)
		if len(in) > 4000 {
			return
		}
		s := &Server{request: *testLimits()}
		c := &conn{s: s}
		c.in.pool = &s.buffers
		c.in.take(s.buffers.get(len(in)))
		c.in.w = copy(c.in.buf, in)
		x := s.newExchange(c)
		n, err := parseAsRequest(c.in.unread(), &x.head)
		if err != nil {
			return
		}
		c.in.r = n
		if x.readTarget(false) != nil || x.head.isConnect() {
			return
		}
		x.rec.Method = methodText(x.head.method)
		x.startBody()
		if x.early, err = x.body.ready(); err != nil || !x.body.done {
			return // refused, or more would be read
		}
		if i := x.head.maxForwards; i >= 0 {
			if n, ok := parseLength(x.head.value(i)); !ok || n == 0 {
				return
			}
		}
		x.upgrades = x.head.upgrading()
		x.buildRequest()
		x.upw.use(near, rawOf(near))
		x.upw.limit = time.Second
		x.upw.out = x.reqHead
		if err := x.body.pass(&x.upw, x.early, x.body.frame); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, x.upw.sent)
		if _, err := io.ReadFull(far, got); err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(bytes.NewReader(got))
		req, err := http.ReadRequest(br)
		if err != nil {
			m := err.Error()
			if strings.Contains(m, "parse ") || strings.Contains(m, "invalid URI") || strings.Contains(m, "railer") {
				return // see FuzzRequestHead
			}
			t.Fatalf("an origin refuses %q, made of %q: %v", got, in, err)
		}
		if req.Method != string(x.head.method) || req.Host != string(x.authority) {
			t.Fatalf("%q, made of %q", got, in)
		}
		if want := string(x.path); !strings.HasSuffix(req.RequestURI, want) || req.RequestURI == "" {
			t.Fatalf("target %q, made of %q", req.RequestURI, in)
		}
		early := bytes.Clone(x.early)
		payload, err := io.ReadAll(req.Body)
		if err != nil && !strings.Contains(err.Error(), "railer") {
			t.Fatalf("body of %q, made of %q: %v", got, in, err)
		}
		if err == nil && !bytes.Equal(payload, early) {
			t.Fatalf("body %q of %q, made of %q", payload, got, in)
		}
		if rest, _ := io.ReadAll(br); err == nil && len(rest) > 0 {
			t.Fatalf("%q follows the request in %q, made of %q", rest, got, in)
		}
		for _, k := range []string{"X-Egress-Path", "Proxy-Authorization", "Proxy-Connection", "Keep-Alive"} {
			if len(req.Header.Values(k)) > 0 || len(req.Trailer.Values(k)) > 0 {
				t.Fatalf("%s goes on in %q, made of %q", k, got, in)
			}
		}
	})
}
