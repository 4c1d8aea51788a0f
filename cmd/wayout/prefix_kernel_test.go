package main_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// TestPrefixGateway: a gateway inside the prefix, and the addresses that belong
// to the link itself, are nobody's source.
func TestPrefixGateway(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	const gateway4, gateway6 = "198.51.100.129", "2001:db8:100:cafe::1"
	if err := s.ISP1.AddAddr("host0", netip.MustParsePrefix(gateway4+"/24"), netip.MustParsePrefix(gateway6+"/64")); err != nil {
		t.Fatal(err)
	}
	if err := s.Host.AddAddr("eth0", netip.MustParsePrefix("2001:db8:100:cafe::2/64")); err != nil {
		t.Fatal(err)
	}
	s.start(`uplink:
  - {name: isp1, interface: eth0, gateway4: ` + gateway4 + `, gateway6: "` + gateway6 + `"}
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    nodes:
      - {id: both, ipv4: 198.51.100.128/29, ipv6: "2001:db8:100:cafe::/124", uplink: isp1}
` + openServer)
	for _, c := range []struct {
		target, gateway string
		of              netip.Prefix
	}{
		{target4, gateway4, netip.MustParsePrefix("198.51.100.128/29")},
		{target6, gateway6, netip.MustParsePrefix("2001:db8:100:cafe::/124")},
	} {
		got := s.draw(3128, c.target, 120, c.of)
		if got[c.gateway] != 0 {
			t.Errorf("%d requests left as the gateway %s", got[c.gateway], c.gateway)
		}
		if len(got) < 5 { // all that are not the gateway's or the link's, of IPv4
			t.Errorf("only %d of the addresses of %s are used", len(got), c.of)
		}
		told := s.ask(lab.Ask{Target: c.target, Header: egress(c.gateway)})
		if told.Status != 503 || !strings.Contains(told.Body, c.gateway) {
			t.Errorf("the gateway's address, selected: %d %q from %s", told.Status, told.Body, told.Seen.Source)
		}
	}
}

// TestPrefixNeighbours: without answers nobody finds the addresses of a prefix
// on the link; with them, only those.
func TestPrefixNeighbours(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	config := func(how string) string {
		return strings.ReplaceAll(prefixConfig(t, oneUplink, "uplink: isp1", how), "connect_timeout: 20s", "connect_timeout: 1s")
	}
	s.start(config("off"))
	ask := lab.Ask{Proxy: proxyAt(3129), Target: target6, Header: egress("2001:db8:100:cafe::5")}
	if told := s.ask(ask); told.Status != 504 {
		t.Errorf("off: %d %s", told.Status, told.Body)
	}
	// auto cannot know that it is on the link.
	s.reload(config("auto"))
	if told := s.ask(ask); told.Status != 504 {
		t.Errorf("auto, without an address in the prefix: %d %s", told.Status, told.Body)
	}
	s.reload(strings.ReplaceAll(config("answer"), "1s", "20s"))
	eventually(t, "the answers reach the gateway", func() bool {
		if err := s.ISP1.ForgetNeighbours("host0"); err != nil {
			t.Fatal(err)
		}
		told := s.ask(ask)
		return told.Status == 200 && told.Seen.Source == "2001:db8:100:cafe::5"
	})
	s.reload(config("off"))
	if err := s.ISP1.ForgetNeighbours("host0"); err != nil {
		t.Fatal(err)
	}
	ask.Header = egress("2001:db8:100:cafe::6")
	if told := s.ask(ask); told.Status != 504 {
		t.Errorf("off again: %d %s", told.Status, told.Body)
	}
}

// TestPrefixRouteGoes takes the local route of a prefix away, which makes its
// addresses the host's own.
func TestPrefixRouteGoes(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	k.start(prefixConfig(t, oneUplink, "uplink: isp1", "answer"))
	ask := lab.Ask{Target: target6, Header: egress("six")}
	for round := range 3 {
		var seen []string
		watched := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan struct{})
		go func() {
			defer close(watched)
			once := sync.OnceFunc(func() { close(first) })
			_ = control.NewClient(k.socket).Watch(ctx, func(all control.Paths) error {
				for _, p := range all.Paths {
					if p.Path == "out/six" && (len(seen) == 0 || seen[len(seen)-1] != p.State) {
						seen = append(seen, p.State)
					}
				}
				once()
				return nil
			})
		}()
		<-first
		downs := strings.Count(k.daemon.Log(), "path=out/six state=down") + strings.Count(k.daemon.Log(), `"path":"out/six","state":"down"`)
		k.ip("-6", "route", "del", "local", routed6.String(), "dev", "lo", "table", "local")
		if !k.daemon.Await(func(log string) bool {
			return strings.Count(log, "path=out/six state=down")+strings.Count(log, `"path":"out/six","state":"down"`) > downs
		}) {
			t.Fatalf("round %d: the log does not say that the path was down", round)
		}
		k.until("out/six", func(p control.Path) bool { return p.State == "up" && p.Reason == "" })
		cancel()
		<-watched
		if !strings.Contains(k.ip("-6", "route", "show", "table", "local"), "local "+routed6.String()+" dev lo") {
			t.Errorf("round %d: the route is not back", round)
		}
		if told := k.ask(ask); told.Status != 200 || !routed6.Contains(netip.MustParseAddr(told.Seen.Source)) {
			t.Errorf("round %d: %d %s from %s", round, told.Status, told.Body, told.Seen.Source)
		}
	}
	// Without the uplink's interface there is nothing to put back.
	if err := k.Host.Down("eth0"); err != nil {
		t.Fatal(err)
	}
	k.until("out/six", func(p control.Path) bool { return p.State == "down" })
	if told := k.ask(ask); told.Status != 503 {
		t.Errorf("without its interface: %d %s", told.Status, told.Body)
	}
}

// TestPrefixState: what wayout puts into the kernel for prefixes it takes away
// again, whichever way it ends.
func TestPrefixState(t *testing.T) {
	t.Parallel()
	k := newKernelScene(t)
	before := k.state()
	k.write(prefixConfig(t, oneUplink, "uplink: isp1", "answer"))
	planned := k.wayout("plan")
	for _, p := range []netip.Prefix{routed4, routed6, shared4, shared6} {
		if !strings.Contains(planned, "local "+p.String()+" ") {
			t.Errorf("the plan has no local route of %s:\n%s", p, planned)
		}
	}
	k.same("plan changes nothing", before)
	k.wayout("apply")
	if again := k.wayout("plan"); again != "" {
		t.Errorf("after apply there is still to do:\n%s", again)
	}
	k.wayout("clean")
	k.same("apply and clean", before)

	works := func(when string) {
		t.Helper()
		for _, ask := range []lab.Ask{
			{Target: target6, Header: egress("2001:db8:100:beef::1:1")},
			{Target: target6, Proxy: proxyAt(3129), Header: egress("2001:db8:100:cafe::1:1")},
			{Target: target4, Header: egress("192.0.2.199")},
		} {
			if told := k.ask(ask); told.Status != 200 || egress(told.Seen.Source)[0] != ask.Header[0] {
				t.Errorf("%s: %v: %d %s from %s", when, ask.Header, told.Status, told.Body, told.Seen.Source)
			}
		}
	}
	k.run(lab.Program{})
	works("at first")
	if err := k.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	k.run(lab.Program{})
	works("after kill -9")
	k.stop()
	k.same("stopped", before)
	k.run(lab.Program{})
	if err := k.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	k.wayout("clean")
	k.same("killed and cleaned", before)

	// Without an uplink the local routes are all there is.
	k.write(prefixConfig(t, "", "", "off"))
	k.run(lab.Program{})
	if got := k.state().added(before, rules6); len(got) != 0 {
		t.Errorf("rules without an uplink: %q", got)
	}
	works0 := k.ask(lab.Ask{Target: target6, Header: egress("2001:db8:100:beef::1:2")})
	if works0.Status != 200 || works0.Seen.Source != "2001:db8:100:beef::1:2" {
		t.Errorf("without an uplink: %d %s", works0.Status, works0.Body)
	}
	// A reload takes the node away, and with it the route.
	k.reload(strings.Replace(prefixConfig(t, "", "", "off"), fmt.Sprintf("      - {id: six, ipv6: %q}\n", routed6), "", 1))
	eventually(t, "the route of a node that is gone is gone", func() bool {
		return !strings.Contains(k.ip("-6", "route", "show", "table", "local"), routed6.String())
	})
	k.stop()
	k.same("stopped, without an uplink", before)
}
