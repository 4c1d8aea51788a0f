package selection_test

import (
	"testing"

	"wayout/selection"
)

// What every request asks of its selection makes no garbage.
func TestReadingDoesNotAllocate(t *testing.T) {
	s := selection.Selection{
		User:   selection.Layer{entry("out", selection.ID("fra-1"))},
		Client: selection.Layer{entry("out", selection.ID("fra-2")), entry("dyn", selection.Index(2))},
		Server: selection.Layer{entry("net", selection.Index(1))},
	}
	globs, err := selection.ParseGlobs([]string{"lon/*", "out/a*b*c", "out/fra-*"})
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() bool{
		"For, strongest": func() bool { _, _, ok := s.For("out"); return ok },
		"For, weakest":   func() bool { _, _, ok := s.For("net"); return ok },
		"For, nothing":   func() bool { _, _, ok := s.For("none"); return !ok },
		"Entries": func() bool {
			n := 0
			for range s.Entries {
				n++
			}
			return n == 3
		},
		"Match":    func() bool { return globs.Match("out/fra-2") },
		"no Match": func() bool { return !globs.Match("out/par-2") },
	} {
		n := testing.AllocsPerRun(100, func() {
			if !f() {
				t.Fatalf("%s: wrong answer", name)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
