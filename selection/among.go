package selection

import "slices"

// PickAmong is Pick among the nodes that ok lets through, for a request whose
// first pick cannot be used at the moment. It goes through all nodes and calls
// ok for those that are usable, so it is for the exception; it allocates.
//
// What the policy is made of holds among these nodes: Serial takes the first,
// LeastConn the one with the fewest connections, and the others their shares by
// weight, the hashing ones always the same node for one key.
func (p *Pool) PickAmong(want Family, key uint64, ok func(node int) bool) (node int, err error) {
	want &= V4 | V6
	s := p.state.Load()
	may := p.among(s.usable, want, ok)
	switch p.policy {
	case Serial, LeastConn:
		t := &table{}
		for i, f := range may {
			if f != 0 && p.weights[i] > 0 {
				t.members = append(t.members, int32(i))
			}
		}
		if len(t.members) == 0 {
			return 0, p.none(want)
		}
		if p.policy == LeastConn {
			return p.leastConn(t), nil
		}
		return int(t.members[0]), nil
	case Random, RoundRobin:
		key = p.rand()
	}
	if i := p.ranking.pick(key, may, want); i >= 0 {
		return i, nil
	}
	return 0, p.none(want)
}

// PickSessionAmong is PickSession, without strict, among the nodes that ok lets
// through. It is for the exception, as PickAmong is.
func (p *Pool) PickSessionAmong(want Family, key uint64, ok func(node int) bool) (node int, err error) {
	want &= V4 | V6
	if i := p.ranking.pick(key, p.among(p.state.Load().usable, want, ok), want); i >= 0 {
		return i, nil
	}
	return 0, p.none(want)
}

// among returns usable without the nodes that are of no use, or that ok refuses.
func (p *Pool) among(usable []Family, want Family, ok func(node int) bool) []Family {
	may := slices.Clone(usable)
	for i, f := range may {
		if f&want == 0 || !ok(i) {
			may[i] = 0
		}
	}
	return may
}
