package router

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/scripts/lab"
)

// TestDiversionOfAbsent: an interface that is yet to come takes nothing from those
// that are there, wherever the configuration has it.
func TestDiversionOfAbsent(t *testing.T) {
	host, client := lab.TestNS(t, "host"), lab.TestNS(t, "client")
	if err := lab.Veth(host, "lan0", client, "eth0"); err != nil {
		t.Fatal(err)
	}
	var s *netcfg.Snapshot
	if err := host.Do(func() (err error) { s, err = netcfg.Read(); return err }); err != nil {
		t.Fatal(err)
	}
	lan, _ := s.Link("lan0")
	https := []config.Divert{{TCP: true, First: 443, Last: 443}}
	servers := []*server{
		{conf: &config.Server{Type: "tproxy", Interface: []string{"br9", "lan0"}, Divert: https}},
		{conf: &config.Server{Type: "tproxy", Interface: []string{"br8"}, Divert: https}},
	}
	entry := bpf.DivertEntry{Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}
	there, absent := entry, entry
	there.Interface, absent.Absent = uint32(lan.Index), true
	if got, want := diversion(servers, s).Entries, []bpf.DivertEntry{there, absent}; !slices.Equal(got, want) {
		t.Errorf("diverted are\n%+v, want\n%+v", got, want)
	}
}
