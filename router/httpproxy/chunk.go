package httpproxy

import (
	"bytes"
	"errors"
)

// Bounds of what comes with the chunks of a body.
const (
	maxChunkLine = 1 << 10 // the size with its extensions and CRLF
	maxChunkExts = 8 << 10 // the extensions of one body
)

// parseChunkSize reads a chunk's size line, without its CRLF: hexadecimal
// digits, as many as an int64 has room for, and extensions, which are looked
// at no further than that they hold no control characters (RFC 9112, section
// 7.1.1: a recipient ignores those it does not know, and all may be dropped).
// White space before an extension is refused. ext is their length. The error
// is a fault.
func parseChunkSize(line []byte) (size int64, ext int, err error) {
	n := 0
	for n < len(line) {
		d, ok := hexDigit(line[n])
		if !ok {
			break
		}
		if n >= 15 { // 60 bits
			return 0, 0, faultChunkSize
		}
		size = size<<4 | int64(d)
		n++
	}
	if n == 0 || (n < len(line) && line[n] != ';') {
		return 0, 0, faultChunkSize
	}
	for _, c := range line[n:] {
		if !isValue(c) {
			return 0, 0, faultChunkExtension
		}
	}
	return size, len(line) - n, nil
}

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkData
	chunkDataEnd // the CRLF after the data
	chunkTrailer
	chunkDone
)

// A chunked decodes a chunked body in place: the payload of what is in the
// buffer is moved together, so that it goes on in one piece.
type chunked struct {
	state   chunkState
	left    int64 // of the chunk's data
	exts    int
	end     headEnd
	trailer head // its fields, when state is chunkDone
}

func (c *chunked) reset() {
	c.state, c.left, c.exts, c.end = chunkSize, 0, 0, headEnd{}
	c.trailer.reset(nil)
}

// decode takes what it can off b. It returns the payload, which lies in b and
// is good as long as b is, and how much of b is dealt with; what is left of b
// has to stand at the start of b at the next call, with more behind it. The
// error is a fault; the payload that stood before it is returned as well.
func (c *chunked) decode(b []byte, lim *headLimits) (payload []byte, used int, err error) {
	for c.state != chunkDone {
		rest := b[used:]
		switch c.state {
		case chunkSize:
			n, err := c.sizeLine(rest)
			if n == 0 || err != nil {
				return payload, used, err
			}
			used += n
		case chunkData:
			n := int(min(c.left, int64(len(rest))))
			if n == 0 {
				return payload, used, nil
			}
			if payload == nil {
				payload = rest[:n]
			} else {
				// Behind the payload in b lies the framing that was used.
				payload = append(payload, rest[:n]...)
			}
			used += n
			if c.left -= int64(n); c.left == 0 {
				c.state = chunkDataEnd
			}
		case chunkDataEnd:
			if len(rest) > 0 && rest[0] != '\r' || len(rest) > 1 && rest[1] != '\n' {
				return payload, used, faultChunkEnd
			}
			if len(rest) < 2 {
				return payload, used, nil
			}
			used += 2
			c.state = chunkSize
		case chunkTrailer:
			n, err := c.trailerSection(rest, lim)
			if n == 0 || err != nil {
				return payload, used, err
			}
			used += n
		}
	}
	return payload, used, nil
}

// sizeLine reads a size line from the start of b; n is 0 when it is not all
// there.
func (c *chunked) sizeLine(b []byte) (n int, err error) {
	i := bytes.IndexByte(b, '\n')
	if i >= maxChunkLine || i < 0 && len(b) >= maxChunkLine {
		return 0, faultChunkExtension
	}
	if i < 0 {
		// Refused as soon as it cannot become a size line any more.
		if len(b) > 0 {
			if _, ok := hexDigit(b[0]); !ok {
				return 0, faultChunkSize
			}
		}
		return 0, nil
	}
	if i == 0 || b[i-1] != '\r' {
		return 0, faultBareLF
	}
	size, ext, err := parseChunkSize(b[:i-1])
	if err != nil {
		return 0, err
	}
	if c.exts += ext; c.exts > maxChunkExts {
		return 0, faultChunkExtension
	}
	c.left, c.state = size, chunkData
	if size == 0 {
		c.state, c.end = chunkTrailer, headEnd{}
	}
	return i + 1, nil
}

// trailerSection reads the trailer fields and the empty line after them; n is
// 0 when they are not all there.
func (c *chunked) trailerSection(b []byte, lim *headLimits) (n int, err error) {
	n, err = c.end.find(b)
	if n == 0 || err != nil {
		return 0, err
	}
	if n > maxTrailer {
		return 0, faultTrailerTooLarge
	}
	c.trailer.reset(b[:n])
	if err := c.trailer.parseFields(b[:n], lim); err != nil {
		if errors.Is(err, faultTooManyFields) {
			return 0, faultTrailerTooLarge
		}
		return 0, faultTrailer
	}
	c.state = chunkDone
	return n, nil
}
