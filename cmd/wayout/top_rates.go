package main

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"wayout/router/control"
)

// leastInterval is the shortest time over which rates are taken. Snapshots
// come with every change of a state too, and the counters of two that are
// milliseconds apart say nothing about a second.
const leastInterval = 500 * time.Millisecond

// rates are what a path does in a second, by the difference of its counters
// over the time between two snapshots.
type rates struct {
	Interval    float64 `json:"interval_seconds"`
	BitsIn      float64 `json:"bits_in"` // IP bits with headers; in: from the far side
	BitsOut     float64 `json:"bits_out"`
	Made        float64 `json:"connections"`
	Failed      float64 `json:"failures"`
	Retransmits float64 `json:"retransmits"` // TCP segments
	PacketsOut  float64 `json:"packets_out"`
	Share       float64 `json:"retransmit_share"` // of the packets out, 0 to 1
}

// row is a path with its rates.
type row struct {
	control.Path
	Rates *rates `json:"rates"` // nil: not known yet, or the counters began anew
}

// rated is what `wayout top --json` prints: the document of `wayout paths
// --json`, with rates.
type rated struct {
	Version int   `json:"version"`
	Paths   []row `json:"paths"`
}

// meter turns snapshots into rates. The zero meter has seen none.
type meter struct {
	at        time.Time
	base      map[string]control.Path
	rates     map[string]*rates
	intervals int // how many there were
}

// add takes a snapshot that came at a time and gives its paths with their
// rates: those of the last interval that was long enough. The order is that
// of the snapshot.
func (m *meter) add(at time.Time, p control.Paths) []row {
	elapsed := at.Sub(m.at)
	if m.base == nil || elapsed >= leastInterval {
		m.advance(at, elapsed, p)
	}
	rows := make([]row, len(p.Paths))
	for i, path := range p.Paths {
		rows[i] = row{Path: path, Rates: m.rates[path.Path]}
	}
	return rows
}

// advance makes a snapshot the base of the next interval.
func (m *meter) advance(at time.Time, elapsed time.Duration, p control.Paths) {
	if m.base != nil {
		m.intervals++
	}
	base, rated := make(map[string]control.Path, len(p.Paths)), make(map[string]*rates, len(p.Paths))
	for _, path := range p.Paths {
		base[path.Path] = path
		if old, ok := m.base[path.Path]; ok {
			rated[path.Path] = ratesOf(old, path, elapsed)
		}
	}
	m.at, m.base, m.rates = at, base, rated
}

// ratesOf is nil when a counter has gone back: then it is that of another path
// of the name, or of another daemon.
func ratesOf(old, now control.Path, elapsed time.Duration) *rates {
	seconds := elapsed.Seconds()
	if seconds <= 0 {
		return nil
	}
	back := false
	per := func(a, b uint64) float64 {
		back = back || b < a
		return float64(b-a) / seconds
	}
	r := &rates{
		Interval:    seconds,
		BitsIn:      8 * per(old.Bytes.In, now.Bytes.In),
		BitsOut:     8 * per(old.Bytes.Out, now.Bytes.Out),
		Made:        per(old.Connections.Made, now.Connections.Made),
		Failed:      per(old.Connections.Failed, now.Connections.Failed),
		Retransmits: per(old.Retransmits, now.Retransmits),
		PacketsOut:  per(old.Packets.Out, now.Packets.Out),
	}
	if back {
		return nil
	}
	r.Share = share(r.Retransmits, r.PacketsOut)
	return r
}

// share is at most 1: the two counters are not read at one moment.
func share(part, whole float64) float64 {
	if whole <= 0 {
		return 0
	}
	return min(part/whole, 1)
}

// totals sum up all paths.
type totals struct {
	paths  int
	states map[string]int
	open   int64
	rates  rates // the sum of those that are known; Interval is the longest
}

func sumUp(rows []row) totals {
	t := totals{paths: len(rows), states: map[string]int{}}
	for i := range rows {
		t.states[rows[i].State]++
		t.open += rows[i].Connections.Open
		if r := rows[i].Rates; r != nil {
			t.rates.Interval = max(t.rates.Interval, r.Interval)
			t.rates.BitsIn += r.BitsIn
			t.rates.BitsOut += r.BitsOut
			t.rates.Made += r.Made
			t.rates.Failed += r.Failed
			t.rates.Retransmits += r.Retransmits
			t.rates.PacketsOut += r.PacketsOut
		}
	}
	t.rates.Share = share(t.rates.Retransmits, t.rates.PacketsOut)
	return t
}

// column is what the paths can be sorted by.
type column int

const (
	byName column = iota
	byState
	byIn
	byOut
	byConnections
	byRTT
	byRetransmits
	byFailures
	columns // how many
)

// columnNames are what a column is called on the command line and on screen.
func columnNames() []string {
	return []string{"name", "state", "in", "out", "connections", "rtt", "retransmits", "failures"}
}

func (c column) String() string { return columnNames()[c] }

// descending says which way round a column is wanted first: names from the
// front, states from the worst, numbers from the largest.
func (c column) descending() bool { return c != byName && c != byState }

// order is a way to sort.
type order struct {
	by   column
	down bool // from the largest
}

// stateRank puts what needs eyes first.
func stateRank(state string) int {
	if i := slices.Index([]string{"down", "expired", "probing", "draining", "up"}, state); i >= 0 {
		return i
	}
	return -1 // a state that this program does not know
}

// compare compares two paths; equal ones are told apart by their names, which
// always run from the front.
func (o order) compare(a, b *row) int {
	c := 0
	switch o.by {
	case byName:
		c = compareNames(a.Path.Path, b.Path.Path)
	case byState:
		c = cmp.Compare(stateRank(a.State), stateRank(b.State))
	case byConnections:
		c = cmp.Compare(a.Connections.Open, b.Connections.Open)
	case byRTT:
		c = cmp.Compare(a.RTT.P50, b.RTT.P50)
	default:
		c = cmp.Compare(o.rate(a), o.rate(b))
	}
	if o.down {
		c = -c
	}
	if c == 0 {
		c = compareNames(a.Path.Path, b.Path.Path)
	}
	return c
}

// rate is the one to sort by; below all others when it is not known.
func (o order) rate(r *row) float64 {
	if r.Rates == nil {
		return -1
	}
	switch o.by {
	case byIn:
		return r.Rates.BitsIn
	case byOut:
		return r.Rates.BitsOut
	case byRetransmits:
		return r.Rates.Retransmits
	default:
		return r.Rates.Failed
	}
}

// compareNames puts p2 before p10: runs of digits count as numbers.
func compareNames(a, b string) int {
	for a != "" && b != "" {
		x, y := digits(a), digits(b)
		if x == "" || y == "" {
			if a[0] != b[0] {
				return cmp.Compare(a[0], b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		a, b = a[len(x):], b[len(y):]
		p, q := strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
		if c := cmp.Or(cmp.Compare(len(p), len(q)), cmp.Compare(p, q), cmp.Compare(len(x), len(y))); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(a), len(b))
}

// digits is the run of digits that s begins with.
func digits(s string) string {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return s[:n]
}

// choose gives the rows that a filter lets through, sorted.
func choose(rows []row, filter string, o order) []*row {
	words := filterWords(filter)
	shown := make([]*row, 0, len(rows))
	for i := range rows {
		if matches(&rows[i], words) {
			shown = append(shown, &rows[i])
		}
	}
	slices.SortFunc(shown, o.compare)
	return shown
}

// filterWords are the words of a filter, as matches wants them.
func filterWords(filter string) []string { return strings.Fields(strings.ToLower(filter)) }

// matches says whether each word, in lower case, stands somewhere in what is
// known of a path.
func matches(r *row, words []string) bool {
	for _, w := range words {
		found := false
		for _, s := range []*string{&r.Path.Path, &r.State, &r.Reason, r.IPv4, r.IPv6, r.Uplink, r.Interface} {
			found = found || s != nil && strings.Contains(strings.ToLower(*s), w)
		}
		if !found {
			return false
		}
	}
	return true
}
