package hop_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper/hop"
)

// bridged is a stream to a TLS peer.
type bridged struct {
	stream hop.Stream
	early  string
	near   *net.TCPConn // the connection to the peer, our end
	peer   *tls.Conn    // its end
	wire   *net.TCPConn // below
}

// bridge makes one. The peer answers with what is given, early data included.
func bridge(t *testing.T, p *hop.Peer, answer string, versions ...uint16) *bridged {
	t.Helper()
	unleaked(t)
	peerSide, ourSide := authority(t)
	if len(versions) > 0 {
		peerSide.MaxVersion = versions[0]
	}
	near, far := connect(t)
	p.Kind, p.Name, p.TLS, p.Timeout = hop.HTTPS, peerName+":443", ourSide, patience
	b := &bridged{near: near, wire: far, peer: tls.Server(far, peerSide)}
	played := make(chan error, 1)
	go func() { played <- play(b.peer, 1<<20, step{asked, answer}) }()
	s, early, err := p.Connect(t.Context(), near, target("a.example", 443), "")
	if err := <-played; err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.stream, b.early = s, string(early)
	t.Cleanup(func() { s.Close() })
	if err := s.SetDeadline(time.Now().Add(3 * patience)); err != nil {
		t.Fatal(err)
	}
	if got := b.peer.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("protocol %q", got)
	}
	return b
}

func TestTLS(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			b := bridge(t, &hop.Peer{}, established+"early", version)
			if b.early != "early" {
				expect(t, b.stream, "early"[len(b.early):])
			}
			expectOpen(t, b.stream, b.peer)
		})
	}
}

// TestTLSRefused: no byte of the request is seen by a peer that is not trusted.
func TestTLSRefused(t *testing.T) {
	good, trust := authority(t)
	_, stranger := authority(t)
	old := good.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	other := good.Clone()
	other.NextProtos = []string{"imap"}
	wants := good.Clone()
	wants.ClientAuth = tls.RequireAnyClientCert
	wants12 := wants.Clone()
	wants12.MaxVersion = tls.VersionTLS12
	for name, c := range map[string]struct {
		peer, us *tls.Config
		host     string
	}{
		"stranger":               {good, stranger, peerName},
		"another name":           {good, trust, "other.example"},
		"address":                {good, trust, "127.0.0.1"},
		"system's roots":         {good, nil, peerName},
		"old version":            {old, trust, peerName},
		"old version, allowed":   {old, func() *tls.Config { c := trust.Clone(); c.MinVersion = tls.VersionTLS10; return c }(), peerName},
		"another protocol":       {other, trust, peerName},
		"wants a certificate":    {wants, trust, peerName},
		"wants a certificate, 2": {wants12, trust, peerName},
	} {
		t.Run(name, func(t *testing.T) {
			unleaked(t)
			near, far := connect(t)
			played := make(chan string, 1)
			go func() {
				conn := tls.Server(far, c.peer)
				b, _ := io.ReadAll(conn)
				far.Close()
				played <- string(b)
			}()
			p := hop.Peer{Kind: hop.HTTPS, Name: net.JoinHostPort(c.host, "443"), TLS: c.us, Username: "al", Password: "pw", Timeout: patience}
			s, _, err := p.Connect(t.Context(), near, target("a.example", 443), "")
			// A peer that wants a certificate says so when the request has been
			// sent, and may reset the connection before it has been heard.
			if s != nil || !errors.Is(err, hop.ErrTLS) && (!strings.HasPrefix(name, "wants") || !errors.Is(err, hop.ErrEnded)) {
				t.Errorf("got %v, %v", s, err)
			}
			if heard := <-played; heard != "" {
				t.Errorf("the peer hears %q", heard)
			}
		})
	}
}

// TestTLSPeerCloses at every phase: before, in and after the handshake, with and
// without close_notify.
func TestTLSPeerCloses(t *testing.T) {
	unleaked(t)
	peerSide, ourSide := authority(t)
	head := established[:len(established)-2]
	for name, peer := range map[string]func(c *net.TCPConn) error{
		"at once":            func(*net.TCPConn) error { return nil },
		"after the hello":    func(c *net.TCPConn) error { _, err := c.Read(make([]byte, 4096)); return err },
		"with garbage":       func(c *net.TCPConn) error { _, err := io.WriteString(c, "\x16\x03\x03"); return err },
		"after handshake":    func(c *net.TCPConn) error { return tls.Server(c, peerSide).Handshake() },
		"within the answer":  func(c *net.TCPConn) error { return play(tls.Server(c, peerSide), 1<<20, step{asked, head}) },
		"before the answer":  func(c *net.TCPConn) error { return play(tls.Server(c, peerSide), 1<<20, step{asked, ""}) },
		"with close_notify":  func(c *net.TCPConn) error { return closeAfter(tls.Server(c, peerSide), "") },
		"close_notify later": func(c *net.TCPConn) error { return closeAfter(tls.Server(c, peerSide), head) },
	} {
		near, far := connect(t)
		played := make(chan error, 1)
		go func() {
			err := peer(far)
			far.Close()
			played <- err
		}()
		p := hop.Peer{Kind: hop.HTTPS, Name: peerName + ":443", TLS: ourSide, Timeout: patience}
		s, _, err := p.Connect(t.Context(), near, target("a.example", 443), "")
		if s != nil || !errors.Is(err, hop.ErrEnded) {
			t.Errorf("%s: got %v, %v", name, s, err)
		}
		if err := <-played; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func closeAfter(c *tls.Conn, answer string) error {
	if err := play(c, 1<<20, step{asked, answer}); err != nil {
		return err
	}
	return c.CloseWrite()
}

func TestTLSPeerIsSlow(t *testing.T) {
	unleaked(t)
	peerSide, ourSide := authority(t)
	for name, peer := range map[string]func(c *net.TCPConn) error{
		"handshake": func(*net.TCPConn) error { return nil },
		"answer":    func(c *net.TCPConn) error { return play(tls.Server(c, peerSide), 1<<20, step{asked, "HTTP/1.1 "}) },
	} {
		for _, want := range []error{hop.ErrTimeout, context.Canceled} {
			near, far := connect(t)
			ctx, cancel := context.WithCancel(t.Context())
			played := make(chan error, 1)
			go func() {
				err := peer(far)
				if errors.Is(want, context.Canceled) {
					cancel()
				}
				played <- err
			}()
			p := hop.Peer{Kind: hop.HTTPS, Name: peerName + ":443", TLS: ourSide, Timeout: patience}
			if errors.Is(want, hop.ErrTimeout) {
				p.Timeout = 300 * time.Millisecond
			}
			s, _, err := p.Connect(ctx, near, target("a.example", 443), "")
			if s != nil || !errors.Is(err, want) {
				t.Errorf("%s: got %v, %v; want %v", name, s, err, want)
			}
			far.Close()
			<-played // with what the timeout has cut off, if the machine is slow
			cancel()
		}
	}
}

const bulk = 16 << 20

// source gives n bytes that seed decides.
func source(n int64, seed uint64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed)}), n)
}

func sumOf(n int64, seed uint64) string {
	h := sha256.New()
	if _, err := io.Copy(h, source(n, seed)); err != nil {
		panic(err)
	}
	return text(h)
}

func text(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// side is an end that bulk goes through.
type side interface {
	io.ReadWriter
	CloseWrite() error
}

// exchange sends bulk both ways between two sides at once, each ending its half,
// and checks that all of it arrives and then the end.
func exchange(t *testing.T, a, b side) {
	t.Helper()
	var all sync.WaitGroup
	for i, c := range []side{a, b} {
		all.Go(func() {
			_, err := io.Copy(struct{ io.Writer }{c}, source(bulk, uint64(i)))
			if err == nil {
				err = c.CloseWrite()
			}
			if err != nil {
				t.Errorf("side %d sends: %v", i, err)
			}
		})
		all.Go(func() {
			h := sha256.New()
			n, err := io.Copy(h, struct{ io.Reader }{c})
			if err != nil || n != bulk || text(h) != sumOf(bulk, uint64(1-i)) {
				t.Errorf("side %d receives %d bytes, %v, or others than were sent", i, n, err)
			}
		})
	}
	all.Wait()
}

func TestBulk(t *testing.T) {
	b := bridge(t, &hop.Peer{Buffers: new(hop.Buffers)}, established)
	exchange(t, b.stream, b.peer)
}

// TestBulkBare is with a send buffer as small as where the kernel grants no
// larger one.
func TestBulkBare(t *testing.T) {
	p := &hop.Peer{}
	p.Tune(0, 0, 1)
	b := bridge(t, p, established)
	exchange(t, b.stream, b.peer)
}

// TestHalfClose ends one half after the other, and uses the one that is left.
func TestHalfClose(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, peerFirst := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, peer first %v", tls.VersionName(version), peerFirst), func(t *testing.T) {
				b := bridge(t, &hop.Peer{}, established, version)
				type conn interface {
					net.Conn
					CloseWrite() error
				}
				var first, second conn = b.stream, b.peer
				if peerFirst {
					first, second = second, first
				}
				expectOpen(t, first, second)
				if _, err := io.WriteString(first, "last"); err != nil {
					t.Fatal(err)
				}
				if err := first.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				expect(t, second, "last")
				expectEOF(t, second)
				for range 3 {
					if _, err := io.WriteString(second, "more"); err != nil {
						t.Fatal(err)
					}
					expect(t, first, "more")
				}
				if err := second.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				expectEOF(t, first)
				expectEOF(t, b.wire) // without the holder doing anything more
			})
		}
	}
}

// unprivileged is the send buffer that a stream gets of a common kernel without
// CAP_NET_ADMIN.
const unprivileged = 212992

// TestTruncation: a TCP connection that ends without close_notify, or with a
// reset, is a reset of the stream, whatever its holder has done before.
func TestTruncation(t *testing.T) {
	type steps []func(t *testing.T, b *bridged)
	much := func(t *testing.T, b *bridged) {
		inBackground(t, func() error { _, err := b.stream.Write(make([]byte, 1<<20)); return err })
		if _, err := io.ReadFull(b.peer, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	halfClose := func(t *testing.T, b *bridged) {
		_ = b.stream.CloseWrite()
		expectEOF(t, b.peer)
	}
	for _, c := range []struct {
		name   string
		before steps
		bare   bool // without a large send buffer: the holder has to do something before it hears
	}{
		{name: "at once"},
		{name: "after a few bytes", before: steps{greet}},
		{name: "after a half-close", before: steps{halfClose}},
		{name: "after bytes and a half-close", before: steps{greet, halfClose}},
		{name: "after much", before: steps{much}, bare: true},
		{name: "after much and little", before: steps{much, greet}},
		{name: "after much and a half-close", before: steps{much, greet, halfClose}},
		{name: "in the middle of much", before: steps{func(t *testing.T, b *bridged) {
			inBackground(t, func() error { _, _ = b.stream.Write(make([]byte, 16<<20)); return nil })
			if _, err := io.ReadFull(b.peer, make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
		}}},
	} {
		for _, reset := range []bool{false, true} {
			for _, send := range []int{0, unprivileged} {
				t.Run(fmt.Sprintf("%s, reset %v, send buffer %d", c.name, reset, send), func(t *testing.T) {
					p := &hop.Peer{}
					p.Tune(10*time.Millisecond, 0, send)
					b := bridge(t, p, established)
					for _, do := range c.before {
						do(t, b)
					}
					if _, err := io.WriteString(b.peer, "half of"); err != nil {
						t.Fatal(err)
					}
					if reset {
						expect(t, b.stream, "half of")
						_ = b.wire.SetLinger(0)
					}
					b.wire.Close()
					if c.bare && send != 0 {
						inBackground(t, func() error { _, _ = b.stream.Write([]byte("x")); return nil })
					}
					expectReset(t, b.stream)
				})
			}
		}
	}
}

func greet(t *testing.T, b *bridged) { expectOpen(t, b.stream, b.peer) }

// TestBare: where the last message is too large to leave a byte of it, a broken
// stream stands still rather than end, until its holder does something.
func TestBare(t *testing.T) {
	for name, c := range map[string]struct {
		do  func(c *net.UnixConn)
		end error
	}{
		"write": {func(c *net.UnixConn) { _, _ = c.Write([]byte("x")) }, syscall.ECONNRESET},
		"close": {func(c *net.UnixConn) { c.Close() }, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			unleaked(t)
			p, err := hop.NewPair(1)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Stream.Close()
			if p.Bare() {
				t.Fatal("bare from the start")
			}
			const n = 2000
			buf := make([]byte, 2*n)
			if _, err := p.Stream.Write(make([]byte, n)); err != nil {
				t.Fatal(err)
			}
			if got, err := p.Take(buf); len(got) != n || err != nil || !p.Bare() {
				t.Fatalf("took %d bytes, %v, bare %v", len(got), err, p.Bare())
			}
			done := make(chan struct{})
			go func() { p.Sever(); close(done) }()
			_ = p.Stream.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if n, err := p.Stream.Read(buf); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the stream gives %d bytes, %v", n, err)
			}
			_ = p.Stream.SetReadDeadline(time.Now().Add(patience))
			c.do(p.Stream)
			<-done
			if n, err := p.Stream.Read(buf); n != 0 || !errors.Is(err, c.end) {
				t.Errorf("the stream ends with %d bytes, %v; want %v", n, err, c.end)
			}
		})
	}
}

// TestPair takes messages of all sizes with buffers of all sizes.
func TestPair(t *testing.T) {
	for _, send := range []int{1, 1 << 21} {
		unleaked(t)
		p, err := hop.NewPair(send)
		if err != nil {
			t.Fatal(err)
		}
		inBackground(t, func() error {
			r := rand.New(rand.NewPCG(1, 2))
			rest := source(1<<20, 7)
			for {
				n, err := io.CopyN(p.Stream, rest, 1+r.Int64N(1+r.Int64N(9000)))
				if errors.Is(err, io.EOF) && n >= 0 {
					return p.Stream.CloseWrite()
				}
				if err != nil {
					return err
				}
			}
		})
		h := sha256.New()
		for i := 0; ; i++ {
			b, err := p.Take(make([]byte, 2+i%5000))
			if errors.Is(err, unix.EAGAIN) {
				continue
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			h.Write(b)
		}
		if text(h) != sumOf(1<<20, 7) {
			t.Error("other bytes than were sent")
		}
		p.Close()
		expectEOF(t, p.Stream)
		p.Stream.Close()
	}
}
