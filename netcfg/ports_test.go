package netcfg_test

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

// TestCountPorts counts the sockets of two paths towards two targets, and none
// of anybody else.
func TestCountPorts(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	count := func(l loopback) {
		first, firstPort := l.listener(t, ourMark.Value|1, 8) // a listener takes no port of a target
		second, secondPort := l.listener(t, 0, 8)
		connect := func(mark uint32, listener, port int) *wire {
			near := l.bound(t, mark)
			if err := unix.Connect(near, l.at(port)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				t.Fatal(err)
			}
			ready(t, listener, unix.POLLIN)
			far, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			must(t, err)
			must(t, unix.SetsockoptInt(far, unix.SOL_SOCKET, unix.SO_MARK, int(foreignMark.Value))) // has inherited the listener's
			ready(t, near, unix.POLLOUT)
			return l.wire(t, near, far)
		}
		var all []*wire
		for _, m := range []uint32{1, 1, 1, 2} {
			all = append(all, connect(ourMark.Value|m, first, firstPort))
		}
		all = append(all, connect(ourMark.Value|1, second, secondPort), connect(foreignMark.Value, second, secondPort))
		for _, m := range []uint32{ourMark.Value | 2, ourMark.Value | 2, foreignMark.Value} { // datagrams, to nobody yet
			udp, err := unix.Socket(l.family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			must(t, err)
			defer unix.Close(udp)
			must(t, unix.SetsockoptInt(udp, unix.SOL_SOCKET, unix.SO_MARK, int(m)))
			must(t, unix.Bind(udp, l.at(0)))
		}
		all[0].closeNear()
		all[0].await("FIN-WAIT-2")
		all[0].closeFar()
		all[0].await("TIME-WAIT")
		got, err := k.CountPorts(t.Context(), ourMark, 1)
		must(t, err)
		slices.SortFunc(got, func(a, b netcfg.PortUse) int {
			return cmp.Or(cmp.Compare(a.Mark, b.Mark), b.Total()-a.Total())
		})
		addr := l.addr.Unmap()
		to := func(port int) netip.AddrPort { return netip.AddrPortFrom(addr, uint16(port)) }
		want := []netcfg.PortUse{
			{Mark: ourMark.Value | 1, Source: addr, Target: to(firstPort), InUse: 2, TimeWait: 1},
			{Mark: ourMark.Value | 1, Source: addr, Target: to(secondPort), InUse: 1},
			{Mark: ourMark.Value | 2, Source: addr, InUse: 2},
			{Mark: ourMark.Value | 2, Source: addr, Target: to(firstPort), InUse: 1},
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %+v\nwant %+v", l.name, got, want)
		}
		if got, err = k.CountPorts(t.Context(), ourMark, 2); err != nil || len(got) != 2 || !slices.Contains(got, want[0]) || !slices.Contains(got, want[2]) {
			t.Errorf("%s: two at least: %+v, %v", l.name, got, err)
		}
		must(t, errors.Join(unix.Close(first), unix.Close(second)))
		if _, err := k.EndSockets(t.Context(), ourMark); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range loopbacks() {
		count(l)
	}
	if _, err := k.CountPorts(t.Context(), netcfg.Mark{}, 1); !errors.Is(err, netcfg.ErrLayout) {
		t.Errorf("no mark: %v", err)
	}
}
