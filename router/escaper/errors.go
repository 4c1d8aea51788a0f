package escaper

import (
	"errors"
	"fmt"
)

// What can go wrong with a request after its selection is known to be good.
// A front end turns these and the sentinels of package selection into its
// answer, with errors.Is and by one table; the text is for people.
var (
	// ErrNoPath: no selection, and the policy found no path that is up and
	// owns a family of the target.
	ErrNoPath = errors.New("no path is up")
	// ErrProhibited: the egress filter leaves no address of the target.
	ErrProhibited = errors.New("destination prohibited")
	// ErrDNS: the target's name has no address, or the servers failed.
	ErrDNS = errors.New("name resolution failed")
	// ErrDNSTimeout: no name server answered in time.
	ErrDNSTimeout = errors.New("name resolution timed out")
	// ErrRefused: the target answered with a reset to the connection request.
	ErrRefused = errors.New("connection refused")
	// ErrReset: the target ended the connection.
	ErrReset = errors.New("connection reset")
	// ErrUnreachable: the path's uplink knows no way to the target.
	ErrUnreachable = errors.New("destination unreachable")
	// ErrTimeout: the target did not answer the connection request in time.
	ErrTimeout = errors.New("connection timed out")
	// ErrGuarded: the kernel's guard refused the connection because its
	// source or interface is not its path's. It is a fault of the program or
	// of the host's set-up, never of the request.
	ErrGuarded = errors.New("refused by the guard")
	// ErrResources: this process or the host has no descriptor or memory left
	// for a socket.
	ErrResources = errors.New("out of sockets")
	// ErrNoDatagrams: the path is a next-hop proxy that carries only connections.
	ErrNoDatagrams = errors.New("no datagrams by this path")
	// ErrClosed: the daemon is stopping.
	ErrClosed = errors.New("shutting down")
)

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
