package config

import (
	"fmt"
	"math/bits"
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"wayout/selection"
)

// A ref is a name in the file that another section has to define.
type ref struct {
	section, name string
	at            *place
}

// finish makes what needs the whole file: references, nodes, and everything that two places can contradict each other in.
func (d *decoder) finish(c *Config) {
	if d.spent {
		return
	}
	known := map[string]map[string]int{
		"resolver":   names(d, c.Resolvers, func(r *Resolver) string { return r.Name }),
		"uplink":     names(d, c.Uplinks, func(u *Uplink) string { return u.Name }),
		"escaper":    names(d, c.Escapers, func(e *Escaper) string { return e.Name }),
		"user_group": names(d, c.UserGroups, func(g *UserGroup) string { return g.Name }),
	}
	names(d, c.Servers, func(s *Server) string { return s.Name })
	for _, r := range d.refs {
		if _, ok := known[r.section][r.name]; !ok {
			d.fail(r.at, "no %s has this name", r.section)
		}
	}
	d.checkNetcfg(c)
	uplinks := make(map[string]*Uplink, len(c.Uplinks))
	for i := range c.Uplinks {
		uplinks[c.Uplinks[i].Name] = &c.Uplinks[i]
	}
	escapers := make(map[string]*Escaper, len(c.Escapers))
	for i := range c.Escapers {
		e := &c.Escapers[i]
		if d.places[e] != nil && !d.skipped[e] {
			d.buildNodes(e, uplinks)
		}
		if e.Resolver == "" {
			e.Resolver = DefaultResolver
			if _, ok := known["resolver"][DefaultResolver]; !ok {
				known["resolver"][DefaultResolver] = 0
				c.Resolvers = append(c.Resolvers, Resolver{Name: DefaultResolver, Type: "system"})
			}
		}
		escapers[e.Name] = e
	}
	d.checkUsers(c, escapers)
	d.checkServers(c)
}

// names refuses repeated names of a section and returns the line of each name.
func names[T any](d *decoder, list []T, name func(*T) string) map[string]int {
	lines := make(map[string]int, len(list))
	for i := range list {
		p, n := d.places[&list[i]], name(&list[i])
		if p == nil || n == "" {
			continue
		}
		at := d.find(p, "name")
		if first, ok := lines[n]; ok {
			d.fail(at, "is taken, see line %d", first)
			continue
		}
		lines[n] = at.node.Line
	}
	return lines
}

// minMaskBits is how many bits a mark needs for its class, uplink and path number.
const minMaskBits = 9

// checkNetcfg holds a mask that no mark fits in.
func (d *decoder) checkNetcfg(c *Config) {
	if n := bits.OnesCount32(c.Netcfg.MarkMask); n != 0 && n < minMaskBits {
		d.fail(d.find(d.places[&c.Netcfg], "mark_mask"), "has %d bits set, and a mark needs at least %d", n, minMaskBits)
	}
}

// selectionMap decodes egress_path: a map, or a string that holds it as JSON.
func (d *decoder) selectionMap(p *place, _ *field, v reflect.Value) {
	out := v.Addr().Interface().(*selection.Layer)
	if p.node.Kind == yaml.ScalarNode {
		s, ok := d.text(p)
		if !ok {
			return
		}
		l, err := selection.ParseMap([]byte(s))
		if err != nil {
			d.fail(p, "want a map of escapers, or a string that holds one as a JSON object: %s", err)
			return
		}
		*out = l
		return
	}
	if p.node.Kind != yaml.MappingNode || p.node.ShortTag() != "!!map" {
		d.fail(p, "want a map of escapers, or a string that holds one as a JSON object")
		return
	}
	seen := make(map[string]int)
	l := selection.Layer{}
	for i := 0; i+1 < len(p.node.Content); i += 2 {
		k := p.node.Content[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode || k.ShortTag() == "!!merge" {
			d.failGot(p, k.Line, got(k), "a key has to be the name of an escaper")
			continue
		}
		at := d.at(p, k.Value, 0, p.node.Content[i+1])
		if first, ok := seen[k.Value]; ok {
			d.failGot(at, k.Line, k.Value, "is given twice, first on line %d", first)
			continue
		}
		seen[k.Value] = k.Line
		if val, ok := d.selectionValue(at); ok {
			l = append(l, selection.Entry{Escaper: k.Value, Value: val})
		}
	}
	*out = l
}

// selectionValue reads an ID (text) or an index (a number): what JSON would have in their place.
func (d *decoder) selectionValue(p *place) (selection.Value, bool) {
	const want = "want the ID or address of a node, or its index as a number"
	if p.node.Kind != yaml.ScalarNode {
		d.fail(p, want)
		return selection.Value{}, false
	}
	s := p.node.Value
	switch p.node.ShortTag() {
	case "!!str":
		if s == "" {
			d.fail(p, want)
			return selection.Value{}, false
		}
		return selection.ID(s), true
	case "!!int", "!!float": // a whole number over 64 bits is a float to YAML
		if n, ok := parseNumber(s); ok && !strings.HasPrefix(s, "0x") {
			return selection.Index(n), true
		}
		if s != "" && strings.Trim(s, "0123456789") == "" && s[0] != '0' {
			d.fail(p, "an index has at most 64 bits")
			return selection.Value{}, false
		}
		d.fail(p, "an index is a whole number without sign and leading zeros; put an ID in quotes")
	case "!!null":
		d.fail(p, "has no value")
	default:
		d.fail(p, want+" (put an ID that looks like something else in quotes)")
	}
	return selection.Value{}, false
}

// checkUsers looks up what the operator's maps name, and makes the matchers of allow_path.
func (d *decoder) checkUsers(c *Config, escapers map[string]*Escaper) {
	for i := range c.UserGroups {
		users := c.UserGroups[i].Users
		names(d, users, func(u *User) string { return u.Name })
		for j := range users {
			u := &users[j]
			p := d.places[u]
			if strings.Contains(u.Name, ":") {
				d.fail(d.find(p, "name"), "must hold no colon: Basic authentication ends the name there")
			}
			if u.AllowPath != nil {
				u.Allow, _ = selection.ParseGlobs(u.AllowPath) // each one was parsed before
				d.checkPatterns(d.find(p, "allow_path"), escapers)
			}
			for _, entry := range u.EgressPath {
				d.checkEntry(d.find(p, "egress_path", "egress_path_id_map"), entry, escapers)
			}
		}
	}
}

// checkPatterns refuses a pattern that no path can match, because its escaper is none.
func (d *decoder) checkPatterns(p *place, escapers map[string]*Escaper) {
	for _, at := range d.items(p) {
		if _, err := selection.ParseGlobs([]string{at.node.Value}); err != nil {
			continue // said already
		}
		name, _, _ := strings.Cut(at.node.Value, "/")
		if !strings.Contains(name, "*") && escapers[name] == nil {
			d.fail(at, "matches nothing: no escaper has the name %s", name)
		}
	}
}

func (d *decoder) checkEntry(p *place, entry selection.Entry, escapers map[string]*Escaper) {
	at := &place{up: p, key: entry.Escaper}
	line := p.node.Line
	if v := d.find(p, entry.Escaper); v != nil {
		line = v.node.Line
	}
	e := escapers[entry.Escaper]
	if e == nil {
		d.failGot(at, line, entry.Escaper, "no escaper has this name")
		return
	}
	if b := d.builders[e]; b != nil && !b.selects(entry.Value) {
		what := "is no node of escaper " + e.Name
		if !b.broken {
			what += fmt.Sprintf(" (1 to %d by index, or an ID or address)", len(e.Nodes))
		}
		d.failGot(at, line, entry.Value.String(), "%s", what)
	}
}

// checkServers holds open proxies and listeners that are in each other's way.
func (d *decoder) checkServers(c *Config) {
	taken := make(map[uint16]*port)
	if m := d.find(d.places[&c.Metrics], "listen"); m != nil && c.Metrics.Listen.IsValid() {
		d.checkListener(taken, m, c.Metrics.Listen)
	}
	for i := range c.Servers {
		s := &c.Servers[i]
		p := d.places[s]
		list := d.find(p, "listen")
		if list == nil || d.skipped[s] {
			continue
		}
		for _, at := range d.items(list) {
			ap, bad := parseListen(at.node.Value)
			if at.node.Kind != yaml.ScalarNode || bad != "" {
				continue // said already
			}
			d.checkListener(taken, at, ap)
			if !s.Open && d.find(p, "user_group") == nil && !ap.Addr().IsLoopback() {
				d.fail(at, "without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant")
			}
		}
	}
}

// A port is who listens on one port number.
type port struct {
	exact      map[netip.Addr]string
	any4, any6 string // on 0.0.0.0, on [::] (of both families)
	some4      string // on some IPv4 address
	some       string // on some address
}

func (d *decoder) checkListener(taken map[uint16]*port, at *place, ap netip.AddrPort) {
	if ap.Port() == 0 {
		return
	}
	t := taken[ap.Port()]
	if t == nil {
		t = &port{exact: make(map[netip.Addr]string)}
		taken[ap.Port()] = t
	}
	a := ap.Addr()
	other := t.exact[a]
	switch {
	case other != "":
	case a == netip.IPv6Unspecified():
		other = t.some
	case t.any6 != "":
		other = t.any6
	case a == netip.IPv4Unspecified():
		other = t.some4
	case a.Is4():
		other = t.any4
	}
	if other != "" {
		d.fail(at, "is listened on by %s already", other)
		return
	}
	me := fmt.Sprintf("%s (line %s)", at, strconv.Itoa(at.node.Line))
	t.exact[a], t.some = me, me
	switch {
	case a == netip.IPv6Unspecified():
		t.any6 = me
	case a == netip.IPv4Unspecified():
		t.any4, t.some4 = me, me
	case a.Is4():
		t.some4 = me
	}
}
