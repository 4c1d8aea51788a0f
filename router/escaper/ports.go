package escaper

import "net/netip"

// AllDatagrams stands, among targets, for whom datagrams go to: their sockets take
// a port for all of them.
func AllDatagrams() netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Unspecified(), 0) }

// SetCrowded says towards whom the path has few local ports left: Spill then
// prefers other paths.
func (p *Path) SetCrowded(targets []netip.AddrPort) {
	if len(targets) == 0 {
		p.crowded.Store(nil)
		return
	}
	m := make(map[netip.AddrPort]bool, len(targets))
	for _, t := range targets {
		m[t] = true
	}
	p.crowded.Store(&m)
}

// Crowded reports whether the path has few local ports left towards a target.
func (p *Path) Crowded(to netip.AddrPort) bool {
	m := p.crowded.Load()
	return m != nil && (*m)[to]
}
