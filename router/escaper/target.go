package escaper

import (
	"bytes"
	"net/netip"
)

// The longest domain name, without a dot at its end, and the longest label.
const (
	maxName  = 253
	maxLabel = 63
)

// ParseHost tells a name from a literal IPv4 address: addr is the address, and
// the zero Addr for a name, which may end in a dot. It reports false for what is
// neither: anything with other characters than letters, digits, hyphens,
// underscores and dots (a literal IPv6 address too), and a host in a spelling
// that one resolver takes for an address and another for a name (127.1,
// 0x7f000001). It allocates nothing.
func ParseHost(host []byte) (addr netip.Addr, ok bool) {
	name := host
	if n := len(name); n > 1 && name[n-1] == '.' {
		name = name[:n-1] // a name that is not searched for
	}
	if len(name) > maxName {
		return netip.Addr{}, false
	}
	label := 0 // where the label began
	for i, c := range name {
		switch {
		case c == '.':
			if n := i - label; n == 0 || n > maxLabel {
				return netip.Addr{}, false
			}
			label = i + 1
		case !isDigit(c) && (c|0x20 < 'a' || c|0x20 > 'z') && c != '-' && c != '_':
			return netip.Addr{}, false
		}
	}
	last := name[label:]
	if len(last) == 0 || len(last) > maxLabel {
		return netip.Addr{}, false
	}
	if !isNumber(last) {
		return netip.Addr{}, true
	}
	// No domain name ends in a number, so this is an address or nothing.
	return parseIPv4(host)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// isNumber reports whether inet_aton takes a label for a number: digits, or
// 0x and hexadecimal digits.
func isNumber(label []byte) bool {
	if len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x' {
		for _, c := range label[2:] {
			if !isDigit(c) && (c|0x20 < 'a' || c|0x20 > 'f') {
				return false
			}
		}
		return true
	}
	for _, c := range label {
		if !isDigit(c) {
			return false
		}
	}
	return true
}

// parseIPv4 reads four decimal numbers without leading zeros. It is here
// because netip.ParseAddr takes a string, and this is the hot path.
func parseIPv4(b []byte) (netip.Addr, bool) {
	var q [4]byte
	for i := range q {
		end := bytes.IndexByte(b, '.')
		if i == len(q)-1 {
			if end >= 0 {
				return netip.Addr{}, false
			}
			end = len(b)
		}
		if end < 1 || end > 3 || (b[0] == '0' && end > 1) {
			return netip.Addr{}, false
		}
		n := 0
		for _, c := range b[:end] {
			if !isDigit(c) {
				return netip.Addr{}, false
			}
			n = n*10 + int(c-'0')
		}
		if n > 255 {
			return netip.Addr{}, false
		}
		q[i] = byte(n)
		if end < len(b) {
			b = b[end+1:]
		}
	}
	return netip.AddrFrom4(q), true
}
