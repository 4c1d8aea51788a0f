package bpf

import (
	"errors"
	"fmt"
	"math/bits"
)

// DefaultMask is the mask to use unless the host needs another. The path
// number has bits 0 to 16, the uplink number bits 24 to 29 (63 uplinks), the
// class bits 30 and 31. Bits 17 to 23 stay free, so that no mark is one of
// Tailscale's (0x40000 and 0x80000 under 0xff0000); the bits 0x4000 and 0x8000
// of Kubernetes are only set in path numbers from 16,384 up.
const DefaultMask uint32 = 0xff01ffff

// Widths of the fields. The uplink number takes what is left between.
const (
	classBits     = 2
	maxPathBits   = 17
	minUplinkBits = 3
	minPathBits   = 4
	minMaskBits   = classBits + minUplinkBits + minPathBits
)

// Class says what a socket of the daemon is for.
type Class uint8

// The classes. A socket of ClassNone carries no mark of ours: whatever it
// sends is dropped.
const (
	ClassNone    Class = iota
	ClassClient        // listeners, and what they accept: accepted sockets inherit the mark
	ClassControl       // the daemon's own traffic: names, metrics, health
	ClassPath          // connections and datagrams that leave by a path
)

// Sentinels of marks and path numbers.
var (
	// ErrMask says that a mask cannot hold the fields of a mark.
	ErrMask = errors.New("unusable mark mask")
	// ErrNumber says that a class, uplink or path number is outside of what
	// the layout holds, or is not what the call needs it to be.
	ErrNumber = errors.New("number out of range")
)

// Layout is where class, uplink and path number lie in a socket's mark. The
// fields take the mask's bits from the top: two for the class, then the
// uplink, and for the path number the lowest 17, or as many as leave three for
// the uplink. Bits outside the mask are other software's and always zero in
// our marks. The zero Layout is of no use: take NewLayout's.
type Layout struct {
	// Mask is all that is ours; the others are its parts.
	Mask, ClassMask, UplinkMask, PathMask uint32
}

// NewLayout divides a mask. It needs at least 9 bits (2 of class, 3 of uplink,
// 4 of path number); 22 and more allow 131,071 path numbers. The bits may have
// one gap within the path number and any number elsewhere, so that
// 0xff003fff, which leaves out all of Kubernetes' and Tailscale's bits, is a
// mask for 7 uplinks and 131,071 path numbers. Errors wrap ErrMask.
func NewLayout(mask uint32) (Layout, error) {
	n := bits.OnesCount32(mask)
	if n < minMaskBits {
		return Layout{}, fmt.Errorf("%w: %#x has %d bits, needs at least %d", ErrMask, mask, n, minMaskBits)
	}
	path := min(maxPathBits, n-classBits-minUplinkBits)
	l := Layout{
		Mask:       mask,
		ClassMask:  deposit(1<<n-1<<(n-classBits), mask),
		UplinkMask: deposit(1<<(n-classBits)-1<<path, mask),
		PathMask:   deposit(1<<path-1, mask),
	}
	if r := runs(l.PathMask); r > 2 {
		return Layout{}, fmt.Errorf("%w: the path number's bits %#x of %#x lie in %d runs, at most 2 are possible", ErrMask, l.PathMask, mask, r)
	}
	return l, nil
}

// MaxUplink is the highest uplink number; 0 means no uplink.
func (l Layout) MaxUplink() uint32 { return 1<<bits.OnesCount32(l.UplinkMask) - 1 }

// MaxPath is the highest path number; 0 is no path's.
func (l Layout) MaxPath() uint32 { return 1<<bits.OnesCount32(l.PathMask) - 1 }

// Mark is the mark for a socket. Uplink and path number are 0 for all classes
// but ClassPath, which needs a path number and may have an uplink. A mark that
// would not say what was asked is never made: the error wraps ErrNumber and the
// mark is 0, with which a socket can send nothing.
func (l Layout) Mark(c Class, uplink, path uint32) (uint32, error) {
	switch {
	case c < ClassClient || c > ClassPath || l.Mask == 0:
		return 0, fmt.Errorf("mark: class %d: %w", c, ErrNumber)
	case c != ClassPath && (uplink != 0 || path != 0):
		return 0, fmt.Errorf("mark: class %d with uplink %d and path %d: %w", c, uplink, path, ErrNumber)
	case uplink > l.MaxUplink():
		return 0, fmt.Errorf("mark: uplink %d, the mask %#x allows %d: %w", uplink, l.Mask, l.MaxUplink(), ErrNumber)
	case c == ClassPath && path == 0, path > l.MaxPath():
		return 0, fmt.Errorf("mark: path number %d, the mask %#x allows 1 to %d: %w", path, l.Mask, l.MaxPath(), ErrNumber)
	}
	return deposit(uint32(c), l.ClassMask) | deposit(uplink, l.UplinkMask) | deposit(path, l.PathMask), nil
}

// Answers is the mark of sockets that answer diverted clients, and what a routing
// rule (fwmark VALUE/MASK) has to match for them and nothing else. They are of
// the client's side, with the highest uplink number, which no other socket of that
// class has.
func (l Layout) Answers() (mark, mask uint32) {
	return deposit(uint32(ClassClient), l.ClassMask) | l.UplinkMask, l.ClassMask | l.UplinkMask
}

// Split reads a mark. Bits outside the mask do not matter.
func (l Layout) Split(mark uint32) (c Class, uplink, path uint32) {
	return Class(extract(mark, l.ClassMask)), extract(mark, l.UplinkMask), extract(mark, l.PathMask)
}

// UplinkMatch is what a routing rule (fwmark VALUE/MASK) has to match so that
// it takes the sockets of an uplink's paths and nothing else. There is no rule
// for uplink 0; a number that is out of range wraps ErrNumber.
func (l Layout) UplinkMatch(uplink uint32) (value, mask uint32, err error) {
	if uplink == 0 || uplink > l.MaxUplink() {
		return 0, 0, fmt.Errorf("match uplink %d, the mask %#x allows 1 to %d: %w", uplink, l.Mask, l.MaxUplink(), ErrNumber)
	}
	return deposit(uint32(ClassPath), l.ClassMask) | deposit(uplink, l.UplinkMask), l.ClassMask | l.UplinkMask, nil
}

// Taken says whether a foreign rule (fwmark value/mask) would match a mark of
// ours while uplinks up to maxUplink and path numbers up to maxPath are in use.
// A rule with mask 0 matches whatever the mark, and so is not about marks: no.
func (l Layout) Taken(value, mask, maxUplink, maxPath uint32) bool {
	if mask == 0 || value&mask&^l.Mask != 0 {
		return false
	}
	matches := func(c Class, uplink, path uint32) bool {
		// The smallest number of a field that has the bits asked for is
		// those bits alone.
		return extract(value&mask, l.UplinkMask) <= uplink &&
			extract(value&mask, l.PathMask) <= path &&
			(deposit(uint32(c), l.ClassMask)^value)&mask&l.ClassMask == 0
	}
	return matches(ClassPath, maxUplink, maxPath) || matches(ClassClient, 0, 0) || matches(ClassControl, 0, 0)
}

// shifts is how the programs get at the path number:
// mark>>low & lowMask | mark>>high & highMask.
func (l Layout) shifts() (low, lowMask, high, highMask uint32) {
	low = uint32(bits.TrailingZeros32(l.PathMask))
	width := uint32(bits.TrailingZeros32(^(l.PathMask >> low)))
	lowMask = 1<<width - 1
	if rest := l.PathMask &^ (lowMask << low); rest != 0 {
		high = uint32(bits.TrailingZeros32(rest)) - width
		highMask = rest >> high
	}
	return low, lowMask, high, highMask
}

// deposit puts the low bits of v, in order, where mask has bits.
func deposit(v, mask uint32) uint32 {
	var out uint32
	for ; mask != 0; mask &= mask - 1 {
		if v&1 != 0 {
			out |= mask & -mask
		}
		v >>= 1
	}
	return out
}

// extract is the reverse of deposit.
func extract(v, mask uint32) uint32 {
	var out uint32
	for i := 0; mask != 0; mask &= mask - 1 {
		if v&mask&-mask != 0 {
			out |= 1 << i
		}
		i++
	}
	return out
}

// runs counts the groups of adjacent bits.
func runs(v uint32) int { return bits.OnesCount32(v &^ (v << 1)) }
