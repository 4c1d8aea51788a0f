package relay_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

func TestHalfClose(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	for _, first := range []relay.Side{relay.SideA, relay.SideB} {
		t.Run(first.String(), func(t *testing.T) {
			x := start(t, e, relay.Spec{})
			a, b := x.a, x.b
			if first == relay.SideB {
				a, b = b, a
			}
			send(t, a, "question")
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			expect(t, b, "question")
			expectEOF(t, b)
			send(t, b, "late ")
			expect(t, a, "late ")
			send(t, b, "answer")
			b.Close()
			expect(t, a, "answer")
			expectEOF(t, a)
			want := relay.Result{AToB: 8, BToA: 11, First: first}
			if first == relay.SideB {
				want.AToB, want.BToA = 11, 8
			}
			if r := x.result(t); r != want {
				t.Errorf("got %+v, want %+v", r, want)
			}
		})
	}
}

func TestBothCloseAtOnce(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	for i := range 200 {
		x := start(t, e, relay.Spec{})
		abort := i%2 == 1
		var wg sync.WaitGroup
		for _, c := range []*net.TCPConn{x.a, x.b} {
			wg.Go(func() {
				if abort {
					_ = c.SetLinger(0)
				}
				c.Close()
			})
		}
		wg.Wait()
		r := x.result(t)
		if r.AToB != 0 || r.BToA != 0 || !abort && r.Cause != nil || abort && r.Cause == nil {
			t.Fatalf("abort %v: %+v", abort, r)
		}
	}
}

func TestPrefix(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	for _, size := range []int{1, 5000, 8 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			toB, toA := pattern(size), pattern(size/2)
			pa, pb := slices.Clone(toA), slices.Clone(toB)
			x := start(t, e, relay.Spec{ToB: pb, ToA: pa})
			clear(pa) // Start is done with both
			clear(pb)
			var wg sync.WaitGroup
			for _, side := range []struct {
				c    *net.TCPConn
				want []byte
			}{{x.a, append(toA, "from b"...)}, {x.b, append(toB, "from a"...)}} {
				own := "from a"
				if side.c == x.b {
					own = "from b"
				}
				wg.Go(func() {
					_, _ = io.WriteString(side.c, own)
					_ = side.c.CloseWrite()
					got, err := io.ReadAll(side.c)
					if err != nil || !bytes.Equal(got, side.want) {
						t.Errorf("%s: got %d bytes, %v; want %d", own, len(got), err, len(side.want))
					}
				})
			}
			wg.Wait()
			if r := x.result(t); r.Cause != nil || r.AToB != int64(size+6) || r.BToA != int64(size/2+6) {
				t.Errorf("%+v", r)
			}
		})
	}
}

// TestPrefixToReset hands over bytes for a peer that is gone already.
func TestPrefixToReset(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	a, ra := connect(t)
	b, rb := connect(t)
	defer a.Close()
	_ = b.SetLinger(0)
	b.Close()
	fd := detach(t, rb)
	done := make(chan relay.Result, 1)
	spec := relay.Spec{A: detach(t, ra), B: fd, ToB: []byte("hello"), Done: func(r relay.Result) { done <- r }}
	if _, err := e.Start(spec); err != nil {
		t.Fatal(err)
	}
	r := <-done
	var s *relay.SocketError
	if !errors.As(r.Cause, &s) || s.Side != relay.SideB || r.AToB != 0 {
		t.Errorf("%+v", r)
	}
	expectReset(t, a)
}

func TestResetPassedOn(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	for _, by := range []relay.Side{relay.SideA, relay.SideB} {
		for _, after := range []string{"idle", "data", "bulk", "own half-close", "other's half-close"} {
			t.Run(by.String()+" "+after, func(t *testing.T) {
				x := start(t, e, relay.Spec{})
				a, b := x.a, x.b
				if by == relay.SideB {
					a, b = b, a
				}
				switch after {
				case "data":
					send(t, a, "x")
					expect(t, b, "x")
					send(t, b, "unread")
				case "bulk":
					// b stops reading; the engine holds bytes when the reset comes.
					fillUp(t, a)
				case "own half-close":
					_ = a.CloseWrite()
					expectEOF(t, b)
					send(t, b, "unread by a")
				case "other's half-close":
					_ = b.CloseWrite()
					expectEOF(t, a)
				}
				_ = a.SetLinger(0)
				a.Close()
				if after == "own half-close" {
					// After an end of stream only writing shows a reset.
					if !within(func() bool { _, err := b.Write([]byte("x")); return errors.Is(err, unix.EPIPE) }) {
						t.Error("writing goes on")
					}
				} else {
					expectReset(t, b)
				}
				r := x.result(t)
				var s *relay.SocketError
				if !errors.As(r.Cause, &s) || s.Side != by {
					t.Fatalf("cause %v", r.Cause)
				}
				if !errors.Is(r.Cause, unix.ECONNRESET) && !errors.Is(r.Cause, unix.EPIPE) {
					t.Errorf("cause %v", r.Cause)
				}
			})
		}
	}
}

func TestKill(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	why := errors.New("the path went away")
	for _, bulk := range []bool{false, true} {
		for _, cause := range []error{why, nil} {
			t.Run(fmt.Sprint(bulk, cause), func(t *testing.T) {
				x := start(t, e, relay.Spec{})
				var wg, writers sync.WaitGroup
				defer wg.Wait()
				var wrote [2]error
				if bulk {
					for i, c := range []*net.TCPConn{x.a, x.b} {
						writers.Go(func() { _, wrote[i] = io.Copy(c, zeros{}) })
					}
					for _, c := range []*net.TCPConn{x.a, x.b} {
						if _, err := io.CopyN(io.Discard, c, 10<<20); err != nil {
							t.Fatal(err)
						}
					}
				}
				for range 8 {
					wg.Go(func() { x.Kill(cause) })
				}
				for i, c := range []*net.TCPConn{x.a, x.b} {
					// The kernel tells of a reset once: the reader or the writer.
					_, err := io.Copy(io.Discard, c)
					writers.Wait()
					if !errors.Is(err, unix.ECONNRESET) && !errors.Is(wrote[i], unix.ECONNRESET) {
						t.Errorf("side %d: read %v, wrote %v", i, err, wrote[i])
					}
				}
				want := cause
				if want == nil {
					want = relay.ErrKilled
				}
				if r := x.result(t); !errors.Is(r.Cause, want) {
					t.Errorf("cause %v, want %v", r.Cause, want)
				}
				x.Kill(why) // after the end: nothing
			})
		}
	}
}

func TestIdleLimit(t *testing.T) {
	e := engine(t, relay.Options{Tick: 5 * time.Millisecond}, relay.Tuning{})
	const idle = time.Second
	began := time.Now()
	x := start(t, e, relay.Spec{Idle: idle})
	// Bytes one way only keep it open.
	for range 12 {
		send(t, x.b, "x")
		expect(t, x.a, "x")
		time.Sleep(idle / 8)
	}
	last := time.Now()
	if last.Sub(began) < idle {
		t.Fatal("the test is no test")
	}
	send(t, x.b, "x")
	expectReset(t, x.a)
	expectReset(t, x.b)
	if took := time.Since(last); took < idle {
		t.Errorf("ended after %v", took)
	}
	if r := x.result(t); !errors.Is(r.Cause, relay.ErrIdle) || r.BToA != 13 {
		t.Errorf("%+v", r)
	}
}

func TestIdleLimitOfStalledReader(t *testing.T) {
	e := engine(t, relay.Options{Tick: 5 * time.Millisecond}, relay.Tuning{})
	x := start(t, e, relay.Spec{Idle: 300 * time.Millisecond})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _, _ = io.Copy(x.a, zeros{}) })
	if r := x.result(t); !errors.Is(r.Cause, relay.ErrIdle) {
		t.Errorf("%+v", r)
	}
	expectReset(t, x.b)
}

func TestTotalLimit(t *testing.T) {
	e := engine(t, relay.Options{Tick: 5 * time.Millisecond}, relay.Tuning{})
	const total = 150 * time.Millisecond
	began := time.Now()
	x := start(t, e, relay.Spec{Idle: time.Hour, Total: total})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _, _ = io.Copy(x.a, zeros{}) })
	expectReset(t, x.b)
	if took := time.Since(began); took < total {
		t.Errorf("ended after %v", took)
	}
	if r := x.result(t); !errors.Is(r.Cause, relay.ErrTotal) {
		t.Errorf("cause %v", r.Cause)
	}
}

func TestClose(t *testing.T) {
	unleaked(t)
	e, err := relay.New(relay.Options{Workers: 3})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	var all []*tunnel
	for i := range 60 {
		x := start(t, e, relay.Spec{Idle: time.Hour})
		all = append(all, x)
		switch i % 3 {
		case 0: // stalled
			wg.Go(func() {
				if _, err := io.Copy(x.a, zeros{}); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("wrote: %v", err)
				}
			})
		case 1:
			wg.Go(func() { _, _ = io.Copy(x.a, zeros{}) })
			wg.Go(func() { expectReset(t, x.b) })
		default:
			wg.Go(func() { expectReset(t, x.b) })
		}
	}
	if n := e.Open(); n != len(all) {
		t.Errorf("%d open, want %d", n, len(all))
	}
	var closers sync.WaitGroup
	for range 3 {
		closers.Go(func() { _ = e.Close() })
	}
	closers.Wait()
	for _, x := range all {
		select {
		case r := <-x.done:
			if !errors.Is(r.Cause, relay.ErrClosed) {
				t.Errorf("cause %v", r.Cause)
			}
		default:
			t.Fatal("Close returned before Done")
		}
		x.Kill(nil)
	}
	a, ra := connect(t)
	b, rb := connect(t)
	defer a.Close()
	defer b.Close()
	if _, err := e.Start(relay.Spec{A: detach(t, ra), B: detach(t, rb)}); !errors.Is(err, relay.ErrClosed) {
		t.Errorf("Start after Close: %v", err)
	}
	expectReset(t, a)
	expectReset(t, b)
}

func TestStartFails(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	for _, bad := range []relay.Side{relay.SideA, relay.SideB} {
		a, ra := connect(t)
		defer a.Close()
		spec := relay.Spec{A: detach(t, ra), B: -1, Done: func(relay.Result) { t.Error("Done called") }}
		if bad == relay.SideA {
			spec.A, spec.B = spec.B, spec.A
		}
		if x, err := e.Start(spec); x != nil || !errors.Is(err, unix.EBADF) {
			t.Errorf("got %v, %v", x, err)
		}
		expectReset(t, a)
	}
	a, ra := connect(t)
	defer a.Close()
	fd := detach(t, ra)
	if x, err := e.Start(relay.Spec{A: fd, B: fd}); x != nil || !errors.Is(err, unix.EEXIST) {
		t.Errorf("one descriptor twice: %v, %v", x, err)
	}
	expectReset(t, a)
	if n := e.Open(); n != 0 {
		t.Errorf("%d open", n)
	}
	x := start(t, e, relay.Spec{})
	send(t, x.a, "still well")
	expect(t, x.b, "still well")
}

func TestDetach(t *testing.T) {
	unleaked(t)
	a, b := connect(t)
	defer a.Close()
	fd := detach(t, b)
	if _, err := b.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is still open: %v", err)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %x, %v", flags, err)
	}
	if _, err := unix.Write(fd, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	expect(t, a, "hello")
	unix.Close(fd)
	expectEOF(t, a)
	if fd, err := relay.Detach(b); fd != -1 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed connection: %d, %v", fd, err)
	}
}

// TestStaleEvents: a closed socket whose description lives on (as in a forked
// child) goes on giving events. They must not reach the tunnel that has its place.
func TestStaleEvents(t *testing.T) {
	e := engine(t, relay.Options{Workers: 1}, relay.Tuning{})
	a, ra := connect(t)
	b, rb := connect(t)
	defer a.Close()
	defer b.Close()
	fd := detach(t, ra)
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	done := make(chan relay.Result, 1)
	old, err := e.Start(relay.Spec{A: fd, B: detach(t, rb), Done: func(r relay.Result) { done <- r }})
	if err != nil {
		t.Fatal(err)
	}
	old.Kill(nil)
	<-done
	// The heir has the old place, and side A that nobody reads any more: an
	// error event for it would end it.
	x := start(t, e, relay.Spec{})
	if err := x.a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	expectEOF(t, x.b)
	_ = a.SetLinger(0)
	a.Close() // EPOLLERR, EPOLLHUP, EPOLLIN for ever on the duplicate
	for range 1000 {
		send(t, x.b, "x")
		expect(t, x.a, "x")
	}
	x.b.Close()
	expectEOF(t, x.a)
	if r := x.result(t); r.Cause != nil || r.BToA != 1000 {
		t.Errorf("%+v", r)
	}
}

// TestSlowDone: a Done that does not return holds up no bytes.
func TestSlowDone(t *testing.T) {
	e := engine(t, relay.Options{Workers: 1}, relay.Tuning{})
	a, ra := connect(t)
	b, rb := connect(t)
	entered, release := make(chan struct{}), make(chan struct{})
	_, err := e.Start(relay.Spec{A: detach(t, ra), B: detach(t, rb), Done: func(relay.Result) {
		close(entered)
		<-release
	}})
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.Close()
	<-entered
	x := start(t, e, relay.Spec{})
	send(t, x.a, "passes")
	expect(t, x.b, "passes")
	if n := e.Open(); n != 1 {
		t.Errorf("%d open", n)
	}
	close(release)
}
