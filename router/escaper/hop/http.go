package hop

import (
	"errors"
	"io"
	"net/http"
	"strings"
)

// askHTTP asks for a tunnel by CONNECT, and returns what follows the answer.
func (p *Peer) askHTTP(conn io.ReadWriter, to Target, selection string) (early []byte, err error) {
	head, err := p.request(to, selection)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, head); err != nil {
		return nil, err
	}
	a, early, err := readAnswer(conn)
	switch {
	case err != nil:
		return nil, err
	case a.status/100 == 2:
		// Content-Length and Transfer-Encoding mean nothing here (RFC 9110,
		// section 9.3.6).
		return early, nil
	case a.status == http.StatusProxyAuthRequired && p.Username == "":
		return nil, fail(ErrAuth, nil, "the peer wants credentials and has been given none (407)")
	case a.status == http.StatusProxyAuthRequired:
		return nil, fail(ErrAuth, nil, "%s (407)", ErrAuth)
	}
	return nil, &Refused{Status: a.status, Type: a.problem}
}

// request is the head of a CONNECT request. Host is the target, as in the
// request line (RFC 9112, section 3.2).
func (p *Peer) request(to Target, selection string) (string, error) {
	var b strings.Builder
	authority := to.String()
	b.WriteString("CONNECT " + authority + " HTTP/1.1\r\nHost: " + authority + "\r\n")
	if p.Username != "" {
		b.WriteString("Proxy-Authorization: " + p.authorization() + "\r\n")
	}
	switch {
	case selection == "":
	case p.SelectionHeader == "":
		return "", fail(ErrSelection, nil, "no header is configured that hands a selection to the peer")
	case strings.ContainsFunc(selection, isControl):
		return "", fail(ErrSelection, nil, "a control character in the selection %q", selection)
	default:
		b.WriteString(p.SelectionHeader + ": " + selection + "\r\n")
	}
	b.WriteString("\r\n")
	return b.String(), nil
}

const (
	firstRead  = 4 << 10
	maxHead    = 64 << 10 // of all heads of an answer
	maxInterim = 16
)

// readAnswer reads up to the end of the final head, and what came with it.
func readAnswer(r io.Reader) (a answer, early []byte, err error) {
	var end headEnd
	read := 0 // bytes of interim heads
	b := make([]byte, 0, firstRead)
	for interim := 0; ; {
		n, err := end.find(b)
		size := n
		if n == 0 {
			size = len(b)
		}
		switch {
		case err != nil:
			return a, nil, err
		case read+size > maxHead:
			return a, nil, fail(ErrProtocol, nil, "the peer's answer has a head of more than %d bytes", maxHead)
		case n == 0:
			if b, err = readMore(r, b); err != nil {
				return a, nil, err
			}
			continue
		}
		if a, err = parseAnswer(b[:n]); err != nil {
			return a, nil, err
		}
		b = b[n:]
		switch {
		case a.status == http.StatusSwitchingProtocols:
			return a, nil, fail(ErrProtocol, nil, "the peer switches protocols, which it was not asked for")
		case a.status >= http.StatusOK:
			return a, b, nil
		case interim == maxInterim:
			return a, nil, fail(ErrProtocol, nil, "the peer gives more than %d interim answers", maxInterim)
		}
		interim++
		read += n
		end = headEnd{}
	}
}

// readMore appends what one read gives.
func readMore(r io.Reader, b []byte) ([]byte, error) {
	if len(b) == cap(b) {
		b = append(make([]byte, 0, max(firstRead, 2*len(b))), b...)
	}
	n, err := r.Read(b[len(b):cap(b)])
	b = b[:len(b)+n]
	if n > 0 {
		return b, nil // an error comes again
	}
	if errors.Is(err, io.EOF) && len(b) > 0 {
		err = fail(ErrEnded, io.ErrUnexpectedEOF, "the peer ended the connection within its answer")
	}
	return b, err
}
