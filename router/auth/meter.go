package auth

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// ErrLimit says that a limit was reached: too many are open, or too many began in a short time. RetryAfter has when to
// try again.
var ErrLimit = errors.New("limit reached")

// Limits bounds what a user or a server does. Zeros are no bounds.
type Limits struct {
	Connections int     // open at once
	Rate        float64 // that begin in a second, over a longer time
	Burst       int     // that may begin at once; 0: as many as Rate allows in a second, at least one
	Bandwidth   uint64  // bits a second, in each direction, over all that is open
	// BandwidthBurst is how many bytes may pass at once, in each direction, after a
	// pause. Required with Bandwidth.
	BandwidthBurst int
}

// A Meter counts what its Limits bound. Its methods may be called from many goroutines, and on a nil Meter, which has no
// limits.
type Meter struct {
	limits Limits
	bucket *rate.Limiter // nil: any rate
	// Of all bytes, and of those of datagrams: from the client, and to it. nil
	// without Bandwidth.
	bytes, datagrams [2]*rate.Limiter
	now              func() time.Time
	open             atomic.Int64
}

// NewMeter returns a Meter of which nothing is used. now is the clock; nil: time.Now.
func NewMeter(l Limits, now func() time.Time) *Meter {
	if now == nil {
		now = time.Now
	}
	m := &Meter{limits: l, now: now}
	if l.Rate > 0 {
		burst := l.Burst
		if burst <= 0 {
			burst = int(min(max(1, math.Ceil(l.Rate)), math.MaxInt32))
		}
		m.bucket = rate.NewLimiter(rate.Limit(l.Rate), burst)
	}
	if l.Bandwidth > 0 {
		for i := range m.bytes {
			m.bytes[i] = rate.NewLimiter(rate.Limit(float64(l.Bandwidth)/8), l.BandwidthBurst)
			m.datagrams[i] = rate.NewLimiter(rate.Limit(float64(l.Bandwidth)/8), l.BandwidthBurst)
		}
	}
	return m
}

// Bytes gives the limiters of all bytes that meters bound together, from the client
// and to it; nil where none does.
func Bytes(meters ...*Meter) (up, down []*rate.Limiter) {
	return limiters(meters, func(m *Meter) *[2]*rate.Limiter { return &m.bytes })
}

// Datagrams is Bytes for those of datagrams alone.
func Datagrams(meters ...*Meter) (up, down []*rate.Limiter) {
	return limiters(meters, func(m *Meter) *[2]*rate.Limiter { return &m.datagrams })
}

func limiters(meters []*Meter, of func(*Meter) *[2]*rate.Limiter) (up, down []*rate.Limiter) {
	for _, m := range meters {
		if m != nil && m.limits.Bandwidth > 0 {
			both := of(m)
			up, down = append(up, both[0]), append(down, both[1])
		}
	}
	return up, down
}

// Begin admits one more (a request, a tunnel, an association), to be given back by End, or returns an error that wraps
// ErrLimit. One that is refused counts for nothing.
func (m *Meter) Begin() error {
	if m == nil {
		return nil
	}
	if n := m.open.Add(1); m.limits.Connections > 0 && n > int64(m.limits.Connections) {
		m.open.Add(-1)
		return &limited{fmt.Sprintf("%d connections are open", m.limits.Connections), time.Second}
	}
	if m.bucket == nil {
		return nil
	}
	now := m.now()
	if m.bucket.AllowN(now, 1) {
		return nil
	}
	m.open.Add(-1)
	missing := max(0, 1-m.bucket.TokensAt(now))
	// Not above a day: what is over that is no time that anybody waits.
	wait := min(math.Ceil(missing/m.limits.Rate), (24 * time.Hour).Seconds())
	return &limited{fmt.Sprintf("more than %g in a second", m.limits.Rate), max(time.Second, time.Duration(wait)*time.Second)}
}

// End takes back one that Begin admitted.
func (m *Meter) End() {
	if m != nil {
		m.open.Add(-1)
	}
}

// Open returns how many are open.
func (m *Meter) Open() int64 {
	if m == nil {
		return 0
	}
	return m.open.Load()
}

// limited is an ErrLimit with the time until it is worth trying again.
type limited struct {
	what  string
	after time.Duration
}

func (l *limited) Error() string { return ErrLimit.Error() + ": " + l.what }
func (l *limited) Unwrap() error { return ErrLimit }

// RetryAfter returns how long who got this error from Begin should wait, in whole seconds and at least one; 0 for an error
// that is none of Begin's.
func RetryAfter(err error) time.Duration {
	if l := (*limited)(nil); errors.As(err, &l) {
		return l.after
	}
	return 0
}
