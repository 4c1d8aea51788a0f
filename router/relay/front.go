package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrStopped ends the waits of what a Front ends.
var ErrStopped = errors.New("stopped")

// FrontOptions of a Front. Relay is required.
type FrontOptions struct {
	Name   string // the server's name, in the log
	Relay  *Engine
	Logger *slog.Logger // nil: no log
}

// Front is what a front end is beside its protocol: it accepts clients, knows
// what is open, and drains it as one. Front ends of several protocols may share
// a Front.
type Front struct {
	o        FrontOptions
	ctx      context.Context // of what is waited for on behalf of clients; ends with a cut
	cancel   context.CancelFunc
	draining atomic.Bool
	open     atomic.Int64  // what is tracked
	quiet    chan struct{} // told when open comes to 0 while draining
	next     atomic.Uint32
	shards   [16]Shard

	stop      chan struct{} // closed when draining begins
	mu        sync.Mutex    // of acceptors
	acceptors map[*Acceptor]struct{}
}

// Shard is a part of the set of what is open, with a lock of its own.
type Shard struct {
	mu   sync.Mutex
	open map[Tracked]struct{}
	_    [40]byte // shards share no cache line
}

// Tracked is a client connection, or what has become of one. Both methods are
// called with a lock held: they do not wait, nor track or untrack anything.
type Tracked interface {
	EndIdle() // ends it if it waits for a request
	Cut()     // ends it
}

// NewFront makes a Front. It opens nothing.
func NewFront(o FrontOptions) *Front {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Front{o: o, quiet: make(chan struct{}, 1), acceptors: map[*Acceptor]struct{}{}, stop: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	for i := range f.shards {
		f.shards[i].open = map[Tracked]struct{}{}
	}
	return f
}

// Serve lets the workers accept clients on l until Shutdown, and then returns
// nil. For each begin is called, as a task. Serve closes l. Errors that pass,
// such as no descriptors being left, are waited out, with one line in the log
// for each burst.
func (f *Front) Serve(l *Listener, begin func(*Task, Accepted)) error {
	f.mu.Lock()
	if f.draining.Load() {
		f.mu.Unlock()
		return l.Close()
	}
	a, err := f.o.Relay.Accept(l, begin)
	if err != nil {
		f.mu.Unlock()
		return err
	}
	f.acceptors[a] = struct{}{}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.acceptors, a)
		f.mu.Unlock()
		// Shutdown may have closed it already.
		_ = a.Close()
	}()

	const shortest, longest = 5 * time.Millisecond, time.Second
	var pause time.Duration
	var last time.Time // that it went on
	for {
		select {
		case err = <-a.Errors():
		case <-f.stop:
			return nil
		}
		switch {
		case f.draining.Load():
			return nil
		case !passes(err):
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		case time.Since(last) > longest: // a new burst
			pause = 0
			f.o.Logger.Warn("accept failed, trying on", "server", f.o.Name, "listen", l.Addr().String(), "err", err)
		}
		pause = min(max(2*pause, shortest), longest)
		select {
		case <-time.After(pause):
		case <-f.stop:
			return nil
		}
		last = time.Now()
		if err := a.Resume(); err != nil && !f.draining.Load() {
			return err
		}
	}
}

// passes reports whether an error of accept is about the moment and not about
// the listener.
func passes(err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	switch {
	case errors.Is(err, syscall.EBADF), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOTSOCK), errors.Is(err, io.EOF):
		return false
	}
	return true
}

// Track takes t into the set of what is open, and returns its place there.
func (f *Front) Track(t Tracked) *Shard {
	sh := &f.shards[int(f.next.Add(1))%len(f.shards)]
	f.open.Add(1)
	sh.mu.Lock()
	sh.open[t] = struct{}{}
	sh.mu.Unlock()
	return sh
}

// Untrack takes t out of its place.
func (f *Front) Untrack(sh *Shard, t Tracked) {
	sh.mu.Lock()
	delete(sh.open, t)
	sh.mu.Unlock()
	if f.open.Add(-1) == 0 && f.draining.Load() {
		f.tellQuiet()
	}
}

func (f *Front) tellQuiet() {
	select {
	case f.quiet <- struct{}{}:
	default:
	}
}

func (f *Front) each(do func(Tracked)) {
	for i := range f.shards {
		sh := &f.shards[i]
		sh.mu.Lock()
		for t := range sh.open {
			do(t)
		}
		sh.mu.Unlock()
	}
}

// Open returns how many are tracked.
func (f *Front) Open() int { return int(f.open.Load()) }

// Draining reports whether Quiesce has been called: no request is to begin.
func (f *Front) Draining() bool { return f.draining.Load() }

// Context ends when what is open is cut, and when the Front has been shut down.
func (f *Front) Context() context.Context { return f.ctx }

// Quiesce stops accepting and ends the client connections that wait for a
// request. No request begins after it has returned; those under way go on.
func (f *Front) Quiesce() error {
	f.mu.Lock()
	if !f.draining.Swap(true) {
		close(f.stop)
	}
	var errs []error
	for a := range f.acceptors {
		// What it has accepted is tracked when it is closed.
		if err := a.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close listener: %w", err))
		}
	}
	clear(f.acceptors)
	f.mu.Unlock()
	f.each(Tracked.EndIdle)
	return errors.Join(errs...)
}

// Shutdown is Quiesce, and waits for the requests and tunnels that are under
// way. When ctx ends first, these are cut and its error is returned.
func (f *Front) Shutdown(ctx context.Context) error {
	err := f.Quiesce()
	for f.open.Load() > 0 {
		select {
		case <-f.quiet:
		case <-ctx.Done():
			f.cancel()
			f.each(Tracked.Cut)
			f.awaitCut()
			return errors.Join(err, ctx.Err())
		}
	}
	f.cancel()
	f.tellQuiet() // whoever else may be waiting
	return err
}

// awaitCut waits until all that was cut is over, which is soon: nothing of it
// waits for a peer any more.
func (f *Front) awaitCut() {
	const most = 5 * time.Second
	end := time.NewTimer(most)
	defer end.Stop()
	for f.open.Load() > 0 {
		select {
		case <-f.quiet:
		case <-end.C:
			f.o.Logger.Warn("connections outlive their end", "server", f.o.Name, "open", f.open.Load())
			return
		}
	}
}

// Bare is the Tracked of a connection that is a bare descriptor on a worker.
type Bare struct {
	Task *Task // that serves the connection; nil: none does

	idle atomic.Bool // it waits for its client to speak
	dead atomic.Bool
}

// AwaitFirst waits until the client has said something that is not read yet,
// for as long as idle; 0: without a limit. It reports false when that has not
// come about and the connection is to be closed.
func (b *Bare) AwaitFirst(f *Front, fd int, idle time.Duration) bool {
	// Idle is set before draining is looked at, and Quiesce does it the other
	// way round: one of the two sees the other.
	b.idle.Store(true)
	if f.Draining() {
		b.idle.Store(false)
		return false
	}
	var until time.Time
	if idle > 0 {
		until = time.Now().Add(idle)
	}
	_, err := b.Task.Wait(fd, unix.EPOLLIN, until)
	b.idle.Store(false)
	if err == nil && f.Draining() {
		// A request that came in the very moment of a Shutdown is served.
		b.Task.Spare()
		if b.dead.Load() {
			return false
		}
	}
	return err == nil
}

// EndIdle is Tracked's.
func (b *Bare) EndIdle() {
	if b.idle.Load() {
		b.Task.Kill(ErrStopped)
	}
}

// Cut is Tracked's.
func (b *Bare) Cut() {
	b.dead.Store(true)
	if b.Task != nil {
		b.Task.Kill(ErrStopped)
	}
}

// Dead reports whether Cut has been called.
func (b *Bare) Dead() bool { return b.dead.Load() }
