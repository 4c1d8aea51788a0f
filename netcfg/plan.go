package netcfg

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Kernel is the network state of a namespace: [Netlink], or a fake.
type Kernel interface {
	Read() (*Snapshot, error)
	Do(Op) error
}

// Verb is what an Op does.
type Verb uint8

// The verbs. Replace puts a route in the place of one of ours with the same table,
// destination and metric.
const (
	Add Verb = iota
	Replace
	Delete
)

// Kind is what an Op is about.
type Kind uint8

// The kinds.
const (
	KindRoute Kind = iota
	KindAddress
	KindRule
)

// Op is one change of the kernel's state.
type Op struct {
	Verb  Verb
	Kind  Kind
	Route Route // of KindRoute
	Addr  Address
	Rule  Rule
	Dev   string // the interface's name, for routes and addresses that have one
}

// Plan is what leads from a Snapshot to a Want, in order: unreachable defaults,
// routes, addresses, rules, exceptions for gateways and local routes are added; then
// local routes, exceptions, rules, addresses, routes and unreachable defaults are
// deleted. So a rule never leads to a table that its packets could fall out of, and a
// gateway is never taken for the host itself.
type Plan struct {
	Ops []Op

	// Notes say what of the Want cannot be had at present, and why.
	Notes []string

	// Conflicts are routes in our tables that are not ours. They are left as they
	// are; Apply does the rest and returns [ErrConflict].
	Conflicts []string
}

// ErrConflict says that somebody else uses our routing tables.
var ErrConflict = errors.New("routing table is used by another program")

// Diff gives the changes that make have what want asks for. It is pure; the same
// arguments give the same plan. have has to be read with want's Layout.
func Diff(have *Snapshot, want Want) Plan {
	w := want.spell(have)
	p := Plan{Notes: w.notes}
	dev := func(index int) string { return have.Links[index].Name }

	ours := make(map[routeKey]Route)
	foreign := make(map[routeKey]Route)
	used := make(map[uint32]bool, len(want.Uplinks))
	for _, u := range want.Uplinks {
		used[want.Table(u)] = true
	}
	if len(want.Diverts) > 0 {
		for _, t := range []uint32{want.Layout.divertTable(), want.Layout.restTable(), want.Layout.answersTable()} {
			used[t] = true
		}
	}
	for _, r := range have.Routes {
		r.Down = false
		switch {
		case want.Layout.ownsRoute(r):
			ours[r.key()] = r
		case used[r.Table]:
			foreign[r.key()] = r
			op := Op{Kind: KindRoute, Route: r, Dev: dev(r.LinkIndex)}
			p.Conflicts = append(p.Conflicts, fmt.Sprintf("table %d holds %s", r.Table, op.routeWords()))
		}
	}
	for _, r := range w.routes {
		old, there := ours[r.key()]
		delete(ours, r.key())
		_, taken := foreign[r.key()]
		op := Op{Kind: KindRoute, Route: r, Dev: dev(r.LinkIndex)}
		switch {
		case there && old == r, taken:
			continue
		case there:
			op.Verb = Replace
		}
		p.Ops = append(p.Ops, op)
	}
	for _, r := range ours {
		p.Ops = append(p.Ops, Op{Verb: Delete, Kind: KindRoute, Route: r, Dev: dev(r.LinkIndex)})
	}

	wanted := make(map[journalKey]bool, len(w.addrs))
	for _, a := range w.addrs {
		k := journalKey{a.LinkIndex, a.Addr}
		wanted[k] = true
		if !slices.ContainsFunc(have.Addrs[a.Addr], func(o Address) bool { return o.LinkIndex == a.LinkIndex }) {
			p.Ops = append(p.Ops, Op{Kind: KindAddress, Addr: a, Dev: dev(a.LinkIndex)})
		}
	}
	for _, a := range have.list {
		if want.Layout.ownsAddr(a, have.AddrProto) && !wanted[journalKey{a.LinkIndex, a.Addr}] {
			p.Ops = append(p.Ops, Op{Verb: Delete, Kind: KindAddress, Addr: a, Dev: dev(a.LinkIndex)})
		}
	}

	for _, r := range w.rules {
		if !slices.Contains(have.Rules, r) {
			p.Ops = append(p.Ops, Op{Kind: KindRule, Rule: r})
		}
	}
	for _, r := range have.Rules {
		if want.Layout.ownsRule(r) && !slices.Contains(w.rules, r) {
			p.Ops = append(p.Ops, Op{Verb: Delete, Kind: KindRule, Rule: r})
		}
	}
	slices.SortFunc(p.Ops, compareOps)
	return p
}

// routeKey is what two routes cannot share in the kernel.
type routeKey struct {
	family Family
	table  uint32
	dst    netip.Prefix
	metric uint32
}

func (r Route) key() routeKey { return routeKey{r.Family, r.Table, r.Dst, r.Metric} }

// isLastResort says whether a route is the end of a table of ours.
func (r Route) isLastResort() bool { return r.Type == RouteUnreachable && r.Dst.Bits() == 0 }

// isException says whether a route of table local takes an address out of a prefix
// that is the host's own.
func (r Route) isException() bool { return r.Table == TableLocal && r.Type != RouteLocal }

// step is an Op's place in the order of a Plan.
func (o Op) step() int {
	var n int
	switch {
	case o.isLastResort():
		n = 1
	case o.isException():
		n = 7 // after rules, without which the kernel keeps tables local and main as one
	case o.isLocal():
		n = 8
	case o.Kind == KindRoute && !o.Route.Gateway.IsValid():
		n = 2
	case o.Kind == KindRoute:
		n = 3 // after the prefix that its gateway is in
	case o.Kind == KindAddress:
		n = 4
	case o.Rule.Mask != 0:
		n = 5
	default:
		n = 6
	}
	if o.Verb == Delete {
		n = 20 - n
	}
	return n
}

func compareOps(a, b Op) int {
	return cmp.Or(cmp.Compare(a.step(), b.step()), compareRoute(a.Route, b.Route), compareAddress(a.Addr, b.Addr),
		cmp.Compare(a.Rule.Family, b.Rule.Family), cmp.Compare(a.Rule.Table, b.Rule.Table),
		cmp.Compare(a.Rule.Priority, b.Rule.Priority), a.Rule.Src.Addr().Compare(b.Rule.Src.Addr()),
		a.Rule.Dst.Addr().Compare(b.Rule.Dst.Addr()), cmp.Compare(a.Rule.Dst.Bits(), b.Rule.Dst.Bits()),
		cmp.Compare(a.Rule.IIF, b.Rule.IIF), cmp.Compare(a.Rule.IPProto, b.Rule.IPProto),
		cmp.Compare(a.Rule.DPort.First, b.Rule.DPort.First), cmp.Compare(a.Rule.DPort.Last, b.Rule.DPort.Last))
}

// Touches says whether the plan is about addresses, and whether it is about
// anything else.
func (p Plan) Touches() (addrs, rest bool) {
	for i := range p.Ops {
		if p.Ops[i].Kind == KindAddress {
			addrs = true
		} else {
			rest = true
		}
	}
	return addrs, rest
}

// Empty says whether there is nothing to do.
func (p Plan) Empty() bool { return len(p.Ops) == 0 }

// Adds is the part of the plan that takes nothing away, for a daemon that lets its
// connections drain before it carries out [Plan.Deletes].
func (p Plan) Adds() Plan {
	p.Ops = slices.DeleteFunc(slices.Clone(p.Ops), func(o Op) bool { return o.Verb == Delete })
	return p
}

// Deletes is the part of the plan that takes away.
func (p Plan) Deletes() Plan {
	p.Ops = slices.DeleteFunc(slices.Clone(p.Ops), func(o Op) bool { return o.Verb != Delete })
	return p
}

// Commands gives the plan as commands of the program ip.
func (p Plan) Commands() []string {
	out := make([]string, len(p.Ops))
	for i, o := range p.Ops {
		out[i] = o.String()
	}
	return out
}

// String is the change as a command of the program ip.
func (o Op) String() string {
	six := ""
	switch o.Kind {
	case KindRoute:
		if o.Route.Family == IPv6 {
			six = " -6"
		}
		return "ip" + six + " route " + o.verb() + " " + o.routeWords()
	case KindAddress:
		words := fmt.Sprintf("ip addr %s %s/%d dev %s", o.verb(), o.Addr.Addr, o.Addr.Prefix, o.Dev)
		if o.Verb == Delete {
			return words
		}
		if o.Addr.Protocol != 0 {
			words += fmt.Sprintf(" proto %d", o.Addr.Protocol)
		}
		words += fmt.Sprintf(" metric %d noprefixroute", o.Addr.Metric)
		if o.Addr.Deprecated {
			words += " preferred_lft 0"
		}
		return words
	}
	r := o.Rule
	if r.Family == IPv6 {
		six = " -6"
	}
	table := tableName(r.Table)
	if r.Near {
		table += " suppress_prefixlength 0"
	}
	return fmt.Sprintf("ip%s rule %s priority %d from %s%s lookup %s proto %d",
		six, o.verb(), r.Priority, prefixOrAll(r.Src), r.selectors(), table, r.Protocol)
}

func (o Op) verb() string {
	switch o.Verb {
	case Replace:
		return "replace"
	case Delete:
		return "del"
	}
	return "add"
}

func (o Op) routeWords() string {
	r := o.Route
	var b strings.Builder
	switch r.Type {
	case RouteUnicast:
	case RouteUnreachable:
		b.WriteString("unreachable ")
	case RouteLocal:
		b.WriteString("local ")
	case RouteThrow:
		b.WriteString("throw ")
	default:
		fmt.Fprintf(&b, "type %d ", r.Type)
	}
	if r.Dst.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(r.Dst.String())
	}
	if r.Gateway.IsValid() {
		b.WriteString(" via " + r.Gateway.String())
	}
	if r.LinkIndex != 0 {
		b.WriteString(" dev " + o.Dev)
	}
	if r.OnLink {
		b.WriteString(" onlink")
	}
	if r.Scope == unix.RT_SCOPE_LINK {
		b.WriteString(" scope link")
	}
	fmt.Fprintf(&b, " table %s proto %d metric %d", tableName(r.Table), r.Protocol, r.Metric)
	return b.String()
}

// maxErrors is how many failed operations an error names.
const maxErrors = 20

// ground is the table of one family that a rule stands on.
type ground struct {
	family Family
	table  uint32
}

// Apply carries the plan out. What fails is named in the error and the rest goes
// on, but for what stands on it: a rule is not added when its table's unreachable
// default could not be, and that route is not deleted while a rule leads to it; the
// same holds for a local route and the exceptions in it. Without permission it stops
// at once. What a deletion finds gone is no error.
func (p Plan) Apply(k Kernel) error {
	var errs []error
	failed := 0
	fail := func(o Op, err error) {
		if failed++; failed <= maxErrors {
			errs = append(errs, fmt.Errorf("%s: %w", o, err))
		}
	}
	done := undone{bare: make(map[ground]bool), leadTo: make(map[ground]bool)}
	var ahead []error // of the changes of addresses that come next, and are carried out
	for i, o := range p.Ops {
		if err := done.forbids(o); err != nil {
			fail(o, err)
			continue
		}
		var err error
		if o.Kind == KindAddress {
			if len(ahead) == 0 {
				n := slices.IndexFunc(p.Ops[i:], func(o Op) bool { return o.Kind != KindAddress })
				if n < 0 {
					n = len(p.Ops) - i
				}
				ahead = addresses(k, p.Ops[i:i+n])
			}
			err, ahead = ahead[0], ahead[1:]
		} else {
			err = k.Do(o)
		}
		if err == nil || o.Verb == Delete && isGone(err) || o.Kind == KindAddress && o.Verb == Add && errors.Is(err, unix.EEXIST) {
			continue
		}
		fail(o, err)
		if errors.Is(err, unix.EPERM) {
			break
		}
		done.failed(o)
	}
	if failed > maxErrors {
		errs = append(errs, fmt.Errorf("and %d more operations failed", failed-maxErrors))
	}
	if len(p.Conflicts) > 0 {
		errs = append(errs, fmt.Errorf("%w: %s", ErrConflict, strings.Join(p.Conflicts, "; ")))
	}
	return errors.Join(errs...)
}

// makeTries is how often Make looks again at a host that goes on changing.
const makeTries = 5

// Make carries out what pick leaves of the difference between have and want, and
// returns that plan; a nil pick leaves all. What failed is looked at again, and tried
// again while it is still wanted: a link that went down after have was read takes
// no routes, and lacks none.
func Make(k Kernel, have *Snapshot, want Want, pick func(Plan) Plan) (Plan, error) {
	if pick == nil {
		pick = func(p Plan) Plan { return p }
	}
	first := pick(Diff(have, want))
	err := first.Apply(k)
	for range makeTries - 1 {
		if err == nil || errors.Is(err, unix.EPERM) || errors.Is(err, ErrConflict) {
			break
		}
		now, readErr := k.Read()
		if readErr != nil {
			return first, errors.Join(err, readErr)
		}
		err = pick(Diff(now, want)).Apply(k)
	}
	return first, err
}

// What keeps the order of things when a step of it failed.
var (
	errUnsafe  = errors.New("left undone: packets could fall through to another uplink")
	errGateway = errors.New("left undone: the gateway would be taken for the host itself")
)

// undone is what failed of a plan that other steps stand on.
type undone struct {
	bare   map[ground]bool // without an unreachable default
	leadTo map[ground]bool // with a rule that could not be deleted
	inside []netip.Addr    // gateways whose exception could not be made
	own    []netip.Prefix  // whose local route could not be deleted
}

func (o Op) ground() ground {
	if o.Kind == KindRule {
		return ground{o.Rule.Family, o.Rule.Table}
	}
	return ground{o.Route.Family, o.Route.Table}
}

func (u *undone) forbids(o Op) error {
	adds, dst := o.Verb != Delete, o.Route.Dst
	switch {
	case o.Kind == KindRule && adds && u.bare[o.ground()], o.isLastResort() && !adds && u.leadTo[o.ground()]:
		return errUnsafe
	case o.isLocal() && adds && slices.ContainsFunc(u.inside, dst.Contains),
		o.isException() && !adds && slices.ContainsFunc(u.own, func(p netip.Prefix) bool { return contains(p, dst) }):
		return errGateway
	}
	return nil
}

func (u *undone) failed(o Op) {
	switch adds := o.Verb != Delete; {
	case o.isLastResort() && adds:
		u.bare[o.ground()] = true
	case o.Kind == KindRule && !adds:
		u.leadTo[o.ground()] = true
	case o.isException() && adds:
		u.inside = append(u.inside, o.Route.Dst.Addr())
	case o.isLocal() && !adds:
		u.own = append(u.own, o.Route.Dst)
	}
}

func (o Op) isLastResort() bool { return o.Kind == KindRoute && o.Route.isLastResort() }
func (o Op) isException() bool  { return o.Kind == KindRoute && o.Route.isException() }
func (o Op) isLocal() bool {
	return o.Kind == KindRoute && o.Route.Table == TableLocal && o.Route.Type == RouteLocal
}

// isGone says whether an error of a deletion means that nothing is left to delete.
func isGone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) ||
		errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV)
}

// Reconcile makes the kernel what want asks for when a change may have undone some
// of it, and logs what it did; n is the number of changes. Without a difference
// between have and want it asks the kernel nothing.
func Reconcile(k Kernel, have *Snapshot, want Want, log *slog.Logger) (n int, err error) {
	if Diff(have, want).Empty() {
		return 0, nil
	}
	// have may be from before our own last change.
	have, err = k.Read()
	if err != nil {
		return 0, err
	}
	p := Diff(have, want)
	for i, c := range p.Commands() {
		if i == maxErrors {
			log.Warn("network state put back", "more", len(p.Ops)-i)
			break
		}
		log.Warn("network state put back", "command", c)
	}
	if p.Empty() {
		return 0, nil
	}
	return len(p.Ops), p.Apply(k)
}

// AwaitDAD waits until duplicate address detection is over for all addresses of
// ours (about 1.5 s after they were added) and gives those that other hosts have.
// An address whose interface is not up is not waited for.
func AwaitDAD(ctx context.Context, k Kernel) (duplicate []netip.Addr, err error) {
	for {
		s, err := k.Read()
		if err != nil {
			return nil, err
		}
		waiting := 0
		duplicate = duplicate[:0]
		for _, a := range s.list {
			switch {
			case !a.Ours:
			case a.DadFailed:
				duplicate = append(duplicate, a.Addr)
			case a.Tentative && s.Links[a.LinkIndex].Up:
				waiting++
			}
		}
		if waiting == 0 {
			return duplicate, nil
		}
		select {
		case <-ctx.Done():
			return duplicate, fmt.Errorf("%d addresses are still tentative: %w", waiting, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
