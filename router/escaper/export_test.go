package escaper

import (
	"context"
	"net/netip"
	"time"
)

// For tests of what has no other way in.
var (
	ParsePorts = parsePorts
	Classify   = (*Path).classify
	FirstAddr  = firstAddr
)

// MaxProbes is how many paths are probed at once.
const MaxProbes = maxProbes

// SetNow gives it another clock.
func (h *Health) SetNow(now func() time.Time) { h.now = now }

// StepAt does what is due, its probes in the place of the real ones; nil: those
// themselves, to their end. It returns when the next is due.
func (h *Health) StepAt(now time.Time, probe func(p *Path, done func())) time.Time {
	return h.step(now, func(t *Table, p *Path, next time.Time) {
		done := func() { h.ended(p, next) }
		if probe != nil {
			probe(p, done)
			return
		}
		p.d.probeAll(context.Background(), t, p)
		done()
	})
}

// Observe takes note of how a connection ended.
func (p *Path) Observe(r Result, to netip.AddrPort, err error) { p.d.observe(p, r, to, err) }

// Decision is what becomes of a request before anything is dialled.
type Decision struct {
	Way  []string   // the escapers that it passes
	Path string     // the path; "" when the policy is to pick it
	Addr netip.Addr // the very address that was selected
}

// Decide goes through the table of bad selections.
func (t *Table) Decide(r *Request) (Decision, error) {
	steps, c, err := t.decide(r, nil, true)
	var d Decision
	for i := range steps {
		d.Way = append(d.Way, steps[i].e.Name())
	}
	if c.p != nil {
		d.Path, d.Addr = c.p.Name, c.addr
	}
	return d, err
}

// SetNow gives them another clock.
func (s *Sessions) SetNow(now func() time.Time) { s.now = now }

// Age says how many lifetimes of a session are over.
func (s *Sessions) Age(key uint64, lifetime time.Duration) uint64 { return s.age(key, lifetime) }

// Known is how many sessions are remembered.
func (s *Sessions) Known() int {
	n := 0
	for i := range s.shards {
		n += len(s.shards[i].born)
	}
	return n
}

// MaxSessions is how many are, at most.
const MaxSessions = sessionShards * maxSessions

// NewDoor returns a door with its first table.
func NewDoor(t *Table) *Door {
	d := &Door{}
	d.Swap(t)
	return d
}

// Table returns the current table, nil when the door is closed.
func (d *Door) Table() *Table { return d.table.Load() }
