package netcfg

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
