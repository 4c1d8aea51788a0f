package escaper

import (
	"context"
	"net/netip"

	"wayout/selection"
)

// PacketConn carries the datagrams of one association by its path. Its methods
// are safe for concurrent use.
type PacketConn interface {
	// Send sends one datagram to a target: its name is resolved, the very
	// address is checked by the filter, and it leaves by the association's path
	// and address. It may block while a name is resolved.
	Send(ctx context.Context, to Target, b []byte) error
	// Receive blocks for the next datagram and says who sent it, unmapped.
	Receive(b []byte) (n int, from netip.AddrPort, err error)
	// Source returns where datagrams of a family leave from: the zero AddrPort
	// for a family that the path lacks.
	Source(f selection.Family) netip.AddrPort
	// Close ends Receive.
	Close() error
	// OnKill sets what is told, once, when the path's address has gone.
	OnKill(f func(error))
}
