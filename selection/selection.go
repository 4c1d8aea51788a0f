// Package selection decides which node of an escaper carries a request.
//
// A selection is a map from escaper name to a [Value]: an index, an ID, an
// address or, of the operator, an inline object. It comes from up to four
// places at once (the operator's map of the user, the client's header or SOCKS
// extension, the client's user name, the server's own setting), and the
// strongest one wins escaper by escaper. What nobody selects, the session
// decides, when the user name has one, and else the escaper's policy, among the
// nodes that are usable.
//
// A node owns up to one address of each family, or a whole prefix in its place:
// an address inside it is then that node's. [AddrIn] takes one from it when
// nothing names the very address.
//
// The package is pure: it opens nothing and reads no clock, and its randomness
// is passed in.
package selection

import (
	"net/netip"
	"strconv"
	"strings"
)

// Family is a set of address families.
type Family uint8

// The families, to be combined with |.
const (
	V4 Family = 1 << iota
	V6
)

// FamilyOf returns the family of an address, reading ::ffff:a.b.c.d as IPv4,
// and 0 for the zero Addr.
func FamilyOf(a netip.Addr) Family {
	switch {
	case !a.IsValid():
		return 0
	case a.Is4(), a.Is4In6():
		return V4
	}
	return V6
}

// String names the set as error texts do.
func (f Family) String() string {
	switch f & (V4 | V6) {
	case V4:
		return "IPv4"
	case V6:
		return "IPv6"
	case V4 | V6:
		return "IPv4 or IPv6"
	}
	return "no family"
}

// Source says who decided where a request goes.
type Source uint8

// The sources. The zero value is the policy: nobody selected anything.
const (
	SourcePolicy   Source = iota // the escaper's pick_policy
	SourceUser                   // the operator's egress_path of the user
	SourceHeader                 // the client's header
	SourceSOCKS                  // the client's SOCKS extension
	SourceUsername               // the client's user-name parameters
	SourceServer                 // the server's own select
)

// String returns the word that metrics and logs use.
func (s Source) String() string {
	switch s {
	case SourcePolicy:
		return "policy"
	case SourceUser:
		return "user"
	case SourceHeader:
		return "header"
	case SourceSOCKS:
		return "socks"
	case SourceUsername:
		return "username"
	case SourceServer:
		return "server"
	}
	return "source(" + strconv.Itoa(int(s)) + ")"
}

// ByClient reports whether the client itself chose, so that
// enable_path_selection and allow_path bind the choice.
func (s Source) ByClient() bool {
	return s == SourceHeader || s == SourceSOCKS || s == SourceUsername
}

// Entry is one selection: a value for one escaper.
type Entry struct {
	Escaper string
	Value   Value
}

// Layer is the map of one source, in the order it was given. An escaper stands
// in it at most once. A nil or empty Layer selects nothing.
type Layer []Entry

func (l Layer) find(escaper string) (Value, bool) {
	for i := range l {
		if l[i].Escaper == escaper {
			return l[i].Value, true
		}
	}
	return Value{}, false
}

// Selection is all that was said about one request, one Layer a source.
type Selection struct {
	User     Layer // the operator's map of the user
	Client   Layer // the header or the SOCKS extension
	Username Layer // the user-name parameters path and ip
	Server   Layer

	// Session binds what no layer selects: the escaper then picks by
	// [Pool.PickSession]. The zero Session binds nothing.
	Session Session

	// ClientSource tells Client's two origins apart: SourceSOCKS, or else the
	// header. No value of it makes a client's choice pass as the operator's.
	ClientSource Source
}

const layers = 4

// layer returns the n-th strongest source.
func (s *Selection) layer(n int) (Layer, Source) {
	switch n {
	case 0:
		return s.User, SourceUser
	case 1:
		if s.ClientSource == SourceSOCKS {
			return s.Client, SourceSOCKS
		}
		return s.Client, SourceHeader
	case 2:
		return s.Username, SourceUsername
	}
	return s.Server, SourceServer
}

// For returns what the strongest source that names the escaper says of it.
// When none does, it returns false with SourcePolicy.
func (s *Selection) For(escaper string) (Value, Source, bool) {
	for n := range layers {
		l, src := s.layer(n)
		if v, ok := l.find(escaper); ok {
			return v, src, true
		}
	}
	return Value{}, SourcePolicy, false
}

// Entries ranges over the entries that count, those that no stronger source
// overrides, the strongest source first and each source in its own order.
func (s *Selection) Entries(yield func(Entry, Source) bool) {
	for n := range layers {
		l, src := s.layer(n)
		for i := range l {
			if !s.overridden(l[i].Escaper, n) && !yield(l[i], src) {
				return
			}
		}
	}
}

// overridden reports whether one of the n strongest sources names the escaper.
func (s *Selection) overridden(escaper string, n int) bool {
	for m := range n {
		l, _ := s.layer(m)
		if _, ok := l.find(escaper); ok {
			return true
		}
	}
	return false
}

// quote renders what a client said for an error text: ASCII only, one line,
// and short, because the text goes into headers and logs.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return strconv.QuoteToASCII(strings.ToValidUTF8(s[:most], "")) + "..."
	}
	return strconv.QuoteToASCII(s)
}
