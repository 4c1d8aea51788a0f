package router

import (
	"fmt"
	"regexp"
	"strings"

	"wayout/bpf"
	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/selection"
)

// buildEscapers makes the escapers of a plan, and their table.
func (r *Router) buildEscapers(p, prior *plan) error {
	var err error
	if p.sockets, err = escaper.NewSockets(0, 0); err != nil {
		return err
	}
	if k := p.config.Keepalive; k.Enable {
		p.idle = escaper.NewIdle(k.MaxPerKey, k.Max, k.IdleExpire)
	}
	return r.buildTable(p, prior, func(*config.Escaper) bool { return true })
}

// buildTable makes the table of a plan, of escapers that are built anew, as the
// routes are, and of those of the plan before.
func (r *Router) buildTable(p, prior *plan, anew func(*config.Escaper) bool) error {
	var all []escaper.Escaper
	for i := range p.config.Escapers {
		c := &p.config.Escapers[i]
		var e escaper.Escaper
		var err error
		switch {
		case strings.HasPrefix(c.Type, "route_"):
			e, err = r.buildRoute(c)
		case anew(c):
			e, err = r.buildDirect(p, prior, c)
		default:
			e = prior.table.Direct(c.Name)
		}
		if err != nil {
			return err
		}
		all = append(all, e)
	}
	var err error
	if p.table, err = escaper.NewTable(all...); err != nil {
		return err
	}
	p.holdings = map[*escaper.Direct]*holding{}
	for _, d := range p.table.Directs() {
		if prior != nil {
			p.holdings[d] = prior.holdings[d]
		}
		if p.holdings[d] == nil {
			p.holdings[d] = p.hold(d.Paths())
		}
	}
	return nil
}

// buildDirect makes an escaper whose nodes are egress paths.
func (r *Router) buildDirect(p, prior *plan, e *config.Escaper) (*escaper.Direct, error) {
	names := p.resolvers[e.Resolver]
	resolver := findResolver(p.config, e.Resolver)
	o := escaper.Options{
		Name: e.Name, Policy: e.PickPolicy, StrictIndex: e.StrictIndex, EnableSelection: e.EnablePathSelection,
		Resolver: names, Sockets: p.sockets, Idle: p.idle, Sessions: r.sessions,
		ConnectTimeout: e.ConnectTimeout, AttemptDelay: e.HappyEyeballs.ConnectionAttemptDelay,
		Peers: e.Proxy(), PassSelection: e.PassSelection,
	}
	if resolver.Bind == "path" {
		o.Bound = func(dial escaper.DialFunc) escaper.Resolver { return names.Bound(dial) }
	}
	var err error
	if o.PickKey, err = escaper.ParsePickKey(e.PickKey); err != nil {
		return nil, err
	}
	if o.Strategy, err = escaper.ParseStrategy(e.ResolveStrategy); err != nil {
		return nil, err
	}
	if o.Filter, err = escaper.NewFilter(p.host, rules(e.Filter.Allow), rules(e.Filter.Deny)); err != nil {
		return nil, fmt.Errorf("escaper %s: %w", e.Name, err)
	}
	r.judgeHealth(&o, e)
	if prior != nil && prior.table != nil {
		o.Prior = prior.table.Direct(e.Name)
	}
	nodes, err := p.nodes(e)
	if err != nil {
		return nil, fmt.Errorf("escaper %s: %w", e.Name, err)
	}
	if o.Nodes, err = r.number(p, nodes, o.Prior); err != nil {
		return nil, fmt.Errorf("escaper %s: %w", e.Name, err)
	}
	return escaper.NewDirect(o)
}

func rules(list []config.Rule) []string {
	words := make([]string, len(list))
	for i, r := range list {
		if words[i] = string(r.Class); r.Class == config.ClassNone {
			words[i] = r.Prefix.String()
		}
	}
	return words
}

// nodes lists the paths of an escaper, without the numbers that the kernel
// knows them by.
func (p *plan) nodes(e *config.Escaper) ([]escaper.NodeOptions, error) {
	var nodes []escaper.NodeOptions
	switch {
	case e.Type == "direct_float":
		return p.floating(e), nil
	case e.Proxy():
		return p.peers(e)
	}
	for i := range e.Nodes {
		nodes = append(nodes, p.node(&e.Nodes[i]))
	}
	return nodes, nil
}

// node is a node of addresses, prefixes or an interface.
func (p *plan) node(n *config.Node) escaper.NodeOptions {
	o := escaper.NodeOptions{
		ID: n.ID, V4: n.IPv4, V6: n.IPv6, Net4: n.Net4, Net6: n.Net6,
		Interface: n.Interface, BindToDevice: n.Interface != "", Uplink: n.Uplink, Weight: n.Weight, EIP: n.EIP,
	}
	if !o.V4.IsValid() && !o.V6.IsValid() && !o.Net4.IsValid() && !o.Net6.IsValid() {
		o.Unbound = selection.V4 | selection.V6
	}
	return o
}

// number gives nodes the numbers that the kernel knows their sockets by: the
// one that a path has, as long as it is the same path.
func (r *Router) number(p *plan, nodes []escaper.NodeOptions, prior *escaper.Direct) ([]escaper.NodeOptions, error) {
	before := map[string]*escaper.Path{}
	if prior != nil {
		for _, path := range prior.Paths() {
			before[path.ID] = path
		}
	}
	for i := range nodes {
		o := &nodes[i]
		var err error
		if old := before[o.ID]; old != nil && old.Same(o) {
			o.Number = old.Number
		} else if o.Number, err = r.numbers.Take(); err != nil {
			return nil, fmt.Errorf("node %s: %w", o.ID, err)
		} else {
			p.taken = append(p.taken, o.Number)
		}
		if o.Mark, err = p.layout.Mark(bpf.ClassPath, p.uplinks[o.Uplink].number, o.Number); err != nil {
			return nil, fmt.Errorf("node %s: %w", o.ID, err)
		}
	}
	return nodes, nil
}

// buildRoute makes an escaper whose nodes are escapers.
func (r *Router) buildRoute(e *config.Escaper) (*escaper.Route, error) {
	o := escaper.RouteOptions{
		Name: e.Name, Policy: e.PickPolicy, StrictIndex: e.StrictIndex, EnableSelection: e.EnablePathSelection,
		Sessions: r.sessions,
	}
	var err error
	if e.PickKey != "" { // a type without a policy to choose has none
		if o.PickKey, err = escaper.ParsePickKey(e.PickKey); err != nil {
			return nil, err
		}
	}
	for _, n := range e.Next {
		o.Next = append(o.Next, escaper.Next{Escaper: n.Escaper, Weight: n.Weight})
	}
	switch e.Type {
	case "route_failover":
		o.Policy = selection.Serial
	case "route_upstream", "route_client":
		if o.Next, o.Rules, err = routeRules(e); err != nil {
			return nil, fmt.Errorf("escaper %s: %w", e.Name, err)
		}
	}
	return escaper.NewRoute(o)
}

// routeRules turns the rules of a route into rules over its nodes, which are
// the escapers that they name, in the order in which they are named.
func routeRules(e *config.Escaper) ([]escaper.Next, *escaper.Rules, error) {
	var next []escaper.Next
	index := map[string]int{}
	for i, name := range e.NextNames() {
		index[name] = i
		next = append(next, escaper.Next{Escaper: name, Weight: 1})
	}
	node := func(name string) int { return index[name] }
	hosts := func(list []config.HostRule) []escaper.HostRule {
		var out []escaper.HostRule
		for _, h := range list {
			out = append(out, escaper.HostRule{Node: node(h.Next), Names: h.Hosts})
		}
		return out
	}
	nets := func(list []config.NetRule) []escaper.NetRule {
		var out []escaper.NetRule
		for _, n := range list {
			out = append(out, escaper.NetRule{Node: node(n.Next), Nets: n.Subnets})
		}
		return out
	}
	o := escaper.RulesOptions{Exact: hosts(e.ExactMatch), Suffix: hosts(e.SuffixMatch), Users: hosts(e.UserMatch)}
	if e.Type == "route_client" {
		o.Clients = nets(e.SubnetMatch)
	} else {
		o.Nets = nets(e.SubnetMatch)
	}
	for _, rule := range e.RegexMatch {
		r := escaper.RegexRule{Node: node(rule.Next)}
		for _, text := range rule.Hosts {
			re, err := regexp.Compile(`\A(?:` + text + `)\z`)
			if err != nil {
				return nil, nil, err
			}
			r.Exprs = append(r.Exprs, re)
		}
		o.Regex = append(o.Regex, r)
	}
	o.Default = node(e.DefaultNext)
	return next, escaper.NewRules(o), nil
}

func findResolver(c *config.Config, name string) *config.Resolver {
	for i := range c.Resolvers {
		if c.Resolvers[i].Name == name {
			return &c.Resolvers[i]
		}
	}
	return &config.Resolver{Name: name, Type: "system"}
}
