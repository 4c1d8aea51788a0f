package httpproxy

import (
	"bytes"
	"net/netip"

	"wayout/router/escaper"
)

// An authority is host[:port] as it stands in a target or in a Host field. It
// refers to the bytes that it was parsed from.
type authority struct {
	name []byte     // a domain name, nil for a literal address
	addr netip.Addr // a literal address, unmapped; else the zero Addr
	port uint16     // 0: none was given
}

// parse reads an authority. User information is refused, and so are an empty
// host, an empty port, and a host in a spelling that one resolver takes for an
// address and another for a name (127.1, 0x7f000001).
// needPort refuses an authority without a port. The error is a fault.
func (a *authority) parse(b []byte, needPort bool) error {
	*a = authority{}
	if len(b) == 0 {
		return faultHost
	}
	host, port := b, []byte(nil)
	hasPort := false
	if b[0] == '[' {
		end := bytes.IndexByte(b, ']')
		if end < 0 {
			return faultHost
		}
		host = b[1:end]
		if rest := b[end+1:]; len(rest) > 0 {
			if rest[0] != ':' {
				return faultHost
			}
			port, hasPort = rest[1:], true
		}
	} else if i := bytes.IndexByte(b, ':'); i >= 0 {
		host, port, hasPort = b[:i], b[i+1:], true
	}
	if bytes.IndexByte(b, '@') >= 0 {
		return faultUserinfo
	}
	var err error
	if b[0] == '[' {
		err = a.parseIPv6(host)
	} else {
		err = a.parseName(host)
	}
	switch {
	case err != nil:
		return err
	case hasPort:
		return a.parsePort(port)
	case needPort:
		return faultConnectTarget
	}
	return nil
}

// maxIPv6 is the length of the longest spelling of an IPv6 address.
const maxIPv6 = len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255")

func (a *authority) parseIPv6(host []byte) error {
	if bytes.IndexByte(host, '%') >= 0 {
		return faultZone
	}
	if len(host) > maxIPv6 || bytes.IndexByte(host, ':') < 0 {
		return faultHost
	}
	addr, err := netip.ParseAddr(string(host))
	if err != nil {
		return faultHost
	}
	a.addr = addr.Unmap()
	return nil
}

func (a *authority) parseName(host []byte) error {
	addr, ok := escaper.ParseHost(host)
	switch {
	case !ok:
		return faultHost
	case addr.IsValid():
		a.addr = addr
	default:
		a.name = host
	}
	return nil
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case isDigit(c):
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

func (a *authority) parsePort(b []byte) error {
	if len(b) == 0 || len(b) > 5 || b[0] == '0' {
		return faultPort
	}
	n := 0
	for _, c := range b {
		if !isDigit(c) {
			return faultPort
		}
		n = n*10 + int(c-'0')
	}
	if n > 65535 {
		return faultPort
	}
	a.port = uint16(n)
	return nil
}

// splitAbsolute splits an http URL into its authority and the origin-form of
// the rest: path and query. path is empty when the URL ends with its
// authority, and may begin with '?'; it then wants a "/" before it. The error
// is a fault.
func splitAbsolute(target []byte) (auth, path []byte, err error) {
	const scheme = "http://"
	switch {
	case len(target) == 0:
		return nil, nil, faultRequestLine
	case target[0] == '/':
		return nil, nil, faultOriginForm
	case len(target) == 1 && target[0] == '*':
		return nil, nil, faultAsteriskForm
	case len(target) >= len("https://") && foldEqual(target[:len("https://")], "https://"):
		return nil, nil, faultHTTPS
	case len(target) < len(scheme) || !foldEqual(target[:len(scheme)], scheme):
		return nil, nil, faultScheme
	}
	rest := target[len(scheme):]
	end := len(rest)
	for i, c := range rest {
		if c == '/' || c == '?' || c == '#' {
			end = i
			break
		}
	}
	auth, path = rest[:end], rest[end:]
	for _, c := range path {
		if c == '#' {
			return nil, nil, faultFragment
		}
	}
	return auth, path, nil
}
