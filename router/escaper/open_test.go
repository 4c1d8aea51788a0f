package escaper_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/selection"
)

// checks is an escaper with a path in each state, and another escaper that
// requests do not pass. None of its addresses has to exist: what is tested
// fails before a dial.
func checks(t *testing.T, n *names) *escaper.Door {
	t.Helper()
	f, err := escaper.NewFilter(nil, nil, []string{"203.0.113.0/24", "2001:db8:bad::/48"})
	if err != nil {
		t.Fatal(err)
	}
	out := direct(t, escaper.Options{
		Name: "out", EnableSelection: true, StrictIndex: true, Filter: f, Resolver: n,
		Nodes: []escaper.NodeOptions{
			{ID: "four", V4: addr("198.51.100.1")},
			{ID: "gone", V4: addr("198.51.100.2")},
			{ID: "half", V4: addr("198.51.100.3"), V6: addr("2001:db8::3")},
			{ID: "slow", V4: addr("198.51.100.4")},
			{ID: "new", V6: addr("2001:db8::5")},
			{ID: "dual", V4: addr("198.51.100.6"), V6: addr("2001:db8::6")},
			{ID: "blind", V4: addr("198.51.100.7"), V6: addr("2001:db8::7")},
		},
	})
	closed := direct(t, escaper.Options{Name: "closed", Filter: f, Nodes: []escaper.NodeOptions{{ID: "four", V4: addr("198.51.100.1")}}})
	d := door(t, out, closed)
	tab := d.Table()
	tab.Path("out/gone").SetFamilyState(selection.V4, escaper.Down, "address 198.51.100.2 is not on this host")
	tab.Path("out/half").SetFamilyState(selection.V4, escaper.Down, "address 198.51.100.3 is not on this host")
	tab.Path("out/slow").Drain()
	tab.Path("out/new").SetFamilyState(selection.V6, escaper.Tentative, "address 2001:db8::5 is tentative")
	for _, f := range []selection.Family{selection.V4, selection.V6} {
		tab.Path("out/blind").SetFamilyState(f, escaper.Down, "interface eth9 is down")
	}
	tab.Publish()
	return d
}

func TestRefusals(t *testing.T) {
	n := &names{
		hosts: map[string]resolve.Answer{
			"four.example":    {V4: addrs("192.0.2.1")},
			"six.example":     {V6: addrs("2001:db8:1::1")},
			"denied.example":  {V4: addrs("203.0.113.1", "::ffff:127.0.0.1"), V6: addrs("2001:db8:bad::1", "::1", "64:ff9b::7f00:1")},
			"denied6.example": {V6: addrs("2001:db8:bad::1")},
			"mixed.example":   {V4: addrs("203.0.113.1"), V6: addrs("2001:db8:1::1")},
		},
		errs: map[string]error{
			"late.example":   &resolve.Error{Host: "late.example", Kind: resolve.ErrTimeout},
			"broken.example": &resolve.Error{Host: "broken.example", Kind: resolve.ErrServer},
		},
	}
	allow, err := selection.ParseGlobs([]string{"out/*o*"}) // four, gone, slow
	if err != nil {
		t.Fatal(err)
	}
	id := func(escaper, id string) selection.Entry {
		return selection.Entry{Escaper: escaper, Value: selection.ID(id)}
	}
	index := func(i uint64) selection.Entry {
		return selection.Entry{Escaper: "out", Value: selection.Index(i)}
	}
	const ok4, ok6, bad4, bad6 = "192.0.2.1", "2001:db8:1::1", "203.0.113.1", "2001:db8:bad::1"
	tests := []struct {
		name   string
		sel    selection.Selection
		allow  *selection.Globs
		server string // the request's escaper; "" is out
		to     string
		want   error
		text   string // part of the error
		choice escaper.Choice
	}{
		// Row by row.
		{name: "unknown id", sel: byClient(id("out", "nobody")), to: ok4, want: selection.ErrUnknown, text: "escaper out: unknown id", choice: escaper.Choice{Source: selection.SourceHeader, Asked: "nobody"}},
		{name: "unknown escaper", sel: byClient(id("nowhere", "four")), to: ok4, want: selection.ErrUnknown, text: `unknown escaper "nowhere"`},
		{name: "address of no node", sel: byClient(id("out", "198.51.100.99")), to: ok4, want: selection.ErrUnknown, text: "198.51.100.99 belongs to no node"},
		{name: "strict index", sel: byClient(index(8)), to: ok4, want: selection.ErrUnknown, text: "out of range"},
		{name: "strict index zero", sel: byClient(index(0)), to: ok4, want: selection.ErrUnknown},
		{name: "not passed", sel: byClient(id("closed", "four")), to: ok4, want: selection.ErrNotPassed, text: "does not pass escaper closed"},
		{name: "not passed beside a good one", sel: byClient(id("out", "four"), id("closed", "four")), to: ok4, want: selection.ErrNotPassed},
		{name: "the operator's map may name what other servers pass", sel: selection.Selection{User: selection.Layer{id("closed", "four")}}, to: bad4, want: escaper.ErrProhibited, choice: escaper.Choice{Source: selection.SourcePolicy}},
		{name: "disabled", server: "closed", sel: byClient(id("closed", "four")), to: ok4, want: selection.ErrDisabled, text: "escaper closed"},
		{name: "disabled for user names", server: "closed", sel: selection.Selection{Username: selection.Layer{id("closed", "four")}}, to: ok4, want: selection.ErrDisabled},
		{name: "forbidden", allow: allow, sel: byClient(id("out", "half")), to: ok6, want: selection.ErrForbidden, text: "path out/half"},
		{name: "forbidden by index", allow: allow, sel: byClient(index(3)), to: ok6, want: selection.ErrForbidden, choice: escaper.Choice{Path: "out/half", Source: selection.SourceHeader, Asked: "3"}},
		{name: "forbidden by address", allow: allow, sel: byClient(id("out", "2001:DB8::0:3")), to: ok6, want: selection.ErrForbidden, text: "path out/half"},
		{name: "down", sel: byClient(id("out", "gone")), to: ok4, want: selection.ErrDown, text: "path out/gone is down: address 198.51.100.2 is not on this host", choice: escaper.Choice{Path: "out/gone", Source: selection.SourceHeader, Asked: "gone"}},
		{name: "draining", sel: byClient(id("out", "slow")), to: ok4, want: selection.ErrDown, text: "path out/slow is draining"},
		{name: "tentative", sel: byClient(id("out", "new")), to: ok6, want: selection.ErrDown, text: "path out/new is probing: address 2001:db8::5 is tentative"},
		{name: "down for the user", sel: selection.Selection{User: selection.Layer{id("out", "gone")}}, to: ok4, want: selection.ErrDown},
		{name: "one family down", sel: byClient(id("out", "half")), to: ok4, want: selection.ErrDown, text: "path out/half is down for IPv4: address 198.51.100.3 is not on this host"},
		{name: "one family down, pinned", sel: byClient(id("out", "198.51.100.3")), to: ok6, want: selection.ErrDown},
		{name: "family", sel: byClient(id("out", "four")), to: ok6, want: selection.ErrFamily, text: "path out/four has no address for IPv6"},
		{name: "family, mapped", sel: byClient(id("out", "new")), to: "::ffff:192.0.2.1", want: selection.ErrDown},
		{name: "family of a pinned address", sel: byClient(id("out", "198.51.100.6")), to: ok6, want: selection.ErrFamily, text: "selected by its address 198.51.100.6"},
		{name: "prohibited", sel: byClient(id("out", "four")), to: bad4, want: escaper.ErrProhibited},
		{name: "prohibited, mapped", sel: byClient(id("out", "four")), to: "::ffff:203.0.113.1", want: escaper.ErrProhibited},
		{name: "ingress address of no node", sel: selection.Selection{Server: selection.Layer{id("out", "198.51.100.99")}}, to: ok4, want: selection.ErrDown, text: "belongs to no node"},

		// An earlier row hides the later ones.
		{name: "unknown before not passed", sel: byClient(id("closed", "four"), id("nowhere", "x")), to: ok4, want: selection.ErrUnknown},
		{name: "unknown node of an escaper not passed", sel: byClient(id("closed", "nobody")), to: ok4, want: selection.ErrUnknown, text: "escaper closed"},
		{name: "not passed before disabled", server: "closed", sel: byClient(id("closed", "four"), id("out", "four")), to: ok4, want: selection.ErrNotPassed},
		{name: "disabled before forbidden", server: "closed", allow: allow, sel: byClient(id("closed", "four")), to: ok4, want: selection.ErrDisabled},
		{name: "forbidden before down", allow: allow, sel: byClient(id("out", "blind")), to: ok4, want: selection.ErrForbidden},
		{name: "down before prohibited", sel: byClient(id("out", "gone")), to: bad4, want: selection.ErrDown},
		{name: "down before family", sel: byClient(id("out", "gone")), to: ok6, want: selection.ErrDown},
		{name: "one family down before prohibited", sel: byClient(id("out", "half")), to: bad4, want: selection.ErrDown},
		{name: "prohibited before family", sel: byClient(id("out", "four")), to: bad6, want: escaper.ErrProhibited},
		{name: "down before the resolver", sel: byClient(id("out", "gone")), to: "broken.example", want: selection.ErrDown},

		// Names.
		{name: "name, dns", sel: byClient(id("out", "four")), to: "none.example", want: escaper.ErrDNS},
		{name: "name, dns server", sel: byClient(id("out", "four")), to: "broken.example", want: escaper.ErrDNS},
		{name: "name, dns timeout", sel: byClient(id("out", "four")), to: "late.example", want: escaper.ErrDNSTimeout},
		{name: "name, family", sel: byClient(id("out", "four")), to: "six.example", want: selection.ErrFamily, text: "path out/four has no address for IPv6"},
		{name: "name, family of a pinned address", sel: byClient(id("out", "2001:db8::6")), to: "four.example", want: selection.ErrFamily},
		{name: "name, one family down", sel: byClient(id("out", "half")), to: "four.example", want: selection.ErrDown, text: "path out/half is down for IPv4: address"},
		{name: "name, prohibited", sel: byClient(id("out", "dual")), to: "denied.example", want: escaper.ErrProhibited},
		{name: "name, prohibited before family", sel: byClient(id("out", "four")), to: "denied6.example", want: escaper.ErrProhibited},
		{name: "name, prohibited before one family down", sel: byClient(id("out", "half")), to: "denied.example", want: escaper.ErrProhibited},
		{name: "name, only the other family is permitted", sel: byClient(id("out", "four")), to: "mixed.example", want: escaper.ErrProhibited},

		// What binds clients alone.
		{name: "operator may where clients may not", server: "closed", sel: selection.Selection{User: selection.Layer{id("closed", "four")}}, allow: allow, to: bad4, want: escaper.ErrProhibited, choice: escaper.Choice{Path: "closed/four", Source: selection.SourceUser, Asked: "four"}},
		{name: "server may where clients may not", server: "closed", sel: selection.Selection{Server: selection.Layer{id("closed", "four")}}, allow: allow, to: bad4, want: escaper.ErrProhibited, choice: escaper.Choice{Path: "closed/four", Source: selection.SourceServer, Asked: "four"}},
		{name: "operator over client", allow: allow, sel: selection.Selection{User: selection.Layer{id("out", "four")}, Client: selection.Layer{id("out", "nobody")}}, to: bad4, want: escaper.ErrProhibited, choice: escaper.Choice{Path: "out/four", Source: selection.SourceUser, Asked: "four"}},

		// The policy.
		{name: "policy, prohibited", to: bad4, want: escaper.ErrProhibited, choice: escaper.Choice{Source: selection.SourcePolicy}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := checks(t, n)
			r := request(escaper.Target{Port: 80}, tt.sel)
			if a, err := netip.ParseAddr(tt.to); err == nil {
				r.Target.Addr = a
			} else {
				r.Target.Host = tt.to
			}
			r.Allow = tt.allow
			if tt.server != "" {
				r.Escaper = tt.server
			}
			r.Choice = escaper.Choice{Path: "left over"}
			c, err := d.Open(context.Background(), r)
			if err == nil {
				_ = c.Close()
			}
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
			for _, other := range []error{
				selection.ErrMalformed, selection.ErrUnknown, selection.ErrNotPassed, selection.ErrDisabled, selection.ErrForbidden, selection.ErrDown,
				selection.ErrFamily, selection.ErrBind, selection.ErrPorts, escaper.ErrProhibited, escaper.ErrDNS, escaper.ErrDNSTimeout, escaper.ErrNoPath,
			} {
				if !errors.Is(other, tt.want) && errors.Is(err, other) {
					t.Errorf("%v is also %v", err, other)
				}
			}
			if tt.choice != (escaper.Choice{}) && r.Choice != tt.choice {
				t.Errorf("choice %+v, want %+v", r.Choice, tt.choice)
			}
			for _, p := range d.Table().Paths() {
				if c := p.Counters(); c != (escaper.Counters{}) {
					t.Errorf("path %s was dialled: %+v", p.Name, c)
				}
			}
		})
	}
}

func TestDoorClosed(t *testing.T) {
	d := door(t, direct(t, escaper.Options{Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	r := request(escaper.Target{Addr: addr("127.0.0.1"), Port: 1}, selection.Selection{})
	if d.Swap(nil) == nil {
		t.Error("Swap returned no table")
	}
	if _, err := d.Open(context.Background(), r); !errors.Is(err, escaper.ErrClosed) {
		t.Errorf("closed door: %v", err)
	}
	if r.Escaper = "nowhere"; r.Target.String() != "127.0.0.1:1" {
		t.Errorf("target %s", r.Target)
	}
	named := direct(t, escaper.Options{Name: "named", Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}})
	d = door(t, named)
	if d.Table().Escaper("named") != named || d.Table().Escaper("out") != nil || named.Name() != "named" {
		t.Error("escapers are not found by name")
	}
	if _, err := d.Open(context.Background(), r); !errors.Is(err, selection.ErrUnknown) {
		t.Errorf("unknown escaper of a server: %v", err)
	}
	r = request(escaper.Target{Host: "www.example", Port: 80}, selection.Selection{})
	if r.Escaper = "named"; r.Target.String() != "www.example:80" {
		t.Errorf("target %s", r.Target)
	}
	if _, err := d.Open(context.Background(), r); !errors.Is(err, escaper.ErrDNS) {
		t.Errorf("a name without a resolver: %v", err)
	}
	var zero escaper.Door
	if _, err := zero.Open(context.Background(), r); !errors.Is(err, escaper.ErrClosed) {
		t.Errorf("zero door: %v", err)
	}
}

// TestPolicy shows which paths a request without a selection may take.
func TestPolicy(t *testing.T) {
	four := listen(t, "127.0.0.1:0").hold(t)
	six := listen(t, "[::1]:0").hold(t)
	n := &names{hosts: map[string]resolve.Answer{
		"four.example": {V4: addrs("127.0.0.1")},
		"six.example":  {V6: addrs("::1")},
		"both.example": {V4: addrs("127.0.0.1"), V6: addrs("2001:db8::1")}, // the second goes nowhere
		"bad.example":  {V4: addrs("127.0.0.1"), V6: addrs("fe80::1")},
	}}
	nodes := []escaper.NodeOptions{
		{ID: "a", V4: addr("127.0.0.2"), Weight: 1},
		{ID: "b", V4: addr("127.0.0.3"), Weight: 1},
		{ID: "never", V4: addr("127.0.0.4")},
		{ID: "six", V6: addr("::1"), Weight: 1},
	}
	tests := []struct {
		name  string
		nodes []escaper.NodeOptions
		down  []string // "a 4"
		to    string
		want  []string // IDs that are taken, sorted
		err   error
	}{
		{name: "literal", nodes: nodes, to: "4", want: []string{"a", "b"}},
		{name: "literal IPv6", nodes: nodes, to: "6", want: []string{"six"}},
		{name: "one down", nodes: nodes, down: []string{"a 4"}, to: "4", want: []string{"b"}},
		{name: "all of the family down", nodes: nodes, down: []string{"a 4", "b 4"}, to: "4", err: escaper.ErrNoPath},
		{name: "all down", nodes: nodes, down: []string{"a 4", "b 4", "never 4", "six 6"}, to: "six.example", err: escaper.ErrNoPath},
		{name: "family nobody has", nodes: nodes[:2], to: "6", err: escaper.ErrNoPath},
		{name: "name of a family nobody has", nodes: nodes[:2], to: "six.example", err: escaper.ErrNoPath},
		{name: "none by policy", nodes: nodes[2:3], to: "four.example", err: escaper.ErrNoPath},
		{name: "name", nodes: nodes, to: "four.example", want: []string{"a", "b"}},
		{name: "name of the other family", nodes: nodes, to: "six.example", want: []string{"six"}},
		{name: "name, family down", nodes: nodes, down: []string{"six 6"}, to: "six.example", err: escaper.ErrNoPath},
		{name: "name whose IPv6 is prohibited", nodes: nodes, to: "bad.example", want: []string{"a", "b"}},
		{name: "uniform", nodes: nodes[:2], to: "both.example", want: []string{"a", "b"}},
		{
			name: "half a path is not picked for its other half",
			nodes: []escaper.NodeOptions{
				{ID: "x", V4: addr("127.0.0.2"), V6: addr("::1"), Weight: 1},
				{ID: "y", V4: addr("127.0.0.3"), V6: addr("2001:db8::9"), Weight: 1},
			},
			down: []string{"x 4", "y 6"}, to: "four.example", want: []string{"y"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := door(t, direct(t, escaper.Options{Nodes: tt.nodes, Resolver: n}))
			for _, s := range tt.down {
				id, f, _ := strings.Cut(s, " ")
				fam := selection.V4
				if f == "6" {
					fam = selection.V6
				}
				if !d.Table().Path("out/"+id).SetFamilyState(fam, escaper.Down, "gone") {
					t.Fatalf("%s was down already", s)
				}
			}
			d.Table().Publish()
			var took []string
			for range 40 {
				var r *escaper.Request
				at := four
				switch tt.to {
				case "4":
					r = request(literal(four.addr), selection.Selection{})
				case "6":
					r, at = request(literal(six.addr), selection.Selection{}), six
				case "six.example":
					r, at = request(escaper.Target{Host: tt.to, Port: six.addr.Port()}, selection.Selection{}), six
				default:
					r = request(escaper.Target{Host: tt.to, Port: four.addr.Port()}, selection.Selection{})
				}
				c, err := d.Open(context.Background(), r)
				if !errors.Is(err, tt.err) {
					t.Fatalf("got %v, want %v", err, tt.err)
				}
				if err != nil {
					if selection.Result(err) != "down" || errors.Is(err, selection.ErrFamily) {
						t.Errorf("%v counts as %s", err, selection.Result(err))
					}
					break
				}
				took = append(took, c.Path.ID)
				if saw := at.next(t); saw != c.Source || saw.Addr() != c.Path.V4 && saw.Addr() != c.Path.V6 {
					t.Errorf("the origin saw %s, path %s says %s", saw, c.Path.Name, c.Source)
				}
				if r.Choice.Path != c.Path.Name || r.Choice.Source != selection.SourcePolicy || r.Choice.Asked != "" {
					t.Errorf("choice %+v, path %s", r.Choice, c.Path.Name)
				}
				_ = c.Close()
			}
			slices.Sort(took)
			if took = slices.Compact(took); !slices.Equal(took, tt.want) {
				t.Errorf("took %v, want %v", took, tt.want)
			}
		})
	}
}

// TestAlternating is 400 requests whose selection changes with each: every one
// leaves by the address it asked for.
func TestAlternating(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	var nodes []escaper.NodeOptions
	for _, s := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5", "127.0.0.6"} {
		nodes = append(nodes, escaper.NodeOptions{ID: "n" + s[len(s)-1:], V4: addr(s), Weight: 1})
	}
	d := door(t, direct(t, escaper.Options{EnableSelection: true, Nodes: nodes}))
	for i := range 400 {
		n := nodes[i%len(nodes)]
		v := selection.ID(n.ID)
		switch i / len(nodes) % 4 {
		case 1:
			v = selection.Index(uint64(i + 1)) // wraps
		case 2:
			v = selection.ID(n.V4.String())
		case 3:
			v = selection.ID("::ffff:" + n.V4.String())
		}
		r := request(literal(o.addr), byClient(selection.Entry{Escaper: "out", Value: v}))
		c, err := d.Open(context.Background(), r)
		if err != nil {
			t.Fatal(err)
		}
		saw := o.next(t)
		if saw.Addr() != n.V4 || saw != c.Source || c.Path.ID != n.ID || c.Remote != o.addr || r.Choice.Asked != v.String() {
			t.Fatalf("request %d for %s (%s): the origin saw %s, %s by %s", i, n.ID, v, saw, c.Source, c.Path.Name)
		}
		_ = c.Close()
	}
}

// TestPickKey: the hashing policy keeps a key on one path, and spreads keys.
func TestPickKey(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	n := &names{hosts: map[string]resolve.Answer{}}
	for _, s := range "abcdefghijklmnop" {
		n.hosts[string(s)+".example"] = resolve.Answer{V4: addrs("127.0.0.1")}
	}
	for _, word := range []string{"client_ip", "user", "host"} {
		t.Run(word, func(t *testing.T) {
			key, err := escaper.ParsePickKey(word)
			if err != nil {
				t.Fatal(err)
			}
			d := door(t, direct(t, escaper.Options{
				Policy: selection.Rendezvous, PickKey: key, Resolver: n,
				Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}, {ID: "c", V4: addr("127.0.0.4"), Weight: 1}},
			}))
			seen := map[string]bool{}
			for i := range 16 {
				var first string
				for try := range 3 {
					r := request(escaper.Target{Host: "a.example", Port: o.addr.Port()}, selection.Selection{})
					r.User = "alice"
					switch letter := string(rune('a' + i)); word {
					case "client_ip":
						r.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), uint16(1000+try))
					case "user":
						r.User = letter
					case "host":
						r.Target.Host = letter + ".example"
					}
					c, err := d.Open(context.Background(), r)
					if err != nil {
						t.Fatal(err)
					}
					if try == 0 {
						first = c.Path.ID
					} else if c.Path.ID != first {
						t.Errorf("key %d took %s, then %s", i, first, c.Path.ID)
					}
					seen[first] = true
					_ = c.Close()
				}
			}
			if len(seen) != 3 {
				t.Errorf("16 keys took only %v", seen)
			}
		})
	}
	if _, err := escaper.ParsePickKey("session"); err == nil {
		t.Error("an unknown pick key is accepted")
	}
}
