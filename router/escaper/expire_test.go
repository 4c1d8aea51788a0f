package escaper_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/selection"
)

// TestExpireInForce: what a table says of its paths' times holds from when it is
// in force, and a table that never is changes nothing.
func TestExpireInForce(t *testing.T) {
	t.Parallel()
	to := literal(listen(t, "127.0.0.1:0").hold(t).addr)
	var clock atomic.Int64
	begin := time.Unix(1_800_000_000, 0)
	build := func(prior *escaper.Direct, expire time.Time) (*escaper.Direct, *escaper.Table) {
		e, err := escaper.NewDirect(escaper.Options{
			Name: "out", Filter: filter(t, nil), EnableSelection: true, Prior: prior,
			Now: func() time.Time { return begin.Add(time.Duration(clock.Load())) },
			Nodes: []escaper.NodeOptions{
				{ID: "a", V4: addr("127.0.0.2"), Expire: expire, Weight: 1},
				{ID: "b", V4: addr("127.0.0.3"), Weight: 1},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range e.Paths() {
			p.SetFamilyState(selection.V4, escaper.Up, "")
		}
		tab, err := escaper.NewTable(e)
		if err != nil {
			t.Fatal(err)
		}
		return e, tab
	}
	state := func(e *escaper.Direct) string { return e.Paths()[0].Status().State }
	first, tab := build(nil, begin.Add(time.Hour))
	d := escaper.NewDoor(tab)
	t.Cleanup(func() { d.Swap(nil) })
	open := func() error {
		c, err := d.Open(t.Context(), request(to, byClient(pathID("a"))))
		if err == nil {
			err = c.Close()
		}
		return err
	}
	if err := open(); err != nil || state(first) != "up" {
		t.Errorf("%v, %s", err, state(first))
	}
	// One that is never in force.
	build(first, begin.Add(-time.Hour))
	if err := open(); err != nil || state(first) != "up" {
		t.Errorf("after a table that is not in force: %v, %s", err, state(first))
	}
	second, tab := build(first, begin.Add(-time.Hour))
	d.Swap(tab)
	if err := open(); !errors.Is(err, selection.ErrDown) || state(second) != "expired" {
		t.Errorf("expired: %v, %s", err, state(second))
	}
	for range 20 {
		r := request(to, selection.Selection{})
		c, err := d.Open(t.Context(), r)
		if err != nil || r.Choice.Path != "out/b" {
			t.Fatalf("the policy: %s, %v", r.Choice.Path, err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	build(second, begin.Add(time.Hour))
	if err := open(); !errors.Is(err, selection.ErrDown) || state(second) != "expired" {
		t.Errorf("after a table that is not in force: %v, %s", err, state(second))
	}
	third, tab := build(second, begin.Add(time.Hour))
	d.Swap(tab)
	if err := open(); err != nil || state(third) != "up" {
		t.Errorf("with more time: %v, %s", err, state(third))
	}
	clock.Store(int64(time.Hour))
	if err := open(); !errors.Is(err, selection.ErrDown) || state(third) != "expired" {
		t.Errorf("when its time is over: %v, %s", err, state(third))
	}
}
