package control

import (
	"maps"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"wayout/selection"
)

// How many values the labels of the request counters have.
const (
	sources = 6 // of selection.Source
	codes   = 1000
)

// Counters are the request counters of the daemon. They are plain atomics and
// not a CounterVec, because they stand on the request path: no lock, no map.
type Counters struct {
	mu        sync.Mutex // of servers, which only loading a configuration changes
	servers   map[string]*ServerCounters
	selection [sources]resultCounters
	reloadOK  atomic.Uint64
	reloadErr atomic.Uint64
}

type resultCounters struct {
	ok, malformed, unknown, disabled, forbidden, down, family, bind atomic.Uint64
}

// by gives the counter of a result word (selection.Result).
func (c *resultCounters) by(result string) *atomic.Uint64 {
	switch result {
	case "malformed":
		return &c.malformed
	case "unknown":
		return &c.unknown
	case "disabled":
		return &c.disabled
	case "forbidden":
		return &c.forbidden
	case "down":
		return &c.down
	case "family":
		return &c.family
	case "bind":
		return &c.bind
	default:
		return &c.ok
	}
}

func resultWords() []string {
	return []string{"ok", "malformed", "unknown", "disabled", "forbidden", "down", "family", "bind"}
}

// ServerCounters are the counters of one front end.
type ServerCounters struct {
	codes        [codes]atomic.Uint64
	authFailures atomic.Uint64
	datagrams    atomic.Bool // it passes them
	flows        atomic.Int64
	dropped      atomic.Uint64
}

// NewCounters makes counters, all zero.
func NewCounters() *Counters { return &Counters{servers: map[string]*ServerCounters{}} }

// Server gives the counters of a front end, to be kept by it: the same ones
// whenever the name is the same.
func (c *Counters) Server(name string) *ServerCounters {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.servers[name]
	if s == nil {
		s = &ServerCounters{}
		c.servers[name] = s
	}
	return s
}

// Request counts a request that ended with this HTTP status, or its
// equivalent in another protocol.
func (s *ServerCounters) Request(code int) {
	if code < 0 || code >= codes {
		code = 0
	}
	s.codes[code].Add(1)
}

// CountDatagrams gives the counters of a front end that passes datagrams: the
// associations or flows that are open, and datagrams that were dropped.
func (s *ServerCounters) CountDatagrams() (open *atomic.Int64, dropped *atomic.Uint64) {
	s.datagrams.Store(true)
	return &s.flows, &s.dropped
}

// Datagrams are the counters of all front ends that pass datagrams, by name.
func (c *Counters) Datagrams() []Datagrams {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Datagrams
	for _, name := range slices.Sorted(maps.Keys(c.servers)) {
		if s := c.servers[name]; s.datagrams.Load() {
			all = append(all, Datagrams{Server: name, Open: s.flows.Load(), Dropped: s.dropped.Load()})
		}
	}
	return all
}

// AuthFailure counts a request without valid credentials.
func (s *ServerCounters) AuthFailure() { s.authFailures.Add(1) }

// Selection counts one decision: who chose, and what came of it
// (selection.Result).
func (c *Counters) Selection(source selection.Source, result string) {
	if int(source) < sources {
		c.selection[source].by(result).Add(1)
	}
}

// Reload counts an attempt to load a new configuration.
func (c *Counters) Reload(err error) {
	if err != nil {
		c.reloadErr.Add(1)
		return
	}
	c.reloadOK.Add(1)
}

// Collector makes the daemon's counters and the state of its paths into
// Prometheus metrics, read at the moment of the scrape.
type Collector struct {
	counters  *Counters
	paths     func() Paths
	unmarked  func() uint64 // packets dropped because their socket had no mark
	accounted func() bool   // the kernel counts: without, its metrics are absent

	up, conns, open, bytes, packets, retrans, rtt, guard *prometheus.Desc
	ports, exhaustion                                    *prometheus.Desc
	fragments, unserved, answers                         *prometheus.Desc
	flows, dropped                                       *prometheus.Desc
	requests, selections, auth, reload                   *prometheus.Desc
}

// NewCollector makes a collector. unmarked and accounted may be nil: then the
// kernel does not count.
func NewCollector(c *Counters, paths func() Paths, unmarked func() uint64, accounted func() bool) *Collector {
	path := []string{"escaper", "path"}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("wayout_"+name, help, labels, nil)
	}
	return &Collector{
		counters: c, paths: paths, unmarked: unmarked, accounted: accounted,
		up:         desc("path_up", "1 when the path's state is up.", path...),
		conns:      desc("path_connections_total", "Connection attempts by their result.", append(path, "result")...),
		open:       desc("path_connections_open", "Connections open.", path...),
		bytes:      desc("path_bytes_total", "IP bytes with headers; in: from the far side.", append(path, "direction")...),
		packets:    desc("path_packets_total", "Packets on the wire; in: from the far side.", append(path, "direction")...),
		retrans:    desc("path_retransmits_total", "TCP segments sent again.", path...),
		rtt:        desc("path_rtt_seconds", "Smoothed round-trip times as TCP samples them.", path...),
		guard:      desc("path_guard_drops_total", "Packets stopped because they would leave by another source or interface; unmarked ones under empty labels.", path...),
		ports:      desc("path_ports", "Local ports taken for the target that takes the most of them; absent while they are few.", append(path, "state")...),
		exhaustion: desc("path_ports_exhaustion_seconds", "Until the ports for that target are used up at the present rate; +Inf when they are not.", path...),
		fragments:  desc("divert_fragments_dropped_total", "Fragments dropped because they have no port to be diverted by.", "interface"),
		unserved:   desc("divert_unserved_dropped_total", "Packets of diverted connections and datagrams dropped because no server had a socket for them.", "interface"),
		answers:    desc("neighbour_answers_total", "Neighbour solicitations answered for whole prefixes.", "interface"),
		flows:      desc("udp_flows_open", "SOCKS associations, or flows of a tproxy, that are open.", "server"),
		dropped:    desc("udp_datagrams_dropped_total", "Datagrams that were not passed on, either way.", "server"),
		requests:   desc("requests_total", "Requests by HTTP status or its equivalent.", "server", "code"),
		selections: desc("selection_total", "Decisions about the path, by who chose and what came of it.", "source", "result"),
		auth:       desc("auth_failures_total", "Requests without valid credentials.", "server"),
		reload:     desc("config_reload_total", "Attempts to load a new configuration.", "result"),
	}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.up, c.conns, c.open, c.bytes, c.packets, c.retrans, c.rtt, c.guard, c.ports, c.exhaustion,
		c.fragments, c.unserved, c.answers, c.flows, c.dropped, c.requests, c.selections, c.auth, c.reload,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	kernel := c.accounted != nil && c.accounted()
	now := c.paths()
	for _, i := range now.Interfaces {
		if d := i.Diverted; d != nil {
			counter(c.fragments, d.FragmentsDropped, i.Interface)
			counter(c.unserved, d.UnservedDropped, i.Interface)
		}
		if i.NeighbourAnswers != nil {
			counter(c.answers, *i.NeighbourAnswers, i.Interface)
		}
	}
	for _, d := range now.Datagrams {
		gauge(c.flows, float64(d.Open), d.Server)
		counter(c.dropped, d.Dropped, d.Server)
	}
	for _, p := range now.Paths {
		up := 0.0
		if p.State == "up" {
			up = 1
		}
		gauge(c.up, up, p.Escaper, p.ID)
		gauge(c.open, float64(p.Connections.Open), p.Escaper, p.ID)
		for result, n := range p.Results {
			counter(c.conns, n, p.Escaper, p.ID, result)
		}
		if p.Ports != nil {
			gauge(c.ports, float64(p.Ports.InUse), p.Escaper, p.ID, "in_use")
			gauge(c.ports, float64(p.Ports.TimeWait), p.Escaper, p.ID, "time_wait")
			gauge(c.exhaustion, p.Ports.Exhaustion, p.Escaper, p.ID)
		}
		if !kernel {
			continue
		}
		counter(c.bytes, p.Bytes.In, p.Escaper, p.ID, "in")
		counter(c.bytes, p.Bytes.Out, p.Escaper, p.ID, "out")
		counter(c.packets, p.Packets.In, p.Escaper, p.ID, "in")
		counter(c.packets, p.Packets.Out, p.Escaper, p.ID, "out")
		counter(c.retrans, p.Retransmits, p.Escaper, p.ID)
		counter(c.guard, p.GuardDrops, p.Escaper, p.ID)
		buckets := make(map[float64]uint64, len(p.RTTBuckets.Bounds))
		for i, b := range p.RTTBuckets.Bounds {
			buckets[b] = p.RTTBuckets.Counts[i]
		}
		ch <- prometheus.MustNewConstHistogram(c.rtt, p.RTTBuckets.Count, p.RTTBuckets.Sum, buckets, p.Escaper, p.ID)
	}
	if kernel && c.unmarked != nil {
		counter(c.guard, c.unmarked(), "", "")
	}
	c.counters.mu.Lock()
	defer c.counters.mu.Unlock()
	for name, s := range c.counters.servers {
		counter(c.auth, s.authFailures.Load(), name)
		for code := range s.codes {
			if n := s.codes[code].Load(); n > 0 {
				counter(c.requests, n, name, strconv.Itoa(code))
			}
		}
	}
	for source := range sources {
		for _, r := range resultWords() {
			counter(c.selections, c.counters.selection[source].by(r).Load(), selection.Source(source).String(), r)
		}
	}
	counter(c.reload, c.counters.reloadOK.Load(), "ok")
	counter(c.reload, c.counters.reloadErr.Load(), "error")
}
