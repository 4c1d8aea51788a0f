package escaper_test

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/router/escaper"
)

func TestFilter(t *testing.T) {
	host := &escaper.Host{}
	host.Set([]netip.Prefix{
		netip.MustParsePrefix("127.0.0.1/32"),
		netip.MustParsePrefix("::1/128"),
		netip.MustParsePrefix("198.51.100.11/32"),
		netip.MustParsePrefix("10.1.0.5/32"),
		netip.MustParsePrefix("2001:db8:100::11/128"),
		netip.MustParsePrefix("2001:db8:beef::/64"),
		netip.MustParsePrefix("fe80::1/128"),
	}, []netip.AddrPort{
		netip.MustParseAddrPort("127.0.0.1:3128"),
		netip.MustParseAddrPort("[::1]:3129"),
		netip.MustParseAddrPort("0.0.0.0:1080"),
		netip.MustParseAddrPort("[::]:1081"),
	})
	tests := []struct {
		name        string
		allow, deny []string
		pass, stop  string // addresses, or addr:port as netip writes them
	}{
		{
			name: "defaults",
			pass: `203.0.113.7 10.1.0.6 172.16.0.1 192.168.1.1 100.64.0.1 fd00::1 2001:db8::1 198.51.100.12 1.0.0.0 126.255.255.255
				128.0.0.0 169.253.255.255 169.255.0.0 223.255.255.255 240.0.0.1 255.255.255.254 ::ffff:203.0.113.7 100:0:0:1::1 fe00::1`,
			stop: `0.0.0.0 0.1.2.3 127.0.0.1 127.255.255.255 169.254.169.254 169.254.0.0 224.0.0.1 239.255.255.255 255.255.255.255
				:: ::1 fe80::1 febf::1 ff02::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 100:: 100::ffff:ffff:ffff:ffff
				198.51.100.11 10.1.0.5 2001:db8:100::11 2001:db8:beef::77 fe80::1%eth0`,
		},
		{
			name: "an IPv4 address inside an IPv6 one",
			deny: []string{"private"},
			pass: `64:ff9b::203.0.113.7 2002:cb00:7107::1 ::203.0.113.7 ::ffff:0:203.0.113.7 64:ff9b:1::203.0.113.7
				64:ff9b:1:808:8:800:: 64:ff9b:1:8:8:808:: 64:ff9b:1:0:8:808:800:0 2001:0:cb00:7107::fefe:fefe`,
			stop: `::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:10.0.0.1 ::ffff:0.0.0.0 ::ffff:198.51.100.11
				64:ff9b::127.0.0.1 64:ff9b::169.254.169.254 64:ff9b::10.0.0.1 64:ff9b::0.0.0.0 64:ff9b::198.51.100.11
				2002:7f00:1::1 2002:a9fe:a9fe:: 2002:a00:1:2:3:4:5:6 2002:c633:640b::1
				::127.0.0.1 ::10.0.0.1 ::0.0.0.2 ::ffff:0:127.0.0.1 ::ffff:0:a9fe:a9fe
				64:ff9b:1::127.0.0.1 64:ff9b:1:2:3:4:169.254.169.254 64:ff9b:1:a9fe:a9:fe00:: 64:ff9b:1:7f:0:1:: 64:ff9b:1:0:7f:0:100:0
				2001:0:7f00:1::fefe:fefe 2001:0:808:808::80ff:fffe`,
		},
		{
			name: "loopback allowed", allow: []string{"loopback"},
			pass: "127.0.0.1 127.9.9.9 ::1 ::ffff:127.0.0.1 64:ff9b::127.0.0.1",
			stop: "0.0.0.0 :: 198.51.100.11 169.254.169.254 fe80::2",
		},
		{
			name: "an allowed network opens no default below it", allow: []string{"0.0.0.0/0", "::/0"},
			pass: "203.0.113.7 2001:db8::1 10.0.0.1",
			stop: "127.0.0.1 ::1 169.254.169.254 198.51.100.11 ff02::1 64:ff9b::127.0.0.1",
		},
		{
			name: "an allowed network as long as a default opens it", allow: []string{"127.0.0.0/8", "169.254.0.0/16"},
			pass: "127.0.0.1 169.254.169.254", stop: "::1 fe80::2",
		},
		{
			name: "the longest prefix wins", allow: []string{"10.1.0.0/16", "10.1.2.0/25"}, deny: []string{"private", "10.1.2.0/24"},
			pass: "10.1.0.1 10.1.255.255 10.1.2.0 10.1.2.127 11.0.0.0 9.255.255.255 192.167.0.1",
			stop: "10.0.255.255 10.2.0.0 10.1.2.128 10.1.2.255 192.168.0.1 172.31.255.255 100.100.100.200 fd00:ec2::254 fec0::1 10.1.0.5",
		},
		{
			name: "deny on a tie", allow: []string{"203.0.113.0/24", "203.0.113.7"}, deny: []string{"203.0.113.0/24", "203.0.113.7/32"},
			pass: "203.0.112.255 203.0.114.0", stop: "203.0.113.0 203.0.113.7 203.0.113.255",
		},
		{
			name: "an own address inside an allowed network", allow: []string{"198.51.100.0/24"},
			pass: "198.51.100.12", stop: "198.51.100.11",
		},
		{
			name: "an own address allowed by itself", allow: []string{"198.51.100.11"},
			pass: "198.51.100.11", stop: "10.1.0.5 2001:db8:100::11",
		},
		{
			name: "self allowed", allow: []string{"self"}, deny: []string{"private", "2001:db8:100::11"},
			pass: "198.51.100.11 10.1.0.5 2001:db8:beef::1 fe80::1", stop: "2001:db8:100::11 10.1.0.6 127.0.0.1",
		},
		{
			name: "self allowed and denied", allow: []string{"self", "198.51.100.11"}, deny: []string{"self"},
			pass: "198.51.100.12", stop: "198.51.100.11 10.1.0.5",
		},
		{
			name: "everything denied but one", allow: []string{"203.0.113.7", "2001:db8::7"}, deny: []string{"0.0.0.0/0", "::/0"},
			pass: "203.0.113.7 2001:db8::7 ::ffff:203.0.113.7", stop: "203.0.113.6 203.0.113.8 2001:db8::6 2001:db8::8 255.255.255.255 64:ff9b::203.0.113.7",
		},
		{
			name: "a mapped network is an IPv4 one", deny: []string{"::ffff:203.0.113.0/120", "::ffff:192.0.2.1"},
			pass: "203.0.112.1 192.0.2.2", stop: "203.0.113.1 ::ffff:203.0.113.1 192.0.2.1",
		},
		{
			name: "own listeners", allow: []string{"loopback", "self", "0.0.0.0/8", "::"},
			pass: `127.0.0.1:80 127.0.0.2:3128 [::1]:3128 198.51.100.11:3128 203.0.113.7:1080 203.0.113.7:3128 [2001:db8:100::11]:1080 [::1]:1080`,
			stop: `127.0.0.1:3128 [::ffff:127.0.0.1]:3128 [64:ff9b::127.0.0.1]:3128 0.0.0.0:3128 0.0.0.0:3129 [::1]:3129 [::]:3129
				127.0.0.1:1080 127.8.8.8:1080 198.51.100.11:1080 0.0.0.0:1080 127.0.0.1:1081 [::1]:1081 [2001:db8:beef::5]:1081 198.51.100.11:1081`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := escaper.NewFilter(host, tt.allow, tt.deny)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range strings.Fields(tt.pass) {
				if err := f.Check(target(t, s)); err != nil {
					t.Errorf("%s: %v", s, err)
				}
			}
			for _, s := range strings.Fields(tt.stop) {
				if err := f.Check(target(t, s)); !errors.Is(err, escaper.ErrProhibited) {
					t.Errorf("%s: %v, want it prohibited", s, err)
				}
			}
		})
	}
}

func target(t *testing.T, s string) (netip.Addr, uint16) {
	t.Helper()
	if a, err := netip.ParseAddr(s); err == nil {
		return a, 80
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		t.Fatal(err)
	}
	return ap.Addr(), ap.Port()
}

func TestFilterSaysWhy(t *testing.T) {
	host := &escaper.Host{}
	host.Set([]netip.Prefix{netip.MustParsePrefix("198.51.100.11/32")}, []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:1080")})
	f, err := escaper.NewFilter(host, nil, []string{"203.0.113.0/24"})
	if err != nil {
		t.Fatal(err)
	}
	for s, want := range map[string]string{
		"127.0.0.1":                "destination prohibited: 127.0.0.1 (loopback)",
		"203.0.113.9":              "destination prohibited: 203.0.113.9 (203.0.113.0/24)",
		"198.51.100.11":            "destination prohibited: 198.51.100.11 (self)",
		"198.51.100.11:1080":       "destination prohibited: 198.51.100.11 (a listener of wayout itself)",
		"64:ff9b::169.254.169.254": "destination prohibited: 64:ff9b::a9fe:a9fe, which stands for 169.254.169.254 (linklocal)",
	} {
		if err := f.Check(target(t, s)); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", s, err, want)
		}
	}
	if err := f.Check(netip.Addr{}, 80); !errors.Is(err, escaper.ErrProhibited) {
		t.Errorf("the zero address: %v, want it prohibited", err)
	}
}

func TestFilterRefuses(t *testing.T) {
	for _, s := range []string{"", "lan", "10.0.0.1/8", "10.0.0.0/33", "10.0.0", "fe80::1%eth0", "fe80::%eth0/10", "2001:db8::1/32", "Private"} {
		if _, err := escaper.NewFilter(nil, []string{s}, nil); err == nil {
			t.Errorf("allow %q is accepted", s)
		}
		if _, err := escaper.NewFilter(nil, nil, []string{s}); err == nil {
			t.Errorf("deny %q is accepted", s)
		}
	}
}

func TestFilterHostChanges(t *testing.T) {
	host := &escaper.Host{}
	f, err := escaper.NewFilter(host, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	own := netip.MustParseAddr("198.51.100.11")
	if err := f.Check(own, 80); err != nil {
		t.Errorf("before it is the host's: %v", err)
	}
	host.Set([]netip.Prefix{netip.PrefixFrom(own, 32)}, nil)
	if err := f.Check(own, 80); !errors.Is(err, escaper.ErrProhibited) {
		t.Errorf("while it is the host's: %v", err)
	}
	host.Set(nil, nil)
	if err := f.Check(own, 80); err != nil {
		t.Errorf("after it was the host's: %v", err)
	}
}

// naive is the filter's contract, written down the slow way: go through all
// rules for the longest prefix, once for each reading of the address.
type naive struct {
	allow, deny []netip.Prefix
	own         []netip.Addr
}

func (n *naive) permits(a netip.Addr) bool {
	a = a.WithZone("").Unmap()
	for _, r := range append(readings(a), a) {
		if !n.permitsOne(r) {
			return false
		}
	}
	return true
}

func (n *naive) permitsOne(a netip.Addr) bool {
	longest := func(list []netip.Prefix) int {
		best := -1
		for _, p := range list {
			if p.Contains(a) {
				best = max(best, p.Bits())
			}
		}
		return best
	}
	var byDefault []netip.Prefix
	for _, s := range []string{
		"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32",
		"::/128", "::1/128", "fe80::/10", "ff00::/8", "100::/64",
	} {
		byDefault = append(byDefault, netip.MustParsePrefix(s))
	}
	if slices.Contains(n.own, a) && !a.IsLoopback() {
		byDefault = append(byDefault, netip.PrefixFrom(a, a.BitLen()))
	}
	allow, deny, def := longest(n.allow), longest(n.deny), longest(byDefault)
	switch {
	case deny >= 0 && deny >= allow && deny >= def:
		return false
	case def > allow:
		return false
	}
	return true
}

// readings lists the forms by their text, which netip writes for us.
func readings(a netip.Addr) []netip.Addr {
	if a.Is4() {
		return nil
	}
	b := a.As16()
	four := func(i ...int) netip.Addr { return netip.AddrFrom4([4]byte{b[i[0]], b[i[1]], b[i[2]], b[i[3]]}) }
	zero := func(from, to int) bool {
		return !slices.ContainsFunc(b[from:to], func(c byte) bool { return c != 0 })
	}
	within := func(s string) bool { return netip.MustParsePrefix(s).Contains(a) }
	var list []netip.Addr
	switch {
	case a == netip.IPv6Unspecified(), a == netip.IPv6Loopback():
	case within("::/96"), within("::ffff:0:0:0/96"), within("64:ff9b::/96"):
		list = append(list, four(12, 13, 14, 15))
	case within("64:ff9b:1::/48"):
		if zero(8, 9) && zero(11, 16) {
			list = append(list, four(6, 7, 9, 10))
		}
		if zero(8, 9) && zero(12, 16) {
			list = append(list, four(7, 9, 10, 11))
		}
		if zero(8, 9) && zero(13, 16) {
			list = append(list, four(9, 10, 11, 12))
		}
		if len(list) == 0 || !zero(12, 16) {
			list = append(list, four(12, 13, 14, 15))
		}
	case within("2002::/16"):
		list = append(list, four(2, 3, 4, 5))
	case within("2001::/32"):
		c := four(12, 13, 14, 15).As4()
		list = append(list, four(4, 5, 6, 7), netip.AddrFrom4([4]byte{^c[0], ^c[1], ^c[2], ^c[3]}))
	}
	return list
}

func FuzzFilter(f *testing.F) {
	f.Add([]byte{0, 8, 10, 0, 0, 0}, netip.MustParseAddr("10.0.0.1").AsSlice())
	f.Add([]byte{1, 32, 127, 0, 0, 1, 0, 8, 127, 0, 0, 0}, netip.MustParseAddr("64:ff9b::127.0.0.1").AsSlice())
	f.Add([]byte{2, 24, 192, 168, 0, 0, 3, 25, 192, 168, 0, 0, 4, 32, 192, 168, 0, 1}, netip.MustParseAddr("2002:c0a8:1::").AsSlice())
	f.Add([]byte{5, 0, 0, 0, 0, 0, 6, 96, 0, 0, 0, 0}, netip.MustParseAddr("64:ff9b:1:a9fe:a9:fe00::").AsSlice())
	f.Add([]byte{0, 0, 0, 0, 0, 0}, netip.MustParseAddr("255.255.255.255").AsSlice())
	f.Add([]byte{5, 0, 255, 255, 255, 255, 5, 128, 255, 255, 255, 255}, netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff").AsSlice())
	f.Fuzz(func(t *testing.T, rules, at []byte) {
		a, ok := netip.AddrFromSlice(at)
		if !ok || len(rules) > 6*64 {
			return
		}
		var n naive
		var allow, deny []string
		for ; len(rules) >= 6; rules = rules[6:] {
			p := ruleFrom(rules)
			switch rules[0] % 6 {
			case 0, 1, 5:
				n.deny, deny = append(n.deny, p), append(deny, p.String())
			case 2, 3:
				n.allow, allow = append(n.allow, p), append(allow, p.String())
			case 4:
				n.own = append(n.own, p.Addr())
			}
		}
		host := &escaper.Host{}
		var own []netip.Prefix
		for _, o := range n.own {
			own = append(own, netip.PrefixFrom(o, o.BitLen()))
		}
		host.Set(own, nil)
		flt, err := escaper.NewFilter(host, allow, deny)
		if err != nil {
			t.Fatalf("allow %v deny %v: %v", allow, deny, err)
		}
		// The address itself, those at the edges of the rules, and those that
		// carry an IPv4 rule's edge.
		try := []netip.Addr{a}
		for _, p := range append(append(append([]netip.Prefix{}, n.allow...), n.deny...), own...) {
			try = append(try, p.Addr(), p.Addr().Prev(), p.Addr().Next())
			if p.Addr().Is4() {
				try = append(try, netip.MustParseAddr("64:ff9b::"+p.Addr().String()))
			}
		}
		for _, x := range try {
			if !x.IsValid() {
				continue
			}
			if got, want := flt.Check(x, 80) == nil, n.permits(x); got != want {
				t.Errorf("allow %v deny %v own %v: %s permitted %v, want %v", allow, deny, n.own, x, got, want)
			}
		}
	})
}

// ruleFrom makes a network of six bytes: kind, length and four that go to
// where they make a difference.
func ruleFrom(b []byte) netip.Prefix {
	var p netip.Prefix
	four := [4]byte(b[2:6])
	switch b[0] / 6 % 3 {
	case 0:
		p = netip.PrefixFrom(netip.AddrFrom4(four), int(b[1])%33)
	case 1:
		a := netip.MustParseAddr("64:ff9b::").As16()
		copy(a[12:], four[:])
		p = netip.PrefixFrom(netip.AddrFrom16(a), int(b[1])%129)
	default:
		var a [16]byte
		copy(a[int(four[0])%13:], four[:])
		binary.BigEndian.PutUint16(a[14:], uint16(b[1]))
		p = netip.PrefixFrom(netip.AddrFrom16(a), int(b[1])%129)
		if p.Addr().Is4In6() {
			p = netip.PrefixFrom(p.Addr().Unmap(), 32)
		}
	}
	return p.Masked()
}

func BenchmarkFilterCheck(b *testing.B) {
	host := &escaper.Host{}
	var own []netip.Prefix
	for i := range 1000 {
		own = append(own, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 32))
	}
	host.Set(own, []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:3128")})
	f, err := escaper.NewFilter(host, []string{"10.1.0.0/16"}, []string{"private"})
	if err != nil {
		b.Fatal(err)
	}
	for _, s := range []string{"203.0.113.7", "10.1.2.3", "2001:db8::1", "64:ff9b::203.0.113.7"} {
		a := netip.MustParseAddr(s)
		b.Run(s, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := f.Check(a, 443); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
