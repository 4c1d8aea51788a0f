// Package httpproxy is the HTTP front end: it reads the requests of proxy
// clients (CONNECT and absolute-form, HTTP/1.0 and 1.1), authenticates them,
// hands each to the one door of the escapers, and answers.
//
// The heads of both sides go through one parser (head.go), which is strict
// where two readers could disagree about a message. Bodies are decoded and
// framed anew, so nothing of a client's framing reaches an origin, nor of an
// origin's a client. No Via and no X-Forwarded-For is added, although RFC 9110
// (section 7.6.3) asks for the former: an egress proxy does not tell origins
// that it is there. Loops end at the escapers' filter, which denies the
// daemon's own listeners.
//
// A client connection begins on a worker of the relay, and a CONNECT that has
// to wait for nothing but its dial stays there (begin.go). Any other connection
// is one goroutine, which holds no buffer while it waits for a request. Tunnels (CONNECT, and upgrades over a forwarded request) are
// handed to the relay engine and cost this package nothing more.
package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// Options of a Server. Open and Relay are required, and so are the names when
// clients may select paths.
type Options struct {
	Name    string // the server's name, in records
	Escaper string // its escaper: where a request's chain starts

	Group           *auth.Group // nil: no authentication
	SelectionHeader string      // name of the path selection header, "" when off
	UsernameParams  bool        // user names may have parameters; needs Group
	ReportEgress    bool        // tell the client which path and address it got
	// ServerSelection is the server's own select, for the address that a client
	// connected to. May be nil.
	ServerSelection func(local netip.AddrPort) selection.Layer

	Limits   Limits
	Timeouts Timeouts
	Meter    *auth.Meter // what the server's limits count; nil: none

	// Admit is asked before anything is done for a request: an error refuses it
	// with 503, because the daemon's means run short. nil admits all.
	Admit func() error
	// Vet is asked whether user-name parameters go together, before anything
	// else is; an error refuses them as malformed ones. nil: they do.
	Vet func(*escaper.Request) error
	// Open is the one door (escaper.Door.Open).
	Open func(context.Context, *escaper.Request) (*escaper.Conn, error)
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

// Limits bounds what a message may ask for. A zero field means its default.
type Limits struct {
	Head           int // bytes of a request head; 64 KiB
	Fields         int // header fields of a request; 200
	Target         int // bytes of a request target; 16 KiB
	ResponseHead   int // bytes of a response head; 256 KiB
	ResponseFields int // header fields of a response; 1000
}

// Timeouts bounds every phase. A zero field means its default, a negative one
// no limit.
type Timeouts struct {
	Idle       time.Duration // a kept client connection between two requests; 2 min
	Head       time.Duration // from the first byte of a request to the end of its head; 30 s
	Auth       time.Duration // the check of a password, with the wait for its turn; 10 s
	Response   time.Duration // from the end of the request to the response head; 5 min
	Stall      time.Duration // a body, either way, of which nothing comes; 5 min
	Write      time.Duration // a peer that takes nothing; 2 min
	Linger     time.Duration // a client that goes on sending after its last answer; 2 s
	TunnelIdle time.Duration // a tunnel in which nothing moves; 0 here means no limit
}

func (l *Limits) setDefaults() {
	for _, d := range []struct {
		v   *int
		def int
	}{
		{&l.Head, 64 << 10},
		{&l.Fields, 200},
		{&l.Target, 16 << 10},
		{&l.ResponseHead, 256 << 10},
		{&l.ResponseFields, 1000},
	} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
}

func (t *Timeouts) setDefaults() {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&t.Idle, 2 * time.Minute},
		{&t.Head, 30 * time.Second},
		{&t.Auth, 10 * time.Second},
		{&t.Response, 5 * time.Minute},
		{&t.Stall, 5 * time.Minute},
		{&t.Write, 2 * time.Minute},
		{&t.Linger, 2 * time.Second},
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

// Server is one http_proxy front end.
type Server struct {
	o         Options
	front     *relay.Front
	request   headLimits
	response  headLimits
	buffers   buffers
	exchanges sync.Pool
}

// New makes a server. It opens nothing.
func New(o Options) (*Server, error) {
	switch {
	case o.Open == nil:
		return nil, errors.New("http proxy: no door to open")
	case o.Relay == nil:
		return nil, errors.New("http proxy: no relay engine")
	case o.UsernameParams && o.Group == nil:
		return nil, errors.New("http proxy: user-name parameters without users")
	case o.SelectionHeader != "":
		name := []byte(o.SelectionHeader)
		if !allToken(name) || classify(name, "") != kindOther {
			return nil, fmt.Errorf("http proxy: %q cannot be the path selection header", o.SelectionHeader)
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Limits.setDefaults()
	o.Timeouts.setDefaults()
	s := &Server{o: o, front: o.Front}
	if s.front == nil {
		s.front = relay.NewFront(relay.FrontOptions{Name: o.Name, Relay: o.Relay, Logger: o.Logger})
	}
	s.request = headLimits{
		fields: o.Limits.Fields, target: o.Limits.Target,
		selection: strings.ToLower(o.SelectionHeader),
	}
	// A response has nothing to do with the selection header; an origin's
	// field of that name goes to the client.
	s.response = headLimits{fields: o.Limits.ResponseFields, response: true}
	return s, nil
}

// Serve lets the relay's workers accept clients on l until Shutdown: see
// relay.Front.Serve.
func (s *Server) Serve(l *relay.Listener) error { return s.front.Serve(l, s.Begin) }

// ServeConn serves one client connection, which belongs to the server from
// then on, and returns when it is over or has become a tunnel. pre holds what
// was read from it already.
func (s *Server) ServeConn(tcp *net.TCPConn, pre []byte) {
	c, err := s.newConn(tcp, pre)
	if err != nil {
		// The client has gone before it was looked at.
		_ = tcp.Close()
		return
	}
	c.shard = s.front.Track(c)
	c.serve()
	s.front.Untrack(c.shard, c)
}

// Open returns the number of client connections and tunnels.
func (s *Server) Open() int { return s.front.Open() }

// Quiesce is relay.Front's.
func (s *Server) Quiesce() error { return s.front.Quiesce() }

// Shutdown is relay.Front's.
func (s *Server) Shutdown(ctx context.Context) error { return s.front.Shutdown(ctx) }

func (s *Server) observe(r *escaper.Record) {
	if s.o.Observe != nil {
		s.o.Observe(r)
	}
}
