package router

import (
	"fmt"
	"net/netip"
	"slices"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/selection"
)

// manyChanges is how many paths may change with one event before the log sums
// them up: an uplink with thousands of addresses is one thing that happened.
const manyChanges = 16

// judge says what a snapshot of the kernel means for one family of a path.
func (r *Router) judge(p *plan, s *netcfg.Snapshot, path *escaper.Path, f selection.Family) (escaper.Condition, string) {
	addr, family := path.V4, netcfg.IPv4
	if f == selection.V6 {
		addr, family = path.V6, netcfg.IPv6
	}
	whole := path.Net(f)
	up, hasUplink := p.uplinks[path.Uplink]
	device := p.device(path)
	switch {
	case addr.IsValid():
		state, reason := s.Has(addr, device)
		if state == netcfg.Tentative {
			return escaper.Tentative, reason
		}
		if state != netcfg.Present {
			return escaper.Down, reason
		}
	case whole.IsValid():
		if state, reason := s.HasLocal(whole); state != netcfg.Present {
			return escaper.Down, reason
		}
		if device == "" {
			break
		}
		if l, ok := s.Link(device); !ok {
			return escaper.Down, "interface " + device + " does not exist"
		} else if !l.Up {
			return escaper.Down, l.Reason
		}
	case path.AnySource: // main routing chooses
	default: // by its interface alone: by an address that is on it
		l, ok := s.Link(device)
		if !ok {
			return escaper.Down, "interface " + device + " does not exist"
		}
		if !l.Up {
			return escaper.Down, l.Reason
		}
		if !path.Source(f).IsValid() {
			return escaper.Down, fmt.Sprintf("interface %s has no %s address to send from", device, family)
		}
	}
	if hasUplink {
		return r.judgeUplink(s, up, family)
	}
	if path.Interface == "" && r.hadDefault[family] && !s.DefaultRoute(family) {
		return escaper.Down, fmt.Sprintf("the host's default route for %s is gone", family)
	}
	return escaper.Up, ""
}

// interfaceAddrs are the addresses of an interface to send from, those that reach
// beyond the link, in order.
func interfaceAddrs(s *netcfg.Snapshot, l netcfg.Link, f selection.Family) []netip.Addr {
	var all []netip.Addr
	for a, places := range s.Addrs {
		if selection.FamilyOf(a) != f || !a.IsGlobalUnicast() {
			continue
		}
		if slices.ContainsFunc(places, func(p netcfg.Address) bool {
			return p.LinkIndex == l.Index && !p.LinkScope && !p.Tentative && !p.DadFailed && !p.Deprecated
		}) {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// setSources gives the paths that have only an interface an address of it: the
// one in use while it is good, else the first.
func (r *Router) setSources(p *plan, s *netcfg.Snapshot) {
	type key struct {
		device string
		f      selection.Family
	}
	good := map[key][]netip.Addr{}
	for _, h := range p.holds() {
		for _, path := range h.unbound {
			for _, f := range []selection.Family{selection.V4, selection.V6} {
				if path.Unbound&f == 0 {
					continue
				}
				k := key{path.Interface, f}
				list, known := good[k]
				if !known {
					l, _ := s.Link(path.Interface) // without it there is no address
					list = interfaceAddrs(s, l, f)
					good[k] = list
				}
				was := path.Source(f)
				if _, still := slices.BinarySearchFunc(list, was, netip.Addr.Compare); still {
					continue
				}
				now := netip.Addr{}
				if len(list) > 0 {
					now = list[0]
				}
				if now != was {
					path.SetSource(f, now)
					r.killGone(s, path, f, was)
				}
			}
		}
	}
}

// fewMoved is how many addresses may have changed for the paths that go by them to
// be looked for one by one.
const fewMoved = 1000

// judgePaths brings the states of all paths in line with a snapshot, ends the
// connections of addresses that have gone, and reports whether any state
// changed. It looks at the paths of new escapers, at those that go by what has
// changed since the last time, and at those that errors of this host's own may
// have turned down: of tens of thousands of paths that is not many, as a rule.
func (r *Router) judgePaths(p *plan, s *netcfg.Snapshot, fresh []*escaper.Direct) bool {
	if p.told != s {
		r.tellHost(p, s)
	}
	moved, more := s.Moved(r.judged)
	r.judged = s
	// A family that has never had a default route is on-link only and lacks
	// nothing; one that has had it and lost it reaches nothing.
	for _, f := range []netcfg.Family{netcfg.IPv4, netcfg.IPv6} {
		r.hadDefault[f] = r.hadDefault[f] || s.DefaultRoute(f)
	}
	var changed []*escaper.Path
	in := map[*escaper.Direct]bool{}
	for _, d := range p.table.Directs() {
		paths := d.Paths()
		if !more && len(moved) <= fewMoved && !d.Watched() && !slices.Contains(fresh, d) {
			paths = slices.Concat(d.By(moved), p.holdings[d].unbound)
		}
		for _, path := range paths {
			if r.judgePath(p, s, path) {
				changed = append(changed, path)
				in[d] = true
			}
		}
	}
	for _, path := range r.leaving {
		for _, f := range []selection.Family{selection.V4, selection.V6} {
			r.killGone(s, path, f, path.Source(f))
			r.killWhole(s, path, f)
		}
	}
	if len(changed) == 0 {
		return false
	}
	p.table.PublishOnly(func(d *escaper.Direct) bool { return in[d] })
	r.logChanges(changed)
	return true
}

// tellHost lets the egress filters know what is the host's own.
func (r *Router) tellHost(p *plan, s *netcfg.Snapshot) {
	prefixes := make([]netip.Prefix, 0, len(s.Addrs))
	for a := range s.Addrs {
		prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
	}
	p.host.Set(append(prefixes, s.LocalPrefixes()...), r.listening())
	p.told = s
}

// judgePath brings the states of one path in line with a snapshot, and reports
// whether they changed.
func (r *Router) judgePath(p *plan, s *netcfg.Snapshot, path *escaper.Path) (changed bool) {
	var before escaper.Status
	for _, f := range []selection.Family{selection.V4, selection.V6} {
		if path.Given()&f == 0 {
			continue
		}
		cond, reason := r.judge(p, s, path, f)
		if !changed {
			before = path.Status()
		}
		changed = path.SetFamilyState(f, cond, reason) || changed
		if cond != escaper.Up {
			r.killGone(s, path, f, path.Source(f))
			r.killWhole(s, path, f)
		}
	}
	if !changed {
		return false
	}
	after := path.Status()
	return after.State != before.State || after.Reason != before.Reason
}

// killGone ends the connections of an address that is not on the host any
// more. The kernel does not: they would hang.
func (r *Router) killGone(s *netcfg.Snapshot, path *escaper.Path, f selection.Family, addr netip.Addr) {
	if !addr.IsValid() {
		return
	}
	state, why := s.Has(addr, "")
	if state != netcfg.Absent {
		return
	}
	r.kill(path, f, netip.PrefixFrom(addr, addr.BitLen()), why)
}

// killWhole is killGone for a prefix that is not the host's own any more.
func (r *Router) killWhole(s *netcfg.Snapshot, path *escaper.Path, f selection.Family) {
	whole := path.Net(f)
	if !whole.IsValid() {
		return
	}
	if state, why := s.HasLocal(whole); state == netcfg.Absent {
		r.kill(path, f, whole, why)
	}
}

func (r *Router) kill(path *escaper.Path, f selection.Family, from netip.Prefix, why string) {
	if n := path.Kill(from, selection.Refuse(selection.ErrDown, "path %s is down for %s: %s", path.Name, f, why)); n > 0 {
		r.log.Warn("connections ended", "path", path.Name, "connections", n, "reason", why)
	}
}

func (r *Router) logChanges(changed []*escaper.Path) {
	if len(changed) > manyChanges {
		states := map[string]int{}
		for _, p := range changed {
			states[p.Status().State]++
		}
		last := changed[len(changed)-1]
		r.log.Warn("paths changed", "paths", len(changed), "states", fmt.Sprint(states), "for example", last.Name, "reason", last.Status().Reason)
		return
	}
	for _, p := range changed {
		s := p.Status()
		if s.State == escaper.StateUp && s.Reason == "" {
			r.log.Info("path up", "path", p.Name)
			continue
		}
		r.log.Warn("path changed", "path", p.Name, "state", s.State, "reason", s.Reason)
	}
}

// Paths is the state of all paths, as the control socket tells it.
func (r *Router) Paths() control.Paths {
	all := control.Paths{Version: control.PathsVersion, Paths: []control.Path{}}
	now := r.current.Load()
	if now == nil {
		return all
	}
	all.Interfaces, all.Datagrams = r.tally.interfaces(r.log), r.counters.Datagrams()
	for _, p := range now.table.Paths() {
		all.Paths = append(all.Paths, r.status(p, now.device(p)))
	}
	return all
}

func (r *Router) status(p *escaper.Path, device string) control.Path {
	st, n := p.Status(), p.Counters()
	c := control.Path{
		Path: p.Name, Escaper: p.Escaper, ID: p.ID, State: st.State, Reason: st.Reason, Since: st.Since.UTC(),
		IPv4: sourceText(p, selection.V4), IPv6: sourceText(p, selection.V6), Uplink: text(p.Uplink), Interface: text(device), Weight: int(p.Weight),
		Connections: control.Connections{Open: int64(n.Open), Made: n.Attempts[escaper.ResultOK], Failed: n.Failed(), Closed: n.Closed},
		Results:     make(map[string]uint64, len(n.Attempts)),
	}
	c.Ports = r.ports.of(p.Number)
	others := r.pinnedConnections(p.Name)
	c.Connections.Open += others.Open
	c.Connections.Made += others.Made
	c.Connections.Failed += others.Failed
	c.Connections.Closed += others.Closed
	for i, v := range n.Attempts {
		c.Results[escaper.Result(i).String()] = v
	}
	if k, ok := r.kernelCounters(p.Number); ok {
		c.Bytes = control.InOut{In: k.BytesIn, Out: k.BytesOut}
		c.Packets = control.InOut{In: k.PacketsIn, Out: k.PacketsOut}
		c.Retransmits, c.GuardDrops = k.Retransmits, k.GuardDrops()
		c.RTTBuckets = histogram(&k)
		c.RTT = control.Quantiles{P50: c.RTTBuckets.Quantile(0.5), P99: c.RTTBuckets.Quantile(0.99)}
	}
	return c
}

func histogram(k *bpf.Counters) control.Histogram {
	h := control.Histogram{Sum: k.RTTSum.Seconds()}
	for i, n := range k.RTT {
		h.Count += n
		if i < bpf.RTTBuckets-1 { // the last has no bound
			h.Bounds = append(h.Bounds, bpf.RTTBound(i))
			h.Counts = append(h.Counts, h.Count)
		}
	}
	return h
}

func text(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// sourceText is what connections of a family leave from: an address, a prefix,
// or nil where there is none or main routing chooses.
func sourceText(p *escaper.Path, f selection.Family) *string {
	if n := p.Net(f); n.IsValid() {
		return text(n.String())
	}
	if a := p.Source(f); a.IsValid() {
		return text(a.String())
	}
	return nil
}
