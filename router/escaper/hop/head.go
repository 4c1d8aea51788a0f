package hop

import "bytes"

// answer is what counts of a response head.
type answer struct {
	status  int
	problem string // the error type of Proxy-Status; empty: none
}

// headEnd looks for the empty line that ends a head, in bytes that arrive piece
// by piece; it looks at each byte once.
type headEnd struct{ line, pos int }

// find looks on in b, which holds what it held at the last call and perhaps
// more. n is the length of the head with its empty line, or 0 when more is
// needed. A bare LF is refused: a head and what follows it cannot be told apart
// in two ways.
func (e *headEnd) find(b []byte) (n int, err error) {
	for {
		i := bytes.IndexByte(b[e.pos:], '\n')
		if i < 0 {
			e.pos = len(b)
			return 0, nil
		}
		i += e.pos
		if i == e.line || b[i-1] != '\r' {
			return 0, garbage("a line of its head ends in a bare LF")
		}
		e.pos = i + 1
		if i == e.line+1 {
			return e.pos, nil
		}
		e.line = e.pos
	}
}

func garbage(why string) error {
	return fail(ErrProtocol, nil, "the peer does not speak HTTP: %s", why)
}

// parseAnswer parses a whole response head, with its empty line at the end.
func parseAnswer(b []byte) (a answer, err error) {
	line, rest, _ := bytes.Cut(b, []byte("\r\n"))
	if a.status, err = parseStatusLine(line); err != nil {
		return a, err
	}
	for {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		if len(line) == 0 {
			return a, nil
		}
		name, value, err := parseField(line)
		if err != nil {
			return a, err
		}
		// The first member is nearest to the target (RFC 9209, section 2).
		if a.problem == "" && bytes.EqualFold(name, []byte("Proxy-Status")) {
			a.problem = problemOf(value)
		}
	}
}

// parseStatusLine reads the status of HTTP/1.0 and HTTP/1.1. The space after it
// may be missing where there is no reason phrase, as it often is.
func parseStatusLine(line []byte) (status int, err error) {
	const version = len("HTTP/1.1 ")
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) && !bytes.HasPrefix(line, []byte("HTTP/1.0 ")) {
		return 0, garbage("no status line of HTTP/1")
	}
	code, reason := line[version:], []byte(nil)
	if len(code) > 3 {
		code, reason = code[:3], code[3:]
	}
	for _, c := range code {
		if c < '0' || c > '9' {
			return 0, garbage("no status")
		}
		status = status*10 + int(c-'0')
	}
	switch {
	case len(code) < 3 || status < 100 || status > 599:
		return 0, garbage("a status out of range")
	case len(reason) > 0 && reason[0] != ' ', !isText(reason):
		return 0, garbage("a bad reason phrase")
	}
	return status, nil
}

// parseField takes a line apart. Folded lines and space before the colon (RFC
// 9112, sections 5.1 and 5.2) are refused.
func parseField(line []byte) (name, value []byte, err error) {
	name, value, ok := bytes.Cut(line, []byte(":"))
	switch {
	case !ok || !isToken(name):
		return nil, nil, garbage("a field without a name")
	case !isText(value):
		return nil, nil, garbage("a control character in a field")
	}
	return name, bytes.Trim(value, " \t"), nil
}

// isText allows what may be in a field's value and a reason phrase.
func isText(b []byte) bool {
	for _, c := range b {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// isToken reports whether s is a token (RFC 9110, section 5.6.2).
func isToken[S string | []byte](s S) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '!', c == '*', c == '+', c == '-', c == '.', c == '|', c == '~':
		case c >= '#' && c <= '\'', c >= '^' && c <= '`':
		default:
			return false
		}
	}
	return len(s) > 0
}

// problemOf returns the error parameter of the first member of Proxy-Status
// that has one, or "". A value that cannot be read has none.
func problemOf(v []byte) (kind string) {
	for len(v) > 0 {
		switch v[0] {
		case '"':
			n := stringEnd(v)
			if n == 0 {
				return ""
			}
			v = v[n:]
		case ';':
			v = bytes.TrimLeft(v[1:], " ")
			key, n := cutKey(v)
			v = v[n:]
			if string(key) != "error" || len(v) == 0 || v[0] != '=' {
				continue
			}
			key, n = cutKey(v[1:])
			kind, v = string(key), v[1+n:]
		case ',':
			if kind != "" {
				return kind
			}
			v = v[1:]
		default:
			v = v[1:]
		}
	}
	return kind
}

// stringEnd returns the length of the quoted string (RFC 8941, section 3.3.3)
// that v begins with, 0 when it does not end.
func stringEnd(v []byte) int {
	for i := 1; i < len(v); i++ {
		switch v[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return 0
}

// cutKey returns the key, or the token as error types are, at the beginning.
func cutKey(v []byte) (key []byte, n int) {
	for n < len(v) && (v[n] >= 'a' && v[n] <= 'z' || v[n] >= '0' && v[n] <= '9' || bytes.IndexByte([]byte("_-.*"), v[n]) >= 0) {
		n++
	}
	return v[:n], n
}
