package escaper

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"wayout/selection"
)

// ledger is what a path remembers: its state, its counters, and the books of
// its open connections. It is shared by the Paths that a reload makes of one
// unchanged path. The lock is the path's own; it is held for a few list
// operations, and across a system call only where sweep looks at idle
// connections.
type ledger struct {
	state    atomic.Pointer[state]
	counters counters

	mu      sync.Mutex
	books   *link // the first of all open connections; the others follow by next
	idle    idleSet
	retired bool // the path is in no table any more
}

// link is one open connection on the books.
type link struct {
	*ledger
	tcp    *net.TCPConn // nil: fd
	fd     int
	source netip.AddrPort
	remote netip.AddrPort
	key    idleKey
	pool   *selection.Pool // which counts it for least_conn
	node   int
	idlers *Idle // nil: never parked

	// What follows is guarded by the ledger's mu.
	next, prev *link
	off        bool // off the books
	kill       func(error)
	killed     error
	pos        idlePos

	// Of the liveness check, kept so that it allocates once a connection.
	raw   syscall.RawConn
	peek  func(fd uintptr)
	alive bool
}

// enter puts a connection on the books, if its family may still be used: an
// address that went while the connection was made ends here.
func (l *link) enter(p *Path) error {
	f := selection.FamilyOf(l.source.Addr())
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.state.Load(); s.up()&f == 0 {
		return p.downError(s, f)
	}
	l.next = l.books
	if l.next != nil {
		l.next.prev = l
	}
	l.books = l
	return nil
}

// strike takes the connection off the books. It reports whether it was on.
func (l *link) strike() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.strikeLocked()
}

func (l *link) strikeLocked() bool {
	if l.off {
		return false
	}
	l.off = true
	l.kill = nil
	if l.prev != nil {
		l.prev.next = l.next
	} else {
		l.books = l.next
	}
	if l.next != nil {
		l.next.prev = l.prev
	}
	l.next, l.prev = nil, nil
	l.pool.Closed(l.node)
	l.counters.closed.Add(1)
	return true
}

// onKill sets f, or returns why the connection is dead already.
func (l *link) onKill(f func(error)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.killed == nil && !l.off {
		l.kill = f
	}
	return l.killed
}

func (l *link) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.killed
}

// Kill ends every connection whose source address is addr, or every one when
// addr is the zero Addr, with err as the reason, and returns how many it
// ended. Idle connections are closed, those in use are ended by what OnKill
// set, else reset. To keep new ones from the address, the family's state is
// set before.
func (p *Path) Kill(addr netip.Addr, err error) int {
	type victim struct {
		l *link
		f func(error)
	}
	var victims []victim
	p.mu.Lock()
	for l := p.books; l != nil; {
		next := l.next // striking l forgets it
		if l.killed == nil && (!addr.IsValid() || l.source.Addr() == addr) {
			l.killed = err
			l.unparkLocked()
			victims = append(victims, victim{l, l.kill})
			if l.kill == nil && l.tcp != nil {
				l.strikeLocked()
			}
		}
		l = next
	}
	p.mu.Unlock()
	for _, v := range victims {
		switch {
		case v.f != nil:
			v.f(err)
		case v.l.tcp != nil:
			reset(v.l.tcp)
		}
	}
	return len(victims)
}

func (l *link) close() error {
	if l.tcp == nil {
		return unix.Close(l.fd)
	}
	return l.tcp.Close()
}

// reset closes a connection so that the far side, if it can be reached,
// learns that it was cut rather than ended.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // both fail only on a connection that is closed already
	_ = c.Close()
}

// retire ends a path that is in no table any more: what is open lives on, and
// nothing is kept idle.
func (g *ledger) retire() {
	g.mu.Lock()
	g.retired = true
	g.mu.Unlock()
	g.closeIdle(selection.V4 | selection.V6)
}

func (g *ledger) count(r Result) { g.counters.attempts[r].Add(1) }

// closeIdle closes the idle connections of some families.
func (g *ledger) closeIdle(f selection.Family) {
	g.closeIdleIf(func(l *link) bool { return selection.FamilyOf(l.source.Addr())&f != 0 })
}

// closeIdleIf closes the idle connections that match.
func (g *ledger) closeIdleIf(match func(*link) bool) {
	var closing []*net.TCPConn
	g.mu.Lock()
	for l := g.idle.oldest; l != nil; {
		newer := l.pos.newer
		if match(l) {
			l.unparkLocked()
			l.strikeLocked()
			closing = append(closing, l.tcp)
		}
		l = newer
	}
	g.mu.Unlock()
	for _, c := range closing {
		_ = c.Close() // nobody is left to tell
	}
}
