package selection

import (
	"errors"
	"fmt"
)

// The refusals of a selection, one for each row of the contract's table of what
// a bad selection gets. A front end turns them into its status by errors.Is.
var (
	// ErrMalformed: the selection cannot be read.
	ErrMalformed = errors.New("malformed selection")
	// ErrUnknown: unknown escaper or ID, an address of no node, or a strict
	// index out of range.
	ErrUnknown = errors.New("unknown selection")
	// ErrNotPassed: the map names an escaper that the request does not pass.
	ErrNotPassed = errors.New("escaper not passed")
	// ErrDisabled: the escaper has no enable_path_selection.
	ErrDisabled = errors.New("path selection is disabled")
	// ErrForbidden: the user's allow_path does not hold the path.
	ErrForbidden = errors.New("path not allowed")
	// ErrDown: the path is down, draining or expired; or, by policy, no path
	// is usable.
	ErrDown = errors.New("path is down")
	// ErrFamily: the path was never given an address of the target's family.
	ErrFamily = errors.New("no address of the family")
	// ErrBind: the path's address cannot be bound.
	ErrBind = errors.New("cannot bind")
	// ErrPorts: the ports of the path's address are used up.
	ErrPorts = errors.New("ports used up")

	// ErrMismatch: a Value's At gives an address that is not the path's. It is
	// an ErrMalformed, too: the selection contradicts itself.
	ErrMismatch = Refuse(ErrMalformed, "address is not the path's")
)

// Result returns the word for an outcome that metrics use: ok, malformed,
// unknown, disabled, forbidden, down, family or bind. A nil error is ok, and so
// is one that is no refusal of a selection (a target that refuses, say).
func Result(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, ErrMalformed):
		return "malformed"
	case errors.Is(err, ErrUnknown), errors.Is(err, ErrNotPassed):
		return "unknown"
	case errors.Is(err, ErrDisabled):
		return "disabled"
	case errors.Is(err, ErrForbidden):
		return "forbidden"
	case errors.Is(err, ErrDown):
		return "down"
	case errors.Is(err, ErrFamily):
		return "family"
	case errors.Is(err, ErrBind), errors.Is(err, ErrPorts):
		return "bind"
	}
	return "ok"
}

// refusal is a sentinel with the text that the user sees in its place.
type refusal struct {
	kind error
	text string
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.kind }

// Refuse returns an error that is kind for errors.Is, one of the sentinels, and
// whose whole text is the formatted one: a sentence for the user, without the
// sentinel's own words.
func Refuse(kind error, format string, args ...any) error {
	return &refusal{kind: kind, text: fmt.Sprintf(format, args...)}
}
