package httpproxy

import (
	"fmt"
	"net/http"
)

// A fault is what is wrong with a message, as an error. It is a number, so
// that refusing a message allocates nothing.
type fault uint8

const (
	faultNone fault = iota

	// Of the head as a whole.
	faultBareLF
	faultControl
	faultHeadTooLarge
	faultTooManyFields
	faultTargetTooLong
	faultHeadTimeout
	faultNotHTTP
	faultTLS

	// Of the start line.
	faultRequestLine
	faultMethod
	faultVersion
	faultVersionUnsupported
	faultStatusLine

	// Of the target.
	faultOriginForm
	faultAsteriskForm
	faultScheme
	faultHTTPS
	faultUserinfo
	faultFragment
	faultHost
	faultPort
	faultZone
	faultConnectTarget
	faultTargetBytes

	// Of the fields.
	faultFieldLine
	faultFieldName
	faultNameSpace
	faultObsFold
	faultHostMissing
	faultHostRepeated
	faultHostValue
	faultConnectionNames
	faultConnectionLong
	faultCredentials
	faultExpectation
	faultMaxForwards

	// Of the framing.
	faultLengthValue
	faultLengthRepeated
	faultLengthAndCoding
	faultCodingRepeated
	faultCodingUnknown
	faultCodingVersion
	faultConnectBody
	faultChunkSize
	faultChunkExtension
	faultChunkEnd
	faultTrailer
	faultTrailerTooLarge
	faultBodyTimeout

	// Of a response.
	faultStatusUnasked
	faultTooManyInterim
	faultIncomplete
	faultNoResponse
	faultResponseTimeout

	faultEnd // one past the last
)

// Error says what is wrong in words that go to the other side.
func (f fault) Error() string {
	switch f {
	case faultBareLF:
		return "a line ends in LF without CR"
	case faultControl:
		return "control character in the head"
	case faultHeadTooLarge:
		return "the head is too large"
	case faultTooManyFields:
		return "too many header fields"
	case faultTargetTooLong:
		return "the request target is too long"
	case faultHeadTimeout:
		return "the request head did not arrive in time"
	case faultNotHTTP:
		return "not an HTTP request"
	case faultTLS:
		return "this is a TLS handshake, and the port speaks plain HTTP"
	case faultRequestLine:
		return "malformed request line"
	case faultMethod:
		return "malformed method"
	case faultVersion:
		return "malformed HTTP version"
	case faultVersionUnsupported:
		return "HTTP version not supported, only 1.0 and 1.1"
	case faultStatusLine:
		return "malformed status line"
	case faultOriginForm:
		return "this is a proxy: the request target must be a whole URL (http://host/path), or CONNECT host:port"
	case faultAsteriskForm:
		return "this is a proxy: OPTIONS takes a whole URL (http://host) as its target"
	case faultScheme:
		return "the request target is not an http:// URL"
	case faultHTTPS:
		return "https:// is not forwarded: use CONNECT host:port"
	case faultUserinfo:
		return "user information in the request target"
	case faultFragment:
		return "fragment in the request target"
	case faultHost:
		return "malformed host in the request target"
	case faultPort:
		return "malformed port in the request target, 1 to 65535"
	case faultZone:
		return "IPv6 zone in the request target"
	case faultConnectTarget:
		return "the target of CONNECT is host:port"
	case faultTargetBytes:
		return "character in the request target that is not allowed"
	}
	return f.fieldError()
}

func (f fault) fieldError() string {
	switch f {
	case faultFieldLine:
		return "malformed header field"
	case faultFieldName:
		return "malformed header field name"
	case faultNameSpace:
		return "white space before the colon of a header field"
	case faultObsFold:
		return "folded header field"
	case faultHostMissing:
		return "no Host field"
	case faultHostRepeated:
		return "more than one Host field"
	case faultHostValue:
		return "malformed Host field"
	case faultConnectionNames:
		return "Connection names a field that frames the message"
	case faultConnectionLong:
		return "Connection names too many fields"
	case faultCredentials:
		return "Proxy-Authorization fields that differ"
	case faultExpectation:
		return "unknown expectation"
	case faultMaxForwards:
		return "malformed Max-Forwards"
	case faultLengthValue:
		return "malformed Content-Length"
	case faultLengthRepeated:
		return "more than one Content-Length"
	case faultLengthAndCoding:
		return "both Content-Length and Transfer-Encoding"
	case faultCodingRepeated:
		return "more than one Transfer-Encoding"
	case faultCodingUnknown:
		return "Transfer-Encoding other than chunked"
	case faultCodingVersion:
		return "Transfer-Encoding in an HTTP/1.0 message"
	case faultConnectBody:
		return "CONNECT with a body"
	case faultChunkSize:
		return "malformed chunk size"
	case faultChunkExtension:
		return "malformed or over-long chunk extension"
	case faultChunkEnd:
		return "chunk longer than its size"
	case faultTrailer:
		return "malformed trailer field"
	case faultTrailerTooLarge:
		return "the trailer section is too large"
	case faultBodyTimeout:
		return "the body stalled"
	case faultStatusUnasked:
		return "switched protocols without being asked"
	case faultTooManyInterim:
		return "too many interim responses"
	case faultIncomplete:
		return "the message ended early"
	case faultNoResponse:
		return "the connection ended before a response"
	case faultResponseTimeout:
		return "no response in time"
	}
	return fmt.Sprintf("fault %d", uint8(f))
}

// status is what the fault gets when a client's request has it.
func (f fault) status() int {
	switch f {
	// The target is a part of the head: one status for all of it.
	case faultHeadTooLarge, faultTargetTooLong, faultTooManyFields, faultTrailerTooLarge:
		return http.StatusRequestHeaderFieldsTooLarge
	case faultHeadTimeout, faultBodyTimeout:
		return http.StatusRequestTimeout
	case faultVersionUnsupported:
		return http.StatusHTTPVersionNotSupported
	case faultCodingUnknown:
		return http.StatusNotImplemented
	case faultExpectation:
		return http.StatusExpectationFailed
	}
	return http.StatusBadRequest
}

// originStatus is what the fault gets when an origin's response has it, with
// the error type of RFC 9209, section 2.3.
func (f fault) originStatus() (status int, kind string) {
	switch f {
	case faultHeadTooLarge, faultTooManyFields:
		return http.StatusBadGateway, "http_response_header_section_size"
	case faultTrailerTooLarge:
		return http.StatusBadGateway, "http_response_trailer_section_size"
	case faultCodingUnknown, faultCodingRepeated, faultCodingVersion:
		return http.StatusBadGateway, "http_response_transfer_coding"
	case faultStatusUnasked:
		return http.StatusBadGateway, "http_upgrade_failed"
	case faultIncomplete:
		return http.StatusBadGateway, "http_response_incomplete"
	case faultNoResponse:
		return http.StatusBadGateway, "connection_terminated"
	case faultResponseTimeout:
		return http.StatusGatewayTimeout, "http_response_timeout"
	case faultBodyTimeout:
		return http.StatusGatewayTimeout, "connection_read_timeout"
	}
	return http.StatusBadGateway, "http_protocol_error"
}

// originError is a failure that the origin's side brought about: of its
// connection, or of its response.
type originError struct{ err error }

func (e *originError) Error() string { return "origin: " + e.err.Error() }
func (e *originError) Unwrap() error { return e.err }
