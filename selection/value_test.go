package selection_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"wayout/selection"
)

func TestValueString(t *testing.T) {
	idx, id, at := selection.Index, selection.ID, selection.Address
	for _, c := range []struct {
		v    selection.Value
		want string
	}{
		{selection.Value{}, ""},
		{idx(7), "7"},
		{id("fra-2"), "fra-2"},
		{id("2001:DB8::1"), "2001:DB8::1"}, // as it was given
		{at(addr("2001:DB8::1")), "2001:db8::1"},
		{at(addr("::ffff:192.0.2.1")), "192.0.2.1"},
		{at(netip.Addr{}), "invalid IP"},
		{idx(7).At(addr("192.0.2.1")), "7@192.0.2.1"},
		{id("six").At(addr("2001:db8::1")), "six@2001:db8::1"},
		{id("six").At(addr("2001:db8::1")).At(addr("2001:db8::2")), "six@2001:db8::2"},
		{id("six").At(addr("2001:db8::1")).At(netip.Addr{}), "six"},
		{selection.Inline(selection.InlineNode{ID: "n", V4: addr("192.0.2.1")}), "n"},
		{selection.Inline(selection.InlineNode{V4: addr("::ffff:192.0.2.1"), V6: addr("2001:db8::1")}), "192.0.2.1"},
		{selection.Inline(selection.InlineNode{V6: addr("2001:db8::1")}), "2001:db8::1"},
	} {
		if got := c.v.String(); got != c.want {
			t.Errorf("String = %q, want %q", got, c.want)
		}
	}
}

func TestInline(t *testing.T) {
	now := time.Now() // with a monotonic part, and a zone of its own
	n := selection.InlineNode{ID: "n", V4: addr("::ffff:192.0.2.1"), V6: addr("2001:db8::1"), Expire: now.In(time.FixedZone("x", 3600))}
	v := selection.Inline(n)
	got, ok := v.Inline()
	if want := (selection.InlineNode{ID: "n", V4: addr("192.0.2.1"), V6: addr("2001:db8::1"), Expire: now.Round(0).UTC()}); !ok || got != want {
		t.Errorf("Inline = %v, %v, want %v", got, ok, want)
	}
	n.Expire = now.UTC()
	if selection.Inline(n) != v {
		t.Error("one node makes two values")
	}
	n.Expire = now.Add(time.Nanosecond)
	if selection.Inline(n) == v {
		t.Error("two nodes make one value")
	}
	far := time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // beyond what 64 bits of nanoseconds hold
	if got, _ := selection.Inline(selection.InlineNode{Expire: far}).Inline(); !got.Expire.Equal(far) {
		t.Errorf("Expire = %v, want %v", got.Expire, far)
	}
	if got, _ := selection.Inline(selection.InlineNode{}).Inline(); !got.Expire.IsZero() {
		t.Errorf("Expire = %v, want zero", got.Expire)
	}
	for _, v := range []selection.Value{{}, selection.Index(1), selection.ID("n"), selection.Address(addr("192.0.2.1"))} {
		if n, ok := v.Inline(); ok {
			t.Errorf("%v is the inline node %v", v, n)
		}
	}
}

func TestResolvePinned(t *testing.T) {
	nodes := []selection.Node{
		node("dual", "198.51.100.11", "2001:db8:100::11"),
		prefixNode("six", "", "2001:db8:6::/64"),
		node("192.0.2.99", "", "2001:db8::99"), // its ID is nobody's address
		{ID: "device", Unbound: selection.V4, Weight: 1},
	}
	idx, id, at := selection.Index, selection.ID, selection.Address
	inline := func(v4, v6 string) selection.Value {
		return selection.Inline(selection.InlineNode{ID: "dual", V4: addr(v4), V6: addr(v6)})
	}
	for _, c := range []struct {
		value selection.Value
		node  int
		addr  string
		kind  error
		err   string
	}{
		{value: id("dual").At(addr("198.51.100.11")), addr: "198.51.100.11"},
		{value: id("dual").At(addr("::ffff:198.51.100.11")), addr: "198.51.100.11"},
		{value: id("dual").At(addr("2001:db8:100::11")), addr: "2001:db8:100::11"},
		{value: idx(5).At(addr("2001:db8:100::11")), addr: "2001:db8:100::11"},
		{value: id("six").At(addr("2001:db8:6::abcd")), node: 1, addr: "2001:db8:6::abcd"},
		{value: id("2001:db8:6::abcd").At(addr("2001:db8:6::abcd")), node: 1, addr: "2001:db8:6::abcd"},
		{value: id("192.0.2.99").At(addr("2001:db8::99")), node: 2, addr: "2001:db8::99"},

		{value: id("six").At(addr("2001:db8:7::1")), kind: selection.ErrMismatch, err: `address "2001:db8:7::1" is not that of path "six"`},
		{value: id("six").At(addr("198.51.100.11")), kind: selection.ErrMismatch, err: `path "six"`},
		{value: idx(2).At(addr("198.51.100.11")), kind: selection.ErrMismatch, err: `path "2"`},
		{value: id("dual").At(addr("2001:db8:100::11%eth0")), kind: selection.ErrMismatch, err: "is not that of path"},
		{value: id("dual").At(addr("::ffff:198.51.100.11%eth0")), kind: selection.ErrMismatch, err: "is not that of path"},
		{value: id("192.0.2.99").At(addr("192.0.2.99")), kind: selection.ErrMismatch, err: "is not that of path"},
		{value: id("device").At(addr("198.51.100.11")), kind: selection.ErrMismatch, err: "is not that of path"},
		// Two pins that differ, if on one node.
		{value: id("198.51.100.11").At(addr("2001:db8:100::11")), kind: selection.ErrMismatch, err: "is not that of path"},
		{value: id("2001:db8:6::1").At(addr("2001:db8:6::2")), kind: selection.ErrMismatch, err: "is not that of path"},

		// What At is called on comes first.
		{value: id("nobody").At(addr("198.51.100.11")), kind: selection.ErrUnknown, err: `unknown id "nobody"`},
		{value: selection.Value{}.At(addr("198.51.100.11")), kind: selection.ErrUnknown, err: "nothing selected"},

		{value: at(addr("198.51.100.11")), addr: "198.51.100.11"},
		{value: at(addr("::ffff:198.51.100.11")), addr: "198.51.100.11"},
		{value: at(addr("2001:db8:6::2")), node: 1, addr: "2001:db8:6::2"},
		{value: at(addr("192.0.2.99")), kind: selection.ErrUnknown, err: "address 192.0.2.99 belongs to no node"}, // no ID
		{value: at(addr("2001:db8:6::2%eth0")), kind: selection.ErrUnknown, err: "belongs to no node"},
		{value: at(addr("::ffff:198.51.100.11%eth0")), kind: selection.ErrUnknown, err: "belongs to no node"},
		{value: at(netip.Addr{}), kind: selection.ErrUnknown, err: "no address selected"},

		{value: inline("198.51.100.11", ""), addr: "198.51.100.11"},
		{value: inline("198.51.100.11", "2001:db8:6::1"), addr: "198.51.100.11"},
		{value: inline("", "2001:db8:6::1"), node: 1, addr: "2001:db8:6::1"},
		{value: inline("192.0.2.99", "2001:db8:6::1"), kind: selection.ErrUnknown, err: "address 192.0.2.99 belongs to no node"},
		{value: inline("", ""), kind: selection.ErrUnknown, err: "no address selected"},
	} {
		p := newPool(t, selection.Options{}, nodes...)
		got, fam, a, err := p.Resolve(c.value)
		if c.err != "" {
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.err) || a.IsValid() {
				t.Errorf("Resolve(%v) = %d, %v, %v, want the error %q", c.value, got, a, err, c.err)
			}
			continue
		}
		if err != nil || got != c.node || a != addr(c.addr) || fam != selection.FamilyOf(a) {
			t.Errorf("Resolve(%v) = %d, %v, %v, %v, want %d, %s", c.value, got, fam, a, err, c.node, c.addr)
		}
	}
}
