package httpproxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
)

// forward serves an absolute-form request.
func (x *exchange) forward() outcome {
	x.upgrades = x.head.upgrading()
	if done, o := x.lastHop(); done {
		return o
	}
	x.buildRequest()
	// A kept connection may turn out to have ended, and whether the origin has
	// seen the request is then unknown. So one is only used for what may be
	// sent again (RFC 9110, section 9.2.2) and still can be.
	again := idempotent(x.rec.Method) && x.body.done && !x.upgrades
	x.req.Reuse = again
	for {
		conn, err := x.s.o.Open(x.s.front.Context(), x.req)
		x.rec.Choice = x.req.Choice
		if err != nil {
			return x.refuse(err)
		}
		x.attach(conn)
		err = x.send()
		if err == nil {
			err = x.receiveHead()
		}
		if err == nil {
			return x.respond()
		}
		if again && conn.Reused && x.req.Reuse && isStale(err) {
			_ = conn.Close()
			x.req.Reuse, x.req.Retry = false, conn
			x.dropHead()
			x.buildRequest()
			continue
		}
		return x.fail(err)
	}
}

// lastHop handles Max-Forwards (RFC 9110, section 7.6.2): done when the
// request goes no further.
func (x *exchange) lastHop() (done bool, o outcome) {
	i := x.head.maxForwards
	if i < 0 || x.rec.Method != "OPTIONS" && x.rec.Method != "TRACE" {
		return false, keep
	}
	n, ok := parseLength(x.head.value(i))
	switch {
	case !ok:
		return true, x.refuse(faultMaxForwards)
	case n > 0:
		return false, keep
	}
	status := http.StatusOK
	if x.rec.Method == "TRACE" {
		// To send the request back would show the client nothing it has not sent.
		status = http.StatusMethodNotAllowed
	}
	more := x.wantsMore && x.body.done && !x.s.front.Draining()
	w := x.out(smallBuffer)
	w.out = appendStatus(w.out, status)
	w.out = append(w.out, "Allow: CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\nContent-Length: 0\r\n"...)
	w.out = x.appendConnection(w.out, more)
	w.out = append(w.out, "\r\n"...)
	err := w.flush()
	x.observe(status, err)
	switch {
	case err != nil:
		return true, drop
	case more:
		return true, keep
	}
	return true, linger
}

// ownFields is room for the fields that we write ourselves.
const ownFields = 512

// buildRequest writes the head as it goes to the origin.
func (x *exchange) buildRequest() {
	h := &x.head
	out := x.s.buffers.get(len(h.buf) + ownFields)
	out = append(out, h.method...)
	out = append(out, ' ')
	switch {
	case len(x.path) == 0 && x.rec.Method == "OPTIONS":
		out = append(out, '*') // RFC 9112, section 3.2.4
	case len(x.path) == 0 || x.path[0] != '/':
		out = append(out, '/')
	}
	out = append(out, x.path...)
	// The target's host, whatever the Host field said (RFC 9112, section 3.2.2).
	out = append(out, " HTTP/1.1\r\nHost: "...)
	out = append(out, x.authority...)
	out = append(out, "\r\n"...)
	counted := h.maxForwards >= 0 && (x.rec.Method == "OPTIONS" || x.rec.Method == "TRACE")
	out = h.appendFields(out, func(f *field) bool {
		return f.kind == kindExpect && !x.expects || f.kind == kindMaxForwards && counted
	})
	if counted {
		n, _ := parseLength(h.value(h.maxForwards))
		out = append(out, "Max-Forwards: "...)
		out = strconv.AppendInt(out, n-1, 10)
		out = append(out, "\r\n"...)
	}
	switch {
	case h.chunked:
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
	case h.length >= 0:
		out = append(out, "Content-Length: "...)
		out = strconv.AppendInt(out, h.length, 10)
		out = append(out, "\r\n"...)
	}
	if h.teTrailers {
		out = append(out, "TE: trailers\r\n"...)
	}
	if x.upgrades {
		out = append(out, "Upgrade: "...)
		out = append(out, h.value(h.upgrade)...)
		out = append(out, "\r\n"...)
	}
	switch {
	case x.upgrades && h.teTrailers:
		out = append(out, "Connection: Upgrade, TE\r\n"...)
	case x.upgrades:
		out = append(out, "Connection: Upgrade\r\n"...)
	case h.teTrailers:
		out = append(out, "Connection: TE\r\n"...)
	}
	x.reqHead = append(out, "\r\n"...)
}

// attach takes up the connection that the request goes out by.
func (x *exchange) attach(conn *escaper.Conn) {
	x.conn = conn
	x.rec.Source, x.rec.Reused = conn.Source, conn.Reused
	x.up.drop()
	raw := rawOf(conn.TCP)
	x.up.use(conn.TCP, raw)
	x.upw.use(conn.TCP, raw)
	x.up.stopped.Store(false)
	x.upw.stopped.Store(false)
	x.up.deadline, x.upw.deadline = deadline{}, deadline{}
	if was := conn.Armed(); was != nil {
		x.up.deadline.at, x.upw.deadline.at = was[0], was[1]
	}
	if n := len(conn.Early); n > 0 {
		x.up.take(x.s.buffers.get(n))
		x.up.w = copy(x.up.buf, conn.Early)
	}
	x.c.upstream.Store(conn) // for a cut; one before this is seen by dead
}

// send writes the request head and what is there of the body, and leaves the
// rest to the upload.
func (x *exchange) send() error {
	x.upw.out = x.reqHead
	f := flow{budget: x.budgets()[0]}
	if err := f.wait(x.c.in.halted, len(x.early)); err != nil {
		return x.explain(err)
	}
	if err := x.body.pass(&x.upw, x.early, x.body.frame); err != nil {
		return x.explain(err)
	}
	if !x.body.done {
		x.upload.start(x)
	}
	return nil
}

// explain makes an error of the origin's connection one of the origin: the
// path's own end comes first, since it resets the connection.
func (x *exchange) explain(err error) error {
	if killed := x.conn.Killed(); killed != nil {
		err = killed
	}
	return &originError{err}
}

// isStale reports whether an error is how a kept connection fails that the
// origin had closed: before any byte of a response.
func isStale(err error) bool {
	return errors.Is(err, faultNoResponse) || isBroken(err) && !errors.Is(err, faultIncomplete)
}

// receiveHead reads a response head into x.res. It waits as long as the upload
// goes on, and then for the response's own time.
func (x *exchange) receiveHead() error {
	var end headEnd
	most := x.s.o.Limits.ResponseHead
	if x.up.buf == nil {
		x.up.take(x.s.buffers.get(middleBuffer))
	}
	for {
		b := x.up.unread()
		n, err := end.find(b)
		switch {
		case err != nil:
			return &originError{err}
		case n > most:
			return &originError{faultHeadTooLarge}
		case n > 0:
			x.up.r += n
			if err := x.res.parseResponse(b[:n], &x.s.response); err != nil {
				return &originError{err}
			}
			return nil
		case len(b) >= most:
			return &originError{faultHeadTooLarge}
		}
		if len(b) == len(x.up.buf) {
			x.up.grow(min(4*len(b), max(most, largeBuffer)))
		}
		err = x.up.fill(x.s.o.Timeouts.Response)
		switch {
		case err == nil:
		case errors.Is(err, io.EOF) && x.up.buffered() == 0:
			return x.explain(faultNoResponse)
		case errors.Is(err, io.EOF):
			return x.explain(faultIncomplete)
		case isTimeout(err) && x.upload.busy(x.s.o.Timeouts.Response):
		case isTimeout(err):
			return &originError{faultResponseTimeout}
		case isBroken(err) && x.up.buffered() > 0:
			return x.explain(fmt.Errorf("%w: %w", faultIncomplete, err))
		default:
			return x.explain(err)
		}
	}
}

// fail answers a request that got no response. A fault of the client's own, in
// the body, comes first: it is what ended the exchange.
func (x *exchange) fail(err error) outcome {
	uploading := x.upload.running
	srcErr := x.upload.abandon(x)
	// An origin that took no more is why nothing was waited for; an upload that
	// abandon has ended has another error.
	if uploading && isTimeout(x.upload.dstErr) {
		err = &originError{x.upload.dstErr}
	}
	_ = x.conn.Close()
	var f fault
	switch {
	case srcErr == nil || errors.Is(srcErr, relay.ErrStopped):
		if x.c.dead.Load() {
			x.observe(0, escaper.ErrClosed)
			return drop
		}
		return x.refuse(err)
	case isTimeout(srcErr):
		return x.refuse(faultBodyTimeout)
	case errors.As(srcErr, &f) && f != faultIncomplete:
		return x.refuse(f)
	}
	x.observe(0, fmt.Errorf("client: %w", srcErr))
	return drop
}

// An upload is the rest of a request body that goes to the origin while the
// response is being waited for.
type upload struct {
	running bool // started, and not yet waited for
	done    chan struct{}
	ended   atomic.Int64 // when it ended, Unix time in ns; 0 before
	began   atomic.Bool  // payload has come since it started

	// Good once done is closed.
	srcErr, dstErr error
}

func (u *upload) start(x *exchange) {
	u.running = true
	u.done = make(chan struct{})
	u.ended.Store(0)
	u.began.Store(len(x.early) > 0)
	go u.run(x)
}

func (u *upload) run(x *exchange) {
	u.srcErr, u.dstErr = x.body.copyTo(&x.upw, flow{frame: x.body.frame, stall: x.s.o.Timeouts.Stall, began: &u.began, budget: x.budgets()[0]})
	u.ended.Store(time.Now().UnixNano())
	if u.srcErr != nil || isTimeout(u.dstErr) {
		// Nothing that the origin says to half a request is worth waiting for,
		// be it the client that stopped or the origin that takes no more.
		x.up.stop()
	}
	close(u.done)
}

// busy reports whether the upload goes on, or ended so lately that a response
// may still take its time.
func (u *upload) busy(limit time.Duration) bool {
	if !u.running {
		return false
	}
	at := u.ended.Load()
	return at == 0 || time.Since(time.Unix(0, at)) < limit
}

// over reports whether all of the body has been dealt with, or there was
// nothing to upload.
func (u *upload) over() bool {
	if !u.running {
		return true
	}
	select {
	case <-u.done:
		return true
	default:
		return false
	}
}

// wait waits for the end of the upload.
func (u *upload) wait() (srcErr, dstErr error) {
	if !u.running {
		return nil, nil
	}
	<-u.done
	u.running = false
	return u.srcErr, u.dstErr
}

// abandon stops the upload and returns what had ended it before, on the
// client's side. The client's reader can be used again.
func (u *upload) abandon(x *exchange) error {
	if !u.running {
		return nil
	}
	x.c.in.stop()
	x.upw.stop()
	srcErr, _ := u.wait()
	x.c.in.resume()
	return srcErr
}
