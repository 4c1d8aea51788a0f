package selection

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Params is what the parameters of a user name say.
type Params struct {
	Layer   Layer // of path and ip: one entry or none
	Session Session
}

// param is a parameter of a user name, whichever of its keys names it.
type param uint8

const (
	paramNone param = iota
	paramPath
	paramIP
	paramSession
	paramLifetime
	paramStrict

	params // the number of them
)

// String returns the parameter's own key.
func (p param) String() string {
	return [params]string{"", "path", "ip", "session", "lifetime", "strict"}[p]
}

// keyParam returns the parameter that a key names, and the unit of a bare
// number where it is a duration. paramNone: the key is not known.
func keyParam(key string) (p param, unit time.Duration) {
	switch key {
	case "path":
		return paramPath, 0
	case "ip":
		return paramIP, 0
	case "session", "sessid", "sid", "sessionid":
		return paramSession, 0
	case "lifetime", "sesstime", "sessionduration", "sessttl":
		return paramLifetime, time.Minute
	case "sessionlength":
		return paramLifetime, time.Second
	case "strict":
		return paramStrict, 0
	}
	return paramNone, 0
}

const (
	maxParam    = 64 // bytes of a parameter's value
	maxLifetime = 365 * 24 * time.Hour
)

// nextKey finds the first -KEY- of s whose KEY is known: s[start:end], both
// dashes included. start is -1 when there is none.
func nextKey(s string) (start, end int) {
	for start = strings.IndexByte(s, '-'); start >= 0; start = end - 1 {
		length := strings.IndexByte(s[start+1:], '-')
		if length < 0 {
			break
		}
		end = start + 1 + length + 1
		if p, _ := keyParam(s[start+1 : end-1]); p != paramNone {
			return start, end
		}
	}
	return -1, 0
}

// SplitUsername splits a user name at its first -KEY- that is known. base is
// the name that the password belongs to; it may be empty, and hold dashes. rest
// is what ParseParams reads: "", or it begins with -KEY-. Keys are lower case;
// one without a dash behind it is part of base.
func SplitUsername(name string) (base, rest string) {
	if start, _ := nextKey(name); start >= 0 {
		return name[:start], name[start:]
	}
	return name, ""
}

// ParseParams reads the parameters of a user name, -KEY-VALUE one after the
// other. A value runs to the next -KEY- that is known and does not share the
// dash before the value: -session-path-1 is a session named path-1. It has 1 to
// 64 characters of A-Z, a-z, 0-9 and _.~-.
//
//   - path: digits are an index, all else is an ID, for serverEscaper or, after
//     ESCAPER~, for that one.
//   - ip: a source address, _ standing for a colon. Alone it selects the node
//     of serverEscaper that owns it, as [Address] does; beside path it pins the
//     path's node to it, as [Value.At] does.
//   - session (sessid, sid, sessionid): the session's name.
//   - lifetime (sesstime, sessionduration, sessttl): a whole number of minutes
//     or, with s, m, h or d behind it, of seconds, minutes, hours or days;
//     above 0, 365 days at most. sessionlength is the same in seconds.
//   - strict: on or off.
//
// Errors wrap ErrMalformed: an empty or bad value, a parameter given twice (by
// whichever keys), lifetime or strict without session, a rest that does not
// begin with a known -KEY-. "" gives zero Params. The result refers to rest's
// bytes.
func ParseParams(rest, serverEscaper string) (Params, error) {
	r := paramReader{escaper: serverEscaper}
	for rest != "" {
		start, end := nextKey(rest)
		if start != 0 {
			return Params{}, Refuse(ErrMalformed, "user-name parameters begin with %s, which is no known key", quote(rest))
		}
		key, after := rest[1:end-1], rest[end:]
		stop, _ := nextKey(after)
		if stop < 0 {
			stop = len(after)
		}
		if err := r.read(key, after[:stop]); err != nil {
			return Params{}, err
		}
		rest = after[stop:]
	}
	return r.result()
}

// paramReader gathers the parameters of one user name.
type paramReader struct {
	escaper string // that path and ip are for
	seen    [params]bool
	path    Value
	ip      netip.Addr
	session Session
}

// read takes in one parameter.
func (r *paramReader) read(key, value string) error {
	p, unit := keyParam(key)
	if r.seen[p] {
		return Refuse(ErrMalformed, "user name gives %s twice", p)
	}
	r.seen[p] = true
	if err := checkParam(key, value); err != nil {
		return err
	}
	var ok bool
	switch p {
	case paramPath:
		ok = r.readPath(value)
	case paramIP:
		r.ip = parseAddr(strings.ReplaceAll(value, "_", ":"))
		ok = r.ip.IsValid()
	case paramSession:
		r.session.Name, ok = value, true
	case paramLifetime:
		r.session.Lifetime, ok = parseLifetime(value, unit)
	case paramStrict:
		r.session.Strict = value == "on"
		ok = r.session.Strict || value == "off"
	}
	if !ok {
		return Refuse(ErrMalformed, "user name has %s %s, want %s", key, quote(value), wanted(p))
	}
	return nil
}

// wanted says what the values of a parameter are.
func wanted(p param) string {
	switch p {
	case paramPath:
		return "an index of up to 64 bits, an id, or ESCAPER~ before either"
	case paramIP:
		return "an address"
	case paramLifetime:
		return "a number above 0 and, if need be, s, m, h or d, 365 days at most"
	}
	return "on or off"
}

// checkParam checks what the values of all parameters have in common.
func checkParam(key, value string) error {
	if value == "" {
		return Refuse(ErrMalformed, "user name has an empty %s", key)
	}
	if len(value) > maxParam {
		return Refuse(ErrMalformed, "user name has a %s of %d bytes, %d at most", key, len(value), maxParam)
	}
	for i := range len(value) {
		switch c := value[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', isDigit(c):
		case c == '_', c == '.', c == '~', c == '-':
		default:
			return Refuse(ErrMalformed, "user name has a %s with a character other than A-Z a-z 0-9 _ . ~ and -: %s", key, quote(value))
		}
	}
	return nil
}

// readPath reads [ESCAPER~]INDEX or [ESCAPER~]ID. Neither name holds a ~.
func (r *paramReader) readPath(value string) bool {
	if escaper, node, ok := strings.Cut(value, "~"); ok {
		if escaper == "" || node == "" || strings.Contains(node, "~") {
			return false
		}
		r.escaper, value = escaper, node
	}
	if strings.Trim(value, "0123456789") != "" {
		r.path = ID(value)
		return true
	}
	i, err := strconv.ParseUint(value, 10, 64)
	r.path = Index(i)
	return err == nil
}

// parseLifetime reads a duration of whole units; bare is that of a number
// without one.
func parseLifetime(value string, bare time.Duration) (time.Duration, bool) {
	unit := bare
	number := value[:len(value)-1]
	switch value[len(value)-1] {
	case 's':
		unit = time.Second
	case 'm':
		unit = time.Minute
	case 'h':
		unit = time.Hour
	case 'd':
		unit = 24 * time.Hour
	default:
		number = value
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || n == 0 || n > uint64(maxLifetime/unit) {
		return 0, false
	}
	return time.Duration(n) * unit, true
}

// result puts together what was read.
func (r *paramReader) result() (Params, error) {
	if r.session.Name == "" {
		for _, p := range [...]param{paramLifetime, paramStrict} {
			if r.seen[p] {
				return Params{}, Refuse(ErrMalformed, "user name gives %s without session", p)
			}
		}
	}
	ps := Params{Session: r.session}
	switch {
	case r.seen[paramPath]:
		ps.Layer = Layer{{Escaper: r.escaper, Value: r.path.At(r.ip)}}
	case r.seen[paramIP]:
		ps.Layer = Layer{{Escaper: r.escaper, Value: Address(r.ip)}}
	}
	return ps, nil
}
