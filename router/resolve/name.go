package resolve

import (
	"net/netip"
	"strings"
)

// Limits of RFC 1035 section 2.3.4: 255 octets on the wire are 253 characters in text, without the trailing dot.
const (
	maxName  = 253
	maxLabel = 63
)

// name is a host name in lower case without its trailing dot. It lives on the stack of a lookup, with room to append the
// domains of a search list, so that looking a name up makes no garbage.
type name struct {
	b        [maxName]byte
	n        int // length of the name as given
	dots     int
	absolute bool // it had a trailing dot: no search list
}

// set takes host, and reports false when it can be no host name: empty, too long, with a label that is empty, too long or
// begins with a hyphen, with anything but ASCII letters, digits, hyphens and underscores (internationalised names come in
// their xn-- form), or with a number for its last label, which is how addresses in odd spellings look.
func (m *name) set(host string) bool {
	if rest, ok := strings.CutSuffix(host, "."); ok {
		m.absolute = true
		host = rest
	}
	if host == "" || len(host) > maxName {
		return false
	}
	label := 0
	for i := range len(host) {
		c := host[i]
		if c == '.' {
			if i-label == 0 || i-label > maxLabel {
				return false
			}
			label = i + 1
			m.dots++
		} else {
			switch {
			case 'A' <= c && c <= 'Z':
				c += 'a' - 'A'
			case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '_':
			case c == '-' && i > label:
			default:
				return false
			}
		}
		m.b[i] = c
	}
	m.n = len(host)
	last := m.b[label:m.n]
	return len(last) > 0 && len(last) <= maxLabel && !number(last)
}

// number tells whether a label (in lower case) would be read as a number by inet_aton.
func number(label []byte) bool {
	hex := len(label) >= 2 && label[0] == '0' && label[1] == 'x'
	if hex {
		label = label[2:]
	}
	for _, c := range label {
		if ('0' > c || c > '9') && (!hex || 'a' > c || c > 'f') {
			return false
		}
	}
	return true
}

// host is the name as given.
func (m *name) host() []byte { return m.b[:m.n] }

// with is the name below domain; false when that is too long to be one.
func (m *name) with(domain string) ([]byte, bool) {
	if m.n+1+len(domain) > maxName {
		return nil, false
	}
	m.b[m.n] = '.'
	return m.b[:m.n+1+copy(m.b[m.n+1:], domain)], true
}

// under tells whether the name is domain or below it.
func (m *name) under(domain string) bool {
	i := m.n - len(domain)
	return i >= 0 && string(m.b[i:m.n]) == domain && (i == 0 || m.b[i-1] == '.')
}

// literal reads an address literal. The zone is dropped, since none can be sent, and IPv4 mapped into IPv6 is IPv4. What
// cannot be a literal is not parsed: the parser's error would be garbage on the way of every name.
func literal(host string) (netip.Addr, bool) {
	if strings.IndexByte(host, ':') < 0 && strings.Trim(host, "0123456789.") != "" {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(host)
	return a.WithZone("").Unmap(), err == nil
}
