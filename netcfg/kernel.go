package netcfg

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Options say where a [Netlink] works and what it takes for ours.
type Options struct {
	// Layout is the number space that is ours. With the zero Layout every address
	// with [Protocol] counts as ours in a Snapshot.
	Layout Layout

	// StateDir keeps the list of our addresses on kernels without IFA_PROTO
	// (below 5.18). "" is [DefaultStateDir].
	StateDir string

	// NoAddrProto works as on a kernel without IFA_PROTO.
	NoAddrProto bool
}

// Netlink is the kernel of one network namespace: that of the thread which
// called [Open]. Its methods may be called from any goroutine.
type Netlink struct {
	opt     Options
	ns      *os.File // the namespace, for sockets and files opened later
	sock    *nl.SocketHandle
	tc      *netlink.Handle // for programs on interfaces
	ipv6    bool
	proto   bool // IFA_PROTO is kept
	journal *journal
}

// Open binds to the network namespace of the calling thread. It changes nothing.
func Open(opt Options) (*Netlink, error) {
	if opt.StateDir == "" {
		opt.StateDir = DefaultStateDir
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		_ = ns.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	k := &Netlink{opt: opt, ns: ns, sock: &nl.SocketHandle{Socket: sock}}
	// Explanations beside the error numbers; a kernel without them is none the worse.
	_ = sock.SetExtAck(true)
	_ = sock.SetReceiveTimeout(&unix.Timeval{Sec: 10})
	_ = sock.SetSendTimeout(&unix.Timeval{Sec: 10})
	if k.tc, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		_ = k.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	_, err = os.Stat("/proc/thread-self/net/if_inet6")
	k.ipv6 = err == nil
	k.proto = !opt.NoAddrProto && kernelAtLeast(5, 18)
	if !k.proto {
		if k.journal, err = openJournal(opt, ns); err != nil {
			_ = k.Close()
			return nil, err
		}
	}
	return k, nil
}

// Read takes a snapshot of the calling thread's network namespace.
func Read() (*Snapshot, error) {
	k, err := Open(Options{})
	if err != nil {
		return nil, err
	}
	s, err := k.Read()
	return s, errors.Join(err, k.Close())
}

// Close gives the sockets back.
func (k *Netlink) Close() error {
	k.sock.Close()
	if k.tc != nil {
		k.tc.Close()
	}
	return k.ns.Close()
}

// dumpTries is how often a dump that was interrupted by a change is taken again.
const dumpTries = 4

// dump asks for a list and calls f with the body of every answer, between calls
// of begin, which has to forget what an earlier, interrupted try gave. whole is
// false when even the last try was interrupted.
func (k *Netlink) dump(typ, answer uint16, body []byte, begin func(), f func([]byte) error) (whole bool, err error) {
	for range dumpTries {
		begin()
		var bad error
		req := k.request(typ, unix.NLM_F_DUMP, body)
		err = req.ExecuteIter(unix.NETLINK_ROUTE, answer, func(b []byte) bool {
			bad = f(b)
			return bad == nil
		})
		if bad != nil {
			return false, bad
		}
		if err == nil || !errors.Is(err, nl.ErrDumpInterrupted) {
			return err == nil, err
		}
	}
	return false, nil
}

func (k *Netlink) request(typ uint16, flags int, body []byte) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(int(typ), flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: k.sock}
	req.AddRawData(body)
	return req
}

// part says what of a snapshot has to be read again.
type part uint8

const (
	partLinks part = 1 << iota
	partAddrs
	partRoutes
	partRules
	partAll = partLinks | partAddrs | partRoutes | partRules

	parts = 4 // their number
)

// Read takes a snapshot.
func (k *Netlink) Read() (*Snapshot, error) { return k.reread(nil, partAll) }

// ReadAddrs takes a snapshot whose addresses are new and whose rest is that of an
// earlier one. What an interrupted list skips is taken to be there still.
func (k *Netlink) ReadAddrs(old *Snapshot) (*Snapshot, error) {
	s, err := k.reread(old, partAddrs)
	if err == nil && s.partial {
		s = s.carryOver(old, nil)
	}
	return s, err
}

// reread takes the named parts from the kernel and the others from old.
func (k *Netlink) reread(old *Snapshot, what part) (*Snapshot, error) {
	var links map[int]Link
	var addrs []Address
	var routes []Route
	var rules []Rule
	var begun [parts]time.Time
	if old == nil {
		what = partAll
	} else {
		links, addrs, routes, rules, begun = old.Links, old.list, old.Routes, old.Rules, old.begun
	}
	whole := true
	for i, p := range []struct {
		part part
		name string
		read func() (bool, error)
	}{
		{partLinks, "interfaces", func() (ok bool, err error) { links, ok, err = k.readLinks(); return ok, err }},
		{partAddrs, "addresses", func() (ok bool, err error) { addrs, ok, err = k.readAddrs(); return ok, err }},
		{partRoutes, "routes", func() (ok bool, err error) { routes, ok, err = k.readRoutes(); return ok, err }},
		{partRules, "rules", func() (ok bool, err error) { rules, ok, err = k.readRules(); return ok, err }},
	} {
		if what&p.part == 0 {
			continue
		}
		begun[i] = time.Now()
		ok, err := p.read()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", p.name, err)
		}
		whole = whole && ok
	}
	s := newSnapshot(links, addrs, routes, rules)
	s.IPv6, s.AddrProto, s.partial, s.begun = k.ipv6, k.proto, !whole, begun
	return s, nil
}

func (k *Netlink) readLinks() (links map[int]Link, whole bool, err error) {
	body := make(message, unix.SizeofIfInfomsg)
	body.u32(unix.IFLA_EXT_MASK, skipStats)
	whole, err = k.dump(unix.RTM_GETLINK, unix.RTM_NEWLINK, body,
		func() { links = make(map[int]Link) },
		func(b []byte) error {
			l, err := parseLink(b)
			links[l.Index] = l
			return err
		})
	return links, whole, err
}

func (k *Netlink) readAddrs() (addrs []Address, whole bool, err error) {
	recorded := k.journal.entries()
	whole, err = k.dump(unix.RTM_GETADDR, unix.RTM_NEWADDR, make([]byte, unix.SizeofIfAddrmsg),
		func() { addrs = nil },
		func(b []byte) error {
			a, err := parseAddr(b)
			if err != nil || !a.Addr.IsValid() {
				return err
			}
			if k.proto {
				a.Ours = a.Protocol == Protocol && k.opt.Layout.ownsTable(a.Metric)
			} else {
				a.Ours = recorded[journalKey{a.LinkIndex, a.Addr}]
			}
			addrs = append(addrs, a)
			return nil
		})
	return addrs, whole, err
}

func (k *Netlink) readRoutes() (routes []Route, whole bool, err error) {
	whole = true
	for _, f := range k.families() {
		body := make([]byte, unix.SizeofRtMsg)
		body[0] = byte(f)
		var some []Route
		ok, err := k.dump(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, body,
			func() { some = nil },
			func(b []byte) error {
				r, ok, err := parseRoute(b)
				if ok && r.Family == f && k.keeps(r) {
					some = append(some, r)
				}
				return err
			})
		if err != nil {
			return nil, false, err
		}
		whole = whole && ok
		routes = append(routes, some...)
	}
	return routes, whole, nil
}

// keeps says whether a route belongs into a Snapshot.
func (k *Netlink) keeps(r Route) bool {
	switch {
	case r.Type == RouteLocal, r.Table == TableLocal:
		return r.Protocol != unix.RTPROT_KERNEL
	case r.Table == TableMain && r.isConnected():
		return true
	}
	return r.Type != unix.RTN_BROADCAST && r.Type != unix.RTN_ANYCAST && r.Type != unix.RTN_MULTICAST &&
		(r.Dst.Bits() == 0 || r.Protocol == Protocol || k.opt.Layout != Layout{} && k.opt.Layout.ownsTable(r.Table))
}

// isConnected says whether the route leads to neighbours on its interface.
func (r Route) isConnected() bool {
	return r.Type == RouteUnicast && !r.Gateway.IsValid() && !r.Other && r.LinkIndex != 0 && r.Dst.Bits() > 0
}

func (k *Netlink) readRules() (rules []Rule, whole bool, err error) {
	whole = true
	for _, f := range k.families() {
		body := make([]byte, unix.SizeofRtMsg)
		body[0] = byte(f)
		var some []Rule
		ok, err := k.dump(unix.RTM_GETRULE, unix.RTM_NEWRULE, body,
			func() { some = nil },
			func(b []byte) error {
				r, ok, err := parseRule(b)
				if ok && r.Family == f {
					some = append(some, r)
				}
				return err
			})
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil, false, fmt.Errorf("this kernel has no policy routing (IP_MULTIPLE_TABLES): %w", err)
		}
		if err != nil {
			return nil, false, err
		}
		whole = whole && ok
		rules = append(rules, some...)
	}
	return rules, whole, nil
}

func (k *Netlink) families() []Family {
	if !k.ipv6 {
		return []Family{IPv4}
	}
	return []Family{IPv4, IPv6}
}

// inNamespace runs f on a thread of k's namespace. It needs CAP_SYS_ADMIN only
// when the caller's thread is in another one.
func (k *Netlink) inNamespace(f func() error) error {
	runtime.LockOSThread()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open the network namespace: %w", err)
	}
	defer func() { _ = here.Close() }()
	if sameFile(here, k.ns) {
		defer runtime.UnlockOSThread()
		return f()
	}
	if err := unix.Setns(int(k.ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	err = f()
	if back := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked, so that it ends with its goroutine.
		return errors.Join(err, fmt.Errorf("leave the network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

func sameFile(a, b *os.File) bool {
	sa, errA := a.Stat()
	sb, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// kernelAtLeast compares with the running kernel's release.
func kernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false
	}
	return releaseAtLeast(unix.ByteSliceToString(u.Release[:]), major, minor)
}

func releaseAtLeast(release string, major, minor int) bool {
	var gotMajor, gotMinor int
	if _, err := fmt.Sscanf(strings.TrimSpace(release), "%d.%d", &gotMajor, &gotMinor); err != nil {
		return false
	}
	return gotMajor > major || gotMajor == major && gotMinor >= minor
}

// journalKey names one address of ours in a namespace.
type journalKey struct {
	link int
	addr netip.Addr
}

// Do carries out one change. The error wraps the kernel's error number.
func (k *Netlink) Do(o Op) error {
	add, del := 0, unix.NLM_F_ACK
	switch o.Verb {
	case Add:
		add = unix.NLM_F_CREATE | unix.NLM_F_EXCL | unix.NLM_F_ACK
	case Replace:
		add = unix.NLM_F_CREATE | unix.NLM_F_REPLACE | unix.NLM_F_ACK
	}
	deleting := o.Verb == Delete
	switch o.Kind {
	case KindRoute:
		if deleting {
			return k.send(unix.RTM_DELROUTE, del, encodeRoute(o.Route))
		}
		return k.send(unix.RTM_NEWROUTE, add, encodeRoute(o.Route))
	case KindRule:
		if deleting {
			return k.send(unix.RTM_DELRULE, del, encodeRule(o.Rule))
		}
		return k.send(unix.RTM_NEWRULE, add, encodeRule(o.Rule))
	case KindAddress:
		if deleting {
			return k.deleteAddr(o.Addr)
		}
		return k.addAddr(o, add)
	}
	return fmt.Errorf("operation of kind %d: %w", o.Kind, unix.EINVAL)
}

func (k *Netlink) send(typ uint16, flags int, body []byte) error {
	_, err := k.request(typ, flags, body).Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func (k *Netlink) addAddr(o Op, flags int) error {
	if err := k.journal.add(o.Addr.LinkIndex, o.Dev, o.Addr.Addr); err != nil {
		return err
	}
	err := k.send(unix.RTM_NEWADDR, flags, encodeAddr(o.Addr))
	if err != nil {
		err = errors.Join(err, k.journal.remove(o.Addr.LinkIndex, o.Addr.Addr))
	}
	return err
}

func (k *Netlink) deleteAddr(a Address) error {
	err := k.send(unix.RTM_DELADDR, unix.NLM_F_ACK, encodeAddr(a))
	if err == nil || isGone(err) {
		err = errors.Join(err, k.journal.remove(a.LinkIndex, a.Addr))
	}
	return err
}
