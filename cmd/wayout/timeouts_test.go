package main_test

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// Targets that no packet comes back from, and that a router says no to.
const (
	blackhole4   = "192.0.2.99"
	blackhole6   = "2001:db8:99::99"
	unreachable4 = "192.0.2.98"
	prohibited4  = "192.0.2.97"
)

// holes makes those targets: the providers' routers have routes for them that
// lead nowhere.
func (s *scene) holes(t *testing.T) {
	t.Helper()
	for _, isp := range []*lab.NS{s.ISP1, s.ISP2} {
		for target, kind := range map[string]int{
			blackhole4 + "/32": unix.RTN_BLACKHOLE, blackhole6 + "/128": unix.RTN_BLACKHOLE,
			unreachable4 + "/32": unix.RTN_UNREACHABLE, prohibited4 + "/32": unix.RTN_PROHIBIT,
		} {
			_, dst, err := net.ParseCIDR(target)
			if err != nil {
				t.Fatal(err)
			}
			if err := isp.Netlink().RouteAdd(&netlink.Route{Dst: dst, Type: kind}); err != nil {
				t.Fatalf("route to %s: %v", target, err)
			}
		}
	}
}

// limit is the small timeout under test; everything else in the file has the
// patience of a minute.
const limit = 300 * time.Millisecond

// tookLimit checks that something came to its end because of the limit and
// not at once.
func tookLimit(t *testing.T, what string, begun time.Time) {
	t.Helper()
	if took := time.Since(begun); took < limit-limit/10 {
		t.Errorf("%s after %v, the limit is %v", what, took, limit)
	}
}

// TestTimeouts has a server for each phase, whose limit is small.
func TestTimeouts(t *testing.T) {
	t.Parallel()
	var servers strings.Builder
	port := map[string]uint16{}
	for i, key := range []string{
		"req_header_recv_timeout", "pipeline_read_idle_timeout", "rsp_header_recv_timeout", "body_stall_timeout",
		"send_timeout", "tunnel_idle_timeout", "none",
	} {
		port[key] = 3128 + uint16(i)
		servers.WriteString("  - {name: " + key + ", type: http_proxy, listen: \"" + proxyAt(port[key]).String() + "\", open: true, escaper: out")
		if key != "none" {
			servers.WriteString(", " + key + ": 300ms")
		}
		servers.WriteString("}\n")
	}
	s := outScene(t, "  - {name: hasty, type: direct_fixed, bind_ip: [198.51.100.11], connect_timeout: 300ms}\nserver:\n"+servers.String()+
		"  - {name: hasty, type: http_proxy, listen: \"10.0.0.1:3200\", open: true, escaper: hasty}\n")
	s.holes(t)

	t.Run("head", func(t *testing.T) {
		t.Parallel()
		for _, text := range []string{"G", "GET http://" + target4 + "/ HTTP/1.1\r\nHost: x\r\nX-Slow: "} {
			w := s.dial(t, port["req_header_recv_timeout"])
			begun := time.Now()
			w.say(text)
			resp, body := w.answer("GET")
			refused(t, resp, body, http.StatusRequestTimeout, "http_request_error")
			tookLimit(t, "408", begun)
			w.ended()
		}
		// A byte now and then does not help.
		w := s.dial(t, port["req_header_recv_timeout"])
		w.say("GET ")
		drip := time.NewTicker(limit / 10)
		defer drip.Stop()
		over := make(chan struct{})
		go func() {
			for {
				select {
				case <-drip.C:
					if _, err := io.WriteString(w, "x"); err != nil {
						return
					}
				case <-over:
					return
				}
			}
		}()
		resp, body := w.answer("GET")
		close(over)
		refused(t, resp, body, http.StatusRequestTimeout, "http_request_error")
	})

	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		w := s.dial(t, port["pipeline_read_idle_timeout"])
		w.say(requestTo("GET", target4) + "\r\n")
		if resp, body := w.answer("GET"); resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		begun := time.Now()
		w.ended()
		tookLimit(t, "ended", begun)
	})

	t.Run("response", func(t *testing.T) {
		t.Parallel()
		for _, first := range []string{"", "HTTP/1.1 200 OK\r\nA: "} {
			at := s.serve(t, func(_ int, o *peer) {
				o.head()
				o.say(first)
				_, _ = io.Copy(io.Discard, o.r) // until the proxy has had enough
			})
			w := s.dial(t, port["rsp_header_recv_timeout"])
			for range 2 {
				begun := time.Now()
				w.say(requestTo("GET", at) + "\r\n")
				resp, body := w.answer("GET")
				refused(t, resp, body, http.StatusGatewayTimeout, "http_response_timeout")
				tookLimit(t, "504", begun)
			}
			goesOn(t, s, w)
		}
	})

	t.Run("connect", func(t *testing.T) {
		t.Parallel()
		w := s.dial(t, 3200)
		begun := time.Now()
		w.say(requestTo("GET", blackhole4) + "\r\n")
		resp, body := w.answer("GET")
		refused(t, resp, body, http.StatusGatewayTimeout, "connection_timeout")
		tookLimit(t, "504", begun)
		goesOn(t, s, w)
		w.say("CONNECT " + blackhole4 + ":443 HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, body = w.answer("CONNECT")
		refused(t, resp, body, http.StatusGatewayTimeout, "connection_timeout")
		w.ended()
		// What a router says no to takes no time.
		w = s.dial(t, 3200)
		for _, at := range []string{unreachable4, prohibited4} {
			w.say(requestTo("GET", at) + "\r\n")
			resp, body = w.answer("GET")
			refused(t, resp, body, http.StatusBadGateway, "destination_ip_unroutable")
		}
	})

	t.Run("body of the request", func(t *testing.T) {
		t.Parallel()
		at := s.serve(t, func(_ int, o *peer) {
			o.head()
			_, _ = io.Copy(io.Discard, o.r)
		})
		w := s.dial(t, port["body_stall_timeout"])
		begun := time.Now()
		w.say(requestTo("POST", at) + "Content-Length: 10\r\n\r\nhalf")
		resp, body := w.answer("POST")
		refused(t, resp, body, http.StatusRequestTimeout, "http_request_error")
		tookLimit(t, "408", begun)
		w.ended()
	})

	t.Run("body of the response", func(t *testing.T) {
		t.Parallel()
		at := s.serve(t, func(_ int, o *peer) {
			o.head()
			o.say("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
			_, _ = io.Copy(io.Discard, o.r)
		})
		w := s.dial(t, port["body_stall_timeout"])
		w.say(requestTo("GET", at) + "\r\n")
		begun := time.Now()
		resp, err := http.ReadResponse(w.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if all, err := io.ReadAll(resp.Body); err == nil || string(all) != "half" {
			t.Errorf("%q, %v", all, err)
		}
		tookLimit(t, "ended", begun)
	})

	t.Run("client that takes nothing", func(t *testing.T) {
		t.Parallel()
		over := make(chan error, 1)
		at := s.serve(t, func(_ int, o *peer) {
			o.head()
			o.say("HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
			_, err := io.Copy(o, endless{})
			over <- err
		})
		w := s.dial(t, port["send_timeout"])
		w.say(requestTo("GET", at) + "\r\n")
		if err := <-over; err == nil {
			t.Error("somebody took it all")
		}
	})

	t.Run("origin that takes nothing", func(t *testing.T) {
		t.Parallel()
		over := make(chan struct{})
		at := s.serve(t, func(int, *peer) { <-over })
		t.Cleanup(func() { close(over) })
		w := s.dial(t, port["send_timeout"])
		w.say(requestTo("POST", at) + "Content-Length: 1000000000000\r\n\r\n")
		go func() { _, _ = io.Copy(w, endless{}) }() // ended by the proxy
		resp, body := w.answer("POST")
		if resp.StatusCode != http.StatusGatewayTimeout || !strings.Contains(resp.Header.Get("Proxy-Status"), "error=connection_write_timeout") {
			t.Errorf("%s %q %q", resp.Status, resp.Header.Get("Proxy-Status"), body)
		}
	})

	t.Run("tunnel", func(t *testing.T) {
		t.Parallel()
		at := s.serve(t, func(_ int, o *peer) { _, _ = io.Copy(o, o.r) })
		w := s.dial(t, port["tunnel_idle_timeout"])
		w.say("CONNECT " + at + " HTTP/1.1\r\nHost: x\r\n\r\n")
		if resp, body := w.answer("CONNECT"); resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		// As long as something moves it lives.
		step := time.NewTicker(limit / 4)
		defer step.Stop()
		begun := time.Now()
		for time.Since(begun) < 2*limit {
			w.say("x")
			w.expect("x")
			<-step.C
		}
		begun = time.Now()
		w.ended()
		if took := time.Since(begun); took > 10*time.Second {
			t.Errorf("ended after %v", took)
		}
	})

	t.Run("patience", func(t *testing.T) {
		t.Parallel()
		// None of these limits is where it was not asked for.
		at := s.serve(t, func(_ int, o *peer) {
			o.head()
			time.Sleep(2 * limit) // what is shown is that this is borne
			o.say(okHi)
		})
		w := s.dial(t, port["none"])
		w.say("GET http://" + at)
		time.Sleep(2 * limit)
		w.say("/ HTTP/1.1\r\nHost: x\r\n\r\n")
		if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "hi" {
			t.Errorf("%s %s", resp.Status, body)
		}
		time.Sleep(2 * limit)
		goesOn(t, s, w)
	})
}

// TestFilledBacklog is the other way for a target not to answer: a listener
// that accepts nothing and whose queue is full.
func TestFilledBacklog(t *testing.T) {
	t.Parallel()
	s := outScene(t, `  - {name: hasty, type: direct_fixed, bind_ip: [198.51.100.11], connect_timeout: 300ms}
server:
  - {name: hasty, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: hasty}
`)
	at := netip.MustParseAddrPort(lab.OriginAddr4 + ":8081")
	err := s.Origin.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
			return err
		}
		return unix.Listen(fd, 0) // room for one
	})
	if err != nil {
		t.Fatal(err)
	}
	fill, err := s.Origin.Dial(at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fill.Close() })
	w := s.dial(t, 3128)
	w.say(requestTo("GET", at.String()) + "\r\n")
	resp, body := w.answer("GET")
	refused(t, resp, body, http.StatusGatewayTimeout, "connection_timeout")
	goesOn(t, s, w)
}
