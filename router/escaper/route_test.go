package escaper_test

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"wayout/router/escaper"
	"wayout/selection"
)

// routed is a table of escapers a, b and c, of one path each, and a route to them
// in this order, which requests begin with.
func routed(tb testing.TB, o escaper.RouteOptions) *escaper.Table {
	tb.Helper()
	o.Name = "out"
	var all []escaper.Escaper
	for i, name := range []string{"a", "b", "c"} {
		all = append(all, direct(tb, escaper.Options{Name: name, EnableSelection: true, Nodes: []escaper.NodeOptions{
			{ID: "n", V4: netip.AddrFrom4([4]byte{127, 0, 1, byte(i + 1)}), Weight: 1},
		}}))
		if o.Rules != nil || len(o.Next) < 3 {
			o.Next = append(o.Next, escaper.Next{Escaper: name, Weight: 1})
		}
	}
	r, err := escaper.NewRoute(o)
	if err != nil {
		tb.Fatal(err)
	}
	t, err := escaper.NewTable(append(all, r)...)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func TestRules(t *testing.T) {
	t.Parallel()
	const a, b, c = 0, 1, 2
	nets := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	tab := routed(t, escaper.RouteOptions{Rules: escaper.NewRules(escaper.RulesOptions{
		Exact:   []escaper.HostRule{{Node: b, Names: []string{"exact.test", "192.0.2.7", "2001:db8::7"}}, {Node: c, Names: []string{"exact.test"}}},
		Suffix:  []escaper.HostRule{{Node: b, Names: []string{"test"}}, {Node: c, Names: []string{".deep.test", "Upper.Test"}}},
		Regex:   []escaper.RegexRule{{Node: c, Exprs: []*regexp.Regexp{regexp.MustCompile(`\A(?:r[0-9]+|s)\.example\z`)}}},
		Nets:    []escaper.NetRule{{Node: b, Nets: nets("192.0.2.0/24", "::/0")}, {Node: c, Nets: nets("192.0.2.128/25", "2001:db8::/32")}},
		Users:   []escaper.HostRule{{Node: c, Names: []string{"carol"}}},
		Clients: []escaper.NetRule{{Node: b, Nets: nets("198.51.100.0/24")}, {Node: c, Nets: nets("198.51.100.9/32", "fd00::/8")}},
		Default: a,
	})})
	for _, x := range []struct {
		target, user, client string
		node                 int
	}{
		{"exact.test", "", "", b}, // the first of two
		{"EXACT.test.", "", "", b},
		{"other.test", "", "", b},
		{"test", "", "", b},
		{"deep.test", "", "", c},
		{"x.y.deep.test", "", "", c},
		{"indeep.test", "", "", b},
		{"x.upper.test", "", "", c},
		{"testing", "", "", a},
		{"r12.example", "", "", c},
		{"R12.Example.", "", "", c},
		{"s.example", "", "", c},
		{"xs.example", "", "", a},
		{"r.example", "", "", a},
		{"192.0.2.7", "", "", b},
		{"192.0.2.8", "", "", b},
		{"192.0.2.200", "", "", c},
		{"::ffff:192.0.2.200", "", "", c},
		{"198.51.100.1", "", "", a},
		{"2001:db8::7", "", "", b},
		{"2001:db8::8", "", "", c},
		{"2001:db9::8", "", "", b},
		{"exact.test", "carol", "", c}, // who asks goes before what is asked for
		{"elsewhere", "bob", "", a},
		{"elsewhere", "", "198.51.100.8", b},
		{"elsewhere", "", "198.51.100.9", c},
		{"elsewhere", "", "::ffff:198.51.100.9", c},
		{"elsewhere", "", "fd12::1", c},
		{"elsewhere", "carol", "198.51.100.8", c},
	} {
		to := escaper.Target{Host: x.target, Port: 80}
		if addr, err := netip.ParseAddr(x.target); err == nil {
			to = escaper.Target{Addr: addr, Port: 80}
		}
		req := request(to, selection.Selection{})
		req.User = x.user
		if x.client != "" {
			req.Client = netip.AddrPortFrom(addr(x.client), 1000)
		}
		d, err := tab.Decide(req)
		if want := []string{"a", "b", "c"}[x.node]; err != nil || len(d.Way) != 2 || d.Way[1] != want {
			t.Errorf("%s of %q at %q: %v, %v; want %s", x.target, x.user, x.client, d.Way, err, want)
		}
	}
	if _, err := escaper.NewRoute(escaper.RouteOptions{
		Name: "r", Next: []escaper.Next{{Escaper: "a"}},
		Rules: escaper.NewRules(escaper.RulesOptions{Suffix: []escaper.HostRule{{Node: 1, Names: []string{"test"}}}}),
	}); err == nil {
		t.Error("a rule may name a node that is not there")
	}
}

// TestRouteStates: what becomes of paths, a route knows at once.
func TestRouteStates(t *testing.T) {
	t.Parallel()
	tab := routed(t, escaper.RouteOptions{Policy: selection.Serial, Next: []escaper.Next{{Escaper: "b", Weight: 1}, {Escaper: "a", Weight: 1}, {Escaper: "c"}}})
	way := func() string {
		d, err := tab.Decide(request(escaper.Target{Host: "x.test", Port: 80}, selection.Selection{}))
		if err != nil {
			if !errors.Is(err, escaper.ErrNoPath) {
				t.Errorf("%v", err)
			}
			return "none"
		}
		return strings.Join(d.Way, " ")
	}
	steps := []struct {
		do   func()
		want string
	}{
		{func() {}, "out b"},
		{tab.Path("b/n").Drain, "out a"},
		{tab.Path("a/n").Drain, "none"}, // a weight of 0 is not the policy's
		{tab.Path("b/n").Undrain, "out b"},
		{func() {
			tab.Path("b/n").SetFamilyState(selection.V4, escaper.Down, "gone")
			tab.Publish()
		}, "none"},
		{tab.Path("a/n").Undrain, "out a"},
	}
	for i, s := range steps {
		s.do()
		if got := way(); got != s.want {
			t.Errorf("step %d: %s, want %s", i, got, s.want)
		}
	}
	// Of the other family there is nothing at all.
	_, err := tab.Decide(request(escaper.Target{Addr: addr("2001:db8::1"), Port: 80}, selection.Selection{}))
	if !errors.Is(err, escaper.ErrNoPath) || escaper.StatusOf(err) != 503 {
		t.Errorf("%v", err)
	}
}

func TestTableRefuses(t *testing.T) {
	t.Parallel()
	route := func(name string, next ...string) escaper.Escaper {
		o := escaper.RouteOptions{Name: name}
		for _, n := range next {
			o.Next = append(o.Next, escaper.Next{Escaper: n, Weight: 1})
		}
		r, err := escaper.NewRoute(o)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	d := direct(t, escaper.Options{Name: "d", Nodes: []escaper.NodeOptions{{ID: "n", V4: addr("127.0.0.1")}}})
	for name, all := range map[string][]escaper.Escaper{
		"leads back to itself":   {route("a", "b"), route("b", "c", "d"), route("c", "a"), d},
		"there is no escaper no": {route("a", "no")},
		"there are two":          {d, d},
	} {
		if _, err := escaper.NewTable(all...); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestExplainIsTheWay: the way that is told is the one that is judged, also where
// a policy draws.
func TestExplainIsTheWay(t *testing.T) {
	t.Parallel()
	tab := routed(t, escaper.RouteOptions{EnableSelection: true, Policy: selection.Random})
	seen := map[string]bool{}
	for range 200 {
		x, err := tab.Explain(t.Context(), request(escaper.Target{Addr: addr("192.0.2.1"), Port: 80}, selection.Selection{}), false)
		if err != nil || len(x.Chain) != 2 || x.Choice.Path != x.Chain[1]+"/n" || !x.Any {
			t.Fatalf("%+v, %v", x, err)
		}
		if !slices.ContainsFunc(x.Steps, func(s string) bool { return s == fmt.Sprintf("route out sends it to %s, by its policy", x.Chain[1]) }) {
			t.Fatalf("%q", x.Steps)
		}
		seen[x.Choice.Path] = true
	}
	if len(seen) != 3 {
		t.Errorf("the policy took %v", seen)
	}
	sel := byClient(selection.Entry{Escaper: "out", Value: selection.ID("b")}, selection.Entry{Escaper: "b", Value: selection.Index(1)})
	x, err := tab.Explain(t.Context(), request(escaper.Target{Addr: addr("192.0.2.1"), Port: 80}, sel), false)
	if err != nil || x.Any || x.Choice.Path != "b/n" || x.Source != addr("127.0.1.2") || x.Choice.Source != selection.SourceHeader {
		t.Errorf("%+v, %v", x, err)
	}
	// A refusal tells how far it went.
	x, err = tab.Explain(t.Context(), request(escaper.Target{Addr: addr("127.0.0.1"), Port: 80}, byClient(selection.Entry{Escaper: "a", Value: selection.ID("m")})), false)
	if !errors.Is(err, selection.ErrUnknown) || x.Choice.Asked != "m" {
		t.Errorf("%+v, %v", x, err)
	}
}
