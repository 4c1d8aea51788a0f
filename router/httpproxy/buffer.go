package httpproxy

import (
	"sync"
	"time"
)

// Sizes of the buffers. A head mostly fits the small one; bodies use the
// middle one and, when they keep it full, the large one.
const (
	smallBuffer  = 4 << 10
	middleBuffer = 16 << 10
	largeBuffer  = 64 << 10
)

// buffers lends buffers. Pointers to arrays go into the pools because those,
// unlike slices, fit an interface without an allocation.
type buffers struct{ small, middle, large sync.Pool }

// get returns a buffer of at least n bytes, of length 0 and of one of the
// sizes above where n allows it.
func (p *buffers) get(n int) []byte {
	switch {
	case n <= smallBuffer:
		if b, ok := p.small.Get().(*[smallBuffer]byte); ok {
			return b[:0]
		}
		return make([]byte, 0, smallBuffer)
	case n <= middleBuffer:
		if b, ok := p.middle.Get().(*[middleBuffer]byte); ok {
			return b[:0]
		}
		return make([]byte, 0, middleBuffer)
	case n <= largeBuffer:
		if b, ok := p.large.Get().(*[largeBuffer]byte); ok {
			return b[:0]
		}
		return make([]byte, 0, largeBuffer)
	}
	return make([]byte, 0, n)
}

// put takes a buffer back; one of another size is left to the collector.
func (p *buffers) put(b []byte) {
	switch cap(b) {
	case smallBuffer:
		p.small.Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case middleBuffer:
		p.middle.Put((*[middleBuffer]byte)(b[:middleBuffer]))
	case largeBuffer:
		p.large.Put((*[largeBuffer]byte)(b[:largeBuffer]))
	}
}

// past is a deadline that has been missed.
func past() time.Time { return time.Unix(1, 0) }

// A deadline sets one of the two deadlines of a connection, and only when that
// changes something that matters: a limit may come up to an eighth early. So a
// busy connection rarely touches the timers.
type deadline struct {
	at time.Time
}

func (d *deadline) after(limit time.Duration, set func(time.Time) error) error {
	if limit <= 0 {
		if d.at.IsZero() {
			return nil
		}
		return d.exactly(time.Time{}, set)
	}
	want := time.Now().Add(limit)
	if !d.at.IsZero() && !d.at.After(want) && want.Sub(d.at) < limit/8 {
		return nil
	}
	return d.exactly(want, set)
}

func (d *deadline) exactly(at time.Time, set func(time.Time) error) error {
	d.at = at
	return set(at)
}
