package resolve_test

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/resolve"

	"github.com/miekg/dns"
)

// bothPorts listens on one loopback port for datagrams and for connections.
func bothPorts(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 20 {
		u, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", u.LocalAddr().String())
		if err == nil {
			return u, l
		}
		_ = u.Close() // somebody has the port for connections: another one
	}
	t.Fatal("no port is free for both")
	return nil, nil
}

// forwarder serves on a loopback port, over UDP and TCP, and asks the servers of a network.
func forwarder(t *testing.T, n *network, timeout time.Duration, servers ...string) (at string) {
	t.Helper()
	f := &resolve.Forwarder{Dial: n.dial, Timeout: timeout}
	for _, s := range servers {
		f.Servers = append(f.Servers, netip.AddrPortFrom(netip.MustParseAddr(s), 53))
	}
	u, l := bothPorts(t)
	var served sync.WaitGroup
	served.Go(func() {
		if err := f.ServeUDP(u); err != nil {
			t.Error(err)
		}
	})
	served.Go(func() {
		if err := f.ServeTCP(l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		u.Close()
		l.Close()
		served.Wait()
	})
	return u.LocalAddr().String()
}

func exchange(t *testing.T, network, at, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, qtype)
	m.SetEdns0(4096, false)
	c := dns.Client{Net: network, Timeout: 20 * time.Second}
	r, _, err := c.Exchange(m, at)
	if err != nil {
		t.Fatalf("%s %s: %v", network, name, err)
	}
	return r
}

func TestForwarder(t *testing.T) {
	z := zone{records: []string{"a.test. 60 A 192.0.2.1", "a.test. 60 MX 10 mail.test.", "big.test. 60 TXT " + strings.Repeat(`"`+strings.Repeat("x", 200)+`" `, 30)}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.53": z})
	at := forwarder(t, n, 10*time.Second, "192.0.2.53")
	for _, network := range []string{"udp", "tcp"} {
		if r := exchange(t, network, at, "a.test.", dns.TypeMX); len(r.Answer) != 1 || r.Answer[0].(*dns.MX).Mx != "mail.test." {
			t.Errorf("%s: %v", network, r)
		}
		if r := exchange(t, network, at, "none.test.", dns.TypeA); r.Rcode != dns.RcodeNameError {
			t.Errorf("%s: %v", network, r)
		}
		equal(t, network, n.asked(false), []string{"192.0.2.53 " + network + " MX a.test.", "192.0.2.53 " + network + " A none.test."})
	}
	if r := exchange(t, "tcp", at, "big.test.", dns.TypeTXT); len(r.Answer) != 1 {
		t.Errorf("a long answer: %v", r)
	}
}

// The second server is asked when the first is out of reach, and nobody's silence is an answer.
func TestForwarderAsksTheNext(t *testing.T) {
	z := zone{records: []string{"a.test. 60 A 192.0.2.1"}}
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.53": z, "192.0.2.54": dns.HandlerFunc(silent)})
	for _, first := range []string{"192.0.2.55", "192.0.2.54"} {
		at := forwarder(t, n, 300*time.Millisecond, first, "192.0.2.53")
		for _, network := range []string{"udp", "tcp"} {
			if r := exchange(t, network, at, "A.test.", dns.TypeA); len(r.Answer) != 1 {
				t.Errorf("%s after %s: %v", network, first, r)
			}
		}
	}
	at := forwarder(t, n, 50*time.Millisecond, "192.0.2.54", "192.0.2.55")
	for _, network := range []string{"udp", "tcp"} {
		if r := exchange(t, network, at, "a.test.", dns.TypeA); r.Rcode != dns.RcodeServerFailure || len(r.Question) != 1 || r.Extra != nil {
			t.Errorf("%s: %v", network, r)
		}
	}
}

// What does not answer the question is passed over.
func TestForwarderBelievesNobody(t *testing.T) {
	strange := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		right := reply(req)
		right.Answer = append(right.Answer, record("a.test. 60 A 192.0.2.1"))
		number, question, query := right.Copy(), right.Copy(), right.Copy()
		number.Id++
		question.Question[0].Name = "b.test."
		query.Response = false
		for _, m := range []*dns.Msg{number, question, query, right} {
			_ = w.WriteMsg(m)
		}
	})
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.53": strange})
	at := forwarder(t, n, 10*time.Second, "192.0.2.53")
	if r := exchange(t, "udp", at, "a.test.", dns.TypeA); len(r.Answer) != 1 || r.Question[0].Name != "a.test." {
		t.Errorf("%v", r)
	}
}

func TestForwarderDropsNonsense(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"192.0.2.53": zone{}})
	at := forwarder(t, n, time.Second, "192.0.2.53")
	c, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, b := range [][]byte{{}, make([]byte, 11), make([]byte, 12), append(make([]byte, 5), 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1)} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	exchange(t, "udp", at, "x.test.", dns.TypeA) // it is alive
	if log := n.asked(false); len(log) != 1 {
		t.Errorf("asked %v", log)
	}
}

func TestNameServers(t *testing.T) {
	for _, c := range []struct {
		conf  string
		want  []string
		local bool
	}{
		{"nameserver 192.0.2.1\nnameserver 2001:db8::1 # x\n", []string{"192.0.2.1:53", "[2001:db8::1]:53"}, false},
		{"nameserver 127.0.0.53\noptions edns0\n", nil, true},
		{"nameserver ::1\nnameserver 192.0.2.1\n", []string{"192.0.2.1:53"}, true},
		{"nameserver 0.0.0.0\n", nil, true},
		{"", nil, true},
	} {
		servers, local := resolve.NameServers([]byte(c.conf))
		var got []string
		for _, s := range servers {
			got = append(got, s.String())
		}
		equal(t, c.conf, got, c.want)
		if local != c.local {
			t.Errorf("%q: local %v", c.conf, local)
		}
	}
}

func TestWithNameServer(t *testing.T) {
	got := string(resolve.WithNameServer([]byte("# x\nnameserver 192.0.2.1\nsearch a b\noptions ndots:2"), netip.MustParseAddr("127.1.2.3")))
	if want := "nameserver 127.1.2.3\nsearch a b\noptions ndots:2\n"; got != want {
		t.Errorf("got %q", got)
	}
}

func FuzzForwarderAnswers(f *testing.F) {
	q, err := new(dns.Msg).SetQuestion("a.test.", dns.TypeA).Pack()
	if err != nil {
		f.Fatal(err)
	}
	a := append([]byte(nil), q...)
	a[2] |= 0x80
	f.Add(a, q)
	f.Add(a[:12], q)
	f.Add([]byte{}, q)
	f.Fuzz(func(t *testing.T, answer, query []byte) {
		section := resolve.QuestionOf(query, false)
		if len(section) > len(query) || section != nil && len(section) < 5 {
			t.Errorf("question %x of %x", section, query)
		}
		if section == nil {
			return // dropped before it is asked
		}
		if resolve.Answers(answer, query) && (answer[0] != query[0] || answer[1] != query[1] || answer[2]&0x80 == 0) {
			t.Errorf("%x answers %x", answer, query)
		}
	})
}
