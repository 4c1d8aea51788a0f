package escaper

import (
	"net/netip"
	"sync/atomic"

	"wayout/selection"
)

// Host is what every egress filter has to know of the host: its own addresses
// and wayout's own listeners. The zero value knows of none. Set swaps all of
// it at once and may be called while filters read it.
type Host struct{ p atomic.Pointer[hostFacts] }

type hostFacts struct {
	own       map[[16]byte]struct{} // As16: a netip.Addr is slow to hash
	nets      []netip.Prefix        // own prefixes of more than one address
	listeners map[uint16]*listeners
}

// listeners are wayout's own on one port.
type listeners struct {
	at   []netip.Addr
	wild selection.Family // what the wildcard ones among them take
}

// Set says which addresses are the host's own and where wayout listens. An
// own prefix that is not a single address is a range that the host answers
// for as a whole (that of a prefix node). Loopback addresses may be among
// them; the class loopback is what decides about those. A listener on 0.0.0.0
// stands for every own IPv4 address and for loopback, one on [::] for IPv6 as
// well.
func (h *Host) Set(own []netip.Prefix, listening []netip.AddrPort) {
	f := &hostFacts{
		own:       make(map[[16]byte]struct{}, len(own)),
		listeners: make(map[uint16]*listeners),
	}
	for _, p := range own {
		switch p = unmapPrefix(p).Masked(); {
		case !p.IsValid():
		case p.IsSingleIP():
			f.own[p.Addr().As16()] = struct{}{}
		default:
			f.nets = append(f.nets, p)
		}
	}
	for _, ap := range listening {
		l := f.listeners[ap.Port()]
		if l == nil {
			l = &listeners{}
			f.listeners[ap.Port()] = l
		}
		switch a := ap.Addr().WithZone("").Unmap(); {
		case !a.IsValid():
		case a == netip.IPv4Unspecified():
			l.wild |= selection.V4
		case a.IsUnspecified():
			l.wild |= selection.V4 | selection.V6
		default:
			l.at = append(l.at, a)
		}
	}
	h.p.Store(f)
}

// owns reports whether a is the host's own.
func (f *hostFacts) owns(a netip.Addr) bool {
	if f == nil {
		return false
	}
	if _, ok := f.own[a.As16()]; ok {
		return true
	}
	for _, p := range f.nets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// listens reports whether a connection to a and port would reach a listener of
// wayout itself. The kernel connects the unspecified address to loopback.
func (f *hostFacts) listens(a netip.Addr, port uint16) bool {
	if f == nil {
		return false
	}
	l := f.listeners[port]
	if l == nil {
		return false
	}
	for _, at := range l.at {
		if at == a || a.IsUnspecified() && at.IsLoopback() {
			return true
		}
	}
	return l.wild&selection.FamilyOf(a) != 0 && (a.IsLoopback() || a.IsUnspecified() || f.owns(a))
}

// unmapPrefix turns ::ffff:a.b.c.d/n into a.b.c.d/(n-96).
func unmapPrefix(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}
