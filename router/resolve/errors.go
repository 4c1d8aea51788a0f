package resolve

import (
	"errors"
	"fmt"
	"strings"
)

// The reasons for which a name gives no address. An *Error wraps one of them.
var (
	// ErrNotFound: the name does not exist, or is none.
	ErrNotFound = errors.New("no such name")
	// ErrNoData: the name exists and has no address of a family asked for. It is an ErrNotFound.
	ErrNoData = fmt.Errorf("no address of a family asked for: %w", ErrNotFound)
	// ErrTimeout: no server answered in time, or the caller's deadline came first.
	ErrTimeout = errors.New("no answer in time")
	// ErrServer: the servers cannot be reached, refuse or fail.
	ErrServer = errors.New("server failure")
)

var (
	errBadName   = errors.New("not a host name")
	errBusy      = errors.New("too many questions under way")
	errRcode     = errors.New("failure code")
	errTruncated = errors.New("truncated answer")
	errCase      = errors.New("answers that do not keep the case of letters")
	errStray     = errors.New("too many datagrams that answer nothing")
	errLame      = errors.New("server neither knows the name nor asks others")
	errChain     = errors.New("alias chain too long")
)

// Error says what became of a name.
type Error struct {
	Host   string // as asked for
	Server string // address and port of the server whose word or silence this is; "" when none was asked
	Rcode  string // that server's answer, e.g. "SERVFAIL"; "" when there was none
	Kind   error  // ErrNotFound, ErrNoData, ErrTimeout, ErrServer or context.Canceled
	Err    error  // cause, or nil
}

// Error gives one line that names the host, and server and response code where there are some.
func (e *Error) Error() string {
	var b strings.Builder
	host := e.Host
	if len(host) > maxName {
		host = host[:maxName] // a client may send kilobytes; a log line needs no more
	}
	fmt.Fprintf(&b, "resolve %q: ", host)
	switch {
	case e.Kind == ErrNoData: //nolint:errorlint // identity is meant: the text of the sentinel repeats its parent's
		b.WriteString("no address of a family asked for")
	case e.Kind != nil:
		b.WriteString(e.Kind.Error())
	}
	if e.Server != "" {
		b.WriteString(": server " + e.Server)
		if e.Rcode != "" {
			b.WriteString(" answered " + e.Rcode)
		}
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

// Unwrap gives the sentinel and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}
