package httpproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// A verdict is how an error is told to the client: the status, the error type
// of RFC 9209 (section 2.3), and whether the client does well to try again
// soon.
type verdict struct {
	status int
	kind   string
	retry  bool
}

// judge is the table from errors to answers.
func judge(err error) verdict {
	var origin *originError
	if errors.As(err, &origin) {
		return judgeOrigin(origin.err)
	}
	var f fault
	if errors.As(err, &f) {
		return verdict{status: f.status(), kind: "http_request_error"}
	}
	for _, row := range [...]struct {
		is error
		verdict
	}{
		{errCredentialsMissing, verdict{http.StatusProxyAuthRequired, "http_request_denied", false}},
		{errCredentials, verdict{http.StatusProxyAuthRequired, "http_request_denied", false}},
		{auth.ErrLimit, verdict{http.StatusTooManyRequests, "http_request_denied", true}},
		{errAuthBusy, verdict{http.StatusServiceUnavailable, "proxy_internal_error", true}},
		{errNoRoom, verdict{http.StatusServiceUnavailable, "connection_limit_reached", true}},
		{relay.ErrStopped, verdict{http.StatusServiceUnavailable, "proxy_internal_error", true}},
	} {
		if errors.Is(err, row.is) {
			return row.verdict
		}
	}
	// The status is for every protocol alike, the rest is HTTP's.
	v := verdict{status: escaper.StatusOf(err), kind: "proxy_internal_error"}
	for _, row := range [...]struct {
		is    error
		kind  string
		retry bool
	}{
		{selection.ErrMalformed, "http_request_error", false},
		{selection.ErrUnknown, "http_request_error", false},
		{selection.ErrNotPassed, "http_request_error", false},
		{selection.ErrDisabled, "http_request_error", false},
		{selection.ErrForbidden, "http_request_denied", false},
		// Before ErrDown: a policy that found no path may say why by wrapping both.
		{escaper.ErrNoPath, "destination_unavailable", true},
		{selection.ErrDown, "destination_unavailable", true},
		{selection.ErrFamily, "destination_ip_unroutable", false},
		{selection.ErrBind, "proxy_internal_error", false},
		{selection.ErrPorts, "connection_limit_reached", false},

		{escaper.ErrProhibited, "destination_ip_prohibited", false},
		{escaper.ErrDNSTimeout, "dns_timeout", false},
		{escaper.ErrDNS, "dns_error", false},
		{escaper.ErrRefused, "connection_refused", false},
		{escaper.ErrReset, "connection_terminated", false},
		{escaper.ErrUnreachable, "destination_ip_unroutable", false},
		{escaper.ErrTimeout, "connection_timeout", false},
		{escaper.ErrGuarded, "proxy_internal_error", false},
		{escaper.ErrResources, "proxy_internal_error", true},
		{escaper.ErrClosed, "destination_unavailable", true},
		{context.Canceled, "proxy_internal_error", true},

		// The daemon's own means.
		{syscall.EMFILE, "proxy_internal_error", true},
		{syscall.ENFILE, "proxy_internal_error", true},
		{syscall.ENOBUFS, "proxy_internal_error", true},
		{syscall.ENOMEM, "proxy_internal_error", true},
	} {
		if errors.Is(err, row.is) {
			v.kind, v.retry = row.kind, row.retry
			break
		}
	}
	return v
}

// judgeOrigin is judge for what happened on a connection to an origin that
// had been made.
func judgeOrigin(err error) verdict {
	var f fault
	switch {
	case errors.As(err, &f):
		status, kind := f.originStatus()
		return verdict{status, kind, false}
	case errors.Is(err, selection.ErrDown), errors.Is(err, escaper.ErrClosed), errors.Is(err, relay.ErrStopped):
		return verdict{http.StatusServiceUnavailable, "destination_unavailable", true}
	case isTimeout(err):
		return verdict{http.StatusGatewayTimeout, "connection_write_timeout", false}
	}
	return verdict{http.StatusBadGateway, "connection_terminated", false}
}

// refuseHead answers a request whose head could not be read, or nothing when
// nobody is there to answer. Where the next request begins is unknown then, so
// the connection is over.
func (x *exchange) refuseHead(err error) outcome {
	var f fault
	if !errors.As(err, &f) {
		if !errors.Is(err, io.EOF) && !errors.Is(err, relay.ErrStopped) {
			x.observe(0, err)
		}
		return drop
	}
	x.wantsMore = false
	x.headOnly = false
	return x.refuse(err)
}

// refuse answers the request with an error. The connection goes on when it is
// certain where the next request begins: the body has been read, and the
// request was not CONNECT, after which a hopeful client may already be sending
// what is meant for the tunnel.
func (x *exchange) refuse(err error) outcome {
	if !x.c.leaveWorker() {
		x.observe(0, err)
		return over
	}
	v := judge(err)
	more := x.wantsMore && x.body.done && x.rec.Method != "CONNECT" && !x.s.front.Draining()
	var f fault
	if errors.As(err, &f) && !isOrigin(err) || errors.Is(err, errNoRoom) {
		more = false // where room is short, a client's connection is too
	}
	w := x.out(smallBuffer)
	w.out = x.appendAnswer(w.out, &v, err, more)
	sendErr := w.flush()
	x.observe(v.status, err)
	switch {
	case sendErr != nil:
		return drop
	case more:
		return keep
	}
	return linger
}

func isOrigin(err error) bool {
	var o *originError
	return errors.As(err, &o)
}

// maxDetails bounds the text of an error in an answer.
const maxDetails = 512

func (x *exchange) appendAnswer(out []byte, v *verdict, err error, more bool) []byte {
	text := clip(err.Error(), maxDetails)
	const before = "wayout: "
	out = appendStatus(out, v.status)
	if v.status == http.StatusProxyAuthRequired {
		out = append(out, "Proxy-Authenticate: Basic realm=\"wayout\"\r\n"...)
	}
	if v.retry {
		out = append(out, "Retry-After: "...)
		out = strconv.AppendInt(out, int64(max(time.Second, auth.RetryAfter(err))/time.Second), 10)
		out = append(out, "\r\n"...)
	}
	out = append(out, "Proxy-Status: wayout; error="...)
	out = append(out, v.kind...)
	out = append(out, "; details="...)
	out = appendString(out, text)
	out = append(out, "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: "...)
	out = strconv.AppendInt(out, int64(len(before)+len(text)+1), 10)
	out = append(out, "\r\n"...)
	out = x.appendConnection(out, more)
	out = append(out, "\r\n"...)
	if !x.headOnly {
		out = append(out, before...)
		out = append(out, text...)
		out = append(out, '\n')
	}
	return out
}

func appendStatus(out []byte, status int) []byte {
	out = append(out, "HTTP/1.1 "...)
	out = strconv.AppendInt(out, int64(status), 10)
	out = append(out, ' ')
	out = append(out, http.StatusText(status)...)
	return append(out, "\r\n"...)
}

// appendConnection tells the client what becomes of its connection, where the
// HTTP version does not say it.
func (x *exchange) appendConnection(out []byte, more bool) []byte {
	switch {
	case !more:
		return append(out, "Connection: close\r\n"...)
	case x.oldClient:
		return append(out, "Connection: keep-alive\r\n"...)
	}
	return out
}

// appendEgress appends the fields that tell which path and address the request
// left by. The Proxy-Status of the proxies nearer to the origin stands before
// ours (RFC 9209, section 2).
func (x *exchange) appendEgress(out []byte) []byte {
	if !x.s.o.ReportEgress || x.conn == nil {
		return out
	}
	ip := x.conn.Source.Addr()
	out = append(out, "Proxy-Status: wayout; egress-path="...)
	out = appendString(out, x.req.Choice.Path)
	out = append(out, "; egress-ip=\""...)
	out = ip.AppendTo(out)
	out = append(out, "\"\r\nX-Egress-IP: "...)
	out = ip.AppendTo(out)
	return append(out, "\r\n"...)
}

// appendString appends an sf-string (RFC 8941, section 3.3.3): printable ASCII,
// with quotes and backslashes escaped.
func appendString(out []byte, s string) []byte {
	out = append(out, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c > '~':
			out = append(out, '?')
		case c == '"' || c == '\\':
			out = append(out, '\\', c)
		default:
			out = append(out, c)
		}
	}
	return append(out, '"')
}

// isBroken reports whether an error says that a connection is no more.
func isBroken(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, net.ErrClosed)
}
