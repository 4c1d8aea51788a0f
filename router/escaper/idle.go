package escaper

import (
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"wayout/router/escaper/hop"
	"wayout/selection"
)

// Idle holds the limits of the idle pool. The connections themselves are kept
// by their paths, so that requests of two paths never meet at one lock; only
// the total is counted here. One Idle serves every escaper.
type Idle struct {
	perKey  int
	total   int64
	timeout time.Duration
	n       atomic.Int64
}

// NewIdle returns a pool that keeps at most perKey connections of one path,
// source address, user and destination, at most total in all, and none for
// longer than timeout.
func NewIdle(perKey, total int, timeout time.Duration) *Idle {
	return &Idle{perKey: perKey, total: int64(total), timeout: timeout}
}

// Len returns how many connections are idle.
func (i *Idle) Len() int { return int(i.n.Load()) }

// idleKey is what two requests must have in common to use one connection, the
// path aside: each path has its own idleSet.
type idleKey struct {
	source netip.Addr
	group  string
	user   string
	host   string // lower case, or "" for a literal
	addr   netip.Addr
	port   uint16
}

func keyOf(r *Request, source netip.Addr) idleKey {
	return idleKey{
		source: source,
		group:  r.Group,
		user:   r.User,
		host:   strings.ToLower(r.Target.Host), // no copy where it is lower case
		addr:   r.Target.Addr,
		port:   r.Target.Port,
	}
}

// idleSet is the idle part of a path's books: a stack for each key, because
// the connection used last is the likeliest to be alive, and all of them by
// age, for the timeout. One timer for the path does for all.
type idleSet struct {
	stacks         map[idleKey]stack
	newest, oldest *link
	timer          *time.Timer
	armed          bool
}

type stack struct {
	top *link
	n   int
}

// idlePos is a link's place in the idleSet.
type idlePos struct {
	in           bool
	at           time.Time // when it was parked
	newer, older *link     // of the path
	above, below *link     // of the key
}

// park puts the connection into the idle set. It reports false, and does
// nothing, when the connection cannot be kept.
func (l *link) park() bool {
	if l.kept == nil {
		return false
	}
	var evicted hop.Stream
	l.mu.Lock()
	ok := l.idlers.perKey > 0 && l.mayParkLocked()
	if ok && l.idlers.n.Add(1) > l.idlers.total {
		// Room is made at this path's own expense: no other path's lock.
		if old := l.idle.oldest; old != nil {
			old.unparkLocked()
			old.strikeLocked()
			evicted = old.tcp
		} else {
			l.idlers.n.Add(-1)
			ok = false
		}
	}
	if ok {
		l.parkLocked(time.Now())
	}
	l.mu.Unlock()
	if evicted != nil {
		_ = evicted.Close()
	}
	return ok
}

func (l *link) mayParkLocked() bool {
	f := selection.FamilyOf(l.source.Addr())
	return !l.off && l.killed == nil && !l.retired &&
		l.state.Load().usable()&f != 0 &&
		l.idle.stacks[l.key].n < l.idlers.perKey
}

func (l *link) parkLocked(now time.Time) {
	set := &l.idle
	if set.stacks == nil {
		set.stacks = make(map[idleKey]stack)
	}
	s := set.stacks[l.key]
	l.kill = nil // the last holder's
	l.pos = idlePos{in: true, at: now, older: set.newest, below: s.top}
	if s.top != nil {
		s.top.pos.above = l
	}
	set.stacks[l.key] = stack{top: l, n: s.n + 1}
	if set.newest != nil {
		set.newest.pos.newer = l
	} else {
		set.oldest = l
	}
	set.newest = l
	if !set.armed {
		l.arm(min(l.idlers.timeout, lookEvery))
	}
}

// unparkLocked takes the connection out of the idle set, if it is there.
func (l *link) unparkLocked() {
	if l.kept == nil || !l.pos.in {
		return
	}
	set, p := &l.idle, &l.pos
	if p.newer != nil {
		p.newer.pos.older = p.older
	} else {
		set.newest = p.older
	}
	if p.older != nil {
		p.older.pos.newer = p.newer
	} else {
		set.oldest = p.newer
	}
	s := set.stacks[l.key]
	s.n--
	if p.above != nil {
		p.above.pos.below = p.below
	} else {
		s.top = p.below
	}
	if p.below != nil {
		p.below.pos.above = p.above
	}
	if s.n == 0 {
		delete(set.stacks, l.key)
	} else {
		set.stacks[l.key] = s
	}
	l.pos = idlePos{}
	l.idlers.n.Add(-1)
}

func (g *ledger) arm(d time.Duration) {
	g.idle.armed = true
	if g.idle.timer == nil {
		g.idle.timer = time.AfterFunc(d, g.sweep)
		return
	}
	g.idle.timer.Reset(d)
}

// lookEvery is how often a path looks for idle connections that their far end
// has closed, which would otherwise hold a descriptor until their time is up.
const lookEvery = 5 * time.Second

// sweep closes what has been idle for too long and what is dead.
func (g *ledger) sweep() {
	now := time.Now()
	g.closeIdleIf(func(l *link) bool { return !now.Before(l.pos.at.Add(l.idlers.timeout)) || !l.quiet() })
	g.mu.Lock()
	defer g.mu.Unlock()
	g.idle.armed = false
	if old := g.idle.oldest; old != nil {
		left := old.pos.at.Add(old.idlers.timeout).Sub(now)
		g.arm(min(max(time.Millisecond, left), lookEvery))
	}
}

// take returns an idle connection of the key that is alive, or nil. Dead ones
// on the way to it are closed.
func (g *ledger) take(key *idleKey) *link {
	for {
		g.mu.Lock()
		l := g.idle.stacks[*key].top
		if l == nil {
			g.mu.Unlock()
			return nil
		}
		fresh := time.Since(l.pos.at) < l.idlers.timeout
		l.unparkLocked()
		g.mu.Unlock()
		if fresh && l.quiet() {
			return l
		}
		if l.strike() {
			_ = l.tcp.Close()
		}
	}
}

// nothingToRead reports whether a socket has neither bytes nor an end nor an
// error. The call cannot wait, and so Go's scheduler is not told of it, which
// would cost as much as the call.
func nothingToRead(fd uintptr) bool {
	var b [1]byte
	for {
		_, _, err := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b)), uintptr(len(b)), syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
		if err != syscall.EINTR {
			return err == syscall.EAGAIN
		}
	}
}

// quiet reports whether the connection is open with nothing to read: an end,
// an error and bytes that nobody asked for all make it useless.
func (l *link) quiet() bool {
	if l.peek == nil {
		raw, err := l.tcp.SyscallConn()
		if err != nil {
			return false
		}
		l.raw = raw
		l.peek = func(fd uintptr) { l.alive = nothingToRead(fd) }
	}
	l.alive = false
	return l.raw.Control(l.peek) == nil && l.alive
}
