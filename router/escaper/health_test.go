package escaper_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/selection"
)

// clock is a clock that stands still.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Unix(1_700_000_000, 0)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// watched is paths whose health is judged, by a clock of its own.
type watched struct {
	*clock
	*escaper.Door
	health  *escaper.Health
	changed []string
}

// watch makes a door of one escaper, and what else o makes of it.
func watch(tb testing.TB, o escaper.Options, more ...escaper.Escaper) *watched {
	tb.Helper()
	w := &watched{clock: newClock()}
	w.health = escaper.NewHealth(func(list []*escaper.Path) {
		for _, p := range list {
			w.changed = append(w.changed, p.ID+" "+p.Status().State)
		}
	})
	w.health.SetNow(w.now)
	w.Door = door(tb, append([]escaper.Escaper{w.direct(tb, o)}, more...)...)
	w.health.Use(w.Table())
	return w
}

func (w *watched) direct(tb testing.TB, o escaper.Options) *escaper.Direct {
	tb.Helper()
	o.Health, o.Now, o.EnableSelection = w.health, w.now, true
	return direct(tb, o)
}

// step lets time pass and does what is due. It returns what has changed.
func (w *watched) step(d time.Duration) string {
	w.pass(d)
	w.changed = nil
	w.health.StepAt(w.now(), nil)
	w.pass(time.Second) // changes are told together
	w.health.StepAt(w.now(), nil)
	return strings.Join(w.changed, ", ")
}

func (w *watched) path(id string) *escaper.Path { return w.Table().Path("out/" + id) }

// fail has connections to different addresses time out.
func (w *watched) fail(p *escaper.Path, n int) {
	for i := range n {
		to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 80)
		p.Observe(escaper.ResultTimeout, to, fmt.Errorf("path %s: connect to %s: timed out", p.Name, to))
	}
}

func passive() *escaper.Passive {
	return &escaper.Passive{Failures: 4, Destinations: 3, Window: 30 * time.Second, Hold: 10 * time.Second}
}

func TestPassive(t *testing.T) {
	const ok, refused, timeout, unreachable, reset, local = escaper.ResultOK, escaper.ResultRefused, escaper.ResultTimeout, escaper.ResultUnreachable, escaper.ResultReset, escaper.ResultLocal
	type end struct {
		r    escaper.Result
		to   string
		wait time.Duration // before it
		err  error
	}
	for _, tt := range []struct {
		name   string
		ends   []end
		state  string // of IPv4 and of IPv6
		reason string
	}{
		{"nothing", nil, "up up", ""},
		{"four failures to three addresses", []end{{timeout, "192.0.2.1", 0, nil}, {unreachable, "192.0.2.2", 0, nil}, {reset, "192.0.2.3", 0, nil}, {timeout, "192.0.2.1", 0, nil}}, "down up", "4 connections in a row failed, to 3 addresses; the last: went wrong"},
		{"three failures", []end{{timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.3", 0, nil}}, "up up", ""},
		{"two addresses", []end{{timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}}, "up up", ""},
		{"a third address after many", []end{{timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.3", 0, nil}}, "down up", "4 connections in a row failed, to 3 addresses; the last: went wrong"},
		{"a success between", []end{{timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.3", 0, nil}, {ok, "192.0.2.4", 0, nil}, {timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.3", 0, nil}}, "up up", ""},
		{"one that is refused came through", []end{{timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 0, nil}, {timeout, "192.0.2.3", 0, nil}, {refused, "192.0.2.4", 0, nil}, {timeout, "192.0.2.1", 0, nil}}, "up up", ""},
		{"too slow", []end{{timeout, "192.0.2.1", 0, nil}, {timeout, "192.0.2.2", 20 * time.Second, nil}, {timeout, "192.0.2.3", 0, nil}, {timeout, "192.0.2.1", 11 * time.Second, nil}}, "up up", ""},
		{"the other family", []end{{timeout, "2001:db8::1", 0, nil}, {timeout, "2001:db8::2", 0, nil}, {timeout, "2001:db8::3", 0, nil}, {timeout, "2001:db8::4", 0, nil}}, "up down", "4 connections in a row failed, to 3 addresses; the last: went wrong"},
		{"families apart", []end{{timeout, "2001:db8::1", 0, nil}, {timeout, "2001:db8::2", 0, nil}, {timeout, "192.0.2.3", 0, nil}, {timeout, "192.0.2.4", 0, nil}}, "up up", ""},
		{"bind", []end{{local, "192.0.2.1", 0, selection.Refuse(selection.ErrBind, "cannot bind")}}, "down up", "cannot bind"},
		{"guard", []end{{local, "192.0.2.1", 0, fmt.Errorf("path out/a: %w", escaper.ErrGuarded)}}, "down up", "refused by the guard"},
		{"ports", []end{{local, "192.0.2.1", 0, selection.ErrPorts}, {local, "192.0.2.2", 0, selection.ErrPorts}, {local, "192.0.2.3", 0, selection.ErrPorts}, {local, "192.0.2.4", 0, escaper.ErrResources}}, "up up", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := watch(t, escaper.Options{Passive: passive(), Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1}}})
			p := w.path("a")
			for _, e := range tt.ends {
				w.pass(e.wait)
				if e.err == nil && e.r != ok {
					e.err = errors.New("path out/a: went wrong")
				}
				p.Observe(e.r, netip.AddrPortFrom(addr(e.to), 80), e.err)
			}
			s := p.Status()
			if down := fmt.Sprint(s.V4, s.V6); down != tt.state || s.Reason != tt.reason {
				t.Errorf("%+v, want %s: %s", s, tt.state, tt.reason)
			}
		})
	}
}

// A path to a peer has one address to go to, and one state for both families; a
// peer that refuses is not there.
func TestPassivePeer(t *testing.T) {
	peer, err := escaper.NewPeer(escaper.PeerOptions{Kind: "proxy_socks5", Addr: "192.0.2.9:1080"}, escaper.NewAuthorities())
	if err != nil {
		t.Fatal(err)
	}
	w := watch(t, escaper.Options{Passive: passive(), Peers: true, Nodes: []escaper.NodeOptions{
		{ID: "a", Peer: peer, AnySource: true, Unbound: selection.V4 | selection.V6, Weight: 1},
	}})
	for range 4 {
		w.path("a").Observe(escaper.ResultRefused, netip.MustParseAddrPort("192.0.2.9:1080"), errors.New("refused"))
	}
	if s := w.path("a").Status(); s.State != "down" || s.V4 != escaper.Down || s.V6 != escaper.Down || s.Reason != "4 connections in a row failed, to 1 address; the last: refused" {
		t.Errorf("%+v", s)
	}
}

// A path that goes down again and again stays down twice as long each time.
func TestHoldDoubles(t *testing.T) {
	w := watch(t, escaper.Options{Passive: passive(), Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}})
	p := w.path("a")
	to := netip.MustParseAddrPort("192.0.2.1:80")
	for i, hold := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		hold *= time.Second
		w.fail(p, 4)
		if got := w.step(0); got != "a down" {
			t.Fatalf("round %d: %q", i, got)
		}
		p.Observe(escaper.ResultOK, to, nil) // one that began before
		if got := w.step(hold - 5*time.Second); got != "" || p.Status().State != "down" {
			t.Fatalf("round %d: before the hold is over: %q", i, got)
		}
		if got := w.step(5 * time.Second); got != "a probing" {
			t.Fatalf("round %d: after the hold: %q, %+v", i, got, p.Status())
		}
		if s := p.Status(); !strings.Contains(s.Reason, "on trial by one request at a time, after "+hold.String()+" down: 4 connections") {
			t.Errorf("round %d: %s", i, s.Reason)
		}
		p.Observe(escaper.ResultTimeout, to, errors.New("began before")) // is not the trial's
		p.Observe(escaper.ResultOK, to, nil)
		if got := w.step(0); got != "a up" || p.Status().Reason != "" {
			t.Fatalf("round %d: after the trial: %q, %+v", i, got, p.Status())
		}
	}
	w.pass(301 * time.Second)
	w.fail(p, 4)
	w.step(0)
	if got := w.step(8 * time.Second); got != "a probing" {
		t.Errorf("after a long time up: %q, %+v", got, p.Status())
	}
}

// What an error of the host's own has turned down is tried again as soon as the
// kernel's state has been looked at.
func TestLocalErrorIsRejudged(t *testing.T) {
	w := watch(t, escaper.Options{Passive: passive(), Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}})
	p := w.path("a")
	p.Observe(escaper.ResultLocal, netip.MustParseAddrPort("192.0.2.1:80"), selection.Refuse(selection.ErrBind, "cannot bind"))
	if p.SetFamilyState(selection.V4, escaper.Down, "gone") != true || p.Status().Reason != "gone" {
		t.Errorf("%+v", p.Status())
	}
	if p.SetFamilyState(selection.V4, escaper.Up, "") != true || p.Status().State != "probing" {
		t.Errorf("%+v", p.Status())
	}
	w.step(0)
	if p.SetFamilyState(selection.V4, escaper.Up, "") {
		t.Error("changed again")
	}
	// Not so what connections have turned down.
	p.Observe(escaper.ResultOK, netip.MustParseAddrPort("192.0.2.1:80"), nil)
	w.fail(p, 4)
	if p.SetFamilyState(selection.V4, escaper.Up, "") || p.Status().State != "down" {
		t.Errorf("%+v", p.Status())
	}
}

// blocked is a resolver that holds its questions up until it is let go.
type blocked struct {
	asked chan struct{}
	leave chan struct{}
	to    netip.Addr
}

func (b *blocked) Ready(string, selection.Family) bool { return true }

func (b *blocked) Lookup(context.Context, string, selection.Family) (resolve.Answer, error) {
	b.asked <- struct{}{}
	<-b.leave
	return resolve.Answer{V4: []netip.Addr{b.to}}, nil
}

// onTrial turns a path down and waits for its trial.
func (w *watched) onTrial(t *testing.T, id string) {
	t.Helper()
	w.fail(w.path(id), 4)
	w.step(0)
	w.step(10 * time.Second)
	if s := w.path(id).Status(); s.State != "probing" {
		t.Fatalf("%+v", s)
	}
}

// One request at a time tries a path, whoever chose it; the others get another
// path by policy, and the reason by selection.
func TestTrialIsOneRequest(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	slow := &blocked{asked: make(chan struct{}), leave: make(chan struct{}), to: addr("127.0.0.1")}
	w := watch(t, escaper.Options{
		Passive: passive(), Resolver: slow, Policy: selection.Serial,
		Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}},
	})
	w.onTrial(t, "a")
	name := escaper.Target{Host: "x.example", Port: o.addr.Port()}
	result := make(chan error, 1)
	go func() {
		c, err := w.Open(context.Background(), request(name, selection.Selection{}))
		if err == nil && c.Path.ID != "a" {
			err = fmt.Errorf("by %s", c.Path.ID)
		}
		result <- err
	}()
	<-slow.asked
	for range 3 {
		c, err := w.Open(context.Background(), request(literal(o.addr), selection.Selection{}))
		if err != nil || c.Path.ID != "b" {
			t.Fatalf("%v, %v", c, err)
		}
		_ = c.Close()
	}
	if _, err := w.Open(context.Background(), request(literal(o.addr), byClient(pathID("a")))); !errors.Is(err, selection.ErrDown) || !strings.Contains(err.Error(), "path out/a is probing: on trial by one request at a time") {
		t.Errorf("%v", err)
	}
	// Datagrams prove nothing, so they try nothing.
	if _, err := w.OpenPacket(context.Background(), request(escaper.Target{}, byClient(pathID("a")))); !errors.Is(err, selection.ErrDown) {
		t.Errorf("%v", err)
	}
	close(slow.leave)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	if got := w.step(0); got != "a up" {
		t.Errorf("%q", got)
	}
	c, err := w.Open(context.Background(), request(literal(o.addr), selection.Selection{}))
	if err != nil || c.Path.ID != "a" {
		t.Errorf("%v, %v", c, err)
	}
}

// A trial that fails is the request's failure, and turns the path down for
// twice as long; one that says nothing leaves the trial to the next.
func TestTrialFails(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	w := watch(t, escaper.Options{Passive: passive(), Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}})
	w.onTrial(t, "a")
	if _, err := w.Open(context.Background(), request(escaper.Target{Addr: addr("0.0.0.0"), Port: 80}, byClient(pathID("a")))); !errors.Is(err, escaper.ErrProhibited) {
		t.Errorf("%v", err)
	}
	if s := w.path("a").Status(); s.State != "probing" {
		t.Errorf("%+v", s)
	}
	ctx, cancel := context.WithDeadline(context.Background(), time.Unix(1, 0))
	defer cancel()
	if _, err := w.Open(ctx, request(literal(o.addr), byClient(pathID("a")))); !errors.Is(err, escaper.ErrTimeout) {
		t.Errorf("%v", err)
	}
	if s := w.path("a").Status(); s.State != "down" || !strings.HasPrefix(s.Reason, "the trial failed: connect to ") {
		t.Errorf("%+v", s)
	}
	w.step(0)
	if got := w.step(15 * time.Second); got != "" {
		t.Errorf("after 15 s: %q", got)
	}
	if got := w.step(5 * time.Second); got != "a probing" {
		t.Errorf("after 20 s: %q", got)
	}
	c, err := w.Open(context.Background(), request(literal(o.addr), byClient(pathID("a"))))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if s := w.path("a").Status(); s.State != "up" {
		t.Errorf("%+v", s)
	}
}

// A route that fails over gives one request at a time to the escaper that it
// left, and the others go on by the one that it went to.
func TestTrialBehindRoute(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	slow := &blocked{asked: make(chan struct{}), leave: make(chan struct{}), to: addr("127.0.0.1")}
	second := direct(t, escaper.Options{Name: "second", Resolver: slow, Nodes: []escaper.NodeOptions{{ID: "b", V4: addr("127.0.0.3"), Weight: 1}}})
	inner, err := escaper.NewRoute(escaper.RouteOptions{Name: "inner", Next: []escaper.Next{{Escaper: "out", Weight: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	safe, err := escaper.NewRoute(escaper.RouteOptions{
		Name: "safe", Policy: selection.Serial, EnableSelection: true, Next: []escaper.Next{{Escaper: "inner", Weight: 1}, {Escaper: "second", Weight: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w := watch(t, escaper.Options{
		Passive: passive(), Resolver: slow,
		Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}},
	}, second, inner, safe)
	ask := func(to escaper.Target) (string, error) {
		r := request(to, selection.Selection{})
		r.Escaper = "safe"
		c, err := w.Open(context.Background(), r)
		if err != nil {
			return "", err
		}
		if r.Choice.Path != c.Path.Name {
			t.Errorf("chose %s and went by %s", r.Choice.Path, c.Path.Name)
		}
		return c.Path.ID, c.Close()
	}
	want := func(id string) {
		t.Helper()
		if got, err := ask(literal(o.addr)); got != id || err != nil {
			t.Errorf("by %q, %v, want %s", got, err, id)
		}
	}
	want("a")
	w.fail(w.path("a"), 4)
	w.step(0)
	want("b")
	w.step(10 * time.Second)
	result := make(chan string, 1)
	go func() {
		id, err := ask(escaper.Target{Host: "x.example", Port: o.addr.Port()})
		result <- fmt.Sprint(id, err)
	}()
	<-slow.asked
	want("b")
	want("b")
	r := request(escaper.Target{}, selection.Selection{})
	r.Escaper = "safe"
	if pc, err := w.OpenPacket(context.Background(), r); err != nil || r.Choice.Path != "second/b" {
		t.Errorf("datagrams: %s, %v", r.Choice.Path, err)
	} else {
		_ = pc.Close()
	}
	// Who selects the second escaper has nothing to do with the trial.
	r = request(literal(o.addr), byClient(selection.Entry{Escaper: "safe", Value: selection.ID("second")}))
	r.Escaper = "safe"
	c, err := w.Open(context.Background(), r)
	if err != nil || c.Path.ID != "b" {
		t.Errorf("%v, %v", c, err)
	}
	close(slow.leave)
	if got := <-result; got != "a<nil>" {
		t.Fatal(got)
	}
	w.step(0)
	want("a")
}

// A reload keeps what is known of a path, as far as it is still judged alike.
func TestHealthOverReload(t *testing.T) {
	node := []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}
	w := watch(t, escaper.Options{Passive: passive(), Nodes: node})
	reload := func(o escaper.Options) escaper.Status {
		t.Helper()
		o.Prior, o.Nodes, o.Name, o.Health, o.Now = w.Table().Direct("out"), node, "out", w.health, w.now
		d, err := escaper.NewDirect(o)
		if err != nil {
			t.Fatal(err)
		}
		tab, err := escaper.NewTable(d)
		if err != nil {
			t.Fatal(err)
		}
		w.Swap(tab)
		w.health.Use(tab)
		return w.path("a").Status()
	}
	probe := &escaper.Probe{TCP: "127.0.0.1:9", Interval: time.Hour, Timeout: time.Second, Fall: 1, Rise: 1}
	if s := reload(escaper.Options{Probe: probe}); s.State != "up" {
		t.Errorf("a path that was up is probed: %+v", s)
	}
	reload(escaper.Options{Passive: passive()})
	w.fail(w.path("a"), 4)
	if s := reload(escaper.Options{Passive: passive()}); s.State != "down" {
		t.Errorf("a path that was down: %+v", s)
	}
	if s := reload(escaper.Options{Passive: passive(), Probe: probe}); s.State != "down" {
		t.Errorf("a path that was down is probed: %+v", s)
	}
	if s := reload(escaper.Options{Passive: passive()}); s.State != "probing" {
		t.Errorf("without the probe: %+v", s)
	}
	if s := reload(escaper.Options{}); s.State != "up" {
		t.Errorf("judged no more: %+v", s)
	}
}

func TestHealthNeedsAWatch(t *testing.T) {
	if _, err := escaper.NewDirect(escaper.Options{Name: "out", Passive: passive()}); err == nil {
		t.Error("no error")
	}
}
