package escaper

import (
	"math/rand/v2"
	"net/netip"
	"slices"

	"wayout/selection"
)

// sources are the addresses that one request's sockets are bound to, one of
// each family that its path serves.
type sources struct {
	v4, v6 netip.Addr
	fresh  selection.Family // drawn for this request: no other connection is meant to have them
}

// of returns the address for a family, the zero Addr for none: no socket must
// be bound to that.
func (s *sources) of(f selection.Family) netip.Addr {
	if f == selection.V4 {
		return s.v4
	}
	return s.v6
}

// sources returns what the request's sockets are bound to. The path has to be
// known. What it draws of a whole prefix stays the same for the request.
func (c *choice) sources(r *Request) sources {
	if c.drawn {
		return c.src
	}
	c.drawn = true
	c.src = sources{v4: c.p.source(selection.V4), v6: c.p.source(selection.V6)}
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		if c.p.Net(f).IsValid() {
			c.draw(r, f)
		}
	}
	return c.src
}

// draw takes an address of the path's prefix: the one that was selected, the
// session's, or a new one.
func (c *choice) draw(r *Request, f selection.Family) {
	n, at := c.p.Net4, &c.src.v4
	if f == selection.V6 {
		n, at = c.p.Net6, &c.src.v6
	}
	if c.addr.IsValid() {
		if selection.FamilyOf(c.addr) == f {
			*at = c.addr
		}
		return // and nothing of the other family
	}
	if o := &r.Selection.Session; o.Name != "" {
		g := c.d.sessions.generation(r)
		who := r.Group + "/" + r.User
		for {
			*at = selection.AddrIn(n, selection.KeySession(who, c.p.Name, o.Name, g), 0)
			if !c.p.isReserved(*at) {
				return
			}
			g += 1 << 32 // somebody else has it: another of the session's, and always the same
		}
	}
	c.src.fresh |= f
	for {
		if *at = selection.AddrIn(n, rand.Uint64(), rand.Uint64()); !c.p.isReserved(*at) {
			return
		}
	}
}

// Reserve says which addresses in the path's prefixes are not for use, because
// somebody else has them: gateways, for one. None of them is drawn, and a
// request that selects one is refused. The list is not to be changed.
func (p *Path) Reserve(addrs []netip.Addr) { p.reserved.Store(&addrs) }

// isReserved looks through a few addresses.
func (p *Path) isReserved(a netip.Addr) bool {
	list := p.reserved.Load()
	return list != nil && slices.Contains(*list, a)
}
