// Package rig is what a front end has around it in a test: the real door and
// relay, users, and the records of its requests. It is for tests alone.
package rig

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/resolve"
	"wayout/selection"
)

// Patience is how long a test waits for what has to happen.
const Patience = 10 * time.Second

// names stands for the network's name servers.
type names struct{}

// Ready makes tasks leave their worker for each name.
func (names) Ready(string, selection.Family) bool { return false }

func (names) Lookup(_ context.Context, host string, _ selection.Family) (resolve.Answer, error) {
	switch host {
	case "origin.test":
		return resolve.Answer{V4: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, nil
	case "slow.test":
		return resolve.Answer{}, &resolve.Error{Host: host, Kind: resolve.ErrTimeout}
	}
	return resolve.Answer{}, &resolve.Error{Host: host, Kind: resolve.ErrNotFound}
}

// Server is a front end.
type Server interface {
	Serve(*relay.Listener) error
	Shutdown(context.Context) error
	Open() int
}

// Options of a Rig.
type Options struct {
	// Nodes are the paths of escaper out, whose names are resolved to
	// 127.0.0.1 (origin.test), late (slow.test) or not at all, and which goes to
	// loopback addresses but 127.9.0.0/16. They are up.
	Nodes []escaper.NodeOptions
	Idle  *escaper.Idle // nil: none is kept
	Tick  time.Duration // of the relay; 0: its own
}

// Node is one of them.
func Node(id, v4, v6 string) escaper.NodeOptions {
	n := escaper.NodeOptions{ID: id, V4: netip.MustParseAddr(v4), Weight: 1}
	if v6 != "" {
		n.V6 = netip.MustParseAddr(v6)
	}
	return n
}

// Rig is a door, a relay and records.
type Rig struct {
	TB     testing.TB
	Table  *escaper.Table
	Door   *escaper.Door
	Engine *relay.Engine
	Addr   string // of the server, once it serves

	mu      sync.Mutex
	records []escaper.Record
	seen    chan struct{}
}

// New makes a rig, and closes it at the end of the test.
func New(tb testing.TB, o Options) *Rig {
	tb.Helper()
	r := &Rig{TB: tb, Door: &escaper.Door{}, seen: make(chan struct{}, 1)}
	filter, err := escaper.NewFilter(nil, []string{"loopback"}, []string{"127.9.0.0/16"})
	if err != nil {
		tb.Fatal(err)
	}
	d, err := escaper.NewDirect(escaper.Options{
		Name: "out", Nodes: o.Nodes, Idle: o.Idle,
		Filter: filter, Resolver: names{}, EnableSelection: true, Policy: selection.Serial, ConnectTimeout: 5 * time.Second,
	})
	if err != nil {
		tb.Fatal(err)
	}
	if r.Table, err = escaper.NewTable(d); err != nil {
		tb.Fatal(err)
	}
	for _, p := range r.Table.Paths() {
		p.SetFamilyState(selection.V4, escaper.Up, "")
		p.SetFamilyState(selection.V6, escaper.Up, "")
	}
	r.Table.Publish()
	r.Door.Swap(r.Table)
	if r.Engine, err = relay.New(relay.Options{Workers: 1, Tick: o.Tick}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := r.Engine.Close(); err != nil {
			tb.Errorf("engine: %v", err)
		}
		r.Door.Swap(nil)
	})
	return r
}

// Down turns a path down for IPv4.
func (r *Rig) Down(path string) {
	r.Table.Path(path).SetFamilyState(selection.V4, escaper.Down, "address gone")
	r.Table.Publish()
}

// Serve runs the server on a port of loopback until the end of the test.
func (r *Rig) Serve(s Server) {
	r.TB.Helper()
	l := Listen(r.TB, "127.0.0.1")
	r.Addr = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	r.TB.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			r.TB.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			r.TB.Errorf("serve: %v", err)
		}
		if n := s.Open(); n != 0 {
			r.TB.Errorf("%d connections outlive the server", n)
		}
	})
}

// Listen opens a listener for a server.
func Listen(tb testing.TB, at string) *relay.Listener {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(at)})
	if err != nil {
		tb.Fatal(err)
	}
	bare, err := relay.NewListener(l)
	if err != nil {
		tb.Fatal(err)
	}
	return bare
}

// Observe is the server's hook.
func (r *Rig) Observe(rec *escaper.Record) {
	r.mu.Lock()
	r.records = append(r.records, *rec)
	r.mu.Unlock()
	select {
	case r.seen <- struct{}{}:
	default:
	}
}

// Record waits for the n-th record.
func (r *Rig) Record(n int) escaper.Record {
	r.TB.Helper()
	end := time.After(Patience)
	for {
		r.mu.Lock()
		have := len(r.records)
		if have > n {
			rec := r.records[n]
			r.mu.Unlock()
			return rec
		}
		r.mu.Unlock()
		select {
		case <-r.seen:
		case <-end:
			r.TB.Fatalf("no record %d, only %d", n, have)
		}
	}
}

// Records counts them.
func (r *Rig) Records() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.records)
}

// Dial connects a client, for twice Patience.
func Dial(tb testing.TB, addr string) *net.TCPConn {
	tb.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * Patience)); err != nil {
		tb.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// Group is group team, whose users have the password "secret", but for those whose
// names begin with net: they are known by their networks alone.
func Group(tb testing.TB, users ...auth.User) *auth.Group {
	tb.Helper()
	const hash = "$2a$04$g.yx1OfOprMqm3sT0oGFcOaPxgBQaTp9Kx0TD1jh672cPqKeABM0e" // bcrypt at its least cost
	var list []auth.Credential
	for _, u := range users {
		c := auth.Credential{User: u, Hash: hash}
		if strings.HasPrefix(u.Name, "net") {
			c.Hash = ""
		}
		list = append(list, c)
	}
	g, err := auth.NewGroup("team", list, auth.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	return g
}
