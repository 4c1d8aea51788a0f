package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"wayout/selection"
)

// A kind is a type word: how a value of it is read, and what a bare number of it counts.
type kind struct {
	decode func(*decoder, *place, *field, reflect.Value)
	unit   string
	sub    reflect.Type // of a list's structs that have a table of their own
}

// kinds is the list of type words. A value is refused by d.fail, and v then keeps its default.
func kinds() map[string]kind {
	return map[string]kind{
		"name":                  {decode: (*decoder).name},
		"switch":                {decode: (*decoder).toggle},
		"number":                {decode: (*decoder).number},
		"size":                  {decode: (*decoder).size, unit: "bytes; KiB, MiB, KB, MB"},
		"duration":              {decode: (*decoder).duration, unit: "seconds; ms, s, m, h, d"},
		"one of":                {decode: (*decoder).oneOf},
		"index":                 {decode: (*decoder).index},
		"level":                 {decode: (*decoder).level},
		"pick policy":           {decode: (*decoder).policy},
		"socket path":           {decode: (*decoder).socketPath},
		"interface":             {decode: (*decoder).interfaceName},
		"header name":           {decode: (*decoder).headerName},
		"hash":                  {decode: (*decoder).hash},
		"ipv4":                  {decode: (*decoder).gateway},
		"ipv6":                  {decode: (*decoder).gateway},
		"ip:port":               {decode: (*decoder).listen},
		"ip:port list":          {decode: (*decoder).listens},
		"interfaces":            {decode: (*decoder).interfaceNames},
		"diverted ports":        {decode: (*decoder).diverts},
		"networks":              {decode: (*decoder).rules},
		"ipv4, range or prefix": {decode: (*decoder).nodeSpan},
		"ipv6, range or prefix": {decode: (*decoder).nodeSpan},
		"addresses":             {decode: (*decoder).bindIP},
		"list of nodes":         {decode: (*decoder).nodeSpecs, sub: reflect.TypeFor[nodeSpec]()},
		"selection map":         {decode: (*decoder).selectionMap},
		"path patterns":         {decode: (*decoder).patterns},
		"file path":             {decode: (*decoder).filePath},

		"name servers":     {decode: (*decoder).nameServers},
		"map of addresses": {decode: (*decoder).hosts},
		"host":             {decode: (*decoder).host},
		"host:port":        {decode: (*decoder).hostPort},
		"url":              {decode: (*decoder).url},
		"public addresses": {decode: (*decoder).publicAddrs},
		"network list":     {decode: (*decoder).networks},
		"credential":       {decode: (*decoder).credential},
		"path":             {decode: (*decoder).path},
		"rate":             {decode: (*decoder).rate, unit: "per second; /s, /m, /h"},
		"bandwidth":        {decode: (*decoder).bandwidth, unit: "bit/s; kbit/s, Mbit/s, Gbit/s"},
		"server selection": {decode: (*decoder).serverSelect},

		"list of escapers":    {decode: (*decoder).nexts, sub: reflect.TypeFor[Next]()},
		"host rules":          {decode: (*decoder).hostRules, sub: reflect.TypeFor[exactRule]()},
		"domain rules":        {decode: (*decoder).hostRules, sub: reflect.TypeFor[domainRule]()},
		"regex rules":         {decode: (*decoder).hostRules, sub: reflect.TypeFor[regexRule]()},
		"user rules":          {decode: (*decoder).hostRules, sub: reflect.TypeFor[userRule]()},
		"hosts":               {decode: textKind(parseHost).decode},
		"domains":             {decode: textKind(parseHostName).decode},
		"regular expressions": {decode: textKind(parseRegex).decode},
		"user names":          {decode: textKind(parseUserName).decode},
		"cgroup":              {decode: (*decoder).cgroup},
	}
}

// badName says what is wrong with a name or ID, or nothing.
func badName(s string) string {
	digits := true
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("._:-", rune(c))) {
			return "want letters, digits and . _ : - with a letter or digit first"
		}
		digits = digits && c >= '0' && c <= '9'
	}
	switch {
	case s == "":
		return "is empty"
	case len(s) > 255:
		return "is over 255 characters"
	case digits:
		return "must not be all digits"
	}
	return ""
}

func (d *decoder) name(p *place, f *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	if bad := badName(s); bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(s)
	if f.ref != "" {
		d.refs = append(d.refs, ref{section: f.ref, name: s, at: p})
	}
}

func (d *decoder) toggle(p *place, _ *field, v reflect.Value) {
	const want = "on, off, true or false"
	s, ok := d.plain(p, want)
	if !ok {
		return
	}
	switch s {
	case "on", "On", "ON", "true", "True", "TRUE", "yes", "Yes", "YES":
		v.SetBool(true)
	case "off", "Off", "OFF", "false", "False", "FALSE", "no", "No", "NO":
		v.SetBool(false)
	default:
		d.fail(p, "want %s", want)
	}
}

// parseNumber reads decimal, or hexadecimal after 0x. No sign, no leading zeros: YAML's versions differ on what 010 is.
func parseNumber(s string) (uint64, bool) {
	if hex, ok := strings.CutPrefix(s, "0x"); ok {
		n, err := strconv.ParseUint(hex, 16, 64)
		return n, err == nil
	}
	if len(s) > 1 && s[0] == '0' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil
}

func (d *decoder) number(p *place, f *field, v reflect.Value) {
	const want = "a whole number"
	s, ok := d.plain(p, want)
	if !ok {
		return
	}
	lo, hi := uint64(0), uint64(1)<<(v.Type().Bits()-1)-1
	if v.CanUint() {
		hi = hi<<1 | 1
	}
	if f.min != "" {
		lo, _ = parseNumber(f.min)
	}
	if f.max != "" {
		hi, _ = parseNumber(f.max)
	}
	n, ok := parseNumber(s)
	if digits := strings.TrimLeft(s, "-+"); !ok && (digits == "" || strings.Trim(digits, "0123456789") != "" || digits[0] == '0') {
		d.fail(p, "want %s from %d to %d", want, lo, hi)
		return
	}
	if !ok || n < lo || n > hi {
		d.fail(p, "is out of range %d to %d", lo, hi)
		return
	}
	if v.CanUint() {
		v.SetUint(n)
	} else {
		v.SetInt(int64(n))
	}
}

// parseSize reads a number of bytes, bare or with a unit.
func parseSize(s string) (int64, bool) {
	i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	unit := int64(1)
	if i >= 0 {
		switch strings.TrimSpace(s[i:]) {
		case "B":
		case "KB", "kB":
			unit = 1000
		case "MB":
			unit = 1000 * 1000
		case "KiB", "K":
			unit = 1 << 10
		case "MiB", "M":
			unit = 1 << 20
		default:
			return 0, false
		}
		s = s[:i]
	}
	n, ok := parseNumber(s)
	if !ok || n > 1<<40 {
		return 0, false
	}
	return int64(n) * unit, true
}

func (d *decoder) size(p *place, f *field, v reflect.Value) {
	const want = "a size such as 4096, 32KiB or 1MiB"
	s, ok := d.text(p)
	if !ok {
		return
	}
	n, ok := parseSize(s)
	if !ok {
		d.fail(p, "want %s", want)
		return
	}
	lo, _ := parseSize(f.min)
	hi, _ := parseSize(f.max)
	if n < lo || n > hi {
		d.fail(p, "is out of range %s to %s", f.min, f.max)
		return
	}
	v.SetInt(n)
}

func (d *decoder) duration(p *place, f *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	t, err := parseDuration(s)
	if err != nil {
		d.fail(p, "%s", err)
		return
	}
	lo, _ := parseDuration(f.min)
	hi, _ := parseDuration(f.max)
	if t < lo || t > hi {
		d.fail(p, "is out of range %s to %s", f.min, f.max)
		return
	}
	v.Set(reflect.ValueOf(t).Convert(reflect.TypeFor[time.Duration]()))
}

// word reads one of the words of a field.
func (d *decoder) word(p *place, f *field) (string, bool) {
	s, ok := d.text(p)
	switch {
	case !ok:
		return "", false
	case slices.Contains(f.of, s):
		return s, true
	default:
		d.fail(p, "want %s", orList(f.of))
	}
	return "", false
}

func orList(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

func (d *decoder) oneOf(p *place, f *field, v reflect.Value) {
	if s, ok := d.word(p, f); ok {
		v.SetString(s)
	}
}

func (d *decoder) index(p *place, f *field, v reflect.Value) {
	if s, ok := d.word(p, f); ok {
		v.SetBool(s == "strict")
	}
}

func (d *decoder) policy(p *place, f *field, v reflect.Value) {
	s, ok := d.word(p, f)
	if !ok {
		return
	}
	pol, err := selection.ParsePolicy(s)
	if err != nil {
		d.fail(p, "%s", err)
		return
	}
	v.Set(reflect.ValueOf(pol))
}

func (d *decoder) level(p *place, f *field, v reflect.Value) {
	s, ok := d.word(p, f)
	if !ok {
		return
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(s)); err != nil {
		d.fail(p, "%s", err)
		return
	}
	v.Set(reflect.ValueOf(l))
}

func (d *decoder) socketPath(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	switch {
	case !ok:
	case s == "":
		d.fail(p, "is empty")
	case strings.Contains(s, "\x00"):
		d.fail(p, "holds a zero byte")
	case len(s) > 107: // sun_path, unix(7)
		d.fail(p, "is over the 107 bytes that a socket's path may have")
	default:
		v.SetString(s)
	}
}

func (d *decoder) interfaceName(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	if bad := badInterface(s); bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(s)
}

func badInterface(s string) string {
	// IFNAMSIZ less its end, and what the kernel's dev_valid_name refuses.
	if s == "" || len(s) > 15 || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n\v\f\r\x00") {
		return "want the name of a network interface: 1 to 15 bytes without slash, colon and space"
	}
	return ""
}

// headerName reads an HTTP field name (RFC 9110 section 5.1) that wayout can take off a request without harm.
func (d *decoder) headerName(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	if s == "" || len(s) > 64 || strings.IndexFunc(s, notTokenChar) >= 0 {
		d.fail(p, "want a header name: 1 to 64 letters, digits and !#$%%&'*+-.^_`|~")
		return
	}
	switch strings.ToLower(s) {
	case "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
		"proxy-authenticate", "proxy-authorization", "proxy-authentication-info", "proxy-status", "x-egress-ip", "via", "http2-settings":
		d.fail(p, "is a header between client and proxy with a meaning of its own")
	case "host", "content-length", "content-type", "content-encoding", "content-range", "expect", "range", "date",
		"authorization", "cookie", "accept", "accept-encoding", "cache-control", "max-forwards", "user-agent":
		d.fail(p, "is a header that requests need")
	default:
		v.SetString(s)
	}
}

func notTokenChar(r rune) bool {
	switch {
	case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z':
		return false
	}
	return !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
}

// hash checks the form, and the Loader's Hash the rest. The value is in no error: it may be a password.
func (d *decoder) hash(p *place, _ *field, v reflect.Value) {
	if p.node.Kind != yaml.ScalarNode {
		d.fail(p, "want a single value")
		return
	}
	s, bad := p.node.Value, ""
	switch {
	case p.node.ShortTag() == "!!null":
		bad = "has no value"
	case strings.HasPrefix(s, "$argon2id$"):
		f := strings.Split(s, "$")
		switch {
		case len(f) == 4 && strings.HasPrefix(f[3], "m="):
			bad = "the hash is cut at its first comma: within {} it needs quotes"
		case len(f) != 6 || f[2] != "v=19" || !strings.HasPrefix(f[3], "m=") || f[4] == "" || f[5] == "":
			bad = "an argon2id hash has the form $argon2id$v=19$m=M,t=T,p=P$SALT$HASH"
		}
	case strings.HasPrefix(s, "$2a$"), strings.HasPrefix(s, "$2b$"), strings.HasPrefix(s, "$2y$"):
		if len(s) != 60 || s[6] != '$' {
			bad = "a bcrypt hash has 60 characters"
		}
	case strings.HasPrefix(s, "$"):
		bad = "want an argon2id or bcrypt hash"
	default:
		bad = "plain text is refused: put what wayout hash-password prints here"
	}
	if bad == "" && d.Hash != nil {
		if err := d.Hash(s); err != nil {
			bad = err.Error()
		}
	}
	if bad != "" {
		d.failGot(p, p.node.Line, hidden, "%s", bad)
		return
	}
	v.SetString(s)
}

func (d *decoder) gateway(p *place, f *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	a, bad := parseAddr(s)
	switch {
	case bad != "":
	case a.Is4() != (f.word == "ipv4"):
		bad = "want an address of the other family, " + familyName(f.word)
	case badNodeAddr(a) != "":
		bad = badNodeAddr(a)
	}
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.Set(reflect.ValueOf(a))
}

func familyName(word string) string {
	if strings.HasPrefix(word, "ipv4") {
		return "IPv4"
	}
	return "IPv6"
}

// parseAddr reads an address that is written as what it is: no zone, and IPv4 not as ::ffff:a.b.c.d.
func parseAddr(s string) (a netip.Addr, bad string) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return netip.Addr{}, "want an IP address"
	case a.Zone() != "":
		return netip.Addr{}, "an address has no zone here: give the interface by its own key"
	case a.Is4In6():
		return netip.Addr{}, "write the IPv4 address as " + a.Unmap().String()
	}
	return a, ""
}

// A listen is an address with one port, or with count of them in a row.
type listen struct {
	first netip.AddrPort
	count int
}

// parseListen reads IP:PORT, :PORT or PORT, with LOW-HIGH in the place of PORT for a range.
func parseListen(s string) (listen, string) {
	const want = "want IP:PORT, or :PORT for all addresses"
	host, port := "", s
	colon := strings.LastIndexByte(s, ':')
	if colon >= 0 {
		host, port = s[:colon], s[colon+1:]
	}
	from, to, ranged := strings.Cut(port, "-")
	if !ranged {
		to = from
	}
	low, ok := parseNumber(from)
	high, ok2 := parseNumber(to)
	if !ok || !ok2 || strings.Contains(port, "0x") {
		return listen{}, want
	}
	switch {
	case low > 65535 || high > 65535:
		return listen{}, "a port is 0 to 65535"
	case ranged && low == 0:
		return listen{}, "a range of ports begins at 1 or above"
	case high < low:
		return listen{}, "the range ends before it begins"
	}
	out := listen{netip.AddrPortFrom(netip.IPv6Unspecified(), uint16(low)), int(high-low) + 1}
	if host == "" {
		return out, ""
	}
	ap, err := netip.ParseAddrPort(s[:colon+1] + from)
	switch {
	case err != nil:
		return listen{}, want
	case ap.Addr().Is4In6():
		return listen{}, "write the IPv4 address as " + ap.Addr().Unmap().String()
	case ap.Addr().IsMulticast():
		return listen{}, "a multicast address cannot be listened on"
	}
	out.first = ap
	return out, ""
}

func (d *decoder) listenAt(p *place) (listen, bool) {
	s, ok := d.text(p)
	if !ok {
		return listen{}, false
	}
	l, bad := parseListen(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return listen{}, false
	}
	return l, true
}

// listen reads one address. PORT alone would mean all of them, with nobody having written that.
func (d *decoder) listen(p *place, _ *field, v reflect.Value) {
	if n := p.node.Value; p.node.Kind == yaml.ScalarNode && n != "" && strings.Trim(n, "0123456789") == "" {
		d.fail(p, "a port alone is not enough: want IP:PORT, or :PORT for all addresses, where everyone who can connect is answered")
		return
	}
	l, ok := d.listenAt(p)
	switch {
	case !ok:
	case l.count > 1:
		d.fail(p, "want one port")
	default:
		v.Set(reflect.ValueOf(l.first))
	}
}

// maxListened is how many ports a file may listen on.
const maxListened = 1 << 16

func (d *decoder) listens(p *place, _ *field, v reflect.Value) {
	var out []netip.AddrPort
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one address")
	}
	for _, ip := range items {
		if strings.Contains(ip.node.Value, "/") {
			if n, ok := d.listenNet(ip); ok {
				list := v.Addr().Interface().(*[]netip.AddrPort)
				d.listenNets[list] = append(d.listenNets[list], n)
			}
			continue
		}
		l, ok := d.listenAt(ip)
		if !ok || d.spent {
			continue
		}
		if d.listened += l.count; d.listened > maxListened {
			d.spent = true
			d.fail(ip, "the file listens on more than %d ports", maxListened)
			return
		}
		for n := range l.count {
			out = append(out, netip.AddrPortFrom(l.first.Addr(), l.first.Port()+uint16(n)))
		}
	}
	v.Set(reflect.ValueOf(out))
}

func (d *decoder) rules(p *place, _ *field, v reflect.Value) {
	var out []Rule
	for _, ip := range d.items(p) {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		r, bad := parseRule(s)
		if bad != "" {
			d.fail(ip, "%s", bad)
			continue
		}
		out = append(out, r)
	}
	v.Set(reflect.ValueOf(out))
}

func parseRule(s string) (Rule, string) {
	switch c := Class(s); c {
	case ClassPrivate, ClassLoopback, ClassLinkLocal, ClassMulticast, ClassSelf:
		return Rule{Class: c}, ""
	}
	if !strings.Contains(s, "/") {
		a, bad := parseAddr(s)
		if bad == "want an IP address" {
			bad = "want a network, an address, or private, loopback, linklocal, multicast or self"
		}
		if bad != "" {
			return Rule{}, bad
		}
		return Rule{Prefix: netip.PrefixFrom(a, a.BitLen())}, ""
	}
	n, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return Rule{}, "want a network, an address, or private, loopback, linklocal, multicast or self"
	case n.Addr().Is4In6():
		return Rule{}, "write the IPv4 network as IPv4"
	case n != n.Masked():
		return Rule{}, fmt.Sprintf("has bits beyond its length, perhaps %s", n.Masked())
	}
	return Rule{Prefix: n}, ""
}

func (d *decoder) patterns(p *place, _ *field, v reflect.Value) {
	if !d.isList(p) {
		return
	}
	out := []string{}
	for _, ip := range d.items(p) {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		if _, err := selection.ParseGlobs([]string{s}); err != nil {
			d.fail(ip, "want ESCAPER/ID, with * for any run of characters within a segment")
			continue
		}
		out = append(out, s)
	}
	v.Set(reflect.ValueOf(out))
}
