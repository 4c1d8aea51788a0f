package escaper_test

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/selection"
)

// TestTableShares: an escaper that the next table has as well goes on, with its
// connections, its clock and what it says to the routes that lead to it, which
// are the next table's from its being in force on.
func TestTableShares(t *testing.T) {
	t.Parallel()
	to := literal(listen(t, "127.0.0.1:0").hold(t).addr)
	expire := time.Now().Add(2 * time.Second)
	idle := escaper.NewIdle(8, 8, time.Minute)
	shared := direct(t, escaper.Options{Name: "shared", EnableSelection: true, Idle: idle, Nodes: []escaper.NodeOptions{
		{ID: "a", V4: addr("127.0.3.1"), Weight: 1},
	}})
	timed := direct(t, escaper.Options{Name: "timed", EnableSelection: true, Idle: idle, Nodes: []escaper.NodeOptions{
		{ID: "b", V4: addr("127.0.3.2"), Weight: 1, Expire: expire},
	}})
	other := func(prior *escaper.Direct, ids ...string) *escaper.Direct {
		o := escaper.Options{Name: "other", EnableSelection: true, Idle: idle, Prior: prior, Policy: selection.Serial}
		for i, id := range ids {
			o.Nodes = append(o.Nodes, escaper.NodeOptions{ID: id, V4: addr("127.0.4." + string(rune('1'+i))), Weight: 1})
		}
		return direct(t, o)
	}
	table := func(o *escaper.Direct) *escaper.Table {
		r, err := escaper.NewRoute(escaper.RouteOptions{Name: "out", Policy: selection.Serial, EnableSelection: true, Next: []escaper.Next{
			{Escaper: "shared", Weight: 1}, {Escaper: "other", Weight: 1}, {Escaper: "timed", Weight: 1},
		}})
		if err != nil {
			t.Fatal(err)
		}
		tab, err := escaper.NewTable(shared, timed, o, r)
		if err != nil {
			t.Fatal(err)
		}
		return tab
	}
	first := other(nil, "x", "y")
	d := door(t)
	d.Swap(table(first))
	goes := func(when, want string) {
		t.Helper()
		r := request(to, selection.Selection{})
		c, err := d.Open(t.Context(), r)
		if err != nil || r.Choice.Path != want {
			t.Errorf("%s: by %q, %v, want %s", when, r.Choice.Path, err, want)
		}
		if err == nil {
			_ = c.Close()
		}
	}
	open := func(path ...selection.Entry) *escaper.Conn {
		t.Helper()
		r := request(to, byClient(path...))
		r.Reuse = true
		c, err := d.Open(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	sel := func(e, id string) selection.Entry { return selection.Entry{Escaper: e, Value: selection.ID(id)} }
	open(sel("out", "timed"), sel("timed", "b")).Park()
	open(sel("out", "other"), sel("other", "x")).Park()
	open(sel("out", "other"), sel("other", "y")).Park()
	if n := idle.Len(); n != 3 {
		t.Fatalf("%d connections are idle", n)
	}

	tab := table(other(first, "x"))
	table(other(first, "z")) // never in force
	path := shared.Paths()[0]
	set := func(c escaper.Condition) {
		path.SetFamilyState(selection.V4, c, "for the test")
		shared.Publish()
	}
	set(escaper.Down)
	goes("while the next table is not in force", "other/x")
	set(escaper.Up)
	goes("while the next table is not in force", "shared/a")
	set(escaper.Down) // said to the first table's route alone
	d.Swap(tab)
	goes("what it had become before", "other/x")
	set(escaper.Up)
	goes("what it becomes then", "shared/a")
	if p := tab.Path("shared/a"); p != path || tab.Path("other/y") != nil || tab.Path("other/x") == nil || tab.Path("nobody/a") != nil || tab.Path("shared") != nil {
		t.Errorf("paths by name: %v", p)
	}
	if n := idle.Len(); n != 2 {
		t.Errorf("%d connections are idle, want those of timed/b and other/x", n)
	}
	for _, e := range [][]selection.Entry{{sel("out", "timed"), sel("timed", "b")}, {sel("out", "other"), sel("other", "x")}} {
		if c := open(e...); !c.Reused {
			t.Errorf("%v: the idle connection was not used", e)
		}
	}
	for tab.Path("timed/b").Status().State != escaper.StateExpired {
		if time.Now().After(expire.Add(30 * time.Second)) {
			t.Fatal("the time of a node of a shared escaper does not end")
		}
		runtime.Gosched()
	}
	if time.Now().Before(expire) {
		t.Error("expired too early")
	}
	if _, err := d.Open(t.Context(), request(to, byClient(sel("out", "timed"), sel("timed", "b")))); !errors.Is(err, selection.ErrDown) {
		t.Errorf("expired: %v", err)
	}
}
