package main

import (
	"errors"
	"fmt"
	"net/netip"

	"wayout/scripts/lab"
)

// world is where everything is measured:
//
//	client ---- in0  host  out0 ---- origin
//
// The client and the host's outer side have several addresses. The host's
// primary address on the outer side is told to no proxy, so a connection that
// the origin sees come from it has left unpinned.
type world struct{ client, host, origin *lab.NS }

const (
	innerLink   = "in0"
	hostInner   = "10.0.0.1" // proxies listen here
	hostPrimary = "198.51.100.2"
	originAddr  = "198.51.100.1"
	originPort  = 8080 // and the next one: a second destination
	addresses   = 16   // of the client, and egress addresses of the host

	// The ports that the host binds from; the mode "ports" uses those above.
	lowPort, highPort = 10000, 49999
)

func numbered(form string, from int) []string {
	all := make([]string, addresses)
	for i := range all {
		all[i] = fmt.Sprintf(form, from+i)
	}
	return all
}

func clientAddrs() []string { return numbered("10.0.0.%d", 10) }
func egressAddrs() []string { return numbered("198.51.100.%d", 10) }

func target(i int) string { return fmt.Sprintf("%s:%d", originAddr, originPort+i) }

// newWorld makes the namespaces.
func newWorld() (_ *world, err error) {
	w := &world{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	for _, n := range []struct {
		ns   **lab.NS
		name string
	}{{&w.client, "client"}, {&w.host, "host"}, {&w.origin, "origin"}} {
		if *n.ns, err = lab.NewNS(n.name); err != nil {
			return nil, err
		}
	}
	if err := lab.Veth(w.client, "in0", w.host, innerLink); err != nil {
		return nil, err
	}
	if err := lab.Veth(w.host, "out0", w.origin, "out0"); err != nil {
		return nil, err
	}
	for _, a := range []struct {
		ns    *lab.NS
		link  string
		addrs []string
	}{
		{w.client, "in0", clientAddrs()},
		{w.host, innerLink, []string{hostInner}},
		{w.host, "out0", append([]string{hostPrimary}, egressAddrs()...)},
		{w.origin, "out0", []string{originAddr}},
	} {
		for _, s := range a.addrs {
			if err := a.ns.AddAddr(a.link, netip.PrefixFrom(netip.MustParseAddr(s), 24)); err != nil {
				return nil, err
			}
		}
	}
	if err := w.client.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(hostInner)); err != nil {
		return nil, err
	}
	if err := w.origin.AddRoute(netip.MustParsePrefix("10.0.0.0/24"), netip.MustParseAddr(hostPrimary)); err != nil {
		return nil, err
	}
	return w, w.tune()
}

// tune lifts what would be measured in place of the proxies. The host keeps
// the kernel's defaults for what belongs to them.
func (w *world) tune() error {
	for _, n := range []*lab.NS{w.client, w.host, w.origin} {
		for _, v := range [][2]string{
			{"net/core/somaxconn", "65535"},
			{"net/ipv4/tcp_max_syn_backlog", "65535"},
			{"net/ipv4/ip_local_port_range", fmt.Sprintf("%d %d", lowPort, highPort)},
		} {
			if err := n.Sysctl(v[0], v[1]); err != nil {
				return err
			}
		}
	}
	// The line without a proxy goes through the host too.
	if err := w.host.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return w.client.Sysctl("net/ipv4/tcp_tw_reuse", "1")
}

// hostPorts sets the range that the host takes local ports from.
func (w *world) hostPorts(low, high int) error {
	return w.host.Sysctl("net/ipv4/ip_local_port_range", fmt.Sprintf("%d %d", low, high))
}

func (w *world) close() error {
	var errs []error
	for _, n := range []*lab.NS{w.client, w.host, w.origin} {
		if n != nil {
			errs = append(errs, n.Close())
		}
	}
	return errors.Join(errs...)
}
