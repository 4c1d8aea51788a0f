package main_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// TestAddressVanishesUnderLoad takes an address off the host while requests
// are running, and puts it back.
func TestAddressVanishesUnderLoad(t *testing.T) {
	s := outScene(t, "")
	v4 := lab.Egress4()
	gone := v4[1]
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var requests, wrong atomic.Int64
	load := func(header []string, ok func(lab.Told) bool) {
		wg.Go(func() {
			for ctx.Err() == nil {
				told, err := s.try(lab.Ask{Header: header})
				if err != nil {
					t.Errorf("%v: %v", header, err)
					return
				}
				requests.Add(1)
				if !ok(told) {
					wrong.Add(1)
					t.Errorf("%v: %d %q from %s", header, told.Status, told.Body, told.Seen.Source)
				}
			}
		})
	}
	// The one that goes: either its own address or an honest 503.
	load(egress("p2"), func(d lab.Told) bool {
		return d.Status == 200 && d.Seen.Source == gone.String() || d.Status == 503 && strings.Contains(d.Body, gone.String())
	})
	// Another one is not concerned.
	load(egress("p3"), func(d lab.Told) bool { return d.Status == 200 && d.Seen.Source == v4[2].String() })
	// The policy: always one of ours. A request that picked the address in its
	// last moment may fail; none may come from elsewhere.
	load(nil, func(d lab.Told) bool {
		return d.Status == 200 && strings.Contains(fmt.Sprint(v4), d.Seen.Source) || d.Status == 503
	})

	lacking := func(p control.Path) bool { return strings.Contains(p.Reason, gone.String()) }
	for round := range 5 {
		clock := newFair(t)
		if err := s.Host.DelAddr("eth0", lab.EgressPrefix(gone)); err != nil {
			t.Fatal(err)
		}
		s.until("out/p2", lacking)
		if took, own := clock.took(); own > time.Second {
			t.Errorf("round %d: noticed after %v", round, took)
		}
		told := s.ask(lab.Ask{Header: egress("p2")})
		if told.Status != 503 || !strings.Contains(told.Body, "is not on any interface") || told.Header.Get("Retry-After") != "1" {
			t.Errorf("round %d: the path without its address: %d %q", round, told.Status, told.Body)
		}
		// Its other family is there all the same.
		if told := s.ask(lab.Ask{Header: egress("p2"), Target: target6}); told.Status != 200 || told.Seen.Source != lab.Egress6()[1].String() {
			t.Errorf("round %d: IPv6 of the path: %d %q", round, told.Status, told.Body)
		}
		for range 20 {
			if told := s.ask(lab.Ask{}); told.Status != 200 || told.Seen.Source == gone.String() {
				t.Errorf("round %d: the policy: %d %q from %s", round, told.Status, told.Body, told.Seen.Source)
			}
		}
		if err := s.Host.AddAddr("eth0", lab.EgressPrefix(gone)); err != nil {
			t.Fatal(err)
		}
		s.until("out/p2", func(p control.Path) bool { return p.Reason == "" && p.State == "up" })
		if told := s.ask(lab.Ask{Header: egress("p2")}); told.Status != 200 || told.Seen.Source != gone.String() {
			t.Errorf("round %d: back again: %d %q from %s", round, told.Status, told.Body, told.Seen.Source)
		}
	}
	cancel()
	wg.Wait()
	if requests.Load() < 100 {
		t.Errorf("only %d requests", requests.Load())
	}
	for a, n := range s.origin.Sources() {
		if a.Is4() && !strings.Contains(fmt.Sprint(v4), a.String()) {
			t.Errorf("%d requests came from %s", n, a)
		}
	}
}

// TestConnectionsEndWithTheirAddress holds a tunnel and an idle upstream
// connection open while the address goes.
func TestConnectionsEndWithTheirAddress(t *testing.T) {
	s := outScene(t, "")
	// An echo at the origin: a tunnel that lives until it is ended.
	l := s.listen(lab.OriginAddr4 + ":7")
	accepted := make(chan net.Conn, 2)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	t.Cleanup(func() { l.Close() })
	tunnel := func(path string) net.Conn {
		c, err := s.Client.Dial(proxyAt(3128))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "CONNECT %s:7 HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %s\r\n\r\nhello", lab.OriginAddr4, path)
		want := "HTTP/1.1 200 "
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Fatalf("%q, %v", got, err)
		}
		var b [1]byte
		var all []byte
		for !strings.HasSuffix(string(all), "hello") {
			if _, err := c.Read(b[:]); err != nil {
				t.Fatalf("%v after %q", err, all)
			}
			all = append(all, b[0])
		}
		return c
	}
	dying, living := tunnel("p1"), tunnel("p2")
	clock := newFair(t)
	if err := s.Host.DelAddr("eth0", lab.EgressPrefix(lab.Egress4()[0])); err != nil {
		t.Fatal(err)
	}
	if _, err := dying.Read(make([]byte, 1)); err == nil {
		t.Error("the tunnel of the address that has gone goes on")
	}
	if took, own := clock.took(); own > time.Second {
		t.Errorf("it ended after %v", took)
	}
	if _, err := living.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(living, make([]byte, 1)); err != nil {
		t.Errorf("the tunnel of another address: %v", err)
	}
	s.until("out/p1", func(p control.Path) bool { return p.Connections.Open == 0 })
	if !strings.Contains(s.daemon.Log(), "connections ended") {
		t.Error("nothing in the log")
	}
}

func TestLinkAndRouteGo(t *testing.T) {
	s := outScene(t, "")
	if err := s.Host.Down("eth0"); err != nil {
		t.Fatal(err)
	}
	s.until("out/p1", func(p control.Path) bool { return p.State == "down" && strings.Contains(p.Reason, "eth0") })
	if told := s.ask(lab.Ask{Header: egress("p1")}); told.Status != 503 {
		t.Errorf("%d %s", told.Status, told.Body)
	}
	if err := s.Host.Up("eth0"); err != nil {
		t.Fatal(err)
	}
	// The kernel brings neither the routes nor the IPv6 addresses back.
	s.until("out/p1", func(p control.Path) bool { return p.State == "down" && strings.Contains(p.Reason, "default route") })
	if err := s.Host.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(lab.Gateway1Of4)); err != nil {
		t.Fatal(err)
	}
	s.until("out/p1", func(p control.Path) bool { return p.State == "up" && strings.Contains(p.Reason, "2001:db8:100::11") })
	if told := s.ask(lab.Ask{Header: egress("p1")}); told.Status != 200 || told.Seen.Source != lab.Egress4()[0].String() {
		t.Errorf("%d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
}

func TestDrain(t *testing.T) {
	s := outScene(t, "")
	if _, errs, code := s.command("drain", "out/p1", "--config", s.config); code != 0 {
		t.Fatalf("drain: %d %s", code, errs)
	}
	if p := s.paths()["out/p1"]; p.State != "draining" {
		t.Errorf("state %s", p.State)
	}
	if told := s.ask(lab.Ask{Header: egress("p1")}); told.Status != 503 || !strings.Contains(told.Body, "drain") {
		t.Errorf("%d %s", told.Status, told.Body)
	}
	for range 40 {
		if told := s.ask(lab.Ask{}); told.Status != 200 || told.Seen.Source == lab.Egress4()[0].String() {
			t.Errorf("the policy: %d from %s", told.Status, told.Seen.Source)
		}
	}
	if _, errs, code := s.command("undrain", "--config", s.config, "out/p1"); code != 0 {
		t.Fatalf("undrain: %d %s", code, errs)
	}
	if told := s.ask(lab.Ask{Header: egress("p1")}); told.Status != 200 {
		t.Errorf("%d %s", told.Status, told.Body)
	}
	if _, errs, code := s.command("drain", "out/p77", "--config", s.config); code != 1 || !strings.Contains(errs, "p77") {
		t.Errorf("an unknown path: %d %q", code, errs)
	}
}

// TestTentative waits for an IPv6 address through duplicate address detection.
func TestTentative(t *testing.T) {
	s := newScene(t, true)
	if err := s.Host.Sysctl("net/ipv6/conf/eth0/accept_dad", "1"); err != nil {
		t.Fatal(err)
	}
	s.start(outConfig(""))
	a := lab.Egress6()[0]
	if err := s.Host.DelAddr("eth0", lab.EgressPrefix(a)); err != nil {
		t.Fatal(err)
	}
	s.until("out/p1", func(p control.Path) bool { return p.Reason != "" })
	if err := s.Host.AddTentative("eth0", lab.EgressPrefix(a)); err != nil {
		t.Fatal(err)
	}
	s.until("out/p1", func(p control.Path) bool { return strings.Contains(p.Reason, "tentative") })
	if told := s.ask(lab.Ask{Header: egress("p1"), Target: target6}); told.Status != 503 {
		t.Errorf("while tentative: %d %s", told.Status, told.Body)
	}
	s.until("out/p1", func(p control.Path) bool { return p.Reason == "" })
	if told := s.ask(lab.Ask{Header: egress("p1"), Target: target6}); told.Status != http.StatusOK || told.Seen.Source != a.String() {
		t.Errorf("%d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
}
