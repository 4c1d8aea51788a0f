package selection

import (
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// ParseMap reads a selection written as one JSON object (RFC 8259): keys are
// escaper names, a number selects by index, a string by ID. It is strict where
// the grammar leaves room: numbers are non-negative integers of up to 64 bits
// without fraction or exponent; duplicate keys (compared after their escapes
// are read), null, booleans, arrays, inner objects, empty string values, lone
// surrogates, invalid UTF-8 and anything after the object are refused. Errors
// wrap ErrMalformed. {} selects nothing. Whether a key is an escaper is not
// decided here. There is no limit on the size: it is the caller's.
func ParseMap(json []byte) (Layer, error) { return parseMap(string(json)) }

// scanner reads JSON from s; i is the next byte.
type scanner struct {
	s string
	i int
}

func parseMap(text string) (Layer, error) {
	sc := scanner{s: text}
	l, err := sc.object()
	if err != nil {
		return nil, err
	}
	if sc.space(); sc.i < len(sc.s) {
		return nil, sc.broken("nothing after the map")
	}
	return l, nil
}

// object reads the map itself.
func (sc *scanner) object() (Layer, error) {
	if sc.space(); !sc.take('{') {
		return nil, sc.broken("{")
	}
	if sc.space(); sc.take('}') {
		return nil, nil
	}
	// Commas count entries, save those inside names: a guess with a ceiling.
	l := make(Layer, 0, min(strings.Count(sc.s, ",")+1, 8))
	var names nameSet
	for {
		sc.space()
		name, err := sc.str("a name")
		if err != nil {
			return nil, err
		}
		if !names.add(l, name) {
			return nil, Refuse(ErrMalformed, "map names %s twice", quote(name))
		}
		if sc.space(); !sc.take(':') {
			return nil, sc.broken("a colon")
		}
		sc.space()
		v, err := sc.value(name)
		if err != nil {
			return nil, err
		}
		l = append(l, Entry{Escaper: name, Value: v})
		sc.space()
		switch {
		case sc.take(','):
		case sc.take('}'):
			return l, nil
		default:
			return nil, sc.broken("a comma or }")
		}
	}
}

// nameSet finds duplicate names: by looking through the few entries that a map
// has as a rule, by a table from there on, so that a 4 KiB header of tiny names
// does not cost their square.
type nameSet struct{ table map[string]struct{} }

// add reports whether name is not yet in l, and notes it.
func (n *nameSet) add(l Layer, name string) bool {
	const few = 16
	if len(l) < few {
		_, dup := l.find(name)
		return !dup
	}
	if n.table == nil {
		n.table = make(map[string]struct{}, 4*few)
		for i := range l {
			n.table[l[i].Escaper] = struct{}{}
		}
	}
	if _, dup := n.table[name]; dup {
		return false
	}
	n.table[name] = struct{}{}
	return true
}

// value reads the value of one name.
func (sc *scanner) value(name string) (Value, error) {
	var c byte
	if sc.i < len(sc.s) {
		c = sc.s[sc.i]
	}
	switch {
	case c == '"':
		s, err := sc.str("an id")
		if err != nil {
			return Value{}, err
		}
		if s == "" {
			return Value{}, Refuse(ErrMalformed, "map has an empty id for %s", quote(name))
		}
		return ID(s), nil
	case isDigit(c):
		return sc.number(name)
	case c == '-':
		return Value{}, Refuse(ErrMalformed, "map has a negative number for %s", quote(name))
	}
	return Value{}, sc.broken("an index or an id in quotes for " + quote(name))
}

// number reads an index, and refuses what JSON allows and an index is not.
func (sc *scanner) number(name string) (Value, error) {
	from := sc.i
	for sc.i < len(sc.s) && isDigit(sc.s[sc.i]) {
		sc.i++
	}
	digits := sc.s[from:sc.i]
	if len(digits) > 1 && digits[0] == '0' {
		return Value{}, Refuse(ErrMalformed, "map has a number with a leading zero for %s", quote(name))
	}
	if sc.i < len(sc.s) {
		switch sc.s[sc.i] {
		case '.', 'e', 'E':
			return Value{}, Refuse(ErrMalformed, "map has a number with fraction or exponent for %s", quote(name))
		}
	}
	i, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return Value{}, Refuse(ErrMalformed, "map has a number over 64 bits for %s", quote(name))
	}
	return Index(i), nil
}

// str reads a string; what says which one, for the error. It is a part of the
// input when it has no escapes.
func (sc *scanner) str(what string) (string, error) {
	if !sc.take('"') {
		return "", sc.broken(what + " in quotes")
	}
	from := sc.i
	var buf []byte // what is read before from, once there was an escape
	for sc.i < len(sc.s) {
		switch c := sc.s[sc.i]; {
		case c == '"':
			part := sc.s[from:sc.i]
			sc.i++
			if buf != nil {
				part = string(append(buf, part...))
			}
			if !utf8.ValidString(part) {
				return "", Refuse(ErrMalformed, "map has %s that is not UTF-8", what)
			}
			return part, nil
		case c < ' ':
			return "", sc.broken("no control character in " + what)
		case c == '\\':
			buf = append(buf, sc.s[from:sc.i]...)
			r, ok := sc.escape()
			if !ok {
				return "", Refuse(ErrMalformed, "map has a bad escape in %s", what)
			}
			buf = utf8.AppendRune(buf, r)
			from = sc.i
		default:
			sc.i++
		}
	}
	return "", sc.broken("a quote that ends " + what)
}

// escape reads one escape sequence, both halves of a surrogate pair at once.
func (sc *scanner) escape() (rune, bool) {
	rest := sc.s[sc.i+1:]
	if rest == "" {
		return 0, false
	}
	sc.i += 2
	switch rest[0] {
	case '"', '\\', '/':
		return rune(rest[0]), true
	case 'b':
		return '\b', true
	case 'f':
		return '\f', true
	case 'n':
		return '\n', true
	case 'r':
		return '\r', true
	case 't':
		return '\t', true
	case 'u':
	default:
		return 0, false
	}
	r, ok := sc.hex4()
	if !ok || !utf16.IsSurrogate(r) {
		return r, ok
	}
	if !sc.take('\\') || !sc.take('u') {
		return 0, false
	}
	low, ok := sc.hex4()
	r = utf16.DecodeRune(r, low)
	return r, ok && r != utf8.RuneError
}

// hex4 reads the four digits of a \u escape.
func (sc *scanner) hex4() (rune, bool) {
	if len(sc.s)-sc.i < 4 {
		return 0, false
	}
	var r rune
	for _, c := range []byte(sc.s[sc.i : sc.i+4]) {
		switch {
		case isDigit(c):
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	sc.i += 4
	return r, true
}

func (sc *scanner) space() {
	for sc.i < len(sc.s) {
		switch sc.s[sc.i] {
		case ' ', '\t', '\r', '\n':
			sc.i++
		default:
			return
		}
	}
}

func (sc *scanner) take(c byte) bool {
	if sc.i < len(sc.s) && sc.s[sc.i] == c {
		sc.i++
		return true
	}
	return false
}

// broken says what should have stood where the scanner is.
func (sc *scanner) broken(want string) error {
	if sc.i >= len(sc.s) {
		return Refuse(ErrMalformed, "map ends early, want %s", want)
	}
	return Refuse(ErrMalformed, "map at byte %d: want %s, got %s", sc.i+1, want, quote(sc.s[sc.i:sc.i+1]))
}
