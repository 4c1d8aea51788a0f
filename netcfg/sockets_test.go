package netcfg_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/scripts/lab"
)

var (
	ourMark     = netcfg.Mark{Value: 0x10000, Mask: 0xff0000}
	foreignMark = netcfg.Mark{Value: 0x20000, Mask: 0xff0000}
)

// wire is one connection of a test, over loopback: the near socket has the mark.
type wire struct {
	t         *testing.T
	near, far int // descriptors; -1: closed
	port      int // of the near end
}

// nextPort gives every socket of a test a port of its own, below those that the kernel
// chooses from, so that ss can be asked for it.
var nextPort atomic.Int32

func port() int { return 10000 + int(nextPort.Add(1))%20000 }

// loopback is an address for sockets of a family; mapped ones are of IPv6 and talk
// IPv4.
type loopback struct {
	name   string
	family int
	addr   netip.Addr
}

func loopbacks() []loopback {
	return []loopback{
		{"IPv4", unix.AF_INET, netip.MustParseAddr("127.0.0.1")},
		{"IPv6", unix.AF_INET6, netip.MustParseAddr("::1")},
		{"mapped", unix.AF_INET6, netip.MustParseAddr("::ffff:127.0.0.1")},
	}
}

func (l loopback) at(port int) unix.Sockaddr {
	if l.family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: l.addr.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: l.addr.As16(), Port: port}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (l loopback) socket(t *testing.T, mark uint32) int {
	t.Helper()
	fd, err := unix.Socket(l.family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	if mark != 0 {
		must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)))
	}
	return fd
}

func (l loopback) listener(t *testing.T, mark uint32, backlog int) (fd, port int) {
	t.Helper()
	fd = l.bound(t, mark)
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096))
	must(t, unix.Listen(fd, backlog))
	return fd, portOf(t, fd)
}

// bound is a socket at a port of its own.
func (l loopback) bound(t *testing.T, mark uint32) int {
	t.Helper()
	fd := l.socket(t, mark)
	must(t, unix.Bind(fd, l.at(port())))
	return fd
}

func portOf(t *testing.T, fd int) int {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	must(t, err)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Port
	case *unix.SockaddrInet6:
		return sa.Port
	}
	t.Fatalf("a socket at %v", sa)
	return 0
}

// connect makes a connection and accepts it.
func (l loopback) connect(t *testing.T, mark uint32) *wire {
	t.Helper()
	listener, port := l.listener(t, 0, 8)
	near := l.bound(t, mark)
	if err := unix.Connect(near, l.at(port)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	ready(t, listener, unix.POLLIN)
	far, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	must(t, err)
	must(t, unix.Close(listener))
	ready(t, near, unix.POLLOUT)
	return l.wire(t, near, far)
}

func (l loopback) wire(t *testing.T, near, far int) *wire {
	w := &wire{t: t, near: near, far: far, port: portOf(t, near)}
	t.Cleanup(func() {
		for _, fd := range []int{w.near, w.far} {
			if fd >= 0 {
				_ = unix.Close(fd)
			}
		}
	})
	return w
}

// ready waits for an event of a descriptor.
func ready(t *testing.T, fd int, events int16) {
	t.Helper()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, 5000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 || err != nil {
			t.Fatalf("nothing happens at a socket: %d, error %v", n, err)
		}
		return
	}
}

// closeNear and the others below bring a connection on its way to its state.
func (w *wire) closeNear() {
	must(w.t, unix.Close(w.near))
	w.near = -1
}

func (w *wire) closeFar() {
	must(w.t, unix.Close(w.far))
	w.far = -1
}

func (w *wire) endNear() { must(w.t, unix.Shutdown(w.near, unix.SHUT_WR)) }

func (w *wire) endFar() { must(w.t, unix.Shutdown(w.far, unix.SHUT_WR)) }

// fill sends until the far end takes no more, so that no FIN gets through.
func (w *wire) fill() {
	b := make([]byte, 64<<10)
	for {
		if _, err := unix.Write(w.near, b); err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				w.t.Fatal(err)
			}
			return
		}
	}
}

// await waits until ss shows the near end in a state.
func (w *wire) await(state string) {
	w.t.Helper()
	awaitState(w.t, w.port, state)
}

func awaitState(t *testing.T, port int, state string) {
	t.Helper()
	var got string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = ss(t)[port]; got == state {
			return
		}
	}
	t.Fatalf("the socket at port %d is %q, want %q", port, got, state)
}

// ss gives the states of all sockets by their local ports, as the program ss tells
// them; "LISTEN SYN-RECV" for a listener with a half-open connection.
func ss(t *testing.T) map[int]string {
	t.Helper()
	if _, err := exec.LookPath("ss"); err != nil {
		lab.Missing(t, "ss")
	}
	out, err := exec.Command("ss", "-H", "-t", "-a", "-n", "-O").Output()
	must(t, err)
	states := make(map[int]string)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if strings.HasSuffix(f[3], ":*") {
			continue // it ends at this moment
		}
		var port int
		if _, err := fmt.Sscanf(f[3][strings.LastIndexByte(f[3], ':')+1:], "%d", &port); err != nil {
			t.Fatalf("ss says %q", line)
		}
		if was := states[port]; was == "SYN-RECV" {
			states[port] = f[0] + " " + was
		} else {
			states[port] = strings.TrimSpace(was + " " + f[0])
		}
	}
	return states
}

// socketCase leads a connection to a state.
type socketCase struct {
	name  string
	state netcfg.TCPState
	ss    string
	reset bool // the peer is told
	late  bool // ended from Linux 6.11 on, by some kernels before
	make  func(t *testing.T, l loopback, mark uint32) *wire
}

func lead(steps ...func(*wire)) func(*testing.T, loopback, uint32) *wire {
	return func(t *testing.T, l loopback, mark uint32) *wire {
		w := l.connect(t, mark)
		for _, step := range steps {
			step(w)
		}
		return w
	}
}

func socketCases() []socketCase {
	awaits := func(state string) func(*wire) { return func(w *wire) { w.await(state) } }
	all := []socketCase{
		{"open", netcfg.Established, "ESTAB", true, false, lead()},
		{"connecting", netcfg.SynSent, "SYN-SENT", false, false, func(t *testing.T, l loopback, mark uint32) *wire {
			full, port := l.listener(t, 0, 0)
			t.Cleanup(func() { _ = unix.Close(full) })
			first, near := l.socket(t, 0), l.bound(t, mark)
			t.Cleanup(func() { _ = unix.Close(first) })
			_ = unix.Connect(first, l.at(port))
			ready(t, first, unix.POLLOUT)
			if err := unix.Connect(near, l.at(port)); !errors.Is(err, unix.EINPROGRESS) {
				t.Fatalf("connect to a full listener: %v", err)
			}
			return l.wire(t, near, -1)
		}},
		{"half open", netcfg.SynRecv, "LISTEN SYN-RECV", false, false, func(t *testing.T, l loopback, mark uint32) *wire {
			listener, port := l.listener(t, mark, 8)
			must(t, unix.SetsockoptInt(listener, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 60))
			far := l.socket(t, 0)
			_ = unix.Connect(far, l.at(port))
			ready(t, far, unix.POLLOUT)
			return l.wire(t, listener, far)
		}},
		{"closed by the peer", netcfg.CloseWait, "CLOSE-WAIT", true, false, lead((*wire).endFar)},
		{"ended", netcfg.FinWait2, "FIN-WAIT-2", true, false, lead((*wire).endNear)},
		{"closed", netcfg.FinWait2, "FIN-WAIT-2", false, true, lead((*wire).closeNear)},
		{"closed, with a long FIN_WAIT2", netcfg.FinWait2, "FIN-WAIT-2", true, true, lead(func(w *wire) {
			must(w.t, unix.SetsockoptInt(w.near, unix.IPPROTO_TCP, unix.TCP_LINGER2, 100))
		}, (*wire).closeNear)},
		{"closed, the peer is stuck", netcfg.FinWait1, "FIN-WAIT-1", true, true, lead((*wire).fill, (*wire).closeNear)},
		{"closed by both, the peer is stuck", netcfg.Closing, "CLOSING", false, true, lead((*wire).fill, (*wire).closeNear, (*wire).endFar)},
		{
			"closed after the peer, which is stuck", netcfg.LastAck, "LAST-ACK", false, true,
			lead((*wire).fill, (*wire).endFar, awaits("CLOSE-WAIT"), (*wire).closeNear),
		},
		{"closed by both", netcfg.TimeWait, "TIME-WAIT", false, true, lead((*wire).closeNear, awaits("FIN-WAIT-2"), (*wire).closeFar)},
	}
	if netcfg.KernelSince(6, 11) {
		return all
	}
	return slices.DeleteFunc(all, func(c socketCase) bool { return c.late })
}

// TestEndSockets: sockets in every state go when they have the mark, their peers are
// told as far as TCP does that, and no others are touched.
func TestEndSockets(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	ctx := t.Context()
	type made struct {
		*wire
		socketCase
		name string
		ours bool
	}
	var all []made
	want := make(netcfg.SocketCount)
	for _, l := range loopbacks() {
		for _, c := range socketCases() {
			for _, mark := range []uint32{ourMark.Value | 0x42, foreignMark.Value | 0x42, 0} {
				m := made{c.make(t, l, mark), c, fmt.Sprintf("%s, %s, mark 0x%x", c.name, l.name, mark), mark&ourMark.Mask == ourMark.Value}
				m.await(c.ss)
				all = append(all, m)
				if m.ours {
					want[c.state]++
					if c.state == netcfg.SynRecv {
						want[netcfg.Listen]++
					}
				}
			}
		}
	}
	before := ss(t)
	for _, m := range []netcfg.Mark{ourMark, foreignMark} {
		if got, err := k.CountSockets(ctx, m); err != nil || !maps.Equal(got, want) {
			t.Errorf("mark 0x%x: %s, error %v, want %s", m.Value, got, err, want)
		}
	}
	if got := ss(t); !maps.Equal(got, before) {
		t.Errorf("after counting %v, before %v", got, before)
	}

	if n, err := k.EndSockets(ctx, ourMark); n != want.Total() || err != nil {
		t.Errorf("%d sockets ended, error %v, want %d", n, err, want.Total())
	}
	after := ss(t)
	for _, m := range all {
		state := after[m.port]
		switch {
		case m.ours && state != "":
			t.Errorf("%s: is still %s", m.name, state)
		case !m.ours && state != before[m.port]:
			t.Errorf("%s: is %q, was %q", m.name, state, before[m.port])
		}
		if m.far < 0 {
			continue
		}
		if m.ours && m.reset {
			ready(t, m.far, 0) // POLLERR and POLLHUP come unasked
		}
		errno, err := unix.GetsockoptInt(m.far, unix.SOL_SOCKET, unix.SO_ERROR)
		must(t, err)
		// After the peer's own FIN a reset reads EPIPE.
		if told := errno == int(unix.ECONNRESET) || errno == int(unix.EPIPE); told != (m.ours && m.reset) || errno != 0 && !told {
			t.Errorf("%s: the peer reads %v, want a reset: %v", m.name, unix.Errno(errno), m.ours && m.reset)
		}
		if m.ours && m.near >= 0 && m.state == netcfg.Established {
			if _, err := unix.Read(m.near, make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("%s: its process reads error %v, want ECONNABORTED", m.name, err)
			}
		}
	}
	for _, m := range []netcfg.Mark{ourMark, {Value: 0x7f0000, Mask: 0x7f0000}} {
		if n, err := k.EndSockets(ctx, m); n != 0 || err != nil {
			t.Errorf("a second time: %d sockets ended, error %v", n, err)
		}
		if got, err := k.CountSockets(ctx, m); err != nil || got.Total() != 0 || got.String() != "none" {
			t.Errorf("after the end: %s, error %v", got, err)
		}
	}
}

// TestEndSocketsOnOldKernels: below Linux 6.11 what was closed stays and is named, and
// the others go.
func TestEndSocketsOnOldKernels(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	v4 := loopbacks()[0]
	v4.connect(t, ourMark.Value)
	lead((*wire).fill, (*wire).closeNear)(t, v4, ourMark.Value).await("FIN-WAIT-1")
	n, err := k.EndSocketsAsOld(t.Context(), ourMark)
	const want = "the kernel cannot end sockets: below Linux 6.11 it leaves behind those that were closed with something left to send; " +
		"1 of 2 are left (1 FIN_WAIT1)"
	if n != 1 || !errors.Is(err, netcfg.ErrNoDestroy) || err.Error() != want {
		t.Errorf("%d sockets ended, error %v\nwant 1 and %s", n, err, want)
	}
	left, err := k.CountSockets(t.Context(), ourMark)
	if err != nil || left.String() != "1 FIN_WAIT1" {
		t.Errorf("left are %s, error %v", left, err)
	}
}

func TestLeftOver(t *testing.T) {
	open, late, kept, orphan := netcfg.Leftover{State: netcfg.Established, Refused: true},
		netcfg.Leftover{State: netcfg.TimeWait, Kept: true, Refused: true},
		netcfg.Leftover{State: netcfg.FinWait2, Kept: true, Refused: true}, netcfg.Leftover{State: netcfg.LastAck}
	for _, tt := range []struct {
		list []netcfg.Leftover
		want string
		none bool // ErrNoDestroy
	}{
		{[]netcfg.Leftover{late, open, orphan}, "without CONFIG_INET_DIAG_DESTROY; 3 of 3 are left (1 ESTABLISHED, 1 TIME_WAIT, 1 LAST_ACK)", true},
		{[]netcfg.Leftover{late, kept, orphan}, "too old for those in TIME_WAIT", true},
		{[]netcfg.Leftover{orphan}, "below Linux 6.11", true},
		{[]netcfg.Leftover{{State: netcfg.SynSent}}, "go on being made: 1 of 1 are left (1 SYN_SENT)", false},
	} {
		err := netcfg.LeftOver(tt.list...)
		if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, netcfg.ErrNoDestroy) != tt.none {
			t.Errorf("%+v: got error %v, want one with %q", tt.list, err, tt.want)
		}
	}
	if err := netcfg.LeftOver(); err != nil {
		t.Errorf("nothing left: %v", err)
	}
}

// TestEndSocketsElsewhere: the sockets of the Netlink's namespace are ended, not those
// of the caller's.
func TestEndSocketsElsewhere(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	v4 := loopbacks()[0]
	here := v4.connect(t, ourMark.Value)
	far := elsewhere(t)
	far.do(func() {
		ip(t, "link set lo up")
		there := v4.connect(t, ourMark.Value)
		if n, err := k.EndSockets(t.Context(), ourMark); n != 1 || err != nil {
			t.Errorf("%d sockets ended, error %v, want 1", n, err)
		}
		there.await("ESTAB")
	})
	here.await("")
}

func TestEndSocketsRefuses(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	w := loopbacks()[0].connect(t, ourMark.Value)
	for _, m := range []netcfg.Mark{{}, {Mask: 0xff0000}, {Value: 0x10000}, {Value: 0x10001, Mask: 0xff0000}} {
		n, err := k.EndSockets(t.Context(), m)
		_, errCount := k.CountSockets(t.Context(), m)
		if n != 0 || !errors.Is(err, netcfg.ErrLayout) || !errors.Is(errCount, netcfg.ErrLayout) {
			t.Errorf("mark %+v: %d ended, errors %v and %v, want ErrLayout", m, n, err, errCount)
		}
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if n, err := k.EndSockets(over, ourMark); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d ended, error %v, want context.Canceled", n, err)
	}
	// Without the right to see marks nothing is counted as nothing.
	dropRights(t)
	n, err := k.EndSockets(t.Context(), ourMark)
	_, errCount := k.CountSockets(t.Context(), ourMark)
	if n != 0 || !errors.Is(err, unix.EPERM) || !errors.Is(errCount, unix.EPERM) {
		t.Errorf("without rights: %d ended, errors %v and %v, want EPERM", n, err, errCount)
	}
	w.await("ESTAB")
}

// dropRights takes CAP_NET_ADMIN from the test's thread, which ends with the test.
func dropRights(t *testing.T) {
	t.Helper()
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	must(t, unix.Capget(&head, &data[0]))
	data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	must(t, unix.Capset(&head, &data[0]))
}

// TestEndManySockets: more than one packet of the kernel's list and one batch hold.
func TestEndManySockets(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	// Over loopback the kernel gives ports in TIME_WAIT to others after a second.
	for name, value := range map[string]string{"tcp_tw_reuse": "0", "tcp_max_tw_buckets": "100000", "ip_local_port_range": "1024 65535"} {
		must(t, os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o644))
	}
	timeWaits(t, 3000)
	// The kernel may be at the last FIN yet; ss says when that is over, and how many
	// there are.
	var got netcfg.SocketCount
	var err error
	many, began := 0, time.Now()
	for end := began.Add(5 * time.Second); (many < 2900 || got[netcfg.TimeWait] != many || got.Total() != many) && err == nil && time.Now().Before(end); {
		many = 0
		for _, states := range ss(t) {
			many += strings.Count(states, "TIME-WAIT")
		}
		began = time.Now()
		got, err = k.CountSockets(t.Context(), ourMark)
	}
	if err != nil || many < 2900 || got[netcfg.TimeWait] != many || got.Total() != many {
		t.Fatalf("%s, error %v, want %d TIME_WAIT, about 3000", got, err, many)
	}
	counted := time.Since(began)
	if n, err := k.EndSockets(t.Context(), ourMark); netcfg.KernelSince(6, 11) && (n != many || err != nil) {
		t.Errorf("%d sockets ended, error %v, want %d", n, err, many)
	}
	t.Logf("%d sockets: counted in %s, ended in %s", many, counted, time.Since(began)-counted)
}

// timeWaits leaves behind so many connections with our mark.
func timeWaits(t *testing.T, n int) {
	t.Helper()
	l := loopbacks()[0]
	listener, port := l.listener(t, 0, 8)
	defer func() { _ = unix.Close(listener) }()
	for range n {
		near := l.socket(t, ourMark.Value)
		if err := unix.Connect(near, l.at(port)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
		ready(t, listener, unix.POLLIN)
		far, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		must(t, err)
		must(t, unix.Close(near))
		ready(t, far, unix.POLLIN) // its FIN is there
		must(t, unix.Close(far))
	}
}
