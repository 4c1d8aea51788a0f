package resolve_test

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/miekg/dns"
)

const two = "nameserver 192.0.2.1\nnameserver 192.0.2.2\n"

func good() zone { return zone{records: []string{"www.test. 60 A 192.0.2.10"}} }

// raw sends to each query what it makes of it, datagram by datagram.
func raw(answers func(req *dns.Msg) [][]byte) dns.HandlerFunc {
	return func(w dns.ResponseWriter, req *dns.Msg) {
		for _, b := range answers(req) {
			_, _ = w.Write(b)
		}
	}
}

func packed(m *dns.Msg) []byte {
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// with is a good answer with the address 192.0.2.66, changed.
func with(req *dns.Msg, change func(*dns.Msg)) []byte {
	m := reply(req)
	m.Answer = append(m.Answer, record(req.Question[0].Name+" 60 A 192.0.2.66"))
	change(m)
	return packed(m)
}

// What does not answer the question is passed over, however good it looks, and the wait goes on to what does.
func TestStrayDatagrams(t *testing.T) {
	for what, stray := range map[string]func(req *dns.Msg) []byte{
		"another number": func(req *dns.Msg) []byte { return with(req, func(m *dns.Msg) { m.Id++ }) },
		"a query":        func(req *dns.Msg) []byte { return with(req, func(m *dns.Msg) { m.Response = false }) },
		"another opcode": func(req *dns.Msg) []byte { return with(req, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }) },
		"another name":   func(req *dns.Msg) []byte { return with(req, func(m *dns.Msg) { m.Question[0].Name = "xww.test." }) },
		"another type":   func(req *dns.Msg) []byte { return with(req, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }) },
		"another class": func(req *dns.Msg) []byte {
			return with(req, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
		},
		"no question": func(req *dns.Msg) []byte { return with(req, func(m *dns.Msg) { m.Question = nil }) },
		"two questions": func(req *dns.Msg) []byte {
			return with(req, func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
		},
		"bare denial": func(req *dns.Msg) []byte {
			m := reply(req)
			m.Question, m.Rcode = nil, dns.RcodeNameError
			return packed(m)
		},
		"bare success":     func(req *dns.Msg) []byte { m := reply(req); m.Question = nil; return packed(m) },
		"nothing":          func(*dns.Msg) []byte { return []byte{} },
		"less than a head": func(req *dns.Msg) []byte { return packed(req)[:11] },
		"a cut record":     func(req *dns.Msg) []byte { b := with(req, func(*dns.Msg) {}); return b[:len(b)-2] },
		"noise":            func(*dns.Msg) []byte { return []byte(strings.Repeat("\xff", 100)) },
		"a pointer to itself": func(req *dns.Msg) []byte {
			b := packed(reply(req))
			return append(b[:12], 0xc0, 0x0c, 0, 1, 0, 1)
		},
	} {
		t.Run(what, func(t *testing.T) {
			n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": raw(func(req *dns.Msg) [][]byte {
				m := reply(req)
				m.Answer = append(m.Answer, record("www.test. 60 A 192.0.2.10"))
				return [][]byte{stray(req), stray(req), packed(m)}
			})})
			equal(t, "answer", lookup(t, n.resolver(one), "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
			equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A www.test."})
		})
	}
}

// Whoever guesses at the number of a query does not get to guess for long.
func TestFloodGoesToTCP(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if w.RemoteAddr().Network() == "tcp" {
			good().ServeDNS(w, req)
			return
		}
		for i := range 100 {
			_, _ = w.Write(with(req, func(m *dns.Msg) { m.Id += uint16(i) + 1 }))
		}
	})})
	equal(t, "answer", lookup(t, n.resolver(one), "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A www.test.", "192.0.2.1 tcp A www.test."})
}

func TestTruncated(t *testing.T) {
	cut := func(overTCP dns.Handler) dns.HandlerFunc {
		return func(w dns.ResponseWriter, req *dns.Msg) {
			if w.RemoteAddr().Network() == "tcp" {
				overTCP.ServeDNS(w, req)
				return
			}
			_, _ = w.Write(with(req, func(m *dns.Msg) { m.Truncated = true }))
		}
	}
	long := zone{}
	for i := range 100 {
		long.records = append(long.records, "www.test. 60 A 192.0.2."+string(rune('0'+i/10))+string(rune('0'+i%10)))
	}
	for i := range long.records {
		long.records[i] = strings.Replace(long.records[i], "192.0.2.0", "192.0.2.", 1)
	}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": cut(long)})
	a := lookup(t, n.resolver(one), "www.test", selection.V4)
	equal(t, "number of addresses", len(a.V4), 64) // the bound
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A www.test.", "192.0.2.1 tcp A www.test."})

	for what, bad := range map[string]dns.Handler{
		"another number": raw(func(req *dns.Msg) [][]byte { return [][]byte{with(req, func(m *dns.Msg) { m.Id++ })} }),
		"truncated":      raw(func(req *dns.Msg) [][]byte { return [][]byte{with(req, func(m *dns.Msg) { m.Truncated = true })} }),
		"nothing":        raw(func(*dns.Msg) [][]byte { return [][]byte{{}} }),
		"closed":         dns.HandlerFunc(func(w dns.ResponseWriter, _ *dns.Msg) { _ = w.Close() }),
	} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": cut(bad), "192.0.2.2": good()})
		equal(t, what, lookup(t, n.resolver(two), "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
		equal(t, what+" asked", n.asked(false), []string{"192.0.2.1 udp A www.test.", "192.0.2.1 tcp A www.test.", "192.0.2.2 udp A www.test."})
	}
}

func TestFailover(t *testing.T) {
	for what, bad := range map[string]dns.Handler{
		"SERVFAIL": rcode(dns.RcodeServerFailure),
		"REFUSED":  rcode(dns.RcodeRefused),
		"YXDOMAIN": rcode(dns.RcodeYXDomain),
		"bare REFUSED": raw(func(req *dns.Msg) [][]byte {
			m := reply(req)
			m.Question, m.Rcode = nil, dns.RcodeRefused
			return [][]byte{packed(m)}
		}),
		"lame": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			m := reply(req)
			m.RecursionAvailable = false
			_ = w.WriteMsg(m)
		}),
		"alias of itself": raw(func(req *dns.Msg) [][]byte {
			m := reply(req)
			m.Answer = append(m.Answer, record("www.test. 60 CNAME x.test."), record("x.test. 60 CNAME www.test."))
			return [][]byte{packed(m)}
		}),
	} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": bad, "192.0.2.2": good()})
		equal(t, what, lookup(t, n.resolver(two), "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
		equal(t, what+" asked", n.asked(false), []string{"192.0.2.1 udp A www.test.", "192.0.2.2 udp A www.test."})
	}
	// A server that cannot be reached at all.
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.2": good()})
	equal(t, "unreachable", lookup(t, n.resolver(two), "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	// One whose port is closed, as ICMP says.
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n = newNetwork(t, map[string]dns.Handler{"192.0.2.2": good()})
	n.reach("192.0.2.1", pc.LocalAddr().String())
	_ = pc.Close()
	equal(t, "closed", lookup(t, n.resolver(two), "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
}

func TestAllServersFail(t *testing.T) {
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": rcode(dns.RcodeServerFailure)})
	r := n.resolver("nameserver 192.0.2.1\nnameserver 192.0.2.3\noptions attempts:3\n", c.on)
	for range 2 { // the second is remembered, and says the same
		fails(t, r, "www.test", selection.V4, resolve.ErrServer, `resolve "www.test": server failure: server 192.0.2.1:53 answered SERVFAIL`)
	}
	equal(t, "asked", len(n.asked(false)), 3)
	c.move(time.Second)
	fails(t, r, "www.test", selection.V4, resolve.ErrServer)
	equal(t, "asked again", len(n.asked(false)), 3)

	r = n.resolver("nameserver 192.0.2.4\n")
	fails(t, r, "www.test", selection.V4, resolve.ErrServer, "server 192.0.2.4:53: dial udp: network is unreachable")

	r = resolve.New(resolve.Options{ResolvConf: t.TempDir() + "/none", Hosts: "/dev/null"})
	defer r.Close()
	fails(t, r, "www.test", selection.V4, resolve.ErrServer, "server 127.0.0.1:53: dial udp: no dial function given")
}

func TestTimeoutFailover(t *testing.T) {
	c := newClock()
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(silent), "192.0.2.2": zone{records: []string{
		"a.test. 60 A 192.0.2.10", "b.test. 60 A 192.0.2.11", "c.test. 60 A 192.0.2.12",
	}}})
	quick := func(o *resolve.Options) { o.Timeout = 200 * time.Millisecond }
	r := n.resolver(two, c.on, quick)
	lookup(t, r, "a.test", selection.V4)
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A a.test.", "192.0.2.2 udp A a.test."})
	lookup(t, r, "b.test", selection.V4)
	equal(t, "asked while the first is slow", n.asked(false), []string{"192.0.2.2 udp A b.test."})
	c.move(30 * time.Second)
	lookup(t, r, "c.test", selection.V4)
	equal(t, "asked later", n.asked(false), []string{"192.0.2.1 udp A c.test.", "192.0.2.2 udp A c.test."})

	n = newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(silent)})
	r = n.resolver(one, quick)
	fails(t, r, "www.test", selection.V4, resolve.ErrTimeout, `resolve "www.test": no answer in time: server 192.0.2.1:53`)
	equal(t, "asked", len(n.asked(false)), 2)
	// A server that says no outweighs one that says nothing.
	n = newNetwork(t, map[string]dns.Handler{"192.0.2.1": rcode(dns.RcodeRefused), "192.0.2.2": dns.HandlerFunc(silent)})
	fails(t, n.resolver(two, quick), "www.test", selection.V4, resolve.ErrServer, "192.0.2.1:53 answered REFUSED")
}

// timeout of resolv.conf itself, in whole seconds.
func TestTimeoutOfFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int32
		n := network{t: t}
		r := n.resolver("nameserver 192.0.2.1\noptions timeout:3 attempts:4\n", func(o *resolve.Options) {
			o.Timeout = 0
			o.Dial = piped(func(*dns.Msg) (*dns.Msg, time.Duration) { dials.Add(1); return nil, 0 })
		})
		began := time.Now()
		fails(t, r, "www.test", selection.V4, resolve.ErrTimeout)
		equal(t, "time", time.Since(began), 12*time.Second)
		equal(t, "queries", dials.Load(), int32(4))
		r.Close()
	})
}

func TestQuery(t *testing.T) {
	var mu sync.Mutex
	var queries []*dns.Msg
	ports := map[string]bool{}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		mu.Lock()
		queries = append(queries, req)
		ports[w.RemoteAddr().String()] = true
		mu.Unlock()
		rcode(dns.RcodeNameError)(w, req)
	})})
	r := n.resolver(one)
	const count = 50
	ids := map[uint16]bool{}
	for i := range count {
		fails(t, r, "www"+strings.Repeat("x", i)+".test", selection.V4, resolve.ErrNotFound)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, q := range queries {
		ids[q.Id] = true
		opt := q.IsEdns0()
		if !q.RecursionDesired || q.Response || opt == nil || opt.UDPSize() != 1232 || opt.Do() || len(q.Question) != 1 {
			t.Fatalf("query %v", q)
		}
	}
	// 50 draws of 65536 give fewer than 45 with a chance below 1 in 10^10; ports come from the kernel.
	if len(ids) < 45 || len(ports) < 45 {
		t.Errorf("%d numbers and %d ports in %d queries", len(ids), len(ports), count)
	}
}

func TestServerWithoutEDNS(t *testing.T) {
	for _, bare := range []bool{false, true} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			if req.IsEdns0() == nil {
				good().ServeDNS(w, req)
				return
			}
			m := reply(req)
			m.Rcode = dns.RcodeFormatError
			if bare {
				m.Question = nil
			}
			_ = w.WriteMsg(m)
		})})
		lookup(t, n.resolver(one), "www.test", selection.V4)
		equal(t, "asked", n.asked(false), []string{"192.0.2.1 udp A www.test.", "192.0.2.1 udp A www.test."})
	}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": rcode(dns.RcodeFormatError)})
	fails(t, n.resolver(one), "www.test", selection.V4, resolve.ErrServer, "FORMERR")
	equal(t, "asked", len(n.asked(false)), 4) // with and without, in two attempts
}

func TestChain(t *testing.T) {
	long := []string{}
	for i := range 17 {
		long = append(long, "c"+strings.Repeat("x", i)+".test. 60 CNAME c"+strings.Repeat("x", i+1)+".test.")
	}
	for _, tt := range []struct {
		what, host string
		answer     []string
		want       []string // empty: no data
		kind       error
	}{
		{"alias", "www.test", []string{"www.test. 60 CNAME a.test.", "a.test. 60 A 192.0.2.1"}, []string{"192.0.2.1"}, nil},
		{"the other way round, in other letters", "www.test", []string{"A.Test. 60 A 192.0.2.1", "WWW.test. 60 CNAME a.TEST."}, []string{"192.0.2.1"}, nil},
		{"records beside the way", "www.test", []string{"evil.test. 60 A 192.0.2.66", "www.test. 60 A 192.0.2.1", "www.test. 60 AAAA 2001:db8::66"}, []string{"192.0.2.1"}, nil},
		{"only beside the way", "www.test", []string{"evil.test. 60 A 192.0.2.66"}, nil, resolve.ErrNoData},
		{"another class", "www.test", []string{"www.test. 60 CH A 192.0.2.66"}, nil, resolve.ErrNoData},
		{"an alias to nowhere", "www.test", []string{"www.test. 60 CNAME a.test."}, nil, resolve.ErrNoData},
		{"16 aliases", "cx.test", append(slices.Clone(long[1:]), "c"+strings.Repeat("x", 17)+".test. 60 A 192.0.2.1"), []string{"192.0.2.1"}, nil},
		{"17 aliases", "c.test", append(slices.Clone(long), "c"+strings.Repeat("x", 17)+".test. 60 A 192.0.2.1"), nil, resolve.ErrServer},
	} {
		n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			m := reply(req)
			m.Compress = true
			for _, text := range tt.answer {
				m.Answer = append(m.Answer, record(text))
			}
			_ = w.WriteMsg(m)
		})})
		r := n.resolver(one)
		if tt.kind != nil {
			fails(t, r, tt.host, selection.V4, tt.kind)
			continue
		}
		equal(t, tt.what, lookup(t, r, tt.host, selection.V4), resolve.Answer{V4: addrs(tt.want...)})
	}
}

// NXDOMAIN means that, whatever else is in the message.
func TestDenialWithAddresses(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": raw(func(req *dns.Msg) [][]byte {
		return [][]byte{with(req, func(m *dns.Msg) { m.Rcode = dns.RcodeNameError })}
	})})
	fails(t, n.resolver(one), "www.test", selection.V4, resolve.ErrNotFound, "NXDOMAIN")
}

func TestResolvConfOptions(t *testing.T) {
	z := zone{records: []string{
		"a.test. 60 A 192.0.2.10", "b.test. 60 A 192.0.2.11", "c.test. 60 A 192.0.2.12", "six.test. 60 AAAA 2001:db8::1",
	}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.1": z, "192.0.2.2": z})
	r := n.resolver(two + "options rotate use-vc\noptions no-aaaa\n")
	for _, host := range []string{"a.test", "b.test", "c.test"} {
		lookup(t, r, host, both)
	}
	equal(t, "asked", n.asked(false), []string{"192.0.2.1 tcp A a.test.", "192.0.2.2 tcp A b.test.", "192.0.2.1 tcp A c.test."})
	fails(t, r, "six.test", selection.V6, resolve.ErrNoData)
	equal(t, "asked for IPv6", len(n.asked(false)), 0)
}

// piped is a dial function whose servers answer each query, over a pipe, after a while; never where the answer is nil. It is
// for tests in a bubble, where sockets would hold the clock.
func piped(answer func(req *dns.Msg) (*dns.Msg, time.Duration)) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			defer func() { _ = far.Close() }()
			buf := make([]byte, 4096)
			k, err := far.Read(buf)
			if err != nil {
				return
			}
			var req dns.Msg
			if err := req.Unpack(buf[:k]); err != nil {
				panic(err)
			}
			if m, wait := answer(&req); m != nil {
				time.Sleep(wait) // the bubble's clock
				_, _ = far.Write(packed(m))
			}
			_, _ = io.Copy(io.Discard, far) // until the query is given up
		}()
		return near, nil
	}
}

// RFC 8305: the late family is waited for, for Delay, from when the other one's addresses came.
func TestLateFamily(t *testing.T) {
	const never = -1
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	for _, tt := range []struct {
		what    string
		a, aaaa time.Duration
		took    time.Duration
		pending selection.Family
	}{
		{"both at once", ms(10), ms(10), ms(10), 0},
		{"IPv6 within the delay", ms(200), ms(249), ms(249), 0},
		{"IPv6 late", ms(200), ms(300), ms(250), selection.V6},
		{"IPv6 never", ms(20), never, ms(70), selection.V6},
		{"IPv4 late", ms(300), ms(100), ms(150), selection.V4},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := network{t: t}
			r := n.resolver(one, func(o *resolve.Options) {
				o.Dial = piped(func(req *dns.Msg) (*dns.Msg, time.Duration) {
					m, wait := reply(req), tt.a
					text := "www.test. 60 A 192.0.2.10"
					if req.Question[0].Qtype == dns.TypeAAAA {
						text, wait = "www.test. 60 AAAA 2001:db8::10", tt.aaaa
					}
					if wait == never {
						return nil, 0
					}
					m.Answer = append(m.Answer, record(text))
					return m, wait
				})
			})
			want := resolve.Answer{V4: addrs("192.0.2.10"), V6: addrs("2001:db8::10"), Pending: tt.pending}
			if tt.pending&selection.V4 != 0 {
				want.V4 = nil
			}
			if tt.pending&selection.V6 != 0 {
				want.V6 = nil
			}
			began := time.Now()
			equal(t, tt.what, lookup(t, r, "www.test", both), want)
			equal(t, tt.what+" took", time.Since(began), tt.took)
			if tt.pending == 0 {
				r.Close()
				return
			}
			// Who comes while the question is still open does not wait for it again.
			began = time.Now()
			equal(t, tt.what+", again", lookup(t, r, "www.test", both), want)
			equal(t, tt.what+", again took", time.Since(began), time.Duration(0))
			// Asked for alone, it is waited for; and so it is in the cache for the next.
			if tt.aaaa != never {
				lookup(t, r, "www.test", tt.pending)
				began = time.Now()
				equal(t, tt.what+", at last", lookup(t, r, "www.test", both).Pending, selection.Family(0))
				equal(t, tt.what+", at last took", time.Since(began), time.Duration(0))
			} else {
				fails(t, r, "www.test", tt.pending, resolve.ErrTimeout)
			}
			r.Close()
		})
	}
}

// The end of the caller's time does not throw away what is there.
func TestDeadlineWithOneFamily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{t: t}
		r := n.resolver(one, func(o *resolve.Options) {
			o.Delay = time.Hour
			o.Dial = piped(func(req *dns.Msg) (*dns.Msg, time.Duration) {
				if req.Question[0].Qtype == dns.TypeAAAA {
					return nil, 0
				}
				m := reply(req)
				m.Answer = append(m.Answer, record("www.test. 60 A 192.0.2.10"))
				return m, time.Millisecond
			})
		})
		defer r.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		a, err := r.Lookup(ctx, "www.test", both)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "answer", a, resolve.Answer{V4: addrs("192.0.2.10"), Pending: selection.V6})
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if a, err := r.Lookup(ctx, "www.test", selection.V6); !errors.Is(err, resolve.ErrTimeout) {
			t.Errorf("%v, %v", a, err)
		}
	})
}
