package httpproxy_test

import (
	"context"
	"encoding/base64"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/scripts/lab/rig"
	"wayout/selection"
)

// basic is the field that brings credentials.
func basic(name, password string) string {
	return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"+password)) + "\r\n"
}

// both asks for a URL's origin by forward request and by CONNECT.
func both(at, fields string) map[string]string {
	return map[string]string{
		"GET":     "GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n",
		"CONNECT": "CONNECT " + at + " HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n",
	}
}

func TestUsernameParams(t *testing.T) {
	t.Parallel()
	at := origin(t, whoami)
	r := newProxy(t, func(o *httpproxy.Options) {
		o.UsernameParams = true
		o.Group = rig.Group(t, auth.User{Name: "a-l"})
		o.Vet = func(q *escaper.Request) error {
			if v, _, _ := q.Selection.For("out"); v.String() == "127.0.0.77" {
				return selection.Refuse(selection.ErrMalformed, "not the path's address")
			}
			return nil
		}
	})
	for _, name := range []string{"a-l-path-b", "a-l-path-2", "a-l-path-out~b", "a-l-ip-127.0.0.2", "a-l-path-b-session-x-lifetime-1h"} {
		w := r.dial()
		w.send(both(at, basic(name, "secret"))["GET"])
		if res, body := w.response("GET"); body != "127.0.0.2 /" {
			t.Errorf("%s: %s %q", name, res.Status, body)
		}
	}
	// The header is stronger.
	w := r.dial()
	w.send(both(at, basic("a-l-path-b", "secret")+"X-Egress-Path: c\r\n")["GET"])
	if res, body := w.response("GET"); body != "127.0.0.3 /" {
		t.Errorf("with a header: %s %q", res.Status, body)
	}
	for _, c := range []struct {
		name, password, fields string
		status                 int
	}{
		{"a-l-path-", "secret", "", 400},
		{"a-l-path-b-path-c", "secret", "", 400},
		{"a-l-lifetime-5", "secret", "", 400},
		{"a-l-session-x-strict-maybe", "secret", "", 400},
		{"a-l-path-" + strings.Repeat("x", 65), "secret", "", 400},
		{"a-l-ip-nowhere", "secret", "", 400},
		{"a-l-ip-127.0.0.77", "secret", "", 400}, // by Vet
		{"a-l-path-zz", "secret", "", 400},       // by the door
		{"a-l-path-off", "secret", "", 503},
		// The password comes first, and BASE is all that it belongs to.
		{"a-l-path-", "wrong", "", 407},
		{"b-path-b", "secret", "", 407},
		{"-path-b", "secret", "", 407},
		{"a-l-path", "secret", "", 407},
		{"a-l-path-", "secret", "X-Egress-Path: {\r\n", 400},
	} {
		for method, req := range both(at, basic(c.name, c.password)+c.fields) {
			w := r.dial()
			w.send(req)
			if res, body := w.response(method); res.StatusCode != c.status {
				t.Errorf("%s %s: %s %q", method, c.name, res.Status, body)
			}
		}
	}
	// What the record says of them.
	n := r.Records()
	w = r.dial()
	w.send(both(at, basic("a-l-path-", "secret"))["GET"])
	w.response("GET")
	if rec := r.Record(n); rec.User != "a-l" || rec.Choice.Source != selection.SourceUsername || rec.Choice.Asked != "-path-" {
		t.Errorf("record %+v", rec)
	}
}

// TestSession is handed on with the request.
func TestSession(t *testing.T) {
	t.Parallel()
	var got *escaper.Request
	r := newProxy(t, func(o *httpproxy.Options) {
		o.UsernameParams = true
		o.Group = rig.Group(t, auth.User{Name: "al"})
		o.Open = func(_ context.Context, q *escaper.Request) (*escaper.Conn, error) {
			got = q
			return nil, errors.New("enough")
		}
	})
	w := r.dial()
	w.send(both("127.0.0.1:1", basic("al-sid-s1-sesstime-10-strict-on-path-in~7", "secret"))["GET"])
	w.response("GET")
	if s := got.Selection.Session; s != (selection.Session{Name: "s1", Lifetime: 10 * time.Minute, Strict: true}) {
		t.Errorf("session %+v", s)
	}
	if l := got.Selection.Username; len(l) != 1 || l[0] != (selection.Entry{Escaper: "in", Value: selection.Index(7)}) {
		t.Errorf("layer %+v", l)
	}
}

func TestUsersByNetwork(t *testing.T) {
	t.Parallel()
	at := origin(t, whoami)
	here, elsewhere := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	users := func(from []netip.Prefix) *auth.Group {
		return rig.Group(t,
			auth.User{Name: "net", From: from, Selection: selection.Layer{{Escaper: "out", Value: selection.ID("b")}}},
			auth.User{Name: "al"}, auth.User{Name: "bo", From: elsewhere},
		)
	}
	for _, c := range []struct {
		name, fields, user string
		from               []netip.Prefix
		status             int
	}{
		{"no credentials, known by the network", "", "net", here, 200},
		{"no credentials, not known", "", "", elsewhere, 407},
		{"credentials are stronger", basic("al", "secret"), "al", here, 200},
		{"wrong credentials stay wrong", basic("al", "wrong"), "", here, 407},
		{"a password from elsewhere", basic("bo", "secret"), "", here, 407},
		{"a user without a password", basic("net", "secret"), "", here, 407},
	} {
		r := newProxy(t, func(o *httpproxy.Options) { o.Group = users(c.from) })
		w := r.dial()
		w.send(both(at, c.fields)["GET"])
		res, body := w.response("GET")
		if rec := r.Record(0); res.StatusCode != c.status || rec.User != c.user {
			t.Errorf("%s: %s, record %+v", c.name, res.Status, rec)
		}
		if c.user == "net" && body != "127.0.0.2 /" {
			t.Errorf("%s: %q", c.name, body)
		}
	}
}

// TestLimits: a tunnel counts until it ends, a request until its response has.
func TestLimits(t *testing.T) {
	t.Parallel()
	at, far := origin(t, whoami), echo(t)
	server := auth.NewMeter(auth.Limits{Connections: 2}, nil)
	user := auth.NewMeter(auth.Limits{Connections: 1}, nil)
	r := newProxy(t, func(o *httpproxy.Options) {
		o.Group = rig.Group(t, auth.User{Name: "al", Meter: user}, auth.User{Name: "bo"})
		o.Meter = server
	})
	al, bo := basic("al", "secret"), basic("bo", "secret")
	limited := func(fields string) {
		t.Helper()
		for method, req := range both(at, fields) {
			w := r.dial()
			w.send(req)
			res, _ := w.response(method)
			if n, err := strconv.Atoi(res.Header.Get("Retry-After")); res.StatusCode != 429 || err != nil || n < 1 ||
				!strings.HasPrefix(res.Header.Get("Proxy-Status"), "wayout; error=http_request_denied;") {
				t.Errorf("%s: %s %v", method, res.Status, res.Header)
			}
		}
	}
	free := func() {
		t.Helper()
		if !within(func() bool { return server.Open() == 0 && user.Open() == 0 }) {
			t.Errorf("%d and %d are counted when all is over", server.Open(), user.Open())
		}
	}
	open := func(fields string) *wire {
		w := r.dial()
		w.send(both(far, fields)["CONNECT"] + "x")
		w.expect("HTTP/1.1 200 Connection established\r\n\r\nx")
		return w
	}
	first := open(al)
	limited(al)
	second := open(bo)
	limited(bo)
	_, _ = first.CloseWrite(), second.CloseWrite()
	free()
	// One after the other, on one connection, never are two.
	w := r.dial()
	for range 3 {
		w.send(both(at, al)["GET"])
		if res, _ := w.response("GET"); res.StatusCode != 200 {
			t.Errorf("got %s", res.Status)
		}
		free()
	}
	// What is refused for another reason counts no longer either.
	w.send(both("127.0.0.7:1", al)["GET"])
	if res, _ := w.response("GET"); res.StatusCode != 502 {
		t.Errorf("got %s", res.Status)
	}
	free()
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

// TestServerSelection is asked once for each request, with the address that
// the client connected to.
func TestServerSelection(t *testing.T) {
	t.Parallel()
	at := origin(t, whoami)
	var mu sync.Mutex
	var asked []string
	r := newProxy(t, func(o *httpproxy.Options) {
		o.ServerSelection = func(local netip.AddrPort) selection.Layer {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, local.String())
			return selection.Layer{{Escaper: "out", Value: selection.ID("bcb"[len(asked)-1:][:1])}}
		}
	})
	w := r.dial()
	for _, want := range []string{"127.0.0.2 /", "127.0.0.3 /"} {
		w.send(both(at, "")["GET"])
		if res, body := w.response("GET"); body != want {
			t.Errorf("got %s %q, want %q", res.Status, body, want)
		}
	}
	w.send(both(net.JoinHostPort("127.0.0.1", "1"), "X-Egress-Path: a\r\n")["GET"])
	w.response("GET")
	mu.Lock()
	defer mu.Unlock()
	if len(asked) != 3 || asked[0] != r.Addr || asked[2] != r.Addr {
		t.Errorf("asked for %v", asked)
	}
	if rec := r.Record(0); rec.Choice.Source != selection.SourceServer {
		t.Errorf("record %+v", rec)
	}
}
