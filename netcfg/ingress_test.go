package netcfg_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/scripts/lab"
)

// verdict is a program that says the same of every packet.
func verdict(t *testing.T, v int32) int {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm32(asm.R0, v), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p.FD()
}

// attached describes the queueing discipline and the filters of an interface, as the
// kernel tells them.
func attached(t *testing.T, index int) string {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	var all []string
	qdiscs, err := h.QdiscList(link)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Handle == netlink.MakeHandle(0xffff, 0) {
			all = append(all, q.Type())
		}
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		fs, err := h.FilterList(link, parent)
		if err != nil && !errors.Is(err, unix.EINVAL) {
			t.Fatal(err)
		}
		for _, f := range fs {
			if b, ok := f.(*netlink.BpfFilter); !ok {
				all = append(all, fmt.Sprintf("%d %s", f.Attrs().Priority, f.Type()))
			} else if b.Name != "" { // else it is what the priority begins with
				all = append(all, fmt.Sprintf("%d %s", b.Attrs().Priority, b.Name))
			}
		}
	}
	return strings.Join(all, ", ")
}

func openHere(t *testing.T) *netcfg.Netlink {
	t.Helper()
	k, err := netcfg.Open(netcfg.Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// ingressLink is an interface of a test's namespace.
func ingressLink(t *testing.T) int {
	t.Helper()
	ip(t, "link add in0 type veth peer name in1")
	l, err := netlink.LinkByName("in0")
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Index
}

func TestIngressIsOurs(t *testing.T) {
	inNamespace(t)
	k, index := openHere(t), ingressLink(t)
	const mine, other = "wayout-1-divert", "wayout-2-divert"
	next, drop := verdict(t, -1), verdict(t, 2)
	steps := []struct {
		do   func() error
		want string
	}{
		{func() error { return k.UnsetIngress(index, mine) }, ""},
		{func() error { return k.SetIngress(index, mine, next) }, "clsact, 1 wayout-1-divert made clsact"},
		{func() error { return k.SetIngress(index, mine, drop) }, "clsact, 1 wayout-1-divert made clsact"},
		{func() error { return k.SetIngress(index, other, next) }, "clsact, 1 wayout-2-divert made clsact, 1 wayout-1-divert made clsact"},
		{func() error { return k.UnsetIngress(index, mine) }, "clsact, 1 wayout-2-divert made clsact"},
		{func() error { return k.UnsetIngress(index, mine) }, "clsact, 1 wayout-2-divert made clsact"},
		{func() error { return k.UnsetIngress(index, other) }, ""},
	}
	for i, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if got := attached(t, index); got != s.want {
			t.Errorf("step %d: attached is %q, want %q", i, got, s.want)
		}
	}
	if err := k.SetIngress(index, "theirs", next); err == nil {
		t.Error("a name that is not ours is taken")
	}
}

// TestIngressLeavesOthers: what others have made stays, before and after.
func TestIngressLeavesOthers(t *testing.T) {
	inNamespace(t)
	k := openHere(t)
	next, drop := verdict(t, -1), verdict(t, 2)
	const name = "wayout-1-divert"
	clsact := func(index int) netlink.Qdisc {
		return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	}
	bpf := func(index int, parent uint32, priority, protocol uint16) netlink.Filter {
		return &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: parent, Priority: priority, Protocol: protocol},
			Fd:          drop, Name: "theirs", DirectAction: true,
		}
	}
	const in, out = netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS
	for _, c := range []struct {
		name                string
		theirs              func(index int) error
		before, with, after string
	}{
		{
			"an empty discipline",
			func(i int) error { return netlink.QdiscAdd(clsact(i)) },
			"clsact", "clsact, 1 " + name, "clsact",
		},
		{
			"the older discipline",
			func(i int) error {
				return netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: i, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}})
			},
			"ingress", "ingress, 1 " + name + ", 1 " + name, "ingress", // of which all parents are one
		},
		{
			"a program", // ours comes first
			func(i int) error {
				return errors.Join(netlink.QdiscAdd(clsact(i)), netlink.FilterAdd(bpf(i, in, 1, unix.ETH_P_ALL)))
			},
			"clsact, 1 theirs", "clsact, 1 " + name + ", 1 theirs", "clsact, 1 theirs",
		},
		{
			"a program for another protocol", // of whose priority ours cannot be
			func(i int) error {
				return errors.Join(netlink.QdiscAdd(clsact(i)), netlink.FilterAdd(bpf(i, in, 1, unix.ETH_P_IP)))
			},
			"clsact, 1 theirs", "clsact, 1 theirs, 2 " + name, "clsact, 1 theirs",
		},
		{
			"a program on the way out",
			func(i int) error {
				return errors.Join(netlink.QdiscAdd(clsact(i)), netlink.FilterAdd(bpf(i, out, 1, unix.ETH_P_ALL)))
			},
			"clsact, 1 theirs", "clsact, 1 " + name + ", 1 theirs", "clsact, 1 theirs",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			inNamespace(t)
			k, index := openHere(t), ingressLink(t)
			if err := c.theirs(index); err != nil {
				t.Fatal(err)
			}
			if got := attached(t, index); got != c.before {
				t.Fatalf("before it is %q, want %q", got, c.before)
			}
			for _, prog := range []int{next, drop} {
				if err := k.SetIngress(index, name, prog); err != nil {
					t.Fatal(err)
				}
				if got := attached(t, index); got != c.with {
					t.Errorf("with ours it is %q, want %q", got, c.with)
				}
			}
			if err := k.UnsetIngress(index, name); err != nil {
				t.Fatal(err)
			}
			if got := attached(t, index); got != c.after {
				t.Errorf("after it is %q, want %q", got, c.after)
			}
		})
	}

	// What others add to ours keeps it.
	index := ingressLink(t)
	if err := k.SetIngress(index, name, next); err != nil {
		t.Fatal(err)
	}
	if err := netlink.FilterAdd(bpf(index, out, 7, unix.ETH_P_ALL)); err != nil {
		t.Fatal(err)
	}
	if err := k.UnsetIngress(index, name); err != nil {
		t.Fatal(err)
	}
	if got, want := attached(t, index), "clsact, 7 theirs"; got != want {
		t.Errorf("with others on the way out it is %q, want %q", got, want)
	}
}

// TestIngresses: a namespace's own are found, and those of no interface are gone.
func TestIngresses(t *testing.T) {
	inNamespace(t)
	k, index := openHere(t), ingressLink(t)
	prog := verdict(t, -1)
	const name = "wayout-1-divert"
	find := func(name string, want ...int) {
		t.Helper()
		if got, err := k.Ingresses(name); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s is on %v, want %v; error %v", name, got, want, err)
		}
	}
	find(name)
	elsewhere(t).do(func() { // the same number in another namespace
		ip(t, "link set lo up")
		other := openHere(t)
		i := ingressLink(t)
		if err := other.SetIngress(i, name, prog); err != nil {
			t.Fatal(err)
		}
		if err := k.UnsetIngress(i, name); err != nil {
			t.Fatal(err)
		}
		if got, want := attached(t, i), "clsact, 1 "+name+" made clsact"; got != want {
			t.Errorf("elsewhere it is %q, want %q", got, want)
		}
	})
	find(name)
	if err := k.SetIngress(index, name, prog); err != nil {
		t.Fatal(err)
	}
	find(name, index)
	find("wayout-1-neighbours")
	ip(t, "link del in0")
	find(name)
	if err := k.UnsetIngress(index, name); err != nil {
		t.Errorf("with its interface gone: %v", err)
	}
	if err := k.SetIngress(index, name, prog); !errors.Is(err, unix.ENODEV) {
		t.Errorf("on an interface that is gone: %v", err)
	}
	find(name)
}

func TestTryIngress(t *testing.T) {
	lab.Require(t)
	if err := netcfg.TryIngress(verdict(t, -1)); err != nil {
		t.Error(err)
	}
	if err := netcfg.TryIngress(-1); err == nil {
		t.Error("no program at all can be attached")
	}
}
