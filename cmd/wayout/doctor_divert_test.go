package main

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/scripts/lab"
)

func TestDivertFindings(t *testing.T) {
	ns := lab.TestNS(t, "host")
	other := lab.TestNS(t, "client")
	if err := lab.Veth(ns, "lan0", other, "eth0"); err != nil {
		t.Fatal(err)
	}
	layout := netcfg.Layout{TableBase: netcfg.DefaultTableBase, RulePriority: netcfg.DefaultRulePriority, MarkMask: bpf.DefaultMask}
	read := func() *netcfg.Snapshot {
		t.Helper()
		var s *netcfg.Snapshot
		if err := ns.Do(func() (err error) { s, err = netcfg.Read(); return err }); err != nil {
			t.Fatal(err)
		}
		return s
	}
	lan := config.Server{Type: "tproxy", Interface: []string{"lan0", "br9"}}
	old := errors.New("too old")
	told := func(f finding) string { return f.Level + " " + f.Found }
	if all := examineDiverts(read(), layout, bpf.Feature{}, bpf.Feature{}, &config.Config{Servers: []config.Server{{Type: "http_proxy"}}}); len(all) != 0 {
		t.Errorf("nothing is diverted: %v", all)
	}
	nets := config.Server{Type: "http_proxy", ListenNets: []config.ListenNet{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), First: 1, Last: 1}}}
	if all := examineDiverts(read(), layout, bpf.Feature{Err: old}, bpf.Feature{}, &config.Config{Servers: []config.Server{nets}}); len(all) != 1 || told(all[0]) != levelBlocker+" too old" {
		t.Errorf("a prefix on an old kernel: %v", all)
	}
	if all := examineDiverts(read(), layout, bpf.Feature{}, bpf.Feature{Err: old}, &config.Config{Servers: []config.Server{nets}}); len(all) != 1 || told(all[0]) != levelOK+" " {
		t.Errorf("a prefix on a kernel that cannot drop fragments: %v", all)
	}
	c := &config.Config{Servers: []config.Server{lan, lan}}
	if all := examineDiverts(read(), layout, bpf.Feature{}, bpf.Feature{Err: old}, c); told(all[0]) != levelOK+" " || told(all[1]) != levelBlocker+" too old" {
		t.Errorf("a kernel that cannot drop fragments: %v", all)
	}
	all := examineDiverts(read(), layout, bpf.Feature{}, bpf.Feature{}, c)
	if len(all) != 4 || told(all[0]) != levelOK+" " || told(all[1]) != levelOK+" " || told(all[2]) != levelNote+" no such interface" || told(all[3]) != levelOK+" " {
		t.Errorf("as it should be, but for one interface: %v", all)
	}
	r := netlink.NewRule()
	r.Family, r.IifName, r.Table, r.Priority = unix.AF_INET, "lan0", 500, 100
	if err := ns.Netlink().RuleAdd(r); err != nil {
		t.Fatal(err)
	}
	if all := examineDiverts(read(), layout, bpf.Feature{}, bpf.Feature{}, c); all[3].Level != levelWarning || !strings.Contains(all[3].Found, "100: from all iif lan0 lookup 500") {
		t.Errorf("a rule ahead: %v", all[3])
	}
}
