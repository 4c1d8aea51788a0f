package config

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"wayout/selection"
)

// A span is a run of addresses, both ends included; one address when they are equal. The zero span is none. A span with
// net is that whole prefix, for one node, and first and last are its address.
type span struct {
	first, last netip.Addr
	net         netip.Prefix
}

func (s span) len() int {
	if !s.first.IsValid() {
		return 0
	}
	n, _ := between(s.first, s.last)
	return n
}

// maxRange is how many addresses a range may have.
const maxRange = 1 << 16

// between counts the addresses from a to b, which are of one family; false: b is before a, or they are too many.
func between(a, b netip.Addr) (int, bool) {
	x, y := a.As16(), b.As16()
	hi := binary.BigEndian.Uint64(y[:8]) - binary.BigEndian.Uint64(x[:8])
	xl, yl := binary.BigEndian.Uint64(x[8:]), binary.BigEndian.Uint64(y[8:])
	if hi > 1 || hi == 1 && yl >= xl || hi == 0 && yl < xl || yl-xl >= maxRange {
		return 0, false
	}
	return int(yl-xl) + 1, true
}

// badNodeAddr says why nothing can be sent from an address, or nothing.
func badNodeAddr(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "want an IP address"
	case a.Zone() != "":
		return "an address has no zone here: give the interface by its own key"
	case a.IsUnspecified():
		return "the unspecified address is not one to send from or to"
	case a.IsMulticast():
		return "a multicast address is not one to send from or through"
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "the broadcast address is not one to send from or through"
	}
	return ""
}

// The lengths that a prefix node may have. What is longer is spelled out, as a range is.
const (
	minBits4, maxBits4 = 8, 30
	minBits6, maxBits6 = 48, 124
)

// parseNet reads a prefix.
func parseNet(s string) (span, string) {
	n, err := netip.ParsePrefix(s)
	if err != nil {
		return span{}, "want an address, FIRST-LAST or a prefix"
	}
	shortest, longest := minBits6, maxBits6
	if n.Addr().Is4() {
		shortest, longest = minBits4, maxBits4
	}
	switch {
	case n.Addr().Is4In6():
		return span{}, "write the IPv4 prefix as IPv4"
	case n.Bits() < shortest:
		return span{}, fmt.Sprintf("a prefix is at most a /%d", shortest)
	case n != n.Masked():
		return span{}, fmt.Sprintf("has bits beyond its length, perhaps %s", n.Masked())
	}
	last := lastOf(n)
	for _, a := range [...]netip.Addr{n.Addr(), last} {
		if bad := badNodeAddr(a); bad != "" {
			return span{}, bad
		}
	}
	if n.Bits() > longest {
		return span{first: n.Addr(), last: last}, ""
	}
	return span{first: n.Addr(), last: n.Addr(), net: n}, ""
}

// lastOf is the last address of a prefix.
func lastOf(n netip.Prefix) netip.Addr {
	a := n.Addr().AsSlice()
	for i := n.Bits(); i < 8*len(a); i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(a)
	return last
}

// parseSpan reads ADDRESS, FIRST-LAST or a prefix.
func parseSpan(s string) (span, string) {
	if strings.Contains(s, "/") {
		return parseNet(s)
	}
	from, to, ranged := strings.Cut(s, "-")
	first, bad := parseAddr(strings.TrimSpace(from))
	if bad == "" {
		bad = badNodeAddr(first)
	}
	if bad != "" || !ranged {
		return span{first: first, last: first}, bad
	}
	last, bad := parseAddr(strings.TrimSpace(to))
	switch {
	case bad != "":
		return span{}, bad
	case badNodeAddr(last) != "":
		return span{}, badNodeAddr(last)
	case first.Is4() != last.Is4():
		return span{}, "the ends of a range have to be of one family"
	case last.Less(first):
		return span{}, "the range ends before it begins"
	}
	if _, ok := between(first, last); !ok {
		return span{}, fmt.Sprintf("a range has at most %d addresses", maxRange)
	}
	return span{first: first, last: last}, ""
}

func (d *decoder) spanAt(p *place) (span, bool) {
	s, ok := d.text(p)
	if !ok {
		return span{}, false
	}
	sp, bad := parseSpan(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return span{}, false
	}
	return sp, true
}

func (d *decoder) nodeSpan(p *place, f *field, v reflect.Value) {
	sp, ok := d.spanAt(p)
	if !ok {
		return
	}
	if sp.first.Is4() != strings.HasPrefix(f.word, "ipv4") {
		d.fail(p, "want an %s address", familyName(f.word))
		return
	}
	*v.Addr().Interface().(*span) = sp
}

// nodeSpecs decodes the list of nodes. They become Nodes when the whole file is known.
func (d *decoder) nodeSpecs(p *place, _ *field, v reflect.Value) {
	if !d.isList(p) {
		return
	}
	if len(p.node.Content) == 0 {
		d.fail(p, "want at least one node")
	}
	specs := make([]nodeSpec, len(p.node.Content))
	for i, n := range p.node.Content {
		if d.spent {
			return
		}
		at := d.at(p, "", i, n)
		d.structure(at, reflect.ValueOf(&specs[i]).Elem())
		specs[i].at = at
	}
	d.specs[v.Addr().Interface().(*[]Node)] = specs
}

// bindIP decodes bind_ip: each of its entries is a node without an ID.
func (d *decoder) bindIP(p *place, _ *field, v reflect.Value) {
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one address")
	}
	out := v.Addr().Interface().(*[]netip.Addr)
	for _, ip := range items {
		sp, ok := d.spanAt(ip)
		if !ok || !d.room(ip, sp.len()) || sp.net.IsValid() {
			continue
		}
		a := sp.first
		for range sp.len() {
			*out = append(*out, a)
			a = a.Next()
		}
	}
}

// room says whether the file may have n more nodes.
func (d *decoder) room(p *place, n int) bool {
	if d.spent {
		return false
	}
	if d.nodes += n; d.nodes > maxNodes {
		d.spent = true
		d.fail(p, "the file has more than %d nodes", maxNodes)
		return false
	}
	return true
}

// A builder makes the nodes of one escaper and finds those that are in each other's way.
type builder struct {
	d       *decoder
	e       *Escaper
	at      *place
	uplinks map[string]*Uplink
	ids     map[string]*place     // whose ID it is
	owner   map[netip.Addr]*place // whose address it is
	nets    []ownedNet            // whose prefix it is; after overlaps: sorted, and none within another
	pinned  bool                  // a contradiction of the escaper's own pins was reported

	// What could not be read of the nodes: a selection is not held against them then.
	lostID, lostAddr bool
	broken           bool // the indexes are not what they will be
	pool             *selection.Pool
}

// An ownedNet is a prefix of the node at node, written at value.
type ownedNet struct {
	net         netip.Prefix
	node, value *place
}

// buildNodes makes e.Nodes of nodes, bind_ip or interface, for a direct_fixed.
func (d *decoder) buildNodes(e *Escaper, uplinks map[string]*Uplink) {
	p := d.places[e]
	specs := d.specs[&e.Nodes]
	nodes, bind := d.find(p, "nodes"), d.find(p, "bind_ip")
	n := len(specs) + len(e.BindIP)
	b := &builder{
		d: d, e: e, at: p, uplinks: uplinks,
		ids: make(map[string]*place, n), owner: make(map[netip.Addr]*place, n),
	}
	d.builders[e] = b
	switch {
	case nodes != nil && bind != nil:
		d.fail(bind, "give nodes or bind_ip, not both")
		b.lostID, b.lostAddr = true, true
	case nodes != nil:
		e.Nodes = make([]Node, 0, n)
		for i := range specs {
			b.spec(&specs[i])
		}
		b.overlaps()
		b.addressIDs(specs)
	case bind != nil:
		e.Nodes = make([]Node, 0, n)
		b.bind(bind)
		b.overlaps()
	case e.Interface != "":
		id := e.Interface
		if badName(id) != "" {
			id = "default"
		}
		if up, iface := b.pins(&nodeSpec{}, p); d.room(p, 1) {
			b.add(&Node{ID: id, Interface: iface, Uplink: up, Weight: 1}, p, p, p)
		}
	case d.find(p, "interface") == nil:
		d.failMissing(p, "nodes", "is required, or else bind_ip or interface")
	}
}

// pins returns the uplink and the interface of a node, and says when they contradict each other.
func (b *builder) pins(s *nodeSpec, at *place) (uplink, iface string) {
	uplink, iface = s.Uplink, s.Interface
	if uplink == "" {
		uplink = b.e.Uplink
	}
	if iface == "" {
		iface = b.e.Interface
	}
	u := b.uplinks[uplink]
	if u == nil || u.Interface == "" || iface == "" || u.Interface == iface {
		return uplink, iface
	}
	key := "interface"
	switch {
	case s.Interface != "":
	case s.Uplink != "":
		b.d.fail(b.d.find(at, "uplink"), "contradicts the escaper's interface %s: the uplink's is %s", iface, u.Interface)
		return uplink, iface
	case b.pinned:
		return uplink, iface
	default:
		at, b.pinned = b.at, true
	}
	b.d.fail(b.d.find(at, key), "contradicts uplink %s, whose interface is %s", uplink, u.Interface)
	return uplink, iface
}

// spec adds the nodes of one entry of nodes.
func (b *builder) spec(s *nodeSpec) {
	d, at := b.d, s.at
	at4, at6 := d.find(at, "ipv4"), d.find(at, "ipv6")
	n4, n6 := s.IPv4.len(), s.IPv6.len()
	uplink, iface := b.pins(s, at)
	lostAddr := at4 != nil && n4 == 0 || at6 != nil && n6 == 0
	lostID := s.ID == "" && (lostAddr || d.find(at, "id") != nil)
	b.lostAddr, b.lostID = b.lostAddr || lostAddr, b.lostID || lostID
	switch {
	case lostAddr || lostID:
		// Said already. What is known of the node is still not to be said missing.
		b.broken = true
		if s.ID != "" {
			b.ids[s.ID] = at
		}
		b.note(at, at4, s.IPv4)
		b.note(at, at6, s.IPv6)
		return
	case n4 == 0 && n6 == 0 && iface == "":
		b.broken, b.lostID = true, b.lostID || s.ID == ""
		b.ids[s.ID] = at
		if d.find(at, "interface") == nil {
			d.failMissing(at, "ipv4", "is required, or else ipv6 or interface")
		}
		return
	case n4 == 0 && n6 == 0 && s.ID == "":
		b.broken, b.lostID = true, true
		d.failMissing(at, "id", "is required for a node without an address")
		return
	case n4 > 0 && n6 > 0 && n4 != n6:
		b.broken, b.lostID, b.lostAddr = true, true, true
		d.fail(at6, "%d addresses beside %d in ipv4: they have to be as many", n6, n4)
		return
	}
	n := max(n4, n6, 1)
	if whole := s.IPv4.net.IsValid() || s.IPv6.net.IsValid(); n > 1 || whole {
		if eip := d.find(at, "eip"); eip != nil {
			d.fail(eip, "is for a node of one address of a family, and this one is a range or a prefix")
		}
	}
	if !d.room(at, n) {
		return
	}
	a4, a6 := s.IPv4.addr(), s.IPv6.addr()
	for range n {
		node := Node{
			ID: s.ID, IPv4: a4, IPv6: a6, Net4: s.IPv4.net, Net6: s.IPv6.net,
			Interface: iface, Uplink: uplink, Weight: s.Weight, EIP: s.EIP,
		}
		switch {
		case s.ID == "":
			node.ID = node.source()
		case n > 1:
			node.ID = s.ID + "/" + node.source()
		}
		if !b.add(&node, at, at4, at6) {
			return // one error for a range
		}
		// The zero Addr's Next is an address, and not one that anybody asked for.
		if n4 > 1 {
			a4 = a4.Next()
		}
		if n6 > 1 {
			a6 = a6.Next()
		}
	}
}

// addr is the first address of a span that is no prefix.
func (s span) addr() netip.Addr {
	if s.net.IsValid() {
		return netip.Addr{}
	}
	return s.first
}

// source is the address or prefix of a node, the IPv4 one when it has both.
func (n *Node) source() string {
	switch {
	case n.IPv4.IsValid():
		return n.IPv4.String()
	case n.Net4.IsValid():
		return n.Net4.String()
	case n.IPv6.IsValid():
		return n.IPv6.String()
	}
	return n.Net6.String()
}

// note remembers whose a span is, of a node that is not made.
func (b *builder) note(node, value *place, s span) {
	switch {
	case s.net.IsValid():
		b.nets = append(b.nets, ownedNet{s.net, node, value})
	case s.first.IsValid():
		b.owner[s.first] = node
	}
}

// bind adds a node for each address or prefix of bind_ip.
func (b *builder) bind(p *place) {
	uplink, iface := b.pins(&nodeSpec{}, b.at)
	next := b.e.BindIP
	for _, ip := range b.d.items(p) {
		sp, bad := parseSpan(ip.node.Value)
		if bad != "" {
			continue // said already
		}
		if sp.net.IsValid() {
			node := Node{ID: sp.net.String(), Interface: iface, Uplink: uplink, Weight: 1}
			if sp.first.Is4() {
				node.Net4 = sp.net
			} else {
				node.Net6 = sp.net
			}
			b.add(&node, ip, ip, ip)
			continue
		}
		n := min(sp.len(), len(next))
		for _, a := range next[:n] {
			node := Node{ID: a.String(), Interface: iface, Uplink: uplink, Weight: 1}
			if a.Is4() {
				node.IPv4 = a
			} else {
				node.IPv6 = a
			}
			if !b.add(&node, ip, ip, ip) {
				break
			}
		}
		next = next[n:]
	}
}

// add adds one node, unless its ID or an address is another's.
func (b *builder) add(n *Node, at, at4, at6 *place) bool {
	if first := b.ids[n.ID]; first != nil && first != at {
		if id := b.d.find(at, "id"); id != nil {
			b.d.fail(id, "is the ID of the node on line %d too", first.node.Line)
			b.claim(n, at, at4, at6)
			return false
		}
		// The node has no ID but its address. Either that is a second owner's, which is said below, or by overlaps of a
		// prefix, or addressIDs says whose ID it is.
		if b.owner[n.IPv4] == nil && b.owner[n.IPv6] == nil {
			b.claim(n, at, at4, at6)
			return false
		}
	}
	ok := true
	for _, x := range [...]struct {
		a  netip.Addr
		at *place
	}{{n.IPv4, at4}, {n.IPv6, at6}} {
		switch {
		case !x.a.IsValid():
		case b.owner[x.a] != nil:
			b.d.fail(x.at, "address %s is on the node on line %d too", x.a, b.owner[x.a].node.Line)
			ok = false
		case x.a.Is6() && x.a.IsLinkLocalUnicast() && n.Interface == "" && n.Uplink == "":
			b.d.fail(x.at, "a link-local address needs an interface or an uplink")
			ok = false
		default:
			b.owner[x.a] = at
		}
	}
	if n.Net6.IsValid() && n.Net6.Addr().IsLinkLocalUnicast() && n.Interface == "" && n.Uplink == "" {
		b.d.fail(at6, "a link-local address needs an interface or an uplink")
		ok = false
	}
	b.noteNets(n, at, at4, at6)
	b.ids[n.ID] = at
	b.broken = b.broken || !ok
	b.e.Nodes = append(b.e.Nodes, *n)
	return ok
}

// claim notes the addresses of a node that is refused for its ID.
func (b *builder) claim(n *Node, at, at4, at6 *place) {
	b.broken = true
	for _, a := range [...]netip.Addr{n.IPv4, n.IPv6} {
		if a.IsValid() && b.owner[a] == nil {
			b.owner[a] = at
		}
	}
	b.noteNets(n, at, at4, at6)
}

func (b *builder) noteNets(n *Node, at, at4, at6 *place) {
	if n.Net4.IsValid() {
		b.nets = append(b.nets, ownedNet{n.Net4, at, at4})
	}
	if n.Net6.IsValid() {
		b.nets = append(b.nets, ownedNet{n.Net6, at, at6})
	}
}

// overlaps refuses prefixes that share an address with another node. Prefixes are within each other or apart, so that in
// the order of their addresses each one need only be compared with the last that was within none.
func (b *builder) overlaps() {
	if len(b.nets) == 0 {
		return
	}
	slices.SortStableFunc(b.nets, func(x, y ownedNet) int {
		return cmp.Or(x.net.Addr().Compare(y.net.Addr()), cmp.Compare(x.net.Bits(), y.net.Bits()))
	})
	apart := make([]ownedNet, 0, len(b.nets))
	for _, n := range b.nets {
		if k := len(apart) - 1; k >= 0 && apart[k].net.Contains(n.net.Addr()) {
			first, second := apart[k], n
			if second.node.index < first.node.index {
				first, second = second, first
			}
			b.broken = true
			b.d.fail(second.value, "overlaps with %s of the node on line %d", first.net, first.node.node.Line)
			continue
		}
		apart = append(apart, n)
	}
	b.nets = apart
	b.within()
}

// within refuses addresses inside another node's prefix.
func (b *builder) within() {
	type pair struct{ net, node *place }
	type mistake struct {
		at   *place
		node int // where its node is in the list
		msg  string
	}
	said := make(map[pair]bool) // a range is one mistake
	var list []mistake
	for a, at := range b.owner {
		n := b.netOf(a)
		if n == nil || n.node == at || said[pair{n.value, at}] {
			continue
		}
		said[pair{n.value, at}] = true
		if at.index < n.node.index {
			list = append(list, mistake{n.value, n.node.index, fmt.Sprintf("holds an address of the node on line %d", at.node.Line)})
			continue
		}
		key := "ipv6"
		if a.Is4() {
			key = "ipv4"
		}
		value := b.d.find(at, key)
		if value == nil {
			value = at // an entry of bind_ip
		}
		list = append(list, mistake{value, at.index, fmt.Sprintf("is inside %s of the node on line %d", n.net, n.node.node.Line)})
	}
	slices.SortFunc(list, func(x, y mistake) int {
		return cmp.Or(cmp.Compare(x.node, y.node), cmp.Compare(x.at.key, y.at.key), cmp.Compare(x.msg, y.msg))
	})
	for _, m := range list {
		b.broken = true
		b.d.fail(m.at, "%s", m.msg)
	}
}

// netOf returns the prefix that holds an address, or nil. It is for after overlaps.
func (b *builder) netOf(a netip.Addr) *ownedNet {
	i, found := slices.BinarySearchFunc(b.nets, a, func(n ownedNet, a netip.Addr) int { return n.net.Addr().Compare(a) })
	if !found {
		i--
	}
	if i < 0 || !b.nets[i].net.Contains(a) {
		return nil
	}
	return &b.nets[i]
}

// addressIDs refuses IDs that are another node's address.
func (b *builder) addressIDs(specs []nodeSpec) {
	for i := range specs {
		s := &specs[i]
		if s.ID == "" || !strings.ContainsAny(s.ID, ".:") || s.IPv4.len() > 1 || s.IPv6.len() > 1 {
			continue // the ID of a range is only the first part of its nodes' IDs
		}
		a, err := netip.ParseAddr(s.ID)
		if err != nil {
			continue
		}
		if n := b.netOf(a.Unmap()); n != nil {
			b.broken = true
			b.d.fail(b.d.find(s.at, "id"), "is an address inside %s of the node on line %d", n.net, n.node.node.Line)
			continue
		}
		owner := b.owner[a.Unmap()]
		if owner == nil || owner == s.at {
			continue
		}
		if b.ids[s.ID] != s.at {
			continue // said already: the owner is called by its address
		}
		b.d.fail(b.d.find(s.at, "id"), "is the address of the node on line %d", owner.node.Line)
	}
}

// selects says whether a selection of this escaper names one of its nodes, as far as the nodes could be read.
func (b *builder) selects(v selection.Value) bool {
	if b.pool == nil && !b.broken {
		p, err := selection.NewPool(b.members(), selection.Options{StrictIndex: b.e.StrictIndex})
		b.pool, b.broken = p, err != nil
	}
	id := v.String()
	a, err := netip.ParseAddr(id)
	if err == nil && a.Zone() == "" && b.netOf(a.Unmap()) != nil {
		return true
	}
	if !b.broken {
		_, _, _, err := b.pool.Resolve(v)
		return err == nil
	}
	if strings.Trim(id, "0123456789") == "" || b.ids[id] != nil {
		return true // perhaps an index
	}
	if err == nil {
		return b.lostAddr || b.owner[a.Unmap()] != nil
	}
	return b.lostID || b.lostAddr && strings.Contains(id, "/")
}

// members are the nodes of the escaper as a pool has them.
func (b *builder) members() []selection.Node {
	var out []selection.Node
	for i := range b.e.Nodes {
		n := &b.e.Nodes[i]
		out = append(out, selection.Node{ID: n.ID, V4: n.IPv4, V6: n.IPv6, Net4: n.Net4, Net6: n.Net6, Weight: n.Weight})
	}
	for i := range b.e.Peers {
		out = append(out, selection.Node{ID: b.e.Peers[i].ID})
	}
	for _, name := range b.e.NextNames() {
		out = append(out, selection.Node{ID: name})
	}
	return out
}

// what says how a node of the escaper is named, for who named none.
func (b *builder) what() string {
	how := "an ID or address"
	switch {
	case strings.HasPrefix(b.e.Type, "route_"):
		how = "the name of a next escaper"
	case strings.HasPrefix(b.e.Type, "proxy_"):
		how = "an ID"
	}
	what := "is no node of escaper " + b.e.Name
	if !b.broken {
		what += fmt.Sprintf(" (1 to %d by index, or %s)", b.pool.Len(), how)
	}
	return what
}
