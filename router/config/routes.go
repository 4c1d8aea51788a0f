package config

import (
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// NextNames returns the next escapers of a route, each once, in the order of their indexes: that of next, or else that
// in which the rules name them (exact_match, child_match, subnet_match, regex_match, user_match) and default_next last.
// It is nil for an escaper that is no route.
func (e *Escaper) NextNames() []string {
	var out []string
	seen := make(map[string]bool)
	add := func(name string) {
		if name != "" && !seen[name] {
			seen[name] = true
			out = append(out, name)
		}
	}
	for i := range e.Next {
		add(e.Next[i].Escaper)
	}
	for _, rules := range [...][]HostRule{e.ExactMatch, e.SuffixMatch} {
		for i := range rules {
			add(rules[i].Next)
		}
	}
	for i := range e.SubnetMatch {
		add(e.SubnetMatch[i].Next)
	}
	for _, rules := range [...][]HostRule{e.RegexMatch, e.UserMatch} {
		for i := range rules {
			add(rules[i].Next)
		}
	}
	add(e.DefaultNext)
	return out
}

// nexts decodes a list of escapers: a name, or a map of escaper and weight.
func (d *decoder) nexts(p *place, f *field, v reflect.Value) {
	if !d.isList(p) {
		return
	}
	if len(p.node.Content) == 0 {
		d.fail(p, "want at least one escaper")
	}
	out := make([]Next, len(p.node.Content))
	name := d.table(f.sub).fields[0]
	for i, n := range p.node.Content {
		if d.spent {
			return
		}
		at, item := d.at(p, "", i, n), reflect.ValueOf(&out[i]).Elem()
		if at.node.Kind == yaml.ScalarNode {
			out[i].Weight = 1
			name.decode(d, at, &name, item.Field(name.index))
			d.places[&out[i]] = at
			continue
		}
		d.structure(at, item)
	}
	v.Set(reflect.ValueOf(out))
}

// hostRules decodes a list of the struct f.sub, which is a HostRule with keys.
func (d *decoder) hostRules(p *place, f *field, v reflect.Value) {
	list := reflect.New(reflect.SliceOf(f.sub)).Elem()
	d.sublist(p, f, list)
	out := make([]HostRule, list.Len())
	for i := range out {
		out[i] = list.Index(i).Convert(reflect.TypeFor[HostRule]()).Interface().(HostRule)
	}
	v.Set(reflect.ValueOf(out))
}

// buildRoute checks a route_* escaper by itself.
func (d *decoder) buildRoute(e *Escaper) {
	p := d.places[e]
	b := &builder{d: d, e: e, at: p, ids: make(map[string]*place)}
	d.builders[e] = b
	seen := make(map[string]*place)
	for i := range e.Next {
		n := &e.Next[i]
		at := d.places[n]
		if n.Escaper == "" { // said already
			b.broken, b.lostID = true, true
			continue
		}
		value := d.find(at, "escaper")
		if value == nil {
			value = at
		}
		if first := seen[n.Escaper]; first != nil {
			b.broken = true
			d.fail(value, "is given twice, first on line %d", first.node.Line)
			continue
		}
		seen[n.Escaper] = value
		if w := d.find(at, "weight"); w != nil && e.Type == "route_failover" {
			d.fail(w, "a route_failover takes its escapers in order: it has no weights")
		}
	}
	for _, x := range [...]struct {
		key, alias, list string
		parse            textKind
	}{
		{"exact_match", "", "hosts", parseHost},
		{"child_match", "suffix_match", "domains", parseHostName},
		{"subnet_match", "", "subnets", networkText},
		{"regex_match", "", "regexes", parseRegex},
		{"user_match", "", "users", parseUserName},
	} {
		d.distinct(d.find(p, x.key, x.alias), x.list, x.parse)
	}
	b.lostID = b.lostID || len(e.NextNames()) == 0
	b.broken = b.broken || b.lostID
}

// distinct refuses what two rules match, or one rule twice.
func (d *decoder) distinct(rules *place, key string, parse textKind) {
	if rules == nil || rules.node.Kind != yaml.SequenceNode {
		return
	}
	seen := make(map[string]*place)
	for _, rule := range d.items(rules) {
		list := d.find(rule, key)
		if list == nil {
			continue
		}
		within := make(map[string]bool) // a list of networks says this by itself
		for _, at := range d.items(list) {
			s, bad := parse(at.node.Value)
			if at.node.Kind != yaml.ScalarNode || bad != "" || key == "subnets" && within[s] {
				continue
			}
			within[s] = true
			if first := seen[s]; first != nil {
				d.fail(at, "is matched already, see line %d", first.node.Line)
				continue
			}
			seen[s] = at
		}
	}
}

// An edge is that a route names a next escaper.
type edge struct {
	to string
	at *place
}

// edges returns, by the name of each escaper, where it leads.
func (d *decoder) edges(c *Config) map[string][]edge {
	out := make(map[string][]edge)
	for _, r := range d.refs {
		if r.section != "escaper" {
			continue
		}
		for p := r.at; p.up != nil; p = p.up {
			if p.key == "" && p.up.key == "escaper" && p.up.up != nil && p.up.up.up == nil && p.index < len(c.Escapers) {
				name := c.Escapers[p.index].Name
				out[name] = append(out[name], edge{r.name, r.at})
			}
		}
	}
	return out
}

// checkCycles refuses routes that lead back to themselves: each edge that closes a cycle is one mistake.
func (d *decoder) checkCycles(c *Config, edges map[string][]edge) {
	const onTrail, done = 1, 2
	state := make(map[string]int)
	var trail []string
	var walk func(string)
	walk = func(name string) {
		state[name] = onTrail
		trail = append(trail, name)
		said := make(map[string]bool)
		for _, e := range edges[name] {
			switch {
			case e.to == name && !said[e.to]:
				d.fail(e.at, "an escaper may not route to itself")
			case state[e.to] == onTrail && !said[e.to]:
				cycle := append(slices.Clone(trail[slices.Index(trail, e.to):]), e.to)
				d.fail(e.at, "routes in a circle: %s", strings.Join(cycle, " -> "))
			case state[e.to] == 0:
				walk(e.to)
			}
			said[e.to] = true
		}
		trail = trail[:len(trail)-1]
		state[name] = done
	}
	for i := range c.Escapers {
		if state[c.Escapers[i].Name] == 0 {
			walk(c.Escapers[i].Name)
		}
	}
}

// passes returns the escapers that a request for the first one may pass.
func passes(from string, edges map[string][]edge) map[string]bool {
	seen := map[string]bool{from: true}
	for todo := []string{from}; len(todo) > 0; {
		name := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, e := range edges[name] {
			if !seen[e.to] {
				seen[e.to] = true
				todo = append(todo, e.to)
			}
		}
	}
	return seen
}

// checkUserMatch refuses users that no group has.
func (d *decoder) checkUserMatch(c *Config, e *Escaper) {
	list := d.find(d.places[e], "user_match")
	if len(e.UserMatch) == 0 || list == nil {
		return
	}
	known := make(map[string]bool)
	for i := range c.UserGroups {
		for j := range c.UserGroups[i].Users {
			name := c.UserGroups[i].Users[j].Name
			if name == "" {
				return // it could not be read, and may be the one
			}
			known[name] = true
		}
	}
	for _, rule := range d.items(list) {
		users := d.find(rule, "users")
		if users == nil {
			continue
		}
		for _, at := range d.items(users) {
			if _, bad := parseUserName(at.node.Value); bad == "" && at.node.Kind == yaml.ScalarNode && !known[at.node.Value] {
				d.fail(at, "no user has this name")
			}
		}
	}
}
