package auth

import (
	"fmt"
	"net/netip"
	"slices"
)

// A networks finds users by the client's address: the longest network that holds it. It looks up one prefix of each length
// that there is, so that the number of networks does not matter.
type networks struct {
	users map[netip.Prefix]*User
	bits4 []int // the lengths that there are, longest first
	bits6 []int
}

// add enters the networks of a user without a password, or says which one is another's.
func (n *networks) add(u *User) error {
	if n.users == nil {
		n.users = make(map[netip.Prefix]*User)
	}
	for _, p := range u.From {
		p = p.Masked()
		if other := n.users[p]; other != nil && other != u {
			return fmt.Errorf("%s is the network of two users without a password, %q and %q", p, other.Name, u.Name)
		}
		n.users[p] = u
		bits := &n.bits6
		if p.Addr().Is4() {
			bits = &n.bits4
		}
		if !slices.Contains(*bits, p.Bits()) {
			*bits = append(*bits, p.Bits())
			slices.SortFunc(*bits, func(a, b int) int { return b - a })
		}
	}
	return nil
}

func (n *networks) find(a netip.Addr) *User {
	bits := n.bits6
	if a.Is4() {
		bits = n.bits4
	}
	for _, b := range bits {
		p, err := a.Prefix(b)
		if err != nil {
			return nil
		}
		if u := n.users[p]; u != nil {
			return u
		}
	}
	return nil
}

// plain is a client's address as networks are compared with it: IPv4 as IPv4, without a zone.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// From returns the user who is known by the client's address alone: of the users without a password the one whose
// networks hold it, by the longest that does; nil when there is none. It does not allocate.
func (g *Group) From(client netip.Addr) *User {
	client = plain(client)
	if !client.IsValid() {
		return nil
	}
	return g.networks.find(client)
}

// Allows says whether a user may come from an address: from anywhere when the user has no networks, else from within one
// of them. Verify and Verified know passwords alone, so that who calls one of them asks this before it takes the user for
// authenticated, and answers no as it does to a wrong password. It does not allocate.
func Allows(u *User, client netip.Addr) bool {
	if len(u.From) == 0 {
		return true
	}
	client = plain(client)
	for _, p := range u.From {
		if p.Contains(client) {
			return true
		}
	}
	return false
}
