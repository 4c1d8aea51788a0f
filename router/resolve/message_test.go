package resolve

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// FuzzAnswer takes bytes for a datagram. Whatever they are, an address comes out only of a message that answers the question
// under its number, of the family that was asked.
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
		f.Add(b, false)
		f.Add(b[:len(b)-1], false)
		f.Add(b, true)
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
	f.Fuzz(func(t *testing.T, b []byte, six bool) {
		q := q
		if six {
			q.family = v6
		}
		m, err := q.read(b, 0)
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
	got, err := q.read(b, m.Id)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := q.interpret(got); err != nil || a.kind != noData {
		t.Errorf("%+v, %v", a, err)
	}
}
