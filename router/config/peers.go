package config

import (
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// parseHostPort returns HOST:PORT with the host as hosts are compared.
func parseHostPort(s string) (hostPort, bad string) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", "want HOST:PORT, with an IPv6 address in brackets"
	}
	n, ok := parseNumber(port)
	switch {
	case !ok || strings.HasPrefix(port, "0x"):
		return "", "want HOST:PORT, with an IPv6 address in brackets"
	case n < 1 || n > 65535:
		return "", "a port is 1 to 65535"
	}
	host, bad = parseHost(host)
	if bad != "" {
		return "", bad
	}
	if a, err := netip.ParseAddr(host); err == nil && badNodeAddr(a) != "" {
		return "", badNodeAddr(a)
	}
	return net.JoinHostPort(host, port), ""
}

func (d *decoder) hostPort(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	hp, bad := parseHostPort(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(hp)
}

// credential decodes a user name or password for another proxy, which SOCKS bounds to 255 bytes (RFC 1929). The value is
// in no error.
func (d *decoder) credential(p *place, _ *field, v reflect.Value) {
	bad := ""
	switch s := p.node.Value; {
	case p.node.Kind != yaml.ScalarNode:
		bad = "want a single value"
	case p.node.ShortTag() == "!!null":
		bad = "has no value"
	default:
		if bad = badCredential(s); bad == "" {
			v.SetString(s)
			return
		}
	}
	d.failGot(p, p.node.Line, hidden, "%s", bad)
}

func badCredential(s string) string {
	switch {
	case s == "":
		return "is empty"
	case len(s) > 255:
		return "is over 255 bytes"
	case !utf8.ValidString(s) || strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) >= 0:
		return "holds a control character"
	}
	return ""
}

// filePath decodes the absolute path of a file.
func (d *decoder) filePath(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	file, bad := parseFilePath(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(file)
}

func parseFilePath(s string) (file, bad string) {
	switch {
	case len(s) > 4095 || strings.Contains(s, "\x00"):
		return "", "want the path of a file: at most 4095 bytes"
	case !filepath.IsAbs(s) || strings.HasSuffix(s, "/"):
		return "", "want the whole path of a file, from /"
	}
	return filepath.Clean(s), ""
}

// path decodes ESCAPER/ID, which checkPeers looks up.
func (d *decoder) path(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	if bad := badPath(s); bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(s)
}

func badPath(s string) string {
	if escaper, id, _ := strings.Cut(s, "/"); badName(escaper) != "" || id == "" {
		return "want ESCAPER/ID"
	}
	return ""
}

// buildPeers names the peers of a proxy_* escaper and checks each by itself.
func (d *decoder) buildPeers(e *Escaper) {
	p := d.places[e]
	b := &builder{d: d, e: e, at: p, ids: make(map[string]*place, len(e.Peers))}
	d.builders[e] = b
	list := d.find(p, "nodes")
	if list == nil || len(e.Peers) == 0 {
		b.broken, b.lostID = true, true
		if list != nil && list.node.Kind == yaml.SequenceNode && len(list.node.Content) == 0 {
			d.fail(list, "want at least one node")
		}
		return
	}
	for i := range e.Peers {
		peer := &e.Peers[i]
		at := d.places[peer]
		if at == nil { // said already
			b.broken, b.lostID = true, true
			continue
		}
		d.checkCredentials(e, peer, at)
		id := d.find(at, "id")
		switch {
		case peer.ID != "":
		case id != nil || peer.Addr == "": // said already
			b.broken, b.lostID = true, true
			continue
		case badName(peer.Addr) != "":
			b.broken, b.lostID = true, true
			d.failMissing(at, "id", "is required where addr is no name")
			continue
		default:
			peer.ID = peer.Addr
		}
		if first := b.ids[peer.ID]; first != nil {
			b.broken = true
			if id == nil {
				id = d.find(at, "addr")
			}
			d.fail(id, "is the ID of the node on line %d too", first.node.Line)
			continue
		}
		b.ids[peer.ID] = at
	}
}

func (d *decoder) checkCredentials(e *Escaper, peer *Peer, at *place) {
	user, pass := d.find(at, "username"), d.find(at, "password")
	switch {
	case user == nil && pass != nil:
		d.failMissing(at, "username", "is required beside password")
	case user != nil && pass == nil:
		d.failMissing(at, "password", "is required beside username")
	case e.Type != "proxy_socks5" && strings.Contains(peer.Username, ":"):
		d.failGot(user, user.node.Line, hidden, "must hold no colon: Basic authentication ends the name there")
	}
}

// checkPeers looks up the paths of peers, once all nodes are known.
func (d *decoder) checkPeers(e *Escaper, escapers map[string]*Escaper) {
	for i := range e.Peers {
		peer := &e.Peers[i]
		if peer.Path == "" {
			continue
		}
		at := d.find(d.places[peer], "path")
		name, id, _ := strings.Cut(peer.Path, "/")
		by := escapers[name]
		if by == nil {
			d.fail(at, "no escaper has the name %s", name)
			continue
		}
		if by.Type == "" {
			continue // said already
		}
		if by.Type == "direct_float" {
			d.fail(at, "a path of a direct_float may not exist: want one of a direct_fixed")
			continue
		}
		if by.Type != "direct_fixed" {
			d.fail(at, "want a path of a direct_fixed, and %s is a %s", name, by.Type)
			continue
		}
		if b := d.builders[by]; b.ids[id] == nil && !b.lostID {
			d.fail(at, "escaper %s has no node with the ID %s", name, id)
		}
	}
}
