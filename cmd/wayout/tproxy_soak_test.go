package main_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// What the clients of the diverted hunt ask for, by what selects the path. Each has
// two paths of its own, one by each uplink, and a configuration says which is the
// one.
const (
	byServer  = iota // select of the server
	byRoom1          // the client's network
	byRoom2          // another
	byName1          // the name that HTTP or QUIC shows
	byName2          // another
	byNoName         // none that can be seen
	byAnother        // the server of a port that is diverted at times
	byPress          // the server with few flows
	entries          // their number

	undiverted = entries // a port that nobody diverts
)

// entryNames are the same for people.
func entryName(e int) string {
	return [...]string{"server", "room 1", "room 2", "name 1", "name 2", "no name", "port at times", "few flows", "not diverted"}[e]
}

// port of an entry, of TCP and of UDP.
func entryPort(e int) uint16 {
	return [...]uint16{1000, 2000, 2000, 3000, 3000, 3000, 4000, 5000, 6000}[e]
}

// entrySource is the address of one of an entry's two paths, and by which uplink it
// leaves.
func entrySource(e, variant int, six bool) (_ netip.Addr, uplink int) {
	uplink = (e + variant) % 2
	form := [2][2]string{{"198.51.100.%d", "2001:db8:100::%d"}, {"203.0.113.%d", "2001:db8:200::%d"}}[uplink]
	return netip.MustParseAddr(fmt.Sprintf(form[choose(six)], 30+2*e+variant)), uplink
}

func choose(yes bool) int {
	if yes {
		return 1
	}
	return 0
}

// fewFlows is how many flows one of the servers may have.
const fewFlows = 48

// divertedSoak is the hunt for diverted traffic that leaves by a wrong source, or as
// it came.
type divertedSoak struct {
	*gateway
	weather *weather
	knocks  *knocks
	pace    int // operations between two things that an operator does, at most
	known   map[netip.Addr]int
	dests   []netip.Addr
	quic    [2][]byte
	ports   atomic.Uint32
	answers tally
	chaos   tally

	mu      sync.Mutex
	history []diverting // all configurations, in order
	low     int         // the oldest that may be in force
	starts  int         // of the daemon
}

// knocks counts what clients have tried, whatever came of it, for who waits.
type knocks struct {
	mu   sync.Mutex
	more *sync.Cond
	n    int
	over bool
}

func newKnocks() *knocks {
	k := &knocks{}
	k.more = sync.NewCond(&k.mu)
	return k
}

func (k *knocks) add() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.n++
	k.more.Broadcast()
}

// after waits for n more; it is false when there are no more.
func (k *knocks) after(n int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for end := k.n + n; k.n < end && !k.over; {
		k.more.Wait()
	}
	return !k.over
}

func (k *knocks) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over = true
	k.more.Broadcast()
}

// Clients of the hunt: anybody, and one in each room.
func clientOf(e int, six bool) netip.Addr {
	host := 2
	switch e {
	case byRoom1:
		host = 11
	case byRoom2:
		host = 12
	}
	form := [2]string{"10.0.0.%d", "fd00::%d"}[choose(six)]
	return netip.MustParseAddr(fmt.Sprintf(form, host))
}

func newDivertedSoak(t *testing.T, total int) *divertedSoak {
	h := &divertedSoak{
		gateway: newForwarder(t), weather: newWeather(total), knocks: newKnocks(),
		pace: min(max(total/75, 40), 600), known: map[netip.Addr]int{},
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"one", "two"} {
		var err error
		h.quic[i], err = os.ReadFile(filepath.Join("testdata", "quic-"+name+".bin"))
		must(err)
	}
	for e := range entries {
		for variant := range 2 {
			for _, six := range []bool{false, true} {
				a, uplink := entrySource(e, variant, six)
				h.known[a] = e
				if uplink == 1 { // by isp1 they are the daemon's to manage
					must(h.Host.AddAddr("eth1", lab.EgressPrefix(a)))
				}
			}
		}
	}
	for _, e := range []int{byRoom1, byRoom2} {
		must(h.Client.AddAddr("eth0", netip.PrefixFrom(clientOf(e, false), 24), netip.PrefixFrom(clientOf(e, true), 64)))
	}
	// Several destinations, and a way back to the clients: what is forwarded is
	// answered too, and says so.
	for i := range 3 {
		for _, d := range []struct {
			form     string
			via, up2 string
		}{{"192.0.2.%d", "192.0.2.2", "192.0.2.6"}, {"2001:db8:80::%d", "2001:db8:1::2", "2001:db8:2::2"}} {
			a := netip.MustParseAddr(fmt.Sprintf(d.form, 80+i))
			h.dests = append(h.dests, a)
			if i > 0 {
				one := netip.PrefixFrom(a, a.BitLen())
				must(h.Origin.AddAddr("lo", one))
				must(h.ISP1.AddRoute(one, netip.MustParseAddr(d.via)))
				must(h.ISP2.AddRoute(one, netip.MustParseAddr(d.up2)))
			}
		}
	}
	for _, r := range []struct {
		ns       *lab.NS
		dst, via string
	}{
		{h.Origin, "10.0.0.0/24", "192.0.2.1"},
		{h.Origin, "fd00::/64", "2001:db8:1::1"},
		{h.ISP1, "10.0.0.0/24", lab.Primary1Of4},
		{h.ISP1, "fd00::/64", lab.Primary1Of6},
	} {
		must(r.ns.AddRoute(netip.MustParsePrefix(r.dst), netip.MustParseAddr(r.via)))
	}
	for _, port := range []uint16{1000, 2000, 3000, 4000, 5000, 6000} {
		for _, d := range h.dests {
			at := netip.AddrPortFrom(d, port).String()
			tell(t, h.Origin, at, at)
			tellDatagrams(t, h.Origin, at, at)
		}
		// The host has listeners of its own, that would answer.
		at := fmt.Sprintf("[::]:%d", port)
		tell(t, h.Host, "host", at)
		tellDatagrams(t, h.Host, "host", at)
	}
	return h
}

// diverting is a configuration of the hunt.
type diverting struct {
	variants [entries]int // which path each entry has
	shape    int          // how ports are spelt, all of which are diverted in every one
	at, also bool         // the port that is diverted at times is, of TCP, and of UDP
	drop     bool         // rest: drop
	list     int          // how interfaces are listed
	suffix   string       // of the servers' names
	keep     bool
}

// draw makes up another configuration.
func drawDiverting(rng *rand.Rand) diverting {
	yes := func() bool { return rng.IntN(2) == 0 }
	c := diverting{shape: rng.IntN(3), at: yes(), also: yes(), drop: yes(), list: rng.IntN(3), keep: yes()}
	for e := range c.variants {
		c.variants[e] = rng.IntN(2)
	}
	if rng.IntN(3) == 0 {
		c.suffix = "-2"
	}
	return c
}

// outcome is what a knock has to come to by a configuration: an answer of the origin
// that sees a source; nothing without one.
func (c diverting) outcome(e int, k knock) (seen netip.Addr, ok bool) {
	if e == undiverted || e == byAnother && (!k.udp && !c.at || k.udp && !c.also) {
		return k.from, !c.drop // forwarded
	}
	seen, _ = entrySource(e, c.variants[e], k.from.Is6())
	return seen, true
}

// text is the configuration as the daemon reads it.
func (c diverting) text() string {
	var b strings.Builder
	managed, own, _ := strings.Cut(twoUplinks, "  - {name: isp2")
	b.WriteString(managed + "  - {name: isp2" + strings.ReplaceAll(own, ", manage_addresses: true", ""))
	fmt.Fprintf(&b, "keep_on_stop: %t\ndrain_timeout: 1s\nescaper:\n", c.keep)
	node := func(e, variant int) string {
		v4, uplink := entrySource(e, variant, false)
		v6, _ := entrySource(e, variant, true)
		return fmt.Sprintf("{id: e%dv%d, ipv4: %s, ipv6: %q, uplink: isp%d}", e, variant, v4, v6, uplink+1)
	}
	b.WriteString("  - {name: out, type: direct_fixed, nodes: [")
	for _, e := range []int{byServer, byRoom1, byRoom2, byAnother, byPress} {
		fmt.Fprintf(&b, "%s, %s, ", node(e, 0), node(e, 1))
	}
	b.WriteString("]}\n  - {name: by-name, type: route_upstream, exact_match: [{next: one, hosts: [one.example]}], child_match: [{next: two, domains: [two.example]}], default_next: none}\n")
	for i, name := range []string{"one", "two", "none"} { // nodes that come and go
		e := byName1 + i
		fmt.Fprintf(&b, "  - {name: %s, type: direct_fixed, nodes: [%s]}\n", name, node(e, c.variants[e]))
	}
	fmt.Fprintf(&b, "user_group:\n  - name: rooms\n    users:\n")
	for _, e := range []int{byRoom1, byRoom2} {
		fmt.Fprintf(&b, "      - {name: room%d, from: [%s, %q], egress_path: {out: e%dv%d}}\n", e, clientOf(e, false), clientOf(e, true), e, c.variants[e])
	}
	b.WriteString("server:\n")
	lists := [...]string{"lan0", "[lan0, lan9]", "[lan9, lan0]"} // there is no lan9
	rest := [...]string{"forward", "drop"}[choose(c.drop)]
	server := func(name, divert, more string) {
		fmt.Fprintf(&b, "  - {name: %s%s, type: tproxy, interface: %s, divert: [%s], rest: %s, %s}\n", name, c.suffix, lists[c.list], divert, rest, more)
	}
	ports := func(port int) string {
		switch c.shape {
		case 1:
			return fmt.Sprintf("tcp/%d-%d, udp/%d-%d", port-100, port+100, port, port+1)
		case 2:
			return fmt.Sprintf("tcp/%d-%d, udp/%d-%d", port, port+999, port-1, port)
		}
		return fmt.Sprintf("tcp/%d, udp/%d", port, port)
	}
	server("fixed", ports(1000), fmt.Sprintf("escaper: out, select: {out: e%dv%d}", byServer, c.variants[byServer]))
	server("rooms", ports(2000), "escaper: out, user_group: rooms")
	server("names", "tcp/3000, udp/3000", "escaper: by-name, sniff: true, sniff_timeout: 5s, udp_idle_timeout: 20s")
	server("press", "tcp/5000, udp/5000", fmt.Sprintf("escaper: out, select: {out: e%dv%d}, udp_flows: %d, udp_idle_timeout: 1s", byPress, c.variants[byPress], fewFlows))
	var at []string
	if c.at {
		at = append(at, "tcp/4000")
	}
	if c.also {
		at = append(at, "udp/4000")
	}
	if len(at) > 0 {
		server("another", strings.Join(at, ", "), fmt.Sprintf("escaper: out, select: {out: e%dv%d}", byAnother, c.variants[byAnother]))
	}
	return b.String()
}

// next announces a configuration: from now on it may be in force. What it returns
// says that it alone is.
func (h *divertedSoak) next(c diverting) (settled func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.history = append(h.history, c)
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.low = len(h.history) - 1
	}
}

// current is the configuration that was announced last.
func (h *divertedSoak) current() diverting {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.history[len(h.history)-1]
}

// moment is what may be in force, and how often the daemon was started.
type moment struct {
	low, starts int
	report
}

func (h *divertedSoak) now() moment {
	r := h.weather.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	return moment{h.low, h.starts, r}
}

// since gives the configurations of which one may have been in force since a
// moment.
func (h *divertedSoak) since(m moment) []diverting {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.history[m.low:len(h.history):len(h.history)]
}

// soakPatience is for an answer that is to come.
const soakPatience = 10 * time.Second

// draw chooses what a client asks.
func (h *divertedSoak) draw(rng *rand.Rand) (e int, k knock) {
	e, k.udp, k.reset = rng.IntN(undiverted+1), rng.IntN(2) == 0, rng.IntN(2) == 0
	if e == undiverted && rng.IntN(2) == 0 {
		e = byAnother // the rarer, else: one of it may wait for nothing
	}
	six := rng.IntN(2) == 0
	k.from, k.ports = clientOf(e, six), &h.ports
	k.to = netip.AddrPortFrom(h.dests[2*rng.IntN(len(h.dests)/2)+choose(six)], entryPort(e))
	k.say = fmt.Appendf(nil, "\x01 some words %d", rng.IntN(1000)) // nothing that a name could be in
	if name := e - byName1; name == 0 || name == 1 {
		k.say = fmt.Appendf(nil, "GET / HTTP/1.1\r\nHost: %s.example\r\n\r\n", []string{"one", "www.two"}[name])
		if k.udp {
			k.say = h.quic[name]
		}
	}
	return e, k
}

// client asks one thing after the other, on a thread of the client's namespace.
func (h *divertedSoak) client(rng *rand.Rand) {
	if err := h.Client.Do(func() error {
		for h.weather.goes(clients) {
			e, k := h.draw(rng)
			m := h.now()
			k.patience = soakPatience
			if _, ok := h.current().outcome(e, k); !ok || m.bad && k.udp {
				k.patience = brief
			}
			a, err := k.once()
			h.came(clients, e, k, m, a, err)
		}
		return nil
	}); err != nil {
		h.t.Error(err)
	}
}

// came judges what came of a knock, and gives whether it was answered as it should.
func (h *divertedSoak) came(c crew, e int, k knock, m moment, a answer, err error) bool {
	defer h.knocks.add()
	kind := [crews]string{kept: "kept, ", pressing: "press, "}[c] + entryName(e) + ", " + k.network()
	say := func(what string, args ...any) {
		h.t.Helper()
		h.weather.over() // the first fault is as good as many
		h.t.Errorf("%s: %s > %s: %s", kind, k.from, k.to, fmt.Sprintf(what, args...))
	}
	silent := false
	for _, now := range h.since(m) {
		seen, ok := now.outcome(e, k)
		silent = silent || !ok
		if err == nil && ok && a.name == k.to.String() && a.seen == seen {
			h.answers.count(kind, "ok")
			h.weather.ended(c, 1)
			return true
		}
	}
	switch {
	case err == nil:
		h.answers.count(kind, "WRONG")
		say("answered by %s, which sees %s", a.name, a.seen)
	case errors.Is(err, errGarbled):
		h.answers.count(kind, "WRONG")
		say("%v", err)
	case errors.Is(err, errNobody) && silent:
		h.answers.count(kind, "dropped")
	case h.weather.badSince(m.report):
		h.answers.count(kind, "not now: "+short(err))
	default:
		h.answers.count(kind, "error")
		say("%v", err)
	}
	return false
}

// short is an error without what differs from one to the next.
func short(err error) string {
	if no := unix.Errno(0); errors.As(err, &no) {
		return no.Error()
	}
	return err.Error()
}

// neighbour talks to the host itself, which has to answer all the time.
func (h *divertedSoak) neighbour(rng *rand.Rand) {
	if err := h.Client.Do(func() error {
		for h.knocks.after(3) {
			six, udp := rng.IntN(2) == 0, rng.IntN(2) == 0
			to := [2][]string{{lab.HostAddr4, lab.Primary1Of4, lab.Primary2Of4}, {lab.HostAddr6, lab.Primary1Of6, lab.Primary2Of6}}[choose(six)]
			at := to[0] // from which alone datagrams of a wildcard listener's are answered
			if !udp {
				at = to[rng.IntN(len(to))]
			}
			k := knock{udp: udp, from: clientOf(rng.IntN(entries), six), say: []byte("to you"), patience: 2 * soakPatience, reset: true}
			k.to = netip.AddrPortFrom(netip.MustParseAddr(at), entryPort(rng.IntN(undiverted+1)))
			a, err := k.once()
			if err != nil || a.name != "host" || a.seen != k.from {
				h.answers.count("the host itself", "WRONG")
				h.weather.over()
				h.t.Errorf("%s to the host itself: %s > %s: answered by %q, which sees %s: %v", k.network(), k.from, k.to, a.name, a.seen, err)
				continue
			}
			h.answers.count("the host itself", "ok")
		}
		return nil
	}); err != nil {
		h.t.Error(err)
	}
}

// keptOpen is a connection or a socket of UDP that is asked again and again.
type keptOpen struct {
	e     int
	k     knock
	fd    int
	since moment
	seen  netip.Addr // not valid: not answered yet
}

// again asks by it.
func (o *keptOpen) again() (answer, error) {
	end := time.Now().Add(o.k.patience)
	switch {
	case o.k.udp:
		return o.k.datagram(o.fd)
	case o.seen.IsValid():
		err := writeFD(o.fd, o.k.say)
		if err == nil {
			err = echoed(o.fd, nil, o.k.say, end)
		}
		return answer{o.k.to.String(), o.seen}, err
	}
	if err := o.k.connect(o.fd, end); err != nil {
		return answer{}, err
	}
	a, rest, err := o.k.greeted(o.fd, end)
	if err == nil {
		err = echoed(o.fd, rest, o.k.say, end)
	}
	return a, err
}

// stays keeps connections and flows open over all that happens: what they leave by
// stays the same while the daemon does, and its servers' names do.
func (h *divertedSoak) stays(rng *rand.Rand) {
	open := make([]*keptOpen, 16)
	defer func() {
		for _, o := range open {
			if o != nil {
				_ = unix.Close(o.fd)
			}
		}
	}()
	if err := h.Client.Do(func() error {
		for n := 0; h.weather.goes(kept); n++ {
			i := rng.IntN(len(open))
			o := open[i]
			m := h.now()
			if o == nil {
				e, k := h.draw(rng)
				for e >= byName1 { // those that are asked the same way again, and diverted all the time
					e, k = h.draw(rng)
				}
				fd, err := k.open()
				if err != nil {
					return err
				}
				o = &keptOpen{e: e, k: k, fd: fd, since: m}
				open[i] = o
			}
			o.k.patience = soakPatience
			if m.bad {
				o.k.patience = 2 * sendAgain
			}
			o.k.say = fmt.Appendf(nil, "still there %d", n)
			a, err := o.again()
			ok := h.came(kept, o.e, o.k, o.since, a, err)
			switch {
			case !ok:
				_ = unix.Close(o.fd)
				open[i] = nil
			case o.seen.IsValid() && a.seen != o.seen && h.steady(o.since):
				h.answers.count("kept, "+entryName(o.e), "MOVED")
				h.t.Errorf("%s %s > %s left by %s, and leaves by %s", o.k.network(), o.k.from, o.k.to, o.seen, a.seen)
			}
			o.seen = a.seen
		}
		return nil
	}); err != nil {
		h.t.Error(err)
	}
}

// steady says whether nothing happened since that ends flows.
func (h *divertedSoak) steady(m moment) bool {
	now := h.now()
	if now.starts != m.starts {
		return false
	}
	all := h.since(m)
	return !slices.ContainsFunc(all, func(c diverting) bool { return c.suffix != all[0].suffix })
}

// presses has more flows than the server may have.
func (h *divertedSoak) presses(rng *rand.Rand) {
	flows := make([]*keptOpen, fewFlows)
	defer func() {
		for _, o := range flows {
			if o != nil {
				_ = unix.Close(o.fd)
			}
		}
	}()
	if err := h.Client.Do(func() error {
		for n := 0; h.weather.goes(pressing); n++ {
			i := rng.IntN(len(flows))
			o := flows[i]
			if o == nil {
				_, k := h.draw(rng)
				six := k.from.Is6()
				k.udp, k.from, k.to = true, clientOf(byPress, six), netip.AddrPortFrom(k.to.Addr(), entryPort(byPress))
				fd, err := k.open()
				if err != nil {
					return err
				}
				o = &keptOpen{e: byPress, k: k, fd: fd, since: h.now()}
				flows[i] = o
			}
			o.k.say = fmt.Appendf(nil, "press %d", n)
			o.k.patience = soakPatience
			if h.weather.now().bad {
				o.k.patience = sendAgain
			}
			a, err := o.again()
			h.came(pressing, byPress, o.k, o.since, a, err)
			if rng.IntN(50) == 0 {
				_ = unix.Close(o.fd)
				flows[i] = nil
			}
		}
		return nil
	}); err != nil {
		h.t.Error(err)
	}
}
