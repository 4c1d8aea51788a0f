package relay_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

// echo answers a client's first bytes with a letter and what it said, and goes
// on until the client closes or it is cut.
func echo(t *testing.T, f *relay.Front, letter string) func(*relay.Task, relay.Accepted) {
	return func(k *relay.Task, a relay.Accepted) {
		b := &relay.Bare{Task: k}
		place := f.Track(b)
		defer f.Untrack(place, b)
		defer func() { _ = unix.Close(a.FD) }()
		var buf [64]byte
		for {
			n, err := unix.Read(a.FD, buf[:])
			switch {
			case errors.Is(err, unix.EAGAIN):
				if _, err := k.Wait(a.FD, unix.EPOLLIN, time.Time{}); err != nil {
					if !errors.Is(err, relay.ErrStopped) {
						t.Errorf("wait: %v", err)
					}
					return
				}
			case err != nil || n == 0:
				return
			default:
				if _, err := unix.Write(a.FD, append([]byte(letter), buf[:n]...)); err != nil {
					t.Errorf("write: %v", err)
				}
			}
		}
	}
}

// mixed serves clients by the first byte that they say.
func mixed(t *testing.T, idle time.Duration) (*relay.Front, func() *net.TCPConn, <-chan error) {
	t.Helper()
	e := engine(t, relay.Options{Tick: 5 * time.Millisecond}, relay.Tuning{})
	f := relay.NewFront(relay.FrontOptions{Name: "any", Relay: e})
	one, other := echo(t, f, "1"), echo(t, f, "2")
	m := &relay.Mixed{Front: f, Idle: idle, Begin: func(first byte) func(*relay.Task, relay.Accepted) {
		if first == 5 {
			return one
		}
		return other
	}}
	tl, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := relay.NewListener(tl)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- m.Serve(l) }()
	return f, func() *net.TCPConn {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c.(*net.TCPConn)
	}, served
}

func shutdown(t *testing.T, f *relay.Front, served <-chan error, patience time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := f.Shutdown(ctx)
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	if n := f.Open(); n != 0 {
		t.Errorf("%d are open after the shutdown", n)
	}
	return err
}

func TestMixedTellsProtocolsApart(t *testing.T) {
	f, dial, served := mixed(t, 0)
	silent := dial()
	var wg sync.WaitGroup
	for i := range 20 {
		c := dial()
		wg.Go(func() {
			say, want := "\x05abc", "1\x05abc"
			if i%2 == 0 {
				say, want = "GET /", "2GET /"
			}
			send(t, c, say)
			expect(t, c, want)
			_ = c.CloseWrite()
			expectEOF(t, c)
		})
	}
	wg.Wait()
	gone := dial()
	_ = gone.Close() // says nothing at all
	if !within(func() bool { return f.Open() == 1 }) {
		t.Errorf("%d are open beside the silent one", f.Open()-1)
	}
	if err := shutdown(t, f, served, patience); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	expectEOF(t, silent)
}

func TestMixedIdle(t *testing.T) {
	f, dial, served := mixed(t, 20*time.Millisecond)
	expectEOF(t, dial())
	if err := shutdown(t, f, served, patience); err != nil {
		t.Errorf("shutdown: %v", err)
	}
}

// TestMixedIsOneUnit: what each protocol has open is drained, and cut, with the
// port that they share.
func TestMixedIsOneUnit(t *testing.T) {
	f, dial, served := mixed(t, 0)
	a, b := dial(), dial()
	send(t, a, "\x05")
	send(t, b, "G")
	expect(t, a, "1\x05")
	expect(t, b, "2G")
	if err := f.Quiesce(); err != nil {
		t.Fatal(err)
	}
	send(t, a, "still")
	expect(t, a, "1still")
	if n := f.Open(); n < 2 {
		t.Errorf("%d are open, and two are under way", n)
	}
	_ = a.Close()
	if err := shutdown(t, f, served, 50*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown: %v", err)
	}
	expectEOF(t, b)
	if f.Context().Err() == nil {
		t.Error("the context of what was cut goes on")
	}
}
