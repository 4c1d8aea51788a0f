package netcfg_test

import (
	"net/netip"
	"testing"
	"time"
	"wayout/netcfg"
)

func TestZZMeasure(t *testing.T) {
	inNamespace(t)
	plumb(t)
	k := open(t, netcfg.Options{})
	for _, n := range []int{5000, 65000} {
		u := isp1()
		u.Addresses = nil
		for i := range n {
			u.Addresses = append(u.Addresses, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
		}
		w := want(u)
		b := time.Now()
		apply(t, k, w)
		t.Logf("%d v4 applied %v", n, time.Since(b))
		b = time.Now()
		s := read(t, k)
		t.Logf("read %v", time.Since(b))
		b = time.Now()
		netcfg.Diff(s, w)
		t.Logf("diff %v", time.Since(b))
	}
	b := time.Now()
	apply(t, k, want())
	t.Logf("clean %v", time.Since(b))
	u := isp1()
	u.Addresses = nil
	for i := range 2000 {
		a := netip.MustParseAddr("2001:db8:100::").As16()
		a[14], a[15], a[13] = byte(i>>8), byte(i), 1
		u.Addresses = append(u.Addresses, netip.AddrFrom16(a))
	}
	b = time.Now()
	apply(t, k, want(u))
	t.Logf("2000 v6 applied %v", time.Since(b))
}
