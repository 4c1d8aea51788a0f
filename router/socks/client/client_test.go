package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"wayout/router/socks/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

// step is one message of the client that a server expects, and its answer.
type step struct{ want, answer string }

// server plays steps on one connection, and then says what else the client
// sent until it closed.
func server(t *testing.T, steps ...step) (addr string, rest <-chan string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	out := make(chan string, 1)
	go func() {
		defer close(out)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(patience))
		for _, s := range steps {
			b := make([]byte, len(s.want))
			if n, err := io.ReadFull(c, b); err != nil || string(b) != s.want {
				t.Errorf("the client says %x (%v), not %x", b[:n], err, s.want)
				return
			}
			// A byte at a time: the client has to take it as it comes.
			for i := range len(s.answer) {
				_, _ = c.Write([]byte{s.answer[i]})
			}
		}
		b, _ := io.ReadAll(c)
		out <- string(b)
	}()
	return l.Addr().String(), out
}

const (
	reply4  = "\x05\x00\x00\x01\x7f\x00\x00\x02\x12\x34"
	request = "\x05\x01\x00\x03\x03a.b\x00\x50"
)

func TestHandshake(t *testing.T) {
	for _, c := range []struct {
		name   string
		dialer client.Dialer
		steps  []step
		bound  string
		err    error
	}{
		{
			name:  "plain",
			steps: []step{{"\x05\x01\x00", "\x05\x00"}, {request, reply4}},
			bound: "127.0.0.2:4660",
		},
		{
			name:  "bound to a name",
			steps: []step{{"\x05\x01\x00", "\x05\x00"}, {request, "\x05\x00\x00\x03\x01x\x00\x01"}},
			bound: "invalid AddrPort",
		},
		{
			name:  "bound to an IPv6 address",
			steps: []step{{"\x05\x01\x00", "\x05\x00"}, {request, "\x05\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01"}},
			bound: "[2001:db8::1]:1",
		},
		{
			name:   "password",
			dialer: client.Dialer{Username: "al", Password: "pw"},
			steps:  []step{{"\x05\x02\x00\x02", "\x05\x02"}, {"\x01\x02al\x02pw", "\x01\x00"}, {request, reply4}},
			bound:  "127.0.0.2:4660",
		},
		{
			name:   "password not wanted",
			dialer: client.Dialer{Username: "al", Password: "pw"},
			steps:  []step{{"\x05\x02\x00\x02", "\x05\x00"}, {request, reply4}},
			bound:  "127.0.0.2:4660",
		},
		{
			name:   "wrong password",
			dialer: client.Dialer{Username: "al", Password: "pw"},
			steps:  []step{{"\x05\x02\x00\x02", "\x05\x02"}, {"\x01\x02al\x02pw", "\x01\x01"}},
			err:    client.ErrAuth,
		},
		{
			name:   "extension",
			dialer: client.Dialer{Extension: "fra-1"},
			steps:  []step{{"\x05\x01\xe9", "\x05\xe9"}, {"\x01\x00\x05fra-1\x01\x00", "\x01\x00\x00"}, {request, reply4}},
			bound:  "127.0.0.2:4660",
		},
		{
			name:   "extension and password",
			dialer: client.Dialer{Extension: "2", Username: "al", Password: "pw"},
			steps: []step{
				{"\x05\x01\xe9", "\x05\xe9"},
				{"\x01\x00\x012\x02\x00\x02", "\x01\x00\x02"},
				{"\x01\x02al\x02pw", "\x01\x00"},
				{request, reply4},
			},
			bound: "127.0.0.2:4660",
		},
		{
			name:   "extension not known",
			dialer: client.Dialer{Extension: "fra-1"},
			steps:  []step{{"\x05\x01\xe9", "\x05\xff"}},
			err:    client.ErrMethod,
		},
		{
			name:   "extension passed over",
			dialer: client.Dialer{Extension: "fra-1"},
			steps:  []step{{"\x05\x01\xe9", "\x05\x00"}},
			err:    client.ErrProtocol,
		},
		{
			name:   "extension malformed",
			dialer: client.Dialer{Extension: "{"},
			steps:  []step{{"\x05\x01\xe9", "\x05\xe9"}, {"\x01\x00\x01{\x01\x00", "\x01\x01\xff"}},
			err:    client.ErrSelection,
		},
		{
			name:   "extension without a method left",
			dialer: client.Dialer{Extension: "1"},
			steps:  []step{{"\x05\x01\xe9", "\x05\xe9"}, {"\x01\x00\x011\x01\x00", "\x01\x00\xff"}},
			err:    client.ErrMethod,
		},
		{name: "no method", steps: []step{{"\x05\x01\x00", "\x05\xff"}}, err: client.ErrMethod},
		{name: "method not offered", steps: []step{{"\x05\x01\x00", "\x05\x02"}}, err: client.ErrProtocol},
		{name: "not SOCKS", steps: []step{{"\x05\x01\x00", "HT"}}, err: client.ErrProtocol},
		{
			name:  "not SOCKS in the reply",
			steps: []step{{"\x05\x01\x00", "\x05\x00"}, {request, "HT"}}, err: client.ErrProtocol,
		},
		{
			name:  "reply with an unknown address",
			steps: []step{{"\x05\x01\x00", "\x05\x00"}, {request, "\x05\x00\x00\x02\x00"}}, err: client.ErrProtocol,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr, rest := server(t, c.steps...)
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			bound, err := c.dialer.Handshake(ctx, conn, "a.b:80")
			if !errors.Is(err, c.err) || c.err == nil && (err != nil || bound.String() != c.bound) {
				t.Errorf("got %s, %v", bound, err)
			}
			_ = conn.Close()
			if s := <-rest; s != "" {
				t.Errorf("the client goes on with %x", s)
			}
		})
	}
}

func TestReplyError(t *testing.T) {
	for code := byte(1); code < 10; code++ {
		// The address of a refusal may be missing.
		addr, _ := server(t, step{"\x05\x01\x00", "\x05\x00"}, step{request, "\x05" + string(code)})
		d := client.Dialer{Proxy: addr}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, err := d.DialContext(ctx, "tcp", "a.b:80")
		var reply *client.ReplyError
		if !errors.As(err, &reply) || reply.Code != code {
			t.Errorf("%d: got %v", code, err)
		}
		cancel()
	}
}

// TestReadsNothingAhead: what comes behind the reply is the tunnel's.
func TestReadsNothingAhead(t *testing.T) {
	addr, _ := server(t, step{"\x05\x01\x00", "\x05\x00"}, step{request, reply4 + "hello"})
	d := client.Dialer{Proxy: addr}
	conn, err := d.DialContext(t.Context(), "tcp", "a.b:80")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	b := make([]byte, 5)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestAssociate(t *testing.T) {
	const ask = "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"
	for answer, want := range map[string]string{
		"\x05\x00\x00\x01\x7f\x00\x00\x02\x12\x34": "127.0.0.2:4660",
		"\x05\x00\x00\x01\x00\x00\x00\x00\x12\x34": "127.0.0.1:4660", // the server's own
		"\x05\x00\x00\x03\x01x\x12\x34":            "",
	} {
		addr, _ := server(t, step{"\x05\x01\x00", "\x05\x00"}, step{ask, answer})
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		relay, err := new(client.Dialer).Associate(t.Context(), conn)
		if want == "" && !errors.Is(err, client.ErrProtocol) || want != "" && relay.String() != want {
			t.Errorf("%x: got %s, %v", answer, relay, err)
		}
		_ = conn.Close()
	}
}

// TestCancel: a server that says nothing holds nobody.
func TestCancel(t *testing.T) {
	addr, _ := server(t)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := new(client.Dialer).Handshake(ctx, conn, "a.b:80")
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	if _, err := new(client.Dialer).Handshake(ctx, conn, "a.b:80"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestBadDialer(t *testing.T) {
	for _, d := range []client.Dialer{
		{Username: "x"},
		{Password: "x"},
		{Username: strings.Repeat("x", 256), Password: "x"},
		{Username: "x", Password: strings.Repeat("x", 256)},
		{Extension: strings.Repeat("x", client.MaxExtension+1)},
	} {
		near, far := net.Pipe()
		if _, err := d.Handshake(t.Context(), near, "a.b:80"); err == nil {
			t.Errorf("%+v is taken", d)
		}
		_, _ = near.Close(), far.Close()
	}
	if _, err := new(client.Dialer).DialContext(t.Context(), "udp", "a.b:80"); !errors.As(err, new(net.UnknownNetworkError)) {
		t.Errorf("got %v", err)
	}
}
