package netcfg

import (
	"context"
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

// EndSocketsAsOld is EndSockets on a kernel below 6.11.
func (k *Netlink) EndSocketsAsOld(ctx context.Context, m Mark) (int, error) {
	d, err := k.openDiag()
	if err != nil {
		return 0, err
	}
	defer d.close()
	return d.end(ctx, m.choice(), false)
}

// Leftover makes one of the sockets that EndSockets leaves; refused says that the
// kernel would not end it.
type Leftover struct {
	State         TCPState
	Kept, Refused bool
}

// LeftOver is the error for sockets that are left.
func LeftOver(list ...Leftover) error {
	sockets := make([]tcpSocket, len(list))
	fates := make(map[cookie]fate)
	for i, l := range list {
		s := tcpSocket{state: l.State, kept: l.Kept}
		s.id[sizeofInetDiagID-1] = byte(i)
		sockets[i], fates[s.cookie()] = s, untried
		switch {
		case l.Refused:
			fates[s.cookie()] = refused
		case s.orphan():
			fates[s.cookie()] = untouched
		}
	}
	return leftOver(sockets, fates)
}

// ParseSocket is parseSocket; matches says whether the socket has the mark.
func ParseSocket(b []byte, m Mark) (state TCPState, orphan, matches bool, err error) {
	s, err := parseSocket(b)
	return s.state, s.orphan(), s.has(m), err
}

// The parsers, for fuzzing.
var (
	ParseLink    = parseLink
	ParseAddr    = parseAddr
	ParseRoute   = parseRoute
	ParseRule    = parseRule
	ParseFilter  = parseFilter
	ParseNFTRule = parseNFTRule
	ParseClaims  = parseClaims
	EachMessage  = eachMessage
	EncodeAddr   = encodeAddr
	EncodeRoute  = encodeRoute
	EncodeRule   = encodeRule
	MarkMatches  = markMatches
	ReleaseSince = releaseAtLeast
	KernelSince  = kernelAtLeast
	ReadSysctls  = readSysctls
)

// Snapshot is the latest state.
func (w *Watcher) Snapshot() *Snapshot { return w.current.Load() }
