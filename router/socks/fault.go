package socks

import (
	"errors"
	"fmt"
	"net/http"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/socks/client"
	"wayout/selection"
)

// What is wrong with what a client says.
var (
	errVersion     = errors.New("neither SOCKS4 nor SOCKS5")
	errRequest     = errors.New("malformed request")
	errExtension   = fmt.Errorf("%w: the extension cannot be read", selection.ErrMalformed)
	errPassword    = errors.New("malformed user name and password")
	errIncomplete  = errors.New("the client ended in the middle of the handshake")
	errSlow        = errors.New("the handshake did not come in time")
	errCommand     = errors.New("command not supported")
	errHost        = errors.New("malformed host in the request")
	errPort        = errors.New("port 0 in the request")
	errMethods     = errors.New("no authentication method that fits was offered")
	errCredentials = errors.New("authentication failed")
	errUser4       = errors.New("SOCKS4 has no authentication")
	errAuthBusy    = errors.New("password not checked in time")
	errNoRoom      = errors.New("no room for this request") // the daemon takes no new work
)

// judge is the table from errors to answers: the HTTP status that stands for
// the answer in records, and the reply code.
func judge(err error) (status int, code byte) {
	for _, row := range [...]struct {
		is     error
		status int
		code   byte
	}{
		{errMethods, http.StatusProxyAuthRequired, replyNotAllowed},
		{errCredentials, http.StatusProxyAuthRequired, replyNotAllowed},
		{errUser4, http.StatusProxyAuthRequired, replyNotAllowed},
		{auth.ErrLimit, http.StatusTooManyRequests, replyNotAllowed},
		{errAuthBusy, http.StatusServiceUnavailable, replyFailure},
		{errNoRoom, http.StatusServiceUnavailable, replyFailure},
		{relay.ErrStopped, http.StatusServiceUnavailable, replyFailure},

		{errVersion, http.StatusBadRequest, replyFailure},
		{errRequest, http.StatusBadRequest, replyFailure},
		{errPassword, http.StatusBadRequest, replyFailure},
		{errIncomplete, http.StatusBadRequest, replyFailure},
		{errSlow, http.StatusRequestTimeout, replyFailure},
		{errCommand, http.StatusNotImplemented, replyCommand},
		{escaper.ErrNoDatagrams, http.StatusNotImplemented, replyCommand},
		{errHost, http.StatusBadRequest, replyFailure},
		{errPort, http.StatusBadRequest, replyFailure},
		{client.ErrAddrType, http.StatusBadRequest, replyAddress},
		{client.ErrAddr, http.StatusBadRequest, replyFailure},
	} {
		if errors.Is(err, row.is) {
			return row.status, row.code
		}
	}
	// The status is for every protocol alike, the code is SOCKS's.
	status, code = escaper.StatusOf(err), replyFailure
	for _, row := range [...]struct {
		is   error
		code byte
	}{
		{selection.ErrUnknown, replyNotAllowed},
		{selection.ErrNotPassed, replyNotAllowed},
		{selection.ErrDisabled, replyNotAllowed},
		{selection.ErrForbidden, replyNotAllowed},
		// Before ErrFamily: what is down says so, whatever it wraps beside.
		{escaper.ErrNoPath, replyFailure},
		{selection.ErrDown, replyFailure},
		{selection.ErrFamily, replyAddress},
		{escaper.ErrProhibited, replyNotAllowed},
		{escaper.ErrDNSTimeout, replyUnreachable},
		{escaper.ErrDNS, replyUnreachable},
		{escaper.ErrRefused, replyRefused},
		{escaper.ErrReset, replyRefused},
		{escaper.ErrUnreachable, replyUnreachable},
		{escaper.ErrTimeout, replyUnreachable},
	} {
		if errors.Is(err, row.is) {
			return status, row.code
		}
	}
	return status, code
}
