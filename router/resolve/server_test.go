package resolve_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

const both = selection.V4 | selection.V6

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// zone answers from records in master file syntax, e.g. {"www.test. 60 A 192.0.2.1"}. A name without records does not exist;
// one with records of other types has no data. Denials carry soa, where it is not empty.
type zone struct {
	records []string
	soa     string
}

func (z zone) ServeDNS(w dns.ResponseWriter, req *dns.Msg) {
	m := reply(req)
	exists := false
	owner := strings.ToLower(req.Question[0].Name)
	for _, text := range z.records {
		rr := record(text)
		if rr.Header().Name != owner {
			continue
		}
		exists = true
		if t := rr.Header().Rrtype; t == req.Question[0].Qtype || t == dns.TypeCNAME {
			m.Answer = append(m.Answer, rr)
		}
		if c, ok := rr.(*dns.CNAME); ok {
			owner = c.Target
		}
	}
	if !exists {
		m.Rcode = dns.RcodeNameError
	}
	if len(m.Answer) == 0 && z.soa != "" {
		m.Ns = append(m.Ns, record(z.soa))
	}
	_ = w.WriteMsg(m)
}

func record(text string) dns.RR {
	rr, err := dns.NewRR(text)
	if err != nil {
		panic(err) // a mistake in the test's own text
	}
	return rr
}

// reply is an empty answer to req, as a recursive server sends it.
func reply(req *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(req)
	m.RecursionAvailable = true
	return m
}

// rcode answers everything with one response code.
func rcode(code int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, req *dns.Msg) {
		m := reply(req)
		m.Rcode = code
		_ = w.WriteMsg(m)
	}
}

// silent answers nothing.
func silent(dns.ResponseWriter, *dns.Msg) {}

// network is a number of name servers and the dial function that reaches them. It keeps a log of what was asked: one line
// "SERVER NETWORK TYPE NAME" for each query, e.g. "192.0.2.1 udp A www.test.".
type network struct {
	t *testing.T

	mu      sync.Mutex
	servers map[string]string // address in resolv.conf -> where it listens
	log     []string
	dials   int
}

func newNetwork(t *testing.T, servers map[string]dns.Handler) *network {
	n := &network{t: t, servers: map[string]string{}}
	for addr, h := range servers {
		n.serve(addr, h)
	}
	return n
}

// serve starts a server over UDP and TCP on one loopback port.
func (n *network) serve(addr string, h dns.Handler) {
	n.t.Helper()
	var pc net.PacketConn
	var l net.Listener
	for range 50 { // the port of the one may be taken for the other
		var err error
		if pc, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			n.t.Fatal(err)
		}
		if l, err = net.Listen("tcp", pc.LocalAddr().String()); err == nil {
			break
		}
		_ = pc.Close()
	}
	if l == nil {
		n.t.Fatal("no port that is free for both UDP and TCP")
	}
	for _, s := range []*dns.Server{{PacketConn: pc}, {Listener: l}} {
		network := "udp"
		if s.Listener != nil {
			network = "tcp"
		}
		s.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			q := req.Question[0]
			n.note(fmt.Sprintf("%s %s %s %s", addr, network, dns.TypeToString[q.Qtype], q.Name))
			h.ServeDNS(w, req)
		})
		done := make(chan error, 1)
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { done <- s.ActivateAndServe() }()
		<-started
		n.t.Cleanup(func() {
			if err := s.Shutdown(); err != nil {
				n.t.Error(err)
			}
			if err := <-done; err != nil {
				n.t.Error(err)
			}
		})
	}
	n.reach(addr, pc.LocalAddr().String())
}

func (n *network) reach(addr, real string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.servers[net.JoinHostPort(addr, "53")] = real
}

func (n *network) note(line string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log = append(n.log, line)
}

// asked gives the log since the last call; A and AAAA of one name come in any order, so it is sorted where sort says so.
func (n *network) asked(sorted bool) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	log := n.log
	n.log = nil
	if sorted {
		slices.Sort(log)
	}
	return log
}

func (n *network) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	n.mu.Lock()
	real, ok := n.servers[addr]
	n.dials++
	n.mu.Unlock()
	if !ok {
		return nil, errors.New("network is unreachable")
	}
	return new(net.Dialer).DialContext(ctx, network, real)
}

// resolver makes a resolver on this network. Its files are resolv.conf with the lines given, and no hosts.
func (n *network) resolver(conf string, change ...func(*resolve.Options)) *resolve.Resolver {
	n.t.Helper()
	dir := n.t.TempDir()
	o := resolve.Options{
		Dial:       n.dial,
		ResolvConf: write(n.t, filepath.Join(dir, "resolv.conf"), conf),
		Hosts:      filepath.Join(dir, "hosts"),
		Timeout:    5 * time.Second,
		Refresh:    time.Hour,
	}
	for _, c := range change {
		c(&o)
	}
	r := resolve.New(o)
	n.t.Cleanup(r.Close)
	return r
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// clock is a clock that stands until it is moved.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// on makes a resolver follow a new clock.
func (c *clock) on(o *resolve.Options) { o.Now = c.now }

func newClock() *clock { return &clock{t: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)} }

func lookup(t *testing.T, r *resolve.Resolver, host string, want selection.Family) resolve.Answer {
	t.Helper()
	a, err := r.Lookup(t.Context(), host, want)
	if err != nil {
		t.Fatalf("Lookup(%q): %v", host, err)
	}
	return a
}

// fails expects an error that is all of kinds, with each of the texts in it.
func fails(t *testing.T, r *resolve.Resolver, host string, want selection.Family, kind error, texts ...string) {
	t.Helper()
	a, err := r.Lookup(t.Context(), host, want)
	if !errors.Is(err, kind) {
		t.Fatalf("Lookup(%q) = %v, %v; want error %q", host, a, err, kind)
	}
	var e *resolve.Error
	if !errors.As(err, &e) || e.Host != host {
		t.Errorf("Lookup(%q): error %#v is no *Error of that host", host, err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("Lookup(%q): error %q does not say %q", host, err, text)
		}
	}
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func addrs(texts ...string) []netip.Addr {
	var list []netip.Addr
	for _, s := range texts {
		list = append(list, netip.MustParseAddr(s))
	}
	return list
}
