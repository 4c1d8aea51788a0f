package netcfg

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// What comes in by some interfaces and is to be forwarded can be delivered to the
// host itself instead: rules lead it to a table whose only route is a local one for
// everything. Which socket gets it is decided elsewhere. A packet for an address of the
// host never comes to these rules, because table local is asked first. The kernel
// looks at the ports of every packet for such rules, but of fragments it knows the
// protocol alone (measured on Linux 6.18): a rule with ports lets all of them by.

// Divert is an interface, and what of its traffic the host keeps for itself.
type Divert struct {
	Interface string // need not exist yet
	Ports     []DivertPorts
	Rest      Rest
}

// Rest is what becomes of the traffic of an interface that no DivertPorts name.
type Rest uint8

// The kinds of Rest.
const (
	RestForward Rest = iota // as before
	RestDrop                // what is not for the host itself goes nowhere
)

// DivertPorts are destination ports, both ends included; 0 and 65535 are whatever
// has the protocol.
type DivertPorts struct {
	Protocol    uint8 // unix.IPPROTO_TCP or IPPROTO_UDP
	First, Last uint16
}

// Offsets of the rule priorities in a Layout: those before `from PREFIX`, and those
// behind.
const (
	priorityKnown   = 1 // answers to networks of table main
	priorityAnswers = 2 // those to others
	priorityHost    = 3
	priorityFrom    = 4 // and 128 more

	priorityBetween = 133
	priorityNear    = 134
	priorityDivert  = 135
	priorityRest    = 136
)

// divertTable is the table that delivers everything to the host, restTable the
// one that delivers nothing, and answersTable has the ways to clients that are in no
// network that table main knows.
func (l Layout) divertTable() uint32  { return l.TableBase + Tables - 2 }
func (l Layout) restTable() uint32    { return l.TableBase + Tables - 3 }
func (l Layout) answersTable() uint32 { return l.TableBase + Tables - 4 }

func (w Want) validateDiverts() error {
	names := make(map[string]bool)
	for _, d := range w.Diverts {
		switch {
		case d.Interface == "" || len(d.Interface) >= unix.IFNAMSIZ:
			return fmt.Errorf("divert: interface %q: want 1 to %d characters", d.Interface, unix.IFNAMSIZ-1)
		case names[d.Interface]:
			return fmt.Errorf("divert: interface %s is there twice", d.Interface)
		}
		names[d.Interface] = true
		for i, p := range d.Ports {
			switch {
			case p.Protocol != unix.IPPROTO_TCP && p.Protocol != unix.IPPROTO_UDP:
				return fmt.Errorf("divert: interface %s: protocol %d is neither TCP nor UDP", d.Interface, p.Protocol)
			case p.First > p.Last, p.First == 0 && p.Last != 65535:
				return fmt.Errorf("divert: interface %s: ports %d to %d", d.Interface, p.First, p.Last)
			case slices.Contains(d.Ports[:i], p):
				return fmt.Errorf("divert: interface %s: ports %d to %d are there twice", d.Interface, p.First, p.Last)
			}
		}
	}
	if m := w.Answers; len(w.Diverts) > 0 && (m.Value == 0 || m.Value&^m.Mask != 0 || m.Mask&^w.Layout.MarkMask != 0) {
		return fmt.Errorf("divert: mark 0x%x/0x%x: want a value that is not 0, within its mask and within mark_mask 0x%x", m.Value, m.Mask, w.Layout.MarkMask)
	}
	return nil
}

// divert spells out the rules and routes of the Diverts. Interfaces are named and not
// looked for: a rule for one that is yet to come leaves no moment without it.
func (w Want) divert(have *Snapshot, f Family, out *wish) {
	if len(w.Diverts) == 0 {
		return
	}
	scope := uint8(unix.RT_SCOPE_HOST)
	if f == IPv6 {
		scope = unix.RT_SCOPE_UNIVERSE
	}
	out.routes = append(out.routes, lastResort(f, w.Layout.divertTable()), Route{
		Family: f, Table: w.Layout.divertTable(), Type: RouteLocal, Scope: scope, Protocol: Protocol,
		Dst: f.defaultPrefix(), LinkIndex: have.loopback().Index, Metric: metricRoute,
	})
	if slices.ContainsFunc(w.Diverts, func(d Divert) bool { return d.Rest == RestDrop }) {
		out.routes = append(out.routes, lastResort(f, w.Layout.restTable()))
	}
	// Answers have the addresses of other hosts, which may lie in a prefix that an
	// uplink's `from` rule sends away. A client may be in no network that the host
	// knows, since its interface has just gone, or because it says so (IPv6 has no
	// reverse path check): the default route would have the answers leave by an uplink.
	out.routes = append(out.routes, lastResort(f, w.Layout.answersTable()))
	out.routes = append(out.routes, w.answerRoutes(have, f)...)
	out.rules = append(out.rules, w.foreignRules(have, f)...)
	out.rules = append(out.rules, Rule{
		Family: f, Priority: w.Layout.RulePriority + priorityKnown, Table: TableMain, Mark: w.Answers.Value, Mask: w.Answers.Mask,
		IIF: "lo", Near: true, Action: actionLookup, Protocol: Protocol,
	}, Rule{
		Family: f, Priority: w.Layout.RulePriority + priorityAnswers, Table: w.Layout.answersTable(),
		Mark: w.Answers.Value, Mask: w.Answers.Mask, IIF: "lo", Action: actionLookup, Protocol: Protocol,
	})
	out.rules = append(out.rules, w.answerRules(have, f)...)
	for _, d := range w.Diverts {
		// What comes in with their mark is about them: ICMP errors of clients, and of
		// routers on the way to these, that who diverts has marked.
		out.rules = append(out.rules, Rule{
			Family: f, Priority: w.Layout.RulePriority + priorityDivert, Table: w.Layout.divertTable(), IIF: d.Interface,
			Mark: w.Answers.Value, Mask: w.Answers.Mask, Action: actionLookup, Protocol: Protocol,
		})
		out.rules = append(out.rules, w.divertRules(f, d, priorityDivert, netip.Prefix{})...)
		out.rules = append(out.rules, w.nearRules(have, f, d)...)
		if d.Rest == RestDrop {
			out.rules = append(out.rules, Rule{
				Family: f, Priority: w.Layout.RulePriority + priorityRest, Table: w.Layout.restTable(), IIF: d.Interface,
				Action: actionLookup, Protocol: Protocol,
			})
		}
	}
}

// answerRoutes are the default routes of table main by interfaces whose traffic is
// diverted: of these clients may be anywhere.
func (w Want) answerRoutes(have *Snapshot, f Family) []Route {
	var out []Route
	for _, r := range have.Routes {
		link, ok := have.Links[r.LinkIndex]
		if !ok || !link.Admin || !w.diverts(link.Name) || r.Family != f || r.Table != TableMain || r.Type != RouteUnicast ||
			r.Dst.Bits() != 0 || r.Other {
			continue
		}
		r.Table, r.Protocol, r.Down = w.Layout.answersTable(), Protocol, false
		r.OnLink = r.Gateway.IsValid() && have.neighbours(link, f).lack(r.Gateway)
		if !slices.ContainsFunc(out, func(o Route) bool { return o.key() == r.key() }) {
			out = append(out, r)
		}
	}
	return out
}

// foreignRules keep answers off the networks of uplinks, where no client is that came
// by another interface, whatever it says: its address there would be a way for
// answers to leave by the uplink. A network that one of clients is in is spared.
func (w Want) foreignRules(have *Snapshot, f Family) []Rule {
	var out []Rule
	for _, u := range w.Uplinks {
		link, ok := have.Link(u.Interface)
		if !ok || w.diverts(u.Interface) {
			continue
		}
		for _, p := range have.neighbours(link, f).sources {
			r := Rule{
				Family: f, Priority: w.Layout.RulePriority, Table: w.Layout.answersTable(), Dst: p,
				Mark: w.Answers.Value, Mask: w.Answers.Mask, IIF: "lo", Action: actionLookup, Protocol: Protocol,
			}
			if !w.clientsIn(have, f, p) && !slices.Contains(out, r) {
				out = append(out, r)
			}
		}
	}
	return out
}

// clientsIn says whether a network of an interface whose traffic is diverted lies in
// another one.
func (w Want) clientsIn(have *Snapshot, f Family, p netip.Prefix) bool {
	return slices.ContainsFunc(w.Diverts, func(d Divert) bool {
		link, ok := have.Link(d.Interface)
		return ok && slices.ContainsFunc(have.neighbours(link, f).routes, p.Overlaps)
	})
}

// diverts says whether traffic of an interface is diverted.
func (w Want) diverts(name string) bool {
	return slices.ContainsFunc(w.Diverts, func(d Divert) bool { return d.Interface == name })
}

// divertRules lead what is diverted to the table that delivers it: all of it, or
// what goes from a network to that network.
func (w Want) divertRules(f Family, d Divert, priority uint32, between netip.Prefix) []Rule {
	var out []Rule
	for _, p := range d.Ports {
		r := Rule{
			Family: f, Priority: w.Layout.RulePriority + priority, Table: w.Layout.divertTable(), IIF: d.Interface,
			Src: between, Dst: between, IPProto: p.Protocol, Action: actionLookup, Protocol: Protocol,
		}
		if p.First != 0 {
			r.DPort = PortRange{p.First, p.Last}
		}
		out = append(out, r)
	}
	return out
}

// nearRules let what is for an interface's own networks go there as before: an answer
// from elsewhere, or what an address translation turns back to where it came from.
//
// Where an interface leads to clients and off the host alike, they are more than
// a courtesy. By the kernel's reverse path check a packet that goes out where it has
// come in has to have a way back, which is looked up with both ends swapped, ports
// too: a client's answer from port 443 would find that its way back is diverted,
// to a local address, and be dropped (__fib_validate_source, Linux 6.18). Its
// networks may be those of a provider, where neighbours are strangers: what goes
// from one to another by way of the host is diverted there.
func (w Want) nearRules(have *Snapshot, f Family, d Divert) []Rule {
	link, ok := have.Link(d.Interface)
	if !ok || d.Rest == RestDrop {
		return nil
	}
	var out []Rule
	for _, p := range have.neighbours(link, f).sources {
		if p.IsSingleIP() {
			continue // the host's own address
		}
		if w.leadsOff(have, link) {
			out = append(out, w.divertRules(f, d, priorityBetween, p)...)
		}
		out = append(out, Rule{
			Family: f, Priority: w.Layout.RulePriority + priorityNear, Table: TableMain, Dst: p, IIF: d.Interface, Near: true,
			Action: actionLookup, Protocol: Protocol,
		})
	}
	return out
}

// leadsOff says whether packets leave the host by a link: it has an uplink, or a
// default route of table main.
func (w Want) leadsOff(have *Snapshot, link Link) bool {
	return slices.ContainsFunc(w.Uplinks, func(u Uplink) bool { return u.Interface == link.Name }) ||
		slices.ContainsFunc(have.Routes, func(r Route) bool {
			return r.Table == TableMain && r.LinkIndex == link.Index && r.Dst.Bits() == 0
		})
}

// answerRules let the host's own services answer clients that are on the link of an
// interface whose traffic is diverted: they may well have connected to an address of
// an uplink's, whose `from` rule would send the answers to the uplink's gateway. An
// uplink's interface is left out: its networks are not for another uplink's packets.
func (w Want) answerRules(have *Snapshot, f Family) []Rule {
	if len(w.Uplinks) == 0 {
		return nil
	}
	var out []Rule
	for _, d := range w.Diverts {
		link, ok := have.Link(d.Interface)
		if !ok || slices.ContainsFunc(w.Uplinks, func(u Uplink) bool { return u.Interface == d.Interface }) {
			continue
		}
		for _, p := range have.neighbours(link, f).sources {
			r := Rule{
				Family: f, Priority: w.Layout.RulePriority + priorityHost, Table: TableMain, Dst: p, IIF: "lo",
				Near: true, Action: actionLookup, Protocol: Protocol,
			}
			if !slices.Contains(out, r) {
				out = append(out, r)
			}
		}
	}
	return out
}

// Diverted is what the rules of ours that are there lead to the host itself, whoever
// wanted it: by interfaces, each once, in the order of the rules.
func (s *Snapshot) Diverted(l Layout) []Divert {
	var all []Divert
	for _, r := range s.Rules {
		if !l.ownsRule(r) || r.IIF == "" || r.IPProto == 0 || r.Table != l.divertTable() {
			continue
		}
		p := DivertPorts{Protocol: r.IPProto, First: r.DPort.First, Last: r.DPort.Last}
		if r.DPort == (PortRange{}) {
			p.Last = 65535
		}
		i := slices.IndexFunc(all, func(d Divert) bool { return d.Interface == r.IIF })
		if i < 0 {
			i = len(all)
			all = append(all, Divert{Interface: r.IIF})
		}
		if !slices.Contains(all[i].Ports, p) { // the rule of the other family
			all[i].Ports = append(all[i].Ports, p)
		}
	}
	return all
}

// Diverts says whether the plan changes what is led to the host itself, or stopped
// because it is not.
func (p Plan) Diverts(l Layout) bool {
	return slices.ContainsFunc(p.Ops, func(o Op) bool {
		return o.Kind == KindRule && (o.Rule.Table == l.divertTable() || o.Rule.Table == l.restTable())
	})
}

// loopback is the interface lo; the zero Link when it is not there.
func (s *Snapshot) loopback() Link {
	for _, l := range s.Links {
		if l.Loopback {
			return l
		}
	}
	return Link{}
}
