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
	"wayout/scripts/lab/rig"
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
	cases := rig.MalformedRequests()
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		c := cases[name]
		t.Run(name, func(t *testing.T) {
			text := strings.ReplaceAll(c.In, "ORIGIN", rec.at)
			w := s.dial(t, 3128)
			w.say(text + behind)
			resp, body := w.answer(http.MethodGet)
			refused(t, resp, body, c.Status, "http_request_error")
			if !strings.Contains(body, c.Words) {
				t.Errorf("the text %q, want %q in it", body, c.Words)
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
			if c.IsBody() {
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
