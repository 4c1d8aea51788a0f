package httpproxy

import "bytes"

// A field is one line of a head, as offsets into the head's bytes.
type field struct {
	start, nameEnd  int32
	value, valueEnd int32
	end             int32 // past the line's CRLF
	kind            kind
	named           bool // Connection names it: it is about this connection only
	loose           bool // not as we write it: to be written anew
}

// A head is the start line and the fields of one message. It refers to the
// bytes that it was parsed from, and is used again for the next message: a
// parse allocates nothing once fields has its size.
type head struct {
	buf    []byte
	fields []field

	// Of a request.
	method, target []byte
	// Of a response.
	status int
	reason []byte

	minor int // HTTP/1.minor: 0 or 1

	// What the fields say about framing and the connection.
	length        int64 // Content-Length, -1 when there is none
	chunked       bool
	close         bool // Connection: close
	keepAlive     bool // Connection or Proxy-Connection: keep-alive
	namesUpgrade  bool // Connection: upgrade
	hosts         int  // number of Host fields
	host          int  // index of the last of them
	upgrade       int  // index of the Upgrade field, -1 when there is none
	teTrailers    bool
	expect        bool // Expect: 100-continue
	maxForwards   int  // index of the Max-Forwards field, -1 when there is none
	selections    int  // number of path selection headers
	authorization int  // index of Proxy-Authorization, -1 when there is none
}

func (h *head) name(i int) []byte {
	f := &h.fields[i]
	return h.buf[f.start:f.nameEnd]
}

func (h *head) value(i int) []byte {
	f := &h.fields[i]
	return h.buf[f.value:f.valueEnd]
}

func (h *head) reset(b []byte) {
	*h = head{
		buf: b, fields: h.fields[:0],
		length: -1, host: -1, upgrade: -1, maxForwards: -1, authorization: -1,
	}
}

// A headEnd looks for the empty line that ends a head, in bytes that arrive
// piece by piece; it looks at each byte once.
type headEnd struct{ line, pos int }

// find looks on in b, which holds what it held at the last call and perhaps
// more. n is the length of the head with its empty line, or 0 when more is
// needed. A line that ends in a bare LF is refused here, so that a head and
// what follows it are never told apart in two ways.
func (e *headEnd) find(b []byte) (n int, err error) {
	for {
		i := bytes.IndexByte(b[e.pos:], '\n')
		if i < 0 {
			e.pos = len(b)
			return 0, nil
		}
		i += e.pos
		if i == e.line || b[i-1] != '\r' {
			return 0, faultBareLF
		}
		e.pos = i + 1
		if i == e.line+1 {
			return e.pos, nil
		}
		e.line = e.pos
	}
}

// limits of a parse.
type headLimits struct {
	fields, target int
	selection      string // the path selection header in lower case, "" when off
	response       bool   // tolerate and mend what RFC 9112 asks a proxy to mend in responses
}

// parseRequest parses a whole request head, with its empty line at the end.
// The error is a fault.
func (h *head) parseRequest(b []byte, lim *headLimits) error {
	h.reset(b)
	line, rest, err := cutLine(b)
	if err != nil {
		return err
	}
	sp := bytes.IndexByte(line, ' ')
	last := bytes.LastIndexByte(line, ' ')
	if sp < 0 || !allToken(line[:sp]) {
		return h.badMethod(line)
	}
	if last <= sp+1 {
		return faultRequestLine
	}
	h.method, h.target = line[:sp], line[sp+1:last]
	if err := h.parseVersion(line[last+1:]); err != nil {
		return err
	}
	if len(h.target) > lim.target {
		return faultTargetTooLong
	}
	for _, c := range h.target {
		switch {
		case c == ' ':
			return faultRequestLine
		case c < ' ' || c == 0x7f:
			return faultControl
		}
	}
	if err := h.parseFields(rest, lim); err != nil {
		return err
	}
	return h.checkRequest()
}

// badMethod finds words for a line that does not begin with a method.
func (h *head) badMethod(line []byte) error {
	switch {
	case len(line) > 0 && line[0] == 0x16: // a TLS handshake record
		return faultTLS
	case bytes.IndexByte(line, ' ') < 0:
		return faultRequestLine
	}
	return faultMethod
}

// parseResponse parses a whole response head, with its empty line at the end.
// The error is a fault.
func (h *head) parseResponse(b []byte, lim *headLimits) error {
	h.reset(b)
	line, rest, err := cutLine(b)
	if err != nil {
		return err
	}
	const version = len("HTTP/1.1")
	if len(line) < version+len(" 200") || line[version] != ' ' {
		return faultStatusLine
	}
	if err := h.parseVersion(line[:version]); err != nil {
		return err
	}
	for _, c := range line[version+1 : version+4] {
		if c < '0' || c > '9' {
			return faultStatusLine
		}
		h.status = h.status*10 + int(c-'0')
	}
	if h.status < 100 {
		return faultStatusLine
	}
	// The space after the status is missing in many a response without a reason.
	if r := line[version+4:]; len(r) > 0 {
		if r[0] != ' ' {
			return faultStatusLine
		}
		h.reason = r[1:]
		for _, c := range h.reason {
			if !isValue(c) {
				return faultControl
			}
		}
	}
	if err := h.parseFields(rest, lim); err != nil {
		return err
	}
	return h.checkFraming()
}

// parseVersion reads HTTP/1.0 or HTTP/1.1.
func (h *head) parseVersion(v []byte) error {
	const prefix = "HTTP/"
	if len(v) != len("HTTP/1.1") || string(v[:len(prefix)]) != prefix || v[6] != '.' || !isDigit(v[5]) || !isDigit(v[7]) {
		return faultVersion
	}
	if v[5] != '1' || v[7] > '1' {
		return faultVersionUnsupported
	}
	h.minor = int(v[7] - '0')
	return nil
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// cutLine takes the first line off, without its CRLF.
func cutLine(b []byte) (line, rest []byte, err error) {
	i := bytes.IndexByte(b, '\n')
	if i < 1 || b[i-1] != '\r' {
		return nil, nil, faultBareLF
	}
	return b[:i-1], b[i+1:], nil
}

// parseFields parses the field lines of h.buf, of which rest is the tail, up
// to the empty line.
func (h *head) parseFields(rest []byte, lim *headLimits) error {
	for {
		line, next, err := cutLine(rest)
		if err != nil {
			return err
		}
		if len(line) == 0 {
			break
		}
		if len(h.fields) >= lim.fields {
			return faultTooManyFields
		}
		if err := h.parseField(line, len(h.buf)-len(rest), lim); err != nil {
			return err
		}
		rest = next
	}
	return h.readConnection()
}

func (h *head) parseField(line []byte, start int, lim *headLimits) error {
	if line[0] == ' ' || line[0] == '\t' {
		return faultObsFold
	}
	colon := 0
	for colon < len(line) && isToken(line[colon]) {
		colon++
	}
	f := field{start: int32(start), nameEnd: int32(start + colon), end: int32(start + len(line) + 2)}
	if colon < len(line) && (line[colon] == ' ' || line[colon] == '\t') && colon > 0 {
		// RFC 9112, section 5.1: refused in a request, removed from a response.
		if !lim.response {
			return faultNameSpace
		}
		for colon < len(line) && (line[colon] == ' ' || line[colon] == '\t') {
			colon++
		}
		f.loose = true
	}
	switch {
	case colon == len(line):
		return faultFieldLine
	case line[colon] < ' ' || line[colon] == 0x7f:
		return faultControl
	case line[colon] != ':' || colon == 0:
		return faultFieldName
	}
	for _, c := range line[colon+1:] {
		if !isValue(c) {
			return faultControl
		}
	}
	v, end := colon+1, len(line)
	for v < end && (line[v] == ' ' || line[v] == '\t') {
		v++
	}
	for end > v && (line[end-1] == ' ' || line[end-1] == '\t') {
		end--
	}
	f.value, f.valueEnd = int32(start+v), int32(start+end)
	name := line[:f.nameEnd-f.start]
	f.kind = classify(name, lim.selection)
	h.fields = append(h.fields, f)
	if f.kind == kindOther {
		return nil
	}
	return h.note(f.kind, line[v:end])
}

// note takes in a field that the proxy has to do with.
func (h *head) note(k kind, v []byte) error {
	i := len(h.fields) - 1
	switch k {
	case kindContentLength:
		if h.length >= 0 {
			return faultLengthRepeated
		}
		n, ok := parseLength(v)
		if !ok {
			return faultLengthValue
		}
		h.length = n
	case kindTransferEncoding:
		if h.chunked {
			return faultCodingRepeated
		}
		if !foldEqual(v, "chunked") {
			return faultCodingUnknown
		}
		h.chunked = true
	case kindHost:
		h.hosts++
		h.host = i
	case kindUpgrade:
		if h.upgrade >= 0 {
			// A list over two lines: the upgrade is not offered on, which is
			// always allowed (RFC 9110, section 7.8).
			h.upgrade = -2
		}
		if h.upgrade == -1 {
			h.upgrade = i
		}
	case kindTE:
		h.teTrailers = h.teTrailers || hasElement(v, "trailers")
	case kindExpect:
		if !foldEqual(v, "100-continue") {
			return faultExpectation
		}
		h.expect = true
	case kindMaxForwards:
		h.maxForwards = i
	case kindSelection:
		h.selections++
	case kindProxyAuthorization:
		if h.authorization >= 0 && !bytes.Equal(h.value(h.authorization), v) {
			return faultCredentials
		}
		h.authorization = i
	}
	return nil
}

// maxNamed bounds the work that Connection fields can ask for.
const maxNamed = 64

// readConnection marks the fields that Connection names (RFC 9110, section
// 7.6.1).
func (h *head) readConnection() error {
	named := 0
	for i := range h.fields {
		k := h.fields[i].kind
		if k != kindConnection && k != kindProxyConnection {
			continue
		}
		list := h.value(i)
		for len(list) > 0 {
			var e []byte
			e, list = nextElement(list)
			switch {
			case len(e) == 0:
				continue
			case foldEqual(e, "close"):
				// Proxy-Connection is not of any standard; only its wish for a
				// longer life is a thing that old clients say.
				h.close = h.close || k == kindConnection
				continue
			case foldEqual(e, "keep-alive"):
				h.keepAlive = true
			}
			if k == kindProxyConnection {
				continue
			}
			if named++; named > maxNamed {
				return faultConnectionLong
			}
			if err := h.markNamed(e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (h *head) markNamed(name []byte) error {
	switch classify(name, "") {
	case kindHost, kindContentLength, kindTransferEncoding, kindExpect:
		// Taking these away would change where the message goes or ends. An
		// origin that asks for it changes nothing: we write them ourselves.
		if h.status == 0 {
			return faultConnectionNames
		}
	case kindUpgrade:
		h.namesUpgrade = true
	}
	for j := range h.fields {
		if foldEqualBytes(h.name(j), name) {
			h.fields[j].named = true
		}
	}
	return nil
}

// checkFraming refuses what two readers could frame in two ways.
func (h *head) checkFraming() error {
	switch {
	case h.chunked && h.length >= 0:
		return faultLengthAndCoding
	case h.chunked && h.minor == 0:
		return faultCodingVersion
	}
	return nil
}

func (h *head) checkRequest() error {
	if err := h.checkFraming(); err != nil {
		return err
	}
	connect := h.isConnect()
	switch {
	case h.hosts > 1:
		return faultHostRepeated
	case h.hosts == 0 && h.minor >= 1 && !connect:
		// CONNECT names its host in the target, and clients that leave the
		// field out there are common.
		return faultHostMissing
	case connect && (h.chunked || h.length > 0):
		return faultConnectBody
	}
	return nil
}

// checkHost refuses a Host field that is no authority. auth is the target's,
// known to be good: the two are mostly the same.
func (h *head) checkHost(auth []byte) error {
	if h.hosts == 0 {
		return nil
	}
	v := h.value(h.host)
	if bytes.Equal(v, auth) {
		return nil
	}
	var a authority
	if err := a.parse(v, false); err != nil {
		return faultHostValue
	}
	return nil
}

func (h *head) isConnect() bool { return string(h.method) == "CONNECT" }

// upgrading reports whether the request offers to switch protocols in a way
// that is offered on: over a message without a body, and not to HTTP/2, whose
// clear-text upgrade RFC 9113 took back.
func (h *head) upgrading() bool {
	return h.upgrade >= 0 && h.namesUpgrade && h.minor >= 1 && !h.chunked && h.length <= 0 &&
		!hasElement(h.value(h.upgrade), "h2c")
}

// appendFields appends the lines of the fields that go on, as they came
// wherever that is how we write them; neighbours go in one piece. drop tells
// what else to leave out.
func (h *head) appendFields(out []byte, drop func(*field) bool) []byte {
	from, to := int32(0), int32(0) // a run of lines that go on as they are
	for i := range h.fields {
		f := &h.fields[i]
		if !f.kind.forwarded() || f.named || drop(f) {
			continue
		}
		if f.loose {
			out = append(out, h.buf[from:to]...)
			from, to = 0, 0
			out = append(out, h.name(i)...)
			out = append(out, ": "...)
			out = append(out, h.value(i)...)
			out = append(out, "\r\n"...)
			continue
		}
		if f.start != to {
			out = append(out, h.buf[from:to]...)
			from = f.start
		}
		to = f.end
	}
	return append(out, h.buf[from:to]...)
}
