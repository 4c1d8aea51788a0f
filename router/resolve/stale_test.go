package resolve_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/miekg/dns"
)

// fickle is a server whose behaviour changes.
type fickle struct{ h atomic.Value }

func (f *fickle) set(h dns.HandlerFunc)                       { f.h.Store(h) }
func (f *fickle) ServeDNS(w dns.ResponseWriter, req *dns.Msg) { f.h.Load().(dns.HandlerFunc)(w, req) }

func serveStale(d time.Duration) func(*resolve.Options) {
	return func(o *resolve.Options) { o.ServeStale = d }
}

func TestServeStale(t *testing.T) {
	z := zone{records: []string{"www.test. 60 A 192.0.2.10", "six.test. 60 AAAA 2001:db8::1"}, soa: "test. 60 SOA ns.test. root.test. 1 2 3 4 60"}
	for what, bad := range map[string]dns.HandlerFunc{"fails": rcode(dns.RcodeServerFailure), "refuses": rcode(dns.RcodeRefused), "is silent": silent} {
		t.Run(what, func(t *testing.T) {
			var s fickle
			c := newClock()
			n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": &s})
			r := n.resolver(one, c.on, serveStale(time.Hour), func(o *resolve.Options) {
				if what == "is silent" {
					o.Timeout = 200 * time.Millisecond
				}
			})
			s.set(z.ServeDNS)
			lookup(t, r, "www.test", selection.V4)
			fails(t, r, "six.test", selection.V4, resolve.ErrNoData)
			n.asked(false)
			s.set(bad)

			stale := func(asked int) {
				t.Helper()
				equal(t, "answer", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
				equal(t, "asked", len(n.asked(false)), asked)
				equal(t, "ready", r.Ready("www.test", selection.V4), true)
			}
			stale(0)
			c.move(time.Minute)
			equal(t, "ready when it is over", r.Ready("www.test", selection.V4), false)
			stale(2) // two attempts
			stale(0)
			c.move(30*time.Second - 1)
			stale(0)
			c.move(1)
			stale(2)
			// The denial of a family is an answer too.
			fails(t, r, "six.test", selection.V4, resolve.ErrNoData)
			n.asked(false)

			// Not beyond its time, also when it has just been given.
			c.move(time.Hour - 30*time.Second - 10*time.Second)
			stale(2)
			c.move(10*time.Second - 1)
			stale(0)
			c.move(1)
			equal(t, "ready when it is stale no more", r.Ready("www.test", selection.V4), false)
			if _, err := r.Lookup(t.Context(), "www.test", selection.V4); !errors.Is(err, resolve.ErrServer) && !errors.Is(err, resolve.ErrTimeout) {
				t.Errorf("beyond its time: %v", err)
			}

			c.move(time.Second)
			s.set(z.ServeDNS)
			n.asked(false)
			stale(1) // and not stale any more
		})
	}
}

// A denial is a server's word: what it denies is not given any more, nor is it when all servers fail after that.
func TestServeStaleDenied(t *testing.T) {
	soa := "test. 60 SOA ns.test. root.test. 1 2 3 4 60"
	for what, tt := range map[string]struct {
		h    dns.Handler
		kind error
	}{
		"no such name": {zone{soa: soa}, resolve.ErrNotFound},
		"no address":   {zone{records: []string{"www.test. 60 TXT x"}, soa: soa}, resolve.ErrNoData},
	} {
		var s fickle
		c := newClock()
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": &s})
		r := n.resolver(one, c.on, serveStale(time.Hour))
		s.set(good().ServeDNS)
		lookup(t, r, "www.test", selection.V4)
		c.move(time.Minute)
		s.set(tt.h.ServeDNS)
		fails(t, r, "www.test", selection.V4, tt.kind)
		c.move(time.Minute)
		s.set(rcode(dns.RcodeServerFailure))
		fails(t, r, "www.test", selection.V4, tt.kind)
		equal(t, what+": asked", len(n.asked(false)), 4)
	}
}

// A server that answers something else is believed at once.
func TestServeStaleRefreshed(t *testing.T) {
	var s fickle
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": &s})
	r := n.resolver(one, c.on, serveStale(time.Hour))
	s.set(good().ServeDNS)
	lookup(t, r, "www.test", selection.V4)
	c.move(time.Minute)
	s.set(zone{records: []string{"www.test. 60 A 192.0.2.20"}}.ServeDNS)
	equal(t, "answer", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.20")})
}

func TestServeStaleOff(t *testing.T) {
	var s fickle
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": &s})
	r := n.resolver(one, c.on)
	s.set(good().ServeDNS)
	lookup(t, r, "www.test", selection.V4)
	c.move(time.Minute)
	s.set(rcode(dns.RcodeServerFailure))
	fails(t, r, "www.test", selection.V4, resolve.ErrServer)
}

// A search list goes the way that it went when the servers lived.
func TestServeStaleSearch(t *testing.T) {
	var s fickle
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": &s})
	r := n.resolver(one+"search a.test b.test\n", c.on, serveStale(time.Hour))
	s.set(zone{records: []string{"host.b.test. 60 A 192.0.2.1"}}.ServeDNS)
	lookup(t, r, "host", selection.V4)
	c.move(2 * time.Minute)
	s.set(rcode(dns.RcodeServerFailure))
	equal(t, "answer", lookup(t, r, "host", selection.V4), resolve.Answer{V4: addrs("192.0.2.1")})
}

// Servers that say nothing are waited for 1.8 s when there is an old answer, by the first lookup; the question goes on.
func TestServeStaleWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Bool
		n := network{t: t}
		r := n.resolver(one, serveStale(time.Hour), func(o *resolve.Options) {
			o.Dial = piped(func(req *dns.Msg) (*dns.Msg, time.Duration) {
				if dead.Load() {
					return nil, 0
				}
				m := reply(req)
				text := "www.test. 60 A 192.0.2.10"
				if req.Question[0].Qtype == dns.TypeAAAA {
					text = "www.test. 600 AAAA 2001:db8::10"
				}
				m.Answer = append(m.Answer, record(text))
				return m, time.Millisecond
			})
		})
		defer r.Close()
		fresh := resolve.Answer{V4: addrs("192.0.2.10"), V6: addrs("2001:db8::10")}
		took := func(want selection.Family, answer resolve.Answer, d time.Duration) {
			t.Helper()
			began := time.Now()
			equal(t, "answer", lookup(t, r, "www.test", want), answer)
			equal(t, "took", time.Since(began), d)
		}
		took(both, fresh, time.Millisecond)
		time.Sleep(time.Minute)
		dead.Store(true)
		// What the other family has is given after its own, shorter wait.
		took(both, resolve.Answer{V6: fresh.V6, Pending: selection.V4}, resolve.DefaultDelay)
		took(selection.V4, resolve.Answer{V4: fresh.V4}, 1800*time.Millisecond-resolve.DefaultDelay)
		took(selection.V4, resolve.Answer{V4: fresh.V4}, 0) // the question is still under way
		took(both, fresh, 0)
		time.Sleep(10 * time.Second) // two attempts: it has failed, and that is remembered
		equal(t, "ready", r.Ready("www.test", both), true)
		took(both, fresh, 0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if a, err := r.Lookup(ctx, "other.test", selection.V4); !errors.Is(err, resolve.ErrTimeout) {
			t.Errorf("a name that was never known: %v, %v", a, err)
		}
		// The servers live again: the next question is answered by them.
		dead.Store(false)
		time.Sleep(30 * time.Second)
		took(both, fresh, time.Millisecond)
	})
}
