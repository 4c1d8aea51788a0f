package main

import (
	"slices"

	"wayout/netcfg"
	"wayout/router/config"
)

// examineRedirects looks at interfaces whose traffic is diverted and which lead off
// the host as well. What is forwarded out where it came in has the kernel tell the
// client of a shorter way to that destination, which the client takes for all that
// it has to say there, diverted ports too.
func examineRedirects(dir sysctlDir, s *netcfg.Snapshot, c *config.Config) []finding {
	const means = "where a client has said something that is not diverted, it is told to leave the host out, for diverted ports too"
	var all []finding
	for _, name := range redirecting(s, c) {
		if dir.value("net/ipv4/conf/"+name+"/forwarding") == "1" {
			on := false
			for _, conf := range []string{"all", name} { // one of both is enough
				path := "net/ipv4/conf/" + conf + "/send_redirects"
				if dir.value(path) != "1" {
					continue
				}
				on = true
				all = append(all, finding{
					Name: sysctlName(path), Level: levelWarning, Found: "1", Means: means,
					Remedy: "sysctl -w " + sysctlName(path) + "=0", fix: setSysctl(path, "0"),
				})
			}
			if !on {
				all = append(all, finding{Name: "ICMP redirects from " + name, Level: levelOK, Found: "off"})
			}
		}
		if via := linkLocalGateway(s, name); via != "" && dir.value("net/ipv6/conf/"+name+"/forwarding") == "1" {
			all = append(all, finding{
				Name: "ICMPv6 redirects from " + name, Level: levelNote, Found: "sent for the gateway " + via, Means: means + "; Linux has no setting for that",
				Remedy: `write the gateway as a global address, or nft add rule inet FILTER OUTPUT oifname "` + name + `" icmpv6 type nd-redirect drop, or rest: drop`,
			})
		}
	}
	return all
}

// redirecting are the interfaces in question, each once.
func redirecting(s *netcfg.Snapshot, c *config.Config) []string {
	var names []string
	for _, sc := range c.Servers {
		for _, name := range sc.Interface {
			uplink := slices.ContainsFunc(c.Uplinks, func(u config.Uplink) bool { return u.Interface == name })
			if sc.Rest != "drop" && !slices.Contains(names, name) && (uplink || len(defaultRoutes(s, name)) > 0) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return names
}

// defaultRoutes are those of table main by an interface.
func defaultRoutes(s *netcfg.Snapshot, name string) []netcfg.Route {
	l, ok := s.Link(name)
	if !ok {
		return nil
	}
	var all []netcfg.Route
	for _, r := range s.Routes {
		if r.Table == netcfg.TableMain && r.LinkIndex == l.Index && r.Dst.Bits() == 0 {
			all = append(all, r)
		}
	}
	return all
}

// linkLocalGateway is where forwarded IPv6 leaves by an interface, when that is an
// address that redirects can name (ndisc_send_redirect); "" when it is not.
func linkLocalGateway(s *netcfg.Snapshot, name string) string {
	for _, r := range defaultRoutes(s, name) {
		if r.Gateway.Is6() && r.Gateway.IsLinkLocalUnicast() {
			return r.Gateway.String()
		}
	}
	return ""
}
