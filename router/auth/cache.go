package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"sync"
	"sync/atomic"
	"time"
)

// shards is a power of two. Each shard's map is replaced as a whole, so reading takes no lock; a copy costs
// microseconds after milliseconds of hashing.
const shards = 64

// A tag stands for one user name with one password. Without the group's random key it says nothing of either.
type tag [sha256.Size]byte

type verified struct {
	user  *User
	until time.Time
}

// A cache remembers credentials that have been verified, for a short time, and never those that failed.
type cache struct {
	ttl   time.Duration
	limit int       // entries in one shard
	macs  sync.Pool // of *mac
	shard [shards]shard
}

type shard struct {
	mu sync.Mutex // held while m is replaced
	m  atomic.Pointer[map[tag]verified]
}

// A mac is what computing one tag needs: pooled, so that a hit allocates nothing.
type mac struct {
	h   hash.Hash
	msg []byte
	sum []byte
}

func newCache(ttl time.Duration, size int) *cache {
	key := make([]byte, sha256.Size)
	rand.Read(key) //nolint:errcheck // never fails: it ends the program instead
	c := &cache{ttl: ttl, limit: max(1, size/shards)}
	c.macs.New = func() any {
		return &mac{
			h:   hmac.New(sha256.New, key),
			msg: make([]byte, 0, 4+maxName+maxPassword),
			sum: make([]byte, 0, sha256.Size),
		}
	}
	return c
}

// tag is HMAC-SHA256 over the name's length, the name and the password: the length keeps ("ab", "c") from ("a", "bc"),
// whatever bytes they hold.
func (c *cache) tag(name, password string) tag {
	m := c.macs.Get().(*mac)
	m.msg = binary.BigEndian.AppendUint32(m.msg[:0], uint32(len(name)))
	m.msg = append(m.msg, name...)
	m.msg = append(m.msg, password...)
	m.h.Reset()
	m.h.Write(m.msg)
	m.sum = m.h.Sum(m.sum[:0])
	t := tag(m.sum)
	clear(m.msg)
	c.macs.Put(m)
	return t
}

func (c *cache) of(t *tag) *shard { return &c.shard[t[0]%shards] }

// get returns the user of a credential that was verified less than ttl ago.
func (c *cache) get(t *tag) *User {
	m := c.of(t).m.Load()
	if m == nil {
		return nil
	}
	v, ok := (*m)[*t]
	if !ok || !time.Now().Before(v.until) {
		return nil
	}
	return v.user
}

// put remembers a credential. A full shard loses what has expired, and one more at random when nothing has.
func (c *cache) put(t *tag, u *User) {
	if c.ttl <= 0 {
		return
	}
	now := time.Now()
	s := c.of(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	next := make(map[tag]verified)
	if m := s.m.Load(); m != nil {
		for k, v := range *m { // in random order
			if now.Before(v.until) && k != *t && len(next) < c.limit-1 {
				next[k] = v
			}
		}
	}
	next[*t] = verified{user: u, until: now.Add(c.ttl)}
	s.m.Store(&next)
}
