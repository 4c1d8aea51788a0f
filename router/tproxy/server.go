// Package tproxy is the front end for diverted traffic: connections and
// datagrams that the host would forward, and that the kernel delivers to sockets
// of the daemon instead (packages netcfg and bpf see to that). Clients know
// nothing of it: what they connect to is what they reach, by a path of ours.
//
// A connection is a task on a worker of the relay, from its accept to its
// tunnel. Datagrams are sorted into flows, each with its own path and address.
package tproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// Options of a Server, and of the flows of a Datagrams. Open, OpenPacket and
// Relay are required.
type Options struct {
	Name    string // the server's name, in records
	Escaper string // its escaper: where a request's chain starts

	// Group: clients are its users by their networks, and whoever is none of them
	// is refused. nil: clients are nobody in particular.
	Group *auth.Group
	// Selection is the server's own select.
	Selection selection.Layer

	// Sniff is how long a client is waited for, to show the name of its
	// destination; 0: nobody looks for names.
	Sniff time.Duration
	// TunnelIdle ends a tunnel in which nothing moves; 0: none.
	TunnelIdle time.Duration
	// FlowIdle ends a flow of datagrams that is silent; 0: a minute.
	FlowIdle time.Duration
	// Flows is how many there may be at once; 0: 16384.
	Flows int

	Meter *auth.Meter // what the server's limits count; nil: none
	// FlowsOpen and DatagramsDropped count over all flows. Either may be nil.
	FlowsOpen        *atomic.Int64
	DatagramsDropped *atomic.Uint64
	// Admit is asked before anything is done for a connection or a flow: an error
	// refuses it, because the daemon's means run short. nil admits all.
	Admit func() error
	// Open and OpenPacket are the one door (escaper.Door).
	Open       func(context.Context, *escaper.Request) (*escaper.Conn, error)
	OpenPacket func(context.Context, *escaper.Request) (escaper.PacketConn, error)
	// Relay moves the bytes of tunnels.
	Relay *relay.Engine
	// Front is what the router drains; nil: the server has one of its own.
	Front *relay.Front
	// Observe is called once for each connection and each flow when it is over,
	// from any goroutine. The record is the callee's only for the call. May be nil.
	Observe func(*escaper.Record)
	// Prompt says that Observe never blocks.
	Prompt bool
	Logger *slog.Logger // nil: no log
}

func (o *Options) complete() error {
	switch {
	case o.Open == nil || o.OpenPacket == nil:
		return errors.New("tproxy: no door to open")
	case o.Relay == nil:
		return errors.New("tproxy: no relay engine")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.FlowIdle <= 0 {
		o.FlowIdle = time.Minute
	}
	if o.Flows <= 0 {
		o.Flows = 16384
	}
	if o.FlowsOpen == nil {
		o.FlowsOpen = new(atomic.Int64)
	}
	if o.DatagramsDropped == nil {
		o.DatagramsDropped = new(atomic.Uint64)
	}
	return nil
}

// What a client is refused for, beside what the door says.
var (
	errStranger = errors.New("the client is no user of the group")
	errNoRoom   = errors.New("no room for this client") // the daemon takes no new work
	errOwn      = errors.New("the destination is this very listener")
	errEvicted  = errors.New("it was silent the longest of too many flows")
)

// statusOf is the HTTP status that stands for an error in records.
func statusOf(err error) int {
	for _, row := range [...]struct {
		is     error
		status int
	}{
		{errStranger, http.StatusProxyAuthRequired},
		{auth.ErrLimit, http.StatusTooManyRequests},
		{errNoRoom, http.StatusServiceUnavailable},
		{errOwn, http.StatusForbidden},
		{relay.ErrStopped, http.StatusServiceUnavailable},
		{relay.ErrClosed, http.StatusServiceUnavailable},
	} {
		if errors.Is(err, row.is) {
			return row.status
		}
	}
	return escaper.StatusOf(err)
}

// request is what a client asks for by connecting, or sending, to an address.
func (o *Options) request(client, to netip.AddrPort) *escaper.Request {
	r := &escaper.Request{
		Server: o.Name, Escaper: o.Escaper, Client: client, Local: to,
		Target: escaper.Target{Addr: to.Addr(), Port: to.Port()},
	}
	r.Selection.Server = o.Selection
	return r
}

// An admission is what the meters count of one connection or flow.
type admission struct {
	o    *Options
	user *auth.User // nil: nobody in particular
}

// admit says who the client is, and whether there is room for it. What is
// admitted is counted until its end.
func (o *Options) admit(r *escaper.Request) (*admission, error) {
	a := &admission{o: o}
	if o.Group != nil {
		if a.user = o.Group.From(r.Client.Addr()); a.user == nil {
			return nil, errStranger
		}
		r.Group, r.User, r.Allow = o.Group.Name(), a.user.Name, a.user.Allow
		r.Selection.User = a.user.Selection
	}
	if o.Admit != nil {
		if err := o.Admit(); err != nil {
			return nil, fmt.Errorf("%w: %w", errNoRoom, err)
		}
	}
	if err := o.Meter.Begin(); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if err := a.meter().Begin(); err != nil {
		o.Meter.End()
		return nil, fmt.Errorf("user %s: %w", a.user.Name, err)
	}
	return a, nil
}

// meter is the user's, nil where there is none.
func (a *admission) meter() *auth.Meter {
	if a.user == nil {
		return nil
	}
	return a.user.Meter
}

// budgets bound what the server and the user have passed, from the client and to
// it.
func (a *admission) budgets() [2]relay.Budget {
	up, down := auth.Bytes(a.o.Meter, a.meter())
	return [2]relay.Budget{up, down}
}

// police bounds the datagrams that the server and the user have passed, likewise.
func (a *admission) police() [2]relay.Police {
	all := a.budgets()
	up, down := auth.Datagrams(a.o.Meter, a.meter())
	return [2]relay.Police{{Own: up, Of: all[0]}, {Own: down, Of: all[1]}}
}

// end takes back the count; a may be nil.
func (a *admission) end() {
	if a != nil {
		a.meter().End()
		a.o.Meter.End()
	}
}

// Server takes diverted connections.
type Server struct {
	o     Options
	front *relay.Front
	peeks peeks
}

// New makes a server. It opens nothing.
func New(o Options) (*Server, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	s := &Server{o: o, front: o.Front}
	if s.front == nil {
		s.front = relay.NewFront(relay.FrontOptions{Name: o.Name, Relay: o.Relay, Logger: o.Logger})
	}
	return s, nil
}

// Serve lets the relay's workers accept clients on l, a listener of
// ListenStream, until Shutdown: see relay.Front.Serve.
func (s *Server) Serve(l *relay.Listener) error {
	var own netip.AddrPort
	if a, err := netip.ParseAddrPort(l.Addr().String()); err == nil {
		own = a
	}
	return s.front.Serve(l, func(k *relay.Task, a relay.Accepted) { s.begin(k, a, own) })
}

// Shutdown is relay.Front's.
func (s *Server) Shutdown(ctx context.Context) error { return s.front.Shutdown(ctx) }
