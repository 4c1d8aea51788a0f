package lab

import (
	"errors"
	"net/netip"
)

// Stick is a router on a stick: the host has one interface, on a network where its
// clients and its own gateway are too.
//
//	client ----.
//	neighbour --+-- lan --+-- router ---- origin
//	host ------'
//
// The client has the host as its gateway, the neighbour has the router, which
// stands in the place of ISP1; there is no ISP2. The origin knows the way back to
// everybody's address.
type Stick struct {
	*World
	Neighbour *NS

	lan *NS // the switch
}

// Addresses of a Stick, each on an interface eth0. The origin has those of a World.
const (
	StickNet4       = "192.168.1.0/24"
	StickNet6       = "2001:db8:168::/64"
	StickRouter4    = "192.168.1.1"
	StickRouter6    = "2001:db8:168::1"
	StickHost4      = "192.168.1.2"
	StickHost6      = "2001:db8:168::2"
	StickClient4    = "192.168.1.100"
	StickClient6    = "2001:db8:168::100"
	StickNeighbour4 = "192.168.1.101"
	StickNeighbour6 = "2001:db8:168::101"
)

// NewStick makes the namespaces and everything in them. Nobody but the router
// forwards.
func NewStick() (*Stick, error) {
	s := &Stick{World: &World{}}
	err := makeAll([]named{
		{&s.Client, "client"}, {&s.Neighbour, "neighbour"}, {&s.Host, "host"}, {&s.ISP1, "router"}, {&s.Origin, "origin"}, {&s.lan, "lan"},
	})
	if err == nil {
		err = s.build()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close lets go of the namespaces.
func (s *Stick) Close() error {
	return errors.Join(s.World.Close(), closeAll(s.Neighbour, s.lan))
}

func (s *Stick) build() error {
	if err := s.lan.AddBridge("br0"); err != nil {
		return err
	}
	for _, n := range []struct {
		ns         *NS
		four, six  string
		via4, via6 string // its gateway
	}{
		{s.ISP1, StickRouter4, StickRouter6, "", ""},
		{s.Host, StickHost4, StickHost6, StickRouter4, StickRouter6},
		{s.Client, StickClient4, StickClient6, StickHost4, StickHost6},
		{s.Neighbour, StickNeighbour4, StickNeighbour6, StickRouter4, StickRouter6},
	} {
		err := errors.Join(
			Veth(n.ns, "eth0", s.lan, n.ns.Name), s.lan.AddPort("br0", n.ns.Name),
			n.ns.AddAddr("eth0", netip.MustParsePrefix(n.four+"/24"), netip.MustParsePrefix(n.six+"/64")),
		)
		if err == nil && n.via4 != "" {
			err = errors.Join(
				n.ns.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(n.via4)),
				n.ns.AddRoute(netip.MustParsePrefix("::/0"), netip.MustParseAddr(n.via6)))
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(
		s.ISP1.Forward(), Veth(s.ISP1, "up0", s.Origin, "eth0"),
		s.ISP1.AddAddr("up0", netip.MustParsePrefix("192.0.2.1/30"), netip.MustParsePrefix("2001:db8:1::1/64")),
		s.Origin.AddAddr("eth0", netip.MustParsePrefix("192.0.2.2/30"), netip.MustParsePrefix("2001:db8:1::2/64")),
		s.Origin.AddAddr("lo", netip.MustParsePrefix(OriginAddr4+"/32"), netip.MustParsePrefix(OriginAddr6+"/128")),
		s.ISP1.AddRoute(netip.MustParsePrefix(OriginAddr4+"/32"), netip.MustParseAddr("192.0.2.2")),
		s.ISP1.AddRoute(netip.MustParsePrefix(OriginAddr6+"/128"), netip.MustParseAddr("2001:db8:1::2")),
		s.Origin.AddRoute(netip.MustParsePrefix(StickNet4), netip.MustParseAddr("192.0.2.1")),
		s.Origin.AddRoute(netip.MustParsePrefix(StickNet6), netip.MustParseAddr("2001:db8:1::1")),
	)
}
