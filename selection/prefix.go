package selection

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// nets finds the prefix that an address lies in: one look into a map for each
// length that prefixes of its family have. As no two of them overlap, the order
// of the lengths does not matter.
type nets struct {
	owner map[netip.Prefix]int32
	bits4 []uint8
	bits6 []uint8
}

// add enters a prefix; it is not in yet.
func (n *nets) add(p netip.Prefix, node int32) {
	if n.owner == nil {
		n.owner = make(map[netip.Prefix]int32)
	}
	n.owner[p] = node
	lengths := &n.bits6
	if p.Addr().Is4() {
		lengths = &n.bits4
	}
	if b := uint8(p.Bits()); !slices.Contains(*lengths, b) {
		*lengths = append(*lengths, b)
	}
}

// lengths returns the lengths of the prefixes of a's family.
func (n *nets) lengths(a netip.Addr) []uint8 {
	if a.Is4() {
		return n.bits4
	}
	return n.bits6
}

// find returns the prefix of at most so many bits that a lies in, and its node.
// An address with a zone lies in none.
func (n *nets) find(a netip.Addr, most int) (netip.Prefix, int32, bool) {
	if !a.IsValid() || a.Zone() != "" {
		return netip.Prefix{}, 0, false
	}
	for _, b := range n.lengths(a) {
		if int(b) > most {
			continue
		}
		p, err := a.Prefix(int(b))
		if err != nil {
			continue // longer than an address of the family: add was never given one
		}
		if i, ok := n.owner[p]; ok {
			return p, i, true
		}
	}
	return netip.Prefix{}, 0, false
}

// checkNet checks a node's prefix of one family, beside its address of it.
func checkNet(p netip.Prefix, a netip.Addr, fam Family) error {
	switch {
	case p == netip.Prefix{}:
		return nil
	case !p.IsValid() || p.Addr().Is4() != (fam == V4) || p.Addr().Is4In6():
		return fmt.Errorf("%s is not an %s prefix", p, fam)
	case p != p.Masked():
		return fmt.Errorf("prefix %s has bits below its length, want %s", p, p.Masked())
	case p.IsSingleIP():
		return fmt.Errorf("prefix %s is a single address", p)
	case a.IsValid():
		return fmt.Errorf("both an address and a prefix of %s", fam)
	}
	return nil
}

// addNets checks the prefixes of node i and enters them into the index.
func (p *Pool) addNets(i int, n *Node) error {
	if err := errors.Join(checkNet(n.Net4, n.V4, V4), checkNet(n.Net6, n.V6, V6)); err != nil {
		return err
	}
	for _, net := range [...]netip.Prefix{n.Net4, n.Net6} {
		if !net.IsValid() {
			continue
		}
		if other, dup := p.nets.owner[net]; dup {
			return fmt.Errorf("prefix %s is also that of node %d", net, other+1)
		}
		p.nets.add(net, int32(i))
	}
	return nil
}

// overlap returns an error when an address, a prefix or the ID of node i
// belongs to another node. All nodes are in the indexes.
func (p *Pool) overlap(i int, n *Node) error {
	for _, a := range [...]netip.Addr{n.V4, n.V6} {
		if net, other, ok := p.nets.find(a, maxBits); ok {
			return fmt.Errorf("address %s lies in the prefix %s of node %d", a, net, other+1)
		}
	}
	for _, inner := range [...]netip.Prefix{n.Net4, n.Net6} {
		if net, other, ok := p.nets.find(inner.Addr(), inner.Bits()-1); ok {
			return fmt.Errorf("prefix %s lies in the prefix %s of node %d", inner, net, other+1)
		}
	}
	if owner, ok := p.owner(parseAddr(n.ID)); ok && owner != i {
		return fmt.Errorf("id %s is the address of node %d", quote(n.ID), owner+1)
	}
	if len(p.nets.owner) == 0 {
		return nil
	}
	if net, err := netip.ParsePrefix(n.ID); err == nil {
		if owner, ok := p.nets.owner[net.Masked()]; ok && int(owner) != i {
			return fmt.Errorf("id %s is the prefix of node %d", quote(n.ID), owner+1)
		}
	}
	return nil
}

const maxBits = 128 // the longest prefix of any family

// AddrIn returns the address of p whose host bits come from r0 and r1, 128
// random or hashed bits: the same address for the same input, for ever, and all
// addresses equally likely for evenly distributed input, r0 alone included. It
// is never the one with all host bits 0 (the network's, the subnet router's of
// RFC 4291 section 2.6.1) nor, of an IPv4 prefix of /30 and shorter, the one
// with all of them 1 (broadcast). A /31, /32, /127 or /128 has no such
// addresses. Bits of p below its length do not count. The zero Prefix gives the
// zero Addr.
func AddrIn(p netip.Prefix, r0, r1 uint64) netip.Addr {
	p = p.Masked()
	base := p.Addr()
	if !p.IsValid() {
		return base
	}
	host := base.BitLen() - p.Bits()
	low := uint64(1)<<min(host, 64) - 1 // a shift by 64 gives 0, and so all ones
	high := uint64(1)<<max(host-64, 0) - 1
	r1 = mix(r1 + mix(r0))
	// Each round maps the pairs one to one, so that even ones stay even; and as
	// r1 goes through all values in the end, so does the loop.
	for ; ; r1++ {
		l := mix(r1)
		h := mix(r0^l) & high
		l &= low
		if host > 1 && (h|l == 0 || base.Is4() && l == low) {
			continue
		}
		return orHost(base, h, l)
	}
}

// orHost returns the address of a network with these host bits.
func orHost(network netip.Addr, high, low uint64) netip.Addr {
	if network.Is4() {
		b := network.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|uint32(low))
		return netip.AddrFrom4(b)
	}
	b := network.As16()
	binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])|high)
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])|low)
	return netip.AddrFrom16(b)
}
