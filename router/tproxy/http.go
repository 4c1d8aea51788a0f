package tproxy

import "bytes"

// hostName looks for the Host of an HTTP/1 request (RFC 9112 section 3.2). It
// says nothing before the end of the head, because two of them count as none.
func hostName(b []byte) (string, sight) {
	whole := b
	line, rest, ended := cutLine(b)
	if !requestLine(line, ended) {
		return "", nameless
	}
	var host []byte
	hosts := 0
	for ended {
		line, rest, ended = cutLine(rest)
		if ended && len(line) == 0 {
			if hosts != 1 {
				return "", nameless
			}
			return found(withoutPort(host))
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if bytes.HasSuffix(line, []byte("\n")) || !isToken(name) && (ended || len(line) > 0) {
			return "", nameless // also a folded line, and a bare carriage return
		}
		if !ended {
			break
		}
		if !ok {
			return "", nameless
		}
		if bytes.EqualFold(name, []byte("host")) {
			host = bytes.Trim(value, " \t")
			hosts++
		}
	}
	if len(whole) >= mostSniffed {
		return "", nameless
	}
	return "", unclear
}

// cutLine gives the first line, without its CRLF, and what follows; ended is
// false for a line that is not all there.
func cutLine(b []byte) (line, rest []byte, ended bool) {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		return bytes.TrimSuffix(b, []byte("\r")), nil, false
	}
	if i == 0 || b[i-1] != '\r' {
		return b[:i+1], b[i+1:], true // with its bare LF, which no part of a line may hold
	}
	return b[:i-1], b[i+1:], true
}

// requestLine says whether a line, or the beginning of one, is a request's.
func requestLine(line []byte, whole bool) bool {
	const longestMethod = 32
	method, rest, cut := bytes.Cut(line, []byte(" "))
	switch {
	case len(method) > longestMethod, !isToken(method):
		return false
	case !cut:
		return !whole
	}
	target, version, cut := bytes.Cut(rest, []byte(" "))
	for _, c := range target {
		if c <= ' ' || c == 0x7f {
			return false
		}
	}
	if !cut {
		return !whole
	}
	for _, known := range []string{"HTTP/1.1", "HTTP/1.0"} {
		if string(version) == known || !whole && len(version) < len(known) && string(version) == known[:len(version)] {
			return len(target) > 0
		}
	}
	return false
}

// isToken says whether b is a token (RFC 9110 section 5.6.2).
func isToken(b []byte) bool {
	for _, c := range b {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		default:
			if bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) < 0 {
				return false
			}
		}
	}
	return len(b) > 0
}

// withoutPort takes :PORT off. An IPv6 address in brackets stays what it is,
// which is no name.
func withoutPort(host []byte) []byte {
	i := bytes.LastIndexByte(host, ':')
	if i < 0 || bytes.IndexByte(host, ']') > i {
		return host
	}
	for _, c := range host[i+1:] {
		if c < '0' || c > '9' {
			return nil
		}
	}
	return host[:i]
}
