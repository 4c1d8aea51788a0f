package resolve

import (
	"bytes"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Limits of the C library (resolv.conf(5)); the search list, which it no longer bounds, has ours.
const (
	maxServers  = 3
	maxSearch   = 32
	maxNdots    = 15
	maxTimeout  = 30
	maxAttempts = 5
)

// What is held against a server, and for how long.
const (
	slowFor   = 30 * time.Second // it did not answer in time: it is asked after the others
	brokenFor = 5 * time.Second  // it could not be reached or spoken to, which costs less to find out: so too
	foldsFor  = 10 * time.Minute // it does not keep the case of letters: it is asked over TCP (see Options.QueryCase)
)

// settings are what resolv.conf says, as plain values.
type settings struct {
	servers  []string // address:port, in order; never empty
	search   []string // domains in lower case, without trailing dot
	ndots    int      // names with at least so many dots are first tried as they are
	timeout  time.Duration
	attempts int
	rotate   bool // begin with another server each time
	tcp      bool // use-vc: no UDP
	noAAAA   bool // no-aaaa: IPv6 is not asked for
}

// defaults are the settings of an empty resolv.conf(5), without a server.
func defaults() settings { return settings{ndots: 1, timeout: 5 * time.Second, attempts: 2} }

// settings are what Options.Servers and Timeout say.
func (o *Options) settings() settings {
	s := defaults()
	for _, a := range o.Servers {
		s.servers = append(s.servers, netip.AddrPortFrom(a.Addr().Unmap(), orDefault(a.Port(), 53)).String())
	}
	s.timeout = orDefault(o.Timeout, s.timeout)
	return s
}

// parseResolvConf reads a resolv.conf(5) as the C library does: what it does not know or cannot read is passed over, the last
// of search and domain wins, no nameserver means 127.0.0.1, and no search list means the domain part of hostname.
func parseResolvConf(data []byte, hostname string) settings {
	s := defaults()
	listed := false
	for line := range bytes.Lines(data) {
		if line[0] == '#' || line[0] == ';' {
			continue
		}
		f := strings.Fields(string(line))
		for i, word := range f { // a comment behind the values
			if word[0] == '#' || word[0] == ';' {
				f = f[:i]
				break
			}
		}
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil && len(s.servers) < maxServers {
				s.servers = append(s.servers, net.JoinHostPort(a.String(), "53"))
			}
		case "domain":
			s.search, listed = domains(f[1:2]), true
		case "search":
			s.search, listed = domains(f[1:]), true
		case "options":
			for _, o := range f[1:] {
				s.option(o)
			}
		}
	}
	if len(s.servers) == 0 {
		s.servers = []string{"127.0.0.1:53"}
	}
	if _, domain, ok := strings.Cut(hostname, "."); ok && !listed {
		s.search = domains([]string{domain})
	}
	return s
}

// domains are the valid ones of a search list. The root ("."), which stands for the name as it is, is tried anyway.
func domains(words []string) []string {
	var list []string
	for _, w := range words {
		var n name
		if len(list) < maxSearch && n.set(w) {
			list = append(list, string(n.host()))
		}
	}
	return list
}

// option reads one word of an options line. Numbers above the C library's limits are the limit, as they are there.
func (s *settings) option(word string) {
	key, value, _ := strings.Cut(word, ":")
	n, err := strconv.Atoi(value)
	number := err == nil && n >= 0
	switch {
	case key == "ndots" && number:
		s.ndots = min(n, maxNdots)
	case key == "timeout" && number:
		s.timeout = time.Duration(min(max(n, 1), maxTimeout)) * time.Second
	case key == "attempts" && number:
		s.attempts = min(max(n, 1), maxAttempts)
	case word == "rotate":
		s.rotate = true
	case word == "use-vc":
		s.tcp = true
	case word == "no-aaaa":
		s.noAAAA = true
	}
}

// conf is settings at work: with what has been learnt of the servers since.
type conf struct {
	settings
	asked []*server // one for each of settings.servers
	turn  atomic.Uint32
}

// server is one of those that are asked. Its times are the cache's clock; 0: there is nothing against it.
type server struct {
	addr  string
	last  atomic.Int64 // asked after the others until then
	folds atomic.Int64 // asked over TCP until then
}

func newConf(s settings) *conf {
	c := &conf{settings: s}
	for _, addr := range s.servers {
		c.asked = append(c.asked, &server{addr: addr})
	}
	return c
}

// order is the servers in the order in which a question is put to them: as listed (turned by one each time with rotate), those
// that were lately silent or out of reach last. A dead first server would else cost every question its whole timeout.
func (c *conf) order(now int64) []*server {
	first := 0
	if c.rotate {
		first = int(c.turn.Add(1)-1) % len(c.asked)
	}
	var well, ill []*server
	for i := range c.asked {
		s := c.asked[(first+i)%len(c.asked)]
		if s.last.Load() > now {
			ill = append(ill, s)
		} else {
			well = append(well, s)
		}
	}
	return append(well, ill...)
}

// tries is how many names n may stand for.
func (c *conf) tries(n *name) int {
	if n.absolute {
		return 1
	}
	return 1 + len(c.search)
}

// try is the i-th name that n may stand for: as it is, before or after the search list, depending on its dots. It is good
// until the next call; false when it is too long to be a name.
func (c *conf) try(n *name, i int) ([]byte, bool) {
	switch {
	case n.absolute, n.dots >= c.ndots && i == 0, n.dots < c.ndots && i == len(c.search):
		return n.host(), true
	case n.dots >= c.ndots:
		i--
	}
	return n.with(c.search[i])
}
