// Package netcfg owns what wayout puts into the kernel's network state
// (rules, routes, addresses) and reads what the kernel says of it.
//
// The kernel is a set to be made equal to another set. [Netlink.Read] takes a
// [Snapshot], [Diff] compares it with a [Want] and gives a [Plan], and
// [Plan.Apply] carries the plan out. State is always read back: events of a
// [Watcher] only say that it is time to read again.
//
// Sockets outlive their process. [Netlink.CountSockets] says which with a mark are
// left, and [Netlink.EndSockets] ends them before the rules of their mark go.
//
// Everything written is marked ours with protocol 119 ([Protocol]) and lies in
// the number space of a [Layout]; nothing else is ever changed or removed.
package netcfg
