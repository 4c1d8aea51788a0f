package selection

import (
	"strconv"
	"strings"
)

// MaxHeader is the length of the longest header value or SOCKS payload that
// ParseHeader reads, in bytes, without the white space around it.
const MaxHeader = 4096

// ParseHeader reads the value of the path selection header, or the payload of
// the SOCKS extension. Spaces and tabs around it do not count. Digits alone are
// an index for serverEscaper (007 is 7), {...} is a JSON map as ParseMap reads
// it, and all else is an ID for serverEscaper, commas, signs and inner spaces
// included: an ID that no node has is found out by Pool.Resolve. Errors wrap
// ErrMalformed: a value that is empty or longer than MaxHeader, a number over
// 64 bits, a broken map, an ID with a byte that is not printable ASCII.
//
// The Layer refers to value's bytes. An index or an ID allocates the Layer and
// nothing else.
func ParseHeader(value, serverEscaper string) (Layer, error) {
	v := strings.Trim(value, " \t")
	switch {
	case v == "":
		return nil, Refuse(ErrMalformed, "empty selection")
	case len(v) > MaxHeader:
		return nil, Refuse(ErrMalformed, "selection of %d bytes, %d at most", len(v), MaxHeader)
	case v[0] == '{':
		return parseMap(v)
	}
	digits := true
	for i := range len(v) {
		c := v[i]
		if c < ' ' || c > '~' {
			return nil, Refuse(ErrMalformed, "id %s has a character that is not printable ASCII", quote(v))
		}
		digits = digits && isDigit(c)
	}
	if !digits {
		return Layer{{Escaper: serverEscaper, Value: ID(v)}}, nil
	}
	i, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		return nil, Refuse(ErrMalformed, "index %s is over 64 bits", quote(v))
	}
	return Layer{{Escaper: serverEscaper, Value: Index(i)}}, nil
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
