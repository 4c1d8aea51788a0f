package netcfg

import (
	"errors"
	"fmt"
)

// Protocol marks what is ours: FRA_PROTOCOL of rules (Linux 4.17), rtm_protocol
// of routes, IFA_PROTO of addresses (5.18).
const Protocol uint8 = 119

// A daemon's share of the host's number spaces.
const (
	// Tables is how many routing tables a Layout takes, from TableBase on. Uplinks
	// are numbered 1 to MaxUplink and use tables from TableBase on. Three of the last
	// are for what is diverted. The very last of the numbers is no table's: as a
	// metric in table local it marks what is ours there and no single uplink's.
	Tables    = 256
	MaxUplink = Tables - 4

	// Priorities is how many rule priorities a Layout takes, from RulePriority on:
	// the first for the fwmark rules, three for answers to clients, the next 129 for the
	// `from PREFIX` rules (the longest prefix first), two for the own networks of interfaces that
	// divert, one for what is diverted and one for what else comes by
	// such an interface, the rest for rules to come.
	Priorities = 256
)

// Layout is the part of the host's number spaces that belongs to one daemon. Two
// daemons in a network namespace need Layouts that overlap in none of the three.
type Layout struct {
	TableBase    uint32 // first of Tables routing tables; the metric of our addresses and local routes is such a number too
	RulePriority uint32 // first of Priorities rule priorities
	MarkMask     uint32 // all bits of a socket mark that are ours
}

// Defaults of a Layout that stay clear of the tables which distributions and VPNs
// name and of the rules of table main (32766). Which mark bits are free depends on
// the mark's own layout, which is not this package's.
const (
	DefaultTableBase    uint32 = 11900
	DefaultRulePriority uint32 = 11900
)

// ErrLayout is a Layout or a Want that cannot be carried out.
var ErrLayout = errors.New("bad network layout")

// Validate checks that the numbers are free for use on any host.
func (l Layout) Validate() error {
	switch {
	case l.TableBase < 256 || l.TableBase > 0xffffffff-Tables:
		return fmt.Errorf("%w: table_base %d: want 256 to %d (lower tables are the host's own)", ErrLayout, l.TableBase, uint32(0xffffffff-Tables))
	case l.RulePriority < 1 || l.RulePriority > 32766-Priorities:
		return fmt.Errorf("%w: rule_priority %d: want 1 to %d (before the rule of table main)", ErrLayout, l.RulePriority, 32766-Priorities)
	case l.MarkMask == 0:
		return fmt.Errorf("%w: mark_mask is 0", ErrLayout)
	}
	return nil
}

// ownsTable says whether a table is in our range; with the zero Layout all are.
func (l Layout) ownsTable(t uint32) bool {
	return l == Layout{} || t >= l.TableBase && t-l.TableBase < Tables
}

// sharedMetric is the metric in table local of what belongs to no single uplink:
// local routes without one, and exceptions for gateways.
func (l Layout) sharedMetric() uint32 { return l.TableBase + Tables - 1 }

func (l Layout) ownsPriority(p uint32) bool {
	return p >= l.RulePriority && p-l.RulePriority < Priorities
}

// overlaps says which of the three number spaces two Layouts share; "" for none.
func (l Layout) overlaps(o Layout) string {
	apart := func(a, b, size uint32) bool { return a >= b && a-b >= size || b > a && b-a >= size }
	switch {
	case !apart(l.TableBase, o.TableBase, Tables):
		return fmt.Sprintf("routing tables %d to %d", o.TableBase, o.TableBase+Tables-1)
	case !apart(l.RulePriority, o.RulePriority, Priorities):
		return fmt.Sprintf("rule priorities %d to %d", o.RulePriority, o.RulePriority+Priorities-1)
	case l.MarkMask&o.MarkMask != 0:
		return fmt.Sprintf("mark mask 0x%x", o.MarkMask)
	}
	return ""
}
