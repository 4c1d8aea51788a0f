package netcfg

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Metrics of our routes. Both are written out for both families, so that what is
// asked for is what is read back.
const (
	metricRoute = 1024
	// metricLast is the worst there is: whatever else is in the table comes first.
	metricLast = 0xffffffff
)

// manyAddresses is from where on single addresses are dear: the kernel's work for
// each grows with their number (5,000 take a second, 65,000 over ten minutes).
const manyAddresses = 10_000

// Mark selects packets by their fwmark.
type Mark struct {
	Value uint32
	Mask  uint32
}

// Uplink is a way off the host: a routing table, the rules that lead to it, and the
// addresses that leave by it.
type Uplink struct {
	Name      string
	Number    int // 1 to MaxUplink, and the same for as long as connections live; it chooses the table
	Interface string
	Gateway4  netip.Addr // the zero Addr: only neighbours on the link are reached
	Gateway6  netip.Addr
	Mark      Mark

	// Bare says that nodes without an address of their own leave by the uplink,
	// in both families.
	Bare bool

	ManageAddresses bool
	Addresses       []netip.Addr   // of its nodes; put on the interface when ManageAddresses is set
	Local           []netip.Prefix // of its prefix nodes; made the host's own by local routes (AnyIP)
}

// Want is the state of the kernel that a configuration asks for. One without
// uplinks, prefixes and diverts asks for nothing of ours in the Layout.
type Want struct {
	Layout  Layout
	Uplinks []Uplink
	Local   []netip.Prefix // of prefix nodes without an uplink; as Uplink.Local, and routed as the host's own traffic is
	Diverts []Divert       // each interface once
	Clients Mark           // of the clients' sides: these reach what table main has a route for, before the `from` rules; the zero Mark: they do not
	Answers Mark           // of sockets that answer what was diverted: these go to networks of table main, and else by none but the Diverts; needed with Diverts
}

// Table is the routing table of an uplink.
func (w Want) Table(u Uplink) uint32 { return w.Layout.TableBase + uint32(u.Number) - 1 }

// Validate checks what can be checked without looking at the kernel. All errors
// wrap [ErrLayout].
func (w Want) Validate() error {
	if err := w.Layout.Validate(); err != nil {
		return err
	}
	for i, u := range w.Uplinks {
		if err := u.validate(w.Layout); err != nil {
			return fmt.Errorf("%w: uplink %s: %w", ErrLayout, u.Name, err)
		}
		for _, o := range w.Uplinks[:i] {
			switch {
			case o.Name == u.Name:
				return fmt.Errorf("%w: two uplinks are named %s", ErrLayout, u.Name)
			case o.Number == u.Number:
				return fmt.Errorf("%w: uplinks %s and %s have number %d", ErrLayout, o.Name, u.Name, u.Number)
			case (o.Mark.Value^u.Mark.Value)&o.Mark.Mask&u.Mark.Mask == 0:
				return fmt.Errorf("%w: a packet can have the marks of both uplink %s and uplink %s", ErrLayout, o.Name, u.Name)
			}
		}
	}
	if err := errors.Join(w.validateGateways(), w.validateLocal()); err != nil {
		return fmt.Errorf("%w: %w", ErrLayout, err)
	}
	if err := w.validateDiverts(); err != nil {
		return fmt.Errorf("%w: %w", ErrLayout, err)
	}
	return nil
}

// validateGateways refuses to make a gateway's address one of this host's: nothing
// would get to the gateway any more.
func (w Want) validateGateways() error {
	by := map[netip.Addr]string{}
	for _, u := range w.Uplinks {
		by[u.Gateway4], by[u.Gateway6] = u.Name, u.Name
	}
	for _, u := range w.Uplinks {
		for _, a := range u.Addresses {
			if name, taken := by[a]; taken {
				return fmt.Errorf("uplink %s: address %s is the gateway of uplink %s", u.Name, a, name)
			}
		}
	}
	return nil
}

func (u Uplink) validate(l Layout) error {
	switch {
	case u.Number < 1 || u.Number > MaxUplink:
		return fmt.Errorf("number %d: want 1 to %d", u.Number, MaxUplink)
	case u.Interface == "" || len(u.Interface) >= unix.IFNAMSIZ:
		return fmt.Errorf("interface %q: want 1 to %d characters", u.Interface, unix.IFNAMSIZ-1)
	case u.Gateway4.IsValid() && !u.Gateway4.Is4():
		return fmt.Errorf("gateway4 %s is not an IPv4 address", u.Gateway4)
	case u.Gateway6.IsValid() && (!u.Gateway6.Is6() || u.Gateway6.Is4In6() || u.Gateway6.Zone() != ""):
		return fmt.Errorf("gateway6 %s is not an IPv6 address", u.Gateway6)
	case u.Mark.Value == 0 || u.Mark.Value&^u.Mark.Mask != 0 || u.Mark.Mask&^l.MarkMask != 0:
		return fmt.Errorf("mark 0x%x/0x%x: want a value that is not 0, within its mask and within mark_mask 0x%x",
			u.Mark.Value, u.Mark.Mask, l.MarkMask)
	}
	for _, a := range u.Addresses {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			return fmt.Errorf("address %s: want an IPv4 or IPv6 address without a zone", a)
		}
	}
	return nil
}

// serves says whether the uplink has anything of a family. Without, it has no
// say in how the host's own addresses of that family leave.
func (u Uplink) serves(f Family) bool {
	return u.Bare || u.gateway(f).IsValid() ||
		slices.ContainsFunc(u.Addresses, func(a netip.Addr) bool { return familyOf(a) == f }) ||
		slices.ContainsFunc(u.Local, func(p netip.Prefix) bool { return familyOf(p.Addr()) == f })
}

func (u Uplink) gateway(f Family) netip.Addr {
	if f == IPv4 {
		return u.Gateway4
	}
	return u.Gateway6
}

// wish is a Want seen against a Snapshot: the very rules, routes and addresses.
type wish struct {
	rules  []Rule
	routes []Route
	addrs  []Address
	notes  []string
}

// spell says in full what a Want comes to on the host that have shows. What an
// interface cannot take while it is missing or down is left out, and what is there
// of it stays, so that a link which flaps never opens a way around its uplink.
func (w Want) spell(have *Snapshot) wish {
	var out wish
	uplinks := slices.Clone(w.Uplinks)
	slices.SortFunc(uplinks, func(a, b Uplink) int { return a.Number - b.Number })
	fams := []Family{IPv4}
	if have.IPv6 {
		fams = append(fams, IPv6)
	}
	claims := make(map[netip.Prefix]Uplink)
	for _, u := range uplinks {
		link, ok := have.Link(u.Interface)
		switch {
		case !ok:
			out.note("uplink %s: interface %s does not exist", u.Name, u.Interface)
		case !link.Admin:
			out.note("uplink %s: interface %s is down", u.Name, u.Interface)
		}
		for _, f := range fams {
			out.routes = append(out.routes, lastResort(f, w.Table(u)))
			out.rules = append(out.rules, w.markRule(f, u))
			near := have.neighbours(link, f)
			if ok && link.Admin {
				out.routes = append(out.routes, w.uplinkRoutes(f, u, link, near)...)
			} else {
				out.rules = append(out.rules, w.fromRulesThere(have, f, u)...)
			}
			if !u.serves(f) {
				continue
			}
			for _, p := range near.sources {
				w.claim(claims, p, u, &out)
			}
		}
		out.addrs = append(out.addrs, w.addresses(have, u, link, ok, &out)...)
	}
	for _, f := range fams {
		if len(uplinks) > 0 && w.Clients.Mask != 0 {
			out.rules = append(out.rules, w.clientRule(f))
		}
		w.divert(have, f, &out)
	}
	out.routes = append(out.routes, w.localRoutes(have)...)
	out.routes = append(out.routes, w.exceptions(have)...)
	w.claimLocal(have, uplinks, claims, &out)
	for p, u := range claims {
		if r := w.fromRule(p, u); !slices.Contains(out.rules, r) {
			out.rules = append(out.rules, r)
		}
	}
	return out
}

func (o *wish) note(format string, args ...any) {
	o.notes = append(o.notes, fmt.Sprintf(format, args...))
}

// claim gives a source prefix to an uplink. One that two uplinks have goes to the
// one whose gateway is in it, else to the one with the lower number.
func (w Want) claim(claims map[netip.Prefix]Uplink, p netip.Prefix, u Uplink, out *wish) {
	first, taken := claims[p]
	if !taken {
		claims[p] = u
		return
	}
	f := familyOf(p.Addr())
	had, has := p.Contains(first.gateway(f)), p.Contains(u.gateway(f))
	if has && !had {
		claims[p] = u
		return
	}
	if has == had {
		out.note("uplinks %s and %s are both on %s: packets from it that have no mark leave by %s", first.Name, u.Name, p, first.Name)
	}
}

// lastResort is the route that keeps a table's packets from falling through to the
// next one when its other routes have gone.
func lastResort(f Family, table uint32) Route {
	return Route{
		Family: f, Table: table, Type: RouteUnreachable, Protocol: Protocol,
		Dst: f.defaultPrefix(), Metric: metricLast,
	}
}

func (w Want) markRule(f Family, u Uplink) Rule {
	return Rule{
		Family: f, Priority: w.Layout.RulePriority, Table: w.Table(u), Mark: u.Mark.Value, Mask: u.Mark.Mask,
		Action: actionLookup, Protocol: Protocol,
	}
}

// clientRule lets answers to clients go back to the networks that the host is on,
// or has a route to: a client behind one interface may well have connected to an
// address of another, which is an uplink's, and the `from` rule of that would send
// the answers to the uplink's gateway. What only a default route leads to is left
// to the `from` rules.
func (w Want) clientRule(f Family) Rule {
	return Rule{
		Family: f, Priority: w.Layout.RulePriority, Table: TableMain, Mark: w.Clients.Value, Mask: w.Clients.Mask,
		Near: true, Action: actionLookup, Protocol: Protocol,
	}
}

// fromRule sends the host's own packets from an uplink's prefix by that uplink.
// The `iif lo` keeps it to those: packets that are forwarded from a neighbour, to a
// container for one, go their old way. The kernel's reverse path check looks its
// route up with `iif lo` too.
func (w Want) fromRule(p netip.Prefix, u Uplink) Rule {
	return Rule{
		Family: familyOf(p.Addr()), Priority: w.Layout.RulePriority + priorityFrom + uint32(p.Addr().BitLen()-p.Bits()),
		Table: w.Table(u), Src: p, IIF: "lo", Action: actionLookup, Protocol: Protocol,
	}
}

// fromRulesThere gives the source rules of an uplink that the kernel has.
func (w Want) fromRulesThere(have *Snapshot, f Family, u Uplink) []Rule {
	var out []Rule
	for _, r := range have.Rules {
		if r.Family == f && r.Table == w.Table(u) && r.Src.IsValid() && r == w.fromRule(r.Src, u) {
			out = append(out, r)
		}
	}
	return out
}

// uplinkRoutes are the routes of an uplink's table by its interface.
func (w Want) uplinkRoutes(f Family, u Uplink, link Link, near neighbours) []Route {
	var out []Route
	scope := uint8(unix.RT_SCOPE_LINK)
	if f == IPv6 {
		scope = unix.RT_SCOPE_UNIVERSE // IPv6 routes have no scope
	}
	for _, p := range near.routes {
		out = append(out, Route{
			Family: f, Table: w.Table(u), Type: RouteUnicast, Scope: scope, Protocol: Protocol,
			Dst: p, LinkIndex: link.Index, Metric: metricRoute,
		})
	}
	if gw := u.gateway(f); gw.IsValid() {
		out = append(out, Route{
			Family: f, Table: w.Table(u), Type: RouteUnicast, Protocol: Protocol,
			Dst: f.defaultPrefix(), Gateway: gw, LinkIndex: link.Index, Metric: metricRoute,
			OnLink: near.lack(gw),
		})
	}
	return out
}

// addresses are those that have to be on the interface by our doing. One that
// somebody else put on an interface is left as it is.
func (w Want) addresses(have *Snapshot, u Uplink, link Link, ok bool, out *wish) []Address {
	if !u.ManageAddresses || !ok {
		return nil
	}
	if n := len(u.Addresses); n > manyAddresses {
		out.note("uplink %s: the kernel is slow with %d single addresses on an interface; a prefix node holds as many with one route", u.Name, n)
	}
	var list []Address
	seen := make(map[netip.Addr]bool, len(u.Addresses))
	for _, addr := range u.Addresses {
		if seen[addr] || addr.Is6() && !have.IPv6 {
			continue
		}
		seen[addr] = true
		var mine, foreign bool
		for _, a := range have.Addrs[addr] {
			switch {
			case !w.Layout.ownsAddr(a, have.AddrProto):
				foreign = true
				if a.LinkIndex != link.Index {
					out.note("uplink %s: address %s is on interface %s, not on %s", u.Name, addr, have.Links[a.LinkIndex].Name, link.Name)
				}
			case a.LinkIndex == link.Index:
				mine = true
				list = append(list, a)
			}
		}
		// An IPv6 address does not outlive its interface's going down.
		if mine || foreign || addr.Is6() && !link.Admin {
			continue
		}
		a := Address{
			Addr: addr, Prefix: addr.BitLen(), LinkIndex: link.Index,
			Metric: w.Table(u), NoPrefixRoute: true, Ours: true,
			// What does not say where it leaves from, the host's own traffic and what
			// is masqueraded, takes another address while there is one. IPv4 prefers
			// those that were there before by itself.
			Deprecated: addr.Is6(),
		}
		if have.AddrProto {
			a.Protocol = Protocol
		}
		list = append(list, a)
	}
	return list
}

// ownsAddr says whether an address was put there by us. Where the kernel keeps
// IFA_PROTO that and the metric say so, else the reader's list does.
func (l Layout) ownsAddr(a Address, kept bool) bool {
	if kept {
		return a.Protocol == Protocol && l.ownsTable(a.Metric)
	}
	return a.Ours
}

func (l Layout) ownsRule(r Rule) bool {
	table := l.ownsTable(r.Table) || r.Table == TableMain && (r.Mask != 0 || r.Dst.IsValid())
	return r.Protocol == Protocol && l.ownsPriority(r.Priority) && table &&
		r.Action == actionLookup && !r.Invert && !r.Other && r.OIF == ""
}

func (l Layout) ownsRoute(r Route) bool {
	if r.Protocol != Protocol || r.Other {
		return false
	}
	return l.ownsTable(r.Table) || r.Table == TableLocal && l.ownsTable(r.Metric)
}

// neighbours is what an interface reaches without a gateway.
type neighbours struct {
	routes  []netip.Prefix // for its uplink's table
	sources []netip.Prefix // those that the host has an address in, for the `from` rules
}

// neighbours reads them off the interface's addresses and off its on-link routes in
// table main, which is where network managers put the prefixes of addresses that
// they add without a prefix route. Link-local prefixes are of no use beyond the
// link and left out.
func (s *Snapshot) neighbours(link Link, f Family) neighbours {
	var n neighbours
	if link.Index == 0 {
		return n
	}
	var own []netip.Addr // addresses that are not of our doing
	for _, a := range s.list {
		if a.LinkIndex != link.Index || familyOf(a.Addr) != f || a.Ours || a.LinkScope ||
			a.Addr.IsLinkLocalUnicast() || a.Addr.IsLoopback() {
			continue
		}
		own = append(own, a.Addr)
		if p := a.onLink(); !a.NoPrefixRoute && p.Bits() < p.Addr().BitLen() {
			n.add(p, true)
		}
	}
	for _, r := range s.Routes {
		if r.Family != f || r.Table != TableMain || r.LinkIndex != link.Index || r.Protocol == Protocol || !r.isConnected() ||
			r.Dst.Addr().IsLinkLocalUnicast() || r.Dst.Addr().IsMulticast() {
			continue
		}
		// Half the internet by this interface (0.0.0.0/1, as VPNs do) is a route,
		// but no prefix whose packets are the interface's.
		source := r.Dst.Bits() >= shortestSource(f) && r.Dst.Bits() < r.Dst.Addr().BitLen() &&
			slices.ContainsFunc(own, r.Dst.Contains)
		n.add(r.Dst, source)
	}
	// A host whose only address stands alone, as with clouds and point-to-point
	// links. Several such are not taken: rules must not grow with addresses.
	if len(n.sources) == 0 && len(own) == 1 {
		n.sources = append(n.sources, netip.PrefixFrom(own[0], own[0].BitLen()))
	}
	return n
}

func (n *neighbours) add(p netip.Prefix, source bool) {
	if !slices.Contains(n.routes, p) {
		n.routes = append(n.routes, p)
	}
	if source && !slices.Contains(n.sources, p) {
		n.sources = append(n.sources, p)
	}
}

// lack says whether a gateway is in no network of the link, so that a route by it has
// to say that it is there all the same.
func (n neighbours) lack(gateway netip.Addr) bool {
	return !gateway.IsLinkLocalUnicast() && !slices.ContainsFunc(n.routes, func(p netip.Prefix) bool { return p.Contains(gateway) })
}

func shortestSource(f Family) int {
	if f == IPv4 {
		return 8
	}
	return 32
}
