package router

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/relay"
	"wayout/router/tproxy"
	"wayout/selection"
)

// tap is what a server has to take traffic that is for other addresses than its
// sockets have: diverted traffic, or what is for a whole prefix.
type tap struct {
	tcp4, tcp6 *relay.Listener // among the server's listeners too; nil: none
	udp        *tproxy.Sockets // of flows that are not served yet
	flows      *tproxy.Datagrams
	options    tproxy.Options // of the flows, once they are served
}

// taps says whether a server has traffic handed to it.
func taps(sc *config.Server) bool { return sc.Type == "tproxy" || len(sc.ListenNets) > 0 }

// tapping says whether a server of the configuration has.
func tapping(c *config.Config) bool {
	return slices.ContainsFunc(c.Servers, func(sc config.Server) bool { return taps(&sc) })
}

// buildTransparent makes the front end of a tproxy.
func (r *Router) buildTransparent(p *plan, s *server) error {
	sc := s.conf
	open, dropped := r.counters.Server(sc.Name).CountDatagrams()
	s.tap.options = tproxy.Options{
		Name: sc.Name, Escaper: sc.Escaper, Group: p.groups[sc.UserGroup], Selection: sc.Select.Map,
		TunnelIdle: sc.TunnelIdleTimeout, FlowIdle: sc.UDPIdleTimeout, Flows: sc.UDPFlows,
		Meter: r.meters.of("server "+sc.Name, sc.Limits), FlowsOpen: open, DatagramsDropped: dropped,
		Admit: r.limits.admit, Open: p.door.Open, OpenPacket: p.door.OpenPacket, Relay: r.relay, Front: s.front, Logger: r.log,
		Observe: observe(r.access, r.counters, r.counters.Server(sc.Name)), Prompt: r.access.log == nil,
	}
	if sc.Sniff {
		s.tap.options.Sniff = sc.SniffTimeout
	}
	front, err := tproxy.New(s.tap.options)
	if err != nil {
		return err
	}
	s.serve = front.Serve
	return nil
}

// openTap opens the sockets that the kernel is to hand traffic to. Those of the
// old server of the same name are shared, and its flows go on.
func (r *Router) openTap(p *plan, s *server, old []*server) error {
	sc := s.conf
	var was *tap
	for _, o := range old {
		if o.conf.Name == sc.Name && o.conf.Type == sc.Type {
			was = &o.tap
		}
	}
	if was == nil {
		was = &tap{}
	}
	four, six, udp := false, false, false
	mark := p.client
	if sc.Type == "tproxy" {
		mark = p.answers.Value
		tcp := slices.ContainsFunc(sc.Divert, func(v config.Divert) bool { return v.TCP })
		udp = slices.ContainsFunc(sc.Divert, func(v config.Divert) bool { return !v.TCP })
		four, six = tcp, tcp && tproxy.HasIPv6()
	}
	for _, n := range sc.ListenNets {
		four, six = four || n.Prefix.Addr().Is4(), six || n.Prefix.Addr().Is6()
	}
	for _, x := range []struct {
		wanted bool
		f      selection.Family
		was    *relay.Listener
		to     **relay.Listener
	}{{four, selection.V4, was.tcp4, &s.tap.tcp4}, {six, selection.V6, was.tcp6, &s.tap.tcp6}} {
		if !x.wanted {
			continue
		}
		l, err := shareOr(x.was, func() (*relay.Listener, error) { return tproxy.ListenStream(x.f, mark) })
		if err != nil {
			return err
		}
		*x.to = l
		s.listeners = append(s.listeners, l)
	}
	switch {
	case !udp:
	case was.flows != nil:
		s.tap.flows = was.flows
	default:
		var err error
		if s.tap.udp, err = tproxy.OpenSockets(mark); err != nil {
			return err
		}
	}
	return nil
}

func shareOr(l *relay.Listener, open func() (*relay.Listener, error)) (*relay.Listener, error) {
	if l == nil {
		return open()
	}
	return l.Share()
}

// serveFlows lets a server's flows begin, or go on by its options.
func (r *Router) serveFlows(s *server) {
	var err error
	switch {
	case s.tap.flows != nil:
		err = s.tap.flows.Use(s.tap.options)
	case s.tap.udp != nil:
		s.tap.flows, err = tproxy.NewDatagrams(s.tap.options, s.tap.udp)
	}
	r.fail(err)
}

// keepFlows takes from old servers the flows that new ones go on with.
func keepFlows(old, now []*server) {
	for _, o := range old {
		for _, n := range now {
			if o.tap.flows != nil && o.tap.flows == n.tap.flows {
				o.tap.flows = nil
			}
		}
	}
}

// closeTaps closes the sockets of flows that nobody serves yet.
func closeTaps(servers []*server) error {
	var errs []error
	for _, s := range servers {
		if s.tap.flows == nil && s.tap.udp != nil {
			errs = append(errs, s.tap.udp.Close())
		}
	}
	return errors.Join(errs...)
}

// sockets are those of a tap, as the kernel's program has them.
func (t *tap) sockets() bpf.DivertSockets {
	var out bpf.DivertSockets
	if t.tcp4 != nil {
		out.TCP4 = t.tcp4
	}
	if t.tcp6 != nil {
		out.TCP6 = t.tcp6
	}
	udp := t.udp
	if t.flows != nil {
		udp = t.flows.Sockets()
	}
	if udp == nil {
		return out
	}
	v4, v6 := udp.Near()
	if v4 != nil {
		out.UDP4 = v4
	}
	if v6 != nil {
		out.UDP6 = v6
	}
	return out
}

// unopened are the servers of a configuration before they have sockets: what is
// theirs is dropped.
func unopened(c *config.Config) []*server {
	var all []*server
	for i := range c.Servers {
		all = append(all, &server{conf: &c.Servers[i]})
	}
	return all
}

// diversion is what the kernel is to hand to servers, the first of which goes
// before the others. What rules lead here and none of them takes, since another
// configuration wanted it, is dropped.
func diversion(servers []*server, s *netcfg.Snapshot, l netcfg.Layout) bpf.Diversion {
	var v bpf.Diversion
	add := func(e bpf.DivertEntry) { // but for what an earlier one takes whole
		e.Server = len(v.Sockets) - 1
		if !slices.ContainsFunc(v.Entries, func(o bpf.DivertEntry) bool {
			o.Server = e.Server
			return o == e
		}) {
			v.Entries = append(v.Entries, e)
		}
	}
	on := func(name string, protocol uint8, first, last uint16) {
		l, ok := s.Link(name)
		// The rules are there already for one that is yet to come.
		add(bpf.DivertEntry{Interface: uint32(l.Index), Absent: !ok, Protocol: protocol, First: first, Last: last})
	}
	for _, srv := range servers {
		if !taps(srv.conf) {
			continue
		}
		v.Sockets = append(v.Sockets, srv.tap.sockets())
		for _, n := range srv.conf.ListenNets {
			add(bpf.DivertEntry{Prefix: n.Prefix, Protocol: unix.IPPROTO_TCP, First: n.First, Last: n.Last})
		}
		for _, name := range srv.conf.Interface {
			for _, d := range srv.conf.Divert {
				on(name, protocol(d), d.First, d.Last)
			}
		}
	}
	v.Sockets = append(v.Sockets, bpf.DivertSockets{})
	for _, d := range s.Diverted(l) {
		for _, p := range d.Ports {
			on(d.Interface, p.Protocol, p.First, p.Last)
		}
	}
	return v
}

func protocol(d config.Divert) uint8 {
	if d.TCP {
		return unix.IPPROTO_TCP
	}
	return unix.IPPROTO_UDP
}

// diverts are the interfaces whose traffic the network's rules lead here.
func diverts(c *config.Config) []netcfg.Divert {
	var all []netcfg.Divert
	for _, sc := range c.Servers {
		for _, name := range sc.Interface {
			i := slices.IndexFunc(all, func(d netcfg.Divert) bool { return d.Interface == name })
			if i < 0 {
				i = len(all)
				all = append(all, netcfg.Divert{Interface: name})
			}
			if sc.Rest == "drop" {
				all[i].Rest = netcfg.RestDrop
			}
			for _, d := range sc.Divert {
				all[i].Ports = append(all[i].Ports, netcfg.DivertPorts{Protocol: protocol(d), First: d.First, Last: d.Last})
			}
		}
	}
	return all
}

// divertDir is where the diverting programs of a daemon are pinned, beside those
// that end with it.
func divertDir(mount string, c *config.Config) string {
	return filepath.Join(mount, "wayout", instance(c)+"-divert")
}

// openDiverter opens what diverts. Without pins nothing would stop diverted
// traffic when the daemon ends.
func openDiverter(c *config.Config, k *netcfg.Netlink) (*bpf.Diverter, error) {
	mount, err := bpf.BPFFS(true)
	if err != nil {
		return nil, fmt.Errorf("diverted traffic has to be stopped when the daemon ends: %w", err)
	}
	return bpf.NewDiverter(divertDir(mount, c), k)
}

// cleanDiverter removes what an earlier run has left.
func cleanDiverter(c *config.Config, k *netcfg.Netlink) error {
	mount, err := bpf.BPFFS(false)
	if errors.Is(err, bpf.ErrNotMounted) { // what is not pinned may be there all the same
		return bpf.CleanIngress(k, filepath.Base(divertDir("", c)))
	}
	if err != nil {
		return err
	}
	return bpf.CleanDivert(divertDir(mount, c), k)
}

// divert has the kernel hand to servers what is theirs.
func (r *Router) divert(servers []*server, s *netcfg.Snapshot) error {
	k := r.kernel
	if k.diverter == nil {
		if !slices.ContainsFunc(servers, func(s *server) bool { return taps(s.conf) }) {
			return nil
		}
		var err error
		if k.diverter, err = openDiverter(r.o.Config, k.net); err != nil {
			return err
		}
	}
	v := diversion(servers, s, r.want.Layout)
	v.Mark, v.Mask = r.plan.answers.Value, r.plan.answers.Mask
	k.diverted = nil // not known, should this fail: it is tried again
	if err := takeOver(k.diverter, v, s); err != nil {
		return err
	}
	k.diverted = v.Entries
	r.tally.divert(k.diverter, v.Entries, s)
	return nil
}

// takeOver puts a Diversion in force on the host that s shows.
func takeOver(d *bpf.Diverter, v bpf.Diversion, s *netcfg.Snapshot) error {
	// Its own addresses first: a moment later they would be taken. Interfaces last:
	// what comes by one that no entry knows yet is dropped.
	if err := d.SetOwn(s.Own()); err != nil {
		return err
	}
	if err := d.Set(v); err != nil {
		return err
	}
	return d.SetLinks(slices.Collect(maps.Values(indexes(s))))
}

// knowOwn exempts the host's own addresses, as they are now, from what is diverted.
func (r *Router) knowOwn() error {
	have, err := r.kernel.net.Read()
	if err != nil {
		return err
	}
	return r.kernel.diverter.SetOwn(have.Own())
}

// followDiverts brings what is diverted in line with the host's addresses and
// interfaces.
func (r *Router) followDiverts(s *netcfg.Snapshot) {
	k := r.kernel
	if k.diverter == nil {
		return
	}
	if err := k.diverter.SetOwn(s.Own()); err != nil {
		r.log.Error("the host's own addresses cannot be exempted from what is diverted", "err", err)
	}
	if !slices.Equal(diversion(r.servers, s, r.want.Layout).Entries, k.diverted) {
		if err := r.divert(r.servers, s); err != nil {
			r.log.Error("traffic cannot be diverted", "err", err)
		}
		return
	}
	if err := k.diverter.SetLinks(slices.Collect(maps.Values(indexes(s)))); err != nil {
		r.log.Error("interfaces cannot be told from those that are new", "err", err)
	}
}

// restoreDiverts puts back what others have taken off an interface together with
// its queueing discipline.
func (r *Router) restoreDiverts() {
	if r.kernel.diverter == nil {
		return
	}
	restored, err := r.kernel.diverter.Restore()
	if err != nil {
		r.log.Error("fragments of diverted traffic cannot be dropped", "err", err)
	}
	for _, index := range restored {
		r.log.Warn("the program that drops fragments was taken off and is put back", "index", index)
	}
}

// divertBoth has the kernel hand to the servers of the next configuration what
// is theirs, and go on taking what only the old one's do.
func (r *Router) divertBoth(next []*server) error {
	have, err := r.kernel.net.Read()
	if err != nil {
		return err
	}
	return r.divert(slices.Concat(next, r.servers), have)
}

// settleDiverts ends what only servers before took, rules first: what they lead
// here and nobody takes would be the host's own.
func (r *Router) settleDiverts() {
	if r.kernel.diverter == nil {
		return
	}
	have, err := r.kernel.net.Read()
	if err == nil {
		err = netcfg.Diff(have, r.want).Deletes().Apply(r.kernel.net)
	}
	if err == nil {
		have, err = r.kernel.net.Read()
	}
	if err == nil {
		err = r.divert(r.servers, have)
	}
	if err != nil {
		r.log.Error("what was diverted before cannot be let go", "err", err)
	}
}

// closeDiverter ends the diverting. What comes for a tproxy stays stopped, until
// the next start or clean.
func (r *Router) closeDiverter() error {
	d := r.kernel.diverter
	if d == nil {
		return nil
	}
	r.kernel.diverter = nil
	r.tally.divert(nil, nil, nil)
	c := r.plan.config
	if len(r.want.Diverts) == 0 {
		return errors.Join(d.Close(), cleanDiverter(r.o.Config, r.kernel.net))
	}
	r.log.Info("diverted traffic stays stopped: wayout clean lifts that")
	return errors.Join(hold(d, c, r.kernel.net), d.Close())
}

// hold stops what a configuration diverts, as the host is now.
func hold(d *bpf.Diverter, c *config.Config, k *netcfg.Netlink) error {
	have, err := k.Read()
	if err != nil {
		return err
	}
	layout, err := markLayout(c)
	if err != nil {
		return err
	}
	rest := slices.DeleteFunc(unopened(c), func(s *server) bool { return s.conf.Type != "tproxy" })
	v := diversion(rest, have, NetLayout(c))
	v.Mark, v.Mask = layout.Answers()
	return takeOver(d, v, have)
}

// ErrDaemonDiverts: a running daemon diverts other traffic than a configuration says.
var ErrDaemonDiverts = errors.New("nothing was changed, since a daemon runs that diverts other traffic: wayout reload has it read its configuration again")

// applyHolding makes the network as a configuration wants it. What that diverts is
// stopped before rules lead it here, and until a daemon takes it.
//
// Beside a daemon it adds what is missing and takes nothing away, which would end
// connections of paths that the daemon has and the configuration has not. What is
// diverted is the daemon's to change: for a moment without rules, or without sockets
// for what they lead here, traffic would go by.
func applyHolding(c *config.Config, k *netcfg.Netlink, todo *difference) (err error) {
	changes := todo.plan.Diverts(NetLayout(c))
	claim, err := k.Claim()
	switch {
	case errors.Is(err, netcfg.ErrClaimed) && changes:
		return fmt.Errorf("%w (%w)", ErrDaemonDiverts, err)
	case errors.Is(err, netcfg.ErrClaimed):
		if left := len(todo.plan.Deletes().Ops); left > 0 {
			todo.plan = todo.plan.Adds()
			todo.plan.Notes = append(todo.plan.Notes, fmt.Sprintf("a daemon runs that has %d addresses, routes and rules beyond these, which stay: wayout reload has it read its configuration again", left))
		}
		return todo.apply(netcfg.Plan.Adds)
	case err != nil:
		return err
	}
	defer func() { err = errors.Join(err, claim.Close()) }()
	if !tapping(c) && !changes {
		return todo.apply(nil)
	}
	d, err := openDiverter(c, k)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := hold(d, c, k); err != nil {
		return err
	}
	if err := todo.apply(nil); err != nil {
		return err
	}
	if len(diverts(c)) == 0 { // the rules have gone
		return cleanDiverter(c, k)
	}
	// Addresses that it has just made are the host's own.
	return hold(d, c, k)
}

// listeningNets stands for the prefixes that a server listens on: their ports, on
// every own address of the family.
func listeningNets(sc *config.Server) []netip.AddrPort {
	var all []netip.AddrPort
	for _, n := range sc.ListenNets {
		any := netip.IPv6Unspecified()
		if n.Prefix.Addr().Is4() {
			any = netip.IPv4Unspecified()
		}
		for port := uint32(n.First); port <= uint32(n.Last); port++ {
			all = append(all, netip.AddrPortFrom(any, uint16(port)))
		}
	}
	return all
}
