package main

import "time"

// A job is what the load generator, a process of its own, is told to do.
type job struct {
	Kind    string        // tunnel, http, down, up, ping, hold
	Via     string        // how the origin is reached: connect, socks5, http, relay, direct, divert
	Proxy   string        // address and port
	Targets []string      // of the origin, in turn
	Local   []string      // client addresses, in turn
	Sources []string      // that the proxy may leave by; empty: the client's own
	Header  string        // with %s for the source that this request has to leave by
	Clients int           // that work at the same time
	Ops     int64         // how many operations; 0: as many as there is time for
	WarmOps int64         // before these
	For     time.Duration // at most
	Warm    time.Duration // before that, for what has no number of operations
	Steps   []int         // hold: numbers of tunnels
	Group   group         // whose CPU is counted
}

// A result is what the load generator answers: once, or for hold once a step.
type result struct {
	Ops     int64   `json:"ops"`
	Bytes   int64   `json:"bytes,omitempty"`
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"proxy_cpu_seconds"`
	P50     float64 `json:"p50_us,omitempty"`
	P99     float64 `json:"p99_us,omitempty"`
	Errors  int64   `json:"errors"`
	Error   string  `json:"first_error,omitempty"`
	Checked int64   `json:"checked_sources"`
	Wrong   int64   `json:"wrong_sources"`
	WrongAs string  `json:"first_wrong_source,omitempty"`
	Held    int     `json:"held,omitempty"`
}

// A mode is one thing to measure.
type mode struct {
	name, what string
	unit       string  // that CPU is told for
	scale      float64 // from CPU seconds per operation or byte to the unit shown
	fresh      bool    // needs a proxy that has done nothing else
	socks      bool    // tunnels by SOCKS5 alone
	job        job
}

func modes(scale float64, hold int) []mode {
	n := func(ops int64) int64 { return max(10, int64(float64(ops)*scale)) }
	t := func(d time.Duration) time.Duration { return max(200*time.Millisecond, time.Duration(float64(d)*scale)) }
	const us, gb = 1e6, 1e9
	bulk := func(name, kind, what string, conns int) mode {
		return mode{name: name, what: what, unit: "CPU-s/GB", scale: gb, job: job{
			Kind: kind, Clients: conns, For: t(1500 * time.Millisecond), Warm: t(300 * time.Millisecond),
		}}
	}
	return []mode{
		{name: "connect", what: "new tunnel, one request, close; 32 clients", unit: "CPU us", scale: us, job: job{
			Kind: "tunnel", Clients: 32, Ops: n(4000), WarmOps: n(200), For: t(8 * time.Second),
		}},
		{name: "socks5", what: "new SOCKS5 tunnel without a selection, one request, close; 32 clients", unit: "CPU us", scale: us, socks: true, job: job{
			Kind: "tunnel", Clients: 32, Ops: n(4000), WarmOps: n(200), For: t(8 * time.Second),
		}},
		{name: "tunnel-c1", what: "the same, one client", unit: "CPU us", scale: us, job: job{
			Kind: "tunnel", Clients: 1, Ops: n(1000), WarmOps: n(50), For: t(4 * time.Second),
		}},
		{name: "http", what: "forwarded GET, 64 kept client connections", unit: "CPU us", scale: us, job: job{
			Kind: "http", Clients: 64, For: t(1500 * time.Millisecond), Warm: t(300 * time.Millisecond),
		}},
		bulk("down-1", "down", "bulk to the client, 1 tunnel", 1),
		bulk("down-16", "down", "bulk to the client, 16 tunnels", 16),
		bulk("up-1", "up", "bulk to the origin, 1 tunnel", 1),
		bulk("up-16", "up", "bulk to the origin, 16 tunnels", 16),
		{name: "pingpong", what: "128 bytes each way, 1 tunnel", unit: "CPU us", scale: us, job: job{
			Kind: "ping", Clients: 1, For: t(1500 * time.Millisecond), Warm: t(200 * time.Millisecond),
		}},
		{name: "ports", what: "750 tunnels from one source with 500 local ports, two destinations", fresh: true, job: job{
			Kind: "hold", Clients: 8, For: 10 * time.Second, Steps: []int{750},
		}},
		{name: "idle", what: "tunnels that carry nothing", fresh: true, job: job{
			Kind: "hold", Clients: 16, For: 15 * time.Second, Steps: []int{holdBase, hold},
		}},
	}
}

// holdBase is how many tunnels there are when the count of memory begins: what
// a proxy takes once is no tunnel's.
const holdBase = 50
