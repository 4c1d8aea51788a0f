package hop

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// tuning holds the figures of a bridge; 0: those of fill.
type tuning struct {
	// glance is how often a write that does nothing looks whether the other end
	// is still there.
	glance time.Duration
	// linger is how long a peer may take nothing of what is left when the holder
	// of the stream has gone.
	linger time.Duration
	// send is the send buffer that is asked for the stream.
	send int
	// verdict is how long a holder that has gone after the peer's end may take to
	// say how (see End).
	verdict time.Duration
}

func (t *tuning) fill() {
	if t.glance == 0 {
		t.glance = time.Second
	}
	if t.linger == 0 {
		t.linger = 30 * time.Second
	}
	if t.send == 0 {
		t.send = mostSend
	}
	if t.verdict == 0 {
		t.verdict = 2 * time.Second
	}
}

// bridge moves bytes between a TLS connection and one end of a pair of sockets
// whose other end, the stream, has a holder that knows nothing of TLS. A half
// that ends is a half-close on the other side, close_notify on that of TLS.
//
// All else ends both: the peer that goes without close_notify, or resets, is a
// reset of the stream (see end), and the stream that is closed before the peer
// has ended is a reset of the TCP connection. After the peer's end the sockets do
// not tell a holder that gives up from one that closes, unless it leaves bytes
// unread: End does.
type bridge struct {
	tls     *secured
	in      *end
	buffers *Buffers
	tune    tuning

	passed atomic.Bool  // the peer's end has been passed on, or is about to be
	over   atomic.Int32 // halves that have ended well
	dead   atomic.Bool
	left   time.Time // wire.stalled: since when the holder is gone and nothing moves

	saying sync.Once
	said   chan struct{} // closed by the first End
	ending error         // what it said
}

// bridged is the stream.
type bridged struct {
	*net.UnixConn
	b *bridge
}

// End says how a stream's holder has ended it, once the descriptor is closed: nil:
// well, all bytes passed on; else it gave up, and the peer is not to take what it
// got for the whole. The first call counts. Streams but those of TLS peers have no
// need of it.
func End(s Stream, cause error) {
	if s, is := s.(*bridged); is {
		s.b.saying.Do(func() {
			s.b.ending = cause
			close(s.b.said)
		})
	}
}

var (
	errGone = errors.New("the stream's holder has gone")
	errDead = errors.New("the other half has failed")
)

// bridge returns the stream, and pumps until both ends are closed.
func (s *secured) bridge(bufs *Buffers, tune tuning) (*bridged, error) {
	tune.fill()
	in, stream, err := pair(tune.send)
	if err != nil {
		return nil, err
	}
	b := &bridge{tls: s, in: in, buffers: bufs, tune: tune, said: make(chan struct{})}
	s.wire.glance, s.wire.stalled = tune.glance, b.stalled
	go b.run()
	return &bridged{stream, b}, nil
}

func (b *bridge) run() {
	var up sync.WaitGroup
	up.Go(func() { b.abortIf(b.up()) })
	b.abortIf(b.down())
	up.Wait()
	if b.dead.Load() {
		b.in.sever()
		return
	}
	b.in.close()
	_ = b.tls.wire.Close() // close_notify has been sent, and nobody is left to tell
}

// abortIf resets the TCP connection and stops both halves.
func (b *bridge) abortIf(err error) {
	if err == nil || b.dead.Swap(true) {
		return
	}
	_ = b.tls.wire.SetLinger(0) // these fail only on what is closed
	_ = b.tls.wire.Close()
	_ = b.in.conn.SetDeadline(longAgo())
}

// buffer is as large as what a TLS record carries.
type buffer [16 << 10]byte

// Buffers keeps the buffers that no stream uses. The zero value is ready for
// use; it must not be copied.
type Buffers struct{ pool sync.Pool }

func (s *Buffers) get() *buffer {
	if s != nil {
		if b, ok := s.pool.Get().(*buffer); ok {
			return b
		}
	}
	return new(buffer)
}

func (s *Buffers) put(b *buffer) {
	if s != nil {
		s.pool.Put(b)
	}
}

// up is the half from the stream to the peer. It holds no buffer while it waits.
func (b *bridge) up() error {
	for {
		err := b.in.wait()
		switch {
		case errors.Is(err, io.EOF):
			return b.upEnded()
		case err != nil:
			return err
		}
		buf := b.buffers.get()
		for err == nil {
			var p []byte
			if p, err = b.in.take(buf[:]); err == nil {
				_, err = b.tls.Write(p)
			}
		}
		b.buffers.put(buf)
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
}

// upEnded tells the peer that the stream has ended, and then watches whether the
// stream's holder goes before the peer's half has ended too.
func (b *bridge) upEnded() error {
	// This order: our own passing on of the peer's end makes it look closed.
	if b.in.closed() && (!b.passed.Load() || b.gaveUp()) {
		return errGone
	}
	if err := b.tls.CloseWrite(); err != nil {
		return err
	}
	if b.over.Add(1) == 2 {
		return b.tls.wire.SetReadDeadline(longAgo()) // down waits
	}
	err := b.in.waitClosed()
	if errors.Is(err, os.ErrDeadlineExceeded) && !b.dead.Load() || err == nil && b.passed.Load() {
		return nil
	}
	return errGone
}

// gaveUp says whether a holder that has gone after the peer's end gave up. One that
// says nothing did not.
func (b *bridge) gaveUp() bool {
	late := time.NewTimer(b.tune.verdict)
	defer late.Stop()
	select {
	case <-b.said:
		return b.ending != nil
	case <-late.C:
		return false
	}
}

// down is the half from the peer to the stream. While it waits it holds a small
// buffer of its own, or one that lately was filled.
func (b *bridge) down() error {
	var small [512]byte
	var large *buffer
	defer func() {
		if large != nil {
			b.buffers.put(large)
		}
	}()
	for p := small[:]; ; {
		n, err := b.tls.Read(p)
		if n > 0 {
			if err := b.deliver(p[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF): // close_notify
			return b.downEnded()
		case err != nil:
			return err
		case n == len(p) && large == nil:
			large = b.buffers.get()
			p = large[:]
		case n < len(small) && large != nil:
			b.buffers.put(large)
			large, p = nil, small[:]
		}
	}
}

// deliver writes to the stream. A holder that does not read must not keep it
// from seeing that the peer's connection has gone.
func (b *bridge) deliver(p []byte) error {
	for {
		if err := b.in.conn.SetWriteDeadline(time.Now().Add(b.tune.glance)); err != nil {
			return err
		}
		n, err := b.in.conn.Write(p)
		p = p[n:]
		switch {
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case b.dead.Load():
			return errDead
		}
		if err := alive(b.tls.wire.TCPConn); err != nil {
			return err
		}
	}
}

// downEnded tells the stream that the peer has ended, and then watches whether
// the peer resets the connection before the stream's half has ended too. What
// else it sends is nothing (RFC 8446, section 6.1).
func (b *bridge) downEnded() error {
	b.passed.Store(true)
	if err := b.in.conn.CloseWrite(); err != nil {
		return err
	}
	if b.over.Add(1) == 2 {
		return b.in.conn.SetReadDeadline(longAgo()) // up waits
	}
	var rest [64]byte
	for {
		switch _, err := b.tls.wire.TCPConn.Read(rest[:]); {
		case err == nil:
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		default:
			return err
		}
	}
}

// stalled says whether a write to the peer that does nothing is to go on.
func (b *bridge) stalled(progress bool) error {
	switch gone := b.in.closed(); {
	case b.dead.Load():
		return errDead
	case !gone:
		return nil
	case !b.passed.Load():
		return errGone
	case progress || b.left.IsZero():
		b.left = time.Now()
	case time.Since(b.left) > b.tune.linger:
		return errGone
	}
	return nil
}

// alive returns an error when the connection has been reset.
func alive(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	got := int16(0)
	if err := raw.Control(func(fd uintptr) { got = poll(int(fd), 0) }); err != nil {
		return err
	}
	if got&unix.POLLERR != 0 {
		return unix.ECONNRESET
	}
	return nil
}
