package main

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/scripts/lab"
)

func TestPrefixFindings(t *testing.T) {
	a, b := lab.TestNS(t, "host"), lab.TestNS(t, "isp")
	if err := lab.Veth(a, "eth0", b, "host0"); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"2001:db8:1::2/64", "198.51.100.2/24"} {
		if err := a.AddAddr("eth0", netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	var onLink *netcfg.Snapshot
	if err := a.Do(func() (err error) { onLink, err = netcfg.Read(); return err }); err != nil {
		t.Fatal(err)
	}
	six, elsewhere := netip.MustParsePrefix("2001:db8:1::/64"), netip.MustParsePrefix("2001:db8:beef::/64")
	four := netip.MustParsePrefix("198.51.100.128/25")
	for name, c := range map[string]struct {
		net       netip.Prefix
		neighbour string
		ignore    int
		responder error
		level     string
		says      string
	}{
		"shared":                      {net: six, neighbour: "auto", level: levelOK, says: "wayout answers"},
		"shared, and off":             {net: six, neighbour: "off", level: levelWarning, says: "neighbour: auto"},
		"shared, on an old kernel":    {net: six, neighbour: "auto", responder: errors.New("no tcx"), level: levelWarning, says: "route the prefix"},
		"elsewhere":                   {net: elsewhere, neighbour: "auto", level: levelNote, says: "neighbour: answer"},
		"elsewhere, answered":         {net: elsewhere, neighbour: "answer", level: levelOK, says: "wayout answers"},
		"elsewhere, routed":           {net: elsewhere, neighbour: "off", level: levelNote, says: "ask the upstream"},
		"IPv4, shared":                {net: four, neighbour: "auto", level: levelOK, says: "answers ARP"},
		"IPv4, shared, ARP is silent": {net: four, neighbour: "auto", ignore: 1, level: levelWarning, says: "arp_ignore=0"},
	} {
		t.Run(name, func(t *testing.T) {
			n := config.Node{Uplink: "isp1"}
			if c.net.Addr().Is4() {
				n.Net4 = c.net
			} else {
				n.Net6 = c.net
			}
			conf := &config.Config{
				Uplinks:  []config.Uplink{{Name: "isp1", Interface: "eth0"}},
				Escapers: []config.Escaper{{Name: "out", Neighbour: c.neighbour, Nodes: []config.Node{n}}},
			}
			all := examinePrefixes(onLink, netcfg.Sysctls{ARPIgnore: map[string]int{"eth0": c.ignore}}, bpf.Feature{Err: c.responder, Remedy: "have the upstream route the prefix"}, conf)
			if len(all) != 1 || all[0].Level != c.level || !strings.Contains(all[0].Found+" "+all[0].Remedy, c.says) {
				t.Errorf("%+v", all)
			}
		})
	}
}
