package resolve

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// FuzzAnswer takes bytes for a datagram. Whatever they are, an address comes out only of a message that answers the question
// under its number, of the family that was asked, in the letters in which it was asked where these count.
func FuzzAnswer(f *testing.F) {
	q := question{name: "www.test"}
	seed := func(change func(*dns.Msg), records ...string) {
		m := new(dns.Msg).SetQuestion("www.test.", dns.TypeA)
		m = new(dns.Msg).SetReply(m)
		m.Id, m.Compress, m.RecursionAvailable = 0, true, true
		for _, text := range records {
			rr, err := dns.NewRR(text)
			if err != nil {
				f.Fatal(err)
			}
			if _, ok := rr.(*dns.SOA); ok {
				m.Ns = append(m.Ns, rr)
			} else {
				m.Answer = append(m.Answer, rr)
			}
		}
		change(m)
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, false, false)
		f.Add(b[:len(b)-1], false, false)
		f.Add(b, true, false)
		f.Add(b, false, true)
	}
	same := func(*dns.Msg) {}
	seed(same, "www.test. 60 A 192.0.2.1")
	seed(same, "www.test. 60 CNAME a.test.", "a.test. 4294967295 A 192.0.2.1")
	seed(same, "www.test. 60 CNAME www.test.")
	seed(same, "test. 60 SOA ns.test. root.test. 1 2 3 4 5")
	seed(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }, "www.test. 60 AAAA ::ffff:192.0.2.1", "www.test. 60 AAAA 2001:db8::1")
	seed(func(m *dns.Msg) { m.Rcode = dns.RcodeNameError }, "test. 60 SOA ns.test. root.test. 1 2 3 4 5")
	seed(func(m *dns.Msg) { m.Truncated = true }, "www.test. 60 A 192.0.2.1")
	seed(func(m *dns.Msg) { m.Question, m.Rcode = nil, dns.RcodeRefused })
	seed(func(m *dns.Msg) { m.SetEdns0(1232, false) }, "www.test. 60 A 192.0.2.1")
	seed(func(m *dns.Msg) { m.Question[0].Name = "wWw.TeST." }, "www.test. 60 A 192.0.2.1")
	seed(func(m *dns.Msg) { m.Question[0].Name, m.Truncated = "wWw.TeST.", true })
	f.Fuzz(func(t *testing.T, b []byte, six, exact bool) {
		spelt := ""
		if exact {
			spelt = "wWw.TeST."
		}
		q := q
		if six {
			q.family = v6
		}
		m, err := q.read(b, 0, spelt)
		// The question of a message that has one comes first, at a fixed place.
		asked := []byte("\x03wWw\x04TeST\x00")
		if err == nil && len(m.Question) == 1 || errors.Is(err, errTruncated) {
			if exact && (len(b) < 12+len(asked) || !bytes.Equal(b[12:12+len(asked)], asked)) {
				t.Fatal("a question in other letters")
			}
		}
		if errors.Is(err, errCase) && (!exact || len(b) >= 12+len(asked) && bytes.Equal(b[12:12+len(asked)], asked)) {
			t.Fatal("the question in the letters asked for")
		}
		if err != nil {
			if m != nil {
				t.Error("a message with an error")
			}
			return
		}
		if b[0] != 0 || b[1] != 0 || b[2]&0x80 == 0 {
			t.Fatal("another number, or no answer")
		}
		a, err := q.interpret(m)
		if err != nil || a.kind != found {
			if len(a.addrs)+len(a.mapped) > 0 {
				t.Errorf("%v, %+v", err, a)
			}
			return
		}
		if len(m.Question) != 1 || m.Question[0].Qtype != q.rtype() || m.Rcode != dns.RcodeSuccess || m.Truncated {
			t.Errorf("addresses of a message that gives none: %v", m)
		}
		if n := len(a.addrs) + len(a.mapped); n < 1 || n > 2*maxAddrs || a.ttl > 1<<31-1 {
			t.Errorf("%+v", a)
		}
		is := func(list []netip.Addr, ok func(netip.Addr) bool) {
			for _, ip := range list {
				if !ok(ip) {
					t.Errorf("%v among %+v", ip, a)
				}
			}
		}
		is(a.mapped, netip.Addr.Is4)
		is(a.addrs, func(ip netip.Addr) bool { return ip.Is4() != six && !ip.Is4In6() })
	})
}

// Whatever the name, only the case of its letters is drawn, and each letter's by itself.
func FuzzMixed(f *testing.F) {
	for _, s := range []string{"www.test", "xn--bcher-kva.example", "a_b-c.0x1y", "1.z"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		var n name
		if !n.set(host) {
			return
		}
		full := string(n.host())
		spelt := mixed(full + ".")
		if strings.ToLower(spelt) != full+"." {
			t.Fatalf("%q is spelt %q", full, spelt)
		}
		q := question{name: full}
		id, query, err := q.pack(spelt, true)
		if err != nil {
			t.Fatal(err)
		}
		query[2] |= 0x80 // a response, as a server makes it that only sets this bit
		m, err := q.read(query, id, spelt)
		if err != nil || m.Question[0].Name != spelt {
			t.Errorf("%q: %v, %v", spelt, m, err)
		}
	})
}

func TestMixed(t *testing.T) {
	host := strings.Repeat("a", maxLabel)
	upper := [maxLabel]int{}
	const draws = 200
	for range draws {
		for i, c := range mixed(host) {
			if c == 'A' {
				upper[i]++
			}
		}
	}
	for i, n := range upper { // seven standard deviations from the middle
		if n < draws/4 || n > draws*3/4 {
			t.Errorf("letter %d is upper case in %d of %d", i, n, draws)
		}
	}
}

// A record of an address without its bytes, which the parser lets pass, is none.
func TestEmptyRecord(t *testing.T) {
	m := new(dns.Msg).SetQuestion("www.test.", dns.TypeA)
	m.Response, m.RecursionAvailable = true, true
	m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: "www.test.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}})
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	q := question{name: "www.test"}
	got, err := q.read(b, m.Id, "")
	if err != nil {
		t.Fatal(err)
	}
	if a, err := q.interpret(got); err != nil || a.kind != noData {
		t.Errorf("%+v, %v", a, err)
	}
}
