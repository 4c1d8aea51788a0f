package resolve_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/miekg/dns"
)

// given makes the options name servers in place of files.
func given(servers ...string) func(*resolve.Options) {
	return func(o *resolve.Options) {
		for _, s := range servers {
			o.Servers = append(o.Servers, netip.MustParseAddrPort(s))
		}
	}
}

// Neither file is looked at, not even by Reload.
func TestGivenServers(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{
		"192.0.2.1": zone{records: []string{"www.test. 60 A 192.0.2.66", "www.a.test. 60 A 192.0.2.66"}},
		"192.0.2.2": zone{records: []string{"www.test. 60 A 192.0.2.10", "www.a.test. 60 A 192.0.2.66"}},
	})
	dir := t.TempDir()
	hosts := write(t, filepath.Join(dir, "hosts"), "192.0.2.66 www.test\n")
	r := n.resolver(one+"search a.test\noptions no-aaaa use-vc\n", given("[::ffff:192.0.2.2]:0"), func(o *resolve.Options) {
		o.Hosts, o.Refresh = hosts, time.Millisecond
	})
	for range 2 {
		equal(t, "answer", lookup(t, r, "www.test", both), resolve.Answer{V4: addrs("192.0.2.10")})
		fails(t, r, "www", both, resolve.ErrNotFound)
		equal(t, "localhost", lookup(t, r, "localhost", selection.V4), resolve.Answer{V4: addrs("127.0.0.1")})
		write(t, hosts, "192.0.2.67 www.test\n")
		r.Reload()
	}
	equal(t, "asked", n.asked(true), []string{
		"192.0.2.2 udp A www.", "192.0.2.2 udp A www.test.", "192.0.2.2 udp AAAA www.", "192.0.2.2 udp AAAA www.test.",
	})
}

// More servers than resolv.conf may have; the first cannot be reached, the second cuts its answers short and has no TCP, the
// third refuses.
func TestGivenServersFailover(t *testing.T) {
	var mu sync.Mutex
	var dials []string
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{
		"192.0.2.2": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			if w.RemoteAddr().Network() == "tcp" {
				_ = w.Close()
				return
			}
			_, _ = w.Write(with(req, func(m *dns.Msg) { m.Truncated = true }))
		}),
		"192.0.2.3": rcode(dns.RcodeRefused),
		"192.0.2.4": zone{records: []string{"a.test. 60 A 192.0.2.10", "b.test. 60 A 192.0.2.11", "c.test. 60 A 192.0.2.12"}},
	})
	r := n.resolver("", c.on, given("192.0.2.1:53", "192.0.2.2:53", "192.0.2.3:53", "192.0.2.4:53"), func(o *resolve.Options) {
		o.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			mu.Lock()
			dials = append(dials, network+" "+strings.TrimSuffix(addr, ":53"))
			mu.Unlock()
			return n.dial(ctx, network, addr)
		}
	})
	is := func(host string, want ...string) {
		t.Helper()
		lookup(t, r, host, selection.V4)
		mu.Lock()
		defer mu.Unlock()
		equal(t, host, dials, want)
		dials = nil
	}
	is("a.test", "udp 192.0.2.1", "udp 192.0.2.2", "tcp 192.0.2.2", "udp 192.0.2.3", "udp 192.0.2.4")
	is("b.test", "udp 192.0.2.3", "udp 192.0.2.4") // what could not be spoken to is at the end
	c.move(5 * time.Second)
	is("c.test", "udp 192.0.2.1", "udp 192.0.2.2", "tcp 192.0.2.2", "udp 192.0.2.3", "udp 192.0.2.4")
}

func TestGivenServersTruncated(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if w.RemoteAddr().Network() == "tcp" {
			good().ServeDNS(w, req)
			return
		}
		_, _ = w.Write(with(req, func(m *dns.Msg) { m.Truncated = true }))
	})})
	r := n.resolver("", given("192.0.2.1:53"))
	equal(t, "answer", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A www.test.", "192.0.2.1 tcp A www.test."})
}

// Without a timeout of its own a given server is waited for as long as one of resolv.conf.
func TestGivenServersTimeout(t *testing.T) {
	for _, tt := range []struct{ timeout, took time.Duration }{{0, 20 * time.Second}, {time.Second, 4 * time.Second}} {
		synctest.Test(t, func(t *testing.T) {
			n := network{t: t}
			r := n.resolver("", given("192.0.2.1:53", "192.0.2.2:53"), func(o *resolve.Options) {
				o.Timeout = tt.timeout
				o.Dial = piped(func(*dns.Msg) (*dns.Msg, time.Duration) { return nil, 0 })
			})
			defer r.Close()
			began := time.Now()
			fails(t, r, "www.test", selection.V4, resolve.ErrTimeout)
			equal(t, "time", time.Since(began), tt.took)
		})
	}
}

func TestStatic(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": good()})
	hosts := write(t, filepath.Join(t.TempDir(), "hosts"), "192.0.2.66 both\n192.0.2.66 four\n192.0.2.9 file\n")
	list := addrs("192.0.2.7")
	static := map[string][]netip.Addr{
		"both": addrs("192.0.2.5", "2001:db8::5", "::ffff:192.0.2.6", "192.0.2.5"), "four": list, "six.test": addrs("2001:db8::6"),
		"blocked.test": nil, "zoned.test": addrs("fe80::1%eth0"), "db.localhost": addrs("192.0.2.8"), "x.onion": addrs("192.0.2.11"),
	}
	r := n.resolver(one+"search test\n", func(o *resolve.Options) { o.Hosts, o.Static = hosts, static })
	list[0] = netip.MustParseAddr("192.0.2.66") // what was given is not kept
	b := r.Bound(nil)
	for _, r := range []*resolve.Resolver{r, b} {
		for _, tt := range []struct {
			host string
			want selection.Family
			resolve.Answer
		}{
			{"both", both, resolve.Answer{V4: addrs("192.0.2.5", "192.0.2.6"), V6: addrs("2001:db8::5")}},
			{"BOTH.", selection.V6, resolve.Answer{V6: addrs("2001:db8::5")}},
			{"four", both, resolve.Answer{V4: addrs("192.0.2.7")}},
			{"db.localhost", both, resolve.Answer{V4: addrs("192.0.2.8")}},
			{"x.onion", both, resolve.Answer{V4: addrs("192.0.2.11")}},
			{"file", both, resolve.Answer{V4: addrs("192.0.2.9")}},
		} {
			equal(t, tt.host, lookup(t, r, tt.host, tt.want), tt.Answer)
			equal(t, tt.host+" ready", r.Ready(tt.host, tt.want), true)
		}
		for host, want := range map[string]selection.Family{"four": selection.V6, "six.test": selection.V4, "blocked.test": both, "zoned.test": both} {
			fails(t, r, host, want, resolve.ErrNoData)
			equal(t, host+" ready", r.Ready(host, want), true)
		}
		for _, host := range []string{"192.0.2.1", "localhost", "y.onion", "x.invalid", "127.1"} {
			equal(t, host+" ready", r.Ready(host, both), true)
		}
		equal(t, "ready for another", r.Ready("www.test", selection.V4), false)
		equal(t, "ready for nothing", r.Ready("www.test", 0), true)
	}
	equal(t, "queries", n.dials, 0)
	lookup(t, r, "www.test", selection.V4)
	equal(t, "ready for what is known", r.Ready("www.test", selection.V4), true)
	equal(t, "ready for what the bound one does not know", b.Ready("www.test", selection.V4), false)
}

const cased = "the-letters-of-this-name-are-mixed.at-random.test" // all in lower case by chance: 1 in 2^40

func casedZone() zone { return zone{records: []string{cased + ". 60 A 192.0.2.10"}} }

func queryCase(o *resolve.Options) { o.QueryCase = true }

// folding answers as a server does that writes names in lower case.
func folding(h dns.Handler) dns.HandlerFunc {
	return func(w dns.ResponseWriter, req *dns.Msg) {
		req.Question[0].Name = strings.ToLower(req.Question[0].Name)
		h.ServeDNS(w, req)
	}
}

// plain is a log of queries with the names in lower case.
func plain(log []string) []string {
	var list []string
	for _, line := range log {
		server, name, _ := strings.Cut(line, " ")
		network, name, _ := strings.Cut(name, " ")
		rtype, name, _ := strings.Cut(name, " ")
		list = append(list, strings.Join([]string{server, network, rtype, strings.ToLower(name)}, " "))
	}
	return list
}

func TestQueryCase(t *testing.T) {
	var mu sync.Mutex
	spelt := map[string]bool{}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		mu.Lock()
		spelt[req.Question[0].Name] = true
		mu.Unlock()
		casedZone().ServeDNS(w, req)
	})})
	const queries = 5
	for range queries {
		equal(t, "answer", lookup(t, n.resolver(one, queryCase), cased, selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	}
	mu.Lock()
	if len(spelt) != queries || spelt[cased+"."] {
		t.Errorf("spelt %v", spelt)
	}
	mu.Unlock()
	for _, line := range n.asked(false) {
		equal(t, "asked", plain([]string{line}), []string{"192.0.2.1 udp A " + cased + "."})
	}
	lookup(t, n.resolver(one), cased, selection.V4) // as it is without the option
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A " + cased + "."})
}

// A forger who knows number and port but has not seen the query is passed over, and the wait goes on.
func TestQueryCaseForged(t *testing.T) {
	for what, forge := range map[string]func(spelt string) string{
		"lower case": strings.ToLower,
		"upper case": strings.ToUpper,
		"the other way round": func(spelt string) string {
			return strings.Map(func(c rune) rune {
				if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
					c ^= 'a' - 'A'
				}
				return c
			}, spelt)
		},
		"but for one letter": func(spelt string) string {
			b := []byte(spelt)
			b[0] ^= 'a' - 'A'
			return string(b)
		},
	} {
		for _, cut := range []bool{false, true} {
			n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": raw(func(req *dns.Msg) [][]byte {
				m := reply(req)
				m.Answer = append(m.Answer, record(cased+". 60 A 192.0.2.10"))
				forged := with(req, func(m *dns.Msg) { m.Question[0].Name, m.Truncated = forge(req.Question[0].Name), cut })
				return [][]byte{forged, forged, packed(m)}
			})})
			r := n.resolver(one, queryCase)
			equal(t, what, lookup(t, r, cased, selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
			equal(t, what+" asked", plain(n.asked(false)), []string{"192.0.2.1 udp A " + cased + "."})
		}
	}
}

// What a server says that does not keep the case is believed over TCP alone, where nobody else can have said it.
func TestQueryCaseFolded(t *testing.T) {
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if w.RemoteAddr().Network() == "tcp" {
			folding(casedZone()).ServeDNS(w, req)
			return
		}
		_, _ = w.Write(with(req, func(m *dns.Msg) { m.Question[0].Name = strings.ToLower(m.Question[0].Name) }))
	})})
	r := n.resolver(one, queryCase, c.on)
	udp, tcp := "192.0.2.1 udp A "+cased+".", "192.0.2.1 tcp A "+cased+"."
	for _, tt := range []struct {
		after time.Duration
		asked []string
	}{
		{0, []string{udp, tcp}},
		{time.Minute, []string{tcp}}, // it is known by now, and costs no wait
		{10 * time.Minute, []string{udp, tcp}},
	} {
		c.move(tt.after)
		equal(t, "answer", lookup(t, r, cased, selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
		equal(t, "asked", plain(n.asked(false)), tt.asked)
	}
}

// A server that folds names and has no TCP is no use; the next is asked, and when there is none it is an error.
func TestQueryCaseFoldedWithoutTCP(t *testing.T) {
	bad := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if w.RemoteAddr().Network() == "tcp" {
			_ = w.Close()
			return
		}
		folding(casedZone()).ServeDNS(w, req)
	})
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": bad, "192.0.2.2": casedZone()})
	r := n.resolver("", queryCase, given("192.0.2.1:53", "192.0.2.2:53"))
	equal(t, "answer", lookup(t, r, cased, selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	equal(t, "asked", plain(n.asked(false)), []string{
		"192.0.2.1 udp A " + cased + ".", "192.0.2.1 tcp A " + cased + ".", "192.0.2.2 udp A " + cased + ".",
	})
	r = n.resolver(one, queryCase)
	fails(t, r, cased, selection.V4, resolve.ErrServer)
	equal(t, "asked", plain(n.asked(false)), []string{
		"192.0.2.1 udp A " + cased + ".", "192.0.2.1 tcp A " + cased + ".", "192.0.2.1 tcp A " + cased + ".",
	})
}

// Close does not wait for the right spelling.
func TestQueryCaseClose(t *testing.T) {
	var once sync.Once
	sent := make(chan struct{})
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if w.RemoteAddr().Network() == "udp" {
			folding(casedZone()).ServeDNS(w, req)
			once.Do(func() { close(sent) })
		}
	})})
	r := n.resolver(one, queryCase)
	done := make(chan error)
	go func() {
		_, err := r.Lookup(context.Background(), cased, selection.V4)
		done <- err
	}()
	<-sent
	r.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
