package relay

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// Pace bounds what the kernel sends on a TCP socket, in bits a second; 0 lifts
// the bound. The kernel spaces the packets out by itself (SO_MAX_PACING_RATE,
// Linux 4.13 for every queueing discipline), so that nothing here waits.
func Pace(fd int, bits uint64) error {
	bytes := uint64(math.MaxUint64)
	if bits > 0 {
		bytes = max(bits/8, 1)
	}
	if err := unix.SetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, bytes); err != nil {
		return fmt.Errorf("relay: setsockopt SO_MAX_PACING_RATE: %w", err)
	}
	return nil
}
