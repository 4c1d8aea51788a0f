package netcfg_test

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

// TestDiverted: the rules say what is led to the host, whoever asked for it.
func TestDiverted(t *testing.T) {
	k, w := host(), diverting()
	w.Diverts = append(w.Diverts, netcfg.Divert{
		Interface: "br0", Rest: netcfg.RestDrop, Ports: []netcfg.DivertPorts{{Protocol: unix.IPPROTO_TCP, Last: 65535}},
	})
	if got := k.snapshot().Diverted(w.Layout); got != nil {
		t.Errorf("before: %v", got)
	}
	p := netcfg.Diff(k.snapshot(), w)
	if !p.Diverts(w.Layout) {
		t.Error("the plan changes nothing of it")
	}
	if err := p.Apply(k); err != nil {
		t.Fatal(err)
	}
	if p := netcfg.Diff(k.snapshot(), w); p.Diverts(w.Layout) {
		t.Errorf("twice is not once: %q", p.Commands())
	}
	got := map[string][]netcfg.DivertPorts{}
	for _, d := range k.snapshot().Diverted(w.Layout) {
		got[d.Interface] = d.Ports
	}
	for _, d := range w.Diverts {
		for _, p := range d.Ports {
			if len(got[d.Interface]) != len(d.Ports) || !slices.Contains(got[d.Interface], p) {
				t.Errorf("%s: %v, want %v", d.Interface, got[d.Interface], d.Ports)
			}
		}
	}
	if len(got) != len(w.Diverts) {
		t.Errorf("%v", got)
	}
	if p := netcfg.Diff(k.snapshot(), diverting()); !p.Diverts(w.Layout) {
		t.Error("that one goes is no change")
	}
	if p := netcfg.Diff(k.snapshot(), func() netcfg.Want { w := w; w.Uplinks = diverting(isp1()).Uplinks; return w }()); p.Empty() || p.Diverts(w.Layout) {
		t.Errorf("an uplink changes it: %q", p.Commands())
	}
}
