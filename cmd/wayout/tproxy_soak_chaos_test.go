package main_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// judge says of a packet of an uplink whether it may be there. What goes to a port
// that is diverted by all configurations has the source of a path that is its
// entry's and the uplink's.
func (h *divertedSoak) judge(uplink int) func(lab.Packet) (string, bool) {
	rules := uplinkRules{links: linksOf(uplink), own: func(a netip.Addr) bool { return h.ofUplink(a, uplink) }}
	kinds := map[uint8]string{unix.IPPROTO_TCP: tcp, unix.IPPROTO_UDP: udp, unix.IPPROTO_ICMP: icmp, unix.IPPROTO_ICMPV6: icmp}
	return func(p lab.Packet) (string, bool) {
		src, dst, port := p.Src.Addr(), p.Dst.Addr(), p.Dst.Port()
		switch {
		case p.Out || p.EtherType == unix.ETH_P_ARP:
		case slices.Contains(h.dests, src):
			return "sent back", true // it came for an address that has gone
		case slices.Contains(h.dests, dst) && (p.Proto == unix.IPPROTO_TCP || p.Proto == unix.IPPROTO_UDP):
			if h.isClient(src) {
				return "forwarded", uplink == 0 && (port == entryPort(undiverted) || port == entryPort(byAnother))
			}
			e, ours := h.known[src]
			return kinds[p.Proto], ours && h.ofUplink(src, uplink) && port == entryPort(e)
		case slices.Contains(h.dests, dst) && h.isClient(src):
			return "ICMP of clients", uplink == 0
		case slices.Contains(h.dests, dst) && (h.ofUplink(src, uplink) || isPrimary(src, uplink)):
			return icmp, kinds[p.Proto] == icmp
		}
		return rules.judge(p)
	}
}

func isPrimary(a netip.Addr, uplink int) bool {
	s := a.String()
	if uplink == 0 {
		return s == lab.Primary1Of4 || s == lab.Primary1Of6
	}
	return s == lab.Primary2Of4 || s == lab.Primary2Of6
}

func (h *divertedSoak) isClient(a netip.Addr) bool {
	return netip.MustParsePrefix("10.0.0.0/24").Contains(a) || netip.MustParsePrefix("fd00::/64").Contains(a)
}

// ofUplink says whether a source is of a path by an uplink.
func (h *divertedSoak) ofUplink(a netip.Addr, uplink int) bool {
	e, ok := h.known[a]
	for variant := range 2 {
		if s, up := entrySource(e, variant, a.Is6()); ok && s == a {
			return up == uplink
		}
	}
	return false
}

// operator does what operators do, and kills the daemon, until all operations have
// ended.
func (h *divertedSoak) operator(rng *rand.Rand) {
	for h.weather.after(1 + rng.IntN(h.pace)) {
		h.weather.storm(func() { h.chaos.count("operator", h.order(rng)) })
	}
}

func (h *divertedSoak) order(rng *rand.Rand) string {
	other := drawDiverting(rng)
	if rng.IntN(3) == 0 {
		other = h.current()
	}
	switch rng.IntN(11) {
	case 0, 1, 2, 3:
		settled := h.next(other)
		h.write(other.text())
		h.ok("reload")
		settled()
		return "reload"
	case 4:
		h.write(strings.Replace(other.text(), "default_next: none", "default_next: nowhere", 1))
		if _, _, code := h.command("reload", "--config", h.config); code != 2 {
			h.t.Errorf("a bad configuration: exit code %d", code)
		}
		h.write(h.current().text())
		return "reload of a bad configuration"
	case 5:
		h.ok("apply")
		return "apply beside the daemon"
	case 10: // which keeps what it diverts
		h.write(other.text())
		if _, errs, code := h.command("apply", "--config", h.config); code != 0 && (code != 1 || !strings.Contains(errs, "wayout reload")) {
			h.t.Errorf("apply of another configuration: exit code %d: %s", code, errs)
		}
		h.write(h.current().text())
		return "apply of another configuration beside the daemon"
	case 6:
		h.again(rng, h.daemon.Stop, other, false)
		return "stop and start"
	case 7:
		h.again(rng, h.daemon.Stop, other, true)
		return "stop, apply and start"
	case 8:
		h.again(rng, h.daemon.Kill, other, true)
		return "kill -9, apply and start"
	}
	h.again(rng, h.daemon.Kill, other, false)
	return "kill -9 and start"
}

// ok runs a command that has to end well.
func (h *divertedSoak) ok(args ...string) {
	if out, errs, code := h.command(append(args, "--config", h.config)...); code != 0 {
		h.t.Errorf("%v: exit %d: %s%s", args, code, out, errs)
	}
}

// again has the daemon end, clients knock, and starts another, maybe with another
// configuration.
func (h *divertedSoak) again(rng *rand.Rand, end func() error, other diverting, apply bool) {
	wait := func() { h.knocks.after(rng.IntN(20)) }
	if err := end(); err != nil {
		h.t.Errorf("the daemon: %v\n%s", err, h.daemon.Log())
	}
	wait()
	settled := h.next(other)
	h.write(other.text())
	if apply {
		h.ok("apply")
		wait()
	}
	d, err := lab.StartDaemon(h.Host, lab.Program{Path: binary, Args: []string{"serve", "--config", h.config}})
	if err != nil {
		h.t.Error(err)
		h.weather.over()
		return
	}
	h.watchOver(d)
	h.mu.Lock()
	h.starts++
	h.mu.Unlock()
	settled()
}

// all asks for everything once, after or without a daemon.
func (h *divertedSoak) all(check func(e int, k knock, a answer, err error), patience time.Duration) {
	if err := h.Client.Do(func() error {
		for e := range undiverted + 1 {
			for i, d := range h.dests {
				for _, udp := range []bool{false, true} {
					k := knock{udp: udp, from: clientOf(e, i%2 == 1), to: netip.AddrPortFrom(d, entryPort(e)), say: []byte("\x01 at last"), patience: patience}
					if e == byName1 || e == byName2 {
						continue // they would say no name
					}
					a, err := k.once()
					check(e, k, a, err)
				}
			}
		}
		return nil
	}); err != nil {
		h.t.Error(err)
	}
}

// TestSoakDiverted hunts for diverted traffic that leaves by a wrong source or as it
// came, or that somebody else answers: WAYOUT_SOAK connections and datagrams of clients
// behind the host, whose paths go by server, network and name, while the daemon is
// killed, stopped, started, reloaded and applied with one configuration after the
// other.
func TestSoakDiverted(t *testing.T) {
	total, seed := soakSize(t)
	h := newDivertedSoak(t, total)
	var before netState
	eventually(t, "the host has settled", func() bool {
		was := before
		before = h.state()
		return !strings.Contains(before[addrs], "tentative") && was != nil && was.difference(before) == ""
	})
	lookouts := []*lookout{newLookout(t, h.ISP1, h.judge(0)), newLookout(t, h.ISP2, h.judge(1))}
	first := diverting{at: true, also: true}
	h.next(first)()
	h.start(first.text())

	if end, ok := t.Deadline(); ok {
		timer := time.AfterFunc(time.Until(end)-3*time.Minute, h.weather.over)
		defer timer.Stop()
	}
	var workers uint64
	var asking, neighbours sync.WaitGroup
	begin := func(c *sync.WaitGroup, f func(*rand.Rand)) {
		workers++
		rng := rand.New(rand.NewPCG(seed, workers))
		c.Go(func() { f(rng) })
	}
	for range 16 {
		begin(&asking, h.client)
	}
	for range 3 {
		begin(&asking, h.presses)
	}
	begin(&asking, h.stays)
	for range 2 {
		begin(&neighbours, h.neighbour)
	}
	neighbours.Go(func() { asking.Wait(); h.knocks.end() })
	begun := time.Now()
	h.operator(rand.New(rand.NewPCG(seed, 0)))
	neighbours.Wait()
	t.Logf("%d operations in %v\n%s\n%s", h.weather.done, time.Since(begun).Round(time.Second), &h.answers, &h.chaos)
	if h.weather.done < total {
		t.Logf("of %d: the time was up", total)
	}

	select {
	case <-h.daemon.Done():
		t.Fatal("the daemon has ended")
	default:
	}
	if all := h.answers.all(); all["ok"] < sum(all)/2 {
		t.Error("most of it was not answered: that proves little")
	}
	last := diverting{at: true}
	settled := h.next(last)
	h.write(last.text())
	h.ok("reload")
	settled()
	h.all(func(e int, k knock, a answer, err error) {
		if seen, _ := last.outcome(e, k); err != nil || a.name != k.to.String() || a.seen != seen {
			t.Errorf("in the end: %s, %s: %s > %s: answered by %q, which sees %s, want %s: %v", entryName(e), k.network(), k.from, k.to, a.name, a.seen, seen, err)
		}
	}, soakPatience)
	h.stop()
	h.all(func(e int, k knock, a answer, err error) {
		if e != undiverted && (e != byAnother || !k.udp) && err == nil {
			t.Errorf("stopped: %s, %s: %s > %s: answered by %q, which sees %s", entryName(e), k.network(), k.from, k.to, a.name, a.seen)
		}
	}, brief/4)
	for _, l := range lookouts {
		l.verdict(t)
	}
	h.wayout("clean")
	after := h.state()
	for q := range before {
		before[q], after[q] = sorted(before[q]), sorted(after[q])
	}
	if d := before.difference(after); d != "" {
		t.Errorf("after clean:\n%s", d)
	}
}

// TestDivertedLookoutJudges has the judge see what must not be.
func TestDivertedLookoutJudges(t *testing.T) {
	h := &divertedSoak{known: map[netip.Addr]int{}, dests: []netip.Addr{netip.MustParseAddr(lab.OriginAddr4), netip.MustParseAddr(lab.OriginAddr6)}}
	source := func(e, uplink int, six bool) netip.Addr {
		for variant := range 2 {
			a, up := entrySource(e, variant, six)
			h.known[a] = e
			if up == uplink {
				return a
			}
		}
		return netip.Addr{}
	}
	for e := range entries {
		source(e, 2, false)
		source(e, 2, true)
	}
	judge := h.judge(0)
	for _, c := range []struct {
		name string
		src  netip.Addr
		e    int // whose port
		ok   bool
	}{
		{"of the entry", source(byRoom1, 0, false), byRoom1, true},
		{"of the entry, IPv6", source(byRoom1, 0, true), byRoom1, true},
		{"of another entry", source(byServer, 0, false), byRoom1, false},
		{"of the other uplink", source(byRoom1, 1, false), byRoom1, false},
		{"of the primary", netip.MustParseAddr(lab.Primary1Of4), byRoom1, false},
		{"forwarded", clientOf(byRoom1, false), byRoom1, false},
		{"forwarded, IPv6", clientOf(byRoom1, true), byRoom1, false},
		{"forwarded, and not diverted", clientOf(undiverted, false), undiverted, true},
	} {
		d := netip.MustParseAddr(lab.OriginAddr4)
		if c.src.Is6() {
			d = netip.MustParseAddr(lab.OriginAddr6)
		}
		for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			p := lab.Packet{Proto: proto, Src: netip.AddrPortFrom(c.src, 1), Dst: netip.AddrPortFrom(d, entryPort(c.e))}
			if kind, ok := judge(p); ok != c.ok {
				t.Errorf("%s: %s: %s %v", c.name, p, kind, ok)
			}
		}
	}
}
