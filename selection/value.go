package selection

import (
	"net/netip"
	"strconv"
	"time"
	"unique"
)

type kind uint8

const (
	kindNone kind = iota
	kindIndex
	kindID
	kindAddress
	kindInline
)

// Value is what is selected of one escaper. Values are comparable with ==. The
// zero Value names no node at all: [Pool.Resolve] refuses it.
type Value struct {
	id     string
	index  uint64
	addr   netip.Addr                // of kindAddress, and of an ID that parses as one
	pin    netip.Addr                // of At; the zero Addr: none
	inline unique.Handle[InlineNode] // of kindInline
	kind   kind
}

// InlineNode is a node that the operator's map describes in place of its name.
type InlineNode struct {
	ID     string
	V4, V6 netip.Addr // the zero Addr: none of that family
	Expire time.Time  // the zero Time: never
}

// Index selects by position: 1 is the first node, 0 the last, and what is above
// the number of nodes wraps unless the pool is strict.
func Index(i uint64) Value { return Value{kind: kindIndex, index: i} }

// ID selects the node with this ID or, when s parses as an address, the node
// that owns the address. It keeps s and is cheap: s is parsed here, once.
func ID(s string) Value { return Value{kind: kindID, id: s, addr: parseAddr(s)} }

// Address selects the node that owns a, an IPv4 address in either form, and
// pins to a. Unlike [ID] it never finds a node by its ID. An address with a
// zone is no node's, nor is the zero Addr.
func Address(a netip.Addr) Value { return Value{kind: kindAddress, addr: plain(a)} }

// Inline selects the node that owns n.V4 or, when n has none, n.V6, and pins to
// that address. Mapped IPv4 addresses are kept as IPv4, Expire in UTC without a
// monotonic part. Equal nodes make equal Values.
func Inline(n InlineNode) Value {
	n.V4, n.V6 = plain(n.V4), plain(n.V6)
	n.Expire = n.Expire.Round(0).UTC()
	return Value{kind: kindInline, inline: unique.Make(n)}
}

// Inline returns the node that v describes; false when v is no inline value.
// Whether it has expired is the caller's to see: Resolve knows no time.
func (v Value) Inline() (InlineNode, bool) {
	if v.kind != kindInline {
		return InlineNode{}, false
	}
	return v.inline.Value(), true
}

// At returns the selection of the node that v names, pinned to a, which has to
// be an address of that node: see [ErrMismatch]. A second At replaces the
// first; the zero Addr pins nothing.
func (v Value) At(a netip.Addr) Value {
	v.pin = plain(a)
	return v
}

// Index returns the position that v selects by; false when v is no index.
func (v Value) Index() (uint64, bool) { return v.index, v.kind == kindIndex }

// String returns the index in decimal, the ID as it was given, the address, or
// of an inline node its ID and, when it has none, its address. A pin by At
// follows as @ADDRESS.
func (v Value) String() string {
	s := v.name()
	if v.pin.IsValid() {
		s += "@" + v.pin.String()
	}
	return s
}

func (v Value) name() string {
	switch v.kind {
	case kindIndex:
		return strconv.FormatUint(v.index, 10)
	case kindAddress:
		return v.addr.String()
	case kindInline:
		n := v.inline.Value()
		if n.ID != "" {
			return n.ID
		}
		return n.addr().String()
	}
	return v.id
}

// addr returns the address that an inline node is found by.
func (n *InlineNode) addr() netip.Addr {
	if n.V4.IsValid() {
		return n.V4
	}
	return n.V6
}

// plain returns a as nodes have their addresses: ::ffff:a.b.c.d as IPv4. One
// with a zone is left alone, and so belongs to no node: Unmap would drop the
// zone of ::ffff:a.b.c.d%z.
func plain(a netip.Addr) netip.Addr {
	if a.Zone() != "" {
		return a
	}
	return a.Unmap()
}

// parseAddr returns the unmapped address that s spells, or the zero Addr. An
// address with a zone is no node's, so it counts as none: Unmap would drop the
// zone of ::ffff:a.b.c.d%z. netip.ParseAddr allocates its errors, so what is
// plainly no address is sorted out first.
func parseAddr(s string) netip.Addr {
	if len(s) < len("::") || len(s) > len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255") {
		return netip.Addr{}
	}
	dots, colons := 0, 0
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.':
			dots++
		case c == ':':
			colons++
		case c >= '0' && c <= '9', c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
		default:
			return netip.Addr{}
		}
	}
	if colons < 2 && dots != 3 {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap()
}
