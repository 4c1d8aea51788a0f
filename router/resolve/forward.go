package resolve

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	headerSize    = 12 // of a message, RFC 1035 section 4.1.1
	maxForwarding = 1024
	idleForward   = 10 * time.Second // of a program's TCP connection between two queries
)

// Forwarder hands the queries of local programs on to servers, and their answers back, whatever is asked for. It knows and
// keeps nothing itself.
type Forwarder struct {
	Servers []netip.AddrPort // in the order in which they are asked
	Dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	Timeout time.Duration // for one server; 5 s when zero

	busy chan struct{}
	once sync.Once
}

// NameServers gives the servers of a resolv.conf(5) that are not on this host, and true when others are named, or none is: those
// ask by ways of their own.
func NameServers(conf []byte) (servers []netip.AddrPort, local bool) {
	for _, s := range parseResolvConf(conf, "").servers {
		a, err := netip.ParseAddrPort(s)
		switch {
		case err != nil:
		case a.Addr().IsLoopback() || a.Addr().IsUnspecified():
			local = true
		default:
			servers = append(servers, a)
		}
	}
	return servers, local
}

// WithNameServer is a resolv.conf(5) with one server in the place of its own.
func WithNameServer(conf []byte, server netip.Addr) []byte {
	out := fmt.Appendf(nil, "nameserver %s\n", server)
	for line := range bytes.Lines(conf) {
		if f := bytes.Fields(line); len(f) > 0 && (string(f[0]) == "search" || string(f[0]) == "domain" || string(f[0]) == "options") {
			out = append(bytes.TrimRight(append(out, line...), "\n"), '\n')
		}
	}
	return out
}

// begin waits for a place among those that are served.
func (f *Forwarder) begin() {
	f.once.Do(func() { f.busy = make(chan struct{}, maxForwarding) })
	f.busy <- struct{}{}
}

func (f *Forwarder) end() { <-f.busy }

// ServeUDP answers datagrams until c is closed.
func (f *Forwarder) ServeUDP(c net.PacketConn) error {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a query: %w", err)
		}
		query := slices.Clone(buf[:n])
		if questionOf(query, false) == nil {
			continue
		}
		f.begin()
		go func() {
			defer f.end()
			_, _ = c.WriteTo(f.answer("udp", query), from) // who asked may be gone
		}()
	}
}

// ServeTCP answers connections until l is closed.
func (f *Forwarder) ServeTCP(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept a connection: %w", err)
		}
		f.begin()
		go func() {
			defer f.end()
			f.serve(c)
		}()
	}
}

// serve answers one connection's queries, one after the other (RFC 7766 section 6.2.1.1 allows to).
func (f *Forwarder) serve(c net.Conn) {
	defer c.Close()
	for {
		if c.SetDeadline(time.Now().Add(idleForward)) != nil {
			return
		}
		query, err := readFramed(c)
		if err != nil || questionOf(query, false) == nil {
			return
		}
		answer := f.answer("tcp", query)
		if c.SetDeadline(time.Now().Add(idleForward)) != nil || writeFramed(c, answer) != nil {
			return
		}
	}
}

// answer asks the servers in turn until one answers: twice each by UDP, where a datagram may be lost. When none does it is
// SERVFAIL.
func (f *Forwarder) answer(network string, query []byte) []byte {
	rounds := 1
	if network == "udp" {
		rounds = 2
	}
	for range rounds {
		for _, s := range f.Servers {
			if b, err := f.ask(network, s.String(), query); err == nil {
				return b
			}
		}
	}
	b := slices.Clone(query)
	b[2] = b[2]&0x79 | 0x80 // QR, opcode and RD as asked; no AA, no TC
	b[3] = dns.RcodeServerFailure
	// The question alone: what follows it (EDNS) is not echoed.
	binary.BigEndian.PutUint16(b[6:], 0)
	binary.BigEndian.PutUint16(b[8:], 0)
	binary.BigEndian.PutUint16(b[10:], 0)
	return b[:headerSize+len(questionOf(query, false))]
}

// ask puts a query to one server, from a socket and port of its own.
func (f *Forwarder) ask(network, server string, query []byte) ([]byte, error) {
	timeout := f.Timeout
	if timeout == 0 {
		timeout = 5 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := f.Dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if network == "tcp" {
		if err := writeFramed(c, query); err != nil {
			return nil, err
		}
		b, err := readFramed(c)
		if err == nil && !answers(b, query) {
			err = errStray
		}
		return b, err
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, 1<<16)
	for range maxStray {
		n, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		if answers(buf[:n], query) {
			return buf[:n], nil
		}
	}
	return nil, errStray
}

// answers says whether b is an answer to the query: its number and its question, which a server that understood nothing of it
// may leave out.
func answers(b, query []byte) bool {
	if len(b) < headerSize || b[2]&0x80 == 0 || b[0] != query[0] || b[1] != query[1] {
		return false
	}
	if binary.BigEndian.Uint16(b[4:]) == 0 {
		return b[3]&0x0f != dns.RcodeSuccess && b[3]&0x0f != dns.RcodeNameError
	}
	return bytes.EqualFold(questionOf(b, true), questionOf(query, false))
}

// questionOf is the question section of a message that has one question: name, type and class (RFC 1035 section 4.1.2). It is
// nil for all else, and for a query when an answer is wanted or the other way round.
func questionOf(b []byte, answer bool) []byte {
	if len(b) < headerSize || (b[2]&0x80 != 0) != answer || binary.BigEndian.Uint16(b[4:]) != 1 {
		return nil
	}
	for i := headerSize; i < len(b); {
		size := int(b[i])
		switch {
		case size > 63: // nothing stands before it that it could point to
			return nil
		case size == 0 && i+5 <= len(b):
			return b[headerSize : i+5]
		case size == 0:
			return nil
		}
		i += 1 + size
	}
	return nil
}

func readFramed(c io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeFramed(c io.Writer, b []byte) error {
	if len(b) > 1<<16-1 {
		return fmt.Errorf("a message of %d bytes", len(b))
	}
	_, err := c.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...))
	return err
}
