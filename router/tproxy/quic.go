package tproxy

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"slices"
)

// Versions of QUIC.
const (
	quicV1 = 0x00000001 // RFC 9000
	quicV2 = 0x6b3343cf // RFC 9369
)

// The parts of a long header (RFC 9000 section 17.2).
const (
	longHeader    = 0x80
	fixedBit      = 0x40
	longestID     = 20
	sampleAt      = 4 // from the packet number, which is taken to have four bytes
	sampleSize    = 16
	tagSize       = 16
	longestCrypto = mostSniffed
)

// Frames that a client's Initial may hold (RFC 9000 section 17.2.2).
const (
	framePadding = 0x00
	framePing    = 0x01
	frameACK     = 0x02
	frameACKECN  = 0x03
	frameCrypto  = 0x06
)

// A dialect is what two versions of QUIC differ in.
type dialect struct {
	salt         []byte
	initial      byte // type of an Initial, in the first byte
	key, iv, hpk string
}

func dialectOf(version uint32) *dialect {
	switch version {
	case quicV1: // RFC 9001 section 5.2
		return &dialect{
			salt: []byte{
				0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17,
				0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a,
			},
			initial: 0 << 4, key: "quic key", iv: "quic iv", hpk: "quic hp",
		}
	case quicV2: // RFC 9369 section 3
		return &dialect{
			salt: []byte{
				0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93,
				0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9,
			},
			initial: 1 << 4, key: "quicv2 key", iv: "quicv2 iv", hpk: "quicv2 hp",
		}
	}
	return nil
}

// keys protect the Initials of a client.
type keys struct {
	aead cipher.AEAD
	iv   []byte
	hp   cipher.Block
}

// keysFor derives them from the connection ID that the client has chosen for its
// first packet.
func keysFor(d *dialect, id []byte) (*keys, error) {
	secret, err := hkdf.Extract(sha256.New, id, d.salt)
	if err != nil {
		return nil, err
	}
	if secret, err = expandLabel(secret, "client in", sha256.Size); err != nil {
		return nil, err
	}
	var raw [3][]byte
	for i, part := range []struct {
		label string
		size  int
	}{{d.key, 16}, {d.iv, 12}, {d.hpk, 16}} {
		if raw[i], err = expandLabel(secret, part.label, part.size); err != nil {
			return nil, err
		}
	}
	block, err := aes.NewCipher(raw[0])
	if err != nil {
		return nil, err
	}
	k := &keys{iv: raw[1]}
	if k.aead, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	k.hp, err = aes.NewCipher(raw[2])
	return k, err
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 section 7.1).
func expandLabel(secret []byte, label string, size int) ([]byte, error) {
	const prefix = "tls13 "
	info := make([]byte, 0, 4+len(prefix)+len(label))
	info = binary.BigEndian.AppendUint16(info, uint16(size))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(info, prefix...)
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(sha256.New, secret, string(info), size)
}

// A greeting is what a client has said in its first datagrams of QUIC. The zero
// greeting has heard nothing.
type greeting struct {
	keys  *keys
	hello []byte
	have  []span // of hello, apart and in order
}

// span is a part of the hello: from from on, before to.
type span struct{ from, to int }

// add takes a datagram of the client's and says whether the server's name is
// clear now. What is no Initial in it is passed over.
func (g *greeting) add(datagram []byte) (string, sight) {
	met := false
	for len(datagram) > 0 {
		body, rest, ok := g.open(datagram)
		if !ok {
			break
		}
		met = true
		if !g.frames(body) {
			return "", nameless
		}
		datagram = rest
	}
	if !met && g.keys == nil {
		return "", nameless // it is not QUIC, or of a version that we do not know
	}
	if len(g.have) == 0 || g.have[0].from != 0 {
		return "", unclear
	}
	return handshakeName(g.hello[:g.have[0].to])
}

// open takes the protection off the first packet of a datagram; false: it is no
// Initial of the client's. A packet that is coalesced behind it is rest.
func (g *greeting) open(b []byte) (body, rest []byte, ok bool) {
	if len(b) < 7 || b[0]&(longHeader|fixedBit) != longHeader|fixedBit {
		return nil, nil, false
	}
	c := cursor{rest: b[1:]}
	version := uint32(c.number(4))
	d := dialectOf(version)
	if d == nil || b[0]&0x30 != d.initial {
		return nil, nil, false
	}
	id := c.vector(1)
	from := c.vector(1)
	if c.bad || len(id) > longestID || len(from) > longestID {
		return nil, nil, false
	}
	c.take(c.varint()) // token
	n := c.varint()
	if c.bad || n > len(c.rest) || n < sampleAt+sampleSize {
		return nil, nil, false
	}
	header := len(b) - len(c.rest)
	rest = c.rest[n:]
	if g.keys == nil {
		k, err := keysFor(d, id)
		if err != nil {
			return nil, nil, false
		}
		defer func() {
			if ok {
				g.keys = k
			}
		}()
		body, ok = k.open(b[:header+n], header)
		return body, rest, ok
	}
	body, ok = g.keys.open(b[:header+n], header)
	return body, rest, ok
}

// open decrypts a packet, whose packet number is at at (RFC 9001 section 5.4).
func (k *keys) open(packet []byte, at int) ([]byte, bool) {
	b := slices.Clone(packet)
	var mask [aes.BlockSize]byte
	k.hp.Encrypt(mask[:], b[at+sampleAt:at+sampleAt+sampleSize])
	b[0] ^= mask[0] & 0x0f
	size := int(b[0]&3) + 1
	nonce := slices.Clone(k.iv)
	for i := range size {
		b[at+i] ^= mask[1+i]
		// The first packets have small numbers, which are written out in full.
		nonce[len(nonce)-size+i] ^= b[at+i]
	}
	if len(b) < at+size+tagSize {
		return nil, false
	}
	body, err := k.aead.Open(nil, nonce, b[at+size:], b[:at+size])
	return body, err == nil
}

// frames reads the frames of an Initial; false: they are not what a client's may
// hold.
func (g *greeting) frames(b []byte) bool {
	c := cursor{rest: b}
	for len(c.rest) > 0 {
		switch typ := c.varint(); typ {
		case framePadding, framePing:
		case frameACK, frameACKECN:
			c.varint() // largest
			c.varint() // delay
			ranges := c.varint()
			c.varint() // first range
			for i := 0; i < ranges && !c.bad; i++ {
				c.varint()
				c.varint()
			}
			for i := 0; typ == frameACKECN && i < 3; i++ {
				c.varint()
			}
		case frameCrypto:
			at := c.varint()
			data := c.take(c.varint())
			if c.bad || at > longestCrypto-len(data) {
				return false
			}
			g.put(at, data)
		default:
			return false
		}
		if c.bad {
			return false
		}
	}
	return true
}

// put notes a part of the hello. Of what was said twice the first counts.
func (g *greeting) put(at int, data []byte) {
	to := at + len(data)
	if at == to {
		return
	}
	if to > len(g.hello) {
		g.hello = append(g.hello, make([]byte, to-len(g.hello))...)
	}
	next := at
	for _, s := range g.have {
		if s.to <= next || s.from >= to {
			continue
		}
		if s.from > next {
			copy(g.hello[next:s.from], data[next-at:])
		}
		next = max(next, s.to)
	}
	if next < to {
		copy(g.hello[next:to], data[next-at:])
	}
	merged := g.have[:0:0]
	for _, s := range g.have {
		if s.to < at || s.from > to {
			merged = append(merged, s)
			continue
		}
		at, to = min(at, s.from), max(to, s.to)
	}
	merged = append(merged, span{at, to})
	slices.SortFunc(merged, func(a, b span) int { return a.from - b.from })
	g.have = merged
}

// varint reads a number of variable length (RFC 9000 section 16); one that is
// too large to be a length here makes the cursor bad.
func (c *cursor) varint() int {
	if c.bad || len(c.rest) == 0 {
		c.bad = true
		return 0
	}
	size := 1 << (c.rest[0] >> 6)
	b := c.take(size)
	if c.bad {
		return 0
	}
	n := uint64(b[0] & 0x3f)
	for _, x := range b[1:] {
		n = n<<8 | uint64(x)
	}
	if n > 1<<30 {
		c.bad = true
		return 0
	}
	return int(n)
}
