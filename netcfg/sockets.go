package netcfg

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// TCPState is a state of a TCP socket, as the kernel numbers them.
type TCPState uint8

// The states of RFC 9293. SynRecv takes in the half-open connections of a listener,
// TimeWait and FinWait2 what the kernel keeps of a connection after its socket.
const (
	Established TCPState = iota + 1
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Closed
	CloseWait
	LastAck
	Listen
	Closing
)

// String is the state as /proc and ss name it, with underscores.
func (s TCPState) String() string {
	switch s {
	case Established:
		return "ESTABLISHED"
	case SynSent:
		return "SYN_SENT"
	case SynRecv:
		return "SYN_RECV"
	case FinWait1:
		return "FIN_WAIT1"
	case FinWait2:
		return "FIN_WAIT2"
	case TimeWait:
		return "TIME_WAIT"
	case Closed:
		return "CLOSE"
	case CloseWait:
		return "CLOSE_WAIT"
	case LastAck:
		return "LAST_ACK"
	case Listen:
		return "LISTEN"
	case Closing:
		return "CLOSING"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// SocketCount says how many sockets are in each state.
type SocketCount map[TCPState]int

// Total is the number of all of them.
func (c SocketCount) Total() int {
	n := 0
	for _, k := range c {
		n += k
	}
	return n
}

// String is "3 ESTABLISHED, 2 TIME_WAIT", or "none".
func (c SocketCount) String() string {
	var words []string
	for s := range Closing + 1 {
		if c[s] > 0 {
			words = append(words, fmt.Sprintf("%d %s", c[s], s))
		}
	}
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, ", ")
}

// ErrNoDestroy says that the kernel cannot end sockets, or not all of them. The
// error around it says what the kernel lacks and what is left.
var ErrNoDestroy = errors.New("the kernel cannot end sockets")

// errRenewed says that somebody goes on working with the mark.
var errRenewed = errors.New("sockets with the mark stay or go on being made")

// CountSockets counts the TCP sockets of the namespace that have a mark, of both
// families: those of processes and those that have outlived theirs. It changes
// nothing, needs CAP_NET_ADMIN all the same, and is as exact as a list can be that
// is read while connections come and go.
//
// UDP sockets are not counted: none outlives its process.
func (k *Netlink) CountSockets(ctx context.Context, m Mark) (SocketCount, error) {
	if err := m.usable(); err != nil {
		return nil, err
	}
	d, err := k.openDiag()
	if err != nil {
		return nil, err
	}
	defer d.close()
	list, err := d.sockets(ctx, m.choice())
	if err != nil {
		return nil, err
	}
	return countStates(list), nil
}

// EndSockets ends the TCP sockets of the namespace that have a mark, whoever made
// them and in whatever state they are, and gives the number of those that have
// gone. Without rules for its mark a socket's last packets would leave by the rules
// of somebody else; so it is to be called while the mark's rules and routes are still
// there, after the processes have closed what they could.
//
// A process reads ECONNABORTED. Peers are sent a reset, with the mark, by sockets that
// are ESTABLISHED, FIN_WAIT1, FIN_WAIT2 or CLOSE_WAIT; the others and what is kept
// after a socket (TIME_WAIT, FIN_WAIT2 once it is closed) go without a word. The kernel
// answers what peers send to either of them afterwards with resets that have no mark.
//
// The error wraps [ErrNoDestroy] when the kernel lacks CONFIG_INET_DIAG_DESTROY, or
// is too old for some of the sockets: those in TIME_WAIT (Linux 5.15 is), and those
// that were closed with something left to send, which below Linux 6.11 would be left
// behind for good and are not touched. All others are ended in that case too.
// [Netlink.CountSockets] says when the rest has gone by itself.
func (k *Netlink) EndSockets(ctx context.Context, m Mark) (n int, err error) {
	return k.EndSocketsBut(ctx, m, Spare{})
}

// Spare says which sockets are not to be ended.
type Spare struct {
	Cgroups   []uint64 // IDs of the cgroups that they were made in
	Listeners bool     // of these only the listeners
}

func (p Spare) has(s tcpSocket) bool {
	return (!p.Listeners || s.state == Listen) && slices.Contains(p.Cgroups, s.cgroup)
}

// EndSocketsBut is EndSockets without those that are spared. Of what is kept after a
// socket nobody knows the cgroup: with cgroups that are spared whole it is left.
func (k *Netlink) EndSocketsBut(ctx context.Context, m Mark, spare Spare) (n int, err error) {
	if err := m.usable(); err != nil {
		return 0, err
	}
	c := m.choice()
	if len(spare.Cgroups) > 0 {
		c.is = func(s tcpSocket) bool {
			return s.has(m) && !spare.has(s) && (spare.Listeners || !s.kept)
		}
	}
	return k.end(ctx, c)
}

// Socket is a TCP socket of some process.
type Socket struct {
	Mark          uint32
	Local, Remote netip.Addr // mapped addresses unmapped
}

// EndSocketsOf ends the TCP sockets that were made in some cgroups, named by their IDs,
// and that are not right: connections and what becomes one or was one, never
// listeners. It is like [Netlink.EndSockets] in all else, but that sockets to or from
// loopback addresses are right whatever the function says. It needs Linux 5.9.
func (k *Netlink) EndSocketsOf(ctx context.Context, cgroups []uint64, right func(Socket) bool) (n int, err error) {
	return k.end(ctx, choice{
		what: fmt.Sprintf("of cgroups %d", cgroups),
		list: func(f Family) []byte { return encodeSocketRequest(f, allStates&^(1<<Listen)) },
		is: func(s tcpSocket) bool {
			if s.cgroup == 0 || !slices.Contains(cgroups, s.cgroup) {
				return false
			}
			local, remote := s.addrs()
			return !local.IsLoopback() && !remote.IsLoopback() && !right(Socket{s.mark, local, remote})
		},
	})
}

func (k *Netlink) end(ctx context.Context, c choice) (n int, err error) {
	d, err := k.openDiag()
	if err != nil {
		return 0, err
	}
	defer d.close()
	return d.end(ctx, c, kernelAtLeast(6, 11))
}

// endPasses is how often sockets are listed and ended: a second time for those that
// the list missed because they changed their state meanwhile, a third for luck.
const endPasses = 3

// fate is what became of the attempt to end a socket.
type fate uint8

const (
	untried   fate = iota
	ended          // the kernel says
	refused        // the kernel does not do it
	untouched      // this kernel would do harm
)

// end does it; orphans says whether the kernel can end what was closed.
func (d *diag) end(ctx context.Context, c choice, orphans bool) (n int, err error) {
	fates := make(map[cookie]fate) // of every socket that was there
	for pass := 0; ; pass++ {
		list, err := d.sockets(ctx, c)
		if err != nil {
			return countEnded(fates), err
		}
		var todo []tcpSocket
		for _, s := range list {
			id := s.cookie()
			f := fates[id]
			if s.orphan() && !orphans {
				f = untouched
			}
			fates[id] = f
			if f == untried || f == ended {
				todo = append(todo, s)
			}
		}
		if len(todo) == 0 || pass == endPasses {
			return len(fates) - len(list), leftOver(list, fates)
		}
		if err := d.destroy(ctx, todo, fates); err != nil {
			return countEnded(fates), err
		}
	}
}

func countEnded(fates map[cookie]fate) (n int) {
	for _, f := range fates {
		if f == ended {
			n++
		}
	}
	return n
}

// leftOver is the error for what is still there.
func leftOver(list []tcpSocket, fates map[cookie]fate) error {
	if len(list) == 0 {
		return nil
	}
	var whole, late, closed bool
	for _, s := range list {
		switch f := fates[s.cookie()]; {
		case f == refused && s.kept:
			late = true
		case f == refused:
			whole = true
		case f == untouched:
			closed = true
		}
	}
	left := fmt.Sprintf("%d of %d are left (%s)", len(list), len(fates), countStates(list))
	switch {
	case whole:
		return fmt.Errorf("%w: it is built without CONFIG_INET_DIAG_DESTROY; %s", ErrNoDestroy, left)
	case late:
		return fmt.Errorf("%w: it is too old for those in TIME_WAIT, or built without CONFIG_INET_DIAG_DESTROY; %s", ErrNoDestroy, left)
	case closed:
		return fmt.Errorf("%w: below Linux 6.11 it leaves behind those that were closed with something left to send; %s", ErrNoDestroy, left)
	}
	return fmt.Errorf("%w: %s", errRenewed, left)
}

func countStates(list []tcpSocket) SocketCount {
	c := make(SocketCount)
	for _, s := range list {
		c[s.state]++
	}
	return c
}
