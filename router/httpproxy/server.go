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
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

	Group           *auth.Group     // nil: no authentication
	SelectionHeader string          // name of the path selection header, "" when off
	ServerSelection selection.Layer // the server's own select
	ReportEgress    bool            // tell the client which path and address it got

	Limits   Limits
	Timeouts Timeouts

	// Admit is asked before anything is done for a request: an error refuses it
	// with 503, because the daemon's means run short. nil admits all.
	Admit func() error
	// Open is the one door (escaper.Door.Open).
	Open func(context.Context, *escaper.Request) (*escaper.Conn, error)
	// Relay moves the bytes of tunnels.
	Relay *relay.Engine
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
	request   headLimits
	response  headLimits
	buffers   buffers
	exchanges sync.Pool

	ctx      context.Context // of what the server waits for; ends with a cut
	cancel   context.CancelFunc
	draining atomic.Bool
	open     atomic.Int64  // connections and tunnels
	quiet    chan struct{} // told when open comes to 0 while draining
	nextID   atomic.Uint32
	shards   [16]shard

	stop      chan struct{} // closed when draining begins
	mu        sync.Mutex    // of acceptors
	acceptors map[*relay.Acceptor]struct{}
}

// A shard is a part of the set of what is open, with a lock of its own.
type shard struct {
	mu   sync.Mutex
	open map[tracked]struct{}
	_    [40]byte // shards share no cache line
}

// tracked is a client connection or a tunnel.
type tracked interface {
	endIdle() // ends it if it waits for a request
	cut()     // ends it
}

// New makes a server. It opens nothing.
func New(o Options) (*Server, error) {
	switch {
	case o.Open == nil:
		return nil, errors.New("http proxy: no door to open")
	case o.Relay == nil:
		return nil, errors.New("http proxy: no relay engine")
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
	s := &Server{o: o, quiet: make(chan struct{}, 1), acceptors: map[*relay.Acceptor]struct{}{}, stop: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.request = headLimits{
		fields: o.Limits.Fields, target: o.Limits.Target,
		selection: strings.ToLower(o.SelectionHeader),
	}
	// A response has nothing to do with the selection header; an origin's
	// field of that name goes to the client.
	s.response = headLimits{fields: o.Limits.ResponseFields, response: true}
	for i := range s.shards {
		s.shards[i].open = map[tracked]struct{}{}
	}
	return s, nil
}

// Serve lets the relay's workers accept clients on l until Shutdown, and then
// returns nil. It closes l. Errors that pass, such as no descriptors being left,
// are waited out, with one line in the log for each burst.
func (s *Server) Serve(l *relay.Listener) error {
	s.mu.Lock()
	if s.draining.Load() {
		s.mu.Unlock()
		return l.Close()
	}
	a, err := s.o.Relay.Accept(l, s.begin)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	s.acceptors[a] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.acceptors, a)
		s.mu.Unlock()
		// Shutdown may have closed it already.
		_ = a.Close()
	}()

	const shortest, longest = 5 * time.Millisecond, time.Second
	var pause time.Duration
	var last time.Time // that it went on
	for {
		select {
		case err = <-a.Errors():
		case <-s.stop:
			return nil
		}
		switch {
		case s.draining.Load():
			return nil
		case !passes(err):
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		case time.Since(last) > longest: // a new burst
			pause = 0
			s.o.Logger.Warn("accept failed, trying on", "server", s.o.Name, "listen", l.Addr().String(), "err", err)
		}
		pause = min(max(2*pause, shortest), longest)
		select {
		case <-time.After(pause):
		case <-s.stop:
			return nil
		}
		last = time.Now()
		if err := a.Resume(); err != nil && !s.draining.Load() {
			return err
		}
	}
}

// passes reports whether an error of accept is about the moment and not about
// the listener.
func passes(err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	switch {
	case errors.Is(err, syscall.EBADF), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOTSOCK), errors.Is(err, io.EOF):
		return false
	}
	return true
}

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
	c.shard = s.track(c)
	c.serve()
	s.untrack(c.shard, c)
}

func (s *Server) track(t tracked) *shard {
	sh := &s.shards[int(s.nextID.Add(1))%len(s.shards)]
	s.open.Add(1)
	sh.mu.Lock()
	sh.open[t] = struct{}{}
	sh.mu.Unlock()
	return sh
}

func (s *Server) untrack(sh *shard, t tracked) {
	sh.mu.Lock()
	delete(sh.open, t)
	sh.mu.Unlock()
	if s.open.Add(-1) == 0 && s.draining.Load() {
		s.tellQuiet()
	}
}

func (s *Server) tellQuiet() {
	select {
	case s.quiet <- struct{}{}:
	default:
	}
}

func (s *Server) each(f func(tracked)) {
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		for t := range sh.open {
			f(t)
		}
		sh.mu.Unlock()
	}
}

// Open returns the number of client connections and tunnels.
func (s *Server) Open() int { return int(s.open.Load()) }

// Quiesce stops accepting and ends the client connections that wait for a
// request. No request begins after it has returned; those under way go on.
func (s *Server) Quiesce() error {
	s.mu.Lock()
	if !s.draining.Swap(true) {
		close(s.stop)
	}
	var errs []error
	for a := range s.acceptors {
		// What it has accepted is tracked when it is closed.
		if err := a.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close listener: %w", err))
		}
	}
	clear(s.acceptors)
	s.mu.Unlock()
	s.each(tracked.endIdle)
	return errors.Join(errs...)
}

// Shutdown is Quiesce, and waits for the requests and tunnels that are under
// way. When ctx ends first, these are cut and its error is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.Quiesce()
	for s.open.Load() > 0 {
		select {
		case <-s.quiet:
		case <-ctx.Done():
			s.cancel()
			s.each(tracked.cut)
			s.awaitCut()
			return errors.Join(err, ctx.Err())
		}
	}
	s.cancel()
	s.tellQuiet() // whoever else may be waiting
	return err
}

// awaitCut waits until all that was cut is over, which is soon: nothing of it
// waits for a peer any more.
func (s *Server) awaitCut() {
	const most = 5 * time.Second
	end := time.NewTimer(most)
	defer end.Stop()
	for s.open.Load() > 0 {
		select {
		case <-s.quiet:
		case <-end.C:
			s.o.Logger.Warn("connections outlive their end", "server", s.o.Name, "open", s.open.Load())
			return
		}
	}
}

func (s *Server) observe(r *escaper.Record) {
	if s.o.Observe != nil {
		s.o.Observe(r)
	}
}
