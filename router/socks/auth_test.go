package socks_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/router/relay"
	"wayout/router/socks"
	"wayout/scripts/lab/rig"
	"wayout/selection"
)

func TestAuthentication(t *testing.T) {
	at := origin(t, "127.0.0.1")
	to := addr(t, at.String())
	far := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	r := newProxy(t, func(o *socks.Options) {
		o.Group = rig.Group(t, auth.User{Name: "al"}, auth.User{Name: "bo", From: far}, auth.User{Name: "net", From: far})
	})
	n := 0
	for _, c := range []struct {
		name, say, want string
		status          int
	}{
		{"password not offered", hello, "\x05\xff", 407},
		{"wrong password", "\x05\x01\x02" + credentials("al", "wrong"), "\x05\x02\x01\x01", 407},
		{"unknown user", "\x05\x01\x02" + credentials("nobody", "secret"), "\x05\x02\x01\x01", 407},
		{"empty name", "\x05\x01\x02" + credentials("", "secret"), "\x05\x02\x01\x01", 407},
		{"empty password", "\x05\x01\x02" + credentials("al", ""), "\x05\x02\x01\x01", 407},
		{"from elsewhere", "\x05\x01\x02" + credentials("bo", "secret"), "\x05\x02\x01\x01", 407},
		{"known by a network only", "\x05\x01\x02" + credentials("net", "secret"), "\x05\x02\x01\x01", 407},
		{"of another version", "\x05\x01\x02" + "\x05" + credentials("al", "secret")[1:], "\x05\x02\x01\x01", 400},
		{"that ends early", "\x05\x01\x02" + credentials("al", "secret")[:5], "\x05\x02\x01\x01", 400},
		{"parameters that are off", "\x05\x01\x02" + credentials("al-path-b", "secret"), "\x05\x02\x01\x01", 407},
		{"SOCKS4", "\x04\x01\x00\x50\x7f\x00\x00\x01al\x00", reply4, 407},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := r.dial()
			w.send(c.say)
			_ = w.CloseWrite()
			w.expect(c.want)
			w.ended()
			if rec := r.Record(n); rec.Status != c.status || rec.Err == nil || rec.User != "" {
				t.Errorf("record %+v", rec)
			}
			r.good("\x05\x02\x00\x02"+credentials("al", "secret")+connect(to), 14)
			if rec := r.Record(n + 1); rec.Status != 200 || rec.User != "al" {
				t.Errorf("record of the good one: %+v", rec)
			}
			n += 2
		})
	}
}

// TestRequest is what the door is asked.
func TestRequest(t *testing.T) {
	globs, err := selection.ParseGlobs([]string{"out/*"})
	if err != nil {
		t.Fatal(err)
	}
	var got *escaper.Request
	stop := errors.New("enough")
	r := newProxy(t, func(o *socks.Options) {
		o.Extension, o.UsernameParams = true, true
		o.Group = rig.Group(t, auth.User{Name: "a-l", Selection: selection.Layer{{Escaper: "x", Value: selection.Index(1)}}, Allow: globs})
		o.Open = func(_ context.Context, q *escaper.Request) (*escaper.Conn, error) {
			got = q
			return nil, stop
		}
	})
	w := r.dial()
	w.send("\x05\x01\xe9" + extension(`{"out":"b","in":3}`, "\x02") +
		credentials("a-l-path-in~a-session-s1-lifetime-10-strict-on", "secret") + connect(domain("Host.test", 443)))
	w.expect("\x05\xe9\x01\x00\x02\x01\x00" + refused(1))
	w.ended()
	if rec := r.Record(0); !errors.Is(rec.Err, stop) || rec.User != "a-l" || rec.Target != "Host.test:443" {
		t.Errorf("record %+v", rec)
	}
	if got.Server != "socks" || got.Escaper != "out" || got.Client.String() != w.LocalAddr().String() || got.Local.String() != r.Addr ||
		got.Group != "team" || got.User != "a-l" || got.Allow != globs || got.Target != (escaper.Target{Host: "Host.test", Port: 443}) || got.Reuse {
		t.Errorf("request %+v", got)
	}
	for e, want := range map[string]selection.Source{"x": selection.SourceUser, "out": selection.SourceSOCKS, "in": selection.SourceSOCKS} {
		if _, src, ok := got.Selection.For(e); !ok || src != want {
			t.Errorf("%s is selected by %s, not %s", e, src, want)
		}
	}
	if s := got.Selection.Session; s.Name != "s1" || s.Lifetime.Minutes() != 10 || !s.Strict {
		t.Errorf("session %+v", s)
	}
	if l := got.Selection.Username; len(l) != 1 || l[0] != (selection.Entry{Escaper: "in", Value: selection.ID("a")}) {
		t.Errorf("layer %+v", l)
	}
}

func TestUsernameParams(t *testing.T) {
	at := origin(t, "127.0.0.1")
	to := addr(t, at.String())
	r := newProxy(t, func(o *socks.Options) {
		o.UsernameParams = true
		o.Group = rig.Group(t, auth.User{Name: "al"})
		o.Vet = func(q *escaper.Request) error {
			if v, _, _ := q.Selection.For("out"); v.String() == "127.0.0.77" {
				return selection.Refuse(selection.ErrMalformed, "the path has another address")
			}
			return nil
		}
	})
	n := 0
	for _, name := range []string{
		"al-path-b", "al-path-2", "al-path-out~b", "al-ip-127.0.0.2", "al-path-b-session-x",
	} {
		w := r.dial()
		w.send("\x05\x01\x02" + credentials(name, "secret") + connect(to))
		w.expect("\x05\x02\x01\x00\x05\x00\x00")
		w.take(7)
		if seen := w.banner(); seen.Addr().String() != "127.0.0.2" {
			t.Errorf("%s: the origin sees %s", name, seen)
		}
		_ = w.CloseWrite()
		w.ended()
		if rec := r.Record(n); rec.Choice.Source != selection.SourceUsername || rec.User != "al" || rec.Choice.Path != "out/b" {
			t.Errorf("%s: record %+v", name, rec)
		}
		n++
	}
	for _, c := range []struct {
		name, password string
		status         int
	}{
		{"al-path-", "secret", 400},
		{"al-path-b-path-a", "secret", 400},
		{"al-path-b-session-", "secret", 400},
		{"al-lifetime-5", "secret", 400},
		{"al-strict-on", "secret", 400},
		{"al-session-x-strict-maybe", "secret", 400},
		{"al-session-x-lifetime-5w", "secret", 400},
		{"al-path-" + strings.Repeat("x", 65), "secret", 400},
		{"al-path-a b", "secret", 400},
		{"al-ip-nowhere", "secret", 400},
		{"al-ip-127.0.0.77", "secret", 400}, // by Vet
		// The password comes first.
		{"al-path-", "wrong", 407},
		{"bo-path-b", "secret", 407},
		{"-path-b", "secret", 407},
		{"al-path", "secret", 407},
	} {
		w := r.dial()
		w.send("\x05\x01\x02" + credentials(c.name, c.password))
		w.expect("\x05\x02\x01\x01")
		w.ended()
		rec := r.Record(n)
		if rec.Status != c.status || errors.Is(rec.Err, selection.ErrMalformed) != (c.status == 400) {
			t.Errorf("%s: record %+v", c.name, rec)
		}
		if c.status == 400 && (rec.Choice.Source != selection.SourceUsername || rec.User != "al") {
			t.Errorf("%s: record %+v", c.name, rec)
		}
		n++
	}
}

func TestAuthBusy(t *testing.T) {
	gate := auth.NewGate(1)
	const hash = "$2a$04$g.yx1OfOprMqm3sT0oGFcOaPxgBQaTp9Kx0TD1jh672cPqKeABM0e"
	g, err := auth.NewGroup("team", []auth.Credential{{User: auth.User{Name: "al"}, Hash: hash}}, auth.Options{Gate: gate})
	if err != nil {
		t.Fatal(err)
	}
	r := newProxy(t, func(o *socks.Options) {
		o.Group = g
		o.Timeouts.Auth = 1 // a nanosecond: the check cannot be in time
	})
	w := r.dial()
	w.send("\x05\x01\x02" + credentials("al", "secret"))
	w.expect("\x05\x02\x01\x01")
	w.ended()
	if rec := r.Record(0); rec.Status != 503 || !errors.Is(rec.Err, context.DeadlineExceeded) {
		t.Errorf("record %+v", rec)
	}
}

// TestMixed: HTTP, SOCKS4 and SOCKS5 on one port, drained as one.
func TestMixed(t *testing.T) {
	at := origin(t, "127.0.0.1")
	port := string([]byte{byte(at.Port() >> 8), byte(at.Port())})
	var front *relay.Front
	var http *httpproxy.Server
	r := newProxy(t, func(o *socks.Options) {
		front = relay.NewFront(relay.FrontOptions{Name: "any", Relay: o.Relay})
		o.Front = front
		var err error
		http, err = httpproxy.New(httpproxy.Options{Name: "any", Escaper: "out", Open: o.Open, Relay: o.Relay, Front: front})
		if err != nil {
			t.Fatal(err)
		}
	})
	m := &relay.Mixed{Front: front, Begin: func(first byte) func(*relay.Task, relay.Accepted) {
		if first == 4 || first == 5 {
			return r.server.Begin
		}
		return http.Begin
	}}
	l := rig.Listen(t, "127.0.0.1")
	served := make(chan error, 1)
	go func() { served <- m.Serve(l) }()
	silent := dial(t, l.Addr().String()) // accepted before those that follow
	var open []*wire
	for _, c := range []struct {
		say    string
		answer int
	}{
		{hello + connect(addr(t, at.String())), 12},
		{"\x04\x01" + port + "\x7f\x00\x00\x01\x00", 8},
		{"CONNECT " + at.String() + " HTTP/1.1\r\nHost: x\r\n\r\n", len("HTTP/1.1 200 Connection established\r\n\r\n")},
	} {
		w := dial(t, l.Addr().String())
		w.send(c.say)
		if got := w.take(c.answer); len(got) != c.answer {
			t.Fatalf("%q is answered with %q", c.say, got)
		}
		w.banner()
		open = append(open, w)
	}
	if err := front.Quiesce(); err != nil {
		t.Fatal(err)
	}
	silent.ended()
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- front.Shutdown(context.Background()) }()
	for _, w := range open {
		w.send("still there")
		w.expect("still there")
		_ = w.CloseWrite()
		w.ended()
	}
	if err := <-done; err != nil {
		t.Errorf("shutdown: %v", err)
	}
}
