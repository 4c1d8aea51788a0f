package escaper

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"wayout/selection"
)

// Table is all escapers by name. It does not change: a reload makes another.
type Table struct {
	escapers map[string]*Direct
	paths    []*Path
	byName   map[string]*Path
}

// NewTable returns the table of these escapers. Their names have to differ.
func NewTable(escapers ...*Direct) (*Table, error) {
	t := &Table{escapers: make(map[string]*Direct, len(escapers)), byName: map[string]*Path{}}
	for _, d := range escapers {
		if _, dup := t.escapers[d.name]; dup {
			return nil, fmt.Errorf("escaper %s: there are two", d.name)
		}
		t.escapers[d.name] = d
		for _, p := range d.paths {
			t.paths = append(t.paths, p)
			t.byName[p.Name] = p
		}
	}
	return t, nil
}

// Escaper returns the escaper of that name, or nil.
func (t *Table) Escaper(name string) *Direct { return t.escapers[name] }

// Path returns the path of that name ("out/fra-2"), or nil.
func (t *Table) Path(name string) *Path { return t.byName[name] }

// Paths returns all paths, in the configured order. The slice is not to be
// changed.
func (t *Table) Paths() []*Path { return t.paths }

// Publish is Direct.Publish for every escaper.
func (t *Table) Publish() {
	for _, d := range t.escapers {
		d.Publish()
	}
}

// Door is the one way out. The zero value is closed until Swap gives it a
// table.
type Door struct{ table atomic.Pointer[Table] }

// NewDoor returns a door with its first table.
func NewDoor(t *Table) *Door {
	d := &Door{}
	d.table.Store(t)
	return d
}

// Table returns the current table, nil when the door is closed.
func (d *Door) Table() *Table { return d.table.Load() }

// Swap puts another table in the place of the current one, which it returns.
// Requests under way end by the table that they began with. Paths that are not
// in the new table (see Options.Prior) keep the connections in use and lose the
// idle ones. With nil the door is closed: Open then returns ErrClosed.
func (d *Door) Swap(t *Table) *Table {
	old := d.table.Swap(t)
	if old == nil {
		return nil
	}
	kept := map[*ledger]bool{}
	if t != nil {
		for _, p := range t.paths {
			kept[p.ledger] = true
		}
	}
	for _, p := range old.paths {
		if !kept[p.ledger] {
			p.retire()
		}
	}
	return old
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
		c := choice{d: was.Path.d, p: was.Path, want: selection.FamilyOf(was.Source.Addr())}
		return c.open(ctx, r)
	}
	r.Choice = Choice{}
	c, err := t.choose(r)
	if err != nil {
		return nil, err
	}
	return c.open(ctx, r)
}

// choice is a selection that was found good: what the request goes out by.
type choice struct {
	d *Direct
	p *Path // nil: whichever the policy picks

	// addr is the very address that was selected; the zero Addr leaves it to
	// the target which of the path's two it is.
	addr netip.Addr
	want selection.Family // the families of path, or of addr, or of all paths

	deadline time.Time // of dialling, from the first dial on
}

// choose goes through the contract's table of bad selections, row by row: a
// row is looked at for all entries of the selection before the next row is.
func (t *Table) choose(r *Request) (choice, error) {
	own := t.escapers[r.Escaper]
	if own == nil {
		return choice{}, selection.Refuse(selection.ErrUnknown, "unknown escaper %q", r.Escaper)
	}
	c := choice{d: own, want: own.given}
	var err error
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		if err = t.known(e, src); err != nil {
			r.Choice = Choice{Source: src, Asked: e.Value.String()}
		}
		return err == nil
	})
	if err != nil {
		return c, err
	}
	r.Selection.Entries(func(e selection.Entry, src selection.Source) bool {
		// The operator's maps hold for all servers, so they may well name
		// escapers that this request has nothing to do with.
		if e.Escaper != r.Escaper && src.ByClient() {
			r.Choice = Choice{Source: src, Asked: e.Value.String()}
			err = selection.Refuse(selection.ErrNotPassed, "the request does not pass escaper %s, only %s", e.Escaper, r.Escaper)
		}
		return err == nil
	})
	if err != nil {
		return c, err
	}
	v, src, ok := r.Selection.For(r.Escaper)
	if !ok {
		r.Choice.Source = selection.SourcePolicy
		return c, nil
	}
	node, fam, addr, err := own.pool.Resolve(v)
	if err != nil {
		return c, fmt.Errorf("escaper %s: %w", own.name, err)
	}
	p := own.paths[node]
	r.Choice = Choice{Path: p.Name, Source: src, Asked: v.String()}
	if src.ByClient() {
		if !own.enabled {
			return c, selection.Refuse(selection.ErrDisabled, "escaper %s does not let clients choose a path", own.name)
		}
		if !r.Allow.Match(p.Name) {
			return c, selection.Refuse(selection.ErrForbidden, "path %s is not among those that the user may choose", p.Name)
		}
	}
	c.p, c.want = p, p.Given()
	if fam != 0 {
		c.addr, c.want = addr, fam
	}
	return c, nil
}

// known checks the table's row of unknown names.
func (t *Table) known(e selection.Entry, src selection.Source) error {
	d := t.escapers[e.Escaper]
	if d == nil {
		return selection.Refuse(selection.ErrUnknown, "unknown escaper %q", e.Escaper)
	}
	_, _, _, err := d.pool.Resolve(e.Value)
	switch {
	case err == nil:
		return nil
	case src == selection.SourceServer:
		// Names in a fixed map were checked at load. What is left is
		// `select: ingress_ip` with an address of no node: 503.
		return selection.Refuse(selection.ErrDown, "escaper %s has no path to leave by: %v", d.name, err)
	}
	return fmt.Errorf("escaper %s: %w", d.name, err)
}
