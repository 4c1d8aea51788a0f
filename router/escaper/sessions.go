package escaper

import (
	"sync"
	"time"

	"wayout/selection"
)

// Sessions knows how old sessions are that have a lifetime. All else of a
// session is worked out from its name. One Sessions serves every escaper of a
// daemon, so that a session moves on as a whole; it outlives reloads.
type Sessions struct {
	now    func() time.Time
	shards [sessionShards]sessionShard
}

const (
	sessionShards = 16
	// maxSessions is how many sessions a shard remembers. A session that is
	// forgotten begins again with its first path.
	maxSessions = 8192
)

type sessionShard struct {
	mu   sync.Mutex
	born map[uint64]life
	_    [40]byte // shards share no cache line
}

// life is a session's present generation.
type life struct {
	since      time.Time
	generation uint64
}

// NewSessions returns an empty memory.
func NewSessions() *Sessions { return &Sessions{now: time.Now} }

// generation says how many lifetimes of a request's session are over: each has
// a path of its own. It takes no lock for a session without a lifetime. What is
// read once for a request is used for all its steps.
func (s *Sessions) generation(r *Request) uint64 {
	o := &r.Selection.Session
	if o.Lifetime <= 0 {
		return 0
	}
	if r.generation == nil {
		g := s.age(selection.KeySession(r.Group+"/"+r.User, "", o.Name, 0), o.Lifetime)
		r.generation = &g
	}
	return *r.generation
}

func (s *Sessions) age(key uint64, lifetime time.Duration) uint64 {
	now := s.now()
	sh := &s.shards[key%sessionShards]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	l, known := sh.born[key]
	switch {
	case !known:
		sh.room(now)
		l = life{since: now}
	case now.Sub(l.since) >= lifetime:
		l = life{since: now, generation: l.generation + 1}
	default:
		return l.generation
	}
	if sh.born == nil {
		sh.born = map[uint64]life{}
	}
	sh.born[key] = l
	return l.generation
}

// room forgets a session when there are too many: the oldest of a few.
func (sh *sessionShard) room(now time.Time) {
	if len(sh.born) < maxSessions {
		return
	}
	const few = 16
	oldest, age, n := uint64(0), time.Duration(-1), 0
	for key, l := range sh.born { // in no order
		if d := now.Sub(l.since); d > age {
			oldest, age = key, d
		}
		if n++; n == few {
			break
		}
	}
	delete(sh.born, oldest)
}
