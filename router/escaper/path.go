package escaper

import (
	"net/netip"
	"sync/atomic"
	"time"

	"wayout/router/escaper/hop"
	"wayout/selection"
)

// Condition is what is known of one family of a path.
type Condition uint8

// The conditions. Only Up carries traffic.
const (
	None      Condition = iota // the path was never given the family
	Probing                    // nothing is known of it yet
	Tentative                  // the address is there, duplicate address detection is not over
	Up
	Down // see the reason
)

// String returns the word for logs.
func (c Condition) String() string {
	switch c {
	case None:
		return "none"
	case Probing:
		return "probing"
	case Tentative:
		return "tentative"
	case Up:
		return "up"
	case Down:
		return "down"
	}
	return "unknown"
}

// The state words of a path, as `paths --json` prints them.
const (
	StateUp       = "up"
	StateDown     = "down"
	StateDraining = "draining"
	StateExpired  = "expired"
	StateProbing  = "probing"
)

// NodeOptions is one path of a direct escaper, as configured.
type NodeOptions struct {
	ID     string
	V4, V6 netip.Addr // the zero Addr: none of that family

	// Net4 and Net6 are whole prefixes in the place of an address: each
	// connection has an address of its own, or its session's, or the very one
	// that was selected.
	Net4, Net6 netip.Prefix

	// Unbound are the families that the path serves without an address of its
	// own, by one of its interface's (SetSource). It needs BindToDevice.
	Unbound selection.Family

	// Peer is the next-hop proxy that the path goes by; nil: none.
	Peer *Peer
	// AnySource: the path to a peer that the host's main routing may choose the
	// source address for.
	AnySource bool

	// Unlisted: no index counts it. It comes after all that are counted.
	Unlisted bool

	// EIP is what targets see in place of the path's addresses, at most one of
	// each family: what Probe.EIP compares with.
	EIP []netip.Addr

	Expire time.Time         // from when on the path carries nothing new; the zero Time: never
	Labels map[string]string // what a publication says of it besides; not to be changed

	Number       uint32 // the path's number in the kernel's counters; 0: none
	Mark         uint32 // SO_MARK of its sockets; 0: unmarked
	Interface    string
	BindToDevice bool // SO_BINDTODEVICE to Interface
	Uplink       string
	Weight       uint16
}

// Path is one egress path: a source address of each family, or of one, and
// what is known of it. What NodeOptions says of it does not change; its
// condition, counters and connections are safe for concurrent use. They
// outlive a reload that leaves its ID, addresses and interface as they are.
type Path struct {
	NodeOptions

	Escaper string
	Name    string // "out/fra-2"

	d    *Direct
	node int                      // position in d's pool
	hop  atomic.Pointer[hop.Peer] // of Peer, once it was needed
	*ledger
}

// state is all that decides whether a path may be used; it never changes once
// it is published.
type state struct {
	v4, v6   side
	draining bool
	expired  bool
	since    time.Time // of the state word
}

type side struct {
	cond   Condition // as the kernel has it
	reason string
	addr   netip.Addr // the source, for a family that the path serves by its interface alone
	health verdict
	why    string // of health
}

// now is what cond and health come to.
func (d *side) now() (Condition, string) {
	if d.cond != Up || d.health == sound {
		return d.cond, d.reason
	}
	if d.health == failed {
		return Down, d.why
	}
	return Probing, d.why
}

func (s *state) side(f selection.Family) *side {
	if f == selection.V4 {
		return &s.v4
	}
	return &s.v6
}

// families returns those whose side satisfies a condition.
func (s *state) families(is func(*side) bool) selection.Family {
	var f selection.Family
	if is(&s.v4) {
		f |= selection.V4
	}
	if is(&s.v6) {
		f |= selection.V6
	}
	return f
}

// up returns the families that are Up, draining or not.
func (s *state) up() selection.Family {
	return s.families(func(d *side) bool { return d.cond == Up && d.health == sound })
}

// present returns the families that the kernel can send by, whatever is known
// of what becomes of it then.
func (s *state) present() selection.Family {
	return s.families(func(d *side) bool { return d.cond == Up })
}

// usable returns the families that may carry new connections.
func (s *state) usable() selection.Family {
	if s.draining || s.expired {
		return 0
	}
	return s.up()
}

// trial returns the families that may carry one new connection at a time.
func (s *state) trial() selection.Family {
	if s.draining || s.expired {
		return 0
	}
	return s.families(func(d *side) bool { return d.cond == Up && d.health == onTrial })
}

func (s *state) word() string {
	switch {
	case s.expired:
		return StateExpired
	case s.draining:
		return StateDraining
	case s.up() != 0:
		return StateUp
	case s.families(func(d *side) bool { c, _ := d.now(); return c == Tentative || c == Probing }) != 0:
		return StateProbing
	}
	return StateDown
}

// reason says what keeps the families of want from being used: "" when all
// that the path was given are up.
func (s *state) reason(want selection.Family) string {
	text := ""
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		cond, why := s.side(f).now()
		if want&f == 0 || cond == Up || cond == None {
			continue
		}
		switch {
		case why != "":
		case cond == Probing:
			why = f.String() + " has not been looked at yet"
		default:
			why = f.String() + " is " + cond.String()
		}
		if text != "" && text != why {
			why = text + "; " + why
		}
		text = why
	}
	return text
}

// Status is a path's state at one moment.
type Status struct {
	State string // up, down, draining, expired or probing
	// Reason says why the path is not up, or, where State is up, what keeps
	// its other family from being used.
	Reason string
	Since  time.Time // when State became what it is
	V4, V6 Condition
}

// Of returns the condition of one family.
func (s Status) Of(f selection.Family) Condition {
	if f == selection.V4 {
		return s.V4
	}
	return s.V6
}

// Status returns the path's state. A path with one family up is up.
func (p *Path) Status() Status {
	s := p.state.Load()
	st := Status{State: s.word(), Reason: s.reason(selection.V4 | selection.V6), Since: s.since}
	st.V4, _ = s.v4.now()
	st.V6, _ = s.v6.now()
	return st
}

// Given returns the families that the path was configured with, up or not.
func (p *Path) Given() selection.Family {
	f := selection.FamilyOf(p.V4) | selection.FamilyOf(p.V6) | p.Unbound
	if p.Net4.IsValid() {
		f |= selection.V4
	}
	if p.Net6.IsValid() {
		f |= selection.V6
	}
	return f
}

// Net returns the prefix that the path draws its addresses of a family from,
// the zero Prefix when it has a single address, or none.
func (p *Path) Net(f selection.Family) netip.Prefix {
	if f == selection.V4 {
		return p.Net4
	}
	return p.Net6
}

// source returns the one address that a family's connections leave from: the
// zero Addr for a family that the path does not serve, or serves by a whole
// prefix (see choice.sources). No socket must ever be bound to that.
func (p *Path) source(f selection.Family) netip.Addr {
	switch {
	case p.AnySource && f == selection.V4:
		return netip.IPv4Unspecified()
	case p.AnySource && f == selection.V6:
		return netip.IPv6Unspecified()
	case f == selection.V4 && p.V4.IsValid():
		return p.V4
	case f == selection.V6 && p.V6.IsValid():
		return p.V6
	case p.Unbound&f != 0 && (f == selection.V4 || f == selection.V6):
		return p.state.Load().side(f).addr
	}
	return netip.Addr{}
}

// SetFamilyState says what the kernel's state means for one family of the path.
// A family that the path was never given is left alone. What is not Up serves no new
// connection from the return on, and its idle connections are closed; the
// escaper's policy takes note with the next Publish. Connections that are in
// use live on: see Kill. It reports whether anything changed.
func (p *Path) SetFamilyState(f selection.Family, c Condition, reason string) bool {
	if p.Given()&f == 0 || (f != selection.V4 && f != selection.V6) {
		return false
	}
	if c == Up {
		reason = ""
	}
	changed := p.d.change(p, func(s *state) { sd := s.side(f); sd.cond, sd.reason = c, reason })
	if changed && c != Up {
		p.closeIdle(f)
	}
	if c == Up {
		changed = p.d.rejudge(p, f) || changed
	}
	return changed
}

// SetSource says which address of its interface a path uses that has none of
// its own for the family; the zero Addr leaves it without. Idle connections of
// the address before are closed. For other families it does nothing.
func (p *Path) SetSource(f selection.Family, addr netip.Addr) {
	if p.Unbound&f == 0 || p.AnySource || p.source(f) == addr || (f != selection.V4 && f != selection.V6) {
		return
	}
	p.d.change(p, func(s *state) { s.side(f).addr = addr })
	p.closeIdle(f)
}

// Source returns the address that connections of a family leave from now: the
// path's own, or else that of its interface; the zero Addr when there is none,
// or no single one (see Sources).
func (p *Path) Source(f selection.Family) netip.Addr {
	if p.AnySource {
		return netip.Addr{}
	}
	return p.source(f)
}

// Sources returns all addresses that connections of a family may leave from:
// one, a whole prefix, every address for a path of AnySource, or the zero
// Prefix for none.
func (p *Path) Sources(f selection.Family) netip.Prefix {
	if n := p.Net(f); n.IsValid() {
		return n
	}
	a := p.source(f)
	switch {
	case !a.IsValid():
		return netip.Prefix{}
	case p.AnySource:
		return netip.PrefixFrom(a, 0)
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// over says whether the path's time is.
func (p *Path) over(now time.Time) bool { return !p.Expire.IsZero() && !now.Before(p.Expire) }

// lapse takes note of the time: a path whose time is over is expired from now
// on. It reports whether it is.
func (p *Path) lapse(now time.Time) bool {
	if !p.over(now) {
		return false
	}
	if p.d.change(p, func(s *state) { s.expired = s.expired || !p.d.retired }) { // the next table's times are other ones
		p.closeIdle(selection.V4 | selection.V6)
	}
	return true
}

// Drain lets no new connection begin on the path and closes its idle ones;
// those in use live on. It is published at once, like Undrain.
func (p *Path) Drain() {
	if p.d.change(p, func(s *state) { s.draining = true }) {
		p.d.Publish()
		p.closeIdle(selection.V4 | selection.V6)
	}
}

// Undrain takes Drain back.
func (p *Path) Undrain() {
	if p.d.change(p, func(s *state) { s.draining = false }) {
		p.d.Publish()
	}
}

// Result is how an attempt to connect ended.
type Result uint8

// The results, in the order of Counters.
const (
	ResultOK Result = iota
	ResultRefused
	ResultTimeout
	ResultUnreachable
	ResultReset
	ResultLocal // the source, the ports, the guard or the host's resources
	Results     // the number of them
)

// String returns the word that metrics use.
func (r Result) String() string {
	switch r {
	case ResultOK:
		return "ok"
	case ResultRefused:
		return "refused"
	case ResultTimeout:
		return "timeout"
	case ResultUnreachable:
		return "unreachable"
	case ResultReset:
		return "reset"
	case ResultLocal:
		return "local"
	}
	return "unknown"
}

// Counters are a path's connections since the start.
type Counters struct {
	Attempts [Results]uint64 // by result; Attempts[ResultOK] were made
	Closed   uint64
	Open     uint64 // idle ones included: their sockets are open
}

// Failed returns the number of attempts that made no connection.
func (c *Counters) Failed() uint64 {
	var n uint64
	for r := ResultOK + 1; r < Results; r++ {
		n += c.Attempts[r]
	}
	return n
}

type counters struct {
	attempts [Results]atomic.Uint64
	closed   atomic.Uint64
}

// Counters reads the path's counters, one by one.
func (p *Path) Counters() Counters {
	// Closed before made, so that Open is never below zero.
	c := Counters{Closed: p.counters.closed.Load()}
	for r := range c.Attempts {
		c.Attempts[r] = p.counters.attempts[r].Load()
	}
	c.Open = c.Attempts[ResultOK] - c.Closed
	return c
}
