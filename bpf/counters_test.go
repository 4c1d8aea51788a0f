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

func TestRTTQuantile(t *testing.T) {
	for _, c := range []struct {
		name string
		rtt  [bpf.RTTBuckets]uint64
		q    float64
		want float64
	}{
		{"no samples", [bpf.RTTBuckets]uint64{}, 0.5, 0},
		{"half of one bucket", [bpf.RTTBuckets]uint64{4: 10}, 0.5, 0.001536}, // 1.024 ms to 2.048 ms
		{"all of one bucket", [bpf.RTTBuckets]uint64{4: 10}, 1, 0.002048},
		{"in the first", [bpf.RTTBuckets]uint64{0: 1}, 0.5, 0.000064},
		{"in the upper of two", [bpf.RTTBuckets]uint64{0: 50, 7: 50}, 0.75, 0.012288},
		{"at the border", [bpf.RTTBuckets]uint64{0: 50, 7: 50}, 0.5, 0.000128},
		{"beyond the last bound", [bpf.RTTBuckets]uint64{15: 2}, 1, 4.194304},
	} {
		counters := bpf.Counters{RTT: c.rtt}
		if got := counters.RTTQuantile(c.q); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%s: %g s, want %g", c.name, got, c.want)
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
