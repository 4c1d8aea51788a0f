package resolve

import (
	"context"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"wayout/selection"

	"github.com/miekg/dns"
)

func put(c *cache, name string, at, until int64) {
	set, f, lead := c.join(question{name: name}, at)
	if !lead {
		panic(fmt.Sprint("nobody else asks: ", set, f))
	}
	c.land(f, &rrset{at: at, until: until, addrs: []netip.Addr{netip.IPv4Unspecified()}})
}

// names counts what the cache holds: in its chains, in its rings and as flights.
func (c *cache) names() (chained, ringed, flying int) {
	for i := range c.buckets {
		for e := c.buckets[i].Load(); e != nil; e = e.next.Load() {
			chained++
		}
	}
	for i := range c.shard {
		ringed += len(c.shard[i].ring)
		flying += len(c.shard[i].flights)
	}
	return chained, ringed, flying
}

func TestCacheIsBounded(t *testing.T) {
	for _, size := range []int{1, 16, 100, 1000} {
		c := newCache(size)
		bound := (size + shards - 1) / shards * shards
		put(c, "hot", 0, 1e9)
		for i := range 20 * bound {
			if size >= 100 && c.getString("hot", 1)[v4] == nil { // in use, so it stays
				t.Fatalf("size %d: the name in use went with name %d", size, i)
			}
			put(c, "n"+strconv.Itoa(i), 1, 1e9)
		}
		chained, ringed, flying := c.names()
		if chained != ringed || chained > bound || chained < bound*9/10 || flying != 0 {
			t.Errorf("size %d: %d names in chains, %d in rings, %d flights; want %d", size, chained, ringed, flying, bound)
		}
	}
}

func (c *cache) getString(name string, now int64) [2]*rrset { return c.get([]byte(name), now) }

// What has run out goes before what is good, also when it was in use.
func TestCacheDropsWhatIsOver(t *testing.T) {
	c := newCache(2 * shards)
	// Three names of one shard, which has room for two.
	var names []string
	for i := 0; len(names) < 3; i++ {
		if s := "n" + strconv.Itoa(i); c.shardOf(hashOf(c, s)) == &c.shard[0] {
			names = append(names, s)
		}
	}
	put(c, names[0], 0, 100)
	put(c, names[1], 0, 10)
	c.getString(names[0], 5)
	c.getString(names[1], 5)
	put(c, names[2], 50, 100)
	if c.getString(names[0], 60)[v4] == nil || c.getString(names[2], 60)[v4] == nil {
		t.Error("a good name has gone")
	}
	if e := c.find([]byte(names[1]), hashOf(c, names[1])); e != nil {
		t.Error("the name that had run out is still there")
	}
}

// What may yet be given where no server answers is kept as what is good is.
func TestCacheKeepsWhatIsStale(t *testing.T) {
	c := newCache(2 * shards)
	var names []string
	for i := 0; len(names) < 3; i++ {
		if s := "n" + strconv.Itoa(i); c.shardOf(hashOf(c, s)) == &c.shard[0] {
			names = append(names, s)
		}
	}
	stale := &rrset{at: 0, until: 10, stale: 100, addrs: []netip.Addr{netip.IPv4Unspecified()}}
	q := question{name: names[0]}
	_, f, _ := c.join(q, 0)
	c.land(f, stale)
	put(c, names[1], 0, 100)
	c.getString(names[0], 5)
	put(c, names[2], 50, 100)
	if c.stale(names[0], 60)[v4] != stale || c.getString(names[0], 60)[v4] != nil {
		t.Error("the name that is stale has gone, or is good")
	}
	if c.stale(names[0], 100)[v4] != nil {
		t.Error("stale for longer than it may be")
	}
	// A failure that is not to be remembered (none was asked) changes nothing; one that is gives the old answer.
	_, f, _ = c.join(q, 60)
	c.land(f, &rrset{kind: failed})
	if f.set.kind != failed || c.stale(names[0], 60)[v4] != stale {
		t.Errorf("%+v", f.set)
	}
	_, f, _ = c.join(q, 80)
	c.land(f, &rrset{kind: failed, at: 80, until: 81})
	if f.set.kind != found || f.set.at != 80 || f.set.until != 100 || c.getString(names[0], 99)[v4] != f.set {
		t.Errorf("%+v", f.set)
	}
}

func TestCacheUnderWay(t *testing.T) {
	c := newCache(100)
	q := question{name: "www.test", family: v6}
	_, f, lead := c.join(q, 5)
	if !lead || f.start != 5 {
		t.Fatalf("%v, %+v", lead, f)
	}
	if _, g, lead := c.join(q, 6); lead || g != f {
		t.Error("the second does not join the first")
	}
	if _, g, lead := c.join(question{name: "www.test", family: v4}, 6); !lead || g == f {
		t.Error("the other family is another question")
	}
	set := &rrset{at: 7, until: 10}
	c.land(f, set)
	<-f.done
	if got, g, lead := c.join(q, 8); got != set || g != nil || lead {
		t.Error("what is known is asked again")
	}
	if c.getString("www.test", 9)[v6] != set || c.getString("www.test", 10)[v6] != nil {
		t.Error("known for another time than it said")
	}
	if _, g, lead := c.join(q, 10); !lead || g == f {
		t.Error("what has run out is not asked")
	}
}

// Readers without a lock beside writers that evict: what is found is what was put under that name.
func TestCacheConcurrently(t *testing.T) {
	c := newCache(64)
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	const names = 500
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	for w := range 4 {
		writers.Go(func() {
			for i := range 20 * names {
				n := (i*7 + w*13) % names
				_, f, lead := c.join(question{name: "n" + strconv.Itoa(n)}, int64(i))
				if lead {
					c.land(f, &rrset{at: int64(i), until: int64(i) + 3, addrs: []netip.Addr{addr(n)}})
				}
			}
		})
		readers.Go(func() {
			for i := w; ; i++ {
				n := i % names
				if s := c.getString("n"+strconv.Itoa(n), 0)[v4]; s != nil && s.addrs[0] != addr(n) {
					t.Errorf("name %d has %v", n, s.addrs)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
}

// warm is a resolver that knows www.example.com, both families, and the same by its search list, until the clock stops.
func warm(tb testing.TB) *Resolver {
	tb.Helper()
	r := cold(tb)
	heat(tb, r)
	return r
}

// heat makes a resolver know them.
func heat(tb testing.TB, r *Resolver) {
	tb.Helper()
	for _, host := range []string{"www.example.com", "www"} {
		if _, err := r.Lookup(context.Background(), host, selection.V4|selection.V6); err != nil {
			tb.Fatal(err)
		}
	}
}

// cold is a resolver that knows nothing yet.
func cold(tb testing.TB) *Resolver {
	tb.Helper()
	dir := tb.TempDir()
	conf := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 192.0.2.1\nsearch a.test example.com\n"), 0o600); err != nil {
		tb.Fatal(err)
	}
	r := New(Options{
		ResolvConf: conf, Hosts: filepath.Join(dir, "hosts"), Refresh: time.Hour, MaxNegTTL: time.Hour, Dial: pipe,
		ServeStale: time.Hour, Static: map[string][]netip.Addr{"pinned": {netip.IPv4Unspecified(), netip.IPv6Unspecified()}},
	})
	tb.Cleanup(r.Close)
	return r
}

// pipe is a server in a goroutine, which knows www.example.com.
func pipe(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	go func() {
		buf := make([]byte, datagram)
		n, err := far.Read(buf)
		if err != nil {
			return
		}
		var req dns.Msg
		if err := req.Unpack(buf[:n]); err != nil {
			panic(err)
		}
		m := new(dns.Msg).SetReply(&req)
		m.RecursionAvailable = true
		q := req.Question[0]
		hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 3600}
		switch {
		case q.Name != "www.example.com.":
			m.Rcode = dns.RcodeNameError
			m.Ns = append(m.Ns, &dns.SOA{Hdr: dns.RR_Header{Name: "test.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 3600}, Ns: ".", Mbox: ".", Minttl: 3600})
		case q.Qtype == dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: hdr, A: net.IPv4(192, 0, 2, 1)})
		default:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: hdr, AAAA: net.ParseIP("2001:db8::1")})
		}
		b, err := m.Pack()
		if err != nil {
			panic(err)
		}
		_, _ = far.Write(b)
	}()
	return near, nil
}

// ways are the kinds of lookup that must make no garbage.
func ways() map[string]string {
	return map[string]string{
		"hit": "www.example.com", "upper": "WWW.Example.COM", "absolute": "www.example.com.", "search": "www", "localhost": "localhost", "static": "Pinned",
	}
}

func TestHitDoesNotAllocate(t *testing.T) {
	r := warm(t)
	bound := r.Bound(pipe)
	heat(t, bound)
	ctx := context.Background()
	for what, r := range map[string]*Resolver{"parent": r, "bound": bound} {
		for way, host := range ways() {
			if n := testing.AllocsPerRun(100, func() {
				if a, err := r.Lookup(ctx, host, selection.V4|selection.V6); err != nil || len(a.V4) != 1 || len(a.V6) != 1 {
					t.Fatal(a, err)
				}
				if !r.Ready(host, selection.V4|selection.V6) {
					t.Fatal("not ready")
				}
			}); n != 0 {
				t.Errorf("%s, %s: %v allocations", what, way, n)
			}
		}
	}
}

// A bound resolver's cache is a sixteenth of its parent's, and there from the first question on.
func TestBoundCache(t *testing.T) {
	for size, want := range map[int]int{0: DefaultSize / 16, 3200: 208, 100: 64} { // 200 and the grain of 16
		r := New(Options{Servers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}, Size: size})
		b := r.Bound(pipe)
		if a, err := b.Lookup(context.Background(), "localhost", selection.V4); err != nil || b.Ready("www.example.com", selection.V4) {
			t.Fatal(a, err)
		}
		if b.current.Load() != nil {
			t.Error("a cache before the first question")
		}
		if _, err := b.Lookup(context.Background(), "www.example.com", selection.V4); err != nil {
			t.Fatal(err)
		}
		if c := b.current.Load().cache; c.per*shards != want || c == r.current.Load().cache {
			t.Errorf("size %d: room for %d, want %d", size, c.per*shards, want)
		}
		r.Close()
	}
}

func TestLiteralAllocatesItsAnswerAlone(t *testing.T) {
	r := warm(t)
	ctx := context.Background()
	for _, host := range []string{"192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"} {
		if n := testing.AllocsPerRun(100, func() {
			if a, err := r.Lookup(ctx, host, selection.V4|selection.V6); err != nil || len(a.V4)+len(a.V6) != 1 {
				t.Fatal(a, err)
			}
		}); n > 1 {
			t.Errorf("%s: %v allocations", host, n)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	r := warm(b)
	ctx := context.Background()
	for way, host := range ways() {
		b.Run(way, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.Lookup(ctx, host, selection.V4|selection.V6); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := r.Lookup(ctx, "www.example.com", selection.V4|selection.V6); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

func BenchmarkLookupMiss(b *testing.B) {
	r := warm(b)
	ctx := context.Background()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := r.Lookup(ctx, "n"+strconv.Itoa(i)+".test.", selection.V4); err == nil {
			b.Fatal("no such name")
		}
	}
}

func hashOf(c *cache, name string) uint64 { return maphash.String(c.seed, name) }
