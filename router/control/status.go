// Package control is how the outside sees a running daemon: the control
// socket that the commands speak to, the metrics, the health check and the
// dashboard. It reads the daemon's state and changes nothing but what a
// command asks for.
package control

import (
	"errors"
	"time"
)

// PathsVersion is the version of the document that `wayout paths --json`
// prints. It grows when a field changes its meaning or goes away.
const PathsVersion = 1

// ErrUnknownPath: no path has that name.
var ErrUnknownPath = errors.New("no such path")

// Paths is the state of all paths, as `wayout paths --json` prints it.
type Paths struct {
	Version int    `json:"version"`
	Paths   []Path `json:"paths"`

	// Interfaces are those on which the kernel's programs do more than to account
	// for paths; Datagrams the servers that pass datagrams.
	Interfaces []Interface `json:"interfaces,omitempty"`
	Datagrams  []Datagrams `json:"datagrams,omitempty"`
}

// Interface is what the kernel's programs have done with what came in by an
// interface.
type Interface struct {
	// Interface is its name; empty for what is diverted whatever it comes in by,
	// and for an interface that is not there yet.
	Interface        string    `json:"interface"`
	Diverted         *Diverted `json:"diverted,omitempty"`          // nil: nothing is
	NeighbourAnswers *uint64   `json:"neighbour_answers,omitempty"` // nil: none are given
}

// Diverted is what was dropped of what is diverted, in packets.
type Diverted struct {
	FragmentsDropped uint64 `json:"fragments_dropped"`
	UnservedDropped  uint64 `json:"unserved_dropped"` // no server had a socket for it
}

// Datagrams is what a server does with datagrams: those of SOCKS associations,
// or of the flows of a tproxy.
type Datagrams struct {
	Server  string `json:"server"`
	Open    int64  `json:"open"`    // associations or flows
	Dropped uint64 `json:"dropped"` // datagrams that were not passed on, either way
}

// Path is the state of one path.
type Path struct {
	Path        string      `json:"path"` // "out/fra-2"
	Escaper     string      `json:"escaper"`
	ID          string      `json:"id"`
	State       string      `json:"state"` // up, down, draining, expired, probing
	Reason      string      `json:"reason"`
	Since       time.Time   `json:"since"` // of the state
	IPv4        *string     `json:"ipv4"`
	IPv6        *string     `json:"ipv6"`
	Uplink      *string     `json:"uplink"`
	Interface   *string     `json:"interface"`
	Weight      int         `json:"weight"`
	Connections Connections `json:"connections"`
	Bytes       InOut       `json:"bytes"`   // IP bytes with headers; in: from the far side
	Packets     InOut       `json:"packets"` // on the wire, so after segmentation
	Retransmits uint64      `json:"retransmits"`
	RTT         Quantiles   `json:"rtt_seconds"`
	GuardDrops  uint64      `json:"guard_drops"`

	// Results counts connection attempts by how they ended; for the metrics.
	Results map[string]uint64 `json:"-"`
	// Ports is the local ports towards the target that takes the most of them;
	// nil while they are few. For the metrics.
	Ports *Ports `json:"-"`
	// RTTBuckets is the histogram behind RTT; for the metrics.
	RTTBuckets Histogram `json:"-"`
}

// Ports is how many local ports of a path one target takes.
type Ports struct {
	InUse      int
	TimeWait   int     // besides: kept after a connection
	Exhaustion float64 // seconds until there are none, as they go; +Inf when they do not
}

// Proof says that the kernel refused an attempt to leave by a path with a
// source that is not its own.
type Proof struct {
	Path   string `json:"path"`
	Source string `json:"source"` // the wrong one that was tried
	Target string `json:"target"` // where to
}

// Connections counts a path's connections since the daemon started.
type Connections struct {
	Open   int64  `json:"open"`
	Made   uint64 `json:"made"`
	Failed uint64 `json:"failed"`
	Closed uint64 `json:"closed"`
}

// InOut is a pair of counters; in is from the far side.
type InOut struct {
	In  uint64 `json:"in"`
	Out uint64 `json:"out"`
}

// Quantiles of a path's round-trip times, in seconds; 0 without samples.
type Quantiles struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// Histogram is a cumulative histogram: Counts[i] samples were at most
// Bounds[i] seconds.
type Histogram struct {
	Bounds []float64
	Counts []uint64
	Count  uint64
	Sum    float64 // seconds
}

// Quantile is the upper bound of the bucket that holds the q-th sample, in
// seconds; 0 without samples.
func (h Histogram) Quantile(q float64) float64 {
	if h.Count == 0 {
		return 0
	}
	rank := q * float64(h.Count)
	for i, n := range h.Counts {
		if float64(n) >= rank {
			return h.Bounds[i]
		}
	}
	if len(h.Bounds) == 0 {
		return 0
	}
	return h.Bounds[len(h.Bounds)-1]
}
