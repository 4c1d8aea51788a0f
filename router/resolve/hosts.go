package resolve

import (
	"bytes"
	"net/netip"
	"slices"
)

// hosts is what the hosts file says of each name (lower case, no trailing dot). A name that it knows is never asked of a
// server, not even for a family that the file does not give: what the host's owner has pinned or blocked there stays so.
type hosts map[string]Answer

// parseHosts reads a hosts file: an address, white space, a name and its aliases; # starts a comment. Lines whose address does
// not parse or has a zone (it could not be dialled without), and names that are none, are passed over. A name on several lines
// has the addresses of all.
func parseHosts(data []byte) hosts {
	h := hosts{}
	for line := range bytes.Lines(data) {
		line, _, _ = bytes.Cut(line, []byte{'#'})
		var addr netip.Addr
		for i, field := range bytes.Fields(line) {
			if i == 0 {
				a, err := netip.ParseAddr(string(field))
				if err != nil || a.Zone() != "" {
					break
				}
				addr = a.Unmap()
				continue
			}
			var n name
			if !n.set(string(field)) {
				continue
			}
			a := h[string(n.host())]
			if addr.Is4() {
				a.V4 = add(a.V4, addr)
			} else {
				a.V6 = add(a.V6, addr)
			}
			h[string(n.host())] = a
		}
	}
	return h
}

// staticHosts is Options.Static in the form in which it is looked up. Each of its names is known, also one of whose addresses
// none is of use: it is denied and not asked.
func (r *Resolver) staticHosts() hosts {
	h := hosts{}
	for host, list := range r.opt.Static {
		var n name
		if !n.set(host) {
			r.opt.Log.Warn("static host is not a host name", "host", host)
			continue
		}
		a := h[string(n.host())]
		for _, addr := range list {
			addr = addr.Unmap()
			switch {
			case !addr.IsValid() || addr.Zone() != "":
			case addr.Is4():
				a.V4 = add(a.V4, addr)
			default:
				a.V6 = add(a.V6, addr)
			}
		}
		h[string(n.host())] = a
	}
	return h
}

// add appends what is not there yet, up to maxAddrs, and leaves no spare room.
func add(list []netip.Addr, a netip.Addr) []netip.Addr {
	if len(list) >= maxAddrs || slices.Contains(list, a) {
		return list
	}
	return slices.Clip(append(list, a))
}
