package main

import (
	"fmt"
	"net/netip"
	"slices"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
)

// examinePrefixes says of each whole prefix who has to lead its packets here:
// the upstream by a route, or this host by answering for all of its addresses
// on a shared link.
func examinePrefixes(s *netcfg.Snapshot, sys netcfg.Sysctls, responder bpf.Feature, c *config.Config) []finding {
	uplinks := map[string]string{}
	for _, u := range c.Uplinks {
		uplinks[u.Name] = u.Interface
	}
	var all []finding
	for i := range c.Escapers {
		e := &c.Escapers[i]
		for _, n := range e.Nodes {
			device := n.Interface
			if device == "" {
				device = uplinks[n.Uplink]
			}
			for _, p := range []netip.Prefix{n.Net4, n.Net6} {
				if p.IsValid() {
					all = append(all, examinePrefix(s, sys, responder, e, p, device))
				}
			}
		}
	}
	return all
}

func examinePrefix(s *netcfg.Snapshot, sys netcfg.Sysctls, responder bpf.Feature, e *config.Escaper, p netip.Prefix, device string) finding {
	f := finding{Name: "prefix " + p.String(), Level: levelOK}
	on := device
	shared := device != "" && s.OnLink(p, device)
	if device == "" {
		for _, l := range s.Links {
			if !l.Loopback && s.OnLink(p, l.Name) {
				on, shared = l.Name, true
			}
		}
	}
	answered := p.Addr().Is6() && (e.Neighbour == "answer" && device != "" || e.Neighbour != "off" && shared)
	switch {
	case answered && responder.Err != nil:
		f.Level, f.Found = levelWarning, responder.Err.Error()
		f.Means = "nobody answers for its addresses on " + on
		f.Remedy = responder.Remedy
	case answered:
		f.Found = fmt.Sprintf("on the link of %s: wayout answers neighbour solicitations for all of it", on)
	case p.Addr().Is6() && shared:
		f.Level, f.Found = levelWarning, fmt.Sprintf("on the link of %s, and neighbour is off", on)
		f.Means = "nobody answers for its addresses, unless the upstream routes it to this host all the same"
		f.Remedy = "neighbour: auto in escaper " + e.Name
	case shared && sys.ARPIgnore[on] > 0:
		f.Level, f.Found = levelWarning, fmt.Sprintf("on the link of %s, whose arp_ignore is %d", on, sys.ARPIgnore[on])
		f.Means = "the kernel answers ARP for none of its addresses"
		f.Remedy = "sysctl -w net.ipv4.conf." + on + ".arp_ignore=0"
	case shared:
		f.Found = fmt.Sprintf("on the link of %s: the kernel answers ARP for all of it", on)
	default:
		f.Level, f.Found = levelNote, "on no link of this host"
		f.Means = "the upstream has to route it to this host"
		f.Remedy = "ask the upstream for a route to " + p.String() + " by this host's address"
		if slices.Contains([]string{"", "auto"}, e.Neighbour) && p.Addr().Is6() {
			f.Remedy += "; or neighbour: answer, if it takes the prefix to be on the link"
		}
	}
	return f
}
