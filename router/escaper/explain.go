package escaper

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"wayout/selection"
)

// Explanation is what would become of a request.
type Explanation struct {
	Steps  []string   // what decides, one sentence each, in the order in which it does
	Chain  []string   // the escapers that the request passes
	Choice Choice     // as Open would fill it
	Source netip.Addr // what the connection would leave from; the zero Addr where main routing chooses
	Any    bool       // the policy draws: another request may leave by another path
}

// Explain goes the way of Open and dials nothing. A name is resolved only when
// resolve is set; without, the families of its addresses are taken to be those
// that the path has. The error is Open's, as far as it comes to that.
func (t *Table) Explain(ctx context.Context, r *Request, resolve bool) (Explanation, error) {
	x := Explanation{}
	say := func(format string, args ...any) { x.Steps = append(x.Steps, fmt.Sprintf(format, args...)) }
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		say("%s selects %s of escaper %s", src, e.Value, e.Escaper)
		return true
	})
	if s := r.Selection.Session; s.Name != "" {
		say("the session %s chooses where nothing is selected", s.Name)
	}
	r.Choice = Choice{}
	var usual [usualSteps]passed
	steps, c, err := t.decide(r, usual[:0], true)
	x.Choice = r.Choice
	for i := range steps {
		s := &steps[i]
		x.Chain = append(x.Chain, s.e.Name())
		if s.node != "" {
			how, any := s.how(r)
			x.Any = x.Any || any
			say("route %s sends it to %s, by %s", s.e.Name(), s.node, how)
		}
	}
	if err != nil {
		return x, err
	}
	if err := c.ready(); err != nil {
		return x, err
	}
	f, err := c.explainTarget(ctx, r, resolve, say)
	if err != nil {
		return x, err
	}
	if c.p == nil {
		if err := c.pick(r, f, netip.AddrPort{}); err != nil {
			return x, err
		}
		x.Any = x.Any || draws(r, c.d.pool)
		say("the policy %s of escaper %s picks path %s among those that are up for %s", c.d.pool.Policy(), c.d.name, c.p.Name, f)
	}
	x.Choice = r.Choice
	x.Choice.Path = c.p.Name
	if c.d.peers {
		say("path %s goes on by the proxy %s", c.p.Name, c.p.Peer.o.Addr)
		if f = c.p.Given(); c.p.Peer.addr.IsValid() {
			f = selection.FamilyOf(c.p.Peer.addr)
		}
	}
	switch u := c.usable(c.want); {
	case f&c.want == 0 && !c.d.peers:
		return x, c.familyError(f)
	case f&c.p.Given() == 0:
		return x, c.p.peerFamilyError(f)
	case f&u == 0:
		return x, c.p.downError(c.p.state.Load(), f&c.want)
	default:
		f &= u
	}
	src := c.sources(r)
	// As interleave has it: IPv6 first, unless the strategy says otherwise.
	first, second := selection.V6, selection.V4
	if c.d.strategy == V4First {
		first, second = second, first
	}
	if f&first == 0 {
		first = second
	}
	x.Source = src.of(first)
	if src.fresh&first != 0 {
		x.Any = true
		say("each connection of path %s has an address of its own in %s", c.p.Name, c.p.Net(first))
	}
	if c.p.AnySource {
		x.Source = netip.Addr{}
	}
	say("it leaves by path %s, from %s", c.p.Name, orMain(x.Source))
	return x, nil
}

// how says what chose a route's node, and whether it may choose otherwise the
// next time.
func (p *passed) how(r *Request) (how string, any bool) {
	route := p.e.(*Route)
	if p.src != selection.SourcePolicy {
		return "the " + p.src.String() + " selection", false
	}
	if _, ok := route.rules.match(r); ok {
		return "its rules", false
	}
	return "its policy", draws(r, route.pool)
}

// draws reports whether a policy takes another node for a request that is the
// same.
func draws(r *Request, p *selection.Pool) bool {
	switch p.Policy() {
	case selection.Random, selection.RoundRobin, selection.LeastConn:
		return r.Selection.Session.Name == ""
	}
	return false
}

func orMain(a netip.Addr) string {
	if !a.IsValid() {
		return "the address that the host's main routing chooses"
	}
	return a.String()
}

// explainTarget judges the target, and returns the families that it can be
// reached by.
func (c *choice) explainTarget(ctx context.Context, r *Request, resolve bool, say func(string, ...any)) (selection.Family, error) {
	if a := r.Target.Addr; a.IsValid() {
		say("the target is %s, %s", a, selection.FamilyOf(a))
		return selection.FamilyOf(a), c.d.filter.Check(a, r.Target.Port)
	}
	if c.d.peers {
		say("the name %s is for the proxy to resolve", r.Target.Host)
		return c.want, nil
	}
	if !resolve {
		say("the name %s is not resolved (--resolve does): its addresses are taken to be of the path's families, and not judged by the filter", r.Target.Host)
		return c.want & c.d.strategy.families(), nil
	}
	a, err := c.lookup(ctx, r, c.want)
	if err != nil {
		return 0, err
	}
	var f selection.Family
	var texts []string
	var denied error
	for _, list := range [...][]netip.Addr{a.V6, a.V4} {
		for _, addr := range list {
			if err := c.d.filter.Check(addr.Unmap(), r.Target.Port); err != nil {
				denied = err
				texts = append(texts, addr.String()+" (filtered)")
				continue
			}
			f |= selection.FamilyOf(addr)
			texts = append(texts, addr.String())
		}
	}
	say("the name %s is %s", r.Target.Host, strings.Join(texts, ", "))
	if f == 0 && denied != nil {
		return 0, denied
	}
	return f, nil
}
