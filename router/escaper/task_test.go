package escaper_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// onTask runs f as a task of a relay engine.
func onTask(t *testing.T, f func(k *relay.Task)) {
	t.Helper()
	e, err := relay.New(relay.Options{Workers: 1, Tick: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	l, err := relay.NewListener(listen(t, "127.0.0.1:0").TCPListener)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	a, err := e.Accept(l, func(k *relay.Task, c relay.Accepted) {
		defer close(done)
		defer func() { _ = unix.Close(c.FD) }()
		f(k)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = a.Close() }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("the task does not end")
	}
}

// openOn opens a request on a task.
func openOn(t *testing.T, d *escaper.Door, to netip.AddrPort, s selection.Selection, check func(k *relay.Task, c *escaper.Conn, err error)) {
	t.Helper()
	onTask(t, func(k *relay.Task) {
		r := request(literal(to), s)
		r.Task = k
		c, err := d.Open(context.Background(), r)
		check(k, c, err)
	})
}

// TestTaskPinned: a bare descriptor leaves from the selected address, and is on
// the books until it is released or closed.
func TestTaskPinned(t *testing.T) {
	for id, at := range map[string]string{"b": "127.0.0.1:0", "a": "[::1]:0"} {
		o := listen(t, at).hold(t)
		d := door(t, direct(t, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{
			{ID: "a", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1},
		}}))
		p := d.Table().Path("out/" + id)
		openOn(t, d, o.addr, byClient(pathID(id)), func(_ *relay.Task, c *escaper.Conn, err error) {
			if err != nil {
				t.Error(err)
				return
			}
			if c.TCP != nil || c.FD < 0 {
				t.Errorf("no bare descriptor: %v, %d", c.TCP, c.FD)
			}
			saw := o.next(t)
			want := p.V4
			if saw.Addr().Is6() {
				want = p.V6
			}
			if saw != c.Source || saw.Addr() != want || c.Remote != o.addr {
				t.Errorf("the origin saw %s, the connection says %s to %s", saw, c.Source, c.Remote)
			}
			if n := p.Counters(); n.Open != 1 || n.Attempts[escaper.ResultOK] != 1 {
				t.Errorf("counters %+v", n)
			}
			for _, opt := range [][2]int{{unix.IPPROTO_TCP, unix.TCP_NODELAY}, {unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}} {
				if v, err := unix.GetsockoptInt(c.FD, opt[0], opt[1]); err != nil || v == 0 {
					t.Errorf("option %v is %d, %v", opt, v, err)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if n := p.Counters(); n.Open != 0 {
				t.Errorf("counters %+v", n)
			}
		})
	}
}

func TestTaskErrors(t *testing.T) {
	closed := listen(t, "127.0.0.1:0")
	refusing := closed.addr
	_ = closed.Close()
	deaf := blackhole(t, "127.0.0.1:0")
	d := door(t, direct(t, escaper.Options{
		EnableSelection: true, ConnectTimeout: 200 * time.Millisecond,
		Nodes: []escaper.NodeOptions{
			{ID: "a", V4: addr("127.0.0.2"), Weight: 1},
			{ID: "gone", V4: addr("192.0.2.77"), Weight: 1},
			{ID: "dev", V4: addr("127.0.0.4"), Interface: "nosuch0", BindToDevice: true, Weight: 1},
		},
	}))
	for _, x := range []struct {
		path string
		to   netip.AddrPort
		kill bool
		want error
		n    escaper.Result
	}{
		{"a", refusing, false, escaper.ErrRefused, escaper.ResultRefused},
		{"a", deaf, false, escaper.ErrTimeout, escaper.ResultTimeout},
		{"gone", refusing, false, selection.ErrBind, escaper.ResultLocal},
		{"dev", refusing, false, selection.ErrBind, escaper.ResultLocal},
		{"a", deaf, true, context.Canceled, escaper.Results},
	} {
		p := d.Table().Path("out/" + x.path)
		before := p.Counters()
		onTask(t, func(k *relay.Task) {
			if x.kill {
				time.AfterFunc(20*time.Millisecond, func() { k.Kill(errors.New("enough")) })
			}
			r := request(literal(x.to), byClient(pathID(x.path)))
			r.Task = k
			start := time.Now()
			c, err := d.Open(context.Background(), r)
			if c != nil || !errors.Is(err, x.want) {
				t.Errorf("%s to %s: %v, %v", x.path, x.to, c, err)
			}
			if took := time.Since(start); errors.Is(x.want, escaper.ErrTimeout) && (took < 200*time.Millisecond || took > 3*time.Second) {
				t.Errorf("took %v", took)
			}
		})
		if x.n < escaper.Results {
			before.Attempts[x.n]++
		}
		if after := p.Counters(); after != before {
			t.Errorf("%s to %s: counters %+v, want %+v", x.path, x.to, after, before)
		}
	}
}

// TestTaskKilled: nobody closes a bare descriptor but its holder, who learns
// of a kill by OnKill, before and after.
func TestTaskKilled(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	p := d.Table().Path("out/a")
	gone := errors.New("address gone")
	openOn(t, d, o.addr, selection.Selection{}, func(_ *relay.Task, c *escaper.Conn, err error) {
		if err != nil {
			t.Error(err)
			return
		}
		if n := p.Kill(one("127.0.0.2"), gone); n != 1 {
			t.Errorf("killed %d", n)
		}
		if _, err := unix.GetsockoptInt(c.FD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
			t.Errorf("the descriptor is closed: %v", err)
		}
		var told error
		c.OnKill(func(err error) { told = err })
		if !errors.Is(told, gone) || !errors.Is(c.Killed(), gone) {
			t.Errorf("told %v, killed %v", told, c.Killed())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if n := p.Counters(); n.Open != 0 {
			t.Errorf("counters %+v", n)
		}
	})
}
