package selection_test

import (
	"fmt"
	"testing"

	"wayout/selection"
)

func BenchmarkParseHeader(b *testing.B) {
	for _, c := range []struct{ name, value string }{
		{"index", "12345"},
		{"id", "fra-2"},
		{"address", "2001:db8:100::11"},
		{"map", `{"out":"fra-2","by-city":3}`},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := selection.ParseHeader(c.value, "out"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSelectionFor(b *testing.B) {
	s := selection.Selection{
		Client: selection.Layer{entry("out", selection.ID("fra-2"))},
		Server: selection.Layer{entry("dyn", selection.Index(1))},
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, ok := s.For("dyn"); !ok {
			b.Fatal("not found")
		}
	}
}

func sizes() []int { return []int{16, 65536} }

func BenchmarkResolve(b *testing.B) {
	for _, n := range sizes() {
		p := newPool(b, selection.Options{}, manyNodes(n)...)
		kinds := map[string]func(i int) selection.Value{
			"index":   func(i int) selection.Value { return selection.Index(uint64(i)) },
			"id":      func(i int) selection.Value { return selection.ID(fmt.Sprintf("n%d", i%n)) },
			"address": func(i int) selection.Value { return selection.ID(fmt.Sprintf("10.0.%d.%d", i%n>>8, i%n&255)) },
		}
		for _, kind := range []string{"index", "id", "address"} {
			values := make([]selection.Value, 1<<12)
			for i := range values {
				values[i] = kinds[kind](i * 4099) // all over the pool
			}
			b.Run(fmt.Sprintf("%s/%d", kind, n), func(b *testing.B) {
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					i++
					if _, _, _, err := p.Resolve(values[i%len(values)]); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// policyPools calls f for each policy and size, with equal and unequal weights
// where a policy tells them apart.
func policyPools(b *testing.B, f func(b *testing.B, p *selection.Pool)) {
	for _, policy := range allPolicies() {
		for _, n := range sizes() {
			for _, weights := range []string{"equal", "weighted"} {
				if weights == "weighted" && policy == selection.Serial {
					continue
				}
				nodes := manyNodes(n)
				if weights == "weighted" {
					for i, w := range unequal(n, 99) {
						nodes[i].Weight = w + 1
					}
				}
				p := newPool(b, selection.Options{Policy: policy}, nodes...)
				b.Run(fmt.Sprintf("%v/%s/%d", policy, weights, n), func(b *testing.B) { f(b, p) })
			}
		}
	}
}

func BenchmarkPick(b *testing.B) {
	policyPools(b, func(b *testing.B, p *selection.Pool) {
		b.ReportAllocs()
		var key uint64
		for b.Loop() {
			key++
			if _, err := p.Pick(selection.V4, key); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkPickParallel(b *testing.B) {
	p := newPool(b, selection.Options{Policy: selection.RoundRobin}, manyNodes(16)...)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := p.Pick(selection.V4, 0); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkPublish(b *testing.B) {
	policyPools(b, func(b *testing.B, p *selection.Pool) {
		b.ReportAllocs()
		for b.Loop() {
			p.Publish()
		}
	})
}

func BenchmarkPickSession(b *testing.B) {
	for _, n := range sizes() {
		p := newPool(b, selection.Options{}, manyNodes(n)...)
		for _, strict := range []bool{false, true} {
			b.Run(fmt.Sprintf("strict=%v/%d", strict, n), func(b *testing.B) {
				b.ReportAllocs()
				var key uint64
				for b.Loop() {
					key++
					if _, err := p.PickSession(selection.V4, key, strict); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkKeySession(b *testing.B) {
	b.ReportAllocs()
	var sum uint64
	for b.Loop() {
		sum += selection.KeySession("alice", "out", "session-1234", 7)
	}
	if sum == 0 {
		b.Fatal("no keys")
	}
}

func BenchmarkResolvePrefix(b *testing.B) {
	p := newPool(b, selection.Options{}, prefixNodes()...)
	for name, v := range map[string]selection.Value{
		"address": selection.ID("2001:db8:2:abcd::7"),
		"pinned":  selection.ID("both").At(addr("2001:db8:1:1::7")),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, _, err := p.Resolve(v); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkAddrIn(b *testing.B) {
	for _, s := range []string{"203.0.113.0/24", "203.0.113.0/30", "2001:db8:beef::/64", "2001:db8:beef::/48"} {
		net := prefix(s)
		b.Run(s, func(b *testing.B) {
			b.ReportAllocs()
			var r uint64
			for b.Loop() {
				r++
				if !selection.AddrIn(net, r, r).IsValid() {
					b.Fatal("no address")
				}
			}
		})
	}
}

func BenchmarkUsername(b *testing.B) {
	for name, s := range map[string]string{
		"plain":   "alice",
		"path":    "alice-path-fra-2",
		"session": "alice-session-a1b2-lifetime-10-strict-on",
		"all":     "alice-path-out~six-ip-2001_db8__11-session-a1b2-lifetime-10",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, rest := selection.SplitUsername(s)
				if _, err := selection.ParseParams(rest, "out"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
