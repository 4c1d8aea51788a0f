// Package router builds a daemon out of a configuration and runs it: it is
// where the front ends, the escapers, the kernel's state and the control
// socket meet, and the only package that knows all of them.
package router

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/router/relay"
)

// Options of a Router.
type Options struct {
	Config  *config.Config
	Version string
	Stderr  io.Writer // of both logs
	// Load reads the configuration anew, for Reload.
	Load func() (*config.Config, error)
	// Notify tells the service manager how far the daemon is ("READY=1",
	// "STOPPING=1"); nil: nobody to tell.
	Notify func(state string)
}

// Router is the daemon.
type Router struct {
	o       Options
	log     *slog.Logger
	numbers *bpf.Numbers
	current atomic.Pointer[plan] // plan, for who only looks
	plan    *plan
	want    netcfg.Want
	relay   *relay.Engine
	limits  *limits
	access  *accessLog

	sessions *escaper.Sessions // over all reloads
	health   *escaper.Health   // over all reloads; nil: the plan is only looked at
	ports    *portMeter
	tally    tally
	meters   meters // over all reloads

	counters  *control.Counters
	collector *control.Collector
	servers   []*server
	socket    *control.Socket
	monitor   *control.Monitor
	monitorAt netip.AddrPort
	ready     atomic.Bool

	mu         sync.Mutex // orders what the kernel's events and reloads change
	hadDefault map[netcfg.Family]bool
	kernel     *kernel
	leaving    []*escaper.Path // taken away by a reload, with connections left
	pins       pins
	watcher    *netcfg.Watcher  // nil until it follows the kernel
	have       *netcfg.Snapshot // as it was read last; nil until it follows the kernel
	judged     *netcfg.Snapshot // what the states of all paths go by; nil: they have none yet
	settled    settled          // when a reload or a publication last had the network as it wants it

	serving  sync.WaitGroup // front ends that accept
	draining sync.WaitGroup // front ends that a reload has replaced
	failed   chan error
	cut      context.Context // ends when the daemon cuts what does not end by itself
}

// New builds the daemon of a configuration. It changes nothing of the system.
// Mistakes of the configuration that config.Load cannot see come as *Mistake.
func New(o Options) (*Router, error) {
	held, err := pinnedNumbers(o.Config)
	if err != nil {
		return nil, err
	}
	var r *Router
	health := escaper.NewHealth(func(changed []*escaper.Path) { r.onHealth(changed) })
	r, err = newRouter(o, held, health)
	return r, err
}

// Mistake is an error that only another configuration mends.
type Mistake struct{ Err error }

// Error implements error.
func (m *Mistake) Error() string { return m.Err.Error() }

// Unwrap gives what it is about.
func (m *Mistake) Unwrap() error { return m.Err }

// newRouter is New for which the path numbers in held are taken. Its errors
// are Mistakes.
func newRouter(o Options, held []uint32, health *escaper.Health) (_ *Router, err error) {
	defer func() {
		if err != nil {
			err = &Mistake{err}
		}
	}()
	r := &Router{
		o: o, log: newLogger(o.Stderr, o.Config.Log),
		access:     newAccessLog(o.Stderr, o.Config.Log.Level),
		hadDefault: map[netcfg.Family]bool{}, sessions: escaper.NewSessions(), health: health,
	}
	layout, err := markLayout(o.Config)
	if err != nil {
		return nil, err
	}
	r.numbers = bpf.NewNumbers(layout.MaxPath())
	if err := r.numbers.Hold(held...); err != nil {
		return nil, fmt.Errorf("path numbers of an earlier run: %w", err)
	}
	if r.plan, err = r.build(o.Config, layout, nil); err != nil {
		return nil, err
	}
	r.o.Config = r.plan.config
	if r.want, err = r.plan.want(nil); err != nil {
		return nil, errors.Join(err, r.plan.close(nil))
	}
	r.ports = newPortMeter(r.log)
	r.counters = control.NewCounters()
	r.collector = control.NewCollector(r.counters, r.Paths, r.unmarkedDrops, r.accounted)
	return r, nil
}

func newLogger(w io.Writer, c config.Log) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.Level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// Run brings the daemon up, serves until ctx ends, drains, and takes down what
// it put up. now cuts the draining short. The error is nil after a stop that
// was asked for.
func (r *Router) Run(ctx, now context.Context) (err error) {
	var done []func() error // what to undo, the last first
	defer func() {
		for _, f := range slices.Backward(done) {
			err = errors.Join(err, f())
		}
	}()
	done = append(done, func() error { return r.plan.close(nil) })
	c := r.o.Config
	l, err := control.Listen(c.Control.Socket)
	if err != nil {
		return err
	}
	r.failed = make(chan error, 1)
	r.socket = control.NewSocket(l, control.Backend{
		Paths: r.Paths, Drain: r.drain, Prove: r.proveGuard, Reload: r.Reload, Publish: r.Publish, Pins: r.pinBackend(), Version: r.o.Version,
	})
	go func() { r.fail(r.socket.Serve()) }()
	done = append(done, r.socket.Close)

	if err := r.openKernel(); err != nil {
		return err
	}
	done = append(done, r.closeKernel)
	if c.Metrics.Listen.IsValid() {
		l, err := listen(c.Metrics.Listen, r.plan.client, false)
		if err != nil {
			return err
		}
		r.monitor = control.NewMonitor(r.collector, r.Paths, r.ready.Load)
		r.monitorAt = l.Addr().(*net.TCPAddr).AddrPort()
		go func() { r.fail(r.monitor.Serve(l)) }()
		done = append(done, r.monitor.Close)
		r.log.Info("metrics", "listen", r.monitorAt)
	}
	if err := r.applyNetwork(ctx); err != nil {
		return err
	}
	if r.limits, err = openLimits(r.log); err != nil {
		return err
	}
	done = append(done, r.limits.close)
	// A worker of the relay holds its P while it waits in the kernel: with as
	// many more, accepts and dials need not wait for one.
	cores := runtime.GOMAXPROCS(0)
	if r.relay, err = relay.New(relay.Options{Workers: cores, Logger: r.log}); err != nil {
		return err
	}
	runtime.GOMAXPROCS(2 * cores)
	done = append(done, func() error { runtime.GOMAXPROCS(cores); return r.relay.Close() })
	if r.servers, err = r.openServers(r.plan, nil); err != nil {
		return errors.Join(err, closeListeners(r.servers))
	}
	if err := r.divertBoth(nil); err != nil {
		return errors.Join(err, closeListeners(r.servers))
	}
	stopWatch, err := r.watch(ctx)
	if err != nil {
		return errors.Join(err, closeListeners(r.servers))
	}
	done = append(done, stopWatch)
	stopPins, err := r.openPins()
	if err != nil {
		return errors.Join(err, closeListeners(r.servers))
	}
	done = append(done, stopPins)
	r.plan.door.Swap(r.plan.table)
	r.current.Store(r.plan)
	done = append(done, func() error { r.plan.door.Swap(nil); return nil })
	cut, cancel := context.WithCancel(context.Background())
	defer cancel()
	r.cut = cut
	r.mu.Lock() // what is diverted follows the kernel already
	for _, s := range r.servers {
		r.serve(s)
	}
	r.mu.Unlock()
	// Tens of thousands of nodes leave twice their size in garbage behind.
	debug.FreeOSMemory()
	r.ready.Store(true)
	r.notify("READY=1")
	r.log.Info("ready", "version", r.o.Version, "paths", len(r.plan.table.Paths()), "accounting", r.accounted())

	select {
	case <-ctx.Done():
	case err = <-r.failed:
	}
	r.mu.Lock() // a reload under way ends first, none begins after
	r.ready.Store(false)
	servers := r.servers
	r.mu.Unlock()
	r.notify("STOPPING=1")
	r.log.Info("stopping")
	drain, stop := context.WithTimeout(now, r.plan.config.DrainTimeout)
	defer stop()
	context.AfterFunc(drain, cancel)
	r.stopServers(drain, servers)
	r.draining.Wait()
	r.serving.Wait()
	return err
}

// fail ends Run with the error of one of its parts; without one it was told to
// end.
func (r *Router) fail(err error) {
	if err == nil {
		return
	}
	select {
	case r.failed <- err:
	default: // one is enough to stop
		r.log.Error("a part of the daemon failed", "err", err)
	}
}

func (r *Router) notify(state string) {
	if r.o.Notify != nil {
		r.o.Notify(state)
	}
}

// serve lets a front end accept.
func (r *Router) serve(s *server) {
	r.serveFlows(s)
	for _, l := range s.listeners {
		r.serving.Go(func() { r.fail(s.serve(l)) })
		r.log.Info("listening", "server", s.conf.Name, "type", s.conf.Type, "listen", l.Addr().String(), "escaper", s.conf.Escaper)
	}
}

// stopServers drains front ends side by side, until ctx ends.
func (r *Router) stopServers(ctx context.Context, servers []*server) {
	var wg sync.WaitGroup
	for _, s := range servers {
		wg.Go(func() {
			if s.tap.flows != nil {
				s.tap.flows.Quiesce()
			}
			if err := s.front.Shutdown(ctx); err != nil {
				r.log.Warn("connections cut", "server", s.conf.Name, "err", err)
			}
			if s.tap.flows != nil { // which have no end that could be waited for
				if err := s.tap.flows.Close(); err != nil {
					r.log.Warn("the flows do not close", "server", s.conf.Name, "err", err)
				}
			}
		})
	}
	wg.Wait()
}

// closeListeners closes those that no front end serves yet.
func closeListeners(servers []*server) error {
	var errs []error
	for _, s := range servers {
		for _, l := range s.listeners {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(append(errs, closeTaps(servers))...)
}

// listening gives the addresses that the daemon itself listens on: no request
// may go there.
func (r *Router) listening() []netip.AddrPort {
	var all []netip.AddrPort
	for _, s := range r.servers {
		for _, l := range s.listeners {
			all = append(all, l.Addr().(*net.TCPAddr).AddrPort())
		}
		all = append(all, listeningNets(s.conf)...)
	}
	if r.monitorAt.IsValid() {
		all = append(all, r.monitorAt)
	}
	return all
}

// drain takes a path out of use for new connections, or gives it back.
func (r *Router) drain(name string, on bool) error {
	now := r.current.Load()
	if now == nil {
		return escaper.ErrClosed
	}
	p := now.table.Path(name)
	if p == nil {
		return fmt.Errorf("%w: %q", control.ErrUnknownPath, name)
	}
	if on {
		p.Drain()
	} else {
		p.Undrain()
	}
	r.socket.Changed()
	r.log.Info("path set", "path", name, "draining", on)
	return nil
}
