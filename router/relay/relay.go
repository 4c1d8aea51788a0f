// Package relay moves bytes between two connected stream sockets until both
// directions have ended.
//
// A tunnel is two raw descriptors that a worker owns. Each worker is one
// goroutine with one epoll instance (level-triggered). Bytes that the far side
// does not take are held, and while they are held their source is not read:
// that is the whole of back pressure. A tunnel at rest holds its two
// descriptors and one small struct: no goroutine, no buffer, no pipe, no timer.
//
// Small talk goes through a buffer that belongs to the worker; a direction whose
// reads are large is bulk and is spliced through a pipe that is borrowed only
// while bytes are in it.
//
// What leads to a tunnel can run on the workers as well: they accept, and run
// what serves a connection as a coroutine, a [Task], which waits for descriptors
// in the same epoll instance.
//
// End of stream is passed on as a half-close once all bytes before it are
// delivered. A tunnel that ends in any other way (a reset or another socket
// error, a limit, [Tunnel.Kill], [Engine.Close]) resets both peers: neither can
// take what it got for the whole.
package relay

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Causes of an end that the sockets did not bring about; [Result.Cause] holds
// or wraps one of them, the argument of [Tunnel.Kill], or a [*SocketError].
var (
	// ErrClosed ends the tunnels that are open when the engine closes, and is
	// what Start returns from then on.
	ErrClosed = errors.New("relay: engine closed")
	// ErrIdle ends a tunnel in which no byte moved, in either direction, for
	// Spec.Idle.
	ErrIdle = errors.New("relay: idle limit reached")
	// ErrTotal ends a tunnel that is Spec.Total old.
	ErrTotal = errors.New("relay: lifetime limit reached")
	// ErrKilled stands in for a nil cause given to Kill.
	ErrKilled = errors.New("relay: killed")
)

// Side names an end of a tunnel.
type Side uint8

// The sides of a tunnel, as in Spec.
const (
	SideNone Side = iota
	SideA
	SideB
)

// String returns "A", "B" or "none".
func (s Side) String() string {
	switch s {
	case SideA:
		return "A"
	case SideB:
		return "B"
	default:
		return "none"
	}
}

// SocketError is the cause of a tunnel that ended because a socket failed:
// mostly ECONNRESET, EPIPE or ETIMEDOUT.
type SocketError struct {
	Side Side   // whose socket it was
	Op   string // read, write, shutdown, poll
	Err  error  // the unix.Errno
}

func (e *SocketError) Error() string {
	return fmt.Sprintf("relay: %s side %s: %v", e.Op, e.Side, e.Err)
}

// Unwrap gives the errno.
func (e *SocketError) Unwrap() error { return e.Err }

// Options configures an Engine. The zero value is usable.
type Options struct {
	// Workers is the number of epoll loops; 0: one for each core that Go uses
	// when the engine is made (GOMAXPROCS).
	//
	// A worker that waits or is busy keeps one of Go's Ps for up to 10 ms. With
	// no P left over, nobody looks at Go's poller meanwhile, and accepts and
	// dials wait. A program gives Go as many Ps more as there are workers,
	// runtime.GOMAXPROCS(cores + workers): a quarter less CPU for each new
	// tunnel, and nothing lost in bulk.
	Workers int
	// Pipes is how many pipes (two descriptors each) may exist at a time, over
	// all workers; 0: 1024, or an eighth of what the descriptor limit has room
	// for if that is less. Bulk that finds none is copied through memory.
	Pipes int
	// Tick is the resolution of the limits; 0: 100 ms. A limit takes effect up
	// to one tick late, never early.
	Tick time.Duration
	// Logger gets what an operator should know (no pipes to be had); nil: no log.
	Logger *slog.Logger
}

// Spec describes a tunnel.
type Spec struct {
	// A and B are connected, non-blocking stream sockets that no poller
	// watches (see Detach). They belong to the engine from the call of Start,
	// also when Start fails.
	A, B int
	// ToB holds bytes that were already read from A: they go to B before
	// anything else, and count as AToB. ToA likewise. Start is done with both
	// slices when it returns.
	ToB, ToA []byte
	// Task is the task that calls Start, if one does: the tunnel stays on its
	// worker, which may be watching the descriptors already, unless that one has
	// many more tunnels than the next.
	Task *Task
	// Idle ends the tunnel when no byte moved either way for this long; Total
	// when it is this old; 0: never.
	Idle, Total time.Duration
	// Budgets bound A to B and B to A together with all others that spend them.
	Budgets [2]Budget
	// Done is called exactly once for each tunnel that Start returned, after
	// both descriptors are closed. It runs on a goroutine that only makes such
	// calls, one for each worker: it may block, and then delays the Done calls
	// of other tunnels but no bytes. It must not call Engine.Close. May be nil.
	Done func(Result)
	// Prompt says that Done never blocks: the worker calls it, and no other
	// thread is woken for it.
	Prompt bool
}

// Result is how a tunnel ended.
type Result struct {
	// AToB and BToA count the bytes that the receiving side's socket took.
	AToB, BToA int64
	// Cause is nil when both directions ended by end of stream, all bytes
	// passed on; else why both sides were reset.
	Cause error
	// First is the side whose end of stream came first, SideNone when none came.
	First Side
}

// Engine relays tunnels. All methods may be called from any goroutine.
type Engine struct {
	workers []*worker
	next    atomic.Uint32
	pipes   atomic.Int64 // pipes in existence
	maxPipe int64
	starved atomic.Bool // pipes could not be made, and the log says so
	log     *slog.Logger
	tune    tuning

	closeOnce sync.Once
	loops     sync.WaitGroup
	calls     sync.WaitGroup
	tasks     sync.WaitGroup
}

// New makes an engine and starts its workers. It fails when the kernel gives
// no epoll or event descriptor.
func New(o Options) (*Engine, error) {
	return newEngine(o, defaultTuning())
}

func newEngine(o Options, tune tuning) (*Engine, error) {
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if o.Pipes <= 0 {
		o.Pipes = defaultPipes()
	}
	if o.Tick <= 0 {
		o.Tick = 100 * time.Millisecond
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Engine{maxPipe: int64(o.Pipes), log: o.Logger, tune: tune}
	base := time.Now()
	for i := range o.Workers {
		w, err := newWorker(e, i, base, o.Tick)
		if err != nil {
			for _, w := range e.workers {
				w.release()
			}
			return nil, fmt.Errorf("relay: make worker: %w", err)
		}
		e.workers = append(e.workers, w)
	}
	for _, w := range e.workers {
		e.loops.Go(w.run)
		e.calls.Go(w.report)
	}
	return e, nil
}

// defaultPipes keeps the pipes to an eighth of the descriptors.
func defaultPipes() int {
	const most, shareOfFiles = 1024, 16
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return most / 4
	}
	return int(max(1, min(most, lim.Cur/shareOfFiles)))
}

// Start hands a tunnel to a worker. It does not wait for the peers. The error
// is ErrClosed, or says why the kernel does not watch a descriptor; both
// descriptors are then closed, their peers reset, and Done is not called.
func (e *Engine) Start(s Spec) (*Tunnel, error) {
	w := e.pick(s.Task)
	t := &Tunnel{w: w, fd: [2]int32{int32(s.A), int32(s.B)}, done: s.Done, prompt: s.Prompt}
	if k := s.Task; k != nil && w == k.w {
		t.in = [2]bool{k.has(s.A), k.has(s.B)}
	} else if k != nil {
		k.forget(s.A)
		k.forget(s.B)
	}
	t.idle, t.last = int64(s.Idle), w.clock()
	if s.Total > 0 {
		t.end = t.last + int64(s.Total)
	}
	for i, b := range s.Budgets {
		if len(b) > 0 {
			t.dir[i].budget = b
		}
	}
	t.dir[0].spend(len(s.ToB))
	t.dir[1].spend(len(s.ToA))
	t.dir[0].prefix(s.B, s.ToB)
	t.dir[1].prefix(s.A, s.ToA)
	if err := w.add(t); err != nil {
		reset(s.A)
		if s.B != s.A {
			reset(s.B) // a number given twice must not be closed twice
		}
		return nil, err
	}
	return t, nil
}

// pick chooses the worker of a tunnel: the less loaded of two neighbours. That
// is even enough, and shares nothing hot beyond one counter.
func (e *Engine) pick(k *Task) *worker {
	const lead = 8 // over its neighbour that costs a task's worker a tunnel
	if k != nil {
		other := e.workers[(k.w.index+1)%len(e.workers)]
		if k.w.open.Load() <= other.open.Load()+lead {
			return k.w
		}
		return other
	}
	i := int(e.next.Add(1)) % len(e.workers)
	w := e.workers[i]
	if other := e.workers[(i+1)%len(e.workers)]; other.open.Load() < w.open.Load() {
		w = other
	}
	return w
}

// Open returns the number of tunnels that have not ended.
func (e *Engine) Open() int {
	var n int64
	for _, w := range e.workers {
		n += w.open.Load()
	}
	return int(n)
}

// Close ends all tunnels with ErrClosed and returns when every Done call has
// returned and all descriptors are closed. Further calls wait likewise.
func (e *Engine) Close() error {
	e.closeOnce.Do(func() {
		for _, w := range e.workers {
			w.stop()
		}
	})
	e.loops.Wait()
	e.tasks.Wait()
	e.calls.Wait()
	return nil
}

// Socket is a stream socket of package net's: a *net.TCPConn, for one.
type Socket interface {
	syscall.Conn
	io.Closer
}

// Detach takes the descriptor out of c and out of Go's poller, and closes c.
// The descriptor is non-blocking and belongs to the caller. c must not be in
// use. It takes three system calls: fcntl (F_DUPFD_CLOEXEC), epoll_ctl and
// close. When it fails c is closed.
func Detach(c Socket) (fd int, err error) {
	fd = -1
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("relay: detach: %w", err)
	}
	ctlErr := raw.Control(func(s uintptr) {
		fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err == nil {
		err = ctlErr
	}
	closeErr := c.Close()
	if err != nil {
		return -1, fmt.Errorf("relay: detach: %w", err)
	}
	if closeErr != nil {
		reset(fd)
		return -1, fmt.Errorf("relay: detach: %w", closeErr)
	}
	return fd, nil
}

// reset closes a socket so that its peer sees a reset.
func reset(fd int) {
	// An error leaves an ordinary close, all that is left to do.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(fd)
}
