package relay

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestWheel holds the wheel against a plain list: what is over its limit comes
// out by the first tick not before it, and nothing else does.
func TestWheel(t *testing.T) {
	const tick = 7
	rng := rand.New(rand.NewPCG(1, 2))
	h := &wheel{tick: tick}
	in := map[*Tunnel]bool{}
	now := int64(0)
	for range 20000 {
		switch rng.IntN(4) {
		case 0, 1:
			// Near, around the horizon, beyond it.
			due := now + 1 + rng.Int64N([]int64{tick * 3, tick * wheelSlots, tick * wheelSlots * 3}[rng.IntN(3)])
			x := &Tunnel{end: due, slotted: -1}
			h.put(x, x.due())
			in[x] = true
		case 2:
			for x := range in {
				h.drop(x)
				h.drop(x) // a second time does nothing
				delete(in, x)
				break
			}
		default:
			wake, ok := h.next()
			if ok != (len(in) > 0) {
				t.Fatalf("next: %v with %d in", ok, len(in))
			}
			for x := range in {
				// It may wake for a second look at a far limit, never too late.
				if first := (x.due() + tick - 1) / tick * tick; wake > first {
					t.Fatalf("next %d, but one is due at %d", wake, first)
				}
			}
			if ok && rng.IntN(2) == 0 {
				now = max(now, wake)
			} else {
				now += rng.Int64N(tick * wheelSlots * 2)
			}
			out := h.advance(now, nil)
			for x := range in {
				got := slices.Contains(out, x)
				if must := (x.due()+tick-1)/tick <= now/tick; must && !got || got && x.due() > now {
					t.Fatalf("at %d: due %d came out: %v", now, x.due(), got)
				}
				if got {
					delete(in, x)
				}
			}
		}
	}
}

func BenchmarkWheel(b *testing.B) {
	b.ReportAllocs()
	h := &wheel{tick: 1000}
	x := &Tunnel{slotted: -1}
	for i := int64(0); b.Loop(); i++ {
		h.put(x, i*100)
		h.drop(x)
	}
}
