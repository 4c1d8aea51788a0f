package escaper

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"

	"wayout/selection"
)

// Next is a node of a Route: an escaper by its name.
type Next struct {
	Escaper string
	Weight  uint16 // its share when the policy picks; 0: only by selection or rule
}

// RouteOptions is a route escaper as configured.
type RouteOptions struct {
	Name            string
	Next            []Next // in the order of their indexes
	Policy          selection.Policy
	PickKey         PickKey
	StrictIndex     bool
	EnableSelection bool
	Sessions        *Sessions // nil: the route's own

	// Rules choose before the policy does, where one of them holds.
	Rules *Rules

	Rand func() uint64 // see selection.Options
}

// Route is an escaper whose nodes are other escapers. What nothing selects, its
// rules choose, and else its policy among the escapers by which something can
// leave.
type Route struct {
	step
	rules *Rules
	next  []Escaper // by node; set once, by NewTable
	names []string  // of the nodes

	mu sync.Mutex // orders publications
}

// NewRoute returns the route. It leads somewhere once it is in a Table.
func NewRoute(o RouteOptions) (*Route, error) {
	r := &Route{
		step:  step{name: o.Name, key: o.PickKey, enabled: o.EnableSelection, sessions: o.Sessions},
		rules: o.Rules,
	}
	if r.sessions == nil {
		r.sessions = NewSessions()
	}
	nodes := make([]selection.Node, len(o.Next))
	for i, n := range o.Next {
		nodes[i] = selection.Node{ID: n.Escaper, Unbound: selection.V4 | selection.V6, Weight: n.Weight}
		r.names = append(r.names, n.Escaper)
	}
	if o.Rules != nil {
		if err := o.Rules.check(len(o.Next)); err != nil {
			return nil, fmt.Errorf("escaper %s: %w", o.Name, err)
		}
	}
	pool, err := selection.NewPool(nodes, selection.Options{Policy: o.Policy, StrictIndex: o.StrictIndex, Rand: o.Rand})
	if err != nil {
		return nil, fmt.Errorf("escaper %s: %w", o.Name, err)
	}
	r.pool = pool
	r.up.Store(&usable{})
	return r, nil
}

// Publish implements Escaper.
func (r *Route) Publish() {
	r.publish()
	r.publishParents()
}

func (r *Route) publish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := &usable{}
	for i, e := range r.next {
		next := e.base().up.Load()
		r.pool.SetUsable(i, next.any)
		u.any |= next.any
		u.sure |= next.sure
	}
	r.pool.Publish()
	r.up.Store(u)
}

// choose takes the node that leads to the path that the request has the trial
// of, if it has one, or that a rule names, else the one that the policy picks.
// Where all behind the policy's node is on trial, the request gets the trial, or
// another node: one request at a time goes there. It returns the path of the
// trial, also with an error.
func (r *Route) choose(req *Request, trial *Path, tested bool) (int, *Path, error) {
	if n, ok := r.rules.match(req); ok {
		return n, trial, nil
	}
	if trial != nil {
		for i, e := range r.next {
			if route, is := e.(*Route); e == Escaper(trial.d) || is && route.leadsTo(trial.d.name) {
				return i, trial, nil
			}
		}
	}
	want := selection.V4 | selection.V6
	if req.Target.Addr.IsValid() {
		want = selection.FamilyOf(req.Target.Addr)
	}
	n, err := r.pick(req, want)
	if err == nil && r.next[n].base().up.Load().sure&want == 0 {
		if trial == nil && !tested {
			if p := claim(r.next[n], want); p != nil {
				return n, p, nil
			}
		}
		n, err = r.pickAmong(req, want, func(i int) bool { return r.next[i].base().up.Load().sure&want != 0 })
	}
	if err != nil {
		return 0, trial, fail(ErrNoPath, selection.ErrDown, "escaper %s: %s", r.name, err)
	}
	return n, trial, nil
}

// claim gets the trial of a path that an escaper leads to, nil when there is
// none to have. A path that weighs nothing is none of the policy's.
func claim(e Escaper, want selection.Family) *Path {
	if route, is := e.(*Route); is {
		for _, next := range route.next {
			if p := claim(next, want); p != nil {
				return p
			}
		}
		return nil
	}
	d, is := e.(*Direct)
	if !is || d.up.Load().any&want == 0 {
		return nil
	}
	for _, p := range d.paths {
		if f := p.state.Load().trial(); f != 0 && (d.peers || f&want != 0) && p.Weight > 0 && p.trying.CompareAndSwap(false, true) {
			return p
		}
	}
	return nil
}

// leadsTo reports whether a request that is at the route may pass an escaper.
func (r *Route) leadsTo(name string) bool {
	return slices.ContainsFunc(r.next, func(e Escaper) bool {
		if e.Name() == name {
			return true
		}
		next, is := e.(*Route)
		return is && next.leadsTo(name)
	})
}

// HostRule sends the targets, or the users, of a list to a node.
type HostRule struct {
	Node  int
	Names []string // in lower case where they are hosts
}

// NetRule sends the addresses of some networks to a node.
type NetRule struct {
	Node int
	Nets []netip.Prefix
}

// RegexRule sends the names that an expression matches as a whole to a node.
type RegexRule struct {
	Node  int
	Exprs []*regexp.Regexp
}

// RulesOptions are rules as configured. A target is looked for in Exact, then
// in Nets when it is an address, else in Suffix and Regex; a client in Users,
// then in ClientNets. What nothing matches goes to Default, a node, or is the
// policy's when Default is negative.
type RulesOptions struct {
	Exact   []HostRule // hosts and addresses, as they are written
	Nets    []NetRule  // of literal targets; the longest prefix counts
	Suffix  []HostRule // a domain and all below it; the longest counts
	Regex   []RegexRule
	Users   []HostRule
	Clients []NetRule // of clients; the longest prefix counts
	Default int
}

// Rules choose a node by where a request goes to or comes from, without
// resolving anything. They do not change.
type Rules struct {
	exact      map[string]int
	exactAddr  map[netip.Addr]int
	suffix     map[string]int
	nets       netRules
	regex      []RegexRule
	users      map[string]int
	clients    netRules
	unresolved int // Default
	most       int
}

// NewRules prepares rules. Of two that match alike the first one counts.
func NewRules(o RulesOptions) *Rules {
	r := &Rules{
		exact: map[string]int{}, exactAddr: map[netip.Addr]int{}, suffix: map[string]int{}, users: map[string]int{},
		regex: o.Regex, unresolved: o.Default, most: o.Default,
		nets: newNetRules(o.Nets), clients: newNetRules(o.Clients),
	}
	for _, rule := range o.Exact {
		for _, h := range rule.Names {
			if a, err := netip.ParseAddr(h); err == nil {
				put(r.exactAddr, a.WithZone("").Unmap(), rule.Node)
			} else {
				put(r.exact, strings.ToLower(strings.TrimSuffix(h, ".")), rule.Node)
			}
		}
		r.most = max(r.most, rule.Node)
	}
	for _, rule := range o.Suffix {
		for _, h := range rule.Names {
			put(r.suffix, strings.ToLower(strings.Trim(h, ".")), rule.Node)
		}
		r.most = max(r.most, rule.Node)
	}
	for _, rule := range o.Users {
		for _, u := range rule.Names {
			put(r.users, u, rule.Node)
		}
		r.most = max(r.most, rule.Node)
	}
	for _, rule := range o.Regex {
		r.most = max(r.most, rule.Node)
	}
	for _, list := range [][]NetRule{o.Nets, o.Clients} {
		for _, rule := range list {
			r.most = max(r.most, rule.Node)
		}
	}
	return r
}

func put[K comparable](m map[K]int, k K, node int) {
	if _, taken := m[k]; !taken {
		m[k] = node
	}
}

func (r *Rules) check(nodes int) error {
	if r.most >= nodes {
		return fmt.Errorf("a rule names node %d of %d", r.most+1, nodes)
	}
	return nil
}

// match returns the node for a request, false where it is the policy's.
func (r *Rules) match(req *Request) (int, bool) {
	if r == nil {
		return 0, false
	}
	if n, ok := r.byClient(req); ok {
		return n, true
	}
	if req.Name != "" {
		if n, ok := r.byTarget(Target{Host: req.Name}); ok {
			return n, true
		}
	}
	if n, ok := r.byTarget(req.Target); ok {
		return n, true
	}
	return r.unresolved, r.unresolved >= 0
}

func (r *Rules) byClient(req *Request) (int, bool) {
	if req.User != "" {
		if n, ok := r.users[req.User]; ok {
			return n, true
		}
	}
	return r.clients.find(req.Client.Addr())
}

func (r *Rules) byTarget(t Target) (int, bool) {
	if t.Addr.IsValid() {
		a := t.Addr.WithZone("").Unmap()
		if n, ok := r.exactAddr[a]; ok {
			return n, true
		}
		return r.nets.find(a)
	}
	host := strings.ToLower(strings.TrimSuffix(t.Host, "."))
	if n, ok := r.exact[host]; ok {
		return n, true
	}
	for part := host; len(r.suffix) > 0; {
		if n, ok := r.suffix[part]; ok {
			return n, true
		}
		i := strings.IndexByte(part, '.')
		if i < 0 {
			break
		}
		part = part[i+1:]
	}
	for i := range r.regex {
		for _, re := range r.regex[i].Exprs {
			if re.MatchString(host) {
				return r.regex[i].Node, true
			}
		}
	}
	return 0, false
}

// netRules finds the longest of some prefixes that holds an address: a map for
// each length that there is, the longest first.
type netRules struct {
	lengths [2][]int // of IPv4 and of IPv6
	nodes   map[netip.Prefix]int
}

func newNetRules(rules []NetRule) netRules {
	n := netRules{nodes: map[netip.Prefix]int{}}
	for _, rule := range rules {
		for _, p := range rule.Nets {
			p = unmapPrefix(p).Masked()
			put(n.nodes, p, rule.Node)
			list := &n.lengths[family(p.Addr())]
			if !slices.Contains(*list, p.Bits()) {
				*list = append(*list, p.Bits())
			}
		}
	}
	for i := range n.lengths {
		slices.SortFunc(n.lengths[i], func(a, b int) int { return b - a })
	}
	return n
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (n *netRules) find(a netip.Addr) (int, bool) {
	a = a.WithZone("").Unmap()
	if !a.IsValid() {
		return 0, false
	}
	for _, bits := range n.lengths[family(a)] {
		p, err := a.Prefix(bits)
		if err != nil {
			continue
		}
		if node, ok := n.nodes[p]; ok {
			return node, true
		}
	}
	return 0, false
}
