package relay

import "math/bits"

// wheelSlots is the horizon in ticks. A limit beyond it is looked at again once
// in a turn.
const wheelSlots = 1024

// wheel holds the tunnels with limits by the tick at which to look at them
// next. Moving bytes does not touch it: a tunnel whose turn comes before its
// limit is put back. All methods need the worker's lock.
type wheel struct {
	tick  int64 // ns
	cur   int64 // the last tick that was handled
	heads [wheelSlots]*Tunnel
	busy  [wheelSlots / 64]uint64 // slots that hold something
}

// put files t under the first tick not before due (ns).
func (h *wheel) put(t *Tunnel, due int64) {
	n := (due + h.tick - 1) / h.tick
	n = min(max(n, h.cur+1), h.cur+wheelSlots-1)
	i := n % wheelSlots
	t.prev, t.next, t.slotted = nil, h.heads[i], int32(i)
	if t.next != nil {
		t.next.prev = t
	}
	h.heads[i] = t
	h.busy[i/64] |= 1 << (i % 64)
}

// drop takes t out, if it is in.
func (h *wheel) drop(t *Tunnel) {
	if t.slotted < 0 {
		return
	}
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		h.heads[t.slotted] = t.next
		if t.next == nil {
			h.busy[t.slotted/64] &^= 1 << (t.slotted % 64)
		}
	}
	if t.next != nil {
		t.next.prev = t.prev
	}
	t.prev, t.next, t.slotted = nil, nil, -1
}

// advance moves the hand to now (ns), appends the tunnels that are over a limit
// to out, and puts back those that are not.
func (h *wheel) advance(now int64, out []*Tunnel) []*Tunnel {
	target := now / h.tick
	if target <= h.cur {
		return out
	}
	var turn *Tunnel
	for n := h.cur + 1; n <= min(target, h.cur+wheelSlots); n++ {
		i := n % wheelSlots
		for h.heads[i] != nil {
			t := h.heads[i]
			h.drop(t)
			t.next, turn = turn, t
		}
	}
	h.cur = target
	for turn != nil {
		t := turn
		turn, t.next = t.next, nil
		if due := t.due(); due <= now {
			out = append(out, t)
		} else {
			h.put(t, due)
		}
	}
	return out
}

// next returns when (ns) the hand must move next, or false when nothing waits.
func (h *wheel) next() (int64, bool) {
	// From the slot after the hand round to the hand's own, word by word.
	start := (h.cur + 1) % wheelSlots
	for k := int64(0); k <= wheelSlots/64; k++ {
		word := (start/64 + k) % (wheelSlots / 64)
		set := h.busy[word]
		switch k {
		case 0:
			set &= ^uint64(0) << (start % 64)
		case wheelSlots / 64:
			set &= 1<<(start%64) - 1
		}
		if set != 0 {
			slot := word*64 + int64(bits.TrailingZeros64(set))
			return (h.cur + 1 + (slot-start+wheelSlots)%wheelSlots) * h.tick, true
		}
	}
	return 0, false
}
