package hop_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper/hop"
	"wayout/router/relay"
)

// relayed puts a relay between a client and b.
func (b *bridged) relayed(t *testing.T) (client *net.TCPConn, engine *relay.Engine, done chan relay.Result) {
	t.Helper()
	e, err := relay.New(relay.Options{Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	client, server := connect(t)
	done = make(chan relay.Result, 1)
	if _, err := e.Start(relay.Spec{
		A: detach(t, server), B: detach(t, b.stream), ToA: []byte(b.early),
		Done: func(r relay.Result) {
			hop.End(b.stream, r.Cause)
			done <- r
		},
	}); err != nil {
		t.Fatal(err)
	}
	return client, e, done
}

// detach is what the relay takes: a descriptor of its own.
func detach(t *testing.T, c hop.Stream) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	ctlErr := raw.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(ctlErr, err); err != nil {
		t.Fatal(err)
	}
	c.Close()
	return fd
}

func result(t *testing.T, done chan relay.Result) relay.Result {
	t.Helper()
	select {
	case r := <-done:
		return r
	case <-time.After(patience):
		t.Fatal("the tunnel does not end")
		return relay.Result{}
	}
}

func TestRelayBulk(t *testing.T) {
	for _, send := range []int{0, 1 << 16} {
		t.Run(fmt.Sprint(send), func(t *testing.T) {
			p := &hop.Peer{Buffers: new(hop.Buffers)}
			p.Tune(0, 0, send)
			b := bridge(t, p, established)
			client, _, done := b.relayed(t)
			exchange(t, client, b.peer)
			if r := result(t, done); r.Cause != nil || r.AToB != bulk || r.BToA != bulk {
				t.Errorf("got %+v", r)
			}
		})
	}
}

// TestRelaySplices: bulk to the stream goes through a pipe. While the peer takes
// nothing, the pipe is full and so there to be seen.
func TestRelaySplices(t *testing.T) {
	for _, upload := range []bool{true, false} {
		t.Run(fmt.Sprintf("upload %v", upload), func(t *testing.T) {
			b := bridge(t, &hop.Peer{}, established)
			client, _, done := b.relayed(t)
			var from, to side = client, b.peer
			if !upload {
				from, to = to, from
			}
			inBackground(t, func() error {
				_, err := io.Copy(struct{ io.Writer }{from}, source(4*bulk, 5))
				return errors.Join(err, from.CloseWrite())
			})
			if !within(func() bool { return strings.Contains(fmt.Sprint(files(t)), "pipe:") }) {
				t.Error("no pipe is in use")
			}
			h := sha256.New()
			n, err := io.Copy(h, struct{ io.Reader }{to})
			if err != nil || n != 4*bulk || text(h) != sumOf(4*bulk, 5) {
				t.Errorf("%d bytes arrive, %v, or others than were sent", n, err)
			}
			if err := to.CloseWrite(); err != nil {
				t.Error(err)
			}
			if r := result(t, done); r.Cause != nil {
				t.Errorf("got %+v", r)
			}
		})
	}
}

// TestRelayTruncation: the client sees a reset.
func TestRelayTruncation(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, client *net.TCPConn, b *bridged){
		"at once": func(*testing.T, *net.TCPConn, *bridged) {},
		"after the client's end": func(t *testing.T, client *net.TCPConn, b *bridged) {
			_, _ = io.WriteString(client, "ask")
			_ = client.CloseWrite()
			expect(t, b.peer, "ask")
			expectEOF(t, b.peer)
		},
		"after an upload": func(t *testing.T, client *net.TCPConn, b *bridged) {
			inBackground(t, func() error { _, err := io.Copy(client, source(bulk, 1)); return err })
			if _, err := io.CopyN(io.Discard, b.peer, bulk); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := bridge(t, &hop.Peer{}, established)
			client, _, done := b.relayed(t)
			before(t, client, b)
			if _, err := io.WriteString(b.peer, "half of"); err != nil {
				t.Fatal(err)
			}
			expect(t, client, "half of")
			_ = b.wire.CloseWrite()
			expectReset(t, client)
			if r := result(t, done); r.Cause == nil {
				t.Errorf("got %+v", r)
			}
		})
	}
}

// TestRelayEndsAfterPeer: after the peer's own good end, a client that closes is a
// close for it, and one that gives up a reset.
func TestRelayEndsAfterPeer(t *testing.T) {
	for _, gives := range []bool{false, true} {
		t.Run(fmt.Sprintf("gives up %v", gives), func(t *testing.T) {
			b := bridge(t, &hop.Peer{}, established)
			client, _, done := b.relayed(t)
			_ = b.peer.CloseWrite()
			expectEOF(t, client)
			if _, err := io.WriteString(client, "half of"); err != nil {
				t.Fatal(err)
			}
			expect(t, b.peer, "half of")
			if gives {
				_ = client.SetLinger(0)
			}
			client.Close()
			r := result(t, done)
			_, err := io.Copy(io.Discard, b.peer)
			if gives && (r.Cause == nil || !errors.Is(err, syscall.ECONNRESET)) || !gives && (r.Cause != nil || err != nil) {
				t.Errorf("the relay says %v, the peer sees %v", r.Cause, err)
			}
		})
	}
}

// TestRelayKill: what ends the tunnel resets the connection to the peer.
func TestRelayKill(t *testing.T) {
	for _, who := range []string{"engine", "client"} {
		t.Run(who, func(t *testing.T) {
			b := bridge(t, &hop.Peer{}, established+"early")
			client, e, done := b.relayed(t)
			expect(t, client, "early")
			expectOpen(t, client, b.peer)
			if who == "engine" {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
			} else {
				_ = client.SetLinger(0)
				client.Close()
			}
			expectReset(t, b.wire)
			if r := result(t, done); r.Cause == nil {
				t.Errorf("got %+v", r)
			}
		})
	}
}

// TestBuffersComeBack: a stream goes from large reads to small ones and on.
func TestBuffersComeBack(t *testing.T) {
	b := bridge(t, &hop.Peer{Buffers: new(hop.Buffers)}, established)
	big := bytes.Repeat([]byte("x"), 100_000)
	for range 3 {
		expectOpen(t, b.stream, b.peer)
		sent := make(chan error, 1)
		go func() { _, err := b.peer.Write(big); sent <- err }()
		got := make([]byte, len(big))
		if _, err := io.ReadFull(b.stream, got); err != nil || !bytes.Equal(got, big) {
			t.Errorf("got other bytes, %v", err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
	}
}
