package hop_test

import (
	"errors"
	"io"
	"net/netip"
	"testing"

	"wayout/router/escaper/hop"
)

const (
	socksAsked = "\x05\x01\x00\x03\x09a.example\x01\xbb"
	socksReply = "\x05\x00\x00\x01\x7f\x00\x00\x02\x12\x34"
)

func TestSOCKS(t *testing.T) {
	hello := step{"\x05\x01\x00", "\x05\x00"}
	for _, c := range []struct {
		name      string
		peer      hop.Peer
		to        hop.Target
		selection string
		steps     []step
		early     string
		err       error
		code      byte
		reason    hop.Reason
	}{
		{name: "name", steps: []step{hello, {socksAsked, socksReply}}},
		{name: "early data", steps: []step{hello, {socksAsked, socksReply}}, early: "SSH-2.0\r\n"},
		{name: "bound to a name", steps: []step{hello, {socksAsked, "\x05\x00\x00\x03\x01x\x00\x01"}}, early: "x"},
		{
			name: "IPv4", to: hop.Target{Addr: netip.MustParseAddr("::ffff:192.0.2.1"), Port: 80},
			steps: []step{hello, {"\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x50", socksReply}},
		},
		{
			name: "IPv6", to: hop.Target{Addr: netip.MustParseAddr("2001:db8::1"), Port: 80},
			steps: []step{hello, {"\x05\x01\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50", socksReply}},
		},
		{
			name: "credentials", peer: hop.Peer{Username: "al", Password: "pw"},
			steps: []step{{"\x05\x02\x00\x02", "\x05\x02"}, {"\x01\x02al\x02pw", "\x01\x00"}, {socksAsked, socksReply}}, early: "x",
		},
		{
			name: "credentials not wanted", peer: hop.Peer{Username: "al", Password: "pw"},
			steps: []step{{"\x05\x02\x00\x02", "\x05\x00"}, {socksAsked, socksReply}},
		},
		{
			name: "credentials refused", peer: hop.Peer{Username: "al", Password: "pw"},
			steps: []step{{"\x05\x02\x00\x02", "\x05\x02"}, {"\x01\x02al\x02pw", "\x01\x01"}}, err: hop.ErrAuth,
		},
		{name: "credentials wanted", steps: []step{{"\x05\x01\x00", "\x05\xff"}}, err: hop.ErrAuth},
		{
			name: "selection", selection: "fra-1",
			steps: []step{{"\x05\x01\xe9", "\x05\xe9"}, {"\x01\x00\x05fra-1\x01\x00", "\x01\x00\x00"}, {socksAsked, socksReply}}, early: "x",
		},
		{name: "selection not known", selection: "fra-1", steps: []step{{"\x05\x01\xe9", "\x05\xff"}}, err: hop.ErrSelection},
		{name: "selection passed over", selection: "fra-1", steps: []step{{"\x05\x01\xe9", "\x05\x00"}}, err: hop.ErrProtocol},
		{
			name: "selection malformed", selection: "{",
			steps: []step{{"\x05\x01\xe9", "\x05\xe9"}, {"\x01\x00\x01{\x01\x00", "\x01\x01\xff"}}, err: hop.ErrSelection,
		},
		{name: "another version", steps: []step{{"\x05\x01\x00", "\x04\x00"}}, err: hop.ErrProtocol},
		{name: "HTTP", steps: []step{{"\x05\x01\x00", "HTTP/1.1 400 Bad Request\r\n\r\n"}}, err: hop.ErrProtocol},
		{name: "another method", steps: []step{{"\x05\x01\x00", "\x05\x02"}}, err: hop.ErrProtocol},
		{name: "reply of another version", steps: []step{hello, {socksAsked, "\x04\x00\x00\x01\x7f\x00\x00\x02\x12\x34"}}, err: hop.ErrProtocol},
		{name: "reply of another type", steps: []step{hello, {socksAsked, "\x05\x00\x00\x02\x7f\x00\x00\x02\x12\x34"}}, err: hop.ErrProtocol},
		{name: "empty name", steps: []step{hello, {socksAsked, "\x05\x00\x00\x03\x00\x00\x01"}}, err: hop.ErrProtocol},
		{name: "general failure", steps: []step{hello, {socksAsked, "\x05\x01\x00"}}, code: 1, reason: hop.ReasonOther},
		{name: "not allowed", steps: []step{hello, {socksAsked, "\x05\x02\x00"}}, code: 2, reason: hop.ReasonProhibited},
		{name: "network", steps: []step{hello, {socksAsked, "\x05\x03\x00"}}, code: 3, reason: hop.ReasonUnreachable},
		{name: "host", steps: []step{hello, {socksAsked, "\x05\x04\x00"}}, code: 4, reason: hop.ReasonUnreachable},
		{name: "refused", steps: []step{hello, {socksAsked, "\x05\x05\x00"}}, code: 5, reason: hop.ReasonRefused},
		{name: "TTL", steps: []step{hello, {socksAsked, "\x05\x06\x00"}}, code: 6, reason: hop.ReasonTimeout},
		{name: "command", steps: []step{hello, {socksAsked, "\x05\x07\x00"}}, code: 7, reason: hop.ReasonOther},
		{name: "family", steps: []step{hello, {socksAsked, "\x05\x08\x00"}}, code: 8, reason: hop.ReasonUnreachable},
		{name: "unknown", steps: []step{hello, {socksAsked, "\x05\xff\x00"}}, code: 255, reason: hop.ReasonOther},
	} {
		t.Run(c.name, func(t *testing.T) {
			unleaked(t)
			for _, size := range []int{1 << 20, 1} {
				near, far := connect(t)
				steps := append([]step(nil), c.steps...)
				steps[len(steps)-1].answer += c.early
				played := make(chan error, 1)
				go func() {
					played <- play(far, size, steps...)
					_ = far.CloseWrite()
				}()
				c.peer.Kind, c.peer.Name, c.peer.Timeout = hop.SOCKS5, "peer.example:1080", patience
				to := c.to
				if to == (hop.Target{}) {
					to = target("a.example", 443)
				}
				s, early, err := c.peer.Connect(t.Context(), near, to, c.selection)
				var refused *hop.Refused
				switch {
				case c.err != nil:
					if s != nil || !errors.Is(err, c.err) {
						t.Errorf("got %v, %v; want %v", s, err, c.err)
					}
				case c.code != 0:
					if s != nil || !errors.As(err, &refused) || *refused != (hop.Refused{Code: c.code}) || refused.Reason() != c.reason {
						t.Errorf("got %v, %v; want code %d, %s", s, err, c.code, c.reason)
					}
				case err != nil:
					t.Error(err)
				default:
					if rest, err := io.ReadAll(s); string(early)+string(rest) != c.early || err != nil {
						t.Errorf("%q%q follow, %v; want %q", early, rest, err, c.early)
					}
				}
				if err := <-played; err != nil {
					t.Error(err)
				}
				near.Close()
				far.Close()
			}
		})
	}
}

func TestAssociate(t *testing.T) {
	const ask = "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"
	hello := step{"\x05\x01\x00", "\x05\x00"}
	for _, c := range []struct {
		name      string
		kind      hop.Kind
		selection string
		steps     []step
		want      string
		err       error
	}{
		{name: "address", steps: []step{hello, {ask, "\x05\x00\x00\x01\xc0\x00\x02\x01\x12\x34"}}, want: "192.0.2.1:4660"},
		{name: "IPv6", steps: []step{hello, {ask, "\x05\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x12\x34"}}, want: "[2001:db8::1]:4660"},
		{name: "unspecified", steps: []step{hello, {ask, "\x05\x00\x00\x01\x00\x00\x00\x00\x12\x34"}}, want: "127.0.0.1:4660"},
		{name: "unspecified, IPv6", steps: []step{hello, {ask, "\x05\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x12\x34"}}, want: "127.0.0.1:4660"},
		{
			name: "selection", selection: "2",
			steps: []step{{"\x05\x01\xe9", "\x05\xe9"}, {"\x01\x00\x012\x01\x00", "\x01\x00\x00"}, {ask, "\x05\x00\x00\x01\xc0\x00\x02\x01\x12\x34"}}, want: "192.0.2.1:4660",
		},
		{name: "selection not known", selection: "2", steps: []step{{"\x05\x01\xe9", "\x05\xff"}}, err: hop.ErrSelection},
		{name: "no port", steps: []step{hello, {ask, "\x05\x00\x00\x01\xc0\x00\x02\x01\x00\x00"}}, err: hop.ErrProtocol},
		{name: "a name", steps: []step{hello, {ask, "\x05\x00\x00\x03\x01a\x12\x34"}}, err: hop.ErrProtocol},
		{name: "ended", steps: []step{hello, {ask, ""}}, err: hop.ErrEnded},
		{name: "HTTP", kind: hop.HTTP, err: hop.ErrNoUDP},
	} {
		t.Run(c.name, func(t *testing.T) {
			unleaked(t)
			near, far := connect(t)
			played := make(chan error, 1)
			go func() {
				played <- play(far, 1, c.steps...)
				_ = far.CloseWrite()
			}()
			p := hop.Peer{Kind: hop.SOCKS5, Name: "peer.example:1080", Timeout: patience}
			if c.kind != 0 {
				p.Kind = c.kind
			}
			relay, err := p.Associate(t.Context(), near, c.selection)
			if err := <-played; err != nil {
				t.Error(err)
			}
			if c.err != nil {
				if !errors.Is(err, c.err) || relay.IsValid() {
					t.Errorf("got %s, %v; want %v", relay, err, c.err)
				}
				if b, err := io.ReadAll(far); len(b) > 0 || err != nil {
					t.Errorf("the connection is not closed: %q, %v", b, err)
				}
				return
			}
			if err != nil || relay.String() != c.want {
				t.Errorf("got %s, %v; want %s", relay, err, c.want)
			}
			expectEOF(t, near) // it stays open, and without a deadline
		})
	}
}

func TestDatagrams(t *testing.T) {
	for _, c := range []struct {
		to   hop.Target
		head string
	}{
		{target("a.b", 80), "\x00\x00\x00\x03\x03a.b\x00\x50"},
		{hop.Target{Addr: netip.MustParseAddr("192.0.2.1"), Port: 53}, "\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35"},
		{hop.Target{Addr: netip.MustParseAddr("2001:db8::1"), Port: 53}, "\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x35"},
	} {
		b, err := hop.Wrap([]byte("x"), c.to, []byte("payload"))
		if err != nil || string(b) != "x"+c.head+"payload" {
			t.Errorf("%s: got %q, %v", c.to, b, err)
		}
		from, payload, err := hop.Unwrap([]byte(c.head + "payload"))
		if err != nil || from != c.to || string(payload) != "payload" {
			t.Errorf("%s: got %s, %q, %v", c.to, from, payload, err)
		}
	}
	if b, err := hop.Wrap([]byte("x"), hop.Target{}, nil); !errors.Is(err, hop.ErrTarget) || string(b) != "x" {
		t.Errorf("no target: got %q, %v", b, err)
	}
	for _, in := range []string{"", "\x00\x00\x00", "\x00\x00\x01\x01\xc0\x00\x02\x01\x00\x35x", "\x00\x00\x00\x02\xc0\x00\x02\x01\x00\x35x", "\x00\x00\x00\x01\xc0\x00"} {
		if _, _, err := hop.Unwrap([]byte(in)); !errors.Is(err, hop.ErrProtocol) {
			t.Errorf("%q: got %v", in, err)
		}
	}
}
