package bpf

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// TestDivertErrors asks the program which ICMP messages are about answers to diverted
// clients: these get the mark of answers.
func TestDivertErrors(t *testing.T) {
	lab.Require(t)
	const value, mask, other = 0xc1000000, 0xff000000, 0x00001234
	objs, err := loadDiversion(Diversion{
		Entries: []DivertEntry{
			{Interface: 1, Protocol: unix.IPPROTO_UDP, First: 53, Last: 60},
			{Interface: 1, Protocol: unix.IPPROTO_TCP, First: 443, Last: 443},
		},
		Sockets: make([]DivertSockets, 1), Mark: value, Mask: mask,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer objs.Close()
	if err := putOwn(objs, nil, map[netip.Prefix]bool{pfx("10.0.0.0/24"): true, pfx("fd00::1/128"): true}); err != nil {
		t.Fatal(err)
	}
	ports := func(src uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, src), 0x90, 0, 0, 0, 0, 0) }
	icmp := func(typ byte, about ...[]byte) []byte {
		b := []byte{typ, 0, 0, 0, 0, 0, 0, 0}
		for _, p := range about {
			b = append(b, p...)
		}
		return b
	}
	four := func(typ byte, about ...[]byte) []byte {
		return frame(unix.ETH_P_IP, ip4("192.168.0.2", unix.IPPROTO_ICMP, 0), icmp(typ, about...), 0)
	}
	six := func(typ byte, about ...[]byte) []byte {
		return frame(unix.ETH_P_IPV6, ip6("fd00::2", unix.IPPROTO_ICMPV6), icmp(typ, about...), 0)
	}
	later := ip4("192.0.2.80", unix.IPPROTO_UDP, 0)
	binary.BigEndian.PutUint16(later[6:], 185)
	cut := func(offset byte) []byte { return []byte{unix.IPPROTO_UDP, 0, 0, offset, 0, 0, 0, 1} }
	for _, tt := range []struct {
		name   string
		packet []byte
		ours   bool
	}{
		{"unreachable", four(3, ip4("192.0.2.80", unix.IPPROTO_UDP, 0), ports(53)), true},
		{"too large, with options", frame(unix.ETH_P_IP, ip4("192.168.0.2", unix.IPPROTO_ICMP, 8), icmp(3, ip4("192.0.2.80", unix.IPPROTO_TCP, 4), ports(443)), 20), true},
		{"exceeded", four(11, ip4("192.0.2.80", unix.IPPROTO_UDP, 0), ports(60)), true},
		{"of a later fragment", four(3, later), true},
		{"a ping", four(8, ip4("192.0.2.80", unix.IPPROTO_UDP, 0), ports(53)), false},
		{"a redirect", four(5, ip4("192.0.2.80", unix.IPPROTO_UDP, 0), ports(53)), false},
		{"another port", four(3, ip4("192.0.2.80", unix.IPPROTO_UDP, 0), ports(61)), false},
		{"another protocol's port", four(3, ip4("192.0.2.80", unix.IPPROTO_TCP, 0), ports(53)), false},
		{"another protocol", four(3, ip4("192.0.2.80", unix.IPPROTO_ICMP, 0), ports(53)), false},
		{"what the host itself said", four(3, ip4("10.0.0.1", unix.IPPROTO_UDP, 0), ports(53)), false},
		{"cut short", four(3, ip4("192.0.2.80", unix.IPPROTO_UDP, 0)), false},
		{"no ICMP", frame(unix.ETH_P_IP, ip4("192.168.0.2", unix.IPPROTO_UDP, 0), icmp(3, ip4("192.0.2.80", unix.IPPROTO_UDP, 0), ports(53)), 0), false},
		{"IPv6, too large", six(2, ip6("2001:db8::80", unix.IPPROTO_TCP), ports(443)), true},
		{"IPv6, of a first fragment", six(1, ip6("2001:db8::80", unix.IPPROTO_FRAGMENT), cut(1), ports(53)), true},
		{"IPv6, of a first fragment from another port", six(1, ip6("2001:db8::80", unix.IPPROTO_FRAGMENT), cut(1), ports(61)), false},
		{"IPv6, of a later fragment", six(1, ip6("2001:db8::80", unix.IPPROTO_FRAGMENT), cut(8)), true},
		{"IPv6, a ping", six(128, ip6("2001:db8::80", unix.IPPROTO_UDP), ports(53)), false},
		{"IPv6, what the host itself said", six(1, ip6("fd00::1", unix.IPPROTO_UDP), ports(53)), false},
	} {
		var out skb
		ret, err := objs.Fragments.Run(&ebpf.RunOptions{Data: tt.packet, Context: skb{Ifindex: 1, Mark: other}, ContextOut: &out})
		if err != nil {
			t.Fatal(err)
		}
		want := uint32(other)
		if tt.ours {
			want |= value
		}
		if ret != tcxNext || out.Mark != want {
			t.Errorf("%s: verdict %#x, mark %#x, want %#x", tt.name, ret, out.Mark, want)
		}
	}
}
