package router

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/router/config"
)

// What a published node says that targets see is an address where the probe
// compares with it, and only there.
func TestPublishedEIP(t *testing.T) {
	nodes, err := config.ParsePublication([]byte(`[
		{"ip": "192.0.2.1", "eip": "203.0.113.9"},
		{"ip": "192.0.2.2", "eip": "::ffff:203.0.113.8"},
		{"ip": "192.0.2.3", "eip": "Frankfurt"},
		{"ip": "192.0.2.4"}
	]`))
	if err != nil {
		t.Fatal(err)
	}
	p := &plan{config: &config.Config{}, published: publications{"dyn": {nodes: nodes}}}
	now := p.published["dyn"]
	e := &config.Escaper{Name: "dyn", Type: "direct_float"}
	if err := p.fits(e, &now); err != nil {
		t.Errorf("without a probe: %v", err)
	}
	e.Probe = config.Probe{HTTP: "http://ip.example/", EIP: true}
	if err := p.fits(e, &now); err == nil || err.Error() != `node 3: eip: want an IP address, for the probe to compare with, got "Frankfurt"` {
		t.Errorf("with a probe: %v", err)
	}
	var got []string
	for _, n := range p.floating(e) {
		got = append(got, strings.Join(texts(n.EIP), " "))
	}
	if want := []string{"203.0.113.9", "203.0.113.8", "", ""}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func texts(list []netip.Addr) []string {
	var out []string
	for _, a := range list {
		out = append(out, a.String())
	}
	return out
}
