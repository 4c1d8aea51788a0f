package resolve

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"wayout/selection"
)

// ask gets what sets lacks of a name: it joins or starts a question for each family and waits for them, as Lookup's contract
// says. A set that is nil in the result is one that is late. The error is ctx's.
func (r *Resolver) ask(ctx context.Context, st *state, name string, sets [2]*rrset, want selection.Family) ([2]*rrset, error) {
	var flights [2]*flight
	for i, f := range [2]selection.Family{selection.V4, selection.V6} {
		if want&f == 0 {
			sets[i] = nil // known from another lookup, and no reason to wait less for what this one wants
			continue
		}
		if sets[i] != nil {
			continue
		}
		set, fl, lead := st.cache.join(question{name: name, family: i}, r.now())
		if lead {
			r.launch(st, fl)
		}
		sets[i], flights[i] = set, fl
	}
	var late, tired <-chan time.Time
	old := r.old(st, name, flights)
	if wait, ok := patience(old, flights, r.now()); ok && wait == 0 {
		sets = fill(sets, old, flights)
	} else if ok {
		t := time.NewTimer(wait)
		defer t.Stop()
		tired = t.C
	}
	for {
		var done [2]<-chan struct{} // nil, and so never ready, where nothing is waited for
		for i, f := range flights {
			if f != nil && sets[i] == nil {
				done[i] = f.done
			}
		}
		if done[v4] == nil && done[v6] == nil {
			return sets, nil
		}
		if late == nil {
			if wait, ok := r.grace(sets, flights); ok {
				t := time.NewTimer(wait)
				defer t.Stop()
				late = t.C
			}
		}
		select {
		case <-done[v4]:
			sets[v4] = flights[v4].set
		case <-done[v6]:
			sets[v6] = flights[v6].set
		case <-late:
			return sets, nil
		case <-tired:
			sets = fill(sets, old, flights)
		case <-ctx.Done():
			if late != nil { // there are addresses
				return sets, nil
			}
			return sets, ctx.Err()
		}
	}
}

// grace is how long the family that is still under way is waited for when the other has addresses, false when it has none. It
// counts from when both the addresses were known and the question put, so that of many lookups only the first of a question
// that is never answered waits.
func (r *Resolver) grace(sets [2]*rrset, flights [2]*flight) (time.Duration, bool) {
	for i, s := range sets {
		if f := flights[1-i]; s != nil && s.kind == found && f != nil {
			return max(0, time.Duration(max(s.at, f.start)-r.now())+r.opt.Delay), true
		}
	}
	return 0, false
}

// old is what Options.ServeStale allows to give in place of what the flights bring.
func (r *Resolver) old(st *state, name string, flights [2]*flight) (sets [2]*rrset) {
	if r.opt.ServeStale <= 0 || flights[v4] == nil && flights[v6] == nil {
		return sets
	}
	return st.cache.stale(name, r.now())
}

// patience is how long the flights are waited for when there are old sets to give in their place, false when there are none. It
// counts from when the first of the questions was put, so that of many lookups only the first waits.
func patience(old [2]*rrset, flights [2]*flight, now int64) (time.Duration, bool) {
	wait, ok := staleAfter, false
	for i, f := range flights {
		if f != nil && old[i] != nil {
			wait, ok = min(wait, staleAfter-time.Duration(now-f.start)), true
		}
	}
	return max(0, wait), ok
}

// fill puts the old sets in the place of what is still being asked.
func fill(sets, old [2]*rrset, flights [2]*flight) [2]*rrset {
	for i, f := range flights {
		if f != nil && sets[i] == nil {
			sets[i] = old[i]
		}
	}
	return sets
}

// launch flies a flight, or ends it at once when the resolver is closed or has too many.
func (r *Resolver) launch(st *state, f *flight) {
	var err error
	r.mu.Lock()
	switch {
	case r.closed:
		err = net.ErrClosed
	case r.inflight >= r.opt.Inflight:
		err = errBusy
	default:
		r.inflight++
		r.work.Add(1)
	}
	r.mu.Unlock()
	if err != nil {
		st.cache.land(f, &rrset{kind: failed, cause: ErrServer, err: err})
		return
	}
	go func() {
		defer r.work.Done()
		set := r.query(st.conf, f.question)
		r.mu.Lock()
		r.inflight--
		r.mu.Unlock()
		st.cache.land(f, set)
	}()
}

// query puts a question to the servers in turn, as many rounds as there are attempts, until one of them knows. It takes
// attempts x servers x timeout at most, and again as long when every server cuts its answers short and is silent over TCP.
func (r *Resolver) query(c *conf, q question) *rrset {
	set := &rrset{kind: failed, cause: ErrServer}
	servers := c.order(r.now())
	for range c.attempts {
		for _, s := range servers {
			m, err := r.exchange(c, s, q)
			if r.ctx.Err() != nil {
				return &rrset{kind: failed, cause: ErrServer, err: net.ErrClosed}
			}
			now := r.now()
			if err == nil {
				s.last.Store(0)
				var ans answer
				if ans, err = q.interpret(m); err == nil {
					return r.keep(ans, s.addr, now)
				}
				// A server's word outweighs another one's silence as the reason that is told.
				if errors.Is(err, errRcode) {
					err = nil
				}
				*set = rrset{kind: failed, cause: ErrServer, server: s.addr, rcode: rcodeText(m), err: err}
				continue
			}
			cause, ill := ErrServer, brokenFor
			if timeout(err) {
				cause, ill = ErrTimeout, slowFor
				err = nil // the words "i/o timeout" add nothing
			}
			s.last.Store(now + int64(ill))
			if set.rcode == "" {
				*set = rrset{kind: failed, cause: cause, server: s.addr, err: err}
			}
		}
	}
	set.at = r.now()
	set.until = set.at + int64(failTTL)
	return set
}

// keep makes the set of an answer, good for as long as the answer and the bounds say.
func (r *Resolver) keep(a answer, server string, now int64) *rrset {
	ceiling := r.opt.MaxTTL
	if a.kind != found {
		ceiling = r.opt.MaxNegTTL
	}
	ttl := min(max(time.Duration(a.ttl)*time.Second, r.opt.MinTTL), ceiling)
	set := &rrset{kind: a.kind, addrs: a.addrs, mapped: a.mapped, at: now, until: now + int64(ttl), server: server}
	set.stale = set.until + int64(r.opt.ServeStale)
	if a.kind == noName {
		set.rcode = "NXDOMAIN"
	}
	return set
}

func timeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}
