package selection_test

import (
	"errors"
	"fmt"
	"testing"

	"wayout/selection"
)

// Picks among some of the nodes are the policy's own picks of a pool in which
// only these are usable, or at least share by weight and stick to the key.
func TestPickAmong(t *testing.T) {
	var nodes []selection.Node
	for i := range 8 {
		nodes = append(nodes, selection.Node{ID: fmt.Sprintf("n%d", i), Unbound: selection.V4 | selection.V6, Weight: uint16(i % 4)})
	}
	for _, policy := range []selection.Policy{
		selection.Random, selection.Serial, selection.RoundRobin, selection.Rendezvous, selection.LeastConn, selection.Jump, selection.Ketama,
	} {
		p, err := selection.NewPool(nodes, selection.Options{Policy: policy})
		if err != nil {
			t.Fatal(err)
		}
		for i := range nodes {
			if i != 7 {
				p.SetUsable(i, selection.V4|selection.V6)
			}
		}
		p.Publish()
		ok := func(i int) bool { return i >= 2 } // leaves 2, 3, 5 and 6: 0 and 4 weigh nothing, 7 is down
		picked := map[int]int{}
		const rounds = 8000
		for key := range uint64(rounds) {
			n, err := p.PickAmong(selection.V4, key, ok)
			if err != nil {
				t.Fatal(err)
			}
			picked[n]++
			if again, _ := p.PickAmong(selection.V4, key, ok); policy >= selection.Rendezvous && policy != selection.LeastConn && again != n {
				t.Fatalf("%s: key %d: %d, then %d", policy, key, n, again)
			}
		}
		weights := map[int]int{2: 2, 3: 3, 5: 1, 6: 2}
		switch policy {
		case selection.Serial:
			weights = map[int]int{2: 1}
		case selection.LeastConn: // ties
			weights = map[int]int{2: 1, 3: 1, 5: 1, 6: 1}
		}
		sum := 0
		for _, w := range weights {
			sum += w
		}
		for i, n := range picked {
			if want := rounds * weights[i] / sum; n < want*8/10 || n > want*12/10 {
				t.Errorf("%s: node %d was picked %d times of %d, want about %d", policy, i, n, rounds, want)
			}
		}
		if len(picked) != len(weights) {
			t.Errorf("%s: %v", policy, picked)
		}
		if _, err := p.PickAmong(selection.V4, 1, func(int) bool { return false }); !errors.Is(err, selection.ErrDown) {
			t.Errorf("%s: none: %v", policy, err)
		}
	}
}

func TestPickAmongLeastConn(t *testing.T) {
	nodes := []selection.Node{{ID: "a", Unbound: selection.V4, Weight: 1}, {ID: "b", Unbound: selection.V4, Weight: 1}, {ID: "c", Unbound: selection.V4, Weight: 1}}
	p, err := selection.NewPool(nodes, selection.Options{Policy: selection.LeastConn})
	if err != nil {
		t.Fatal(err)
	}
	for i := range nodes {
		p.SetUsable(i, selection.V4)
	}
	p.Publish()
	p.Opened(1)
	if n, err := p.PickAmong(selection.V4, 0, func(i int) bool { return i > 0 }); n != 2 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// A session that cannot have its node gets the one that it would move to.
func TestPickSessionAmong(t *testing.T) {
	var nodes []selection.Node
	for i := range 6 {
		nodes = append(nodes, selection.Node{ID: fmt.Sprintf("n%d", i), Unbound: selection.V4, Weight: 1})
	}
	p, err := selection.NewPool(nodes, selection.Options{})
	if err != nil {
		t.Fatal(err)
	}
	set := func(f func(i int) selection.Family) {
		for i := range nodes {
			p.SetUsable(i, f(i))
		}
		p.Publish()
	}
	for key := range uint64(100) {
		set(func(int) selection.Family { return selection.V4 })
		home, err := p.PickSession(selection.V4, key, false)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.PickSessionAmong(selection.V4, key, func(i int) bool { return i != home })
		if err != nil || got == home {
			t.Fatalf("%d in place of %d: %v", got, home, err)
		}
		set(func(i int) selection.Family {
			if i == home {
				return 0
			}
			return selection.V4
		})
		if want, _ := p.PickSession(selection.V4, key, false); got != want {
			t.Errorf("key %d: %d, want %d", key, got, want)
		}
	}
	if _, err := p.PickSessionAmong(selection.V4, 1, func(int) bool { return false }); !errors.Is(err, selection.ErrDown) {
		t.Error(err)
	}
}
