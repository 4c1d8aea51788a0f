package relay

import (
	"container/heap"
	"math"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// A Budget bounds the bytes a second that pass in one direction, over all
// tunnels and whatever else goes by the same limiters: each of them counts bytes.
// It may be overdrawn. Who comes then takes what it will need and waits until
// that has come in, so that all get their turns in the order of their coming,
// wherever they run. nil is no bound.
//
// A limiter's burst is what may pass at once after a pause. It has to be
// [Burst] for the rate.
type Budget []*rate.Limiter

// minBurst holds the largest datagram.
const minBurst = 64 << 10

// Burst is what a Budget's limiter may hold, in bytes, at a rate in bytes a
// second: that of 100 ms, or 64 KiB if that is more.
func Burst(bytes float64) int { return int(min(max(bytes/10, minBurst), math.MaxInt32)) }

// minTurn keeps a slow tunnel from system calls for a few bytes each.
const minTurn = 8 << 10

// Turn is how many bytes one may move before others get their turn: those of
// 10 ms, or 8 KiB if that is more.
func (b Budget) Turn() int {
	turn := math.MaxInt32
	for _, l := range b {
		turn = min(turn, max(int(min(float64(l.Limit())/100, math.MaxInt32)), minTurn))
	}
	return turn
}

// Good says whether it is not overdrawn.
func (b Budget) Good(now time.Time) bool {
	for _, l := range b {
		if l.TokensAt(now) <= 0 {
			return false
		}
	}
	return true
}

// Take takes n bytes and returns how long to wait before they may pass: not at
// all if it was good.
func (b Budget) Take(now time.Time, n int) (wait time.Duration) {
	for _, l := range b {
		tokens := l.TokensAt(now)
		for left := n; left > 0; left -= l.Burst() {
			l.ReserveN(now, min(left, l.Burst()))
		}
		if tokens <= 0 {
			wait = max(wait, time.Duration(-tokens/float64(l.Limit())*float64(time.Second)))
		}
	}
	return wait
}

// GiveBack undoes Take for bytes that do not pass after all.
func (b Budget) GiveBack(now time.Time, n int) {
	for _, l := range b {
		l.ReserveN(now, -n)
	}
}

// A Police drops datagrams, which do not wait. They go before all else that Of
// bounds, as long as they keep to Own.
type Police struct{ Own, Of Budget }

// Pass says whether a datagram of n bytes may pass now, and takes them if so.
func (p Police) Pass(now time.Time, n int) bool {
	if len(p.Own) == 0 {
		return true
	}
	if !p.Own.Good(now) {
		return false
	}
	p.Own.Take(now, n)
	p.Of.Take(now, n)
	return true
}

// A turn is a direction of a tunnel that waits for its budget.
type turn struct {
	t   *Tunnel
	dir int
	due int64 // ns since the engine began
}

// turns is a heap, the next turn first.
type turns []turn

func (h turns) Len() int           { return len(h) }
func (h turns) Less(i, j int) bool { return h[i].due < h[j].due }
func (h turns) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *turns) Push(x any)        { *h = append(*h, x.(turn)) }
func (h *turns) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	(*h)[last] = turn{}
	*h = (*h)[:last]
	return x
}

// allowance is how many bytes a direction may read now. 0: it waits for its turn,
// and is not read until then.
func (t *Tunnel) allowance(dir int) int {
	d := &t.dir[dir]
	if d.taken > 0 {
		return d.taken
	}
	now, most := time.Now(), d.budget.Turn()
	if d.budget.Good(now) {
		return most
	}
	n, err := unix.IoctlGetInt(int(t.fd[dir]), unix.TIOCINQ)
	if err != nil || n == 0 {
		return most // the read says what is the matter
	}
	d.taken, d.queued = min(n, most), true
	due := now.Add(d.budget.Take(now, d.taken))
	heap.Push(&t.w.turns, turn{t, dir, int64(due.Sub(t.w.base))})
	return 0
}

// spend takes what was read from the direction's budget, unless that was done
// before.
func (d *direction) spend(n int) {
	if d.budget == nil {
		return
	}
	n -= d.taken
	d.taken = 0
	if n > 0 {
		d.budget.Take(time.Now(), n)
	}
}

// giveBack is for a direction that has ended before its turn.
func (d *direction) giveBack() {
	if d.taken > 0 {
		d.budget.GiveBack(time.Now(), d.taken)
		d.taken = 0
	}
}

// takeTurns lets those go on whose turn it is.
func (w *worker) takeTurns() {
	for len(w.turns) > 0 && w.turns[0].due <= w.now {
		next := heap.Pop(&w.turns).(turn)
		next.t.proceed(next.dir)
	}
}

// proceed lets a direction go on that has waited for its turn.
func (t *Tunnel) proceed(dir int) {
	if t.over {
		return
	}
	d := &t.dir[dir]
	d.queued = false
	if !d.eof && !d.waiting() {
		t.fill(dir)
	}
	if !t.over {
		t.armAll()
	}
}
