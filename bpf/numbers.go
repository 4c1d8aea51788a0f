package bpf

import (
	"fmt"
	"sync"
)

// Numbers hands out path numbers so that none is given to a path while a
// socket of another path still carries it: its packets would be judged and
// counted as that path's. A number goes through four states:
//
//	free -> Take -> in use -> Release -> resting -> Free -> free
//
// Only the caller can know when no socket is left (Counters.Open of the number
// is 0 and it has closed all datagram sockets); until it says so by Free a
// released number rests. Freed numbers are used again oldest first, and before
// those that never were, which keeps the kernel's tables small.
//
// All methods may be called concurrently.
type Numbers struct {
	mu      sync.Mutex
	limit   uint32
	next    uint32 // the lowest number never used nor held
	free    []uint32
	used    map[uint32]bool
	resting map[uint32]uint64 // number -> when it came to rest, counted in clock
	clock   uint64
}

// NewNumbers hands out 1 to limit (Layout.MaxPath).
func NewNumbers(limit uint32) *Numbers {
	return &Numbers{limit: limit, next: 1, used: map[uint32]bool{}, resting: map[uint32]uint64{}}
}

// Take gives a number that no socket carries. When every number is in use or
// rests, the error wraps ErrNumber.
func (n *Numbers) Take() (uint32, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.free) > 0 {
		num := n.free[0]
		n.free = n.free[1:]
		n.used[num] = true
		return num, nil
	}
	for n.next <= n.limit && n.rests(n.next) {
		n.next++
	}
	if n.next > n.limit {
		return 0, fmt.Errorf("take a path number: %d in use, %d with sockets left, of %d: %w", len(n.used), len(n.resting), n.limit, ErrNumber)
	}
	num := n.next
	n.next++
	n.used[num] = true
	return num, nil
}

// Release takes a number from its path. It rests until Free.
func (n *Numbers) Release(num uint32) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.used[num] {
		return fmt.Errorf("release path number %d, which is not in use: %w", num, ErrNumber)
	}
	delete(n.used, num)
	n.rest(num)
	return nil
}

// Hold lets numbers rest that were not taken here: those of
// Programs.Inherited, which sockets of a killed daemon may still carry.
func (n *Numbers) Hold(nums ...uint32) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, num := range nums {
		if num < n.next || num > n.limit || n.rests(num) {
			return fmt.Errorf("hold path number %d, which is not unused: %w", num, ErrNumber)
		}
		n.rest(num)
	}
	return nil
}

// Free says that no socket carries a resting number any more.
func (n *Numbers) Free(num uint32) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.rests(num) {
		return fmt.Errorf("free path number %d, which does not rest: %w", num, ErrNumber)
	}
	delete(n.resting, num)
	n.free = append(n.free, num)
	return nil
}

func (n *Numbers) rest(num uint32) {
	n.clock++
	n.resting[num] = n.clock
}

func (n *Numbers) rests(num uint32) bool {
	_, ok := n.resting[num]
	return ok
}
