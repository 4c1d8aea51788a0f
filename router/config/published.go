package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// PublishedPeer is a node of a proxy_float: a next-hop proxy that a publication gives.
type PublishedPeer struct {
	Peer
	Kind    string    // proxy_http, proxy_https or proxy_socks5
	TLSName string    // of proxy_https; empty: the escaper's
	TLSCA   string    // of proxy_https; empty: the escaper's
	Expire  time.Time // the zero Time: never
	Labels  map[string]string
}

// peerKeys are the keys of a published proxy that are not labels.
const peerKeys = " type addr username password id expire path weight eip tls_name tls_ca "

// Float says whether the escaper's nodes are published at run time.
func (e *Escaper) Float() bool { return strings.HasSuffix(e.Type, "_float") }

// Proxy says whether the escaper's nodes are next-hop proxies.
func (e *Escaper) Proxy() bool { return strings.HasPrefix(e.Type, "proxy_") }

// ParsePeers reads the nodes of a proxy_float: a JSON array of objects with type (http, https or socks5), addr, username,
// password, id, expire (RFC 3339), path, weight (a number), eip, tls_name, tls_ca and, under any other key, labels; other
// values are strings. Its error is as ParsePublication's, and holds no credentials. Repeated keys and IDs are mistakes.
// Whether paths and files exist is not looked at, nor whether a node has expired.
func ParsePeers(b []byte) ([]PublishedPeer, error) {
	nodes, errs, err := published(b, publishedPeer)
	if err != nil {
		return nil, err
	}
	ids := make(map[string]int, len(nodes))
	for i := range nodes {
		id := nodes[i].ID
		if id == "" {
			continue // said already
		}
		if first, taken := ids[id]; taken {
			errs = append(errs, fmt.Errorf("node %d: id: is the ID of node %d too, got %s", i+1, first+1, quote(id)))
			continue
		}
		ids[id] = i
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return nodes, nil
}

// published reads the elements of a publication. errs are the mistakes of single nodes.
func published[T any](b []byte, read func(json.RawMessage) (T, []string)) (nodes []T, errs []error, err error) {
	if !utf8.Valid(b) {
		return nil, nil, errors.New("not JSON: the text is not UTF-8")
	}
	items, err := elements(b)
	if err != nil {
		return nil, nil, err
	}
	nodes = make([]T, len(items))
	for i, item := range items {
		n, list := read(item)
		for _, text := range list {
			errs = append(errs, fmt.Errorf("node %d: %s", i+1, text))
		}
		nodes[i] = n
	}
	return nodes, errs, nil
}

// A peerReader reads one published proxy.
type peerReader struct {
	PublishedPeer
	given  map[string]bool
	faults []string
}

// publishedPeer reads one node, and says what is wrong with it.
func publishedPeer(item json.RawMessage) (PublishedPeer, []string) {
	all, err := members(item)
	if err != nil {
		return PublishedPeer{}, []string{"want a JSON object"} // what else it is may hold a password
	}
	r := peerReader{PublishedPeer: PublishedPeer{Peer: Peer{Weight: 1}}, given: make(map[string]bool, len(all))}
	for _, m := range all {
		bad := "is given twice"
		if !r.given[m.key] {
			r.given[m.key] = true
			bad = r.member(m)
		} else {
			m.value = nil
		}
		switch {
		case bad == "":
		case m.value == nil:
			r.fault("%s: %s", printable(m.key), bad)
		default:
			r.fault("%s: %s, got %s", printable(m.key), bad, quote(m.shown()))
		}
	}
	r.whole()
	return r.PublishedPeer, r.faults
}

func (r *peerReader) fault(format string, args ...any) {
	r.faults = append(r.faults, fmt.Sprintf(format, args...))
}

// shown is the value as far as it is for an error: what may be a credential, under a misspelt key or in front of an
// address, is not.
func (m *member) shown() string {
	text, is := stringOf(m.value)
	if !is {
		text = string(m.value)
	}
	if !strings.Contains(peerKeys, " "+m.key+" ") || m.key == "username" || m.key == "password" || strings.Contains(text, "@") {
		return hidden
	}
	return text
}

// member takes one key, and says what is wrong with its value.
func (r *peerReader) member(m member) (bad string) {
	switch m.key {
	case "weight":
		return r.setWeight(m.value)
	case "eip":
		return r.setEIP(m.value)
	}
	text, is := stringOf(m.value)
	if !is {
		return "want a string"
	}
	switch m.key {
	case "type":
		switch kind := strings.TrimPrefix(text, "proxy_"); kind {
		case "http", "https", "socks5":
			r.Kind = "proxy_" + kind
		default:
			bad = "want http, https or socks5"
		}
	case "addr":
		r.Addr, bad = parseHostPort(text)
	case "username":
		r.Username, bad = text, badCredential(text)
	case "password":
		r.Password, bad = text, badCredential(text)
	case "id":
		if bad = badName(text); bad == "" {
			r.ID = text
		}
	case "expire":
		r.Expire, bad = parseExpire(text)
	case "path":
		r.Path, bad = text, badPath(text)
	case "tls_name":
		r.TLSName, bad = parseHost(text)
	case "tls_ca":
		r.TLSCA, bad = parseFilePath(text)
	case "user", "pass", "passwd", "pwd", "auth":
		bad = "is no key: credentials are username and password"
	case "ip", "ipv4", "ipv6", "host", "port", "address", "url":
		bad = "is no key: where the proxy listens is addr, HOST:PORT"
	case "uplink":
		bad = "is no key: the way to the proxy is path, ESCAPER/ID of a direct_fixed"
	default:
		bad = setLabel(&r.Labels, peerKeys, m.key, text)
	}
	return bad
}

func (r *peerReader) setWeight(value json.RawMessage) string {
	text, is := stringOf(value)
	if !is {
		text = string(value)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "want a whole number from 0 to 65535"
	}
	r.Weight = uint16(n)
	return ""
}

func (r *peerReader) setEIP(value json.RawMessage) string {
	list := []json.RawMessage{value}
	if value[0] == '[' {
		list, _ = elements(value)
	}
	if len(list) == 0 {
		return "want at least one address"
	}
	for _, v := range list {
		text, is := stringOf(v)
		if !is {
			return "want an address, or a list of one of each family"
		}
		bad := ""
		if r.EIP, bad = addEIP(r.EIP, text); bad != "" {
			return bad
		}
	}
	return ""
}

// addEIP adds one address that targets see.
func addEIP(list []netip.Addr, text string) ([]netip.Addr, string) {
	a, bad := parseAddr(text)
	if bad == "" {
		bad = badNodeAddr(a)
	}
	for _, other := range list {
		if bad == "" && other.Is4() == a.Is4() {
			bad = "there is an address of this family already"
		}
	}
	if bad != "" {
		return list, bad
	}
	return append(list, a), ""
}

// whole says what a node lacks, and what of it does not go together.
func (r *peerReader) whole() {
	for _, key := range []string{"type", "addr"} {
		if !r.given[key] {
			r.fault("%s: is required", key)
		}
	}
	switch user, pass := r.given["username"], r.given["password"]; {
	case pass && !user:
		r.fault("username: is required beside password")
	case user && !pass:
		r.fault("password: is required beside username")
	case user && r.Kind != "" && r.Kind != "proxy_socks5" && strings.Contains(r.Username, ":"):
		r.fault("username: must hold no colon: Basic authentication ends the name there, got %s", quote(hidden))
	}
	for _, key := range []string{"tls_name", "tls_ca"} {
		if r.given[key] && r.Kind != "" && r.Kind != "proxy_https" {
			r.fault("%s: is for a proxy of type https", key)
		}
	}
	switch {
	case r.given["id"], r.Addr == "":
	case badName(r.Addr) != "":
		r.fault("id: is required where addr is no name")
	default:
		r.ID = r.Addr
	}
}
