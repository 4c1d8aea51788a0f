package main_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"wayout/scripts/lab"
)

// zone is the lab's name server: what it answers, by type and name.
type zone struct {
	records map[string][]string // "A name." -> addresses

	mu    sync.Mutex
	asked map[string]int // "A name."
}

// ServeDNS answers. Names below silent. get no answer at all, names below
// broken. a failure, and names without records do not exist.
func (z *zone) ServeDNS(w dns.ResponseWriter, req *dns.Msg) {
	q := req.Question[0]
	name := strings.ToLower(q.Name)
	key := dns.TypeToString[q.Qtype] + " " + name
	z.mu.Lock()
	z.asked[key]++
	z.mu.Unlock()
	m := new(dns.Msg).SetReply(req)
	m.RecursionAvailable = true
	switch {
	case strings.HasSuffix(name, "silent."), strings.HasPrefix(key, "AAAA half-"):
		return
	case strings.HasSuffix(name, "broken."):
		m.Rcode = dns.RcodeServerFailure
	case z.records["A "+name] == nil && z.records["AAAA "+name] == nil:
		m.Rcode = dns.RcodeNameError
	}
	for _, a := range z.records[key] {
		rr, err := dns.NewRR(fmt.Sprintf("%s 60 IN %s %s", name, dns.TypeToString[q.Qtype], a))
		if err != nil {
			panic(err) // a mistake in the test's own text
		}
		m.Answer = append(m.Answer, rr)
	}
	_ = w.WriteMsg(m) // who asked may have gone
}

func (z *zone) count(key string) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.asked[key]
}

// names runs the name server at the origin, and the daemon with a resolv.conf
// that leads there.
func (s *scene) names(t *testing.T, z *zone, hosts, config string) {
	t.Helper()
	z.asked = map[string]int{}
	var pc net.PacketConn
	err := s.Origin.Do(func() (err error) {
		pc, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(lab.OriginAddr4+":53")))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := &dns.Server{PacketConn: pc, Handler: z}
	done := make(chan error, 1)
	started := make(chan struct{})
	srv.NotifyStartedFunc = func() { close(started) }
	go func() { done <- srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() {
		if err := srv.Shutdown(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	s.write(config)
	s.run(lab.Program{Files: map[string]string{
		"/etc/resolv.conf": "nameserver " + lab.OriginAddr4 + "\nsearch corp.test\noptions timeout:1 attempts:1\n",
		"/etc/hosts":       hosts,
	}})
}

func TestNames(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.holes(t)
	z := &zone{records: map[string][]string{
		"A both.test.": {lab.OriginAddr4}, "AAAA both.test.": {lab.OriginAddr6},
		"A four.test.": {lab.OriginAddr4}, "AAAA six.test.": {lab.OriginAddr6},
		"A intranet.corp.test.":  {lab.OriginAddr4},
		"A loop.test.":           {"127.0.0.1"},
		"AAAA loop6.test.":       {"::1"},
		"AAAA mapped.test.":      {"::ffff:169.254.169.254"},
		"A metadata.test.":       {"169.254.169.254"},
		"A own.test.":            {lab.Primary1Of4},
		"A some-denied.test.":    {"127.0.0.1", lab.OriginAddr4, "169.254.1.1"},
		"AAAA some-denied.test.": {"::1"},
		"A happy.test.":          {lab.OriginAddr4}, "AAAA happy.test.": {blackhole6},
		"A two.test.":   {unreachable4, lab.OriginAddr4},
		"A half-.test.": {lab.OriginAddr4},
		"A dark.test.":  {blackhole4}, "AAAA dark.test.": {blackhole6},
	}}
	config := strings.Replace(outConfig("server:\n"+
		`  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: out, path_selection_header: X-Egress-Path, report_egress: true}`+"\n"),
		"type: direct_fixed\n", "type: direct_fixed\n    connect_timeout: 3s\n", 1)
	s.names(t, z, "127.0.0.1 localhost looped\n"+lab.OriginAddr4+" pinned.test also.test # the file is asked first\n"+lab.OriginAddr6+" pinned.test\n", config)

	v4, v6 := lab.Egress4()[0].String(), lab.Egress6()[0].String()
	for _, c := range []struct {
		name, host, path string
		source           string
		status           int
		kind             string
		text             string
	}{
		{"both families: IPv6 first", "both.test", "p1", v6, 0, "", ""},
		{"in capitals, with its dot", "BOTH.test.", "p1", v6, 0, "", ""},
		{"IPv4 alone", "four.test", "p1", v4, 0, "", ""},
		{"IPv6 alone", "six.test", "p1", v6, 0, "", ""},
		{"both families, a path with IPv4", "both.test", "p9", lab.Primary1Of4, 0, "", ""},
		{"both families, selected by the IPv4 address", "both.test", v4, v4, 0, "", ""},
		{"both families, selected by the IPv6 address", "both.test", v6, v6, 0, "", ""},
		{"IPv6 alone, a path with IPv4", "six.test", "p9", "", 502, "destination_ip_unroutable", "p9"},
		{"IPv6 alone, selected by the IPv4 address", "six.test", v4, "", 502, "destination_ip_unroutable", v4},
		{"by the search list", "intranet", "p1", v4, 0, "", ""},
		{"the other family's answer is late", "half-.test", "p1", v4, 0, "", ""},

		{"hosts file", "pinned.test", "p1", v6, 0, "", ""},
		{"hosts file, an alias", "also.test", "p1", v4, 0, "", ""},
		{"hosts file, loopback", "looped", "p1", "", 403, "destination_ip_prohibited", "127.0.0.1"},
		{"localhost", "localhost", "p1", "", 403, "destination_ip_prohibited", ""},
		{"below localhost", "me.localhost", "p1", "", 403, "destination_ip_prohibited", ""},

		{"no such name", "gone.test", "p1", "", 502, "dns_error", "gone.test"},
		{"no such name, the policy", "gone.test", "", "", 502, "dns_error", "gone.test"},
		{"a failing server", "www.broken", "p1", "", 502, "dns_error", "SERVFAIL"},
		{"a silent server", "www.silent", "p1", "", 504, "dns_timeout", "www.silent"},

		{"to loopback", "loop.test", "p1", "", 403, "destination_ip_prohibited", "127.0.0.1"},
		{"to IPv6 loopback", "loop6.test", "p1", "", 403, "destination_ip_prohibited", "::1"},
		{"to link-local in IPv6's clothes", "mapped.test", "p1", "", 403, "destination_ip_prohibited", "169.254.169.254"},
		{"to link-local", "metadata.test", "p1", "", 403, "destination_ip_prohibited", "169.254.169.254"},
		{"to the host itself", "own.test", "p1", "", 403, "destination_ip_prohibited", lab.Primary1Of4},
		{"to denied ones and an allowed one", "some-denied.test", "p1", v4, 0, "", ""},

		{"IPv6 is a black hole", "happy.test", "p1", v4, 0, "", ""},
		{"the first address is unreachable", "two.test", "p1", v4, 0, "", ""},
		{"all are black holes", "dark.test", "p1", "", 504, "connection_timeout", ""},
	} {
		for _, tunnel := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, tunnel %v", c.name, tunnel), func(t *testing.T) {
				t.Parallel()
				var header []string
				if c.path != "" {
					header = egress(c.path)
				}
				told, err := s.try(lab.Ask{Target: c.host + ":80", Header: header, Tunnel: tunnel})
				if err != nil {
					t.Fatal(err)
				}
				status := c.status
				if status == 0 {
					status = http.StatusOK
				}
				if told.Status != status || told.Seen.Source != c.source || !strings.Contains(told.Body, c.text) {
					t.Errorf("%d %q, the origin saw %q; want %d and %q", told.Status, told.Body, told.Seen.Source, status, c.source)
				}
				if ps := told.Header.Get("Proxy-Status"); c.kind != "" && !strings.HasPrefix(ps, "wayout; error="+c.kind+"; details=\"") {
					t.Errorf("Proxy-Status %q, want %s", ps, c.kind)
				}
				if told.Status == 200 && !tunnel && told.Seen.Host != c.host+":80" {
					t.Errorf("the origin was asked for %q", told.Seen.Host)
				}
			})
		}
	}
	t.Cleanup(func() {
		// Asked once for all requests, and never what the hosts file knows.
		for key, want := range map[string]int{
			"A both.test.": 1, "AAAA both.test.": 1, "A pinned.test.": 0, "AAAA also.test.": 0, "A localhost.": 0, "A looped.": 0,
		} {
			if n := z.count(key); n != want {
				t.Errorf("the name server was asked %d times for %s, want %d", n, key, want)
			}
		}
	})
}

// TestHappyEyeballs bounds the time that a dead IPv6 costs, and that it costs
// no other source address.
func TestHappyEyeballs(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.holes(t)
	z := &zone{records: map[string][]string{"A happy.test.": {lab.OriginAddr4}, "AAAA happy.test.": {blackhole6}}}
	s.names(t, z, "", strings.Replace(outConfig(""), "type: direct_fixed\n",
		"type: direct_fixed\n    connect_timeout: 1m\n    happy_eyeballs: {connection_attempt_delay: 50ms}\n", 1))
	for i := range 4 {
		begun := time.Now()
		told := s.ask(lab.Ask{Target: "happy.test:80", Header: egress(fmt.Sprintf("p%d", i+1)), Tunnel: i%2 == 1})
		took := time.Since(begun)
		if told.Status != 200 || told.Seen.Source != lab.Egress4()[i].String() {
			t.Errorf("%d %s from %s", told.Status, told.Body, told.Seen.Source)
		}
		if took < 45*time.Millisecond || took > 10*time.Second {
			t.Errorf("took %v: IPv6 has 50 ms, and then a second try must not wait for it", took)
		}
	}
}
