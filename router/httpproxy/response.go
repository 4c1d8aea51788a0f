package httpproxy

import (
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// maxInterim bounds the interim responses to one request.
const maxInterim = 64

// respond relays the response of which x.res holds the first head, and those
// after it when that was an interim one.
func (x *exchange) respond() outcome {
	asked := false // the origin has asked for the body
	for n := 0; x.res.status < 200; n++ {
		if x.res.status == http.StatusSwitchingProtocols {
			return x.switchProtocols()
		}
		asked = asked || x.res.status == http.StatusContinue
		if n == maxInterim {
			return x.fail(&originError{faultTooManyInterim})
		}
		// HTTP/1.0 knows no interim responses.
		if !x.oldClient {
			if err := x.sendInterim(); err != nil {
				return x.lost(x.res.status, nil, err)
			}
		}
		if err := x.receiveHead(); err != nil {
			return x.fail(err)
		}
	}
	// A final answer before the client was told to go on: it may send the body
	// or not, so the connection cannot be used further (RFC 9110, section
	// 10.1.1).
	unwanted := x.expects && !asked && x.upload.running && !x.upload.began.Load() && !x.upload.over()
	return x.relay(unwanted)
}

func (x *exchange) sendInterim() error {
	w := x.out(len(x.res.buf) + ownFields)
	w.out = appendStatusLine(w.out, &x.res)
	w.out = x.res.appendFields(w.out, func(*field) bool { return false })
	w.out = append(w.out, "\r\n"...)
	return w.flush()
}

func appendStatusLine(out []byte, h *head) []byte {
	out = append(out, "HTTP/1.1 "...)
	out = strconv.AppendInt(out, int64(h.status), 10)
	out = append(out, ' ')
	out = append(out, h.reason...)
	return append(out, "\r\n"...)
}

// relay sends the final response.
func (x *exchange) relay(unwanted bool) outcome {
	h := &x.res
	from, length := x.responseFraming()
	to := from
	if from == frameChunked || from == frameClose {
		to = frameChunked
		if x.oldClient {
			to = frameClose
		}
	}
	persistent := from != frameClose && !h.close && (h.minor == 1 || h.keepAlive)
	more := x.wantsMore && to != frameClose && !unwanted && !x.s.front.Draining()

	x.writeResponseHead(to, length, more)
	x.resBody.start(&x.up, from, length, &x.s.response)
	srcErr, dstErr := x.resBody.copyTo(&x.c.out, flow{frame: to, stall: x.s.o.Timeouts.Stall, patient: x.uploading, budget: x.budgets()[1]})
	if srcErr != nil || dstErr != nil {
		return x.lost(h.status, srcErr, dstErr)
	}
	return x.complete(persistent, more, unwanted)
}

func (x *exchange) uploading() bool { return x.upload.busy(x.s.o.Timeouts.Stall) }

// responseFraming tells how the end of the response is told (RFC 9112, section
// 6.3), and its Content-Length, -1 when there is none.
func (x *exchange) responseFraming() (framing, int64) {
	h := &x.res
	switch {
	case x.headOnly, h.status == http.StatusNotModified:
		return frameNone, h.length
	case h.status == http.StatusNoContent:
		return frameNone, -1
	case h.chunked:
		return frameChunked, -1
	case h.length >= 0:
		return frameSized, h.length
	}
	return frameClose, -1
}

func (x *exchange) writeResponseHead(to framing, length int64, more bool) {
	h := &x.res
	w := x.out(len(x.res.buf) + ownFields)
	report := x.s.o.ReportEgress
	out := appendStatusLine(w.out, h)
	out = h.appendFields(out, func(f *field) bool {
		// An origin does not get to say which address it was asked from.
		return f.kind == kindEgressIP && report || f.kind == kindTrailer && to != frameChunked
	})
	switch {
	case to == frameChunked:
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
	case length >= 0:
		out = append(out, "Content-Length: "...)
		out = strconv.AppendInt(out, length, 10)
		out = append(out, "\r\n"...)
	}
	out = x.appendEgress(out)
	out = x.appendConnection(out, more)
	w.out = append(out, "\r\n"...)
}

// complete ends an exchange whose response has been relayed whole. What is
// left of the request body goes on to an origin that goes on reading; else it
// is read to nowhere, within bounds, or the client's connection ends.
func (x *exchange) complete(persistent, more, unwanted bool) outcome {
	const mostDiscarded = 256 << 10
	sent := true // the origin has all of the request
	if x.upload.running {
		if !x.upload.over() && (unwanted || !persistent) {
			_ = x.upload.abandon(x) // stopped by us: no fault of anybody
			sent = false
		} else {
			srcErr, dstErr := x.upload.wait()
			if srcErr != nil {
				_ = x.conn.Close()
				x.observe(x.res.status, fmt.Errorf("client: %w", srcErr))
				return drop
			}
			sent = dstErr == nil && x.body.done
		}
	}
	if persistent && sent && x.up.buffered() == 0 && x.leaveArmed() == nil {
		x.conn.Park()
	} else {
		_ = x.conn.Close()
	}
	if more && !x.body.done {
		more = x.body.discard(mostDiscarded, x.s.o.Timeouts.Linger)
	}
	x.observe(x.res.status, nil)
	switch {
	case more:
		return keep
	case !x.wantsMore && x.body.done && x.c.in.buffered() == 0:
		return drop // the client said that this was its last
	}
	return linger
}

// leaveArmed notes our deadlines on a connection before it is given back: the
// next request is likely to want the same, and setting them is dear. One that
// was set to end a wait is taken off.
func (x *exchange) leaveArmed() error {
	to := x.conn.Armed()
	switch {
	case to == nil:
		return nil
	case x.up.halted() || x.upw.halted():
		*to = [2]time.Time{}
		return x.conn.TCP.SetDeadline(time.Time{})
	}
	*to = [2]time.Time{x.up.deadline.at, x.upw.deadline.at}
	return nil
}

// lost ends an exchange whose response broke off. The client learns it by a
// body that ends early, or by a reset where only the end of the connection
// tells the end of the body.
func (x *exchange) lost(status int, srcErr, dstErr error) outcome {
	uploadErr := x.upload.abandon(x)
	err := fmt.Errorf("client: %w", dstErr)
	switch {
	case dstErr == nil && uploadErr != nil:
		err = fmt.Errorf("client: %w", uploadErr)
	case dstErr == nil:
		err = x.explain(srcErr)
	}
	_ = x.conn.Close()
	x.observe(status, err)
	return reset
}

// switchProtocols makes a tunnel of an upgrade that the origin agreed to.
func (x *exchange) switchProtocols() outcome {
	if !x.upgrades || x.res.upgrade < 0 {
		return x.fail(&originError{faultStatusUnasked})
	}
	w := x.out(len(x.res.buf) + ownFields)
	w.out = appendStatusLine(w.out, &x.res)
	w.out = x.res.appendFields(w.out, func(f *field) bool { return f.kind == kindEgressIP && x.s.o.ReportEgress })
	w.out = append(w.out, "Upgrade: "...)
	w.out = append(w.out, x.res.value(x.res.upgrade)...)
	w.out = append(w.out, "\r\nConnection: Upgrade\r\n"...)
	w.out = x.appendEgress(w.out)
	w.out = append(w.out, "\r\n"...)
	if err := w.flush(); err != nil {
		return x.lost(http.StatusSwitchingProtocols, nil, err)
	}
	return x.tunnel(http.StatusSwitchingProtocols, x.up.unread())
}
