package selection_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/selection"
)

func prefix(s string) netip.Prefix {
	if s == "" {
		return netip.Prefix{}
	}
	return netip.MustParsePrefix(s)
}

func prefixNode(id, net4, net6 string) selection.Node {
	return selection.Node{ID: id, Net4: prefix(net4), Net6: prefix(net6), Weight: 1}
}

func TestPrefixErrors(t *testing.T) {
	both := prefixNode("a", "192.0.2.0/24", "")
	both.V4 = addr("198.51.100.1")
	both6 := prefixNode("a", "", "2001:db8::/64")
	both6.V6 = addr("2001:db8:1::1")
	broken := selection.Node{ID: "a", Net4: netip.PrefixFrom(addr("192.0.2.0"), 33)}
	for _, c := range []struct {
		name  string
		nodes []selection.Node
		want  string
	}{
		{"IPv6 as IPv4", []selection.Node{prefixNode("a", "2001:db8::/64", "")}, "node 1: 2001:db8::/64 is not an IPv4 prefix"},
		{"IPv4 as IPv6", []selection.Node{prefixNode("a", "", "192.0.2.0/24")}, "is not an IPv6 prefix"},
		{"mapped", []selection.Node{{ID: "a", Net6: netip.PrefixFrom(addr("::ffff:192.0.2.0"), 120)}}, "is not an IPv6 prefix"},
		{"too long", []selection.Node{broken}, "is not an IPv4 prefix"},
		{"host bits", []selection.Node{prefixNode("a", "192.0.2.1/24", "")}, "prefix 192.0.2.1/24 has bits below its length, want 192.0.2.0/24"},
		{"IPv6 host bits", []selection.Node{prefixNode("a", "", "2001:db8::1/64")}, "want 2001:db8::/64"},
		{"single", []selection.Node{prefixNode("a", "192.0.2.1/32", "")}, "prefix 192.0.2.1/32 is a single address"},
		{"IPv6 single", []selection.Node{prefixNode("a", "", "2001:db8::1/128")}, "is a single address"},
		{"beside an address", []selection.Node{both}, "both an address and a prefix of IPv4"},
		{"beside an IPv6 address", []selection.Node{both6}, "both an address and a prefix of IPv6"},
		{"twice", []selection.Node{prefixNode("a", "192.0.2.0/24", ""), prefixNode("b", "192.0.2.0/24", "")}, "node 2: prefix 192.0.2.0/24 is also that of node 1"},
		{"inside", []selection.Node{prefixNode("a", "", "2001:db8::/48"), prefixNode("b", "", "2001:db8:0:5::/64")}, "node 2: prefix 2001:db8:0:5::/64 lies in the prefix 2001:db8::/48 of node 1"},
		{"around", []selection.Node{prefixNode("a", "192.0.2.128/25", ""), prefixNode("b", "192.0.2.0/24", "")}, "node 1: prefix 192.0.2.128/25 lies in the prefix 192.0.2.0/24 of node 2"},
		{"at the start of", []selection.Node{prefixNode("a", "192.0.2.0/25", ""), prefixNode("b", "192.0.2.0/24", "")}, "node 1: prefix 192.0.2.0/25 lies"},
		{"address inside", []selection.Node{node("a", "192.0.2.7", ""), prefixNode("b", "192.0.2.0/24", "")}, "node 1: address 192.0.2.7 lies in the prefix 192.0.2.0/24 of node 2"},
		{"IPv6 address inside", []selection.Node{prefixNode("b", "", "2001:db8::/64"), node("a", "", "2001:db8::7")}, "node 2: address 2001:db8::7 lies in the prefix 2001:db8::/64 of node 1"},
		{"id inside", []selection.Node{node("2001:db8::7", "192.0.2.7", ""), prefixNode("b", "", "2001:db8::/64")}, `node 1: id "2001:db8::7" is the address of node 2`},
		{"id is the prefix", []selection.Node{node("2001:db8::/64", "192.0.2.7", ""), prefixNode("b", "", "2001:db8::/64")}, `node 1: id "2001:db8::/64" is the prefix of node 2`},
		{"id spells the prefix", []selection.Node{prefixNode("b", "", "2001:db8::/64"), node("2001:DB8:0::5/64", "192.0.2.7", "")}, "node 2: id"},
	} {
		p, err := selection.NewPool(c.nodes, selection.Options{})
		if err == nil || p != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func prefixNodes() []selection.Node {
	mixed := prefixNode("mixed", "", "2001:db8:2::/48")
	mixed.V4 = addr("198.51.100.1")
	return []selection.Node{
		prefixNode("both", "192.0.2.0/25", "2001:db8:1:1::/64"),
		mixed,
		prefixNode("2001:db8:1:2::/64", "", "2001:db8:1:2::/64"),
		prefixNode("pair", "192.0.2.254/31", ""),
		node("one", "192.0.2.128", "2001:db8:1:3::1"),
		prefixNode("192.0.3.9", "192.0.3.0/24", ""), // its ID is its own address
	}
}

func TestResolvePrefix(t *testing.T) {
	p := newPool(t, selection.Options{}, prefixNodes()...)
	for _, c := range []struct {
		id   string
		node int
		addr string
		err  string
	}{
		{id: "192.0.2.0", node: 0, addr: "192.0.2.0"},
		{id: "192.0.2.77", node: 0, addr: "192.0.2.77"},
		{id: "::ffff:192.0.2.127", node: 0, addr: "192.0.2.127"},
		{id: "192.0.2.128", node: 4, addr: "192.0.2.128"},
		{id: "192.0.2.129", err: "address 192.0.2.129 belongs to no node"},
		{id: "192.0.2.253", err: "belongs to no node"},
		{id: "192.0.2.254", node: 3, addr: "192.0.2.254"},
		{id: "192.0.2.255", node: 3, addr: "192.0.2.255"},
		{id: "2001:db8:1:1::", node: 0, addr: "2001:db8:1:1::"},
		{id: "2001:db8:1:1:ffff:ffff:ffff:ffff", node: 0, addr: "2001:db8:1:1:ffff:ffff:ffff:ffff"},
		{id: "2001:DB8:1:1:0::7", node: 0, addr: "2001:db8:1:1::7"},
		{id: "2001:db8:2:abcd::7", node: 1, addr: "2001:db8:2:abcd::7"},
		{id: "2001:db8:3::7", err: "belongs to no node"},
		{id: "2001:db8:1::7", err: "belongs to no node"},
		{id: "2001:db8:1:2::7", node: 2, addr: "2001:db8:1:2::7"},
		{id: "2001:db8:1:2::/64", node: 2},
		{id: "2001:db8:1:1::/64", err: "unknown id"}, // both has another ID
		{id: "2001:db8:1:1::7%eth0", err: "unknown id"},
		{id: "mixed", node: 1},
		{id: "192.0.3.9", node: 5, addr: "192.0.3.9"},
		{id: "192.0.3.10", node: 5, addr: "192.0.3.10"},
	} {
		got, fam, a, err := p.Resolve(selection.ID(c.id))
		if c.err != "" {
			if !errors.Is(err, selection.ErrUnknown) || !strings.Contains(err.Error(), c.err) {
				t.Errorf("Resolve(%s) = %d, %v, want the error %q", c.id, got, err, c.err)
			}
			continue
		}
		if err != nil || got != c.node || a != addr(c.addr) || fam != selection.FamilyOf(a) {
			t.Errorf("Resolve(%s) = %d, %v, %v, %v, want %d, %s", c.id, got, fam, a, err, c.node, c.addr)
		}
	}
}

// A prefix gives its node the family.
func TestPrefixFamilies(t *testing.T) {
	p := newPool(t, selection.Options{}, prefixNodes()...)
	for want, list := range map[selection.Family]string{selection.V4: "0 1 3 4 5", selection.V6: "0 1 2 4"} {
		if got := picks(t, p, want); got != list {
			t.Errorf("picks for %v are %s, want %s", want, got, list)
		}
	}
}

func TestResolvePrefixAllocs(t *testing.T) {
	p := newPool(t, selection.Options{}, prefixNodes()...)
	values := []selection.Value{
		selection.ID("192.0.2.77"), selection.ID("2001:db8:2:abcd::7"), selection.ID("2001:db8:1:2::/64"),
		selection.Address(addr("192.0.2.255")), selection.ID("both").At(addr("2001:db8:1:1::7")),
		selection.Inline(selection.InlineNode{V6: addr("2001:db8:1:1::9")}),
	}
	net := prefix("2001:db8::/64")
	n := testing.AllocsPerRun(100, func() {
		for _, v := range values {
			if _, _, _, err := p.Resolve(v); err != nil {
				t.Fatal(err)
			}
		}
		for i := range uint64(4) {
			if !selection.AddrIn(net, i, i).IsValid() {
				t.Fatal("no address")
			}
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestAddrInEdges(t *testing.T) {
	if a := selection.AddrIn(netip.Prefix{}, 1, 2); a.IsValid() {
		t.Errorf("AddrIn of nothing = %v", a)
	}
	for _, c := range []struct{ prefix, all string }{
		{"192.0.2.7/32", "192.0.2.7"},
		{"192.0.2.6/31", "192.0.2.6 192.0.2.7"},
		{"192.0.2.4/30", "192.0.2.5 192.0.2.6"},
		{"192.0.2.7/30", "192.0.2.5 192.0.2.6"}, // what lies below the length does not count
		{"192.0.2.8/29", "192.0.2.9 192.0.2.10 192.0.2.11 192.0.2.12 192.0.2.13 192.0.2.14"},
		{"2001:db8::7/128", "2001:db8::7"},
		{"2001:db8::6/127", "2001:db8::6 2001:db8::7"},
		{"2001:db8::4/126", "2001:db8::5 2001:db8::6 2001:db8::7"},
	} {
		seen := map[netip.Addr]bool{}
		for i := range uint64(500) { // misses one of six with a chance of 1e-38
			seen[selection.AddrIn(prefix(c.prefix), i, i>>3)] = true
		}
		var got []netip.Addr
		for a := range seen {
			got = append(got, a)
		}
		slices.SortFunc(got, netip.Addr.Compare)
		if s := strings.Trim(fmt.Sprint(got), "[]"); s != c.all {
			t.Errorf("addresses in %s are %s, want %s", c.prefix, s, c.all)
		}
	}
}

// Where a session's address lies is part of what users see.
func TestAddrInStable(t *testing.T) {
	for _, c := range []struct {
		prefix string
		r0, r1 uint64
		want   string
	}{
		{"203.0.113.0/24", 0, 0, "203.0.113.145"},
		{"203.0.113.0/24", 1, 0, "203.0.113.195"},
		{"2001:db8:beef::/64", 1, 0, "2001:db8:beef:0:b18a:2f4:6d8d:86c3"},
		{"2001:db8:beef::/48", 1, 2, "2001:db8:beef:a191:e68e:6fc0:1df0:8360"},
		{"2001:db8:beef::/48", 1 << 63, 1<<64 - 1, "2001:db8:beef:58cf:f378:8299:1586:5635"},
	} {
		if got := selection.AddrIn(prefix(c.prefix), c.r0, c.r1); got != addr(c.want) {
			t.Errorf("AddrIn(%s, %d, %d) = %v, want %s", c.prefix, c.r0, c.r1, got, c.want)
		}
	}
}

// All addresses are equally likely, also for plainly counted input, and by
// either number alone; and so is each byte of the host part of a large prefix.
func TestAddrInEven(t *testing.T) {
	inputs := map[string]func(i uint64) (r0, r1 uint64){
		"first":  func(i uint64) (uint64, uint64) { return i, 0 },
		"second": func(i uint64) (uint64, uint64) { return 0, i },
		"hashed": func(i uint64) (uint64, uint64) { return selection.KeySession("u", "e", "s", i), 0 },
	}
	for name, input := range inputs {
		for _, p := range []string{"192.0.2.0/30", "192.0.2.0/28", "192.0.2.0/24", "2001:db8::/126", "2001:db8::/120"} {
			net := prefix(p)
			counts := make([]int, 1<<(net.Addr().BitLen()-net.Bits()))
			weights := slices.Repeat([]uint16{1}, len(counts))
			weights[0] = 0
			if net.Addr().Is4() {
				weights[len(weights)-1] = 0
			}
			for i := range uint64(40_000) {
				r0, r1 := input(i)
				a := selection.AddrIn(net, r0, r1).As16()
				counts[int(a[15])&(len(counts)-1)]++
			}
			t.Run(name+" "+p, func(t *testing.T) { chiSquare(t, counts, weights) })
		}
		for _, at := range []int{6, 7, 8, 15} {
			counts := make([]int, 256)
			for i := range uint64(40_000) {
				r0, r1 := input(i)
				a := selection.AddrIn(prefix("2001:db8::/48"), r0, r1).As16()
				counts[a[at]]++
			}
			t.Run(fmt.Sprintf("%s byte %d", name, at), func(t *testing.T) { chiSquare(t, counts, slices.Repeat([]uint16{1}, 256)) })
		}
	}
}

func FuzzAddrIn(f *testing.F) {
	f.Add([]byte{192, 0, 2, 0}, uint8(24), uint64(0), uint64(0))
	f.Add([]byte{192, 0, 2, 0}, uint8(30), uint64(7), uint64(9))
	f.Add([]byte{192, 0, 2, 0}, uint8(31), uint64(1), uint64(0))
	f.Add([]byte{0, 0, 0, 0}, uint8(0), uint64(1), uint64(0))
	f.Add(addr("2001:db8::").AsSlice(), uint8(64), uint64(1), uint64(2))
	f.Add(addr("2001:db8::").AsSlice(), uint8(48), uint64(1)<<63, uint64(2))
	f.Add(addr("2001:db8::1").AsSlice(), uint8(126), uint64(3), uint64(4))
	f.Add(addr("::").AsSlice(), uint8(0), uint64(3), uint64(4))
	f.Fuzz(func(t *testing.T, network []byte, bits uint8, r0, r1 uint64) {
		base, ok := netip.AddrFromSlice(network)
		if !ok {
			return
		}
		p := netip.PrefixFrom(base, int(bits))
		a := selection.AddrIn(p, r0, r1)
		if !p.IsValid() {
			if a.IsValid() {
				t.Fatalf("AddrIn(%v) = %v", p, a)
			}
			return
		}
		if !p.Contains(a) || a != selection.AddrIn(p.Masked(), r0, r1) {
			t.Fatalf("AddrIn(%v, %d, %d) = %v", p, r0, r1, a)
		}
		host := base.BitLen() - int(bits)
		if host < 2 {
			return
		}
		if a == p.Masked().Addr() {
			t.Fatalf("AddrIn(%v, %d, %d) = %v, the network", p, r0, r1, a)
		}
		if a.Is4() {
			b := a.As4()
			if ones := uint32(1<<host - 1); binary.BigEndian.Uint32(b[:])&ones == ones {
				t.Fatalf("AddrIn(%v, %d, %d) = %v, the broadcast address", p, r0, r1, a)
			}
		}
	})
}
