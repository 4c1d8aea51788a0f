package netcfg_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

// plumb gives the test's namespace two uplinks, a LAN and foreign state of every
// kind, some of it close to ours.
func plumb(t *testing.T) {
	t.Helper()
	for _, line := range []string{
		"link add eth0 type veth peer name far0", "link add eth1 type veth peer name far1", "link add lan0 type veth peer name far2",
		"link set eth0 up", "link set far0 up", "link set eth1 up", "link set far1 up", "link set lan0 up", "link set far2 up",
		"addr add 198.51.100.5/24 dev eth0", "addr add 2001:db8:100::5/64 dev eth0 nodad",
		"addr add 203.0.113.5/28 dev eth1", "addr add 192.168.7.1/24 dev lan0",
		"addr add 198.51.100.99/32 dev lan0",
		"route add default via 198.51.100.1 dev eth0", "-6 route add default via 2001:db8:100::1 dev eth0",
		"route add default via 198.51.100.1 dev eth0 table 500 proto 119", "route add blackhole 10.77.0.0/16 proto 119",
		"route add local 10.88.0.0/16 dev lo proto 119", "-6 route add unreachable default metric 4294967295 table 500",
		"rule add priority 9 from all lookup 500 proto 119", "rule add priority 11900 fwmark 0x10000/0xff0000 lookup 11900",
		"rule add priority 11912 from 198.51.100.0/24 iif lo lookup 500 proto 119", "-6 rule add priority 5210 fwmark 0x80000/0xff0000 lookup main",
	} {
		ip(t, line)
	}
	k := open(t, netcfg.Options{})
	eth0, _ := read(t, k).Link("eth0")
	for _, a := range []netcfg.Address{
		{Addr: netip.MustParseAddr("198.51.100.98"), Protocol: 119, Metric: 77}, // our protocol, not our numbers
		{Addr: netip.MustParseAddr("192.0.2.200"), Protocol: 118, Metric: 11900},
	} {
		a.LinkIndex, a.Prefix = eth0.Index, a.Addr.BitLen()
		do(t, k, netcfg.Op{Kind: netcfg.KindAddress, Addr: a, Dev: "eth0"})
	}
}

// do carries out one change by its command; by netlink only where the installed
// program has no word for it (iproute2 below 6.3 knows no protocol of addresses).
func do(t *testing.T, k netcfg.Kernel, o netcfg.Op) {
	t.Helper()
	if o.Kind == netcfg.KindAddress && o.Verb == netcfg.Add && o.Addr.Protocol != 0 {
		help, _ := exec.Command("ip", "addr", "help").CombinedOutput()
		if !strings.Contains(string(help), "proto") {
			if err := k.Do(o); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	ip(t, strings.TrimPrefix(o.String(), "ip "))
}

// show is the namespace as the program ip tells it, without what changes by itself.
func show(t *testing.T) string {
	t.Helper()
	// An address has its local route once duplicate address detection is over.
	for end := time.Now().Add(20 * time.Second); strings.Contains(ip(t, "-6 addr show tentative -dadfailed"), "tentative"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("addresses are still tentative")
		}
	}
	var b strings.Builder
	for _, line := range []string{"-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all", "addr"} {
		lines := slices.DeleteFunc(strings.Split(ip(t, line), "\n"), func(l string) bool { return strings.Contains(l, "fe80::") })
		slices.Sort(lines)
		b.WriteString("# ip " + line + strings.Join(lines, "\n") + "\n")
	}
	unsteady := regexp.MustCompile(`link/ether \S+| tentative|link-netnsid \d+|expires \d+sec|error -?\d+`)
	return unsteady.ReplaceAllString(b.String(), "")
}

func open(t *testing.T, opt netcfg.Options) *netcfg.Netlink {
	t.Helper()
	if opt.Layout == (netcfg.Layout{}) {
		opt.Layout = layout()
	}
	k, err := netcfg.Open(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

func read(t *testing.T, k netcfg.Kernel) *netcfg.Snapshot {
	t.Helper()
	s, err := k.Read()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func apply(t *testing.T, k netcfg.Kernel, w netcfg.Want) netcfg.Plan {
	t.Helper()
	p := netcfg.Diff(read(t, k), w)
	if err := p.Apply(k); err != nil {
		t.Fatal(err)
	}
	return p
}

func mustHold(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("no %q in\n%s", w, text)
		}
	}
}

func wholeWant() netcfg.Want {
	w := want(
		with(isp1(), func(u *netcfg.Uplink) {
			u.Local = prefixes("10.60.0.0/24", "2001:db8:beef::/64", "2001:db8:100::/64")
		}),
		with(isp2(), func(u *netcfg.Uplink) {
			u.ManageAddresses, u.Addresses, u.Gateway4 = true, addrs("203.0.113.7"), netip.MustParseAddr("192.0.2.1") // on no prefix
		}),
	)
	w.Local = prefixes("10.61.0.0/16", "2001:db8:cafe::/48")
	w.Answers = netcfg.Mark{Value: 0xc10000, Mask: 0xff0000}
	w.Diverts = []netcfg.Divert{
		{Interface: "eth0", Rest: netcfg.RestDrop, Ports: []netcfg.DivertPorts{
			{Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}, {Protocol: unix.IPPROTO_UDP, First: 1000, Last: 2000},
		}},
		{Interface: "eth1", Ports: []netcfg.DivertPorts{{Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}}},
		{Interface: "later0", Ports: []netcfg.DivertPorts{{Protocol: unix.IPPROTO_TCP, Last: 65535}}},
	}
	return w
}

// TestApply: the plan's commands and Apply lead to the same state, twice is nothing
// to do, and what clean leaves is what was there before, also when the daemon that
// applied it was killed.
func TestApply(t *testing.T) {
	inNamespace(t)
	plumb(t)
	before := show(t)
	k := open(t, netcfg.Options{})
	p := apply(t, k, wholeWant())
	if len(p.Notes)+len(p.Conflicts) > 0 {
		t.Errorf("notes %q, conflicts %q", p.Notes, p.Conflicts)
	}
	after := show(t)
	mustHold(
		t, after,
		"11900:	from all fwmark 0x10000/0xff0000 lookup 11900 proto 119",
		"11912:	from 198.51.100.0/24 iif lo lookup 11900 proto 119",
		"11908:	from 203.0.113.0/28 iif lo lookup 11901 proto 119",
		"11968:	from 2001:db8:100::/64 iif lo lookup 11900 proto 119",
		"unreachable default table 11900 proto 119 metric 4294967295",
		"default via 192.0.2.1 dev eth1 table 11901 proto 119 metric 1024 onlink",
		"unreachable default dev lo table 11901 proto 119 metric 4294967295",
		"inet 198.51.100.11/32 metric 11900 scope global",
		"local 10.60.0.0/24 dev lo table local proto 119 scope host metric 11900",
		"local 2001:db8:beef::/64 dev lo table local proto 119 metric 11900",
		"local 10.61.0.0/16 dev lo table local proto 119 scope host metric 12155",
		"local 2001:db8:cafe::/48 dev lo table local proto 119 metric 12155",
		"throw 2001:db8:100::1 dev lo table local proto 119 metric 12155",
		"11912:	from 10.60.0.0/24 iif lo lookup 11900 proto 119",
		"11968:	from 2001:db8:beef::/64 iif lo lookup 11900 proto 119",
		"11901:	from all fwmark 0xc10000/0xff0000 iif lo lookup main suppress_prefixlength 0 proto 119",
		"11902:	from all fwmark 0xc10000/0xff0000 iif lo lookup 12152 proto 119",
		"12035:	from all fwmark 0xc10000/0xff0000 iif eth0 lookup 12154 proto 119",
		"12035:	from all iif eth0 ipproto tcp dport 443 lookup 12154 proto 119",
		"12035:	from all iif eth0 ipproto udp dport 1000-2000 lookup 12154 proto 119",
		"12035:	from all iif later0 [detached] ipproto tcp lookup 12154 proto 119",
		"12036:	from all iif eth0 lookup 12153 proto 119",
		"12033:	from 203.0.113.0/28 to 203.0.113.0/28 iif eth1 ipproto tcp dport 443 lookup 12154 proto 119",
		"12034:	from all to 203.0.113.0/28 iif eth1 lookup main suppress_prefixlength 0 proto 119",
		"local default dev lo table 12154 proto 119 scope host metric 1024",
		"unreachable default table 12153 proto 119 metric 4294967295",
	)
	if again := apply(t, k, wholeWant()); !again.Empty() {
		t.Errorf("a second time there is still to do:\n%s", strings.Join(again.Commands(), "\n"))
	}
	if show(t) != after {
		t.Error("the second time changed something")
	}

	// The same by hand, in a namespace of its own.
	byHand := make(chan string)
	go func() {
		defer close(byHand)
		t.Run("by hand", func(t *testing.T) {
			inNamespace(t)
			plumb(t)
			k := open(t, netcfg.Options{})
			for _, o := range p.Ops {
				do(t, k, o)
			}
			byHand <- show(t)
			// A daemon that never was here finds nothing to do and can clean up.
			if p := netcfg.Diff(read(t, k), wholeWant()); !p.Empty() {
				t.Errorf("after the plan's commands there is still to do:\n%s", strings.Join(p.Commands(), "\n"))
			}
			for _, o := range netcfg.Diff(read(t, k), want()).Ops {
				do(t, k, o)
			}
			byHand <- show(t)
		})
	}()
	if got := <-byHand; got != after {
		t.Errorf("by hand (-by Apply +by hand):\n%s", cmp.Diff(after, got))
	}
	if got := <-byHand; got != before {
		t.Errorf("cleaned by hand (-before +after):\n%s", cmp.Diff(before, got))
	}
	for range byHand {
	}

	// Another process, as after kill -9.
	k = open(t, netcfg.Options{})
	apply(t, k, want())
	if got := show(t); got != before {
		t.Errorf("after clean (-before +after):\n%s", cmp.Diff(before, got))
	}
}

// TestStateFile: on a kernel that does not keep IFA_PROTO a file says which
// addresses are ours, written before the address is.
func TestStateFile(t *testing.T) {
	inNamespace(t)
	plumb(t)
	before := show(t)
	opt := netcfg.Options{StateDir: filepath.Join(t.TempDir(), "state"), NoAddrProto: true}
	k := open(t, opt)
	c, err := k.Claim()
	if err != nil {
		t.Fatal(err)
	}
	w := wholeWant()
	p := apply(t, k, w)
	mustHold(t, show(t), "inet 198.51.100.11/32 metric 11900 scope global")
	if got := strings.Join(p.Commands(), "\n"); strings.Contains(got, "/32 dev eth0 proto") {
		t.Errorf("the plan marks addresses:\n%s", got)
	}
	if again := apply(t, k, w); !again.Empty() {
		t.Errorf("a second time there is still to do:\n%s", strings.Join(again.Commands(), "\n"))
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	// Killed; meanwhile one of our addresses went and somebody else put it back.
	ip(t, "addr del 203.0.113.7/32 dev eth1")
	k = open(t, opt)
	if c, err = k.Claim(); err != nil {
		t.Fatal(err)
	}
	ip(t, "addr add 203.0.113.7/32 dev eth1")
	apply(t, k, want())
	mustHold(t, show(t), "inet 203.0.113.7/32 scope global eth1")
	ip(t, "addr del 203.0.113.7/32 dev eth1")
	if got := show(t); got != before {
		t.Errorf("after clean (-before +after):\n%s", cmp.Diff(before, got))
	}
	if left, err := os.ReadDir(opt.StateDir); err != nil || len(left) > 0 {
		t.Errorf("the state directory holds %v (error %v), want nothing", left, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	// A list that cannot be written: no address without its entry.
	opt.StateDir = "/proc/wayout"
	k = open(t, opt)
	err = netcfg.Diff(read(t, k), w).Apply(k)
	if err == nil || !strings.Contains(err.Error(), "list of our addresses") {
		t.Errorf("got error %v, want one about the list", err)
	}
	if strings.Contains(ip(t, "addr"), "198.51.100.11") {
		t.Error("an address was added that no list names")
	}
	apply(t, k, want())
}

// TestStateFileOfOthers: entries of another boot, namespace or interface, and cut
// lines, make nothing ours.
func TestStateFileOfOthers(t *testing.T) {
	inNamespace(t)
	plumb(t)
	opt := netcfg.Options{StateDir: t.TempDir(), NoAddrProto: true}
	k := open(t, opt)
	apply(t, k, want(isp1()))
	files, err := filepath.Glob(filepath.Join(opt.StateDir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("state files %v, error %v", files, err)
	}
	good, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	line := strings.SplitAfter(string(good), "\n")[0]
	f := strings.Fields(line)
	f[5] = "198.51.100.99" // foreign, on lan0
	var bad strings.Builder
	bad.Write(good)
	for i, v := range map[int]string{1: "another-boot", 2: "1:2", 3: "4x", 4: "lan0 more", 5: "198.51.100"} {
		g := slices.Clone(f)
		g[i] = v
		bad.WriteString(strings.Join(g, " ") + "\n")
	}
	bad.WriteString("+ " + f[1])
	if err := os.WriteFile(files[0], []byte(bad.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	var ours []string
	for _, a := range read(t, open(t, opt)).AddressList() {
		if a.Ours {
			ours = append(ours, a.Addr.String())
		}
	}
	if got, want := fmt.Sprint(ours), "[198.51.100.11 2001:db8:100::11]"; got != want {
		t.Errorf("ours: %s, want %s", got, want)
	}
}

// TestDownUplinkRefuses: packets of an uplink that is down go nowhere, by mark and by
// source, however long it stays down.
func TestDownUplinkRefuses(t *testing.T) {
	inNamespace(t)
	plumb(t)
	ip(t, "rule del priority 9") // it takes all packets
	k := open(t, netcfg.Options{})
	w := want(isp1(), isp2())
	apply(t, k, w)
	get := func(words string) string {
		out, err := exec.Command("ip", strings.Fields("route get "+words)...).CombinedOutput()
		if err != nil {
			return strings.TrimSpace(string(out))
		}
		return strings.Join(strings.Fields(string(out))[:5], " ")
	}
	const refused = "RTNETLINK answers: No route to host"
	check := func(when string, want map[string]string) {
		t.Helper()
		for words, answer := range want {
			if got := get(words); got != answer {
				t.Errorf("%s: ip route get %s: %s, want %s", when, words, got, answer)
			}
		}
	}
	up := map[string]string{
		"192.0.2.77 mark 0x10000":            "192.0.2.77 via 198.51.100.1 dev eth0",
		"192.0.2.77 mark 0x20000":            "192.0.2.77 via 203.0.113.1 dev eth1",
		"192.0.2.77 from 203.0.113.5":        "192.0.2.77 from 203.0.113.5 via 203.0.113.1",
		"203.0.113.9 mark 0x20000":           "203.0.113.9 dev eth1 table 11901",
		"2001:db8:9::9 mark 0x10000":         "2001:db8:9::9 from :: via 2001:db8:100::1",
		"2001:db8:9::9 mark 0x20000":         refused, // it has no IPv6
		"2001:db8:9::9 from 2001:db8:100::5": "2001:db8:9::9 from 2001:db8:100::5 via 2001:db8:100::1",
		"192.0.2.77":                         "192.0.2.77 via 198.51.100.1 dev eth0",
	}
	check("up", up)
	ip(t, "link set eth1 down")
	down := map[string]string{
		"192.0.2.77 mark 0x20000":  refused,
		"203.0.113.9 mark 0x20000": refused,
		"192.0.2.77 mark 0x10000":  "192.0.2.77 via 198.51.100.1 dev eth0",
	}
	check("down", down)
	for range 2 {
		if p := apply(t, k, w); !p.Empty() || len(p.Notes) != 1 {
			t.Errorf("with a link down there is to do:\n%s\nnotes %q", strings.Join(p.Commands(), "\n"), p.Notes)
		}
		mustHold(t, ip(t, "rule"), "from 203.0.113.0/28 iif lo lookup 11901")
	}
	check("still down", down)
	ip(t, "link set eth1 up")
	apply(t, k, w)
	check("up again", up)
	// An interface that is not there at all, and one that comes back under its name.
	ip(t, "link del eth1")
	apply(t, k, w)
	check("gone", down)
	mustHold(t, ip(t, "rule"), "from 203.0.113.0/28 iif lo lookup 11901")
	ip(t, "link add eth1 type veth peer name far1")
	ip(t, "link set eth1 up")
	ip(t, "link set far1 up")
	ip(t, "addr add 203.0.113.5/28 dev eth1")
	apply(t, k, w)
	check("another one", up)
}

// TestPutBack: what of ours vanishes comes back by Reconcile out of the watcher.
func TestPutBack(t *testing.T) {
	inNamespace(t)
	plumb(t)
	k := open(t, netcfg.Options{})
	w := wholeWant()
	apply(t, k, w)
	if _, err := netcfg.AwaitDAD(context.Background(), k); err != nil {
		t.Fatal(err)
	}
	ours := func() string {
		return strings.Join(slices.DeleteFunc(strings.Split(show(t), "\n"), func(line string) bool {
			return !strings.Contains(line, "119")
		}), "\n")
	}
	goal := ours()
	ctx, cancel := context.WithCancel(context.Background())
	watcher, err := netcfg.Watch(ctx, netcfg.WatchOptions{Kernel: k, OnChange: func(s *netcfg.Snapshot) {
		if _, err := netcfg.Reconcile(k, s, w, slog.New(slog.DiscardHandler)); err != nil && ctx.Err() == nil {
			t.Logf("reconcile: %v", err) // while an interface changes
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		<-watcher.Done()
	}()
	for _, line := range []string{
		"rule del priority 11900 fwmark 0x10000/0xff0000 proto 119",
		"-6 rule del priority 11968",
		"-6 rule flush proto 119",
		"route flush table 11900",
		"-6 route flush table 11901",
		"route del unreachable default table 11901",
		"addr del 198.51.100.11/32 dev eth0",
		"addr del 2001:db8:100::11/128 dev eth0",
		"route del local 10.60.0.0/24 dev lo table local proto 119 metric 11900",
		"-6 route del local 2001:db8:cafe::/48 dev lo table local proto 119 metric 12155",
		"-6 route del throw 2001:db8:100::1 table local proto 119 metric 12155",
		"link set eth1 down", "link set eth1 up",
	} {
		ip(t, line)
		if line == "link set eth1 down" {
			continue
		}
		deadline := time.Now().Add(5 * time.Second)
		for ours() != goal {
			if time.Now().After(deadline) {
				t.Fatalf("after `ip %s` (-want +got):\n%s", line, cmp.Diff(goal, ours()))
			}
		}
	}
}

func TestAwaitDAD(t *testing.T) {
	inNamespace(t)
	plumb(t)
	far := elsewhere(t)
	ip(t, fmt.Sprintf("link set far0 netns %d", far.thread))
	far.do(func() { // another host has one of the addresses
		ip(t, "link set far0 up")
		ip(t, "addr add 2001:db8:100::11/64 dev far0 nodad")
	})
	k := open(t, netcfg.Options{})
	w := want(with(isp1(), func(u *netcfg.Uplink) { u.Addresses = addrs("2001:db8:100::11", "2001:db8:100::12") }))
	for deadline := time.Now().Add(5 * time.Second); ; {
		if l, _ := read(t, k).Link("eth0"); l.Up {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no carrier")
		}
	}
	apply(t, k, w)
	if st, _ := read(t, k).Has(netip.MustParseAddr("2001:db8:100::12"), "eth0"); st != netcfg.Tentative {
		t.Errorf("a fresh address is %s, want tentative", st)
	}
	short, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if _, err := netcfg.AwaitDAD(short, k); !isErr(err, context.DeadlineExceeded) {
		t.Errorf("without the time for it: %v", err)
	}
	long, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	twice, err := netcfg.AwaitDAD(long, k)
	if err != nil || fmt.Sprint(twice) != "[2001:db8:100::11]" {
		t.Errorf("duplicates %v, error %v, want [2001:db8:100::11]", twice, err)
	}
	s := read(t, k)
	for addr, state := range map[string]netcfg.State{"2001:db8:100::11": netcfg.DadFailed, "2001:db8:100::12": netcfg.Present} {
		if st, reason := s.Has(netip.MustParseAddr(addr), "eth0"); st != state {
			t.Errorf("%s is %s (%s), want %s", addr, st, reason, state)
		}
	}
	if p := netcfg.Diff(s, w); !p.Empty() {
		t.Errorf("a duplicate leads to %q", p.Commands())
	}
}

// TestDisabledIPv6: a host where IPv6 is switched off by sysctl, as in containers.
func TestDisabledIPv6(t *testing.T) {
	inNamespace(t)
	for _, f := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f+"/disable_ipv6", []byte("1"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range []string{"link add eth0 type veth peer name far0", "link set eth0 up", "link set far0 up", "addr add 198.51.100.5/24 dev eth0"} {
		ip(t, line)
	}
	before := show(t)
	k := open(t, netcfg.Options{})
	w := want(with(isp1(), func(u *netcfg.Uplink) { u.Gateway6, u.Addresses = netip.Addr{}, addrs("198.51.100.11") }))
	apply(t, k, w)
	if p := apply(t, k, w); !p.Empty() {
		t.Errorf("a second time there is still to do: %q", p.Commands())
	}
	apply(t, k, want())
	if got := show(t); got != before {
		t.Errorf("after clean (-before +after):\n%s", cmp.Diff(before, got))
	}
}

// TestWithoutRights: no right to change leads to one error, not to one each.
func TestWithoutRights(t *testing.T) {
	k := host()
	for n := range 100 {
		k.failAt[n] = 1 // EPERM
	}
	err := netcfg.Diff(k.snapshot(), want(isp1(), isp2())).Apply(k)
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("got error %v, want one line", err)
	}
}

// TestOtherLayout: a daemon with other numbers in the same namespace keeps what is
// its own.
func TestOtherLayout(t *testing.T) {
	inNamespace(t)
	plumb(t)
	before := show(t)
	other := netcfg.Layout{TableBase: 21900, RulePriority: 21900, MarkMask: 0xff}
	k, k2 := open(t, netcfg.Options{}), open(t, netcfg.Options{Layout: other})
	w2 := netcfg.Want{Layout: other, Uplinks: []netcfg.Uplink{with(isp1(), func(u *netcfg.Uplink) {
		u.Mark, u.Addresses = netcfg.Mark{Value: 1, Mask: 0xff}, addrs("198.51.100.21")
		u.Local = []netip.Prefix{netip.MustParsePrefix("10.60.0.0/24")}
	})}}
	apply(t, k, wholeWant())
	first := show(t)
	apply(t, k2, w2)
	if p := netcfg.Diff(read(t, k), wholeWant()); !p.Empty() {
		t.Errorf("the other daemon's state is to be changed:\n%s", strings.Join(p.Commands(), "\n"))
	}
	apply(t, k2, netcfg.Want{Layout: other})
	if got := show(t); got != first {
		t.Errorf("after the other's clean:\n%s\nwant\n%s", got, first)
	}
	apply(t, k2, w2)
	apply(t, k, want())
	if p := netcfg.Diff(read(t, k2), w2); !p.Empty() {
		t.Errorf("clean took the other's: it has to\n%s", strings.Join(p.Commands(), "\n"))
	}
	apply(t, k2, netcfg.Want{Layout: other})
	if got := show(t); got != before {
		t.Errorf("after both cleans:\n%s\nbefore:\n%s", got, before)
	}
}

// TestTraffic: with the strictest reverse path check, connections from a managed
// address with its uplink's mark go out and come back by that uplink, and so do the
// replies of a server on the host that knows nothing of marks.
func TestTraffic(t *testing.T) {
	inNamespace(t)
	plumb(t)
	ip(t, "rule del priority 9")
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	far := elsewhere(t)
	var origin net.Listener
	ip(t, fmt.Sprintf("link set far1 netns %d", far.thread))
	far.do(func() {
		ip(t, "link set lo up")
		ip(t, "link set far1 up")
		ip(t, "addr add 203.0.113.1/28 dev far1")
		ip(t, "addr add 192.0.2.77/32 dev lo")
		var err error
		if origin, err = net.Listen("tcp4", "192.0.2.77:0"); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { _ = origin.Close() }()
	k := open(t, netcfg.Options{})
	apply(t, k, want(isp1(), with(isp2(), func(u *netcfg.Uplink) { u.ManageAddresses, u.Addresses = true, addrs("203.0.113.7") })))

	d := net.Dialer{
		Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(203, 0, 113, 7)},
		Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x20000)
			}), err)
		},
	}
	conn, err := d.Dial("tcp4", origin.Addr().String())
	if err != nil {
		t.Fatalf("out by a path: %v", err)
	}
	defer func() { _ = conn.Close() }()
	seen, err := origin.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = seen.Close() }()
	if got := seen.RemoteAddr().(*net.TCPAddr).IP.String(); got != "203.0.113.7" {
		t.Errorf("the origin saw %s, want 203.0.113.7", got)
	}

	server, err := net.Listen("tcp4", "203.0.113.5:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	far.do(func() {
		d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 77)}}
		c, err := d.Dial("tcp4", server.Addr().String())
		if err != nil {
			t.Errorf("a server's reply: %v", err)
			return
		}
		_ = c.Close()
	})
}
