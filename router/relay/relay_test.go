package relay_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// engine makes an engine that the test's end closes; goroutines and descriptors
// must then be as before.
func engine(t *testing.T, o relay.Options, tune relay.Tuning) *relay.Engine {
	t.Helper()
	unleaked(t)
	if o.Workers == 0 {
		o.Workers = workers
	}
	e, err := relay.NewTuned(o, tune)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if n := e.Open(); n != 0 {
			t.Errorf("%d tunnels open after Close", n)
		}
		if n := e.Pipes(); n != 0 {
			t.Errorf("%d pipes after Close", n)
		}
	})
	return e
}

// unleaked checks at the test's end that it left no goroutine and no descriptor.
func unleaked(t *testing.T) {
	t.Helper()
	// The poller's own descriptors come with the first socket.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	before := files(t)
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore)
		var after []string
		within(func() bool {
			after = files(t)
			return len(after) <= len(before)
		})
		if len(after) > len(before) {
			t.Errorf("descriptors: %d before, %d after: %v", len(before), len(after), after)
		}
	})
}

func files(t *testing.T) []string {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, n := range names {
		to, err := os.Readlink("/proc/self/fd/" + n.Name())
		if err == nil && !strings.HasPrefix(to, "/proc/") {
			out = append(out, n.Name()+" "+to)
		}
	}
	return out
}

// within polls for what has no event to await.
func within(ok func() bool) bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return true
		}
	}
	return ok()
}

// connect returns the ends of a TCP connection over loopback.
func connect(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	return c, d
}

func detach(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	fd, err := relay.Detach(c)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// tunnel is a relayed pair of peers.
type tunnel struct {
	*relay.Tunnel
	a, b *net.TCPConn // the peers
	fd   [2]int       // the engine's ends
	done chan relay.Result
}

// start relays between two peers, with the rest of spec as given.
func start(t testing.TB, e *relay.Engine, spec relay.Spec) *tunnel {
	t.Helper()
	a, ra := connect(t)
	b, rb := connect(t)
	x := &tunnel{a: a, b: b, done: make(chan relay.Result, 2)}
	x.fd = [2]int{detach(t, ra), detach(t, rb)}
	spec.A, spec.B = x.fd[0], x.fd[1]
	spec.Done = func(r relay.Result) { x.done <- r }
	var err error
	if x.Tunnel, err = e.Start(spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	for _, c := range []*net.TCPConn{a, b} {
		if err := c.SetDeadline(time.Now().Add(3 * patience)); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// result waits for the end, and checks that it comes once.
func (x *tunnel) result(t testing.TB) relay.Result {
	t.Helper()
	select {
	case r := <-x.done:
		select {
		case <-x.done:
			t.Error("Done called twice")
		default:
		}
		return r
	case <-time.After(patience):
		t.Fatal("the tunnel does not end")
		return relay.Result{}
	}
}

func send(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != s {
		t.Fatalf("got %q, %v; want %q", b, err, s)
	}
}

func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("got %d bytes, %v; want EOF", n, err)
	}
}

// expectReset reads c dry and checks that a reset ends it.
func expectReset(t testing.TB, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v; want a reset", err)
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

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

// fillUp writes the pattern, over and over, to c until nothing on its way moves,
// and returns how much it took.
func fillUp(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	block := pattern(fillBlock)
	total, still := 0, 0
	for still < 20 {
		n := 0
		if err := raw.Control(func(fd uintptr) { n, err = unix.Write(int(fd), block[total%fillBlock:]) }); err != nil {
			t.Fatal(err)
		}
		if errors.Is(err, unix.EAGAIN) {
			// Whether it is over, nothing but time can tell.
			still++
			time.Sleep(2 * time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		total, still = total+n, 0
	}
	return total
}

const fillBlock = 256 << 10

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

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

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
	if _, err := e.Start(relay.Spec{A: detach(t, ra), B: detach(t, rb)}); err != relay.ErrClosed {
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

// TestStalledReader: what a reader that stops costs beyond the sockets' own buffers.
func TestStalledReader(t *testing.T) {
	for _, s := range []struct {
		name  string
		pipes int
		tune  relay.Tuning
		files bool // may hold a pipe
	}{
		{"spliced", 0, relay.Tuning{}, true},
		{"copied", 0, relay.Tuning{Large: 1 << 20}, false},
	} {
		t.Run(s.name, func(t *testing.T) {
			e := engine(t, relay.Options{Pipes: s.pipes}, s.tune)
			began := time.Now()
			x := start(t, e, relay.Spec{})
			// Bulk first, so that the direction is in its stride.
			warm := make(chan error, 1)
			go func() {
				_, err := x.a.Write(make([]byte, 32<<20))
				warm <- err
			}()
			if _, err := io.CopyN(io.Discard, x.b, 32<<20); err != nil {
				t.Fatal(err)
			}
			if err := <-warm; err != nil {
				t.Fatal(err)
			}
			sent := fillUp(t, x.a)
			var peers, in, out, held int
			measure := func() {
				peers = queued(t, sysfd(t, x.a), unix.TIOCOUTQ) + queued(t, sysfd(t, x.b), unix.TIOCINQ)
				in, out = queued(t, x.fd[0], unix.TIOCINQ), queued(t, x.fd[1], unix.TIOCOUTQ)
				held = sent - peers - in - out
			}
			// Bytes that arrived and are not acknowledged yet count twice.
			for last, same := -1, 0; same < 50; time.Sleep(5 * time.Millisecond) {
				if measure(); held == last && held > 0 {
					same++
				} else {
					last, same = held, 0
				}
				if same == 0 && time.Since(began) > patience {
					break
				}
			}
			t.Logf("taken %d: in the peers' sockets %d, in ours %d (A) and %d (B), held by the relay %d", sent, peers, in, out, held)
			if held <= 0 || held >= 1<<20 {
				t.Errorf("the relay holds %d bytes", held)
			}
			if !s.files && e.Pipes() > 0 {
				t.Errorf("%d pipes", e.Pipes())
			}
			// The other direction is not held up.
			send(t, x.b, "back")
			expect(t, x.a, "back")
			// And nothing was lost.
			_ = x.a.CloseWrite()
			got, err := io.ReadAll(x.b)
			want := bytes.Repeat(pattern(fillBlock), sent/fillBlock+1)[:sent]
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %d of %d, %v", len(got), sent, err)
			}
		})
	}
}

func sysfd(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := raw.Control(func(fd uintptr) { n = int(fd) }); err != nil {
		t.Fatal(err)
	}
	return n
}

func queued(t testing.TB, fd int, what uint) int {
	t.Helper()
	n, err := unix.IoctlGetInt(fd, what)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestManyStalledReaders: the pipes are bounded, what finds none is copied, and
// what all of them hold is bounded with them.
func TestManyStalledReaders(t *testing.T) {
	const most, n = 4, 12
	e := engine(t, relay.Options{Pipes: most}, relay.Tuning{})
	var all []*tunnel
	var sent [n]int
	var wg sync.WaitGroup
	for i := range n {
		x := start(t, e, relay.Spec{})
		all = append(all, x)
		wg.Go(func() { sent[i] = fillUp(t, x.a) })
	}
	wg.Wait()
	if got := e.Pipes(); got > most || got == 0 {
		t.Errorf("%d pipes, at most %d", got, most)
	}
	for i, x := range all {
		_ = x.a.CloseWrite()
		got, err := io.Copy(io.Discard, x.b)
		if err != nil || got != int64(sent[i]) {
			t.Errorf("tunnel %d: got %d of %d, %v", i, got, sent[i], err)
		}
		x.b.Close()
		if r := x.result(t); r.Cause != nil || r.AToB != got {
			t.Errorf("%+v", r)
		}
	}
}

// TestNoSpinning: the states in which a level-triggered event could repeat for
// ever cost no processor time.
func TestNoSpinning(t *testing.T) {
	e := engine(t, relay.Options{Workers: 1}, relay.Tuning{})
	for _, s := range []struct {
		name string
		do   func(x *tunnel)
	}{
		{"idle", func(*tunnel) {}},
		{"half-closed", func(x *tunnel) { _ = x.a.CloseWrite(); expectEOF(t, x.b) }},
		{"reader stopped", func(x *tunnel) { fillUp(t, x.a) }},
		{"reader stopped, sender ended", func(x *tunnel) { fillUp(t, x.a); _ = x.a.CloseWrite() }},
		{"reader stopped, both ended", func(x *tunnel) {
			fillUp(t, x.a)
			_ = x.b.CloseWrite()
			expectEOF(t, x.a)
			_ = x.a.CloseWrite()
		}},
	} {
		t.Run(s.name, func(t *testing.T) {
			x := start(t, e, relay.Spec{})
			s.do(x)
			const look = 200 * time.Millisecond
			from := cpu(t)
			time.Sleep(look)
			if used := cpu(t) - from; used > look/2 {
				t.Errorf("%v of processor time in %v", used, look)
			}
			// And it is not stuck.
			_ = x.a.CloseWrite()
			if _, err := io.Copy(io.Discard, x.b); err != nil {
				t.Error(err)
			}
			x.b.Close()
			if r := x.result(t); r.Cause != nil {
				t.Error(r.Cause)
			}
		})
	}
}

func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestNoDescriptors: with none left for pipes, bulk is copied, the log says so
// once, and splicing comes back with the descriptors.
func TestNoDescriptors(t *testing.T) {
	var log lockedBuffer
	e := engine(t, relay.Options{Workers: 1, Logger: slog.New(slog.NewTextHandler(&log, nil))}, relay.Tuning{})
	x := start(t, e, relay.Spec{})

	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free), Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	restore := sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	})
	defer restore()

	block := pattern(1 << 20)
	round := func() {
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = x.a.Write(block) })
		got := make([]byte, len(block))
		if _, err := io.ReadFull(x.b, got); err != nil || !bytes.Equal(got, block) {
			t.Errorf("bytes differ, %v", err)
		}
		wg.Wait()
	}
	if !within(func() bool { round(); return strings.Contains(log.String(), "no pipes") }) {
		t.Error("the log does not tell")
	}
	for range 20 {
		round()
	}
	if n := strings.Count(log.String(), "no pipes"); n != 1 || !strings.Contains(log.String(), "too many open files") {
		t.Errorf("log: %s", log.String())
	}
	if e.Pipes() != 0 {
		t.Errorf("%d pipes", e.Pipes())
	}
	restore()
	if !within(func() bool { round(); return e.Pipes() > 0 }) {
		t.Error("splicing does not come back")
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestPipesGoBack: after bulk a tunnel holds its two descriptors, and the free
// pipes are closed when nobody has needed them for a while.
func TestPipesGoBack(t *testing.T) {
	e := engine(t, relay.Options{Workers: 1}, relay.Tuning{})
	x := start(t, e, relay.Spec{})
	before := len(files(t))
	go func() { _, _ = x.a.Write(make([]byte, 16<<20)) }()
	if _, err := io.CopyN(io.Discard, x.b, 16<<20); err != nil {
		t.Fatal(err)
	}
	if n := e.Pipes(); n != 1 {
		t.Fatalf("%d pipes after bulk one way, want 1", n)
	}
	if !within(func() bool { return e.Pipes() == 0 }) {
		t.Error("the free pipe is kept")
	}
	if after := len(files(t)); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
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
