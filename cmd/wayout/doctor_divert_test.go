package main

import (
	"errors"
	"net"
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

func TestRedirectFindings(t *testing.T) {
	ns := lab.TestNS(t, "host")
	other := lab.TestNS(t, "lan")
	for _, name := range []string{"e0", "e1"} {
		if err := lab.Veth(ns, name, other, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := ns.AddAddr("e0", netip.MustParsePrefix("192.168.1.2/24")); err != nil {
		t.Fatal(err)
	}
	read := func() *netcfg.Snapshot {
		t.Helper()
		var s *netcfg.Snapshot
		if err := ns.Do(func() (err error) { s, err = netcfg.Read(); return err }); err != nil {
			t.Fatal(err)
		}
		return s
	}
	lan := func(rest string, names ...string) *config.Config {
		return &config.Config{Servers: []config.Server{{Type: "tproxy", Interface: names, Rest: rest}}}
	}
	stick := lan("forward", "e0")
	stick.Uplinks = []config.Uplink{{Name: "isp", Interface: "e0"}}
	four := func(all, own string) sysctlDir {
		return sysDir(t, map[string]string{
			"net/ipv4/conf/e0/forwarding": "1", "net/ipv4/conf/all/send_redirects": all, "net/ipv4/conf/e0/send_redirects": own,
			"net/ipv6/conf/e0/forwarding": "1",
		})
	}
	const both = "warning+ net.ipv4.conf.all.send_redirects; warning+ net.ipv4.conf.e0.send_redirects"
	check := func(name string, dir sysctlDir, c *config.Config, want string) {
		t.Helper()
		if got := levels(t, examineRedirects(dir, read(), c)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	check("nothing diverted", four("1", "1"), &config.Config{Uplinks: stick.Uplinks}, "")
	check("two interfaces", four("1", "1"), lan("forward", "e0", "e1"), "")
	check("an uplink", four("1", "1"), stick, both)
	check("an uplink, off for all", four("0", "1"), stick, "warning+ net.ipv4.conf.e0.send_redirects")
	check("an uplink, off", four("0", "0"), stick, "ok ICMP redirects from e0")
	check("nothing is forwarded", sysDir(t, nil), stick, "")
	dropping := *stick
	dropping.Servers = lan("drop", "e0").Servers
	check("the rest is dropped", four("1", "1"), &dropping, "")
	if err := ns.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("192.168.1.1")); err != nil {
		t.Fatal(err)
	}
	check("the host's own gateway", four("1", "1"), lan("forward", "e1", "e0", "e0"), both)
	l, err := ns.Netlink().LinkByName("e0")
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Netlink().RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, Gw: net.ParseIP("fe80::1")}); err != nil {
		t.Fatal(err)
	}
	check("an IPv6 gateway of the link", four("0", "0"), stick, "ok ICMP redirects from e0; note ICMPv6 redirects from e0")
}
