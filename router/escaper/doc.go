// Package escaper takes a request out of the host: it turns the selection into
// a path, the target into addresses that may be dialled, and the two into a
// connection that is bound to the path.
//
// Door.Open is the only way. It loads the current Table once and then touches
// nothing that is shared between paths but counters: no lock of the process, no
// file, no netlink. What a path knows (its state, its open and idle
// connections) sits behind that path's own lock.
//
// A path's state comes from outside, by Path.SetFamilyState and Publish: the
// package does not look at the host's addresses itself. When it is told
// nothing, or late, the worst that happens is a dial that fails: a socket is
// bound to the path's address, marked and, where asked, held to its interface
// before it connects, a pin that cannot be set fails the dial, and nothing ever
// takes the place of the address that was chosen.
package escaper
