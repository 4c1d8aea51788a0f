package netcfg_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

func isErr(err, target error) bool { return errors.Is(err, target) }

// fakeKernel is a kernel that follows the rules of the real one as far as they
// matter here, and breaks on what must never be.
type fakeKernel struct {
	links  []netcfg.Link
	addrs  []netcfg.Address
	routes []netcfg.Route
	rules  []netcfg.Rule
	noIPv6 bool

	done   int         // operations tried
	failAt map[int]int // which of them fails, with what error number
	broken []string    // what must never be
}

func newFake() *fakeKernel { return &fakeKernel{failAt: make(map[int]int)} }

func (k *fakeKernel) snapshot() *netcfg.Snapshot {
	s := netcfg.NewSnapshot(k.links, slices.Clone(k.addrs), slices.Clone(k.routes), slices.Clone(k.rules))
	s.IPv6 = !k.noIPv6
	return s
}

func (k *fakeKernel) Read() (*netcfg.Snapshot, error) { return k.snapshot(), nil }

func (k *fakeKernel) Do(o netcfg.Op) error {
	k.done++
	err := error(nil)
	if errno := k.failAt[k.done]; errno != 0 {
		err = unix.Errno(errno)
	} else {
		err = k.do(o)
	}
	k.check(o)
	return err
}

func (k *fakeKernel) do(o netcfg.Op) error {
	switch o.Kind {
	case netcfg.KindRoute:
		return k.doRoute(o)
	case netcfg.KindAddress:
		at := slices.IndexFunc(k.addrs, func(a netcfg.Address) bool {
			return a.Addr == o.Addr.Addr && a.LinkIndex == o.Addr.LinkIndex
		})
		switch {
		case o.Verb == netcfg.Delete && at < 0:
			return unix.EADDRNOTAVAIL
		case o.Verb == netcfg.Delete:
			k.addrs = slices.Delete(k.addrs, at, at+1)
		case at >= 0:
			return unix.EEXIST
		default:
			k.addrs = append(k.addrs, o.Addr)
		}
	case netcfg.KindRule:
		at := slices.Index(k.rules, o.Rule)
		switch {
		case o.Verb == netcfg.Delete && at < 0:
			return unix.ENOENT
		case o.Verb == netcfg.Delete:
			k.rules = slices.Delete(k.rules, at, at+1)
		case at >= 0:
			return unix.EEXIST
		default:
			k.rules = append(k.rules, o.Rule)
		}
	}
	return nil
}

func (k *fakeKernel) doRoute(o netcfg.Op) error {
	at := slices.IndexFunc(k.routes, func(r netcfg.Route) bool { return netcfg.KeyOf(r) == netcfg.KeyOf(o.Route) })
	if link := o.Route.LinkIndex; o.Verb != netcfg.Delete && link != 0 {
		if i := slices.IndexFunc(k.links, func(l netcfg.Link) bool { return l.Index == link }); i < 0 || !k.links[i].Admin {
			return unix.ENETDOWN
		}
	}
	if gw := o.Route.Gateway; o.Verb != netcfg.Delete && gw.IsValid() && !o.Route.OnLink && !gw.IsLinkLocalUnicast() &&
		!slices.ContainsFunc(k.routes, func(r netcfg.Route) bool {
			return r.LinkIndex == o.Route.LinkIndex && !r.Gateway.IsValid() && r.Dst.Contains(gw)
		}) {
		return unix.ENETUNREACH
	}
	switch {
	case o.Verb == netcfg.Delete && (at < 0 || k.routes[at] != o.Route):
		return unix.ESRCH
	case o.Verb == netcfg.Delete:
		k.routes = slices.Delete(k.routes, at, at+1)
	case o.Verb == netcfg.Replace && at >= 0:
		k.routes[at] = o.Route
	case at >= 0:
		return unix.EEXIST
	default:
		k.routes = append(k.routes, o.Route)
	}
	return nil
}

// isOwn says whether table local gives an address to the host.
func (k *fakeKernel) isOwn(a netip.Addr) bool {
	bits, own := -1, false
	for _, r := range k.routes {
		if r.Table == netcfg.TableLocal && r.Dst.Contains(a) && r.Dst.Bits() > bits {
			bits, own = r.Dst.Bits(), r.Type == netcfg.RouteLocal
		}
	}
	return own
}

// check: no rule of ours leads to a table that packets could fall out of, and no
// gateway is the host's own.
func (k *fakeKernel) check(o netcfg.Op) {
	for _, r := range k.rules {
		if r.Protocol != netcfg.Protocol || r.Priority < 11900 || r.Table == netcfg.TableMain {
			continue
		}
		if !slices.ContainsFunc(k.routes, func(x netcfg.Route) bool {
			return x.Family == r.Family && x.Table == r.Table && netcfg.IsLastResort(x)
		}) {
			k.broken = append(k.broken, fmt.Sprintf("after %q: %s leads to a table without an unreachable default", o, r))
		}
	}
	for _, r := range k.routes {
		if gw := r.Gateway; gw.IsValid() && k.isOwn(gw) {
			k.broken = append(k.broken, fmt.Sprintf("after %q: gateway %s is the host's own", o, gw))
		}
	}
}

// down does what the kernel does when an interface is set down.
func (k *fakeKernel) down(index int) {
	for i := range k.links {
		if k.links[i].Index == index {
			k.links[i].Admin, k.links[i].Up = false, false
		}
	}
	k.routes = slices.DeleteFunc(k.routes, func(r netcfg.Route) bool { return r.LinkIndex == index })
	k.addrs = slices.DeleteFunc(k.addrs, func(a netcfg.Address) bool { return a.LinkIndex == index && a.Addr.Is6() })
}

// up brings back the connected IPv4 routes.
func (k *fakeKernel) up(index int) {
	for i := range k.links {
		if k.links[i].Index == index {
			k.links[i].Admin, k.links[i].Up = true, true
		}
	}
	for _, a := range k.addrs {
		if a.LinkIndex == index && a.Prefix < 32 {
			k.routes = append(k.routes, connected(netip.PrefixFrom(a.Addr, a.Prefix).Masked(), index))
		}
	}
}

// show writes the state down, in order.
func (k *fakeKernel) show() string {
	s := k.snapshot()
	var b strings.Builder
	for _, a := range s.AddressList() {
		fmt.Fprintf(&b, "%+v\n", a)
	}
	for _, r := range s.Routes {
		fmt.Fprintf(&b, "%+v\n", r)
	}
	rules := make([]string, 0, len(s.Rules))
	for _, r := range s.Rules {
		rules = append(rules, fmt.Sprintf("%+v\n", r))
	}
	slices.Sort(rules)
	return b.String() + strings.Join(rules, "")
}

// TestEachOperationFailsOnce: whichever operation fails, with whatever error, the
// rest is done, nothing unsafe is ever there, foreign state stays, and a second run
// leads to the same end.
func TestEachOperationFailsOnce(t *testing.T) {
	second := with(isp2(), func(u *netcfg.Uplink) {
		u.ManageAddresses, u.Addresses, u.Gateway4 = true, addrs("203.0.113.7", "198.51.100.11"), netip.MustParseAddr("203.0.113.2")
	})
	local := with(isp1(), func(u *netcfg.Uplink) { u.Local = prefixes("10.60.0.0/24", "198.51.100.0/24", "2001:db8:100::/56") })
	loose := netcfg.Want{Layout: layout(), Local: prefixes("198.51.100.0/24", "2001:db8:beef::/64")}
	for _, tt := range []struct {
		name     string
		from, to netcfg.Want
	}{
		{"from nothing", want(), want(local, isp2())},
		{"to prefixes alone", want(), loose},
		{"from prefixes alone", loose, want()},
		{"from prefixes alone to uplinks", loose, want(local, isp2())},
		{"to nothing", want(local, isp2()), want()},
		{"to diverts", want(isp2()), diverting(isp2())},
		{"from diverts", diverting(), want()},
		{"from one to another", want(local, isp2()), want(with(isp1NoAddrs(), func(u *netcfg.Uplink) { u.Mark.Value = 0x50000 }), second)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			prepare := func() *fakeKernel {
				k := host()
				if err := netcfg.Diff(k.snapshot(), tt.from).Apply(k); err != nil {
					t.Fatal(err)
				}
				k.done = 0
				return k
			}
			good := prepare()
			plan := netcfg.Diff(good.snapshot(), tt.to)
			if err := plan.Apply(good); err != nil {
				t.Fatal(err)
			}
			for _, errno := range []unix.Errno{unix.ENOMEM, unix.EPERM, unix.EINTR} {
				for n := 1; n <= len(plan.Ops); n++ {
					k := prepare()
					k.failAt[n] = int(errno)
					err := netcfg.Diff(k.snapshot(), tt.to).Apply(k)
					if !errors.Is(err, errno) || !strings.Contains(err.Error(), plan.Ops[n-1].String()) {
						t.Fatalf("operation %d failed with %v; Apply says %v", n, errno, err)
					}
					again := netcfg.Diff(k.snapshot(), tt.to)
					if again.Empty() {
						t.Fatalf("operation %d (%s) failed, yet nothing is left to do", n, plan.Ops[n-1])
					}
					if err := again.Apply(k); err != nil {
						t.Fatalf("second run after operation %d: %v", n, err)
					}
					if k.show() != good.show() {
						t.Fatalf("after a failure of operation %d and a second run\n%s\nwant\n%s", n, k.show(), good.show())
					}
					if len(k.broken) > 0 {
						t.Fatalf("operation %d failed:\n%s", n, strings.Join(k.broken, "\n"))
					}
				}
			}
		})
	}
}

// TestForeignSurvives: whatever is done and undone, what was there before is there.
func TestForeignSurvives(t *testing.T) {
	k := host()
	before := k.show()
	locals := want(with(isp1(), func(u *netcfg.Uplink) { u.Local = prefixes("198.51.100.0/24", "2001:db8:100::/64") }), isp2())
	for _, w := range []netcfg.Want{want(isp1()), want(isp1(), isp2()), locals, want(isp2()), want()} {
		if err := netcfg.Diff(k.snapshot(), w).Apply(k); err != nil {
			t.Fatal(err)
		}
	}
	if k.show() != before {
		t.Errorf("got\n%s\nwant\n%s", k.show(), before)
	}
}

// TestDeleteOfGone: what somebody else deleted first is no error.
func TestDeleteOfGone(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOENT, unix.ESRCH, unix.EADDRNOTAVAIL, unix.ENODEV} {
		k := host()
		if err := netcfg.Diff(k.snapshot(), want(isp1())).Apply(k); err != nil {
			t.Fatal(err)
		}
		p := netcfg.Diff(k.snapshot(), want())
		for n := range p.Ops {
			k.failAt[k.done+n+1] = int(errno)
		}
		if err := p.Apply(k); err != nil {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

func TestManyErrors(t *testing.T) {
	k := host()
	u := isp1()
	for i := range 100 {
		u.Addresses = append(u.Addresses, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
	}
	for n := range 200 {
		k.failAt[n] = int(unix.ENOBUFS)
	}
	p := netcfg.Diff(k.snapshot(), want(u))
	err := p.Apply(k)
	if err == nil || strings.Count(err.Error(), "\n") != 20 || !strings.Contains(err.Error(), "more operations failed") {
		t.Errorf("got error %v, want 20 lines and a count", err)
	}
}

func TestReconcile(t *testing.T) {
	k := host()
	w := want(isp1())
	if err := netcfg.Diff(k.snapshot(), w).Apply(k); err != nil {
		t.Fatal(err)
	}
	goal := k.show()
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	if n, err := netcfg.Reconcile(k, k.snapshot(), w, logger); n != 0 || err != nil || log.Len() > 0 {
		t.Errorf("nothing to do: %d changes, error %v, log %q", n, err, log.String())
	}
	for i := len(k.rules) - 1; i >= 0; i-- {
		if k.rules[i].Protocol != netcfg.Protocol || k.rules[i].Priority < 11900 {
			continue
		}
		k.rules = slices.Delete(k.rules, i, i+1)
	}
	stale := k.snapshot()
	if n, err := netcfg.Reconcile(k, stale, w, logger); n != 4 || err != nil {
		t.Errorf("%d changes, error %v, want 4 and none", n, err)
	}
	if k.show() != goal {
		t.Errorf("got\n%s\nwant\n%s", k.show(), goal)
	}
	if !strings.Contains(log.String(), `command="ip rule add priority 11900 from all fwmark 0x10000/0xff0000 lookup 11900 proto 119"`) {
		t.Errorf("the log does not say what was put back:\n%s", log.String())
	}
	// A snapshot from before is no reason to do it twice.
	if n, err := netcfg.Reconcile(k, stale, w, slog.New(slog.DiscardHandler)); n != 0 || err != nil {
		t.Errorf("with an old snapshot: %d changes, error %v", n, err)
	}
}

// TestMakeOnAHostThatChanges: a link that goes down after the state was read is no
// failure; what cannot be done is, and without rights it is not tried again.
func TestMakeOnAHostThatChanges(t *testing.T) {
	w := want(isp1(), isp2())
	k := host()
	stale := k.snapshot()
	k.down(3)
	plan, err := netcfg.Make(k, stale, w, nil)
	if err != nil {
		t.Error(err)
	}
	if !netcfg.Diff(k.snapshot(), w).Empty() || len(k.broken) > 0 || plan.Empty() {
		t.Errorf("left to do %q, broken %q", netcfg.Diff(k.snapshot(), w).Commands(), k.broken)
	}

	k = host()
	for n := range 1000 {
		k.failAt[n] = int(unix.ENOMEM)
	}
	if _, err := netcfg.Make(k, k.snapshot(), w, nil); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("nothing can be done: %v", err)
	}

	k = host()
	k.failAt[1] = int(unix.EPERM)
	if _, err := netcfg.Make(k, k.snapshot(), w, netcfg.Plan.Adds); !errors.Is(err, unix.EPERM) || k.done != 1 {
		t.Errorf("without rights: %v after %d operations", err, k.done)
	}
}

// TestReconcileLocal: a local route and an exception that vanish are put back, and
// the log says so.
func TestReconcileLocal(t *testing.T) {
	k := host()
	w := want(with(isp1NoAddrs(), func(u *netcfg.Uplink) { u.Local = prefixes("198.51.100.0/24") }))
	w.Local = prefixes("2001:db8:beef::/64")
	if err := netcfg.Diff(k.snapshot(), w).Apply(k); err != nil {
		t.Fatal(err)
	}
	goal := k.show()
	k.routes = slices.DeleteFunc(k.routes, func(r netcfg.Route) bool { return r.Table == netcfg.TableLocal })
	if st, reason := k.snapshot().HasLocal(w.Local[0]); st != netcfg.Absent || reason != "no local route makes 2001:db8:beef::/64 the host's own" {
		t.Errorf("without its route the prefix is %s (%s)", st, reason)
	}
	var log strings.Builder
	if n, err := netcfg.Reconcile(k, k.snapshot(), w, slog.New(slog.NewTextHandler(&log, nil))); n != 3 || err != nil {
		t.Errorf("%d changes, error %v, want 3 and none", n, err)
	}
	if k.show() != goal {
		t.Errorf("got\n%s\nwant\n%s", k.show(), goal)
	}
	mustHold(
		t, log.String(),
		`command="ip route add throw 198.51.100.1/32 table local proto 119 metric 12155"`,
		`command="ip route add local 198.51.100.0/24 dev lo table local proto 119 metric 11900"`,
		`command="ip -6 route add local 2001:db8:beef::/64 dev lo table local proto 119 metric 12155"`,
	)
	if len(k.broken) > 0 {
		t.Errorf("on the way:\n%s", strings.Join(k.broken, "\n"))
	}
}
