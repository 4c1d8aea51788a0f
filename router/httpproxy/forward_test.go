package httpproxy_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/selection"
)

// The issue's own: 400 requests on one kept client connection to one origin,
// each with another selection than the one before.
func TestAlternateSelectionOnOneConnection(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	at := origin(t, whoami)
	w := r.dial()
	for i := range 400 {
		path := string("abc"[i%3])
		w.send("GET http://" + at + "/" + path + " HTTP/1.1\r\nHost: x\r\nX-Egress-Path: " + path + "\r\n\r\n")
		if _, body := w.response("GET"); body != fmt.Sprintf("127.0.0.%d /%s", i%3+1, path) {
			t.Fatalf("request %d by %s: %q", i, path, body)
		}
	}
	for i := range 400 {
		rec := r.Record(i)
		if want := "out/" + string("abc"[i%3]); rec.Choice.Path != want || rec.Reused != (i >= 3) || rec.Status != 200 {
			t.Fatalf("record %d: %+v", i, rec)
		}
	}
}

func TestPipelined(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	at := origin(t, whoami)
	w := r.dial()
	var b strings.Builder
	const n = 200
	for i := range n {
		switch i % 3 {
		case 0:
			fmt.Fprintf(&b, "GET http://%s/%d HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %d\r\n\r\n", at, i, i%3+1)
		case 1:
			fmt.Fprintf(&b, "POST http://%s/%d HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %d\r\nContent-Length: 5\r\n\r\nhello", at, i, i%3+1)
		case 2:
			fmt.Fprintf(&b, "PUT http://%s/%d HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %d\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", at, i, i%3+1)
		}
	}
	go func() { _, _ = io.WriteString(w.TCPConn, b.String()) }()
	for i := range n {
		if _, body := w.response("GET"); body != fmt.Sprintf("127.0.0.%d /%d", i%3+1, i) {
			t.Fatalf("response %d: %q", i, body)
		}
	}
}

// The head as the origin gets it, byte by byte.
func TestRequestHead(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, in, want string }{
		{
			"plain", "GET http://ORIGIN/x?y=1 HTTP/1.1\r\nHost: ORIGIN\r\nAccept: */*\r\n\r\n",
			"GET /x?y=1 HTTP/1.1\r\nHost: ORIGIN\r\nAccept: */*\r\n\r\n",
		},
		{
			"target beats Host", "GET http://ORIGIN/ HTTP/1.1\r\nHost: other.test\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
		},
		{"no path", "GET HTTP://ORIGIN HTTP/1.1\r\nHost: ORIGIN\r\n\r\n", "GET / HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"},
		{"query alone", "GET http://ORIGIN?q HTTP/1.1\r\nHost: ORIGIN\r\n\r\n", "GET /?q HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"},
		{"asterisk", "OPTIONS http://ORIGIN HTTP/1.1\r\nHost: ORIGIN\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"},
		{"bytes above ASCII", "GET http://ORIGIN/\xc3\xa9 HTTP/1.1\r\nHost: ORIGIN\r\n\r\n", "GET /\xc3\xa9 HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"},
		{
			"HTTP/1.0", "GET http://ORIGIN/ HTTP/1.0\r\nUser-Agent: old\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\nUser-Agent: old\r\n\r\n",
		},
		{
			"hop by hop",
			"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nA: 1\r\nConnection: keep-alive, X-Mine,x-none\r\nProxy-Connection: keep-alive\r\n" +
				"Keep-Alive: 5\r\nB: 2\r\nx-mine: 3\r\nProxy-Authorization: Basic eDp5\r\nProxy-Authenticate: x\r\nUpgrade: foo\r\nX-MINE: 4\r\nC: 3\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\nA: 1\r\nB: 2\r\nC: 3\r\n\r\n",
		},
		{
			"selection, every copy", "GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nx-egress-path: b\r\nA: 1\r\nX-EGRESS-PATH:  b \r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\nA: 1\r\n\r\n",
		},
		{
			"TE", "GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTE: gzip, trailers\r\nConnection: TE\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\nTE: trailers\r\nConnection: TE\r\n\r\n",
		},
		{
			"upgrade", "GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
		},
		{
			"no upgrade to HTTP/2",
			"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
		},
		{
			"Max-Forwards", "OPTIONS http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nMax-Forwards: 7\r\n\r\n",
			"OPTIONS / HTTP/1.1\r\nHost: ORIGIN\r\nMax-Forwards: 6\r\n\r\n",
		},
		{
			"sized", "POST http://ORIGIN/ HTTP/1.1\r\nContent-Length: 003\r\nHost: ORIGIN\r\n\r\nabc",
			"POST / HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 3\r\n\r\nabc",
		},
		{
			"empty body", "POST http://ORIGIN/ HTTP/1.1\r\nContent-Length: 0\r\nHost: ORIGIN\r\nExpect: 100-continue\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 0\r\n\r\n",
		},
		{
			"chunked, framed anew",
			"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: Chunked\r\n\r\n01;ext=\"a\"\r\na\r\n2\r\nbc\r\n000\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		},
		{
			"trailers",
			"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\nTrailer: Sum\r\n\r\n1\r\na\r\n0\r\nSum: 9\r\n" +
				"X-Egress-Path: b\r\nContent-Length: 3\r\nHost: evil\r\nTransfer-Encoding: chunked\r\nLast: 1\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: ORIGIN\r\nTrailer: Sum\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nSum: 9\r\nLast: 1\r\n\r\n",
		},
		{
			"one empty line before", "\r\nGET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := make(chan string, 1)
			at := script(t, func(_ int, w *wire) {
				var b strings.Builder
				one := make([]byte, 1)
				for {
					n, err := w.br.Read(one)
					b.Write(one[:n])
					if s := b.String(); err != nil || strings.HasSuffix(s, "END") {
						got <- strings.TrimSuffix(s, "END")
						return
					}
					if len(b.String()) == len(strings.ReplaceAll(tt.want, "ORIGIN", w.LocalAddr().String())) {
						w.say("HTTP/1.1 204 No Content\r\n\r\n")
					}
				}
			})
			r := newProxy(t, nil)
			w := r.dial()
			w.send(strings.ReplaceAll(tt.in, "ORIGIN", at))
			if res, _ := w.response("GET"); res.StatusCode != 204 {
				t.Fatal(res.Status)
			}
			r.Table.Path("out/a").SetFamilyState(selection.V4, escaper.Down, "end of test") // closes the idle connection
			r.Table.Path("out/b").SetFamilyState(selection.V4, escaper.Down, "end of test")
			select {
			case have := <-got:
				if want := strings.ReplaceAll(tt.want, "ORIGIN", at); have != want {
					t.Errorf("origin got\n%q, want\n%q", have, want)
				}
			case <-time.After(patience):
				t.Fatal("the origin's connection stays open")
			}
		})
	}
}

// The response as the client gets it, and whether both connections live on.
func TestResponse(t *testing.T) {
	t.Parallel()
	const get = "GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"
	const old = "GET http://ORIGIN/ HTTP/1.0\r\n\r\n"
	const oldKept = "GET http://ORIGIN/ HTTP/1.0\r\nProxy-Connection: Keep-Alive\r\n\r\n"
	for _, tt := range []struct {
		name, req, res, want string
		kept                 bool // the client's connection
		reused               bool // the origin's
	}{
		{"sized", get, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nA: b\r\n\r\nhi", "HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 2\r\n\r\nhi", true, true},
		{"no reason", get, "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", true, true},
		{
			"hop by hop", get, "HTTP/1.1 200 OK\r\nConnection: x, keep-alive\r\nX: 1\r\nKeep-Alive: 3\r\nProxy-Authenticate: z\r\nContent-Length: 0\r\nY: 2\r\n\r\n",
			"HTTP/1.1 200 OK\r\nY: 2\r\nContent-Length: 0\r\n\r\n", true, true,
		},
		{
			"space before the colon", get, "HTTP/1.1 200 OK\r\nA: 1\r\nB : 2\r\nC: 3\r\nContent-Length : 0\r\n\r\n",
			"HTTP/1.1 200 OK\r\nA: 1\r\nB: 2\r\nC: 3\r\nContent-Length: 0\r\n\r\n", true, true,
		},
		{"origin closes", get, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", true, false},
		{
			"chunked", get, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\nh\r\n1\r\ni\r\n0\r\nT: 1\r\n\r\n",
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nT: 1\r\n\r\n", true, true,
		},
		{"until close", get, "HTTP/1.1 200 OK\r\n\r\nhi~", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", true, false},
		{"old origin", get, "HTTP/1.0 200 OK\r\n\r\nhi~", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", true, false},
		{"old origin that keeps", get, "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nh", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nh", true, true},
		{"old origin that closes", get, "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nh", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nh", true, false},
		{"old client", old, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", false, true},
		{"old client that keeps", oldKept, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nhi", true, true},
		{
			"old client, chunked", oldKept, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n\r\n2\r\nhi\r\n0\r\nT: 1\r\n\r\n",
			"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi", false, true,
		},
		{"old client, until close", oldKept, "HTTP/1.1 200 OK\r\n\r\nhi~", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi", false, false},
		{"old client, interim", oldKept, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n", true, true},
		{
			"interim", get, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
			"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", true, true,
		},
		{"HEAD", strings.Replace(get, "GET", "HEAD", 1), "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", true, true},
		{"HEAD, chunked", strings.Replace(get, "GET", "HEAD", 1), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", true, true},
		{"not modified", get, "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nETag: x\r\n\r\n", "HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 99\r\n\r\n", true, true},
		{
			"client closes", strings.Replace(get, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
			"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", false, true,
		},
		{"more than the response", get, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", true, false},
		{"unusual status", get, "HTTP/1.1 999 Denied\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 999 Denied\r\nContent-Length: 0\r\n\r\n", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			at := script(t, func(_ int, w *wire) {
				for w.head() != "" {
					body, closes := strings.CutSuffix(tt.res, "~")
					w.say(body)
					if closes {
						return
					}
				}
			})
			r := newProxy(t, nil)
			w := r.dial()
			req := strings.ReplaceAll(tt.req, "ORIGIN", at)
			rounds := 1
			if tt.kept {
				rounds = 2
			}
			for range rounds {
				w.send(req)
				w.expect(tt.want)
			}
			if !tt.kept {
				w.ended()
				again := r.dial()
				again.send(req)
				again.expect(tt.want)
			}
			if got := r.Record(1).Reused; got != tt.reused {
				t.Errorf("origin's connection reused: %v, want %v", got, tt.reused)
			}
			if rec := r.Record(0); rec.Err != nil {
				t.Errorf("record: %v", rec.Err)
			}
		})
	}
}

func TestReportEgress(t *testing.T) {
	t.Parallel()
	r := newProxy(t, func(o *httpproxy.Options) { o.ReportEgress = true })
	at := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Egress-IP", "192.0.2.66")
		w.Header().Set("Proxy-Status", "cdn; hit")
		whoami(w, r)
	})
	w := r.dial()
	w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\nX-Egress-Path: b\r\n\r\n")
	res, body := w.response("GET")
	if body != "127.0.0.2 /" {
		t.Fatal(body)
	}
	if got := res.Header.Values("X-Egress-IP"); len(got) != 1 || got[0] != "127.0.0.2" {
		t.Errorf("X-Egress-IP %q", got)
	}
	want := []string{"cdn; hit", `wayout; egress-path="out/b"; egress-ip="127.0.0.2"`}
	if got := res.Header.Values("Proxy-Status"); len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("Proxy-Status %q", got)
	}
}

// Bodies of many sizes, both ways at once, by net/http at both ends.
func TestEcho(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	at := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		if r.ContentLength >= 0 {
			w.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
		}
		w.Header().Set("Trailer", "Sum")
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("Sum", r.Trailer.Get("Sum"))
	})
	c := r.client(nil)
	for _, size := range []int{0, 1, 100, 4095, 4096, 5000, 16384, 70000, 300000, 5 << 20} {
		for _, chunked := range []bool{false, true} {
			data := bytes.Repeat([]byte("0123456789abcdef"), size/16+1)[:size]
			req, err := http.NewRequest("POST", "http://"+at+"/", bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			if chunked {
				req.ContentLength = -1
				req.Body = io.NopCloser(bytes.NewReader(data))
				req.Trailer = http.Header{"Sum": {"42"}}
			}
			res, err := c.Do(req)
			if err != nil {
				t.Fatalf("%d chunked=%v: %v", size, chunked, err)
			}
			got, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%d chunked=%v: got %d bytes, %v", size, chunked, len(got), err)
			}
			if chunked && res.Trailer.Get("Sum") != "42" {
				t.Errorf("%d: trailer %v", size, res.Trailer)
			}
		}
	}
}

func TestExpectContinue(t *testing.T) {
	t.Parallel()
	const post = "POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
	t.Run("granted", func(t *testing.T) {
		t.Parallel()
		at := script(t, func(_ int, w *wire) {
			if h := w.head(); !strings.Contains(h, "Expect: 100-continue\r\n") {
				t.Errorf("origin got %q", h)
			}
			w.say("HTTP/1.1 100 Continue\r\n\r\n")
			w.expect("hello")
			w.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		})
		r := newProxy(t, nil)
		w := r.dial()
		w.send(strings.ReplaceAll(post, "ORIGIN", at))
		w.expect("HTTP/1.1 100 Continue\r\n\r\n")
		w.send("hello")
		w.expect("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		at := script(t, func(_ int, w *wire) {
			w.head()
			w.say("HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
			if b, _ := io.ReadAll(w.br); len(b) > 0 {
				t.Errorf("origin got %q", b)
			}
		})
		r := newProxy(t, nil)
		w := r.dial()
		w.send(strings.ReplaceAll(post, "ORIGIN", at))
		w.expect("HTTP/1.1 417 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		w.ended()
	})
	t.Run("the client does not wait", func(t *testing.T) {
		t.Parallel()
		at := script(t, func(_ int, w *wire) {
			w.head()
			w.expect("hello")
			w.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			w.head()
		})
		r := newProxy(t, nil)
		w := r.dial()
		for range 2 {
			w.send(strings.ReplaceAll(post, "ORIGIN", at))
			w.send("hello")
			w.expect("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
}

// An answer that comes before the body is read.
func TestEarlyAnswer(t *testing.T) {
	t.Parallel()
	at := script(t, func(_ int, w *wire) {
		w.head()
		w.say("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
		if _, err := w.br.ReadByte(); err != nil { // some of the body has come
			return
		}
	})
	r := newProxy(t, nil)
	t.Run("small enough to read to its end", func(t *testing.T) {
		w := r.dial()
		const size = 100 << 10
		w.send(fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", at, size))
		w.expect("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
		w.send(strings.Repeat("x", size))
		w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
		w.expect("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
	})
	t.Run("too large", func(t *testing.T) {
		w := r.dial()
		w.send("POST http://" + at + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
		go func() {
			b := bytes.Repeat([]byte("x"), 1<<16)
			for {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		}()
		w.expect("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
	})
}

// Kept connections that the origin closes without a word.
func TestStaleConnection(t *testing.T) {
	t.Parallel()
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
	at := script(t, func(n int, w *wire) {
		w.head()
		w.say(ok)
		if n == 0 {
			w.head() // takes the second request and closes
			return
		}
		w.head()
	})
	r := newProxy(t, nil)
	w := r.dial()
	for range 2 {
		w.send("PUT http://" + at + "/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nT: 1\r\n\r\n")
		w.expect(ok)
	}
	if rec := r.Record(1); rec.Reused || rec.Err != nil {
		t.Errorf("record of what was sent again: %+v", rec)
	}
	// What may not be sent twice gets a connection of its own.
	w.send("POST http://" + at + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na")
	w.expect(ok)
	if rec := r.Record(2); rec.Reused {
		t.Error("a POST on a kept connection")
	}
}

// What bounded one request is no bound of the next on the same connection, also
// when it has passed meanwhile.
func TestKeptConnectionOutlivesItsDeadlines(t *testing.T) {
	t.Parallel()
	const limit = time.Second
	at := origin(t, whoami)
	r := newProxy(t, func(o *httpproxy.Options) {
		o.Timeouts.Response, o.Timeouts.Write, o.Timeouts.Stall = limit, limit, limit
	})
	w := r.dial()
	for n := range 2 {
		w.send("GET http://" + at + "/x HTTP/1.1\r\nHost: x\r\n\r\n")
		if res, body := w.response("GET"); body != "127.0.0.1 /x" {
			t.Fatalf("%s %q", res.Status, body)
		}
		if rec := r.Record(n); rec.Reused != (n == 1) || rec.Err != nil {
			t.Errorf("request %d: %+v", n, rec)
		}
		time.Sleep(limit + limit/8) // the time has to pass
	}
}

func TestUpgrade(t *testing.T) {
	t.Parallel()
	at := script(t, func(_ int, w *wire) {
		if h := w.head(); !strings.HasSuffix(h, "Upgrade: echo\r\nConnection: Upgrade\r\n\r\n") {
			t.Errorf("origin got %q", h)
		}
		w.say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nfirst ")
		_, _ = io.Copy(w.TCPConn, w.br)
	})
	r := newProxy(t, func(o *httpproxy.Options) { o.ReportEgress = true })
	w := r.dial()
	w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nearly ")
	w.expect("HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n" +
		"Proxy-Status: wayout; egress-path=\"out/a\"; egress-ip=\"127.0.0.1\"\r\nX-Egress-IP: 127.0.0.1\r\n\r\nfirst early ")
	w.send("late")
	if err := w.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	w.expect("late")
	w.ended()
	if rec := r.Record(0); rec.Status != 101 || rec.BytesOut != 10 || rec.BytesIn != 16 || rec.Err != nil {
		t.Errorf("record %+v", rec)
	}
}

// What comes of a response is passed on at once, also in the middle.
func TestStreaming(t *testing.T) {
	t.Parallel()
	next := make(chan struct{})
	at := script(t, func(_ int, w *wire) {
		w.head()
		w.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		<-next
		w.say("5\r\nab")
		<-next
		w.say("cde\r\n0\r\n\r\n")
	})
	r := newProxy(t, nil)
	w := r.dial()
	w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
	w.expect("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
	next <- struct{}{}
	w.expect("2\r\nab\r\n")
	next <- struct{}{}
	w.expect("3\r\ncde\r\n0\r\n\r\n")
}

// A response that breaks off must not look whole.
func TestBrokenResponse(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, req, res string }{
		{"sized", "HTTP/1.1", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi"},
		{"sized and large", "HTTP/1.1", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhi"},
		{"chunked", "HTTP/1.1", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi"},
		{"chunked, bad", "HTTP/1.1", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nz\r\n"},
		{"chunked, to an old client", "HTTP/1.0", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			at := script(t, func(_ int, w *wire) {
				w.head()
				w.say(tt.res)
			})
			r := newProxy(t, nil)
			w := r.dial()
			w.send("GET http://" + at + "/ " + tt.req + "\r\nHost: x\r\n\r\n")
			res, err := http.ReadResponse(w.br, nil)
			if err == nil {
				_, err = io.ReadAll(res.Body)
			}
			if err == nil {
				t.Fatal("the client takes it for a whole response")
			}
			if rec := r.Record(0); rec.Err == nil || rec.Status != 200 {
				t.Errorf("record %+v", rec)
			}
		})
	}
}

func TestMaxForwardsEndsHere(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	w := r.dial()
	for method, status := range map[string]int{"OPTIONS": 200, "TRACE": 405} {
		w.send(method + " http://origin.test/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\n\r\n")
		if res, _ := w.response(method); res.StatusCode != status {
			t.Errorf("%s: %s", method, res.Status)
		}
	}
}

// A client that sends half and ends gets no answer made of half a request.
func TestClientLeavesInTheBody(t *testing.T) {
	t.Parallel()
	whole := make(chan error, 1)
	at := script(t, func(_ int, w *wire) {
		req, err := http.ReadRequest(bufio.NewReader(w.br))
		if err == nil {
			_, err = io.ReadAll(req.Body)
		}
		whole <- err
	})
	r := newProxy(t, nil)
	for _, body := range []string{"Content-Length: 10\r\n\r\nhi", "Transfer-Encoding: chunked\r\n\r\n5\r\nhi"} {
		w := r.dial()
		w.send("POST http://" + at + "/ HTTP/1.1\r\nHost: x\r\n" + body)
		if err := w.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-whole:
			if err == nil {
				t.Errorf("the origin takes %q for a whole request", body)
			}
		case <-time.After(patience):
			t.Fatal("the origin's connection stays open")
		}
	}
}
