package escaper_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/selection"
)

// pooled is an escaper of two paths that keeps connections idle.
func pooled(tb testing.TB, idle *escaper.Idle, n *names) *escaper.Door {
	tb.Helper()
	return door(tb, direct(tb, escaper.Options{
		EnableSelection: true, Idle: idle, Resolver: n,
		Nodes: []escaper.NodeOptions{
			{ID: "a", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1},
			{ID: "b", V4: addr("127.0.0.3")},
		},
	}))
}

func forward(t escaper.Target, id, user string) *escaper.Request {
	r := request(t, byClient(pathID(id)))
	r.User, r.Reuse = user, true
	return r
}

func open(tb testing.TB, d *escaper.Door, r *escaper.Request) *escaper.Conn {
	tb.Helper()
	c, err := d.Open(context.Background(), r)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// TestIdleIdentity parks a connection and then asks for ones that differ from
// it in one thing each: only the very same request gets it back.
func TestIdleIdentity(t *testing.T) {
	four := listen(t, "127.0.0.1:0").hold(t)
	six := listen(t, "[::1]:0").hold(t)
	other := listen(t, "127.0.0.1:0").hold(t)
	n := &names{hosts: map[string]resolve.Answer{
		"www.example": {V4: addrs("127.0.0.1")}, "www2.example": {V4: addrs("127.0.0.1")}, "both.example": {V4: addrs("127.0.0.1"), V6: addrs("::1")},
	}}
	name := escaper.Target{Host: "www.example", Port: four.addr.Port()}
	mk := func(t escaper.Target, id, user string) func() *escaper.Request {
		return func() *escaper.Request { return forward(t, id, user) }
	}
	tests := []struct {
		name         string
		first, again func() *escaper.Request
		same         bool
	}{
		{"the same literal", mk(literal(four.addr), "a", "u"), mk(literal(four.addr), "a", "u"), true},
		{"the same name", mk(name, "a", "u"), mk(name, "a", "u"), true},
		{"the same name in capitals", mk(name, "a", "u"), mk(escaper.Target{Host: "WWW.Example", Port: name.Port}, "a", "u"), true},
		{"the same path, selected by its address", mk(name, "a", "u"), mk(name, "127.0.0.2", "u"), true},
		{"IPv6", mk(literal(six.addr), "a", "u"), mk(literal(six.addr), "a", "u"), true},
		{"another path", mk(name, "a", "u"), mk(name, "b", "u"), false},
		{"another user", mk(name, "a", "u"), mk(name, "a", "v"), false},
		{"no user", mk(name, "a", "u"), mk(name, "a", ""), false},
		{"another name of the same address", mk(name, "a", "u"), mk(escaper.Target{Host: "www2.example", Port: name.Port}, "a", "u"), false},
		{"name and literal", mk(name, "a", "u"), mk(literal(four.addr), "a", "u"), false},
		{"another port", mk(literal(four.addr), "a", "u"), mk(literal(other.addr), "a", "u"), false},
		{"a tunnel", mk(name, "a", "u"), func() *escaper.Request {
			r := forward(name, "a", "u")
			r.Reuse = false
			return r
		}, false},
		{"parked by a tunnel", func() *escaper.Request {
			r := forward(name, "a", "u")
			r.Reuse = false
			return r
		}, mk(name, "a", "u"), false},
		{"another source address of the path", mk(escaper.Target{Host: "both.example", Port: six.addr.Port()}, "::1", "u"), mk(escaper.Target{Host: "both.example", Port: four.addr.Port()}, "127.0.0.2", "u"), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := pooled(t, escaper.NewIdle(4, 16, time.Minute), n)
			first := open(t, d, tt.first())
			if first.Reused {
				t.Error("the first connection is reused")
			}
			first.Park()
			r := tt.again()
			c := open(t, d, r)
			defer c.Close()
			if c.Reused != tt.same || c.Reused != (c.Source == first.Source) {
				t.Errorf("reused %v, want %v; sources %s and %s", c.Reused, tt.same, first.Source, c.Source)
			}
			if r.Choice.Path != c.Path.Name || c.Path.V4 != c.Source.Addr() && c.Path.V6 != c.Source.Addr() {
				t.Errorf("choice %+v, path %s, source %s", r.Choice, c.Path.Name, c.Source)
			}
		})
	}
}

func TestIdleSavesResolving(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	n := &names{hosts: map[string]resolve.Answer{"www.example": {V4: addrs("127.0.0.1")}}}
	d := pooled(t, escaper.NewIdle(4, 16, time.Minute), n)
	to := escaper.Target{Host: "www.example", Port: o.addr.Port()}
	for range 3 {
		open(t, d, forward(to, "a", "")).Park()
	}
	if asked := n.questions(); len(asked) != 1 {
		t.Errorf("asked %v", asked)
	}
}

// TestIdleLate: what a holder does after Park does not touch the next holder.
func TestIdleLate(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	idle := escaper.NewIdle(4, 16, time.Minute)
	d := pooled(t, idle, nil)
	first := open(t, d, forward(literal(o.addr), "a", ""))
	first.OnKill(func(error) { t.Error("the first holder is told of a kill") })
	first.Park()
	second := open(t, d, forward(literal(o.addr), "a", ""))
	if !second.Reused {
		t.Fatal("not reused")
	}
	_ = first.Close()
	first.Release(nil)
	first.Park()
	if idle.Len() != 0 {
		t.Error("parked again")
	}
	if _, err := second.TCP.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	p := second.Path
	if c := p.Counters(); c.Open != 1 || c.Closed != 0 {
		t.Errorf("counters %+v", c)
	}
	if n := p.Kill(one("127.0.0.2"), errors.New("gone")); n != 1 {
		t.Errorf("killed %d", n)
	}
}

func TestIdleLimits(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	fill := func(d *escaper.Door, id string, users ...string) {
		var cs []*escaper.Conn
		for _, u := range users {
			cs = append(cs, open(t, d, forward(literal(o.addr), id, u)))
		}
		for _, c := range cs {
			c.Park()
		}
	}
	t.Run("per key", func(t *testing.T) {
		idle := escaper.NewIdle(2, 16, time.Minute)
		d := pooled(t, idle, nil)
		fill(d, "a", "u", "u", "u", "u", "v")
		if c := d.Table().Path("out/a").Counters(); idle.Len() != 3 || c.Open != 3 || c.Closed != 2 {
			t.Errorf("%d idle, counters %+v", idle.Len(), c)
		}
	})
	t.Run("total", func(t *testing.T) {
		idle := escaper.NewIdle(4, 3, time.Minute)
		d := pooled(t, idle, nil)
		fill(d, "a", "u", "v", "w", "x", "y")
		if c := d.Table().Path("out/a").Counters(); idle.Len() != 3 || c.Open != 3 {
			t.Errorf("%d idle, counters %+v", idle.Len(), c)
		}
		fill(d, "b", "u") // has none of its own to give up
		if c := d.Table().Path("out/b").Counters(); idle.Len() != 3 || c.Open != 0 {
			t.Errorf("%d idle, counters %+v", idle.Len(), c)
		}
		// The newest have stayed.
		for u, want := range map[string]bool{"u": false, "v": false, "w": true, "x": true, "y": true} {
			c := open(t, d, forward(literal(o.addr), "a", u))
			if c.Reused != want {
				t.Errorf("user %s: reused %v, want %v", u, c.Reused, want)
			}
			_ = c.Close()
		}
		if idle.Len() != 0 {
			t.Errorf("%d idle at the end", idle.Len())
		}
	})
	t.Run("last in, first out", func(t *testing.T) {
		d := pooled(t, escaper.NewIdle(4, 16, time.Minute), nil)
		one, two := open(t, d, forward(literal(o.addr), "a", "")), open(t, d, forward(literal(o.addr), "a", ""))
		one.Park()
		two.Park()
		if c := open(t, d, forward(literal(o.addr), "a", "")); c.Source != two.Source {
			t.Errorf("took %s, parked %s last", c.Source, two.Source)
		}
	})
	t.Run("off", func(t *testing.T) {
		for _, idle := range []*escaper.Idle{nil, escaper.NewIdle(0, 16, time.Minute), escaper.NewIdle(4, 0, time.Minute)} {
			d := pooled(t, idle, nil)
			fill(d, "a", "u")
			if c := d.Table().Path("out/a").Counters(); c.Open != 0 || c.Closed != 1 {
				t.Errorf("counters %+v", c)
			}
		}
	})
}

func TestIdleTimeout(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	idle := escaper.NewIdle(4, 16, 50*time.Millisecond)
	d := pooled(t, idle, nil)
	for range 2 { // the timer has to work a second time
		for range 2 {
			open(t, d, forward(literal(o.addr), "a", "")).Park()
			c, err := o.Accept()
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("read: %v", err)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("closed after %v", took)
			}
			_ = c.Close()
		}
		if idle.Len() != 0 || d.Table().Path("out/a").Counters().Open != 0 {
			t.Errorf("%d idle, %+v", idle.Len(), d.Table().Path("out/a").Counters())
		}
	}
}

// TestIdleDead: a connection that the far side has ended, or has written to,
// is not used again.
func TestIdleDead(t *testing.T) {
	for name, f := range map[string]func(*net.TCPConn) error{
		"end":   (*net.TCPConn).CloseWrite,
		"reset": func(c *net.TCPConn) error { return errors.Join(c.SetLinger(0), c.Close()) },
		"bytes": func(c *net.TCPConn) error {
			_, err := c.Write([]byte("HTTP/1.1 408 Request Timeout\r\n\r\n"))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := listen(t, "127.0.0.1:0")
			d := pooled(t, escaper.NewIdle(4, 16, time.Minute), nil)
			first := open(t, d, forward(literal(o.addr), "a", ""))
			far, err := o.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			first.Park()
			if err := f(far); err != nil {
				t.Fatal(err)
			}
			// Loopback delivers before the far side's call returns.
			c := open(t, d, forward(literal(o.addr), "a", ""))
			defer c.Close()
			if c.Reused || c.Source == first.Source {
				t.Errorf("reused: %v", c.Reused)
			}
			if n := c.Path.Counters(); n.Open != 1 || n.Closed != 1 {
				t.Errorf("counters %+v", n)
			}
		})
	}
}

// TestIdleStateChanges: what can no longer be used is not kept.
func TestIdleStateChanges(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	six := listen(t, "[::1]:0").hold(t)
	tests := []struct {
		name string
		f    func(*escaper.Door, *escaper.Path)
		left int
		park bool // what is parked afterwards is kept
	}{
		{"drain", func(_ *escaper.Door, p *escaper.Path) { p.Drain() }, 0, false},
		{"IPv4 down", func(_ *escaper.Door, p *escaper.Path) { p.SetFamilyState(selection.V4, escaper.Down, "gone") }, 1, false},
		{"IPv6 down", func(_ *escaper.Door, p *escaper.Path) { p.SetFamilyState(selection.V6, escaper.Down, "gone") }, 1, true},
		{"kill", func(_ *escaper.Door, p *escaper.Path) { p.Kill(one("::1"), errors.New("gone")) }, 1, true},
		{"still up", func(_ *escaper.Door, p *escaper.Path) { p.SetFamilyState(selection.V4, escaper.Up, "") }, 2, true},
		{"closed", func(d *escaper.Door, _ *escaper.Path) { d.Swap(nil) }, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			idle := escaper.NewIdle(4, 16, time.Minute)
			d := pooled(t, idle, nil)
			p := d.Table().Path("out/a")
			used := open(t, d, forward(literal(o.addr), "a", "used"))
			open(t, d, forward(literal(o.addr), "a", "")).Park()
			open(t, d, forward(literal(six.addr), "a", "")).Park()
			tt.f(d, p)
			if idle.Len() != tt.left {
				t.Errorf("%d idle, want %d", idle.Len(), tt.left)
			}
			if _, err := used.TCP.Write([]byte("x")); err != nil {
				t.Errorf("the one in use: %v", err)
			}
			before := idle.Len()
			used.Park()
			if (idle.Len() > before) != tt.park {
				t.Errorf("%d idle after parking, %d before", idle.Len(), before)
			}
			if c := p.Counters(); int(c.Open) != idle.Len() {
				t.Errorf("%d idle, counters %+v", idle.Len(), c)
			}
		})
	}
}

// TestIdleFilterChanges: a destination that has become the host's own is no
// longer reached by a connection made before.
func TestIdleFilterChanges(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	host := &escaper.Host{}
	idle := escaper.NewIdle(4, 16, time.Minute)
	n := &names{hosts: map[string]resolve.Answer{"www.example": {V4: addrs("127.0.0.1")}}}
	d := door(t, direct(t, escaper.Options{Idle: idle, Filter: filter(t, host), Resolver: n, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	r := request(escaper.Target{Host: "www.example", Port: o.addr.Port()}, selection.Selection{})
	r.Reuse = true
	open(t, d, r).Park()
	host.Set(nil, []netip.AddrPort{o.addr})
	if _, err := d.Open(context.Background(), r); !errors.Is(err, escaper.ErrProhibited) {
		t.Errorf("got %v", err)
	}
	if idle.Len() != 0 {
		t.Error("still idle")
	}
}

// TestIdleConcurrent hammers two paths with every operation at once; the
// connections know whose they are, and the books balance at the end.
func TestIdleConcurrent(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	idle := escaper.NewIdle(8, 24, 5*time.Millisecond)
	d := pooled(t, idle, nil)
	stop := make(chan struct{})
	var changes, work sync.WaitGroup
	changes.Go(func() {
		a, b := d.Table().Path("out/a"), d.Table().Path("out/b")
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			switch i % 4 {
			case 0:
				a.Kill(one("127.0.0.2"), errors.New("gone"))
			case 1:
				b.Drain()
			case 2:
				b.Undrain()
			case 3:
				d.Table().Publish()
			}
		}
	})
	for w := range 8 {
		work.Go(func() {
			for i := range 150 {
				id, want := "a", addr("127.0.0.2")
				if (w+i)%2 == 1 {
					id, want = "b", addr("127.0.0.3")
				}
				user := string(rune('u' + i%3))
				c, err := d.Open(context.Background(), forward(literal(o.addr), id, user))
				if err != nil {
					if !errors.Is(err, selection.ErrDown) {
						t.Error(err)
					}
					continue
				}
				if c.Source.Addr() != want || c.Path.ID != id {
					t.Errorf("asked for %s, got %s from %s", id, c.Path.ID, c.Source)
				}
				switch i % 5 {
				case 0:
					_ = c.Close()
				case 1:
					c.OnKill(func(error) { _ = c.Close() })
					c.Park()
				default:
					c.Park()
				}
			}
		})
	}
	work.Wait()
	close(stop)
	changes.Wait()
	paths := d.Swap(nil).Paths()
	for _, p := range paths {
		if c := p.Counters(); c.Open != 0 || c.Closed != c.Attempts[escaper.ResultOK] {
			t.Errorf("path %s: %+v", p.Name, c)
		}
	}
	if idle.Len() != 0 {
		t.Errorf("%d idle at the end", idle.Len())
	}
}

func BenchmarkIdleHit(b *testing.B) {
	o := listen(b, "127.0.0.1:0").drain(b)
	d := pooled(b, escaper.NewIdle(4, 16, time.Minute), nil)
	r := forward(literal(o.addr), "a", "alice")
	open(b, d, r).Park()
	b.ReportAllocs()
	for b.Loop() {
		c, err := d.Open(context.Background(), r)
		if err != nil {
			b.Fatal(err)
		}
		if !c.Reused {
			_ = c.Close()
			b.Fatal("not reused")
		}
		c.Park()
	}
}
