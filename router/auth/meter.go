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
	Bandwidth   uint64  // bits a second, in each direction
}

// A Meter counts what its Limits bound. Its methods may be called from many goroutines, and on a nil Meter, which has no
// limits.
type Meter struct {
	limits Limits
	bucket *rate.Limiter // nil: any rate
	now    func() time.Time
	open   atomic.Int64
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
	return m
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

// Bandwidth returns the bits a second that are allowed in each direction, or 0 for any number.
func (m *Meter) Bandwidth() uint64 {
	if m == nil {
		return 0
	}
	return m.limits.Bandwidth
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

// Narrower returns the smaller of two bandwidths, of which 0 is none.
func Narrower(a, b uint64) uint64 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
