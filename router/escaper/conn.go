package escaper

import (
	"net/netip"
	"sync/atomic"
	"time"

	"wayout/router/escaper/hop"
)

// Conn is a connection that leaves by a path: bound, and on the path's books
// until one of Close, Release and Park ends its holder's hold on it. Its
// methods are safe for concurrent use. After Park the connection may be
// somebody else's: a Conn is one holder's view of it, so that a late Close
// cannot touch the next holder's.
//
// A bare descriptor is the holder's alone to close: a Kill before OnKill only
// shows in OnKill and Killed, since closing a number that another goroutine
// uses could hit whatever has it next.
type Conn struct {
	TCP    hop.Stream     // a bare socket, so that the kernel can splice: a *net.TCPConn, or the end of a pair of sockets; nil: FD
	FD     int            // for a request with a task: the bare descriptor, non-blocking
	Path   *Path          // what it leaves by
	Source netip.AddrPort // the local end, as the kernel tells it
	Remote netip.AddrPort // the address that was dialled
	Reused bool           // it came from the idle pool
	Early  []byte         // what a next-hop proxy has sent ahead: first of what comes from the target

	link *link
	done atomic.Bool
}

// Close closes the connection and takes it off its path's books. A second
// Close, and one after Park or Release, does nothing.
func (c *Conn) Close() error {
	if c.done.Swap(true) || !c.link.strike() {
		return nil
	}
	return c.link.close()
}

// Release takes the connection off the books without closing it: somebody
// else, the relay, has closed the descriptor, well or (with a cause) because the
// tunnel failed.
func (c *Conn) Release(cause error) {
	if c.done.Swap(true) {
		return
	}
	if c.TCP != nil {
		hop.End(c.TCP, cause)
	}
	c.link.strike()
}

// Park gives the connection back after a complete exchange that left nothing
// unread: into the idle pool for the next request of the same path, source
// address, user and destination, or closed where that is not possible.
func (c *Conn) Park() {
	if c.done.Swap(true) {
		return
	}
	if !c.link.park() && c.link.strike() {
		_ = c.link.close() // nobody is left to tell
	}
}

// Armed is where holders note the deadlines that they have set on TCP, to read
// and to write: Park leaves both to the next one. nil: there will be none.
func (c *Conn) Armed() *[2]time.Time {
	if c.link.kept == nil {
		return nil
	}
	return &c.link.armed
}

// OnKill sets what ends the connection when its path's address has gone; it
// is called once, with the reason, on a goroutine that is not the holder's,
// and has to end in Close or Release. By default the connection is reset. When
// the connection was killed already, f is called at once.
func (c *Conn) OnKill(f func(error)) {
	if err := c.link.onKill(f); err != nil {
		f(err)
	}
}

// Killed returns why the connection was ended from this side, or nil.
func (c *Conn) Killed() error { return c.link.reason() }
