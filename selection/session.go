package selection

import "time"

// Session is what the user-name parameters say of stickiness.
type Session struct {
	Name     string        // "" is no session
	Lifetime time.Duration // 0 is without end
	Strict   bool          // fail rather than move when the session's path goes down
}

// PickSession returns the position of the session's node, by weighted
// rendezvous hashing of key, a [KeySession], whatever the pool's policy: among
// the nodes of weight above 0 that are usable by a family in want. When a node
// goes, only its sessions move, and they come back with it.
//
// With strict, nodes count that were given a family in want, usable or not, so
// that no change of state moves a session: when its node is not usable by a
// family in want the error is ErrDown and names the node's ID.
//
// Errors otherwise are those of Pick. It takes no lock and, unless it fails,
// allocates nothing. It goes through all nodes, at a few nanoseconds each.
func (p *Pool) PickSession(want Family, key uint64, strict bool) (node int, err error) {
	want &= V4 | V6
	usable := p.state.Load().usable
	among := usable
	if strict {
		among = p.givens
	}
	i := p.ranking.pick(key, among, want)
	switch {
	case i < 0:
		return 0, p.none(want)
	case usable[i]&want == 0:
		return 0, Refuse(ErrDown, "path %s, which the session is bound to, is not up for %s", quote(p.ids[i]), want)
	}
	return i, nil
}
