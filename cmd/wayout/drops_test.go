package main_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// TestTransparentDrops compares what the metrics and paths --json say of dropped
// fragments, of packets that nobody was there for, and of flows, with what the
// client has sent.
func TestTransparentDrops(t *testing.T) {
	g := newGateway(t)
	tell(t, g.Origin, "origin", at4(443))
	tellDatagrams(t, g.Origin, "origin", everywhere(1500)...)
	config := `metrics: {listen: "10.0.0.1:9180"}` + "\n" +
		strings.Replace(uplinkConfig(lan(`divert: ["tcp/443", "udp/1500"], select: {out: p6}`)),
			"type: direct_fixed\n", "type: direct_fixed\n    egress_network_filter: {deny: [\"192.0.2.66/32\"]}\n", 1)
	g.start(config)
	seen := g.capture(g.Client, "eth0")
	sent := func(is func(lab.Packet) bool) (n float64) {
		for _, p := range settled(t, seen) {
			if p.Out && is(p) {
				n++
			}
		}
		return n
	}
	drops := func(kind string) float64 {
		return g.scrape(t)[`wayout_divert_`+kind+`_dropped_total{interface="lan0"}`]
	}
	all := g.scrape(t)
	for _, name := range []string{
		`wayout_divert_fragments_dropped_total{interface="lan0"}`, `wayout_udp_flows_open{server="lan"}`,
		`wayout_udp_datagrams_dropped_total{server="lan"}`,
	} {
		if v, ok := all[name]; !ok || v != 0 {
			t.Errorf("at the start %s is %v, there: %v", name, v, ok)
		}
	}
	atStart := all[`wayout_divert_unserved_dropped_total{interface="lan0"}`]

	// Fragments, of both families.
	c := g.clientSocket()
	large := []byte(strings.Repeat("large ", 1000))
	for _, at := range everywhere(1500) {
		if _, err := c.WriteToUDPAddrPort(large, netip.MustParseAddrPort(at)); err != nil {
			t.Fatal(err)
		}
	}
	fragments := func(p lab.Packet) bool { return udpOf(p) && p.Length > 100 }
	eventually(t, "the fragments are counted", func() bool { return drops("fragments") > 0 && drops("fragments") == sent(fragments) })

	// A flow, and datagrams of one that the filter refuses.
	if got := sendOn(t, c, at4(1500), "hello", patience); got != "origin "+p6Of4+" hello" {
		t.Errorf("a flow: %q", got)
	}
	for range 3 {
		if _, err := c.WriteToUDPAddrPort([]byte("denied"), netip.MustParseAddrPort("192.0.2.66:1500")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "what is refused is counted", func() bool {
		all := g.scrape(t)
		return all[`wayout_udp_datagrams_dropped_total{server="lan"}`] == 3 && all[`wayout_udp_flows_open{server="lan"}`] == 1
	})
	if now := drops("unserved"); now != atStart {
		t.Errorf("with the server there %v packets found none, at the start %v", now, atStart)
	}

	// Nobody is there.
	before := sent(toPort(443))
	if err := g.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if got := g.dial(at4(443), brief); got != "nobody" {
		t.Fatalf("killed: %q answers", got)
	}
	g.start(config)
	want := sent(toPort(443)) - before
	if got := drops("unserved") - atStart; want == 0 || got < want || got > want+1 { // one may still have been on its way
		t.Errorf("%v packets found no server, of %v that were sent", got, want)
	}
	if drops("fragments") != sent(fragments) {
		t.Errorf("after a new start %v fragments, sent were %v", drops("fragments"), sent(fragments))
	}

	// The same by --json.
	var told control.Paths
	if err := json.Unmarshal([]byte(g.wayout("paths", "--json", "--control", g.socket)), &told); err != nil {
		t.Fatal(err)
	}
	if len(told.Interfaces) != 1 || told.Interfaces[0].Interface != "lan0" || told.Interfaces[0].Diverted == nil ||
		float64(told.Interfaces[0].Diverted.FragmentsDropped) != drops("fragments") ||
		len(told.Datagrams) != 1 || told.Datagrams[0].Server != "lan" {
		t.Errorf("paths --json: %+v, %+v", told.Interfaces, told.Datagrams)
	}
}

// clientSocket is a socket of the client's for datagrams to anywhere.
func (g *gateway) clientSocket() (c *net.UDPConn) {
	g.t.Helper()
	if err := g.Client.Do(func() (err error) {
		c, err = net.ListenUDP("udp", nil)
		return err
	}); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// TestNeighbourAnswersCounted compares the metric with the advertisements that the
// gateway has got.
func TestNeighbourAnswersCounted(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(prefixConfig(t, oneUplink, "uplink: isp1", "answer"))
	gateway, err := s.ISP1.Capture("host0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { gateway.Close() })
	const answers = `wayout_neighbour_answers_total{interface="eth0"}`
	if v, ok := s.scrape(t)[answers]; !ok || v != 0 {
		t.Errorf("before anybody has asked: %v, there: %v", v, ok)
	}
	const asked = 3
	for i := range asked {
		a := fmt.Sprintf("2001:db8:100:cafe::%d", i+1)
		if told := s.ask(lab.Ask{Proxy: proxyAt(3129), Target: target6, Header: egress(a)}); told.Status != 200 || told.Seen.Source != a {
			t.Fatalf("from %s: %d %s", a, told.Status, told.Body)
		}
	}
	net := netip.MustParsePrefix(lab.SharedNet6)
	n := 0.0
	for _, p := range settled(t, gateway) { // an advertisement comes from the address that it is about
		if !p.Out && p.Proto == unix.IPPROTO_ICMPV6 && net.Contains(p.Src.Addr()) && p.Length == 72 {
			n++
		}
	}
	if got := s.scrape(t)[answers]; n < asked || got != n {
		t.Errorf("%v answers are counted, the gateway got %v", got, n)
	}
	// They are not forgotten with who gave them.
	s.reload(prefixConfig(t, oneUplink, "uplink: isp1", "off"))
	if got := s.scrape(t)[answers]; got != n {
		t.Errorf("without answers any more %v are counted, the gateway got %v", got, n)
	}
}

// TestAssociationsCounted compares the metrics of datagrams with the associations
// and what was wrong with their datagrams.
func TestAssociationsCounted(t *testing.T) {
	t.Parallel()
	s := outScene(t, `metrics: {listen: "10.0.0.1:9180"}`+"\n"+fronts(selects+"open: true, escaper: out"))
	s.serveDatagrams(t)
	a, b := s.mustAssociate(t, said{selection: "p1"}), s.mustAssociate(t, said{selection: "p2"})
	for range 4 {
		if _, err := a.udp.Write([]byte{0, 0, 1}); err != nil {
			t.Fatal(err)
		}
	}
	a.mustEcho(t, echo4, "behind them")
	b.mustEcho(t, echo4, "beside them")
	sums := func() (open, dropped float64) {
		all := s.scrape(t)
		for _, v := range family(all, "wayout_udp_flows_open") {
			open += v
		}
		for _, v := range family(all, "wayout_udp_datagrams_dropped_total") {
			dropped += v
		}
		return open, dropped
	}
	if open, dropped := sums(); open != 2 || dropped != 4 {
		t.Errorf("%v associations, %v datagrams dropped; want 2 and 4", open, dropped)
	}
	a.Close()
	if !s.daemon.Await(func(log string) bool { return strings.Contains(log, `"dropped":4`) }) {
		t.Error("the access log does not say what was dropped")
	}
	eventually(t, "the end is counted", func() bool { open, _ := sums(); return open == 1 })
}

// TestFlowPortsRunOut has 20 ports for each path, and more flows than that: each
// has a port of its path for itself, and what is over goes by the next one.
func TestFlowPortsRunOut(t *testing.T) {
	const ports, flows = 20, 30
	g := newGateway(t)
	if err := g.Host.Sysctl("net/ipv4/ip_local_port_range", "40000 40019"); err != nil {
		t.Fatal(err)
	}
	tellDatagrams(t, g.Origin, "origin", at4(1500))
	g.start(`metrics: {listen: "10.0.0.1:9180"}` + "\n" + strings.Replace(uplinkConfig(lan(`divert: ["udp/1500"]`)),
		"type: direct_fixed\n", "type: direct_fixed\n    pick_policy: serial\n    spill: on\n", 1))
	from := map[string]int{}
	for range flows {
		from[sendOn(t, g.clientSocket(), at4(1500), "hello", patience)]++
	}
	one, two := "origin "+uplinkNodes()[0].v4.String()+" hello", "origin "+uplinkNodes()[1].v4.String()+" hello"
	// A look in between may have seen that few are left, and spared them.
	if from[one] > ports || from[one] < ports*8/10 || from[one]+from[two] != flows {
		t.Errorf("sources: %v", from)
	}
	const metric = `wayout_path_ports{escaper="out",path="p1",state="in_use"}`
	eventually(t, "the ports are counted", func() bool { return g.scrape(t)[metric] == float64(from[one]) })
}
