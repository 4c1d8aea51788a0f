package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/scripts/lab"
)

// divertWorld is the world with rules in the host that deliver TCP port 443 and
// UDP ports 1000 to 1999 from lan0 to the host itself.
type divertWorld struct {
	*lab.World
	t    *testing.T
	lan  uint32
	dir  string
	in   *netcfg.Netlink
	d    *Diverter
	tcp4 *net.TCPListener
	tcp6 *net.TCPListener
}

const divertTable = 11000

func newDivertWorld(t *testing.T) *divertWorld {
	t.Helper()
	lab.Require(t)
	w, err := lab.NewWorld(false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	h := w.Host.Netlink()
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	lan, err := h.LinkByName("lan0")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct {
		family int
		all    string
	}{{unix.AF_INET, "0.0.0.0/0"}, {unix.AF_INET6, "::/0"}} {
		_, all, err := net.ParseCIDR(f.all)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.RouteAdd(&netlink.Route{Dst: all, LinkIndex: lo.Attrs().Index, Table: divertTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}); err != nil {
			t.Fatal(err)
		}
		for _, e := range []struct {
			proto       int
			first, last uint16
		}{{unix.IPPROTO_TCP, 443, 443}, {unix.IPPROTO_UDP, 1000, 1999}} {
			r := netlink.NewRule()
			r.Family, r.IifName, r.IPProto, r.Table, r.Priority = f.family, "lan0", e.proto, divertTable, 100
			r.Dport = netlink.NewRulePortRange(e.first, e.last)
			if err := h.RuleAdd(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	mount, err := BPFFS(true)
	if err != nil {
		t.Fatal(err)
	}
	d := &divertWorld{World: w, t: t, lan: uint32(lan.Attrs().Index)}
	d.dir = filepath.Join(mount, "wayout", fmt.Sprintf("wayout-test-divert-%d", os.Getpid()))
	d.do(func() (err error) {
		d.in, err = netcfg.Open(netcfg.Options{StateDir: t.TempDir()})
		return err
	})
	t.Cleanup(func() { d.in.Close() })
	t.Cleanup(func() {
		if err := CleanDivert(d.dir, d.in); err != nil {
			t.Error(err)
		}
	})
	d.open()
	return d
}

func (w *divertWorld) do(f func() error) {
	w.t.Helper()
	if err := w.Host.Do(f); err != nil {
		w.t.Fatal(err)
	}
}

// open makes a Diverter of what is pinned.
func (w *divertWorld) open() {
	w.t.Helper()
	w.do(func() (err error) {
		w.d, err = NewDiverter(w.dir, w.in)
		return err
	})
	d := w.d
	w.t.Cleanup(func() { d.Close() })
}

// transparent listens on a loopback address, for others.
func (w *divertWorld) transparent(at string) *net.TCPListener {
	w.t.Helper()
	var l *net.TCPListener
	w.do(func() error {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
			}), err)
		}}
		lc.SetMultipathTCP(false)
		x, err := lc.Listen(w.t.Context(), "tcp", at)
		if err == nil {
			l = x.(*net.TCPListener)
		}
		return err
	})
	w.t.Cleanup(func() { l.Close() })
	return l
}

func raw(t *testing.T, l *net.TCPListener) Socket {
	t.Helper()
	c, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// set puts the usual entries in force, with sockets of a server's.
func (w *divertWorld) set() {
	w.t.Helper()
	w.tcp4, w.tcp6 = w.transparent("127.0.0.1:0"), w.transparent("[::1]:0")
	w.do(func() error {
		return w.d.Set(Diversion{Entries: w.entries(), Sockets: []DivertSockets{{TCP4: raw(w.t, w.tcp4), TCP6: raw(w.t, w.tcp6)}}})
	})
}

func (w *divertWorld) entries() []DivertEntry {
	return []DivertEntry{
		{Interface: w.lan, Protocol: unix.IPPROTO_TCP, First: 443, Last: 443},
		{Interface: w.lan, Protocol: unix.IPPROTO_UDP, First: 1000, Last: 1999},
	}
}

func (w *divertWorld) own(list ...string) {
	w.t.Helper()
	m := map[netip.Prefix]bool{}
	for _, s := range list {
		p := netip.MustParsePrefix(s)
		m[p] = true
	}
	if err := w.d.SetOwn(m); err != nil {
		w.t.Fatal(err)
	}
}

// answer writes a word on every connection and closes it.
func answer(l *net.TCPListener, word string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprintf(c, "%s at %s", word, c.LocalAddr())
		c.Close()
	}
}

// asks connects from the client and gives what it is told, or that nobody
// answers.
func (w *divertWorld) asks(at string, patience time.Duration) string {
	w.t.Helper()
	var told string
	err := w.Client.Do(func() error {
		c, err := net.DialTimeout("tcp", at, patience)
		if err != nil {
			told = "nobody"
			return nil
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		told = string(b)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return told
}

func (w *divertWorld) wants(when string, answers map[string]string) {
	w.t.Helper()
	for at, want := range answers {
		patience := 20 * time.Second
		if want == "nobody" {
			patience = 300 * time.Millisecond
		}
		if got := w.asks(at, patience); got != want {
			w.t.Errorf("%s: %s is answered by %q, want %q", when, at, got, want)
		}
	}
}

func TestDivert(t *testing.T) {
	w := newDivertWorld(t)
	host, err := w.Host.Listen(netip.MustParseAddrPort("[::]:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go answer(host, "host")
	w.own("10.0.0.1/32", "fd00::1/128", "198.51.100.2/32")
	w.set()
	go answer(w.tcp4, "daemon")
	go answer(w.tcp6, "daemon")
	taken := map[string]string{
		"203.0.113.99:443":      "daemon at 203.0.113.99:443",
		"[2001:db8:9::9]:443":   "daemon at [2001:db8:9::9]:443",
		"10.0.0.1:443":          "host at 10.0.0.1:443",
		"[fd00::1]:443":         "host at [fd00::1]:443",
		"198.51.100.2:443":      "host at 198.51.100.2:443",
		"203.0.113.99:444":      "nobody",                          // not forwarded here
		"[2001:db8:100::2]:443": "daemon at [2001:db8:100::2]:443", // own, but nobody said so
	}
	w.wants("diverted", taken)

	// The process ends: its sockets do, and the pins hold.
	w.tcp4.Close()
	w.tcp6.Close()
	if err := w.d.Close(); err != nil {
		t.Fatal(err)
	}
	w.wants("after the end", map[string]string{
		"203.0.113.99:443": "nobody", "[2001:db8:9::9]:443": "nobody", "10.0.0.1:443": "host at 10.0.0.1:443",
	})

	// The next one takes over.
	w.open()
	if w.d.lookup == nil || len(w.d.edges)+len(w.d.filters) != 1 {
		t.Fatalf("not taken over: %v, %v, %v", w.d.lookup, w.d.edges, w.d.filters)
	}
	w.wants("before its first Set", map[string]string{"203.0.113.99:443": "nobody"})
	w.own("10.0.0.1/32", "fd00::1/128", "198.51.100.2/32", "2001:db8:100::2/128")
	w.set()
	go answer(w.tcp4, "next")
	go answer(w.tcp6, "next")
	w.wants("taken over", map[string]string{
		"203.0.113.99:443": "next at 203.0.113.99:443", "[2001:db8:100::2]:443": "host at [2001:db8:100::2]:443",
	})
	w.own("10.0.0.1/32")
	w.wants("with other addresses of its own", map[string]string{"[fd00::1]:443": "next at [fd00::1]:443", "10.0.0.1:443": "host at 10.0.0.1:443"})

	// An interface that is yet to come: nobody gets what would be its traffic.
	w.do(func() error {
		return w.d.Set(Diversion{
			Entries: []DivertEntry{{Absent: true, Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}},
			Sockets: []DivertSockets{{TCP4: raw(t, w.tcp4), TCP6: raw(t, w.tcp6)}},
		})
	})
	absent := map[string]string{"203.0.113.99:443": "nobody", "[2001:db8:9::9]:443": "nobody", "10.0.0.1:443": "host at 10.0.0.1:443"}
	if !tellsInterface() { // what the rules lead here is the only server's
		absent["203.0.113.99:443"], absent["[2001:db8:9::9]:443"] = "next at 203.0.113.99:443", "next at [2001:db8:9::9]:443"
	}
	w.wants("an absent interface", absent)

	// A whole prefix and a range of ports, whatever comes in by whatever.
	w.do(func() error {
		return w.d.Set(Diversion{
			Entries: []DivertEntry{{Prefix: netip.MustParsePrefix("10.0.0.0/30"), Protocol: unix.IPPROTO_TCP, First: 440, Last: 450}},
			Sockets: []DivertSockets{{TCP4: raw(t, w.tcp4)}},
		})
	})
	w.wants("a prefix", map[string]string{"10.0.0.1:443": "next at 10.0.0.1:443", "10.0.0.1:441": "next at 10.0.0.1:441", "10.0.0.1:439": "nobody", "[fd00::1]:443": "host at [fd00::1]:443"})
	w.do(func() error {
		both := append(w.entries()[:1:1], DivertEntry{Server: 1, Prefix: netip.MustParsePrefix("10.0.0.0/30"), Protocol: unix.IPPROTO_TCP, First: 443, Last: 443})
		return w.d.Set(Diversion{Entries: both, Sockets: []DivertSockets{{}, {TCP4: raw(t, w.tcp4)}}})
	})
	w.wants("a prefix behind an interface", map[string]string{"10.0.0.1:443": "next at 10.0.0.1:443", "203.0.113.99:443": "nobody"})
	w.do(func() error { return w.d.Set(Diversion{}) })
	if len(w.d.edges)+len(w.d.filters) != 0 {
		t.Errorf("fragments are still looked for on %v, %v", w.d.edges, w.d.filters)
	}

	w.do(func() error { return w.d.Set(Diversion{Entries: w.entries(), Sockets: []DivertSockets{{}}}) })
	if err := w.d.Close(); err != nil {
		t.Fatal(err)
	}
	if names, err := divertPins(w.dir); len(names) == 0 || err != nil {
		t.Errorf("nothing is pinned: %v", err)
	}
	if err := CleanDivert(w.dir, w.in); err != nil {
		t.Fatal(err)
	}
	w.wants("cleaned", map[string]string{"10.0.0.1:443": "host at 10.0.0.1:443", "[2001:db8:9::9]:443": "host at [2001:db8:9::9]:443"})
	if names, err := divertPins(w.dir); len(names) > 0 || err != nil {
		t.Errorf("pinned are %v: %v", names, err)
	}
}

// TestDivertManyKinds: neither an interface that is yet to come nor the host's own
// addresses keep entries behind them from what is theirs.
func TestDivertManyKinds(t *testing.T) {
	w := newDivertWorld(t)
	host, err := w.Host.Listen(netip.MustParseAddrPort("[::]:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go answer(host, "host")
	w.own("10.0.0.1/32", "fd00::1/128", "198.51.100.2/32")
	one, two := w.transparent("127.0.0.1:0"), w.transparent("127.0.0.1:0")
	go answer(one, "one")
	go answer(two, "two")
	const tcp = unix.IPPROTO_TCP
	w.do(func() error {
		return w.d.Set(Diversion{
			Entries: []DivertEntry{
				{Absent: true, Protocol: tcp, First: 443, Last: 443},
				{Interface: w.lan, Protocol: tcp, First: 443, Last: 443},
				{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Protocol: tcp, First: 443, Last: 443, Server: 1},
			},
			Sockets: []DivertSockets{{TCP4: raw(t, one)}, {TCP4: raw(t, two)}},
		})
	})
	if err := w.d.SetLinks([]uint32{1, w.lan}); err != nil {
		t.Fatal(err)
	}
	w.wants("of several kinds", map[string]string{
		"203.0.113.99:443": "one at 203.0.113.99:443", "10.0.0.1:443": "host at 10.0.0.1:443", "198.51.100.2:443": "two at 198.51.100.2:443",
		"[2001:db8:9::9]:443": "nobody",
	})
}

// TestDivertStranger: what comes by an interface that has taken a diverted one's name
// is nobody's, until the entries know it.
func TestDivertStranger(t *testing.T) {
	w := newDivertWorld(t)
	host, err := w.Host.Listen(netip.MustParseAddrPort("[::]:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go answer(host, "host")
	w.own("10.0.0.1/32", "fd00::1/128")
	gone := uint32(1 << 20) // what lan0 was when the entries were made
	v := Diversion{Entries: []DivertEntry{{Interface: gone, Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}}, Sockets: make([]DivertSockets, 1)}
	w.do(func() error { return w.d.Set(v) })
	if err := w.d.SetLinks([]uint32{1, gone}); err != nil {
		t.Fatal(err)
	}
	held := map[string]string{"203.0.113.99:443": "nobody", "[2001:db8:9::9]:443": "nobody", "10.0.0.1:443": "host at 10.0.0.1:443", "[fd00::1]:443": "host at [fd00::1]:443"}
	w.wants("by another interface of the name", held)
	w.do(func() error { return w.d.Set(v) })
	w.wants("with the same again", held)
	if err := w.d.SetLinks([]uint32{1, w.lan}); err != nil {
		t.Fatal(err)
	}
	known := map[string]string{"[2001:db8:9::9]:443": "host at [2001:db8:9::9]:443", "10.0.0.1:443": "host at 10.0.0.1:443"}
	if !tellsInterface() {
		known["[2001:db8:9::9]:443"] = "nobody"
	}
	w.wants("known, and not diverted", known)
	if err := w.d.SetLinks([]uint32{1}); err != nil {
		t.Fatal(err)
	}
	w.wants("forgotten", held)
}

func TestDiversionMistakes(t *testing.T) {
	lab.Require(t)
	for name, v := range map[string]Diversion{
		"a server that is not there": {Entries: []DivertEntry{{Interface: 1}}},
		"too many entries":           {Entries: make([]DivertEntry, MaxDivertEntries+1), Sockets: make([]DivertSockets, 1)},
	} {
		if o, err := loadDiversion(v); err == nil {
			o.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

// TestOneServerEach: where the interface is not known two servers' ports may not meet.
func TestOneServerEach(t *testing.T) {
	tcp := func(server int, index uint32, first, last uint16) DivertEntry {
		return DivertEntry{Server: server, Interface: index, Absent: index == 0, Protocol: unix.IPPROTO_TCP, First: first, Last: last}
	}
	udp := tcp(1, 3, 443, 443)
	udp.Protocol = unix.IPPROTO_UDP
	prefix := DivertEntry{Server: 1, Prefix: netip.MustParsePrefix("10.0.0.0/8"), Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}
	for name, c := range map[string]struct {
		with DivertEntry
		ok   bool
	}{
		"the same server":      {tcp(0, 3, 443, 443), true},
		"the same interface":   {tcp(1, 2, 443, 443), true},
		"other ports":          {tcp(1, 3, 501, 600), true},
		"another protocol":     {udp, true},
		"the host's own":       {prefix, true},
		"the last port":        {tcp(1, 3, 500, 600), false},
		"all ports":            {tcp(1, 3, 0, AnyPort), false},
		"an interface to come": {tcp(1, 0, 443, 443), false},
	} {
		err := Diversion{Entries: []DivertEntry{tcp(0, 2, 400, 500), c.with}}.oneServerEach()
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrInterfaceUnknown) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDivertFragments asks the program about packets of all kinds.
func TestDivertFragments(t *testing.T) {
	lab.Require(t)
	objs, err := loadDiversion(Diversion{
		Entries: []DivertEntry{
			{Interface: 1, Protocol: unix.IPPROTO_UDP, First: 53, Last: 53},
			{Interface: 1, Protocol: unix.IPPROTO_TCP, First: 0, Last: AnyPort},
		},
		Sockets: make([]DivertSockets, 1),
	})
	if err != nil {
		var v *ebpf.VerifierError
		if errors.As(err, &v) {
			t.Fatalf("%+v", v)
		}
		t.Fatal(err)
	}
	defer objs.Close()
	if err := putOwn(objs, nil, map[netip.Prefix]bool{netip.MustParsePrefix("10.0.0.0/24"): true, netip.MustParsePrefix("10.0.0.9/32"): false, netip.MustParsePrefix("fd00::1/128"): true}); err != nil {
		t.Fatal(err)
	}
	four := func(dst string, proto byte, frag uint16) []byte {
		h := ip4("192.168.0.2", proto, 0)
		a := netip.MustParseAddr(dst).As4()
		copy(h[16:], a[:])
		binary.BigEndian.PutUint16(h[6:], frag)
		return frame(unix.ETH_P_IP, h, nil, 64)
	}
	six := func(dst string, next byte, headers ...byte) []byte {
		h := ip6("fd00::2", next)
		a := netip.MustParseAddr(dst).As16()
		copy(h[24:], a[:])
		return frame(unix.ETH_P_IPV6, h, headers, 64)
	}
	head := func(next byte) []byte { return []byte{next, 0, 0, 0, 0, 0, 0, 0} }
	chain := func(n int, last ...byte) []byte {
		var all []byte
		for range n {
			all = append(all, head(unix.IPPROTO_DSTOPTS)...)
		}
		return append(all, last...)
	}
	const mf, off, df = 0x2000, 185, 0x4000
	for _, tt := range []struct {
		name   string
		packet []byte
		drop   bool
	}{
		{"whole datagram", four("203.0.113.1", unix.IPPROTO_UDP, 0), false},
		{"whole, not to be fragmented", four("203.0.113.1", unix.IPPROTO_UDP, df), false},
		{"first fragment", four("203.0.113.1", unix.IPPROTO_UDP, mf), true},
		{"middle fragment", four("203.0.113.1", unix.IPPROTO_UDP, mf|off), true},
		{"last fragment", four("203.0.113.1", unix.IPPROTO_UDP, off), true},
		{"to the host", four("10.0.0.1", unix.IPPROTO_UDP, off), false},
		{"to what is taken out of the host's", four("10.0.0.9", unix.IPPROTO_UDP, off), true},
		{"to a group", four("224.0.0.251", unix.IPPROTO_UDP, off), false},
		{"to all", four("255.255.255.255", unix.IPPROTO_UDP, off), false},
		{"of a protocol that is taken whole", four("203.0.113.1", unix.IPPROTO_TCP, off), false},
		{"of another protocol", four("203.0.113.1", unix.IPPROTO_ICMP, off), false},
		{"IPv6, whole", six("2001:db8::1", unix.IPPROTO_UDP), false},
		{"IPv6, whole behind headers", six("2001:db8::1", unix.IPPROTO_HOPOPTS, append(head(unix.IPPROTO_DSTOPTS), head(unix.IPPROTO_UDP)...)...), false},
		{"IPv6 fragment", six("2001:db8::1", unix.IPPROTO_FRAGMENT, head(unix.IPPROTO_UDP)...), true},
		{"IPv6 fragment to the host", six("fd00::1", unix.IPPROTO_FRAGMENT, head(unix.IPPROTO_UDP)...), false},
		{"IPv6 fragment to a group", six("ff02::fb", unix.IPPROTO_FRAGMENT, head(unix.IPPROTO_UDP)...), false},
		{"IPv6 fragment of a protocol that is taken whole", six("2001:db8::1", unix.IPPROTO_FRAGMENT, head(unix.IPPROTO_TCP)...), false},
		{"IPv6 fragment of another protocol", six("2001:db8::1", unix.IPPROTO_FRAGMENT, head(unix.IPPROTO_ICMPV6)...), false},
		{"IPv6 fragment that hides its protocol", six("2001:db8::1", unix.IPPROTO_FRAGMENT, head(unix.IPPROTO_DSTOPTS)...), true},
		{"IPv6 fragment behind headers", six("2001:db8::1", unix.IPPROTO_HOPOPTS, append(head(unix.IPPROTO_FRAGMENT), head(unix.IPPROTO_UDP)...)...), true},
		{"IPv6, too many headers", six("2001:db8::1", unix.IPPROTO_DSTOPTS, chain(9, head(unix.IPPROTO_UDP)...)...), true},
		{"ARP", frame(unix.ETH_P_ARP, make([]byte, 28), nil, 18), false},
	} {
		want := uint32(tcxNext)
		if tt.drop {
			want = 2
		}
		if got := run(t, objs.Fragments, tt.packet, skb{Ifindex: 1}); got != want {
			t.Errorf("%s: verdict %#x, want %#x", tt.name, got, want)
		}
	}
	elsewhere, err := loadDiversion(Diversion{
		Entries: []DivertEntry{{Interface: 2, Protocol: unix.IPPROTO_UDP, First: 53, Last: 53}},
		Sockets: make([]DivertSockets, 1),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	if got := run(t, elsewhere.Fragments, four("203.0.113.1", unix.IPPROTO_UDP, off), skb{Ifindex: 1}); got != tcxNext {
		t.Errorf("on another interface: verdict %#x", got)
	}
}

func TestProbeDivert(t *testing.T) {
	lab.Require(t)
	for _, f := range []Feature{ProbeDivert(), ProbeFragments(netcfg.TryIngress)} {
		if !f.OK || f.Err != nil {
			t.Errorf("%+v", f)
		}
	}
}
