package relay

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// batch is how many events one epoll_wait may return.
const batch = 256

// wakeSlot marks the event descriptor's events; tunnels' are never negative.
const wakeSlot = -1

// busy is for how long (ns) a worker goes on before it lets others run. To do so
// wakes another thread, so that it should not be often.
const busy = int64(4 * time.Millisecond)

// worker owns an epoll instance and the tunnels on it.
type worker struct {
	e     *Engine
	index int // among the engine's
	base  time.Time
	open  atomic.Int64

	// Only the worker's goroutine uses these.
	now     int64 // ns since base, of this batch
	buf     []byte
	bigFree [][]byte // empty buffers for held bytes, bounded by maxFree
	pipes   pipes
	dead    []*Tunnel // ended in this batch
	turns   turns     // of tunnels that wait for their budgets

	mu       sync.Mutex
	ep, evt  int
	woken    bool // evt is set
	closing  bool
	closed   bool
	awake    bool  // it will look at the wheel before it sleeps
	until    int64 // ns; the worker sleeps no longer than this
	slots    []slot
	vacant   []uint32
	wheel    wheel
	kills    []kill
	steps    []*Task // whose wait is over
	routines []*routine
	finished []ended
	wake     chan struct{} // finished has something, or the worker is gone
}

// slot is where an event's data leads. The generation tells an event of an
// earlier tenant (a forked child may keep a closed descriptor's registration
// alive) from the present one's.
type slot struct {
	t    *Tunnel   // or a task's wait
	from *Acceptor // or a listener
	gen  uint32
}

type kill struct {
	t     *Tunnel
	cause error
}

type ended struct {
	done   func(Result)
	result Result
}

type ready struct {
	t      *Tunnel
	side   int
	events uint32
}

func newWorker(e *Engine, index int, base time.Time, tick time.Duration) (*worker, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	evt, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(ep)
		return nil, fmt.Errorf("eventfd2: %w", err)
	}
	w := &worker{
		e: e, index: index, base: base, ep: ep, evt: evt,
		buf: make([]byte, e.tune.buffer), until: math.MaxInt64, wake: make(chan struct{}, 1),
	}
	w.wheel.tick = int64(tick)
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: wakeSlot}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, evt, &ev); err != nil {
		w.release()
		return nil, fmt.Errorf("epoll_ctl: %w", err)
	}
	return w, nil
}

func (w *worker) release() {
	_ = unix.Close(w.evt)
	_ = unix.Close(w.ep)
}

// clock returns nanoseconds since the engine began.
func (w *worker) clock() int64 { return int64(time.Since(w.base)) }

// add registers a tunnel. The worker is not woken for it, unless it sleeps
// beyond the tunnel's first limit: readiness wakes it.
func (w *worker) add(t *Tunnel) error {
	// The worker looks its events up under the same lock, so it meets the
	// tunnel whole or not at all, though one side is registered before the other.
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closing {
		return ErrClosed
	}
	t.slot = w.occupy(slot{t: t})
	t.gen = w.slots[t.slot].gen
	for side := range t.fd {
		if err := t.arm(side); err != nil {
			// The first side's events carry a generation that ends here.
			w.vacate(t.slot)
			return fmt.Errorf("relay: epoll_ctl: %w", err)
		}
	}
	w.open.Add(1)
	t.slotted = -1
	if due := t.due(); due != math.MaxInt64 {
		w.schedule(t, due)
	}
	return nil
}

// schedule files t under a time (ns). It needs the lock.
func (w *worker) schedule(t *Tunnel, due int64) {
	w.wheel.put(t, due)
	if due < w.until && !w.awake {
		w.until = due
		w.rouse()
	}
}

// occupy puts a tenant into a free slot, whose generation goes on. It needs the
// lock.
func (w *worker) occupy(s slot) uint32 {
	i := uint32(len(w.slots))
	if k := len(w.vacant); k > 0 {
		i, w.vacant = w.vacant[k-1], w.vacant[:k-1]
		s.gen = w.slots[i].gen
		w.slots[i] = s
	} else {
		w.slots = append(w.slots, s)
	}
	return i
}

// vacate frees a slot. It needs the lock.
func (w *worker) vacate(i uint32) {
	w.slots[i] = slot{gen: w.slots[i].gen + 1}
	w.vacant = append(w.vacant, i)
}

// rouse ends the worker's wait. It needs the lock.
func (w *worker) rouse() {
	if w.woken || w.closed {
		return
	}
	w.woken = true
	one := binary.NativeEndian.AppendUint64(nil, 1)
	_, _ = unix.Write(w.evt, one) // cannot fail: it is 0 or 1
}

func (w *worker) kill(t *Tunnel, cause error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.slots[t.slot].t != t {
		return
	}
	w.kills = append(w.kills, kill{t, cause})
	w.rouse()
}

func (w *worker) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closing = true
	w.rouse()
}

// run is the worker's loop. It waits in the kernel and not in Go's poller: one
// system call a wake-up instead of four, which is what small talk costs.
func (w *worker) run() {
	var (
		events  = make([]unix.EpollEvent, batch)
		todo    = make([]ready, 0, batch)
		expired []*Tunnel
		kills   []kill
		steps   []*Task
		accepts []*Acceptor
		wait    = -1
		slice   int64 // when the goroutine last let others run
	)
	for {
		n, err := unix.EpollWait(w.ep, events, wait)
		if err == unix.EINTR {
			n, err = 0, nil
		}
		w.now = w.clock()

		w.mu.Lock()
		w.awake = true
		for _, ev := range events[:max(n, 0)] {
			if ev.Fd == wakeSlot {
				var b [8]byte
				_, _ = unix.Read(w.evt, b[:])
				w.woken = false
				continue
			}
			s := w.slots[ev.Fd>>1]
			switch {
			case s.gen != uint32(ev.Pad):
			case s.from != nil:
				s.from.active.Add(1)
				accepts = append(accepts, s.from)
			case s.t == nil:
			case s.t.task != nil:
				w.resume(s.t.task, ev.Events, nil)
			default:
				todo = append(todo, ready{s.t, int(ev.Fd & 1), ev.Events})
			}
		}
		kills, w.kills = w.kills, kills[:0]
		expired = w.expire(expired[:0])
		steps, w.steps = w.steps, steps[:0]
		closing := w.closing
		w.mu.Unlock()

		for _, k := range kills {
			k.t.abort(k.cause)
		}
		for _, t := range expired {
			t.abort(t.limit(w.now))
		}
		for _, r := range todo {
			r.t.handle(r.side, r.events)
		}
		w.takeTurns()
		for _, k := range steps {
			k.step()
		}
		for _, a := range accepts {
			a.accept(w)
		}
		clear(kills)
		clear(expired)
		clear(todo)
		clear(steps)
		clear(accepts)
		todo, accepts = todo[:0], accepts[:0]
		w.trim()
		if err != nil {
			w.e.log.Error("relay worker cannot wait for events", "err", err)
		}
		if closing || err != nil {
			w.end()
			return
		}
		reported := w.settle()
		wait = w.wait()
		// A worker never enters the scheduler by itself, and would keep its P
		// for 10 ms at a time. From then on sysmon takes the P away in every
		// wait, and looks for such every 20 us.
		if reported || w.now-slice > busy {
			slice = w.now
			runtime.Gosched()
		}
	}
}

// expire appends the tunnels that are over a limit to out, and ends the waits
// that are. It needs the lock.
func (w *worker) expire(out []*Tunnel) []*Tunnel {
	all := w.wheel.advance(w.now, out)
	out = all[:0]
	for _, t := range all {
		if t.task != nil {
			w.resume(t.task, 0, os.ErrDeadlineExceeded)
		} else {
			out = append(out, t)
		}
	}
	clear(all[len(out):])
	return out
}

// settle frees the slots of the tunnels that ended and hands their results
// over. It says whether the goroutine that reports them has work.
func (w *worker) settle() bool {
	if len(w.dead) == 0 {
		return false
	}
	w.mu.Lock()
	reports := false
	for _, t := range w.dead {
		w.wheel.drop(t)
		w.vacate(t.slot)
		if t.done != nil && !t.prompt {
			w.finished = append(w.finished, ended{t.done, t.result()})
			t.done = nil
			reports = true
		}
	}
	w.open.Add(-int64(len(w.dead)))
	w.mu.Unlock()
	for _, t := range w.dead {
		if t.done != nil {
			t.done(t.result())
			t.done = nil
		}
	}
	clear(w.dead)
	w.dead = w.dead[:0]
	if reports {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
	return reports
}

// wait returns how long epoll_wait may take, in milliseconds.
func (w *worker) wait() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.steps) > 0 {
		return 0
	}
	w.awake = false
	w.until = math.MaxInt64
	if due, ok := w.wheel.next(); ok {
		w.until = due
	}
	if len(w.turns) > 0 {
		w.until = min(w.until, w.turns[0].due)
	}
	if len(w.pipes.free) > 0 {
		w.until = min(w.until, w.pipes.trimAt)
	}
	if w.until == math.MaxInt64 {
		return -1
	}
	ms := (w.until - w.now + int64(time.Millisecond) - 1) / int64(time.Millisecond)
	return int(min(max(ms, 0), math.MaxInt32))
}

// end resets every tunnel and gives up what the worker holds.
func (w *worker) end() {
	w.mu.Lock()
	w.closing = true
	all := make([]*Tunnel, 0, len(w.slots))
	for _, s := range w.slots {
		switch {
		case s.t == nil:
		case s.t.task != nil:
			w.resume(s.t.task, 0, ErrClosed)
		default:
			all = append(all, s.t)
		}
	}
	steps := w.steps
	w.steps = nil
	w.mu.Unlock()
	for _, t := range all {
		t.abort(ErrClosed)
	}
	for _, k := range steps {
		k.step()
	}
	w.settle()
	for _, p := range w.pipes.free {
		w.closePipe(p)
	}
	w.pipes.free = nil
	w.mu.Lock()
	w.closed = true
	w.release()
	routines := w.routines
	w.routines = nil
	w.mu.Unlock()
	for _, r := range routines {
		r.stop()
	}
	close(w.wake)
}

// report makes the Done calls.
func (w *worker) report() {
	var calls []ended
	for range w.wake {
		calls = w.callDone(calls)
	}
	w.callDone(calls)
}

func (w *worker) callDone(calls []ended) []ended {
	w.mu.Lock()
	calls, w.finished = w.finished, calls[:0]
	w.mu.Unlock()
	for _, c := range calls {
		c.done(c.result)
	}
	clear(calls)
	return calls
}
