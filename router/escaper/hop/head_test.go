package hop_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"regexp"
	"testing"

	"wayout/router/escaper/hop"
)

// lax finds what net/http reads and we do not.
var lax = []*regexp.Regexp{
	regexp.MustCompile(`(^|[^\r])\n`),                                                   // a bare LF
	regexp.MustCompile(`^HTTP/[^1]|^HTTP/1\.[^01]`),                                     // other versions
	regexp.MustCompile(`^HTTP/\d\.\d +( |\t)`),                                          // more than a space before the status
	regexp.MustCompile(`^HTTP/\d\.\d (\+|-|0|[6-9])`),                                   // a status out of range
	regexp.MustCompile(`^[^\r\n]*[\x00-\x08\x0b-\x1f\x7f][^\n]`),                        // controls in the status line, CR among them
	regexp.MustCompile(`\n[ \t]`),                                                       // folded lines, and such before the first field
	regexp.MustCompile(`\n[^\r\n]*[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]`),                    // controls in a field
	regexp.MustCompile(`\n[^\n]*\r[^\n]`),                                               // CR in a field
	regexp.MustCompile(`\n[^:\r\n]*[^!#$%&'*+.^_` + "`" + `|~0-9A-Za-z:\r\n-][^:\n]*:`), // a name that is no token
	regexp.MustCompile(`\n:`),                                                           // an empty name
}

func isLax(head []byte) bool {
	for _, l := range lax {
		if l.Match(head) {
			return true
		}
	}
	return interim.Match(head)
}

// interim finds answers that net/http does not read beyond.
var interim = regexp.MustCompile(`^HTTP/1\.[01] 1\d\d`)

// framing finds fields that net/http does not read an answer for, and that mean
// nothing in one to CONNECT.
var framing = regexp.MustCompile(`(?i)\n(Content-Length|Transfer-Encoding|Trailer):`)

// FuzzAnswer: what we take, net/http takes, and in the same way; what we refuse
// and it takes is in the list above.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		established,
		"HTTP/1.0 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 2\r\n\r\nno",
		"HTTP/1.1 502\r\nProxy-Status: a; error=dns_error, \"b\"; error=x\r\nVia: 1.1 a\r\n\r\nhello",
		"HTTP/1.1 100 Continue\r\n\r\n" + established + "early",
		"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
		"HTTP/1.1 200 OK\nA: b\n\n",
		"HTTP/1.1  200 OK\r\nA : b\r\n\r\n",
		"HTTP/1.1 200 OK\r\n\x80\xff: \x80\r\n\r\n",
		"HTTP/1.1 200 OK\r\nA: b\r\rc\r\n\r\n",
		"HTTP/1.1 999 \r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		status, problem, early, err := hop.ReadAnswer(b)
		if err != nil && !errors.Is(err, hop.ErrProtocol) && !errors.Is(err, hop.ErrEnded) && !errors.Is(err, io.EOF) {
			t.Fatalf("error %v", err)
		}
		if err == nil && !bytes.HasSuffix(b, early) {
			t.Fatalf("%q is not what follows", early)
		}
		r := bytes.NewReader(b)
		br := bufio.NewReader(r)
		res, oracle := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
		after := br.Buffered() + r.Len()
		switch {
		case err != nil && oracle == nil:
			if head := b[:len(b)-after]; !isLax(head) {
				t.Fatalf("we refuse what net/http takes: %v", err)
			}
			return
		case err != nil, interim.Match(b):
			return
		case oracle != nil:
			if !framing.Match(b) {
				t.Fatalf("we take what net/http refuses: %v", oracle)
			}
			return
		}
		if status != res.StatusCode {
			t.Fatalf("status %d, net/http has %d", status, res.StatusCode)
		}
		if problem != "" && res.Header.Get("Proxy-Status") == "" && len(res.Header.Values("Proxy-Status")) < 2 {
			t.Fatalf("problem %q, and net/http has no Proxy-Status", problem)
		}
		if after != len(early) {
			t.Fatalf("%d bytes follow, net/http has %d", len(early), after)
		}
	})
}
