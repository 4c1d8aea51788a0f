package escaper

import (
	"net"
	"net/netip"
	"strconv"
	"time"

	"wayout/selection"
)

// Target is where a request wants to go. Exactly one of Host and Addr is set.
type Target struct {
	Host string     // a name to resolve, as the client wrote it
	Addr netip.Addr // a literal address, unmapped and without a zone
	Port uint16
}

// String gives host:port, with brackets around an IPv6 address.
func (t Target) String() string {
	if t.Addr.IsValid() {
		return netip.AddrPortFrom(t.Addr, t.Port).String()
	}
	return net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port)))
}

// Request is what a front end hands to Door.Open. From here on HTTP, SOCKS
// and diverted traffic are one.
type Request struct {
	Server  string         // name of the front end
	Escaper string         // the front end's own escaper: where the chain starts
	Client  netip.AddrPort // who asks
	Local   netip.AddrPort // the address that the client connected to
	Group   string         // the user group that authenticated, or ""
	User    string         // the name in it, or ""
	Allow   *selection.Globs
	Target  Target
	// Name is what the client was seen to call a target that is an address; "":
	// nothing was seen. Routes go by it. It is not resolved, and never dialled.
	Name      string
	Selection selection.Selection

	// Reuse says that an idle connection of the same path, source address,
	// user and destination will do as well as a new one. A front end sets it
	// for forward requests only: a tunnel has its connection to itself.
	Reuse bool

	// Retry is the connection of an attempt before that came to nothing: the
	// request leaves by the same path again, and nothing is chosen anew.
	Retry *Conn

	// Task runs the request on a thread that it must not hold up; nil: a
	// goroutine of its own does. With a task the connection may come as a bare
	// descriptor. Not together with Reuse. Who cancels Open's context ends the
	// task's wait as well.
	Task Task

	// Choice is filled by Open, also when Open fails: how far the choice went.
	Choice Choice

	generation *uint64 // of the session, once it is known
}

// Task is how a request waits that shares its thread with others: *relay.Task,
// or a fake that stands for the kernel's readiness.
type Task interface {
	// Wait waits for epoll events on a descriptor, until a time. It returns
	// those that are there; os.ErrDeadlineExceeded is that the time has come,
	// any other error that the request is to be given up.
	Wait(fd int, events uint32, until time.Time) (uint32, error)
	// Leave is called before anything else that may block.
	Leave()
}

// Choice says which path a request took, and who said so.
type Choice struct {
	Path   string           // "out/fra-2", or "" when it did not come to that
	Source selection.Source // who chose: SourcePolicy when nobody did
	Asked  string           // the selection as it was asked for, "" for the policy
}
