package socks

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"wayout/router/escaper"
	"wayout/router/socks/client"
	"wayout/selection"
)

// Versions, methods and commands of the protocols.
const (
	version4    = 4
	version5    = 5
	versionAuth = 1 // of the sub-negotiations: RFC 1929, and the extension

	methodNone      = 0x00
	methodPassword  = 0x02
	methodExtension = 0xe9
	methodNoneFits  = 0xff

	commandConnect   = 1
	commandAssociate = 3
)

// Each parse function reads one message from the beginning of b, and returns
// how many bytes it takes: 0 without an error when b ends before it does. What
// it returns refers to b, but for addresses. The error says that it can never
// be read. The longest message takes maxMessage bytes.

const (
	maxUserID  = 255 // bytes of what a SOCKS4 client calls itself
	maxMessage = 1 + 2 + selection.MaxHeader + 1 + 255
)

// parseGreeting reads VER, NMETHODS, METHODS (RFC 1928, section 3).
func parseGreeting(b []byte) (methods []byte, n int, err error) {
	if len(b) > 0 && b[0] != version5 {
		return nil, 0, errVersion
	}
	if len(b) < 2 || len(b) < 2+int(b[1]) {
		return nil, 0, nil
	}
	n = 2 + int(b[1])
	return b[2:n], n, nil
}

// parseExtension reads VER, LEN, PAYLOAD, NMETHODS, METHODS.
func parseExtension(b []byte) (payload, methods []byte, n int, err error) {
	if len(b) > 0 && b[0] != versionAuth {
		return nil, nil, 0, errExtension
	}
	if len(b) < 3 {
		return nil, nil, 0, nil
	}
	size := int(binary.BigEndian.Uint16(b[1:]))
	if size == 0 || size > selection.MaxHeader {
		return nil, nil, 0, errExtension
	}
	at := 3 + size
	if len(b) <= at || len(b) <= at+int(b[at]) {
		return nil, nil, 0, nil
	}
	n = at + 1 + int(b[at])
	return b[3:at], b[at+1 : n], n, nil
}

// parsePassword reads VER, ULEN, UNAME, PLEN, PASSWD (RFC 1929, section 2).
// Either may be empty: such are nobody's.
func parsePassword(b []byte) (name, password []byte, n int, err error) {
	if len(b) > 0 && b[0] != versionAuth {
		return nil, nil, 0, errPassword
	}
	if len(b) < 2 {
		return nil, nil, 0, nil
	}
	at := 2 + int(b[1])
	if len(b) <= at || len(b) <= at+int(b[at]) {
		return nil, nil, 0, nil
	}
	n = at + 1 + int(b[at])
	return b[2:at], b[at+1 : n], n, nil
}

// parseRequest reads VER, CMD, RSV and an address (RFC 1928, section 4).
func parseRequest(b []byte) (command byte, to client.Addr, n int, err error) {
	const head = 3
	if len(b) > 0 && b[0] != version5 {
		return 0, to, 0, errRequest
	}
	if len(b) <= head {
		return 0, to, 0, nil
	}
	to, n, err = client.ParseAddr(b[head:])
	if err != nil || n == 0 {
		return b[1], to, 0, err
	}
	return b[1], to, head + n, nil
}

// parseRequest4 reads VN, CD, DSTPORT, DSTIP, USERID, NUL and, for 4a, where
// DSTIP is 0.0.0.1 to 0.0.0.255, a name and NUL. What the user calls himself
// proves nothing, and is passed over.
func parseRequest4(b []byte) (command byte, to client.Addr, n int, err error) {
	const head = 8
	if len(b) > 0 && b[0] != version4 {
		return 0, to, 0, errRequest
	}
	if len(b) <= head {
		return 0, to, 0, nil
	}
	to.Port = binary.BigEndian.Uint16(b[2:])
	user, found := field4(b[head:], maxUserID)
	switch {
	case user > maxUserID:
		return b[1], to, 0, errRequest
	case !found:
		return 0, to, 0, nil
	}
	n = head + user + 1
	if b[4] != 0 || b[5] != 0 || b[6] != 0 || b[7] == 0 {
		to.IP = ip4(b[4:8])
		return b[1], to, n, nil
	}
	const maxHost = 255
	host, found := field4(b[n:], maxHost)
	switch {
	case host > maxHost, found && host == 0:
		return b[1], to, 0, errRequest
	case !found:
		return 0, to, 0, nil
	}
	to.Host = string(b[n : n+host])
	return b[1], to, n + host + 1, nil
}

// field4 returns the length of a field that ends in NUL, and whether its end is
// there. A length over most is that of a field that is too long already.
func field4(b []byte, most int) (n int, found bool) {
	if len(b) > most+1 {
		b = b[:most+1]
	}
	i := bytes.IndexByte(b, 0)
	if i < 0 {
		return len(b), false
	}
	return i, true
}

// target is where an address leads. A name that spells an address is one.
func target(a client.Addr) (escaper.Target, error) {
	t := escaper.Target{Addr: a.IP.Unmap(), Port: a.Port}
	if a.Host != "" {
		addr, ok := escaper.ParseHost([]byte(a.Host))
		if !ok {
			// What has no zone has no zone to lose.
			if addr, _ = netip.ParseAddr(a.Host); !addr.Is6() || addr.Zone() != "" {
				return escaper.Target{}, errHost
			}
		}
		if t.Addr = addr.Unmap(); !addr.IsValid() {
			t.Host = a.Host
		}
	}
	if t.Port == 0 {
		return escaper.Target{}, errPort
	}
	return t, nil
}

// ip4 makes an address of 4 bytes.
func ip4(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }

// Speaks reports whether a client that begins with this byte speaks SOCKS.
func Speaks(first byte) bool { return first == version5 || first == version4 }
