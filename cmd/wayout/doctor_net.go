package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"wayout/netcfg"
	"wayout/router/config"
)

// sysctlDir is where the settings are; procSys, but for tests.
type sysctlDir string

// procSys are the settings of this process's network namespace.
const procSys sysctlDir = "/proc/sys"

// value is a setting, by its path (net/ipv4/tcp_tw_reuse), with single spaces
// between its words; "" when this kernel has none of the name or it may not be
// read.
func (d sysctlDir) value(path string) string {
	b, err := os.ReadFile(filepath.Join(string(d), path))
	if err != nil {
		return ""
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

// sysctlName is how sysctl(8) and sysctl.d(5) call a setting: with dots, unless
// the name of an interface holds some.
func sysctlName(path string) string {
	if strings.Contains(path, ".") {
		return path
	}
	return strings.ReplaceAll(path, "/", ".")
}

// The range of ports that Linux chooses local ports from unless it is told
// otherwise, and from how many on there is nothing to say.
const (
	defaultPorts = "32768 60999"
	fewPorts     = 60999 - 32768 + 1
	manyPorts    = 40000
)

// portsIn is how many ports a range has.
func portsIn(text string) (int, bool) {
	w := strings.Fields(text)
	if len(w) != 2 {
		return 0, false
	}
	low, err1 := strconv.Atoi(w[0])
	high, err2 := strconv.Atoi(w[1])
	return high - low + 1, err1 == nil && err2 == nil && low <= high
}

// examineSysctls looks at what bounds the number of connections.
func examineSysctls(s netcfg.Sysctls) []finding {
	ports := finding{Name: s.PortRange.Name, Level: levelOK, Found: s.PortRange.Value}
	if n, ok := portsIn(s.PortRange.Value); ok && n < manyPorts {
		ports.Level = levelNote
		ports.Means = fmt.Sprintf("one address holds %d connections to one destination", n)
		ports.Remedy = `sysctl -w net.ipv4.ip_local_port_range="1025 65535", if no service of the host listens there`
		if n < fewPorts {
			ports.Level = levelWarning
			ports.fix = setSysctl("net/ipv4/ip_local_port_range", defaultPorts)
		}
	}
	reuse := finding{Name: s.TimeWaitReuse.Name, Level: levelOK, Found: s.TimeWaitReuse.Value}
	if s.TimeWaitReuse.Set && s.TimeWaitReuse.Value != "1" {
		reuse.Level = levelWarning
		reuse.Means = "a port in TIME_WAIT serves again after a minute; with 1 after a second"
		reuse.Remedy = "sysctl -w net.ipv4.tcp_tw_reuse=1"
		reuse.fix = setSysctl("net/ipv4/tcp_tw_reuse", "1")
	}
	all := []finding{ports, reuse}
	if s.Timestamps.Set && s.Timestamps.Value == "0" {
		all = append(all, finding{
			Name: s.Timestamps.Name, Level: levelWarning, Found: "0",
			Means: "tcp_tw_reuse does nothing without them", Remedy: "sysctl -w net.ipv4.tcp_timestamps=1",
		})
	}
	if s.Conntrack.Set {
		all = append(all, examineConntrack(s.Conntrack.Value, s.ConntrackMax.Value))
	}
	return all
}

// examineConntrack: count and limit of the entries are as /proc/sys has them.
func examineConntrack(count, limit string) finding {
	x := finding{
		Name: "connection tracking", Level: levelNote, Found: count + " of " + limit + " entries",
		Means:  "each connection of a path takes an entry; a full table drops the next one's packets",
		Remedy: "sysctl -w net.netfilter.nf_conntrack_max=1048576, or exempt the paths' addresses (notrack)",
	}
	n, err1 := strconv.Atoi(count)
	most, err2 := strconv.Atoi(limit)
	if err1 == nil && err2 == nil && n >= most/5*4 {
		x.Level = levelWarning
	}
	return x
}

// examineReversePath looks at the interfaces of the uplinks: with the strict
// check the answer to a packet that left by a rule of ours may be dropped.
func examineReversePath(s netcfg.Sysctls, c *config.Config) []finding {
	var all []finding
	for _, u := range c.Uplinks {
		x := finding{Name: "reverse path check of " + u.Interface, Level: levelOK, Found: "off or loose"}
		strictness, there := s.ReversePath[u.Interface]
		switch {
		case !there:
			x.Level, x.Found = levelNote, "there is no such interface"
		case strictness == 1 && s.SrcValidMark.Value == "1":
			x.Found = "strict, by the mark too"
		case strictness == 1:
			x.Level, x.Found = levelWarning, "strict"
			x.Means = "the kernel drops answers to addresses that are not of the interface's own networks; for those that are, wayout's rules by source prefix satisfy it"
			path := "net/ipv4/conf/" + u.Interface + "/rp_filter"
			x.Remedy = "sysctl -w " + sysctlName(path) + "=2"
			x.fix = setSysctl(path, "2")
		}
		all = append(all, x)
	}
	return all
}

// wantsIPv6 says which interfaces paths with IPv6 addresses leave by; "" stands
// for the host's main routing.
func wantsIPv6(c *config.Config) map[string]bool {
	devices := map[string]string{}
	for _, u := range c.Uplinks {
		devices[u.Name] = u.Interface
	}
	wants := map[string]bool{}
	for _, e := range c.Escapers {
		for _, n := range e.Nodes {
			device := n.Interface
			if device == "" {
				device = devices[n.Uplink]
			}
			if n.IPv6.IsValid() {
				wants[device] = true
			}
		}
	}
	return wants
}

// examineIPv6 looks for what keeps IPv6 away from the paths that have it.
func examineIPv6(sys sysctlDir, c *config.Config) []finding {
	wants := wantsIPv6(c)
	x := finding{Name: "IPv6", Level: levelOK}
	switch sys.value("net/ipv6/conf/all/disable_ipv6") {
	case "":
		x.Found, x.Remedy = "the kernel is without it", "boot without ipv6.disable=1, or: modprobe ipv6"
	case "1":
		x.Found, x.Remedy = "switched off", "sysctl -w net.ipv6.conf.all.disable_ipv6=0"
	default:
		all := []finding{x}
		for _, u := range c.Uplinks {
			all = append(all, examineUplink6(sys, u, wants[u.Interface])...)
		}
		return all
	}
	x.Level = levelNote
	if len(wants) > 0 {
		x.Level, x.Means = levelWarning, "paths with IPv6 addresses are down for IPv6"
	}
	return []finding{x}
}

// examineUplink6 looks at IPv6 on an uplink's interface. What is not wanted
// there is nothing to speak of.
func examineUplink6(sys sysctlDir, u config.Uplink, wanted bool) []finding {
	conf := "net/ipv6/conf/" + u.Interface + "/"
	if !wanted && !u.Gateway6.IsValid() {
		return nil
	}
	if sys.value(conf+"disable_ipv6") == "1" {
		return []finding{{
			Name: "IPv6 of " + u.Interface, Level: levelWarning, Found: "switched off",
			Means: "paths with IPv6 addresses are down for IPv6", Remedy: "sysctl -w " + sysctlName(conf+"disable_ipv6") + "=0",
		}}
	}
	x := finding{Name: "router advertisements of " + u.Interface, Level: levelOK}
	if sys.value(conf+"forwarding") != "1" || sys.value(conf+"accept_ra") != "1" {
		return []finding{x}
	}
	// Documentation/networking/ip-sysctl.rst: accept_ra=1 takes them only
	// while the interface does not forward.
	x.Level, x.Found = levelNote, "not accepted, because the interface forwards IPv6"
	x.Means = "nothing while gateway6 is configured and the addresses are static"
	x.Remedy = "sysctl -w " + sysctlName(conf+"accept_ra") + "=2"
	if !u.Gateway6.IsValid() {
		x.Level = levelWarning
		x.Means = "addresses and routes that came by them expire; the uplink has no gateway6 of its own"
	}
	return []finding{x}
}

// examineRules looks for policy routing rules of others that packets of ours
// may match.
func examineRules(s *netcfg.Snapshot, layout netcfg.Layout) []finding {
	var all []finding
	for _, r := range s.ForeignRules(layout) {
		if r.MarkMatches {
			all = append(all, finding{
				Name: "foreign rule that matches our marks", Level: levelBlocker, Found: r.Rule.String(),
				Means:  "it takes packets of the paths to where it says",
				Remedy: fmt.Sprintf("leave its bits out of netcfg.mark_mask (now 0x%x)", layout.MarkMask),
			})
			continue
		}
		all = append(all, finding{
			Name: "foreign rule ahead of ours", Level: levelNote, Found: r.Rule.String(),
			Means:  "it may take packets of the paths before wayout's rules see them",
			Remedy: fmt.Sprintf("if it does, set netcfg.rule_priority below its priority (now %d)", layout.RulePriority),
		})
	}
	return all
}

// examineNAT names what would change the source of a packet on the way out.
func examineNAT(nat netcfg.NAT) []finding {
	const name = "source address translation on the way out"
	var all []finding
	for _, r := range nat.Rules {
		all = append(all, finding{
			Name: name, Level: levelWarning, Found: r,
			Means:  "packets of a path that it matches leave by another address than promised, or are dropped by the guard",
			Remedy: "exempt the paths' addresses, before that rule: nft insert rule FAMILY TABLE CHAIN ip saddr ADDRESS accept",
		})
	}
	for _, u := range nat.Unknown {
		all = append(all, finding{Name: name, Level: levelNote, Found: u, Means: "what changes the source of a path's packets there is not seen"})
	}
	if len(all) == 0 {
		all = []finding{{Name: name, Level: levelOK, Found: "none"}}
	}
	return all
}
