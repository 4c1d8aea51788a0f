package escaper

import (
	"container/heap"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	// maxProbes is how many paths are probed at once.
	maxProbes = 64
	// firstProbes is how far apart the first probes of two paths begin.
	firstProbes = 2 * time.Millisecond
	// gather is how long changes of state are gathered before policies take note
	// of them: that takes time in proportion to all paths.
	gather = 100 * time.Millisecond
	// patience is how long a path that cannot send is left alone.
	patience = time.Second
)

// Health watches over the paths whose connections or probes are judged: it
// sends their probes, ends their holds, lets policies take note of what has
// changed, and tells of it. One serves a daemon, over all reloads. An idle path
// costs no goroutine.
type Health struct {
	changed func([]*Path)
	now     func() time.Time
	wake    chan struct{} // of one

	mu     sync.Mutex
	table  *Table
	paths  map[*ledger]*Path // of those of table that are watched over, at least
	due    tasks
	probes map[*ledger]bool // that have a task in due, or are being probed
	busy   int              // probes under way
	noted  map[*ledger]bool // whose verdict has changed
	flush  time.Time        // not before
}

// task is what is to be done for a path at a time: a probe, or else a look at
// its holds.
type task struct {
	at    time.Time
	l     *ledger
	probe bool
}

// NewHealth returns one that tells changed of paths whose state has changed,
// after their policies have taken note. changed may be nil.
func NewHealth(changed func([]*Path)) *Health {
	return &Health{
		changed: changed, now: time.Now, wake: make(chan struct{}, 1),
		paths: map[*ledger]*Path{}, probes: map[*ledger]bool{}, noted: map[*ledger]bool{},
	}
}

// Use says which table's paths there are.
//
// What is known of the paths that were there before is fitted to how they are
// judged now.
func (h *Health) Use(t *Table) {
	for p, before := range h.exchange(t) {
		p.d.adopt(p, before)
	}
}

// exchange puts a table in the place of the one before, and returns the paths
// that both have with the escaper that they had.
func (h *Health) exchange(t *Table) map[*Path]*Direct {
	h.mu.Lock()
	defer h.mu.Unlock()
	gone, come := h.table.without(t), t.without(h.table)
	h.table = t
	if !slices.ContainsFunc(slices.Concat(gone, come), (*Direct).Watched) {
		return nil
	}
	before, kept := map[*ledger]*Direct{}, map[*Path]*Direct{}
	for _, d := range gone {
		for _, p := range d.paths {
			before[p.ledger] = d
			delete(h.paths, p.ledger)
		}
	}
	now, first := h.now(), time.Duration(0)
	for _, d := range come {
		for _, p := range d.paths {
			if was := before[p.ledger]; was != nil {
				kept[p] = was
			}
			h.paths[p.ledger] = p
			if d.probe != nil && !h.probes[p.ledger] {
				h.probes[p.ledger] = true
				heap.Push(&h.due, task{now.Add(min(first, d.probe.Interval/2)), p.ledger, true})
				first += firstProbes
			}
		}
	}
	h.poke()
	return kept
}

// Run works until ctx ends, and waits for the probes that are under way.
func (h *Health) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-h.wake:
		}
		next := h.step(h.now(), func(t *Table, p *Path, next time.Time) {
			wg.Go(func() {
				p.d.probeAll(ctx, t, p)
				h.ended(p, next)
			})
		})
		if next.IsZero() {
			timer.Stop()
			continue
		}
		timer.Reset(max(next.Sub(h.now()), 0))
	}
}

// step does all that is due, and returns when the next is; the zero Time: not
// before something happens. probe has to begin a probe of a path and to return;
// the end of the probe is told by ended.
func (h *Health) step(now time.Time, probe func(t *Table, p *Path, next time.Time)) time.Time {
	for {
		p, k := h.take(now)
		if p == nil {
			break
		}
		if k.probe {
			probe(h.tableNow(), p, now.Add(jitter(p.d.probe.Interval)))
		} else if at := p.d.release(p, now); !at.IsZero() {
			h.remind(k.l, at)
		}
	}
	next := h.tell(now)
	h.mu.Lock()
	defer h.mu.Unlock()
	full := h.busy == maxProbes // then the end of one wakes
	if len(h.due) > 0 && !full && (next.IsZero() || h.due[0].at.Before(next)) {
		next = h.due[0].at
	}
	return next
}

// take takes the next task that is due, nil when there is none or too much is
// under way. A path that cannot send at the moment is looked at again soon.
func (h *Health) take(now time.Time) (*Path, task) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.due) > 0 && !h.due[0].at.After(now) && h.busy < maxProbes {
		k := heap.Pop(&h.due).(task)
		p := h.paths[k.l]
		switch {
		case p == nil, k.probe && p.d.probe == nil:
			if k.probe {
				delete(h.probes, k.l)
			}
		case !k.probe:
			return p, k
		case p.state.Load().present() == 0 || p.state.Load().expired:
			k.at = now.Add(min(p.d.probe.Interval, patience))
			heap.Push(&h.due, k)
		default:
			h.busy++
			return p, k
		}
	}
	return nil, task{}
}

func (h *Health) tableNow() *Table {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.table
}

// jitter is a time a tenth more or less.
func jitter(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*float64(d)/5)
}

// tell lets policies take note of what has changed, and returns when it wants
// to do so again.
func (h *Health) tell(now time.Time) time.Time {
	h.mu.Lock()
	if len(h.noted) == 0 {
		h.mu.Unlock()
		return time.Time{}
	}
	if now.Before(h.flush) {
		defer h.mu.Unlock()
		return h.flush
	}
	h.flush = now.Add(gather)
	var list []*Path
	escapers := map[*Direct]bool{}
	if h.table != nil {
		for _, p := range h.table.paths { // in their order
			if h.noted[p.ledger] {
				list = append(list, p)
				escapers[p.d] = true
			}
		}
	}
	clear(h.noted)
	h.mu.Unlock()
	for d := range escapers {
		d.Publish()
	}
	if h.changed != nil && len(list) > 0 {
		h.changed(list)
	}
	return time.Time{}
}

// note says that the verdict on a path has changed.
func (h *Health) note(l *ledger) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.noted[l] = true
	h.poke()
}

// remind has the path's holds looked at, at a time.
func (h *Health) remind(l *ledger, at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	heap.Push(&h.due, task{at, l, false})
	h.poke()
}

// ended takes note of a probe that is over. The next one of the path is at a
// time, or now.
func (h *Health) ended(p *Path, next time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy--
	heap.Push(&h.due, task{next, p.ledger, true})
	h.poke()
}

func (h *Health) poke() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// tasks is a heap, the next due first.
type tasks []task

func (t tasks) Len() int           { return len(t) }
func (t tasks) Less(i, j int) bool { return t[i].at.Before(t[j].at) }
func (t tasks) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }

// Push implements heap.Interface.
func (t *tasks) Push(x any) { *t = append(*t, x.(task)) }

// Pop implements heap.Interface.
func (t *tasks) Pop() any {
	last := len(*t) - 1
	x := (*t)[last]
	*t = (*t)[:last]
	return x
}
