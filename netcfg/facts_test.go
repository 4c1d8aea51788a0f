package netcfg_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

func TestForeignRules(t *testing.T) {
	inNamespace(t)
	for _, line := range []string{
		"rule add priority 5210 fwmark 0x80000/0xff0000 lookup main",   // Tailscale's shape
		"rule add priority 5220 fwmark 0x4000/0x4000 lookup main",      // Kubernetes'
		"rule add priority 5270 from all lookup 52",                    // takes everything before us
		"rule add priority 5280 not fwmark 0xca6c lookup 51820",        // wg-quick's
		"rule add priority 20000 from all lookup 53",                   // after us
		"rule add priority 20010 fwmark 0x10000/0x10000 lookup 54",     // after us, and it matches
		"rule add priority 11900 fwmark 0x10000/0xff0000 lookup 11900", // as ours, by somebody else
	} {
		ip(t, line)
	}
	k := open(t, netcfg.Options{})
	apply(t, k, want(with(isp2(), func(u *netcfg.Uplink) { u.Interface = "none0" })))
	var got []string
	for _, f := range read(t, k).ForeignRules(layout()) {
		got = append(got, fmt.Sprintf("%s matches=%v ahead=%v", f.Rule, f.MarkMatches, f.Ahead))
	}
	want := []string{
		"5210: from all fwmark 0x80000/0xff0000 lookup main matches=true ahead=true",
		"5270: from all lookup 52 matches=false ahead=true",
		"5280: not from all fwmark 0xca6c/0xffffffff lookup 51820 matches=true ahead=true",
		"11900: from all fwmark 0x10000/0xff0000 lookup 11900 matches=true ahead=false",
		"20010: from all fwmark 0x10000/0x10000 lookup 54 matches=true ahead=false",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

func TestMarkMatches(t *testing.T) {
	for _, tt := range []struct {
		mark, mask uint32
		invert     bool
		ours       uint32
		want       bool
	}{
		{0x4000, 0x4000, false, 0xff0000, false},
		{0x4000, 0x4000, true, 0xff0000, true}, // all of ours lack the bit
		{0x4000, 0x4000, false, 0xffff, true},
		{0x80000, 0xff0000, false, 0x0fffff, true},
		{0, 0xff, false, 0xff0000, true}, // "not marked by them" is true of ours
		{0, 0xff, true, 0xff0000, false},
		{0, 0, false, 0xff0000, false}, // no fwmark selector
		{0x10001, 0xffffffff, false, 0xff0000, false},
	} {
		if got := netcfg.MarkMatches(netcfg.Rule{Mark: tt.mark, Mask: tt.mask, Invert: tt.invert}, tt.ours); got != tt.want {
			t.Errorf("%+v: got %v", tt, got)
		}
	}
}

func TestSysctls(t *testing.T) {
	inNamespace(t)
	ip(t, "link add up0.5 type veth peer name far0")
	for name, v := range map[string]string{"ip_local_port_range": "1025 65000", "conf/all/rp_filter": "0", "conf/up0.5/rp_filter": "2", "conf/far0/rp_filter": "1"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(v), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	k := open(t, netcfg.Options{})
	got := make(chan netcfg.Sysctls, 1)
	go func() { // on a thread of another namespace
		s, err := k.Sysctls()
		if err != nil {
			t.Error(err)
		}
		got <- s
	}()
	s := <-got
	if want := (netcfg.Sysctl{Name: "net.ipv4.ip_local_port_range", Value: "1025 65000", Set: true}); s.PortRange != want {
		t.Errorf("got %+v, want %+v", s.PortRange, want)
	}
	delete(s.ReversePath, "lo")
	if want := map[string]int{"up0.5": 2, "far0": 1}; !maps.Equal(s.ReversePath, want) {
		t.Errorf("reverse path %v, want %v", s.ReversePath, want)
	}
	for name, v := range map[string]string{"all/rp_filter": "1", "all/arp_ignore": "1", "far0/arp_ignore": "2"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name, []byte(v), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := k.Sysctls(); err != nil || s.ARPIgnore["up0.5"] != 1 || s.ARPIgnore["far0"] != 2 {
		t.Errorf("ARP: %v, error %v", s.ARPIgnore, err)
	}
	if s, err := k.Sysctls(); err != nil || s.ReversePath["far0"] != 1 || s.ReversePath["up0.5"] != 2 || s.ReversePath["lo"] != 1 {
		t.Errorf("with all=1: %v, error %v", s.ReversePath, err)
	}
}

func TestSysctlsMissing(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "net/ipv4/conf/eth0"), 0o755); err != nil {
		t.Fatal(err)
	}
	s, err := netcfg.ReadSysctls(root)
	if err != nil || s.Conntrack.Set || s.PortRange.Set || len(s.ReversePath) != 0 {
		t.Errorf("got %+v, error %v, want nothing set", s, err)
	}
	if _, err := netcfg.ReadSysctls(filepath.Join(root, "none")); err == nil {
		t.Error("no /proc/sys is no error")
	}
}

// TestNAT: rules that translate the source are found, others are not, and what
// cannot be known is said.
func TestNAT(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	look := func() netcfg.NAT {
		n, err := k.NAT()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := look(); len(n.Rules)+len(n.Unknown) > 0 {
		t.Errorf("in a fresh namespace: %+v", n)
	}
	masquerade(t)
	if n, want := look(), []string{"ip nat post: masquerade"}; !slices.Equal(n.Rules, want) || len(n.Unknown) > 0 {
		t.Errorf("got %+v, want rules %q", n, want)
	}
}

// masquerade adds an nftables table with a chain after routing and two rules, an
// empty one and one that masquerades.
func masquerade(t *testing.T) {
	t.Helper()
	const mine = unix.NFNL_SUBSYS_NFTABLES << 8
	const nested = 1 << 15
	be := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	var batch []byte
	add := func(typ, flags uint16, family byte, resource uint16, attrs ...[]byte) {
		body := cat(append([][]byte{{family, 0, byte(resource >> 8), byte(resource)}}, attrs...)...)
		batch = append(batch, u32(uint32(16+len(body)))...)
		batch = binary.NativeEndian.AppendUint16(batch, typ)
		batch = binary.NativeEndian.AppendUint16(batch, unix.NLM_F_REQUEST|flags)
		batch = append(batch, u32(uint32(len(batch)))...)
		batch = append(append(batch, 0, 0, 0, 0), body...)
	}
	table, chain := attr(unix.NFTA_RULE_TABLE, 'n', 'a', 't', 0), attr(unix.NFTA_RULE_CHAIN, 'p', 'o', 's', 't', 0)
	create := uint16(unix.NLM_F_CREATE | unix.NLM_F_APPEND)
	add(unix.NFNL_MSG_BATCH_BEGIN, 0, 0, unix.NFNL_SUBSYS_NFTABLES)
	add(mine|unix.NFT_MSG_NEWTABLE, create, unix.NFPROTO_IPV4, 0, attr(unix.NFTA_TABLE_NAME, 'n', 'a', 't', 0))
	add(mine|unix.NFT_MSG_NEWCHAIN, create, unix.NFPROTO_IPV4, 0,
		attr(unix.NFTA_CHAIN_TABLE, 'n', 'a', 't', 0), attr(unix.NFTA_CHAIN_NAME, 'p', 'o', 's', 't', 0), attr(unix.NFTA_CHAIN_TYPE, 'n', 'a', 't', 0),
		attr(unix.NFTA_CHAIN_HOOK|nested, cat(attr(unix.NFTA_HOOK_HOOKNUM, be(4)...), attr(unix.NFTA_HOOK_PRIORITY, be(100)...))...))
	add(mine|unix.NFT_MSG_NEWRULE, create, unix.NFPROTO_IPV4, 0, table, chain)
	add(mine|unix.NFT_MSG_NEWRULE, create, unix.NFPROTO_IPV4, 0, table, chain,
		attr(unix.NFTA_RULE_EXPRESSIONS|nested, attr(unix.NFTA_LIST_ELEM|nested,
			cat(attr(unix.NFTA_EXPR_NAME, 'm', 'a', 's', 'q', 0), attr(unix.NFTA_EXPR_DATA|nested))...)...))
	add(unix.NFNL_MSG_BATCH_END, unix.NLM_F_ACK, 0, unix.NFNL_SUBSYS_NFTABLES)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil || n < 20 {
		t.Fatalf("answer of %d bytes, error %v", n, err)
	}
	if errno := -int32(binary.NativeEndian.Uint32(answer[16:20])); errno != 0 {
		t.Fatalf("add nftables rules: %v", unix.Errno(errno))
	}
}

func TestRelease(t *testing.T) {
	for release, want := range map[string]bool{
		"5.18.0": true, "6.1.0-13-amd64": true, "5.17.99": false, "4.19": false, "10.0": true, "": false, "x.y": false, "5": false,
	} {
		if got := netcfg.ReleaseSince(release, 5, 18); got != want {
			t.Errorf("%q: %v", release, got)
		}
	}
}
