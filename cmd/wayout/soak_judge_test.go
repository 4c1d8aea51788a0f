package main_test

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// lookout judges every packet that comes from the host by one uplink, as it
// passes.
type lookout struct {
	isp   string
	watch *lab.Capture
	judge func(lab.Packet) (kind string, ok bool)

	mu    sync.Mutex
	seen  map[string]int // by kind
	wrong []string
	stop  context.CancelFunc
	done  chan struct{}
}

// Kinds of packets.
const (
	towards    = "towards the host"
	neighbours = "neighbours" // ARP, neighbour discovery, groups: of the link, and no further
	icmp       = "ICMP"
	tcp        = "TCP"
	udp        = "UDP"
)

// wrongsTold bounds what is told of wrong packets; they are counted all the same.
const wrongsTold = 30

func newLookout(t *testing.T, isp *lab.NS, judge func(lab.Packet) (kind string, ok bool)) *lookout {
	t.Helper()
	c, err := isp.Capture("host0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &lookout{isp: isp.Name, watch: c, judge: judge, seen: map[string]int{}, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for {
			pkts, err := c.Take(ctx)
			if err != nil {
				return
			}
			l.see(pkts)
		}
	}()
	t.Cleanup(func() {
		stop()
		<-l.done
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func (l *lookout) see(pkts []lab.Packet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range pkts {
		kind, ok := l.judge(p)
		l.seen[kind]++
		if !ok {
			l.seen["wrong"]++
			if len(l.wrong) < wrongsTold {
				l.wrong = append(l.wrong, p.String())
			}
		}
	}
}

// uplinkRules are what may be seen of an uplink.
type uplinkRules struct {
	links []netip.Prefix        // the networks of the uplink itself
	own   func(netip.Addr) bool // whether a source is one of the uplink's paths'
}

// linksOf are the networks of the world's uplinks.
func linksOf(uplink int) []netip.Prefix {
	if uplink == 0 {
		return []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:100::/64")}
	}
	return []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:200::/64")}
}

// judge tells of what kind a packet is, and whether it may be where it is. What
// leaves for the origin has the source of a path, and of one of this uplink: also
// what the kernel sends without a socket, resets, acknowledgements out of
// TIME_WAIT and ICMP errors, since it answers from the address that was asked.
func (l uplinkRules) judge(p lab.Packet) (kind string, ok bool) {
	src, dst := p.Src.Addr(), p.Dst.Addr()
	origin := dst.IsValid() && (dst.String() == lab.OriginAddr4 || dst.String() == lab.OriginAddr6)
	switch {
	case p.Out:
		return towards, true
	case p.EtherType == unix.ETH_P_ARP:
		return neighbours, true
	case p.Proto == unix.IPPROTO_TCP:
		return tcp, origin && l.own(src)
	case p.Proto == unix.IPPROTO_UDP:
		return udp, origin && l.own(src)
	case p.Proto == unix.IPPROTO_ICMPV6 || p.Proto == unix.IPPROTO_IGMP:
		near := func(n netip.Prefix) bool { return n.Contains(dst) }
		if dst.IsMulticast() || dst.IsLinkLocalUnicast() || slices.ContainsFunc(l.links, near) {
			return neighbours, true
		}
		return icmp, origin && l.own(src)
	case p.Proto == unix.IPPROTO_ICMP:
		return icmp, origin && l.own(src)
	}
	return "unknown", false
}

// verdict waits until all that has come in by the count of the interface was
// judged, and says what came of it. Sources are watched on.
func (l *lookout) verdict(t *testing.T) {
	t.Helper()
	all := func() (n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for kind, k := range l.seen {
			// Of what goes to a host whose link is down the capture has more.
			if kind != "wrong" && kind != towards {
				n += k
			}
		}
		return n
	}
	var state string
	eventually(t, "every packet of "+l.isp+" is judged", func() bool {
		in, _, err := l.watch.Truth()
		if err != nil {
			t.Fatal(err)
		}
		state = fmt.Sprintf("%d of %d", all(), in.Packets)
		return uint64(all()) == in.Packets
	}, &state)
	l.mu.Lock()
	defer l.mu.Unlock()
	t.Logf("%s: %d packets, %s", l.isp, sum(l.seen)-l.seen["wrong"], counts(l.seen))
	if n := l.seen["wrong"]; n != 0 {
		t.Errorf("%s has seen %d wrong packets:\n%s", l.isp, n, strings.Join(l.wrong, "\n"))
	}
	if l.seen[tcp] == 0 || l.seen[udp] == 0 {
		t.Errorf("%s has not seen both TCP and UDP", l.isp)
	}
}

// tally counts operations by what they were and what came of them.
type tally struct {
	mu    sync.Mutex
	kinds map[string]map[string]int
}

func (y *tally) count(kind, answer string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.kinds == nil {
		y.kinds = map[string]map[string]int{}
	}
	if y.kinds[kind] == nil {
		y.kinds[kind] = map[string]int{}
	}
	y.kinds[kind][answer]++
}

func (y *tally) String() string {
	all := y.all()
	y.mu.Lock()
	defer y.mu.Unlock()
	var b strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(y.kinds)) {
		fmt.Fprintf(&b, "%s: %d: %s\n", kind, sum(y.kinds[kind]), counts(y.kinds[kind]))
	}
	fmt.Fprintf(&b, "all: %d: %s", sum(all), counts(all))
	return b.String()
}

// all counts every answer, whatever the kind.
func (y *tally) all() map[string]int {
	y.mu.Lock()
	defer y.mu.Unlock()
	all := map[string]int{}
	for _, answers := range y.kinds {
		for answer, n := range answers {
			all[answer] += n
		}
	}
	return all
}

func sum(m map[string]int) (n int) {
	for _, k := range m {
		n += k
	}
	return n
}

func counts(m map[string]int) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		all = append(all, fmt.Sprintf("%s %d", k, m[k]))
	}
	return strings.Join(all, ", ")
}

// TestLookoutJudges has the judge see what must not be.
func TestLookoutJudges(t *testing.T) {
	own := lab.Egress4()[0]
	l := uplinkRules{links: linksOf(0), own: func(a netip.Addr) bool { return a == own }}
	at := func(s string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(s), 80) }
	origin4, origin6 := at(lab.OriginAddr4), at(lab.OriginAddr6)
	for _, c := range []struct {
		name string
		p    lab.Packet
		kind string
		ok   bool
	}{
		{"of the path", lab.Packet{Proto: unix.IPPROTO_TCP, Src: netip.AddrPortFrom(own, 1), Dst: origin4}, tcp, true},
		{"of the primary", lab.Packet{Proto: unix.IPPROTO_TCP, Src: at(lab.Primary1Of4), Dst: origin4}, tcp, false},
		{"a reset of the primary", lab.Packet{Proto: unix.IPPROTO_TCP, Flags: lab.RST, Src: at(lab.Primary1Of6), Dst: origin6}, tcp, false},
		{"of another uplink's path", lab.Packet{Proto: unix.IPPROTO_UDP, Src: netip.AddrPortFrom(lab.Egress4()[4], 1), Dst: origin4}, udp, false},
		{"to elsewhere", lab.Packet{Proto: unix.IPPROTO_UDP, Src: netip.AddrPortFrom(own, 1), Dst: at(lab.Gateway1Of4)}, udp, false},
		{"the other way", lab.Packet{Out: true, Proto: unix.IPPROTO_TCP, Src: origin4, Dst: at(lab.Primary1Of4)}, towards, true},
		{"an ICMP error of the primary", lab.Packet{Proto: unix.IPPROTO_ICMP, Src: at(lab.Primary1Of4), Dst: origin4}, icmp, false},
		{"an ICMPv6 error of the primary", lab.Packet{Proto: unix.IPPROTO_ICMPV6, Src: at(lab.Primary1Of6), Dst: origin6}, icmp, false},
		{"neighbour discovery", lab.Packet{Proto: unix.IPPROTO_ICMPV6, Src: at(lab.Primary1Of6), Dst: at(lab.Gateway1Of6)}, neighbours, true},
		{"ARP", lab.Packet{EtherType: unix.ETH_P_ARP}, neighbours, true},
		{"nothing that is known", lab.Packet{Proto: unix.IPPROTO_SCTP, Src: netip.AddrPortFrom(own, 1), Dst: origin4}, "unknown", false},
	} {
		if kind, ok := l.judge(c.p); kind != c.kind || ok != c.ok {
			t.Errorf("%s: %s %v, want %s %v", c.name, kind, ok, c.kind, c.ok)
		}
	}
}
