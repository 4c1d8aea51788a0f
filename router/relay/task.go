package relay

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Task is a function that runs on a worker's own thread, between the events of
// the tunnels, and gives the thread back whenever it waits. It is a coroutine:
// neither its begin nor its waits go through Go's scheduler, which would wake
// another thread for each.
//
// It must not block in any other way than Wait. For anything that may, it first
// calls Leave and goes on in a goroutine of its own.
type Task struct {
	w  *worker
	in *routine // nil: it is over

	// What the routine asks for when it yields.
	fd     int
	events uint32
	until  time.Time
	got    uint32
	err    error
	away   bool     // in a goroutine of its own
	known  [2]int32 // descriptors that the worker's epoll has, -1: none
	waits  bool     // under the worker's lock, as is what follows
	killed error
}

// step is why a routine gives back the thread.
type step uint8

const (
	stepEnd step = iota
	stepWait
	stepLeave
)

// routine runs tasks, one after the other. It holds what a task needs only until
// it is over, which is long before whoever can kill it lets go of it.
type routine struct {
	next  func() (step, bool)
	stop  func()
	yield func(step) bool
	task  *Task
	serve func(*Task, Accepted)
	conn  Accepted
	pause Tunnel // stands for the task's wait in the slots and in the wheel
}

func newRoutine() *routine {
	r := &routine{}
	r.next, r.stop = iter.Pull(func(yield func(step) bool) {
		r.yield = yield
		for {
			r.serve(r.task, r.conn)
			r.task, r.serve = nil, nil
			if !yield(stepEnd) {
				return
			}
		}
	})
	return r
}

// maxRoutines is how many routines without a task a worker keeps.
const maxRoutines = 64

// begin runs serve as a task.
func (w *worker) begin(serve func(*Task, Accepted), c Accepted) {
	k := &Task{w: w, known: [2]int32{-1, -1}}
	w.mu.Lock()
	if n := len(w.routines); n > 0 {
		k.in, w.routines = w.routines[n-1], w.routines[:n-1]
	}
	w.mu.Unlock()
	if k.in == nil {
		k.in = newRoutine()
	}
	k.in.task, k.in.serve, k.in.conn = k, serve, c
	k.in.pause = Tunnel{task: k, slotted: -1}
	w.e.tasks.Add(1)
	k.step()
}

// step runs the task until it ends, waits or leaves.
func (k *Task) step() {
	for {
		s, _ := k.in.next()
		switch s {
		case stepEnd:
			r := k.in
			k.in, r.pause.task = nil, nil
			k.w.recycle(r)
			k.w.e.tasks.Done()
			return
		case stepLeave:
			go k.step()
			return
		case stepWait:
			err := k.w.watch(k)
			if err == nil {
				return // it may be going on already, in the worker
			}
			k.err = err
		}
	}
}

func (w *worker) recycle(r *routine) {
	w.mu.Lock()
	keep := !w.closed && len(w.routines) < maxRoutines
	if keep {
		w.routines = append(w.routines, r)
	}
	w.mu.Unlock()
	if !keep {
		r.stop()
	}
}

// Wait waits until one of the epoll events is there on a descriptor, and is back
// on the worker then. It returns the events that are; until may be the zero
// time. The error is os.ErrDeadlineExceeded, what Kill was given, ErrClosed, or
// that the kernel does not watch the descriptor.
func (k *Task) Wait(fd int, events uint32, until time.Time) (uint32, error) {
	k.fd, k.events, k.until, k.got = fd, events, until, 0
	k.in.yield(stepWait)
	if k.err != nil || k.got&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		k.forget(fd) // it is about to be closed, and its number used again
	}
	return k.got, k.err
}

// Leave lets the task go on in a goroutine of its own, until its next Wait.
func (k *Task) Leave() {
	if k.away {
		return
	}
	k.away = true
	k.in.yield(stepLeave)
}

// Kill ends the Wait that is under way and every later one with an error. It
// may be called from anywhere, also when the task is over.
func (k *Task) Kill(err error) {
	w := k.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if k.killed == nil {
		k.killed = err
	}
	if k.waits {
		w.resume(k, 0, err)
		w.rouse()
	}
}

// Spare takes back Kill.
func (k *Task) Spare() {
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	k.killed = nil
}

// watch begins a wait.
func (w *worker) watch(k *Task) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closing:
		return ErrClosed
	case k.killed != nil:
		return k.killed
	}
	t := &k.in.pause
	t.slot = w.occupy(slot{t: t})
	t.gen = w.slots[t.slot].gen
	if err := k.arm(); err != nil {
		w.vacate(t.slot)
		return fmt.Errorf("relay: epoll_ctl: %w", err)
	}
	k.waits, k.away = true, false
	t.end = 0
	if !k.until.IsZero() {
		t.end = max(1, int64(k.until.Sub(w.base)))
	}
	if due := t.due(); due != math.MaxInt64 {
		w.schedule(t, due)
	}
	return nil
}

// arm lets epoll tell once.
func (k *Task) arm() error {
	op := unix.EPOLL_CTL_MOD
	if !k.has(k.fd) {
		op = unix.EPOLL_CTL_ADD
		free := 0
		if k.known[0] >= 0 {
			free = 1
		}
		k.known[free] = int32(k.fd)
	}
	ev := unix.EpollEvent{Events: k.events | unix.EPOLLONESHOT, Fd: int32(k.in.pause.slot << 1), Pad: int32(k.in.pause.gen)}
	return unix.EpollCtl(k.w.ep, op, k.fd, &ev)
}

// has says whether the worker's epoll has a descriptor.
func (k *Task) has(fd int) bool { return k.known[0] == int32(fd) || k.known[1] == int32(fd) }

// forget takes a descriptor out of the worker's epoll, if it is there.
func (k *Task) forget(fd int) {
	for i := range k.known {
		if k.known[i] != int32(fd) {
			continue
		}
		k.known[i] = -1
		_ = unix.EpollCtl(k.w.ep, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

// resume ends a task's wait; the worker goes on with it. It needs the lock.
func (w *worker) resume(k *Task, got uint32, err error) {
	k.waits, k.got, k.err = false, got, err
	w.wheel.drop(&k.in.pause)
	w.vacate(k.in.pause.slot)
	w.steps = append(w.steps, k)
}

// Attach makes a Go connection of a descriptor, in Go's poller. The descriptor
// is closed, also when it fails. It takes a dozen system calls.
func (k *Task) Attach(fd int) (*net.TCPConn, error) {
	k.forget(fd) // the socket lives on, and with it what epoll has
	f := os.NewFile(uintptr(fd), "client")
	c, err := net.FileConn(f)
	err = errors.Join(err, f.Close())
	tcp, ok := c.(*net.TCPConn)
	switch {
	case err == nil && ok:
		return tcp, nil
	case c != nil:
		_ = c.Close()
	}
	if err == nil {
		err = unix.EPROTOTYPE
	}
	return nil, fmt.Errorf("relay: attach: %w", err)
}
