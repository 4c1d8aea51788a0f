package selection_test

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"wayout/selection"
)

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func node(id, v4, v6 string) selection.Node {
	return selection.Node{ID: id, V4: addr(v4), V6: addr(v6), Weight: 1}
}

// newPool makes a pool of which every node is usable by all that it has.
func newPool(t testing.TB, o selection.Options, nodes ...selection.Node) *selection.Pool {
	t.Helper()
	p, err := selection.NewPool(nodes, o)
	if err != nil {
		t.Fatal(err)
	}
	for i := range nodes {
		p.SetUsable(i, selection.V4|selection.V6)
	}
	p.Publish()
	return p
}

func TestNewPoolErrors(t *testing.T) {
	for _, c := range []struct {
		name  string
		nodes []selection.Node
		want  string
	}{
		{"empty id", []selection.Node{node("", "192.0.2.1", "")}, "node 1: empty id"},
		{"duplicate id", []selection.Node{node("a", "", ""), node("b", "", ""), node("a", "", "")}, `node 3: id "a" is also that of node 1`},
		{"one address twice", []selection.Node{node("a", "192.0.2.1", ""), node("b", "192.0.2.1", "")}, "node 2: address 192.0.2.1 is also that of node 1"},
		{"one IPv6 address twice", []selection.Node{node("a", "", "2001:db8::1"), node("b", "192.0.2.1", "2001:db8::1")}, "address 2001:db8::1"},
		{"id is a later node's address", []selection.Node{node("192.0.2.1", "192.0.2.2", ""), node("b", "192.0.2.1", "")}, `node 1: id "192.0.2.1" is the address of node 2`},
		{"id is an earlier node's address", []selection.Node{node("b", "192.0.2.1", ""), node("192.0.2.1", "192.0.2.2", "")}, "node 2: id"},
		{"id spells another node's address", []selection.Node{node("2001:DB8:0::1", "", ""), node("b", "", "2001:db8::1")}, "is the address of node 2"},
		{"id maps another node's address", []selection.Node{node("::ffff:192.0.2.1", "", ""), node("b", "192.0.2.1", "")}, "is the address of node 2"},
		{"IPv6 as IPv4", []selection.Node{node("a", "2001:db8::1", "")}, "is not an IPv4 address"},
		{"mapped as IPv4", []selection.Node{node("a", "::ffff:192.0.2.1", "")}, "is not an IPv4 address"},
		{"IPv4 as IPv6", []selection.Node{node("a", "", "192.0.2.1")}, "is not an IPv6 address"},
		{"mapped as IPv6", []selection.Node{node("a", "", "::ffff:192.0.2.1")}, "is not an IPv6 address"},
		{"zone", []selection.Node{node("a", "", "fe80::1%eth0")}, "without a zone"},
	} {
		p, err := selection.NewPool(c.nodes, selection.Options{})
		if err == nil || p != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, err := selection.NewPool(nil, selection.Options{Policy: 200}); err == nil {
		t.Error("an unknown policy makes a pool")
	}
}

func TestResolve(t *testing.T) {
	nodes := []selection.Node{
		node("fra-1", "198.51.100.11", "2001:db8:100::11"),
		node("fra-2", "198.51.100.12", ""),
		node("203.0.113.7", "203.0.113.7", "2001:db8::7"), // its ID is its own address
		node("192.0.2.99", "", "2001:db8::99"),            // its ID is nobody's address
	}
	idx, id := selection.Index, selection.ID
	const none = selection.Family(0)
	type test struct {
		value  selection.Value
		strict bool
		node   int
		fam    selection.Family
		addr   string
		err    string
	}
	tests := []test{
		{value: idx(1), node: 0},
		{value: idx(4), node: 3},
		{value: idx(0), node: 3},
		{value: idx(5), node: 0},
		{value: idx(6), node: 1},
		{value: idx(math.MaxUint32 + 1), node: (math.MaxUint32 + 1 - 1) % 4},
		{value: idx(math.MaxUint64), node: (math.MaxUint64 - 1) % 4},
		{value: idx(1), strict: true, node: 0},
		{value: idx(4), strict: true, node: 3},
		{value: idx(0), strict: true, err: "index 0 is out of range 1 to 4 (strict)"},
		{value: idx(5), strict: true, err: "index 5 is out of range 1 to 4 (strict)"},
		{value: idx(math.MaxUint64), strict: true, err: "index 18446744073709551615 is out of range"},

		{value: id("fra-1"), node: 0, fam: none},
		{value: id("fra-2"), node: 1, fam: none},
		{value: id("FRA-2"), err: `unknown id "FRA-2"`},
		{value: id("fra-9"), err: `unknown id "fra-9"`},
		{value: id("fra-"), err: `unknown id "fra-"`},
		{value: id(""), err: `unknown id ""`},
		{value: id("1"), err: `unknown id "1"`},
		{value: id("+1"), err: `unknown id "+1"`},
		{value: id("fra\n\"ü"), err: `unknown id "fra\n\"\u00fc"`},
		{value: id(strings.Repeat("x", 4096)), err: `xxx"...`},
		{value: selection.Value{}, err: "nothing selected"},

		{value: id("198.51.100.11"), node: 0, fam: selection.V4, addr: "198.51.100.11"},
		{value: id("::ffff:198.51.100.11"), node: 0, fam: selection.V4, addr: "198.51.100.11"},
		{value: id("::FFFF:c633:640b"), node: 0, fam: selection.V4, addr: "198.51.100.11"},
		{value: id("0:0:0:0:0:ffff:198.51.100.11"), node: 0, fam: selection.V4, addr: "198.51.100.11"},
		{value: id("0000:0000:0000:0000:0000:ffff:198.051.100.011"), err: "unknown id"},
		{value: id("0000:0000:0000:0000:0000:ffff:198.51.100.111"), err: "address 198.51.100.111 belongs to no node"},
		{value: id("2001:db8:100::11"), node: 0, fam: selection.V6, addr: "2001:db8:100::11"},
		{value: id("2001:DB8:100:0:0:0:0:11"), node: 0, fam: selection.V6, addr: "2001:db8:100::11"},
		{value: id("2001:0db8:0100::0011"), node: 0, fam: selection.V6, addr: "2001:db8:100::11"},
		{value: id("2001:db8:100::0.0.0.17"), node: 0, fam: selection.V6, addr: "2001:db8:100::11"},
		{value: id("203.0.113.7"), node: 2, fam: selection.V4, addr: "203.0.113.7"},
		{value: id("2001:db8::7"), node: 2, fam: selection.V6, addr: "2001:db8::7"},
		{value: id("192.0.2.99"), node: 3, fam: none},
		{value: id("::ffff:192.0.2.99"), err: "address 192.0.2.99 belongs to no node"},
		{value: id("198.51.100.13"), err: "address 198.51.100.13 belongs to no node"},
		{value: id("::ffff:198.51.100.11%eth0"), err: "unknown id"},
		{value: id("2001:db8:100::11%eth0"), err: `unknown id "2001:db8:100::11%eth0"`},
		{value: id("2001:db8:100::11%"), err: "unknown id"},
		{value: id("[2001:db8:100::11]"), err: "unknown id"},
		{value: id("198.51.100.11:80"), err: "unknown id"},
		{value: id("198.51.100.011"), err: "unknown id"},
		{value: id("198.51.100.11/32"), err: "unknown id"},
		{value: id("3325256715"), err: "unknown id"},
		{value: id("::"), err: "address :: belongs to no node"},
	}
	for _, c := range tests {
		p := newPool(t, selection.Options{StrictIndex: c.strict}, nodes...)
		got, fam, a, err := p.Resolve(c.value)
		if c.err != "" {
			if !errors.Is(err, selection.ErrUnknown) || !strings.Contains(err.Error(), c.err) || len(err.Error()) > 300 {
				t.Errorf("Resolve(%v) = %d, %v, want the error %q", c.value, got, err, c.err)
			}
			continue
		}
		if err != nil || got != c.node || fam != c.fam || a != addr(c.addr) {
			t.Errorf("Resolve(%v) = %d, %v, %v, %v, want %d, %v, %s", c.value, got, fam, a, err, c.node, c.fam, c.addr)
		}
	}
}

// Indexes mean configured positions, whatever is usable and whatever it weighs.
func TestResolveIgnoresState(t *testing.T) {
	nodes := []selection.Node{node("a", "192.0.2.1", ""), node("b", "192.0.2.2", ""), node("c", "192.0.2.3", "")}
	nodes[1].Weight = 0
	p, err := selection.NewPool(nodes, selection.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range nodes {
		if got, _, _, err := p.Resolve(selection.Index(uint64(i + 1))); err != nil || got != i {
			t.Errorf("index %d is node %d, %v", i+1, got, err)
		}
	}
}

func TestEmptyPool(t *testing.T) {
	p := newPool(t, selection.Options{})
	if p.Len() != 0 {
		t.Errorf("Len = %d", p.Len())
	}
	for i := range uint64(3) {
		if _, _, _, err := p.Resolve(selection.Index(i)); !errors.Is(err, selection.ErrUnknown) {
			t.Errorf("Resolve(%d): %v", i, err)
		}
	}
	if _, err := p.Pick(selection.V4, 0); !errors.Is(err, selection.ErrDown) {
		t.Errorf("Pick: %v", err)
	}
}

func allPolicies() []selection.Policy {
	return []selection.Policy{selection.Random, selection.Serial, selection.RoundRobin, selection.Rendezvous, selection.LeastConn, selection.Jump, selection.Ketama}
}

// picks returns the set of nodes that a number of picks fall on.
func picks(t *testing.T, p *selection.Pool, want selection.Family) string {
	t.Helper()
	seen := make([]bool, p.Len())
	for k := range uint64(400) {
		i, err := p.Pick(want, k)
		if err != nil {
			return selection.Result(err)
		}
		seen[i] = true
	}
	var s []string
	for i, ok := range seen {
		if ok {
			s = append(s, fmt.Sprint(i))
		}
	}
	return strings.Join(s, " ")
}

// What may be picked, per family, step by step.
func TestUsable(t *testing.T) {
	const v4, v6, both = selection.V4, selection.V6, selection.V4 | selection.V6
	for _, policy := range allPolicies() {
		t.Run(policy.String(), func(t *testing.T) {
			nodes := []selection.Node{
				node("dual", "192.0.2.1", "2001:db8::1"),
				node("four", "192.0.2.2", ""),
				node("six", "", "2001:db8::3"),
				node("zero", "192.0.2.4", "2001:db8::4"),
				{ID: "device", Unbound: v4, Weight: 1},
			}
			nodes[3].Weight = 0
			p, err := selection.NewPool(nodes, selection.Options{Policy: policy})
			if err != nil {
				t.Fatal(err)
			}
			expect := func(step, for4, for6, forBoth string) {
				t.Helper()
				for want, list := range map[selection.Family]string{v4: for4, v6: for6, both: forBoth, 0: "family"} {
					if policy == selection.Serial {
						list, _, _ = strings.Cut(list, " ")
					}
					if got := picks(t, p, want); got != list {
						t.Errorf("%s: picks for %v are %q, want %q", step, want, got, list)
					}
				}
			}
			expect("fresh", "down", "down", "down")
			for i := range nodes {
				p.SetUsable(i, both)
			}
			expect("before Publish", "down", "down", "down")
			p.Publish()
			expect("all up", "0 1 4", "0 2", "0 1 2 4")
			p.SetUsable(0, v6)
			p.Publish()
			expect("dual lost IPv4", "1 4", "0 2", "0 1 2 4")
			p.SetUsable(1, v6) // never given: it does not count
			p.SetUsable(4, 0)
			p.Publish()
			expect("four and device down", "down", "0 2", "0 2")
			p.SetUsable(0, 0)
			p.SetUsable(2, 0)
			p.Publish()
			expect("only weight 0 left", "down", "down", "down")
			p.SetUsable(1, v4)
			p.Publish()
			expect("back", "1", "down", "1")
		})
	}
}

func TestPickErrors(t *testing.T) {
	p := newPool(t, selection.Options{}, node("a", "192.0.2.1", ""))
	for _, c := range []struct {
		want selection.Family
		kind error
		text string
	}{
		{selection.V6, selection.ErrFamily, "no path has an address for IPv6"},
		{0, selection.ErrFamily, "the target has no address family"},
		{selection.V4, selection.ErrDown, "no path is up for IPv4"},
		{selection.V4 | selection.V6, selection.ErrDown, "no path is up for IPv4 or IPv6"},
	} {
		p.SetUsable(0, 0)
		p.Publish()
		if _, err := p.Pick(c.want, 0); !errors.Is(err, c.kind) || err.Error() != c.text {
			t.Errorf("Pick(%v): %v, want %q", c.want, err, c.text)
		}
	}
}

func TestHotPathAllocs(t *testing.T) {
	for _, policy := range allPolicies() {
		nodes := manyNodes(300)
		nodes[7].Weight = 9
		p := newPool(t, selection.Options{Policy: policy}, nodes...)
		values := []selection.Value{selection.Index(7), selection.ID("n7"), selection.ID("10.0.0.7"), selection.ID("::ffff:10.0.0.7")}
		var key uint64
		n := testing.AllocsPerRun(100, func() {
			key++
			i, err := p.Pick(selection.V4, key)
			if err != nil {
				t.Fatal(err)
			}
			p.Opened(i)
			p.Closed(i)
			for _, v := range values {
				if _, _, _, err := p.Resolve(v); err != nil {
					t.Fatal(err)
				}
			}
		})
		if n != 0 {
			t.Errorf("%v: %v allocations", policy, n)
		}
	}
}

// Picks beside a writer see whole tables: a node that is down all the while is
// never picked, and there is always one to pick.
func TestPublishWhilePicking(t *testing.T) {
	for _, policy := range allPolicies() {
		t.Run(policy.String(), func(t *testing.T) {
			nodes := manyNodes(8)
			nodes[2].Weight = 5
			p := newPool(t, selection.Options{Policy: policy}, nodes...)
			const dead, flapping = 0, 1
			p.SetUsable(dead, 0)
			p.Publish()
			done := make(chan struct{})
			var wg sync.WaitGroup
			for g := range uint64(4) {
				wg.Go(func() {
					for k := g; ; k += 4 {
						select {
						case <-done:
							return
						default:
						}
						i, err := p.Pick(selection.V4, k)
						if err != nil || i == dead {
							t.Errorf("Pick = %d, %v", i, err)
							return
						}
						p.Opened(i)
						p.Closed(i)
					}
				})
			}
			for i := range 500 {
				p.SetUsable(flapping, selection.Family(i)&selection.V4)
				p.Publish()
			}
			close(done)
			wg.Wait()
			for i := range nodes {
				if p.Open(i) != 0 {
					t.Errorf("node %d has %d open", i, p.Open(i))
				}
			}
		})
	}
}
