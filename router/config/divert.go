package config

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

func parseInterface(s string) (string, string) { return s, badInterface(s) }

// interfaceNames decodes one name or a list, each once.
func (d *decoder) interfaceNames(p *place, f *field, v reflect.Value) {
	textKind(parseInterface).decode(d, p, f, v)
	seen := make(map[string]*place)
	for _, at := range d.items(p) {
		if at.node.Kind != yaml.ScalarNode || badInterface(at.node.Value) != "" {
			continue // said already
		}
		if first := seen[at.node.Value]; first != nil {
			d.fail(at, "is given twice, first on line %d", first.node.Line)
		}
		seen[at.node.Value] = at
	}
}

// parsePorts reads PORT or LOW-HIGH.
func parsePorts(s string) (first, last uint16, bad string) {
	from, to, ranged := strings.Cut(s, "-")
	if !ranged {
		to = from
	}
	low, ok := parseNumber(from)
	high, ok2 := parseNumber(to)
	switch {
	case !ok || !ok2 || strings.Contains(s, "0x"):
		return 0, 0, "want a port, or LOW-HIGH"
	case low < 1 || low > 65535 || high < 1 || high > 65535:
		return 0, 0, "a port is 1 to 65535"
	case high < low:
		return 0, 0, "the range ends before it begins"
	}
	return uint16(low), uint16(high), ""
}

// parseDivert reads PROTOCOL/PORTS.
func parseDivert(s string) (Divert, string) {
	proto, ports, found := strings.Cut(s, "/")
	if !found || proto != "tcp" && proto != "udp" {
		return Divert{}, "want tcp/PORT, udp/PORT, LOW-HIGH in the place of PORT, or * for all ports"
	}
	out := Divert{TCP: proto == "tcp", Last: 65535}
	if ports == "*" {
		return out, ""
	}
	var bad string
	out.First, out.Last, bad = parsePorts(ports)
	return out, bad
}

// overlaps says whether a packet can be meant by both.
func (v Divert) overlaps(o Divert) bool {
	return v.TCP == o.TCP && v.First <= o.Last && o.First <= v.Last
}

func (d *decoder) diverts(p *place, _ *field, v reflect.Value) {
	var out []Divert
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one")
	}
	for _, at := range items {
		s, ok := d.text(at)
		if !ok {
			continue
		}
		x, bad := parseDivert(s)
		if bad != "" {
			d.fail(at, "%s", bad)
			continue
		}
		out = append(out, x)
	}
	v.Set(reflect.ValueOf(out))
}

// parseListenNet reads PREFIX:PORTS, with an IPv6 prefix in brackets.
func parseListenNet(s string) (ListenNet, string) {
	const want = "want PREFIX:PORT, with an IPv6 prefix in brackets"
	colon := strings.LastIndexByte(s, ':')
	if colon < 0 {
		return ListenNet{}, want
	}
	text := s[:colon]
	inner, bracketed := strings.CutPrefix(text, "[")
	if bracketed {
		if inner, bracketed = strings.CutSuffix(inner, "]"); !bracketed {
			return ListenNet{}, want
		}
	}
	n, err := netip.ParsePrefix(inner)
	switch {
	case err != nil, n.Addr().Is6() != bracketed:
		return ListenNet{}, want
	case n.Addr().Is4In6():
		return ListenNet{}, "write the IPv4 prefix as IPv4"
	case n != n.Masked():
		return ListenNet{}, fmt.Sprintf("has bits beyond its length, perhaps %s", n.Masked())
	case n.Bits() == 0:
		return ListenNet{}, "a prefix of all addresses is written :PORT"
	case n.Addr().IsMulticast():
		return ListenNet{}, "a multicast address cannot be listened on"
	}
	first, last, bad := parsePorts(s[colon+1:])
	return ListenNet{Prefix: n, First: first, Last: last}, bad
}

func (d *decoder) listenNet(p *place) (ListenNet, bool) {
	s, ok := d.text(p)
	if !ok {
		return ListenNet{}, false
	}
	n, bad := parseListenNet(s)
	if bad != "" {
		d.fail(p, "%s", bad)
	}
	return n, bad == ""
}

// maxTaken is how many entries the kernel's program for diverted traffic holds: one for each interface of a tproxy
// and each of its divert, and one for each prefix of a listen.
const maxTaken = 128

// A taker is who takes traffic.
type taker struct {
	at     *place
	iface  string // "": any
	divert Divert
	net    netip.Prefix // without an interface
}

// overlaps says whether a packet can be meant by both.
func (t taker) overlaps(o taker) bool {
	if t.iface != o.iface || !t.divert.overlaps(o.divert) {
		return false
	}
	return t.iface != "" || t.net.Overlaps(o.net)
}

// checkDiverts holds what two servers, or two entries of one, would both take.
func (d *decoder) checkDiverts(c *Config) {
	var all []taker
	rest := make(map[string]*Server)
	add := func(t taker) {
		for _, o := range all {
			if t.overlaps(o) {
				d.fail(t.at, "is taken by %s (line %d) already", o.at, o.at.node.Line)
				return
			}
		}
		all = append(all, t)
		if len(all) == maxTaken+1 {
			d.fail(t.at, "the file takes more than %d kinds of traffic: interfaces times divert, and prefixes in listen", maxTaken)
		}
	}
	for i := range c.Servers {
		s := &c.Servers[i]
		p := d.places[s]
		if p == nil {
			continue
		}
		for _, at := range d.itemsOf(p, "listen") {
			n, bad := parseListenNet(at.node.Value)
			if at.node.Kind != yaml.ScalarNode || bad != "" || s.Type == "tproxy" {
				continue // no prefix, or said already
			}
			add(taker{at: at, divert: Divert{TCP: true, First: n.First, Last: n.Last}, net: n.Prefix})
		}
		if s.Type != "tproxy" {
			continue
		}
		for _, name := range s.Interface {
			if o := rest[name]; o != nil && o.Rest != s.Rest {
				d.fail(p, "contradicts server %s, whose rest is %s, on interface %s", o.Name, o.Rest, name)
			}
			rest[name] = s
			for _, at := range d.itemsOf(p, "divert") {
				x, bad := parseDivert(at.node.Value)
				if at.node.Kind == yaml.ScalarNode && bad == "" {
					add(taker{at: at, iface: name, divert: x})
				}
			}
		}
		if s.Select.Mode != "" && s.Select.Mode != "map" {
			d.fail(d.find(p, "select"), "a tproxy has a map of escapers alone: its clients connect to no address of its own")
		}
	}
}

// itemsOf are the entries of a list in a map, none when it is not there.
func (d *decoder) itemsOf(p *place, key string) []*place {
	if at := d.find(p, key); at != nil {
		return d.items(at)
	}
	return nil
}

// checkListenNets holds the prefixes of a server's listen against single listeners and what goes with them.
func (d *decoder) checkListenNets(s *Server, p *place) {
	for _, at := range d.itemsOf(p, "listen") {
		n, bad := parseListenNet(at.node.Value)
		if at.node.Kind != yaml.ScalarNode || bad != "" {
			continue
		}
		if !s.Open && d.find(p, "user_group") == nil && !n.Prefix.Addr().IsLoopback() {
			d.fail(at, "without user_group only loopback addresses are listened on, unless open: true says that an open proxy is meant")
		}
		if s.Select.Mode == "port" && len(s.Listen) > 0 {
			d.fail(at, "select: port counts the ports of prefixes or of single addresses, and here are both")
		}
	}
}

// checkHeld finds single listeners inside the prefixes of a server's listen: nothing would ever come to them, as a
// prefix goes before all else. It goes before listeners on all addresses too, and these have the rest.
func (d *decoder) checkHeld(p *place, taken map[uint16]*port) {
	for _, at := range d.itemsOf(p, "listen") {
		n, bad := parseListenNet(at.node.Value)
		if at.node.Kind != yaml.ScalarNode || bad != "" {
			continue
		}
		for _, number := range slices.Sorted(maps.Keys(taken)) {
			if number < n.First || number > n.Last {
				continue
			}
			exact := taken[number].exact
			for _, a := range slices.SortedFunc(maps.Keys(exact), netip.Addr.Compare) {
				if !a.IsUnspecified() && n.Prefix.Contains(a.Unmap()) {
					d.fail(at, "holds %s, which is listened on by %s", netip.AddrPortFrom(a, number), exact[a])
				}
			}
		}
	}
}

// checkDivertedUsers wants that a tproxy's users can be known.
func (d *decoder) checkDivertedUsers(c *Config, s *Server, p *place) {
	if s.Type != "tproxy" || s.UserGroup == "" {
		return
	}
	for i := range c.UserGroups {
		if c.UserGroups[i].Name != s.UserGroup {
			continue
		}
		for _, u := range c.UserGroups[i].Users {
			if u.Password == "" && len(u.From) > 0 {
				return
			}
		}
		d.fail(d.find(p, "user_group"), "has no user who is known by from alone: diverted clients give no password")
	}
}

// ports is how many ports listen has. Every address of a prefix has the same ones.
func (s *Server) ports() int {
	n := len(s.Listen)
	for _, l := range s.ListenNets {
		n += int(l.Last-l.First) + 1
	}
	return n
}
