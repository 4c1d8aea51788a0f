package config

import (
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"reflect"
	"slices"
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
		if d.places[e] != nil {
			d.build(e, uplinks)
			d.checkHealth(e)
		}
		if e.Resolver == "" && !strings.HasPrefix(e.Type, "route_") {
			e.Resolver = DefaultResolver
			if _, ok := known["resolver"][DefaultResolver]; !ok {
				known["resolver"][DefaultResolver] = 0
				c.Resolvers = append(c.Resolvers, Resolver{Name: DefaultResolver, Type: "system"})
			}
		}
		escapers[e.Name] = e
	}
	edges := d.edges(c)
	d.checkCycles(c, edges)
	for i := range c.Escapers {
		d.checkPeers(&c.Escapers[i], escapers)
		d.checkUserMatch(c, &c.Escapers[i])
	}
	d.checkUsers(c, escapers, uplinks)
	d.checkServers(c, escapers, edges)
	d.checkUserNames(c)
	d.checkDiverts(c)
	d.checkPins(c, escapers)
}

// build makes what an escaper is by its own keys.
func (d *decoder) build(e *Escaper, uplinks map[string]*Uplink) {
	switch {
	case e.Type == "direct_fixed":
		d.buildNodes(e, uplinks)
	case e.Type == "direct_float":
		b := &builder{d: d, e: e, at: d.places[e], uplinks: uplinks}
		b.pins(&nodeSpec{}, b.at)
	case e.Proxy() && !e.Float():
		d.buildPeers(e)
	case strings.HasPrefix(e.Type, "route_"):
		d.buildRoute(e)
	}
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
	nodes := make(map[string]Inline)
	*out = d.layer(p, nodes)
	if len(nodes) > 0 {
		d.inline[out] = nodes
	}
}

// layer decodes a map of selections, and the inline nodes in it into nodes, unless that is nil and they are refused.
func (d *decoder) layer(p *place, nodes map[string]Inline) selection.Layer {
	if p.node.Kind == yaml.ScalarNode {
		s, ok := d.text(p)
		if !ok {
			return nil
		}
		l, err := selection.ParseMap([]byte(s))
		if err != nil && nodes != nil {
			rest, inline := d.inlineText(p, s)
			if rest != nil {
				l, err = selection.ParseMap(rest)
			}
			maps.Copy(nodes, inline)
		}
		if err != nil {
			d.fail(p, "want a map of escapers, or a string that holds one as a JSON object: %s", err)
			return nil
		}
		return l
	}
	if p.node.Kind != yaml.MappingNode || p.node.ShortTag() != "!!map" {
		d.fail(p, "want a map of escapers, or a string that holds one as a JSON object")
		return nil
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
		if at.node.Kind == yaml.MappingNode && at.node.ShortTag() == "!!map" && nodes != nil {
			nodes[k.Value] = d.inlineMap(at)
			continue
		}
		if val, ok := d.selectionValue(at); ok {
			l = append(l, selection.Entry{Escaper: k.Value, Value: val})
		}
	}
	return l
}

// serverSelect decodes select: a word, or a map of selections.
func (d *decoder) serverSelect(p *place, _ *field, v reflect.Value) {
	out := v.Addr().Interface().(*Select)
	switch s := p.node.Value; {
	case p.node.Kind == yaml.ScalarNode && (s == "ingress_ip" || s == "port"):
		if s, ok := d.text(p); ok {
			*out = Select{Mode: s}
		}
	case p.node.Kind == yaml.ScalarNode && !strings.HasPrefix(strings.TrimSpace(s), "{"):
		if _, ok := d.text(p); ok {
			d.fail(p, "want ingress_ip, port or a map of escapers")
		}
	default:
		if l := d.layer(p, nil); len(l) > 0 {
			*out = Select{Mode: "map", Map: l}
		}
	}
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
func (d *decoder) checkUsers(c *Config, escapers map[string]*Escaper, uplinks map[string]*Uplink) {
	for i := range c.UserGroups {
		users := c.UserGroups[i].Users
		names(d, users, func(u *User) string { return u.Name })
		open := make(map[netip.Prefix]*place) // networks that need no password
		for j := range users {
			u := &users[j]
			p := d.places[u]
			if p == nil {
				continue
			}
			if strings.Contains(u.Name, ":") {
				d.fail(d.find(p, "name"), "must hold no colon: Basic authentication ends the name there")
			}
			if u.AllowPath != nil {
				u.Allow, _ = selection.ParseGlobs(u.AllowPath) // each one was parsed before
				d.checkPatterns(d.find(p, "allow_path"), escapers)
			}
			d.checkFrom(p, open)
			operator := d.find(p, "egress_path", "egress_path_id_map")
			for _, entry := range u.EgressPath {
				d.checkEntry(operator, entry, escapers)
			}
			u.Inline = d.inline[&u.EgressPath]
			for _, name := range slices.Sorted(maps.Keys(u.Inline)) {
				d.checkInline(operator, name, u.Inline[name], escapers, uplinks)
			}
		}
	}
}

// checkFrom wants a password or a network of a user, and of the users without a password that each has its own.
func (d *decoder) checkFrom(p *place, open map[netip.Prefix]*place) {
	from, password := d.find(p, "from"), d.find(p, "password")
	switch {
	case from == nil && password == nil:
		d.failMissing(p, "password", "is required, or else from")
		return
	case from == nil || password != nil:
		return
	}
	for _, at := range d.items(from) {
		n, bad := parseNetwork(at.node.Value)
		if at.node.Kind != yaml.ScalarNode || bad != "" {
			continue // said already
		}
		if first := open[n]; first != nil && first != p {
			d.fail(at, "is a network of the user on line %d too", first.node.Line)
			continue
		}
		open[n] = p
	}
}

// checkInline looks up what an inline node is for and what it names.
func (d *decoder) checkInline(p *place, name string, n Inline, escapers map[string]*Escaper, uplinks map[string]*Uplink) {
	at, line, value := d.entryAt(p, name)
	e := escapers[name]
	switch {
	case e == nil:
		d.failGot(at, line, name, "no escaper has this name")
		return
	case e.Type == "":
		return // said already
	case e.Type != "direct_float":
		d.failGot(at, line, "{...}", "a node itself is for a direct_float, and %s is a %s", name, e.Type)
		return
	case n.Uplink != "" && uplinks[n.Uplink] == nil:
		d.failGot(&place{up: at, key: "uplink"}, line, n.Uplink, "no uplink has this name")
	case n.V6.IsLinkLocalUnicast() && n.Uplink == "" && e.Uplink == "" && e.Interface == "":
		d.failGot(at, line, n.V6.String(), "a link-local address needs an uplink")
	}
	if u := uplinks[n.Uplink]; u != nil && e.Interface != "" && u.Interface != "" && u.Interface != e.Interface {
		d.failGot(value, line, n.Uplink, "contradicts the escaper's interface %s: the uplink's is %s", e.Interface, u.Interface)
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

// entryAt is where a map of selections at p has the value for an escaper, and that value's line and place.
func (d *decoder) entryAt(p *place, escaper string) (at *place, line int, value *place) {
	at = &place{up: p, key: escaper}
	if v := d.find(p, escaper); v != nil {
		return at, v.node.Line, v
	}
	return at, p.node.Line, at
}

func (d *decoder) checkEntry(p *place, entry selection.Entry, escapers map[string]*Escaper) {
	at, line, _ := d.entryAt(p, entry.Escaper)
	e := escapers[entry.Escaper]
	if e == nil {
		d.failGot(at, line, entry.Escaper, "no escaper has this name")
		return
	}
	if b := d.builders[e]; b != nil && !b.selects(entry.Value) {
		d.failGot(at, line, entry.Value.String(), "%s", b.what())
	}
}

// checkServers holds open proxies, listeners that are in each other's way, and selections that cannot be.
func (d *decoder) checkServers(c *Config, escapers map[string]*Escaper, edges map[string][]edge) {
	taken := make(map[uint16]*port)
	if m := d.find(d.places[&c.Metrics], "listen"); m != nil && c.Metrics.Listen.IsValid() {
		d.checkListener(taken, m, c.Metrics.Listen)
	}
	for i := range c.Servers {
		s := &c.Servers[i]
		p := d.places[s]
		if p == nil {
			continue
		}
		s.ListenNets = d.listenNets[&s.Listen]
		d.checkSelect(s, p, escapers, edges)
		d.checkDivertedUsers(c, s, p)
		if at := d.find(p, "username_params"); s.UsernameParams && d.find(p, "user_group") == nil {
			d.fail(at, "needs a user_group: without one nobody has a user name")
		}
		list := d.find(p, "listen")
		if list == nil {
			continue
		}
		d.checkListenNets(s, p)
		for _, at := range d.items(list) {
			l, bad := parseListen(at.node.Value)
			if at.node.Kind != yaml.ScalarNode || bad != "" {
				continue // said already
			}
			for n := range l.count {
				if !d.checkListener(taken, at, netip.AddrPortFrom(l.first.Addr(), l.first.Port()+uint16(n))) {
					break // one error for a range
				}
			}
			if !s.Open && d.find(p, "user_group") == nil && !l.first.Addr().IsLoopback() {
				d.fail(at, "without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant")
			}
		}
	}
	for i := range c.Servers {
		if p := d.places[&c.Servers[i]]; p != nil {
			d.checkHeld(p, taken)
		}
	}
}

// checkUserNames wants that a user can give his name where parameters are read
// from behind it.
func (d *decoder) checkUserNames(c *Config) {
	for i := range c.UserGroups {
		g := &c.UserGroups[i]
		reader := slices.IndexFunc(c.Servers, func(s Server) bool { return s.UsernameParams && s.UserGroup == g.Name })
		if reader < 0 {
			continue
		}
		for j := range g.Users {
			u := &g.Users[j]
			p := d.places[u]
			_, params := selection.SplitUsername(u.Name)
			if params == "" || p == nil || d.find(p, "password") == nil {
				continue
			}
			d.fail(d.find(p, "name"), "server %s reads %s as parameters (username_params): nobody can log in by this name", c.Servers[reader].Name, params)
		}
	}
}

// checkSelect looks up what select names, among the escapers that the server's requests pass.
func (d *decoder) checkSelect(s *Server, p *place, escapers map[string]*Escaper, edges map[string][]edge) {
	at := d.find(p, "select")
	if s.Select.Mode == "port" && s.ports() == 1 {
		d.fail(at, "needs a range of ports in listen, or several of them")
	}
	if len(s.Select.Map) == 0 {
		return
	}
	passed := passes(s.Escaper, edges)
	for _, entry := range s.Select.Map {
		d.checkEntry(at, entry, escapers)
		if escapers[entry.Escaper] != nil && escapers[s.Escaper] != nil && !passed[entry.Escaper] {
			where, line, _ := d.entryAt(at, entry.Escaper)
			d.failGot(where, line, entry.Escaper, "no request of this server passes this escaper: it begins at %s", s.Escaper)
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

// checkListener notes who listens where. false: another does.
func (d *decoder) checkListener(taken map[uint16]*port, at *place, ap netip.AddrPort) bool {
	if ap.Port() == 0 {
		return true
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
		return false
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
	return true
}
