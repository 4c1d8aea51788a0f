package lab

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestProgramSeesItsNamespaceAndFiles(t *testing.T) {
	n := TestNS(t, "a")
	var out bytes.Buffer
	cmd, err := n.Start(Program{
		Path: "/bin/sh", Args: []string{"-c", "cat /etc/hosts; ls -1 /proc/self/net/dev_snmp6"},
		Files:  map[string]string{"/etc/hosts": "192.0.2.1 here\n"},
		Stdout: &out, Stderr: &out,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	if got, want := out.String(), "192.0.2.1 here\nlo\n"; got != want {
		t.Fatalf("the program saw %q, want %q", got, want)
	}
}

// TestWorldLeadsByMainRouting shows that the world's own routing does what the
// tests of the product take for granted: without a pin a connection leaves by
// the first uplink's primary address.
func TestWorldLeadsByMainRouting(t *testing.T) {
	Require(t)
	w, err := NewWorld(true)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct{ origin, source string }{
		{OriginAddr4, Primary1Of4},
		{OriginAddr6, ""}, // the kernel takes any of the interface's addresses
	} {
		at := netip.AddrPortFrom(netip.MustParseAddr(c.origin), 80)
		l, err := w.Origin.Listen(at)
		if err != nil {
			t.Fatal(err)
		}
		o := StartOrigin(l)
		var conn net.Conn
		if conn, err = w.Host.Dial(at); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		all, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		_, body, _ := bytes.Cut(all, []byte("\r\n\r\n"))
		var seen Seen
		if err := json.Unmarshal(body, &seen); err != nil {
			t.Fatalf("%v in %s", err, all)
		}
		if c.source != "" && seen.Source != c.source {
			t.Errorf("left by %s, want %s", seen.Source, c.source)
		}
		if seen.Method != http.MethodGet || seen.Conn != 1 {
			t.Errorf("the origin saw %+v", seen)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestWorldsPrefixes shows that an address of each prefix is answered once the host
// has made the prefix its own, and that neighbour discovery is what SharedNet6 lacks.
func TestWorldsPrefixes(t *testing.T) {
	Require(t)
	w, err := NewWorld(false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct{ net, origin, alone string }{
		{RoutedNet4, OriginAddr4, ""},
		{RoutedNet6, OriginAddr6, ""},
		{SharedNet4, OriginAddr4, ""},
		{SharedNet6, OriginAddr6, "2001:db8:100:cafe::77"}, // the one that it has on its interface
	} {
		p := netip.MustParsePrefix(c.net)
		if err := w.Host.AddLocal(p); err != nil {
			t.Fatal(err)
		}
		src := p.Addr().Next().Next()
		if c.alone != "" {
			src = netip.MustParseAddr(c.alone)
			if err := w.Host.AddAddr("eth0", netip.PrefixFrom(src, 128)); err != nil {
				t.Fatal(err)
			}
		}
		l, err := w.Origin.Listen(netip.MustParseAddrPort(net.JoinHostPort(c.origin, "80")))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := w.Host.DialFrom(src, netip.MustParseAddrPort(l.Addr().String()))
		if err != nil {
			t.Fatalf("%s: %v", c.net, err)
		}
		seen, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := netip.MustParseAddrPort(seen.RemoteAddr().String()).Addr(); got != src {
			t.Errorf("the origin saw %s, want %s", got, src)
		}
		seen.Close()
		conn.Close()
		l.Close()
	}
	if err := w.ISP1.ForgetNeighbours("host0"); err != nil {
		t.Fatal(err)
	}
	host0, err := w.ISP1.Netlink().LinkByName("host0")
	if err != nil {
		t.Fatal(err)
	}
	left, err := w.ISP1.Netlink().NeighList(host0.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range left {
		if n.IP.IsGlobalUnicast() {
			t.Errorf("neighbour %s is left", n.IP)
		}
	}
}
