package main

import (
	"fmt"
	"slices"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
)

// examineDiverts says whether the host can take traffic for others, and for
// whole prefixes, where the configuration asks for that.
func examineDiverts(s *netcfg.Snapshot, l netcfg.Layout, lookup, fragments bpf.Feature, c *config.Config) []finding {
	var all []finding
	needed := false
	var interfaces []string
	for _, sc := range c.Servers {
		needed = needed || sc.Type == "tproxy" || len(sc.ListenNets) > 0
		interfaces = append(interfaces, sc.Interface...)
	}
	if !needed {
		return nil
	}
	all = append(all, neededFeature(lookup))
	if len(interfaces) > 0 { // a prefix in listen wants no program on an interface
		all = append(all, neededFeature(fragments))
	}
	slices.Sort(interfaces)
	for _, name := range slices.Compact(interfaces) {
		f := finding{Name: "traffic from " + name, Level: levelOK}
		if _, ok := s.Link(name); !ok {
			f.Level, f.Found, f.Means = levelNote, "no such interface", "its traffic is taken once it is there"
		}
		// What these rules take is not asked about ports any more.
		for _, r := range s.ForeignRules(l) {
			if r.Ahead && !r.MarkMatches && (r.Rule.IIF == "" || r.Rule.IIF == name) {
				f.Level, f.Found = levelWarning, "a rule comes first: "+r.Rule.String()
				f.Means = "what it takes is forwarded past wayout"
				f.Remedy = fmt.Sprintf("set netcfg.rule_priority below its priority (now %d)", l.RulePriority)
			}
		}
		all = append(all, f)
	}
	return all
}

func neededFeature(can bpf.Feature) finding {
	f := finding{Name: can.Name, Level: levelOK}
	if can.Err != nil {
		f.Level, f.Found, f.Remedy = levelBlocker, can.Err.Error(), can.Remedy
		f.Means = "needed for " + can.Need
	}
	return f
}
