package bpf_test

import (
	"errors"
	"math/bits"
	"testing"

	"wayout/bpf"
)

func TestLayoutOfMasks(t *testing.T) {
	for _, c := range []struct {
		mask, class, uplink, path uint32
		maxUplink, maxPath        uint32
	}{
		{bpf.DefaultMask, 0xc0000000, 0x3f000000, 0x1ffff, 63, 131071},
		{0xffffffff, 0xc0000000, 0x3ffe0000, 0x1ffff, 8191, 131071},
		{0xff003fff, 0xc0000000, 0x38000000, 0x07003fff, 7, 131071},
		{0x003fffff, 0x00300000, 0x000e0000, 0x1ffff, 7, 131071},
		{0x3fffff00, 0x30000000, 0x0e000000, 0x01ffff00, 7, 131071},
		{0x0000ffff, 0xc000, 0x3800, 0x07ff, 7, 2047},
		{0x1ff, 0x180, 0x70, 0xf, 7, 15},
		{0xa0a8000f, 0xa0000000, 0x00a80000, 0xf, 7, 15},
	} {
		l, err := bpf.NewLayout(c.mask)
		if err != nil {
			t.Errorf("%#x: %v", c.mask, err)
			continue
		}
		want := bpf.Layout{Mask: c.mask, ClassMask: c.class, UplinkMask: c.uplink, PathMask: c.path}
		if l != want {
			t.Errorf("%#x is divided as %#x, want %#x", c.mask, l, want)
		}
		if l.MaxUplink() != c.maxUplink || l.MaxPath() != c.maxPath {
			t.Errorf("%#x holds %d uplinks and %d paths, want %d and %d", c.mask, l.MaxUplink(), l.MaxPath(), c.maxUplink, c.maxPath)
		}
	}
	for _, mask := range []uint32{0, 0xff, 0x80000000, 0x55555555, 0xfffff115} {
		if l, err := bpf.NewLayout(mask); !errors.Is(err, bpf.ErrMask) {
			t.Errorf("%#x is taken: %+v, %v", mask, l, err)
		}
	}
}

func TestMark(t *testing.T) {
	l, err := bpf.NewLayout(bpf.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		class        bpf.Class
		uplink, path uint32
		want         uint32 // 0: an error
	}{
		{bpf.ClassClient, 0, 0, 0x40000000},
		{bpf.ClassControl, 0, 0, 0x80000000},
		{bpf.ClassPath, 0, 1, 0xc0000001},
		{bpf.ClassPath, 1, 2, 0xc1000002},
		{bpf.ClassPath, 63, 131071, 0xff01ffff},
		{bpf.ClassPath, 64, 1, 0},
		{bpf.ClassPath, 1, 131072, 0},
		{bpf.ClassPath, 1, 0, 0},
		{bpf.ClassClient, 1, 0, 0},
		{bpf.ClassControl, 0, 1, 0},
		{bpf.ClassNone, 0, 0, 0},
		{bpf.ClassPath + 1, 0, 1, 0},
	} {
		got, err := l.Mark(c.class, c.uplink, c.path)
		if got != c.want || errors.Is(err, bpf.ErrNumber) != (c.want == 0) {
			t.Errorf("Mark(%d, %d, %d) = %#x, %v, want %#x", c.class, c.uplink, c.path, got, err, c.want)
		}
		if err != nil {
			continue
		}
		if class, uplink, path := l.Split(got | ^l.Mask); class != c.class || uplink != c.uplink || path != c.path {
			t.Errorf("Split(%#x) = %d, %d, %d", got, class, uplink, path)
		}
	}
	if got, err := (bpf.Layout{}).Mark(bpf.ClassPath, 0, 1); got != 0 || err == nil {
		t.Errorf("the zero layout makes mark %#x", got)
	}
}

func TestUplinkMatch(t *testing.T) {
	l, err := bpf.NewLayout(bpf.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	value, mask, err := l.UplinkMatch(5)
	if err != nil || value != 0xc5000000 || mask != 0xff000000 {
		t.Errorf("uplink 5 is %#x/%#x, %v", value, mask, err)
	}
	for _, u := range []uint32{0, 64} { // a rule with mask 0 would match everything
		if value, mask, err := l.UplinkMatch(u); !errors.Is(err, bpf.ErrNumber) {
			t.Errorf("uplink %d is %#x/%#x", u, value, mask)
		}
	}
}

func TestForeignRules(t *testing.T) {
	const none = 0
	for _, c := range []struct {
		name              string
		ours, value, mask uint32
		uplinks, paths    uint32
		want              bool
	}{
		{"Tailscale bypass", bpf.DefaultMask, 0x80000, 0xff0000, 63, 131071, false},
		{"Tailscale subnet", bpf.DefaultMask, 0x40000, 0xff0000, 63, 131071, false},
		{"Tailscale, all bits ours", 0xffffffff, 0x80000, 0xff0000, 4, 100, true},
		{"Tailscale, all bits ours, few uplinks", 0xffffffff, 0x80000, 0xff0000, 3, 100, false},
		{"Kubernetes masquerade, few paths", bpf.DefaultMask, 0x4000, 0x4000, 3, 0x3fff, false},
		{"Kubernetes masquerade, many paths", bpf.DefaultMask, 0x4000, 0x4000, 3, 0x4000, true},
		{"Kubernetes drop, many paths", bpf.DefaultMask, 0x8000, 0x8000, 3, 0x8000, true},
		{"Kubernetes masquerade, left out", 0xff003fff, 0x4000, 0x4000, 7, 131071, false},
		{"Kubernetes drop, left out", 0xff003fff, 0x8000, 0x8000, 7, 131071, false},
		{"wg-quick", bpf.DefaultMask, 0xca6c, 0xffffffff, 63, 131071, false},
		{"unmarked sockets", bpf.DefaultMask, 0, 0xffffffff, 63, 131071, false},
		{"zero in bits of others", bpf.DefaultMask, 0, 0xfe0000, none, none, true},
		{"the client's side", bpf.DefaultMask, 0x40000000, 0xffffffff, none, none, true},
		{"control", bpf.DefaultMask, 0x80000000, 0xc0000000, none, none, true},
		{"an uplink's own", bpf.DefaultMask, 0xc2000000, 0xff000000, 2, 10, true},
		{"an uplink not in use", bpf.DefaultMask, 0xc2000000, 0xff000000, 1, 10, false},
		{"whatever the mark", bpf.DefaultMask, 0, 0, 63, 131071, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := bpf.NewLayout(c.ours)
			if err != nil {
				t.Fatal(err)
			}
			if got := l.Taken(c.value, c.mask, c.uplinks, c.paths); got != c.want {
				t.Errorf("fwmark %#x/%#x: %v, want %v", c.value, c.mask, got, c.want)
			}
		})
	}
}

// FuzzLayout holds that whatever mask is taken is divided without overlap, and
// that a mark reads back as what it was made of, in the mask's bits alone.
func FuzzLayout(f *testing.F) {
	f.Add(bpf.DefaultMask, uint32(5), uint32(4711))
	f.Add(uint32(0xff003fff), uint32(7), uint32(131071))
	f.Add(uint32(0xa0a8000f), uint32(3), uint32(9))
	f.Fuzz(func(t *testing.T, mask, uplink, path uint32) {
		l, err := bpf.NewLayout(mask)
		if err != nil {
			if !errors.Is(err, bpf.ErrMask) {
				t.Fatal(err)
			}
			return
		}
		if l.ClassMask|l.UplinkMask|l.PathMask != mask || l.ClassMask&l.UplinkMask|l.UplinkMask&l.PathMask|l.ClassMask&l.PathMask != 0 {
			t.Fatalf("%#x is divided as %#x", mask, l)
		}
		if bits.OnesCount32(l.ClassMask) != 2 {
			t.Fatalf("%#x has the class bits %#x", mask, l.ClassMask)
		}
		uplink, path = uplink&l.MaxUplink(), path&l.MaxPath()|1
		m, err := l.Mark(bpf.ClassPath, uplink, path)
		if err != nil {
			t.Fatal(err)
		}
		if m&^mask != 0 {
			t.Fatalf("mark %#x is not within %#x", m, mask)
		}
		if c, u, p := l.Split(m); c != bpf.ClassPath || u != uplink || p != path {
			t.Fatalf("%#x: mark %#x of uplink %d and path %d reads as %d, %d, %d", mask, m, uplink, path, c, u, p)
		}
		if !l.Taken(m, mask, uplink, path) {
			t.Fatalf("%#x: a rule for mark %#x itself is said not to match it", mask, m)
		}
	})
}
