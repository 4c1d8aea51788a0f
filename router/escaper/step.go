package escaper

import (
	"fmt"
	"strings"
	"sync/atomic"

	"wayout/selection"
)

// An Escaper is one step of a request's way out: a *Direct, whose nodes are
// egress paths, or a *Route, whose nodes are the next escapers.
type Escaper interface {
	Name() string
	// Publish lets the policy take note of the states of all nodes, and the
	// routes that lead here of what comes of it.
	Publish()
	publish() // without the routes
	base() *step
}

// step is what all escapers have in common: a name, nodes, and how one of them
// is chosen.
type step struct {
	name     string
	pool     *selection.Pool
	key      PickKey
	enabled  bool // enable_path_selection
	sessions *Sessions
	up       atomic.Pointer[usable]   // as last published
	parents  atomic.Pointer[[]*Route] // whose node it is in the table that is in force
}

// usable is what the published states of all nodes come to.
type usable struct {
	any selection.Family // what some node can be used by
	// sure is the part of any for which no path has to be tried first.
	sure selection.Family
	// alike: every node was given the same families, and can be used by all of
	// them or by none. Then any node that the policy picks reaches what another
	// would have reached.
	alike bool
}

// Name returns the escaper's name.
func (s *step) Name() string { return s.name }

func (s *step) base() *step { return s }

func (s *step) publishParents() {
	if all := s.parents.Load(); all != nil {
		for _, r := range *all {
			r.Publish()
		}
	}
}

// pick lets the policy choose a node among those that are up for a family of
// want, or the request's session, where it has one.
func (s *step) pick(r *Request, want selection.Family) (int, error) {
	if name := r.Selection.Session.Name; name != "" {
		key := selection.KeySession(r.User, s.name, name, s.sessions.generation(r))
		return s.pool.PickSession(want, key, r.Selection.Session.Strict)
	}
	return s.pool.Pick(want, s.pickKey(r))
}

// pickAmong is pick among the nodes that ok lets through. A strict session has
// one node and no other.
func (s *step) pickAmong(r *Request, want selection.Family, ok func(node int) bool) (int, error) {
	session := r.Selection.Session
	switch {
	case session.Name == "":
		return s.pool.PickAmong(want, s.pickKey(r), ok)
	case session.Strict:
		return 0, selection.Refuse(selection.ErrDown, "the session is bound to one path")
	}
	return s.pool.PickSessionAmong(want, selection.KeySession(r.User, s.name, session.Name, s.sessions.generation(r)), ok)
}

// PickKey says what the hashing policies hash.
type PickKey uint8

// The keys.
const (
	KeyClientIP PickKey = iota
	KeyUser
	KeyHost // the target as asked for, a name in lower case
)

// ParsePickKey reads a pick_key's word.
func ParsePickKey(s string) (PickKey, error) {
	switch s {
	case "client_ip":
		return KeyClientIP, nil
	case "user":
		return KeyUser, nil
	case "host":
		return KeyHost, nil
	}
	return 0, fmt.Errorf("unknown pick key %q, want client_ip, user or host", s)
}

// pickKey returns the key of a request for the hashing policies. It is the same
// in every process.
func (s *step) pickKey(r *Request) uint64 {
	switch s.key {
	case KeyUser:
		return selection.KeyString(r.User)
	case KeyHost:
		if r.Name != "" {
			return selection.KeyString(strings.ToLower(r.Name))
		}
		if r.Target.Addr.IsValid() {
			return selection.KeyAddr(r.Target.Addr)
		}
		return selection.KeyString(strings.ToLower(r.Target.Host))
	}
	return selection.KeyAddr(r.Client.Addr())
}
