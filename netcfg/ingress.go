package netcfg

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Where the kernel has no links of programs to interfaces (tcx, Linux 6.6) a program
// goes on what comes in by one as a filter of the queueing discipline clsact (4.5). A
// filter has a name, which says whose it is; it lasts until it, the discipline or the
// interface is removed.

// ErrNoClsact says that the kernel was built without clsact, or without filters that
// are eBPF programs.
var ErrNoClsact = errors.New("no clsact with eBPF filters in this kernel")

// Filters with a name that begins with ourFilters are wayout's, this daemon's or
// another's. A discipline has no name: the end madeClsact of a filter's says that
// wayout has made it, so that the last such filter takes it along.
const (
	ourFilters = "wayout-"
	madeClsact = " made clsact"
)

// SetIngress puts a program, given by its descriptor, on what comes in by an
// interface: in the place of the filter of that name by one atomic step, else as a
// new one, before those of others that are eBPF programs as well. A filter of another
// kind that has the first priority stays before it. The name begins with "wayout-".
// The error wraps unix.ENODEV where there is no such interface, and ErrNoClsact.
func (k *Netlink) SetIngress(index int, name string, prog int) error {
	if !strings.HasPrefix(name, ourFilters) {
		return fmt.Errorf("program on interface %d: name %q", index, name)
	}
	if err := k.setIngress(index, name, prog); err != nil {
		return fmt.Errorf("attach a program to interface %d: %w", index, err)
	}
	return nil
}

func (k *Netlink) setIngress(index int, name string, prog int) error {
	err := noClsact(k.tc.QdiscAdd(clsact(index)))
	made := err == nil
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	all, err := k.filters(index, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return err
	}
	if f := filterOf(all, name); f != nil {
		f.Fd = prog
		return k.tc.FilterReplace(f)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Protocol: unix.ETH_P_ALL, Priority: freePriority(all),
		},
		Fd: prog, Name: name, DirectAction: true,
	}
	if made || slices.ContainsFunc(all, tellsMade) {
		f.Name += madeClsact
	}
	err = noClsact(k.tc.FilterAdd(f))
	if err != nil && made {
		err = errors.Join(err, k.tc.QdiscDel(clsact(index)))
	}
	return err
}

// UnsetIngress takes off what SetIngress has put on, and the discipline if it is
// wayout's and has nothing left. What is not there is no error.
func (k *Netlink) UnsetIngress(index int, name string) error {
	if err := k.unsetIngress(index, name); err != nil {
		return fmt.Errorf("detach a program from interface %d: %w", index, err)
	}
	return nil
}

func (k *Netlink) unsetIngress(index int, name string) error {
	all, err := k.filters(index, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return err
	}
	f := filterOf(all, name)
	if f == nil {
		return nil
	}
	f.Fd = -1
	if err := k.tc.FilterDel(f); err != nil && !isGone(err) {
		return err
	}
	if !tellsMade(f) {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if left, err := k.filters(index, parent); err != nil || len(left) > 0 {
			return err
		}
	}
	if err := k.tc.QdiscDel(clsact(index)); err != nil && !isGone(err) {
		return err
	}
	return nil
}

// Ingresses lists the interfaces that have a program by that name.
func (k *Netlink) Ingresses(name string) ([]int, error) {
	indexes, err := k.ingressLinks()
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	var found []int
	for _, index := range indexes {
		all, err := k.filters(index, netlink.HANDLE_MIN_INGRESS)
		if err != nil {
			return nil, fmt.Errorf("list the programs on interface %d: %w", index, err)
		}
		if filterOf(all, name) != nil {
			found = append(found, index)
		}
	}
	return found, nil
}

// TryIngress tries whether a program can be put on what comes in by an interface: on
// one of a network namespace that is made for it. Without the right to make one
// (CAP_SYS_ADMIN) nothing is tried, and there is no error.
func TryIngress(prog int) error {
	tried := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread and its namespace end here
		tried <- tryIngress(prog)
	}()
	return <-tried
}

func tryIngress(prog int) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil
		}
		return fmt.Errorf("make a network namespace: %w", err)
	}
	k, err := Open(Options{})
	if err != nil {
		return err
	}
	const loopback = 1
	return errors.Join(k.setIngress(loopback, ourFilters+"trial", prog), k.Close())
}

func clsact(index int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// What others have made is read here and not by the library, which would read all of
// it, and fail where it cannot.

// ingressLinks lists the interfaces with one of the disciplines, clsact or ingress,
// that have filters on what comes in.
func (k *Netlink) ingressLinks() (all []int, err error) {
	_, err = k.dump(unix.RTM_GETQDISC, unix.RTM_NEWQDISC, (&nl.TcMsg{}).Serialize(), func() { all = nil }, func(b []byte) error {
		if len(b) < nl.SizeofTcMsg {
			return fmt.Errorf("a queueing discipline of %d bytes", len(b))
		}
		if m := nl.DeserializeTcMsg(b); m.Handle == netlink.MakeHandle(0xffff, 0) {
			all = append(all, int(m.Ifindex))
		}
		return nil
	})
	return all, err
}

// filters lists those of an interface. The discipline ingress takes the same parent
// for them as clsact.
func (k *Netlink) filters(index int, parent uint32) (all []netlink.Filter, err error) {
	ask := &nl.TcMsg{Ifindex: int32(index), Parent: parent}
	_, err = k.dump(unix.RTM_GETTFILTER, unix.RTM_NEWTFILTER, ask.Serialize(), func() { all = nil }, func(b []byte) error {
		f, err := parseFilter(b)
		all = append(all, f)
		return err
	})
	if isGone(err) || errors.Is(err, unix.EINVAL) { // neither discipline, nor filters
		return nil, nil
	}
	return all, err
}

// parseFilter reads whose a filter is and where it stands. Of an eBPF program it is a
// BpfFilter, with a name; one without a handle is what a priority begins with.
func parseFilter(b []byte) (netlink.Filter, error) {
	if len(b) < nl.SizeofTcMsg {
		return nil, fmt.Errorf("a filter of %d bytes", len(b))
	}
	m := nl.DeserializeTcMsg(b)
	a := netlink.FilterAttrs{LinkIndex: int(m.Ifindex), Handle: m.Handle, Parent: m.Parent}
	a.Priority, a.Protocol = netlink.MajorMinor(m.Info)
	a.Protocol = nl.Swap16(a.Protocol)
	var kind, name string
	err := eachAttr(b[nl.SizeofTcMsg:], func(typ uint16, v []byte) (err error) {
		switch {
		case typ == nl.TCA_KIND:
			kind = attrString(v)
		case typ == nl.TCA_CHAIN:
			var chain uint32
			chain, err = attrU32(v)
			a.Chain = &chain
		case typ == nl.TCA_OPTIONS && kind == "bpf": // the kind comes first
			err = eachAttr(v, func(typ uint16, v []byte) error {
				if typ == nl.TCA_BPF_NAME {
					name = attrString(v)
				}
				return nil
			})
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("a filter: %w", err)
	}
	if kind != "bpf" {
		return &netlink.GenericFilter{FilterAttrs: a, FilterType: kind}, nil
	}
	return &netlink.BpfFilter{FilterAttrs: a, Name: name, Fd: -1, DirectAction: true}, nil
}

// filterOf finds the filter of a name; nil when there is none.
func filterOf(all []netlink.Filter, name string) *netlink.BpfFilter {
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok && strings.TrimSuffix(b.Name, madeClsact) == name {
			return b
		}
	}
	return nil
}

func tellsMade(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && strings.HasPrefix(b.Name, ourFilters) && strings.HasSuffix(b.Name, madeClsact)
}

// freePriority is the first one that can hold an eBPF program for every protocol: all
// filters of a priority are of one kind and protocol, and a new one comes first.
func freePriority(all []netlink.Filter) uint16 {
	for p := uint16(1); ; p++ {
		if !slices.ContainsFunc(all, func(f netlink.Filter) bool {
			a := f.Attrs()
			return a.Priority == p && (a.Chain == nil || *a.Chain == 0) && (f.Type() != "bpf" || a.Protocol != unix.ETH_P_ALL)
		}) {
			return p
		}
	}
}

// noClsact tells the one error that is the kernel's: a kind it does not know.
func noClsact(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: %w", ErrNoClsact, err)
	}
	return err
}
