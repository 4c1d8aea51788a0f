package socks

import (
	"net/netip"

	"wayout/router/socks/client"
)

// Reply codes of SOCKS5 (RFC 1928, section 6), and of SOCKS4.
const (
	replyOK          = 0x00
	replyFailure     = 0x01
	replyNotAllowed  = 0x02
	replyUnreachable = 0x04
	replyRefused     = 0x05
	replyCommand     = 0x07
	replyAddress     = 0x08

	reply4OK      = 0x5a
	reply4Refused = 0x5b
)

// appendReply appends a SOCKS5 reply. An invalid bound is written as zeros.
func appendReply(b []byte, code byte, bound netip.AddrPort) []byte {
	if !bound.IsValid() {
		bound = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	}
	// An address without a zone can always be written.
	b, _ = client.AppendAddr(append(b, version5, code, 0), client.AddrOf(netip.AddrPortFrom(bound.Addr().WithZone(""), bound.Port())))
	return b
}

// appendReply4 appends a SOCKS4 reply, which has room for IPv4 only.
func appendReply4(b []byte, code byte, bound netip.AddrPort) []byte {
	ip := netip.IPv4Unspecified()
	if a := bound.Addr().Unmap(); a.Is4() {
		ip = a
	}
	q := ip.As4()
	return append(append(b, 0, code, byte(bound.Port()>>8), byte(bound.Port())), q[:]...)
}
