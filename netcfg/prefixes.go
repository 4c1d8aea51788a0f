package netcfg

import (
	"cmp"
	"net/netip"
	"slices"
)

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// aggregate gives the fewest prefixes that cover what list covers and nothing else,
// in order. All of list has to be of one family and without host bits; its order is
// lost. Two halves of everything are left as they are: a rule `from` all would be
// none.
func aggregate(list []netip.Prefix) []netip.Prefix {
	slices.SortFunc(list, comparePrefix)
	out := list[:0]
	for _, p := range list {
		if n := len(out); n > 0 && out[n-1].Contains(p.Addr()) {
			continue // the wider one comes first
		}
		out = append(out, p)
		for len(out) > 1 {
			n := len(out)
			both, ok := parent(out[n-2], out[n-1])
			if !ok {
				break
			}
			out = append(out[:n-2], both)
		}
	}
	return out
}

// parent gives the prefix that two prefixes are the halves of.
func parent(a, b netip.Prefix) (netip.Prefix, bool) {
	if a.Bits() != b.Bits() || a.Bits() < 2 {
		return netip.Prefix{}, false
	}
	p := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
	return p, a != b && p.Contains(b.Addr())
}

// covers says whether p lies in one of list, which has to be the result of an
// aggregate.
func covers(list []netip.Prefix, p netip.Prefix) bool {
	i, found := slices.BinarySearchFunc(list, p, comparePrefix)
	return found || i > 0 && list[i-1].Bits() <= p.Bits() && list[i-1].Contains(p.Addr())
}

// addressCount is how many addresses are in prefixes that do not overlap. It stops
// at 2^63.
func addressCount(list []netip.Prefix) uint64 {
	const most = 1 << 63
	var n uint64
	for _, p := range list {
		host := p.Addr().BitLen() - p.Bits()
		if host >= 63 || n+1<<host >= most {
			return most
		}
		n += 1 << host
	}
	return n
}
