package netcfg

import (
	"cmp"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Family is an address family; the values are those of AF_INET and AF_INET6.
type Family uint8

// The two families.
const (
	IPv4 Family = unix.AF_INET
	IPv6 Family = unix.AF_INET6
)

func familyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

func (f Family) zero() netip.Addr {
	if f == IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// defaultPrefix is 0.0.0.0/0 or ::/0.
func (f Family) defaultPrefix() netip.Prefix { return netip.PrefixFrom(f.zero(), 0) }

// String is "IPv4" or "IPv6".
func (f Family) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	}
	return fmt.Sprintf("family %d", uint8(f))
}

// Tables that every Linux host has.
const (
	TableMain  uint32 = unix.RT_TABLE_MAIN
	TableLocal uint32 = unix.RT_TABLE_LOCAL
)

// RouteType is the kernel's RTN_ number.
type RouteType uint8

// The route types that matter here.
const (
	RouteUnicast     RouteType = unix.RTN_UNICAST
	RouteLocal       RouteType = unix.RTN_LOCAL
	RouteUnreachable RouteType = unix.RTN_UNREACHABLE
	RouteThrow       RouteType = unix.RTN_THROW // the lookup goes on with the next rule
)

// rejects says whether a packet that meets such a route goes nowhere.
func (t RouteType) rejects() bool {
	switch t {
	case RouteUnreachable, RouteThrow, unix.RTN_BLACKHOLE, unix.RTN_PROHIBIT:
		return true
	}
	return false
}

// Link is a network interface.
type Link struct {
	Index    int
	Name     string
	Kind     string  // "veth", "bridge"; "" for hardware and loopback
	MAC      [6]byte // zero where the link has no Ethernet address
	Admin    bool    // set up by the administrator
	Up       bool    // Admin, and the operational state (RFC 2863) is up or unknown
	Loopback bool
	Reason   string // why it is not Up, as a sentence without a full stop; "" when it is
}

// Address is an address on an interface.
type Address struct {
	Addr      netip.Addr
	Prefix    int        // length of its on-link prefix in bits
	Peer      netip.Addr // far end of a point-to-point link; the zero Addr when there is none
	Broadcast netip.Addr // the zero Addr when there is none
	LinkIndex int
	Metric    uint32 // IFA_RT_PRIORITY; on an address of ours: the table of its uplink
	Protocol  uint8  // IFA_PROTO; 0 below Linux 5.18 and when nobody set it

	Tentative     bool // IPv6: duplicate address detection goes on, it cannot be bound
	DadFailed     bool // IPv6: another host has it
	Deprecated    bool // IPv6: its preferred lifetime is over; it can still be bound
	NoPrefixRoute bool
	LinkScope     bool // scope link, host or nowhere: not for use beyond the link
	Ours          bool // put there by wayout, in the number space of the reader's Layout
}

// onLink is the prefix of neighbours that the address stands for.
func (a Address) onLink() netip.Prefix {
	addr := a.Addr
	if a.Peer.IsValid() {
		addr = a.Peer
	}
	return netip.PrefixFrom(addr, a.Prefix).Masked()
}

// Route is an entry of a routing table.
type Route struct {
	Family    Family
	Table     uint32
	Type      RouteType
	Scope     uint8 // IPv4; 0 for IPv6
	Protocol  uint8
	Dst       netip.Prefix // 0.0.0.0/0 and ::/0 for a default
	Gateway   netip.Addr   // the zero Addr: on-link
	LinkIndex int          // 0 for routes that reject
	Metric    uint32
	OnLink    bool // the gateway is taken to be on the link
	Down      bool // the kernel says dead or linkdown
	Other     bool // it has what we do not read: several next hops, TOS, an IPv4 route by an IPv6 gateway
}

// Rule is a policy routing rule.
type Rule struct {
	Family   Family
	Priority uint32
	Table    uint32
	Src, Dst netip.Prefix // the zero Prefix: all
	Mark     uint32
	Mask     uint32 // 0: no fwmark selector
	IIF, OIF string
	IPProto  uint8     // 0: any
	DPort    PortRange // destination ports; the zero PortRange: any
	Near     bool      // the table's default routes do not count (suppress_prefixlength 0)
	Action   uint8     // FR_ACT_*; 1 looks the table up
	Protocol uint8
	Invert   bool // `not`
	Other    bool // it has selectors or actions that we do not read
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Snapshot is the kernel's network state at one moment. It is immutable: every
// reader shares it, none may write to its maps and slices.
type Snapshot struct {
	Links map[int]Link
	Addrs map[netip.Addr][]Address

	// Routes holds the default routes of all tables, the local routes that the
	// kernel did not make itself (AnyIP), the on-link routes of table main, the
	// routes with our protocol and all those in the Layout's tables. The rest is
	// skipped while reading, so that a host with a full routing table is no burden.
	Routes []Route
	Rules  []Rule

	IPv6      bool // the kernel has IPv6
	AddrProto bool // the kernel keeps IFA_PROTO (Linux 5.18)

	list    []Address // Addrs in order of address, then interface
	local   []netip.Prefix
	holes   []netip.Prefix // what table local takes out of them again
	byName  map[string]Link
	partial bool // a dump was interrupted by changes until the tries ran out
	begun   [parts]time.Time
}

// Since is when the reading of the snapshot's oldest part began: what was changed
// before is in it.
func (s *Snapshot) Since() time.Time {
	return slices.MinFunc(s.begun[:], time.Time.Compare)
}

// SinceAddrs is when the reading of its addresses began.
func (s *Snapshot) SinceAddrs() time.Time { return s.begun[bits.TrailingZeros8(uint8(partAddrs))] }

// State is what became of an address.
type State uint8

// The states of an address, best first.
const (
	Present   State = iota // usable
	Tentative              // duplicate address detection is not over
	DadFailed              // another host on the link has it
	LinkDown               // it is there, its interface is not up
	Absent                 // on no interface and in no local route
)

// String is the state in one word.
func (s State) String() string {
	switch s {
	case Present:
		return "present"
	case Tentative:
		return "tentative"
	case DadFailed:
		return "dadfailed"
	case LinkDown:
		return "linkdown"
	case Absent:
		return "absent"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// newSnapshot indexes and orders what was read.
func newSnapshot(links map[int]Link, addrs []Address, routes []Route, rules []Rule) *Snapshot {
	slices.SortFunc(addrs, compareAddress)
	slices.SortFunc(routes, compareRoute)
	slices.SortStableFunc(rules, func(a, b Rule) int {
		return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Priority, b.Priority))
	})
	s := &Snapshot{Links: links, Routes: routes, Rules: rules, list: addrs, byName: make(map[string]Link, len(links))}
	for _, l := range links {
		s.byName[l.Name] = l
	}
	for _, r := range routes {
		switch {
		case r.Table != TableLocal:
		case r.Type != RouteLocal:
			s.holes = append(s.holes, r.Dst)
		case !slices.Contains(s.local, r.Dst):
			s.local = append(s.local, r.Dst)
		}
	}
	s.Addrs = make(map[netip.Addr][]Address, len(addrs))
	for i := 0; i < len(addrs); {
		j := i + 1
		for j < len(addrs) && addrs[j].Addr == addrs[i].Addr {
			j++
		}
		s.Addrs[addrs[i].Addr] = addrs[i:j:j]
		i = j
	}
	return s
}

func compareAddress(a, b Address) int {
	return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.LinkIndex, b.LinkIndex),
		cmp.Compare(a.Prefix, b.Prefix), a.Peer.Compare(b.Peer))
}

func compareRoute(a, b Route) int {
	return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Table, b.Table),
		a.Dst.Addr().Compare(b.Dst.Addr()), cmp.Compare(a.Dst.Bits(), b.Dst.Bits()),
		cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.LinkIndex, b.LinkIndex),
		a.Gateway.Compare(b.Gateway), cmp.Compare(a.Protocol, b.Protocol))
}

// Equal says whether nothing that a Snapshot holds differs.
func (s *Snapshot) Equal(o *Snapshot) bool {
	return s.IPv6 == o.IPv6 && s.AddrProto == o.AddrProto && maps.Equal(s.Links, o.Links) &&
		slices.Equal(s.list, o.list) && slices.Equal(s.Routes, o.Routes) && slices.Equal(s.Rules, o.Rules)
}

// Moved lists the addresses of which this snapshot says something else than an
// earlier one, which may be nil. more: it says something else of interfaces or
// routes too.
func (s *Snapshot) Moved(before *Snapshot) (addrs []netip.Addr, more bool) {
	if before == nil {
		return nil, true
	}
	if s == before {
		return nil, false
	}
	a, b := s.list, before.list // in the same order
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && compareAddress(a[0], b[0]) < 0:
			addrs, a = append(addrs, a[0].Addr), a[1:]
		case len(a) == 0 || compareAddress(a[0], b[0]) > 0:
			addrs, b = append(addrs, b[0].Addr), b[1:]
		default:
			if a[0] != b[0] {
				addrs = append(addrs, a[0].Addr)
			}
			a, b = a[1:], b[1:]
		}
	}
	return slices.Compact(addrs), !maps.Equal(s.Links, before.Links) || !slices.Equal(s.Routes, before.Routes)
}

// Link gives the interface of that name.
func (s *Snapshot) Link(name string) (Link, bool) {
	l, ok := s.byName[name]
	return l, ok
}

// Has says whether addr can be bound and, when it cannot, why. With an ifname
// that interface has to be there and up too (the address may be on another one,
// as with addresses on lo); without one the address's own interface has to be up.
// A local route that covers the address (AnyIP) stands for it.
func (s *Snapshot) Has(addr netip.Addr, ifname string) (State, string) {
	addr = addr.Unmap().WithZone("")
	if ifname != "" {
		l, ok := s.Link(ifname)
		if !ok {
			return LinkDown, "interface " + ifname + " does not exist"
		}
		if !l.Up {
			return LinkDown, l.Reason
		}
	}
	best, reason := Absent, ""
	for _, a := range s.Addrs[addr] {
		if state, why := s.usable(a, ifname); state < best {
			best, reason = state, why
		}
	}
	if best == Present || s.anyIP(addr) {
		return Present, ""
	}
	if best == Absent {
		reason = "address " + addr.String() + " is not on any interface"
	}
	return best, reason
}

// anyIP says whether a local route makes an address the host's own, and no longer
// prefix of table local says otherwise.
func (s *Snapshot) anyIP(addr netip.Addr) bool {
	longest := func(list []netip.Prefix) int {
		bits := -1
		for _, p := range list {
			if p.Bits() > bits && p.Contains(addr) {
				bits = p.Bits()
			}
		}
		return bits
	}
	own := longest(s.local)
	return own >= 0 && own >= longest(s.holes)
}

// HasLocal says whether a whole prefix is the host's own by a local route (AnyIP),
// its own or that of a shorter prefix: Present, or Absent and why. What lies in it
// and is a gateway's all the same does not count; [Want.Reserved] names it.
func (s *Snapshot) HasLocal(p netip.Prefix) (State, string) {
	if slices.ContainsFunc(s.local, func(l netip.Prefix) bool { return contains(l, p) }) {
		return Present, ""
	}
	return Absent, "no local route makes " + p.String() + " the host's own"
}

// contains says whether all of p is in outer.
func contains(outer, p netip.Prefix) bool {
	return outer.Bits() <= p.Bits() && outer.Contains(p.Addr())
}

// OnLink says whether a prefix, or a part of it, lies on the link of an interface, so
// that whoever sends to its addresses asks for them there by ARP or neighbour
// discovery: the host has to answer. Of other prefixes the upstream has to know a
// route by the host. Prefixes of half the internet, as VPNs have them, do not count.
//
// It goes by the host's own addresses and routes. An upstream that takes a prefix
// to be on the link while the host has no address in it cannot be told from here.
func (s *Snapshot) OnLink(p netip.Prefix, link string) bool {
	l, ok := s.Link(link)
	if !ok || !p.IsValid() {
		return false
	}
	f := familyOf(p.Addr())
	return slices.ContainsFunc(s.neighbours(l, f).routes, func(q netip.Prefix) bool {
		return q.Bits() >= shortestSource(f) && q.Overlaps(p)
	})
}

func (s *Snapshot) usable(a Address, ifname string) (State, string) {
	l, ok := s.Links[a.LinkIndex]
	if !ok {
		return LinkDown, fmt.Sprintf("the interface of address %s (number %d) is not known", a.Addr, a.LinkIndex)
	}
	// Carrier counts for the interface that packets leave by; elsewhere an
	// address can be bound for as long as its interface is not set down.
	if !l.Up && (ifname == "" || ifname == l.Name || !l.Admin) {
		return LinkDown, l.Reason
	}
	if a.DadFailed {
		return DadFailed, "address " + a.Addr.String() + " is used by another host (duplicate address detection)"
	}
	if a.Tentative {
		return Tentative, "address " + a.Addr.String() + " is tentative (duplicate address detection)"
	}
	return Present, ""
}

// HasDefault says whether a usable default route is in the table. Routes that
// reject do not count.
func (s *Snapshot) HasDefault(f Family, table uint32) bool {
	return slices.ContainsFunc(s.Routes, func(r Route) bool {
		return r.Family == f && r.Table == table && r.Dst.Bits() == 0 && r.Type == RouteUnicast && !r.Down
	})
}

// DefaultRoute is HasDefault of table main.
func (s *Snapshot) DefaultRoute(f Family) bool { return s.HasDefault(f, TableMain) }

// HasRoute says whether exactly this route is there, whatever the kernel says of
// its state (Down).
func (s *Snapshot) HasRoute(r Route) bool {
	r.Down = false
	return slices.ContainsFunc(s.Routes, func(o Route) bool {
		o.Down = false
		return o == r
	})
}

// GlobalAddrs gives the addresses that a host without a configuration can send
// from: global unicast (private ranges and unique local ones too), on interfaces
// that are up, not loopback, not link-local, not tentative, failed or deprecated.
// IPv4 comes first, in order of interface number and then of address; an address
// on two interfaces counts once.
func (s *Snapshot) GlobalAddrs() []netip.Addr {
	var found []Address
	for _, list := range s.Addrs {
		for _, a := range list {
			l := s.Links[a.LinkIndex]
			if !l.Up || l.Loopback || a.LinkScope || !a.Addr.IsGlobalUnicast() ||
				a.Tentative || a.DadFailed || a.Deprecated {
				continue
			}
			found = append(found, a)
		}
	}
	slices.SortFunc(found, func(a, b Address) int {
		return cmp.Or(cmp.Compare(familyOf(a.Addr), familyOf(b.Addr)),
			cmp.Compare(a.LinkIndex, b.LinkIndex), a.Addr.Compare(b.Addr))
	})
	out := make([]netip.Addr, 0, len(found))
	seen := make(map[netip.Addr]bool, len(found))
	for _, a := range found {
		if !seen[a.Addr] {
			seen[a.Addr] = true
			out = append(out, a.Addr)
		}
	}
	return out
}

// OwnAddrs gives every address of the host, loopback and link-local ones too, in
// order of address.
func (s *Snapshot) OwnAddrs() []netip.Addr {
	return slices.SortedFunc(maps.Keys(s.Addrs), netip.Addr.Compare)
}

// Own says which addresses are the host's own: its addresses and the prefixes of
// local routes (AnyIP) with true, and with false what table local takes out of
// these. The longest prefix counts. Broadcast addresses are among them.
func (s *Snapshot) Own() map[netip.Prefix]bool {
	own := make(map[netip.Prefix]bool, len(s.Addrs)+len(s.local))
	for _, p := range s.local {
		own[p] = true
	}
	for _, p := range s.holes {
		own[p] = false
	}
	for a := range s.Addrs {
		own[netip.PrefixFrom(a, a.BitLen())] = true
	}
	for _, a := range s.Broadcasts() {
		own[netip.PrefixFrom(a, a.BitLen())] = true
	}
	return own
}

// LocalPrefixes gives the prefixes that the host takes for its own by a local
// route (AnyIP), beside its addresses.
func (s *Snapshot) LocalPrefixes() []netip.Prefix { return slices.Clone(s.local) }

// Broadcasts gives the broadcast addresses of the interfaces, in order.
func (s *Snapshot) Broadcasts() []netip.Addr {
	var out []netip.Addr
	for _, a := range s.list {
		if a.Broadcast.IsValid() {
			out = append(out, a.Broadcast)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// String is the rule as `ip rule` shows it, as far as it was read.
func (r Rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", r.Priority)
	if r.Invert {
		b.WriteString(" not")
	}
	b.WriteString(" from " + prefixOrAll(r.Src))
	b.WriteString(r.selectors())
	if r.Action == actionLookup {
		fmt.Fprintf(&b, " lookup %s", tableName(r.Table))
	} else {
		fmt.Fprintf(&b, " action %d", r.Action)
	}
	if r.Protocol != 0 {
		fmt.Fprintf(&b, " proto %d", r.Protocol)
	}
	if r.Near {
		b.WriteString(" suppress_prefixlength 0")
	}
	if r.Other {
		b.WriteString(" ...")
	}
	return b.String()
}

// selectors is what stands between the addresses and the action.
func (r Rule) selectors() string {
	var out string
	if r.Dst.IsValid() {
		out += " to " + r.Dst.String()
	}
	if r.Mask != 0 {
		out += fmt.Sprintf(" fwmark 0x%x/0x%x", r.Mark, r.Mask)
	}
	if r.IIF != "" {
		out += " iif " + r.IIF
	}
	if r.OIF != "" {
		out += " oif " + r.OIF
	}
	switch r.IPProto {
	case 0:
	case unix.IPPROTO_TCP:
		out += " ipproto tcp"
	case unix.IPPROTO_UDP:
		out += " ipproto udp"
	default:
		out += fmt.Sprintf(" ipproto %d", r.IPProto)
	}
	switch p := r.DPort; {
	case p == PortRange{}:
	case p.First == p.Last:
		out += fmt.Sprintf(" dport %d", p.First)
	default:
		out += fmt.Sprintf(" dport %d-%d", p.First, p.Last)
	}
	return out
}

func prefixOrAll(p netip.Prefix) string {
	if !p.IsValid() {
		return "all"
	}
	return p.String()
}

func tableName(t uint32) string {
	switch t {
	case TableMain:
		return "main"
	case TableLocal:
		return "local"
	case unix.RT_TABLE_DEFAULT:
		return "default"
	}
	return fmt.Sprint(t)
}

// actionLookup is FR_ACT_TO_TBL.
const actionLookup = 1
