package httpproxy

import (
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"wayout/router/relay"
)

// stream is a bare stream socket: a *net.TCPConn, or the end of a pair of
// sockets.
type stream interface {
	net.Conn
	syscall.Conn
}

// A reader is the receiving half of a connection with what was read ahead.
// One goroutine uses it at a time; stop may be called by any.
type reader struct {
	tcp      stream // set by use
	socket   socket
	pool     *buffers
	buf      []byte // its capacity is the buffer; nil while nothing is held
	r, w     int    // buf[r:w] is unread
	deadline deadline
	stopped  atomic.Bool
	dead     *atomic.Bool // the client connection's: stopped for good
	full     bool         // the last read filled all the room there was
}

// use makes it the reader of a connection.
func (r *reader) use(tcp stream, raw syscall.RawConn) { r.tcp, r.socket.raw = tcp, raw }

// unread returns what was read ahead. It is good until the next fill.
func (r *reader) unread() []byte { return r.buf[r.r:r.w] }

func (r *reader) buffered() int { return r.w - r.r }

// fill reads once, waiting at most limit (0: for ever, negative: the deadline
// stays as it is), and returns when there is at least a byte more. The end of
// the stream is io.EOF. There must be room.
func (r *reader) fill(limit time.Duration) error {
	if r.buf == nil {
		r.take(r.pool.get(smallBuffer))
	}
	if r.r > 0 {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	if r.w == len(r.buf) {
		return io.ErrShortBuffer
	}
	if limit >= 0 {
		if err := r.deadline.after(limit, r.tcp.SetReadDeadline); err != nil {
			return err
		}
	}
	// After the deadline is set, so that a stop either finds it set and
	// overrides it, or is seen here.
	if r.halted() {
		return relay.ErrStopped
	}
	n, err := r.socket.read(r.buf[r.w:])
	if r.halted() {
		return relay.ErrStopped
	}
	r.full = n == len(r.buf)-r.w
	r.w += n
	return err
}

func (r *reader) take(b []byte) {
	r.buf = b[:cap(b)]
	r.r, r.w = 0, 0
}

// grow makes the buffer at least n bytes large.
func (r *reader) grow(n int) {
	if len(r.buf) >= n {
		return
	}
	b := r.pool.get(n)
	b = b[:cap(b)]
	w := copy(b, r.unread())
	if r.buf != nil {
		r.pool.put(r.buf)
	}
	r.buf, r.r, r.w = b, 0, w
}

// release gives the buffer back when nothing is in it.
func (r *reader) release() {
	if r.buf != nil && r.r == r.w {
		r.drop()
	}
}

// drop gives the buffer back with what is in it.
func (r *reader) drop() {
	if r.buf == nil {
		return
	}
	r.pool.put(r.buf)
	r.buf, r.r, r.w = nil, 0, 0
}

// stop ends a fill that waits, and every later one, until resume.
func (r *reader) stop() {
	r.stopped.Store(true)
	// It fails only when the connection is closed, which stops it as well.
	_ = r.tcp.SetReadDeadline(past())
}

func (r *reader) halted() bool { return r.stopped.Load() || r.dead.Load() }

// resume lets a stopped reader go on. Nobody may be calling stop any more.
func (r *reader) resume() {
	if r.stopped.Load() {
		r.stopped.Store(false)
		r.deadline.at = past()
	}
}
