// Package lab makes small networks out of network namespaces, for the tests
// and for the demo. It speaks netlink itself, so that neither needs the ip
// program, and its namespaces have no name: they are gone with the last
// descriptor or process that holds them, however the program ended.
package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is one network namespace, with loopback up.
type NS struct {
	Name string // for messages only

	fd netns.NsHandle
	nl *netlink.Handle
}

// NewNS makes a namespace. It needs CAP_SYS_ADMIN.
func NewNS(name string) (*NS, error) {
	type made struct {
		fd  netns.NsHandle
		err error
	}
	c := make(chan made)
	go func() {
		// Never unlocked: the thread is in another namespace, so it has to
		// end with this goroutine instead of going back to the scheduler.
		runtime.LockOSThread()
		fd, err := netns.New()
		if err == nil {
			err = skipDAD()
		}
		c <- made{fd, err}
	}()
	m := <-c
	if m.err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, m.err)
	}
	nl, err := netlink.NewHandleAt(m.fd, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("netlink in namespace %s: %w", name, err), m.fd.Close())
	}
	n := &NS{Name: name, fd: m.fd, nl: nl}
	if err := n.Up("lo"); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// skipDAD makes addresses usable at once: duplicate address
// detection would keep each IPv6 address tentative for over a second.
func skipDAD() error {
	for _, f := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f+"/accept_dad", []byte("0"), 0o644); err != nil {
			return fmt.Errorf("switch off duplicate address detection: %w", err)
		}
	}
	return nil
}

// Close lets go of the namespace. It ends once no process is left in it.
func (n *NS) Close() error {
	n.nl.Close()
	return n.fd.Close()
}

// Netlink is the namespace's own netlink handle.
func (n *NS) Netlink() *netlink.Handle { return n.nl }

// Do runs f on a thread that is in the namespace and waits for it. Only f's
// own goroutine is there: what starts others (the resolver, a dialler that
// races two families) has no place in f. Sockets and processes that f makes
// belong to the namespace for good.
func (n *NS) Do(f func() error) error {
	c := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, as in NewNS
		if err := netns.Set(n.fd); err != nil {
			c <- fmt.Errorf("enter namespace %s: %w", n.Name, err)
			return
		}
		c <- f()
	}()
	return <-c
}

// Listen opens a TCP listener in the namespace. It can be served anywhere.
func (n *NS) Listen(addr netip.AddrPort) (*net.TCPListener, error) {
	var l *net.TCPListener
	err := n.Do(func() error {
		var err error
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in %s: %w", n.Name, err)
	}
	return l, nil
}

// Dial connects from the namespace to a literal address.
func (n *NS) Dial(addr netip.AddrPort) (*net.TCPConn, error) {
	var conn *net.TCPConn
	err := n.Do(func() error {
		var err error
		conn, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(addr))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial from %s: %w", n.Name, err)
	}
	return conn, nil
}

// Veth joins two namespaces by a pair of interfaces and brings both up.
func Veth(a *NS, aName string, b *NS, bName string) error {
	// With the queues' length that the kernel prefers: it gives that to an interface
	// without one when clsact comes to it.
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aName
	pair := &netlink.Veth{
		LinkAttrs:     attrs,
		PeerName:      bName,
		PeerTxQLen:    -1,
		PeerNamespace: netlink.NsFd(b.fd),
	}
	if err := a.nl.LinkAdd(pair); err != nil {
		return fmt.Errorf("join %s %s and %s %s: %w", a.Name, aName, b.Name, bName, err)
	}
	return errors.Join(a.Up(aName), b.Up(bName))
}

// Up brings an interface up.
func (n *NS) Up(link string) error { return n.onLink(link, n.nl.LinkSetUp) }

// Down takes an interface down.
func (n *NS) Down(link string) error { return n.onLink(link, n.nl.LinkSetDown) }

// SetMTU limits what an interface carries in a packet.
func (n *NS) SetMTU(link string, bytes int) error {
	return n.onLink(link, func(l netlink.Link) error { return n.nl.LinkSetMTU(l, bytes) })
}

func (n *NS) onLink(name string, f func(netlink.Link) error) error {
	l, err := n.nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s in %s: %w", name, n.Name, err)
	}
	if err := f(l); err != nil {
		return fmt.Errorf("interface %s in %s: %w", name, n.Name, err)
	}
	return nil
}

// AddAddr puts addresses on an interface. An IPv6 address is usable at once.
func (n *NS) AddAddr(link string, addrs ...netip.Prefix) error {
	return n.onLink(link, func(l netlink.Link) error {
		for _, a := range addrs {
			if err := n.nl.AddrAdd(l, addr(a)); err != nil {
				return fmt.Errorf("add %s: %w", a, err)
			}
		}
		return nil
	})
}

// AddTentative puts IPv6 addresses on an interface that are not usable before
// duplicate address detection is over, which takes a second or two where the
// interface's accept_dad is on.
func (n *NS) AddTentative(link string, addrs ...netip.Prefix) error {
	return n.onLink(link, func(l netlink.Link) error {
		for _, a := range addrs {
			if err := n.nl.AddrAdd(l, &netlink.Addr{IPNet: ipNet(a)}); err != nil {
				return fmt.Errorf("add %s: %w", a, err)
			}
		}
		return nil
	})
}

// DelAddr takes addresses off an interface.
func (n *NS) DelAddr(link string, addrs ...netip.Prefix) error {
	return n.onLink(link, func(l netlink.Link) error {
		for _, a := range addrs {
			if err := n.nl.AddrDel(l, addr(a)); err != nil {
				return fmt.Errorf("delete %s: %w", a, err)
			}
		}
		return nil
	})
}

func addr(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// AddRoute adds a route by a gateway; a default route when dst has no bits.
func (n *NS) AddRoute(dst netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(dst), Gw: via.AsSlice()}
	if err := n.nl.RouteAdd(r); err != nil {
		return fmt.Errorf("route %s via %s in %s: %w", dst, via, n.Name, err)
	}
	return nil
}

// AddNeighbours adds a route to a prefix whose addresses are all on an interface's
// link: each is asked for there.
func (n *NS) AddNeighbours(dst netip.Prefix, link string) error {
	return n.onLink(link, func(l netlink.Link) error {
		return n.nl.RouteAdd(&netlink.Route{Dst: ipNet(dst), LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK})
	})
}

// AddLocal makes a whole prefix the namespace's own (AnyIP).
func (n *NS) AddLocal(dst netip.Prefix) error {
	return n.onLink("lo", func(l netlink.Link) error {
		return n.nl.RouteAdd(&netlink.Route{
			Dst: ipNet(dst), LinkIndex: l.Attrs().Index,
			Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		})
	})
}

// ForgetNeighbours empties an interface's table of neighbours, of both families.
// The kernel's limit for it holds for all namespaces together.
func (n *NS) ForgetNeighbours(link string) error {
	return n.onLink(link, func(l netlink.Link) error {
		list, err := n.nl.NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, e := range list {
			if err := n.nl.NeighDel(&e); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forget %s: %w", e.IP, err)
			}
		}
		return nil
	})
}

// DialFrom connects from the namespace to a literal address, from a source that it
// need not have (IP_FREEBIND), as IPv6 wants it of the addresses of AddLocal.
func (n *NS) DialFrom(src netip.Addr, addr netip.AddrPort) (*net.TCPConn, error) {
	var conn net.Conn
	err := n.Do(func() error {
		d := net.Dialer{
			LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0)),
			Timeout:   30 * time.Second,
			Control: func(_, _ string, c syscall.RawConn) (err error) {
				return errors.Join(c.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
				}), err)
			},
		}
		var err error
		conn, err = d.Dial("tcp", addr.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial from %s in %s: %w", src, n.Name, err)
	}
	return conn.(*net.TCPConn), nil
}

// DelRoute takes away what AddRoute added.
func (n *NS) DelRoute(dst netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(dst), Gw: via.AsSlice()}
	if err := n.nl.RouteDel(r); err != nil {
		return fmt.Errorf("delete route %s via %s in %s: %w", dst, via, n.Name, err)
	}
	return nil
}

// Sysctl writes a value below /proc/sys in the namespace, for example
// ("net/ipv4/ip_forward", "1").
func (n *NS) Sysctl(name, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
			return fmt.Errorf("sysctl %s in %s: %w", name, n.Name, err)
		}
		return nil
	})
}
