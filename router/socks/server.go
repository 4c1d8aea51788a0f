// Package socks is the SOCKS front end: SOCKS5 (RFC 1928) with CONNECT and UDP
// ASSOCIATE, user name and password (RFC 1929) and the path selection extension
// (see package client), and CONNECT of SOCKS4 and 4a.
//
// A client connection is a task on a worker of the relay, from its accept to
// its tunnel: a CONNECT that has to wait for nothing but its client and its dial
// wakes no other thread, and no poller of Go's ever sees its descriptor. An
// association of datagrams has two goroutines, one a direction, while its
// control connection waits on the worker.
//
// Clients may send all their messages at once, without waiting for answers.
package socks

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// Options of a Server. Open and Relay are required.
type Options struct {
	Name    string // the server's name, in records
	Escaper string // its escaper: where a request's chain starts

	Group          *auth.Group // nil: no authentication
	Extension      bool        // the path selection extension is spoken
	UsernameParams bool        // user names may have parameters; needs Group
	// ServerSelection is the server's own select, for the address that a client
	// connected to. May be nil.
	ServerSelection func(local netip.AddrPort) selection.Layer

	Timeouts Timeouts
	Meter    *auth.Meter // what the server's limits count; nil: none
	// AssociationsOpen and DatagramsDropped count over all associations. Either may
	// be nil.
	AssociationsOpen *atomic.Int64
	DatagramsDropped *atomic.Uint64

	// Admit is asked before anything is done for a request: an error refuses it,
	// because the daemon's means run short. nil admits all.
	Admit func() error
	// Vet is asked whether user-name parameters go together, before anything
	// else is; an error refuses them as malformed ones. nil: they do.
	Vet func(*escaper.Request) error
	// Open is the one door (escaper.Door.Open).
	Open func(context.Context, *escaper.Request) (*escaper.Conn, error)
	// OpenPacket is the same for associations of datagrams; nil: UDP ASSOCIATE
	// is not supported.
	OpenPacket func(context.Context, *escaper.Request) (escaper.PacketConn, error)
	// ListenPacket opens the client's side of an association. Required with
	// OpenPacket.
	ListenPacket func(netip.AddrPort) (*net.UDPConn, error)
	// Relay moves the bytes of tunnels.
	Relay *relay.Engine
	// Front is shared with the front ends of other protocols on the same port;
	// nil: the server has one of its own.
	Front *relay.Front
	// Observe is called once for each request when it is over, from any
	// goroutine. The record is the callee's only for the call. May be nil.
	Observe func(*escaper.Record)
	// Prompt says that Observe never blocks.
	Prompt bool
	Logger *slog.Logger // nil: no log
}

// Timeouts bounds every phase. A zero field means its default, a negative one
// no limit.
type Timeouts struct {
	Idle       time.Duration // before the first byte of a client; 2 min
	Handshake  time.Duration // from there to the end of its request, what we take apart; 30 s
	Auth       time.Duration // the check of a password, with the wait for its turn; 10 s
	Write      time.Duration // a client that takes no answer; 2 min
	Linger     time.Duration // a client that goes on sending after it was refused; 2 s
	TunnelIdle time.Duration // a tunnel in which nothing moves; 0 here means no limit
	UDPIdle    time.Duration // an association without datagrams; 1 min
}

func (t *Timeouts) setDefaults() {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&t.Idle, 2 * time.Minute},
		{&t.Handshake, 30 * time.Second},
		{&t.Auth, 10 * time.Second},
		{&t.Write, 2 * time.Minute},
		{&t.Linger, 2 * time.Second},
		{&t.UDPIdle, time.Minute},
	} {
		switch {
		case *d.v == 0:
			*d.v = d.def
		case *d.v < 0:
			*d.v = 0
		}
	}
	t.TunnelIdle = max(t.TunnelIdle, 0)
}

// Server is one socks_proxy front end.
type Server struct {
	o       Options
	front   *relay.Front
	buffers buffers

	datagrams datagrams
}

// New makes a server. It opens nothing.
func New(o Options) (*Server, error) {
	switch {
	case o.Open == nil:
		return nil, errors.New("socks proxy: no door to open")
	case o.Relay == nil:
		return nil, errors.New("socks proxy: no relay engine")
	case o.OpenPacket != nil && o.ListenPacket == nil:
		return nil, errors.New("socks proxy: no sockets for the clients of associations")
	case o.UsernameParams && o.Group == nil:
		return nil, errors.New("socks proxy: user-name parameters without users")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.AssociationsOpen == nil {
		o.AssociationsOpen = new(atomic.Int64)
	}
	if o.DatagramsDropped == nil {
		o.DatagramsDropped = new(atomic.Uint64)
	}
	o.Timeouts.setDefaults()
	s := &Server{o: o, front: o.Front}
	if s.front == nil {
		s.front = relay.NewFront(relay.FrontOptions{Name: o.Name, Relay: o.Relay, Logger: o.Logger})
	}
	return s, nil
}

// Serve lets the relay's workers accept clients on l until Shutdown: see
// relay.Front.Serve.
func (s *Server) Serve(l *relay.Listener) error { return s.front.Serve(l, s.Begin) }

// Open returns the number of client connections, tunnels and associations.
func (s *Server) Open() int { return s.front.Open() }

// Quiesce is relay.Front's.
func (s *Server) Quiesce() error { return s.front.Quiesce() }

// Shutdown is relay.Front's.
func (s *Server) Shutdown(ctx context.Context) error { return s.front.Shutdown(ctx) }
