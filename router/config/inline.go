package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxPublished is how many nodes a publication may have.
const maxPublished = 1 << 16

// An attribute is one key of an inline node and its text.
type attribute struct {
	key, text string
}

// A fault is what is wrong with one attribute of an inline node, by its position; -1: with the node.
type fault struct {
	attr int
	msg  string
}

// inlineKeys are the keys of an inline node that are not labels.
const inlineKeys = " ip ipv4 ipv6 id uplink expire "

// parseInline makes a node of its attributes, no two of one key, and says all that is wrong with them.
func parseInline(attrs []attribute) (Inline, []fault) {
	var (
		n      Inline
		faults []fault
		given  = make(map[string]bool, len(attrs))
		lost   bool // an address could not be read
	)
	for i, a := range attrs {
		given[a.key] = true
		bad := ""
		switch a.key {
		case "ip", "ipv4", "ipv6":
			bad = n.setAddr(a.key, a.text)
			lost = lost || bad != ""
		case "id":
			if bad = badName(a.text); bad == "" {
				n.ID = a.text
			}
		case "uplink":
			if bad = badName(a.text); bad == "" {
				n.Uplink = a.text
			}
		case "expire":
			var err error
			if n.Expire, err = time.Parse(time.RFC3339, a.text); err != nil {
				bad = "want RFC 3339, as 2026-01-31T12:00:00Z"
			} else if n.Expire.IsZero() {
				bad = "is out of range" // the zero Time stands for none
			}
		default:
			bad = n.setLabel(a.key, a.text)
		}
		if bad != "" {
			faults = append(faults, fault{i, bad})
		}
	}
	if !n.V4.IsValid() && !n.V6.IsValid() && !lost {
		faults = append(faults, fault{-1, "ip: is required, or else ipv4 or ipv6"})
	}
	if !given["id"] {
		n.ID = n.source().String()
	}
	return n, faults
}

// source is the address of a node, the IPv4 one when it has both.
func (n *Inline) source() netip.Addr {
	if n.V4.IsValid() {
		return n.V4
	}
	return n.V6
}

func (n *Inline) setAddr(key, text string) string {
	a, bad := parseAddr(text)
	if bad == "" {
		bad = badNodeAddr(a)
	}
	to, family := &n.V6, "ipv6"
	if bad == "" && a.Is4() {
		to, family = &n.V4, "ipv4"
	}
	switch {
	case bad != "":
		return bad
	case key != "ip" && key != family:
		return "want an " + familyName(key) + " address"
	case to.IsValid():
		return "the node has an " + familyName(family) + " address already"
	}
	*to = a
	return ""
}

// setLabel keeps a free label. Keys in another case would be taken for labels, and a node that has to expire would not.
func (n *Inline) setLabel(key, text string) string {
	const most = 255
	switch lower := strings.ToLower(key); {
	case lower != key && strings.Contains(inlineKeys, " "+lower+" "):
		return "write the key as " + lower
	case badName(key) != "":
		return "the name of a label: " + badName(key)
	case len(text) > most:
		return fmt.Sprintf("a label has at most %d bytes", most)
	case !utf8.ValidString(text) || strings.ContainsRune(text, utf8.RuneError) || !validUTF8Print(text):
		return "a label holds printable text"
	}
	if n.Labels == nil {
		n.Labels = make(map[string]string)
	}
	n.Labels[key] = text
	return ""
}

// ParsePublication reads the nodes of a direct_float: a JSON array of objects with ip, ipv4, ipv6, id, uplink, expire
// (RFC 3339) and, under any other key, labels; all values are strings. Its error holds every mistake, one a line, with
// the node's position from 1: `node 3: expire: want RFC 3339, got "x"`. Repeated keys, IDs and addresses, an ID that is
// another node's address, and anything after the array are mistakes. Whether uplinks exist is not looked at, nor whether
// a node has expired.
func ParsePublication(b []byte) ([]Inline, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not JSON: the text is not UTF-8")
	}
	items, err := elements(b)
	if err != nil {
		return nil, err
	}
	nodes := make([]Inline, len(items))
	var errs []error
	for i, item := range items {
		n, list := publishedNode(item)
		for _, text := range list {
			errs = append(errs, fmt.Errorf("node %d: %s", i+1, text))
		}
		nodes[i] = n
	}
	errs = append(errs, repeated(nodes)...)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return nodes, nil
}

// elements splits a JSON text that is one array.
func elements(b []byte) ([]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	t, err := dec.Token()
	if err != nil {
		return nil, notJSON(b, err)
	}
	if t != json.Delim('[') {
		return nil, errors.New("want a JSON array of nodes")
	}
	var out []json.RawMessage
	for dec.More() {
		var item json.RawMessage
		if err := dec.Decode(&item); err != nil {
			return nil, notJSON(b, err)
		}
		if len(out) == maxPublished {
			return nil, fmt.Errorf("a publication has at most %d nodes", maxPublished)
		}
		out = append(out, item)
	}
	if _, err := dec.Token(); err != nil {
		return nil, notJSON(b, err)
	}
	if rest := bytes.TrimLeft(b[dec.InputOffset():], " \t\r\n"); len(rest) > 0 {
		return nil, fmt.Errorf("line %d: something follows the array", lineOf(b, int64(len(b)-len(rest))))
	}
	return out, nil
}

func lineOf(b []byte, offset int64) int {
	return 1 + bytes.Count(b[:min(max(0, offset), int64(len(b)))], []byte("\n"))
}

// notJSON says where a text is no JSON. The tokens' own errors do not know their place.
func notJSON(b []byte, err error) error {
	var syntax *json.SyntaxError
	var all json.RawMessage
	if whole := json.Unmarshal(b, &all); whole != nil {
		err = whole
	}
	if !errors.As(err, &syntax) || syntax.Offset >= int64(len(b)) && strings.Contains(syntax.Error(), "unexpected end") {
		return errors.New("not JSON: the text ends too early")
	}
	return fmt.Errorf("line %d: not JSON: %w", lineOf(b, syntax.Offset-1), err)
}

// publishedNode reads one node, and says what is wrong with it.
func publishedNode(item json.RawMessage) (Inline, []string) {
	list, faults := attributes(item)
	n, more := parseInline(list)
	if len(faults) > 0 && len(more) > 0 && more[len(more)-1].attr < 0 {
		more = more[:len(more)-1] // perhaps it is what could not be read
	}
	for _, f := range more {
		if f.attr < 0 {
			faults = append(faults, f.msg)
			continue
		}
		a := list[f.attr]
		faults = append(faults, fmt.Sprintf("%s: %s, got %s", printable(a.key), f.msg, quote(a.text)))
	}
	return n, faults
}

// printable is a key in an error: quoted when it is no word.
func printable(key string) string {
	if badName(key) != "" {
		return quote(key)
	}
	return key
}

// attributes reads a JSON object whose values are strings, and says which are not.
func attributes(object json.RawMessage) (list []attribute, faults []string) {
	all, err := objectMembers(object)
	if err != nil {
		return nil, []string{err.Error()}
	}
	seen := make(map[string]bool, len(all))
	for _, m := range all {
		var text string
		switch {
		case seen[m.key]:
			faults = append(faults, printable(m.key)+": is given twice")
		case m.value[0] != '"' || json.Unmarshal(m.value, &text) != nil:
			faults = append(faults, fmt.Sprintf("%s: want a string, got %s", printable(m.key), quote(string(m.value))))
		default:
			list = append(list, attribute{m.key, text})
		}
		seen[m.key] = true
	}
	return list, faults
}

// A member is one key of a JSON object with its value as it is written.
type member struct {
	key   string
	value json.RawMessage
}

// objectMembers splits a JSON object, keys that are repeated included.
func objectMembers(b []byte) ([]member, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, fmt.Errorf("want a JSON object, got %s", quote(string(b)))
	}
	var out []member
	for dec.More() {
		t, err := dec.Token()
		key, ok := t.(string)
		if err != nil || !ok {
			return nil, errors.New("not a JSON object")
		}
		m := member{key: key}
		if err := dec.Decode(&m.value); err != nil {
			return nil, fmt.Errorf("not a JSON object: %w", err)
		}
		out = append(out, m)
	}
	if _, err := dec.Token(); err != nil {
		return nil, errors.New("not a JSON object: the text ends too early")
	}
	if len(bytes.TrimLeft(b[dec.InputOffset():], " \t\r\n")) > 0 {
		return nil, errors.New("something follows the JSON object")
	}
	return out, nil
}

// repeated says which nodes share an ID or an address, and which are called by another's address.
func repeated(nodes []Inline) []error {
	ids, addrs := make(map[string]int, len(nodes)), make(map[netip.Addr]int, len(nodes))
	var errs []error
	shared := make(map[int]bool) // by address, so that its ID need not be said
	for i := range nodes {
		for _, a := range [...]netip.Addr{nodes[i].V4, nodes[i].V6} {
			if !a.IsValid() {
				continue
			}
			if first, ok := addrs[a]; ok {
				shared[i] = true
				errs = append(errs, fmt.Errorf("node %d: address %s is on node %d too", i+1, a, first+1))
				continue
			}
			addrs[a] = i
		}
	}
	for i := range nodes {
		n := &nodes[i]
		if n.ID == "" || !n.source().IsValid() {
			continue // said already
		}
		first, taken := ids[n.ID]
		if !taken {
			ids[n.ID] = i
		}
		owner, foreign := -1, false
		if a, err := netip.ParseAddr(n.ID); err == nil {
			owner, foreign = addrs[a.Unmap()]
			foreign = foreign && owner != i
		}
		switch {
		case shared[i]:
		case foreign:
			errs = append(errs, fmt.Errorf("node %d: id: is the address of node %d, got %s", i+1, owner+1, quote(n.ID)))
		case taken:
			errs = append(errs, fmt.Errorf("node %d: id: is the ID of node %d too, got %s", i+1, first+1, quote(n.ID)))
		}
	}
	return errs
}

// inlineMap decodes an inline node that is written as a map, as far as it is good.
func (d *decoder) inlineMap(p *place) Inline {
	var (
		list []attribute
		at   []*place
		seen = make(map[string]int)
		ok   = true
	)
	for i := 0; i+1 < len(p.node.Content); i += 2 {
		k := p.node.Content[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode || k.ShortTag() == "!!merge" {
			d.failGot(p, k.Line, got(k), "a key has to be a word")
			ok = false
			continue
		}
		vp := d.at(p, k.Value, 0, p.node.Content[i+1])
		if first := seen[k.Value]; first > 0 {
			d.failGot(vp, k.Line, k.Value, "is given twice, first on line %d", first)
			ok = false
			continue
		}
		seen[k.Value] = k.Line
		s, good := d.text(vp)
		if !good {
			ok = false
			continue
		}
		list, at = append(list, attribute{k.Value, s}), append(at, vp)
	}
	n, faults := parseInline(list)
	for _, f := range faults {
		switch {
		case f.attr >= 0:
			d.fail(at[f.attr], "%s", f.msg)
		case ok: // else perhaps it is what could not be read
			d.failMissing(p, "ip", strings.TrimPrefix(f.msg, "ip: "))
		}
	}
	return n
}

// inlineText takes the inline nodes out of a map of selections that is written as JSON, and returns the map without
// them. It returns nil when the text is no JSON object or holds no inline node.
func (d *decoder) inlineText(p *place, text string) (rest []byte, nodes map[string]Inline) {
	all, err := objectMembers([]byte(text))
	if err != nil || !utf8.ValidString(text) {
		return nil, nil
	}
	nodes = make(map[string]Inline)
	seen := make(map[string]bool)
	var b bytes.Buffer
	for _, m := range all {
		if m.value[0] != '{' && !seen[m.key] {
			if b.Len() > 0 {
				b.WriteByte(',')
			}
			key, _ := json.Marshal(m.key) //nolint:errcheck,errchkjson // a string
			b.Write(key)
			b.WriteByte(':')
			b.Write(m.value)
			seen[m.key] = true
			continue
		}
		if seen[m.key] {
			d.fail(p, "%s is given twice", strconv.Quote(m.key))
			continue
		}
		seen[m.key] = true
		n, faults := publishedNode(m.value)
		for _, f := range faults {
			d.fail(p, "%s: %s", printable(m.key), f)
		}
		nodes[m.key] = n
	}
	return []byte("{" + b.String() + "}"), nodes
}
