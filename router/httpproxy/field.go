package httpproxy

// kind sorts the fields that the proxy itself has to do with; all others are
// end to end and are forwarded as they came.
type kind uint8

const (
	kindOther kind = iota
	kindConnection
	kindProxyConnection
	kindKeepAlive
	kindProxyAuthorization
	kindProxyAuthenticate // and Proxy-Authentication-Info
	kindTE
	kindTrailer
	kindTransferEncoding
	kindContentLength
	kindUpgrade
	kindHost
	kindExpect
	kindMaxForwards
	kindHTTP2Settings
	kindSelection // the path selection header
	kindEgressIP  // X-Egress-IP
)

// classify tells the kind of a field by its name, in any case. selection is
// the name of the path selection header in lower case, "" when it is off.
func classify(name []byte, selection string) kind {
	if len(name) == len(selection) && foldEqual(name, selection) {
		return kindSelection
	}
	// The length alone rules out nearly all fields.
	switch len(name) {
	case 2:
		return pick(name, "te", kindTE)
	case 4:
		return pick(name, "host", kindHost)
	case 6:
		return pick(name, "expect", kindExpect)
	case 7:
		if k := pick(name, "trailer", kindTrailer); k != kindOther {
			return k
		}
		return pick(name, "upgrade", kindUpgrade)
	case 10:
		if k := pick(name, "connection", kindConnection); k != kindOther {
			return k
		}
		return pick(name, "keep-alive", kindKeepAlive)
	case 11:
		return pick(name, "x-egress-ip", kindEgressIP)
	case 12:
		return pick(name, "max-forwards", kindMaxForwards)
	case 14:
		if k := pick(name, "content-length", kindContentLength); k != kindOther {
			return k
		}
		return pick(name, "http2-settings", kindHTTP2Settings)
	case 16:
		return pick(name, "proxy-connection", kindProxyConnection)
	case 17:
		return pick(name, "transfer-encoding", kindTransferEncoding)
	case 18:
		return pick(name, "proxy-authenticate", kindProxyAuthenticate)
	case 19:
		return pick(name, "proxy-authorization", kindProxyAuthorization)
	case 25:
		return pick(name, "proxy-authentication-info", kindProxyAuthenticate)
	}
	return kindOther
}

func pick(name []byte, want string, k kind) kind {
	if foldEqual(name, want) {
		return k
	}
	return kindOther
}

// forwarded reports whether a field of this kind goes on as it came. The
// others are dropped, and where the message needs them written anew: those
// that are about one connection (RFC 9110, section 7.6.1), those that frame
// the message, and the path selection header.
func (k kind) forwarded() bool {
	switch k {
	case kindOther, kindTrailer, kindExpect, kindMaxForwards, kindEgressIP:
		return true
	}
	return false
}

// inTrailer reports whether a trailer field of this kind goes on. What frames,
// routes or authenticates a message has no place there (RFC 9110, section
// 6.5.1).
func (k kind) inTrailer() bool { return k == kindOther }

// foldEqual compares with a string in lower case, ignoring the case of ASCII
// letters in b and of nothing else.
func foldEqual(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i := range b {
		if toLower(b[i]) != lower[i] {
			return false
		}
	}
	return true
}

// foldEqualBytes compares two names ignoring the case of ASCII letters.
func foldEqualBytes(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if toLower(a[i]) != toLower(b[i]) {
			return false
		}
	}
	return true
}

func toLower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c + ('a' - 'A')
	}
	return c
}

// Bit sets over ASCII: the characters of a token (RFC 9110, section 5.6.2) and
// those of a host name as resolvers take it.
const (
	tokenLow  = 0x03ff_6cfa_0000_0000 // 0-9 ! # $ % & ' * + - .
	tokenHigh = 0x57ff_ffff_c7ff_fffe // A-Z a-z ^ _ ` | ~
)

func isToken(c byte) bool {
	switch {
	case c < 64:
		return tokenLow>>c&1 != 0
	case c < 128:
		return uint64(tokenHigh)>>(c-64)&1 != 0
	}
	return false
}

func allToken(b []byte) bool {
	for _, c := range b {
		if !isToken(c) {
			return false
		}
	}
	return len(b) > 0
}

// isValue reports whether c may stand in a field value: all but control
// characters, tabs aside. Bytes above ASCII pass (obs-text).
func isValue(c byte) bool { return c >= ' ' && c != 0x7f || c == '\t' }

func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// nextElement takes the first element off a comma-separated list.
func nextElement(list []byte) (element, rest []byte) {
	for i, c := range list {
		if c == ',' {
			return trim(list[:i]), list[i+1:]
		}
	}
	return trim(list), nil
}

// hasElement reports whether a list holds a word, in any case.
func hasElement(list []byte, lower string) bool {
	for len(list) > 0 {
		var e []byte
		e, list = nextElement(list)
		if foldEqual(e, lower) {
			return true
		}
	}
	return false
}

// parseLength reads a Content-Length: digits alone, at most 18 of them, which
// an int64 holds.
func parseLength(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}
