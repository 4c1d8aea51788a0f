package tproxy

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpHeader is the length of a UDP header (RFC 768).
const udpHeader = 8

// An answerer sends datagrams in the name of others. Sockets of UDP that are
// bound to their addresses and ports would not do: where another program listens
// on the port at all addresses (a DNS server, say) the kernel refuses that. A raw
// socket has no port. It writes the UDP header itself; the kernel adds that of IP,
// with the source that the message asks for, and fragments what is too large.
type answerer struct{ fd int }

// newAnswerer opens a raw socket. It receives nothing: it is bound to loopback,
// and its filter takes no packet.
func newAnswerer(v4 bool, mark uint32) (_ *answerer, err error) {
	domain, level, option := unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	at := unix.Sockaddr(&unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()})
	if v4 {
		domain, level, option = unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT
		at = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_UDP)
	if err != nil {
		return nil, fmt.Errorf("open a raw socket for answers (it needs CAP_NET_RAW): %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	nothing := [1]unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	for _, step := range []struct {
		what string
		err  error
	}{
		{"SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]})},
		{"SO_MARK", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))},
		{"IP_TRANSPARENT", unix.SetsockoptInt(fd, level, option, 1)},
		{"IP_MTU_DISCOVER", mayBeCut(fd, v4)},
		{"bind", unix.Bind(fd, at)},
	} {
		if step.err != nil {
			return nil, fmt.Errorf("socket for answers: %w", os.NewSyscallError(step.what, step.err))
		}
	}
	return &answerer{fd}, nil
}

// mayBeCut lets routers on the way to the client fragment answers. Nobody here is
// told when one is too large for them: the socket is bound to another address. Of
// IPv6 only the sender fragments.
func mayBeCut(fd int, v4 bool) error {
	if !v4 {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
}

func (a *answerer) close() error { return unix.Close(a.fd) }

// A reply is what all answers of a flow have in common.
type reply struct {
	a      *answerer
	oob    []byte // says which source address to send from
	to     unix.Sockaddr
	ports  [4]byte // source and destination, as in the header
	pseudo uint32  // sum of the pseudo-header but for the length
}

// reply prepares the answers of from to a client.
func (a *answerer) reply(from, client netip.AddrPort) (*reply, error) {
	r := &reply{a: a, pseudo: unix.IPPROTO_UDP}
	binary.BigEndian.PutUint16(r.ports[0:], from.Port())
	binary.BigEndian.PutUint16(r.ports[2:], client.Port())
	r.pseudo = sum(sum(r.pseudo, from.Addr().AsSlice()), client.Addr().WithZone("").AsSlice())
	if from.Addr().Is4() {
		r.to = &unix.SockaddrInet4{Addr: client.Addr().As4()}
		info := unix.Inet4Pktinfo{Spec_dst: from.Addr().As4()}
		r.oob = message(unix.SOL_IP, unix.IP_PKTINFO, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unix.SizeofInet4Pktinfo))
		return r, nil
	}
	zone, err := zoneIndex(client.Addr().Zone())
	if err != nil {
		return nil, err
	}
	r.to = &unix.SockaddrInet6{Addr: client.Addr().As16(), ZoneId: zone}
	info := unix.Inet6Pktinfo{Addr: from.Addr().As16()}
	r.oob = message(unix.SOL_IPV6, unix.IPV6_PKTINFO, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unix.SizeofInet6Pktinfo))
	return r, nil
}

// message is a control message (cmsg(3)).
func message(level, typ int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(len(data)))
	copy(b[unix.CmsgLen(0):], data)
	return b
}

// zoneIndex is the interface that a link-local address belongs to.
func zoneIndex(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("zone %s: %w", zone, err)
	}
	return uint32(i.Index), nil
}

// send sends a datagram whose payload begins at udpHeader in b. One for which
// there is no room now is lost, as datagrams are.
func (r *reply) send(b []byte) error {
	copy(b[0:4], r.ports[:])
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	b[6], b[7] = 0, 0
	check := ^fold(sum(r.pseudo+uint32(len(b)), b))
	if check == 0 {
		check = 0xffff // 0 says that there is none
	}
	binary.BigEndian.PutUint16(b[6:], check)
	return unix.Sendmsg(r.a.fd, b, r.oob, r.to, 0)
}

// sum adds up 16-bit words (RFC 1071).
func sum(s uint32, b []byte) uint32 {
	wide := uint64(s)
	for len(b) >= 2 {
		wide += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		wide += uint64(b[0]) << 8
	}
	for wide > 0xffffffff {
		wide = wide>>32 + wide&0xffffffff
	}
	return uint32(wide)
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
