package main_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"wayout/scripts/lab"
)

// limitScene has fronts of which each is about one limit, and users alike.
func limitScene(t *testing.T) *scene {
	t.Helper()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.serveEcho()
	h := hashOf(t, "secret")
	team := selects + "user_group: team, username_params: true, escaper: out"
	s.start(outConfig(fmt.Sprintf(`user_group:
  - name: team
    users:
      - {name: free, password: %[1]q}
      - {name: three, password: %[1]q, limits: {connections: 3}}
      - {name: once, password: %[1]q, limits: {rate: 1/h}}
      - {name: slow, password: %[1]q, limits: {bandwidth: 8Mbit/s}}
      - {name: lan, from: [10.0.0.2], limits: {connections: 3}, egress_path: {out: p5}}
`, h) + fronts(team, selects+"open: true, escaper: out, limits: {connections: 3}", selects+"open: true, escaper: out, limits: {rate: 1/h}",
		selects+"open: true, escaper: out, limits: {bandwidth: 8Mbit/s}", team+", limits: {connections: 1}")))
	return s
}

// hold opens a tunnel to the echo, by HTTP or SOCKS5, that has to be granted.
func (s *scene) hold(t *testing.T, p protocol, a said) net.Conn {
	t.Helper()
	if p == connect {
		c, err := s.control(a)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := a.dialer().Handshake(t.Context(), c, lab.OriginAddr4+":7"); err != nil {
			t.Fatal(err)
		}
		return c
	}
	w := s.dial(t, uint16(3100+a.front))
	w.say("CONNECT " + lab.OriginAddr4 + ":7 HTTP/1.1\r\nHost: x\r\n")
	if a.user != "" {
		w.say(basic(a.user, a.password) + "\r\n")
	}
	w.say("\r\n")
	if resp, body := w.answer("CONNECT"); resp.StatusCode != 200 {
		t.Fatalf("%s %s", resp.Status, body)
	}
	return w
}

// limited asks by each protocol, and all have to be refused.
func (s *scene) limited(t *testing.T, what string, a said, atLeast int) {
	t.Helper()
	for _, p := range protocols() {
		got, err := s.say(p, a)
		want := map[bool]string{true: "429", false: "reply 0x02"}[p == forward || p == tunnel]
		if err != nil || got.answer != want {
			t.Errorf("%s, %s: %s, %v, want %s", what, p, got, err, want)
		}
		if got.header == nil {
			continue
		}
		if after, err := strconv.Atoi(got.header.Get("Retry-After")); err != nil || after < atLeast || after > 3600 {
			t.Errorf("%s, %s: Retry-After %q", what, p, got.header.Get("Retry-After"))
		}
		if got.kind == "" {
			t.Errorf("%s, %s: no Proxy-Status", what, p)
		}
	}
}

// TestConnectionLimits fills the limits of a user and of a server by tunnels
// and an association: what is beyond is refused until one of them ends.
func TestConnectionLimits(t *testing.T) {
	t.Parallel()
	s := limitScene(t)
	for _, c := range []struct {
		name string
		a, b said // of the same limit
	}{
		{"user", said{user: "three", password: "secret"}, said{user: "three-session-x", password: "secret"}},
		{"server", said{front: 1}, said{front: 1, selection: "p1"}},
	} {
		held := []io.Closer{s.hold(t, connect, c.a)}
		as, err := s.associate(c.b)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		as.mustEcho(t, echo4, "hello")
		held = append(held, as.control)
		// A server's limit is HTTP's or SOCKS's; a user's is of all servers.
		if c.name == "user" {
			held = append(held, s.hold(t, tunnel, c.a))
		} else {
			held = append(held, s.hold(t, connect, c.b))
			for range 3 {
				s.hold(t, tunnel, c.a)
			}
		}
		for _, a := range []said{c.a, c.b} {
			s.limited(t, c.name, a, 1)
		}
		for i, h := range held {
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			eventually(t, fmt.Sprintf("%s: there is room when %d has ended", c.name, i), func() bool {
				got, err := s.say(connect, c.a)
				if err != nil {
					t.Fatal(err)
				}
				return got.answer == "ok"
			})
		}
	}
	// Who is at his limit is in nobody else's way, and one limit beside another
	// holds: that of front 4.
	free := said{front: 4, user: "free", password: "secret"}
	one := s.hold(t, connect, free)
	if got, err := s.say(connect, said{front: 4, user: "three", password: "secret"}); err != nil || got.answer != "reply 0x02" {
		t.Errorf("the server's limit, another user: %s, %v", got, err)
	}
	if got, err := s.say(connect, said{user: "free", password: "secret"}); err != nil || got.answer != "ok" {
		t.Errorf("the same user of another server: %s, %v", got, err)
	}
	// What the server refused counts for no user.
	for range 5 {
		if got, err := s.say(connect, said{front: 4, user: "three", password: "secret"}); err != nil || got.answer != "reply 0x02" {
			t.Errorf("%s, %v", got, err)
		}
	}
	if got, err := s.say(tunnel, said{user: "three", password: "secret"}); err != nil || got.answer != "ok" {
		t.Errorf("after refusals of a server: %s, %v", got, err)
	}
	one.Close()
	// A wrong password is that, also at the limit.
	for range 3 {
		s.hold(t, connect, said{user: "three", password: "secret"})
	}
	for _, p := range protocols() {
		got, err := s.say(p, said{user: "three", password: "wrong"})
		if want := verdicts()["credentials"].want(p, said{}); err != nil || got.answer != want {
			t.Errorf("%s with a wrong password: %s, %v", p, got, err)
		}
	}
	// Reload does not forget what is open.
	text, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	_, config, _ := strings.Cut(string(text), "\n") // without the control socket
	s.reload(config)
	s.limited(t, "after a reload", said{user: "three", password: "secret"}, 1)
}

// TestRateLimits takes the only request of an hour, of a user and of a server.
func TestRateLimits(t *testing.T) {
	t.Parallel()
	s := limitScene(t)
	once := said{user: "once", password: "secret"}
	if got, err := s.say(forward, once); err != nil || got.answer != "ok" {
		t.Fatalf("%s, %v", got, err)
	}
	s.limited(t, "user", once, 3000)
	if got, err := s.say(connect, said{front: 2}); err != nil || got.answer != "ok" {
		t.Fatalf("%s, %v", got, err)
	}
	if got, err := s.say(tunnel, said{front: 2}); err != nil || got.answer != "ok" {
		t.Fatalf("%s, %v", got, err)
	}
	s.limited(t, "server", said{front: 2}, 3000)
	for range 20 {
		if got, err := s.say(connect, said{user: "free", password: "secret"}); err != nil || got.answer != "ok" {
			t.Fatalf("another user: %s, %v", got, err)
		}
	}
}

// TestBandwidthLimits sends 2 MB by a tunnel of 1 MB in a second, one way and
// the other.
func TestBandwidthLimits(t *testing.T) {
	t.Parallel()
	const rate, size = 1_000_000, 2_000_000
	s := limitScene(t)
	for name, c := range map[string]struct {
		p protocol
		a said
	}{
		"user by SOCKS":   {connect, said{user: "slow", password: "secret"}},
		"user by HTTP":    {tunnel, said{user: "slow", password: "secret"}},
		"server by SOCKS": {connect, said{front: 3}},
		"server by HTTP":  {tunnel, said{front: 3}},
		"nobody":          {connect, said{user: "free", password: "secret"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := s.hold(t, c.p, c.a)
			begun := time.Now()
			go func() { _, _ = w.Write(make([]byte, size)) }() // what is missing is missed below
			if n, err := io.CopyN(io.Discard, w, size); err != nil {
				t.Fatalf("%d bytes came back: %v", n, err)
			}
			took := time.Since(begun)
			if name != "nobody" && (took < size*time.Second/rate/3 || took > patience) {
				t.Errorf("%d bytes with %d in a second took %v", size, rate, took)
			}
		})
	}
}

// TestUsersByNetwork knows clients by where they come from.
func TestUsersByNetwork(t *testing.T) {
	t.Parallel()
	s := limitScene(t)
	other := netip.MustParseAddr("10.0.0.3")
	if err := s.Client.AddAddr("eth0", netip.PrefixFrom(other, 24)); err != nil {
		t.Fatal(err)
	}
	p5 := lab.Egress4()[4]
	for _, p := range protocols() {
		if got, err := s.say(p, said{}); err != nil || got.answer != "ok" || got.source.Addr() != p5 {
			t.Errorf("%s: %s, %v, want %s", p, got, err, p5)
		}
		// Credentials are stronger than the network, and wrong ones are wrong.
		if got, err := s.say(p, said{user: "free-path-p3", password: "secret"}); err != nil || got.source.Addr() != lab.Egress4()[2] {
			t.Errorf("%s with credentials: %s, %v", p, got, err)
		}
		got, err := s.say(p, said{user: "free", password: "wrong"})
		if want := verdicts()["credentials"].want(p, said{}); err != nil || got.answer != want {
			t.Errorf("%s with a wrong password: %s, %v", p, got, err)
		}
	}
	// SOCKS4 has no credentials: the network is all.
	ask4 := func(from netip.Addr) (byte, netip.Addr) {
		t.Helper()
		c, err := s.control(said{from: from})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		code, bound, err := connect4(c, target4)
		if err != nil {
			t.Fatal(err)
		}
		if code != 0x5a {
			return code, netip.Addr{}
		}
		seen, err := getThrough(c, target4)
		if err != nil || seenAt(seen) != bound {
			t.Errorf("the origin saw %s, the reply tells %s (%v)", seenAt(seen), bound, err)
		}
		return code, bound.Addr()
	}
	if code, source := ask4(netip.MustParseAddr(lab.ClientAddr4)); code != 0x5a || source != p5 {
		t.Errorf("SOCKS4 of the client: 0x%02x from %s", code, source)
	}
	if code, _ := ask4(other); code != 0x5b {
		t.Errorf("SOCKS4 of a stranger: 0x%02x", code)
	}
	if got, err := s.say(connect, said{from: other}); err != nil || got.answer != "method" {
		t.Errorf("a stranger without credentials: %s, %v", got, err)
	}
	if got, err := s.say(connect, said{from: other, selection: "p1"}); err != nil || got.answer != "method" {
		t.Errorf("a stranger with the extension: %s, %v", got, err)
	}
	c, err := s.Client.DialFrom(other, proxyAt(3100))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := newPeer(t, c, nil)
	w.say("GET http://" + target4 + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 407 {
		t.Errorf("a stranger by HTTP: %s", resp.Status)
	}
	// His limits hold for all servers.
	for range 3 {
		s.hold(t, connect, said{})
	}
	s.limited(t, "by network", said{}, 1)
}
