package escaper

import (
	"fmt"

	"wayout/selection"
)

// Strategy says which families of a target's name are used, and in which order.
type Strategy uint8

// The strategies. Only what the path serves is ever asked for.
const (
	AnyFamily Strategy = iota // both, IPv6 first (RFC 8305)
	V4Only
	V6Only
	V4First
	V6First
)

// ParseStrategy reads a resolve_strategy's word.
func ParseStrategy(s string) (Strategy, error) {
	switch s {
	case "any", "":
		return AnyFamily, nil
	case "ipv4_only":
		return V4Only, nil
	case "ipv6_only":
		return V6Only, nil
	case "ipv4_first":
		return V4First, nil
	case "ipv6_first":
		return V6First, nil
	}
	return 0, fmt.Errorf("unknown resolve strategy %q, want any, ipv4_only, ipv6_only, ipv4_first or ipv6_first", s)
}

// families returns those that names are resolved to.
func (s Strategy) families() selection.Family {
	switch s {
	case V4Only:
		return selection.V4
	case V6Only:
		return selection.V6
	}
	return selection.V4 | selection.V6
}
