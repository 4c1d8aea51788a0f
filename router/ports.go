package router

import (
	"context"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/control"
	"wayout/router/escaper"
)

const (
	// portsEvery is how often the ports are looked at, at most: while a look
	// takes longer than a twentieth of it, more seldom.
	portsEvery = 2 * time.Second
	// timeWait is how long the kernel keeps a port after a connection
	// (TCP_TIMEWAIT_LEN): what is opened now is not free before that.
	timeWait = time.Minute

	portsFew  = 0.25 // of all ports: what a path has taken at least, to all targets, to be looked at
	portsFull = 0.80 // to one target: the log says so
	portsCalm = 0.70 // and may say so again once it was below
	portsLast = 0.95 // policies pick another path (spill)
)

// portMeter knows how many of the ports of paths are taken.
type portMeter struct {
	log    *slog.Logger
	recent map[uint32]*recentUse     // by path number
	before map[portKey]portSample    // of the look before
	warned map[portKey]bool          // in this burst
	full   map[uint32]*escaper.Path  // that were told to be crowded
	byPath atomic.Pointer[portTable] // of the last look
}

// portTable is the fullest target of each path that was looked at, by its
// number.
type portTable map[uint32]control.Ports

// recentUse estimates how many ports a path may have taken from its counters
// alone.
type recentUse struct {
	at     time.Time
	closed uint64
	kept   float64 // of the connections that were closed, those within about timeWait
}

// portKey is one path towards one target, from one source.
type portKey struct {
	number uint32
	source netip.Addr
	target netip.AddrPort
}

type portSample struct {
	taken int
	at    time.Time
}

func newPortMeter(log *slog.Logger) *portMeter {
	return &portMeter{log: log, recent: map[uint32]*recentUse{}, before: map[portKey]portSample{}, warned: map[portKey]bool{}}
}

// of returns the fullest target of a path, nil when it was not looked at.
func (m *portMeter) of(number uint32) *control.Ports {
	t := m.byPath.Load()
	if t == nil {
		return nil
	}
	if p, ok := (*t)[number]; ok {
		return &p
	}
	return nil
}

// busy reports whether any path may have taken many of so many ports.
func (m *portMeter) busy(paths []*escaper.Path, ports int, now time.Time) bool {
	busy := false
	known := make(map[uint32]*recentUse, len(m.recent))
	for _, p := range paths {
		c := p.Counters()
		if c.Attempts[escaper.ResultOK] == 0 {
			continue
		}
		u := m.recent[p.Number]
		if u == nil {
			u = &recentUse{at: now}
		}
		known[p.Number] = u
		u.kept = u.kept*math.Exp(-now.Sub(u.at).Seconds()/timeWait.Seconds()) + float64(c.Closed-min(u.closed, c.Closed))
		u.at, u.closed = now, c.Closed
		busy = busy || float64(c.Open)+u.kept >= portsFew*float64(ports)
	}
	m.recent = known
	return busy
}

// take takes note of what a look at the kernel's sockets has found. ports is
// how many there are for each target. Where the kernel gives away the ports
// that are kept after a connection, reuse, these are not taken.
func (m *portMeter) take(paths []*escaper.Path, uses []netcfg.PortUse, ports int, reuse bool, now time.Time) {
	byMark := make(map[uint32]*escaper.Path, len(paths))
	for _, p := range paths {
		byMark[p.Mark] = p
	}
	table, samples, warned := portTable{}, map[portKey]portSample{}, map[portKey]bool{}
	crowded := map[*escaper.Path][]netip.AddrPort{}
	for _, u := range uses {
		p := byMark[u.Mark]
		if p == nil {
			continue
		}
		k := portKey{p.Number, u.Source, u.Target}
		s := portSample{taken: u.Total(), at: now}
		if reuse {
			s.taken = u.InUse
		}
		samples[k] = s
		left := m.left(k, s, ports)
		share := float64(s.taken) / float64(ports)
		if was, ok := table[p.Number]; !ok || u.Total() > was.InUse+was.TimeWait {
			table[p.Number] = control.Ports{InUse: u.InUse, TimeWait: u.TimeWait, Exhaustion: seconds(left)}
		}
		switch {
		case share >= portsFull, left <= timeWait:
			warned[k] = true
			if !m.warned[k] {
				m.warn(p, u, s, ports, left)
			}
		case m.warned[k] && share >= portsCalm:
			warned[k] = true
		}
		// An address of a whole prefix is one of many.
		if single := !p.Net4.IsValid() && !p.Net6.IsValid(); single && (share >= portsLast || left <= 2*portsEvery) {
			to := u.Target
			if !to.IsValid() {
				to = escaper.AllDatagrams()
			}
			crowded[p] = append(crowded[p], to)
		}
	}
	m.before, m.warned = samples, warned
	m.byPath.Store(&table)
	full := map[uint32]*escaper.Path{}
	for p, targets := range crowded {
		p.SetCrowded(targets)
		full[p.Number] = p
	}
	for number, p := range m.full {
		if full[number] == nil {
			p.SetCrowded(nil)
		}
	}
	m.full = full
}

// never is a time that does not come.
const never = time.Duration(math.MaxInt64)

// left is how long the ports last at the rate since the look before.
func (m *portMeter) left(k portKey, s portSample, ports int) time.Duration {
	was, known := m.before[k]
	grown, free := s.taken-was.taken, max(ports-s.taken, 0)
	switch {
	case free == 0:
		return 0
	case !known, grown <= 0:
		return never
	}
	left := float64(free) / (float64(grown) / s.at.Sub(was.at).Seconds())
	if left > 1e6 {
		return never
	}
	return time.Duration(left * float64(time.Second))
}

// seconds gives a time for people and metrics.
func seconds(left time.Duration) float64 {
	if left == never {
		return math.Inf(1)
	}
	return left.Seconds()
}

func (m *portMeter) warn(p *escaper.Path, u netcfg.PortUse, s portSample, ports int, left time.Duration) {
	target := "all, by UDP"
	if u.Target.IsValid() {
		target = u.Target.String()
	}
	args := []any{"path", p.Name, "source", u.Source, "target", target, "taken", s.taken, "ports", ports, "time_wait", u.TimeWait}
	if left < never {
		args = append(args, "left", left.Round(time.Second))
	}
	m.log.Warn("ports are running out", args...)
}

// watchPorts looks at the ports of paths from time to time, until ctx ends.
func (r *Router) watchPorts(ctx context.Context) {
	reuse := reusesTimeWait()
	wait := portsEvery
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		begun := time.Now()
		if err := r.lookAtPorts(ctx, reuse, begun); err != nil && ctx.Err() == nil {
			r.log.Error("ports cannot be counted", "err", err)
			return
		}
		wait = max(portsEvery, 20*time.Since(begun))
	}
}

func (r *Router) lookAtPorts(ctx context.Context, reuse bool, now time.Time) error {
	r.mu.Lock()
	layout, ports := r.plan.layout, r.plan.sockets.Ports()
	paths := r.plan.table.Paths()
	r.mu.Unlock()
	if !r.ports.busy(paths, ports, now) {
		r.ports.take(nil, nil, ports, reuse, now)
		return nil
	}
	one, err := layout.Mark(bpf.ClassPath, 0, 1)
	if err != nil {
		return err
	}
	m := netcfg.Mark{Value: one & layout.ClassMask, Mask: layout.ClassMask}
	uses, err := r.kernel.net.CountPorts(ctx, m, max(1, ports/10))
	if err != nil {
		return err
	}
	r.ports.take(paths, uses, ports, reuse, now)
	return nil
}

// reusesTimeWait says whether new connections may take the ports that are kept
// after others (net.ipv4.tcp_tw_reuse; 2 is for loopback only).
func reusesTimeWait() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_tw_reuse")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}
