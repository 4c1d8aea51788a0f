package netcfg

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// A prefix node's addresses are the host's own by one local route (AnyIP). The kernel
// asks table local before any other, so that such a route would make the gateway's
// own address the host's too, when that lies in the prefix. Measured on Linux 6.18:
// connections through the gateway go on, but those to it reach the host itself,
// nothing it sends is answered, and it gets no ARP answers (its packets have a source
// that is ours). So each gateway in a prefix has an exception in table local,
// that sends the lookup on to the next rule.

// manyPrefixes is from where on the rules of prefixes are dear: the kernel looks at
// each for every new connection (1,000 rules take 22 us).
const manyPrefixes = 256

// validateLocal checks the prefixes of prefix nodes.
func (w Want) validateLocal() error {
	owner := make(map[netip.Prefix]string)
	check := func(who string, list []netip.Prefix) error {
		for _, p := range list {
			switch other, taken := owner[p]; {
			case !p.IsValid() || p.Masked() != p || p.Addr().Is4In6():
				return fmt.Errorf("%s: prefix %s: want a prefix without host bits", who, p)
			case p.Bits() < shortestSource(familyOf(p.Addr())):
				return fmt.Errorf("%s: prefix %s: want /%d or longer", who, p, shortestSource(familyOf(p.Addr())))
			case !p.Addr().IsGlobalUnicast():
				return fmt.Errorf("%s: prefix %s: want global unicast addresses", who, p)
			case taken && other != who:
				return fmt.Errorf("prefix %s is of both %s and %s", p, other, who)
			}
			owner[p] = who
		}
		return nil
	}
	if err := check("no uplink", w.Local); err != nil {
		return err
	}
	for _, u := range w.Uplinks {
		if err := check("uplink "+u.Name, u.Local); err != nil {
			return err
		}
	}
	for _, u := range w.Uplinks {
		for _, gw := range []netip.Addr{u.Gateway4, u.Gateway6} {
			if !gw.IsValid() {
				continue
			}
			if who, taken := owner[netip.PrefixFrom(gw, gw.BitLen())]; taken {
				return fmt.Errorf("%s: prefix %s/%d is the gateway of uplink %s", who, gw, gw.BitLen(), u.Name)
			}
		}
	}
	return nil
}

// localRoutes make whole prefixes the host's own.
func (w Want) localRoutes(have *Snapshot) []Route {
	lo := have.loopback()
	var out []Route
	add := func(list []netip.Prefix, metric uint32) {
		for _, p := range list {
			f, scope := familyOf(p.Addr()), uint8(unix.RT_SCOPE_HOST)
			if f == IPv6 {
				if !have.IPv6 {
					continue
				}
				scope = unix.RT_SCOPE_UNIVERSE
			}
			r := Route{
				Family: f, Table: TableLocal, Type: RouteLocal, Scope: scope, Protocol: Protocol,
				Dst: p, LinkIndex: lo.Index, Metric: metric,
			}
			if !slices.Contains(out, r) {
				out = append(out, r)
			}
		}
	}
	for _, u := range w.Uplinks {
		add(u.Local, w.Table(u))
	}
	add(w.Local, w.Layout.sharedMetric())
	return out
}

// claimLocal gives each prefix of an uplink's prefix nodes to the uplink, so that
// packets from it which have no mark (the kernel's own resets, late
// acknowledgements) take the same way, and the reverse path check lets replies in.
func (w Want) claimLocal(have *Snapshot, uplinks []Uplink, claims map[netip.Prefix]Uplink, out *wish) {
	n := 0
	for _, u := range uplinks {
		for _, p := range u.Local {
			if p.Addr().Is6() && !have.IPv6 {
				continue
			}
			if first, taken := claims[p]; taken && first.Number != u.Number {
				out.note("uplink %s is on %s, which is a prefix of uplink %s: packets from it that have no mark leave by %s",
					first.Name, p, u.Name, u.Name)
			}
			claims[p] = u
			n++
		}
	}
	if n > manyPrefixes {
		out.note("the kernel looks at a rule for each of %d prefixes of uplinks; a shorter prefix takes one for all", n)
	}
}

// nextHop is a gateway of the host's.
type nextHop struct {
	addr netip.Addr
	link int // 0: an uplink's
}

// gateways are those of the uplinks and of the default routes of others, of both
// families, each once, in order. Link-local ones lie in no prefix of ours.
func (w Want) gateways(have *Snapshot) []nextHop {
	var out []nextHop
	add := func(a netip.Addr, link int) {
		if a.IsValid() && !a.IsLinkLocalUnicast() && !slices.ContainsFunc(out, func(h nextHop) bool { return h.addr == a }) {
			out = append(out, nextHop{a, link})
		}
	}
	for _, u := range w.Uplinks {
		add(u.Gateway4, 0)
		add(u.Gateway6, 0)
	}
	for _, r := range have.Routes {
		if r.Dst.Bits() == 0 && r.Type == RouteUnicast && !w.Layout.ownsRoute(r) && familyOf(r.Gateway) == r.Family {
			add(r.Gateway, r.LinkIndex)
		}
	}
	slices.SortFunc(out, func(a, b nextHop) int { return a.addr.Compare(b.addr) })
	return out
}

// exceptions keep gateways that lie in a prefix of ours what they are. The next rules
// decide how they are reached: an uplink's for its packets, table main for others.
func (w Want) exceptions(have *Snapshot) []Route {
	var out []Route
	for _, h := range w.gateways(have) {
		f := familyOf(h.addr)
		if f == IPv6 && !have.IPv6 || !w.isLocal(h.addr) {
			continue
		}
		r := Route{
			Family: f, Table: TableLocal, Type: RouteThrow, Protocol: Protocol,
			Dst: netip.PrefixFrom(h.addr, h.addr.BitLen()), Metric: w.Layout.sharedMetric(),
		}
		// Until a rule is added the kernel keeps IPv4's tables local and main as one,
		// and a lookup that is sent on skips both (measured). Without uplinks and diverts we
		// add no rule, but then there is only one way to the gateway.
		if f == IPv4 && len(w.Uplinks) == 0 && len(w.Diverts) == 0 {
			r.Type, r.Scope, r.LinkIndex = RouteUnicast, unix.RT_SCOPE_LINK, h.link
		}
		out = append(out, r)
	}
	return out
}

// isLocal says whether an address is in a prefix of ours.
func (w Want) isLocal(a netip.Addr) bool {
	has := func(p netip.Prefix) bool { return p.Contains(a) }
	return slices.ContainsFunc(w.Local, has) ||
		slices.ContainsFunc(w.Uplinks, func(u Uplink) bool { return slices.ContainsFunc(u.Local, has) })
}

// Reserved gives, in order, the addresses in a prefix of ours that are not for use:
// no path may send from them, and nobody may answer for them. They are the
// gateways, and of each prefix that is on a link of the host the first address (the
// network of IPv4, the routers' anycast address of IPv6, RFC 4291 section 2.6.1) and
// IPv4's last (broadcast).
func (w Want) Reserved(have *Snapshot, p netip.Prefix) []netip.Addr {
	f := familyOf(p.Addr())
	out := have.Broadcasts()
	for _, h := range w.gateways(have) {
		out = append(out, h.addr)
	}
	for _, l := range have.Links {
		for _, q := range have.neighbours(l, f).routes {
			if q.Addr().BitLen()-q.Bits() < 2 { // links of two ends have neither (RFC 3021, RFC 6164)
				continue
			}
			out = append(out, q.Addr())
			if f == IPv4 {
				out = append(out, last(q))
			}
		}
	}
	out = slices.DeleteFunc(out, func(a netip.Addr) bool { return !p.Contains(a) })
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// last is the highest address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
