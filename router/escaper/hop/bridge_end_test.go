package hop_test

import (
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper/hop"
)

// TestHolderGoes: a stream that is closed before the peer has ended resets the
// connection.
func TestHolderGoes(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, b *bridged){
		"at once":           func(*testing.T, *bridged) {},
		"after a few bytes": func(t *testing.T, b *bridged) { expectOpen(t, b.stream, b.peer) },
		"with bytes unread": func(t *testing.T, b *bridged) { _, _ = io.WriteString(b.peer, "hello") },
		"after a half-close": func(t *testing.T, b *bridged) {
			_ = b.stream.CloseWrite()
			expectEOF(t, b.peer)
		},
		"while the peer takes nothing":  func(t *testing.T, b *bridged) { fill(t, b.stream) },
		"while it takes nothing itself": func(t *testing.T, b *bridged) { fill(t, b.peer) },
	} {
		t.Run(name, func(t *testing.T) {
			p := &hop.Peer{}
			p.Tune(10*time.Millisecond, 0, 1)
			b := bridge(t, p, established)
			before(t, b)
			b.stream.Close()
			expectReset(t, b.wire)
		})
	}
}

// fill writes to c until nothing moves for a while, which nothing but time can
// tell.
func fill(t *testing.T, c net.Conn) {
	t.Helper()
	for {
		_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := c.Write(make([]byte, 256<<10))
		if errors.Is(err, os.ErrDeadlineExceeded) && n == 0 {
			return
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		if _, within := c.(*tls.Conn); within && err != nil {
			return // it cannot go on after a deadline
		}
	}
}

// TestKill: closing our end of the TCP connection ends the stream.
func TestKill(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, b *bridged){
		"at once":                      func(*testing.T, *bridged) {},
		"after the peer's end":         func(t *testing.T, b *bridged) { _ = b.peer.CloseWrite(); expectEOF(t, b.stream) },
		"while the peer takes nothing": func(t *testing.T, b *bridged) { fill(t, b.stream) },
		"while the stream takes none":  func(t *testing.T, b *bridged) { fill(t, b.peer) },
	} {
		t.Run(name, func(t *testing.T) {
			p := &hop.Peer{}
			p.Tune(10*time.Millisecond, 0, 0)
			b := bridge(t, p, established)
			before(t, b)
			_ = b.near.SetLinger(0)
			b.near.Close()
			if _, err := io.Copy(io.Discard, b.wire); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the peer sees %v", err)
			}
			if name != "after the peer's end" {
				expectReset(t, b.stream)
				return
			}
			// The read half is over: writes fail.
			if !within(func() bool {
				_, err := b.stream.Write([]byte("x"))
				return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
			}) {
				t.Error("the stream takes what nobody gets")
			}
		})
	}
}

// TestPeerResetsAfterItsEnd: the stream's other half fails then, though nothing
// is sent.
func TestPeerResetsAfterItsEnd(t *testing.T) {
	b := bridge(t, &hop.Peer{}, established)
	_ = b.peer.CloseWrite()
	expectEOF(t, b.stream)
	_ = b.wire.SetLinger(0)
	b.wire.Close()
	raw, err := b.stream.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if !within(func() bool {
		p := []unix.PollFd{{}}
		if err := raw.Control(func(fd uintptr) {
			p[0].Fd = int32(fd)
			_, _ = unix.Poll(p, 0)
		}); err != nil {
			t.Fatal(err)
		}
		return p[0].Revents&unix.POLLERR != 0
	}) {
		t.Error("the stream shows no error")
	}
}

// TestLeftBehind: what a holder has written before it closes, after the peer's
// end, still arrives, however slowly the peer takes it.
func TestLeftBehind(t *testing.T) {
	p := &hop.Peer{}
	p.Tune(10*time.Millisecond, 0, 0)
	b := bridge(t, p, established)
	_ = b.peer.CloseWrite()
	expectEOF(t, b.stream)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{b.stream}, source(bulk, 3))
		b.stream.Close()
		sent <- err
	}()
	h := sha256.New()
	n, err := io.Copy(h, b.peer)
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if err != nil || n != bulk || text(h) != sumOf(bulk, 3) {
		t.Errorf("%d bytes arrive, %v, or others than were sent", n, err)
	}
}

// TestLinger: a peer that takes nothing of it is given up.
func TestLinger(t *testing.T) {
	p := &hop.Peer{}
	p.Tune(time.Millisecond, 50*time.Millisecond, 0)
	b := bridge(t, p, established)
	_ = b.peer.CloseWrite()
	expectEOF(t, b.stream)
	fill(t, b.stream)
	b.stream.Close()
	if err := hungUp(b.wire); err != nil { // which is there without a byte being read
		t.Error(err)
	}
}

// hungUp waits until c has been reset.
func hungUp(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, _ = unix.Poll(p, 0)
		return p[0].Revents&unix.POLLERR != 0
	})
}
