package relay_test

import (
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"wayout/router/relay"
)

// budget is so many bytes a second.
func budget(bytes float64) relay.Budget {
	return relay.Budget{rate.NewLimiter(rate.Limit(bytes), relay.Burst(bytes))}
}

// flood writes into a connection until it is closed.
func flood(wg *sync.WaitGroup, c net.Conn) {
	wg.Go(func() { _, _ = io.Copy(c, zeros{}) })
}

// TestBudgetShared has more tunnels than workers spend one budget, copied and
// spliced: together they get what it allows, and each gets its part.
func TestBudgetShared(t *testing.T) {
	for _, c := range []struct {
		name  string
		bytes float64
	}{{"copied", 2e6}, {"spliced", 20e6}} {
		t.Run(c.name, func(t *testing.T) {
			e := engine(t, relay.Options{Workers: 2}, relay.Tuning{})
			const tunnels = 5
			b := budget(c.bytes)
			free := budget(1e12)
			var all [tunnels]*tunnel
			var got [tunnels]atomic.Int64
			var wg sync.WaitGroup
			for i := range all {
				all[i] = start(t, e, relay.Spec{Budgets: [2]relay.Budget{b, free}})
				flood(&wg, all[i].a)
				wg.Go(func() {
					buf := make([]byte, 64<<10)
					for {
						n, err := all[i].b.Read(buf)
						got[i].Add(int64(n))
						if err != nil {
							return
						}
					}
				})
			}
			sum := func() (n int64) {
				for i := range got {
					n += got[i].Load()
				}
				return n
			}
			// What may pass at once is no part of what is measured.
			reach := func(n int64) time.Time {
				if !within(func() bool { return sum() >= n }) {
					t.Fatalf("%d bytes have come, want %d", sum(), n)
				}
				return time.Now()
			}
			first := int64(relay.Burst(c.bytes)) + int64(c.bytes)/10
			from := reach(first)
			begun := sum()
			to := reach(first + int64(c.bytes))
			speed := float64(sum()-begun) / to.Sub(from).Seconds()
			if speed > 1.3*c.bytes || speed < 0.5*c.bytes {
				t.Errorf("%.0f bytes a second together, the budget is %.0f", speed, c.bytes)
			}
			for i := range got {
				if n, part := got[i].Load(), sum()/tunnels; n < part/4 || n > 2*part {
					t.Errorf("tunnel %d got %d bytes, an equal part is %d", i, n, part)
				}
			}
			// The other direction has a budget of its own.
			send(t, all[0].b, "back")
			expect(t, all[0].a, "back")
			for _, x := range all {
				x.Kill(nil)
				x.result(t)
				_ = x.a.Close()
				_ = x.b.Close()
			}
			wg.Wait()
		})
	}
}

// TestBudgetDeliversAll: what a source has sent before it ended comes, and then
// its end, however overdrawn the budget is meanwhile.
func TestBudgetDeliversAll(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	b := budget(2e6)
	want := pattern(600_000)
	x := start(t, e, relay.Spec{Budgets: [2]relay.Budget{b, b}})
	go func() {
		_, _ = x.a.Write(want)
		_ = x.a.CloseWrite()
	}()
	// The other side closes both ways to come while bytes for it wait.
	got, err := io.ReadAll(x.b)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	_ = x.b.CloseWrite()
	if r := x.result(t); r.Cause != nil || r.AToB != int64(len(want)) {
		t.Errorf("result %+v", r)
	}
}

// TestBudgetEnds ends tunnels whose directions wait: by a reset, by Kill, and with
// the engine.
func TestBudgetEnds(t *testing.T) {
	for name, end := range map[string]func(e *relay.Engine, x *tunnel){
		"reset": func(_ *relay.Engine, x *tunnel) { _ = x.b.SetLinger(0); _ = x.b.Close() },
		"kill":  func(_ *relay.Engine, x *tunnel) { x.Kill(nil) },
		"close": func(e *relay.Engine, _ *tunnel) { _ = e.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			e := engine(t, relay.Options{}, relay.Tuning{})
			b := budget(1000)
			b.Take(time.Now(), 10*relay.Burst(1000)) // it is good again in ten minutes
			x := start(t, e, relay.Spec{Budgets: [2]relay.Budget{b, nil}})
			send(t, x.a, "waits")
			send(t, x.b, "goes") // and so the worker has met what waits, or will first
			expect(t, x.a, "goes")
			end(e, x)
			if r := x.result(t); r.Cause == nil || r.AToB != 0 {
				t.Errorf("result %+v", r)
			}
			if tokens, want := b[0].Tokens(), -9.0*float64(relay.Burst(1000)); tokens < want || tokens > want+60_000 {
				t.Errorf("%.0f bytes are missing, %.0f were taken by others", -tokens, -want)
			}
		})
	}
}

// TestBudgetTake hands out what comes in, in the order of coming.
func TestBudgetTake(t *testing.T) {
	at := time.Now()
	b := budget(100_000)
	if d := b.Take(at, relay.Burst(100_000)+1000); d != 0 {
		t.Errorf("the burst waits for %v", d)
	}
	if b.Good(at) || !b.Good(at.Add(20*time.Millisecond)) {
		t.Error("overdrawn by 1000 bytes at 100,000 a second it has to be good after 10 ms")
	}
	if d := b.Take(at, 2000); d.Round(time.Millisecond) != 10*time.Millisecond {
		t.Errorf("the first waits for %v", d)
	}
	if d := b.Take(at, 1); d.Round(time.Millisecond) != 30*time.Millisecond {
		t.Errorf("the second waits for %v", d)
	}
	b.GiveBack(at, 2000)
	if d := b.Take(at, 1); d.Round(time.Millisecond) != 10*time.Millisecond {
		t.Errorf("after the first has given back, the third waits for %v", d)
	}
	b.Take(at, 2000)
	two := relay.Budget{b[0], budget(1e9)[0]}
	if d := two.Take(at, 1); d < 25*time.Millisecond {
		t.Errorf("with a good limiter beside it: %v", d)
	}
	if none := relay.Budget(nil); none.Take(at, 1<<30) != 0 || !none.Good(at) || none.Turn() <= 0 {
		t.Error("no bound bounds")
	}
}

// TestPolice drops what comes over the budget, lets pass the largest datagram when
// it is good, and goes before what else waits.
func TestPolice(t *testing.T) {
	at := time.Now()
	p := relay.Police{Own: budget(1000), Of: budget(1000)}
	p.Of.Take(at, relay.Burst(1000)+5000) // tunnels have their turns for five seconds
	if !p.Pass(at, 65507) || !p.Pass(at, 100) {
		t.Fatal("the burst does not pass")
	}
	if p.Pass(at, 1) || p.Pass(at.Add(60*time.Millisecond), 1) {
		t.Error("more than the burst passes") // by 71 bytes
	}
	if !p.Pass(at.Add(80*time.Millisecond), 1) {
		t.Error("it does not pass at its time")
	}
	if d := p.Of.Take(at, 1); d.Round(time.Second) != 71*time.Second {
		t.Errorf("the next tunnel waits for %v: five seconds, and the datagrams", d)
	}
	if !(relay.Police{}).Pass(at, 1<<30) {
		t.Error("no bound bounds")
	}
}
