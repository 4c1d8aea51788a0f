package hop_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"wayout/router/escaper/hop"
)

const (
	established = "HTTP/1.1 200 Connection established\r\n\r\n"
	asked       = "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n"
)

func TestRequests(t *testing.T) {
	basic := base64.StdEncoding.EncodeToString([]byte("al:p:w"))
	long := strings.Repeat("a", 255)
	for _, c := range []struct {
		name      string
		peer      hop.Peer
		to        hop.Target
		selection string
		want      string
	}{
		{name: "name", to: target("a.example", 443), want: asked},
		{name: "long name", to: target(long, 1), want: "CONNECT " + long + ":1 HTTP/1.1\r\nHost: " + long + ":1\r\n\r\n"},
		{
			name: "IPv4", to: hop.Target{Addr: netip.MustParseAddr("::ffff:192.0.2.1"), Port: 80},
			want: "CONNECT 192.0.2.1:80 HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n",
		},
		{
			name: "IPv6", to: hop.Target{Addr: netip.MustParseAddr("2001:db8::1"), Port: 80},
			want: "CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n",
		},
		{
			name: "credentials", peer: hop.Peer{Username: "al", Password: "p:w"}, to: target("a.example", 443),
			want: strings.TrimSuffix(asked, "\r\n") + "Proxy-Authorization: Basic " + basic + "\r\n\r\n",
		},
		{
			name: "selection", peer: hop.Peer{SelectionHeader: "X-Path"}, to: target("a.example", 443), selection: `{"out":"fra-1"}`,
			want: strings.TrimSuffix(asked, "\r\n") + `X-Path: {"out":"fra-1"}` + "\r\n\r\n",
		},
		{name: "no selection", peer: hop.Peer{SelectionHeader: "X-Path"}, to: target("a.example", 443), want: asked},
	} {
		t.Run(c.name, func(t *testing.T) {
			unleaked(t)
			near, far := connect(t)
			c.peer.Kind, c.peer.Name, c.peer.Timeout = hop.HTTP, "peer.example:3128", patience
			heard := make(chan error, 1)
			go func() { heard <- play(far, 1<<20, step{c.want, established}) }()
			s, early, err := c.peer.Connect(t.Context(), near, c.to, c.selection)
			if heard := <-heard; heard != nil {
				t.Error(heard)
			}
			if err != nil || s != near || len(early) != 0 {
				t.Fatalf("got %v, %q, %v", s, early, err)
			}
			expectOpen(t, s, far)
		})
	}
}

// TestBadPeersAndTargets: nothing is sent that was not asked for.
func TestBadPeersAndTargets(t *testing.T) {
	good := target("a.example", 443)
	_, trust := authority(t)
	trust.InsecureSkipVerify = true
	for name, c := range map[string]struct {
		peer      hop.Peer
		to        hop.Target
		selection string
		err       error
	}{
		"no kind":                {peer: hop.Peer{Kind: 0}, to: good},
		"no port":                {peer: hop.Peer{Kind: hop.HTTP, Name: "peer.example"}, to: good},
		"bad port":               {peer: hop.Peer{Kind: hop.HTTP, Name: "peer.example:http"}, to: good},
		"port 0":                 {peer: hop.Peer{Kind: hop.HTTP, Name: "peer.example:0"}, to: good},
		"no host":                {peer: hop.Peer{Kind: hop.HTTP, Name: ":3128"}, to: good},
		"colon":                  {peer: hop.Peer{Kind: hop.HTTP, Username: "a:b", Password: "c"}, to: good},
		"password alone":         {peer: hop.Peer{Kind: hop.HTTP, Password: "c"}, to: good},
		"control character":      {peer: hop.Peer{Kind: hop.HTTP, Username: "a", Password: "c\n"}, to: good},
		"header name":            {peer: hop.Peer{Kind: hop.HTTP, SelectionHeader: "X Path"}, to: good},
		"header Host":            {peer: hop.Peer{Kind: hop.HTTP, SelectionHeader: "host"}, to: good},
		"no verification":        {peer: hop.Peer{Kind: hop.HTTPS, TLS: trust}, to: good},
		"SOCKS, password alone":  {peer: hop.Peer{Kind: hop.SOCKS5, Password: "c"}, to: good},
		"SOCKS, long name":       {peer: hop.Peer{Kind: hop.SOCKS5, Username: strings.Repeat("u", 256), Password: "c"}, to: good},
		"selection, no header":   {peer: hop.Peer{Kind: hop.HTTP}, to: good, selection: "fra-1", err: hop.ErrSelection},
		"selection, two lines":   {peer: hop.Peer{Kind: hop.HTTP, SelectionHeader: "X-Path"}, to: good, selection: "1\r\nA: b", err: hop.ErrSelection},
		"selection, SOCKS, long": {peer: hop.Peer{Kind: hop.SOCKS5}, to: good, selection: strings.Repeat("1", 4097), err: hop.ErrSelection},
		"no target":              {peer: hop.Peer{Kind: hop.HTTP}, to: hop.Target{Port: 1}, err: hop.ErrTarget},
		"target without port":    {peer: hop.Peer{Kind: hop.HTTP}, to: hop.Target{Host: "a"}, err: hop.ErrTarget},
		"two targets":            {peer: hop.Peer{Kind: hop.HTTP}, to: hop.Target{Host: "a", Addr: netip.MustParseAddr("::1"), Port: 1}, err: hop.ErrTarget},
		"target with zone":       {peer: hop.Peer{Kind: hop.SOCKS5}, to: hop.Target{Addr: netip.MustParseAddr("fe80::1%lo"), Port: 1}, err: hop.ErrTarget},
		"long target":            {peer: hop.Peer{Kind: hop.SOCKS5}, to: target(strings.Repeat("a", 256), 1), err: hop.ErrTarget},
		"target of two lines":    {peer: hop.Peer{Kind: hop.HTTP}, to: target("a\r\nb", 1), err: hop.ErrTarget},
		"target with a port":     {peer: hop.Peer{Kind: hop.HTTP}, to: target("a:1", 1), err: hop.ErrTarget},
	} {
		t.Run(name, func(t *testing.T) {
			unleaked(t)
			near, far := connect(t)
			if c.peer.Name == "" {
				c.peer.Name = "peer.example:3128"
			}
			ctx := quickly(t)
			if c.peer.Kind == hop.HTTPS {
				c.peer.Timeout = patience
			}
			s, _, err := c.peer.Connect(ctx, near, c.to, c.selection)
			if err == nil || c.err != nil && !errors.Is(err, c.err) || s != nil {
				t.Errorf("got %v, %v; want %v", s, err, c.err)
			}
			if b, err := io.ReadAll(far); len(b) != 0 || err != nil {
				t.Errorf("the peer hears %q, %v", b, err)
			}
		})
	}
}

func TestAnswers(t *testing.T) {
	many := strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 16)
	for _, c := range []struct {
		name, answer, early string
		err                 error
		refused             hop.Refused
		reason              hop.Reason
	}{
		{name: "plain", answer: established},
		{name: "no reason phrase", answer: "HTTP/1.1 200\r\n\r\n"},
		{name: "empty reason phrase", answer: "HTTP/1.0 200 \r\n\r\n"},
		{name: "other success", answer: "HTTP/1.1 299 Fine\r\nVia: x\r\n\r\n"},
		{name: "framing", answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", early: "hello"},
		{name: "early data", answer: established, early: "\x00SSH-2.0\r\n\r\nmore"},
		{name: "much early data", answer: established, early: strings.Repeat("0123456789abcdef", 1000)},
		{name: "interim", answer: "HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" + many[:len(many)-28] + established, early: "x"},
		{name: "long head", answer: "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", 65000) + "\r\n\r\n", early: "x"},

		{name: "too many interim", answer: "HTTP/1.1 100 Continue\r\n\r\n" + many + established, err: hop.ErrProtocol},
		{name: "switching", answer: "HTTP/1.1 101 Switching Protocols\r\n\r\n", err: hop.ErrProtocol},
		{name: "too long", answer: "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", 66000) + "\r\n\r\n", err: hop.ErrProtocol},
		{name: "too long interim", answer: "HTTP/1.1 100 OK\r\nA: " + strings.Repeat("a", 40000) + "\r\n\r\nHTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", 40000) + "\r\n\r\n", err: hop.ErrProtocol},
		{name: "endless line", answer: "HTTP/1.1 200 " + strings.Repeat("a", 70000), err: hop.ErrProtocol},
		{name: "bare LF", answer: "HTTP/1.1 200 OK\n\n", err: hop.ErrProtocol},
		{name: "bare LF at the end", answer: "HTTP/1.1 200 OK\r\nA: b\r\n\n", err: hop.ErrProtocol},
		{name: "LF first", answer: "\n" + established, err: hop.ErrProtocol},
		{name: "empty line first", answer: "\r\n" + established, err: hop.ErrProtocol},
		{name: "bare CR", answer: "HTTP/1.1 200 O\rK\r\n\r\n", err: hop.ErrProtocol},
		{name: "version 0.9", answer: "hello\r\n\r\n", err: hop.ErrProtocol},
		{name: "version 2", answer: "HTTP/2.0 200 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "version 1.2", answer: "HTTP/1.2 200 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "lower case", answer: "http/1.1 200 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "two spaces", answer: "HTTP/1.1  200 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "short status", answer: "HTTP/1.1 20\r\n\r\n", err: hop.ErrProtocol},
		{name: "long status", answer: "HTTP/1.1 2000 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "no status", answer: "HTTP/1.1 \r\n\r\n", err: hop.ErrProtocol},
		{name: "status of letters", answer: "HTTP/1.1 2OO OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "status 099", answer: "HTTP/1.1 099 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "status 600", answer: "HTTP/1.1 600 OK\r\n\r\n", err: hop.ErrProtocol},
		{name: "control in the reason", answer: "HTTP/1.1 200 \x00\r\n\r\n", err: hop.ErrProtocol},
		{name: "folded", answer: "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", err: hop.ErrProtocol},
		{name: "space before colon", answer: "HTTP/1.1 200 OK\r\nA : b\r\n\r\n", err: hop.ErrProtocol},
		{name: "no colon", answer: "HTTP/1.1 200 OK\r\nA\r\n\r\n", err: hop.ErrProtocol},
		{name: "no name", answer: "HTTP/1.1 200 OK\r\n: b\r\n\r\n", err: hop.ErrProtocol},
		{name: "control in a field", answer: "HTTP/1.1 200 OK\r\nA: b\x7f\r\n\r\n", err: hop.ErrProtocol},
		{name: "SOCKS", answer: "\x05\xff\r\n\r\n", err: hop.ErrProtocol},

		{name: "wants credentials", answer: "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\n\r\n", err: hop.ErrAuth},
		{name: "forbidden", answer: "HTTP/1.1 403 No\r\n\r\nbody", refused: hop.Refused{Status: 403}, reason: hop.ReasonProhibited},
		{name: "legal", answer: "HTTP/1.1 451 No\r\n\r\n", refused: hop.Refused{Status: 451}, reason: hop.ReasonProhibited},
		{name: "limit", answer: "HTTP/1.1 429 No\r\n\r\n", refused: hop.Refused{Status: 429}, reason: hop.ReasonLimit},
		{name: "timeout", answer: "HTTP/1.1 504 No\r\n\r\n", refused: hop.Refused{Status: 504}, reason: hop.ReasonTimeout},
		{name: "bad gateway", answer: "HTTP/1.1 502 No\r\n\r\n", refused: hop.Refused{Status: 502}, reason: hop.ReasonUnreachable},
		{name: "unavailable", answer: "HTTP/1.1 503 No\r\n\r\n", refused: hop.Refused{Status: 503}, reason: hop.ReasonUnreachable},
		{name: "bad request", answer: "HTTP/1.1 400 No\r\n\r\n", refused: hop.Refused{Status: 400}, reason: hop.ReasonOther},
		{name: "redirect", answer: "HTTP/1.1 302 No\r\nLocation: /\r\n\r\n", refused: hop.Refused{Status: 302}, reason: hop.ReasonOther},
		{
			name: "proxy status", answer: "HTTP/1.1 502 No\r\nproxy-status: wayout; error=connection_refused; details=\"x\"\r\n\r\n",
			refused: hop.Refused{Status: 502, Type: "connection_refused"}, reason: hop.ReasonRefused,
		},
		{
			name: "proxy status, far and near", answer: "HTTP/1.1 502 No\r\nProxy-Status: a; error=dns_timeout, b; error=proxy_internal_error\r\nProxy-Status: c; error=dns_error\r\n\r\n",
			refused: hop.Refused{Status: 502, Type: "dns_timeout"}, reason: hop.ReasonDNSTimeout,
		},
		{
			name: "proxy status of the second", answer: "HTTP/1.1 502 No\r\nProxy-Status: a;next-hop=\";error=dns_error\",\"b;error=x\\\"\"; rcode=1;error=dns_error\r\n\r\n",
			refused: hop.Refused{Status: 502, Type: "dns_error"}, reason: hop.ReasonDNS,
		},
		{
			name: "proxy status not registered", answer: "HTTP/1.1 504 No\r\nProxy-Status: a; error=gremlins\r\n\r\n",
			refused: hop.Refused{Status: 504, Type: "gremlins"}, reason: hop.ReasonTimeout,
		},
		{
			name: "proxy status broken", answer: "HTTP/1.1 504 No\r\nProxy-Status: a; error=dns_error; details=\"\r\n\r\n",
			refused: hop.Refused{Status: 504}, reason: hop.ReasonTimeout,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			unleaked(t)
			for _, size := range []int{1 << 20, 1, 7} {
				if size == 1 && len(c.answer) > 10000 {
					continue // slow, and the answers of 7 show it too
				}
				near, far := connect(t)
				played := make(chan error, 1)
				go func() {
					played <- play(far, size, step{asked, c.answer + c.early})
					_ = far.CloseWrite()
				}()
				p := hop.Peer{Kind: hop.HTTP, Name: "peer.example:3128", Timeout: patience}
				s, early, err := p.Connect(t.Context(), near, target("a.example", 443), "")
				switch {
				case c.err != nil || c.reason != 0:
					var refused *hop.Refused
					if s != nil || c.err != nil && !errors.Is(err, c.err) ||
						c.reason != 0 && (!errors.As(err, &refused) || *refused != c.refused || refused.Reason() != c.reason) {
						t.Errorf("pieces of %d: got %v, %v", size, s, err)
					}
					if _, err := near.Write(nil); !errors.Is(err, net.ErrClosed) {
						t.Errorf("the connection is not closed: %v", err)
					}
				case err != nil:
					t.Errorf("pieces of %d: %v", size, err)
				default:
					rest, err := io.ReadAll(s)
					if got := string(early) + string(rest); got != c.early || err != nil {
						t.Errorf("pieces of %d: %d bytes follow, %v; want %d", size, len(got), err, len(c.early))
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

func TestCredentialsRefused(t *testing.T) {
	unleaked(t)
	near, far := connect(t)
	p := hop.Peer{Kind: hop.HTTP, Name: "peer.example:3128", Username: "al", Password: "secret"}
	go func() { _ = play(far, 1<<20, step{"CONNECT", "HTTP/1.1 407 No\r\n\r\n"}) }()
	_, _, err := p.Connect(quickly(t), near, target("a.example", 443), "")
	if !errors.Is(err, hop.ErrAuth) || !strings.Contains(fmt.Sprint(err), "refuses our credentials") || strings.Contains(fmt.Sprint(err), "secret") {
		t.Errorf("got %v", err)
	}
}

// conversation is a peer of a kind, and how a talk with it goes.
type conversation struct {
	peer  hop.Peer
	steps []step
}

func conversations() map[string]conversation {
	return map[string]conversation{
		"http":  {hop.Peer{Kind: hop.HTTP, Name: "peer.example:3128"}, []step{{asked, "HTTP/1.1 100 Continue\r\n\r\n" + established}}},
		"socks": {hop.Peer{Kind: hop.SOCKS5, Name: "peer.example:1080"}, []step{{"\x05\x01\x00", "\x05\x00"}, {socksAsked, socksReply}}},
		"socks with all": {
			hop.Peer{Kind: hop.SOCKS5, Name: "peer.example:1080", Username: "al", Password: "pw"},
			[]step{
				{"\x05\x01\xe9", "\x05\xe9"},
				{"\x01\x00\x012\x02\x00\x02", "\x01\x00\x02"},
				{"\x01\x02al\x02pw", "\x01\x00"},
				{socksAsked, socksReply},
			},
		},
	}
}

func (c *conversation) selection() string {
	if c.peer.Username != "" {
		return "2"
	}
	return ""
}

// cut returns the first n bytes that the peer answers.
func cut(steps []step, n int) []step {
	var out []step
	for _, s := range steps {
		s.answer = s.answer[:min(n, len(s.answer))]
		n -= len(s.answer)
		if out = append(out, s); n == 0 {
			break
		}
	}
	return out
}

func answered(steps []step) (n int) {
	for _, s := range steps {
		n += len(s.answer)
	}
	return n
}

// TestPeerCloses at every byte of its answers.
func TestPeerCloses(t *testing.T) {
	for name, c := range conversations() {
		t.Run(name, func(t *testing.T) {
			unleaked(t)
			for n := range answered(c.steps) {
				for _, reset := range []bool{false, true} {
					near, far := connect(t)
					go func() {
						_ = play(far, 1<<20, cut(c.steps, n)...)
						if reset {
							_ = far.SetLinger(0)
						}
						far.Close()
					}()
					s, _, err := c.peer.Connect(quickly(t), near, target("a.example", 443), c.selection())
					if s != nil || !errors.Is(err, hop.ErrEnded) {
						t.Errorf("after %d bytes, reset %v: got %v, %v", n, reset, s, err)
					}
				}
			}
		})
	}
}

// TestPeerIsSlow: it says nothing more after every byte of its answers.
func TestPeerIsSlow(t *testing.T) {
	for name, c := range conversations() {
		t.Run(name, func(t *testing.T) {
			unleaked(t)
			for n := range answered(c.steps) {
				near, far := connect(t)
				ctx, cancel := context.WithCancel(t.Context())
				want := context.Canceled
				switch n % 3 {
				case 0:
					var stop func()
					ctx, stop = context.WithTimeout(ctx, 20*time.Millisecond)
					defer stop()
					want = hop.ErrTimeout
				case 1:
					c.peer.Timeout = 20 * time.Millisecond
					want = hop.ErrTimeout
				}
				played := make(chan struct{})
				go func() {
					defer close(played)
					_ = play(far, 1<<20, cut(c.steps, n)...)
					if errors.Is(want, context.Canceled) {
						cancel()
					}
				}()
				s, _, err := c.peer.Connect(ctx, near, target("a.example", 443), c.selection())
				if s != nil || !errors.Is(err, want) {
					t.Errorf("after %d bytes: got %v, %v; want %v", n, s, err, want)
				}
				cancel()
				far.Close()
				<-played
				c.peer.Timeout = 0
			}
		})
	}
}

func TestGivenUpBefore(t *testing.T) {
	unleaked(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range conversations() {
		near, far := connect(t)
		if s, _, err := c.peer.Connect(ctx, near, target("a.example", 443), c.selection()); s != nil || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, %v", name, s, err)
		}
		expectEOF(t, far)
	}
}
