package netcfg

import (
	"net/netip"
	"slices"
)

// Export what the tests make snapshots of and look behind.

// NewSnapshot makes a snapshot by hand.
func NewSnapshot(links []Link, addrs []Address, routes []Route, rules []Rule) *Snapshot {
	byIndex := make(map[int]Link, len(links))
	for _, l := range links {
		byIndex[l.Index] = l
	}
	s := newSnapshot(byIndex, addrs, routes, rules)
	s.IPv6, s.AddrProto = true, true
	return s
}

// AddressList gives all addresses in order.
func (s *Snapshot) AddressList() []Address { return s.list }

// CarryOver is carryOver; gone are addresses of which an event said that they went.
func (s *Snapshot) CarryOver(old *Snapshot, gone ...Address) *Snapshot {
	m := make(map[journalKey]bool)
	for _, a := range gone {
		m[journalKey{a.LinkIndex, a.Addr}] = true
	}
	return s.carryOver(old, m)
}

// ParseJournal gives the addresses that a state file of boot "b" and namespace "1:2"
// names, and the file written anew.
func ParseJournal(text string) (addrs []netip.Addr, again string) {
	j := &journal{boot: "b", net: "1:2", live: make(map[journalKey]bool), name: make(map[journalKey]string)}
	j.parse(text)
	for k := range j.live {
		addrs = append(addrs, k.addr)
		again += j.line("+", k, j.name[k])
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, again
}

// BreakSubscription makes the watcher's socket useless.
func (w *Watcher) BreakSubscription() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sub.Close()
}

// ShrinkBuffer leaves the watcher's socket room for hardly an event.
func (w *Watcher) ShrinkBuffer() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sub.SetReceiveBufferSize(1, false)
}

// KeyOf makes two routes comparable as the kernel does.
func KeyOf(r Route) any { return r.key() }

// IsLastResort is isLastResort.
func IsLastResort(r Route) bool { return r.isLastResort() }

// The parsers, for fuzzing.
var (
	ParseLink    = parseLink
	ParseAddr    = parseAddr
	ParseRoute   = parseRoute
	ParseRule    = parseRule
	ParseNFTRule = parseNFTRule
	ParseClaims  = parseClaims
	EncodeAddr   = encodeAddr
	EncodeRoute  = encodeRoute
	EncodeRule   = encodeRule
	MarkMatches  = markMatches
	ReleaseSince = releaseAtLeast
	ReadSysctls  = readSysctls
)
