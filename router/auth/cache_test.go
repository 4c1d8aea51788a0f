package auth

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func testGroup(t *testing.T, o Options) *Group {
	t.Helper()
	const hash = "$2a$04$QyNPVbf81.wm/tRBq4W3EeCARjlnYmVDypnJW0taqz.t6hcESSx4W" // of "secret"
	g, err := NewGroup("team", []Credential{{User: User{Name: "alice"}, Hash: hash}}, o)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// fill takes all slots of the gate, so that whatever needs hashing has to wait; the result gives them back.
func fill(g *Group) func() {
	for range cap(g.gate.slots) {
		g.gate.slots <- struct{}{}
	}
	return func() {
		for range cap(g.gate.slots) {
			<-g.gate.slots
		}
	}
}

// hashless verifies while nothing can be hashed: it succeeds from the cache alone.
func hashless(t *testing.T, g *Group, name, password string) error {
	t.Helper()
	defer fill(g)()
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	<-ctx.Done()
	_, err := g.Verify(ctx, name, password)
	return err
}

func TestCacheLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGroup(t, Options{})
		if _, err := g.Verify(t.Context(), "alice", "secret"); err != nil {
			t.Fatal(err)
		}
		if err := hashless(t, g, "alice", "secret"); err != nil {
			t.Fatalf("right after: %v", err)
		}
		time.Sleep(DefaultCacheTTL - 10*time.Nanosecond)
		if err := hashless(t, g, "alice", "secret"); err != nil {
			t.Fatalf("before the end of its life: %v", err)
		}
		time.Sleep(time.Second)
		if err := hashless(t, g, "alice", "secret"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("after its life: %v, want a wait for hashing", err)
		}
		if _, err := g.Verify(t.Context(), "alice", "secret"); err != nil {
			t.Fatalf("hashed again: %v", err)
		}
	})
}

func TestCacheKeepsSuccessesOnly(t *testing.T) {
	g := testGroup(t, Options{})
	for _, c := range [][2]string{{"alice", "wrong"}, {"mallory", "secret"}, {"", ""}} {
		if _, err := g.Verify(t.Context(), c[0], c[1]); !errors.Is(err, ErrAuth) {
			t.Fatalf("%q: %v", c, err)
		}
	}
	if n := g.cache.len(); n != 0 {
		t.Fatalf("%d entries for failures", n)
	}
	off := testGroup(t, Options{CacheTTL: -1})
	if _, err := off.Verify(t.Context(), "alice", "secret"); err != nil {
		t.Fatal(err)
	}
	if n := off.cache.len(); n != 0 {
		t.Fatalf("%d entries in a cache that is off", n)
	}
}

func TestCacheBound(t *testing.T) {
	c := newCache(time.Hour, 1024)
	u := &User{Name: "alice"}
	for i := range 10000 {
		tg := c.tag("alice", fmt.Sprint(i))
		c.put(&tg, u)
		if c.get(&tg) != u {
			t.Fatalf("entry %d is not there right after", i)
		}
	}
	if n := c.len(); n > 1024 || n < 900 {
		t.Fatalf("%d entries, want about 1024 and no more", n)
	}
	same := c.tag("alice", "9999")
	before := c.len()
	for range 100 {
		c.put(&same, u)
	}
	if n := c.len(); n != before {
		t.Fatalf("one credential again and again: %d entries, had %d", n, before)
	}
}

func TestTags(t *testing.T) {
	c, other := newCache(time.Hour, 64), newCache(time.Hour, 64)
	seen := map[tag]string{}
	for _, p := range [][2]string{{"a", "bc"}, {"ab", "c"}, {"abc", ""}, {"", "abc"}, {"a", "bc\x00"}, {"a\x00", "bc"}, {"a", "\x00bc"}} {
		tg := c.tag(p[0], p[1])
		if was, ok := seen[tg]; ok {
			t.Errorf("%q and %s have one tag", p, was)
		}
		seen[tg] = fmt.Sprintf("%q", p)
		if tg != c.tag(p[0], p[1]) {
			t.Errorf("%q has two tags", p)
		}
		if tg == other.tag(p[0], p[1]) {
			t.Errorf("%q has the same tag under another key", p)
		}
	}
}

// Clients that bring one credential at one time cost one computation.
func TestSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGroup(t, Options{Gate: NewGate(1), CacheTTL: -1})
		open := fill(g)
		const clients = 50
		errs := make(chan error, 2*clients)
		for i := range 2 * clients {
			pass := "secret"
			if i%2 == 1 {
				pass = "wrong"
			}
			go func() {
				_, err := g.Verify(t.Context(), "alice", pass)
				errs <- err
			}()
		}
		synctest.Wait()
		if n := len(g.flying); n != 2 {
			t.Fatalf("%d computations for two credentials", n)
		}
		open()
		bad := 0
		for range 2 * clients {
			if err := <-errs; errors.Is(err, ErrAuth) {
				bad++
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if bad != clients {
			t.Fatalf("%d refused, want %d", bad, clients)
		}
		if len(g.flying) != 0 {
			t.Fatal("a flight is left behind")
		}
	})
}

// The client that computes for others goes away: the others get their answer all the same.
func TestLeaderGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGroup(t, Options{Gate: NewGate(1)})
		open := fill(g)
		ctx, cancel := context.WithCancel(t.Context())
		verify := func(ctx context.Context) <-chan error {
			c := make(chan error, 1)
			go func() {
				_, err := g.Verify(ctx, "alice", "secret")
				c <- err
			}()
			synctest.Wait()
			return c
		}
		leader, second := verify(ctx), verify(t.Context())
		gone, stop := context.WithCancel(t.Context())
		third := verify(gone)

		stop()
		if err := <-third; !errors.Is(err, context.Canceled) || errors.Is(err, ErrAuth) {
			t.Fatalf("the third: %v, want its context's error", err)
		}
		cancel()
		if err := <-leader; !errors.Is(err, context.Canceled) || errors.Is(err, ErrAuth) {
			t.Fatalf("the leader: %v, want its context's error", err)
		}
		open()
		if err := <-second; err != nil {
			t.Fatalf("the second: %v", err)
		}
	})
}

func TestGateBounds(t *testing.T) {
	g := testGroup(t, Options{Gate: NewGate(3)})
	if n := cap(g.gate.slots); n != 3 {
		t.Fatalf("%d slots, want 3", n)
	}
	if n := cap(NewGate(0).slots); n < 1 {
		t.Fatalf("%d slots by default", n)
	}
	// With every slot taken, neither a known nor an unknown name is hashed.
	for _, name := range []string{"alice", "mallory"} {
		if err := hashless(t, g, name, "secret"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v, want to wait", name, err)
		}
	}
}

// An unknown name costs what a user of the group costs, and always the same user.
func TestStranger(t *testing.T) {
	g := testGroup(t, Options{})
	if g.stranger("mallory") != g.secrets[0] {
		t.Fatal("a stranger's work is not a member's")
	}
	many, err := NewGroup("many", []Credential{
		{User: User{Name: "a"}, Hash: "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAA"},
		{User: User{Name: "b"}, Hash: "$argon2id$v=19$m=16,t=1,p=1$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAA"},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	took := map[*secret]int{}
	for i := range 100 {
		name := fmt.Sprint("x", i)
		s := many.stranger(name)
		if s != many.stranger(name) {
			t.Fatal("the work for one name changes")
		}
		took[s]++
	}
	if len(took) != 2 {
		t.Fatalf("strangers look like %d of 2 users", len(took))
	}
	empty, err := NewGroup("empty", nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s := empty.stranger("x"); s.memory != defaultMemory || s.time != defaultTime {
		t.Fatalf("in an empty group: m=%d t=%d", s.memory, s.time)
	}
}

// len counts the entries, expired ones too.
func (c *cache) len() int {
	n := 0
	for i := range c.shard {
		if m := c.shard[i].m.Load(); m != nil {
			n += len(*m)
		}
	}
	return n
}
