package resolve

import (
	"hash/maphash"
	"math/bits"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// The two families as positions of an array.
const (
	v4 = iota
	v6
)

// maxAddrs bounds the addresses of one name and family that are kept.
const maxAddrs = 64

// kind is what became of a question. A greater one weighs more as the reason why a name has no address.
type kind uint8

const (
	found  kind = iota
	noName      // the name does not exist
	noData      // it exists, without such a record
	failed      // nobody could say
)

// rrset is what is known of one name and family. It is not changed once it is made.
type rrset struct {
	kind   kind
	addrs  []netip.Addr
	mapped []netip.Addr // IPv4 addresses that AAAA records spelt as ::ffff:a.b.c.d
	at     int64        // when it became known
	until  int64        // when it is to be asked anew
	stale  int64        // until when it may be given all the same where no server answers (see Options.ServeStale)
	server string       // who said so
	rcode  string
	cause  error // of failed: ErrTimeout or ErrServer
	err    error // what it came from, or nil
}

// fail makes the error of a lookup that ends with this set.
func (s *rrset) fail(host string) *Error {
	e := &Error{Host: host, Server: s.server, Rcode: s.rcode, Err: s.err}
	switch s.kind {
	case noName:
		e.Kind = ErrNotFound
	case failed:
		e.Kind = s.cause
	default:
		e.Kind = ErrNoData
	}
	return e
}

// The times of RFC 8767 section 5.
const (
	staleAfter = 1800 * time.Millisecond // how long servers are waited for before an old answer is given: client response timer
	staleFor   = 30 * time.Second        // how long that is the answer before they are asked anew: failure recheck timer
)

// again is an old set given anew since the servers failed, at the time now.
func (s *rrset) again(now int64) *rrset {
	next := *s
	next.at, next.until = now, min(now+int64(staleFor), s.stale)
	return &next
}

// question is a name (lower case, no trailing dot) and a family, v4 or v6.
type question struct {
	name   string
	family int
}

// flight is a question under way.
type flight struct {
	question
	start int64
	done  chan struct{} // closed when set is there
	set   *rrset
}

// shards is how many locks the cache has, a power of two.
const shards = 16

// cache remembers what is known of names, a bounded number of them. It is a hash table of chains whose readers take no lock:
// links and sets are atomic pointers. Writers take the lock of the shard that the name falls into. When a shard is full, a
// clock hand goes round its names and removes the first that has not been used since the hand last passed, so that a flood of
// names asked once does not push out those in use.
type cache struct {
	seed    maphash.Seed
	buckets []atomic.Pointer[entry] // a power of two, at least shards: a bucket belongs to one shard
	per     int                     // names in a shard, at most
	shard   [shards]shard
}

// shard has its map and its ring from when it needs them: of many caches most hold few names.
type shard struct {
	mu      sync.Mutex
	flights map[question]*flight
	ring    []*entry
	hand    int
	_       [64]byte // the next lock is not on this one's cache line
}

type entry struct {
	name string
	hash uint64
	next atomic.Pointer[entry]
	sets [2]atomic.Pointer[rrset]
	used atomic.Bool
}

func newCache(size int) *cache {
	per := max(1, (size+shards-1)/shards)
	return &cache{seed: maphash.MakeSeed(), buckets: make([]atomic.Pointer[entry], shards<<bits.Len(uint(per-1))), per: per}
}

func (c *cache) bucket(hash uint64) *atomic.Pointer[entry] {
	return &c.buckets[hash&uint64(len(c.buckets)-1)]
}

func (c *cache) shardOf(hash uint64) *shard { return &c.shard[hash%shards] }

func (c *cache) find(name []byte, hash uint64) *entry {
	for e := c.bucket(hash).Load(); e != nil; e = e.next.Load() {
		if e.hash == hash && e.name == string(name) {
			return e
		}
	}
	return nil
}

// get is what is known of name: a set for each family, nil where it is unknown or its time is over.
func (c *cache) get(name []byte, now int64) (sets [2]*rrset) {
	e := c.find(name, maphash.Bytes(c.seed, name))
	if e == nil {
		return sets
	}
	if !e.used.Load() { // a store for each hit would pass the cache line from core to core
		e.used.Store(true)
	}
	for i := range sets {
		if s := e.sets[i].Load(); s != nil && now < s.until {
			sets[i] = s
		}
	}
	return sets
}

// stale is what was known of name and may be given yet where no server answers: a set for each family, or nil.
func (c *cache) stale(name string, now int64) (sets [2]*rrset) {
	e := c.find([]byte(name), maphash.String(c.seed, name))
	if e == nil {
		return sets
	}
	for i := range sets {
		if s := e.sets[i].Load(); s != nil && now < s.stale {
			sets[i] = s
		}
	}
	return sets
}

// join finds who asks q already. Exactly one of the results is there: what is known after all, or the flight; lead says that
// the flight is the caller's to fly, and to end with land.
func (c *cache) join(q question, now int64) (set *rrset, f *flight, lead bool) {
	hash := maphash.String(c.seed, q.name)
	sh := c.shardOf(hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if e := c.find([]byte(q.name), hash); e != nil {
		if s := e.sets[q.family].Load(); s != nil && now < s.until {
			return s, nil, false
		}
	}
	if f = sh.flights[q]; f != nil {
		return nil, f, false
	}
	f = &flight{question: q, start: now, done: make(chan struct{})}
	if sh.flights == nil {
		sh.flights = map[question]*flight{}
	}
	sh.flights[q] = f
	return nil, f, true
}

// land ends a flight: its set is remembered, unless its time is over at once, and given to all who wait. In place of the failure
// of all servers that is the answer of before, where it may be.
func (c *cache) land(f *flight, set *rrset) {
	hash := maphash.String(c.seed, f.name)
	sh := c.shardOf(hash)
	sh.mu.Lock()
	delete(sh.flights, f.question)
	if set.until > set.at {
		e := c.find([]byte(f.name), hash)
		if e == nil {
			e = &entry{name: f.name, hash: hash}
			c.insert(sh, e, set.at)
		}
		if old := e.sets[f.family].Load(); set.kind == failed && old != nil && set.at < old.stale {
			set = old.again(set.at)
		}
		e.sets[f.family].Store(set)
	}
	sh.mu.Unlock()
	f.set = set
	close(f.done)
}

// insert links a name in, in the place of another when its shard is full. The shard is locked.
func (c *cache) insert(sh *shard, e *entry, now int64) {
	if len(sh.ring) < c.per {
		sh.ring = append(sh.ring, e)
	} else {
		// Twice round is enough unless readers mark names as fast as the hand clears them; then any will do.
		for range 2 * len(sh.ring) {
			old := sh.ring[sh.hand]
			if !old.used.Swap(false) || old.over(now) {
				break
			}
			sh.hand = (sh.hand + 1) % len(sh.ring)
		}
		c.unlink(sh.ring[sh.hand])
		sh.ring[sh.hand] = e
		sh.hand = (sh.hand + 1) % len(sh.ring)
	}
	b := c.bucket(e.hash)
	e.next.Store(b.Load())
	b.Store(e)
}

// over tells whether nothing that the entry holds is still good for anything.
func (e *entry) over(now int64) bool {
	for i := range e.sets {
		if s := e.sets[i].Load(); s != nil && now < max(s.until, s.stale) {
			return false
		}
	}
	return true
}

// unlink takes a name out of its chain. Its own link stays, so that a reader that stands on it gets on.
func (c *cache) unlink(e *entry) {
	for p := c.bucket(e.hash); ; {
		next := p.Load()
		if next == nil {
			return
		}
		if next == e {
			p.Store(e.next.Load())
			return
		}
		p = &next.next
	}
}
