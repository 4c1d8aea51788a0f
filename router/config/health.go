package config

import (
	"net/netip"
	"net/url"
	"reflect"
	"strings"
)

// parseURL returns an absolute http or https URL as it is asked for.
func parseURL(s string) (text, bad string) {
	const want = "want an URL with http:// or https://"
	u, err := url.Parse(s)
	switch {
	case err != nil, u.Opaque != "", u.Scheme != "http" && u.Scheme != "https":
		return "", want
	case u.User != nil:
		return "", "an URL with credentials is not supported"
	case u.Fragment != "":
		return "", "a fragment (#...) is not sent"
	case len(s) > 2048:
		return "", "is over 2048 bytes"
	}
	host, bad := parseHost(u.Hostname())
	if bad != "" {
		return "", bad
	}
	if a, err := netip.ParseAddr(host); err == nil && badNodeAddr(a) != "" {
		return "", badNodeAddr(a)
	}
	if p := u.Port(); p != "" {
		if n, ok := parseNumber(p); !ok || n < 1 || n > 65535 {
			return "", "a port is 1 to 65535"
		}
	} else if strings.HasSuffix(u.Host, ":") {
		return "", "a port is 1 to 65535"
	}
	return u.String(), ""
}

func (d *decoder) url(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	u, bad := parseURL(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(u)
}

// publicAddrs decodes one address, or a list with one of each family.
func (d *decoder) publicAddrs(p *place, _ *field, v reflect.Value) {
	var out []netip.Addr
	items := d.items(p)
	if len(items) == 0 {
		d.fail(p, "want at least one address")
	}
	for _, ip := range items {
		s, ok := d.text(ip)
		if !ok {
			continue
		}
		bad := ""
		if out, bad = addEIP(out, s); bad != "" {
			d.fail(ip, "%s", bad)
		}
	}
	v.Set(reflect.ValueOf(out))
}

// checkHealth holds what the keys of health and probe say to each other.
func (d *decoder) checkHealth(e *Escaper) {
	if p := d.places[&e.Health]; p != nil {
		e.Health.On = true
		// Behind a next-hop proxy there is one destination, whatever the number.
		if n := d.find(p, "destinations"); e.Health.Destinations > e.Health.Failures && !e.Proxy() {
			if n == nil {
				n = d.find(p, "failures")
			}
			d.fail(n, "%d failures cannot be to %d destinations", e.Health.Failures, e.Health.Destinations)
		}
	}
	p := d.places[&e.Probe]
	if p == nil {
		return
	}
	tcp, http := d.find(p, "tcp"), d.find(p, "http")
	switch {
	case tcp == nil && http == nil:
		d.failMissing(p, "tcp", "is required, or else http")
	case tcp != nil && http != nil:
		d.fail(http, "give tcp or http, not both")
	}
	if e.Probe.Timeout > e.Probe.Interval {
		at := d.find(p, "timeout")
		if at == nil {
			at = d.find(p, "interval")
		}
		d.fail(at, "timeout is %s and interval %s: a probe has to end before the next", e.Probe.Timeout, e.Probe.Interval)
	}
	if at := d.find(p, "eip"); e.Probe.EIP && http == nil && tcp != nil {
		d.fail(at, "needs http: a connection alone does not say what address it comes from")
	} else if e.Probe.EIP && !e.Float() && !e.saysEIP() {
		d.fail(at, "compares nothing: no node has an eip")
	}
}

// saysEIP says whether any node has an eip.
func (e *Escaper) saysEIP() bool {
	for i := range e.Nodes {
		if len(e.Nodes[i].EIP) > 0 {
			return true
		}
	}
	for i := range e.Peers {
		if len(e.Peers[i].EIP) > 0 {
			return true
		}
	}
	return false
}
