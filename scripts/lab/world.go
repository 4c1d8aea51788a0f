package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// World is a host with two uplinks, a client on its inner side and an origin
// that both uplinks reach:
//
//	client ---- lan0  host  eth0 ---- isp1 ---- origin
//	                        eth1 ---- isp2 ----/
//
// The host has a primary address on each uplink, which nothing is ever told
// to use (so a connection that shows it has left unpinned), and the addresses
// of Egress4 and Egress6 beside it. Its main routing goes out by isp1.
//
// Whole prefixes come in by isp1 too, for which the host itself does nothing yet:
// it has to make them its own, and to answer for SharedNet6.
type World struct {
	Client, Host, ISP1, ISP2, Origin *NS
}

// Addresses of the world.
const (
	ClientAddr4  = "10.0.0.2"
	HostAddr4    = "10.0.0.1" // of the host on the client's side
	ClientAddr6  = "fd00::2"
	HostAddr6    = "fd00::1"
	OriginAddr4  = "192.0.2.80"
	OriginAddr6  = "2001:db8:80::80"
	Gateway1Of4  = "198.51.100.1"
	Gateway1Of6  = "2001:db8:100::1"
	Gateway2Of4  = "203.0.113.1"
	Gateway2Of6  = "2001:db8:200::1"
	Primary1Of4  = "198.51.100.2"
	Primary2Of4  = "203.0.113.2"
	Primary1Of6  = "2001:db8:100::2"
	Primary2Of6  = "2001:db8:200::2"
	uplink1Net4  = "198.51.100.0/24"
	uplink1Net6  = "2001:db8:100::/64"
	uplink2Net4  = "203.0.113.0/24"
	uplink2Net6  = "2001:db8:200::/64"
	perUplink    = 4
	firstAddress = 11
)

// Prefixes whose every address the origin answers by way of isp1. Of a routed one
// isp1 has a route by the host's primary address; of a shared one it takes every
// address to be a neighbour on the host's link, and asks for it by ARP or neighbour
// discovery.
const (
	RoutedNet4 = "192.0.2.128/25"
	RoutedNet6 = "2001:db8:100:beef::/64"
	SharedNet4 = "198.51.100.128/25" // the upper half of the link's own network
	SharedNet6 = "2001:db8:100:cafe::/64"
)

// Egress4 are the host's eight IPv4 egress addresses: four of eth0's network
// (198.51.100.11 to .14), then four of eth1's (203.0.113.11 to .14).
func Egress4() []netip.Addr { return egress("198.51.100.%d", "203.0.113.%d") }

// Egress6 are the eight IPv6 egress addresses, alike: 2001:db8:100::11 to
// ::14, then 2001:db8:200::11 to ::14.
func Egress6() []netip.Addr { return egress("2001:db8:100::%d", "2001:db8:200::%d") }

func egress(forms ...string) []netip.Addr {
	var all []netip.Addr
	for _, form := range forms {
		for i := range perUplink {
			all = append(all, netip.MustParseAddr(fmt.Sprintf(form, firstAddress+i)))
		}
	}
	return all
}

// NewWorld makes the namespaces and everything in them. With egress false the
// host has only its primary addresses: something else is to add the rest.
func NewWorld(egress bool) (*World, error) {
	w := &World{}
	if err := makeAll([]named{{&w.Client, "client"}, {&w.Host, "host"}, {&w.ISP1, "isp1"}, {&w.ISP2, "isp2"}, {&w.Origin, "origin"}}); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	if err := w.build(egress); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// named is a namespace to be made.
type named struct {
	ns   **NS
	name string
}

func makeAll(all []named) error {
	for _, n := range all {
		ns, err := NewNS(n.name)
		if err != nil {
			return err
		}
		*n.ns = ns
	}
	return nil
}

// Close lets go of the namespaces.
func (w *World) Close() error { return closeAll(w.Client, w.Host, w.ISP1, w.ISP2, w.Origin) }

func closeAll(all ...*NS) error {
	var errs []error
	for _, n := range all {
		if n != nil {
			errs = append(errs, n.Close())
		}
	}
	return errors.Join(errs...)
}

func (w *World) build(withEgress bool) error {
	for _, v := range []struct {
		a     *NS
		aName string
		b     *NS
		bName string
	}{
		{w.Client, "eth0", w.Host, "lan0"},
		{w.Host, "eth0", w.ISP1, "host0"},
		{w.Host, "eth1", w.ISP2, "host0"},
		{w.ISP1, "up0", w.Origin, "isp1"},
		{w.ISP2, "up0", w.Origin, "isp2"},
	} {
		if err := Veth(v.a, v.aName, v.b, v.bName); err != nil {
			return err
		}
	}
	type at struct {
		ns    *NS
		link  string
		addrs []string
	}
	for _, a := range []at{
		{w.Client, "eth0", []string{ClientAddr4 + "/24", ClientAddr6 + "/64"}},
		{w.Host, "lan0", []string{HostAddr4 + "/24", HostAddr6 + "/64"}},
		{w.Host, "eth0", []string{Primary1Of4 + "/24", Primary1Of6 + "/64"}},
		{w.Host, "eth1", []string{Primary2Of4 + "/24", Primary2Of6 + "/64"}},
		{w.ISP1, "host0", []string{Gateway1Of4 + "/24", Gateway1Of6 + "/64"}},
		{w.ISP2, "host0", []string{Gateway2Of4 + "/24", Gateway2Of6 + "/64"}},
		{w.ISP1, "up0", []string{"192.0.2.1/30", "2001:db8:1::1/64"}},
		{w.Origin, "isp1", []string{"192.0.2.2/30", "2001:db8:1::2/64"}},
		{w.ISP2, "up0", []string{"192.0.2.5/30", "2001:db8:2::1/64"}},
		{w.Origin, "isp2", []string{"192.0.2.6/30", "2001:db8:2::2/64"}},
		{w.Origin, "lo", []string{OriginAddr4 + "/32", OriginAddr6 + "/128"}},
	} {
		for _, s := range a.addrs {
			if err := a.ns.AddAddr(a.link, netip.MustParsePrefix(s)); err != nil {
				return err
			}
		}
	}
	if withEgress {
		if err := w.addEgress(); err != nil {
			return err
		}
	}
	if err := errors.Join(w.ISP1.Forward(), w.ISP2.Forward()); err != nil {
		return err
	}
	for _, r := range []struct {
		ns       *NS
		dst, via string
	}{
		{w.Client, "0.0.0.0/0", HostAddr4},
		{w.Client, "::/0", HostAddr6},
		{w.Host, "0.0.0.0/0", Gateway1Of4},
		{w.Host, "::/0", Gateway1Of6},
		{w.ISP1, OriginAddr4 + "/32", "192.0.2.2"},
		{w.ISP1, OriginAddr6 + "/128", "2001:db8:1::2"},
		{w.ISP2, OriginAddr4 + "/32", "192.0.2.6"},
		{w.ISP2, OriginAddr6 + "/128", "2001:db8:2::2"},
		{w.ISP1, RoutedNet4, Primary1Of4},
		{w.ISP1, RoutedNet6, Primary1Of6},
		{w.Origin, uplink1Net4, "192.0.2.1"},
		{w.Origin, uplink1Net6, "2001:db8:1::1"},
		{w.Origin, RoutedNet4, "192.0.2.1"},
		{w.Origin, RoutedNet6, "2001:db8:1::1"},
		{w.Origin, SharedNet6, "2001:db8:1::1"},
		{w.Origin, uplink2Net4, "192.0.2.5"},
		{w.Origin, uplink2Net6, "2001:db8:2::1"},
	} {
		if err := r.ns.AddRoute(netip.MustParsePrefix(r.dst), netip.MustParseAddr(r.via)); err != nil {
			return err
		}
	}
	return w.ISP1.AddNeighbours(netip.MustParsePrefix(SharedNet6), "host0")
}

func (w *World) addEgress() error {
	for _, addrs := range [][]netip.Addr{Egress4(), Egress6()} {
		for i, a := range addrs {
			link := "eth0"
			if i >= perUplink {
				link = "eth1"
			}
			if err := w.Host.AddAddr(link, EgressPrefix(a)); err != nil {
				return err
			}
		}
	}
	return nil
}

// EgressPrefix is an egress address with the length of its network, as it
// stands on the host's interface.
func EgressPrefix(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(a, 24)
	}
	return netip.PrefixFrom(a, 64)
}
