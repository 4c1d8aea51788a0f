package httpproxy

import (
	"errors"
	"io"
	"math"
	"strconv"
	"sync/atomic"
	"time"

	"wayout/router/relay"
)

// framing says how the end of a body is told.
type framing uint8

const (
	frameNone    framing = iota // there is no body
	frameSized                  // by Content-Length
	frameChunked                // by the chunked coding
	frameClose                  // by the end of the connection; responses only
)

// A body is the payload of one message, as it comes out of a reader.
type body struct {
	in      *reader
	lim     *headLimits
	frame   framing
	left    int64 // sized: bytes to come
	chunks  chunked
	done    bool
	torn    bool  // bytes of it are lost, so that its end cannot be told
	payload int64 // bytes given out
}

func (b *body) start(in *reader, frame framing, length int64, lim *headLimits) {
	b.in, b.lim, b.frame, b.left = in, lim, frame, length
	b.torn, b.payload = false, 0
	b.done = frame == frameNone || frame == frameSized && length == 0
	if frame == frameChunked {
		b.chunks.reset()
	}
}

// ready gives the payload that is there without reading, good until the next
// fill. After it, done tells whether that was all. The error is a fault, and
// comes after the payload that stood before it.
func (b *body) ready() (p []byte, err error) {
	if b.done || b.in.buffered() == 0 {
		return nil, nil
	}
	switch b.frame {
	case frameSized:
		n := int(min(b.left, int64(b.in.buffered())))
		p = b.in.unread()[:n]
		b.in.r += n
		b.left -= int64(n)
		b.done = b.left == 0
	case frameChunked:
		var used int
		p, used, err = b.chunks.decode(b.in.unread(), b.lim)
		b.in.r += used
		b.done = b.chunks.state == chunkDone
	case frameClose:
		p = b.in.unread()
		b.in.r = b.in.w
	}
	b.payload += int64(len(p))
	return p, err
}

// more reads once, after ready gave nothing and the body is not done. The buffer
// grows beyond the middle size only up to turn.
func (b *body) more(limit time.Duration, turn int) error {
	in := b.in
	switch {
	case len(in.buf) < middleBuffer:
		in.grow(middleBuffer)
	case in.full && len(in.buf) < largeBuffer && turn >= largeBuffer:
		in.grow(largeBuffer)
	}
	if in.buffered() >= maxTrailer {
		// What stays in the buffer is less than a line of framing, or else it
		// is a trailer section.
		return faultTrailerTooLarge
	}
	err := in.fill(limit)
	if errors.Is(err, io.EOF) {
		if b.frame == frameClose {
			b.done = true
			return nil
		}
		return faultIncomplete
	}
	return err
}

// maxTrailer is the size of the largest trailer section, in bytes.
const maxTrailer = 8 << 10

// A flow says how a body is written on.
type flow struct {
	frame   framing       // chunked, or anything else: as it is
	stall   time.Duration // for which the source may be silent
	patient func() bool   // asked when it was: whether that is all right
	began   *atomic.Bool  // set when payload comes
	budget  relay.Budget  // of the payload
}

// copyTo writes the payload to w, behind what is in w.out, as it comes. It
// tells on which side it failed.
func (b *body) copyTo(w *writer, f flow) (srcErr, dstErr error) {
	for {
		p, err := b.ready()
		if err == nil && len(p) == 0 && !b.done {
			if dstErr = w.flush(); dstErr != nil {
				return nil, dstErr
			}
			if b.frame == frameSized && f.frame == frameSized && b.left >= spliceFrom && f.budget.Turn() >= spliceStep {
				return b.spliceTo(w, f)
			}
			if err = b.more(f.stall, f.budget.Turn()); err != nil && !f.excuses(err) {
				return err, nil
			}
			continue
		}
		if len(p) > 0 && f.began != nil {
			f.began.Store(true)
		}
		if dstErr = f.wait(w.halted, len(p)); dstErr == nil {
			dstErr = b.pass(w, p, f.frame)
		}
		if dstErr != nil {
			return nil, dstErr
		}
		if b.done || err != nil {
			return err, nil
		}
	}
}

// pause is how long a wait for the budget may take no notice of an end.
const pause = 50 * time.Millisecond

// wait takes n bytes and waits until they may pass. It ends with
// relay.ErrStopped when halted says so.
func (f *flow) wait(halted func() bool, n int) error {
	if len(f.budget) == 0 || n == 0 {
		return nil
	}
	now := time.Now()
	due := now.Add(f.budget.Take(now, n))
	for d := due.Sub(now); d > 0; d = time.Until(due) {
		if halted() {
			f.budget.GiveBack(time.Now(), n)
			return relay.ErrStopped
		}
		time.Sleep(min(d, pause))
	}
	return nil
}

func (f *flow) excuses(err error) bool {
	return isTimeout(err) && f.patient != nil && f.patient()
}

// pass writes a piece of the payload, and the end of the body when it is done.
func (b *body) pass(w *writer, p []byte, frame framing) error {
	if frame != frameChunked {
		return w.send(p, "")
	}
	if len(p) > 0 {
		w.out = strconv.AppendUint(w.out, uint64(len(p)), 16)
		w.out = append(w.out, "\r\n"...)
		tail := "\r\n"
		plain := b.done && (b.frame != frameChunked || len(b.chunks.trailer.fields) == 0)
		if plain {
			tail = "\r\n0\r\n\r\n"
		}
		if err := w.send(p, tail); err != nil || plain {
			return err
		}
	}
	if !b.done {
		return w.flush()
	}
	w.out = append(w.out, "0\r\n"...)
	if b.frame == frameChunked {
		w.out = b.chunks.trailer.appendTrailer(w.out)
	}
	w.out = append(w.out, "\r\n"...)
	return w.flush()
}

// appendTrailer appends the trailer fields that go on.
func (h *head) appendTrailer(out []byte) []byte {
	return h.appendFields(out, func(f *field) bool { return !f.kind.inTrailer() })
}

// spliceTo moves the rest of a sized body without looking at it.
func (b *body) spliceTo(w *writer, f flow) (srcErr, dstErr error) {
	for !b.done {
		step := b.left
		if len(f.budget) > 0 {
			step = min(step, spliceStep)
		}
		if dstErr = f.wait(w.halted, int(min(step, math.MaxInt32))); dstErr != nil {
			return nil, dstErr
		}
		var n int64
		n, srcErr, dstErr = w.splice(b.in, step, f.stall)
		b.left -= n
		b.payload += n
		b.done = b.left == 0
		switch {
		case srcErr == nil && dstErr == nil:
		case dstErr == nil && f.excuses(srcErr):
		case errors.Is(srcErr, io.EOF):
			return faultIncomplete, nil
		default:
			b.torn = true // the pipe may have held some
			return srcErr, dstErr
		}
	}
	return nil, nil
}

// discard reads the rest of a body, at most n bytes of it and for at most limit,
// and reports whether it came to its end.
func (b *body) discard(n int64, limit time.Duration) bool {
	if b.torn || b.in.deadline.exactly(time.Now().Add(limit), b.in.tcp.SetReadDeadline) != nil {
		return false
	}
	for end := b.payload + n; !b.done && b.payload <= end; {
		p, err := b.ready()
		if err != nil {
			return false
		}
		if len(p) == 0 && !b.done && b.more(-1, middleBuffer) != nil {
			return false
		}
	}
	return b.done
}
