package netcfg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// errShort is a netlink message or attribute that ends too early.
var errShort = errors.New("netlink message is too short")

// Attributes that x/sys and the netlink library have no name for.
const (
	ifaProto = 11 // IFA_PROTO, Linux 5.18

	skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS, Linux 4.6

	ruleInvert    = 0x2 // FIB_RULE_INVERT
	ruleDportMask = 29  // FRA_DPORT_MASK, Linux 6.15
)

// operational states of RFC 2863 as the kernel numbers them.
const (
	operUnknown = 0
	operUp      = 6
)

// eachAttr calls f for every attribute in b, without the nested and byte order
// flags in the type. It stops at the first error.
func eachAttr(b []byte, f func(typ uint16, v []byte) error) error {
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b[0:2]))
		typ := binary.NativeEndian.Uint16(b[2:4]) & nlaTypeMask
		if size < unix.SizeofRtAttr || size > len(b) {
			return fmt.Errorf("attribute %d of %d bytes in %d: %w", typ, size, len(b), errShort)
		}
		if err := f(typ, b[unix.SizeofRtAttr:size]); err != nil {
			return err
		}
		next := (size + 3) &^ 3
		if next >= len(b) {
			return nil
		}
		b = b[next:]
	}
	return nil
}

const nlaTypeMask = 0x3fff // NLA_TYPE_MASK

func attrU32(v []byte) (uint32, error) {
	if len(v) < 4 {
		return 0, errShort
	}
	return binary.NativeEndian.Uint32(v), nil
}

// attrString cuts at the first NUL.
func attrString(v []byte) string {
	for i, c := range v {
		if c == 0 {
			return string(v[:i])
		}
	}
	return string(v)
}

func attrAddr(v []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(v)
	if !ok {
		return netip.Addr{}, fmt.Errorf("address of %d bytes: %w", len(v), errShort)
	}
	return a, nil
}

// parseLink reads the body of an RTM_NEWLINK message (struct ifinfomsg and
// attributes).
func parseLink(b []byte) (Link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Link{}, errShort
	}
	flags := binary.NativeEndian.Uint32(b[8:12])
	l := Link{
		Index:    int(int32(binary.NativeEndian.Uint32(b[4:8]))),
		Admin:    flags&unix.IFF_UP != 0,
		Loopback: flags&unix.IFF_LOOPBACK != 0,
	}
	running := flags&unix.IFF_RUNNING != 0
	err := eachAttr(b[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) error {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = attrString(v)
		case unix.IFLA_ADDRESS:
			if len(v) == len(l.MAC) {
				l.MAC = [6]byte(v)
			}
		case unix.IFLA_OPERSTATE:
			if len(v) < 1 {
				return errShort
			}
			running = v[0] == operUnknown || v[0] == operUp
		case unix.IFLA_LINKINFO:
			return eachAttr(v, func(typ uint16, v []byte) error {
				if typ == nl.IFLA_INFO_KIND {
					l.Kind = attrString(v)
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return Link{}, fmt.Errorf("parse link: %w", err)
	}
	l.Up = l.Admin && running
	switch {
	case !l.Admin:
		l.Reason = "interface " + l.Name + " is down"
	case !running:
		l.Reason = "interface " + l.Name + " has no carrier"
	}
	return l, nil
}

// parseAddr reads the body of an RTM_NEWADDR or RTM_DELADDR message (struct
// ifaddrmsg and attributes). A message that carries no address gives the zero
// Address and no error.
func parseAddr(b []byte) (Address, error) {
	if len(b) < unix.SizeofIfAddrmsg {
		return Address{}, errShort
	}
	family := Family(b[0])
	if family != IPv4 && family != IPv6 {
		return Address{}, nil
	}
	a := Address{
		Prefix:    int(b[1]),
		LinkIndex: int(binary.NativeEndian.Uint32(b[4:8])),
		LinkScope: b[3] != unix.RT_SCOPE_UNIVERSE && b[3] != unix.RT_SCOPE_SITE,
	}
	flags := uint32(b[2])
	var local, address netip.Addr
	err := eachAttr(b[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) (err error) {
		switch typ {
		case unix.IFA_LOCAL:
			local, err = attrAddr(v)
		case unix.IFA_ADDRESS:
			address, err = attrAddr(v)
		case unix.IFA_BROADCAST:
			a.Broadcast, err = attrAddr(v)
		case unix.IFA_FLAGS:
			flags, err = attrU32(v)
		case unix.IFA_RT_PRIORITY:
			a.Metric, err = attrU32(v)
		case ifaProto:
			if len(v) < 1 {
				return errShort
			}
			a.Protocol = v[0]
		}
		return err
	})
	if err != nil {
		return Address{}, fmt.Errorf("parse address: %w", err)
	}
	// IFA_LOCAL is the host's end of a point-to-point link and IFA_ADDRESS the
	// far one; a plain IPv6 address has IFA_ADDRESS alone.
	a.Addr = local
	if !local.IsValid() {
		a.Addr = address
	}
	if !a.Addr.IsValid() || familyOf(a.Addr) != family || a.Prefix > a.Addr.BitLen() {
		return Address{}, nil
	}
	if address.IsValid() && address != a.Addr && familyOf(address) == family {
		a.Peer = address
	}
	a.DadFailed = flags&unix.IFA_F_DADFAILED != 0
	// An optimistic address may be used while detection goes on (RFC 4429).
	a.Tentative = flags&unix.IFA_F_TENTATIVE != 0 && flags&unix.IFA_F_OPTIMISTIC == 0 && !a.DadFailed
	a.Deprecated = flags&unix.IFA_F_DEPRECATED != 0
	a.NoPrefixRoute = flags&unix.IFA_F_NOPREFIXROUTE != 0
	return a, nil
}

// parseRoute reads the body of an RTM_NEWROUTE or RTM_DELROUTE message (struct
// rtmsg and attributes). ok is false for what is no IPv4 or IPv6 routing table
// entry (cached routes, multicast routing, MPLS).
func parseRoute(b []byte) (r Route, ok bool, err error) {
	if len(b) < unix.SizeofRtMsg {
		return Route{}, false, errShort
	}
	r.Family = Family(b[0])
	flags := binary.NativeEndian.Uint32(b[8:12])
	if r.Family != IPv4 && r.Family != IPv6 || flags&unix.RTM_F_CLONED != 0 {
		return Route{}, false, nil
	}
	bits := int(b[1])
	dst := r.Family.zero()
	r.Table = uint32(b[4])
	r.Protocol, r.Scope, r.Type = b[5], b[6], RouteType(b[7])
	r.Down = flags&(unix.RTNH_F_DEAD|unix.RTNH_F_LINKDOWN) != 0
	r.OnLink = flags&unix.RTNH_F_ONLINK != 0
	err = eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) (err error) {
		var n uint32
		switch typ {
		case unix.RTA_DST:
			dst, err = attrAddr(v)
		case unix.RTA_GATEWAY:
			r.Gateway, err = attrAddr(v)
		case unix.RTA_VIA, unix.RTA_MULTIPATH, unix.RTA_ENCAP:
			r.Other = true
		case unix.RTA_OIF:
			n, err = attrU32(v)
			r.LinkIndex = int(n)
		case unix.RTA_PRIORITY:
			r.Metric, err = attrU32(v)
		case unix.RTA_TABLE:
			r.Table, err = attrU32(v)
		}
		return err
	})
	if err != nil {
		return Route{}, false, fmt.Errorf("parse route: %w", err)
	}
	if b[2] != 0 || b[3] != 0 { // source length (IPv6 subtrees), TOS
		r.Other = true
	}
	r.Dst = netip.PrefixFrom(dst, bits).Masked()
	if !r.Dst.IsValid() || familyOf(dst) != r.Family {
		return Route{}, false, nil
	}
	if r.Type.rejects() {
		// IPv6 says `dev lo` of such a route, IPv4 says nothing.
		r.LinkIndex, r.Gateway = 0, netip.Addr{}
	}
	return r, true, nil
}

// parseRule reads the body of an RTM_NEWRULE message (struct fib_rule_hdr and
// attributes). ok is false for other families.
func parseRule(b []byte) (r Rule, ok bool, err error) {
	if len(b) < unix.SizeofRtMsg {
		return Rule{}, false, errShort
	}
	r.Family = Family(b[0])
	if r.Family != IPv4 && r.Family != IPv6 {
		return Rule{}, false, nil
	}
	dstBits, srcBits := int(b[1]), int(b[2])
	r.Table, r.Action = uint32(b[4]), b[7]
	r.Invert = binary.NativeEndian.Uint32(b[8:12])&ruleInvert != 0
	r.Other = b[3] != 0 // TOS
	var src, dst netip.Addr
	err = eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) (err error) {
		var n uint32
		switch typ {
		case nl.FRA_SRC:
			src, err = attrAddr(v)
		case nl.FRA_DST:
			dst, err = attrAddr(v)
		case nl.FRA_IIFNAME:
			r.IIF = attrString(v)
		case nl.FRA_OIFNAME:
			r.OIF = attrString(v)
		case nl.FRA_PRIORITY:
			r.Priority, err = attrU32(v)
		case nl.FRA_FWMARK:
			r.Mark, err = attrU32(v)
		case nl.FRA_FWMASK:
			r.Mask, err = attrU32(v)
		case nl.FRA_TABLE:
			r.Table, err = attrU32(v)
		case nl.FRA_PROTOCOL:
			if len(v) < 1 {
				return errShort
			}
			r.Protocol = v[0]
		case nl.FRA_SUPPRESS_PREFIXLEN:
			n, err = attrU32(v)
			r.Near = n == 0
			r.Other = r.Other || n != 0 && n != ^uint32(0)
		case nl.FRA_SUPPRESS_IFGROUP:
			n, err = attrU32(v)
			r.Other = r.Other || n != ^uint32(0)
		case nl.FRA_IP_PROTO:
			if len(v) < 1 {
				return errShort
			}
			r.IPProto = v[0]
		case nl.FRA_DPORT_RANGE:
			if len(v) < 4 {
				return errShort
			}
			r.DPort = PortRange{binary.NativeEndian.Uint16(v), binary.NativeEndian.Uint16(v[2:])}
		case ruleDportMask: // said of every single port
			if len(v) < 2 {
				return errShort
			}
			r.Other = r.Other || binary.NativeEndian.Uint16(v) != 0xffff
		case unix.FRA_PAD: // carries nothing
		default:
			r.Other = true
		}
		return err
	})
	if err != nil {
		return Rule{}, false, fmt.Errorf("parse rule: %w", err)
	}
	for _, p := range []struct {
		addr netip.Addr
		bits int
		to   *netip.Prefix
	}{{src, srcBits, &r.Src}, {dst, dstBits, &r.Dst}} {
		if p.bits == 0 {
			continue
		}
		*p.to = netip.PrefixFrom(p.addr, p.bits).Masked()
		if !p.to.IsValid() {
			return Rule{}, false, fmt.Errorf("parse rule: prefix of %d bits: %w", p.bits, errShort)
		}
	}
	return r, true, nil
}

// message is the body of a request that is being written.
type message []byte

func (m *message) attr(typ uint16, v []byte) {
	*m = binary.NativeEndian.AppendUint16(*m, uint16(unix.SizeofRtAttr+len(v)))
	*m = binary.NativeEndian.AppendUint16(*m, typ)
	*m = append(*m, v...)
	for len(*m)%4 != 0 {
		*m = append(*m, 0)
	}
}

func (m *message) u32(typ uint16, n uint32) {
	m.attr(typ, binary.NativeEndian.AppendUint32(nil, n))
}

// encodeRule gives the body of RTM_NEWRULE and RTM_DELRULE for a rule of the
// shapes that we make.
func encodeRule(r Rule) []byte {
	m := make(message, unix.SizeofRtMsg, 128)
	m[0] = byte(r.Family)
	m[7] = r.Action
	if r.Src.IsValid() {
		m[2] = byte(r.Src.Bits())
		m.attr(nl.FRA_SRC, r.Src.Addr().AsSlice())
	}
	if r.Dst.IsValid() {
		m[1] = byte(r.Dst.Bits())
		m.attr(nl.FRA_DST, r.Dst.Addr().AsSlice())
	}
	m.u32(nl.FRA_PRIORITY, r.Priority)
	if r.Mask != 0 {
		m.u32(nl.FRA_FWMARK, r.Mark)
		m.u32(nl.FRA_FWMASK, r.Mask)
	}
	if r.IIF != "" {
		m.attr(nl.FRA_IIFNAME, append([]byte(r.IIF), 0))
	}
	if r.IPProto != 0 {
		m.attr(nl.FRA_IP_PROTO, []byte{r.IPProto})
	}
	if r.DPort != (PortRange{}) {
		m.attr(nl.FRA_DPORT_RANGE, binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, r.DPort.First), r.DPort.Last))
	}
	m.u32(nl.FRA_TABLE, r.Table)
	if r.Near {
		m.u32(nl.FRA_SUPPRESS_PREFIXLEN, 0)
	}
	m.attr(nl.FRA_PROTOCOL, []byte{r.Protocol})
	return m
}

// encodeRoute gives the body of RTM_NEWROUTE and RTM_DELROUTE.
func encodeRoute(r Route) []byte {
	m := make(message, unix.SizeofRtMsg, 128)
	m[0] = byte(r.Family)
	m[1] = byte(r.Dst.Bits())
	m[5], m[6], m[7] = r.Protocol, r.Scope, byte(r.Type)
	if r.OnLink {
		binary.NativeEndian.PutUint32(m[8:12], unix.RTNH_F_ONLINK)
	}
	if r.Dst.Bits() > 0 {
		m.attr(unix.RTA_DST, r.Dst.Addr().AsSlice())
	}
	m.u32(unix.RTA_TABLE, r.Table)
	if r.Gateway.IsValid() {
		m.attr(unix.RTA_GATEWAY, r.Gateway.AsSlice())
	}
	if r.LinkIndex != 0 {
		m.u32(unix.RTA_OIF, uint32(r.LinkIndex))
	}
	m.u32(unix.RTA_PRIORITY, r.Metric)
	return m
}

// encodeAddr gives the body of RTM_NEWADDR and RTM_DELADDR for an address of
// ours: no prefix route, no broadcast address, no end of life; deprecated from the
// start if so wished.
func encodeAddr(a Address) []byte {
	m := make(message, unix.SizeofIfAddrmsg, 64)
	m[0] = byte(familyOf(a.Addr))
	m[1] = byte(a.Prefix)
	m[3] = unix.RT_SCOPE_UNIVERSE
	binary.NativeEndian.PutUint32(m[4:8], uint32(a.LinkIndex))
	b := a.Addr.AsSlice()
	m.attr(unix.IFA_LOCAL, b)
	m.attr(unix.IFA_ADDRESS, b)
	m.u32(unix.IFA_FLAGS, unix.IFA_F_NOPREFIXROUTE)
	if a.Metric != 0 {
		m.u32(unix.IFA_RT_PRIORITY, a.Metric)
	}
	if a.Deprecated {
		var info [16]byte // struct ifa_cacheinfo: preferred and valid lifetime, and when it was made and changed
		binary.NativeEndian.PutUint32(info[4:], 0xffffffff)
		m.attr(unix.IFA_CACHEINFO, info[:])
	}
	if a.Protocol != 0 {
		m.attr(ifaProto, []byte{a.Protocol})
	}
	return m
}
