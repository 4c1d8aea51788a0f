package httpproxy_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/router/relay"
	"wayout/scripts/lab/rig"
	"wayout/selection"
)

// Every shape that is refused: the status, that the connection ends so that
// what follows cannot be taken for a request, and that the next good request
// is served.
func TestMalformed(t *testing.T) {
	t.Parallel()
	r := newProxy(t, func(o *httpproxy.Options) {
		o.Limits.Head, o.Limits.Fields, o.Limits.Target = 8<<10, 32, 2<<10
	})
	at := origin(t, whoami)
	good := "GET http://" + at + "/ HTTP/1.1\r\nHost: " + at + "\r\n\r\n"
	for name, tt := range rig.MalformedRequests() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := r.dial()
			// A second request behind the bad one must not be answered.
			w.send(strings.ReplaceAll(tt.In, "ORIGIN", at) + good)
			res, body := w.response("GET")
			if res.StatusCode != tt.Status || !strings.Contains(body, tt.Words) {
				t.Errorf("got %s %q, want %d and %q", res.Status, body, tt.Status, tt.Words)
			}
			if ps := res.Header.Get("Proxy-Status"); !strings.HasPrefix(ps, `wayout; error=http_request_error; details="`) {
				t.Errorf("Proxy-Status %q", ps)
			}
			w.ended()
			again := r.dial()
			again.send(good)
			if res, body := again.response("GET"); res.StatusCode != 200 || body != "127.0.0.1 /" {
				t.Errorf("the next good request: %s %q", res.Status, body)
			}
		})
	}
}

// A bad chunk that comes when the body is under way already.
func TestLateBadChunk(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	got := make(chan struct{})
	at := script(t, func(_ int, w *wire) {
		w.head()
		w.expect("5\r\nhello\r\n")
		close(got)
		w.ended()
	})
	w := r.dial()
	w.send("POST http://" + at + "/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
	<-got
	w.send("zz\r\n")
	if res, body := w.response("POST"); res.StatusCode != 400 || !strings.Contains(body, "chunk size") {
		t.Errorf("%s %q", res.Status, body)
	}
	w.ended()
}

// Malformed responses: 502 with the registered type.
func TestMalformedResponse(t *testing.T) {
	t.Parallel()
	const ok = "HTTP/1.1 200 OK\r\n"
	for name, tt := range map[string]struct{ res, kind string }{
		"nothing":             {"", "connection_terminated"},
		"half a head":         {ok + "A: b\r\n", "http_response_incomplete"},
		"HTTP/0.9":            {"hello\r\n\r\n", "http_protocol_error"},
		"HTTP/2":              {"HTTP/2.0 200 OK\r\n\r\n", "http_protocol_error"},
		"two digits":          {"HTTP/1.1 20 OK\r\n\r\n", "http_protocol_error"},
		"four digits":         {"HTTP/1.1 2000 OK\r\n\r\n", "http_protocol_error"},
		"status 099":          {"HTTP/1.1 099 OK\r\n\r\n", "http_protocol_error"},
		"bare LF":             {"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "http_protocol_error"},
		"obs-fold":            {ok + "A: b\r\n c\r\n\r\n", "http_protocol_error"},
		"NUL":                 {ok + "A: \x00\r\n\r\n", "http_protocol_error"},
		"control in reason":   {"HTTP/1.1 200 O\x01K\r\n\r\n", "http_protocol_error"},
		"length and coding":   {ok + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "http_protocol_error"},
		"two lengths":         {ok + "Content-Length: 1\r\nContent-Length: 2\r\n\r\na", "http_protocol_error"},
		"bad length":          {ok + "Content-Length: -1\r\n\r\na", "http_protocol_error"},
		"unknown coding":      {ok + "Transfer-Encoding: gzip\r\n\r\n", "http_response_transfer_coding"},
		"coding in 1.0":       {"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "http_response_transfer_coding"},
		"many fields":         {ok + strings.Repeat("A: b\r\n", 60) + "\r\n", "http_response_header_section_size"},
		"long head":           {ok + "A: " + strings.Repeat("x", 40000) + "\r\n\r\n", "http_response_header_section_size"},
		"unasked switch":      {"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "http_upgrade_failed"},
		"interim without end": {strings.Repeat("HTTP/1.1 102 Wait\r\n\r\n", 100), "http_protocol_error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at := script(t, func(_ int, w *wire) {
				w.head()
				w.say(tt.res)
			})
			good := origin(t, whoami)
			r := newProxy(t, func(o *httpproxy.Options) { o.Limits.ResponseHead, o.Limits.ResponseFields = 32<<10, 50 })
			w := r.dial()
			w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
			res, body := w.response("GET")
			for res.StatusCode == 102 {
				res, body = w.response("GET")
			}
			if res.StatusCode != 502 || !strings.Contains(res.Header.Get("Proxy-Status"), "error="+tt.kind+";") {
				t.Errorf("got %s %q %q", res.Status, res.Header.Get("Proxy-Status"), body)
			}
			// The request was sound, so the same connection goes on.
			w.send("GET http://" + good + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
			if res, body := w.response("GET"); res.StatusCode != 200 || body != "127.0.0.1 /" {
				t.Errorf("the next good request: %s %q", res.Status, body)
			}
		})
	}
}

// Section 3's table and section 4's answers, over forward and CONNECT, by the
// real door.
func TestRefusals(t *testing.T) {
	t.Parallel()
	globs, err := selection.ParseGlobs([]string{"out/a", "out/b", "out/off"})
	if err != nil {
		t.Fatal(err)
	}
	g := rig.Group(t, auth.User{Name: "x", Allow: globs})
	r := newProxy(t, func(o *httpproxy.Options) { o.Group = g })
	at := origin(t, whoami)
	_, port, _ := net.SplitHostPort(at)
	const user = "Proxy-Authorization: Basic eDpzZWNyZXQ=\r\n" // x:secret
	for _, tt := range []struct {
		name, host, fields string
		status             int
		kind               string
	}{
		{"no credentials", "127.0.0.1", "", 407, "http_request_denied"},
		{"wrong password", "127.0.0.1", "Proxy-Authorization: Basic eDp5\r\n", 407, "http_request_denied"},
		{"unknown user", "127.0.0.1", "Proxy-Authorization: Basic eTpzZWNyZXQ=\r\n", 407, "http_request_denied"},
		{"malformed credentials", "127.0.0.1", "Proxy-Authorization: Basic !!\r\n", 407, "http_request_denied"},
		{"other scheme", "127.0.0.1", "Proxy-Authorization: Bearer x\r\n", 407, "http_request_denied"},
		{"authentication comes first", "127.0.0.1", "X-Egress-Path: {\r\n", 407, "http_request_denied"},
		{"broken JSON", "127.0.0.1", user + "X-Egress-Path: {\r\n", 400, "http_request_error"},
		{"empty", "127.0.0.1", user + "X-Egress-Path:\r\n", 400, "http_request_error"},
		{"copies differ", "127.0.0.1", user + "X-Egress-Path: a\r\nX-Egress-Path: b\r\n", 400, "http_request_error"},
		{"over 64 bits", "127.0.0.1", user + "X-Egress-Path: 18446744073709551616\r\n", 400, "http_request_error"},
		{"unknown ID", "127.0.0.1", user + "X-Egress-Path: zz\r\n", 400, "http_request_error"},
		{"not passed", "127.0.0.1", user + "X-Egress-Path: {\"other\":1}\r\n", 400, "http_request_error"},
		{"forbidden", "127.0.0.1", user + "X-Egress-Path: c\r\n", 403, "http_request_denied"},
		{"down", "127.0.0.1", user + "X-Egress-Path: off\r\n", 503, "destination_unavailable"},
		{"prohibited", "127.9.0.1", user, 403, "destination_ip_prohibited"},
		{"no such name", "gone.test", user, 502, "dns_error"},
		{"name servers silent", "slow.test", user, 504, "dns_timeout"},
		{"refused", "127.0.0.7", user, 502, "connection_refused"},
		{"family", "[::1]", user + "X-Egress-Path: a\r\n", 502, "destination_ip_unroutable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := r.dial()
			target := tt.host + ":" + port
			ok := "GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\n" + user + "X-Egress-Path: b\r\n\r\n"
			check := func(res *http.Response, body string) {
				t.Helper()
				if res.StatusCode != tt.status || !strings.HasPrefix(res.Header.Get("Proxy-Status"), "wayout; error="+tt.kind+"; details=\"") {
					t.Errorf("got %s, Proxy-Status %q", res.Status, res.Header.Get("Proxy-Status"))
				}
				if (res.Header.Get("Retry-After") == "1") != (tt.status == 503) {
					t.Errorf("Retry-After %q", res.Header.Get("Retry-After"))
				}
				if (res.Header.Get("Proxy-Authenticate") == `Basic realm="wayout"`) != (tt.status == 407) {
					t.Errorf("Proxy-Authenticate %q", res.Header.Get("Proxy-Authenticate"))
				}
				if len(body) < 10 || res.Header.Get("Content-Type") == "" {
					t.Errorf("body %q", body)
				}
			}
			// A forwarded request without a body leaves the connection usable.
			w.send("GET http://" + target + "/ HTTP/1.1\r\nHost: x\r\n" + tt.fields + "\r\n")
			check(w.response("GET"))
			w.send(ok)
			if res, body := w.response("GET"); body != "127.0.0.2 /" {
				t.Errorf("the next good request: %s %q", res.Status, body)
			}
			// With a body that has come it does too.
			w.send("POST http://" + target + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n" + tt.fields + "\r\nhi" + ok)
			check(w.response("POST"))
			if res, body := w.response("GET"); body != "127.0.0.2 /" {
				t.Errorf("the next good request: %s %q", res.Status, body)
			}
			// HEAD's answer has no body.
			w.send("HEAD http://" + target + "/ HTTP/1.1\r\nHost: x\r\n" + tt.fields + "\r\n")
			if res, _ := w.response("HEAD"); res.StatusCode != tt.status {
				t.Errorf("HEAD: %s", res.Status)
			}
			// After CONNECT it ends: what follows may be meant for the tunnel.
			w.send("CONNECT " + target + " HTTP/1.1\r\nHost: x\r\n" + tt.fields + "\r\n" + ok)
			check(w.response("CONNECT"))
			w.ended()
		})
	}
}

// With a body that has not come, a refusal ends the connection and is not lost.
func TestRefusedBeforeBody(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	w := r.dial()
	w.send("POST http://gone.test/ HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
	w.send(strings.Repeat("x", 100000))
	if res, _ := w.response("POST"); res.StatusCode != 502 || !res.Close {
		t.Errorf("got %s, close %v", res.Status, res.Close)
	}
	w.ended()
}

// Errors that the test's own network cannot be made to give.
func TestAnswerTable(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err    error
		status int
		kind   string
		retry  bool
	}{
		{selection.ErrDisabled, 400, "http_request_error", false},
		{selection.ErrNotPassed, 400, "http_request_error", false},
		{selection.ErrBind, 503, "proxy_internal_error", false},
		{selection.ErrPorts, 503, "connection_limit_reached", false},
		{selection.ErrFamily, 502, "destination_ip_unroutable", false},
		{escaper.ErrNoPath, 503, "destination_unavailable", true},
		{escaper.ErrReset, 502, "connection_terminated", false},
		{escaper.ErrUnreachable, 502, "destination_ip_unroutable", false},
		{escaper.ErrTimeout, 504, "connection_timeout", false},
		{escaper.ErrGuarded, 503, "proxy_internal_error", false},
		{escaper.ErrClosed, 503, "destination_unavailable", true},
		{syscall.EMFILE, 503, "proxy_internal_error", true},
		{errors.New("a \"quoted\" \\ and\r\n\xff"), 500, "proxy_internal_error", false},
	} {
		r := newProxy(t, func(o *httpproxy.Options) {
			o.Open = func(context.Context, *escaper.Request) (*escaper.Conn, error) {
				return nil, fmt.Errorf("open: %w", tt.err)
			}
		})
		for _, req := range []string{"GET http://origin.test/", "CONNECT origin.test:80"} {
			w := r.dial()
			w.send(req + " HTTP/1.1\r\nHost: x\r\n\r\n")
			res, body := w.response("GET")
			want := "wayout; error=" + tt.kind + "; details=\"open: "
			if ps := res.Header.Get("Proxy-Status"); res.StatusCode != tt.status || !strings.HasPrefix(ps, want) {
				t.Errorf("%v: got %s, Proxy-Status %q", tt.err, res.Status, ps)
			}
			if (res.Header.Get("Retry-After") == "1") != tt.retry {
				t.Errorf("%v: Retry-After %q", tt.err, res.Header.Get("Retry-After"))
			}
			if tt.status == 500 && !strings.HasSuffix(res.Header.Get("Proxy-Status"), `a \"quoted\" \\ and???"`) {
				t.Errorf("Proxy-Status %q", res.Header.Get("Proxy-Status"))
			}
			if !strings.HasPrefix(body, "wayout: open: ") {
				t.Errorf("body %q", body)
			}
		}
	}
}

func TestOperatorsMapWins(t *testing.T) {
	t.Parallel()
	g := rig.Group(t, auth.User{Name: "x", Selection: selection.Layer{{Escaper: "out", Value: selection.ID("b")}}})
	r := newProxy(t, func(o *httpproxy.Options) {
		o.Group = g
		o.ServerSelection = func(netip.AddrPort) selection.Layer {
			return selection.Layer{{Escaper: "out", Value: selection.ID("c")}}
		}
	})
	at := origin(t, whoami)
	w := r.dial()
	w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic eDpzZWNyZXQ=\r\nX-Egress-Path: a\r\n\r\n")
	if _, body := w.response("GET"); body != "127.0.0.2 /" {
		t.Error(body)
	}
	if rec := r.Record(0); rec.User != "x" || rec.Choice.Source != selection.SourceUser {
		t.Errorf("record %+v", rec)
	}
}

// What the record says of a selection that could not be read.
func TestRecordOfMalformed(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	w := r.dial()
	w.send("GET http://origin.test/ HTTP/1.1\r\nHost: x\r\nX-Egress-Path: {x\r\n\r\n")
	w.response("GET")
	rec := r.Record(0)
	if rec.Choice.Source != selection.SourceHeader || rec.Choice.Asked != "{x" || selection.Result(rec.Err) != "malformed" ||
		rec.Status != 400 || rec.Method != "GET" || rec.Target != "origin.test:80" {
		t.Errorf("record %+v", rec)
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	engine, err := relay.New(relay.Options{Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = engine.Close() }()
	open := func(context.Context, *escaper.Request) (*escaper.Conn, error) { return nil, escaper.ErrClosed }
	if _, err := httpproxy.New(httpproxy.Options{Open: open, Relay: engine, SelectionHeader: "X-Path"}); err != nil {
		t.Fatal(err)
	}
	for _, o := range []httpproxy.Options{
		{Relay: engine},
		{Open: open},
		{Open: open, Relay: engine, SelectionHeader: "Host"},
		{Open: open, Relay: engine, SelectionHeader: "content-length"},
		{Open: open, Relay: engine, SelectionHeader: "Proxy-Authorization"},
		{Open: open, Relay: engine, SelectionHeader: "X Path"},
	} {
		if _, err := httpproxy.New(o); err == nil {
			t.Errorf("accepted: header %q, door %v, relay %v", o.SelectionHeader, o.Open != nil, o.Relay != nil)
		}
	}
}

// TestNoRoom refuses before credentials are looked at, and ends the client's
// connection; when there is room again a request is served.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	var full atomic.Bool
	full.Store(true)
	r := newProxy(t, func(o *httpproxy.Options) {
		o.Group = rig.Group(t, auth.User{Name: "alice"})
		o.Admit = func() error {
			if full.Load() {
				return errors.New("out of everything")
			}
			return nil
		}
	})
	at := origin(t, whoami)
	for _, request := range []string{
		"GET http://" + at + "/ HTTP/1.1\r\nHost: " + at + "\r\n\r\n",
		"CONNECT " + at + " HTTP/1.1\r\nHost: " + at + "\r\n\r\n",
	} {
		w := r.dial()
		w.send(request)
		res, _ := w.response("GET")
		if res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") != "1" ||
			!strings.Contains(res.Header.Get("Proxy-Status"), "error=connection_limit_reached;") {
			t.Errorf("%q: %d %v", request, res.StatusCode, res.Header)
		}
		w.ended()
	}
	full.Store(false)
	w := r.dial()
	w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: " + at + "\r\n\r\n")
	if res, _ := w.response("GET"); res.StatusCode != http.StatusProxyAuthRequired {
		t.Errorf("with room: %d", res.StatusCode)
	}
}
