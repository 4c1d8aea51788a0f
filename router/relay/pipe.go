package relay

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// pipe is a kernel pipe that bytes are spliced through.
type pipe struct {
	r, w int
	n    int // bytes in it
}

const (
	// retryPipes is how long no pipe is asked for after the kernel gave none.
	retryPipes = int64(time.Second)
	// trimPipes is how long a free pipe may go unused.
	trimPipes = int64(2 * time.Second)
)

// pipes is a worker's store of empty pipes; the engine bounds their sum.
type pipes struct {
	free   []*pipe
	spare  int   // the fewest free pipes since trimmed: nobody needed these
	retry  int64 // ns; until then make none
	trimAt int64 // ns
}

// minPipe is the capacity below which a pipe is worse than copying, and what
// every pipe may hold at any time: what all pipes hold is bounded by Pipes
// times this, plus what was in them when another was made.
const minPipe = 64 << 10

// share returns how many bytes a pipe may take. Large pipes halve the price of
// bulk, for each byte wakes fewer processes; but when many readers are slow,
// each pipe stays full, so what there is is divided among the pipes.
func (e *Engine) share() int {
	return max(minPipe, min(e.tune.pipe, int(e.maxPipe*minPipe/max(e.pipes.Load(), 1))))
}

// borrow returns an empty pipe, or nil when there is none to be had.
func (w *worker) borrow() *pipe {
	if k := len(w.pipes.free); k > 0 {
		p := w.pipes.free[k-1]
		w.pipes.free = w.pipes.free[:k-1]
		w.pipes.spare = min(w.pipes.spare, k-1)
		return p
	}
	if w.now < w.pipes.retry {
		return nil
	}
	if w.e.pipes.Add(1) > w.e.maxPipe {
		w.e.pipes.Add(-1)
		return nil
	}
	p, err := newPipe(w.e.tune.pipe)
	if err != nil {
		w.e.pipes.Add(-1)
		w.pipes.retry = w.now + retryPipes
		if !w.e.starved.Swap(true) {
			w.e.log.Warn("no pipes for splicing, copying through memory", "err", err)
		}
		return nil
	}
	if w.e.starved.Load() {
		w.e.starved.Store(false)
	}
	return p
}

// newPipe makes a pipe that takes size bytes where the kernel allows that. A
// user near the soft limit (fs.pipe-user-pages-soft) may not enlarge pipes, and
// one over it gets pipes of a page or two: those are an error.
func newPipe(size int) (*pipe, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, size); err != nil {
		has, getErr := unix.FcntlInt(uintptr(p[0]), unix.F_GETPIPE_SZ, 0)
		if getErr != nil || has < minPipe {
			_, _ = unix.Close(p[0]), unix.Close(p[1])
			return nil, fmt.Errorf("enlarge pipe: %w", err)
		}
	}
	return &pipe{r: p[0], w: p[1]}, nil
}

// giveBack takes a pipe that is no longer needed; one that still holds bytes
// is closed.
func (w *worker) giveBack(p *pipe) {
	if p.n > 0 {
		w.closePipe(p)
		return
	}
	if len(w.pipes.free) == 0 {
		w.pipes.spare, w.pipes.trimAt = 0, w.now+trimPipes
	}
	w.pipes.free = append(w.pipes.free, p)
}

// trim closes the free pipes that nobody needed since the last trim.
func (w *worker) trim() {
	if len(w.pipes.free) == 0 || w.now < w.pipes.trimAt {
		return
	}
	for range w.pipes.spare {
		k := len(w.pipes.free) - 1
		w.closePipe(w.pipes.free[k])
		w.pipes.free = w.pipes.free[:k]
	}
	w.pipes.spare, w.pipes.trimAt = len(w.pipes.free), w.now+trimPipes
}

func (w *worker) closePipe(p *pipe) {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
	w.e.pipes.Add(-1)
}
