package main_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// reload sends SIGHUP and waits for what the daemon says of it.
func (s *scene) reload(config string) {
	s.t.Helper()
	s.write(config)
	before := strings.Count(s.daemon.Log(), "reloaded")
	if err := s.daemon.Signal(unix.SIGHUP); err != nil {
		s.t.Fatal(err)
	}
	if !s.daemon.Await(func(log string) bool { return strings.Count(log, "reloaded") > before }) {
		s.t.Fatal("the daemon says nothing of its reload")
	}
}

// nodes is a configuration with these paths, of the world's eight.
func nodes(which ...int) string {
	var b strings.Builder
	b.WriteString("metrics: {listen: \"10.0.0.1:9180\"}\nescaper:\n  - name: out\n    type: direct_fixed\n    enable_path_selection: true\n    nodes:\n")
	for _, i := range which {
		fmt.Fprintf(&b, "      - {id: p%d, ipv4: %s, ipv6: %q}\n", i, lab.Egress4()[i-1], lab.Egress6()[i-1])
	}
	return b.String() + openServer
}

// echo opens a tunnel through a path to an echo at the origin.
func (s *scene) echo(path string) net.Conn {
	s.t.Helper()
	c, err := s.Client.Dial(proxyAt(3128))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		s.t.Fatal(err)
	}
	fmt.Fprintf(c, "CONNECT %s:7 HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %s\r\n\r\n", lab.OriginAddr4, path)
	var head []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); head = append(head, b[0]) {
		if _, err := c.Read(b); err != nil {
			s.t.Fatalf("%v after %q", err, head)
		}
	}
	if !strings.HasPrefix(string(head), "HTTP/1.1 200 ") {
		s.t.Fatalf("%q", head)
	}
	return c
}

// echoes says whether a tunnel of echo is alive.
func echoes(c net.Conn) error {
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

func (s *scene) serveEcho() {
	l := s.listen(lab.OriginAddr4 + ":7")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	s.t.Cleanup(func() { l.Close() })
}

func TestReload(t *testing.T) {
	s := newScene(t, true)
	s.serveEcho()
	s.start(nodes(1, 2, 3))
	stays, leaves := s.echo("p1"), s.echo("p2")

	s.reload(nodes(4, 1, 3))
	for _, c := range []selectionCase{
		{name: "new", header: egress("p4"), source: lab.Egress4()[3].String()},
		{name: "kept", header: egress("p1"), source: lab.Egress4()[0].String()},
		{name: "gone", header: egress("p2"), status: 400},
		{name: "gone, by address", header: egress(lab.Egress4()[1].String()), status: 400},
		{name: "indexes follow the new order", header: egress("1"), source: lab.Egress4()[3].String()},
		{name: "indexes follow the new order", header: egress("2"), source: lab.Egress4()[0].String()},
	} {
		c.check(s, false)
		c.check(s, true)
	}
	for name, c := range map[string]net.Conn{"of a path that stays": stays, "of a path that left": leaves} {
		if err := echoes(c); err != nil {
			t.Errorf("the tunnel %s: %v", name, err)
		}
	}
	if open := s.paths()["out/p1"].Connections.Open; open < 1 {
		t.Errorf("out/p1 has %d connections open: its books did not survive", open)
	}

	// The address of a path that left ends its connections all the same.
	if err := s.Host.DelAddr("eth0", lab.EgressPrefix(lab.Egress4()[1])); err != nil {
		t.Fatal(err)
	}
	if _, err := leaves.Read(make([]byte, 1)); err == nil {
		t.Error("the tunnel of an address that has gone goes on")
	}
	if err := echoes(stays); err != nil {
		t.Errorf("the tunnel of another address: %v", err)
	}
}

func TestReloadOfABrokenFileChangesNothing(t *testing.T) {
	s := newScene(t, true)
	s.start(nodes(1, 2))
	for name, c := range map[string]struct{ config, says string }{
		"syntax":             {"escaper: [", ""},
		"unknown key":        {nodes(1, 2) + "nonsense: 1\n", "nonsense"},
		"port in use":        {nodes(3) + "  - {name: other, type: http_proxy, listen: \"10.0.0.1:9180\", open: true, escaper: out}\n", "9180"},
		"needs a restart":    {strings.Replace(nodes(3), "9180", "9181", 1), "restart"},
		"no such address":    {strings.Replace(nodes(3), "10.0.0.1:3128", "10.0.0.77:3128", 1), "10.0.0.77"},
		"nothing to listen":  {nodes(3) + "  - {name: other, type: http_proxy, escaper: out}\n", "listen"},
		"accounting changes": {"accounting: off\n" + nodes(3), "accounting"},
	} {
		s.reload(c.config)
		if !strings.Contains(s.daemon.Log(), "configuration not reloaded") || !strings.Contains(s.daemon.Log(), c.says) {
			t.Errorf("%s: the log does not say why", name)
		}
		if told := s.ask(lab.Ask{Header: egress("p2")}); told.Status != 200 || told.Seen.Source != lab.Egress4()[1].String() {
			t.Errorf("%s: afterwards %d from %s", name, told.Status, told.Seen.Source)
		}
		if told := s.ask(lab.Ask{Header: egress("p3")}); told.Status != 400 {
			t.Errorf("%s: a part of it came into force: %d", name, told.Status)
		}
	}
	metrics := s.metrics()
	for _, line := range []string{`wayout_config_reload_total{result="error"} 7`, `wayout_config_reload_total{result="ok"} 0`} {
		if !strings.Contains(metrics, line) {
			t.Errorf("no %s in the metrics", line)
		}
	}
}

// metrics reads the daemon's metrics.
func (s *scene) metrics() string {
	s.t.Helper()
	c, err := s.Client.Dial(proxyAt(9180))
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /metrics HTTP/1.0\r\n\r\n")
	b, err := io.ReadAll(c)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// TestReloadUnderLoad reloads again and again while clients ask: no request
// fails, and each leaves by what it asked for.
func TestReloadUnderLoad(t *testing.T) {
	s := newScene(t, true)
	configs := []string{nodes(1, 2, 3, 4), nodes(4, 3, 1), nodes(1, 5, 6, 3), nodes(3, 1)}
	s.start(configs[0])
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var asked atomic.Int64
	for i := range 8 {
		path := []int{1, 3}[i%2] // these two are in every configuration
		want := lab.Egress4()[path-1].String()
		wg.Go(func() {
			for ctx.Err() == nil {
				told, err := s.try(lab.Ask{Header: egress(fmt.Sprintf("p%d", path)), Tunnel: i%4 > 1})
				if err != nil || told.Status != 200 || told.Seen.Source != want {
					t.Errorf("p%d: %v, %d %q from %s", path, err, told.Status, told.Body, told.Seen.Source)
					return
				}
				asked.Add(1)
			}
		})
	}
	for i := range 20 {
		s.reload(configs[(i+1)%len(configs)])
	}
	cancel()
	wg.Wait()
	if asked.Load() < 100 {
		t.Errorf("only %d requests", asked.Load())
	}
	if log := s.daemon.Log(); strings.Contains(log, "not reloaded") {
		t.Error("a reload failed")
	}
	// What left is let go of: the numbers, the guards and the books.
	s.until("out/p1", func(p control.Path) bool { return p.Connections.Open <= 8 })
}

// TestReloadWidensAListener: one address becomes all of them, on the same port, and
// the other way round; what others hold stays theirs.
func TestReloadWidensAListener(t *testing.T) {
	s := newScene(t, true)
	s.serveEcho()
	config := func(at string) string {
		return strings.Replace(nodes(1, 2), "server:\n", "server:\n  - {name: wide, type: http_proxy, listen: \""+at+"\", open: true, escaper: out, path_selection_header: X-Egress-Path}\n", 1)
	}
	const port = 3200
	s.start(config(fmt.Sprintf("%s:%d", lab.HostAddr4, port)))
	for _, at := range []string{"0.0.0.0", lab.HostAddr4, "[::]", "127.0.0.1", "0.0.0.0", "[::]"} {
		s.reload(config(fmt.Sprintf("%s:%d", at, port)))
		told, err := (lab.Ask{From: s.Client, Proxy: proxyAt(port), Target: target4, Header: egress("p2")}).Do()
		switch {
		case at == "127.0.0.1" && err == nil:
			t.Errorf("%s: it answers elsewhere", at)
		case at != "127.0.0.1" && (err != nil || told.Status != 200 || told.Seen.Source != lab.Egress4()[1].String()):
			t.Errorf("%s: %v, %d %s", at, err, told.Status, told.Body)
		}
	}
	l, err := s.Host.Listen(netip.AddrPortFrom(netip.MustParseAddr(lab.HostAddr4), port+1))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.write(config(fmt.Sprintf("0.0.0.0:%d", port+1)))
	if _, errs, code := s.command("reload", "--control", s.socket); code != 1 || !strings.Contains(errs, "address already in use") {
		t.Errorf("a port of another program's: %d %q", code, errs)
	}
}

func TestReloadCommand(t *testing.T) {
	s := newScene(t, true)
	s.start(nodes(1, 2))
	s.write(nodes(3))
	if out, errs, code := s.command("reload", "--config", s.config); code != 0 || out != "" {
		t.Fatalf("%d %q %q", code, out, errs)
	}
	if told := s.ask(lab.Ask{Header: egress("p3")}); told.Status != 200 {
		t.Errorf("the new path: %d %s", told.Status, told.Body)
	}
	s.write(strings.Replace(nodes(3), "id: p3", "id: -p3", 1))
	_, errs, code := s.command("reload", "--control", s.socket)
	if code != 1 || !strings.Contains(errs, s.config+":") || !strings.Contains(errs, "escaper[0].nodes[0].id") {
		t.Errorf("a broken file: %d %q", code, errs)
	}
}
