package main_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"

	"wayout/scripts/lab"
)

// TestExchange plays both the client and the origin, byte by byte, for what
// HTTP/1 has between the two.
func TestExchange(t *testing.T) {
	t.Parallel()
	s := outScene(t, "")
	for _, c := range []struct {
		name string
		f    func(*testing.T, *scene)
	}{
		{"head as the origin gets it", headAsSent},
		{"early answer, the origin ends", earlyAnswerClose},
		{"early answer, the origin reads on", earlyAnswerKeep},
		{"100-continue", expectContinue},
		{"100-continue denied", expectDenied},
		{"100-continue of HTTP/1.0", expectOld},
		{"trailers", trailers},
		{"HEAD, 204, 304", bodiless},
		{"103", earlyHints},
		{"HTTP/1.0 client", oldClient},
		{"HTTP/1.0 origin", oldOrigin},
		{"answer that breaks off", brokenAnswer},
		{"no answer", noAnswer},
		{"malformed answers", malformedAnswers},
		{"kept connection that has ended", staleUpstream},
		{"upgrade", upgrade},
		{"upgrade refused", upgradeRefused},
		{"half-close by the client", halfCloseClient},
		{"half-close by the origin", halfCloseOrigin},
		{"reset within a tunnel", resetInTunnel},
		{"client that goes away", clientGone},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, s) })
	}
}

// ask is a request's head up to where more fields may stand.
func requestTo(method, at string) string {
	return method + " http://" + at + "/x?y=z HTTP/1.1\r\nHost: " + at + "\r\n"
}

const okHi = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"

// goesOn checks that a client connection serves one more request.
func goesOn(t *testing.T, s *scene, w *peer) {
	t.Helper()
	at := s.serve(t, func(_ int, o *peer) {
		o.head()
		o.say("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnext")
	})
	w.say(requestTo("GET", at) + "\r\n")
	if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "next" {
		t.Errorf("the next request: %s %q", resp.Status, body)
	}
}

func headAsSent(t *testing.T, s *scene) {
	heads := make(chan string, 1)
	at := s.serve(t, func(_ int, o *peer) {
		for h, more := o.next(); more; h, more = o.next() {
			heads <- h
			o.say("HTTP/1.1 200 Fine, thanks\r\nContent-Length: 2\r\nKeep-Alive: timeout=5\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\n" +
				"Proxy-Authenticate: Basic\r\nX-Egress-IP: 192.0.2.1\r\nSet-Cookie: a=b\r\nset-cookie: c=d\r\n\r\nhi")
		}
	})
	w := s.dial(t, 3128)
	// The Host field of the request has nothing to say beside its target.
	w.say("GET http://" + at + " HTTP/1.1\r\nHost: other.test\r\nX-Egress-Path: p1\r\nAccept:  */*  \r\nConnection: x-one, X-Two\r\nX-One: 1\r\nX-TWO: 2\r\n" +
		"x-egress-path: p1\r\nKeep-Alive: 300\r\nTE: gzip\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic YTpi\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n" +
		"Cookie: a=b\r\ncookie: c=d\r\nX-Latin: \xe9\r\n\r\n")
	want := "GET / HTTP/1.1\r\nHost: " + at + "\r\nAccept:  */*  \r\nCookie: a=b\r\ncookie: c=d\r\nX-Latin: \xe9\r\n\r\n"
	if got := <-heads; got != want {
		t.Errorf("the origin got\n%q, want\n%q", got, want)
	}
	got := w.head()
	for _, line := range []string{"HTTP/1.1 200 Fine, thanks\r\n", "\r\nSet-Cookie: a=b\r\nset-cookie: c=d\r\n", "\r\nX-Egress-IP: " + lab.Egress4()[0].String() + "\r\n", "\r\nContent-Length: 2\r\n"} {
		if !strings.Contains(got, line) {
			t.Errorf("the client got %q without %q", got, line)
		}
	}
	for _, word := range []string{"X-Hop", "Keep-Alive", "Connection", "Proxy-Authenticate", "192.0.2.1\r\n", "Via", "X-Forwarded"} {
		if strings.Contains(got, word) {
			t.Errorf("the client got %q with %q", got, word)
		}
	}
	w.expect("hi")
	w.say("OPTIONS http://" + at + " HTTP/1.1\r\nHost: " + at + "\r\n\r\n")
	if got := <-heads; !strings.HasPrefix(got, "OPTIONS * HTTP/1.1\r\n") {
		t.Errorf("OPTIONS of the origin became %q", got)
	}
	w.answer("OPTIONS")
	w.say("GET http://" + strings.ToUpper(at) + "?q HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := <-heads; !strings.HasPrefix(got, "GET /?q HTTP/1.1\r\nHost: "+at+"\r\n") {
		t.Errorf("a query without a path became %q", got)
	}
	w.answer("GET")
}

// The origin answers before it has read the body, and closes.
func earlyAnswerClose(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		o.head()
		o.say("HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")
		// What comes is let come, so that no reset takes the answer away.
		_, _ = io.Copy(io.Discard, o.r)
	})
	w := s.dial(t, 3128)
	w.say(requestTo("POST", at) + "Content-Length: 1000000\r\n\r\n")
	w.say(strings.Repeat("x", 1000))
	resp, body := w.answer("POST")
	if resp.StatusCode != 413 || body != "large" {
		t.Fatalf("%s %q", resp.Status, body)
	}
	// The rest is 1 MB that nobody wants: the connection may end instead.
	if resp.Close {
		w.ended()
		return
	}
	_, _ = io.Copy(w, strings.NewReader(strings.Repeat("x", 999000)))
	w.ended()
}

// The origin answers before it has read the body, and reads it all the same:
// both connections can go on.
func earlyAnswerKeep(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		for _, more := o.next(); more; _, more = o.next() {
			o.say("HTTP/1.1 401 Who\r\nContent-Length: 3\r\n\r\nwho")
			if _, err := io.CopyN(io.Discard, o.r, 300_000); err != nil {
				o.fail("body: %v", err)
			}
		}
	})
	w := s.dial(t, 3128)
	for range 2 {
		w.say(requestTo("POST", at) + "Content-Length: 300000\r\n\r\n")
		resp, body := w.answer("POST")
		if resp.StatusCode != 401 || body != "who" || resp.Close {
			t.Fatalf("%s %q, close %v", resp.Status, body, resp.Close)
		}
		w.say(strings.Repeat("x", 300_000))
	}
	goesOn(t, s, w)
}

func expectContinue(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		for h, more := o.next(); more; h, more = o.next() {
			if !strings.Contains(h, "\r\nExpect: 100-continue\r\n") {
				o.fail("no expectation in %q", h)
			}
			o.say("HTTP/1.1 100 Continue\r\n\r\n")
			o.expect("body!")
			o.say(okHi)
		}
	})
	w := s.dial(t, 3128)
	for range 2 {
		w.say(requestTo("PUT", at) + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		if got := w.head(); got != "HTTP/1.1 100 Continue\r\n\r\n" {
			t.Fatalf("%q", got)
		}
		w.say("body!")
		if resp, body := w.answer("PUT"); resp.StatusCode != 200 || body != "hi" {
			t.Fatalf("%s %q", resp.Status, body)
		}
	}
}

func expectDenied(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		o.head()
		o.say("HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno")
		o.ended()
	})
	w := s.dial(t, 3128)
	w.say(requestTo("PUT", at) + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
	resp, body := w.answer("PUT")
	if resp.StatusCode != 403 || body != "no" || !resp.Close {
		t.Fatalf("%s %q, close %v: whether the body comes is not known", resp.Status, body, resp.Close)
	}
	w.ended()
}

// HTTP/1.0 knows no interim answers: the expectation is not passed on, and a
// 100 of the origin's is not either.
func expectOld(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		if h := o.head(); strings.Contains(h, "Expect") {
			o.fail("an expectation of HTTP/1.0 in %q", h)
		}
		o.say("HTTP/1.1 100 Continue\r\n\r\n")
		o.expect("body!")
		o.say(okHi)
	})
	w := s.dial(t, 3128)
	w.say("PUT http://" + at + "/ HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nbody!")
	if resp, body := w.answer("PUT"); resp.StatusCode != 200 || body != "hi" {
		t.Fatalf("%s %q", resp.Status, body)
	}
	w.ended()
}

// Chunks and trailers both ways. The selection header goes from trailers too,
// and so does what has no place there.
func trailers(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		for {
			req, err := http.ReadRequest(o.r)
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				o.fail("request: %v", err)
			}
			body, err := io.ReadAll(req.Body)
			if err != nil || string(body) != "hello, world" {
				o.fail("body %q, %v", body, err)
			}
			if fmt.Sprint(req.Trailer) != "map[X-Sum:[abc]]" {
				o.fail("trailer %v", req.Trailer)
			}
			if req.Header.Get("TE") != "trailers" {
				o.fail("TE %q", req.Header.Get("TE"))
			}
			o.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Res\r\n\r\n3;ext=1\r\nfoo\r\n03\r\nbar\r\n0\r\nX-Res: def\r\nContent-Length: 9\r\n\r\n")
		}
	})
	w := s.dial(t, 3128)
	for range 2 {
		w.say(requestTo("POST", at) + "Transfer-Encoding: Chunked\r\nX-Egress-Path: p2\r\nTrailer: X-Sum\r\nTE: trailers, deflate\r\nConnection: TE\r\n\r\n")
		w.say("5;a=\"b\"\r\nhello\r\n")
		w.say("00007\r\n, world\r\n0\r\nX-Sum: abc\r\nX-Egress-Path: p3\r\nx-egress-path: p4\r\nContent-Length: 3\r\nHost: other.test\r\nProxy-Authorization: Basic YTpi\r\n\r\n")
		resp, body := w.answer("POST")
		if resp.StatusCode != 200 || body != "foobar" || fmt.Sprint(resp.Trailer) != "map[X-Res:[def]]" {
			t.Fatalf("%s %q %v", resp.Status, body, resp.Trailer)
		}
		if resp.Header.Get("X-Egress-IP") != lab.Egress4()[1].String() {
			t.Errorf("left by %s: a trailer chose", resp.Header.Get("X-Egress-IP"))
		}
	}
}

// Answers without a body, whatever their head says.
func bodiless(t *testing.T, s *scene) {
	answers := []struct{ method, answer string }{
		{"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"},
		{"HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"HEAD", "HTTP/1.1 404 No\r\n\r\n"},
		{"GET", "HTTP/1.1 204 None\r\n\r\n"},
		{"DELETE", "HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n"},
		{"GET", "HTTP/1.1 304 Same\r\nContent-Length: 1000\r\nETag: \"a\"\r\n\r\n"},
		{"GET", "HTTP/1.1 304 Same\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
	}
	at := s.serve(t, func(_ int, o *peer) {
		for {
			req, err := http.ReadRequest(o.r)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					o.fail("request: %v", err)
				}
				return
			}
			var n int
			if _, err := fmt.Sscanf(req.URL.Path, "/%d", &n); err != nil {
				o.fail("%v", err)
			}
			o.say(answers[n].answer)
		}
	})
	w := s.dial(t, 3128)
	for i, a := range answers {
		w.say(fmt.Sprintf("%s http://%s/%d HTTP/1.1\r\nHost: x\r\n\r\n", a.method, at, i))
		want, _, _ := strings.Cut(a.answer, "\r\n")
		got := w.head()
		if line, _, _ := strings.Cut(got, "\r\n"); line != want {
			t.Fatalf("answer to %d: %q, want %q", i, got, want)
		}
		if i == 0 && !strings.Contains(got, "\r\nContent-Length: 1000\r\n") || i == 5 && !strings.Contains(got, "\r\nETag: \"a\"\r\n") {
			t.Errorf("answer to %d: %q", i, got)
		}
		if a.method == "HEAD" || strings.Contains(want, "304") || strings.Contains(want, "204") {
			if strings.Contains(want, "204") && strings.Contains(got, "Transfer-Encoding") {
				t.Errorf("answer to %d: %q (RFC 9112, section 6.1)", i, got)
			}
			continue
		}
		if strings.Contains(got, "Transfer-Encoding") {
			w.expect("0\r\n\r\n")
		}
	}
	goesOn(t, s, w)
}

func earlyHints(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		for _, more := o.next(); more; _, more = o.next() {
			o.say("HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
			o.say("HTTP/1.1 102 Processing\r\n\r\n" + okHi)
		}
	})
	w := s.dial(t, 3128)
	w.say(requestTo("GET", at) + "\r\n")
	if got := w.head(); got != "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n" {
		t.Errorf("%q", got)
	}
	if got := w.head(); got != "HTTP/1.1 102 Processing\r\n\r\n" {
		t.Errorf("%q", got)
	}
	if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "hi" {
		t.Errorf("%s %q", resp.Status, body)
	}
	w = s.dial(t, 3128)
	w.say("GET http://" + at + "/ HTTP/1.0\r\n\r\n")
	if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "hi" {
		t.Errorf("HTTP/1.0: %s %q", resp.Status, body)
	}
	w.ended()
}

func oldClient(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		for {
			req, err := http.ReadRequest(o.r)
			if err != nil {
				return
			}
			if req.Proto != "HTTP/1.1" || req.Host == "" {
				o.fail("the origin got %s with Host %q", req.Proto, req.Host)
			}
			if req.URL.Path == "/chunked" {
				o.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n")
				continue
			}
			o.say(okHi)
		}
	})
	// By default it ends.
	w := s.dial(t, 3128)
	w.say("GET http://" + at + "/ HTTP/1.0\r\n\r\n")
	if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "hi" {
		t.Errorf("%s %q", resp.Status, body)
	}
	w.ended()
	// It stays when that is asked for, and the answer says so.
	for _, field := range []string{"Connection: Keep-Alive", "Proxy-Connection: keep-alive"} {
		w = s.dial(t, 3128)
		for range 2 {
			w.say("GET http://" + at + "/ HTTP/1.0\r\n" + field + "\r\n\r\n")
			got := w.head()
			if !strings.Contains(strings.ToLower(got), "\r\nconnection: keep-alive\r\n") {
				t.Errorf("%s: %q", field, got)
			}
			w.expect("hi")
		}
		// Chunks are nothing to HTTP/1.0: the end of the connection tells
		// the end of the body.
		w.say("GET http://" + at + "/chunked HTTP/1.0\r\n" + field + "\r\n\r\n")
		if got := w.head(); strings.Contains(got, "chunked") || strings.Contains(strings.ToLower(got), "keep-alive") {
			t.Errorf("%q", got)
		}
		w.expect("hi")
		w.ended()
	}
}

func oldOrigin(t *testing.T, s *scene) {
	long := strings.Repeat("0123456789abcdef", 4096)
	at := s.serve(t, func(n int, o *peer) {
		o.head()
		switch n % 3 {
		case 0: // sized
			o.say("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		case 1: // to the end of the connection
			o.say("HTTP/1.0 200 OK\r\n\r\n" + long)
		case 2: // the same of HTTP/1.1
			o.say("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + long)
		}
	})
	w := s.dial(t, 3128)
	for i := range 6 {
		w.say(requestTo("GET", at) + "\r\n")
		resp, body := w.answer("GET")
		want := long
		if i%3 == 0 {
			want = "hi"
		}
		if resp.StatusCode != 200 || body != want || resp.Proto != "HTTP/1.1" || resp.Close {
			t.Fatalf("answer %d: %s %s, %d bytes, close %v", i, resp.Proto, resp.Status, len(body), resp.Close)
		}
	}
}

// An answer that breaks off must not look like a whole one.
func brokenAnswer(t *testing.T, s *scene) {
	for _, c := range []struct{ name, answer string }{
		{"sized", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf"},
		{"chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"},
		{"chunked, within a chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nhalf"},
		{"bad chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n"},
		{"to the end, reset", "HTTP/1.1 200 OK\r\n\r\nhalf"},
	} {
		for _, version := range []string{"HTTP/1.1", "HTTP/1.0"} {
			seen := make(chan struct{})
			at := s.serve(t, func(_ int, o *peer) {
				o.head()
				o.say(c.answer)
				<-seen
				if strings.Contains(c.name, "reset") {
					if err := o.SetLinger(0); err != nil {
						o.fail("linger: %v", err)
					}
				}
			})
			w := s.dial(t, 3128)
			w.say("GET http://" + at + "/ " + version + "\r\nHost: x\r\n\r\n")
			resp, err := http.ReadResponse(w.r, nil)
			if err != nil {
				t.Fatalf("%s, %s: %v", c.name, version, err)
			}
			half := make([]byte, 4)
			_, err = io.ReadFull(resp.Body, half)
			close(seen)
			if c.name == "chunked, within a chunk" && errors.Is(err, syscall.ECONNRESET) {
				continue
			}
			if c.name != "bad chunk" && (err != nil || string(half) != "half") {
				t.Fatalf("%s, %s: %q, %v", c.name, version, half, err)
			}
			if rest, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("%s, %s: the answer ends well, after %q", c.name, version, rest)
			}
		}
	}
}

func noAnswer(t *testing.T, s *scene) {
	for _, c := range []struct {
		name, kind string
		f          func(o *peer)
	}{
		{"end", "connection_terminated", func(o *peer) { o.head() }},
		{"reset", "connection_terminated", func(o *peer) {
			o.head()
			if err := o.SetLinger(0); err != nil {
				o.fail("linger: %v", err)
			}
		}},
		{"half a head", "http_response_incomplete", func(o *peer) {
			o.head()
			o.say("HTTP/1.1 200 OK\r\nA: ")
		}},
		{"interim and end", "connection_terminated", func(o *peer) {
			o.head()
			o.say("HTTP/1.1 103 Early Hints\r\n\r\n")
		}},
	} {
		for _, method := range []string{"GET", "POST"} {
			at := s.serve(t, func(_ int, o *peer) { c.f(o) })
			w := s.dial(t, 3128)
			w.say(requestTo(method, at) + "Content-Length: 0\r\n\r\n")
			resp, body := w.answer(method)
			if resp.StatusCode == 103 {
				resp, body = w.answer(method)
			}
			if c.name == "interim and end" && strings.Contains(resp.Header.Get("Proxy-Status"), "http_response_incomplete") {
				c.kind = "http_response_incomplete" // as good a word for it
			}
			refused(t, resp, body, 502, c.kind)
			goesOn(t, s, w)
		}
	}
}

// malformedAnswers are those of an origin: 502, and the client's own
// connection goes on.
func malformedAnswers(t *testing.T, s *scene) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for name, c := range map[string]struct{ answer, kind string }{
		"HTTP/0.9":          {"<html>hello</html>\r\n\r\n", "http_protocol_error"},
		"another version":   {"HTTP/2.0 200 OK\r\n\r\n", "http_protocol_error"},
		"another protocol":  {"SSH-2.0-OpenSSH_9.6\r\n\r\n", "http_protocol_error"},
		"status of letters": {"HTTP/1.1 2OO OK\r\n\r\n", "http_protocol_error"},
		"bare LF":           {"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "http_protocol_error"},
		"NUL":               {ok + "A: \x00\r\n\r\n", "http_protocol_error"},
		"length and coding": {ok + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "http_protocol_error"},
		"two lengths":       {ok + "Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi!", "http_protocol_error"},
		"negative length":   {ok + "Content-Length: -2\r\n\r\n", "http_protocol_error"},
		"unknown coding":    {ok + "Transfer-Encoding: gzip\r\n\r\n", "http_response_transfer_coding"},
		"101 unasked":       {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "http_upgrade_failed"},
		"head over 256 KiB": {ok + "A: " + strings.Repeat("x", 300<<10) + "\r\n\r\n", "http_response_header_section_size"},
	} {
		t.Run(name, func(t *testing.T) {
			at := s.serve(t, func(_ int, o *peer) {
				o.head()
				// The proxy may have seen enough before all is said.
				_, _ = io.WriteString(o, c.answer)
				_, _ = io.Copy(io.Discard, o.r)
			})
			w := s.dial(t, 3128)
			w.say(requestTo("GET", at) + "\r\n")
			resp, body := w.answer("GET")
			refused(t, resp, body, 502, c.kind)
			goesOn(t, s, w)
		})
	}
}

// A kept upstream connection that the origin ends just then: a request that
// may be sent again is, another one never goes out by a kept connection.
func staleUpstream(t *testing.T, s *scene) {
	var mu sync.Mutex
	var requests []string
	at := s.serve(t, func(n int, o *peer) {
		i := 0
		for h, more := o.next(); more; h, more = o.next() {
			mu.Lock()
			requests = append(requests, fmt.Sprintf("%d %s", n, strings.Fields(h)[0]))
			mu.Unlock()
			if i++; n == 0 && i == 2 {
				return // the second request on the first connection
			}
			o.say(okHi)
		}
	})
	w := s.dial(t, 3128)
	for _, method := range []string{"GET", "POST", "GET"} {
		w.say(requestTo(method, at) + "X-Egress-Path: p1\r\nContent-Length: 0\r\n\r\n")
		if resp, body := w.answer(method); resp.StatusCode != 200 || body != "hi" {
			t.Fatalf("%s: %s %q", method, resp.Status, body)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	// The POST had a connection of its own; then either kept one was tried.
	switch words := strings.Join(requests, ", "); words {
	case "0 GET, 1 POST, 0 GET, 2 GET", "0 GET, 1 POST, 1 GET":
	default:
		t.Errorf("the origin saw %s", words)
	}
}
