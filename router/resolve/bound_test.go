package resolve_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/miekg/dns"
)

// counted is n's dial function with a count of its calls.
func counted(n *network) (dial func(context.Context, string, string) (net.Conn, error), calls *atomic.Int32) {
	calls = new(atomic.Int32)
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		calls.Add(1)
		return n.dial(ctx, network, addr)
	}, calls
}

// Each resolver's queries go by its own dial function, over UDP and TCP, after failures too; and what one was told, the others
// do not know.
func TestBoundDial(t *testing.T) {
	// Three networks in which the same server says different things.
	var dials [3]func(context.Context, string, string) (net.Conn, error)
	var calls [3]*atomic.Int32
	for i := range dials {
		z := zone{records: []string{"www.test. 60 A 192.0.2.1" + strconv.Itoa(i)}}
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.2": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			if w.RemoteAddr().Network() == "tcp" {
				z.ServeDNS(w, req)
				return
			}
			_, _ = w.Write(with(req, func(m *dns.Msg) { m.Truncated = true }))
		})})
		dials[i], calls[i] = counted(n)
	}
	parent := resolve.New(resolve.Options{
		Dial: dials[0], Servers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53")},
	})
	defer parent.Close()
	resolvers := []*resolve.Resolver{parent, parent.Bound(dials[1]), parent.Bound(dials[2])}
	for i, r := range resolvers {
		if r.Ready("www.test", selection.V4) {
			t.Errorf("resolver %d knows what another was told", i)
		}
		var want [3]int32
		for j := range calls {
			calls[j].Store(0)
		}
		want[i] = 3 // 192.0.2.1 in vain, 192.0.2.2 over UDP and TCP
		for range 2 {
			equal(t, "answer", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.1" + strconv.Itoa(i))})
			equal(t, "ready", r.Ready("www.test", selection.V4), true)
			for j := range calls {
				equal(t, "calls of dial "+strconv.Itoa(j)+" for resolver "+strconv.Itoa(i), calls[j].Load(), want[j])
			}
		}
	}

	// One whose dial function fails, and one that has none, fail: nothing else is tried.
	for j := range calls {
		calls[j].Store(0)
	}
	down := errors.New("path is down")
	broken := parent.Bound(func(context.Context, string, string) (net.Conn, error) { return nil, down })
	fails(t, broken, "www.test", selection.V4, resolve.ErrServer, "path is down")
	if _, err := broken.Lookup(t.Context(), "www.test", selection.V4); !errors.Is(err, down) {
		t.Errorf("%v does not wrap what dial said", err)
	}
	fails(t, parent.Bound(nil), "www.test", selection.V4, resolve.ErrServer, "no dial function")
	// What is bound to a bound one is bound to the parent, by its own dial function.
	again := broken.Bound(dials[1])
	broken.Close()
	equal(t, "answer", lookup(t, again, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.11")})
	for j, want := range []int32{0, 3, 0} {
		equal(t, "calls of dial "+strconv.Itoa(j), calls[j].Load(), want)
	}
}

// A server that one path does not reach is not held to be dead on another.
func TestBoundServersApart(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{
		"192.0.2.1": zone{records: []string{"a.test. 60 A 192.0.2.10", "b.test. 60 A 192.0.2.11"}},
		"192.0.2.2": zone{records: []string{"a.test. 60 A 192.0.2.20", "b.test. 60 A 192.0.2.21"}},
	})
	r := n.resolver(two)
	b := r.Bound(func(ctx context.Context, network, addr string) (net.Conn, error) {
		if addr == "192.0.2.1:53" {
			return nil, errors.New("no route")
		}
		return n.dial(ctx, network, addr)
	})
	equal(t, "bound", lookup(t, b, "a.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.20")})
	equal(t, "parent", lookup(t, r, "a.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	n.asked(false)
	lookup(t, b, "b.test", selection.V4)
	lookup(t, r, "b.test", selection.V4)
	equal(t, "asked", n.asked(false), []string{"192.0.2.2 udp A b.test.", "192.0.2.1 udp A b.test."})
}

// The files are the parent's, and so are their changes, for those that have put questions and those that have not.
func TestBoundReload(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{
		"192.0.2.1": zone{records: []string{"www.test. 60 A 192.0.2.10", "www.a.test. 60 A 192.0.2.11", "www.a.test. 60 AAAA 2001:db8::11"}},
		"192.0.2.2": zone{records: []string{"www.test. 60 A 192.0.2.20"}},
	})
	var resolv, hosts string
	r := n.resolver("", func(o *resolve.Options) {
		resolv, hosts = files(t, o)
		write(t, resolv, one+"search a.test\n")
		write(t, hosts, "10.0.0.1 pinned\n")
	})
	dial, calls := counted(n)
	used, fresh := r.Bound(dial), r.Bound(dial)
	equal(t, "search list", lookup(t, used, "www", both), resolve.Answer{V4: addrs("192.0.2.11"), V6: addrs("2001:db8::11")})
	equal(t, "hosts", lookup(t, used, "pinned", selection.V4), resolve.Answer{V4: addrs("10.0.0.1")})
	equal(t, "answer", lookup(t, used, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})

	write(t, hosts, "10.0.0.2 pinned\n")
	asked := calls.Load()
	r.Reload()
	for _, b := range []*resolve.Resolver{used, fresh} {
		equal(t, "hosts changed", lookup(t, b, "pinned", selection.V4), resolve.Answer{V4: addrs("10.0.0.2")})
		equal(t, "ready", b.Ready("pinned", both), true)
	}
	equal(t, "what it knew is kept", used.Ready("www.test", selection.V4), true)
	equal(t, "questions", calls.Load(), asked)

	write(t, resolv, "nameserver 192.0.2.2\noptions no-aaaa\n")
	used.Reload() // the parent's, called there
	for _, b := range []*resolve.Resolver{r, used, fresh} {
		equal(t, "ready after a change of servers", b.Ready("www.test", selection.V4), false)
		equal(t, "ready for what is not asked", b.Ready("www.test", selection.V6), true)
		equal(t, "other servers", lookup(t, b, "www.test", both), resolve.Answer{V4: addrs("192.0.2.20")})
		fails(t, b, "www", selection.V4, resolve.ErrNotFound)
	}
}

// A bound resolver has the options of its parent.
func TestBoundOptions(t *testing.T) {
	var s fickle
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": &s})
	r := n.resolver("", c.on, queryCase, serveStale(time.Hour), given("192.0.2.1:53"), func(o *resolve.Options) {
		o.Dial = nil
		o.MaxTTL = 10 * time.Second
	})
	b := r.Bound(n.dial)
	s.set(casedZone().ServeDNS)
	lookup(t, b, cased, selection.V4)
	if log := n.asked(false); len(log) != 1 || log[0] == plain(log)[0] {
		t.Errorf("asked %q", log)
	}
	c.move(10 * time.Second)
	equal(t, "ready", b.Ready(cased, selection.V4), false)
	s.set(rcode(dns.RcodeServerFailure))
	equal(t, "stale", lookup(t, b, cased, selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
}

func TestBoundClose(t *testing.T) {
	var mu sync.Mutex
	arrived := make(chan struct{}, 8)
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if req.Question[0].Name == "slow.test." {
			arrived <- struct{}{}
			return
		}
		mu.Lock()
		defer mu.Unlock()
		good().ServeDNS(w, req)
	})})
	r := n.resolver(one, func(o *resolve.Options) { o.Timeout = time.Hour })
	wait := func(b *resolve.Resolver) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := b.Lookup(context.Background(), "slow.test", selection.V4)
			done <- err
		}()
		<-arrived
		return done
	}
	closed := func(what string, done chan error) {
		t.Helper()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	first, second := r.Bound(n.dial), r.Bound(n.dial)
	one, other, parents := wait(first), wait(second), wait(r)
	lookup(t, first, "www.test", selection.V4)
	first.Close()
	closed("closed by itself", one)
	fails(t, first, "other.test", selection.V4, net.ErrClosed)
	lookup(t, first, "www.test", selection.V4) // a hit needs nothing that was closed
	first.Close()

	lookup(t, second, "www.test", selection.V4) // the others live on
	lookup(t, r, "www.test", selection.V4)
	r.Close()
	closed("closed with its parent", other)
	closed("the parent", parents)
	fails(t, second, "other.test", selection.V4, net.ErrClosed)
	fails(t, r.Bound(n.dial), "other.test", selection.V4, net.ErrClosed)
	second.Close()
}

// Close waits for what runs of the bound resolvers, as it does for what runs of its own.
func TestBoundCloseWaits(t *testing.T) {
	n := newNetwork(t, nil)
	r := n.resolver(one)
	dialling := make(chan struct{})
	var over atomic.Bool
	b := r.Bound(func(ctx context.Context, _, _ string) (net.Conn, error) {
		close(dialling)
		<-ctx.Done()
		time.Sleep(50 * time.Millisecond) // longer than a Close takes that does not wait
		over.Store(true)
		return nil, ctx.Err()
	})
	done := make(chan error)
	go func() {
		_, err := b.Lookup(context.Background(), "www.test", selection.V4)
		done <- err
	}()
	<-dialling
	r.Close()
	equal(t, "the query is over", over.Load(), true)
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// Bound resolvers come, ask and go while the parent is closed.
func TestBoundConcurrently(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": good()})
	r := n.resolver(one)
	var work sync.WaitGroup
	asked := make(chan struct{}, 8)
	for range 8 {
		work.Go(func() {
			for i := 0; ; i++ {
				b := r.Bound(n.dial)
				_, err := b.Lookup(context.Background(), "www.test", selection.V4)
				if i%2 == 0 {
					b.Close()
				}
				if i == 3 {
					asked <- struct{}{}
				}
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 8 {
		<-asked
	}
	r.Close()
	work.Wait()
}

// An idle bound resolver is small, has no goroutine, and leaves nothing behind when it is closed.
func TestBoundIsCheap(t *testing.T) {
	n := newNetwork(t, nil)
	hosts := map[string][]netip.Addr{"pinned.test": addrs("192.0.2.1")}
	r := n.resolver(one+"search a.test b.test\n", func(o *resolve.Options) { o.Static = hosts })
	const count = 10_000
	list := make([]*resolve.Resolver, count)
	routines, before := runtime.NumGoroutine(), heap()
	for i := range list {
		list[i] = r.Bound(n.dial)
		// What needs no question makes nothing.
		lookup(t, list[i], "pinned.test", selection.V4)
		if list[i].Ready("www.test", both) {
			t.Fatal("ready for a name that nobody has asked for")
		}
	}
	each := int64(heap()-before) / count
	t.Logf("%d bytes each", each)
	if each >= 4096 {
		t.Errorf("%d bytes each", each)
	}
	if now := runtime.NumGoroutine(); now > routines {
		t.Errorf("%d goroutines, %d before", now, routines)
	}
	for _, b := range list {
		b.Close()
	}
	clear(list)
	if left := int64(heap()) - int64(before); left > count*256 { // the parent's tables stay as large as they were
		t.Errorf("%d bytes left", left)
	}
}

// heap is what is in use once garbage is gone.
func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
