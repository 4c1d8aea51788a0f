package tproxy

import "encoding/binary"

// Numbers of TLS (RFC 8446 sections 4 and 5.1, RFC 6066 section 3).
const (
	recordHandshake  = 22
	recordHeader     = 5
	longestRecord    = 1 << 14
	clientHello      = 1
	extensionName    = 0
	nameTypeHost     = 0
	handshakeHeader  = 4
	randomAndVersion = 2 + 32
)

// helloName looks for the server name in the records that a TLS connection
// begins with. A ClientHello may take several.
func helloName(b []byte) (string, sight) {
	var message []byte
	for {
		if len(b) < recordHeader {
			if len(b) > 0 && b[0] != recordHandshake || len(b) > 1 && b[1] != 3 {
				return "", nameless
			}
			return "", unclear
		}
		n := int(binary.BigEndian.Uint16(b[3:]))
		if b[0] != recordHandshake || b[1] != 3 || n == 0 || n > longestRecord {
			return "", nameless
		}
		part := b[recordHeader:min(len(b), recordHeader+n)]
		if message == nil {
			message = part[:len(part):len(part)] // a second one is not to overwrite what follows
		} else {
			message = append(message, part...)
		}
		if name, s := handshakeName(message); s != unclear || len(b) < recordHeader+n {
			return name, s
		}
		b = b[recordHeader+n:]
	}
}

// handshakeName looks for the server name in a handshake message, which QUIC has
// without records.
func handshakeName(b []byte) (string, sight) {
	if len(b) == 0 {
		return "", unclear
	}
	if b[0] != clientHello {
		return "", nameless
	}
	if len(b) < handshakeHeader {
		return "", unclear
	}
	n := int(b[1])<<16 | int(binary.BigEndian.Uint16(b[2:]))
	if n > mostSniffed {
		return "", nameless
	}
	if len(b) < handshakeHeader+n {
		return "", unclear
	}
	return extensionsName(b[handshakeHeader : handshakeHeader+n])
}

// extensionsName looks for the server name in the body of a whole ClientHello.
func extensionsName(b []byte) (string, sight) {
	c := cursor{rest: b}
	c.take(randomAndVersion)
	c.vector(1) // session
	c.vector(2) // cipher suites
	c.vector(1) // compression
	if c.bad || len(c.rest) == 0 {
		return "", nameless
	}
	extensions := cursor{rest: c.vector(2)}
	if c.bad {
		return "", nameless
	}
	for len(extensions.rest) > 0 && !extensions.bad {
		typ := extensions.number(2)
		body := extensions.vector(2)
		if extensions.bad || typ != extensionName {
			continue
		}
		names := cursor{rest: body}
		list := cursor{rest: names.vector(2)}
		for len(list.rest) > 0 && !names.bad {
			kind, name := list.number(1), list.vector(2)
			if !list.bad && kind == nameTypeHost {
				return found(name)
			}
			if list.bad {
				break
			}
		}
		break
	}
	return "", nameless
}

// A cursor takes a message apart. Once it has met its end too early it is bad,
// and gives nothing.
type cursor struct {
	rest []byte
	bad  bool
}

func (c *cursor) take(n int) []byte {
	if c.bad || n > len(c.rest) {
		c.bad = true
		return nil
	}
	out := c.rest[:n]
	c.rest = c.rest[n:]
	return out
}

// number reads a number of so many bytes, at most four.
func (c *cursor) number(size int) int {
	n := 0
	for _, b := range c.take(size) {
		n = n<<8 | int(b)
	}
	return n
}

// vector reads what stands behind its own length.
func (c *cursor) vector(size int) []byte { return c.take(c.number(size)) }
