package escaper

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Filter is an egress_network_filter: it says which addresses may be dialled.
//
// Rules are networks; a class is several. The longest prefix that holds the
// address decides, and deny on a tie. Below the operator's rules lie the
// defaults, which count as rules of their own length too, but lose a tie with
// the operator: so `allow: [loopback]` opens 127.0.0.0/8, and `allow:
// ["0.0.0.0/0"]` does not. The class self is the single addresses of the host,
// and so outweighs every network: an own address in an allowed network stays
// denied until it is allowed by itself, or self is.
//
// An IPv6 address that carries an IPv4 one (see embedded) has to be allowed in
// both readings. wayout's own listeners are denied whatever the rules say.
//
// A Filter does not change; what it knows of the host does, by Host.Set.
type Filter struct {
	host  *Host
	spans []span // by from; each rules up to the next one's from
	self  ruling // the operator's word on the class self
}

// span is a run of addresses that one rule decides.
type span struct {
	from netip.Addr
	rule *rule // nil: allowed, because no rule holds it
}

type ruling uint8

const (
	unruled ruling = iota
	allowed
	denied
)

// rule is one network, allowed or denied.
type rule struct {
	net      netip.Prefix
	word     string // what the operator wrote, or the class of a default
	allow    bool
	operator bool
}

// beats reports whether r decides over q where both have the same network.
func (r *rule) beats(q *rule) bool {
	if r.operator != q.operator {
		return r.operator
	}
	return !r.allow
}

const classSelf = "self"

// class returns the networks that a class word stands for; nil when it is none.
// 100.64.0.0/10 (RFC 6598) and fec0::/10 (RFC 3879) are reachable no more than
// the ranges of RFC 1918 and RFC 4193 and count as private.
func class(word string) []string {
	switch word {
	case "private":
		return []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10"}
	case "loopback":
		return []string{"127.0.0.0/8", "::1/128"}
	case "linklocal":
		return []string{"169.254.0.0/16", "fe80::/10"}
	case "multicast":
		return []string{"224.0.0.0/4", "ff00::/8"}
	}
	return nil
}

// NewFilter returns the filter of these rules: networks, addresses, or one of
// the classes private, loopback, linklocal, multicast and self. Without any it
// denies the defaults of the contract: unspecified (0.0.0.0/8, where the
// kernel takes the first address for itself, and ::), loopback, link-local,
// multicast, broadcast, 100::/64 and the host's own addresses. host may be
// nil: then nothing is the host's own.
func NewFilter(host *Host, allow, deny []string) (*Filter, error) {
	if host == nil {
		host = &Host{}
	}
	f := &Filter{host: host}
	var rules []*rule
	for _, list := range [...]struct {
		words []string
		allow bool
	}{{allow, true}, {deny, false}} {
		for _, w := range list.words {
			if w == classSelf {
				if f.self = allowed; !list.allow {
					f.self = denied
				}
				continue
			}
			rs, err := parseRule(w, list.allow)
			if err != nil {
				return nil, fmt.Errorf("egress filter: %w", err)
			}
			rules = append(rules, rs...)
		}
	}
	f.spans = flatten(append(rules, defaults()...))
	return f, nil
}

func defaults() []*rule {
	var rules []*rule
	add := func(word string, nets ...string) {
		for _, n := range nets {
			rules = append(rules, &rule{net: netip.MustParsePrefix(n), word: word})
		}
	}
	add("unspecified", "0.0.0.0/8", "::/128")
	add("loopback", class("loopback")...)
	add("linklocal", class("linklocal")...)
	add("multicast", class("multicast")...)
	add("broadcast", "255.255.255.255/32")
	add("discard", "100::/64") // RFC 6666
	return rules
}

func parseRule(word string, allow bool) ([]*rule, error) {
	nets := class(word)
	if nets == nil {
		nets = []string{word}
	}
	var rules []*rule
	for _, n := range nets {
		p, err := parseNet(n)
		if err != nil {
			return nil, err
		}
		rules = append(rules, &rule{net: p, word: word, allow: allow, operator: true})
	}
	return rules, nil
}

// parseNet reads a network or an address. Host bits and zones are mistakes.
func parseNet(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%q is no network, address or class (private, loopback, linklocal, multicast, self)", s)
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is no network", s)
	}
	p = unmapPrefix(p)
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("network %q has bits set outside its mask, want %s", s, p.Masked())
	}
	return p, nil
}

// flatten turns rules into the spans in which one of them decides. Networks
// either hold one another or are apart, so a walk by start, with the networks
// around the place on a stack, meets each span once.
func flatten(rules []*rule) []span {
	slices.SortStableFunc(rules, func(a, b *rule) int {
		return cmp.Or(a.net.Addr().Compare(b.net.Addr()), cmp.Compare(a.net.Bits(), b.net.Bits()))
	})
	var spans []span
	put := func(from netip.Addr, r *rule) {
		if n := len(spans); n > 0 && spans[n-1].from == from {
			spans[n-1].rule = r
			return
		}
		spans = append(spans, span{from: from, rule: r})
	}
	var around []*rule
	leave := func() {
		end := last(around[len(around)-1].net).Next()
		around = around[:len(around)-1]
		if !end.IsValid() { // the family's last address
			return
		}
		var r *rule
		if len(around) > 0 {
			r = around[len(around)-1]
		}
		put(end, r)
	}
	for _, first := range [...]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		put(first, nil)
		for _, r := range rules {
			if r.net.Addr().BitLen() != first.BitLen() {
				continue
			}
			for len(around) > 0 && !around[len(around)-1].net.Contains(r.net.Addr()) {
				leave()
			}
			if n := len(around); n > 0 && around[n-1].net == r.net {
				if !r.beats(around[n-1]) {
					continue
				}
				around[n-1] = r
			} else {
				around = append(around, r)
			}
			put(r.net.Addr(), r)
		}
		for len(around) > 0 {
			leave()
		}
	}
	return spans
}

// last returns the last address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().As16()
	n := p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	for i := n; i < 128; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	if p.Addr().Is4() {
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.AddrFrom16(b)
}

// Check returns nil when addr may be dialled, else an error that wraps
// ErrProhibited and says what denies it. It allocates only the error.
func (f *Filter) Check(addr netip.Addr, port uint16) error {
	why, at := f.verdict(addr, port)
	switch {
	case why == "":
		return nil
	case at != addr:
		return fail(ErrProhibited, nil, "destination prohibited: %s, which stands for %s (%s)", addr, at, why)
	}
	return fail(ErrProhibited, nil, "destination prohibited: %s (%s)", addr, why)
}

// verdict returns what denies an address, and in which reading of it; "" when
// it may be dialled.
func (f *Filter) verdict(addr netip.Addr, port uint16) (why string, at netip.Addr) {
	a := addr.WithZone("").Unmap()
	if !a.IsValid() {
		return "no address", addr
	}
	host := f.host.p.Load()
	if why := f.deny(host, a, port); why != "" {
		return why, a
	}
	if a.Is6() {
		var buf [most]netip.Addr
		for _, in := range embedded(a, buf[:0]) {
			if why := f.deny(host, in, port); why != "" {
				return why, in
			}
		}
	}
	return "", a
}

// deny returns what denies an address, "" when nothing does.
func (f *Filter) deny(host *hostFacts, a netip.Addr, port uint16) string {
	if host.listens(a, port) {
		return "a listener of wayout itself"
	}
	r := f.decide(a)
	if !a.IsLoopback() && host.owns(a) {
		exact := r != nil && r.operator && r.net.IsSingleIP()
		switch {
		case f.self == denied, f.self == unruled && !exact:
			return classSelf
		case !exact: // allowed by class, against any network
			return ""
		}
	}
	if r == nil || r.allow {
		return ""
	}
	return r.word
}

// decide returns the rule for an address, nil for none.
func (f *Filter) decide(a netip.Addr) *rule {
	lo, hi := 0, len(f.spans) // the last span that does not begin after a
	for lo+1 < hi {
		mid := int(uint(lo+hi) >> 1)
		if a.Less(f.spans[mid].from) {
			hi = mid
		} else {
			lo = mid
		}
	}
	return f.spans[lo].rule
}
