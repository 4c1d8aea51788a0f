package netcfg_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

// TestManyAddresses: what goes to the kernel many at a time is carried out, and
// answered, one by one.
func TestManyAddresses(t *testing.T) {
	inNamespace(t)
	ip(t, "link add eth0 type veth peer name far0")
	ip(t, "link set eth0 up")
	k := open(t, netcfg.Options{})
	eth0, _ := read(t, k).Link("eth0")
	var ops []netcfg.Op
	add := func(a string, link int) {
		addr := netip.MustParseAddr(a)
		ops = append(ops, netcfg.Op{Kind: netcfg.KindAddress, Dev: "eth0", Addr: netcfg.Address{
			Addr: addr, Prefix: addr.BitLen(), LinkIndex: link, Metric: 11900, Protocol: netcfg.Protocol, NoPrefixRoute: true,
		}})
	}
	const n = 300
	for i := range n {
		switch i {
		case 70, 199:
			add("198.18.0.1", eth0.Index) // is there already
		case 130:
			add("198.18.0.131", 4711) // there is no such interface
		default:
			add(fmt.Sprintf("198.18.%d.%d", i/250, 1+i%250), eth0.Index)
		}
	}
	add("2001:db8::1", eth0.Index)
	answers := func(ops []netcfg.Op, want map[int]error) {
		t.Helper()
		errs := k.DoAddresses(ops)
		if len(errs) != len(ops) {
			t.Fatalf("%d answers to %d", len(errs), len(ops))
		}
		for i, err := range errs {
			if !errors.Is(err, want[i]) {
				t.Errorf("%s: %v, want %v", ops[i], err, want[i])
			}
		}
	}
	answers(ops, map[int]error{70: unix.EEXIST, 199: unix.EEXIST, 130: unix.ENODEV})
	if got := strings.Count(ip(t, "addr show dev eth0"), "inet 198.18."); got != n-3 {
		t.Errorf("%d addresses are there, want %d", got, n-3)
	}
	for i := range ops {
		ops[i].Verb = netcfg.Delete
	}
	ops = slices.Delete(ops, 130, 131)
	ops[3].Addr.Addr = netip.MustParseAddr("192.0.2.99")
	answers(ops, map[int]error{3: unix.EADDRNOTAVAIL, 70: unix.EADDRNOTAVAIL, 198: unix.EADDRNOTAVAIL})
	if left := strings.Count(ip(t, "addr show dev eth0"), "inet 198.18."); left != 1 { // the one that was not asked for
		t.Errorf("%d addresses are left", left)
	}
	answers(nil, nil)
}
