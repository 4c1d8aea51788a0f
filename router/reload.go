package router

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"slices"
	"time"

	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/escaper"
)

// ErrRestart: the new configuration changes what a running daemon cannot.
var ErrRestart = errors.New("cannot be changed by a reload, restart the daemon")

// sweepEvery is how often the daemon looks whether what a reload took away is
// still in use. The kernel tells of a socket's end only by its counters.
const sweepEvery = 2 * time.Second

// Reload reads the configuration again and puts it in the place of the current
// one. All of the new is built before anything of the old is touched: with an
// error, which is logged too, nothing has changed. Requests under way end by
// what they began with, and tunnels live on.
func (r *Router) Reload() error {
	c, err := r.o.Load()
	if err == nil {
		err = r.reload(c)
	}
	r.counters.Reload(err)
	if err != nil {
		r.log.Error("configuration not reloaded", "err", err)
		return err
	}
	r.log.Info("configuration reloaded", "paths", len(r.current.Load().table.Paths()))
	r.socket.Changed()
	return nil
}

func (r *Router) reload(c *config.Config) (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.plan
	if !r.ready.Load() {
		return escaper.ErrClosed
	}
	if err := fixed(old.config, c); err != nil {
		return err
	}
	p, err := r.build(c, old.layout, old)
	if err != nil {
		return err
	}
	var servers []*server
	defer func() {
		if err != nil {
			err = errors.Join(err, closeListeners(servers), r.discard(p, old))
		}
	}()
	if servers, err = r.openServers(p, r.servers); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			r.settleDiverts()
		}
	}()
	if err := r.divertBoth(servers); err != nil {
		return err
	}
	install, err := r.prepare(p, old)
	if err != nil {
		return err
	}

	// ---- Nothing below this line fails. ----

	drained := r.servers
	r.servers = servers
	install()
	keepFlows(drained, servers)
	for _, s := range servers {
		r.serve(s)
	}
	r.settleDiverts()
	// Old and new accept from the same sockets: what comes after the reload is
	// the new ones' alone.
	for _, s := range drained {
		if err := s.front.Quiesce(); err != nil {
			r.log.Warn("the old front end does not close", "server", s.conf.Name, "err", err)
		}
	}
	r.draining.Go(func() {
		r.stopServers(r.cut, drained)
		// Until here the old front ends went by all that they knew: users, maps
		// and paths of one configuration. What only that had is over now.
		old.door.Swap(p.table)
		if err := old.close(p); err != nil {
			r.log.Error("the old configuration does not close", "err", err)
		}
		debug.FreeOSMemory()
	})
	return nil
}

// prepare makes the kernel ready for the paths of the next plan, those of the
// old one included, and returns what puts it into force. That does not fail.
func (r *Router) prepare(p, old *plan) (install func(), err error) {
	leaving := append(slices.Clone(r.leaving), gone(old, p)...)
	want, err := p.want(leaving)
	if err != nil {
		return nil, err
	}
	have, err := r.kernel.net.Read()
	if err != nil {
		return nil, err
	}
	if _, err := netcfg.Make(r.kernel.net, have, want, netcfg.Plan.Adds); err != nil {
		return nil, fmt.Errorf("make the network as wished: %w", err)
	}
	if err := r.readAgain(true, true); err != nil {
		return nil, err
	}
	return r.settle(p, want, leaving, p.table.Directs())
}

// prepareNodes is prepare for a plan that is the old one with other published
// nodes. It goes by the state of the network that was read last; what this may
// lack is read again. What else has changed, the watch over the kernel finds.
func (r *Router) prepareNodes(p, old *plan) (install func(), err error) {
	leaving := append(slices.Clone(r.leaving), gone(old, p)...)
	want, err := p.want(leaving)
	if err != nil {
		return nil, err
	}
	fresh := slices.DeleteFunc(slices.Clone(p.table.Directs()), func(d *escaper.Direct) bool { return old.holdings[d] != nil })
	made, err := netcfg.Make(r.kernel.net, r.have, want, netcfg.Plan.Adds)
	if err != nil {
		return nil, fmt.Errorf("make the network as wished: %w", err)
	}
	addrs, rest := made.Touches()
	if err := r.readAgain(addrs || lacks(r.have, fresh), rest); err != nil {
		return nil, err
	}
	return r.settle(p, want, leaving, fresh)
}

// lacks says whether a snapshot is without an address of the paths of some
// escapers.
func lacks(s *netcfg.Snapshot, of []*escaper.Direct) bool {
	for _, d := range of {
		for _, path := range d.Paths() {
			for _, a := range []netip.Addr{path.V4, path.V6} {
				if !a.IsValid() {
					continue
				}
				if state, _ := s.Has(a, ""); state != netcfg.Present {
					return true
				}
			}
		}
	}
	return false
}

// settled is when what a reload or a publication had added was there: a
// snapshot from before may lack it.
type settled struct{ all, addrs time.Time }

// after says whether some of a snapshot is from before.
func (t settled) after(s *netcfg.Snapshot) bool {
	return s.Since().Before(t.all) || s.SinceAddrs().Before(t.addrs)
}

// settle has what the paths of a plan need beside the network in place, and
// returns what puts the plan into force. anew are its escapers whose paths are
// to be judged.
func (r *Router) settle(p *plan, want netcfg.Want, leaving []*escaper.Path, anew []*escaper.Direct) (install func(), err error) {
	have := r.have
	r.setSources(p, have)
	r.settlePrefixes(p, leaving, want, have)
	if err := r.setGuards(p, have); err != nil {
		return nil, err
	}
	return func() {
		r.plan, r.want, r.leaving = p, want, leaving
		r.judgePaths(p, have, anew)
		r.reconfigurePins(p)
		r.health.Use(p.table)
		r.current.Store(p)
		p.door.Swap(p.table)
	}, nil
}

// fixed says what of a new configuration a running daemon cannot take up.
func fixed(old, c *config.Config) error {
	for _, f := range []struct {
		key  string
		same bool
	}{
		{"control.socket", c.Control == old.Control},
		{"metrics.listen", c.Metrics == old.Metrics},
		{"log", c.Log == old.Log},
		{"accounting", c.Accounting == old.Accounting},
		{"netcfg", c.Netcfg == old.Netcfg},
	} {
		if !f.same {
			return fmt.Errorf("%s: %w", f.key, ErrRestart)
		}
	}
	for _, u := range old.Uplinks {
		if !slices.Contains(c.Uplinks, u) {
			return fmt.Errorf("uplink %s: an uplink that is there %w", u.Name, ErrRestart)
		}
	}
	return nil
}

// gone lists the paths of a plan that are not in the next one.
func gone(old, next *plan) []*escaper.Path {
	kept := map[uint32]bool{}
	for _, d := range next.table.Directs() {
		if old.holdings[d] == nil {
			for _, p := range d.Paths() {
				kept[p.Number] = true
			}
		}
	}
	var all []*escaper.Path
	for _, d := range old.table.Directs() {
		if next.holdings[d] != nil {
			continue
		}
		for _, p := range d.Paths() {
			if !kept[p.Number] {
				all = append(all, p)
			}
		}
	}
	return all
}

// sweep lets go of the paths that a reload, or a daemon that was killed, left
// behind and that no socket uses any more: their guards, their numbers and
// their addresses.
func (r *Router) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sweepPins()
	r.restoreDiverts()
	r.refreshPins(r.plan, nil)
	r.kernel.inherited = slices.DeleteFunc(r.kernel.inherited, func(number uint32) bool {
		if r.inKernel(number) {
			return false
		}
		if err := errors.Join(r.clearGuard(number), r.numbers.Free(number)); err != nil {
			r.log.Error("path number of an earlier run cannot be let go", "number", number, "err", err)
		}
		return true
	})
	n := len(r.leaving)
	r.leaving = slices.DeleteFunc(r.leaving, func(p *escaper.Path) bool {
		if c := p.Counters(); c.Open > 0 || r.inKernel(p.Number) {
			return false
		}
		if err := errors.Join(r.clearGuard(p.Number), r.numbers.Release(p.Number), r.numbers.Free(p.Number)); err != nil {
			r.log.Error("path cannot be let go", "path", p.Name, "err", err)
		}
		return true
	})
	if len(r.leaving) == n {
		return
	}
	want, err := r.plan.want(r.leaving)
	if err == nil {
		r.want = want
		var have *netcfg.Snapshot
		if have, err = r.kernel.net.Read(); err == nil {
			var made netcfg.Plan
			made, err = netcfg.Make(r.kernel.net, have, want, nil)
			err = errors.Join(err, r.readAgain(made.Touches()))
		}
	}
	if err != nil {
		r.log.Error("the network cannot be made as wished", "err", err)
	}
}

// readAgain takes note of the network after addresses, or more than these, were
// added or taken away: a publication that brings back what is gone must not find it there.
func (r *Router) readAgain(addrs, rest bool) (err error) {
	have, at := r.have, r.settled
	switch now := time.Now(); {
	case rest:
		at = settled{now, now}
		have, err = r.kernel.net.Read()
	case addrs:
		at.addrs = now
		have, err = r.kernel.net.ReadAddrs(have)
	}
	if err == nil {
		r.have, r.settled = have, at
	}
	return err
}

// putBack takes note of the network after what had vanished of a snapshot was put
// back, for the next publication. What the watch reads next is newer; only where
// addresses came or went may it be in part from before.
func (r *Router) putBack(s *netcfg.Snapshot) error {
	now := time.Now()
	have, err := r.kernel.net.Read()
	if err != nil {
		return err
	}
	if moved, _ := have.Moved(s); len(moved) > 0 {
		r.settled.addrs = now
	}
	r.have = have
	return nil
}

// inKernel says whether the kernel still knows a TCP socket of a number, be it
// one that it closes by itself.
func (r *Router) inKernel(number uint32) bool {
	c, ok := r.kernelCounters(number)
	return ok && c.Open()+c.Connecting() > 0
}

func (r *Router) clearGuard(number uint32) error {
	if !r.accounted() {
		return nil
	}
	return r.kernel.progs.ClearPath(number)
}
