package escaper

import (
	"encoding/binary"
	"net/netip"
)

// most is how many IPv4 addresses one IPv6 address can be read as.
const most = 4

// embedded appends to list the IPv4 addresses that a router or host on the way
// may read out of an IPv6 address, so that each can be checked like a target of
// its own. An address of another form has none. The forms:
//
//   - ::a.b.c.d, IPv4-compatible (RFC 4291 section 2.5.5.1), and
//     ::ffff:0:a.b.c.d, IPv4-translated (RFC 2765 section 2.1);
//   - 64:ff9b::a.b.c.d, NAT64's well-known prefix (RFC 6052 section 2.1);
//   - 64:ff9b:1::/48, NAT64's prefix for local use (RFC 8215), below which an
//     operator may take a /48, /56, /64 or /96: every placement of RFC 6052
//     section 2.2 that the address can be is read;
//   - 2002:AABB:CCDD::/48, 6to4 (RFC 3056);
//   - 2001::/32, Teredo (RFC 4380 section 4): the server, and the client, which
//     is written inverted.
//
// ::ffff:a.b.c.d is no IPv6 address here: it is unmapped before.
func embedded(a netip.Addr, list []netip.Addr) []netip.Addr {
	if !a.Is6() {
		return list
	}
	b := a.As16()
	hi, lo := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	last := v4(uint32(lo))
	switch {
	case hi == 0 && lo>>32 == 0:
		if lo <= 1 { // :: and ::1 are themselves
			return list
		}
		return append(list, last)
	case hi == 0 && lo>>32 == 0xffff0000:
		return append(list, last)
	case hi == 0x0064ff9b_0000_0000 && lo>>32 == 0:
		return append(list, last)
	case hi>>16 == 0x0064ff9b_0001:
		return localNAT64(hi, lo, list)
	case hi>>48 == 0x2002:
		return append(list, v4(uint32(hi>>16)))
	case hi>>32 == 0x2001_0000:
		return append(list, v4(uint32(hi)), v4(^uint32(lo)))
	}
	return list
}

// localNAT64 reads the placements of RFC 6052 section 2.2. Those of a prefix
// shorter than 96 bits leave bits 64 to 71 and all after the address zero. The
// last 32 bits count as well, unless they are the empty end of such a form.
func localNAT64(hi, lo uint64, list []netip.Addr) []netip.Addr {
	found := false
	if lo>>56 == 0 {
		for _, before := range [...]uint{16, 8, 0} { // bits of the address before bit 64
			after := 32 - before
			body := lo << 8 // what follows the zero octet
			if body<<after != 0 {
				continue
			}
			list = append(list, v4(uint32(hi)&(1<<before-1)<<after|uint32(body>>(64-after))))
			found = true
		}
	}
	if found && uint32(lo) == 0 {
		return list
	}
	return append(list, v4(uint32(lo)))
}

func v4(u uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(u >> 24), byte(u >> 16), byte(u >> 8), byte(u)})
}
