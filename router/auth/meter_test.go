package auth_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"wayout/router/auth"
)

// A clock that moves when it is told to.
type clock struct{ at time.Time }

func newClock() *clock                          { return &clock{time.Unix(1_700_000_000, 0)} }
func (c *clock) now() time.Time                 { return c.at }
func (c *clock) advance(d time.Duration)        { c.at = c.at.Add(d) }
func meter(l auth.Limits, c *clock) *auth.Meter { return auth.NewMeter(l, c.now) }

func TestMeterConnections(t *testing.T) {
	m := meter(auth.Limits{Connections: 2}, newClock())
	for range 2 {
		if err := m.Begin(); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		err := m.Begin()
		if !errors.Is(err, auth.ErrLimit) || auth.RetryAfter(err) != time.Second {
			t.Fatalf("the third: %v, %s", err, auth.RetryAfter(err))
		}
	}
	if n := m.Open(); n != 2 {
		t.Fatalf("%d open: the refused ones count", n)
	}
	m.End()
	if err := m.Begin(); err != nil {
		t.Fatalf("after one has ended: %v", err)
	}
}

func TestMeterRate(t *testing.T) {
	tests := []struct {
		name   string
		limits auth.Limits
		burst  int           // that begin at once
		after  time.Duration // what the next one is told
		exact  time.Duration // when it is admitted
	}{
		{"two a second", auth.Limits{Rate: 2}, 2, time.Second, 500 * time.Millisecond},
		{"one in ten seconds", auth.Limits{Rate: 0.1}, 1, 10 * time.Second, 10 * time.Second},
		{"sixty a minute, all at once", auth.Limits{Rate: 1, Burst: 60}, 60, time.Second, time.Second},
		{"one in three seconds", auth.Limits{Rate: 1. / 3}, 1, 3 * time.Second, 3 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newClock()
			m := meter(tt.limits, c)
			for i := range tt.burst {
				if err := m.Begin(); err != nil {
					t.Fatalf("number %d: %v", i+1, err)
				}
				m.End()
			}
			err := m.Begin()
			if !errors.Is(err, auth.ErrLimit) {
				t.Fatalf("one more: %v", err)
			}
			if got := auth.RetryAfter(fmt.Errorf("wrapped: %w", err)); got != tt.after {
				t.Errorf("retry after %s, want %s", got, tt.after)
			}
			c.advance(tt.exact - time.Millisecond)
			if err := m.Begin(); err == nil {
				t.Error("admitted too early")
			}
			c.advance(2 * time.Millisecond)
			if err := m.Begin(); err != nil {
				t.Errorf("after %s: %v", tt.exact, err)
			}
			if n := m.Open(); n != 1 {
				t.Errorf("%d open, want 1", n)
			}
		})
	}
}

// Who is refused for what is open takes nothing of the rate.
func TestMeterRefusalCostsNoRate(t *testing.T) {
	m := meter(auth.Limits{Connections: 1, Rate: 2}, newClock())
	if err := m.Begin(); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := m.Begin(); err == nil {
			t.Fatal("a second one was admitted")
		}
	}
	m.End()
	if err := m.Begin(); err != nil {
		t.Fatalf("the second in its second: %v", err)
	}
}

func TestMeterWithoutLimits(t *testing.T) {
	for name, m := range map[string]*auth.Meter{"nil": nil, "zero": auth.NewMeter(auth.Limits{}, nil)} {
		for range 1000 {
			if err := m.Begin(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		m.End()
		if up, down := auth.Bytes(m); up != nil || down != nil {
			t.Errorf("%s: bytes are bounded", name)
		}
	}
	if n := (*auth.Meter)(nil).Open(); n != 0 {
		t.Errorf("nil: %d open", n)
	}
	if d := auth.RetryAfter(errors.New("another")); d != 0 {
		t.Errorf("another error: %s", d)
	}
}

// TestBytes: each direction has limiters of its own, one of each meter, and all
// who ask get the same ones.
func TestBytes(t *testing.T) {
	one := auth.NewMeter(auth.Limits{Bandwidth: 8000, BandwidthBurst: 100}, nil)
	two := auth.NewMeter(auth.Limits{Bandwidth: 16000, BandwidthBurst: 200}, nil)
	up, down := auth.Bytes(nil, one, auth.NewMeter(auth.Limits{Connections: 1}, nil), two)
	if len(up) != 2 || len(down) != 2 || up[0] == down[0] {
		t.Fatalf("limiters %v and %v", up, down)
	}
	for _, l := range [][]*rate.Limiter{up, down} {
		if l[0].Limit() != 1000 || l[0].Burst() != 100 || l[1].Limit() != 2000 || l[1].Burst() != 200 {
			t.Errorf("bytes a second %v and %v, at once %d and %d", l[0].Limit(), l[1].Limit(), l[0].Burst(), l[1].Burst())
		}
	}
	if again, _ := auth.Bytes(one); again[0] != up[0] {
		t.Error("another limiter the second time")
	}
}

// However many come at once, no more are open than may be.
func TestMeterConcurrent(t *testing.T) {
	const most = 7
	m := auth.NewMeter(auth.Limits{Connections: most}, nil)
	var inside, worst, admitted atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 500 {
				if m.Begin() != nil {
					continue
				}
				admitted.Add(1)
				n := inside.Add(1)
				for w := worst.Load(); n > w && !worst.CompareAndSwap(w, n); w = worst.Load() {
				}
				inside.Add(-1)
				m.End()
			}
		})
	}
	wg.Wait()
	if worst.Load() > most || admitted.Load() == 0 || m.Open() != 0 {
		t.Fatalf("%d at once of %d, %d admitted, %d left open", worst.Load(), most, admitted.Load(), m.Open())
	}
}
