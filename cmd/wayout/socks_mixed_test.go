package main_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// TestMixedPort sends 300 requests of all protocols through one port, many at
// once: each gets its own protocol's answer and leaves as it has said.
func TestMixedPort(t *testing.T) {
	t.Parallel()
	const total, clients = 300, 12
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start(outConfig(`server:
  - {name: any, type: mixed_proxy, listen: ["10.0.0.1:8080"], open: true, escaper: out, path_selection_header: X-Egress-Path, socks_extension: true}
`))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for {
				i := int(next.Add(1) - 1)
				if i >= total {
					return
				}
				if err := s.mixedRequest(i); err != nil {
					t.Errorf("request %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()

	// What is no protocol at all, each in its way.
	for first, answer := range map[string]string{
		"\x05\x00":                             "\x05\xff",
		"\x05\x01\x02":                         "\x05\xff",
		"\x04\x02\x00\x50\x01\x02\x03\x04\x00": "\x00\x5b",
		"\x16\x03\x01\r\n\r\n":                 "HTTP/1.1 400 ",
		"GET / HTTP/1.1\r\n\r\n":               "HTTP/1.1 400 ",
	} {
		w := s.dial(t, 8080)
		w.say(first)
		w.expect(answer)
	}
}

// mixedRequest sends one of six kinds of request to the mixed port.
func (s *scene) mixedRequest(i int) error {
	path := i/6%8 + 1
	in := ingress{at: proxyAt(8080), selection: fmt.Sprint(path), six: i/12%2 == 1}
	want := lab.Egress4()[path-1]
	if in.six {
		want = lab.Egress6()[path-1]
	}
	if kind := i % 6; kind < 4 {
		got, err := s.askAt(protocols()[kind], in)
		if err == nil && (got.answer != "ok" || got.source.Addr() != want || got.bound.IsValid() && got.bound != got.source) {
			err = fmt.Errorf("%s: %s (told %s), want %s", protocols()[kind], got, got.bound, want)
		}
		return err
	}
	// SOCKS4 says nothing of paths.
	c, err := s.Client.Dial(in.at)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	target := target4
	if i%6 == 5 {
		target = "localhost:80" // by name, and forbidden
	}
	code, bound, err := connect4(c, target)
	if err != nil || i%6 == 5 {
		if err == nil && code != 0x5b {
			err = fmt.Errorf("SOCKS4a to localhost: 0x%02x", code)
		}
		return err
	}
	seen, err := getThrough(c, target)
	if err == nil && (code != 0x5a || seenAt(seen) != bound || !strings.Contains(fmt.Sprint(lab.Egress4()), seen.Source)) {
		err = fmt.Errorf("SOCKS4: 0x%02x, told %s, seen %s", code, bound, seenAt(seen))
	}
	return err
}

// lifeConfig is a mixed server and one of each kind, with these paths.
func lifeConfig(more string, which ...int) string {
	config, _, _ := strings.Cut(nodes(which...), "server:")
	return more + config + fronts(selects+"open: true, escaper: out")
}

// TestReloadWithSOCKS reloads with tunnels and associations open: they go on,
// those of a path that has left too.
func TestReloadWithSOCKS(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveEcho()
	s.serveDatagrams(t)
	s.start(lifeConfig("", 1, 2, 3))
	type open struct {
		tunnel net.Conn
		as     *association
		source [2]netip.AddrPort
	}
	begin := func(path int) open {
		a := said{selection: fmt.Sprint("p", path)}
		o := open{tunnel: s.hold(t, connect, a), as: s.mustAssociate(t, a)}
		o.source = [2]netip.AddrPort{o.as.mustEcho(t, echo4, "hello"), o.as.mustEcho(t, echo6, "hello")}
		return o
	}
	all := map[int]open{1: begin(1), 2: begin(2)}
	goOn := func(when string) {
		t.Helper()
		for path, o := range all {
			if err := echoes(o.tunnel); err != nil {
				t.Errorf("%s: the tunnel of p%d: %v", when, path, err)
			}
			for i, to := range []string{echo4, echo6} {
				if source := o.as.mustEcho(t, to, when); source != o.source[i] {
					t.Errorf("%s: the association of p%d sends from %s, and from %s before", when, path, source, o.source[i])
				}
			}
		}
	}
	s.reload(lifeConfig("", 4, 1, 3))
	goOn("p2 has left")
	for _, p := range protocols() {
		for selection, want := range map[string]string{"p4": "ok", "1": "ok", "p2": ""} {
			got, err := s.say(p, said{selection: selection})
			if want == "" {
				want = verdicts()["unknown"].want(p, said{})
			}
			if err != nil || got.answer != want || want == "ok" && got.source.Addr() != lab.Egress4()[3] {
				t.Errorf("after the reload %s by %s: %s, %v, want %s", selection, p, got, err, want)
			}
		}
	}
	// A reload that moves the servers elsewhere leaves what is open.
	s.reload(strings.NewReplacer(":1100", ":1190", ":3100", ":3190").Replace(lifeConfig("", 1, 3)))
	goOn("the ports have moved")
	eventually(t, "the old port is closed", func() bool {
		c, err := s.Client.Dial(proxyAt(1100))
		if err == nil {
			c.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	// The address of the path that has left ends what is left of it.
	if err := s.Host.DelAddr("eth0", lab.EgressPrefix(lab.Egress4()[1])); err != nil {
		t.Fatal(err)
	}
	all[2].as.ends(t)
	if _, err := all[2].tunnel.Read(make([]byte, 1)); err == nil {
		t.Error("the tunnel of an address that has gone goes on")
	}
	delete(all, 2)
	goOn("the address of p2 has gone")
}

// TestStopWithSOCKS stops the daemon with a tunnel and an association open: it
// takes no new clients, waits for both to end, and ends well.
func TestStopWithSOCKS(t *testing.T) {
	t.Parallel()
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut %v", cut), func(t *testing.T) {
			t.Parallel()
			s := newScene(t, true)
			s.serveEcho()
			s.serveDatagrams(t)
			more := ""
			if cut {
				more = "drain_timeout: 1s\n"
			}
			s.start(lifeConfig(more, 1, 2, 3))
			held := s.hold(t, connect, said{selection: "p1"})
			as := s.mustAssociate(t, said{selection: "p2"})
			source := as.mustEcho(t, echo4, "hello")
			// One that has said nothing yet is no work that is under way.
			idle, err := s.control(said{})
			if err != nil {
				t.Fatal(err)
			}
			defer idle.Close()
			end := s.stopping(t)
			eventually(t, "new clients are refused", func() bool {
				c, err := s.Client.Dial(proxyAt(1100))
				if err == nil {
					c.Close()
				}
				return errors.Is(err, syscall.ECONNREFUSED)
			})
			if !cut {
				if err := echoes(held); err != nil {
					t.Errorf("while it drains: the tunnel: %v", err)
				}
				if now := as.mustEcho(t, echo4, "draining"); now != source {
					t.Errorf("while it drains the association sends from %s, and from %s before", now, source)
				}
				held.Close()
				if now := as.mustEcho(t, echo4, "still"); now != source {
					t.Errorf("while it drains the association sends from %s, and from %s before", now, source)
				}
				as.Close()
			}
			endsBy(t, end, patience)
			if cut {
				as.ends(t)
				if _, err := held.Read(make([]byte, 1)); err == nil {
					t.Error("the tunnel has outlived the daemon")
				}
			}
		})
	}
}

// TestDrainedPathAndSOCKS: a path that is drained keeps its association.
func TestDrainedPathAndSOCKS(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start(lifeConfig("", 1, 2))
	as := s.mustAssociate(t, said{selection: "p1"})
	source := as.mustEcho(t, echo4, "hello")
	if _, errs, code := s.command("drain", "out/p1", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	if now := as.mustEcho(t, echo4, "drained"); now != source {
		t.Errorf("from %s, and from %s before", now, source)
	}
	if _, err := s.associate(said{selection: "p1"}); !errors.Is(err, refusedError("reply 0x01")) {
		t.Errorf("a new one: %v", err)
	}
	as.control.Close()
	s.until("out/p1", func(p control.Path) bool { return p.Connections.Open == 0 })
}

// TestHandshakeByBytes says a whole SOCKS5 handshake with the extension in one
// segment and then byte by byte: the answers are those of docs/socks.md.
func TestHandshakeByBytes(t *testing.T) {
	t.Parallel()
	s, _ := udpScene(t, "")
	target, err := client.AppendAddr([]byte{5, 1, 0}, client.AddrOf(netip.MustParseAddrPort(target4)))
	if err != nil {
		t.Fatal(err)
	}
	words := "\x05\x02\x00\xe9" + "\x01\x00\x02p3\x01\x00" + string(target) + "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
	for _, size := range []int{len(words), 1, 7} {
		w := s.dial(t, 1100)
		for rest := words; rest != ""; rest = rest[min(size, len(rest)):] {
			w.say(rest[:min(size, len(rest))])
		}
		w.expect("\x05\xe9\x01\x00\x00\x05\x00\x00\x01")
		source := make([]byte, 6)
		for i := range source {
			if source[i], err = w.r.ReadByte(); err != nil {
				t.Fatal(err)
			}
		}
		resp, body := w.answer("GET")
		if want := fmt.Sprintf(`"source":"%s","port":%d,`, lab.Egress4()[2], int(source[4])<<8|int(source[5])); resp.StatusCode != 200 ||
			netip.AddrFrom4([4]byte(source[:4])) != lab.Egress4()[2] || !strings.Contains(body, want) {
			t.Errorf("in pieces of %d: told %v, %s", size, source, body)
		}
	}
	for _, c := range []struct{ name, say, answer string }{
		{"not offered", "\x05\x01\x02", "\x05\xff"},
		{"no payload", "\x05\x01\xe9\x01\x00\x00\x01\x00", "\x05\xe9\x01\x01\xff"},
		{"over 4096", "\x05\x01\xe9\x01\x10\x01", "\x05\xe9\x01\x01\xff"},
		{"another version", "\x05\x01\xe9\x02\x00\x01p\x01\x00", "\x05\xe9\x01\x01\xff"},
		{"broken", "\x05\x01\xe9\x01\x00\x01{\x01\x00", "\x05\xe9\x01\x01\xff"},
		{"no method", "\x05\x01\xe9\x01\x00\x02p3\x00", "\x05\xe9\x01\x00\xff"},
		{"no method that fits", "\x05\x01\xe9\x01\x00\x02p3\x01\x02", "\x05\xe9\x01\x00\xff"},
		{"the extension again", "\x05\x01\xe9\x01\x00\x02p3\x01\xe9", "\x05\xe9\x01\x00\xff"},
		{"BIND", "\x05\x01\x00\x05\x02\x00\x01\xc0\x00\x02\x50\x00\x50", "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"an unknown command", "\x05\x01\x00\x05\x09\x00\x01\xc0\x00\x02\x50\x00\x50", "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"an unknown address type", "\x05\x01\x00\x05\x01\x00\x02\xc0\x00\x02\x50\x00\x50", "\x05\x00\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"SOCKS4 BIND", "\x04\x02\x00\x50\xc0\x00\x02\x50\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
	} {
		w := s.dial(t, 1100)
		w.say(c.say)
		w.expect(c.answer)
		w.ended()
	}
}
