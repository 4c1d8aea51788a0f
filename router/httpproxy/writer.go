package httpproxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"wayout/router/relay"
)

// A writer is the sending half of a connection, with what is to be sent before
// anything else.
type writer struct {
	tcp      stream // set by use
	socket   socket
	out      []byte // to be sent first; its buffer is lent by whoever uses the writer
	limit    time.Duration
	deadline deadline
	stopped  atomic.Bool
	dead     *atomic.Bool // the client connection's: stopped for good
	sent     int64        // bytes that the kernel took
	vec      net.Buffers
	parts    [3][]byte
	tail     [8]byte
	split    io.LimitedReader
}

// use makes it the writer of a connection.
func (w *writer) use(tcp stream, raw syscall.RawConn) { w.tcp, w.socket.raw = tcp, raw }

func (w *writer) arm(limit time.Duration) error {
	if err := w.deadline.after(limit, w.tcp.SetWriteDeadline); err != nil {
		return err
	}
	if w.halted() {
		return relay.ErrStopped
	}
	return nil
}

// write sends all of b. A peer that takes nothing for the writer's limit gets
// os.ErrDeadlineExceeded.
func (w *writer) write(b []byte) error {
	for len(b) > 0 {
		if err := w.arm(w.limit); err != nil {
			return err
		}
		n, err := w.socket.write(b)
		if err != nil {
			return err
		}
		w.sent += int64(n)
		b = b[n:]
	}
	return nil
}

// goesOn reports whether a failed write moved bytes and only ran out of time.
func (w *writer) goesOn(n int64, err error) bool {
	return n > 0 && errors.Is(err, os.ErrDeadlineExceeded) && !w.halted()
}

// flush sends what is in out.
func (w *writer) flush() error {
	if len(w.out) == 0 {
		return nil
	}
	err := w.write(w.out)
	w.out = w.out[:0]
	return err
}

// copied is the size up to which a payload is copied behind what is in out:
// dearer than a second vector of the write from about there on.
const copied = 8 << 10

// send sends out, then p, then tail (at most 8 bytes), as one write.
func (w *writer) send(p []byte, tail string) error {
	if len(p) <= copied && len(w.out)+len(p)+len(tail) <= cap(w.out) {
		w.out = append(w.out, p...)
		w.out = append(w.out, tail...)
		return w.flush()
	}
	w.vec = w.parts[:0]
	if len(w.out) > 0 {
		w.vec = append(w.vec, w.out)
	}
	if len(p) > 0 {
		w.vec = append(w.vec, p)
	}
	if len(tail) > 0 {
		w.vec = append(w.vec, w.tail[:copy(w.tail[:], tail)])
	}
	for len(w.vec) > 0 {
		if err := w.arm(w.limit); err != nil {
			return err
		}
		n, err := w.vec.WriteTo(w.tcp)
		w.sent += n
		if err != nil && !w.goesOn(n, err) {
			return err
		}
	}
	w.out = w.out[:0]
	w.parts = [3][]byte{}
	return nil
}

func (w *writer) halted() bool { return w.stopped.Load() || w.dead.Load() }

// stop ends a write that waits, and every later one.
func (w *writer) stop() {
	w.stopped.Store(true)
	_ = w.tcp.SetWriteDeadline(past())
}

// Bodies of a known size, and more to come than spliceFrom, are spliced,
// spliceStep bytes at a time: a peer that does not take that much within twice
// the limit counts as stalled.
const (
	spliceFrom = 256 << 10
	spliceStep = 128 << 10
)

// splice moves n bytes from src, which has nothing read ahead, without them
// coming into the program. It returns how many went, and whose fault it is
// when that is fewer.
func (w *writer) splice(src *reader, n int64, limit time.Duration) (moved int64, srcErr, dstErr error) {
	for moved < n {
		if err := src.deadline.after(limit, src.tcp.SetReadDeadline); err != nil {
			return moved, err, nil
		}
		if src.halted() {
			return moved, relay.ErrStopped, nil
		}
		if err := w.arm(2 * w.limit); err != nil {
			return moved, nil, err
		}
		step := min(n-moved, spliceStep)
		w.split = io.LimitedReader{R: src.tcp, N: step}
		m, err := w.readFrom()
		moved += m
		w.sent += m
		switch {
		case src.halted():
			return moved, relay.ErrStopped, nil
		case err == nil && m == step:
		case err == nil:
			return moved, io.EOF, nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return moved, nil, err
		case time.Now().Before(w.deadline.at) || w.limit <= 0:
			// The source ran out of time, and the pipe is empty: it is
			// emptied before each read.
			if m == 0 {
				return moved, err, nil
			}
		default:
			return moved, nil, err
		}
	}
	return moved, nil, nil
}

// readFrom moves what split holds. Only the end of a pair of sockets, to a TLS
// peer, cannot have it spliced.
func (w *writer) readFrom() (int64, error) {
	if tcp, is := w.tcp.(io.ReaderFrom); is {
		return tcp.ReadFrom(&w.split)
	}
	return io.Copy(w.tcp, &w.split)
}
