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
	"sync"
	"sync/atomic"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/router/relay"
)

// Options of a Router.
type Options struct {
	Config  *config.Config
	Version string
	Stderr  io.Writer // of both logs
	// Notify tells the service manager how far the daemon is ("READY=1",
	// "STOPPING=1"); nil: nobody to tell.
	Notify func(state string)
}

// Router is the daemon.
type Router struct {
	o       Options
	log     *slog.Logger
	numbers *bpf.Numbers
	door    *escaper.Door
	plan    *plan
	want    netcfg.Want
	relay   *relay.Engine
	access  *accessLog

	counters  *control.Counters
	collector *control.Collector
	servers   []*server
	socket    *control.Socket
	monitor   *control.Monitor
	ready     atomic.Bool

	mu         sync.Mutex // orders what the kernel's events change
	hadDefault map[netcfg.Family]bool
	kernel     *kernel
}

// server is a front end with its listeners.
type server struct {
	conf      *config.Server
	front     *httpproxy.Server
	listeners []*net.TCPListener
}

// New builds the daemon of a configuration. It touches nothing of the system:
// its errors are mistakes of the configuration that config.Load cannot see.
func New(o Options) (*Router, error) {
	r := &Router{
		o: o, log: newLogger(o.Stderr, o.Config.Log), door: &escaper.Door{},
		access:     newAccessLog(o.Stderr, o.Config.Log.Level),
		hadDefault: map[netcfg.Family]bool{},
	}
	mask := o.Config.Netcfg.MarkMask
	if mask == 0 {
		mask = bpf.DefaultMask
	}
	layout, err := bpf.NewLayout(mask)
	if err != nil {
		return nil, fmt.Errorf("netcfg.mark_mask: %w", err)
	}
	r.numbers = bpf.NewNumbers(layout.MaxPath())
	if r.plan, err = r.build(o.Config, layout); err != nil {
		return nil, err
	}
	if r.want, err = r.plan.want(); err != nil {
		return nil, errors.Join(err, r.plan.close())
	}
	names := make([]string, len(o.Config.Servers))
	for i := range o.Config.Servers {
		names[i] = o.Config.Servers[i].Name
	}
	r.counters = control.NewCounters(names)
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
	defer func() { err = errors.Join(err, r.plan.close()) }()
	c := r.o.Config
	l, err := control.Listen(c.Control.Socket)
	if err != nil {
		return err
	}
	r.socket = control.NewSocket(l, control.Backend{Paths: r.Paths, Drain: r.drain, Version: r.o.Version})
	failed := make(chan error, 2+len(c.Servers))
	go func() { failed <- r.socket.Serve() }()
	defer func() { err = errors.Join(err, r.socket.Close()) }()

	if err := r.openKernel(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.closeKernel()) }()
	if r.relay, err = relay.New(relay.Options{Logger: r.log}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.relay.Close()) }()
	if err := r.openServers(); err != nil {
		return errors.Join(err, r.closeListeners())
	}
	stopWatch, err := r.watch(ctx)
	if err != nil {
		return errors.Join(err, r.closeListeners())
	}
	defer stopWatch()
	r.door.Swap(r.plan.table)
	defer r.door.Swap(nil)
	if c.Metrics.Listen.IsValid() {
		ml, err := listen(c.Metrics.Listen, r.plan.client, false)
		if err != nil {
			return errors.Join(err, r.closeListeners())
		}
		r.monitor = control.NewMonitor(r.collector, r.Paths, r.ready.Load)
		go func() { failed <- r.monitor.Serve(ml) }()
		defer func() { err = errors.Join(err, r.monitor.Close()) }()
		r.log.Info("metrics", "listen", ml.Addr().String())
	}
	for _, s := range r.servers {
		for _, l := range s.listeners {
			go func() { failed <- s.front.Serve(l) }()
			r.log.Info("listening", "server", s.conf.Name, "type", s.conf.Type, "listen", l.Addr().String(), "escaper", s.conf.Escaper)
		}
	}
	r.ready.Store(true)
	r.notify("READY=1")
	r.log.Info("ready", "version", r.o.Version, "paths", len(r.plan.table.Paths()), "accounting", r.accounted())

	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	r.ready.Store(false)
	r.notify("STOPPING=1")
	r.log.Info("stopping")
	r.shutdown(now)
	return err
}

func (r *Router) notify(state string) {
	if r.o.Notify != nil {
		r.o.Notify(state)
	}
}

// openServers builds the front ends and binds their listeners.
func (r *Router) openServers() error {
	for i := range r.o.Config.Servers {
		sc := &r.o.Config.Servers[i]
		front, err := httpproxy.New(httpproxy.Options{
			Name: sc.Name, Escaper: sc.Escaper, Group: r.plan.groups[sc.UserGroup],
			SelectionHeader: sc.PathSelectionHeader, ReportEgress: sc.ReportEgress,
			Limits: httpproxy.Limits{
				Head: sc.ReqHeaderMaxSize, Fields: sc.ReqHeaderMaxCount, Target: sc.ReqTargetMaxSize,
				ResponseHead: sc.RspHeaderMaxSize, ResponseFields: sc.RspHeaderMaxCount,
			},
			Timeouts: httpproxy.Timeouts{
				Idle: sc.PipelineReadIdleTimeout, Head: sc.ReqHeaderRecvTimeout, Auth: sc.AuthTimeout,
				Response: sc.RspHeaderRecvTimeout, Stall: sc.BodyStallTimeout, Write: sc.SendTimeout, TunnelIdle: sc.TunnelIdleTimeout,
			},
			Open: r.door.Open, Relay: r.relay, Logger: r.log,
			Observe: observe(r.access, r.counters, r.counters.Server(sc.Name)),
		})
		if err != nil {
			return fmt.Errorf("server %s: %w", sc.Name, err)
		}
		s := &server{conf: sc, front: front}
		r.servers = append(r.servers, s)
		for _, at := range sc.Listen {
			l, err := listen(at, r.plan.client, true)
			if err != nil {
				return fmt.Errorf("server %s: %w", sc.Name, err)
			}
			s.listeners = append(s.listeners, l)
		}
	}
	return nil
}

// closeListeners closes those that no front end serves yet.
func (r *Router) closeListeners() error {
	var errs []error
	for _, s := range r.servers {
		for _, l := range s.listeners {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// listening gives the addresses that the daemon itself listens on: no request
// may go there.
func (r *Router) listening() []netip.AddrPort {
	var all []netip.AddrPort
	for _, s := range r.servers {
		for _, l := range s.listeners {
			all = append(all, l.Addr().(*net.TCPAddr).AddrPort())
		}
	}
	if m := r.o.Config.Metrics.Listen; m.IsValid() {
		all = append(all, m)
	}
	return all
}

// shutdown drains all front ends side by side.
func (r *Router) shutdown(now context.Context) {
	ctx, cancel := context.WithTimeout(now, r.o.Config.DrainTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, s := range r.servers {
		wg.Go(func() {
			if err := s.front.Shutdown(ctx); err != nil {
				r.log.Warn("connections cut", "server", s.conf.Name, "err", err)
			}
		})
	}
	wg.Wait()
}

// drain takes a path out of use for new connections, or gives it back.
func (r *Router) drain(name string, on bool) error {
	t := r.door.Table()
	if t == nil {
		return escaper.ErrClosed
	}
	p := t.Path(name)
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
