package httpproxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
)

// A conn is a client connection. What only a request needs is in its exchange.
type conn struct {
	s             *Server
	tcp           *net.TCPConn
	client, local netip.AddrPort
	in            reader
	out           writer

	raw      syscall.RawConn
	wake     func(fd uintptr) bool // bound once: c.readable
	readErr  error
	idle     atomic.Bool
	upstream atomic.Pointer[escaper.Conn] // of the request under way
	dead     atomic.Bool                  // cut: readers and writers of both sides look at it
	shard    *relay.Shard

	// Of a connection that has not left the worker: see begin.go.
	task   *relay.Task // nil: it has, and tcp is set
	fd     int
	tunnel *tunnel // tracked in the connection's place
}

// outcome says what becomes of a client connection after a request.
type outcome uint8

const (
	keep   outcome = iota // the next request
	linger                // close, when the client has had time to read the answer
	drop                  // close
	reset                 // close so that the client sees that the answer is not whole
	gone                  // it has become a tunnel
	over                  // it has ended
)

func (s *Server) newConn(tcp *net.TCPConn, pre []byte) (*conn, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("client connection: %w", err)
	}
	c := &conn{s: s, tcp: tcp, raw: raw, fd: -1}
	if c.client, err = addrPort(tcp.RemoteAddr()); err != nil {
		return nil, err
	}
	if c.local, err = addrPort(tcp.LocalAddr()); err != nil {
		return nil, err
	}
	c.in.use(tcp, raw)
	c.out.use(tcp, raw)
	c.in.pool, c.in.dead = &s.buffers, &c.dead
	c.out.limit, c.out.dead = s.o.Timeouts.Write, &c.dead
	c.wake = c.readable
	if len(pre) > 0 {
		c.in.take(s.buffers.get(len(pre)))
		c.in.w = copy(c.in.buf, pre)
	}
	return c, nil
}

func addrPort(a net.Addr) (netip.AddrPort, error) {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, errors.New("client connection: no address")
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
}

// serve runs the connection to its end.
func (c *conn) serve() {
	for c.await() {
		x := c.s.newExchange(c)
		o := x.run()
		c.upstream.Store(nil)
		x.free()
		if o != keep {
			c.finish(o)
			return
		}
	}
	c.finish(drop)
}

func (c *conn) finish(o outcome) {
	switch o {
	case gone:
		c.in.drop()
		return
	case over:
		return
	case linger:
		c.lingerOn()
	case reset:
		_ = c.tcp.SetLinger(0)
	}
	c.in.drop()
	// Nothing can be done about a close that fails.
	_ = c.tcp.Close()
}

// await waits for the first bytes of a request without holding a buffer, and
// reports whether there are any.
func (c *conn) await() bool {
	if c.dead.Load() {
		return false
	}
	if c.in.buffered() > 0 {
		return true
	}
	c.in.release()
	if c.in.deadline.after(c.s.o.Timeouts.Idle, c.tcp.SetReadDeadline) != nil {
		return false
	}
	// Idle is set before draining is looked at, and Shutdown does it the other
	// way round: one of the two sees the other.
	c.idle.Store(true)
	defer c.idle.Store(false)
	var err error
	if !c.s.front.Draining() {
		err = c.raw.Read(c.wake)
	}
	if c.s.front.Draining() && c.in.buffered() == 0 && c.readErr == nil {
		// A request that is there already is served: its client, perhaps a new
		// one, has done nothing wrong.
		err = c.raw.Control(func(fd uintptr) { c.readable(fd) })
	}
	if err != nil || c.readErr != nil || c.in.buffered() == 0 {
		return false
	}
	c.in.resume() // a request that came in the very moment of a Shutdown is served
	return true
}

// readable is called when the descriptor may be readable. Only then is a
// buffer taken.
func (c *conn) readable(fd uintptr) bool {
	c.in.take(c.s.buffers.get(smallBuffer))
	n, err := moveBytes(syscall.SYS_READ, fd, c.in.buf)
	if err == syscall.EAGAIN {
		c.in.drop()
		return false
	}
	if c.readErr = nil; err != 0 {
		c.readErr = err
	}
	c.in.w = n
	return true
}

// EndIdle ends the connection if it waits for a request.
func (c *conn) EndIdle() {
	if c.idle.Load() {
		c.in.stop()
	}
}

// Cut ends the connection.
func (c *conn) Cut() {
	c.dead.Store(true)
	// Both directions of both sides: whatever the request waits for. It fails
	// only on a connection that is closed, where nobody waits.
	_ = c.tcp.SetDeadline(past())
	if up := c.upstream.Load(); up != nil {
		_ = up.TCP.SetDeadline(past())
	}
}

// readHead reads until a whole request head is there, and returns its length
// in what is unread. The error is a fault, or that of the connection.
func (c *conn) readHead() (int, error) {
	var end headEnd
	lim := &c.s.o.Limits
	skipped, timed := false, false
	for {
		b := c.in.unread()
		// One empty line before a request is let pass (RFC 9112, section 2.2).
		if !skipped && len(b) >= 2 && b[0] == '\r' && b[1] == '\n' {
			c.in.r += 2
			skipped, end = true, headEnd{}
			continue
		}
		if len(b) > 0 && !isToken(b[0]) && b[0] != '\r' {
			return 0, notHTTP(b[0])
		}
		n, err := end.find(b)
		switch {
		case err != nil:
			return 0, err
		case n > lim.Head:
			return 0, faultHeadTooLarge
		case n > 0:
			return n, nil
		case end.line == 0 && len(b) > lim.Target+maxStartLine:
			return 0, faultTargetTooLong
		case len(b) >= lim.Head:
			return 0, faultHeadTooLarge
		}
		if !timed {
			timed = true
			if d := c.s.o.Timeouts.Head; d > 0 {
				if err := c.in.deadline.exactly(time.Now().Add(d), c.tcp.SetReadDeadline); err != nil {
					return 0, err
				}
			}
		}
		if len(b) == len(c.in.buf) {
			c.in.grow(min(4*len(b), max(lim.Head, largeBuffer)))
		}
		if err := c.in.fill(-1); err != nil {
			switch {
			case errors.Is(err, io.EOF) && c.in.buffered() == 0:
				return 0, io.EOF
			case errors.Is(err, io.EOF):
				return 0, faultIncomplete
			case isTimeout(err):
				return 0, faultHeadTimeout
			}
			return 0, err
		}
	}
}

// maxStartLine is what a request line holds beside its target, with a long
// method.
const maxStartLine = 64

func notHTTP(first byte) error {
	switch first {
	case 0x16: // a TLS handshake record
		return faultTLS
	case '\n':
		return faultBareLF
	}
	return faultNotHTTP
}

// lingerOn closes the sending half and reads on for a while: a close with
// bytes unread would reset the connection, and the client might lose the
// answer (RFC 9112, section 9.6).
func (c *conn) lingerOn() {
	const most = 1 << 20
	if c.dead.Load() || c.tcp.CloseWrite() != nil {
		return
	}
	c.in.resume()
	if c.s.o.Timeouts.Linger > 0 {
		if c.in.deadline.exactly(time.Now().Add(c.s.o.Timeouts.Linger), c.tcp.SetReadDeadline) != nil {
			return
		}
	}
	for n := 0; n < most; {
		c.in.r, c.in.w = 0, 0
		if c.in.fill(-1) != nil {
			return
		}
		n += c.in.buffered()
	}
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
