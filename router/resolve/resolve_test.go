package resolve_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/miekg/dns"
)

const one = "nameserver 192.0.2.1\n"

func TestWithoutQuery(t *testing.T) {
	n := newNetwork(t, nil)
	dir := t.TempDir()
	hosts := write(t, filepath.Join(dir, "hosts"), "10.0.0.1 Pinned alias\n2001:db8::5 six\n10.0.0.2 localhost\n")
	r := n.resolver(one+"search test\n", func(o *resolve.Options) { o.Hosts = hosts })
	long := strings.Repeat("a", 63)
	for _, tt := range []struct {
		host string
		want selection.Family
		v4   string
		v6   string
		err  error
	}{
		{host: "192.0.2.7", v4: "192.0.2.7"},
		{host: "192.0.2.7", want: selection.V6, v4: "192.0.2.7"},
		{host: "2001:db8::1", v6: "2001:db8::1"},
		{host: "2001:DB8:0::1", want: selection.V4, v6: "2001:db8::1"},
		{host: "::ffff:192.0.2.7", v4: "192.0.2.7"},
		{host: "::ffff:c000:207", want: selection.V6, v4: "192.0.2.7"},
		{host: "fe80::1%eth0", v6: "fe80::1"},
		{host: "localhost", v4: "127.0.0.1", v6: "::1"},
		{host: "LocalHost.", want: selection.V6, v6: "::1"},
		{host: "a.b.localhost", want: selection.V4, v4: "127.0.0.1"},
		{host: "pinned", v4: "10.0.0.1"},
		{host: "ALIAS.", v4: "10.0.0.1"},
		{host: "six", v6: "2001:db8::5"},
		{host: "six", want: selection.V4, err: resolve.ErrNoData}, // and not a query: the file pins the name
		{host: "nothing.invalid", err: resolve.ErrNotFound},
		{host: "x.onion", err: resolve.ErrNotFound},
		{host: "127.1", err: resolve.ErrNotFound},
		{host: "0x7f.1", err: resolve.ErrNotFound},
		{host: "0x7f000001", err: resolve.ErrNotFound},
		{host: "1.0x", err: resolve.ErrNotFound},
		{host: "2130706433", err: resolve.ErrNotFound},
		{host: "0177.0.0.1", err: resolve.ErrNotFound},
		{host: "1.2.3.4.", err: resolve.ErrNotFound},
		{host: "1.2.3.4.5", err: resolve.ErrNotFound},
		{host: "256.0.0.1", err: resolve.ErrNotFound},
		{host: "[::1]", err: resolve.ErrNotFound},
		{host: "host:80", err: resolve.ErrNotFound},
		{host: "", err: resolve.ErrNotFound},
		{host: ".", err: resolve.ErrNotFound},
		{host: ".test", err: resolve.ErrNotFound},
		{host: "a..test", err: resolve.ErrNotFound},
		{host: "a.test..", err: resolve.ErrNotFound},
		{host: "-a.test", err: resolve.ErrNotFound},
		{host: "a b.test", err: resolve.ErrNotFound},
		{host: "a\x00.test", err: resolve.ErrNotFound},
		{host: "a/b", err: resolve.ErrNotFound},
		{host: "b\u00fccher.test", err: resolve.ErrNotFound},
		{host: long + "a.test", err: resolve.ErrNotFound},
		{host: "test." + long + "a", err: resolve.ErrNotFound},
		{host: strings.Repeat("a.", 126) + "aa", err: resolve.ErrNotFound},
		{host: strings.Repeat("host", 10000), err: resolve.ErrNotFound},
	} {
		want := tt.want
		if want == 0 {
			want = both
		}
		if tt.err != nil {
			fails(t, r, tt.host, want, tt.err)
			continue
		}
		var wanted resolve.Answer
		if tt.v4 != "" {
			wanted.V4 = addrs(tt.v4)
		}
		if tt.v6 != "" {
			wanted.V6 = addrs(tt.v6)
		}
		equal(t, tt.host, lookup(t, r, tt.host, want), wanted)
	}
	fails(t, r, "www.test", 0, resolve.ErrNoData)
	_, err := r.Lookup(t.Context(), strings.Repeat("host", 10000), both)
	if len(err.Error()) > 400 {
		t.Errorf("the error of a long name has %d bytes", len(err.Error()))
	}
	if n.dials != 0 {
		t.Errorf("%d sockets for what needs none", n.dials)
	}
}

func TestFamilies(t *testing.T) {
	z := zone{records: []string{
		"www.test. 60 A 192.0.2.10", "www.test. 60 A 192.0.2.11", "www.test. 60 A 192.0.2.10",
		"www.test. 60 AAAA 2001:db8::10",
		"four.test. 60 A 192.0.2.12", "six.test. 60 AAAA 2001:db8::12",
		"mapped.test. 60 A 192.0.2.13", "mapped.test. 60 AAAA ::ffff:127.0.0.1", "mapped.test. 60 AAAA 2001:db8::13",
		"onlymapped.test. 60 AAAA ::ffff:127.0.0.1",
		"under_score.test. 60 A 192.0.2.14", "text.test. 60 TXT hello",
	}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": z})
	r := n.resolver(one)
	for _, tt := range []struct {
		host   string
		want   selection.Family
		answer resolve.Answer
		err    error
		asked  []string
	}{
		{"www.test", selection.V4, resolve.Answer{V4: addrs("192.0.2.10", "192.0.2.11")}, nil, []string{"A www.test."}},
		{"WWW.Test", both, resolve.Answer{V4: addrs("192.0.2.10", "192.0.2.11"), V6: addrs("2001:db8::10")}, nil, []string{"AAAA www.test."}},
		{"www.test.", both, resolve.Answer{V4: addrs("192.0.2.10", "192.0.2.11"), V6: addrs("2001:db8::10")}, nil, nil},
		{"four.test", both, resolve.Answer{V4: addrs("192.0.2.12")}, nil, []string{"A four.test.", "AAAA four.test."}},
		{"four.test", selection.V6, resolve.Answer{}, resolve.ErrNoData, nil},
		{"six.test", selection.V6, resolve.Answer{V6: addrs("2001:db8::12")}, nil, []string{"AAAA six.test."}},
		{"mapped.test", both, resolve.Answer{V4: addrs("192.0.2.13", "127.0.0.1"), V6: addrs("2001:db8::13")}, nil, []string{"A mapped.test.", "AAAA mapped.test."}},
		{"mapped.test", selection.V4, resolve.Answer{V4: addrs("192.0.2.13")}, nil, nil},
		{"mapped.test", selection.V6, resolve.Answer{V6: addrs("2001:db8::13")}, nil, nil},
		{"onlymapped.test", both, resolve.Answer{V4: addrs("127.0.0.1")}, nil, []string{"A onlymapped.test.", "AAAA onlymapped.test."}},
		{"onlymapped.test", selection.V6, resolve.Answer{}, resolve.ErrNoData, nil},
		{"under_score.test", selection.V4, resolve.Answer{V4: addrs("192.0.2.14")}, nil, []string{"A under_score.test."}},
		{"text.test", both, resolve.Answer{}, resolve.ErrNoData, []string{"A text.test.", "AAAA text.test."}},
		{"none.test", both, resolve.Answer{}, resolve.ErrNotFound, []string{"A none.test.", "AAAA none.test."}},
	} {
		if tt.err != nil {
			fails(t, r, tt.host, tt.want, tt.err)
		} else {
			equal(t, tt.host, lookup(t, r, tt.host, tt.want), tt.answer)
		}
		var asked []string
		for _, line := range n.asked(true) {
			asked = append(asked, strings.TrimPrefix(line, "192.0.2.1 udp "))
		}
		equal(t, tt.host+" asked", asked, tt.asked)
	}
	_, err := r.Lookup(t.Context(), "none.test", both)
	if errors.Is(err, resolve.ErrNoData) || !strings.Contains(err.Error(), "server 192.0.2.1:53 answered NXDOMAIN") {
		t.Errorf("a name that does not exist: %v", err)
	}
}

// Callers share slices: appending to one must not be seen by another.
func TestAnswerHasNoSpareRoom(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": zone{records: []string{
		"www.test. 60 A 192.0.2.1", "www.test. 60 A 192.0.2.2", "www.test. 60 A 192.0.2.3",
	}}})
	a := lookup(t, n.resolver(one), "www.test", selection.V4)
	if len(a.V4) != 3 || cap(a.V4) != 3 {
		t.Errorf("len %d, cap %d, want 3 and 3", len(a.V4), cap(a.V4))
	}
}

// Each family is answered only when both have been asked.
func TestFamiliesAreAskedAtOnce(t *testing.T) {
	var all sync.WaitGroup
	all.Add(2)
	z := zone{records: []string{"www.test. 60 A 192.0.2.10", "www.test. 60 AAAA 2001:db8::10"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		all.Done()
		all.Wait()
		z.ServeDNS(w, req)
	})})
	r := n.resolver(one, func(o *resolve.Options) { o.Delay = time.Minute })
	equal(t, "answer", lookup(t, r, "www.test", both), resolve.Answer{V4: addrs("192.0.2.10"), V6: addrs("2001:db8::10")})
}

func TestSingleFlight(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	z := zone{records: []string{"www.test. 60 A 192.0.2.10"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		close(arrived) // a second query panics
		<-release
		z.ServeDNS(w, req)
	})})
	r := n.resolver(one)

	// The lookup that puts the question is given up; the question is not.
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error)
	go func() {
		_, err := r.Lookup(ctx, "www.test", selection.V4)
		first <- err
	}()
	<-arrived
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) || errors.Is(err, resolve.ErrTimeout) {
		t.Errorf("the lookup that was given up: %v", err)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if _, err := r.Lookup(ctx, "www.test", selection.V4); !errors.Is(err, resolve.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the lookup that had no time: %v", err)
	}

	var began, ended sync.WaitGroup
	for range 100 {
		began.Add(1)
		ended.Go(func() {
			began.Done()
			a, err := r.Lookup(t.Context(), "www.test", selection.V4)
			if err != nil || len(a.V4) != 1 {
				t.Errorf("%v, %v", a, err)
			}
		})
	}
	began.Wait()
	close(release)
	ended.Wait()
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A www.test."})
}

func TestPositiveTTL(t *testing.T) {
	z := zone{records: []string{
		"ten.test. 10 A 192.0.2.10",
		"zero.test. 0 A 192.0.2.10",
		"week.test. 604800 A 192.0.2.10",
		"wild.test. 4294967295 A 192.0.2.10",
		"alias.test. 7 CNAME ten.test.", "ten.test. 10 A 192.0.2.11",
	}}
	for _, tt := range []struct {
		host string
		ttl  time.Duration
	}{
		{"ten.test", 10 * time.Second},
		{"zero.test", time.Second},      // floor
		{"week.test", time.Hour},        // ceiling
		{"wild.test", time.Second},      // RFC 2181: no more than 31 bits, else 0
		{"alias.test", 7 * time.Second}, // the least of the chain
	} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": z})
		c := newClock()
		r := n.resolver(one, c.on)
		for range 3 {
			lookup(t, r, tt.host, selection.V4)
			c.move(tt.ttl - time.Nanosecond)
			lookup(t, r, tt.host, selection.V4)
			equal(t, tt.host+" asked", len(n.asked(false)), 1)
			c.move(time.Nanosecond)
		}
	}
}

func TestNegativeTTL(t *testing.T) {
	records := []string{"six.test. 60 AAAA 2001:db8::1", "alias.test. 5 CNAME six.test.", "six.test. 60 AAAA 2001:db8::1"}
	const soa = "test. 100 SOA ns.test. root.test. 1 2 3 4 "
	for _, tt := range []struct {
		host, soa string
		kind      error
		ttl       time.Duration
	}{
		{"none.test", soa + "30", resolve.ErrNotFound, 30 * time.Second},
		{"none.test", soa + "200", resolve.ErrNotFound, 100 * time.Second}, // the record's own time is less
		{"none.test", "test. 86400 SOA ns.test. root.test. 1 2 3 4 86400", resolve.ErrNotFound, 5 * time.Minute},
		{"none.test", "", resolve.ErrNotFound, time.Second},
		{"six.test", soa + "30", resolve.ErrNoData, 30 * time.Second},
		{"six.test", soa + "0", resolve.ErrNoData, time.Second},
		{"six.test", "", resolve.ErrNoData, time.Second},
		{"alias.test", soa + "30", resolve.ErrNoData, time.Second}, // the server below sends no SOA with an alias
	} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": zone{records: records, soa: tt.soa}})
		c := newClock()
		r := n.resolver(one, c.on)
		for range 2 {
			fails(t, r, tt.host, selection.V4, tt.kind)
			c.move(tt.ttl - time.Nanosecond)
			fails(t, r, tt.host, selection.V4, tt.kind)
			equal(t, tt.host+" asked", len(n.asked(false)), 1)
			c.move(time.Nanosecond)
		}
	}
}

func TestSearch(t *testing.T) {
	z := zone{records: []string{
		"host.b.test. 60 A 192.0.2.1", "host.d.test. 60 A 192.0.2.9",
		"x.y.a.test. 60 A 192.0.2.2", "x.y. 60 A 192.0.2.3",
		"six.a.test. 60 AAAA 2001:db8::1", "six.b.test. 60 A 192.0.2.4",
		"broken.b.test. 60 A 192.0.2.5",
	}}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if strings.HasPrefix(req.Question[0].Name, "broken.a.") {
			rcode(dns.RcodeServerFailure)(w, req)
			return
		}
		z.ServeDNS(w, req)
	})
	const list = "search a.test B.test.\n"
	for _, tt := range []struct {
		conf, host string
		answer     string
		err        error
		asked      string // names, in order
	}{
		{list, "host", "192.0.2.1", nil, "host.a.test. host.b.test."},
		{list, "host.", "", resolve.ErrNotFound, "host."},
		{list, "x.y", "192.0.2.3", nil, "x.y."},
		{list + "options ndots:2\n", "x.y", "192.0.2.2", nil, "x.y.a.test."},
		{list, "p.q", "", resolve.ErrNotFound, "p.q. p.q.a.test. p.q.b.test."},
		{list, "nope", "", resolve.ErrNotFound, "nope.a.test. nope.b.test. nope."},
		{list + "domain d.test\n", "host", "192.0.2.9", nil, "host.d.test."}, // the last of the two wins
		{list, "six", "192.0.2.4", nil, "six.a.test. six.b.test."},
		{list, "broken", "", resolve.ErrServer, "broken.a.test. broken.a.test."}, // never the next: it is another host
		{"search " + strings.Repeat("long.", 49) + "test\n", "a.b", "", resolve.ErrNotFound, "a.b. a.b." + strings.Repeat("long.", 49) + "test."},
		{"search " + strings.Repeat("long.", 49) + "test\n", "a.bc", "", resolve.ErrNotFound, "a.bc."}, // too long with it
		{"search .\n", "host", "", resolve.ErrNotFound, "host."},
	} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": h})
		r := n.resolver(one + tt.conf)
		for range 2 { // the second from the cache
			if tt.err != nil {
				fails(t, r, tt.host, selection.V4, tt.err)
			} else {
				equal(t, tt.host, lookup(t, r, tt.host, selection.V4), resolve.Answer{V4: addrs(tt.answer)})
			}
		}
		var names []string
		for _, line := range n.asked(false) {
			names = append(names, line[strings.LastIndexByte(line, ' ')+1:])
		}
		equal(t, tt.host+" asked", strings.Join(names, " "), tt.asked)
	}
}

// A name of which one domain of the list has the IPv4 and the next the IPv6 address is two hosts, not one.
func TestSearchDoesNotMixHosts(t *testing.T) {
	z := zone{records: []string{"host.a.test. 60 A 192.0.2.1", "host.b.test. 60 AAAA 2001:db8::2"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": z})
	r := n.resolver(one + "search a.test b.test\n")
	equal(t, "answer", lookup(t, r, "host", both), resolve.Answer{V4: addrs("192.0.2.1")})
}

func TestOneFamilyFails(t *testing.T) {
	z := zone{records: []string{"www.test. 60 A 192.0.2.10"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if req.Question[0].Qtype == dns.TypeAAAA {
			rcode(dns.RcodeServerFailure)(w, req)
			return
		}
		z.ServeDNS(w, req)
	})})
	r := n.resolver(one, func(o *resolve.Options) { o.Delay = time.Minute })
	equal(t, "answer", lookup(t, r, "www.test", both), resolve.Answer{V4: addrs("192.0.2.10")})
	fails(t, r, "www.test", selection.V6, resolve.ErrServer, "SERVFAIL")
	// No address of the one and a failure of the other: nobody can say that there is none.
	n = newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if req.Question[0].Qtype == dns.TypeAAAA {
			rcode(dns.RcodeRefused)(w, req)
			return
		}
		_ = w.WriteMsg(reply(req))
	})})
	fails(t, n.resolver(one), "www.test", both, resolve.ErrServer, "server 192.0.2.1:53 answered REFUSED")
}

func TestClose(t *testing.T) {
	arrived := make(chan struct{}, 1)
	z := zone{records: []string{"www.test. 60 A 192.0.2.10"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if req.Question[0].Name == "slow.test." {
			arrived <- struct{}{}
			return
		}
		z.ServeDNS(w, req)
	})})
	r := n.resolver(one)
	lookup(t, r, "www.test", selection.V4)
	waiting := make(chan error)
	go func() {
		_, err := r.Lookup(context.Background(), "slow.test", selection.V4)
		waiting <- err
	}()
	<-arrived
	began := time.Now()
	r.Close()
	if err := <-waiting; !errors.Is(err, net.ErrClosed) || !errors.Is(err, resolve.ErrServer) {
		t.Errorf("a lookup that waits: %v", err)
	}
	if d := time.Since(began); d > 3*time.Second { // the server's timeout is 5 s
		t.Errorf("Close took %v", d)
	}
	fails(t, r, "other.test", selection.V4, net.ErrClosed)
	lookup(t, r, "www.test", selection.V4) // a hit needs nothing that was closed
	r.Close()
}

func TestInflightLimit(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	z := zone{records: []string{"a.test. 60 A 192.0.2.10", "b.test. 60 A 192.0.2.11"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if req.Question[0].Name == "a.test." {
			close(arrived)
			<-release
		}
		z.ServeDNS(w, req)
	})})
	r := n.resolver(one, func(o *resolve.Options) { o.Inflight = 1 })
	done := make(chan error)
	go func() {
		_, err := r.Lookup(context.Background(), "a.test", selection.V4)
		done <- err
	}()
	<-arrived
	fails(t, r, "b.test", selection.V4, resolve.ErrServer, "too many questions")
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	lookup(t, r, "b.test", selection.V4) // the refusal is not remembered
}
