package main_test

import (
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"wayout/scripts/lab"
)

// recorder is an origin by net/http, another reading of HTTP than the
// product's, that keeps what it took for requests.
type recorder struct {
	at string

	mu   sync.Mutex
	seen map[string]int // "METHOD PATH"
}

func (s *scene) record(t *testing.T) *recorder {
	t.Helper()
	rec := &recorder{at: lab.OriginAddr4 + ":8080", seen: map[string]int{}}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec.mu.Lock()
		rec.seen[r.Method+" "+r.URL.Path]++
		rec.mu.Unlock()
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return // half a body: the proxy found a fault in the rest
		}
		fmt.Fprint(w, "good")
	})}
	l := s.listen(rec.at)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ended by Close
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return rec
}

// only checks that the recorder has seen nothing but these, and forgets it.
func (rec *recorder) only(t *testing.T, requests ...string) {
	t.Helper()
	rec.mu.Lock()
	defer rec.mu.Unlock()
	for r, n := range rec.seen {
		if !slices.Contains(requests, r) {
			t.Errorf("the origin saw %d x %q", n, r)
		}
	}
	rec.seen = map[string]int{}
}

// malformed is a shape of request that is refused: %s stands for the origin.
type malformed struct {
	in     string
	status int    // 0: 400
	body   string // words in the answer's text
}

const (
	badLine  = "GET http://%s/bad HTTP/1.1\r\n"
	badHost  = "Host: %s\r\n"
	badGet   = badLine + badHost
	badPost  = "POST http://%s/bad HTTP/1.1\r\n" + badHost
	badChunk = badPost + "Transfer-Encoding: chunked\r\n\r\n"
)

func malformedRequests() map[string]malformed {
	fat := strings.Repeat("x", 9<<10)
	return map[string]malformed{
		// Framing that two readers see two ways.
		"length before coding":        {badPost + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, "both"},
		"coding before length":        {badPost + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 0, "both"},
		"lengths that differ":         {badPost + "Content-Length: 0\r\nContent-Length: 44\r\n\r\n", 0, "more than one Content-Length"},
		"equal lengths":               {badPost + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 0, "more than one Content-Length"},
		"equal lengths in one field":  {badPost + "Content-Length: 2, 2\r\n\r\nhi", 0, "Content-Length"},
		"signed length":               {badPost + "Content-Length: +2\r\n\r\nhi", 0, "Content-Length"},
		"negative length":             {badPost + "Content-Length: -2\r\n\r\n", 0, "Content-Length"},
		"hexadecimal length":          {badPost + "Content-Length: 0x2\r\n\r\nhi", 0, "Content-Length"},
		"length of nothing":           {badPost + "Content-Length: \r\n\r\n", 0, "Content-Length"},
		"length with a space":         {badPost + "Content-Length: 1 0\r\n\r\n", 0, "Content-Length"},
		"length over 64 bits":         {badPost + "Content-Length: 18446744073709551616\r\n\r\n", 0, "Content-Length"},
		"length over 63 bits":         {badPost + "Content-Length: 9223372036854775808\r\n\r\n", 0, "Content-Length"},
		"coding of two":               {badPost + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding after chunked":        {badPost + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding with another's name":  {badPost + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding in quotes":            {badPost + "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding twice":                {badPost + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, "Transfer-Encoding"},
		"coding in HTTP/1.0":          {"POST http://%s/bad HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, "HTTP/1.0"},
		"coding in a folded line":     {badPost + "Transfer-Encoding: chunked\r\n ,identity\r\n\r\n0\r\n\r\n", 0, "folded"},
		"Connection: Content-Length":  {badPost + "Content-Length: 2\r\nConnection: Content-Length\r\n\r\nhi", 0, "Connection"},
		"Connection: Host":            {badGet + "Connection: keep-alive, host\r\n\r\n", 0, "Connection"},
		"CONNECT with a body":         {"CONNECT %s HTTP/1.1\r\n" + badHost + "Content-Length: 2\r\n\r\nhi", 0, "CONNECT with a body"},
		"CONNECT with a chunked body": {"CONNECT %s HTTP/1.1\r\n" + badHost + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, "CONNECT with a body"},

		// Lines.
		"request line ends in LF":     {"GET http://%s/bad HTTP/1.1\n" + badHost + "\r\n", 0, "LF"},
		"field ends in LF":            {badGet + "A: b\n\r\n", 0, "LF"},
		"head ends in LF":             {badGet + "\n", 0, "LF"},
		"LF hides a field":            {badGet + "A: b\nTransfer-Encoding: chunked\r\n\r\n", 0, "LF"},
		"CR within a value":           {badGet + "A: b\rContent-Length: 3\r\n\r\n", 0, "control"},
		"CR before CRLF":              {badGet + "A: b\r\r\n\r\n", 0, "control"},
		"obs-fold by a space":         {badGet + "A: b\r\n c\r\n\r\n", 0, "folded"},
		"obs-fold by a tab":           {badGet + "A: b\r\n\tc\r\n\r\n", 0, "folded"},
		"fold before the first field": {badLine + " Host: %s\r\n\r\n", 0, "folded"},
		"space before the colon":      {badGet + "A : b\r\n\r\n", 0, "white space"},
		"tab before the colon":        {badGet + "A\t: b\r\n\r\n", 0, "white space"},
		"space in the length's name":  {badPost + "Content-Length : 2\r\n\r\nhi", 0, "white space"},
		"no colon":                    {badGet + "Nonsense\r\n\r\n", 0, "field"},
		"no name":                     {badGet + ": b\r\n\r\n", 0, "name"},
		"name that is no token":       {badGet + "A{}: b\r\n\r\n", 0, "name"},
		"name above ASCII":            {badGet + "\xc5\xbfa: b\r\n\r\n", 0, "name"},
		"NUL in a value":              {badGet + "A: b\x00\r\n\r\n", 0, "control"},
		"NUL in a name":               {badGet + "A\x00: b\r\n\r\n", 0, "control"},
		"DEL in a value":              {badGet + "A: b\x7f\r\n\r\n", 0, "control"},
		"escape in a value":           {badGet + "A: \x1b[2J\r\n\r\n", 0, "control"},
		"control in the target":       {"GET http://%s/bad\x01 HTTP/1.1\r\n" + badHost + "\r\n", 0, "control"},
		"control in the method":       {"GE\x01T http://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, ""},

		// The request line.
		"HTTP/0.9 without a version": {"GET http://%s/bad\r\n\r\n", 0, "request line"},
		"HTTP/0.9 by name":           {"GET http://%s/bad HTTP/0.9\r\n" + badHost + "\r\n", 505, "version"},
		"HTTP/1.2":                   {"GET http://%s/bad HTTP/1.2\r\n" + badHost + "\r\n", 505, "version"},
		"HTTP/2.0":                   {"GET http://%s/bad HTTP/2.0\r\n" + badHost + "\r\n", 505, "version"},
		"HTTP/2 preface":             {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version"},
		"version in small letters":   {"GET http://%s/bad http/1.1\r\n" + badHost + "\r\n", 0, "version"},
		"version of two digits":      {"GET http://%s/bad HTTP/1.10\r\n" + badHost + "\r\n", 0, "version"},
		"version with a word more":   {"GET http://%s/bad HTTP/1.1 x\r\n" + badHost + "\r\n", 0, ""},
		"two spaces":                 {"GET  http://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "request line"},
		"space in the target":        {"GET http://%s/b ad HTTP/1.1\r\n" + badHost + "\r\n", 0, "request line"},
		"space at the start":         {" GET http://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, ""},
		"method that is no token":    {"G(E)T http://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "method"},
		"TLS":                        {"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", 0, "TLS"},
		"SOCKS":                      {"\x05\x01\x00", 0, "not an HTTP request"},

		// The target.
		"origin-form":              {"GET /bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "this is a proxy"},
		"asterisk-form":            {"OPTIONS * HTTP/1.1\r\n" + badHost + "\r\n", 0, "this is a proxy"},
		"https://":                 {"GET https://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "CONNECT"},
		"ftp://":                   {"GET ftp://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "http://"},
		"authority-form":           {"GET %s HTTP/1.1\r\n" + badHost + "\r\n", 0, "http://"},
		"no authority":             {"GET http:///bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"user information":         {"GET http://me@%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "user information"},
		"fragment":                 {"GET http://%s/bad#x HTTP/1.1\r\n" + badHost + "\r\n", 0, "fragment"},
		"host above ASCII":         {"GET http://\xc3\xb6.test/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"host with an escape":      {"GET http://192%%2e0.2.80/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"IPv4 of two numbers":      {"GET http://127.1/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"IPv4 of one number":       {"GET http://3221226064/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"IPv4 with an octal":       {"GET http://0300.0.2.80/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"IPv6 with a zone":         {"GET http://[fe80::1%%25eth0]/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "zone"},
		"IPv6 without brackets":    {"GET http://2001:db8:80::80/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "host"},
		"port 0":                   {"GET http://192.0.2.80:0/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "port"},
		"port over 65535":          {"GET http://192.0.2.80:65536/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "port"},
		"no port after the colon":  {"GET http://192.0.2.80:/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, "port"},
		"CONNECT without a port":   {"CONNECT 192.0.2.80 HTTP/1.1\r\n" + badHost + "\r\n", 0, "host:port"},
		"CONNECT without a host":   {"CONNECT :8080 HTTP/1.1\r\n" + badHost + "\r\n", 0, ""},
		"CONNECT to port 0":        {"CONNECT 192.0.2.80:0 HTTP/1.1\r\n" + badHost + "\r\n", 0, "port"},
		"CONNECT to a name's port": {"CONNECT 192.0.2.80:http HTTP/1.1\r\n" + badHost + "\r\n", 0, "port"},
		"CONNECT to a URL":         {"CONNECT http://%s/bad HTTP/1.1\r\n" + badHost + "\r\n", 0, ""},
		"CONNECT to a path":        {"CONNECT /bad HTTP/1.1\r\n" + badHost + "\r\n", 0, ""},

		// Fields that the proxy itself has to do with.
		"no Host":                 {badLine + "\r\n", 0, "Host"},
		"two Hosts":               {badGet + "Host: other.test\r\n\r\n", 0, "Host"},
		"two equal Hosts":         {badGet + badHost + "\r\n", 0, "Host"},
		"empty Host":              {badLine + "Host:\r\n\r\n", 0, "Host"},
		"Host that is a list":     {badLine + "Host: %s, other.test\r\n\r\n", 0, "Host"},
		"Host with a path":        {badLine + "Host: %s/x\r\n\r\n", 0, "Host"},
		"another expectation":     {badPost + "Content-Length: 2\r\nExpect: a-miracle\r\n\r\nhi", 417, "expectation"},
		"credentials that differ": {badGet + basic("a", "b") + "\r\n" + basic("a", "c") + "\r\n\r\n", 0, "differ"},

		// Sizes.
		"head over the limit":         {badGet + "A: " + fat + "\r\n\r\n", 431, "head"},
		"head over it by many fields": {badGet + strings.Repeat("A: "+fat[:900]+"\r\n", 10) + "\r\n", 431, "head"},
		"head that never ends":        {badGet + "A: " + fat, 431, "head"},
		"too many fields":             {badGet + strings.Repeat("A: b\r\n", 40) + "\r\n", 431, "fields"},
		"long target":                 {"GET http://%s/" + fat[:3000] + " HTTP/1.1\r\n" + badHost + "\r\n", 431, "target"},

		// Chunks.
		"no chunk size":                  {badChunk + "\r\nhi\r\n0\r\n\r\n", 0, "chunk size"},
		"chunk size that is no number":   {badChunk + "g\r\nhi\r\n0\r\n\r\n", 0, "chunk size"},
		"negative chunk size":            {badChunk + "-2\r\nhi\r\n0\r\n\r\n", 0, "chunk size"},
		"chunk size with 0x":             {badChunk + "0x2\r\nhi\r\n0\r\n\r\n", 0, "chunk size"},
		"chunk size with a space":        {badChunk + "2 \r\nhi\r\n0\r\n\r\n", 0, "chunk size"},
		"chunk size over 64 bits":        {badChunk + "10000000000000002\r\nhi\r\n0\r\n\r\n", 0, "chunk size"},
		"chunk size ends in LF":          {badChunk + "2\nhi\r\n0\r\n\r\n", 0, "LF"},
		"chunk size ends in CR":          {badChunk + "2\rx\nhi\r\n0\r\n\r\n", 0, ""},
		"control in a chunk extension":   {badChunk + "2;a=\x00\r\nhi\r\n0\r\n\r\n", 0, "extension"},
		"chunk extension that goes on":   {badChunk + "2;" + fat[:2000] + "\r\nhi\r\n0\r\n\r\n", 0, "extension"},
		"chunk longer than its size":     {badChunk + "2\r\nhi!\r\n0\r\n\r\n", 0, "longer"},
		"chunk data ends in LF":          {badChunk + "2\r\nhi\n0\r\n\r\n", 0, ""},
		"second chunk without a size":    {badChunk + "2\r\nhi\r\n\r\n0\r\n\r\n", 0, "chunk size"},
		"trailer without a colon":        {badChunk + "2\r\nhi\r\n0\r\nNonsense\r\n\r\n", 0, "trailer"},
		"trailer that ends in LF":        {badChunk + "2\r\nhi\r\n0\r\nA: b\n\r\n", 0, "LF"},
		"trailer that is folded":         {badChunk + "2\r\nhi\r\n0\r\nA: b\r\n c\r\n\r\n", 0, "trailer"},
		"coding in a trailer":            {badChunk + "2\r\nhi\r\n0\r\nTransfer-Encoding: gzip\r\n\r\n", 0, "trailer"},
		"trailer section over its limit": {badChunk + "2\r\nhi\r\n0\r\nA: " + fat + "\r\n\r\n", 431, "trailer"},
	}
}

// TestMalformedRequests sends every shape that is refused, with a good request
// behind it in the same breath that must be taken for nothing, and then a good
// request on a connection of its own.
func TestMalformedRequests(t *testing.T) {
	t.Parallel()
	s := outScene(t, `server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: out, path_selection_header: X-Egress-Path,
     req_header_max_size: 8KiB, req_header_max_count: 32, req_target_max_size: 2KiB}
`)
	rec := s.record(t)
	behind := "GET http://" + rec.at + "/smuggled HTTP/1.1\r\nHost: " + rec.at + "\r\n\r\n"
	good := "GET http://" + rec.at + "/good HTTP/1.1\r\nHost: " + rec.at + "\r\nX-Egress-Path: p1\r\n\r\n"
	cases := malformedRequests()
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		c := cases[name]
		t.Run(name, func(t *testing.T) {
			text := strings.ReplaceAll(strings.ReplaceAll(c.in, "%s", rec.at), "%%", "%")
			w := s.dial(t, 3128)
			w.say(text + behind)
			resp, body := w.answer(http.MethodGet)
			status := c.status
			if status == 0 {
				status = http.StatusBadRequest
			}
			refused(t, resp, body, status, "http_request_error")
			if !strings.Contains(body, c.body) {
				t.Errorf("the text %q, want %q in it", body, c.body)
			}
			if !resp.Close {
				t.Error("the answer does not say that the connection ends")
			}
			w.ended()
			again := s.dial(t, 3128)
			again.say(good)
			if resp, body := again.answer(http.MethodGet); resp.StatusCode != http.StatusOK || body != "good" {
				t.Errorf("the next good request: %s %q", resp.Status, body)
			}
			// The head of a request whose body is bad may have gone on.
			if strings.HasPrefix(c.in, badChunk) {
				rec.only(t, "GET /good", "POST /bad")
			} else {
				rec.only(t, "GET /good")
			}
		})
	}
}

// TestPipelinedMalformed sends a good request, a bad one and a good one at
// once: the first is served, the second refused, the third never read.
func TestPipelinedMalformed(t *testing.T) {
	t.Parallel()
	s := outScene(t, "")
	rec := s.record(t)
	get := func(path, more string) string {
		return "GET http://" + rec.at + path + " HTTP/1.1\r\nHost: x.test\r\n" + more + "\r\n"
	}
	w := s.dial(t, 3128)
	w.say(get("/good", "") + "POST http://" + rec.at + "/good HTTP/1.1\r\nHost: x.test\r\nContent-Length: 5\r\n\r\nGET /" +
		get("/bad", "A : b\r\n") + get("/smuggled", ""))
	for range 2 {
		if resp, body := w.answer(http.MethodGet); resp.StatusCode != http.StatusOK || body != "good" {
			t.Fatalf("%s %q", resp.Status, body)
		}
	}
	resp, body := w.answer(http.MethodGet)
	refused(t, resp, body, http.StatusBadRequest, "http_request_error")
	w.ended()
	rec.only(t, "GET /good", "POST /good")
}

// TestBadHeaders sends requests that are well formed and not to be served: the
// connection goes on where it is certain where the next request begins, a body
// is never taken for a request, and the next good request is served.
func TestBadHeaders(t *testing.T) {
	t.Parallel()
	h := hashOf(t, "secret")
	s := outScene(t, fmt.Sprintf(`user_group:
  - {name: team, users: [{name: alice, password: %q, allow_path: ["out/p1", "out/p9"]}, {name: "a-b", password: %q}]}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", user_group: team, escaper: out, path_selection_header: X-Egress-Path}
`, h, h))
	rec := s.record(t)
	token := func(s string) string {
		return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(s))
	}
	alice := basic("alice", "secret")
	v6 := "[" + lab.OriginAddr6 + "]:80"
	for _, c := range []struct {
		name   string
		header []string
		target string
		status int
		kind   string
	}{
		{"no credentials", nil, "", 407, "http_request_denied"},
		{"no credentials, bad selection", egress("{"), "", 407, "http_request_denied"},
		{"wrong password", []string{basic("alice", "wrong")}, "", 407, "http_request_denied"},
		{"wrong password, bad selection", []string{basic("alice", "wrong"), "X-Egress-Path: {"}, "", 407, "http_request_denied"},
		{"unknown user", []string{basic("mallory", "secret")}, "", 407, "http_request_denied"},
		{"name in another case", []string{basic("Alice", "secret")}, "", 407, "http_request_denied"},
		{"no name", []string{basic("", "secret")}, "", 407, "http_request_denied"},
		{"no password", []string{basic("alice", "")}, "", 407, "http_request_denied"},
		{"no colon", []string{token("alice")}, "", 407, "http_request_denied"},
		{"password with NUL behind", []string{token("alice:secret\x00")}, "", 407, "http_request_denied"},
		{"password with a newline behind", []string{token("alice:secret\n")}, "", 407, "http_request_denied"},
		{"password of 3 KB", []string{basic("alice", strings.Repeat("secret", 500))}, "", 407, "http_request_denied"},
		{"name of 3 KB", []string{basic(strings.Repeat("alice", 600), "secret")}, "", 407, "http_request_denied"},
		{"not base64", []string{"Proxy-Authorization: Basic !!!"}, "", 407, "http_request_denied"},
		{"base64 with rubbish behind", []string{alice + "!"}, "", 407, "http_request_denied"},
		{"scheme alone", []string{"Proxy-Authorization: Basic"}, "", 407, "http_request_denied"},
		{"empty field", []string{"Proxy-Authorization:"}, "", 407, "http_request_denied"},
		{"another scheme", []string{"Proxy-Authorization: Bearer YWxpY2U6c2VjcmV0"}, "", 407, "http_request_denied"},
		{"credentials for the origin", []string{"Authorization" + strings.TrimPrefix(alice, "Proxy-Authorization")}, "", 407, "http_request_denied"},

		{"empty selection", []string{alice, "X-Egress-Path:"}, "", 400, "http_request_error"},
		{"selection of blanks", []string{alice, "X-Egress-Path:  \t "}, "", 400, "http_request_error"},
		{"selections that differ", []string{alice, "X-Egress-Path: p1", "X-Egress-Path: p2"}, "", 400, "http_request_error"},
		{"selections that differ in their names' case", []string{alice, "X-EGRESS-PATH: p1", "x-egress-path: p2"}, "", 400, "http_request_error"},
		{"selection over 64 bits", []string{alice, "X-Egress-Path: 18446744073709551616"}, "", 400, "http_request_error"},
		{"selection over 4 KiB", []string{alice, "X-Egress-Path: " + strings.Repeat("0", 4097)}, "", 400, "http_request_error"},
		{"selection above ASCII", []string{alice, "X-Egress-Path: p\xc2\xb9"}, "", 400, "http_request_error"},
		{"broken JSON", []string{alice, `X-Egress-Path: {"out":}`}, "", 400, "http_request_error"},
		{"JSON with more behind", []string{alice, `X-Egress-Path: {"out":"p1"}{}`}, "", 400, "http_request_error"},
		{"JSON with a double key by escape", []string{alice, `X-Egress-Path: {"out":"p1","\u006fut":"p1"}`}, "", 400, "http_request_error"},
		{"JSON with an empty ID", []string{alice, `X-Egress-Path: {"out":""}`}, "", 400, "http_request_error"},
		{"unknown ID", []string{alice, "X-Egress-Path: p10"}, "", 400, "http_request_error"},
		{"unknown escaper", []string{alice, `X-Egress-Path: {"in":1}`}, "", 400, "http_request_error"},
		{"path that is not allowed", []string{alice, "X-Egress-Path: p2"}, "", 403, "http_request_denied"},
		{"path without the family", []string{alice, "X-Egress-Path: p9"}, v6, 502, "destination_ip_unroutable"},
		{"the host itself", []string{alice, "X-Egress-Path: p1"}, lab.Primary1Of4 + ":80", 403, "destination_ip_prohibited"},
		{"the proxy itself", []string{alice, "X-Egress-Path: p1"}, "10.0.0.1:3128", 403, "destination_ip_prohibited"},
		{"nobody listens", []string{alice, "X-Egress-Path: p1"}, lab.OriginAddr4 + ":9", 502, "connection_refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			target := c.target
			if target == "" {
				target = rec.at
			}
			fields := "Host: " + target + "\r\n" + strings.Join(append(c.header, ""), "\r\n")
			good := "GET http://" + rec.at + "/good HTTP/1.1\r\nHost: " + rec.at + "\r\n" + alice + "\r\nX-Egress-Path: p1\r\n\r\n"
			smuggled := "GET http://" + rec.at + "/smuggled HTTP/1.1\r\nHost: " + rec.at + "\r\n" + alice + "\r\n\r\n"
			next := func(w *peer) {
				t.Helper()
				w.say(good)
				if resp, body := w.answer(http.MethodGet); resp.StatusCode != http.StatusOK || body != "good" {
					t.Errorf("the next good request: %s %q", resp.Status, body)
				}
			}
			w := s.dial(t, 3128)
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				w.say(method + " http://" + target + "/bad HTTP/1.1\r\n" + fields + "\r\n")
				resp, body := w.answer(method)
				refused(t, resp, body, c.status, c.kind)
				if resp.Close {
					t.Fatalf("the connection ends after %s", method)
				}
				next(w)
			}
			// A body that looks like a request is part of the refused one,
			// whether it comes at once or not.
			for _, late := range []bool{false, true} {
				w := s.dial(t, 3128)
				w.say(fmt.Sprintf("POST http://%s/bad HTTP/1.1\r\nContent-Length: %d\r\n%s\r\n", target, len(smuggled), fields))
				if !late {
					w.say(smuggled)
				}
				resp, body := w.answer(http.MethodPost)
				refused(t, resp, body, c.status, c.kind)
				if late {
					// It may have been closed already.
					_, _ = io.WriteString(w, smuggled)
				}
				if resp.Close {
					w.ended()
				} else {
					next(w)
				}
			}
			// What follows a refused CONNECT may be meant for the tunnel.
			w = s.dial(t, 3128)
			w.say("CONNECT " + target + " HTTP/1.1\r\n" + fields + "\r\n" + smuggled)
			resp, body := w.answer(http.MethodConnect)
			refused(t, resp, body, c.status, c.kind)
			if !resp.Close {
				t.Error("the connection goes on after a refused CONNECT")
			}
			w.ended()
			next(s.dial(t, 3128))
			rec.only(t, "GET /good")
		})
	}
	// Spellings of good credentials.
	for _, header := range []string{
		alice, "proxy-authorization: basic " + strings.TrimPrefix(alice, "Proxy-Authorization: Basic "),
		"Proxy-Authorization:   Basic   " + strings.TrimPrefix(alice, "Proxy-Authorization: Basic "), basic("a-b", "secret"),
		alice + "\r\n" + alice,
	} {
		if told := s.ask(lab.Ask{Header: []string{header}}); told.Status != http.StatusOK {
			t.Errorf("%q: %d %s", header, told.Status, told.Body)
		}
	}
}
