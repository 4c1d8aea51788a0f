package lab

import (
	"errors"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Containers are two on a bridge of the host of a World, as Docker makes them: each
// in a namespace whose eth0 is a port of the bridge, and with the host as gateway.
type Containers struct{ One, Two *NS }

// Addresses of the Containers; the bridge is docker0.
const (
	BridgeNet4    = "172.17.0.0/16"
	BridgeNet6    = "fd17::/64"
	BridgeHost4   = "172.17.0.1"
	BridgeHost6   = "fd17::1"
	ContainerOne4 = "172.17.0.2"
	ContainerOne6 = "fd17::2"
	ContainerTwo4 = "172.17.0.3"
	ContainerTwo6 = "fd17::3"
)

// AddContainers makes the bridge and the containers.
func (w *World) AddContainers() (*Containers, error) {
	c := &Containers{}
	err := makeAll([]named{{&c.One, "one"}, {&c.Two, "two"}})
	if err == nil {
		err = errors.Join(w.Host.AddBridge("docker0"),
			w.Host.AddAddr("docker0", netip.MustParsePrefix(BridgeHost4+"/16"), netip.MustParsePrefix(BridgeHost6+"/64")))
	}
	for _, n := range []struct {
		ns        *NS
		four, six string
	}{{c.One, ContainerOne4, ContainerOne6}, {c.Two, ContainerTwo4, ContainerTwo6}} {
		if err == nil {
			err = errors.Join(
				Veth(n.ns, "eth0", w.Host, "veth-"+n.ns.Name), w.Host.AddPort("docker0", "veth-"+n.ns.Name),
				n.ns.AddAddr("eth0", netip.MustParsePrefix(n.four+"/16"), netip.MustParsePrefix(n.six+"/64")),
				n.ns.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(BridgeHost4)),
				n.ns.AddRoute(netip.MustParsePrefix("::/0"), netip.MustParseAddr(BridgeHost6)))
		}
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Close lets go of the containers' namespaces.
func (c *Containers) Close() error { return closeAll(c.One, c.Two) }

// AddBridge makes a bridge and brings it up.
func (n *NS) AddBridge(name string) error {
	attrs := netlink.NewLinkAttrs() // its queue has the usual length
	attrs.Name = name
	if err := n.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return err
	}
	return n.Up(name)
}

// AddPort makes an interface a port of a bridge.
func (n *NS) AddPort(bridge, link string) error {
	return n.onLink(bridge, func(b netlink.Link) error {
		return n.onLink(link, func(l netlink.Link) error { return n.nl.LinkSetMaster(l, b) })
	})
}

// Forward has the namespace forward what is for others, in both families.
func (n *NS) Forward() error {
	return errors.Join(n.Sysctl("net/ipv4/ip_forward", "1"), n.Sysctl("net/ipv6/conf/all/forwarding", "1"))
}
