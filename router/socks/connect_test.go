package socks_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/socks"
	"wayout/router/socks/client"
	"wayout/scripts/lab/rig"
	"wayout/selection"
)

// message is what a client says, and how many bytes it is answered with.
type message struct {
	say    string
	answer int
}

// ways are how a client's messages may arrive.
func ways() map[string]func(w *wire, all []message, extra string) string {
	return map[string]func(w *wire, all []message, extra string) string{
		"in turn": func(w *wire, all []message, extra string) string {
			got := ""
			for _, m := range all {
				w.send(m.say)
				got += w.take(m.answer)
			}
			w.send(extra)
			return got
		},
		"byte by byte": func(w *wire, all []message, extra string) string {
			got := ""
			for _, m := range all {
				for i := range len(m.say) {
					w.send(m.say[i : i+1])
					if i%7 == 0 {
						time.Sleep(time.Millisecond) // for segments of their own; nothing depends on it
					}
				}
				got += w.take(m.answer)
			}
			w.send(extra)
			return got
		},
		"in one segment": func(w *wire, all []message, extra string) string {
			say, n := "", 0
			for _, m := range all {
				say += m.say
				n += m.answer
			}
			w.send(say + extra)
			return w.take(n)
		},
	}
}

func TestConnect(t *testing.T) {
	r := newProxy(t, func(o *socks.Options) {
		o.Extension = true
		o.Group = rig.Group(t, auth.User{Name: "al"}, auth.User{Name: "net", From: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})
	})
	four, six := origin(t, "127.0.0.1"), origin(t, "::1")
	port := string([]byte{byte(four.Port() >> 8), byte(four.Port())})
	pw := message{credentials("al", "secret"), 2}
	n := 0
	for _, c := range []struct {
		name string
		all  []message
		from string // the address that the origin sees
	}{
		{"IPv4", []message{{hello, 2}, {connect(addr(t, four.String())), 10}}, "127.0.0.1"},
		{"IPv6", []message{{hello, 2}, {connect(addr(t, six.String())), 22}}, "::1"},
		{"IPv4 in IPv6", []message{{hello, 2}, {connect("\x04" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01" + port), 10}}, "127.0.0.1"},
		{"name", []message{{hello, 2}, {connect(domain("origin.test", four.Port())), 10}}, "127.0.0.1"},
		{"IPv4 as a name", []message{{hello, 2}, {connect(domain("127.0.0.1", four.Port())), 10}}, "127.0.0.1"},
		{"IPv6 as a name", []message{{hello, 2}, {connect(domain("::1", six.Port())), 22}}, "::1"},
		{"many methods", []message{{"\x05\xff" + strings.Repeat("\x80", 254) + "\x00", 2}, {connect(addr(t, four.String())), 10}}, "127.0.0.1"},
		{"password", []message{{"\x05\x02\x00\x02", 2}, pw, {connect(addr(t, four.String())), 10}}, "127.0.0.1"},
		{"extension", []message{{"\x05\x02\x00\xe9", 2}, {extension("b", "\x00"), 3}, {connect(addr(t, four.String())), 10}}, "127.0.0.2"},
		{"extension and password", []message{{"\x05\x01\xe9", 2}, {extension(" 2\t", "\x00\x02"), 3}, pw, {connect(addr(t, four.String())), 10}}, "127.0.0.2"},
		{"the longest extension", []message{
			{"\x05\x01\xe9", 2},
			{extension(strings.Repeat(" ", 2000)+"b"+strings.Repeat(" ", 2095), strings.Repeat("\x01", 254)+"\x02"), 3},
			pw,
			{connect(addr(t, four.String())), 10},
		}, "127.0.0.2"},
		{"SOCKS4", []message{{"\x04\x01" + port + "\x7f\x00\x00\x01me\x00", 8}}, "127.0.0.1"},
		{"SOCKS4a", []message{{"\x04\x01" + port + "\x00\x00\x00\x07\x00origin.test\x00", 8}}, "127.0.0.1"},
		{"SOCKS4a with an address", []message{{"\x04\x01" + port + "\x00\x00\x00\x01\x00127.0.0.1\x00", 8}}, "127.0.0.1"},
	} {
		for way, talk := range ways() {
			t.Run(c.name+", "+way, func(t *testing.T) {
				w := r.dial()
				got := talk(w, c.all, "early")
				if last := got[max(0, len(got)-c.all[len(c.all)-1].answer):]; len(last) < 8 || last[1] != 0 && last[1] != 0x5a {
					t.Fatalf("answered with %x", got)
				}
				seen := w.banner()
				w.expect("early")
				w.send("late")
				w.expect("late")
				if seen.Addr().String() != c.from {
					t.Errorf("the origin sees %s", seen)
				}
				last := got[len(got)-c.all[len(c.all)-1].answer:]
				if bound := boundOf(t, last); bound != seen {
					t.Errorf("the reply says %s (%x), the origin %s", bound, last, seen)
				}
				_ = w.CloseWrite()
				w.ended()
				rec := r.Record(n)
				n++
				if rec.Status != 200 || rec.Err != nil || rec.Method != "CONNECT" || rec.Source != seen || rec.Server != "socks" ||
					rec.BytesOut != 9 || rec.BytesIn != int64(len(seen.String())+1+9) || rec.Client.String() != w.LocalAddr().String() {
					t.Errorf("record %+v", rec)
				}
				if user := "net"; strings.Contains(c.name, "password") == (rec.User == user) && c.name != "the longest extension" {
					t.Errorf("user %q", rec.User)
				}
			})
		}
	}
}

// boundOf reads the address of a reply of either version.
func boundOf(t *testing.T, reply string) netip.AddrPort {
	t.Helper()
	if reply[0] == 0 {
		if reply[1] != 0x5a {
			t.Fatalf("reply %x", reply)
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte([]byte(reply[4:]))), uint16(reply[2])<<8|uint16(reply[3]))
	}
	if !strings.HasPrefix(reply, "\x05\x00\x00") {
		t.Fatalf("reply %x", reply)
	}
	a, n, err := client.ParseAddr([]byte(reply[3:]))
	if err != nil || n != len(reply)-3 {
		t.Fatalf("reply %x: %v", reply, err)
	}
	return a.AddrPort()
}

// TestMalformed: each gets its answer and the end of its connection, and the
// next client is served.
func TestMalformed(t *testing.T) {
	at := origin(t, "127.0.0.1")
	to := addr(t, at.String())
	r := newProxy(t, func(o *socks.Options) {
		o.Extension = true
		o.Timeouts.Linger = 50 * time.Millisecond
	})
	long := strings.Repeat("x", 256)
	n := 0
	for _, c := range []struct {
		name, say, want string
		status          int
	}{
		{"another protocol", "GET / HTTP/1.1\r\n\r\n", "", 400},
		{"another version", "\x06\x01\x00", "", 400},
		{"zero", "\x00", "", 400},
		{"no methods", "\x05\x00", "\x05\xff", 407},
		{"no method that fits", "\x05\x02\x01\x02", "\x05\xff", 407},
		{"a greeting that ends early", "\x05\x02\x00", "", 400},
		{"a version alone", "\x05", "", 400},
		{"request of another version", hello + "\x04\x01\x00" + to, fine + refused(1), 400},
		{"a request that ends early", hello + connect(to[:len(to)-1]), fine + refused(1), 400},
		{"unknown address type", hello + connect("\x02\x7f\x00\x00\x01\x00\x50"), fine + refused(8), 400},
		{"address type 0", hello + connect("\x00\x00\x50"), fine + refused(8), 400},
		{"empty name", hello + connect("\x03\x00\x00\x50"), fine + refused(1), 400},
		{"name with a space", hello + connect(domain("a b", 80)), fine + refused(1), 400},
		{"name with NUL", hello + connect(domain("a\x00b", 80)), fine + refused(1), 400},
		{"name with a line end", hello + connect(domain("a\r\nb", 80)), fine + refused(1), 400},
		{"odd spelling of an address", hello + connect(domain("127.1", 80)), fine + refused(1), 400},
		{"address with a zone", hello + connect(domain("fe80::1%lo", 80)), fine + refused(1), 400},
		{"port 0", hello + connect(addr(t, "127.0.0.1:0")), fine + refused(1), 400},
		{"BIND", hello + "\x05\x02\x00" + to, fine + refused(7), 501},
		{"command 0", hello + "\x05\x00\x00" + to, fine + refused(7), 501},
		{"command 255", hello + "\x05\xff\x00" + to, fine + refused(7), 501},
		{"ASSOCIATE where there is none", hello + "\x05\x03\x00" + to, fine + refused(7), 501},

		{"extension of another version", "\x05\x01\xe9\x02\x00\x01a\x01\x00", "\x05\xe9\x01\x01\xff", 400},
		{"extension without payload", "\x05\x01\xe9" + extension("", "\x00"), "\x05\xe9\x01\x01\xff", 400},
		{"extension too long", "\x05\x01\xe9\x01\x10\x01", "\x05\xe9\x01\x01\xff", 400},
		{"blank extension", "\x05\x01\xe9" + extension("  ", "\x00"), "\x05\xe9\x01\x01\xff", 400},
		{"broken map", "\x05\x01\xe9" + extension("{", "\x00"), "\x05\xe9\x01\x01\xff", 400},
		{"extension that ends early", "\x05\x01\xe9\x01\x00\x01a\x01", "\x05\xe9", 400},
		{"extension without methods", "\x05\x01\xe9" + extension("a", ""), "\x05\xe9\x01\x00\xff", 407},
		{"extension without a method that fits", "\x05\x01\xe9" + extension("a", "\x02\xe9"), "\x05\xe9\x01\x00\xff", 407},

		{"SOCKS4 BIND", "\x04\x02\x00\x50\x7f\x00\x00\x01\x00", reply4, 501},
		{"SOCKS4 command 0", "\x04\x00\x00\x50\x7f\x00\x00\x01\x00", reply4, 501},
		{"SOCKS4 port 0", "\x04\x01\x00\x00\x7f\x00\x00\x01\x00", reply4, 400},
		{"SOCKS4 that ends early", "\x04\x01\x00\x50\x7f\x00\x00\x01me", reply4, 400},
		{"SOCKS4 head that ends early", "\x04\x01\x00\x50\x7f", reply4, 400},
		{"SOCKS4 user without end", "\x04\x01\x00\x50\x7f\x00\x00\x01" + long, reply4, 400},
		{"SOCKS4a without name", "\x04\x01\x00\x50\x00\x00\x00\x01\x00\x00", reply4, 400},
		{"SOCKS4a name without end", "\x04\x01\x00\x50\x00\x00\x00\x01\x00" + long, reply4, 400},
		{"SOCKS4a that ends early", "\x04\x01\x00\x50\x00\x00\x00\x01\x00origin", reply4, 400},
		{"SOCKS4a bad name", "\x04\x01\x00\x50\x00\x00\x00\x01\x00a b\x00", reply4, 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := r.dial()
			w.send(c.say)
			_ = w.CloseWrite()
			w.expect(c.want)
			w.ended()
			if rec := r.Record(n); rec.Status != c.status || rec.Err == nil {
				t.Errorf("record %+v", rec)
			}
			r.good(hello+connect(to), 12)
			if rec := r.Record(n + 1); rec.Status != 200 {
				t.Errorf("record of the good one: %+v", rec)
			}
			n += 2
		})
	}
}

// TestExtensionIsOff: then the method is one that we do not know.
func TestExtensionIsOff(t *testing.T) {
	at := origin(t, "127.0.0.1")
	r := newProxy(t, nil)
	r.good("\x05\x02\xe9\x00"+connect(addr(t, at.String())), 12)
	w := r.dial()
	w.send("\x05\x01\xe9")
	w.expect("\x05\xff")
	w.ended()
}

// TestReplies: one table from errors to codes.
func TestReplies(t *testing.T) {
	var fault error
	r := newProxy(t, func(o *socks.Options) {
		o.Open = func(context.Context, *escaper.Request) (*escaper.Conn, error) {
			return nil, fmt.Errorf("wrapped: %w", fault)
		}
	})
	n := 0
	for _, c := range []struct {
		err    error
		code   byte
		status int
	}{
		{selection.ErrUnknown, 2, 400},
		{selection.ErrNotPassed, 2, 400},
		{selection.ErrDisabled, 2, 400},
		{selection.ErrForbidden, 2, 403},
		{selection.ErrDown, 1, 503},
		{escaper.ErrNoPath, 1, 503},
		{selection.ErrFamily, 8, 502},
		{selection.ErrBind, 1, 503},
		{selection.ErrPorts, 1, 503},
		{escaper.ErrProhibited, 2, 403},
		{escaper.ErrDNS, 4, 502},
		{escaper.ErrDNSTimeout, 4, 504},
		{escaper.ErrRefused, 5, 502},
		{escaper.ErrReset, 5, 502},
		{escaper.ErrUnreachable, 4, 502},
		{escaper.ErrTimeout, 4, 504},
		{escaper.ErrGuarded, 1, 503},
		{escaper.ErrResources, 1, 503},
		{escaper.ErrClosed, 1, 503},
		{relay.ErrStopped, 1, 503},
		{syscall.EMFILE, 1, 503},
		{errors.New("something else"), 1, 500},
	} {
		fault = c.err
		w := r.dial()
		w.send(hello + connect(addr(t, "192.0.2.1:80")))
		w.expect(fine + refused(c.code))
		w.ended()
		if rec := r.Record(n); rec.Status != c.status || !errors.Is(rec.Err, c.err) || rec.Target != "192.0.2.1:80" {
			t.Errorf("%v: record %+v", c.err, rec)
		}
		n++
		w = r.dial()
		w.send("\x04\x01\x00\x50\xc0\x00\x02\x01\x00")
		w.expect(reply4)
		w.ended()
		if rec := r.Record(n); rec.Status != c.status {
			t.Errorf("%v: record %+v", c.err, rec)
		}
		n++
	}
}

// TestRefusals by the real door.
func TestRefusals(t *testing.T) {
	gone := origin(t, "127.0.0.1")
	r := newProxy(t, func(o *socks.Options) { o.Extension = true })
	for _, c := range []struct {
		path, to string
		code     byte
	}{
		{"a", addr(t, "127.9.0.1:80"), 2},
		{"off", addr(t, gone.String()), 1},
		{"nobody", addr(t, gone.String()), 2},
		{"127.0.0.99", addr(t, gone.String()), 2},
		{`{"in":"a"}`, addr(t, gone.String()), 2},
		{"b", addr(t, "[::1]:80"), 8},
		{"a", domain("none.test", 80), 4},
		{"a", domain("slow.test", 80), 4},
		{"a", addr(t, "127.0.0.1:1"), 5},
	} {
		w := r.dial()
		w.send("\x05\x01\xe9" + extension(c.path, "\x00") + connect(c.to))
		w.expect("\x05\xe9\x01\x00\x00" + refused(c.code))
		w.ended()
	}
	// The choice is known where there was one.
	if rec := r.Record(1); rec.Choice.Path != "out/off" || rec.Choice.Source != selection.SourceSOCKS || rec.Choice.Asked != "off" {
		t.Errorf("record %+v", rec)
	}
}

// TestServerSelection is asked once for each connection, with the address that
// the client connected to.
func TestServerSelection(t *testing.T) {
	at := origin(t, "127.0.0.1")
	var asked []netip.AddrPort // on the only worker
	r := newProxy(t, func(o *socks.Options) {
		o.ServerSelection = func(local netip.AddrPort) selection.Layer {
			asked = append(asked, local)
			return selection.Layer{{Escaper: "out", Value: selection.ID("b")}}
		}
	})
	w := r.dial()
	w.send(hello + connect(addr(t, at.String())))
	w.take(12)
	if seen := w.banner(); seen.Addr().String() != "127.0.0.2" {
		t.Errorf("the origin sees %s", seen)
	}
	_ = w.CloseWrite()
	w.ended()
	if rec := r.Record(0); rec.Choice.Source != selection.SourceServer {
		t.Errorf("record %+v", rec)
	}
	if len(asked) != 1 || asked[0].String() != r.Addr {
		t.Errorf("asked for %v", asked)
	}
}

func TestAdmit(t *testing.T) {
	full := errors.New("no descriptors left")
	r := newProxy(t, func(o *socks.Options) { o.Admit = func() error { return full } })
	w := r.dial()
	w.send(hello + connect(addr(t, "127.0.0.1:1")))
	w.expect(fine + refused(1))
	w.ended()
	if rec := r.Record(0); rec.Status != 503 || !errors.Is(rec.Err, full) {
		t.Errorf("record %+v", rec)
	}
}

// TestLimits: of the server and of a user, while a tunnel lasts.
func TestLimits(t *testing.T) {
	at := origin(t, "127.0.0.1")
	request := connect(addr(t, at.String()))
	al := "\x05\x01\x02" + credentials("al", "secret") + request
	bo := "\x05\x01\x02" + credentials("bo", "secret") + request
	const greeted = "\x05\x02\x01\x00"
	server, user := auth.NewMeter(auth.Limits{Connections: 2}, nil), auth.NewMeter(auth.Limits{Connections: 1}, nil)
	r := newProxy(t, func(o *socks.Options) {
		o.Group = rig.Group(t, auth.User{Name: "al", Meter: user}, auth.User{Name: "bo"})
		o.Meter = server
	})
	open := func(say string) *wire {
		w := r.dial()
		w.send(say)
		w.take(len(greeted) + 10)
		w.banner()
		return w
	}
	limited := func(say string) {
		t.Helper()
		w := r.dial()
		w.send(say)
		w.expect(greeted + refused(2))
		w.ended()
	}
	first := open(al)
	limited(al)
	if rec := r.Record(0); rec.Status != 429 || !errors.Is(rec.Err, auth.ErrLimit) || rec.User != "al" {
		t.Errorf("record %+v", rec)
	}
	second := open(bo)
	limited(bo)
	_ = first.Close()
	_ = second.Close()
	r.Record(3)
	if !within(func() bool { return server.Open() == 0 && user.Open() == 0 }) {
		t.Fatalf("%d and %d are counted when all is over", server.Open(), user.Open())
	}
	_ = open(al).Close()
	r.Record(4)
	if !within(func() bool { return user.Open() == 0 }) {
		t.Fatal("the user's tunnel is counted when it is over")
	}
	// What is refused for another reason is given back as well.
	w := r.dial()
	w.send("\x05\x01\x02" + credentials("al", "secret") + connect(addr(t, "127.0.0.1:1")))
	w.expect(greeted + refused(5))
	w.ended()
	if !within(func() bool { return server.Open() == 0 && user.Open() == 0 }) {
		t.Errorf("%d and %d are counted when all is over", server.Open(), user.Open())
	}
}

func TestTimeouts(t *testing.T) {
	r := newProxy(t, func(o *socks.Options) {
		o.Timeouts.Idle, o.Timeouts.Handshake = 30*time.Millisecond, 50*time.Millisecond
	})
	r.dial().ended() // says nothing, and leaves no record
	for i, c := range []struct{ say, want string }{
		{"\x05", ""},
		{hello + "\x05\x01", fine + refused(1)},
		{"\x04\x01", reply4},
	} {
		w := r.dial()
		w.send(c.say)
		w.expect(c.want)
		w.ended()
		if rec := r.Record(i); rec.Status != 408 {
			t.Errorf("%q: record %+v", c.say, rec)
		}
	}
}

// TestLinger: a client that has sent more than it should still reads its
// answer.
func TestLinger(t *testing.T) {
	r := newProxy(t, func(o *socks.Options) { o.Timeouts.Linger = patience })
	w := r.dial()
	w.send(hello + connect(addr(t, "127.9.0.1:80")) + strings.Repeat("x", 100<<10))
	w.expect(fine + refused(2))
	_ = w.CloseWrite()
	w.ended()
}

// TestShutdown: clients that have said nothing go at once, tunnels live on, and
// are cut in the end.
func TestShutdown(t *testing.T) {
	at := origin(t, "127.0.0.1")
	r := newProxy(t, nil)
	silent, tunnel, halfway := r.dial(), r.dial(), r.dial()
	tunnel.send(hello + connect(addr(t, at.String())))
	tunnel.take(12)
	tunnel.banner()
	halfway.send(hello)
	halfway.expect(fine)
	if err := r.server.Quiesce(); err != nil {
		t.Fatal(err)
	}
	silent.ended()
	halfway.send(connect(addr(t, at.String())))
	halfway.take(10)
	halfway.banner()
	_ = halfway.CloseWrite()
	halfway.ended()
	tunnel.send("on")
	tunnel.expect("on")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := r.server.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := tunnel.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the tunnel: %v", err)
	}
	if rec := r.Record(1); !errors.Is(rec.Err, escaper.ErrClosed) {
		t.Errorf("record %+v", rec)
	}
}

// TestKill: a path that goes takes its tunnels with it.
func TestKill(t *testing.T) {
	at := origin(t, "127.0.0.1")
	r := newProxy(t, nil)
	w := r.dial()
	w.send(hello + connect(addr(t, at.String())))
	w.take(12)
	w.banner()
	gone := errors.New("address gone")
	for _, p := range r.Table.Paths() {
		p.Kill(netip.MustParsePrefix("127.0.0.1/32"), gone)
	}
	if _, err := w.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the tunnel: %v", err)
	}
	if rec := r.Record(0); rec.Err == nil {
		t.Errorf("record %+v", rec)
	}
}
