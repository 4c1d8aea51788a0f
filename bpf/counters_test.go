package bpf_test

import (
	"math"
	"testing"

	"wayout/bpf"
)

func TestRTTBounds(t *testing.T) {
	for i, want := range map[int]float64{0: 0.000128, 1: 0.000256, 14: 2.097152, 15: math.Inf(1)} {
		if got := bpf.RTTBound(i); got != want {
			t.Errorf("bucket %d holds up to %g s, want %g", i, got, want)
		}
	}
}

func TestOpen(t *testing.T) {
	for _, c := range []struct {
		c                bpf.Counters
		open, connecting uint64
	}{
		{bpf.Counters{}, 0, 0},
		{bpf.Counters{Tried: 9, Made: 5, Failed: 1, Closed: 2}, 3, 3},
		{bpf.Counters{Tried: 1, Made: 1, Closed: 2}, 0, 0}, // made before the programs were there
		{bpf.Counters{Tried: 1, Made: 1, Failed: 1}, 1, 0},
	} {
		if got := c.c.Open(); got != c.open {
			t.Errorf("%+v: %d open, want %d", c.c, got, c.open)
		}
		if got := c.c.Connecting(); got != c.connecting {
			t.Errorf("%+v: %d connecting, want %d", c.c, got, c.connecting)
		}
	}
}
