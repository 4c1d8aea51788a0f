package selection

import (
	"fmt"
	"strings"
)

// Globs is a set of patterns over paths, as allow_path holds them. A nil *Globs
// matches every path; one without patterns matches none.
type Globs struct{ patterns []glob }

type glob struct{ escaper, id string }

// ParseGlobs reads patterns of the form ESCAPER/ID, in which * stands for any
// run of characters within its segment, the empty run included. A path has two
// segments, parted by its first slash: * never spans escaper and ID, while the
// slash inside a generated ID (2001:db8::/64) is a character of that ID. A
// pattern that no path can match is an error. The result is never nil: an
// absent allow_path is the caller's nil, an empty one allows nothing.
func ParseGlobs(patterns []string) (*Globs, error) {
	g := &Globs{patterns: make([]glob, 0, len(patterns))}
	for _, p := range patterns {
		escaper, id, ok := strings.Cut(p, "/")
		if !ok || escaper == "" || id == "" {
			return nil, fmt.Errorf("parse path pattern %s: want ESCAPER/ID", quote(p))
		}
		for _, r := range p {
			if !inPattern(r) {
				return nil, fmt.Errorf("parse path pattern %s: %s is in no path; * is the only wildcard", quote(p), quote(string(r)))
			}
		}
		g.patterns = append(g.patterns, glob{escaper: escaper, id: id})
	}
	return g, nil
}

// inPattern reports whether r is a character of names and IDs, or the wildcard.
func inPattern(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		return true
	}
	return strings.ContainsRune("._:-/*", r)
}

// Match reports whether one of the patterns matches the path, an ESCAPER/ID
// whose ID is resolved (no index, no other spelling of an address).
func (g *Globs) Match(path string) bool {
	if g == nil {
		return true
	}
	escaper, id, ok := strings.Cut(path, "/")
	if !ok {
		return false
	}
	for i := range g.patterns {
		if match(g.patterns[i].escaper, escaper) && match(g.patterns[i].id, id) {
			return true
		}
	}
	return false
}

// match compares s with a pattern. After a mismatch it lets the last * take one
// more character: earlier ones never need to be tried again.
func match(pattern, s string) bool {
	p, i := 0, 0
	star, held := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, held = p, i
			p++
		case p < len(pattern) && pattern[p] == s[i]:
			p++
			i++
		case star >= 0:
			held++
			p, i = star+1, held
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
