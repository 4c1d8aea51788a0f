package bpf_test

import (
	"errors"
	"slices"
	"testing"

	"wayout/bpf"
)

func take(t *testing.T, n *bpf.Numbers, want uint32) {
	t.Helper()
	got, err := n.Take()
	if err != nil || got != want {
		t.Fatalf("took %d, %v, want %d", got, err, want)
	}
}

func TestNumbersAreNotUsedAgainTooEarly(t *testing.T) {
	n := bpf.NewNumbers(4)
	for want := uint32(1); want <= 4; want++ {
		take(t, n, want)
	}
	if _, err := n.Take(); !errors.Is(err, bpf.ErrNumber) {
		t.Fatalf("a fifth of four: %v", err)
	}
	for _, num := range []uint32{3, 1, 2} {
		if err := n.Release(num); err != nil {
			t.Fatal(err)
		}
	}
	if got := n.Resting(); !slices.Equal(got, []uint32{3, 1, 2}) {
		t.Fatalf("resting %v", got)
	}
	if _, err := n.Take(); !errors.Is(err, bpf.ErrNumber) {
		t.Fatalf("took a number that rests: %v", err)
	}
	for _, num := range []uint32{2, 3} {
		if err := n.Free(num); err != nil {
			t.Fatal(err)
		}
	}
	take(t, n, 2) // freed first
	take(t, n, 3)
	if got := n.Resting(); !slices.Equal(got, []uint32{1}) {
		t.Fatalf("resting %v", got)
	}
}

func TestNumbersOfAnEarlierRun(t *testing.T) {
	n := bpf.NewNumbers(5)
	if err := n.Hold(1, 2, 4); err != nil {
		t.Fatal(err)
	}
	take(t, n, 3)
	take(t, n, 5)
	if _, err := n.Take(); !errors.Is(err, bpf.ErrNumber) {
		t.Fatalf("took a number that is held: %v", err)
	}
	if err := n.Free(4); err != nil {
		t.Fatal(err)
	}
	take(t, n, 4)
}

func TestNumbersRefuseWhatCannotBe(t *testing.T) {
	n := bpf.NewNumbers(4)
	take(t, n, 1)
	for name, err := range map[string]error{
		"release of a number not taken": n.Release(2),
		"free of a number in use":       n.Free(1),
		"free of a number not taken":    n.Free(3),
		"hold of a number in use":       n.Hold(1),
		"hold of none":                  n.Hold(0),
		"hold beyond the limit":         n.Hold(5),
		"hold twice":                    n.Hold(3, 3),
	} {
		if !errors.Is(err, bpf.ErrNumber) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// BenchmarkNumbers replaces every path of 65,536 at once, as a reload may.
func BenchmarkNumbers(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		n := bpf.NewNumbers(131071)
		for range 65536 {
			if _, err := n.Take(); err != nil {
				b.Fatal(err)
			}
		}
		for num := uint32(1); num <= 65536; num++ {
			if err := n.Release(num); err != nil {
				b.Fatal(err)
			}
		}
		for range 65535 {
			if _, err := n.Take(); err != nil {
				b.Fatal(err)
			}
		}
		for _, num := range n.Resting() {
			if err := n.Free(num); err != nil {
				b.Fatal(err)
			}
		}
	}
}
