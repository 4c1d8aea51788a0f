package bpf

import (
	"math"
	"time"
)

// RTTBuckets is the number of buckets of the round-trip histogram.
const RTTBuckets = 16

// Counters are what the kernel has counted for one path number since it was
// given to its path.
type Counters struct {
	// Packets as the wire has them (the segments of a GSO packet each), and
	// bytes of them with IP and transport headers. In is from the far side.
	BytesIn, BytesOut, PacketsIn, PacketsOut uint64
	// Retransmits is the number of TCP segments sent again.
	Retransmits uint64
	// TCP connections: begun, established, ended before that, ended after.
	Tried, Made, Failed, Closed uint64
	// What the guard stopped: packets with a source that is not the path's,
	// by an interface that is not the path's, of a number without a guard;
	// and connects and datagrams refused before there was a packet.
	DropSource, DropInterface, DropUnknown, Refused uint64
	// RTTSum adds up the smoothed round-trip times sampled.
	RTTSum time.Duration
	// RTT counts the samples by RTTBound; not cumulative.
	RTT [RTTBuckets]uint64

	unmarked uint64 // only in slot 0
}

// Open is the number of TCP connections that are established or still being
// closed by the kernel. 0 says that no TCP socket of the number is left but
// those of Connecting.
func (c *Counters) Open() uint64 { return c.Made - min(c.Made, c.Closed) }

// Connecting is the number of TCP connections neither made nor failed yet.
func (c *Counters) Connecting() uint64 { return c.Tried - min(c.Tried, c.Made+c.Failed) }

// GuardDrops is all that the guard stopped. A connect or a datagram that was
// refused counts as the one packet that it did not send.
func (c *Counters) GuardDrops() uint64 {
	return c.DropSource + c.DropInterface + c.DropUnknown + c.Refused
}

// RTTBound is the upper bound, inclusive, of a bucket of the histogram in
// seconds: 128 us, doubled with each bucket; the last has none (+Inf).
func RTTBound(bucket int) float64 {
	if bucket >= RTTBuckets-1 {
		return math.Inf(1)
	}
	return float64(uint64(128)<<bucket) / 1e6
}

// add and sub work field by field; sub stops at zero.
func (c *Counters) add(o *Counters) {
	a, b := c.fields(), o.fields()
	for i := range a {
		*a[i] += *b[i]
	}
	c.RTTSum += o.RTTSum
	for i := range c.RTT {
		c.RTT[i] += o.RTT[i]
	}
}

func (c *Counters) sub(o *Counters) {
	a, b := c.fields(), o.fields()
	for i := range a {
		*a[i] -= min(*a[i], *b[i])
	}
	c.RTTSum -= min(c.RTTSum, o.RTTSum)
	for i := range c.RTT {
		c.RTT[i] -= min(c.RTT[i], o.RTT[i])
	}
}

func (c *Counters) fields() [14]*uint64 {
	return [...]*uint64{
		&c.BytesIn, &c.BytesOut, &c.PacketsIn, &c.PacketsOut, &c.Retransmits,
		&c.Tried, &c.Made, &c.Failed, &c.Closed,
		&c.DropSource, &c.DropInterface, &c.DropUnknown, &c.Refused, &c.unmarked,
	}
}
