package escaper

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper/hop"
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
	names    atomic.Pointer[ownNames]
	courses  atomic.Pointer[[2]course]               // by family; a path to a peer has one
	trying   atomic.Bool                             // a request tries the path, which is on trial
	crowded  atomic.Pointer[map[netip.AddrPort]bool] // towards whom few ports are left
	reserved atomic.Pointer[[]netip.Addr]            // see Path.Reserve

	mu      sync.Mutex
	books   *link // the first of all open connections; the others follow by next
	idle    idleSet
	retired bool // the path is in no table any more
}

// link is one open connection on the books.
type link struct {
	*ledger
	tcp    hop.Stream // nil: fd
	fd     int
	source netip.AddrPort
	second netip.Addr // the other source of an association with both families; or the zero Addr
	remote netip.AddrPort
	pool   *selection.Pool // which counts it for least_conn
	node   int
	*kept  // nil: it is never parked

	// What follows is guarded by the ledger's mu.
	next, prev *link
	off        bool // off the books
	kill       func(error)
	killed     error
}

// kept is what a link has beside that may be parked. Most have not: a tunnel's
// connection serves once.
type kept struct {
	idlers *Idle
	key    idleKey
	armed  [2]time.Time // see Conn.Armed
	pos    idlePos      // guarded by the ledger's mu

	// Of the liveness check, kept so that it allocates once a connection.
	raw   syscall.RawConn
	peek  func(fd uintptr)
	alive bool
}

// enter puts a connection on the books, if its family may still be used: an
// address that went while the connection was made ends here.
func (l *link) enter(p *Path) error {
	f := selection.FamilyOf(l.source.Addr())
	if l.second.IsValid() {
		f |= selection.FamilyOf(l.second)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.state.Load(); s.present()&f != f {
		return p.downError(s, f&^s.present())
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

// leavesBy reports whether an address of the prefix is a source of the
// connection.
func (l *link) leavesBy(from netip.Prefix) bool {
	return from.Contains(l.source.Addr()) || from.Contains(l.second)
}

// Kill ends every connection whose source address is in from, or every one when
// from is the zero Prefix, with err as the reason, and returns how many it
// ended. Idle connections are closed, those in use are ended by what OnKill
// set, else reset. To keep new ones from the address, the family's state is
// set before.
func (p *Path) Kill(from netip.Prefix, err error) int {
	type victim struct {
		l *link
		f func(error)
	}
	var victims []victim
	p.mu.Lock()
	for l := p.books; l != nil; {
		next := l.next // striking l forgets it
		if l.killed == nil && (!from.IsValid() || l.leavesBy(from)) {
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
	err := l.tcp.Close()
	hop.End(l.tcp, nil)
	return err
}

var errCut = errors.New("the connection was cut")

// reset closes a connection so that the far side, if it can be reached,
// learns that it was cut rather than ended.
func reset(c hop.Stream) {
	// Both fail only on a connection that is closed already.
	if tcp, is := c.(*net.TCPConn); is {
		_ = tcp.SetLinger(0)
	}
	hop.End(c, errCut) // a TLS peer's has no resets
	_ = c.Close()
}

// retire ends a path that is in no table any more: what is open lives on, and
// nothing is kept idle.
func (g *ledger) retire() {
	g.mu.Lock()
	g.retired = true
	g.mu.Unlock()
	g.closeIdle(selection.V4 | selection.V6)
	if n := g.names.Load(); n != nil {
		n.end()
	}
}

// ownNames is a path's own resolver, once it was needed (see Options.Bound),
// and whose child it is.
type ownNames struct{ parent, own Resolver }

// end lets go of the resolver: nobody asks by this path any more.
func (n *ownNames) end() {
	if r, is := n.own.(interface{ Close() }); is {
		r.Close()
	}
}

func (g *ledger) count(r Result) { g.counters.attempts[r].Add(1) }

// closeIdle closes the idle connections of some families.
func (g *ledger) closeIdle(f selection.Family) {
	g.closeIdleIf(func(l *link) bool { return selection.FamilyOf(l.source.Addr())&f != 0 })
}

// closeIdleIf closes the idle connections that match.
func (g *ledger) closeIdleIf(match func(*link) bool) {
	var closing []hop.Stream
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
