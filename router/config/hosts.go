package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parseHostName returns a host name as names are compared: in lower case, without a dot at the end.
func parseHostName(s string) (name, bad string) {
	const want = "want a host name: labels of letters, digits, - and _ between dots"
	name = strings.ToLower(strings.TrimSuffix(s, "."))
	if name == "" || len(name) > 253 {
		return "", want
	}
	label := ""
	for label = range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return "", want
		}
		for i := range len(label) {
			c := label[i]
			switch {
			case c >= 0x80:
				return "", "want a host name in its ASCII form (xn--...)"
			case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			default:
				return "", want
			}
		}
	}
	if strings.Trim(label, "0123456789") == "" {
		return "", "a host name does not end in a number"
	}
	return name, ""
}

// parseHost returns a host name or an address as they are compared.
func parseHost(s string) (host, bad string) {
	if _, err := netip.ParseAddr(s); err == nil {
		a, bad := parseAddr(s)
		if bad != "" {
			return "", bad
		}
		return a.String(), ""
	}
	return parseHostName(s)
}

// maxRegex bounds the text of a regular expression.
const maxRegex = 1024

// parseRegex returns a regular expression as it is written.
func parseRegex(s string) (expr, bad string) {
	switch {
	case s == "":
		return "", "is empty"
	case len(s) > maxRegex:
		return "", fmt.Sprintf("is over %d bytes", maxRegex)
	}
	// By itself: within the anchors a)|(b would be an expression, of which only one half is anchored at each end.
	if _, err := regexp.Compile(s); err != nil {
		return "", strings.TrimPrefix(err.Error(), "error parsing regexp: ")
	}
	return s, ""
}

// parseUserName returns the name of a user.
func parseUserName(s string) (name, bad string) {
	bad = badName(s)
	if bad == "" && strings.Contains(s, ":") {
		bad = "a user name holds no colon"
	}
	return s, bad
}

// parseNetwork reads a network, or an address as one.
func parseNetwork(s string) (netip.Prefix, string) {
	r, bad := parseRule(s)
	switch {
	case r.Class != ClassNone || strings.HasPrefix(bad, "want a network, an address"):
		return netip.Prefix{}, "want a network or an address"
	case bad != "":
		return netip.Prefix{}, bad
	}
	return r.Prefix, ""
}

func networkText(s string) (text, bad string) {
	n, bad := parseNetwork(s)
	return n.String(), bad
}

// A textKind decodes a list of texts, each in the form that parse gives it.
type textKind func(string) (string, string)

func (parse textKind) decode(d *decoder, p *place, _ *field, v reflect.Value) {
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one")
	}
	out := make([]string, 0, len(items))
	for _, ip := range items {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		s, bad := parse(s)
		if bad != "" {
			d.fail(ip, "%s", bad)
			continue
		}
		out = append(out, s)
	}
	v.Set(reflect.ValueOf(out))
}

func (d *decoder) networks(p *place, _ *field, v reflect.Value) {
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one network")
	}
	out := make([]netip.Prefix, 0, len(items))
	seen := make(map[netip.Prefix]bool, len(items))
	for _, ip := range items {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		n, bad := parseNetwork(s)
		switch {
		case bad != "":
			d.fail(ip, "%s", bad)
		case seen[n]:
			d.fail(ip, "is given twice")
		default:
			seen[n] = true
			out = append(out, n)
		}
	}
	v.Set(reflect.ValueOf(out))
}

func (d *decoder) host(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	h, bad := parseHost(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(h)
}

// hosts decodes a map of names, each with an address or a list of addresses.
func (d *decoder) hosts(p *place, _ *field, v reflect.Value) {
	if p.node.Kind != yaml.MappingNode || p.node.ShortTag() != "!!map" {
		d.fail(p, "want a map of names and addresses")
		return
	}
	out := make(map[string][]netip.Addr, len(p.node.Content)/2)
	lines := make(map[string]int)
	for i := 0; i+1 < len(p.node.Content); i += 2 {
		k := p.node.Content[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode || k.ShortTag() == "!!merge" {
			d.failGot(p, k.Line, got(k), "a key has to be a host name")
			continue
		}
		at := d.at(p, k.Value, 0, p.node.Content[i+1])
		name, bad := parseHostName(k.Value)
		if first, ok := lines[name]; ok && bad == "" {
			d.failGot(at, k.Line, k.Value, "is given twice, first on line %d", first)
			continue
		}
		if bad != "" {
			d.failGot(at, k.Line, k.Value, "%s", bad)
		}
		lines[name] = k.Line
		out[name] = d.hostAddrs(at)
	}
	v.Set(reflect.ValueOf(out))
}

func (d *decoder) hostAddrs(p *place) []netip.Addr {
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one address")
	}
	var out []netip.Addr
	for _, ip := range items {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		a, bad := parseAddr(s)
		switch {
		case bad != "":
			d.fail(ip, "%s", bad)
		case slices.Contains(out, a):
			d.fail(ip, "is given twice")
		default:
			out = append(out, a)
		}
	}
	return out
}

// parseServer reads IP or IP:PORT of a name server.
func parseServer(s string) (netip.AddrPort, string) {
	const want, dnsPort = "want the address of a name server, IP or IP:PORT", 53
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
		if err != nil || strings.HasPrefix(s, "[") != strings.HasSuffix(s, "]") {
			return netip.AddrPort{}, want
		}
		ap = netip.AddrPortFrom(a, dnsPort)
	}
	switch a := ap.Addr(); {
	case ap.Port() == 0:
		return netip.AddrPort{}, "a port is 1 to 65535"
	case a.Is4In6():
		return netip.AddrPort{}, "write the IPv4 address as " + a.Unmap().String()
	case a.Zone() == "" && a.Is6() && a.IsLinkLocalUnicast():
		return netip.AddrPort{}, "a link-local address needs its interface, as in fe80::1%eth0"
	case badNodeAddr(a.WithZone("")) != "":
		return netip.AddrPort{}, badNodeAddr(a.WithZone(""))
	}
	return ap, ""
}

func (d *decoder) nameServers(p *place, _ *field, v reflect.Value) {
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one address")
	}
	var out []netip.AddrPort
	for _, ip := range items {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		ap, bad := parseServer(s)
		switch {
		case bad != "":
			d.fail(ip, "%s", bad)
		case slices.Contains(out, ap):
			d.fail(ip, "is given twice")
		default:
			out = append(out, ap)
		}
	}
	v.Set(reflect.ValueOf(out))
}
