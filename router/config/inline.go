package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
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
		named  bool
		lost   bool // an address could not be read
	)
	for i, a := range attrs {
		named = named || a.key == "id"
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
			n.Expire, bad = parseExpire(a.text)
		default:
			bad = setLabel(&n.Labels, inlineKeys, a.key, a.text)
		}
		if bad != "" {
			faults = append(faults, fault{i, bad})
		}
	}
	if !n.V4.IsValid() && !n.V6.IsValid() && !lost {
		faults = append(faults, fault{-1, "ip: is required, or else ipv4 or ipv6"})
	}
	if !named {
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

func parseExpire(text string) (at time.Time, bad string) {
	at, err := time.Parse(time.RFC3339, text)
	switch {
	case err != nil:
		return time.Time{}, "want RFC 3339, as 2026-01-31T12:00:00Z"
	case at.IsZero(): // stands for none
		return time.Time{}, "is out of range"
	}
	return at, ""
}

// setLabel keeps a free label. Those of keys in another case would be taken for labels, and a node that has to expire
// would not.
func setLabel(labels *map[string]string, keys, key, text string) string {
	const most = 255
	switch lower := strings.ToLower(key); {
	case lower != key && strings.Contains(keys, " "+lower+" "):
		return "write the key as " + lower
	case badName(key) != "":
		return "the name of a label: " + badName(key)
	case len(text) > most:
		return fmt.Sprintf("a label has at most %d bytes", most)
	case !utf8.ValidString(text) || strings.ContainsRune(text, utf8.RuneError) || !validUTF8Print(text):
		return "a label holds printable text"
	}
	if *labels == nil {
		*labels = make(map[string]string)
	}
	(*labels)[key] = text
	return ""
}

// ParsePublication reads the nodes of a direct_float: a JSON array of objects with ip, ipv4, ipv6, id, uplink, expire
// (RFC 3339) and, under any other key, labels; all values are strings. Its error holds every mistake, one a line, with
// the node's position from 1: `node 3: expire: want RFC 3339, got "x"`. Repeated keys, IDs and addresses, an ID that is
// another node's address, and anything after the array are mistakes. Whether uplinks exist is not looked at, nor whether
// a node has expired.
func ParsePublication(b []byte) ([]Inline, error) {
	nodes, errs, err := published(b, publishedNode)
	if err != nil {
		return nil, err
	}
	errs = append(errs, repeated(nodes)...)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return nodes, nil
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

// attributes reads a JSON text that is an object whose values are strings, and says which are not.
func attributes(object json.RawMessage) (list []attribute, faults []string) {
	all, err := members(object)
	if err != nil {
		return nil, []string{err.Error()}
	}
	list = make([]attribute, 0, len(all))
	twice := repeatedKeys(all)
	for i, m := range all {
		text, ok := stringOf(m.value)
		switch {
		case twice(i):
			faults = append(faults, printable(m.key)+": is given twice")
		case !ok:
			faults = append(faults, fmt.Sprintf("%s: want a string, got %s", printable(m.key), quote(string(m.value))))
		default:
			list = append(list, attribute{m.key, text})
		}
	}
	return list, faults
}

// repeatedKeys says of each member whether its key is one's before it. They are asked for in order.
func repeatedKeys(all []member) func(i int) bool {
	const few = 16
	if len(all) <= few { // no map for tens of thousands of small objects
		return func(i int) bool {
			return slices.ContainsFunc(all[:i], func(m member) bool { return m.key == all[i].key })
		}
	}
	seen := make(map[string]bool, len(all))
	return func(i int) bool {
		was := seen[all[i].key]
		seen[all[i].key] = true
		return was
	}
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
