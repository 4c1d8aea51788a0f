package netcfg

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// What sock_diag(7) has and x/sys has no name for.
const (
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY
	sockDestroy      = 21 // SOCK_DESTROY, Linux 4.5

	inetDiagReqBytecode = 1  // INET_DIAG_REQ_BYTECODE
	inetDiagMark        = 15 // INET_DIAG_MARK, Linux 4.10
	inetDiagCgroup      = 21 // INET_DIAG_CGROUP_ID, Linux 5.9
	inetDiagMarkCond    = 10 // INET_DIAG_BC_MARK_COND, Linux 4.9

	sizeofInetDiagReq   = 56 // struct inet_diag_req_v2
	sizeofInetDiagMsg   = 72 // struct inet_diag_msg
	sizeofInetDiagID    = 48 // struct inet_diag_sockid, which ends with the cookie
	sizeofInetDiagOp    = 4  // struct inet_diag_bc_op
	sizeofInetDiagMarks = 8  // struct inet_diag_markcond

	timerKept = 3 // idiag_timer of what is kept after a socket
)

// allStates are the states that a socket with a peer or a listener can be in.
const allStates = 1<<Established | 1<<SynSent | 1<<SynRecv | 1<<FinWait1 | 1<<FinWait2 | 1<<TimeWait |
	1<<CloseWait | 1<<LastAck | 1<<Listen | 1<<Closing

// cookie names a socket for as long as the host runs.
type cookie [8]byte

// tcpSocket is what sock_diag says of a socket.
type tcpSocket struct {
	family Family // IPv6 for one that talks to IPv4-mapped addresses too
	state  TCPState
	kept   bool                   // what is kept after a connection, not a socket
	owned  bool                   // a process has it open
	id     [sizeofInetDiagID]byte // as the kernel wants it back
	marked bool                   // mark was told
	mark   uint32
	cgroup uint64 // that it was made in; 0: not told
}

// ends are the socket's addresses: of struct inet_diag_sockid, two ports and
// two addresses of 16 bytes each, in network order.
func (s tcpSocket) ends() (local, remote netip.AddrPort) {
	return s.end(0, 4), s.end(2, 20)
}

func (s tcpSocket) end(port, addr int) netip.AddrPort {
	a := netip.AddrFrom16([16]byte(s.id[addr:]))
	if s.family == IPv4 {
		a = netip.AddrFrom4([4]byte(s.id[addr:]))
	}
	return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(s.id[port:]))
}

func (s tcpSocket) cookie() cookie { return cookie(s.id[sizeofInetDiagID-len(cookie{}):]) }

// orphan says whether a socket was closed by its process and goes on by itself.
func (s tcpSocket) orphan() bool {
	if s.owned || s.kept {
		return false
	}
	return s.state == FinWait1 || s.state == FinWait2 || s.state == Closing || s.state == LastAck
}

func (s tcpSocket) has(m Mark) bool { return s.marked && s.mark&m.Mask == m.Value }

// addrs are the addresses of both ends (struct inet_diag_sockid).
func (s tcpSocket) addrs() (local, remote netip.Addr) {
	at := func(b []byte) netip.Addr {
		if s.family == IPv4 {
			return netip.AddrFrom4([4]byte(b))
		}
		return netip.AddrFrom16([16]byte(b)).Unmap()
	}
	return at(s.id[4:]), at(s.id[20:])
}

// parseSocket reads the body of a SOCK_DIAG_BY_FAMILY message (struct inet_diag_msg
// and attributes).
func parseSocket(b []byte) (tcpSocket, error) {
	if len(b) < sizeofInetDiagMsg {
		return tcpSocket{}, errShort
	}
	s := tcpSocket{
		family: Family(b[0]), state: TCPState(b[1]), kept: b[2] == timerKept,
		id:    [sizeofInetDiagID]byte(b[4:]),
		owned: binary.NativeEndian.Uint32(b[68:72]) != 0,
	}
	err := eachAttr(b[sizeofInetDiagMsg:], func(typ uint16, v []byte) (err error) {
		switch typ {
		case inetDiagMark:
			s.marked = true
			s.mark, err = attrU32(v)
		case inetDiagCgroup:
			if len(v) != 8 {
				return errShort
			}
			s.cgroup = binary.NativeEndian.Uint64(v)
		}
		return err
	})
	if err != nil {
		return tcpSocket{}, fmt.Errorf("parse socket: %w", err)
	}
	return s, nil
}

// eachMessage calls f for every netlink message in b. It stops at the first error.
func eachMessage(b []byte, f func(typ uint16, seq uint32, body []byte) error) error {
	for len(b) >= unix.SizeofNlMsghdr {
		size := binary.NativeEndian.Uint32(b[0:4])
		if size < unix.SizeofNlMsghdr || uint64(size) > uint64(len(b)) {
			return fmt.Errorf("message of %d bytes in %d: %w", size, len(b), errShort)
		}
		if err := f(binary.NativeEndian.Uint16(b[4:6]), binary.NativeEndian.Uint32(b[8:12]), b[unix.SizeofNlMsghdr:size]); err != nil {
			return err
		}
		next := (uint64(size) + 3) &^ 3
		if next >= uint64(len(b)) {
			return nil
		}
		b = b[next:]
	}
	return nil
}

// appendMessage writes a netlink message.
func appendMessage(b []byte, typ, flags uint16, seq uint32, body []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(binary.NativeEndian.AppendUint32(b, 0), body...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func encodeSocketRequest(f Family, states uint32) message {
	m := make(message, sizeofInetDiagReq, sizeofInetDiagReq+32)
	m[0], m[1] = byte(f), unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(m[4:8], states)
	return m
}

// encodeList asks for the sockets of a family with a mark. The kernel's filter does
// the choosing: the other sockets of a busy host are never sent. It refuses the
// filter (EPERM) to those whom it would not tell marks.
func encodeList(f Family, m Mark) []byte {
	const size = sizeofInetDiagOp + sizeofInetDiagMarks
	b := encodeSocketRequest(f, allStates)
	code := make([]byte, sizeofInetDiagOp, size)
	code[0], code[1] = inetDiagMarkCond, size
	binary.NativeEndian.PutUint16(code[2:4], size+4) // beyond the end: no match
	code = binary.NativeEndian.AppendUint32(code, m.Value)
	code = binary.NativeEndian.AppendUint32(code, m.Mask)
	b.attr(inetDiagReqBytecode, code)
	return b
}

// encodeDestroy asks for the end of one socket, and of no other that may have come to
// its addresses and ports: the cookie is in the id.
func encodeDestroy(s tcpSocket) []byte {
	b := encodeSocketRequest(s.family, 0)
	copy(b[8:], s.id[:])
	return b
}

// diag is a sock_diag(7) socket.
type diag struct {
	fd  int
	seq uint32
	buf []byte
}

// usable refuses value 0: it would be all sockets that have no mark, those of the
// whole host.
func (m Mark) usable() error {
	if m.Value == 0 || m.Value&^m.Mask != 0 {
		return fmt.Errorf("%w: sockets with mark 0x%x/0x%x: want a value that is not 0 and within its mask", ErrLayout, m.Value, m.Mask)
	}
	return nil
}

// openDiag opens one in k's namespace.
func (k *Netlink) openDiag() (*diag, error) {
	d := &diag{buf: make([]byte, 64<<10)}
	err := k.inNamespace(func() (err error) {
		d.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return err
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, errNoDiag(err)
	}
	if err != nil {
		return nil, fmt.Errorf("open a socket for socket diagnostics: %w", err)
	}
	timeout := unix.Timeval{Sec: 10}
	err = errors.Join(
		unix.Bind(d.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(d.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
	)
	if err != nil {
		d.close()
		return nil, fmt.Errorf("open a socket for socket diagnostics: %w", err)
	}
	// Acknowledgements without a copy of what they are for; only to have them small.
	_ = unix.SetsockoptInt(d.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return d, nil
}

func errNoDiag(err error) error {
	return fmt.Errorf("%w: it is built without CONFIG_INET_TCP_DIAG, or its module tcp_diag is missing: %w", ErrNoDestroy, err)
}

func (d *diag) close() { _ = unix.Close(d.fd) }

// exchange sends a packet and calls f with what is answered until f says that it was
// the last.
func (d *diag) exchange(ctx context.Context, packet []byte, f func(typ uint16, seq uint32, body []byte) (last bool, err error)) error {
	if err := unix.Sendto(d.fd, packet, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for last := false; !last; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, from, err := unix.Recvfrom(d.fd, d.buf, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n > len(d.buf):
			return fmt.Errorf("a packet of %d bytes: %w", n, unix.EMSGSIZE)
		}
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue // not from the kernel
		}
		err = eachMessage(d.buf[:n], func(typ uint16, seq uint32, body []byte) (err error) {
			if !last {
				last, err = f(typ, seq, body)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// status is what an NLMSG_ERROR or NLMSG_DONE message says: nil for success.
func status(body []byte) error {
	if len(body) < 4 {
		return errShort
	}
	if errno := int32(binary.NativeEndian.Uint32(body)); errno < 0 {
		return unix.Errno(-errno)
	}
	return nil
}

// choice says which sockets are meant.
type choice struct {
	what string                // for errors
	list func(f Family) []byte // the request for them, or for more
	is   func(tcpSocket) bool
}

func (m Mark) choice() choice {
	return choice{
		what: fmt.Sprintf("with mark 0x%x/0x%x", m.Value, m.Mask),
		list: func(f Family) []byte { return encodeList(f, m) },
		is:   func(s tcpSocket) bool { return s.has(m) },
	}
}

// udp is the same of UDP sockets.
func (c choice) udp() choice {
	list := c.list
	c.list = func(f Family) []byte {
		b := list(f)
		b[1] = unix.IPPROTO_UDP
		binary.NativeEndian.PutUint32(b[4:8], 1<<Established|1<<Closed)
		return b
	}
	return c
}

// sockets lists TCP sockets.
func (d *diag) sockets(ctx context.Context, c choice) ([]tcpSocket, error) {
	var list []tcpSocket
	err := d.each(ctx, c, func(s tcpSocket) { list = append(list, s) })
	return list, err
}

// each calls do for each socket that is meant. What UDP has of a TCP socket's state
// is Established for one that is connected, and Closed.
func (d *diag) each(ctx context.Context, c choice, do func(tcpSocket)) error {
	for _, f := range []Family{IPv4, IPv6} {
		d.seq++
		packet := appendMessage(nil, sockDiagByFamily, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, d.seq, c.list(f))
		err := d.exchange(ctx, packet, func(typ uint16, seq uint32, body []byte) (bool, error) {
			switch {
			case seq != d.seq:
				return false, nil
			case typ == unix.NLMSG_DONE && len(body) < 4:
				return true, nil
			case typ == unix.NLMSG_DONE, typ == unix.NLMSG_ERROR:
				return true, status(body)
			case typ != sockDiagByFamily:
				return false, nil
			}
			s, err := parseSocket(body)
			if err == nil && c.is(s) {
				do(s)
			}
			return false, err
		})
		if errors.Is(err, unix.ENOENT) {
			return errNoDiag(err)
		}
		if err != nil {
			return fmt.Errorf("list %s sockets %s: %w", f, c.what, err)
		}
	}
	return nil
}

// destroyBatch is how many sockets are ended with one packet; the acknowledgements
// of all of them have to find room in a receive buffer of the default size.
const destroyBatch = 64

// destroy ends sockets and writes down what became of each. Only that the kernel
// does not do it for a socket, or that a socket has gone, is no error.
func (d *diag) destroy(ctx context.Context, list []tcpSocket, fates map[cookie]fate) error {
	var packet []byte
	for len(list) > 0 {
		batch := list[:min(destroyBatch, len(list))]
		list = list[len(batch):]
		packet = packet[:0]
		first := d.seq + 1
		for i, s := range batch {
			packet = appendMessage(packet, sockDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, first+uint32(i), encodeDestroy(s))
		}
		d.seq += uint32(len(batch))
		answers := 0
		err := d.exchange(ctx, packet, func(typ uint16, seq uint32, body []byte) (bool, error) {
			i := seq - first
			if typ != unix.NLMSG_ERROR || uint64(i) >= uint64(len(batch)) {
				return false, nil
			}
			switch err := status(body); {
			case err == nil, errors.Is(err, unix.ENOENT):
				fates[batch[i].cookie()] = ended
			case errors.Is(err, unix.EOPNOTSUPP):
				fates[batch[i].cookie()] = refused
			default:
				return true, err
			}
			answers++
			return answers == len(batch), nil
		})
		if err != nil {
			return fmt.Errorf("end sockets: %w", err)
		}
	}
	return nil
}
