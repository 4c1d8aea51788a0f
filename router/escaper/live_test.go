package escaper_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/scripts/lab"
	"wayout/selection"
)

// TestLive is a host with a primary address that no path has, and paths with
// others; the origin, in another namespace, judges which addresses were used.
func TestLive(t *testing.T) {
	if isChild(t) {
		live(t)
		return
	}
	host, far := lab.TestNS(t, "host"), lab.TestNS(t, "origin")
	if err := lab.Veth(host, "eth0", far, "eth0"); err != nil {
		t.Fatal(err)
	}
	prefixes := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	if err := errors.Join(
		host.AddAddr("eth0", prefixes("10.9.0.1/24", "10.9.0.11/32", "10.9.0.12/32", "fd09::1/64", "fd09::11/128")...),
		far.AddAddr("eth0", prefixes("10.9.0.9/24", "fd09::9/64")...),
	); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	saw := map[netip.Addr]int{}
	var wg sync.WaitGroup
	for _, at := range []string{"10.9.0.9:80", "[fd09::9]:80"} {
		l, err := far.Listen(netip.MustParseAddrPort(at))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				mu.Lock()
				saw[c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()]++
				mu.Unlock()
			}
		})
		defer l.Close()
	}
	runChildIn(t, host)
	mu.Lock()
	defer mu.Unlock()
	for _, s := range []string{"10.9.0.11", "10.9.0.12", "fd09::11"} {
		if saw[addr(s)] == 0 {
			t.Errorf("the origin never saw %s", s)
		}
		delete(saw, addr(s))
	}
	if len(saw) != 0 {
		t.Errorf("the origin saw addresses of no path: %v", saw)
	}
}

func live(t *testing.T) {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	nl := func(f func(netlink.Link, *netlink.Addr) error, a string) {
		t.Helper()
		na, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		na.Flags = unix.IFA_F_NODAD
		if err := f(eth0, na); err != nil {
			t.Fatal(err)
		}
	}
	n := &names{hosts: map[string]resolve.Answer{"www.example": {V4: addrs("10.9.0.9"), V6: addrs("fd09::9")}}}
	d := door(t, direct(t, escaper.Options{
		EnableSelection: true, Resolver: n, ConnectTimeout: 10 * time.Second,
		Nodes: []escaper.NodeOptions{
			{ID: "dual", V4: addr("10.9.0.11"), V6: addr("fd09::11"), Mark: 0x1234, Interface: "eth0", BindToDevice: true, Weight: 1},
			{ID: "four", V4: addr("10.9.0.12"), Weight: 1},
			{ID: "astray", V4: addr("10.9.0.1"), Interface: "lo", BindToDevice: true},
		},
	}))
	four, six := escaper.Target{Addr: addr("10.9.0.9"), Port: 80}, escaper.Target{Addr: addr("fd09::9"), Port: 80}
	name := escaper.Target{Host: "www.example", Port: 80}
	via := func(id string, to escaper.Target) (*escaper.Conn, error) {
		c, err := d.Open(context.Background(), request(to, byClient(pathID(id))))
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return c, err
	}
	good := func(id string, to escaper.Target, source string) *escaper.Conn {
		t.Helper()
		c, err := via(id, to)
		if err != nil {
			t.Fatal(err)
		}
		if c.Source.Addr() != addr(source) {
			t.Fatalf("%s to %s left from %s, want %s", id, to, c.Source, source)
		}
		return c
	}
	bad := func(id string, to escaper.Target, want error, text string) {
		t.Helper()
		if _, err := via(id, to); !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s to %s: %v, want %v with %q", id, to, err, want, text)
		}
	}

	pinned := good("dual", four, "10.9.0.11")
	options(t, pinned)
	options(t, good("dual", six, "fd09::11"))
	good("dual", name, "fd09::11")
	gone := good("four", four, "10.9.0.12")
	good("four", name, "10.9.0.12")
	bad("four", six, selection.ErrFamily, "out/four")

	// An address goes, and nobody has told us yet.
	nl(netlink.AddrDel, "10.9.0.12/32")
	bad("four", four, selection.ErrBind, "cannot bind 10.9.0.12: it is not on this host")
	nl(netlink.AddrDel, "fd09::11/128")
	bad("dual", six, selection.ErrBind, "cannot bind fd09::11: it is not on this host")
	good("dual", name, "10.9.0.11") // the path's other family serves

	// Then the watcher does.
	reason := errors.New("address 10.9.0.12 is not on this host")
	p := d.Table().Path("out/four")
	p.SetFamilyState(selection.V4, escaper.Down, reason.Error())
	if p.Kill(one("10.9.0.12"), reason) == 0 || !errors.Is(gone.Killed(), reason) {
		t.Errorf("the connection of an address that has gone: %v", gone.Killed())
	}
	if _, err := gone.TCP.Write([]byte("x")); err == nil {
		t.Error("it still takes bytes")
	}
	if _, err := pinned.TCP.Write([]byte("x")); err != nil {
		t.Errorf("the other path's connection: %v", err)
	}
	bad("four", four, selection.ErrDown, "path out/four is down: "+reason.Error())

	// And it comes back.
	nl(netlink.AddrAdd, "10.9.0.12/32")
	nl(netlink.AddrAdd, "fd09::11/128")
	p.SetFamilyState(selection.V4, escaper.Up, "")
	good("four", four, "10.9.0.12")
	good("dual", six, "fd09::11")

	// What the routing tables say.
	bad("four", escaper.Target{Addr: addr("192.0.2.1"), Port: 80}, escaper.ErrUnreachable, "network is unreachable")
	for kind, dst := range map[int]string{unix.RTN_UNREACHABLE: "192.0.2.1/32", unix.RTN_PROHIBIT: "192.0.2.2/32", unix.RTN_BLACKHOLE: "192.0.2.3/32"} {
		_, ipnet, err := net.ParseCIDR(dst)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.RouteAdd(&netlink.Route{Dst: ipnet, Type: kind}); err != nil {
			t.Fatal(err)
		}
		bad("four", escaper.Target{Addr: netip.MustParsePrefix(dst).Addr(), Port: 80}, escaper.ErrUnreachable, "")
	}
	// A device and an address that contradict each other go nowhere.
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if c, err := d.Open(ctx, request(four, byClient(pathID("astray")))); err == nil {
		t.Errorf("bound to lo, and connected from %s", c.Source)
		_ = c.Close()
	}
}

// options checks what is set on a path's socket.
func options(t *testing.T, c *escaper.Conn) {
	t.Helper()
	raw, err := c.TCP.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		for _, o := range []struct {
			name             string
			level, opt, want int
		}{
			{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, 0x1234},
			{"IP_BIND_ADDRESS_NO_PORT", unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1},
			{"TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1},
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0},
			{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP}, // and not MPTCP
		} {
			if got, err := unix.GetsockoptInt(int(fd), o.level, o.opt); err != nil || got != o.want {
				t.Errorf("%s is %d (%v), want %d", o.name, got, err, o.want)
			}
		}
		if got, err := unix.GetsockoptInt(int(fd), unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE); err != nil || got == 0 {
			t.Errorf("IP_LOCAL_PORT_RANGE is %#x (%v)", got, err)
		}
		if got, err := unix.GetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE); err != nil || got != "eth0" {
			t.Errorf("SO_BINDTODEVICE is %q (%v)", got, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
