package main_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"wayout/scripts/lab"
)

// peer is one end of a connection on which the test says every byte itself: a
// client's to the proxy, or an origin's from it.
type peer struct {
	*net.TCPConn
	t      *testing.T
	r      *bufio.Reader
	origin *origin // nil: a client's end
}

// origin is who accepts connections for a test.
type origin struct{ over atomic.Bool }

// peerTime bounds what is waited for by a peer.
const peerTime = 20 * time.Second

func newPeer(t *testing.T, c *net.TCPConn, o *origin) *peer {
	w := &peer{TCPConn: c, t: t, r: bufio.NewReader(c), origin: o}
	if err := c.SetDeadline(time.Now().Add(peerTime)); err != nil {
		w.fail("deadline: %v", err)
	}
	return w
}

// dial connects a client to the proxy on a port.
func (s *scene) dial(t *testing.T, port uint16) *peer {
	t.Helper()
	c, err := s.Client.Dial(proxyAt(port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return newPeer(t, c, nil)
}

// fail ends the test, or the origin's part in it.
func (w *peer) fail(format string, args ...any) {
	w.t.Helper()
	if w.origin == nil {
		w.t.Fatalf(format, args...)
	}
	if !w.origin.over.Load() {
		w.t.Errorf("origin: "+format, args...)
	}
	runtime.Goexit()
}

func (w *peer) say(text string) {
	w.t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		w.fail("say: %v", err)
	}
}

// head reads a message's head, with its empty line.
func (w *peer) head() string {
	w.t.Helper()
	var b strings.Builder
	for !strings.HasSuffix(b.String(), "\r\n\r\n") {
		line, err := w.r.ReadString('\n')
		b.WriteString(line)
		if err != nil {
			w.fail("head: %v after %q", err, b.String())
		}
	}
	return b.String()
}

// next reads the head of the next message, if there is one.
func (w *peer) next() (head string, more bool) {
	w.t.Helper()
	if _, err := w.r.Peek(1); errors.Is(err, io.EOF) {
		return "", false
	}
	return w.head(), true
}

// expect reads exactly this text.
func (w *peer) expect(text string) {
	w.t.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(w.r, got); err != nil || string(got) != text {
		w.fail("got %q (%v), want %q", got[:n], err, text)
	}
}

// answer reads a response to a request with this method, and its body.
func (w *peer) answer(method string) (*http.Response, string) {
	w.t.Helper()
	resp, err := http.ReadResponse(w.r, &http.Request{Method: method})
	if err != nil {
		w.fail("answer to %s: %v", method, err)
	}
	if method == http.MethodConnect && resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, "" // the tunnel follows
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.fail("body of the %d to %s: %v", resp.StatusCode, method, err)
	}
	return resp, string(body)
}

// ended waits for the other side to end the connection, and minds anything
// that it still says.
func (w *peer) ended() {
	w.t.Helper()
	rest, err := io.ReadAll(w.r)
	if len(rest) > 0 {
		w.fail("the other side went on: %q", rest)
	}
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		w.fail("the connection does not end: %v", err)
	}
}

// serve runs an origin: f is called in a goroutine for each connection, with
// its number from 0. It gives the origin's address. At the end of the test the
// connections are closed, and what f makes of that is no fault.
func (s *scene) serve(t *testing.T, f func(n int, w *peer)) string {
	t.Helper()
	l, err := s.Origin.Listen(netip.AddrPortFrom(netip.MustParseAddr(lab.OriginAddr4), 0))
	if err != nil {
		t.Fatal(err)
	}
	o := &origin{}
	var accepting, serving sync.WaitGroup
	var open []net.Conn
	accepting.Go(func() {
		for n := 0; ; n++ {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			open = append(open, c)
			serving.Go(func() {
				defer c.Close()
				f(n, newPeer(t, c, o))
			})
		}
	})
	t.Cleanup(func() {
		o.over.Store(true)
		l.Close()
		accepting.Wait()
		for _, c := range open {
			c.Close()
		}
		serving.Wait()
	})
	return l.Addr().String()
}

// proxyStatus is the form of the Proxy-Status of a refusal (RFC 9209 and RFC
// 8941: a token, a parameter that is a token, one that is a string).
var proxyStatus = regexp.MustCompile(`^wayout; error=([a-z_]+); details="((?:[ !#-\[\]-~]|\\["\\])*)"$`)

// refused checks everything about a refusal but what becomes of the
// connection.
func refused(t *testing.T, resp *http.Response, body string, status int, kind string) {
	t.Helper()
	if resp.StatusCode != status {
		t.Errorf("status %s %q, want %d", resp.Status, body, status)
	}
	all := resp.Header.Values("Proxy-Status")
	m := proxyStatus.FindStringSubmatch(strings.Join(all, ", "))
	switch {
	case m == nil:
		t.Errorf("Proxy-Status %q", all)
	case m[1] != kind:
		t.Errorf("Proxy-Status %q, want error=%s", all, kind)
	case m[2] == "":
		t.Errorf("Proxy-Status %q gives no details", all)
	}
	if resp.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("Content-Type %q", resp.Header.Get("Content-Type"))
	}
	if resp.Request.Method != http.MethodHead && (len(body) < 10 || len(body) > 600 || strings.Count(body, "\n") != 1 || !strings.HasSuffix(body, "\n")) {
		t.Errorf("the text %q is not one short line", body)
	}
	if resp.ContentLength < 0 {
		t.Errorf("no Content-Length")
	}
	if got := resp.Header.Get("Retry-After"); (got == "1") != (status == http.StatusServiceUnavailable) {
		t.Errorf("Retry-After %q with %d", got, status)
	}
	if got := resp.Header.Get("Proxy-Authenticate"); strings.HasPrefix(got, "Basic ") != (status == http.StatusProxyAuthRequired) {
		t.Errorf("Proxy-Authenticate %q with %d", got, status)
	}
}
