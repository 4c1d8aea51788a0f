package httpproxy_test

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/httpproxy"
	"wayout/selection"
)

// echo is an origin that sends back what it gets.
func echo(tb testing.TB) string {
	return script(tb, func(_ int, w *wire) {
		_, _ = io.Copy(w.TCPConn, w.br)
		_ = w.CloseWrite()
	})
}

func TestConnect(t *testing.T) {
	t.Parallel()
	at := echo(t)
	_, port, _ := net.SplitHostPort(at)
	for _, tt := range []struct {
		name, req string
		report    bool
		want      string
	}{
		{"plain", "CONNECT " + at + " HTTP/1.1\r\nHost: " + at + "\r\n\r\n", false, "HTTP/1.1 200 Connection established\r\n\r\n"},
		{"by name", "CONNECT origin.test:" + port + " HTTP/1.1\r\nHost: x\r\n\r\n", false, "HTTP/1.1 200 Connection established\r\n\r\n"},
		{"without Host", "CONNECT " + at + " HTTP/1.1\r\n\r\n", false, "HTTP/1.1 200 Connection established\r\n\r\n"},
		{"HTTP/1.0", "CONNECT " + at + " HTTP/1.0\r\nContent-Length: 0\r\n\r\n", false, "HTTP/1.1 200 Connection established\r\n\r\n"},
		{"report", "CONNECT " + at + " HTTP/1.1\r\nX-Egress-Path: 2\r\n\r\n", true, "HTTP/1.1 200 Connection established\r\n" +
			"Proxy-Status: wayout; egress-path=\"out/b\"; egress-ip=\"127.0.0.2\"\r\nX-Egress-IP: 127.0.0.2\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newProxy(t, func(o *httpproxy.Options) { o.ReportEgress = tt.report })
			w := r.dial()
			w.send(tt.req + "early ")
			w.expect(tt.want + "early ")
			data := make([]byte, 3<<20)
			_, _ = rand.Read(data)
			go func() {
				_, _ = w.Write(data)
				_ = w.CloseWrite()
			}()
			got, err := io.ReadAll(w.br)
			if err != nil || string(got) != string(data) {
				t.Fatalf("%d bytes came back, %v", len(got), err)
			}
			n := int64(len(data) + len("early "))
			if rec := r.Record(0); rec.Status != 200 || rec.BytesIn != n || rec.BytesOut != n || rec.Err != nil || rec.Method != "CONNECT" {
				t.Errorf("record %+v", rec)
			}
			// A tunnel is off the books when it is over.
			path := r.Table.Path(r.Record(0).Choice.Path)
			if c := path.Counters(); c.Open != 0 {
				t.Errorf("%s has %d open connections", path.Name, c.Open)
			}
		})
	}
}

// When the path's address goes, its tunnels end.
func TestKilledTunnel(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	w := r.dial()
	w.send("CONNECT " + echo(t) + " HTTP/1.1\r\nX-Egress-Path: b\r\n\r\nx")
	w.expect("HTTP/1.1 200 Connection established\r\n\r\nx")
	gone := errors.New("address gone")
	if n := r.Table.Path("out/b").Kill(netip.MustParsePrefix("127.0.0.2/32"), gone); n != 1 {
		t.Fatalf("%d connections ended", n)
	}
	if _, err := w.br.ReadByte(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the client reads %v, want a reset", err)
	}
	if rec := r.Record(0); !errors.Is(rec.Err, gone) {
		t.Errorf("record %+v", rec)
	}
}

// When it goes before the response, the client is told.
func TestKilledForward(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	got := make(chan struct{})
	at := script(t, func(_ int, w *wire) {
		w.head()
		close(got)
		w.head()
	})
	w := r.dial()
	w.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\nX-Egress-Path: b\r\n\r\n")
	<-got
	r.Table.Path("out/b").SetFamilyState(selection.V4, escaper.Down, "address gone")
	r.Table.Path("out/b").Kill(netip.MustParsePrefix("127.0.0.2/32"), selection.Refuse(selection.ErrDown, "path out/b is down: address gone"))
	if res, body := w.response("GET"); res.StatusCode != 503 || !strings.Contains(body, "address gone") {
		t.Errorf("%s %q", res.Status, body)
	}
}

func TestTimeouts(t *testing.T) {
	t.Parallel()
	const short = 60 * time.Millisecond
	silent := script(t, func(_ int, w *wire) {
		w.head()
		_, _ = io.Copy(io.Discard, w.br)
	})
	half := script(t, func(_ int, w *wire) {
		w.head()
		w.say("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi")
		_, _ = io.Copy(io.Discard, w.br)
	})
	for _, tt := range []struct {
		name, in string
		set      func(*httpproxy.Timeouts)
		status   int
		kind     string
	}{
		{"head", "GET http://" + silent + "/ HT", func(t *httpproxy.Timeouts) { t.Head = short }, 408, "http_request_error"},
		{"idle", "", func(t *httpproxy.Timeouts) { t.Idle = short }, 0, ""},
		{"response", "GET http://" + silent + "/ HTTP/1.1\r\nHost: x\r\n\r\n", func(t *httpproxy.Timeouts) { t.Response = short }, 504, "http_response_timeout"},
		{
			"request body", "POST http://" + silent + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhi",
			func(t *httpproxy.Timeouts) { t.Stall = short }, 408, "http_request_error",
		},
		{"response body", "GET http://" + half + "/ HTTP/1.1\r\nHost: x\r\n\r\n", func(t *httpproxy.Timeouts) { t.Stall = short }, 200, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newProxy(t, func(o *httpproxy.Options) { tt.set(&o.Timeouts) })
			start := time.Now()
			w := r.dial()
			w.send(tt.in)
			switch tt.status {
			case 0:
				w.ended()
			case 200:
				res, err := http.ReadResponse(w.br, nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadAll(res.Body); err == nil {
					t.Error("a stalled body looks whole")
				}
			default:
				res, _ := w.response("GET")
				if res.StatusCode != tt.status || !strings.Contains(res.Header.Get("Proxy-Status"), tt.kind) {
					t.Errorf("%s %s", res.Status, res.Header.Get("Proxy-Status"))
				}
			}
			if d := time.Since(start); d < short*7/8 || d > patience/2 {
				t.Errorf("after %v", d)
			}
		})
	}
}

// An origin that answers only when the upload is over, and slowly comes to
// that, is not one that does not answer.
func TestResponseTimeCountsFromTheUpload(t *testing.T) {
	t.Parallel()
	r := newProxy(t, func(o *httpproxy.Options) { o.Timeouts.Response = 80 * time.Millisecond })
	at := origin(t, whoami)
	w := r.dial()
	w.send("PUT http://" + at + "/x HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n")
	for range 8 {
		time.Sleep(30 * time.Millisecond) // the pace of the client is what is tested
		w.send("x")
	}
	if res, body := w.response("PUT"); body != "127.0.0.1 /x" {
		t.Errorf("%s %q", res.Status, body)
	}
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	arrived, release := make(chan struct{}), make(chan struct{})
	at := origin(t, func(w http.ResponseWriter, _ *http.Request) {
		close(arrived)
		<-release
		_, _ = io.WriteString(w, "late")
	})
	idle, busy, tunnel := r.dial(), r.dial(), r.dial()
	idle.send("OPTIONS http://x/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\n\r\n")
	idle.response("OPTIONS")
	tunnel.send("CONNECT " + echo(t) + " HTTP/1.1\r\n\r\nx")
	tunnel.expect("HTTP/1.1 200 Connection established\r\n\r\nx")
	busy.send("GET http://" + at + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
	<-arrived

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	down := make(chan error, 1)
	go func() { down <- r.server.Shutdown(ctx) }()
	idle.ended()
	if c, err := net.Dial("tcp", r.Addr); err == nil {
		// The kernel may have queued it before the listener was closed.
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a client is served after Shutdown")
		}
		_ = c.Close()
	}
	close(release)
	if res, body := busy.response("GET"); body != "late" || !res.Close {
		t.Errorf("the request under way got %s %q, close %v", res.Status, body, res.Close)
	}
	busy.ended()
	tunnel.send("still")
	tunnel.expect("still")
	select {
	case err := <-down:
		t.Fatalf("Shutdown does not wait for the tunnel: %v", err)
	default:
	}
	cancel()
	if err := <-down; !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := tunnel.br.ReadByte(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the tunnel's client reads %v, want a reset", err)
	}
	if n := r.server.Open(); n != 0 {
		t.Errorf("%d open", n)
	}
}

// Cut in every phase of a request.
func TestShutdownCuts(t *testing.T) {
	t.Parallel()
	silent := script(t, func(_ int, w *wire) { _, _ = io.Copy(io.Discard, w.br) })
	half := script(t, func(_ int, w *wire) {
		w.head()
		w.say("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi")
		_, _ = io.Copy(io.Discard, w.br)
	})
	for name, in := range map[string]string{
		"head":          "GET http://",
		"response":      "GET http://" + silent + "/ HTTP/1.1\r\nHost: x\r\n\r\n",
		"request body":  "POST http://" + silent + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
		"response body": "GET http://" + half + "/ HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newProxy(t, nil)
			w := r.dial()
			w.send(in)
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			start := time.Now()
			err := r.server.Shutdown(ctx)
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
			if d := time.Since(start); d > 3*time.Second || r.server.Open() != 0 {
				t.Errorf("took %v, %d open", d, r.server.Open())
			}
		})
	}
}

// What a sniffer has read comes first.
func TestServeConn(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	at := origin(t, whoami)
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	w := dial(t, l.Addr().String())
	c, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	go r.server.ServeConn(c, []byte("GET http://"+at+"/1 HTTP/1.1\r\nHo"))
	w.send("st: x\r\n\r\nGET http://" + at + "/2 HTTP/1.1\r\nHost: x\r\n\r\n")
	for _, want := range []string{"127.0.0.1 /1", "127.0.0.1 /2"} {
		if _, body := w.response("GET"); body != want {
			t.Errorf("%q, want %q", body, want)
		}
	}
}

// A request that comes byte by byte.
func TestByteByByte(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	at := origin(t, whoami)
	w := r.dial()
	for range 2 {
		for _, b := range []byte("PUT http://" + at + "/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;e\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: x\r\n\r\n") {
			w.send(string(b))
		}
		if _, body := w.response("PUT"); body != "127.0.0.1 /x" {
			t.Error(body)
		}
	}
}

// Many clients at once, all kinds of requests, every answer right.
func TestManyClients(t *testing.T) {
	t.Parallel()
	r := newProxy(t, nil)
	at := origin(t, whoami)
	tunnels := echo(t)
	const clients, requests = 32, 60
	var wg sync.WaitGroup
	for n := range clients {
		wg.Go(func() {
			w := dial(t, r.Addr)
			for i := range requests {
				k := (n + i) % 3
				path := string("abc"[k])
				want := "127.0.0." + string("123"[k]) + " /" + path
				switch i % 3 {
				case 0:
					w.say("GET http://" + at + "/" + path + " HTTP/1.1\r\nHost: x\r\nX-Egress-Path: " + path + "\r\n\r\n")
				case 1:
					w.say("POST http://" + at + "/" + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nX-Egress-Path: " + path + "\r\n\r\nabc")
				case 2:
					w.say("CONNECT " + tunnels + " HTTP/1.1\r\nX-Egress-Path: " + path + "\r\n\r\nping")
					b := make([]byte, len("HTTP/1.1 200 Connection established\r\n\r\nping"))
					if _, err := io.ReadFull(w.br, b); err != nil || !strings.HasSuffix(string(b), "ping") {
						t.Errorf("tunnel: %q %v", b, err)
						return
					}
					_ = w.Close()
					w = dial(t, r.Addr)
					continue
				}
				res, err := http.ReadResponse(w.br, nil)
				if err != nil {
					t.Error(err)
					return
				}
				body, err := io.ReadAll(res.Body)
				if err != nil || string(body) != want {
					t.Errorf("%q %v, want %q", body, err, want)
					return
				}
			}
		})
	}
	wg.Wait()
}
