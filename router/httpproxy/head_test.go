package httpproxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

const benchHead = "GET http://192.0.2.10:8080/path/to/something?with=a&query=1 HTTP/1.1\r\n" +
	"Host: 192.0.2.10:8080\r\n" +
	"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n" +
	"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n" +
	"Accept-Language: en-US,en;q=0.5\r\n" +
	"Accept-Encoding: gzip, deflate\r\n" +
	"Proxy-Authorization: Basic YWxpY2U6c2VjcmV0\r\n" +
	"Proxy-Connection: keep-alive\r\n" +
	"X-Egress-Path: fra-2\r\n" +
	"Cookie: a=b; c=d\r\n\r\n"

func testLimits() *headLimits {
	return &headLimits{fields: 100, target: 4096, selection: "x-egress-path"}
}

func TestParseAllocatesNothing(t *testing.T) {
	b := []byte(benchHead)
	lim := testLimits()
	var h head
	var a authority
	n := testing.AllocsPerRun(100, func() {
		var end headEnd
		n, err := end.find(b)
		if err == nil {
			err = h.parseRequest(b[:n], lim)
		}
		var auth []byte
		if err == nil {
			auth, _, err = splitAbsolute(h.target)
		}
		if err == nil {
			err = a.parse(auth, false)
		}
		if err != nil || h.checkHost(auth) != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkParseRequest(b *testing.B) {
	in := []byte(benchHead)
	lim := testLimits()
	var h head
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		var end headEnd
		n, err := end.find(in)
		if err != nil || h.parseRequest(in[:n], lim) != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseResponse(b *testing.B) {
	in := []byte("HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nServer: x\r\nContent-Type: text/html\r\n" +
		"Content-Length: 64\r\nConnection: keep-alive\r\nETag: \"abc\"\r\n\r\n")
	lim := &headLimits{fields: 100, response: true}
	var h head
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		if err := h.parseResponse(in, lim); err != nil {
			b.Fatal(err)
		}
	}
}

func TestFaultsHaveWords(t *testing.T) {
	for f := faultNone + 1; f < faultEnd; f++ {
		if s := f.Error(); strings.HasPrefix(s, "fault ") {
			t.Errorf("fault %d has no words", f)
		}
		if s := f.status(); s < 400 || s > 599 {
			t.Errorf("%v: status %d", f, s)
		}
		if s, kind := f.originStatus(); s < 500 || kind == "" {
			t.Errorf("%v: origin status %d %q", f, s, kind)
		}
	}
}

// The end of a head is found wherever the reads split it.
func TestHeadEnd(t *testing.T) {
	in := []byte("GET / HTTP/1.1\r\nA: b\r\n\r\nrest")
	want := len(in) - len("rest")
	for split := range in {
		var e headEnd
		n, err := e.find(in[:split])
		if err != nil || split < want && n != 0 {
			t.Fatalf("at %d: %d, %v", split, n, err)
		}
		if n == 0 {
			n, err = e.find(in)
		}
		if n != want || err != nil {
			t.Fatalf("at %d: %d, %v", split, n, err)
		}
	}
}

// parseAsRequest is what a request goes through before it goes anywhere.
func parseAsRequest(in []byte, h *head) (n int, err error) {
	var end headEnd
	n, err = end.find(in)
	if n == 0 && err == nil {
		return 0, faultIncomplete
	}
	if err == nil {
		err = h.parseRequest(in[:n], testLimits())
	}
	return n, err
}

// FuzzRequestHead compares the parser with net/http's. What we take, net/http
// takes too and reads alike: that direction admits no difference but those
// below, because a proxy that reads a request otherwise than an origin does is
// what request smuggling is. What net/http takes and we refuse is the list in
// the issue and is not compared: bare LF, obs-fold, repeated lengths that
// agree, Transfer-Encoding in HTTP/1.0, control characters in values, a
// Connection field that names framing, other expectations.
//
//	what                                   net/http   we      why
//	CONNECT without Host                   takes      take    its server asks for none either
//	target that url.Parse cannot read      refuses    take    path and query are the origin's to read; the
//	  ("%zz", CONNECT h:p by url's rules)                     authority is parsed by target.go, strictly
//	malformed value of Host                refuses    later   checkHost, after the target is known
//	trailing white space in Trailer names  refuses    take    Trailer is only passed on
func FuzzRequestHead(f *testing.F) {
	line, rest, _ := strings.Cut(benchHead, "\r\n")
	for _, s := range [][2]string{
		{line, rest},
		{"GET http://a/ HTTP/1.1", "Host: a\r\n"},
		{"POST http://a/ HTTP/1.1", "Host: a\r\nContent-Length: 3\r\n"},
		{"POST http://a/ HTTP/1.1", "Host: a\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n"},
		{"POST http://a/ HTTP/1.0", "Content-Length: 3\r\nContent-Length: 3\r\n"},
		{"CONNECT a:443 HTTP/1.1", ""},
		{"GET http://a/ HTTP/1.1", "Host: a\r\nA : b\r\n c\r\n"},
		{"GET http://a/ HTTP/1.1", "Host: a\r\nConnection: close, X\r\nX: \tb \t\r\n"},
		{"PRI * HTTP/2.0", "\r\nSM\r\n"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, line, fields string) {
		in := []byte(line + "\r\n" + fields + "\r\n")
		var h head
		n, err := parseAsRequest(in, &h)
		if err != nil {
			return
		}
		req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(in[:n])))
		if err != nil {
			// The oracle reads the target as a URL and looks into Trailer.
			m := err.Error()
			if strings.Contains(m, "parse ") || strings.Contains(m, "invalid URI") || strings.Contains(m, "railer") || strings.Contains(m, "malformed Host") {
				return
			}
			t.Fatalf("net/http refuses %q: %v", in[:n], err)
		}
		if req.Method != string(h.method) || req.ProtoMinor != h.minor || req.RequestURI != string(h.target) {
			t.Fatalf("start line of %q: %s %s 1.%d", in[:n], req.Method, req.RequestURI, req.ProtoMinor)
		}
		chunked := len(req.TransferEncoding) == 1 && req.TransferEncoding[0] == "chunked"
		if chunked != h.chunked {
			t.Fatalf("chunked in %q: net/http %v, we %v", in[:n], chunked, h.chunked)
		}
		if !h.chunked && req.ContentLength != max(h.length, 0) {
			t.Fatalf("length in %q: net/http %d, we %d", in[:n], req.ContentLength, h.length)
		}
		compareFields(t, &h, req.Header, in[:n])
	})
}

// compareFields compares all fields but those that net/http takes out.
func compareFields(t *testing.T, h *head, theirs http.Header, in []byte) {
	t.Helper()
	ours := http.Header{}
	for i := range h.fields {
		switch h.fields[i].kind {
		case kindHost, kindTransferEncoding, kindContentLength, kindTrailer:
			continue
		}
		ours.Add(string(h.name(i)), string(h.value(i)))
	}
	for _, k := range []string{"Content-Length", "Transfer-Encoding", "Trailer", "Host"} {
		theirs.Del(k)
	}
	if len(ours.Values("Pragma")) > 0 && ours.Get("Cache-Control") == "" {
		theirs.Del("Cache-Control") // net/http adds it to Pragma: no-cache
	}
	if len(ours) != len(theirs) {
		t.Fatalf("fields of %q: net/http %v, we %v", in, theirs, ours)
	}
	for k, v := range ours {
		if strings.Join(v, "\x00") != strings.Join(theirs[k], "\x00") {
			t.Fatalf("field %s of %q: net/http %q, we %q", k, in, theirs[k], v)
		}
	}
}

// FuzzResponseHead does the same for responses. We take two things that
// net/http refuses: white space before the colon, which a proxy has to remove
// (RFC 9112, section 5.1), so what is compared is the head as it is passed on;
// and Trailer names that it finds fault with.
func FuzzResponseHead(f *testing.F) {
	for _, s := range [][2]string{
		{"HTTP/1.1 200 OK", "Content-Length: 2\r\n"},
		{"HTTP/1.1 204", ""},
		{"HTTP/1.0 200 OK", "A : b\r\n"},
		{"HTTP/1.1 200 OK", "Transfer-Encoding: chunked\r\nConnection: x\r\nX: y\r\n"},
		{"HTTP/1.1 200 OK", "A: 1\r\nB\t: 2\r\nConnection: a, close\r\nTrailer: C\r\nKeep-Alive: 3\r\nD:\r\n"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, line, fields string) {
		in := []byte(line + "\r\n" + fields + "\r\n")
		var h head
		var end headEnd
		n, err := end.find(in)
		if n == 0 || err != nil || h.parseResponse(in[:n], &headLimits{fields: 100, response: true}) != nil || h.status < 200 {
			return
		}
		x := &exchange{s: &Server{}, c: &conn{s: &Server{}}, res: h, wantsMore: true}
		frame, length := x.responseFraming()
		x.writeResponseHead(frame, length, true)
		out := x.c.out.out
		res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(out)), nil)
		if err != nil {
			if strings.Contains(err.Error(), "railer") {
				return
			}
			t.Fatalf("net/http refuses %q, made of %q: %v", out, in[:n], err)
		}
		if res.StatusCode != h.status || res.ProtoMinor != 1 || len(res.TransferEncoding) > 0 != h.chunked && frame != frameNone {
			t.Fatalf("%q, made of %q: %d %v", out, in[:n], res.StatusCode, res.TransferEncoding)
		}
		if frame == frameSized && res.ContentLength != h.length {
			t.Fatalf("%q, made of %q: length %d", out, in[:n], res.ContentLength)
		}
		for _, k := range []string{"Connection", "Keep-Alive", "Proxy-Authenticate", "Upgrade", "Proxy-Connection"} {
			if len(res.Header.Values(k)) > 0 {
				t.Fatalf("%s goes on in %q, made of %q", k, out, in[:n])
			}
		}
	})
}

// FuzzChunked decodes in pieces what net/http decodes whole.
func FuzzChunked(f *testing.F) {
	for _, s := range []string{
		"5\r\nhello\r\n0\r\n\r\n",
		"1;a=b\r\nx\r\n00a\r\n0123456789\r\n0;z\r\nT: 1\r\n\r\nrest",
		"5 \r\nhello\r\n0\r\n\r\n",
		"5\nhello\n0\n\n",
		"ffffffffffffffffff\r\n",
	} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		var c chunked
		c.reset()
		lim := testLimits()
		var got, pending []byte
		rest := bytes.Clone(in)
		for c.state != chunkDone {
			n := min(int(step)+1, len(rest))
			if n == 0 {
				return // more is wanted
			}
			pending = append(pending, rest[:n]...)
			rest = rest[n:]
			p, used, err := c.decode(pending, lim)
			got = append(got, p...)
			if err != nil {
				return
			}
			pending = bytes.Clone(pending[used:])
		}
		// The same through a request that net/http reads.
		br := bufio.NewReader(io.MultiReader(strings.NewReader("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), bytes.NewReader(in)))
		req, err := http.ReadRequest(br)
		if err != nil {
			t.Fatal(err)
		}
		want, err := io.ReadAll(req.Body)
		if err != nil && !strings.Contains(err.Error(), "railer") && !strings.Contains(err.Error(), "malformed MIME") {
			t.Fatalf("net/http refuses %q: %v", in, err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%q: net/http %q, we %q", in, want, got)
		}
		left, _ := io.ReadAll(br)
		if err == nil && len(left) != len(pending)+len(rest) {
			t.Fatalf("%q: net/http leaves %q, we %q", in, left, append(pending, rest...))
		}
	})
}

// FuzzTarget: what is taken for a target is a URL to net/url's mind too, with
// the same host and port.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{
		"http://a/", "http://a:80?x", "http://[::1]:8080/", "http://[::ffff:127.0.0.1]/", "http://127.0.0.1/", "http://127.1/",
		"http://0x7f.1/", "http://a.b.c./x", "http://a@b/", "http://a#b", "http://[fe80::1%25x]/", "https://a/", "/", "*",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		auth, path, err := splitAbsolute(in)
		if err != nil {
			return
		}
		var a authority
		if a.parse(auth, false) != nil {
			return
		}
		if len(path) > 0 && path[0] != '/' && path[0] != '?' {
			t.Fatalf("%q: path %q", in, path)
		}
		if (a.name == nil) != a.addr.IsValid() || a.addr.Zone() != "" || a.addr.Is4In6() {
			t.Fatalf("%q: name %q, address %v", in, a.name, a.addr)
		}
		req, err := http.NewRequest("GET", "http://"+string(auth)+"/", nil)
		if err != nil {
			t.Fatalf("net/url refuses %q: %v", auth, err)
		}
		if req.URL.User != nil || req.URL.Path != "/" {
			t.Fatalf("%q: %v", auth, req.URL)
		}
		host := req.URL.Hostname()
		if a.name != nil && host != string(a.name) {
			t.Fatalf("%q: net/url's host %q, ours %q", auth, host, a.name)
		}
		for _, c := range a.name {
			if c > 0x7e || c <= ' ' {
				t.Fatalf("name %q", a.name)
			}
		}
	})
}

func TestJudgeKeepsTheMostTelling(t *testing.T) {
	// An origin's failure is its own even when a fault of the same name is
	// the client's elsewhere.
	if v := judge(&originError{faultBareLF}); v.status != http.StatusBadGateway {
		t.Error(v)
	}
	if v := judge(errors.Join(io.EOF, faultBareLF)); v.status != http.StatusBadRequest {
		t.Error(v)
	}
}
