package escaper_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/scripts/lab"
	"wayout/selection"
)

// TestManyPerPort: 100 local ports carry a connection each to ten
// destinations, because bind leaves the port to connect; and when they are
// used up, that is told apart from an address that has gone. It runs in a
// namespace of its own, where no listener has one of the ports.
func TestManyPerPort(t *testing.T) {
	if !isChild(t) {
		runChildIn(t, lab.TestNS(t, "ports"))
		return
	}
	const low, ports, destinations = 40000, 100, 10
	s, err := escaper.NewSockets(low, low+ports-1)
	if err != nil {
		t.Fatal(err)
	}
	if lo, hi, ok := s.PortRange(); !ok || lo != low || hi != low+ports-1 {
		t.Fatalf("port range %d to %d, %v", lo, hi, ok)
	}
	d := door(t, direct(t, escaper.Options{Sockets: s, EnableSelection: true, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.5"), Weight: 1}}}))
	used := map[uint16]int{}
	var held []*escaper.Conn
	defer func() {
		for _, c := range held {
			_ = c.TCP.(*net.TCPConn).SetLinger(0) // leave no TIME_WAIT behind: the ports are few
			_ = c.Close()
		}
	}()
	var last *origin
	for i := range destinations {
		last = listen(t, "127.0.0.1:"+strconv.Itoa(20001+i)).hold(t) // outside the range
		for range ports {
			c, err := d.Open(context.Background(), request(literal(last.addr), byClient(pathID("a"))))
			if err != nil {
				t.Fatalf("connection %d: %v", len(held), err)
			}
			held = append(held, c)
			used[c.Source.Port()]++
			if saw := last.next(t); saw.Addr() != addr("127.0.0.5") {
				t.Fatalf("the origin saw %s", saw)
			}
		}
	}
	if len(held) != ports*destinations || len(used) != ports {
		t.Errorf("%d connections from %d ports, want %d from %d", len(held), len(used), ports*destinations, ports)
	}
	_, err = d.Open(context.Background(), request(literal(last.addr), byClient(pathID("a"))))
	want := "path out/a: the ports of 127.0.0.5 towards " + last.addr.String() + " are used up"
	if !errors.Is(err, selection.ErrPorts) || errors.Is(err, selection.ErrBind) || err.Error() != want {
		t.Errorf("101st connection to one destination: %v, want %s", err, want)
	}
	c := d.Table().Path("out/a").Counters()
	if c.Attempts[escaper.ResultOK] != 1000 || c.Attempts[escaper.ResultLocal] != 1 || c.Open != 1000 || c.Failed() != 1 {
		t.Errorf("counters %+v", c)
	}
}

func TestSockets(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Fatal(err)
	}
	lo, hi, err := escaper.ParsePorts(string(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ low, high, wantLow, wantHigh uint16 }{
		{0, 0, lo, hi},
		{1, 65535, lo, hi},
		{lo + 10, lo + 20, lo + 10, lo + 20},
		{1, lo, lo, lo},
		{hi, 65535, hi, hi},
	} {
		s, err := escaper.NewSockets(tt.low, tt.high)
		if err != nil {
			t.Errorf("%d to %d: %v", tt.low, tt.high, err)
			continue
		}
		if low, high, _ := s.PortRange(); low != tt.wantLow || high != tt.wantHigh {
			t.Errorf("%d to %d: got %d to %d, want %d to %d", tt.low, tt.high, low, high, tt.wantLow, tt.wantHigh)
		}
	}
	for _, tt := range [][2]uint16{{1, lo - 1}, {hi + 1, 65535}, {lo + 5, lo + 4}} {
		if _, err := escaper.NewSockets(tt[0], tt[1]); hi < 65535 && err == nil {
			t.Errorf("%d to %d is accepted, the host has %d to %d", tt[0], tt[1], lo, hi)
		}
	}
	for _, s := range []string{"", "1", "1 2 3", "a b", "1 65536"} {
		if _, _, err := escaper.ParsePorts(s); err == nil {
			t.Errorf("sysctl %q is accepted", s)
		}
	}
}

// TestAddressGone: a path whose address is not on the host fails its dials and
// takes no other address.
func TestAddressGone(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{
		{ID: "gone", V4: addr("192.0.2.77"), Weight: 1}, {ID: "here", V4: addr("127.0.0.2"), Weight: 1},
	}}))
	_, err := d.Open(context.Background(), request(literal(o.addr), byClient(pathID("gone"))))
	const want = "path out/gone: cannot bind 192.0.2.77: it is not on this host"
	if !errors.Is(err, selection.ErrBind) || errors.Is(err, selection.ErrPorts) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if c := d.Table().Path("out/gone").Counters(); c.Attempts[escaper.ResultLocal] != 1 || c.Open != 0 {
		t.Errorf("counters %+v", c)
	}
	select {
	case a := <-o.seen:
		t.Errorf("the origin saw %s", a)
	default:
	}
	if !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("%v does not tell its cause", err)
	}
}

func TestDeviceGone(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{Nodes: []escaper.NodeOptions{
		{ID: "a", V4: addr("127.0.0.2"), Interface: "nosuch0", BindToDevice: true, Weight: 1},
	}}))
	if _, err := d.Open(context.Background(), request(literal(o.addr), selection.Selection{})); !errors.Is(err, selection.ErrBind) {
		t.Errorf("got %v", err)
	}
}

// TestUnbound: a path without an address leaves by an address of its
// interface, and by none before it is told which.
func TestUnbound(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{Nodes: []escaper.NodeOptions{
		{ID: "lo", Unbound: selection.V4, Interface: "lo", BindToDevice: true, Weight: 1},
	}}))
	if _, err := d.Open(context.Background(), request(literal(o.addr), selection.Selection{})); !errors.Is(err, selection.ErrFamily) {
		t.Errorf("without an address: %v", err)
	}
	for _, source := range []string{"127.0.0.3", "127.0.0.4"} {
		d.Table().Path("out/lo").SetSource(selection.V4, addr(source))
		c, err := d.Open(context.Background(), request(literal(o.addr), selection.Selection{}))
		if err != nil {
			t.Fatal(err)
		}
		if saw := o.next(t); saw != c.Source || c.Source.Addr() != addr(source) {
			t.Errorf("the origin saw %s, the connection says %s, want %s", saw, c.Source, source)
		}
		_ = c.Close()
	}
}

func TestConnectErrors(t *testing.T) {
	closed := listen(t, "127.0.0.1:0")
	refusing := closed.addr
	_ = closed.Close()
	deaf := blackhole(t, "127.0.0.1:0")
	d := door(t, direct(t, escaper.Options{
		ConnectTimeout: 300 * time.Millisecond,
		Nodes:          []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}},
	}))
	p := d.Table().Path("out/a")
	t.Run("refused", func(t *testing.T) {
		_, err := d.Open(context.Background(), request(literal(refusing), selection.Selection{}))
		if !errors.Is(err, escaper.ErrRefused) || err.Error() != "path out/a: connect to "+refusing.String()+": refused" {
			t.Errorf("got %v", err)
		}
		if c := p.Counters(); c.Attempts[escaper.ResultRefused] != 1 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		start := time.Now()
		_, err := d.Open(context.Background(), request(literal(deaf), selection.Selection{}))
		if !errors.Is(err, escaper.ErrTimeout) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took < 300*time.Millisecond || took > 3*time.Second {
			t.Errorf("took %v", took)
		}
		if c := p.Counters(); c.Attempts[escaper.ResultTimeout] != 1 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("deadline of the caller", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := d.Open(ctx, request(literal(deaf), selection.Selection{})); !errors.Is(err, escaper.ErrTimeout) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		before := p.Counters()
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(20*time.Millisecond, cancel)
		start := time.Now()
		if _, err := d.Open(ctx, request(literal(deaf), selection.Selection{})); !errors.Is(err, context.Canceled) || errors.Is(err, escaper.ErrTimeout) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took > 250*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if after := p.Counters(); after != before {
			t.Errorf("counted: %+v, then %+v", before, after)
		}
	})
	if c := p.Counters(); c.Open != 0 {
		t.Errorf("left open: %+v", c)
	}
}

// blackhole returns an address that answers no connection request: a listener
// whose queue is full.
func blackhole(t *testing.T, at string) netip.AddrPort {
	t.Helper()
	a, _ := fullListener(t, at)
	return a
}

// fullListener is blackhole; its second result makes room in the queue, so
// that the next connection request (Linux repeats one after a second) is
// answered.
func fullListener(t *testing.T, at string) (netip.AddrPort, func()) {
	t.Helper()
	want := netip.MustParseAddrPort(at)
	domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(want.Port()), Addr: [4]byte{127, 0, 0, 1}})
	if want.Addr().Is6() {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(want.Port()), Addr: want.Addr().As16()}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, sa); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	f, err := net.FileListener(dup(t, fd))
	if err != nil {
		t.Fatal(err)
	}
	a := f.Addr().(*net.TCPAddr).AddrPort()
	_ = f.Close()
	for range 8 {
		c, err := net.DialTimeout("tcp", a.String(), 100*time.Millisecond)
		if err != nil {
			return a, func() {
				n, _, err := unix.Accept(fd)
				if err != nil {
					t.Error(err)
				}
				_ = unix.Close(n)
			}
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	t.Fatal("the listener's queue does not fill")
	return a, nil
}

func dup(t *testing.T, fd int) *os.File {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(n), "listener")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestHappyEyeballs: an IPv6 address that does not answer delays the IPv4 one
// by the attempt delay; one that refuses, or whose bind fails, not at all.
func TestHappyEyeballs(t *testing.T) {
	const delay = 150 * time.Millisecond
	four := listen(t, "127.0.0.1:0").hold(t)
	port := four.addr.Port()
	six := netip.AddrPortFrom(addr("::1"), port)
	node := escaper.NodeOptions{ID: "a", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1}
	n := &names{hosts: map[string]resolve.Answer{
		"both.example":   {V4: addrs("127.0.0.1"), V6: addrs("::1")},
		"many.example":   {V4: addrs("127.0.0.1", "127.0.0.7"), V6: addrs("::1", "::1", "::1")},
		"late.example":   {V4: addrs("127.0.0.1"), Pending: selection.V6},
		"denied.example": {V4: addrs("127.0.0.1"), V6: addrs("fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe")},
	}}
	open := func(t *testing.T, d *escaper.Door, host string) (*escaper.Conn, time.Duration, error) {
		t.Helper()
		start := time.Now()
		c, err := d.Open(context.Background(), request(escaper.Target{Host: host, Port: port}, selection.Selection{}))
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return c, time.Since(start), err
	}
	make := func(t *testing.T, node escaper.NodeOptions) (*escaper.Door, *escaper.Path) {
		t.Helper()
		d := door(t, direct(t, escaper.Options{Resolver: n, AttemptDelay: delay, ConnectTimeout: 2 * time.Second, Nodes: []escaper.NodeOptions{node}}))
		return d, d.Table().Path("out/a")
	}

	t.Run("refused", func(t *testing.T) {
		d, p := make(t, node)
		c, took, err := open(t, d, "both.example")
		if err != nil || c.Source.Addr() != addr("127.0.0.2") || took >= delay {
			t.Errorf("%+v after %v: %v", c, took, err)
		}
		four.next(t)
		if c := p.Counters(); c.Attempts[escaper.ResultRefused] != 1 || c.Attempts[escaper.ResultOK] != 1 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("bind fails", func(t *testing.T) {
		gone := node
		gone.V6 = addr("2001:db8::77")
		d, p := make(t, gone)
		c, took, err := open(t, d, "both.example")
		if err != nil || c.Source.Addr() != addr("127.0.0.2") || took >= delay {
			t.Errorf("%+v after %v: %v", c, took, err)
		}
		four.next(t)
		if c := p.Counters(); c.Attempts[escaper.ResultLocal] != 1 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("filtered", func(t *testing.T) {
		d, p := make(t, node)
		c, took, err := open(t, d, "denied.example")
		if err != nil || c.Remote != four.addr || took >= delay {
			t.Errorf("%+v after %v: %v", c, took, err)
		}
		four.next(t)
		if c := p.Counters(); c.Failed() != 0 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("wrong family never dialled", func(t *testing.T) {
		only := node
		only.V6 = netip.Addr{}
		d, p := make(t, only)
		if c, _, err := open(t, d, "both.example"); err != nil || c.Remote != four.addr {
			t.Errorf("%+v: %v", c, err)
		}
		four.next(t)
		if c := p.Counters(); c.Failed() != 0 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("family that is down is not dialled", func(t *testing.T) {
		d, p := make(t, node)
		p.SetFamilyState(selection.V6, escaper.Down, "gone")
		if c, _, err := open(t, d, "both.example"); err != nil || c.Remote != four.addr {
			t.Errorf("%+v: %v", c, err)
		}
		four.next(t)
		if c := p.Counters(); c.Failed() != 0 {
			t.Errorf("counters %+v", c)
		}
	})
	deaf := blackhole(t, six.String())
	if deaf != six {
		t.Fatalf("blackhole at %s, want %s", deaf, six)
	}
	t.Run("silent", func(t *testing.T) {
		d, p := make(t, node)
		c, took, err := open(t, d, "both.example")
		if err != nil || c.Source.Addr() != addr("127.0.0.2") || c.Remote != four.addr || took < delay || took > delay+time.Second {
			t.Errorf("%+v after %v: %v", c, took, err)
		}
		if saw := four.next(t); saw != c.Source {
			t.Errorf("the origin saw %s", saw)
		}
		if c := p.Counters(); c.Failed() != 0 || c.Attempts[escaper.ResultOK] != 1 {
			t.Errorf("the loser is counted: %+v", c)
		}
	})
	t.Run("silent, then in turn", func(t *testing.T) {
		d, _ := make(t, node)
		c, took, err := open(t, d, "many.example")
		if err != nil || c.Remote != four.addr || took < delay || took > 2*delay {
			t.Errorf("%+v after %v: %v", c, took, err)
		}
		four.next(t)
	})
	t.Run("all fail", func(t *testing.T) {
		_ = four.Close()
		d, p := make(t, node)
		start := time.Now()
		_, _, err := open(t, d, "many.example")
		// The deaf addresses last to the end; the refusal says more.
		if took := time.Since(start); !errors.Is(err, escaper.ErrRefused) || took < time.Second || took > 4*time.Second {
			t.Errorf("after %v: %v", took, err)
		}
		if c := p.Counters(); c.Attempts[escaper.ResultRefused] != 2 || c.Attempts[escaper.ResultTimeout] != 3 || c.Open != 0 {
			t.Errorf("counters %+v", c)
		}
	})
	t.Run("a family that was late is asked again", func(t *testing.T) {
		d, _ := make(t, node)
		before := len(n.questions())
		_, _, err := open(t, d, "late.example")
		if !errors.Is(err, escaper.ErrRefused) {
			t.Errorf("got %v", err)
		}
		if asked := n.questions()[before:]; !slices.Equal(asked, []string{"late.example IPv4 or IPv6", "late.example IPv6"}) {
			t.Errorf("asked %v", asked)
		}
	})
}

// TestCancelledRace ends a race from outside, and by the connect timeout.
func TestCancelledRace(t *testing.T) {
	deaf := blackhole(t, "127.0.0.1:0")
	n := &names{hosts: map[string]resolve.Answer{"deaf.example": {V4: addrs("127.0.0.1", "127.0.0.1", "127.0.0.1")}}}
	d := door(t, direct(t, escaper.Options{
		Resolver: n, AttemptDelay: 10 * time.Millisecond, ConnectTimeout: 200 * time.Millisecond,
		Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}},
	}))
	r := request(escaper.Target{Host: "deaf.example", Port: deaf.Port()}, selection.Selection{})
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := d.Open(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := d.Open(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	start := time.Now()
	if _, err := d.Open(context.Background(), r); !errors.Is(err, escaper.ErrTimeout) || time.Since(start) > 2*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	if c := d.Table().Path("out/a").Counters(); c.Open != 0 || c.Attempts[escaper.ResultOK] != 0 {
		t.Errorf("counters %+v", c)
	}
}

// TestLateFamily: an answer that has come for one family only does not decide
// alone, when no connection comes of it.
func TestLateFamily(t *testing.T) {
	six := listen(t, "[::1]:0").hold(t)
	n := &names{
		hosts: map[string]resolve.Answer{
			"late.example":   {V4: addrs("127.0.0.1"), Pending: selection.V6},
			"never.example":  {V4: addrs("127.0.0.1"), Pending: selection.V6},
			"denied.example": {V4: addrs("127.0.0.1"), Pending: selection.V6},
		},
		late: map[string][]netip.Addr{"late.example": addrs("::1"), "denied.example": addrs("fe80::1")},
	}
	d := door(t, direct(t, escaper.Options{Resolver: n, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1}}}))
	to := func(host string) *escaper.Request {
		return request(escaper.Target{Host: host, Port: six.addr.Port()}, selection.Selection{})
	}
	c, err := d.Open(context.Background(), to("late.example"))
	if err != nil {
		t.Fatal(err)
	}
	if six.next(t) != c.Source {
		t.Errorf("left from %s", c.Source)
	}
	_ = c.Close()
	for _, host := range []string{"never.example", "denied.example"} {
		if _, err := d.Open(context.Background(), to(host)); !errors.Is(err, escaper.ErrRefused) {
			t.Errorf("%s: %v", host, err)
		}
	}
}

// TestCloseRace: when attempts connect at the same time, one is kept.
func TestCloseRace(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	n := &names{hosts: map[string]resolve.Answer{"www.example": {V4: addrs("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1")}}}
	d := door(t, direct(t, escaper.Options{Resolver: n, AttemptDelay: 1, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	p := d.Table().Path("out/a")
	for range 300 {
		c, err := d.Open(context.Background(), request(escaper.Target{Host: "www.example", Port: o.addr.Port()}, selection.Selection{}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.TCP.Write([]byte("x")); err != nil {
			t.Fatalf("the winner: %v", err)
		}
		_ = c.Close()
	}
	for end := time.Now().Add(5 * time.Second); p.Counters().Open != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("losers are left open: %+v", p.Counters())
		}
	}
	if c := p.Counters(); c.Attempts[escaper.ResultOK] < 300 || c.Failed() != 0 {
		t.Errorf("counters %+v", c)
	}
}

// TestOutOfDescriptors runs out of descriptors for a moment, in a child of its
// own.
func TestOutOfDescriptors(t *testing.T) {
	if !isChild(t) {
		runChild(t)
		return
	}
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: highest(t) + 1, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := d.Open(context.Background(), request(literal(o.addr), selection.Selection{}))
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, escaper.ErrResources) {
		t.Errorf("got %v", err)
	}
	c, err := d.Open(context.Background(), request(literal(o.addr), selection.Selection{}))
	if err != nil {
		t.Fatalf("afterwards: %v", err)
	}
	_ = c.Close()
}

// highest fills the gaps in the descriptors and returns the highest one.
func highest(t *testing.T) uint64 {
	t.Helper()
	var top uint64
	for range 2 { // a gap is gone once duplicates lie above what was highest
		entries, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for range entries {
			f := dup(t, 0)
			top = max(top, uint64(f.Fd()))
		}
	}
	return top
}

// TestClassify: one error number means different things of different calls.
func TestClassify(t *testing.T) {
	from, to := addr("198.51.100.1"), netip.MustParseAddrPort("203.0.113.7:443")
	p := &escaper.Path{Name: "out/a"}
	for _, tt := range []struct {
		call   string
		errno  syscall.Errno
		want   error
		result escaper.Result
	}{
		{"bind", syscall.EADDRNOTAVAIL, selection.ErrBind, escaper.ResultLocal},
		{"bind", syscall.EADDRINUSE, selection.ErrBind, escaper.ResultLocal},
		{"bind", syscall.EPERM, selection.ErrBind, escaper.ResultLocal},
		{"setsockopt SO_MARK", syscall.EPERM, selection.ErrBind, escaper.ResultLocal},
		{"setsockopt SO_BINDTODEVICE", syscall.ENODEV, selection.ErrBind, escaper.ResultLocal},
		{"socket", syscall.EAFNOSUPPORT, selection.ErrBind, escaper.ResultLocal},
		{"socket", syscall.EMFILE, escaper.ErrResources, escaper.ResultLocal},
		{"socket", syscall.ENFILE, escaper.ErrResources, escaper.ResultLocal},
		{"connect", syscall.ENOBUFS, escaper.ErrResources, escaper.ResultLocal},
		{"connect", syscall.EADDRNOTAVAIL, selection.ErrPorts, escaper.ResultLocal},
		{"connect", syscall.EAGAIN, selection.ErrPorts, escaper.ResultLocal},
		{"connect", syscall.EPERM, escaper.ErrGuarded, escaper.ResultLocal},
		{"connect", syscall.ECONNREFUSED, escaper.ErrRefused, escaper.ResultRefused},
		{"connect", syscall.ECONNRESET, escaper.ErrReset, escaper.ResultReset},
		{"connect", syscall.ETIMEDOUT, escaper.ErrTimeout, escaper.ResultTimeout},
		{"connect", syscall.ENETUNREACH, escaper.ErrUnreachable, escaper.ResultUnreachable},
		{"connect", syscall.EHOSTUNREACH, escaper.ErrUnreachable, escaper.ResultUnreachable},
		{"connect", syscall.EACCES, escaper.ErrUnreachable, escaper.ResultUnreachable},
		{"connect", syscall.EINVAL, escaper.ErrUnreachable, escaper.ResultUnreachable},
		{"connect", syscall.ENODEV, selection.ErrBind, escaper.ResultLocal},
	} {
		err := &net.OpError{Op: "dial", Err: os.NewSyscallError(tt.call, tt.errno)}
		r, got := escaper.Classify(p, err, from, to)
		if !errors.Is(got, tt.want) || r != tt.result || !errors.Is(got, tt.errno) {
			t.Errorf("%s: %s: %v (%s), want %v (%s)", tt.call, tt.errno, got, r, tt.want, tt.result)
		}
	}
	for _, err := range []error{context.DeadlineExceeded, os.ErrDeadlineExceeded} {
		if r, got := escaper.Classify(p, &net.OpError{Op: "dial", Err: err}, from, to); !errors.Is(got, escaper.ErrTimeout) || r != escaper.ResultTimeout {
			t.Errorf("%v: %v (%s)", err, got, r)
		}
	}
}
