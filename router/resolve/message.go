package resolve

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	// payload is the EDNS0 size that passes without fragments nearly everywhere (DNS Flag Day 2020). The buffer is larger, for
	// servers that do not heed it.
	payload  = 1232
	datagram = 4096

	// maxChain is how many aliases (CNAME) are followed within an answer.
	maxChain = 16

	// maxStray is how many datagrams that do not answer the question are passed over before it is put over TCP: whoever sends
	// that many is guessing at the query's number.
	maxStray = 64

	// caseWait is how long the right answer is waited for once there was one in letters of another case. Whether that was
	// forged or the server folds names, TCP tells, so that there is no need to wait for long.
	caseWait = 500 * time.Millisecond
)

// exchange puts a question to one server: over UDP, over TCP when the answer does not fit or cannot be told from a forged one;
// with EDNS0, without it when the
// server does not know it (RFC 6891 section 7). The message that it returns answers the question.
func (r *Resolver) exchange(c *conf, s *server, q question) (*dns.Msg, error) {
	network, edns := "udp", true
	if c.tcp || r.opt.QueryCase && s.folds.Load() > r.now() {
		network = "tcp"
	}
	for {
		m, err := r.once(c, network, s.addr, q, edns)
		switch {
		case errors.Is(err, errCase):
			s.folds.Store(r.now() + int64(foldsFor))
			network = "tcp"
		case network == "udp" && (errors.Is(err, errTruncated) || errors.Is(err, errStray)):
			network = "tcp"
		case err != nil:
			return nil, err
		case edns && (m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented):
			edns = false
		default:
			return m, nil
		}
	}
}

// once sends one query from a socket and port of its own and waits for its answer, settings.timeout at most.
func (r *Resolver) once(c *conf, network, server string, q question, edns bool) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(r.ctx, c.timeout)
	defer cancel()
	conn, err := r.opt.Dial(ctx, network, server)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", network, err)
	}
	defer func() { _ = conn.Close() }() // what was to be read is read
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("set deadline: %w", err)
	}
	stop := context.AfterFunc(r.ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // Close ends the wait
	defer stop()

	if network == "tcp" {
		return q.overTCP(conn, edns)
	}
	return r.overUDP(ctx, conn, q, edns)
}

// overUDP sends the query and waits for what answers it. It returns errCase when there was such a thing but for the case of its
// letters, and nothing better came in caseWait.
func (r *Resolver) overUDP(ctx context.Context, conn net.Conn, q question, edns bool) (*dns.Msg, error) {
	spelt := q.name + "."
	if r.opt.QueryCase {
		spelt = mixed(spelt)
	}
	id, query, err := q.pack(spelt, edns)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(query); err != nil {
		return nil, fmt.Errorf("send the query: %w", err)
	}
	if !r.opt.QueryCase {
		spelt = ""
	}
	buf := make([]byte, datagram)
	folded := false
	for range maxStray {
		n, err := conn.Read(buf)
		switch {
		case err != nil && folded && timeout(err):
			return nil, errCase
		case err != nil:
			return nil, fmt.Errorf("wait for the answer: %w", err)
		}
		m, err := q.read(buf[:n], id, spelt)
		switch {
		case err == nil, errors.Is(err, errTruncated):
			return m, err
		case errors.Is(err, errCase) && !folded:
			folded = true
			if err := hasten(ctx, conn); err != nil {
				return nil, err
			}
		}
	}
	return nil, errStray
}

// hasten brings the deadline of a query forward to caseWait from now, and leaves it where it is sooner.
func hasten(ctx context.Context, conn net.Conn) error {
	at := time.Now().Add(caseWait)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(at) {
		return nil
	}
	if err := conn.SetReadDeadline(at); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	return ctx.Err() // Close may have set its own just before
}

// overTCP sends the query and reads one message, each behind its length (RFC 1035 section 4.2.2). Nobody else can have put
// anything into the stream: a message that does not answer is the server's fault.
func (q question) overTCP(conn net.Conn, edns bool) (*dns.Msg, error) {
	id, query, err := q.pack(q.name+".", edns)
	if err != nil {
		return nil, err
	}
	framed := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(query)), uint16(len(query)))
	if _, err := conn.Write(append(framed, query...)); err != nil {
		return nil, fmt.Errorf("send the query: %w", err)
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, fmt.Errorf("wait for the answer: %w", err)
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	return q.read(buf, id, "")
}

func (q question) rtype() uint16 {
	if q.family == v6 {
		return dns.TypeAAAA
	}
	return dns.TypeA
}

// mixed is a name with each of its letters, which are lower case, in upper case with a chance of one half.
func mixed(name string) string {
	b := []byte(name)
	coins := make([]byte, len(b))
	_, _ = rand.Read(coins) // it never fails
	for i, c := range b {
		if 'a' <= c && c <= 'z' {
			b[i] = c - (coins[i]&1)*('a'-'A')
		}
	}
	return string(b)
}

// pack makes the query, with a random number and the name as it is spelt.
func (q question) pack(spelt string, edns bool) (id uint16, query []byte, err error) {
	var m dns.Msg
	m.SetQuestion(spelt, q.rtype())
	if edns {
		m.SetEdns0(payload, false)
	}
	if query, err = m.Pack(); err != nil {
		return 0, nil, fmt.Errorf("make the query: %w", err)
	}
	return m.Id, query, nil
}

// read parses what came back and checks that it answers this question under this number. Where spelt is not empty, the name in
// it is to be spelt so, byte for byte, and an answer that has it in letters of another case is errCase. A truncated answer is errTruncated
// (whatever its rest looks like); all else that is wrong with it is an error too. A failure without a question section is
// taken for the server's answer, since some send them so: it can make us ask another server, never believe an address.
func (q question) read(b []byte, id uint16, spelt string) (*dns.Msg, error) {
	var m dns.Msg
	err := m.Unpack(b)
	switch {
	case len(b) < 12 || m.Id != id || !m.Response || m.Opcode != dns.OpcodeQuery:
		return nil, errors.New("not an answer to this query")
	case len(m.Question) == 0 && err == nil && m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError && len(m.Answer) == 0:
		return &m, nil
	case len(m.Question) != 1 || !q.isAsked(m.Question[0]):
		return nil, errors.New("answer to another question")
	case spelt != "" && m.Question[0].Name != spelt:
		return nil, errCase
	case m.Truncated:
		return nil, errTruncated
	case err != nil:
		return nil, fmt.Errorf("parse the answer: %w", err)
	}
	return &m, nil
}

func (q question) isAsked(a dns.Question) bool {
	return a.Qtype == q.rtype() && a.Qclass == dns.ClassINET && same(a.Name, q.name+".")
}

// same compares names. The parser writes all that is not printable ASCII as escapes, so only ASCII is folded.
func same(a, b string) bool { return strings.EqualFold(a, b) }

// answer is what a message says of a question.
type answer struct {
	kind   kind // found, noName or noData
	addrs  []netip.Addr
	mapped []netip.Addr
	ttl    uint32 // seconds: the least of all records on the way; 0 for a denial that does not say (RFC 2308 section 5)
}

// interpret reads a message that read has passed. It follows the aliases from the name that was asked to its addresses; records
// that are not on that way count for nothing. The error is for what makes another server worth asking.
func (q question) interpret(m *dns.Msg) (answer, error) {
	switch m.Rcode {
	case dns.RcodeSuccess, dns.RcodeNameError:
	default:
		return answer{}, errRcode
	}
	a := answer{kind: noData, ttl: 1<<31 - 1}
	owner := q.name + "."
	for range maxChain + 1 {
		alias := ""
		for _, rr := range m.Answer {
			h := rr.Header()
			if h.Class != dns.ClassINET || !same(h.Name, owner) {
				continue
			}
			switch rr := rr.(type) {
			case *dns.A:
				if ip, ok := netip.AddrFromSlice(rr.A); ok && q.family == v4 {
					a.addrs = add(a.addrs, ip.Unmap())
					a.bound(h.Ttl)
				}
			case *dns.AAAA:
				ip, ok := netip.AddrFromSlice(rr.AAAA)
				if !ok || q.family != v6 {
					continue
				}
				if ip.Is4In6() {
					a.mapped = add(a.mapped, ip.Unmap())
				} else {
					a.addrs = add(a.addrs, ip)
				}
				a.bound(h.Ttl)
			case *dns.CNAME:
				if alias == "" {
					alias = rr.Target
					a.bound(h.Ttl)
				}
			}
		}
		switch {
		case m.Rcode == dns.RcodeSuccess && len(a.addrs)+len(a.mapped) > 0:
			a.kind = found
			return a, nil
		case alias == "":
			return a.denial(m)
		}
		owner = alias
	}
	return answer{}, errChain
}

// bound lowers the time to live; a value with the highest bit set is zero (RFC 2181 section 8).
func (a *answer) bound(ttl uint32) {
	if ttl > 1<<31-1 {
		ttl = 0
	}
	a.ttl = min(a.ttl, ttl)
}

// denial makes the answer of a message without addresses. How long it holds is said by the zone's SOA record; where there is
// none the answer holds for the floor, so that one burst of requests asks once.
func (a answer) denial(m *dns.Msg) (answer, error) {
	a.addrs, a.mapped = nil, nil
	if m.Rcode == dns.RcodeNameError {
		a.kind = noName
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			a.bound(soa.Hdr.Ttl)
			a.bound(soa.Minttl)
			return a, nil
		}
	}
	a.ttl = 0
	if a.kind == noData && len(m.Answer) == 0 && !m.Authoritative && !m.RecursionAvailable {
		return answer{}, errLame
	}
	return a, nil
}

// rcodeText is the response code by its name.
func rcodeText(m *dns.Msg) string {
	if s, ok := dns.RcodeToString[m.Rcode]; ok {
		return s
	}
	return fmt.Sprintf("RCODE%d", m.Rcode)
}
