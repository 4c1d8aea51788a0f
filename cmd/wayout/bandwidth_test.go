package main_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"wayout/scripts/lab"
)

// slowRate is 8Mbit/s in bytes, and slowBurst more than what passes at once.
const (
	slowRate  = 1_000_000
	slowBurst = slowRate/10 + 64<<10
)

// zeros never end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// serveBulk runs an origin on port 81 that answers GET with a body that is too
// large to end, and takes any body; taken counts the bytes of those.
func (s *scene) serveBulk(t *testing.T) (taken *atomic.Int64) {
	t.Helper()
	taken = new(atomic.Int64)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			_, _ = io.Copy(&countingWriter{taken}, r.Body)
			return
		}
		w.Header().Set("Content-Length", "100000000000")
		_, _ = io.Copy(w, zeros{})
	})}
	l := s.listen(lab.OriginAddr4 + ":81")
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	return taken
}

type countingWriter struct{ n *atomic.Int64 }

func (w *countingWriter) Write(b []byte) (int, error) {
	w.n.Add(int64(len(b)))
	return len(b), nil
}

// TestBandwidthOfAll has the connections of one user, by different protocols and
// servers, use his bandwidth together: what they get is his in sum, and each gets
// a part.
func TestBandwidthOfAll(t *testing.T) {
	t.Parallel()
	user := said{user: "slow", password: "secret"}
	// Each is started by a scene, and counts what it gets.
	echo := func(p protocol) func(*scene, *testing.T) io.Reader {
		return func(s *scene, t *testing.T) io.Reader {
			w := s.hold(t, p, user)
			go func() { _, _ = io.Copy(w, zeros{}) }()
			return w
		}
	}
	get := func(s *scene, t *testing.T) io.Reader {
		w := s.dial(t, 3100)
		w.say("GET http://" + lab.OriginAddr4 + ":81/ HTTP/1.1\r\nHost: x\r\n" + basic(user.user, user.password) + "\r\n\r\n")
		return w
	}
	for name, all := range map[string][]func(*scene, *testing.T) io.Reader{
		"SOCKS":           {echo(connect), echo(connect), echo(connect)},
		"CONNECT and GET": {echo(tunnel), get, get},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := limitScene(t)
			s.serveBulk(t)
			got := make([]atomic.Int64, len(all))
			sum := func() (n int64) {
				for i := range got {
					n += got[i].Load()
				}
				return n
			}
			for i, open := range all {
				r := open(s, t)
				go func() { _, _ = io.Copy(&countingWriter{&got[i]}, r) }()
			}
			bounded(t, "all of them", sum)
			for i := range got {
				if one, part := got[i].Load(), sum()/int64(len(got)); one < part/4 {
					t.Errorf("connection %d got %d bytes, an equal part is %d", i, one, part)
				}
			}
		})
	}
	t.Run("POST", func(t *testing.T) {
		t.Parallel()
		s := limitScene(t)
		taken := s.serveBulk(t)
		post := func() {
			w := s.dial(t, 3100)
			w.say("POST http://" + lab.OriginAddr4 + ":81/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n" + basic(user.user, user.password) + "\r\n\r\n")
			go func() { _, _ = io.Copy(w, zeros{}) }()
		}
		post()
		post()
		bounded(t, "two uploads", taken.Load)
	})
}

// bounded measures how fast a count of bytes grows, after what may pass at once.
func bounded(t *testing.T, what string, count func() int64) {
	t.Helper()
	reach := func(n int64) (time.Time, int64) {
		eventually(t, what+" get on", func() bool { return count() >= n })
		return time.Now(), count()
	}
	from, begun := reach(slowBurst + slowRate/2)
	to, ended := reach(begun + 2*slowRate)
	if speed := float64(ended-begun) / to.Sub(from).Seconds(); speed > 1.3*slowRate || speed < 0.5*slowRate {
		t.Errorf("%s: %.0f bytes a second, %d are allowed", what, speed, slowRate)
	}
}

// policed sends datagrams of 1000 bytes, and compares what passes with the
// bandwidth, and what does not with the metric.
func policed(t *testing.T, what string, send func(n int), passed, dropped func() int) {
	t.Helper()
	const batch, batches = 50, 20
	was := dropped()
	begun := time.Now()
	for i := range batches {
		send(batch)
		eventually(t, what+": each datagram passes or is counted", func() bool {
			return passed()+dropped()-was == (i+1)*batch
		})
	}
	took := time.Since(begun).Seconds()
	bytes := float64(1000 * passed())
	if most := slowBurst + 1.3*slowRate*took; bytes > most {
		t.Errorf("%s: %.0f bytes passed in %.2f s, at most %.0f should", what, bytes, took, most)
	}
	if least := min(0.9*slowRate/10+0.5*slowRate*took, 1000*batch*batches); bytes < least {
		t.Errorf("%s: %.0f bytes passed in %.2f s, at least %.0f should", what, bytes, took, least)
	}
	if dropped() == was && took < batch*batches*1000/(2.0*slowRate) {
		t.Errorf("%s: nothing was dropped in %.2f s", what, took)
	}
}

// answerMany serves datagrams at the origin that ask for as many answers of 1000
// bytes as they say, and counts those that ask for none.
func answerMany(t *testing.T, s *scene, at string) (taken *atomic.Int64) {
	t.Helper()
	taken = new(atomic.Int64)
	var u *net.UDPConn
	if err := s.Origin.Do(func() (err error) {
		u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			many, err := strconv.Atoi(string(b[:n]))
			if err != nil {
				taken.Add(1)
				continue
			}
			for range many {
				_, _ = u.WriteToUDPAddrPort(make([]byte, 1000), from)
			}
		}
	}()
	return taken
}

// TestBandwidthOfDatagrams polices an association and a flow, both ways.
func TestBandwidthOfDatagrams(t *testing.T) {
	t.Parallel()
	const port = 1500
	ask := func(n int) []byte { return []byte(strconv.Itoa(n)) }
	large := make([]byte, 1000)
	// both runs each way with a client of its own: send to the origin, receive one.
	both := func(t *testing.T, s *scene, client func() (send func([]byte) error, receive func() error)) {
		taken := answerMany(t, s, at4(port))
		dropped := func() (n int) {
			for _, v := range family(s.scrape(t), "wayout_udp_datagrams_dropped_total") {
				n += int(v)
			}
			return n
		}
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		send, receive := client()
		policed(t, "up", func(n int) {
			for range n {
				must(send(large))
			}
		}, func() int { return int(taken.Load()) }, dropped)
		var got atomic.Int64
		go func() {
			for receive() == nil {
				got.Add(1)
			}
		}()
		policed(t, "down", func(n int) { must(send(ask(n))) }, func() int { return int(got.Load()) }, dropped)
	}
	t.Run("association", func(t *testing.T) {
		t.Parallel()
		s := outScene(t, `metrics: {listen: "10.0.0.1:9180"}`+"\n"+fronts("open: true, escaper: out, limits: {bandwidth: 8Mbit/s}"))
		a := s.mustAssociate(t, said{})
		both(t, s, func() (func([]byte) error, func() error) {
			return func(b []byte) error { return a.send(at4(port), b) }, func() error { _, _, err := a.receive(); return err }
		})
	})
	t.Run("flow", func(t *testing.T) {
		g := newGateway(t)
		g.start(`metrics: {listen: "10.0.0.1:9180"}` + "\n" + strings.TrimSpace(uplinkConfig(lan(`divert: ["udp/1500"], limits: {bandwidth: 8Mbit/s}`))))
		c := g.clientSocket()
		both(t, g.scene, func() (func([]byte) error, func() error) {
			to := netip.MustParseAddrPort(at4(port))
			buf := make([]byte, 1<<16)
			return func(b []byte) error { _, err := c.WriteToUDPAddrPort(b, to); return err },
				func() error { _, _, err := c.ReadFromUDPAddrPort(buf); return err }
		})
	})
}
