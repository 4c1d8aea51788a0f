package relay

import (
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

// tuning holds the figures that the relay's speed hangs on. BenchmarkCrossover
// says that a splice and a copy cost the same at 16 KiB, a splice 0.9 of a copy
// at 32 KiB and half at 128 KiB; BenchmarkEngines, that bulk is cheaper the more
// a pipe takes.
type tuning struct {
	buffer int // of each worker, for copying
	pipe   int // the most that one splice takes, and so that a pipe holds
	passes int // reads in one direction before others get their turn
	large  int // bytes of a read that speaks for splicing
	larges int // such reads in a row that turn copying into splicing
	small  int // bytes below which a splice speaks for copying
	smalls int // such splices in a row that turn splicing into copying
}

func defaultTuning() tuning {
	return tuning{
		buffer: 64 << 10, pipe: 960 << 10, passes: 8,
		large: 32 << 10, larges: 2, small: 16 << 10, smalls: 2,
	}
}

// smallHeld is the most held bytes that are kept in memory of their own size
// and not in a buffer that is used again.
const smallHeld = 4 << 10

// maxFree is how many empty buffers a worker keeps.
const maxFree = 16

// Tunnel is a handle on two sockets that a worker relays.
type Tunnel struct {
	w      *worker
	done   func(Result)
	task   *Task        // whose wait this is: no tunnel
	prompt bool         // done does not block
	dir    [2]direction // dir[0] is A to B
	fd     [2]int32     // A, B
	mask   [2]uint32    // what epoll watches for, of each side
	in     [2]bool      // epoll watches the side
	hung   [2]bool      // taken out of epoll: both ways ended, bytes still held

	slot, gen uint32

	next, prev *Tunnel // in the wheel's slot
	slotted    int32   // that slot, -1: none
	idle       int64   // ns, 0: no limit
	end        int64   // ns since the engine began, 0: no limit
	last       int64   // ns since the engine began: when bytes last moved

	first Side
	over  bool
	cause error
}

// direction is one half of a tunnel.
type direction struct {
	bytes  int64
	held   []byte // bytes that the far side has not taken, in memory
	big    []byte // the reusable buffer that held lies in
	pipe   *pipe  // the same, in the kernel
	streak uint8  // large reads (copying) or small ones (splicing) in a row
	splice bool   // bulk
	copies bool   // the sockets cannot be spliced
	queued bool   // waits for its turn
	budget Budget // nil: no bound
	taken  int    // from budget, and not read yet
	eof    bool   // the source has ended
	shut   bool   // and the far side knows
}

func (d *direction) waiting() bool { return len(d.held) > 0 || d.pipe != nil }

// prefix sends b to fd as far as fd takes it, and holds the rest. An error is
// left for the worker, which meets it again.
func (d *direction) prefix(fd int, b []byte) {
	if len(b) == 0 {
		return
	}
	n, err := write(fd, b)
	if err != nil {
		n = 0
	}
	d.bytes = int64(n)
	if n < len(b) {
		d.held = append([]byte(nil), b[n:]...)
	}
}

// Kill ends the tunnel: both sides are reset and Result.Cause is cause
// (ErrKilled for nil). It returns at once, and does nothing to a tunnel that has
// ended or is about to.
func (t *Tunnel) Kill(cause error) {
	if cause == nil {
		cause = ErrKilled
	}
	t.w.kill(t, cause)
}

// due returns when (ns) a limit is reached if nothing moves until then.
func (t *Tunnel) due() int64 {
	due := int64(math.MaxInt64)
	if t.idle > 0 {
		due = t.last + t.idle
	}
	if t.end > 0 {
		due = min(due, t.end)
	}
	return due
}

func (t *Tunnel) limit(now int64) error {
	if t.end > 0 && t.end <= now {
		return ErrTotal
	}
	return ErrIdle
}

func (t *Tunnel) result() Result {
	return Result{AToB: t.dir[0].bytes, BToA: t.dir[1].bytes, Cause: t.cause, First: t.first}
}

// handle does what the events of one side allow.
func (t *Tunnel) handle(side int, events uint32) {
	const bad = unix.EPOLLERR | unix.EPOLLHUP
	if t.over {
		return // an event of this batch, for the other descriptor
	}
	from, to := &t.dir[side], &t.dir[1-side]
	reading := !from.eof && !from.waiting() && !from.queued
	if events&(unix.EPOLLOUT|bad) != 0 && to.waiting() {
		// What the far side takes makes room for more, which is most likely
		// there: reading it here saves turning EPOLLIN on and off again.
		if t.drain(1 - side) {
			t.fill(1 - side)
		}
	}
	if events&(unix.EPOLLIN|bad) != 0 && reading && !t.over {
		t.fill(side)
	}
	if t.over {
		return
	}
	if events&unix.EPOLLERR != 0 && !reading {
		// Nobody reads this side, and so nobody met its error.
		t.fail(side, "poll", socketError(int(t.fd[side])))
		return
	}
	if events&unix.EPOLLHUP != 0 && t.want(side) == 0 {
		// Ended both ways while bytes from it are still held: epoll would
		// say so for ever.
		t.in[side], t.hung[side] = false, true
		if err := unix.EpollCtl(t.w.ep, unix.EPOLL_CTL_DEL, int(t.fd[side]), nil); err != nil {
			t.fail(side, "poll", err)
			return
		}
	}
	t.armAll()
}

// armAll makes epoll watch both sides for what they are wanted for.
func (t *Tunnel) armAll() {
	for s := range t.fd {
		if err := t.arm(s); err != nil {
			t.fail(s, "poll", err)
			return
		}
	}
}

// want returns what a side is to be watched for.
func (t *Tunnel) want(side int) uint32 {
	var mask uint32
	if from := &t.dir[side]; !from.eof && !from.waiting() && !from.queued {
		mask = unix.EPOLLIN
	}
	if t.dir[1-side].waiting() {
		mask |= unix.EPOLLOUT
	}
	return mask
}

// arm makes epoll watch a side for what it is wanted for.
func (t *Tunnel) arm(side int) error {
	mask, op := t.want(side), unix.EPOLL_CTL_MOD
	switch {
	case t.in[side] && mask == t.mask[side]:
		return nil
	case t.hung[side] && mask == 0:
		return nil
	case !t.in[side]:
		op = unix.EPOLL_CTL_ADD
	}
	ev := unix.EpollEvent{Events: mask, Fd: int32(t.slot<<1) | int32(side), Pad: int32(t.gen)}
	if err := unix.EpollCtl(t.w.ep, op, int(t.fd[side]), &ev); err != nil {
		return err
	}
	t.in[side], t.hung[side], t.mask[side] = true, false, mask
	return nil
}

// fill moves bytes of a direction that holds none, unless it waits for its
// turn.
func (t *Tunnel) fill(dir int) {
	d := &t.dir[dir]
	if d.queued {
		return
	}
	for range t.w.e.tune.passes {
		most := math.MaxInt
		if d.budget != nil {
			if most = t.allowance(dir); most == 0 {
				break
			}
		}
		var more bool
		if d.splice {
			more = t.spliceOnce(dir, most)
		} else {
			more = t.copyOnce(dir, most)
		}
		if !more {
			break
		}
	}
	// The pipe was kept between passes; with bytes in it it stays.
	if d.pipe != nil && d.pipe.n == 0 {
		t.w.giveBack(d.pipe)
		d.pipe = nil
	}
}

// copyOnce reads once, at most so many bytes, and writes what it read. It says
// whether to go on.
func (t *Tunnel) copyOnce(dir, most int) bool {
	d, tune := &t.dir[dir], &t.w.e.tune
	b := t.w.buf[:min(len(t.w.buf), most)]
	n, err := read(int(t.fd[dir]), b)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case err != nil:
		t.fail(dir, "read", err)
		return false
	case n == 0:
		t.ended(dir)
		return false
	}
	t.last = t.w.now
	d.spend(n)
	m, err := write(int(t.fd[1-dir]), b[:n])
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		t.fail(1-dir, "write", err)
		return false
	}
	d.bytes += int64(m)
	if n < tune.large {
		d.streak = 0
	} else if d.streak++; int(d.streak) >= tune.larges && !d.copies {
		d.splice, d.streak = true, 0
	}
	if m < n {
		t.hold(d, b[m:n])
		return false
	}
	return n == len(b)
}

// hold keeps bytes that lie in the worker's buffer.
func (t *Tunnel) hold(d *direction, b []byte) {
	if len(b) <= smallHeld {
		d.held = append([]byte(nil), b...)
		return
	}
	if k := len(t.w.bigFree); k > 0 {
		d.big, t.w.bigFree = t.w.bigFree[k-1], t.w.bigFree[:k-1]
	} else {
		d.big = make([]byte, len(t.w.buf))
	}
	d.held = d.big[:copy(d.big, b)]
}

// spliceOnce moves one pipe of bytes, or at most so many. It says whether to go
// on.
func (t *Tunnel) spliceOnce(dir, most int) bool {
	d, tune := &t.dir[dir], &t.w.e.tune
	if d.pipe == nil {
		if d.pipe = t.w.borrow(); d.pipe == nil {
			return t.copyOnce(dir, most)
		}
	}
	n, err := splice(int(t.fd[dir]), d.pipe.w, min(t.w.e.share(), most))
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case errors.Is(err, unix.EINVAL):
		d.splice, d.copies = false, true
		return true
	case err != nil:
		t.fail(dir, "read", err)
		return false
	case n == 0:
		t.ended(dir)
		return false
	}
	t.last = t.w.now
	d.pipe.n = n
	d.spend(n)
	if n >= min(tune.small, most) {
		d.streak = 0
	} else if d.streak++; int(d.streak) >= tune.smalls {
		d.splice, d.streak = false, 0
	}
	return t.drainPipe(dir) && n >= min(tune.small, most)
}

// drain writes what a direction holds; its source has not ended, for the end is
// read after the bytes. It says whether all of it went.
func (t *Tunnel) drain(dir int) bool {
	d := &t.dir[dir]
	if d.pipe != nil {
		if !t.drainPipe(dir) {
			return false
		}
		t.w.giveBack(d.pipe)
		d.pipe = nil
	} else {
		n, err := write(int(t.fd[1-dir]), d.held)
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if err != nil {
			t.fail(1-dir, "write", err)
			return false
		}
		t.last = t.w.now
		d.bytes += int64(n)
		d.held = d.held[n:]
		if len(d.held) > 0 {
			return false
		}
		t.unhold(d)
	}
	return true
}

// drainPipe writes what is in the direction's pipe, and leaves the pipe with
// the direction. It says whether the pipe is empty.
func (t *Tunnel) drainPipe(dir int) bool {
	d := &t.dir[dir]
	for d.pipe.n > 0 {
		n, err := splice(d.pipe.r, int(t.fd[1-dir]), d.pipe.n)
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if err == nil && n == 0 {
			err = unix.EPIPE // a socket takes no bytes only when it is gone
		}
		if err != nil {
			t.fail(1-dir, "write", err)
			return false
		}
		t.last = t.w.now
		d.pipe.n -= n
		d.bytes += int64(n)
	}
	return true
}

func (t *Tunnel) unhold(d *direction) {
	if d.big != nil && len(t.w.bigFree) < maxFree {
		t.w.bigFree = append(t.w.bigFree, d.big)
	}
	d.held, d.big = nil, nil
}

// ended notes that a direction's source has ended; the direction holds nothing.
func (t *Tunnel) ended(dir int) {
	t.dir[dir].eof = true
	if t.first == SideNone {
		t.first = SideA + Side(dir)
	}
	t.pass(dir)
}

// pass tells the far side of a direction that no more bytes come. When it is
// the second to be told, closing does that.
func (t *Tunnel) pass(dir int) {
	t.dir[dir].shut = true
	if t.dir[1-dir].shut {
		t.close(nil)
		return
	}
	if err := unix.Shutdown(int(t.fd[1-dir]), unix.SHUT_WR); err != nil {
		t.fail(1-dir, "shutdown", err)
	}
}

// fail ends the tunnel because a side's socket failed.
func (t *Tunnel) fail(side int, op string, err error) {
	t.abort(&SocketError{Side: SideA + Side(side), Op: op, Err: err})
}

// abort ends the tunnel, if it has not ended, by resetting both sides.
func (t *Tunnel) abort(cause error) {
	if t.over {
		return
	}
	t.close(cause)
}

// close closes both sides and gives back what the tunnel holds.
func (t *Tunnel) close(cause error) {
	t.over, t.cause = true, cause
	for s, fd := range t.fd {
		if cause != nil {
			reset(int(fd))
		} else {
			_ = unix.Close(int(fd))
		}
		d := &t.dir[s]
		if d.pipe != nil {
			t.w.giveBack(d.pipe)
			d.pipe = nil
		}
		t.unhold(d)
		d.giveBack()
	}
	t.w.dead = append(t.w.dead, t)
}

func socketError(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if n == 0 {
		return unix.EIO
	}
	return unix.Errno(n)
}

// The calls below are not to be seen interrupted, and give 0 with any error.

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return 0, err
		}
	}
}

func write(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Write(fd, b)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return 0, err
		}
	}
}

func splice(from, to, n int) (int, error) {
	for {
		k, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err == nil {
			return int(k), nil
		}
		if err != unix.EINTR {
			return 0, err
		}
	}
}
