package netcfg_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/netcfg"
)

func prefixes(list string) []netip.Prefix {
	var out []netip.Prefix
	for s := range strings.FieldsSeq(list) {
		if !strings.Contains(s, "/") {
			a := netip.MustParseAddr(s)
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
			continue
		}
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestAggregate(t *testing.T) {
	for _, tt := range []struct{ list, want string }{
		{"", ""},
		{"203.0.113.9", "203.0.113.9/32"},
		{"203.0.113.9 203.0.113.9", "203.0.113.9/32"},
		{"203.0.113.9 203.0.113.8", "203.0.113.8/31"},
		{"203.0.113.9 203.0.113.10", "203.0.113.9/32 203.0.113.10/32"}, // neighbours, not siblings
		{"203.0.113.11 203.0.113.9 203.0.113.10 203.0.113.8", "203.0.113.8/30"},
		{"203.0.113.9 203.0.113.10 203.0.113.11 203.0.113.12", "203.0.113.9/32 203.0.113.10/31 203.0.113.12/32"},
		{"10.0.0.128/25 10.0.0.7 10.0.0.0/25", "10.0.0.0/24"},
		{"10.0.0.0/24 10.0.1.0/25 10.0.1.128/26 10.0.1.192/26", "10.0.0.0/23"},
		{"10.0.0.0/8 10.1.0.0/16 10.255.255.255", "10.0.0.0/8"},
		{"0.0.0.0/1 128.0.0.0/1", "0.0.0.0/1 128.0.0.0/1"}, // never everything
		{"255.255.255.255 255.255.255.254", "255.255.255.254/31"},
		{"2001:db8:1::/64 2001:db8::/64 2001:db8:0:1::/64", "2001:db8::/63 2001:db8:1::/64"},
		{"2001:db8::ffff:ffff:ffff:ffff 2001:db8:0:1::", "2001:db8::ffff:ffff:ffff:ffff/128 2001:db8:0:1::/128"},
	} {
		got := netcfg.Aggregate(prefixes(tt.list))
		if words := strings.Trim(fmt.Sprint(got), "[]"); words != tt.want {
			t.Errorf("%s: got %s, want %s", tt.list, words, tt.want)
		}
	}
}

// TestAggregateProperties: of any set the result covers exactly the set, with as few
// prefixes as can be, in order; judged address by address in a small space.
func TestAggregateProperties(t *testing.T) {
	for _, base := range []string{"203.0.113.0/24", "2001:db8::ff00/120"} {
		space := netip.MustParsePrefix(base)
		r := rand.New(rand.NewPCG(1, 2))
		for range 2000 {
			var list []netip.Prefix
			var in [256]bool
			dense := r.IntN(256)
			for i := range in {
				if r.IntN(256) < dense {
					list = append(list, netip.PrefixFrom(nth(space, i), space.Addr().BitLen()))
				}
			}
			for range r.IntN(3) {
				list = append(list, netip.PrefixFrom(nth(space, r.IntN(256)), space.Bits()+1+r.IntN(7)).Masked())
			}
			for i := range in {
				in[i] = slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(nth(space, i)) })
			}
			r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			got := netcfg.Aggregate(slices.Clone(list))
			if n := fewest(in[:]); len(got) != n {
				t.Fatalf("%v: %d prefixes, want %d: %v", list, len(got), n, got)
			}
			if !slices.IsSortedFunc(got, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) }) {
				t.Fatalf("%v: not in order: %v", list, got)
			}
			total := uint64(0)
			for i, want := range in {
				a := nth(space, i)
				n := 0
				for _, p := range got {
					if p.Contains(a) {
						n++
					}
				}
				if one := netip.PrefixFrom(a, a.BitLen()); n > 1 || n == 1 != want || netcfg.Covers(got, one) != want {
					t.Fatalf("%v: %s is in %d of %v, want %v", list, a, n, got, want)
				}
				if want {
					total++
				}
			}
			if n := netcfg.AddressCount(got); n != total {
				t.Fatalf("%v: %d addresses, want %d", got, n, total)
			}
			for _, p := range list {
				if !netcfg.Covers(got, p) {
					t.Fatalf("%v does not cover %s", got, p)
				}
			}
			if netcfg.Covers(got, space) && len(got) != 1 {
				t.Fatalf("%v covers %s", got, space)
			}
		}
	}
}

// nth is an address of a prefix with eight host bits.
func nth(p netip.Prefix, i int) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] = byte(i)
	a, _ := netip.AddrFromSlice(b)
	return a
}

// fewest is the number of prefixes that a set needs at least, by halves.
func fewest(in []bool) int {
	if !slices.Contains(in, false) {
		return 1
	}
	if !slices.Contains(in, true) {
		return 0
	}
	return fewest(in[:len(in)/2]) + fewest(in[len(in)/2:])
}

func TestAddressCount(t *testing.T) {
	for _, tt := range []struct {
		list string
		want uint64
	}{
		{"", 0},
		{"10.0.0.0/8 10.0.0.1", 1<<24 + 1},
		{"2001:db8::/66", 1 << 62},
		{"2001:db8::/66 2001:db8:1::/66 2001:db8:2::/66", 1 << 63},
		{"2001:db8::/32", 1 << 63},
		{"::1 2001:db8::/32", 1 << 63},
	} {
		if got := netcfg.AddressCount(prefixes(tt.list)); got != tt.want {
			t.Errorf("%s: %d addresses, want %d", tt.list, got, tt.want)
		}
	}
}

func FuzzAggregate(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 0x85, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		space := netip.MustParsePrefix("203.0.113.0/24")
		var list []netip.Prefix
		for i := 0; i+1 < len(b) && i < 200; i += 2 {
			list = append(list, netip.PrefixFrom(nth(space, int(b[i])), 32-int(b[i+1])%8).Masked())
		}
		got := netcfg.Aggregate(slices.Clone(list))
		for i := range 256 {
			a := nth(space, i)
			want := slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
			if netcfg.Covers(got, netip.PrefixFrom(a, 32)) != want {
				t.Fatalf("%v of %v: %s", got, list, a)
			}
		}
	})
}

// BenchmarkDiffNodes is what each event of the kernel costs with a node on every
// address of a routed block.
func BenchmarkDiffNodes(b *testing.B) {
	for _, n := range []int{256, 65536} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			u := isp1()
			u.ManageAddresses, u.Addresses = false, nil
			for i := range n {
				u.Addresses = append(u.Addresses, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}))
			}
			have, w := host().snapshot(), want(u)
			b.ReportAllocs()
			for b.Loop() {
				netcfg.Diff(have, w)
			}
		})
	}
}
