package escaper_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"wayout/router/escaper"
	"wayout/selection"
)

func TestStatusOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 200},
		{selection.ErrMalformed, 400},
		{selection.ErrUnknown, 400},
		{selection.ErrNotPassed, 400},
		{selection.ErrDisabled, 400},
		{selection.ErrForbidden, 403},
		{selection.ErrDown, 503},
		{selection.ErrFamily, 502},
		{selection.ErrBind, 503},
		{selection.ErrPorts, 503},
		{escaper.ErrNoPath, 503},
		{escaper.ErrProhibited, 403},
		{escaper.ErrDNS, 502},
		{escaper.ErrDNSTimeout, 504},
		{escaper.ErrRefused, 502},
		{escaper.ErrReset, 502},
		{escaper.ErrUnreachable, 502},
		{escaper.ErrTimeout, 504},
		{escaper.ErrGuarded, 503},
		{escaper.ErrResources, 503},
		{escaper.ErrClosed, 503},
		{context.Canceled, 503},
		{syscall.EMFILE, 503},
		{errors.New("something else"), 500},
	} {
		if got := escaper.StatusOf(c.err); got != c.want {
			t.Errorf("%v: got %d, want %d", c.err, got, c.want)
		}
		if c.err == nil {
			continue
		}
		if got := escaper.StatusOf(fmt.Errorf("wrapped: %w", c.err)); got != c.want {
			t.Errorf("wrapped %v: got %d, want %d", c.err, got, c.want)
		}
	}
}
