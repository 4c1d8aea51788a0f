package config_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"wayout/router/config"
	"wayout/selection"
)

const hash = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAA"

func addr(s string) netip.Addr         { return netip.MustParseAddr(s) }
func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func parse(t *testing.T, text string) *config.Config {
	t.Helper()
	c, err := config.Parse("w.yaml", []byte(text))
	if err != nil {
		t.Fatalf("%v\nin:\n%s", err, text)
	}
	return c
}

// noHealth and probe are the defaults; a probe to nowhere is off.
func noHealth() config.Health {
	return config.Health{Failures: 5, Destinations: 3, Window: 30 * time.Second, Hold: 10 * time.Second}
}

func probe(tcp string) config.Probe {
	return config.Probe{TCP: tcp, Interval: 10 * time.Second, Timeout: 3 * time.Second, Fall: 3, Rise: 2}
}

// The example of testdata has every key that there is; what it says comes out.
func TestExample(t *testing.T) {
	c, err := config.Load(filepath.Join("testdata", "example.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	allow, err := selection.ParseGlobs([]string{"out/fra-*", "out/pool/*"})
	if err != nil {
		t.Fatal(err)
	}
	want := &config.Config{
		Control:      config.Control{Socket: "/run/wayout/control.sock"},
		Metrics:      config.Metrics{Listen: addrPort("127.0.0.1:9180")},
		Log:          config.Log{Format: "json", Level: slog.LevelInfo},
		Accounting:   true,
		KeepOnStop:   false,
		DrainTimeout: 45 * time.Second,
		Keepalive:    config.Keepalive{Enable: true, IdleExpire: 90 * time.Second, MaxPerKey: 8, Max: 1024},
		Netcfg:       config.Netcfg{MarkMask: 0xff00ffff, TableBase: 7000, RulePriority: 5000},
		Resolvers: []config.Resolver{
			{Name: "sys", Type: "system"},
			{
				Name: "own", Type: "dns", Server: []netip.AddrPort{addrPort("192.0.2.53:53"), addrPort("[2001:db8::53]:5353")}, Bind: "path",
				Hosts: map[string][]netip.Addr{
					"db.example": {addr("192.0.2.7")}, "www.example": {addr("192.0.2.8"), addr("2001:db8::8")},
				},
				ServeStale: time.Hour, Timeout: 2 * time.Second,
			},
			{Name: config.DefaultResolver, Type: "system"},
		},
		Uplinks: []config.Uplink{
			{Name: "isp1", Interface: "eth0", Gateway4: addr("198.51.100.1"), Gateway6: addr("2001:db8:100::1"), ManageAddresses: true},
			{Name: "isp2", Interface: "eth1", Gateway4: addr("203.0.113.1")},
		},
		Escapers: []config.Escaper{
			{
				Name: "out", Type: "direct_fixed", Resolver: "sys", EnablePathSelection: true,
				PickPolicy: selection.RoundRobin, PickKey: "user", StrictIndex: true, ResolveStrategy: "ipv4_first", Neighbour: "answer",
				Filter: config.Filter{
					Deny:  []config.Rule{{Class: config.ClassPrivate}, {Prefix: netip.MustParsePrefix("192.0.2.7/32")}},
					Allow: []config.Rule{{Prefix: netip.MustParsePrefix("10.1.0.0/16")}},
				},
				Nodes: []config.Node{
					{ID: "fra-1", IPv4: addr("198.51.100.11"), IPv6: addr("2001:db8:100::11"), Uplink: "isp1", Weight: 2},
					{ID: "fra-2", IPv4: addr("198.51.100.12"), Uplink: "isp1", Weight: 1, EIP: []netip.Addr{addr("192.0.2.200")}},
					{ID: "lon-1", IPv4: addr("203.0.113.7"), Interface: "eth1", Uplink: "isp2"},
					{ID: "pool/198.51.100.20", IPv4: addr("198.51.100.20"), IPv6: addr("2001:db8:100::20"), Uplink: "isp1", Weight: 1},
					{ID: "pool/198.51.100.21", IPv4: addr("198.51.100.21"), IPv6: addr("2001:db8:100::21"), Uplink: "isp1", Weight: 1},
					{ID: "dev", Interface: "eth0", Uplink: "isp1", Weight: 1},
					{ID: "six", Net6: netip.MustParsePrefix("2001:db8:beef::/64"), Uplink: "isp1", Weight: 1},
				},
				Uplink:         "isp1",
				ConnectTimeout: 5 * time.Second,
				HappyEyeballs:  config.HappyEyeballs{ConnectionAttemptDelay: 100 * time.Millisecond},
				Health:         config.Health{On: true, Failures: 4, Destinations: 2, Window: 20 * time.Second, Hold: 5 * time.Second},
				Probe:          config.Probe{HTTP: "https://ip.example/", Interval: 20 * time.Second, Timeout: 5 * time.Second, Fall: 2, Rise: 1, EIP: true},
				Spill:          true,
			},
			{
				Name: "short", Type: "direct_fixed", Resolver: config.DefaultResolver, PickKey: "client_ip", ResolveStrategy: "any", Neighbour: "auto",
				Nodes: []config.Node{
					{ID: "198.51.100.11", IPv4: addr("198.51.100.11"), Interface: "eth0", Weight: 1},
					{ID: "2001:db8:100::11", IPv6: addr("2001:db8:100::11"), Interface: "eth0", Weight: 1},
				},
				BindIP:         []netip.Addr{addr("198.51.100.11"), addr("2001:db8:100::11")},
				Interface:      "eth0",
				ConnectTimeout: 10 * time.Second,
				HappyEyeballs:  config.HappyEyeballs{ConnectionAttemptDelay: 250 * time.Millisecond},
				Health:         noHealth(), Probe: probe(""),
			},
			{
				Name: "dyn", Type: "direct_float", Resolver: config.DefaultResolver, PickKey: "client_ip", ResolveStrategy: "any",
				Cache:          "/var/lib/wayout/dyn.json",
				ConnectTimeout: 10 * time.Second,
				HappyEyeballs:  config.HappyEyeballs{ConnectionAttemptDelay: 250 * time.Millisecond},
				Health:         noHealth(), Probe: probe(""),
			},
			{
				Name: "by-city", Type: "route_select", PickKey: "client_ip",
				Next: []config.Next{{Escaper: "out", Weight: 2}, {Escaper: "dyn", Weight: 1}},
			},
			{
				Name: "by-target", Type: "route_upstream",
				ExactMatch:  []config.HostRule{{Next: "out", Hosts: []string{"example.com", "192.0.2.1"}}},
				SuffixMatch: []config.HostRule{{Next: "dyn", Hosts: []string{"example.org"}}},
				SubnetMatch: []config.NetRule{{Next: "short", Subnets: []netip.Prefix{
					netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::1/128"),
				}}},
				RegexMatch:  []config.HostRule{{Next: "dyn", Hosts: []string{`img[0-9]+\.example\.net`}}},
				DefaultNext: "by-city",
			},
			{
				Name: "by-client", Type: "route_client",
				UserMatch:   []config.HostRule{{Next: "by-target", Hosts: []string{"alice"}}},
				DefaultNext: "out",
			},
			{
				Name: "peer", Type: "proxy_https", Resolver: config.DefaultResolver, PickKey: "client_ip", ResolveStrategy: "any",
				Peers: []config.Peer{
					{ID: "p1", Addr: "proxy.example:3129", Username: "u", Password: "p:$w", Path: "out/fra-1", Weight: 3, EIP: []netip.Addr{addr("192.0.2.9"), addr("2001:db8::9")}},
					{ID: "192.0.2.9:3129", Addr: "192.0.2.9:3129", Weight: 1},
				},
				PassSelection: true, PeerSelectionHeader: "X-Way", TLSName: "proxy.example", TLSCA: "/etc/wayout/peers.pem",
				HandshakeTimeout: 4 * time.Second,
				ConnectTimeout:   10 * time.Second,
				HappyEyeballs:    config.HappyEyeballs{ConnectionAttemptDelay: 250 * time.Millisecond},
				Health:           noHealth(), Probe: probe("www.example:443"),
			},
		},
		UserGroups: []config.UserGroup{{Name: "team", Users: []config.User{
			{
				Name: "alice", Password: hash,
				EgressPath: selection.Layer{{Escaper: "out", Value: selection.ID("fra-2")}, {Escaper: "short", Value: selection.Index(0)}},
				AllowPath:  []string{"out/fra-*", "out/pool/*"}, Allow: allow,
				From:   []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("192.0.2.3/32")},
				Limits: config.Limits{Connections: 1000, Rate: config.Rate{Count: 200, Per: time.Second}, Bandwidth: 100_000_000},
			},
			{
				Name: "bob", Password: "$2y$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
				EgressPath: selection.Layer{{Escaper: "out", Value: selection.ID("2001:DB8:100::11")}},
				Inline: map[string]config.Inline{"dyn": {
					ID: "198.51.100.77", V4: addr("198.51.100.77"), Expire: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
					Labels: map[string]string{"isp": "two"},
				}},
			},
		}}, {
			Name: "guests", Users: []config.User{{Name: "guest", From: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}}},
		}},
		Pins: []config.Pin{{Cgroup: "/system.slice/backup.service", Path: "out/fra-1"}},
		Servers: []config.Server{
			{
				Name: "web", Type: "mixed_proxy", Listen: []netip.AddrPort{addrPort("127.0.0.1:3128")},
				Escaper: "by-client", UserGroup: "team", PathSelectionHeader: "X-Egress-Path", ReportEgress: true, SOCKSExtension: true, UsernameParams: true,
				Select: config.Select{Mode: "map", Map: selection.Layer{
					{Escaper: "out", Value: selection.ID("fra-1")}, {Escaper: "dyn", Value: selection.ID("anything")},
				}},
				Limits:           config.Limits{Connections: 5000, Rate: config.Rate{Count: 60, Per: time.Minute}, Bandwidth: 1_000_000_000},
				ReqHeaderMaxSize: 32 << 10, ReqHeaderMaxCount: 64, ReqTargetMaxSize: 8 << 10, RspHeaderMaxSize: 128 << 10, RspHeaderMaxCount: 100,
				PipelineReadIdleTimeout: time.Minute, ReqHeaderRecvTimeout: 10 * time.Second, AuthTimeout: 3 * time.Second,
				RspHeaderRecvTimeout: 60 * time.Second, BodyStallTimeout: 30 * time.Second, SendTimeout: 20 * time.Second,
				TunnelIdleTimeout: 36 * time.Hour, UDPIdleTimeout: 90 * time.Second,
			},
			{
				Name: "wide", Type: "http_proxy", Listen: []netip.AddrPort{addrPort("0.0.0.0:8080"), addrPort("[2001:db8:100::11]:8080"), addrPort("[::]:0")},
				Escaper: "short", Open: true,
				ReqHeaderMaxSize: 64 << 10, ReqHeaderMaxCount: 200, ReqTargetMaxSize: 16 << 10, RspHeaderMaxSize: 256 << 10, RspHeaderMaxCount: 1000,
				PipelineReadIdleTimeout: 2 * time.Minute, ReqHeaderRecvTimeout: 30 * time.Second, AuthTimeout: 10 * time.Second,
				RspHeaderRecvTimeout: 5 * time.Minute, BodyStallTimeout: 5 * time.Minute, SendTimeout: 2 * time.Minute,
				TunnelIdleTimeout: time.Hour,
			},
			{
				Name: "ports", Type: "socks_proxy",
				Listen:  []netip.AddrPort{addrPort("127.0.0.1:20000"), addrPort("127.0.0.1:20001"), addrPort("127.0.0.1:20002")},
				Escaper: "out", Select: config.Select{Mode: "port"},
				ReqHeaderRecvTimeout: 30 * time.Second, AuthTimeout: 10 * time.Second, SendTimeout: 2 * time.Minute,
				TunnelIdleTimeout: time.Hour, UDPIdleTimeout: time.Minute,
			},
			{
				Name: "nets", Type: "socks_proxy", Escaper: "out", Open: true, Select: config.Select{Mode: "ingress_ip"},
				ListenNets: []config.ListenNet{
					{Prefix: netip.MustParsePrefix("198.51.100.0/25"), First: 1080, Last: 1080},
					{Prefix: netip.MustParsePrefix("2001:db8:100::/64"), First: 1080, Last: 1089},
				},
				ReqHeaderRecvTimeout: 30 * time.Second, AuthTimeout: 10 * time.Second, SendTimeout: 2 * time.Minute,
				TunnelIdleTimeout: time.Hour, UDPIdleTimeout: time.Minute,
			},
			{
				Name: "lan", Type: "tproxy", Escaper: "out", UserGroup: "guests",
				Select:    config.Select{Mode: "map", Map: selection.Layer{{Escaper: "out", Value: selection.ID("fra-1")}}},
				Interface: []string{"lan0", "br0"},
				Divert: []config.Divert{
					{TCP: true, First: 443, Last: 443}, {First: 1000, Last: 2000}, {TCP: true, First: 8000, Last: 8999}, {First: 443, Last: 443},
				},
				Rest: "drop", Sniff: true, SniffTimeout: 100 * time.Millisecond, UDPFlows: 1000,
				Limits:            config.Limits{Connections: 100},
				TunnelIdleTimeout: time.Hour, UDPIdleTimeout: 5 * time.Minute,
			},
		},
	}
	if diff := cmp.Diff(want, c, compare()...); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
}

func compare() []cmp.Option {
	return []cmp.Option{
		cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}, selection.Value{}),
		cmpopts.IgnoreUnexported(config.Config{}, config.Resolver{}, config.Escaper{}, config.User{}, config.Server{}),
		cmp.Comparer(func(a, b *selection.Globs) bool {
			return a == nil && b == nil || a != nil && b != nil && fmt.Sprint(*a) == fmt.Sprint(*b)
		}),
	}
}

// What has no line in the file has the default that the reference prints.
func TestDefaults(t *testing.T) {
	c := parse(t, "escaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1}]\n"+
		"server: [{name: web, type: http_proxy, listen: 127.0.0.1:3128, escaper: out}]\n")
	if c.Control.Socket != "/run/wayout/control.sock" || c.Metrics.Listen.IsValid() || c.Log.Format != "text" || c.Log.Level != slog.LevelInfo ||
		!c.Accounting || c.KeepOnStop || c.DrainTimeout != 30*time.Second || c.Netcfg != (config.Netcfg{}) {
		t.Errorf("top level: %+v", c)
	}
	e := c.Escapers[0]
	if e.EnablePathSelection || e.StrictIndex || e.PickPolicy != selection.Random || e.PickKey != "client_ip" || e.Resolver != config.DefaultResolver {
		t.Errorf("escaper: %+v", e)
	}
	if s := c.Servers[0]; s.Open || s.ReportEgress || s.PathSelectionHeader != "" || s.UserGroup != "" {
		t.Errorf("server: %+v", s)
	}
	if len(c.Resolvers) != 1 || c.Resolvers[0].Name != config.DefaultResolver || c.Resolvers[0].Type != "system" {
		t.Errorf("resolvers: %+v", c.Resolvers)
	}
}

func TestZeroConfiguration(t *testing.T) {
	c := config.Default([]netip.Addr{
		addr("198.51.100.11"), addr("2001:db8::5"), addr("::ffff:198.51.100.12"), addr("198.51.100.11"),
		{},
		addr("fe80::1%eth0"), addr("224.0.0.1"), addr("0.0.0.0"),
	})
	want := []config.Node{
		{ID: "198.51.100.11", IPv4: addr("198.51.100.11"), Weight: 1},
		{ID: "2001:db8::5", IPv6: addr("2001:db8::5"), Weight: 1},
		{ID: "198.51.100.12", IPv4: addr("198.51.100.12"), Weight: 1},
	}
	if diff := cmp.Diff(want, c.Escapers[0].Nodes, compare()...); diff != "" {
		t.Errorf("nodes: -want +got:\n%s", diff)
	}
	// All the rest is what a file with the same words gives.
	file := parse(t, `
escaper: [{name: out, type: direct_fixed, enable_path_selection: on, nodes: [{ipv4: 198.51.100.11}, {ipv6: "2001:db8::5"}, {ipv4: 198.51.100.12}]}]
server: [{name: web, type: mixed_proxy, listen: 127.0.0.1:3128, escaper: out, path_selection_header: X-Egress-Path}]
`)
	if diff := cmp.Diff(file, c, compare()...); diff != "" {
		t.Errorf("-file +zero configuration:\n%s", diff)
	}
	if n := len(config.Default(nil).Escapers[0].Nodes); n != 0 {
		t.Errorf("%d nodes of no addresses", n)
	}
}

func nodesOf(t *testing.T, escaper string) []config.Node {
	t.Helper()
	return parse(t, "uplink: [{name: isp1, interface: eth0}]\nescaper: [{name: out, type: direct_fixed, "+escaper+"}]\n").Escapers[0].Nodes
}

func TestNodes(t *testing.T) {
	tests := []struct {
		name, escaper string
		want          []config.Node
	}{
		{"range with an ID", "nodes: [{id: p, ipv4: 192.0.2.254-192.0.3.1, weight: 7}]", []config.Node{
			{ID: "p/192.0.2.254", IPv4: addr("192.0.2.254"), Weight: 7},
			{ID: "p/192.0.2.255", IPv4: addr("192.0.2.255"), Weight: 7},
			{ID: "p/192.0.3.0", IPv4: addr("192.0.3.0"), Weight: 7},
			{ID: "p/192.0.3.1", IPv4: addr("192.0.3.1"), Weight: 7},
		}},
		{"range without an ID", "nodes: [{ipv6: '2001:db8::ffff:ffff:ffff:ffff - 2001:db8:0:1::'}]", []config.Node{
			{ID: "2001:db8::ffff:ffff:ffff:ffff", IPv6: addr("2001:db8::ffff:ffff:ffff:ffff"), Weight: 1},
			{ID: "2001:db8:0:1::", IPv6: addr("2001:db8:0:1::"), Weight: 1},
		}},
		{"range of one", "nodes: [{id: p, ipv4: 192.0.2.1-192.0.2.1}]", []config.Node{{ID: "p", IPv4: addr("192.0.2.1"), Weight: 1}}},
		{"bind_ip", "bind_ip: [192.0.2.9, '2001:db8::1', 192.0.2.1-192.0.2.2], uplink: isp1", []config.Node{
			{ID: "192.0.2.9", IPv4: addr("192.0.2.9"), Uplink: "isp1", Weight: 1},
			{ID: "2001:db8::1", IPv6: addr("2001:db8::1"), Uplink: "isp1", Weight: 1},
			{ID: "192.0.2.1", IPv4: addr("192.0.2.1"), Uplink: "isp1", Weight: 1},
			{ID: "192.0.2.2", IPv4: addr("192.0.2.2"), Uplink: "isp1", Weight: 1},
		}},
		{"bind_ip of one", "bind_ip: 2001:DB8:0::1", []config.Node{{ID: "2001:db8::1", IPv6: addr("2001:db8::1"), Weight: 1}}},
		{"interface alone", "interface: br-lan", []config.Node{{ID: "br-lan", Interface: "br-lan", Weight: 1}}},
		{"interface that is no ID", "interface: wg%0", []config.Node{{ID: "default", Interface: "wg%0", Weight: 1}}},
		{"defaults of the escaper", "uplink: isp1, interface: eth0, nodes: [{id: a, ipv4: 192.0.2.1}, {id: b}]", []config.Node{
			{ID: "a", IPv4: addr("192.0.2.1"), Interface: "eth0", Uplink: "isp1", Weight: 1},
			{ID: "b", Interface: "eth0", Uplink: "isp1", Weight: 1},
		}},
		{"names that YAML takes for something else", "nodes: [{id: on, ipv4: 192.0.2.1}, {id: 1e5, ipv4: 192.0.2.2}, {id: 0x10, ipv4: 192.0.2.3}]", []config.Node{
			{ID: "on", IPv4: addr("192.0.2.1"), Weight: 1},
			{ID: "1e5", IPv4: addr("192.0.2.2"), Weight: 1},
			{ID: "0x10", IPv4: addr("192.0.2.3"), Weight: 1},
		}},
		{"an ID that is an address of none, as behind NAT", "nodes: [{id: 203.0.113.9, ipv4: 10.0.0.5}]", []config.Node{{ID: "203.0.113.9", IPv4: addr("10.0.0.5"), Weight: 1}}},
		{"an ID that is the node's own address", "nodes: [{id: '2001:DB8::1', ipv6: '2001:db8::1'}]", []config.Node{{ID: "2001:DB8::1", IPv6: addr("2001:db8::1"), Weight: 1}}},
		{"link-local", "nodes: [{id: a, ipv6: 'fe80::1', interface: eth0}]", []config.Node{{ID: "a", IPv6: addr("fe80::1"), Interface: "eth0", Weight: 1}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, nodesOf(t, tt.escaper), compare()...); diff != "" {
				t.Fatalf("-want +got:\n%s", diff)
			}
		})
	}
	if n := len(nodesOf(t, "bind_ip: 10.0.0.1-10.1.0.0")); n != 65536 {
		t.Errorf("the longest range: %d nodes, want 65536", n)
	}
}

func TestValues(t *testing.T) {
	head := "escaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1}]\n"
	t.Run("switches", func(t *testing.T) {
		for word, want := range map[string]bool{"on": true, "true": true, "yes": true, "TRUE": true, "off": false, "false": false, "no": false, "Off": false} {
			if c := parse(t, "accounting: "+word); c.Accounting != want {
				t.Errorf("%s is %v", word, c.Accounting)
			}
		}
	})
	t.Run("durations", func(t *testing.T) {
		for word, want := range map[string]time.Duration{
			"0": 0, "90": 90 * time.Second, "1.5": 1500 * time.Millisecond, "90s": 90 * time.Second, "1h30m": 90 * time.Minute,
			"1h 30min": 90 * time.Minute, "250ms": 250 * time.Millisecond, "1d": 24 * time.Hour, `"10"`: 10 * time.Second,
		} {
			if c := parse(t, "drain_timeout: "+word); c.DrainTimeout != want {
				t.Errorf("%s is %v, want %v", word, c.DrainTimeout, want)
			}
		}
	})
	t.Run("listeners", func(t *testing.T) {
		for word, want := range map[string]string{
			`":3128"`: "[::]:3128", "3128": "[::]:3128", "0.0.0.0:3128": "0.0.0.0:3128", `"[::1]:0"`: "[::1]:0", "[127.0.0.1:1]": "127.0.0.1:1",
			`"[fe80::1%eth0]:80"`: "[fe80::1%eth0]:80",
		} {
			c := parse(t, head+"server: [{name: web, type: http_proxy, open: true, escaper: out, listen: "+word+"}]")
			if got := c.Servers[0].Listen; len(got) != 1 || got[0].String() != want {
				t.Errorf("%s is %v, want %s", word, got, want)
			}
		}
	})
	t.Run("sizes", func(t *testing.T) {
		for word, want := range map[string]int{"4096": 4096, "32KiB": 32768, "32 KiB": 32768, "20KB": 20000, "1MiB": 1 << 20, "64K": 65536} {
			c := parse(t, head+"server: [{name: web, type: http_proxy, listen: 127.0.0.1:0, escaper: out, req_header_max_size: "+word+"}]")
			if got := c.Servers[0].ReqHeaderMaxSize; got != want {
				t.Errorf("%s is %d, want %d", word, got, want)
			}
		}
	})
	t.Run("log", func(t *testing.T) {
		c := parse(t, "log: {level: debug}")
		if c.Log.Level != slog.LevelDebug {
			t.Errorf("level %v", c.Log.Level)
		}
	})
	t.Run("allow_path", func(t *testing.T) {
		user := head + "user_group: [{name: g, users: [{name: u, password: '" + hash + "'%s}]}]"
		if u := parse(t, fmt.Sprintf(user, "")).UserGroups[0].Users[0]; u.Allow != nil || u.AllowPath != nil {
			t.Error("absent: want nil, any path")
		}
		if u := parse(t, fmt.Sprintf(user, ", allow_path: []")).UserGroups[0].Users[0]; u.Allow == nil || u.Allow.Match("out/192.0.2.1") {
			t.Error("empty: want no path")
		}
	})
	t.Run("egress_path", func(t *testing.T) {
		for _, words := range []string{
			`egress_path: {out: 192.0.2.1}`, `egress_path_id_map: {out: 192.0.2.1}`, `egress_path: '{"out": "192.0.2.1"}'`,
			`egress_path: "{\"out\": \"::ffff:192.0.2.1\"}"`, `egress_path: {out: 1}`, `egress_path: '{"out": 18446744073709551615}'`,
			`egress_path: {out: 18446744073709551615}`,
		} {
			c := parse(t, head+"user_group: [{name: g, users: [{name: u, password: '"+hash+"', "+words+"}]}]")
			if l := c.UserGroups[0].Users[0].EgressPath; len(l) != 1 || l[0].Escaper != "out" {
				t.Errorf("%s is %v", words, l)
			}
		}
		c := parse(t, head+"user_group: [{name: g, users: [{name: u, password: '"+hash+"', egress_path: {}}]}]")
		if l := c.UserGroups[0].Users[0].EgressPath; len(l) != 0 {
			t.Errorf("{} is %v", l)
		}
	})
	t.Run("anchors", func(t *testing.T) {
		c := parse(t, "escaper:\n  - &a {name: out, type: direct_fixed, nodes: &n [{id: a, ipv4: 192.0.2.1}]}\n"+
			"  - {name: two, type: direct_fixed, nodes: *n}\n")
		if len(c.Escapers) != 2 || len(c.Escapers[1].Nodes) != 1 {
			t.Errorf("%+v", c.Escapers)
		}
	})
	t.Run("JSON, byte order mark, CRLF", func(t *testing.T) {
		parse(t, "\ufeff{\"log\": {\"level\": \"warn\"},\r\n \"accounting\": false}\r\n")
	})
}

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	var list config.Errors
	if _, err := config.Load(filepath.Join(dir, "none.yaml")); !errors.Is(err, os.ErrNotExist) || errors.As(err, &list) {
		t.Errorf("no file: %v", err)
	}
	if _, err := config.Load(dir); err == nil || errors.As(err, &list) {
		t.Errorf("a directory: %v", err)
	}
	path := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(path, []byte("accounting: maybe\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := config.Load(path)
	if want := path + `:1: accounting: want on, off, true or false, got "maybe"`; err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	var one *config.Error
	if !errors.As(err, &one) || one.Line != 1 || one.Key != "accounting" || one.File != path {
		t.Errorf("as a value: %+v", one)
	}
	if _, err := config.Parse("big.yaml", []byte(strings.Repeat("#", 33<<20))); err == nil || err.Error() != "big.yaml:1: the file is over 32 MiB" {
		t.Errorf("a large file: %v", err)
	}
}
