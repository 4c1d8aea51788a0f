package router

import (
	"bytes"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"wayout/netcfg"
	"wayout/router/escaper"
	"wayout/scripts/lab"
	"wayout/selection"
)

// portPaths makes paths with numbers and marks of their own.
func portPaths(t *testing.T) []*escaper.Path {
	t.Helper()
	d, err := escaper.NewDirect(escaper.Options{Name: "out", Nodes: []escaper.NodeOptions{
		{ID: "a", V4: netip.MustParseAddr("127.0.0.2"), Number: 1, Mark: 0x11},
		{ID: "b", V4: netip.MustParseAddr("127.0.0.3"), Number: 2, Mark: 0x12},
		{ID: "net", Net4: netip.MustParsePrefix("127.9.0.0/16"), Number: 3, Mark: 0x13},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return d.Paths()
}

func TestPortMeter(t *testing.T) {
	const ports = 1000
	var log bytes.Buffer
	m := newPortMeter(slog.New(slog.NewTextHandler(&log, nil)))
	paths := portPaths(t)
	now := time.Unix(1000, 0)
	target := netip.MustParseAddrPort("192.0.2.1:443")
	other := netip.MustParseAddrPort("192.0.2.2:443")
	use := func(mark uint32, to netip.AddrPort, inUse, timeWait int) netcfg.PortUse {
		return netcfg.PortUse{Mark: mark, Source: netip.MustParseAddr("127.0.0.2"), Target: to, InUse: inUse, TimeWait: timeWait}
	}
	for i, step := range []struct {
		uses    []netcfg.PortUse
		reuse   bool
		want    string // of a, as metrics have it
		warned  bool
		crowded bool
	}{
		{nil, false, "none", false, false},
		{[]netcfg.PortUse{use(0x11, target, 10, 90), use(0x11, other, 5, 5), use(0x99, target, 999, 1)}, false, "10 90 +Inf", false, false},
		{[]netcfg.PortUse{use(0x11, target, 10, 92)}, false, "10 92 898", false, false},       // 1 a second
		{[]netcfg.PortUse{use(0x11, target, 10, 132)}, false, "10 132 42.9", true, false},     // 20 a second
		{[]netcfg.PortUse{use(0x11, target, 10, 790)}, false, "10 790 0.607903", false, true}, // in the same burst: less than two looks are left
		{[]netcfg.PortUse{use(0x11, target, 10, 780)}, false, "10 780 +Inf", false, false},    // and again
		{[]netcfg.PortUse{use(0x11, target, 960, 0)}, false, "960 0 0.470588", false, true},   // nearly gone
		{[]netcfg.PortUse{use(0x11, target, 960, 0)}, false, "960 0 +Inf", false, true},       // and still
		{[]netcfg.PortUse{use(0x11, target, 600, 50)}, false, "600 50 +Inf", false, false},    // calm
		{[]netcfg.PortUse{use(0x11, target, 600, 250)}, false, "600 250 1.5", true, true},     // the next burst
		{[]netcfg.PortUse{use(0x11, target, 600, 400)}, false, "600 400 0", false, true},      // all gone
		{[]netcfg.PortUse{use(0x11, target, 600, 400)}, true, "600 400 +Inf", false, false},   // those that are kept may be taken
		{nil, false, "none", false, false},                                                                                 // quiet
		{[]netcfg.PortUse{use(0x11, other, 850, 0)}, false, "850 0 +Inf", true, false},                                     // another target
		{[]netcfg.PortUse{use(0x11, netip.AddrPort{}, 960, 0), use(0x11, target, 9, 0)}, false, "960 0 +Inf", true, false}, // by UDP
		{[]netcfg.PortUse{use(0x12, other, 990, 0)}, false, "none", true, false},                                           // another path
		{[]netcfg.PortUse{use(0x13, other, 990, 0), use(0x11, other, 1, 0)}, false, "1 0 +Inf", true, false},               // an address of many
	} {
		now = now.Add(2 * time.Second)
		log.Reset()
		m.take(paths, step.uses, ports, step.reuse, now)
		got := "none"
		if p := m.of(1); p != nil {
			got = fmt.Sprintf("%d %d %.6g", p.InUse, p.TimeWait, p.Exhaustion)
		}
		if got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
		if warned := strings.Contains(log.String(), "ports are running out"); warned != step.warned {
			t.Errorf("step %d: the log says %q", i, &log)
		}
		if crowded := paths[0].Crowded(target); crowded != step.crowded {
			t.Errorf("step %d: crowded %t", i, crowded)
		}
		byUDP := slices.ContainsFunc(step.uses, func(u netcfg.PortUse) bool { return !u.Target.IsValid() })
		if crowded := paths[0].Crowded(escaper.AllDatagrams()); crowded != byUDP {
			t.Errorf("step %d: crowded for datagrams: %t", i, crowded)
		}
		if paths[2].Crowded(other) {
			t.Errorf("step %d: a whole prefix is crowded", i)
		}
	}
	if m.of(7) != nil {
		t.Error("a path that is not there")
	}
}

// Only paths that may have taken many ports are worth a look.
func TestPortMeterIsBusy(t *testing.T) {
	lab.Require(t) // it marks a socket
	m := newPortMeter(slog.New(slog.DiscardHandler))
	paths := portPaths(t)
	now := time.Unix(1000, 0)
	if m.busy(paths, 4, now) {
		t.Error("busy without a connection")
	}
	at := netip.MustParseAddrPort("127.0.0.1:0")
	l, err := listen(at, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := escaper.NewDirect(escaper.Options{Name: "out", Nodes: []escaper.NodeOptions{{ID: "a", V4: netip.MustParseAddr("127.0.0.2"), Number: 1, Weight: 1}}, Filter: allowLoopback(t)})
	if err != nil {
		t.Fatal(err)
	}
	d.Paths()[0].SetFamilyState(selection.V4, escaper.Up, "")
	d.Publish()
	tab, err := escaper.NewTable(d)
	if err != nil {
		t.Fatal(err)
	}
	var door escaper.Door
	door.Swap(tab)
	defer door.Swap(nil)
	to := netip.MustParseAddrPort(l.Addr().String())
	c, err := door.Open(t.Context(), &escaper.Request{Escaper: "out", Target: escaper.Target{Addr: to.Addr(), Port: to.Port()}})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		wait time.Duration
		want bool
	}{{0, true}, {time.Second, true}} {
		now = now.Add(step.wait)
		if got := m.busy(d.Paths(), 4, now); got != step.want {
			t.Errorf("open: busy %t", got)
		}
		if m.busy(d.Paths(), 1000, now) {
			t.Error("busy with one of a thousand")
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if !m.busy(d.Paths(), 4, now.Add(time.Second)) {
		t.Error("a connection that was closed a second ago still takes its port")
	}
	if m.busy(d.Paths(), 4, now.Add(5*time.Minute)) {
		t.Error("one that was closed minutes ago does not")
	}
}

func allowLoopback(t *testing.T) *escaper.Filter {
	t.Helper()
	f, err := escaper.NewFilter(nil, []string{"loopback"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestNeverIsInfinite(t *testing.T) {
	if !math.IsInf(seconds(never), 1) || seconds(90*time.Second) != 90 {
		t.Error(seconds(never), seconds(90*time.Second))
	}
}
