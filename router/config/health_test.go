package config_test

import (
	"strings"
	"testing"

	"wayout/router/config"
)

func TestHealthMistakes(t *testing.T) {
	const (
		out  = "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1}], "
		peer = "escaper: [{name: peer, type: proxy_socks5, nodes: [{addr: 'p.example:1080'}], "
	)
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"health that is no map", out + "health: on}]", []string{`1: escaper[0].health: want a map of keys and values, got "on"`}},
		{"health of a route", "escaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1}, {name: r, type: route_select, next: [out], health: {}}]", []string{
			`1: escaper[1].health: is not a key of route_select, got "health"`,
		}},
		{"no failures", out + "health: {failures: 0}}]", []string{`1: escaper[0].health.failures: is out of range 1 to 100, got "0"`}},
		{"more destinations than failures", out + "health: {failures: 5, destinations: 6}}]", []string{
			`1: escaper[0].health.destinations: 5 failures cannot be to 6 destinations, got "6"`,
		}},
		{"fewer failures than destinations", out + "health: {failures: 2}}]", []string{
			`1: escaper[0].health.failures: 2 failures cannot be to 3 destinations, got "2"`,
		}},
		{"hold", out + "health: {hold: 1h}}]", []string{`1: escaper[0].health.hold: is out of range 100ms to 5m, got "1h"`}},
		{"empty probe", out + "probe: {}}]", []string{`1: escaper[0].probe.tcp: is required, or else http, got ""`}},
		{"both probes", out + "probe: {tcp: 'a:1', http: 'http://a/'}}]", []string{`1: escaper[0].probe.http: give tcp or http, not both, got "http://a/"`}},
		{"probe without a port", out + "probe: {tcp: a.example}}]", []string{
			`1: escaper[0].probe.tcp: want HOST:PORT, with an IPv6 address in brackets, got "a.example"`,
		}},
		{"scheme", out + "probe: {http: 'ftp://a/'}}]", []string{`1: escaper[0].probe.http: want an URL with http:// or https://, got "ftp://a/"`}},
		{"no URL", out + "probe: {http: a.example}}]", []string{`1: escaper[0].probe.http: want an URL with http:// or https://, got "a.example"`}},
		{"credentials", out + "probe: {http: 'http://u:p@a/'}}]", []string{`1: escaper[0].probe.http: an URL with credentials is not supported, got "http://u:p@a/"`}},
		{"fragment", out + "probe: {http: 'http://a/#x'}}]", []string{`1: escaper[0].probe.http: a fragment (#...) is not sent, got "http://a/#x"`}},
		{"host of an URL", out + "probe: {http: 'http:///x'}}]", []string{
			`1: escaper[0].probe.http: want a host name: labels of letters, digits, - and _ between dots, got "http:///x"`,
		}},
		{"address of an URL", out + "probe: {http: 'http://0.0.0.0/x'}}]", []string{
			`1: escaper[0].probe.http: the unspecified address is not one to send from or to, got "http://0.0.0.0/x"`,
		}},
		{"port of an URL", out + "probe: {http: 'http://a:0/'}}]", []string{`1: escaper[0].probe.http: a port is 1 to 65535, got "http://a:0/"`}},
		{"long URL", out + "probe: {http: 'http://a/" + strings.Repeat("x", 2048) + "'}}]", []string{
			`1: escaper[0].probe.http: is over 2048 bytes, got "http://a/` + strings.Repeat("x", 71) + `..."`,
		}},
		{"timeout above interval", out + "probe: {tcp: 'a:1', interval: 1s, timeout: 2s}}]", []string{
			`1: escaper[0].probe.timeout: timeout is 2s and interval 1s: a probe has to end before the next, got "2s"`,
		}},
		{"interval below timeout", out + "probe: {tcp: 'a:1', interval: 2s}}]", []string{
			`1: escaper[0].probe.interval: timeout is 3s and interval 2s: a probe has to end before the next, got "2s"`,
		}},
		{"eip by tcp", out + "probe: {tcp: 'a:1', eip: on}}]", []string{
			`1: escaper[0].probe.eip: needs http: a connection alone does not say what address it comes from, got "on"`,
		}},
		{"eip of no node", out + "probe: {http: 'http://a/', eip: on}}]", []string{`1: escaper[0].probe.eip: compares nothing: no node has an eip, got "on"`}},
		{"eip that is none", "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1, eip: there}]}]", []string{
			`1: escaper[0].nodes[0].eip: want an IP address, got "there"`,
		}},
		{"two of a family", "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1, eip: [192.0.2.2, 192.0.2.3]}]}]", []string{
			`1: escaper[0].nodes[0].eip[1]: there is an address of this family already, got "192.0.2.3"`,
		}},
		{"empty eip", "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1, eip: []}]}]", []string{
			`1: escaper[0].nodes[0].eip: want at least one address, got "[...]"`,
		}},
		{"eip of a range", "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv4: 192.0.2.1-192.0.2.4, eip: 192.0.2.9}]}]", []string{
			`1: escaper[0].nodes[0].eip: is for a node of one address of a family, and this one is a range or a prefix, got "192.0.2.9"`,
		}},
		{"eip of a prefix", "escaper: [{name: out, type: direct_fixed, nodes: [{id: a, ipv6: '2001:db8::/64', eip: '2001:db8:1::9'}]}]", []string{
			`1: escaper[0].nodes[0].eip: is for a node of one address of a family, and this one is a range or a prefix, got "2001:db8:1::9"`,
		}},
		{"spill", peer + "spill: much}]", []string{`1: escaper[0].spill: want on, off, true or false, got "much"`}},
	} {
		t.Run(tt.name, func(t *testing.T) { wantMistakes(t, tt.text, tt.want...) })
	}
}

func TestHealthOf(t *testing.T) {
	const nodes = "escaper: [{name: out, type: direct_fixed, bind_ip: 192.0.2.1, "
	for text, want := range map[string]config.Health{
		nodes + "spill: on}]":   noHealth(),
		nodes + "health: {} }]": {On: true, Failures: 5, Destinations: 3, Window: noHealth().Window, Hold: noHealth().Hold},
		"escaper: [{name: peer, type: proxy_http, nodes: [{addr: 'p.example:1080'}], health: {failures: 1}}]": {
			On: true, Failures: 1, Destinations: 3, Window: noHealth().Window, Hold: noHealth().Hold,
		},
	} {
		if got := parse(t, text).Escapers[0].Health; got != want {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
	}
	for url, want := range map[string]string{
		"http://A.example": "http://A.example", "https://192.0.2.1:8443/a?b=c": "https://192.0.2.1:8443/a?b=c", "http://[2001:db8::1]/": "http://[2001:db8::1]/",
	} {
		if got := parse(t, nodes+"probe: {http: '"+url+"'}}]").Escapers[0].Probe.HTTP; got != want {
			t.Errorf("%s: %q", url, got)
		}
	}
}
