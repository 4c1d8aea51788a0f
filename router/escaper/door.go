package escaper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"wayout/selection"
)

// Table is all escapers by name. It does not change: a reload, or a publication
// of nodes, makes another.
type Table struct {
	escapers map[string]Escaper
	direct   []*Direct
	ordered  []Escaper // nodes before the routes that lead to them
	paths    []*Path
	parents  map[*step][]*Route // the routes that lead to an escaper
	begun    sync.Once
}

// begin puts the table into force, once. Until then it changes nothing of what
// its paths share with those of another table.
func (t *Table) begin() {
	t.begun.Do(func() {
		for _, d := range t.direct {
			d.begun.Do(d.begin)
		}
		// What a shared escaper has published meanwhile went to the routes of
		// the table before.
		for _, e := range t.ordered {
			list := t.parents[e.base()]
			e.base().parents.Store(&list)
		}
		t.publishRoutes()
	})
}

// NewTable returns the table of these escapers, and ties the routes among them
// to the escapers that they lead to. Names have to differ and to be there, and
// no route may lead back to itself. A route is in one table; a *Direct may also
// be in that of before, whose place this one takes: it goes on as it is.
func NewTable(escapers ...Escaper) (*Table, error) {
	t := &Table{escapers: make(map[string]Escaper, len(escapers)), parents: map[*step][]*Route{}}
	n := 0
	for _, e := range escapers {
		if d, is := e.(*Direct); is {
			n += len(d.paths)
		}
	}
	t.paths = make([]*Path, 0, n)
	for _, e := range escapers {
		if _, dup := t.escapers[e.Name()]; dup {
			return nil, fmt.Errorf("escaper %s: there are two", e.Name())
		}
		t.escapers[e.Name()] = e
		d, is := e.(*Direct)
		if !is {
			continue
		}
		t.direct = append(t.direct, d)
		t.paths = append(t.paths, d.paths...)
	}
	seen := map[string]bool{} // false: on the way to it
	for _, e := range escapers {
		if err := t.tie(e, seen); err != nil {
			return nil, err
		}
	}
	for _, e := range t.ordered {
		// One that is in a table already goes on by the routes of that, until
		// this one is in force.
		if list := t.parents[e.base()]; e.base().parents.CompareAndSwap(nil, &list) {
			e.publish()
		}
	}
	return t, nil
}

// tie resolves the names of a route's nodes, and of those behind them.
func (t *Table) tie(e Escaper, seen map[string]bool) error {
	if done, met := seen[e.Name()]; met {
		if !done {
			return fmt.Errorf("escaper %s: leads back to itself", e.Name())
		}
		return nil
	}
	seen[e.Name()] = false
	if r, is := e.(*Route); is {
		r.next = make([]Escaper, len(r.names))
		for i, name := range r.names {
			next := t.escapers[name]
			if next == nil {
				return fmt.Errorf("escaper %s: there is no escaper %s", r.name, name)
			}
			if err := t.tie(next, seen); err != nil {
				return err
			}
			r.next[i] = next
			s := next.base()
			t.parents[s] = append(t.parents[s], r)
		}
	}
	seen[e.Name()] = true
	t.ordered = append(t.ordered, e)
	return nil
}

// Escaper returns the escaper of that name, or nil.
func (t *Table) Escaper(name string) Escaper { return t.escapers[name] }

// Direct returns the escaper of that name if its nodes are paths, or nil.
func (t *Table) Direct(name string) *Direct {
	d, _ := t.escapers[name].(*Direct)
	return d
}

// Path returns the path of that name ("out/fra-2"), or nil.
func (t *Table) Path(name string) *Path {
	of, id, _ := strings.Cut(name, "/")
	if d := t.Direct(of); d != nil {
		if i, known := d.pool.Position(id); known {
			return d.paths[i]
		}
	}
	return nil
}

// Directs returns the escapers whose nodes are paths, in the configured order.
// The slice is not to be changed.
func (t *Table) Directs() []*Direct { return t.direct }

// Paths returns all paths, in the configured order. The slice is not to be
// changed.
func (t *Table) Paths() []*Path { return t.paths }

// Publish lets the policies of all escapers take note of the states of their
// nodes.
func (t *Table) Publish() { t.PublishOnly(func(*Direct) bool { return true }) }

// PublishOnly is Publish where the states of paths have changed in some
// escapers alone.
func (t *Table) PublishOnly(changed func(*Direct) bool) {
	for _, d := range t.direct {
		if changed(d) {
			d.publish()
		}
	}
	t.publishRoutes()
}

func (t *Table) publishRoutes() {
	for _, e := range t.ordered {
		if r, is := e.(*Route); is {
			r.publish()
		}
	}
}

// Door is the one way out. The zero value is closed until Swap gives it a
// table.
type Door struct{ table atomic.Pointer[Table] }

// Swap puts another table in the place of the current one, which it returns.
// Requests under way end by the table that they began with. Paths that are not
// in the new table (see Options.Prior) keep the connections in use and lose the
// idle ones. With nil the door is closed: Open then returns ErrClosed.
func (d *Door) Swap(t *Table) *Table {
	leaving := d.table.Load().without(t)
	for _, e := range leaving {
		e.retire()
	}
	if t != nil {
		t.begin()
	}
	old := d.table.Swap(t)
	if len(leaving) == 0 {
		return old
	}
	kept := map[*ledger]bool{}
	for _, e := range t.without(old) {
		for _, p := range e.paths {
			kept[p.ledger] = true
		}
	}
	for _, e := range leaving {
		for _, p := range e.paths {
			if !kept[p.ledger] {
				p.retire()
			}
		}
	}
	return old
}

// without lists the direct escapers of a table, which may be nil, that another
// one, which may be nil too, does not have.
func (t *Table) without(other *Table) []*Direct {
	if t == nil {
		return nil
	}
	var all []*Direct
	for _, d := range t.direct {
		if other == nil || other.Direct(d.name) != d {
			all = append(all, d)
		}
	}
	return all
}

// Open connects a request to its target, by the path that is selected for it
// or, when none is, that the policy picks. It never takes another path in place
// of a selected one, nor a second one in place of one that failed. It fills
// r.Choice.
//
// Errors wrap one of the sentinels here or in package selection, or
// context.Canceled when ctx was cancelled, and say path and reason.
func (d *Door) Open(ctx context.Context, r *Request) (*Conn, error) {
	t := d.table.Load()
	if t == nil {
		return nil, ErrClosed
	}
	if was := r.Retry; was != nil {
		c := choice{t: t, d: was.Path.d, p: was.Path, selected: true, want: selection.FamilyOf(was.Source.Addr())}
		if c.p.Net(c.want).IsValid() {
			c.addr = was.Source.Addr()
		}
		if c.d.peers {
			c.want = selection.V4 | selection.V6
		}
		return c.open(ctx, r)
	}
	r.Choice = Choice{}
	c, err := t.choose(r, false)
	if err != nil {
		c.settle(nil)
		return nil, err
	}
	return c.open(ctx, r)
}

// Vet says whether what a client selected contradicts itself, in that it names
// a node and an address that is not the node's: the one thing that is malformed
// and cannot be seen without the nodes. The error wraps
// selection.ErrMalformed.
func (d *Door) Vet(r *Request) error {
	t := d.table.Load()
	if t == nil {
		return ErrClosed
	}
	return t.coherent(r)
}

// choice is a selection that was found good: what the request goes out by.
type choice struct {
	t        *Table
	d        *Direct
	p        *Path // nil: whichever the policy picks
	selected bool  // somebody selected p

	// addr is the very address that was selected; the zero Addr leaves it to
	// the target which of the path's two it is.
	addr netip.Addr
	over time.Time        // when the selection itself has expired; the zero Time: it has not
	want selection.Family // the families of path, or of addr, or of all paths

	src      sources   // of the sockets, once they are drawn
	drawn    bool      // src is
	deadline time.Time // of dialling, from the first dial on

	probe  bool             // it finds out about p, whatever p's state
	tested bool             // what is on trial will not do
	trying bool             // it is the one request that may try p
	tried  selection.Family // which it may try p for

	full []int // nodes without ports for the request
	last error // of the last of them
}

// passed is an escaper on the request's way, and what was chosen of its nodes.
type passed struct {
	e     Escaper
	node  string // the next escaper's name; "" at a Direct
	path  *Path  // nil when the policy will choose it
	src   selection.Source
	asked selection.Value
}

// usualSteps is how many escapers a request passes without an allocation.
const usualSteps = 4

// choose goes through the contract's table of bad selections, row by row: a
// row is looked at for all entries of the selection, or all escapers on the
// way, before the next row is. With tested no path on trial is chosen. The
// choice has to be settled, also with an error.
func (t *Table) choose(r *Request, tested bool) (choice, error) {
	var usual [usualSteps]passed
	_, c, err := t.decide(r, usual[:0], tested)
	return c, err
}

// decide is choose that tells the request's way, which it appends to steps.
func (t *Table) decide(r *Request, steps []passed, tested bool) ([]passed, choice, error) {
	if t.escapers[r.Escaper] == nil {
		return steps, choice{}, selection.Refuse(selection.ErrUnknown, "unknown escaper %q", r.Escaper)
	}
	if err := t.coherent(r); err != nil {
		return steps, choice{}, err
	}
	if err := t.known(r); err != nil {
		return steps, choice{}, err
	}
	steps, c, broken := t.walk(r, steps, tested)
	if err := t.allPassed(r, steps, broken != nil); err != nil {
		return steps, c, err
	}
	for i := range steps {
		if p := &steps[i]; p.src.ByClient() && !p.e.base().enabled {
			r.Choice = p.choice()
			return steps, c, selection.Refuse(selection.ErrDisabled, "escaper %s does not let clients choose a path", p.e.Name())
		}
	}
	for i := range steps {
		if p := &steps[i]; p.src.ByClient() && !r.Allow.Match(p.name()) {
			r.Choice = p.choice()
			return steps, c, selection.Refuse(selection.ErrForbidden, "path %s is not among those that the user may choose", p.name())
		}
	}
	r.Choice = decisive(r, steps)
	if c.trying {
		r.Choice.Path = c.p.Name
	}
	return steps, c, broken
}

// coherent checks the one row of what is malformed that needs the nodes.
func (t *Table) coherent(r *Request) (err error) {
	if len(r.Selection.Username) == 0 {
		return nil
	}
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		if s := t.escapers[e.Escaper]; s != nil && src.ByClient() {
			if _, _, _, rerr := s.base().pool.Resolve(e.Value); errors.Is(rerr, selection.ErrMalformed) {
				r.Choice = Choice{Source: src, Asked: e.Value.String()}
				err = fmt.Errorf("escaper %s: %w", e.Escaper, rerr)
			}
		}
		return err == nil
	})
	return err
}

// known checks the table's row of unknown names.
func (t *Table) known(r *Request) (err error) {
	foreign := t.handsOn(r)
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		if s := t.escapers[e.Escaper]; s != nil {
			if _, _, _, err = nodeOf(s, e.Value, src); src == selection.SourceServer {
				err = nil // a path that is down is a later row
			}
		} else if !foreign || !src.ByClient() {
			err = selection.Refuse(selection.ErrUnknown, "unknown escaper %q", e.Escaper)
		}
		if err != nil {
			r.Choice = Choice{Source: src, Asked: e.Value.String()}
		}
		return err == nil
	})
	return err
}

// handsOn reports whether the request may come to an escaper that hands a
// client's selection on to a peer: what names nothing here may name something
// there.
func (t *Table) handsOn(r *Request) bool {
	own := t.escapers[r.Escaper]
	for _, d := range t.direct {
		if !d.pass {
			continue
		}
		if route, is := own.(*Route); own == Escaper(d) || is && route.leadsTo(d.name) {
			return true
		}
	}
	return false
}

// nodeOf finds the node of an escaper that a selection names.
func nodeOf(e Escaper, v selection.Value, src selection.Source) (node int, f selection.Family, addr netip.Addr, err error) {
	s := e.base()
	node, f, addr, err = s.pool.Resolve(v)
	if d, is := e.(*Direct); is && err == nil && d.paths[node].Unlisted && src != selection.SourceUser {
		// What an operator's map describes is there for that map alone.
		err = selection.Refuse(selection.ErrUnknown, "unknown id %s", v.String())
	}
	switch {
	case err == nil:
		return node, f, addr, nil
	case src == selection.SourceServer:
		// Names in a fixed map were checked at load. What is left is
		// `select: ingress_ip` with an address of no node: 503.
		return 0, 0, addr, selection.Refuse(selection.ErrDown, "escaper %s has no path to leave by: %v", s.name, err)
	}
	return 0, 0, addr, fmt.Errorf("escaper %s: %w", s.name, err)
}

// walk follows the request from its server's escaper to the one that owns its
// path. The error is that a route has nowhere to send it, or that the server's own
// selection names no node: then the steps end there.
func (t *Table) walk(r *Request, steps []passed, tested bool) ([]passed, choice, error) {
	var claimed *Path // what a route has sent the request to try
	for e := t.escapers[r.Escaper]; ; {
		s := e.base()
		p := passed{e: e}
		node, fam, addr := -1, selection.Family(0), netip.Addr{}
		v, src, ok := r.Selection.For(s.name)
		if ok {
			var err error
			p.src, p.asked = src, v
			if node, fam, addr, err = nodeOf(e, v, src); err != nil {
				return append(steps, p), trialOf(t, claimed), err
			}
		}
		route, is := e.(*Route)
		if !is {
			d := e.(*Direct)
			c := choice{t: t, d: d, want: d.given, tested: tested}
			switch {
			case claimed == nil:
			case !ok && claimed.d == d:
				c = trialOf(t, claimed)
				if c.want = c.p.Given(); d.peers {
					c.want = selection.V4 | selection.V6
				}
				return append(steps, p), c, nil
			default: // what is selected leads elsewhere
				claimed.d.settle(claimed, 0, nil)
			}
			if ok {
				c.p, c.selected = d.paths[node], true
				c.want, p.path = c.p.Given(), c.p
				in, inline := v.Inline()
				switch {
				case inline && !in.Expire.IsZero() && !d.now().Before(in.Expire):
					c.over = in.Expire
				case inline && in.V4.IsValid() && in.V6.IsValid():
				case fam != 0:
					c.addr, c.want = addr, fam
				}
			}
			if d.peers {
				c.want = selection.V4 | selection.V6
			}
			return append(steps, p), c, nil
		}
		if !ok {
			var err error
			if node, claimed, err = route.choose(r, claimed, tested); err != nil {
				return append(steps, p), trialOf(t, claimed), err
			}
		}
		p.node = route.names[node]
		steps = append(steps, p)
		e = route.next[node]
	}
}

// trialOf is the choice of a path that a request has the trial of; the zero
// choice for none.
func trialOf(t *Table, p *Path) choice {
	if p == nil {
		return choice{}
	}
	return choice{t: t, d: p.d, p: p, trying: true, tried: p.state.Load().trial()}
}

// allPassed checks the row of escapers that the request does not pass. The
// operator's maps hold for all servers, so they may well name escapers that
// this request has nothing to do with.
func (t *Table) allPassed(r *Request, steps []passed, broken bool) (err error) {
	last := steps[len(steps)-1].e
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		if !src.ByClient() {
			return true
		}
		for i := range steps {
			if steps[i].e.Name() == e.Escaper {
				return true
			}
		}
		if route, is := last.(*Route); broken && is && route.leadsTo(e.Escaper) {
			return true // it might have been
		}
		if d, is := last.(*Direct); is && d.pass && t.escapers[e.Escaper] == nil {
			return true // it is the peer's to judge
		}
		r.Choice = Choice{Source: src, Asked: e.Value.String()}
		err = selection.Refuse(selection.ErrNotPassed, "the request does not pass escaper %s, only %s", e.Escaper, way(steps))
		return false
	})
	return err
}

// way names the escapers that a request passes.
func way(steps []passed) string {
	text := ""
	for i := range steps {
		if i > 0 {
			text += " and "
		}
		text += steps[i].e.Name()
	}
	return text
}

// name is the node's name, as allow_path's patterns match it.
func (p *passed) name() string {
	if p.path != nil {
		return p.path.Name
	}
	return p.e.Name() + "/" + p.node
}

func (p *passed) choice() Choice {
	c := Choice{Source: p.src, Asked: p.asked.String()}
	if p.path != nil {
		c.Path = p.path.Name
	}
	return c
}

// decisive says who chose: the path itself where somebody did, else the last of
// the routes that somebody chose at, else the session, else the policy.
func decisive(r *Request, steps []passed) Choice {
	for i := len(steps) - 1; i >= 0; i-- {
		if steps[i].src != selection.SourcePolicy {
			return steps[i].choice()
		}
	}
	if name := r.Selection.Session.Name; name != "" {
		return Choice{Source: selection.SourceUsername, Asked: "session " + name}
	}
	return Choice{Source: selection.SourcePolicy}
}
