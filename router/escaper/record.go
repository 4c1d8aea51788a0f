package escaper

import (
	"net/netip"
	"time"
)

// Record is what a front end reports about one request when it is over: the
// access log and the request metrics are made from it.
type Record struct {
	Start    time.Time
	Duration time.Duration // to the end of the answer, or of the tunnel
	Server   string
	Client   netip.AddrPort
	User     string
	Method   string // "CONNECT", "GET", ...; "" when the head was unreadable
	Target   string // host:port
	Name     string // of a target that is an address, where the client was seen to call it so
	Choice   Choice
	Source   netip.AddrPort // where the connection left from; invalid when there was none
	Status   int            // HTTP status sent to the client, or its equivalent
	BytesIn  int64          // payload bytes from the target to the client
	BytesOut int64          // payload bytes from the client to the target
	Reused   bool           // the upstream connection had served before
	Dropped  int64          // datagrams of an association that were not passed on
	Err      error          // why it failed, or how a begun answer ended early
}
