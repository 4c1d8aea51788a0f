package escaper_test

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/selection"
)

func TestStatus(t *testing.T) {
	now := time.Unix(1000, 0)
	d, err := escaper.NewDirect(escaper.Options{
		Name: "out", Now: func() time.Time { return now },
		Nodes: []escaper.NodeOptions{{ID: "dual", V4: addr("198.51.100.1"), V6: addr("2001:db8::1")}, {ID: "four", V4: addr("198.51.100.2")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := d.Paths()[0]
	type step struct {
		name    string
		do      func() bool
		changed bool
		want    escaper.Status
	}
	const up, down, none, probing, tentative = escaper.Up, escaper.Down, escaper.None, escaper.Probing, escaper.Tentative
	set := func(p *escaper.Path, f selection.Family, c escaper.Condition, why string) func() bool {
		return func() bool { return p.SetFamilyState(f, c, why) }
	}
	call := func(f func()) func() bool {
		return func() bool {
			f()
			return true
		}
	}
	at := func(n int64) time.Time { return time.Unix(1000+n, 0) }
	for i, s := range []step{
		{"made", func() bool { return true }, true, escaper.Status{State: "probing", Reason: "IPv4 has not been looked at yet; IPv6 has not been looked at yet", Since: at(0), V4: probing, V6: probing}},
		{"IPv6 down", set(p, selection.V6, down, "no route"), true, escaper.Status{State: "probing", Reason: "IPv4 has not been looked at yet; no route", Since: at(0), V4: probing, V6: down}},
		{"IPv4 up", set(p, selection.V4, up, "ignored"), true, escaper.Status{State: "up", Reason: "no route", Since: at(2), V4: up, V6: down}},
		{"again", set(p, selection.V4, up, ""), false, escaper.Status{State: "up", Reason: "no route", Since: at(2), V4: up, V6: down}},
		{"IPv6 tentative", set(p, selection.V6, tentative, ""), true, escaper.Status{State: "up", Reason: "IPv6 is tentative", Since: at(2), V4: up, V6: tentative}},
		{"IPv4 down", set(p, selection.V4, down, "eth0 is down"), true, escaper.Status{State: "probing", Reason: "eth0 is down; IPv6 is tentative", Since: at(5), V4: down, V6: tentative}},
		{"IPv6 down too", set(p, selection.V6, down, "eth0 is down"), true, escaper.Status{State: "down", Reason: "eth0 is down", Since: at(6), V4: down, V6: down}},
		{"drain", call(p.Drain), true, escaper.Status{State: "draining", Reason: "eth0 is down", Since: at(7), V4: down, V6: down}},
		{"up while draining", set(p, selection.V6, up, ""), true, escaper.Status{State: "draining", Reason: "eth0 is down", Since: at(7), V4: down, V6: up}},
		{"undrain", call(p.Undrain), true, escaper.Status{State: "up", Reason: "eth0 is down", Since: at(9), V4: down, V6: up}},
		{"both up", set(p, selection.V4, up, ""), true, escaper.Status{State: "up", Since: at(9), V4: up, V6: up}},
		{"both families at once is not a family", set(p, selection.V4|selection.V6, down, "x"), false, escaper.Status{State: "up", Since: at(9), V4: up, V6: up}},
	} {
		now = at(int64(i))
		if changed := s.do(); changed != s.changed {
			t.Errorf("%s: changed %v", s.name, changed)
		}
		if got := p.Status(); got != s.want {
			t.Errorf("%s: %+v, want %+v", s.name, got, s.want)
		}
	}
	four := d.Paths()[1]
	if four.SetFamilyState(selection.V6, up, "") || four.Status().V6 != none || four.Given() != selection.V4 {
		t.Errorf("a family that was never given: %+v", four.Status())
	}
	for c, want := range map[escaper.Condition]string{none: "none", probing: "probing", tentative: "tentative", up: "up", down: "down", 99: "unknown"} {
		if c.String() != want {
			t.Errorf("condition %d is %s", c, c)
		}
	}
	words := ""
	for r := range escaper.Results + 1 {
		words += r.String() + " "
	}
	if words != "ok refused timeout unreachable reset local unknown " {
		t.Errorf("results %s", words)
	}
}

func TestNewDirectRefuses(t *testing.T) {
	four := addr("198.51.100.1")
	for name, nodes := range map[string][]escaper.NodeOptions{
		"no address":               {{ID: "a"}},
		"unbound, no device":       {{ID: "a", Unbound: selection.V4, Interface: "eth0"}},
		"device, no interface":     {{ID: "a", V4: four, BindToDevice: true}},
		"unspecified":              {{ID: "a", V4: addr("0.0.0.0")}},
		"unspecified IPv6":         {{ID: "a", V6: addr("::")}},
		"multicast":                {{ID: "a", V4: addr("224.0.0.1")}},
		"IPv6 in the place of V4":  {{ID: "a", V4: addr("2001:db8::1")}},
		"a mapped address":         {{ID: "a", V6: addr("::ffff:198.51.100.1")}},
		"two of one ID":            {{ID: "a", V4: four}, {ID: "a", V4: addr("198.51.100.2")}},
		"one address on two nodes": {{ID: "a", V4: four}, {ID: "b", V4: four}},
	} {
		if _, err := escaper.NewDirect(escaper.Options{Name: "out", Nodes: nodes}); err == nil || !strings.Contains(err.Error(), "escaper out: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	a := direct(t, escaper.Options{Nodes: []escaper.NodeOptions{{ID: "a", V4: four}}})
	if _, err := escaper.NewTable(a, a); err == nil {
		t.Error("two escapers of one name are accepted")
	}
}

// TestKill: when an address goes, its connections end at once and with the
// reason, those of the path's other address live on, and no new one begins.
func TestKill(t *testing.T) {
	four := listen(t, "127.0.0.1:0")
	six := listen(t, "[::1]:0").hold(t)
	d := door(t, direct(t, escaper.Options{
		EnableSelection: true, Idle: escaper.NewIdle(4, 16, time.Minute),
		Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}},
	}))
	p := d.Table().Path("out/a")
	reason := errors.New("address 127.0.0.2 is not on this host")
	accept := func() io.ReadCloser {
		t.Helper()
		c, err := four.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}

	mine := open(t, d, forward(literal(four.addr), "a", "1"))
	farMine := accept()
	relayed := open(t, d, forward(literal(four.addr), "a", "2"))
	accept()
	var told error
	relayed.OnKill(func(err error) { told = err })
	idle := open(t, d, forward(literal(four.addr), "a", "3"))
	farIdle := accept()
	idle.Park()
	closed := open(t, d, forward(literal(four.addr), "a", "4"))
	accept()
	_ = closed.Close()
	other := open(t, d, forward(literal(four.addr), "b", "1"))
	accept()
	v6 := open(t, d, forward(literal(six.addr), "a", "1"))

	got := make(chan error)
	go func() { // a goroutine in the middle of a read is woken
		_, err := mine.TCP.Read(make([]byte, 1))
		got <- err
	}()
	p.SetFamilyState(selection.V4, escaper.Down, reason.Error())
	if n := p.Kill(one("127.0.0.2"), reason); n != 2 { // the state change has closed the idle one
		t.Errorf("killed %d connections, want 2", n)
	}
	select {
	case err := <-got:
		if err == nil {
			t.Error("read succeeded")
		}
	case <-time.After(time.Second):
		t.Error("a second later the connection still lives")
	}
	if !errors.Is(mine.Killed(), reason) || !errors.Is(told, reason) || !errors.Is(relayed.Killed(), reason) {
		t.Errorf("reasons: %v, %v, %v", mine.Killed(), told, relayed.Killed())
	}
	if closed.Killed() != nil || other.Killed() != nil || v6.Killed() != nil {
		t.Error("the wrong ones were killed")
	}
	for name, c := range map[string]io.Reader{"reset": farMine, "closed": farIdle} {
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%s: the far side reads %d, %v", name, n, err)
		}
	}
	late := errors.New("not called")
	mine.OnKill(func(err error) { late = err })
	if !errors.Is(late, reason) {
		t.Errorf("OnKill after the kill: %v", late)
	}
	if p.Kill(one("127.0.0.2"), reason) != 0 {
		t.Error("killed twice")
	}
	if c := p.Counters(); c.Open != 2 { // relayed, until its relay lets go, and v6
		t.Errorf("counters %+v", c)
	}
	relayed.Release(nil)
	_ = mine.Close()
	if c := p.Counters(); c.Open != 1 || c.Closed != 4 {
		t.Errorf("counters %+v", c)
	}
	if _, err := v6.TCP.Write([]byte("x")); err != nil {
		t.Errorf("IPv6: %v", err)
	}
	if _, err := d.Open(context.Background(), forward(literal(four.addr), "a", "1")); !errors.Is(err, selection.ErrDown) {
		t.Errorf("a new one: %v", err)
	}
	if n := p.Kill(netip.Prefix{}, reason); n != 1 {
		t.Errorf("killed %d, want the last one", n)
	}
	_ = other.Close()
}

// TestKillWhileDialling: an address that goes while a connection from it is
// being made leaves none behind.
func TestKillWhileDialling(t *testing.T) {
	slow, answer := fullListener(t, "127.0.0.1:0")
	d := door(t, direct(t, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	p := d.Table().Path("out/a")
	got := make(chan error)
	go func() {
		_, err := d.Open(context.Background(), request(literal(slow), byClient(pathID("a"))))
		got <- err
	}()
	time.Sleep(50 * time.Millisecond) // nothing tells that a request was sent; too early would find the path down as well
	p.SetFamilyState(selection.V4, escaper.Down, "gone")
	if n := p.Kill(one("127.0.0.2"), errors.New("gone")); n != 0 {
		t.Errorf("killed %d", n)
	}
	answer()
	if err := <-got; !errors.Is(err, selection.ErrDown) {
		t.Errorf("got %v", err)
	}
	if c := p.Counters(); c.Open != 0 || c.Attempts[escaper.ResultOK] != 1 {
		t.Errorf("counters %+v", c)
	}
}

// TestKillConcurrent is the same by chance, many times over.
func TestKillConcurrent(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	p := d.Table().Path("out/a")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			p.SetFamilyState(selection.V4, escaper.Down, "gone")
			p.Kill(one("127.0.0.2"), errors.New("gone"))
			p.SetFamilyState(selection.V4, escaper.Up, "")
			d.Table().Publish()
		}
	})
	for range 300 {
		c, err := d.Open(context.Background(), request(literal(o.addr), byClient(pathID("a"))))
		if err == nil {
			_ = c.Close()
		} else if !errors.Is(err, selection.ErrDown) {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	if c := p.Counters(); c.Open != 0 {
		t.Errorf("counters %+v", c)
	}
}

func TestDrain(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{
		{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1},
	}}))
	p := d.Table().Path("out/a")
	c := open(t, d, request(literal(o.addr), byClient(pathID("a"))))
	p.Drain()
	if _, err := d.Open(context.Background(), request(literal(o.addr), byClient(pathID("a")))); !errors.Is(err, selection.ErrDown) {
		t.Errorf("selected while draining: %v", err)
	}
	for range 20 {
		c := open(t, d, request(literal(o.addr), selection.Selection{}))
		if c.Path.ID != "b" {
			t.Error("the policy picked a draining path")
		}
		_ = c.Close()
	}
	if _, err := c.TCP.Write([]byte("x")); err != nil || p.Counters().Open != 1 {
		t.Errorf("the open one: %v, %+v", err, p.Counters())
	}
	p.Undrain()
	_ = open(t, d, request(literal(o.addr), byClient(pathID("a")))).Close()
	_ = c.Close()
}

// TestLeastConn: connections count for the policy from pick to close.
func TestLeastConn(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	refusing := listen(t, "127.0.0.1:0")
	_ = refusing.Close()
	d := door(t, direct(t, escaper.Options{Policy: selection.LeastConn, Nodes: []escaper.NodeOptions{
		{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 2},
	}}))
	for range 9 { // failures count for nothing
		if _, err := d.Open(context.Background(), request(literal(refusing.addr), selection.Selection{})); !errors.Is(err, escaper.ErrRefused) {
			t.Fatal(err)
		}
	}
	var held []*escaper.Conn
	n := map[string]int{}
	for range 30 {
		c := open(t, d, request(literal(o.addr), selection.Selection{}))
		held = append(held, c)
		n[c.Path.ID]++
	}
	if n["a"] != 10 || n["b"] != 20 {
		t.Errorf("took %v, want 10 and 20", n)
	}
	for _, c := range held {
		if c.Path.ID == "a" {
			_ = c.Close()
		}
	}
	for range 10 {
		c := open(t, d, request(literal(o.addr), selection.Selection{}))
		defer c.Close()
		if c.Path.ID != "a" {
			t.Error("took the fuller path")
		}
	}
	for _, c := range held {
		_ = c.Close()
	}
}

// TestReload: what has stayed as it was keeps its state, counters and
// connections; what has gone loses its idle ones.
func TestReload(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	idle := escaper.NewIdle(4, 16, time.Minute)
	nodes := []escaper.NodeOptions{
		{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}, {ID: "c", V4: addr("127.0.0.4"), Weight: 1},
	}
	o1 := escaper.Options{EnableSelection: true, Idle: idle, Nodes: nodes}
	old := direct(t, o1)
	d := door(t, old)
	inUse := open(t, d, forward(literal(o.addr), "a", "x"))
	for _, id := range []string{"a", "b", "c"} {
		open(t, d, forward(literal(o.addr), id, "")).Park()
	}
	gone := open(t, d, forward(literal(o.addr), "c", "x"))
	d.Table().Path("out/b").Drain() // closes b's idle one

	f := filter(t, nil)
	next, err := escaper.NewDirect(escaper.Options{
		Name: "out", EnableSelection: true, Idle: idle, Filter: f, Prior: old,
		Nodes: []escaper.NodeOptions{
			{ID: "new", V4: addr("127.0.0.5"), Weight: 1},
			{ID: "b", V4: addr("127.0.0.3"), Weight: 7},
			{ID: "a", V4: addr("127.0.0.2"), Weight: 1},
			{ID: "c", V4: addr("127.0.0.6"), Weight: 1},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	table, err := escaper.NewTable(next)
	if err != nil {
		t.Fatal(err)
	}
	d.Swap(table)
	if idle.Len() != 1 {
		t.Errorf("%d idle, want that of a", idle.Len())
	}
	for name, want := range map[string]string{"out/a": "up", "out/b": "draining", "out/c": "probing", "out/new": "probing"} {
		if s := table.Path(name).Status(); s.State != want {
			t.Errorf("%s is %s, want %s", name, s.State, want)
		}
	}
	if c := table.Path("out/a").Counters(); c.Open != 2 || c.Attempts[escaper.ResultOK] != 2 {
		t.Errorf("a: %+v", c)
	}
	if c := table.Path("out/c").Counters(); c != (escaper.Counters{}) {
		t.Errorf("another address, the same counters: %+v", c)
	}
	c := open(t, d, forward(literal(o.addr), "a", ""))
	if !c.Reused || c.Path != table.Path("out/a") {
		t.Errorf("reused %v, by a path of the old table: %v", c.Reused, c.Path != table.Path("out/a"))
	}
	gone.Park() // its path is no more
	if gone.Path.Counters().Open != 0 {
		t.Errorf("kept idle on a path that has gone: %+v", gone.Path.Counters())
	}
	if n := table.Path("out/a").Kill(one("127.0.0.2"), errors.New("gone")); n != 2 || inUse.Killed() == nil {
		t.Errorf("killed %d, want those of before and after the reload", n)
	}
}
