package escaper

import (
	"context"
	"errors"
	"net/http"
	"syscall"

	"wayout/selection"
)

// StatusOf returns the HTTP status that stands for an error of Open, whatever
// protocol the client speaks: 200 for nil, 500 for an error that is none of
// the sentinels here and in package selection.
func StatusOf(err error) int {
	if err == nil {
		return http.StatusOK
	}
	for _, row := range [...]struct {
		is     error
		status int
	}{
		{selection.ErrMalformed, http.StatusBadRequest},
		{selection.ErrUnknown, http.StatusBadRequest},
		{selection.ErrNotPassed, http.StatusBadRequest},
		{selection.ErrDisabled, http.StatusBadRequest},
		{selection.ErrForbidden, http.StatusForbidden},
		{ErrNoPath, http.StatusServiceUnavailable},
		{selection.ErrDown, http.StatusServiceUnavailable},
		{selection.ErrFamily, http.StatusBadGateway},
		{selection.ErrBind, http.StatusServiceUnavailable},
		{selection.ErrPorts, http.StatusServiceUnavailable},

		{ErrProhibited, http.StatusForbidden},
		{ErrDNSTimeout, http.StatusGatewayTimeout},
		{ErrDNS, http.StatusBadGateway},
		{ErrRefused, http.StatusBadGateway},
		{ErrReset, http.StatusBadGateway},
		{ErrUnreachable, http.StatusBadGateway},
		{ErrTimeout, http.StatusGatewayTimeout},
		{ErrGuarded, http.StatusServiceUnavailable},
		{ErrNoDatagrams, http.StatusNotImplemented},
		{ErrResources, http.StatusServiceUnavailable},
		{ErrClosed, http.StatusServiceUnavailable},
		{context.Canceled, http.StatusServiceUnavailable}, // only a stop gives a request up

		// The daemon's own means.
		{syscall.EMFILE, http.StatusServiceUnavailable},
		{syscall.ENFILE, http.StatusServiceUnavailable},
		{syscall.ENOBUFS, http.StatusServiceUnavailable},
		{syscall.ENOMEM, http.StatusServiceUnavailable},
	} {
		if errors.Is(err, row.is) {
			return row.status
		}
	}
	return http.StatusInternalServerError
}
