package netcfg_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

func attr(typ uint16, v ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(v)))
	b = append(binary.NativeEndian.AppendUint16(b, typ), v...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func cat(parts ...[]byte) []byte {
	var out []byte
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func u32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

// message is a kernel's message of each kind, for seeds.
func messages() map[string][]byte {
	v4, v6 := []byte{192, 0, 2, 1}, netip.MustParseAddr("2001:db8::1").AsSlice()
	return map[string][]byte{
		"link": cat(
			[]byte{0, 0, 1, 0}, u32(7), u32(unix.IFF_UP|unix.IFF_RUNNING), u32(0),
			attr(unix.IFLA_IFNAME, 'e', 't', 'h', '0', 0), attr(unix.IFLA_OPERSTATE, 6),
			attr(unix.IFLA_LINKINFO, attr(1, 'v', 'e', 't', 'h', 0)...),
		),
		"address": cat(
			[]byte{unix.AF_INET, 24, 0x80, 0}, u32(7), attr(unix.IFA_ADDRESS, v4...), attr(unix.IFA_LOCAL, v4...),
			attr(unix.IFA_FLAGS, u32(unix.IFA_F_PERMANENT|unix.IFA_F_NOPREFIXROUTE)...), attr(11, 119), attr(9, u32(11900)...),
		),
		"address6": cat([]byte{unix.AF_INET6, 64, 0x40, 0}, u32(7), attr(unix.IFA_ADDRESS, v6...)),
		"route": cat(
			[]byte{unix.AF_INET, 24, 0, 0, 0, 119, 0, 1}, u32(unix.RTNH_F_ONLINK), attr(unix.RTA_DST, 192, 0, 2, 0),
			attr(unix.RTA_TABLE, u32(11900)...), attr(unix.RTA_GATEWAY, v4...), attr(unix.RTA_OIF, u32(7)...), attr(unix.RTA_PRIORITY, u32(1024)...),
		),
		"rule": cat(
			[]byte{unix.AF_INET6, 0, 64, 0, 0, 0, 0, 1}, u32(0), attr(2, v6...), attr(3, 'l', 'o', 0),
			attr(6, u32(11965)...), attr(10, u32(0x10000)...), attr(16, u32(0xff0000)...), attr(15, u32(11900)...), attr(21, 119),
		),
		"socket": cat(
			[]byte{unix.AF_INET, 4, 1, 0}, make([]byte, 68), attr(8, 0), attr(15, u32(0x10042)...),
		),
		"nft": cat(
			[]byte{unix.NFPROTO_INET, 0, 0, 0}, attr(unix.NFTA_RULE_TABLE, 'n', 'a', 't', 0), attr(unix.NFTA_RULE_CHAIN, 'p', 'o', 's', 't', 0),
			attr(unix.NFTA_RULE_EXPRESSIONS|1<<15, attr(unix.NFTA_LIST_ELEM|1<<15, attr(unix.NFTA_EXPR_NAME, 'm', 'a', 's', 'q', 0)...)...),
		),
	}
}

func TestParse(t *testing.T) {
	m := messages()
	link, err := netcfg.ParseLink(m["link"])
	if want := (netcfg.Link{Index: 7, Name: "eth0", Kind: "veth", Admin: true, Up: true}); err != nil || link != want {
		t.Errorf("link %+v, error %v, want %+v", link, err, want)
	}
	a, err := netcfg.ParseAddr(m["address"])
	if want := (netcfg.Address{Addr: netip.MustParseAddr("192.0.2.1"), Prefix: 24, LinkIndex: 7, Metric: 11900, Protocol: 119, NoPrefixRoute: true}); err != nil || a != want {
		t.Errorf("address %+v, error %v, want %+v", a, err, want)
	}
	a, err = netcfg.ParseAddr(m["address6"])
	if want := (netcfg.Address{Addr: netip.MustParseAddr("2001:db8::1"), Prefix: 64, LinkIndex: 7, Tentative: true}); err != nil || a != want {
		t.Errorf("address %+v, error %v, want %+v", a, err, want)
	}
	r, ok, err := netcfg.ParseRoute(m["route"])
	if want := (netcfg.Route{
		Family: netcfg.IPv4, Table: 11900, Type: netcfg.RouteUnicast, Protocol: 119, Dst: netip.MustParsePrefix("192.0.2.0/24"),
		Gateway: netip.MustParseAddr("192.0.2.1"), LinkIndex: 7, Metric: 1024, OnLink: true,
	}); err != nil || !ok || r != want {
		t.Errorf("route %+v, %v, error %v, want %+v", r, ok, err, want)
	}
	rule, ok, err := netcfg.ParseRule(m["rule"])
	if want := (netcfg.Rule{
		Family: netcfg.IPv6, Priority: 11965, Table: 11900, Src: netip.MustParsePrefix("2001:db8::/64"), IIF: "lo",
		Mark: 0x10000, Mask: 0xff0000, Action: 1, Protocol: 119,
	}); err != nil || !ok || rule != want {
		t.Errorf("rule %+v, %v, error %v, want %+v", rule, ok, err, want)
	}
	nft, err := netcfg.ParseNFTRule(m["nft"])
	if want := "inet nat post: masquerade"; err != nil || nft != want {
		t.Errorf("nftables rule %q, error %v, want %q", nft, err, want)
	}
	state, orphan, matches, err := netcfg.ParseSocket(m["socket"], netcfg.Mark{Value: 0x10000, Mask: 0xff0000})
	if err != nil || state != netcfg.FinWait1 || !orphan || !matches {
		t.Errorf("socket in %s, orphan %v, marked %v, error %v", state, orphan, matches, err)
	}
	for name, b := range m {
		for n := range b {
			if _, _, _, err := netcfg.ParseSocket(b[:n], netcfg.Mark{}); n < 72 && err == nil {
				t.Errorf("%s cut to %d bytes is a socket", name, n)
			}
			_, errLink := netcfg.ParseLink(b[:n])
			_, errAddr := netcfg.ParseAddr(b[:n])
			_, _, errRoute := netcfg.ParseRoute(b[:n])
			_, _, errRule := netcfg.ParseRule(b[:n])
			if n < 8 && (errLink == nil || errAddr == nil || errRoute == nil || errRule == nil) {
				t.Errorf("%s cut to %d bytes is no error", name, n)
			}
		}
	}
}

// TestEncode: what is written is read back as the same, for every operation of a
// large plan.
func TestEncode(t *testing.T) {
	for _, o := range netcfg.Diff(host().snapshot(), wholeWant()).Ops {
		var got, want any
		var err error
		switch o.Kind {
		case netcfg.KindRoute:
			want = o.Route
			got, _, err = netcfg.ParseRoute(netcfg.EncodeRoute(o.Route))
		case netcfg.KindRule:
			want = o.Rule
			got, _, err = netcfg.ParseRule(netcfg.EncodeRule(o.Rule))
		case netcfg.KindAddress:
			o.Addr.Ours = false
			o.Addr.Deprecated = false // a flag that the kernel makes of the lifetime
			want = o.Addr
			got, err = netcfg.ParseAddr(netcfg.EncodeAddr(o.Addr))
		}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %+v, error %v\nwant %+v", o, got, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, b := range messages() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = netcfg.ParseLink(b)
		_, _ = netcfg.ParseNFTRule(b)
		if a, err := netcfg.ParseAddr(b); err == nil && a.Addr.IsValid() {
			netcfg.NewSnapshot(nil, []netcfg.Address{a}, nil, nil).Has(a.Addr, "")
			if a.Prefix > a.Addr.BitLen() {
				t.Errorf("address %+v", a)
			}
		}
		if r, ok, err := netcfg.ParseRoute(b); ok && (err != nil || !r.Dst.IsValid() || r.Dst.Masked() != r.Dst) {
			t.Errorf("route %+v, error %v", r, err)
		}
		if r, ok, err := netcfg.ParseRule(b); ok && (err != nil || !strings.Contains(r.String(), "from")) {
			t.Errorf("rule %+v, error %v", r, err)
		}
		if f, err := netcfg.ParseFilter(b); err == nil && f.Attrs().LinkIndex != int(int32(binary.NativeEndian.Uint32(b[4:]))) {
			t.Errorf("filter %+v", f)
		}
	})
}

func FuzzParseSocket(f *testing.F) {
	m := netcfg.Mark{Value: 0x10000, Mask: 0xff0000}
	for _, b := range messages() {
		f.Add(b)
		f.Add(cat(u32(uint32(16+len(b))), []byte{20, 0, 2, 0}, u32(1), u32(0), b))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, matches, err := netcfg.ParseSocket(b, m)
		if matches && (err != nil || !bytes.Contains(b, []byte{15, 0}) && !bytes.Contains(b, []byte{0, 15})) {
			t.Errorf("a mark in %x, error %v", b, err)
		}
		total := 0
		err = netcfg.EachMessage(b, func(_ uint16, _ uint32, body []byte) error {
			total += 16 + len(body)
			_, _, _, err := netcfg.ParseSocket(body, m)
			return err
		})
		if err == nil && total > len(b) {
			t.Errorf("messages of %d bytes in %d", total, len(b))
		}
	})
}

func FuzzParseClaims(f *testing.F) {
	f.Add("0000000000000000: 00000002 00000000 00010000 0001 01 123 @wayout-netcfg/11900/11900/ff0000/17\n")
	f.Add("x x x x x x x @wayout-netcfg/1/2\nx x x x x x x @wayout-netcfg/-1/1/1/1")
	f.Fuzz(func(t *testing.T, table string) {
		for name := range netcfg.ParseClaims(table) {
			if !strings.HasPrefix(name, "@wayout-netcfg/") {
				t.Errorf("a claim named %q", name)
			}
		}
	})
}

func FuzzParseJournal(f *testing.F) {
	f.Add("+ b 1:2 7 eth0 192.0.2.1\n- b 1:2 7 eth0 192.0.2.1\n+ b 1:2 7 eth0 2001:db8::1\n")
	f.Add("+ b 1:3 7 eth0 192.0.2.1\n+ b 1:2 x eth0 192.0.2.1\n+ b 1:2 7 eth0 192.0.2")
	f.Fuzz(func(t *testing.T, text string) {
		addrs, again := netcfg.ParseJournal(text)
		if second, _ := netcfg.ParseJournal(again); !slices.Equal(addrs, second) {
			t.Errorf("%v, written and read again %v", addrs, second)
		}
	})
}
