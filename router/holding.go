package router

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"wayout/router/escaper"
	"wayout/selection"
)

// holding is what some paths, those of one escaper as a rule, come to for the
// kernel. It is worked out once: a publication to one escaper does not go
// through the paths of others.
type holding struct {
	addrs map[string][]netip.Addr   // by uplink, of those that have one
	nets  map[string][]netip.Prefix // by uplink, "" for none; each once
	bare  map[string]bool           // uplinks that paths without an address leave by

	devices []string        // interfaces that paths have to leave by, each once
	unbound []*escaper.Path // those that have only an interface
	whole   []*escaper.Path // those of a whole prefix
}

func (p *plan) hold(paths []*escaper.Path) *holding {
	h := &holding{addrs: map[string][]netip.Addr{}, nets: map[string][]netip.Prefix{}, bare: map[string]bool{}}
	seen := map[string]bool{}
	for _, path := range paths {
		if d := p.device(path); d != "" && !seen[d] {
			seen[d] = true
			h.devices = append(h.devices, d)
		}
		if path.Unbound != 0 && !path.AnySource {
			h.unbound = append(h.unbound, path)
		}
		if path.Net4.IsValid() || path.Net6.IsValid() {
			h.whole = append(h.whole, path)
			for _, n := range []netip.Prefix{path.Net4, path.Net6} {
				if n.IsValid() && !slices.Contains(h.nets[path.Uplink], n) {
					h.nets[path.Uplink] = append(h.nets[path.Uplink], n)
				}
			}
		}
		if path.Uplink == "" {
			continue
		}
		if path.Unbound != 0 {
			h.bare[path.Uplink] = true
		}
		list := h.addrs[path.Uplink]
		if path.V4.IsValid() {
			list = append(list, path.V4)
		}
		if path.V6.IsValid() {
			list = append(list, path.V6)
		}
		h.addrs[path.Uplink] = list
	}
	return h
}

// holds are the holdings of a plan's escapers, in their order.
func (p *plan) holds() []*holding {
	var all []*holding
	for _, d := range p.table.Directs() {
		all = append(all, p.holdings[d])
	}
	return all
}

// guardFacts puts into words what the guards of paths depend on that these do
// not fix: the numbers of the interfaces that they leave by, and the addresses of
// those that have none of their own.
func (h *holding) guardFacts(index map[string]uint32) string {
	var b strings.Builder
	for _, d := range h.devices {
		fmt.Fprintln(&b, d, index[d])
	}
	for _, path := range h.unbound {
		fmt.Fprintln(&b, path.Number, path.Source(selection.V4), path.Source(selection.V6))
	}
	return b.String()
}
