package escaper

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"wayout/selection"
)

// verdict is what connections and probes say of one family of a path that the
// kernel can send by.
type verdict uint8

const (
	sound    verdict = iota // nothing is known against it
	unproved                // it waits for its first probe
	onTrial                 // it was failed, and its hold is over: one request at a time may try it
	failed
)

// Passive says when the connections that fail on a path turn it down: so many
// in a row, to so many addresses, within a time. Connections that time out,
// that no route leads to or that are reset before they are made are failures;
// one that is refused came through, save on a path to a peer, where it was the
// peer that refused. On such a path one address is enough. An address that
// cannot be bound and a connection that the guard refuses turn a path down by
// themselves.
type Passive struct {
	Failures     int
	Destinations int
	Window       time.Duration
	Hold         time.Duration // how long a path stays down at least; see course.fall
}

const (
	// maxHold bounds the doubling of a hold.
	maxHold = 5 * time.Minute
	// minCalm is how long a path has to be up at least so that its next fall
	// counts as a first one.
	minCalm = time.Minute
)

// course is what is remembered of the connections and probes of one family.
type course struct {
	// restless: there is something that a connection made would change.
	restless atomic.Bool

	mu       sync.Mutex
	failures []time.Time // those in a row, the oldest first, as many as count
	targets  []failedTo  // where to, each once
	hold     time.Duration
	until    time.Time // the end of the hold
	back     time.Time // when the path was last given back
	local    bool      // it failed by an error of this host's own
	good     int       // probes in a row
	bad      int
}

// failedTo is a target that could not be reached, and when that was last so.
type failedTo struct {
	addr netip.Addr
	at   time.Time
}

// Watched says whether connections or probes judge the escaper's paths.
func (d *Direct) Watched() bool { return d.passive != nil || d.probe != nil }

// course returns what is remembered of a family. A path to a peer is one for
// both. A path that nothing has happened to takes no room.
func (p *Path) course(f selection.Family) *course {
	both := p.courses.Load()
	if both == nil {
		both = &[2]course{}
		if !p.courses.CompareAndSwap(nil, both) {
			both = p.courses.Load()
		}
	}
	if p.Peer == nil && f == selection.V6 {
		return &both[1]
	}
	return &both[0]
}

// alike returns the families that share a family's course.
func (p *Path) alike(f selection.Family) selection.Family {
	if p.Peer != nil {
		return p.Given()
	}
	return f
}

// verdict returns what is said of a family.
func (p *Path) verdict(f selection.Family) verdict {
	s := p.state.Load()
	if p.alike(f)&selection.V4 != 0 {
		return s.v4.health
	}
	return s.v6.health
}

// pronounce sets the verdict on a family and all that share its course.
func (d *Direct) pronounce(p *Path, f selection.Family, v verdict, why string) {
	was := p.verdict(f)
	f = p.alike(f)
	d.change(p, func(s *state) {
		for _, one := range [...]selection.Family{selection.V4, selection.V6} {
			if f&one != 0 && p.Given()&one != 0 {
				s.side(one).health, s.side(one).why = v, why
			}
		}
	})
	if v == was {
		return
	}
	if v == failed {
		p.closeIdle(f)
	}
	if d.health != nil {
		d.health.note(p.ledger)
	}
}

// observe takes note of how a connection to an address ended, where connections
// or probes judge the path.
func (d *Direct) observe(p *Path, r Result, to netip.AddrPort, err error) {
	if !d.Watched() {
		return
	}
	f := selection.FamilyOf(to.Addr())
	refused := r == ResultRefused && p.Peer != nil
	switch {
	case r == ResultOK, r == ResultRefused && !refused:
		d.passed(p, f)
	case d.passive == nil:
	case refused, r == ResultTimeout, r == ResultUnreachable, r == ResultReset:
		d.missed(p, f, to.Addr(), err)
	case broken(err):
		d.broke(p, f, err)
	}
}

// broken says whether an error is the host's and the path's own: used up ports
// and descriptors are none of the path's faults.
func broken(err error) bool {
	return errors.Is(err, selection.ErrBind) || errors.Is(err, ErrGuarded)
}

// passed takes note of a connection that came through.
func (d *Direct) passed(p *Path, f selection.Family) {
	if p.courses.Load() == nil {
		return
	}
	c := p.course(f)
	if !c.restless.Load() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch p.verdict(f) {
	case sound:
		c.forget()
		c.restless.Store(false)
	case onTrial:
		if d.probe == nil {
			c.giveBack(d.now())
			d.pronounce(p, f, sound, "")
		}
	}
	// What was failed waits for its hold to end; what is probed, for its probes.
}

// missed takes note of one that did not.
func (d *Direct) missed(p *Path, f selection.Family, to netip.Addr, err error) {
	c := p.course(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.verdict(f) != sound {
		return // a trial is settled by who tries
	}
	c.restless.Store(true)
	now := d.now()
	n := c.miss(d.passive, to, now)
	need := d.passive.Destinations
	if p.Peer != nil {
		need = 1
	}
	if len(c.failures) < d.passive.Failures || n < need {
		return
	}
	d.fall(p, f, c, now, fmt.Sprintf("%d connections in a row failed, to %s; the last: %s", len(c.failures), count(n, "address", "addresses"), p.plain(err)))
}

func count(n int, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}

// plain is an error's text without the path's name, for a reason that stands
// beside it.
func (p *Path) plain(err error) string {
	return strings.TrimPrefix(err.Error(), "path "+p.Name+": ")
}

// miss adds a failure to those in a row, and returns how many targets they had.
func (c *course) miss(o *Passive, to netip.Addr, now time.Time) int {
	old := now.Add(-o.Window)
	c.failures = append(slices.DeleteFunc(c.failures, old.After), now)
	if n := len(c.failures) - o.Failures; n > 0 {
		c.failures = slices.Delete(c.failures, 0, n)
	}
	c.targets = slices.DeleteFunc(c.targets, func(t failedTo) bool { return t.addr == to || t.at.Before(old) })
	c.targets = append(c.targets, failedTo{to, now})
	if n := len(c.targets) - max(o.Destinations, 1); n > 0 {
		c.targets = slices.Delete(c.targets, 0, n)
	}
	return len(c.targets)
}

// broke takes note of an error that one connection is enough for.
func (d *Direct) broke(p *Path, f selection.Family, err error) {
	c := p.course(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.verdict(f) != sound {
		return
	}
	d.fall(p, f, c, d.now(), p.plain(err))
	c.local = true
}

// fall turns a family down. The course is locked.
func (d *Direct) fall(p *Path, f selection.Family, c *course, now time.Time, why string) {
	base := maxHold
	switch {
	case d.passive != nil:
		base = d.passive.Hold
	case d.probe != nil:
		base = d.probe.Interval
	}
	c.fall(now, base, p.verdict(f) == onTrial)
	d.pronounce(p, f, failed, why)
	if d.probe == nil {
		d.health.remind(p.ledger, c.until)
	}
}

// fall begins a hold: base, or twice the hold before when the path has not been
// up since for as long as that took, a minute at least, or was only on trial.
func (c *course) fall(now time.Time, base time.Duration, again bool) {
	again = again || !c.back.IsZero() && now.Sub(c.back) < max(c.hold, minCalm)
	if again && c.hold > 0 {
		base = max(base, 2*c.hold)
	}
	c.hold = min(base, maxHold)
	c.until = now.Add(c.hold)
	c.good, c.bad, c.local = 0, 0, false
	c.forget()
	c.restless.Store(true)
}

// giveBack ends the time of a path that was down.
func (c *course) giveBack(now time.Time) {
	c.back = now
	c.good, c.bad, c.local = 0, 0, false
	c.forget()
	c.restless.Store(false)
}

func (c *course) forget() { c.failures, c.targets = c.failures[:0], c.targets[:0] }

// release puts the families on trial whose hold is over, and returns when that
// of another is; the zero Time: there is none.
func (d *Direct) release(p *Path, now time.Time) (next time.Time) {
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		c := p.course(f)
		c.mu.Lock()
		switch {
		case p.verdict(f) != failed || d.probe != nil || p.Given()&f == 0:
		case !now.Before(c.until):
			d.try(p, f, c)
		case next.IsZero() || c.until.Before(next):
			next = c.until
		}
		c.mu.Unlock()
	}
	return next
}

// try puts a family on trial. The course is locked.
func (d *Direct) try(p *Path, f selection.Family, c *course) {
	s := p.state.Load()
	sd := &s.v4
	if p.alike(f)&selection.V4 == 0 {
		sd = &s.v6
	}
	d.pronounce(p, f, onTrial, fmt.Sprintf("on trial by one request at a time, after %s down: %s", c.hold, sd.why))
}

// settle ends a request's trial of a path, by what came of it. A connection
// that was made has settled it already.
func (d *Direct) settle(p *Path, f selection.Family, err error) {
	if err != nil && (errors.Is(err, ErrTimeout) || errors.Is(err, ErrUnreachable) || errors.Is(err, ErrReset) ||
		p.Peer != nil && errors.Is(err, ErrRefused) || broken(err)) {
		for _, one := range [...]selection.Family{selection.V4, selection.V6} {
			c := p.course(one)
			c.mu.Lock()
			if f&one != 0 && p.verdict(one) == onTrial {
				d.fall(p, one, c, d.now(), "the trial failed: "+p.plain(err))
			}
			c.mu.Unlock()
		}
	}
	p.trying.Store(false)
}

// rejudge is for when the kernel's state was looked at again: a path that an
// error of the host's own had turned down is tried again.
func (d *Direct) rejudge(p *Path, f selection.Family) bool {
	if p.verdict(f) != failed {
		return false
	}
	c := p.course(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.local || p.verdict(f) != failed {
		return false
	}
	c.local, c.until = false, d.now()
	if d.probe != nil {
		return false
	}
	d.try(p, f, c)
	return true
}

// adopt fits what is known of a path to how it is judged after a reload.
func (d *Direct) adopt(p *Path, before *Direct) {
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		if p.Given()&f == 0 || !d.Watched() && p.courses.Load() == nil && p.verdict(f) == sound {
			continue
		}
		c := p.course(f)
		c.mu.Lock()
		switch v := p.verdict(f); {
		case !d.Watched():
			c.giveBack(d.now())
			d.pronounce(p, f, sound, "")
		case d.probe == nil && (v == unproved || before.probe != nil && v == failed):
			d.try(p, f, c)
		case d.probe != nil && before.probe != nil && *d.probe != *before.probe:
			c.good, c.bad = 0, 0
		}
		c.mu.Unlock()
	}
}
