package netcfg_test

import (
	"net/netip"
	"strings"
	"testing"

	"wayout/netcfg"
)

// TestRulesDoNotGrow: rules go with uplinks and their prefixes, never with nodes.
func TestRulesDoNotGrow(t *testing.T) {
	count := func(n int) (rules, addresses int) {
		u := isp1()
		u.Addresses = nil
		for i := range n {
			u.Addresses = append(u.Addresses, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
		}
		for _, o := range netcfg.Diff(host().snapshot(), want(u, isp2())).Ops {
			switch o.Kind {
			case netcfg.KindRule:
				rules++
			case netcfg.KindAddress:
				addresses++
			}
		}
		return rules, addresses
	}
	for _, n := range []int{16, 200, 65000} {
		if rules, addresses := count(n); rules != 7 || addresses != n {
			t.Errorf("%d nodes: %d rules and %d addresses, want 7 and %d", n, rules, addresses, n)
		}
	}
}

func TestValidate(t *testing.T) {
	ok := want(isp1(), isp2())
	if err := ok.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what   string
		change func(*netcfg.Want)
		want   string
	}{
		{"table of the host", func(w *netcfg.Want) { w.Layout.TableBase = 200 }, "table_base 200"},
		{"table range over the end", func(w *netcfg.Want) { w.Layout.TableBase = 0xffffffff }, "table_base 4294967295"},
		{"priority after main", func(w *netcfg.Want) { w.Layout.RulePriority = 32766 }, "rule_priority 32766"},
		{"no mark bits", func(w *netcfg.Want) { w.Layout.MarkMask = 0 }, "mark_mask is 0"},
		{"number 0", func(w *netcfg.Want) { w.Uplinks[0].Number = 0 }, "number 0"},
		{"divert nowhere", func(w *netcfg.Want) { *w = diverting(); w.Diverts[0].Interface = "" }, "interface \"\": want 1 to 15 characters"},
		{"divert twice", func(w *netcfg.Want) { *w = diverting(); w.Diverts = append(w.Diverts, w.Diverts[0]) }, "interface lan0 is there twice"},
		{"divert SCTP", func(w *netcfg.Want) { *w = diverting(); w.Diverts[0].Ports[0].Protocol = 132 }, "protocol 132 is neither TCP nor UDP"},
		{"divert from port 0", func(w *netcfg.Want) { *w = diverting(); w.Diverts[0].Ports[0].First = 0 }, "ports 0 to 2000"},
		{"divert backwards", func(w *netcfg.Want) { *w = diverting(); w.Diverts[0].Ports[0].First = 2001 }, "ports 2001 to 2000"},
		{"divert a port twice", func(w *netcfg.Want) { *w = diverting(); w.Diverts[0].Ports[1] = w.Diverts[0].Ports[0] }, "are there twice"},
		{"divert without a mark", func(w *netcfg.Want) { *w = diverting(); w.Answers = netcfg.Mark{} }, "mark 0x0/0x0"},
		{"number too high", func(w *netcfg.Want) { w.Uplinks[0].Number = 256 }, "number 256: want 1 to 252"},
		{"same number", func(w *netcfg.Want) { w.Uplinks[0].Number = 2 }, "have number 2"},
		{"same name", func(w *netcfg.Want) { w.Uplinks[0].Name = "isp2" }, "two uplinks are named isp2"},
		{"same mark", func(w *netcfg.Want) { w.Uplinks[0].Mark.Value = 0x20000 }, "marks of both"},
		{"mark that contains the other", func(w *netcfg.Want) { w.Uplinks[0].Mark = netcfg.Mark{Value: 0x20000, Mask: 0x20000} }, "marks of both"},
		{"mark 0", func(w *netcfg.Want) { w.Uplinks[0].Mark.Value = 0 }, "mark 0x0"},
		{"mark outside its mask", func(w *netcfg.Want) { w.Uplinks[0].Mark.Value = 0x1 }, "mark 0x1"},
		{"mask outside ours", func(w *netcfg.Want) { w.Uplinks[0].Mark.Mask = 0xffff0000 }, "mark_mask 0xff0000"},
		{"no interface", func(w *netcfg.Want) { w.Uplinks[0].Interface = "" }, `interface ""`},
		{"long interface", func(w *netcfg.Want) { w.Uplinks[0].Interface = "interface0123456" }, "1 to 15"},
		{"gateway of the wrong family", func(w *netcfg.Want) { w.Uplinks[0].Gateway4 = netip.MustParseAddr("::1") }, "gateway4 ::1"},
		{"gateway with a zone", func(w *netcfg.Want) { w.Uplinks[0].Gateway6 = netip.MustParseAddr("fe80::1%eth0") }, "gateway6 fe80::1%eth0"},
		{"mapped address", func(w *netcfg.Want) { w.Uplinks[0].Addresses = addrs("::ffff:192.0.2.1") }, "address ::ffff:192.0.2.1"},
		{"an address that is a gateway", func(w *netcfg.Want) { w.Uplinks[1].Addresses = append(w.Uplinks[1].Addresses, w.Uplinks[0].Gateway4) }, "is the gateway of uplink isp1"},
		{"host bits", func(w *netcfg.Want) { w.Uplinks[0].Local = prefixes("10.0.0.1/8") }, "uplink isp1: prefix 10.0.0.1/8"},
		{"host bits, no uplink", func(w *netcfg.Want) { w.Local = prefixes("2001:db8::1/64") }, "no uplink: prefix 2001:db8::1/64"},
		{"no prefix", func(w *netcfg.Want) { w.Local = make([]netip.Prefix, 1) }, "without host bits"},
		{"mapped prefix", func(w *netcfg.Want) { w.Local = prefixes("::ffff:10.0.0.0/104") }, "without host bits"},
		{"half the internet", func(w *netcfg.Want) { w.Local = prefixes("128.0.0.0/1") }, "prefix 128.0.0.0/1: want /8"},
		{"much of the internet", func(w *netcfg.Want) { w.Local = prefixes("2000::/3") }, "prefix 2000::/3: want /32"},
		{"loopback", func(w *netcfg.Want) { w.Local = prefixes("127.0.0.0/8") }, "global unicast"},
		{"link-local", func(w *netcfg.Want) { w.Local = prefixes("fe80::/64") }, "global unicast"},
		{"multicast", func(w *netcfg.Want) { w.Local = prefixes("ff0e::/32") }, "global unicast"},
		{"of this network", func(w *netcfg.Want) { w.Local = prefixes("0.0.0.0/8") }, "global unicast"},
		{"a prefix of two uplinks", func(w *netcfg.Want) {
			w.Uplinks[0].Local, w.Uplinks[1].Local = prefixes("10.60.0.0/24"), prefixes("10.61.0.0/24", "10.60.0.0/24")
		}, "prefix 10.60.0.0/24 is of both uplink isp1 and uplink isp2"},
		{"a prefix with and without an uplink", func(w *netcfg.Want) {
			w.Local, w.Uplinks[1].Local = prefixes("2001:db8:beef::/64"), prefixes("2001:db8:beef::/64")
		}, "prefix 2001:db8:beef::/64 is of both no uplink and uplink isp2"},
		{"a gateway alone", func(w *netcfg.Want) { w.Local = prefixes("203.0.113.1/32") }, "no uplink: prefix 203.0.113.1/32 is the gateway of uplink isp2"},
	} {
		w := want(isp1(), isp2())
		tt.change(&w)
		err := w.Validate()
		if !isErr(err, netcfg.ErrLayout) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got error %v, want one with %q", tt.what, err, tt.want)
		}
	}
}
