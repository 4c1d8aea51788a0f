package escaper_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"wayout/router/escaper"
	"wayout/selection"
)

// model is what the table of an escaper.Table is made of, for a slow reading of
// the contract's section 3 beside which the real one is held.
type model struct {
	escapers []*modelEscaper
	own      string // the server's escaper
	layers   [4][]modelEntry
	socks    bool
	allow    []string // nil: anything
}

type modelEscaper struct {
	name            string
	route           bool
	enabled, strict bool
	nodes           []modelNode // of a route: next escapers, by their names
}

type modelNode struct {
	id       string
	v4, v6   netip.Addr
	net      netip.Prefix
	unlisted bool
	up       bool
	weight   uint16
}

// modelEntry is one selection: a number, a text, an address beside it, or an
// inline object.
type modelEntry struct {
	escaper string
	kind    byte // 'i'ndex, 't'ext, 'a'ddress, 'o'bject
	index   uint64
	text    string
	pin     netip.Addr // of the user name's ip beside path
}

func (e modelEntry) value() selection.Value {
	var v selection.Value
	switch e.kind {
	case 'i':
		v = selection.Index(e.index)
	case 't':
		v = selection.ID(e.text)
	case 'a':
		v = selection.Address(netip.MustParseAddr(e.text))
	case 'o':
		n := selection.InlineNode{ID: "own"}
		if a := netip.MustParseAddr(e.text); a.Is4() {
			n.V4 = a
		} else {
			n.V6 = a
		}
		v = selection.Inline(n)
	}
	if e.pin.IsValid() {
		v = v.At(e.pin)
	}
	return v
}

var errKinds = []error{
	selection.ErrMalformed, selection.ErrUnknown, selection.ErrNotPassed, selection.ErrDisabled, selection.ErrForbidden, selection.ErrDown,
}

func (m *model) find(name string) *modelEscaper {
	for _, e := range m.escapers {
		if e.name == name {
			return e
		}
	}
	return nil
}

func (n *modelNode) owns(a netip.Addr) bool {
	return a.IsValid() && (n.v4 == a || n.v6 == a || n.net.IsValid() && n.net.Contains(a))
}

// resolve is the table of values: a node's position, the very address, or what
// is wrong.
func (e *modelEscaper) resolve(x modelEntry, src int) (node int, addr netip.Addr, err error) {
	listed := 0
	for _, n := range e.nodes {
		if !n.unlisted {
			listed++
		}
	}
	node = -1
	switch a, _ := netip.ParseAddr(x.text); {
	case x.kind == 'i' && listed == 0, x.kind == 'i' && e.strict && (x.index < 1 || x.index > uint64(listed)):
	case x.kind == 'i':
		// Counted from one, and round in both directions.
		node = int((x.index%uint64(listed) + uint64(listed) - 1) % uint64(listed))
	default:
		a = a.Unmap()
		for i := range e.nodes {
			if a.Zone() == "" && e.nodes[i].owns(a) {
				node, addr = i, a
			}
		}
		for i := range e.nodes {
			if node < 0 && x.kind == 't' && e.nodes[i].id == x.text {
				node = i
			}
		}
	}
	if node < 0 || e.nodes[node].unlisted && src != 0 {
		// Whoever names another's node and an address is told of the node
		// alone.
		if node >= 0 && x.pin.IsValid() && (!e.nodes[node].owns(x.pin) || addr.IsValid() && addr != x.pin) {
			return 0, addr, selection.ErrMalformed
		}
		return 0, addr, selection.ErrUnknown
	}
	if x.pin.IsValid() {
		if !e.nodes[node].owns(x.pin) || addr.IsValid() && addr != x.pin {
			return 0, addr, selection.ErrMalformed
		}
		addr = x.pin
	}
	return node, addr, nil
}

// counts lists the entries that no stronger source overrides, with their
// sources: 0 user, 1 client, 2 user name, 3 server.
func (m *model) counts() (list []modelEntry, sources []int) {
	seen := map[string]bool{}
	for src, l := range m.layers {
		for _, x := range l {
			if !seen[x.escaper] {
				list, sources = append(list, x), append(sources, src)
			}
		}
		for _, x := range l {
			seen[x.escaper] = true
		}
	}
	return list, sources
}

func byModelClient(src int) bool { return src == 1 || src == 2 }

func (m *model) leadsTo(from, to string) bool {
	if from == to {
		return true
	}
	e := m.find(from)
	return e.route && slices.ContainsFunc(e.nodes, func(n modelNode) bool { return m.leadsTo(n.id, to) })
}

// usable says whether something can leave by an escaper.
func (m *model) usable(name string) bool {
	e := m.find(name)
	return slices.ContainsFunc(e.nodes, func(n modelNode) bool { return !e.route && n.up || e.route && m.usable(n.id) })
}

func (m *model) allowed(name string) bool {
	return m.allow == nil || slices.ContainsFunc(m.allow, func(p string) bool {
		e, all := strings.CutSuffix(p, "/*")
		return p == name || all && strings.HasPrefix(name, e+"/")
	})
}

// decide reads the table of bad selections from the top.
func (m *model) decide() (d escaper.Decision, err error) {
	list, sources := m.counts()
	// Malformed: a user name's path with another path's address.
	if len(m.layers[2]) > 0 {
		for i, x := range list {
			if e := m.find(x.escaper); e != nil && byModelClient(sources[i]) {
				if _, _, err := e.resolve(x, 0); errors.Is(err, selection.ErrMalformed) {
					return d, err
				}
			}
		}
	}
	// Unknown escaper, ID, address, index.
	for i, x := range list {
		e := m.find(x.escaper)
		if e == nil {
			return d, selection.ErrUnknown
		}
		if _, _, err := e.resolve(x, sources[i]); err != nil && sources[i] != 3 {
			return d, selection.ErrUnknown
		}
	}
	// Where it goes.
	type taken struct {
		name string
		src  int
	}
	var way []taken // what somebody chose, by its full name
	var broken error
	at := m.own
	for {
		e := m.find(at)
		d.Way = append(d.Way, at)
		chosen, src := -1, -1
		for i, x := range list {
			if x.escaper != at {
				continue
			}
			node, addr, err := e.resolve(x, sources[i])
			if src = sources[i]; err != nil {
				broken = selection.ErrDown // the server's own selection
				break
			}
			chosen = node
			if !e.route {
				d.Addr = addr
			}
		}
		if broken != nil {
			break
		}
		if chosen >= 0 {
			way = append(way, taken{at + "/" + e.nodes[chosen].id, src})
		}
		if !e.route {
			if chosen >= 0 {
				d.Path = at + "/" + e.nodes[chosen].id
			}
			break
		}
		for i := range e.nodes { // the first by which something can leave
			if chosen < 0 && e.nodes[i].weight > 0 && m.usable(e.nodes[i].id) {
				chosen = i
			}
		}
		if chosen < 0 {
			broken = selection.ErrDown
			break
		}
		at = e.nodes[chosen].id
	}
	// Not passed. Where the way ends before its end, what lies ahead might have been.
	for i, x := range list {
		ahead := broken != nil && m.find(at).route && m.leadsTo(at, x.escaper)
		if byModelClient(sources[i]) && !slices.Contains(d.Way, x.escaper) && !ahead {
			return d, selection.ErrNotPassed
		}
	}
	for _, w := range way {
		if e, _, _ := strings.Cut(w.name, "/"); byModelClient(w.src) && !m.find(e).enabled {
			return d, selection.ErrDisabled
		}
	}
	for _, w := range way {
		if byModelClient(w.src) && !m.allowed(w.name) {
			return d, selection.ErrForbidden
		}
	}
	return d, broken
}

// randomModel makes escapers with nodes, routes over them, and a selection that
// is good about as often as not.
func randomModel(r *rand.Rand) *model {
	m := &model{}
	pick := func(n int) int { return r.IntN(n) }
	octet := 1
	for i := range 1 + pick(3) {
		e := &modelEscaper{name: "d" + strconv.Itoa(i), enabled: pick(5) > 0, strict: pick(3) == 0}
		for k := range pick(5) {
			n := modelNode{id: "n" + strconv.Itoa(k), up: pick(4) > 0, weight: uint16(pick(3))}
			switch a := netip.AddrFrom4([4]byte{192, 0, 2, byte(octet)}); pick(4) {
			case 0:
				n.v6 = netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", octet))
			case 1:
				n.v4, n.v6 = a, netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", octet))
			case 2:
				n.net = netip.MustParsePrefix(fmt.Sprintf("2001:db8:%x::/64", octet))
			default:
				n.v4 = a
				if pick(3) == 0 {
					n.id = a.String()
				}
			}
			octet++
			e.nodes = append(e.nodes, n)
		}
		if pick(3) == 0 {
			e.nodes = append(e.nodes, modelNode{id: "own", v4: netip.AddrFrom4([4]byte{192, 0, 2, byte(octet)}), unlisted: true, up: true})
			octet++
		}
		m.escapers = append(m.escapers, e)
	}
	for i := range pick(4) {
		e := &modelEscaper{name: "r" + strconv.Itoa(i), route: true, enabled: pick(5) > 0, strict: pick(3) == 0}
		for _, k := range r.Perm(len(m.escapers))[:1+pick(len(m.escapers))] {
			e.nodes = append(e.nodes, modelNode{id: m.escapers[k].name, weight: uint16(pick(3))})
		}
		m.escapers = append(m.escapers, e)
	}
	m.own = m.escapers[len(m.escapers)-1-pick(2)*pick(len(m.escapers))].name
	m.socks = pick(2) == 0
	for src := range m.layers {
		if pick(3) == 0 {
			m.layers[src] = m.randomLayer(r, src)
		}
	}
	if pick(3) == 0 {
		m.allow = []string{}
		for _, e := range m.escapers {
			if pick(3) == 0 {
				m.allow = append(m.allow, e.name+"/*")
			} else if len(e.nodes) > 0 && pick(2) == 0 {
				m.allow = append(m.allow, e.name+"/"+e.nodes[pick(len(e.nodes))].id)
			}
		}
	}
	return m
}

func (m *model) randomLayer(r *rand.Rand, src int) (l []modelEntry) {
	for range 1 + r.IntN(3) {
		e := m.escapers[r.IntN(len(m.escapers))]
		x := modelEntry{escaper: e.name, kind: 't', text: "nobody"}
		if src == 2 && r.IntN(2) == 0 {
			x.escaper = m.own
		}
		if r.IntN(20) == 0 {
			x.escaper, e = "unknown", nil
		}
		if slices.ContainsFunc(l, func(o modelEntry) bool { return o.escaper == x.escaper }) {
			continue
		}
		if e = m.find(x.escaper); e == nil {
			l = append(l, x)
			continue
		}
		anyNode := func() modelNode {
			if len(e.nodes) == 0 {
				return modelNode{id: "nobody", v4: netip.MustParseAddr("198.51.100.1")}
			}
			return e.nodes[r.IntN(len(e.nodes))]
		}
		anyAddr := func() netip.Addr {
			n := anyNode()
			switch {
			case n.net.IsValid():
				return selection.AddrIn(n.net, r.Uint64(), r.Uint64())
			case n.v6.IsValid() && (!n.v4.IsValid() || r.IntN(2) == 0):
				return n.v6
			case n.v4.IsValid():
				return n.v4
			}
			return netip.MustParseAddr("198.51.100.1")
		}
		switch r.IntN(6) {
		case 0, 1:
			x.kind, x.index = 'i', uint64(r.IntN(len(e.nodes)+3))
		case 2:
			x.text = anyAddr().String()
			if a := netip.MustParseAddr(x.text); a.Is4() && r.IntN(2) == 0 {
				x.text = "::ffff:" + x.text
			}
		case 3:
			if src == 0 && !e.route {
				x.kind = 'o'
			} else if src >= 2 {
				x.kind = 'a'
			}
			x.text = anyAddr().String()
		default:
			if r.IntN(6) > 0 {
				x.text = anyNode().id
			}
		}
		if src == 2 && r.IntN(3) == 0 && x.kind != 'a' {
			x.pin = anyAddr()
		}
		l = append(l, x)
	}
	return l
}

// table makes the real thing.
func (m *model) table(t *testing.T) (*escaper.Table, *escaper.Request) {
	t.Helper()
	var all []escaper.Escaper
	for _, e := range m.escapers {
		if e.route {
			o := escaper.RouteOptions{Name: e.name, Policy: selection.Serial, StrictIndex: e.strict, EnableSelection: e.enabled}
			for _, n := range e.nodes {
				o.Next = append(o.Next, escaper.Next{Escaper: n.id, Weight: n.weight})
			}
			r, err := escaper.NewRoute(o)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, r)
			continue
		}
		o := escaper.Options{Name: e.name, StrictIndex: e.strict, EnableSelection: e.enabled}
		for _, n := range e.nodes {
			o.Nodes = append(o.Nodes, escaper.NodeOptions{ID: n.id, V4: n.v4, V6: n.v6, Net6: n.net, Unlisted: n.unlisted, Weight: n.weight})
		}
		d, err := escaper.NewDirect(o)
		if err != nil {
			t.Fatal(err)
		}
		for i, p := range d.Paths() {
			c := escaper.Down
			if e.nodes[i].up {
				c = escaper.Up
			}
			p.SetFamilyState(selection.V4, c, "")
			p.SetFamilyState(selection.V6, c, "")
		}
		all = append(all, d)
	}
	tab, err := escaper.NewTable(all...)
	if err != nil {
		t.Fatal(err)
	}
	r := &escaper.Request{Server: "web", Escaper: m.own, Client: netip.MustParseAddrPort("192.0.2.1:1000"), Target: escaper.Target{Host: "any.test", Port: 80}}
	var layers [4]selection.Layer
	for src, l := range m.layers {
		for _, x := range l {
			layers[src] = append(layers[src], selection.Entry{Escaper: x.escaper, Value: x.value()})
		}
	}
	r.Selection = selection.Selection{User: layers[0], Client: layers[1], Username: layers[2], Server: layers[3]}
	if m.socks {
		r.Selection.ClientSource = selection.SourceSOCKS
	}
	if m.allow != nil {
		if r.Allow, err = selection.ParseGlobs(m.allow); err != nil {
			t.Fatal(err)
		}
	}
	return tab, r
}

// TestChooseByTheTable holds the way that requests are judged beside a slow
// reading of the contract, on thousands of random tables.
func TestChooseByTheTable(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(3, 2026))
	outcomes := map[string]int{}
	for i := range 6000 {
		m := randomModel(rnd)
		want, wantErr := m.decide()
		tab, req := m.table(t)
		got, err := tab.Decide(req)
		kind := "good"
		for _, k := range errKinds {
			if errors.Is(wantErr, k) {
				kind = k.Error()
			}
		}
		outcomes[kind]++
		same := (err == nil) == (wantErr == nil) && (wantErr == nil || errors.Is(err, wantErr))
		if wantErr == nil {
			same = same && slices.Equal(got.Way, want.Way) && got.Path == want.Path && got.Addr == want.Addr
		}
		if !same {
			t.Errorf("table %d: got %+v, %v; want %+v, %v", i, got, err, want, wantErr)
			for _, e := range m.escapers {
				t.Logf("%+v", *e)
			}
			t.Fatalf("from %s by %+v, allowed %q", m.own, m.layers, m.allow)
		}
		if wantErr != nil && req.Choice.Source == selection.SourcePolicy && !errors.Is(wantErr, selection.ErrDown) {
			t.Errorf("table %d: refused with %v, and nobody is said to have chosen", i, err)
		}
	}
	t.Log(outcomes)
	for _, k := range errKinds {
		if outcomes[k.Error()] < 20 {
			t.Errorf("only %d tables are about %q", outcomes[k.Error()], k)
		}
	}
}
