package netcfg_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

const (
	mainTable = netcfg.TableMain
	kernel    = 2 // RTPROT_KERNEL
)

func layout() netcfg.Layout {
	return netcfg.Layout{TableBase: 11900, RulePriority: 11900, MarkMask: 0xff0000}
}

func addrs(list ...string) []netip.Addr {
	out := make([]netip.Addr, len(list))
	for i, s := range list {
		out[i] = netip.MustParseAddr(s)
	}
	return out
}

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

// host is a host with two uplinks, each with an IPv4 and an IPv6 prefix, a LAN, and
// things that are not ours.
func host() *fakeKernel {
	k := newFake()
	k.links = []netcfg.Link{
		{Index: 1, Name: "lo", Admin: true, Up: true, Loopback: true},
		{Index: 2, Name: "eth0", Admin: true, Up: true},
		{Index: 3, Name: "eth1", Admin: true, Up: true},
		{Index: 4, Name: "lan0", Admin: true, Up: true},
	}
	for _, a := range []struct {
		p    string
		link int
	}{
		{"127.0.0.1/8", 1},
		{"198.51.100.5/24", 2},
		{"2001:db8:100::5/64", 2},
		{"203.0.113.5/28", 3},
		{"192.168.7.1/24", 4},
		{"198.51.100.99/32", 4}, // a foreign address that looks like one of ours
	} {
		p := netip.MustParsePrefix(a.p)
		k.addrs = append(k.addrs, netcfg.Address{Addr: p.Addr(), Prefix: p.Bits(), LinkIndex: a.link, LinkScope: a.link == 1})
		if a.link != 1 && p.Bits() < 32 || p.Addr().Is6() {
			k.routes = append(k.routes, connected(p.Masked(), a.link))
		}
	}
	k.routes = append(
		k.routes, connected(netip.MustParsePrefix("fe80::/64"), 2),
		netcfg.Route{Family: netcfg.IPv4, Table: mainTable, Type: netcfg.RouteUnicast, Protocol: 3, Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("198.51.100.1"), LinkIndex: 2},
		netcfg.Route{Family: netcfg.IPv4, Table: 500, Type: netcfg.RouteUnicast, Protocol: netcfg.Protocol, Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("198.51.100.1"), LinkIndex: 2},
	)
	k.rules = []netcfg.Rule{
		{Family: netcfg.IPv4, Priority: 0, Table: netcfg.TableLocal, Action: 1, Protocol: kernel},
		{Family: netcfg.IPv4, Priority: 5210, Table: mainTable, Mark: 0x80000, Mask: 0xff0000, Action: 1},
		{Family: netcfg.IPv4, Priority: 9, Table: 500, Action: 1, Protocol: netcfg.Protocol},           // our protocol, not our priority
		{Family: netcfg.IPv4, Priority: 11900, Table: 11900, Mark: 0x10000, Mask: 0xff0000, Action: 1}, // ours but for the protocol
		{Family: netcfg.IPv4, Priority: 32766, Table: mainTable, Action: 1, Protocol: kernel},
	}
	return k
}

func connected(p netip.Prefix, link int) netcfg.Route {
	r := netcfg.Route{Family: netcfg.IPv4, Table: mainTable, Type: netcfg.RouteUnicast, Scope: 253, Protocol: kernel, Dst: p, LinkIndex: link}
	if p.Addr().Is6() {
		r.Family, r.Scope, r.Metric = netcfg.IPv6, 0, 256
	}
	return r
}

func isp1() netcfg.Uplink {
	return netcfg.Uplink{
		Name: "isp1", Number: 1, Interface: "eth0", Mark: netcfg.Mark{Value: 0x10000, Mask: 0xff0000},
		Gateway4: netip.MustParseAddr("198.51.100.1"), Gateway6: netip.MustParseAddr("2001:db8:100::1"),
		ManageAddresses: true, Addresses: addrs("198.51.100.11", "198.51.100.5", "2001:db8:100::11"),
	}
}

func isp2() netcfg.Uplink {
	return netcfg.Uplink{
		Name: "isp2", Number: 2, Interface: "eth1", Mark: netcfg.Mark{Value: 0x20000, Mask: 0xff0000},
		Gateway4: netip.MustParseAddr("203.0.113.1"),
	}
}

// diverting is a Want that takes TCP 443 and some UDP of lan0.
func diverting(u ...netcfg.Uplink) netcfg.Want {
	w := want(u...)
	w.Answers = netcfg.Mark{Value: 0xc10000, Mask: 0xff0000}
	w.Diverts = []netcfg.Divert{{Interface: "lan0", Ports: []netcfg.DivertPorts{
		{Protocol: unix.IPPROTO_UDP, First: 1000, Last: 2000},
		{Protocol: unix.IPPROTO_TCP, First: 443, Last: 443},
	}}}
	return w
}

func want(u ...netcfg.Uplink) netcfg.Want { return netcfg.Want{Layout: layout(), Uplinks: u} }

func TestDiffCommands(t *testing.T) {
	tests := []struct {
		name   string
		change func(k *fakeKernel) // the host, before
		from   netcfg.Want         // applied first
		then   func(k *fakeKernel) // the host, after that
		want   netcfg.Want
		ip     string
		notes  string
	}{
		{
			name: "two uplinks on a fresh host",
			want: want(isp1(), isp2()),
			ip: `
ip route add unreachable default table 11900 proto 119 metric 4294967295
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11900 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip route add 198.51.100.0/24 dev eth0 scope link table 11900 proto 119 metric 1024
ip route add 203.0.113.0/28 dev eth1 scope link table 11901 proto 119 metric 1024
ip -6 route add 2001:db8:100::/64 dev eth0 table 11900 proto 119 metric 1024
ip route add default via 198.51.100.1 dev eth0 table 11900 proto 119 metric 1024
ip route add default via 203.0.113.1 dev eth1 table 11901 proto 119 metric 1024
ip -6 route add default via 2001:db8:100::1 dev eth0 table 11900 proto 119 metric 1024
ip addr add 198.51.100.11/32 dev eth0 proto 119 metric 11900 noprefixroute
ip addr add 2001:db8:100::11/128 dev eth0 proto 119 metric 11900 noprefixroute preferred_lft 0
ip rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip rule add priority 11912 from 198.51.100.0/24 iif lo lookup 11900 proto 119
ip rule add priority 11908 from 203.0.113.0/28 iif lo lookup 11901 proto 119
ip -6 rule add priority 11968 from 2001:db8:100::/64 iif lo lookup 11900 proto 119`,
		},
		{
			name: "one uplink leaves",
			from: want(isp1(), isp2()),
			want: want(isp1()),
			ip: `
ip rule del priority 11908 from 203.0.113.0/28 iif lo lookup 11901 proto 119
ip rule del priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule del priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip route del default via 203.0.113.1 dev eth1 table 11901 proto 119 metric 1024
ip route del 203.0.113.0/28 dev eth1 scope link table 11901 proto 119 metric 1024
ip route del unreachable default table 11901 proto 119 metric 4294967295
ip -6 route del unreachable default table 11901 proto 119 metric 4294967295`,
		},
		{
			name: "all of ours goes and nothing else",
			from: want(isp1()),
			want: want(),
			ip: `
ip rule del priority 11912 from 198.51.100.0/24 iif lo lookup 11900 proto 119
ip -6 rule del priority 11968 from 2001:db8:100::/64 iif lo lookup 11900 proto 119
ip rule del priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip -6 rule del priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip addr del 198.51.100.11/32 dev eth0
ip addr del 2001:db8:100::11/128 dev eth0
ip route del default via 198.51.100.1 dev eth0 table 11900 proto 119 metric 1024
ip -6 route del default via 2001:db8:100::1 dev eth0 table 11900 proto 119 metric 1024
ip route del 198.51.100.0/24 dev eth0 scope link table 11900 proto 119 metric 1024
ip -6 route del 2001:db8:100::/64 dev eth0 table 11900 proto 119 metric 1024
ip route del unreachable default table 11900 proto 119 metric 4294967295
ip -6 route del unreachable default table 11900 proto 119 metric 4294967295`,
		},
		{
			name: "another gateway, on no prefix of the interface",
			from: want(isp1()),
			want: want(with(isp1(), func(u *netcfg.Uplink) { u.Gateway4 = netip.MustParseAddr("192.0.2.1") })),
			ip: `
ip route replace default via 192.0.2.1 dev eth0 onlink table 11900 proto 119 metric 1024`,
		},
		{
			name: "a link-local gateway is on the link",
			from: want(isp1()),
			want: want(with(isp1(), func(u *netcfg.Uplink) { u.Gateway6 = netip.MustParseAddr("fe80::1") })),
			ip: `
ip -6 route replace default via fe80::1 dev eth0 table 11900 proto 119 metric 1024`,
		},
		{
			name: "another mark: the rule comes before the old one goes",
			from: want(isp1()),
			want: want(with(isp1(), func(u *netcfg.Uplink) { u.Mark.Value = 0x30000 })),
			ip: `
ip rule add priority 11900 from all fwmark 0x30000/0xff0000 lookup 11900 proto 119
ip -6 rule add priority 11900 from all fwmark 0x30000/0xff0000 lookup 11900 proto 119
ip rule del priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip -6 rule del priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119`,
		},
		{
			name: "no interface: packets with its mark go nowhere",
			want: want(with(isp2(), func(u *netcfg.Uplink) { u.Interface = "ppp9" })),
			ip: `
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119`,
			notes: "uplink isp2: interface ppp9 does not exist",
		},
		{
			name:  "an interface that went down keeps its rules, IPv6 ones too",
			from:  want(isp1()),
			then:  func(k *fakeKernel) { k.down(2) },
			want:  want(isp1()),
			notes: "uplink isp1: interface eth0 is down",
		},
		{
			name: "an interface that came up again",
			from: want(isp1()),
			then: func(k *fakeKernel) { k.down(2); k.up(2) },
			want: want(isp1()),
			ip: `
ip route add 198.51.100.0/24 dev eth0 scope link table 11900 proto 119 metric 1024
ip route add default via 198.51.100.1 dev eth0 table 11900 proto 119 metric 1024
ip -6 route add default via 2001:db8:100::1 dev eth0 onlink table 11900 proto 119 metric 1024
ip addr add 2001:db8:100::11/128 dev eth0 proto 119 metric 11900 noprefixroute preferred_lft 0
ip -6 rule del priority 11968 from 2001:db8:100::/64 iif lo lookup 11900 proto 119`,
		},
		{
			name: "foreign addresses are left where they are",
			want: want(with(isp2(), func(u *netcfg.Uplink) {
				u.ManageAddresses, u.Addresses = true, addrs("198.51.100.99", "203.0.113.5", "203.0.113.6", "203.0.113.6")
			})),
			ip: `
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip route add 203.0.113.0/28 dev eth1 scope link table 11901 proto 119 metric 1024
ip route add default via 203.0.113.1 dev eth1 table 11901 proto 119 metric 1024
ip addr add 203.0.113.6/32 dev eth1 proto 119 metric 11901 noprefixroute
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip rule add priority 11908 from 203.0.113.0/28 iif lo lookup 11901 proto 119`,
			notes: "uplink isp2: address 198.51.100.99 is on interface lan0, not on eth1",
		},
		{
			name: "an address moves to the other uplink: added there first",
			from: want(with(isp1(), noAddrs("203.0.113.7"))),
			want: want(isp1NoAddrs(), with(isp2(), func(u *netcfg.Uplink) { u.ManageAddresses, u.Addresses = true, addrs("203.0.113.7") })),
			ip: `
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip route add 203.0.113.0/28 dev eth1 scope link table 11901 proto 119 metric 1024
ip route add default via 203.0.113.1 dev eth1 table 11901 proto 119 metric 1024
ip addr add 203.0.113.7/32 dev eth1 proto 119 metric 11901 noprefixroute
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip rule add priority 11908 from 203.0.113.0/28 iif lo lookup 11901 proto 119
ip addr del 203.0.113.7/32 dev eth0`,
		},
		{
			name: "a prefix node",
			from: want(isp1()),
			want: want(with(isp1(), func(u *netcfg.Uplink) {
				u.Local = []netip.Prefix{netip.MustParsePrefix("2001:db8:beef::/64"), netip.MustParsePrefix("10.60.0.0/24")}
			})),
			ip: `
ip rule add priority 11912 from 10.60.0.0/24 iif lo lookup 11900 proto 119
ip -6 rule add priority 11968 from 2001:db8:beef::/64 iif lo lookup 11900 proto 119
ip route add local 10.60.0.0/24 dev lo table local proto 119 metric 11900
ip -6 route add local 2001:db8:beef::/64 dev lo table local proto 119 metric 11900`,
		},
		{
			name: "prefix nodes that hold the gateways of their uplink and of table main",
			from: want(isp1NoAddrs()),
			want: want(with(isp1NoAddrs(), func(u *netcfg.Uplink) { u.Local = prefixes("198.51.100.0/24", "2001:db8:100::/64") })),
			ip: `
ip route add throw 198.51.100.1/32 table local proto 119 metric 12155
ip -6 route add throw 2001:db8:100::1/128 table local proto 119 metric 12155
ip route add local 198.51.100.0/24 dev lo table local proto 119 metric 11900
ip -6 route add local 2001:db8:100::/64 dev lo table local proto 119 metric 11900`,
		},
		{
			name: "such prefix nodes go: the exceptions last",
			from: want(with(isp1NoAddrs(), func(u *netcfg.Uplink) { u.Local = prefixes("198.51.100.0/25", "2001:db8:100::/64") })),
			want: want(isp1NoAddrs()),
			ip: `
ip route del local 198.51.100.0/25 dev lo table local proto 119 metric 11900
ip -6 route del local 2001:db8:100::/64 dev lo table local proto 119 metric 11900
ip route del throw 198.51.100.1/32 table local proto 119 metric 12155
ip -6 route del throw 2001:db8:100::1/128 table local proto 119 metric 12155
ip rule del priority 11911 from 198.51.100.0/25 iif lo lookup 11900 proto 119`,
		},
		{
			name: "another gateway in the prefix of a node",
			from: want(with(isp2(), func(u *netcfg.Uplink) { u.Local = prefixes("203.0.113.0/28") })),
			want: want(with(isp2(), func(u *netcfg.Uplink) {
				u.Local, u.Gateway4 = prefixes("203.0.113.0/28"), netip.MustParseAddr("203.0.113.14")
			})),
			ip: `
ip route replace default via 203.0.113.14 dev eth1 table 11901 proto 119 metric 1024
ip route add throw 203.0.113.14/32 table local proto 119 metric 12155
ip route del throw 203.0.113.1/32 table local proto 119 metric 12155`,
		},
		{
			name: "prefix nodes without an uplink, with main's gateway in one",
			want: netcfg.Want{Layout: layout(), Local: prefixes("2001:db8:beef::/64", "198.51.100.0/24", "198.51.100.0/24")},
			ip: `
ip route add 198.51.100.1/32 dev eth0 scope link table local proto 119 metric 12155
ip route add local 198.51.100.0/24 dev lo table local proto 119 metric 12155
ip -6 route add local 2001:db8:beef::/64 dev lo table local proto 119 metric 12155`,
		},
		{
			name: "an uplink comes to prefix nodes without one",
			from: netcfg.Want{Layout: layout(), Local: prefixes("198.51.100.0/24")},
			want: netcfg.Want{Layout: layout(), Local: prefixes("198.51.100.0/24"), Uplinks: []netcfg.Uplink{isp2()}},
			ip: `
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip route add 203.0.113.0/28 dev eth1 scope link table 11901 proto 119 metric 1024
ip route add default via 203.0.113.1 dev eth1 table 11901 proto 119 metric 1024
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip rule add priority 11908 from 203.0.113.0/28 iif lo lookup 11901 proto 119
ip route replace throw 198.51.100.1/32 table local proto 119 metric 12155`,
		},
		{
			name: "prefix nodes without an uplink go",
			from: netcfg.Want{Layout: layout(), Local: prefixes("2001:db8:beef::/64", "198.51.100.0/24")},
			want: want(),
			ip: `
ip route del local 198.51.100.0/24 dev lo table local proto 119 metric 12155
ip -6 route del local 2001:db8:beef::/64 dev lo table local proto 119 metric 12155
ip route del 198.51.100.1/32 dev eth0 scope link table local proto 119 metric 12155`,
		},
		{
			name: "a prefix node that is another uplink's link",
			from: want(isp1NoAddrs(), isp2()),
			want: want(isp1NoAddrs(), with(isp2(), func(u *netcfg.Uplink) { u.Local = prefixes("198.51.100.0/24") })),
			ip: `
ip rule add priority 11912 from 198.51.100.0/24 iif lo lookup 11901 proto 119
ip route add throw 198.51.100.1/32 table local proto 119 metric 12155
ip route add local 198.51.100.0/24 dev lo table local proto 119 metric 11901
ip rule del priority 11912 from 198.51.100.0/24 iif lo lookup 11900 proto 119`,
			notes: "uplink isp1 is on 198.51.100.0/24, which is a prefix of uplink isp2: packets from it that have no mark leave by isp2",
		},
		{
			name:  "a prefix node of an uplink that is down",
			from:  want(with(isp2(), func(u *netcfg.Uplink) { u.Local = prefixes("203.0.113.0/28", "10.60.0.0/24") })),
			then:  func(k *fakeKernel) { k.down(3) },
			want:  want(with(isp2(), func(u *netcfg.Uplink) { u.Local = prefixes("203.0.113.0/28", "10.60.0.0/24") })),
			notes: "uplink isp2: interface eth1 is down",
		},
		{
			name: "two uplinks by one interface: each prefix to the one whose gateway is in it",
			change: func(k *fakeKernel) {
				p := netip.MustParsePrefix("203.0.113.65/28")
				k.addrs = append(k.addrs, netcfg.Address{Addr: p.Addr(), Prefix: 28, LinkIndex: 2})
				k.routes = append(k.routes, connected(p.Masked(), 2))
			},
			from: want(isp1NoAddrs()),
			want: want(isp1NoAddrs(), with(isp2(), func(u *netcfg.Uplink) { u.Interface, u.Gateway4 = "eth0", netip.MustParseAddr("203.0.113.66") })),
			ip: `
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip route add 198.51.100.0/24 dev eth0 scope link table 11901 proto 119 metric 1024
ip route add 203.0.113.64/28 dev eth0 scope link table 11901 proto 119 metric 1024
ip -6 route add 2001:db8:100::/64 dev eth0 table 11901 proto 119 metric 1024
ip route add default via 203.0.113.66 dev eth0 table 11901 proto 119 metric 1024
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip rule add priority 11908 from 203.0.113.64/28 iif lo lookup 11901 proto 119
ip rule del priority 11908 from 203.0.113.64/28 iif lo lookup 11900 proto 119`,
		},
		{
			name: "a family without gateway and nodes keeps its own ways",
			want: want(with(isp1(), func(u *netcfg.Uplink) {
				u.Gateway6 = netip.Addr{}
				u.Addresses = slices.DeleteFunc(slices.Clone(u.Addresses), netip.Addr.Is6)
			})),
			ip: `
ip route add unreachable default table 11900 proto 119 metric 4294967295
ip -6 route add unreachable default table 11900 proto 119 metric 4294967295
ip route add 198.51.100.0/24 dev eth0 scope link table 11900 proto 119 metric 1024
ip -6 route add 2001:db8:100::/64 dev eth0 table 11900 proto 119 metric 1024
ip route add default via 198.51.100.1 dev eth0 table 11900 proto 119 metric 1024
ip addr add 198.51.100.11/32 dev eth0 proto 119 metric 11900 noprefixroute
ip rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip -6 rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip rule add priority 11912 from 198.51.100.0/24 iif lo lookup 11900 proto 119`,
		},
		{
			name: "a lone address, as clouds and point-to-point links have it, and half the internet",
			change: func(k *fakeKernel) {
				k.links = append(k.links, netcfg.Link{Index: 5, Name: "tun0", Admin: true, Up: true})
				k.addrs = append(k.addrs, netcfg.Address{Addr: netip.MustParseAddr("10.8.0.2"), Prefix: 32, LinkIndex: 5, Peer: netip.MustParseAddr("10.8.0.1")})
				k.routes = append(k.routes, connected(netip.MustParsePrefix("10.8.0.1/32"), 5), connected(netip.MustParsePrefix("0.0.0.0/1"), 5))
			},
			want: want(with(isp2(), func(u *netcfg.Uplink) { u.Interface, u.Gateway4, u.Bare = "tun0", netip.Addr{}, true })),
			ip: `
ip route add unreachable default table 11901 proto 119 metric 4294967295
ip -6 route add unreachable default table 11901 proto 119 metric 4294967295
ip route add 0.0.0.0/1 dev tun0 scope link table 11901 proto 119 metric 1024
ip route add 10.8.0.1/32 dev tun0 scope link table 11901 proto 119 metric 1024
ip rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip -6 rule add priority 11900 from all fwmark 0x20000/0xff0000 lookup 11901 proto 119
ip rule add priority 11904 from 10.8.0.2/32 iif lo lookup 11901 proto 119`,
		},
		{
			name: "a host without IPv6",
			change: func(k *fakeKernel) {
				k.noIPv6 = true
				k.addrs = slices.DeleteFunc(k.addrs, func(a netcfg.Address) bool { return a.Addr.Is6() })
				k.routes = slices.DeleteFunc(k.routes, func(r netcfg.Route) bool { return r.Family == netcfg.IPv6 })
			},
			want: want(isp1()),
			ip: `
ip route add unreachable default table 11900 proto 119 metric 4294967295
ip route add 198.51.100.0/24 dev eth0 scope link table 11900 proto 119 metric 1024
ip route add default via 198.51.100.1 dev eth0 table 11900 proto 119 metric 1024
ip addr add 198.51.100.11/32 dev eth0 proto 119 metric 11900 noprefixroute
ip rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip rule add priority 11912 from 198.51.100.0/24 iif lo lookup 11900 proto 119`,
		},
		{
			name: "diverted ports",
			want: diverting(),
			ip: `
ip route add unreachable default table 12152 proto 119 metric 4294967295
ip route add unreachable default table 12154 proto 119 metric 4294967295
ip -6 route add unreachable default table 12152 proto 119 metric 4294967295
ip -6 route add unreachable default table 12154 proto 119 metric 4294967295
ip route add local default dev lo table 12154 proto 119 metric 1024
ip -6 route add local default dev lo table 12154 proto 119 metric 1024
ip rule add priority 11901 from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119
ip rule add priority 11902 from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip rule add priority 12035 from all fwmark 0xc10000/0xff0000 iif lan0 lookup 12154 proto 119
ip -6 rule add priority 11901 from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119
ip -6 rule add priority 11902 from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip -6 rule add priority 12035 from all fwmark 0xc10000/0xff0000 iif lan0 lookup 12154 proto 119
ip rule add priority 12034 from all to 192.168.7.0/24 iif lan0 lookup main suppress_prefixlength 0 proto 119
ip rule add priority 12035 from all iif lan0 ipproto tcp dport 443 lookup 12154 proto 119
ip rule add priority 12035 from all iif lan0 ipproto udp dport 1000-2000 lookup 12154 proto 119
ip -6 rule add priority 12035 from all iif lan0 ipproto tcp dport 443 lookup 12154 proto 119
ip -6 rule add priority 12035 from all iif lan0 ipproto udp dport 1000-2000 lookup 12154 proto 119`,
		},
		{
			name: "clients on the link of diverted traffic, beside an uplink",
			from: diverting(),
			want: diverting(isp1()),
			ip: `
ip route add unreachable default table 11900 proto 119 metric 4294967295
ip -6 route add unreachable default table 11900 proto 119 metric 4294967295
ip route add 198.51.100.0/24 dev eth0 scope link table 11900 proto 119 metric 1024
ip -6 route add 2001:db8:100::/64 dev eth0 table 11900 proto 119 metric 1024
ip route add default via 198.51.100.1 dev eth0 table 11900 proto 119 metric 1024
ip -6 route add default via 2001:db8:100::1 dev eth0 table 11900 proto 119 metric 1024
ip addr add 198.51.100.11/32 dev eth0 proto 119 metric 11900 noprefixroute
ip addr add 2001:db8:100::11/128 dev eth0 proto 119 metric 11900 noprefixroute preferred_lft 0
ip rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip rule add priority 11900 from all to 198.51.100.0/24 fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip -6 rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119
ip -6 rule add priority 11900 from all to 2001:db8:100::/64 fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip rule add priority 11903 from all to 192.168.7.0/24 iif lo lookup main suppress_prefixlength 0 proto 119
ip rule add priority 11912 from 198.51.100.0/24 iif lo lookup 11900 proto 119
ip -6 rule add priority 11968 from 2001:db8:100::/64 iif lo lookup 11900 proto 119`,
		},
		{
			name: "a whole protocol of an interface that is yet to come, and nothing else of it",
			from: diverting(),
			want: func() netcfg.Want {
				w := diverting()
				w.Diverts = append(w.Diverts, netcfg.Divert{
					Interface: "br0", Rest: netcfg.RestDrop, Ports: []netcfg.DivertPorts{{Protocol: unix.IPPROTO_TCP, Last: 65535}},
				})
				return w
			}(),
			ip: `
ip route add unreachable default table 12153 proto 119 metric 4294967295
ip -6 route add unreachable default table 12153 proto 119 metric 4294967295
ip rule add priority 12035 from all fwmark 0xc10000/0xff0000 iif br0 lookup 12154 proto 119
ip -6 rule add priority 12035 from all fwmark 0xc10000/0xff0000 iif br0 lookup 12154 proto 119
ip rule add priority 12036 from all iif br0 lookup 12153 proto 119
ip rule add priority 12035 from all iif br0 ipproto tcp lookup 12154 proto 119
ip -6 rule add priority 12036 from all iif br0 lookup 12153 proto 119
ip -6 rule add priority 12035 from all iif br0 ipproto tcp lookup 12154 proto 119`,
		},
		{
			name: "diverted ports of an interface that leads off the host too",
			from: want(isp1()),
			want: func() netcfg.Want {
				w := diverting(isp1())
				w.Diverts[0].Interface = "eth0"
				return w
			}(),
			ip: `
ip route add unreachable default table 12152 proto 119 metric 4294967295
ip route add unreachable default table 12154 proto 119 metric 4294967295
ip -6 route add unreachable default table 12152 proto 119 metric 4294967295
ip -6 route add unreachable default table 12154 proto 119 metric 4294967295
ip route add local default dev lo table 12154 proto 119 metric 1024
ip -6 route add local default dev lo table 12154 proto 119 metric 1024
ip route add default via 198.51.100.1 dev eth0 table 12152 proto 119 metric 0
ip rule add priority 11901 from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119
ip rule add priority 11902 from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip rule add priority 12035 from all fwmark 0xc10000/0xff0000 iif eth0 lookup 12154 proto 119
ip -6 rule add priority 11901 from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119
ip -6 rule add priority 11902 from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip -6 rule add priority 12035 from all fwmark 0xc10000/0xff0000 iif eth0 lookup 12154 proto 119
ip rule add priority 12034 from all to 198.51.100.0/24 iif eth0 lookup main suppress_prefixlength 0 proto 119
ip rule add priority 12033 from 198.51.100.0/24 to 198.51.100.0/24 iif eth0 ipproto tcp dport 443 lookup 12154 proto 119
ip rule add priority 12033 from 198.51.100.0/24 to 198.51.100.0/24 iif eth0 ipproto udp dport 1000-2000 lookup 12154 proto 119
ip rule add priority 12035 from all iif eth0 ipproto tcp dport 443 lookup 12154 proto 119
ip rule add priority 12035 from all iif eth0 ipproto udp dport 1000-2000 lookup 12154 proto 119
ip -6 rule add priority 12034 from all to 2001:db8:100::/64 iif eth0 lookup main suppress_prefixlength 0 proto 119
ip -6 rule add priority 12033 from 2001:db8:100::/64 to 2001:db8:100::/64 iif eth0 ipproto tcp dport 443 lookup 12154 proto 119
ip -6 rule add priority 12033 from 2001:db8:100::/64 to 2001:db8:100::/64 iif eth0 ipproto udp dport 1000-2000 lookup 12154 proto 119
ip -6 rule add priority 12035 from all iif eth0 ipproto tcp dport 443 lookup 12154 proto 119
ip -6 rule add priority 12035 from all iif eth0 ipproto udp dport 1000-2000 lookup 12154 proto 119`,
		},
		{
			name: "another port: the rule comes before the old one goes",
			from: diverting(),
			want: func() netcfg.Want {
				w := diverting()
				w.Diverts[0].Ports[1] = netcfg.DivertPorts{Protocol: unix.IPPROTO_TCP, First: 80, Last: 443}
				return w
			}(),
			ip: `
ip rule add priority 12035 from all iif lan0 ipproto tcp dport 80-443 lookup 12154 proto 119
ip -6 rule add priority 12035 from all iif lan0 ipproto tcp dport 80-443 lookup 12154 proto 119
ip rule del priority 12035 from all iif lan0 ipproto tcp dport 443 lookup 12154 proto 119
ip -6 rule del priority 12035 from all iif lan0 ipproto tcp dport 443 lookup 12154 proto 119`,
		},
		{
			name: "diverting ends: rules first",
			from: diverting(),
			want: want(),
			ip: `
ip rule del priority 12034 from all to 192.168.7.0/24 iif lan0 lookup main suppress_prefixlength 0 proto 119
ip rule del priority 12035 from all iif lan0 ipproto tcp dport 443 lookup 12154 proto 119
ip rule del priority 12035 from all iif lan0 ipproto udp dport 1000-2000 lookup 12154 proto 119
ip -6 rule del priority 12035 from all iif lan0 ipproto tcp dport 443 lookup 12154 proto 119
ip -6 rule del priority 12035 from all iif lan0 ipproto udp dport 1000-2000 lookup 12154 proto 119
ip rule del priority 11901 from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119
ip rule del priority 11902 from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip rule del priority 12035 from all fwmark 0xc10000/0xff0000 iif lan0 lookup 12154 proto 119
ip -6 rule del priority 11901 from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119
ip -6 rule del priority 11902 from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119
ip -6 rule del priority 12035 from all fwmark 0xc10000/0xff0000 iif lan0 lookup 12154 proto 119
ip route del local default dev lo table 12154 proto 119 metric 1024
ip -6 route del local default dev lo table 12154 proto 119 metric 1024
ip route del unreachable default table 12152 proto 119 metric 4294967295
ip route del unreachable default table 12154 proto 119 metric 4294967295
ip -6 route del unreachable default table 12152 proto 119 metric 4294967295
ip -6 route del unreachable default table 12154 proto 119 metric 4294967295`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k := host()
			if tt.change != nil {
				tt.change(k)
			}
			if len(tt.from.Uplinks)+len(tt.from.Local)+len(tt.from.Diverts) > 0 {
				if err := netcfg.Diff(k.snapshot(), tt.from).Apply(k); err != nil {
					t.Fatal(err)
				}
			}
			if tt.then != nil {
				tt.then(k)
			}
			if err := tt.want.Validate(); err != nil {
				t.Fatal(err)
			}
			p := netcfg.Diff(k.snapshot(), tt.want)
			if got, want := strings.Join(p.Commands(), "\n"), strings.TrimSpace(tt.ip); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if got := strings.Join(p.Notes, "\n"); got != tt.notes {
				t.Errorf("notes %q, want %q", got, tt.notes)
			}
			if len(p.Conflicts) > 0 {
				t.Errorf("conflicts %q", p.Conflicts)
			}
			if len(p.Adds().Ops)+len(p.Deletes().Ops) != len(p.Ops) {
				t.Error("Adds and Deletes are not the whole plan")
			}
			if err := p.Apply(k); err != nil {
				t.Fatal(err)
			}
			if again := netcfg.Diff(k.snapshot(), tt.want); !again.Empty() {
				t.Errorf("a second time there is still to do:\n%s", strings.Join(again.Commands(), "\n"))
			}
		})
	}
}

func with(u netcfg.Uplink, f func(*netcfg.Uplink)) netcfg.Uplink {
	f(&u)
	return u
}

func noAddrs(list ...string) func(*netcfg.Uplink) {
	return func(u *netcfg.Uplink) { u.Addresses = addrs(list...) }
}

func isp1NoAddrs() netcfg.Uplink { return with(isp1(), noAddrs()) }

func TestDiffConflicts(t *testing.T) {
	k := host()
	k.routes = append(k.routes, netcfg.Route{
		Family: netcfg.IPv4, Table: 11900, Type: netcfg.RouteUnicast, Protocol: 4, Dst: netip.MustParsePrefix("0.0.0.0/0"),
		Gateway: netip.MustParseAddr("203.0.113.1"), LinkIndex: 3, Metric: 1024,
	})
	before := k.snapshot()
	p := netcfg.Diff(before, want(isp1()))
	if got, want := strings.Join(p.Conflicts, "\n"), "table 11900 holds default via 203.0.113.1 dev eth1 table 11900 proto 4 metric 1024"; got != want {
		t.Errorf("conflicts\n%s\nwant\n%s", got, want)
	}
	if err := p.Apply(k); !isErr(err, netcfg.ErrConflict) {
		t.Errorf("got error %v, want ErrConflict", err)
	}
	if !k.snapshot().HasRoute(k.routes[len(k.routes)-1]) || slices.ContainsFunc(p.Commands(), func(c string) bool {
		return strings.Contains(c, "replace")
	}) {
		t.Error("the foreign route was touched")
	}
}
