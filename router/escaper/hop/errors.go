package hop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
)

// What a peer can do other than make the tunnel or refuse it.
var (
	// ErrAuth: the peer does not accept our credentials, or wants some.
	ErrAuth = errors.New("the peer refuses our credentials")
	// ErrSelection: the selection cannot be handed on, or the peer cannot read
	// it.
	ErrSelection = errors.New("the peer takes no selection")
	// ErrProtocol: what the peer says is not what its kind says.
	ErrProtocol = errors.New("the peer does not speak the protocol")
	// ErrTLS: the peer is not who it should be, or does not speak TLS with us.
	ErrTLS = errors.New("no TLS with the peer")
	// ErrTimeout: the peer has not answered in time.
	ErrTimeout = errors.New("the peer does not answer in time")
	// ErrEnded: the peer ended the connection before it answered.
	ErrEnded = errors.New("the peer ended the connection")
	// ErrNoUDP: peers of this kind carry no datagrams.
	ErrNoUDP = errors.New("the peer carries no datagrams")
)

// Reason is a class of refusals.
type Reason uint8

// The reasons for which a peer makes no tunnel.
const (
	ReasonRefused     Reason = iota + 1 // the target refused the connection
	ReasonUnreachable                   // the peer knows no way to the target, or has no address of its family
	ReasonTimeout                       // the target did not answer in time
	ReasonDNS                           // the target's name has no address
	ReasonDNSTimeout                    // no name server answered in time
	ReasonProhibited                    // the peer does not allow it
	ReasonLimit                         // the peer has no room, or we ask too much
	ReasonOther
)

// String returns the reason in words.
func (r Reason) String() string {
	switch r {
	case ReasonRefused:
		return "refused"
	case ReasonUnreachable:
		return "unreachable"
	case ReasonTimeout:
		return "timeout"
	case ReasonDNS:
		return "dns"
	case ReasonDNSTimeout:
		return "dns timeout"
	case ReasonProhibited:
		return "prohibited"
	case ReasonLimit:
		return "limit"
	}
	return "other"
}

// Refused is the answer of a peer that makes no tunnel.
type Refused struct {
	Status int    // of HTTP; 0: SOCKS
	Type   string // the error type of Proxy-Status (RFC 9209, section 2.3), if it names one
	Code   byte   // of SOCKS (RFC 1928, section 6)
}

func (r *Refused) Error() string {
	switch {
	case r.Status == 0:
		return fmt.Sprintf("the peer refuses with 0x%02x: %s", r.Code, r.Reason())
	case r.Type != "":
		return fmt.Sprintf("the peer refuses with %d %s: %s", r.Status, http.StatusText(r.Status), r.Type)
	}
	return fmt.Sprintf("the peer refuses with %d %s", r.Status, http.StatusText(r.Status))
}

// Reason says why. What Proxy-Status says comes before what the status says.
func (r *Refused) Reason() Reason {
	if r.Status == 0 {
		return reasonOfCode(r.Code)
	}
	if known := reasonOfType(r.Type); known != 0 {
		return known
	}
	switch r.Status {
	case http.StatusForbidden, http.StatusUnavailableForLegalReasons:
		return ReasonProhibited
	case http.StatusTooManyRequests:
		return ReasonLimit
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return ReasonTimeout
	case http.StatusBadGateway, http.StatusServiceUnavailable: // what most proxies say when a connect fails
		return ReasonUnreachable
	}
	return ReasonOther
}

// reasonOfType returns 0 for a type that is not registered.
func reasonOfType(kind string) Reason {
	switch kind {
	case "connection_refused":
		return ReasonRefused
	case "destination_unavailable", "destination_ip_unroutable":
		return ReasonUnreachable
	case "connection_timeout", "connection_read_timeout", "connection_write_timeout", "http_response_timeout":
		return ReasonTimeout
	case "dns_error":
		return ReasonDNS
	case "dns_timeout":
		return ReasonDNSTimeout
	case "destination_ip_prohibited", "http_request_denied":
		return ReasonProhibited
	case "connection_limit_reached":
		return ReasonLimit
	case "destination_not_found", "connection_terminated", "http_request_error", "http_protocol_error",
		"http_response_incomplete", "http_upgrade_failed", "tls_protocol_error", "tls_certificate_error",
		"tls_alert_received", "proxy_internal_response", "proxy_internal_error", "proxy_configuration_error",
		"proxy_loop_detected":
		return ReasonOther
	}
	return 0
}

func reasonOfCode(code byte) Reason {
	switch code {
	case 2:
		return ReasonProhibited
	case 3, 4, 8: // network, host, address type
		return ReasonUnreachable
	case 5:
		return ReasonRefused
	case 6: // TTL expired, which servers say for want of a code for timeouts
		return ReasonTimeout
	}
	return ReasonOther
}

// failure is an error whose whole text is its own, that is kind (one of the
// sentinels) for errors.Is, and that keeps what caused it.
type failure struct {
	kind  error
	text  string
	cause error
}

func (f *failure) Error() string { return f.text }

func (f *failure) Unwrap() []error {
	if f.cause == nil {
		return []error{f.kind}
	}
	return []error{f.kind, f.cause}
}

func fail(kind, cause error, format string, args ...any) error {
	return &failure{kind: kind, text: fmt.Sprintf(format, args...), cause: cause}
}

// explain gives what ended a conversation its kind.
func explain(err error) error {
	var ours *failure
	var refused *Refused
	var op *net.OpError
	switch {
	case errors.Is(err, context.Canceled):
		return fail(context.Canceled, err, "given up")
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return fail(ErrTimeout, err, "%s", ErrTimeout)
	case errors.As(err, &ours), errors.As(err, &refused):
		return err
	case isEnd(err):
		return fail(ErrEnded, err, "%s", ErrEnded)
	case errors.As(err, &op) && op.Op == "remote error": // an alert: TLS 1.3 tells of a missing certificate after the handshake
		return fail(ErrTLS, err, "%s: %s", ErrTLS, err)
	}
	return err
}

// isEnd reports whether an error says that the far side has gone.
func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errTruncated) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
