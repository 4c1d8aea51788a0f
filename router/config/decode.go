package config

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"wayout/selection"
)

// A Loader reads configurations, with the checks that are others' knowledge. The zero value makes none of them.
type Loader struct {
	// Hash says what is wrong with a password hash of the right form. Its error must not hold the hash.
	Hash func(string) error
}

// Load reads and checks a configuration file. What is wrong with its content comes as Errors; another error means that
// it could not be read.
func (l Loader) Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return l.Parse(path, data)
}

// Parse checks the text of a configuration file; name stands for it in errors. Every error is an Errors with all
// mistakes of the file.
func (l Loader) Parse(name string, data []byte) (*Config, error) {
	d := newDecoder(name)
	d.Loader = l
	root := d.document(data)
	if root == nil {
		return nil, d.errs
	}
	c := d.fresh()
	d.structure(&place{node: root}, reflect.ValueOf(c).Elem())
	d.finish(c)
	if len(d.errs) > 0 {
		d.errs.sort()
		return nil, d.errs
	}
	return c, nil
}

// maxAliased bounds the values that aliases add to a file, and maxNodes the nodes that its ranges do: a short file must
// not become a large configuration.
const (
	maxAliased = 1 << 20
	maxNodes   = 1 << 18
)

// A decoder reads one file. It goes on after a mistake: what is wrong keeps its default, so that later checks are about
// what the file says.
type decoder struct {
	Loader
	file     string
	errs     Errors
	tables   map[reflect.Type]*table
	kinds    map[string]kind
	places   map[any]*place // of each struct but nodes, by pointer
	specs    map[*[]Node][]nodeSpec
	inline   map[*selection.Layer]map[string]Inline // the nodes that a map of selections holds
	listened int                                    // ports, of all servers
	refs     []ref
	builders map[*Escaper]*builder
	// listenNets are the prefixes of a listen, by the rest of it.
	listenNets map[*[]netip.AddrPort][]ListenNet
	aliased    int
	nodes      int
	spent      bool // one of the bounds was reached, and that was said
}

func newDecoder(file string) *decoder {
	return &decoder{
		file:   file,
		tables: make(map[reflect.Type]*table),
		kinds:  kinds(),
		places: make(map[any]*place),
		specs:  make(map[*[]Node][]nodeSpec),
		inline: make(map[*selection.Layer]map[string]Inline),

		listenNets: make(map[*[]netip.AddrPort][]ListenNet),
		builders:   make(map[*Escaper]*builder),
	}
}

// fresh returns a Config of defaults.
func (d *decoder) fresh() *Config {
	return d.table(reflect.TypeFor[Config]()).defaults.Addr().Interface().(*Config)
}

// newWithDefaults returns a struct of defaults, of a type of the file.
func newWithDefaults[T any](typ string) *T {
	t := newDecoder("").table(reflect.TypeFor[T]())
	t.reset(t.defaults, typ)
	return t.defaults.Addr().Interface().(*T)
}

// A place is a value in the file and the way to it.
type place struct {
	up    *place
	key   string     // in a map
	index int        // in a list, when key is empty
	node  *yaml.Node // never an alias
	alias bool       // reached through an alias
}

func (p *place) String() string {
	switch {
	case p.up == nil:
		return ""
	case p.key == "":
		return p.up.String() + "[" + strconv.Itoa(p.index) + "]"
	}
	key := p.key
	if secret(key) {
		key = hidden
	}
	if strings.ContainsAny(key, ": \t\r\n") || !validUTF8Print(key) {
		key = quote(key)
	}
	if up := p.up.String(); up != "" {
		return up + "." + key
	}
	return key
}

func validUTF8Print(s string) bool {
	for _, r := range s {
		if !strconv.IsPrint(r) {
			return false
		}
	}
	return true
}

// at is the place of a key's value, or of a list's item when key is empty.
func (d *decoder) at(up *place, key string, index int, n *yaml.Node) *place {
	p := &place{up: up, key: key, index: index, node: n, alias: up.alias}
	if n.Kind == yaml.AliasNode {
		p.node, p.alias = n.Alias, true // never nil, the parser refuses unknown anchors; never an alias itself
	}
	if p.alias {
		d.aliased++
	}
	if d.aliased > maxAliased && !d.spent {
		d.spent = true
		d.fail(p, "aliases make the file too large")
	}
	return p
}

// find is the place of a key's value in a map that was decoded, by any of its names; nil when it is not there.
func (d *decoder) find(p *place, names ...string) *place {
	if p == nil || p.node.Kind != yaml.MappingNode {
		return nil
	}
	c := p.node.Content
	for i := 0; i+1 < len(c); i += 2 {
		k := c[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind == yaml.ScalarNode && slices.Contains(names, k.Value) {
			return d.at(p, k.Value, 0, c[i+1])
		}
	}
	return nil
}

// items are the places of a list's items, or the one place of a value that stands for a list.
func (d *decoder) items(p *place) []*place {
	if p.node.Kind != yaml.SequenceNode {
		return []*place{p}
	}
	out := make([]*place, len(p.node.Content))
	for i, n := range p.node.Content {
		out[i] = d.at(p, "", i, n)
	}
	return out
}

func (d *decoder) failFile(line int, msg string) {
	d.errs = append(d.errs, &Error{File: d.file, Line: line, Msg: msg})
}

// fail says what is wrong with the value at p, and what the value is.
func (d *decoder) fail(p *place, format string, args ...any) {
	d.failGot(p, p.node.Line, got(p.node), format, args...)
}

// failMissing says that a key of the map at p is not there.
func (d *decoder) failMissing(p *place, key, msg string) {
	d.failGot(&place{up: p, key: key}, p.node.Line, "", "%s", msg)
}

func (d *decoder) failGot(p *place, line int, value, format string, args ...any) {
	key := p.String()
	if key == "" {
		key = "(the file)"
	}
	msg := fmt.Sprintf(format, args...)
	if secret(msg) && secret(value) {
		msg, _, _ = strings.Cut(msg, ": ") // what follows may repeat the value
	}
	if secret(value) {
		value = hidden
	}
	msg += ", got " + quote(value)
	d.errs = append(d.errs, &Error{File: d.file, Line: max(1, line), Key: key, Msg: msg})
}

// hidden stands in errors for what may be a password or a part of its hash.
const hidden = "(hidden)"

// secret says whether a text may be, or hold, a piece of a password's hash: its parts are set apart by $, which nothing
// else in a configuration has.
func secret(s string) bool { return strings.Contains(s, "$") }

// got is how an error shows a value.
func got(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "{...}"
	case yaml.SequenceNode:
		return "[...]"
	}
	return n.Value
}

// A table is what a struct's tags say.
type table struct {
	fields   []field
	byKey    map[string][]int // aliases too; several fields where types differ in what a key means
	defaults reflect.Value    // a struct of defaults, addressable
}

type field struct {
	index                                     int
	key, alias, word, unit, def, meaning, ref string
	of, types                                 []string
	min, max                                  string
	required                                  bool
	decode                                    func(*decoder, *place, *field, reflect.Value)
	sub                                       reflect.Type // of a struct, or of a list's structs
}

// table reads the tags of a struct, once.
func (d *decoder) table(t reflect.Type) *table {
	if have := d.tables[t]; have != nil {
		return have
	}
	out := &table{byKey: make(map[string][]int), defaults: reflect.New(t).Elem()}
	d.tables[t] = out
	for i := range t.NumField() {
		sf := t.Field(i)
		key, ok := sf.Tag.Lookup("key")
		if !ok {
			continue
		}
		f := field{
			index: i, key: key, alias: sf.Tag.Get("alias"), word: sf.Tag.Get("type"), unit: sf.Tag.Get("unit"),
			def: sf.Tag.Get("default"), meaning: sf.Tag.Get("meaning"), ref: sf.Tag.Get("ref"),
			of: strings.Fields(sf.Tag.Get("of")), types: strings.Fields(sf.Tag.Get("for")),
			min: sf.Tag.Get("min"), max: sf.Tag.Get("max"), required: sf.Tag.Get("required") == "yes",
		}
		switch {
		case f.word != "":
			k := d.kinds[f.word]
			f.decode = k.decode
			if f.unit == "" {
				f.unit = k.unit
			}
			if k.sub != nil {
				f.sub = k.sub
			}
		case sf.Type.Kind() == reflect.Struct:
			f.word, f.sub, f.decode = "map", sf.Type, (*decoder).submap
		default:
			f.word, f.sub, f.decode = "list of maps", sf.Type.Elem(), (*decoder).sublist
		}
		out.byKey[key] = append(out.byKey[key], len(out.fields))
		if f.alias != "" {
			out.byKey[f.alias] = append(out.byKey[f.alias], len(out.fields))
		}
		out.fields = append(out.fields, f)
	}
	for i := range out.fields {
		f := &out.fields[i]
		v := out.defaults.Field(f.index)
		switch {
		case f.word == "map":
			v.Set(d.table(f.sub).defaults)
		case f.def != "":
			f.decode(d, &place{key: f.key, up: &place{}, node: defaultNode(f.def)}, f, v)
		}
	}
	return out
}

// belongs says whether structs of this type have the field.
func (f *field) belongs(typ string) bool { return len(f.types) == 0 || slices.Contains(f.types, typ) }

// defaultNode is a default's text as the parser would give it.
func defaultNode(text string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Value: text, Line: 1}
	n.Tag = n.ShortTag()
	return n
}

// reset makes v the defaults of a type: zero where the type has no such key.
func (t *table) reset(v reflect.Value, typ string) {
	v.Set(t.defaults)
	for i := range t.fields {
		if f := &t.fields[i]; typ != "" && !f.belongs(typ) {
			v.Field(f.index).SetZero()
		}
	}
}

func (d *decoder) submap(p *place, _ *field, v reflect.Value) { d.structure(p, v) }

func (d *decoder) sublist(p *place, _ *field, v reflect.Value) {
	if !d.isList(p) {
		return
	}
	// At its full length from the start: places are kept by pointer.
	v.Set(reflect.MakeSlice(v.Type(), len(p.node.Content), len(p.node.Content)))
	for i, n := range p.node.Content {
		if d.spent {
			return
		}
		d.structure(d.at(p, "", i, n), v.Index(i))
	}
}

func (d *decoder) isList(p *place) bool {
	if p.node.Kind != yaml.SequenceNode || p.node.ShortTag() != "!!seq" {
		d.fail(p, "want a list")
		return false
	}
	return true
}

// structure decodes a map by the tags of v's type.
func (d *decoder) structure(p *place, v reflect.Value) {
	if p.node.Kind != yaml.MappingNode || p.node.ShortTag() != "!!map" {
		d.fail(p, "want a map of keys and values")
		return
	}
	t := d.table(v.Type())
	typ := d.typeOf(p, t)
	t.reset(v, typ)
	if v.Type() != reflect.TypeFor[nodeSpec]() {
		d.places[v.Addr().Interface()] = p
	}
	var seen [64]*yaml.Node // by field: its key
	c := p.node.Content
	for i := 0; i+1 < len(c) && !d.spent; i += 2 {
		k := c[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		f := d.keyed(p, t, k, typ)
		if f < 0 {
			continue
		}
		if first := seen[f]; first != nil {
			kp := &place{up: p, key: k.Value}
			if first.Value == k.Value {
				d.failGot(kp, k.Line, k.Value, "is given twice, first on line %d", first.Line)
			} else {
				d.failGot(kp, k.Line, k.Value, "means the same as %s on line %d: give one of them", first.Value, first.Line)
			}
			continue
		}
		seen[f] = k
		fp := d.at(p, k.Value, 0, c[i+1])
		t.fields[f].decode(d, fp, &t.fields[f], v.Field(t.fields[f].index))
	}
	for i := range t.fields {
		f := &t.fields[i]
		if f.required && seen[i] == nil && !d.spent && f.belongs(typ) {
			d.failMissing(p, f.key, "is required")
		}
	}
}

// typeOf returns the type of the struct at p, or "" when it has none that is known.
func (d *decoder) typeOf(p *place, t *table) string {
	i := t.byKey["type"]
	if len(i) == 0 {
		return ""
	}
	tp := d.find(p, "type")
	if tp == nil || tp.node.Kind != yaml.ScalarNode || !slices.Contains(t.fields[i[0]].of, tp.node.Value) {
		return ""
	}
	return tp.node.Value
}

// keyed returns the field of a key in the file, or -1 after it has said what is wrong with the key. Where the type is not
// known, what a key means may not be either: then nothing is said of it.
func (d *decoder) keyed(p *place, t *table, k *yaml.Node, typ string) int {
	if k.Kind != yaml.ScalarNode {
		d.failGot(p, k.Line, got(k), "a key has to be a word")
		return -1
	}
	if k.ShortTag() == "!!merge" {
		d.failGot(&place{up: p, key: k.Value}, k.Line, k.Value, "merge keys are not supported: write the keys out")
		return -1
	}
	fields := t.byKey[k.Value]
	if typ == "" && len(fields) > 1 {
		return -1
	}
	for _, f := range fields {
		if typ == "" || t.fields[f].belongs(typ) {
			return f
		}
	}
	if len(fields) > 0 {
		d.failGot(&place{up: p, key: k.Value}, k.Line, k.Value, "is not a key of %s", typ)
		return -1
	}
	if spilled(p, k) {
		return -1
	}
	kp := &place{up: p, key: k.Value}
	if near := nearest(k.Value, t, typ); near != "" {
		d.failGot(kp, k.Line, k.Value, "unknown key (perhaps %s is meant)", near)
		return -1
	}
	d.failGot(kp, k.Line, k.Value, "unknown key")
	return -1
}

// spilled says whether a key of a map is a piece of the hash beside it, which lacks its quotes and so ends at its first
// comma. That is said of the hash.
func spilled(p *place, k *yaml.Node) bool {
	if !strings.HasPrefix(k.Value, "t=") && !strings.HasPrefix(k.Value, "p=") {
		return false
	}
	for i := 0; i+1 < len(p.node.Content); i += 2 {
		if v := p.node.Content[i+1]; p.node.Content[i].Value == "password" && v.Style == 0 &&
			strings.HasPrefix(v.Value, "$argon2") && strings.Count(v.Value, "$") == 3 {
			return true
		}
	}
	return false
}

// nearest returns a known key that differs from the given one in at most two places, for who mistyped it.
func nearest(key string, t *table, typ string) string {
	best, dist := "", 3
	if len(key) > 40 {
		return ""
	}
	for i := range t.fields {
		k := t.fields[i].key
		if n := distance(key, k); n < dist && n < len(k)-1 && (typ == "" || t.fields[i].belongs(typ)) {
			best, dist = k, n
		}
	}
	return best
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// text returns a scalar as it is written: a name such as 1e5 or on is a name, whatever YAML takes it for.
func (d *decoder) text(p *place) (string, bool) {
	if p.node.Kind != yaml.ScalarNode {
		d.fail(p, "want a single value")
		return "", false
	}
	switch tag := p.node.ShortTag(); tag {
	case "!!str", "!!int", "!!float", "!!bool", "!!timestamp", "!!merge":
		return p.node.Value, true
	case "!!null":
		d.fail(p, "has no value")
	default:
		d.fail(p, "the YAML tag %s is not supported", tag)
	}
	return "", false
}

// plain is text that was not put in quotes: what numbers and switches have to be.
func (d *decoder) plain(p *place, want string) (string, bool) {
	s, ok := d.text(p)
	if ok && p.node.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		d.fail(p, "want %s, without quotes", want)
		return "", false
	}
	return s, ok
}

var errUnit = errors.New("want a time such as 500ms, 30s, 5m or 2h")

// parseDuration reads numbers with units (ms, s, m or min, h, d), or one bare number of seconds.
func parseDuration(s string) (time.Duration, error) {
	if s == "" || s[0] < '0' || s[0] > '9' {
		return 0, errUnit
	}
	if n, err := strconv.ParseFloat(s, 64); err == nil {
		return seconds(n, time.Second)
	}
	var sum time.Duration
	for s != "" {
		digits := strings.IndexFunc(s, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
		if digits <= 0 {
			return 0, errUnit
		}
		n, err := strconv.ParseFloat(s[:digits], 64)
		if err != nil {
			return 0, errUnit
		}
		s = s[digits:]
		end := strings.IndexFunc(s, func(r rune) bool { return r < 'a' || r > 'z' })
		if end < 0 {
			end = len(s)
		}
		var unit time.Duration
		switch s[:end] {
		case "ms":
			unit = time.Millisecond
		case "s":
			unit = time.Second
		case "m", "min":
			unit = time.Minute
		case "h":
			unit = time.Hour
		case "d":
			unit = 24 * time.Hour
		default:
			return 0, errUnit
		}
		v, err := seconds(n, unit)
		if err != nil {
			return 0, err
		}
		if sum += v; sum > maxDuration {
			return 0, errUnit
		}
		s = strings.TrimPrefix(s[end:], " ")
	}
	return sum, nil
}

const maxDuration = 10 * 365 * 24 * time.Hour

func seconds(n float64, unit time.Duration) (time.Duration, error) {
	v := n * float64(unit)
	if !(v >= 0 && v <= float64(maxDuration)) { // NaN too
		return 0, errUnit
	}
	return time.Duration(v), nil
}
