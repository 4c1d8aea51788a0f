package main_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"

	"wayout/scripts/lab"
)

const upgradeFields = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"

// A WebSocket through forward: an echo, with frames right behind both heads.
func upgrade(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		h := o.head()
		for _, line := range []string{"\r\nConnection: Upgrade\r\n", "\r\nUpgrade: websocket\r\n", "\r\nSec-WebSocket-Key: "} {
			if !strings.Contains(h, line) {
				o.fail("no %q in %q", line, h)
			}
		}
		if strings.Contains(h, "X-Egress-Path") {
			o.fail("%q", h)
		}
		o.say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nfirst")
		if _, err := io.Copy(o, o.r); err != nil {
			o.fail("echo: %v", err)
		}
	})
	w := s.dial(t, 3128)
	w.say(requestTo("GET", at) + upgradeFields + "X-Egress-Path: p4\r\n\r\nsecond")
	resp, _ := w.answer("GET")
	if resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "websocket" || resp.Header.Get("Connection") != "Upgrade" ||
		resp.Header.Get("Sec-WebSocket-Accept") == "" || resp.Header.Get("X-Egress-IP") != lab.Egress4()[3].String() {
		t.Fatalf("%s %v", resp.Status, resp.Header)
	}
	w.expect("firstsecond")
	for i := range 50 {
		frame := "\x81\x85" + strings.Repeat(string(rune('a'+i%26)), 1+i*100)
		w.say(frame)
		w.expect(frame)
	}
	if err := w.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	w.ended()
}

// An origin that does not upgrade answers as ever.
func upgradeRefused(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		o.head()
		o.say("HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno")
	})
	w := s.dial(t, 3128)
	w.say(requestTo("GET", at) + upgradeFields + "\r\n")
	if resp, body := w.answer("GET"); resp.StatusCode != 426 || body != "no" {
		t.Errorf("%s %q", resp.Status, body)
	}
	goesOn(t, s, w)
}

// connect opens a tunnel.
func (s *scene) connect(t *testing.T, at string) *peer {
	t.Helper()
	w := s.dial(t, 3128)
	w.say("CONNECT " + at + " HTTP/1.1\r\nHost: " + at + "\r\n\r\n")
	if resp, body := w.answer("CONNECT"); resp.StatusCode != 200 {
		t.Fatalf("%s %q", resp.Status, body)
	}
	return w
}

func halfCloseClient(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		all, err := io.ReadAll(o.r) // to the client's half-close
		if err != nil {
			o.fail("read: %v", err)
		}
		o.say(string(bytes.ToUpper(all)) + strings.Repeat("y", 200_000))
	})
	w := s.connect(t, at)
	w.say("question")
	if err := w.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(w.r)
	if err != nil || !strings.HasPrefix(string(all), "QUESTION") || len(all) != 200_008 {
		t.Errorf("%d bytes, %v", len(all), err)
	}
}

func halfCloseOrigin(t *testing.T, s *scene) {
	heard := make(chan int, 1)
	at := s.serve(t, func(_ int, o *peer) {
		o.say("banner")
		if err := o.CloseWrite(); err != nil {
			o.fail("half-close: %v", err)
		}
		all, err := io.ReadAll(o.r)
		if err != nil {
			o.fail("read: %v", err)
		}
		heard <- len(all)
	})
	w := s.connect(t, at)
	all, err := io.ReadAll(w.r)
	if err != nil || string(all) != "banner" {
		t.Fatalf("%q, %v", all, err)
	}
	// The other direction lives.
	w.say(strings.Repeat("z", 300_000))
	if err := w.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n := <-heard; n != 300_000 {
		t.Errorf("the origin heard %d bytes", n)
	}
}

func resetInTunnel(t *testing.T, s *scene) {
	at := s.serve(t, func(_ int, o *peer) {
		o.expect("x")
		if err := o.SetLinger(0); err != nil {
			o.fail("linger: %v", err)
		}
	})
	w := s.connect(t, at)
	w.say("x")
	w.ended()
}

// A client that goes away in the middle takes its upstream connection along.
func clientGone(t *testing.T, s *scene) {
	gone := make(chan error, 1)
	said := make(chan struct{})
	at := s.serve(t, func(_ int, o *peer) {
		o.head()
		o.say("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
		close(said)
		_, err := io.Copy(o, endless{})
		gone <- err
	})
	w := s.dial(t, 3128)
	w.say(requestTo("GET", at) + "\r\n")
	<-said
	w.head()
	if err := w.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := <-gone; err == nil {
		t.Error("the origin could say all of it")
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestLargeBodies sends 20 MB each way by each means, and compares hashes.
func TestLargeBodies(t *testing.T) {
	t.Parallel()
	const size = 20_000_000
	s := outScene(t, "")
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data) // never fails
	want := sha256.Sum256(data)

	// An origin that gives back what it gets.
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength >= 0 {
			w.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
		}
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		if _, err := io.Copy(w, r.Body); err != nil {
			t.Error(err)
		}
	})
	srv := &http.Server{Handler: mux}
	l := s.listen(lab.OriginAddr4 + ":8080")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ended by Close
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	client := s.httpClient("http://" + proxyAt(3128).String())
	for _, c := range []struct {
		name string
		body io.Reader
	}{
		{"sized", bytes.NewReader(data)},
		{"chunked", io.MultiReader(bytes.NewReader(data))},
	} {
		resp, err := client.Post("http://"+lab.OriginAddr4+":8080/echo", "application/octet-stream", c.body)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		h := sha256.New()
		n, err := io.Copy(h, resp.Body)
		resp.Body.Close()
		if err != nil || n != size || !bytes.Equal(h.Sum(nil), want[:]) {
			t.Errorf("%s: %d bytes came back, %v", c.name, n, err)
		}
		if sized := resp.ContentLength == size; sized != (c.name == "sized") {
			t.Errorf("%s: the answer's length is %d", c.name, resp.ContentLength)
		}
	}

	at := s.serve(t, func(_ int, o *peer) {
		if _, err := io.Copy(o, o.r); err != nil {
			o.fail("echo: %v", err)
		}
		if err := o.CloseWrite(); err != nil {
			o.fail("half-close: %v", err)
		}
	})
	w := s.connect(t, at)
	go func() {
		// What cannot be said is missed below.
		_, _ = w.Write(data)
		_ = w.CloseWrite()
	}()
	h := sha256.New()
	n, err := io.Copy(h, w.r)
	if err != nil || n != size || !bytes.Equal(h.Sum(nil), want[:]) {
		t.Errorf("tunnel: %d bytes came back, %v", n, err)
	}
}
