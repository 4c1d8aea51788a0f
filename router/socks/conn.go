package socks

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// Sizes of the buffers: the small one holds a plain handshake, with all of its
// messages sent at once, the large one the longest message.
const (
	smallBuffer = 1 << 10
	largeBuffer = 8 << 10
)

// buffers lends buffers. Pointers to arrays go into the pools because those,
// unlike slices, fit an interface without an allocation.
type buffers struct{ small, large sync.Pool }

func (p *buffers) get(n int) []byte {
	if n <= smallBuffer {
		if b, ok := p.small.Get().(*[smallBuffer]byte); ok {
			return b[:]
		}
		return make([]byte, smallBuffer)
	}
	if b, ok := p.large.Get().(*[largeBuffer]byte); ok {
		return b[:]
	}
	return make([]byte, largeBuffer)
}

func (p *buffers) put(b []byte) {
	switch len(b) {
	case smallBuffer:
		p.small.Put((*[smallBuffer]byte)(b))
	case largeBuffer:
		p.large.Put((*[largeBuffer]byte)(b))
	}
}

// A conn is a client connection up to its tunnel, on a task.
type conn struct {
	s             *Server
	k             *relay.Task
	t             *tunnel
	fd            int
	client, local netip.AddrPort

	buf   []byte // lent; nil: none
	r, w  int    // buf[r:w] has not been looked at
	until time.Time
	asked bool // the client has been answered, and nothing of what it says next can be there

	old bool            // SOCKS4
	rec *escaper.Record // the tunnel's
	req *escaper.Request
	out [maxReply]byte
}

// maxReply is the length of the longest answer.
const maxReply = 3 + 1 + 16 + 2

// Begin serves a new client connection, as a task. It returns when the
// connection has ended or has become a tunnel.
func (s *Server) Begin(k *relay.Task, a relay.Accepted) {
	c := &conn{s: s, k: k, fd: a.FD, client: a.Remote, local: a.Local}
	c.t = &tunnel{Bare: relay.Bare{Task: k}, s: s}
	c.t.place = s.front.Track(c.t)
	if c.first() && c.serve() {
		return // it is a tunnel's
	}
	c.drop()
	_ = syscall.Close(c.fd)
	c.t.release()
}

// first reads what the client begins with, and holds no buffer meanwhile.
func (c *conn) first() bool {
	for {
		c.buf = c.s.buffers.get(smallBuffer)
		n, err := syscall.Read(c.fd, c.buf)
		switch {
		case n > 0:
			c.w = n
			return true
		case errors.Is(err, syscall.EINTR):
		case !errors.Is(err, syscall.EAGAIN):
			return false
		default:
			c.drop()
			if !c.t.AwaitFirst(c.s.front, c.fd, c.s.o.Timeouts.Idle) {
				return false
			}
			continue
		}
		c.drop()
	}
}

// serve runs the handshake, and reports whether the connection has been handed
// over.
func (c *conn) serve() bool {
	c.rec = &c.t.rec
	*c.rec = escaper.Record{Start: time.Now(), Server: c.s.o.Name, Client: c.client}
	if d := c.s.o.Timeouts.Handshake; d > 0 {
		c.until = c.rec.Start.Add(d)
	}
	c.req = &escaper.Request{
		Server: c.s.o.Name, Escaper: c.s.o.Escaper,
		Client: c.client, Local: c.local, Task: c.k,
	}
	if c.s.o.ServerSelection != nil {
		c.req.Selection.Server = c.s.o.ServerSelection(c.local)
	}
	switch c.buf[0] {
	case version5:
		return c.serve5()
	case version4:
		return c.serve4()
	}
	return c.refuse(errVersion, nil)
}

func (c *conn) unread() []byte { return c.buf[c.r:c.w] }

func (c *conn) drop() {
	if c.buf != nil {
		c.s.buffers.put(c.buf)
		c.buf, c.r, c.w = nil, 0, 0
	}
}

// fill reads more. The error is io.EOF, os.ErrDeadlineExceeded, relay.ErrStopped
// or the connection's.
func (c *conn) fill() error {
	switch {
	case c.r == c.w:
		c.r, c.w = 0, 0
	case c.w == len(c.buf) && c.r > 0:
		c.r, c.w = 0, copy(c.buf, c.buf[c.r:c.w])
	case c.w == len(c.buf):
		large := c.s.buffers.get(largeBuffer)
		copy(large, c.buf)
		c.s.buffers.put(c.buf)
		c.buf = large
	}
	for {
		if c.asked {
			c.asked = false
			if _, err := c.k.Wait(c.fd, unix.EPOLLIN, c.until); err != nil {
				return err
			}
		}
		n, err := syscall.Read(c.fd, c.buf[c.w:])
		switch {
		case n > 0:
			c.w += n
			return nil
		case err == nil:
			return io.EOF
		case errors.Is(err, syscall.EAGAIN):
			c.asked = true
		case !errors.Is(err, syscall.EINTR):
			return err
		}
	}
}

// write sends an answer.
func (c *conn) write(b []byte) error {
	for {
		n, err := syscall.Write(c.fd, b)
		switch {
		case n == len(b):
			c.asked = c.r == c.w
			return nil
		case n > 0:
			b = b[n:]
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			var until time.Time
			if d := c.s.o.Timeouts.Write; d > 0 {
				until = time.Now().Add(d)
			}
			if _, err := c.k.Wait(c.fd, unix.EPOLLOUT, until); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// read reads one message with one of the parse functions, which says how many
// bytes it takes.
func (c *conn) read(parse func(b []byte) (n int, err error)) error {
	for {
		n, err := parse(c.unread())
		if err != nil {
			return err
		}
		if n > 0 {
			c.r += n
			return nil
		}
		switch err := c.fill(); {
		case err == nil:
		case errors.Is(err, io.EOF):
			return errIncomplete
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errSlow
		default:
			return &connError{err}
		}
	}
}

// connError is a failure of the client's connection: nobody is left to answer.
type connError struct{ err error }

func (e *connError) Error() string { return "client connection: " + e.err.Error() }
func (e *connError) Unwrap() error { return e.err }

// refuse answers with what a phase says for no, and ends the connection, when
// the client has had time to read the answer. It returns false.
func (c *conn) refuse(err error, answer []byte) bool {
	var broken *connError
	gone := errors.As(err, &broken)
	stopped := gone && (errors.Is(err, relay.ErrStopped) || errors.Is(err, relay.ErrClosed))
	status := 0
	if !gone {
		status, _ = judge(err)
		gone = c.write(answer) != nil
	}
	if !stopped {
		c.observe(status, err)
	}
	c.t.uncount()
	if !gone {
		c.lingerOn()
	}
	return false
}

// observe reports the request.
func (c *conn) observe(status int, err error) {
	if c.s.o.Observe == nil {
		return
	}
	if !c.s.o.Prompt {
		c.k.Leave()
	}
	c.rec.Status, c.rec.Err = status, err
	c.rec.Duration = time.Since(c.rec.Start)
	c.s.o.Observe(c.rec)
}

// lingerOn closes the sending half and reads on for a while: a close with
// bytes unread would reset the connection, and the client might lose the
// answer.
func (c *conn) lingerOn() {
	const most = 1 << 20
	if syscall.Shutdown(c.fd, syscall.SHUT_WR) != nil {
		return
	}
	c.until = time.Time{}
	if d := c.s.o.Timeouts.Linger; d > 0 {
		c.until = time.Now().Add(d)
	}
	for n := 0; n < most; n += c.w {
		c.r = c.w
		if c.fill() != nil {
			return
		}
	}
}

// selected tells the record what was asked for, where it cannot be read.
func (c *conn) selected(src selection.Source, asked string) {
	const most = 256
	c.rec.Choice = escaper.Choice{Source: src, Asked: asked[:min(len(asked), most)]}
}
