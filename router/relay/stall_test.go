package relay_test

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

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
				if measure(); held == last && held >= 0 {
					same++
				} else {
					last, same = held, 0
				}
				if same == 0 && time.Since(began) > patience {
					break
				}
			}
			t.Logf("taken %d: in the peers' sockets %d, in ours %d (A) and %d (B), held by the relay %d", sent, peers, in, out, held)
			if held < 0 || held >= 1<<20 {
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
