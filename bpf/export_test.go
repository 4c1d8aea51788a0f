package bpf

import (
	"cmp"
	"maps"
	"slices"
)

// Resting lists the numbers that wait for Free, longest waiting first.
func (n *Numbers) Resting() []uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.SortedFunc(maps.Keys(n.resting), func(a, b uint32) int {
		return cmp.Compare(n.resting[a], n.resting[b])
	})
}
