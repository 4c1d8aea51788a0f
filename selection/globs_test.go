package selection_test

import (
	"regexp"
	"strings"
	"testing"

	"wayout/selection"
)

func TestGlobs(t *testing.T) {
	for _, c := range []struct {
		patterns string
		path     string
		want     bool
	}{
		{"out/fra-* out/six", "out/fra-1", true},
		{"out/fra-* out/six", "out/fra-", true},
		{"out/fra-* out/six", "out/six", true},
		{"out/fra-* out/six", "out/six6", false},
		{"out/fra-* out/six", "out/lon-1", false},
		{"out/fra-* out/six", "dyn/fra-1", false},
		{"out/fra-* out/six", "OUT/fra-1", false},
		{"out/fra-* out/six", "out/Fra-1", false},
		{"out/*", "out/fra-1", true},
		{"out/*", "output/fra-1", false},
		{"o*/x", "out/x", true},
		{"o*/x", "out/y/x", false}, // no * from the escaper into the ID
		{"*/x", "out/x", true},
		{"*/*", "out/x", true},
		{"*/*", "out", false},
		{"*/*", "", false},
		{"out/*1*", "out/a1b", true},
		{"out/*1*", "out/ab", false},
		{"out/a*b*c", "out/a-b-b-c", true},
		{"out/a*b*c", "out/a-c-b", false},
		{"out/**", "out/x", true},
		{"out/*.*", "out/192.0.2.1", true},
		{"out/2001:db8:*", "out/2001:db8:beef::/64", true}, // the slash is the ID's
		{"out/*", "out/2001:db8:beef::/64", true},
		{"out/2001:db8:beef::/64", "out/2001:db8:beef::/64", true},
		{"out/2001:db8:beef::/64", "out/2001:db8:beef::/65", false},
		{"", "out/fra-1", false}, // allow_path: [] allows nothing
	} {
		g, err := selection.ParseGlobs(strings.Fields(c.patterns))
		if err != nil {
			t.Errorf("ParseGlobs(%q): %v", c.patterns, err)
			continue
		}
		if got := g.Match(c.path); got != c.want {
			t.Errorf("%q matches %q: %v, want %v", c.patterns, c.path, got, c.want)
		}
	}
	var any *selection.Globs
	if !any.Match("out/fra-1") {
		t.Error("nil does not match")
	}
	if g, err := selection.ParseGlobs(nil); err != nil || g == nil || g.Match("out/fra-1") {
		t.Errorf("ParseGlobs(nil) = %v, %v, want one that matches nothing", g, err)
	}
}

func TestGlobErrors(t *testing.T) {
	for _, p := range []string{"", "*", "out", "fra-*", "/x", "out/", "/", "out/fra-?", "out/[ab]", "out/fra 1", `out/a\*`, "out/größe", "out/\xff"} {
		g, err := selection.ParseGlobs([]string{"out/x", p})
		if err == nil || g != nil {
			t.Errorf("ParseGlobs(%q) = %v, %v, want an error", p, g, err)
		}
	}
}

// A pattern of many stars must not take more than the product of the lengths.
func TestGlobCost(t *testing.T) {
	g, err := selection.ParseGlobs([]string{"out/" + strings.Repeat("a*", 2000) + "b"})
	if err != nil {
		t.Fatal(err)
	}
	if g.Match("out/" + strings.Repeat("a", 4000)) {
		t.Error("matches without a b")
	}
}

func FuzzParseGlobs(f *testing.F) {
	f.Add("out/fra-*", "out/fra-1")
	f.Add("*/*", "out/2001:db8::/64")
	f.Add("out/a*b*c", "out/abbc")
	f.Add("out/*a*a*b", "out/aaaaaaaab")
	f.Add("out", "out/x")
	f.Fuzz(func(t *testing.T, pattern, path string) {
		g, err := selection.ParseGlobs([]string{pattern})
		if err != nil {
			if g != nil {
				t.Fatalf("ParseGlobs(%q) = %v with %v", pattern, g, err)
			}
			return
		}
		escaper, id, _ := strings.Cut(pattern, "/")
		part := func(glob, any string) string {
			return strings.ReplaceAll(regexp.QuoteMeta(glob), `\*`, any)
		}
		// Bytes, not characters: a path is what a configuration made of ASCII.
		if strings.ContainsFunc(path, func(r rune) bool { return r >= 0x80 }) {
			return
		}
		re := regexp.MustCompile(`(?s)\A` + part(escaper, `[^/]*`) + "/" + part(id, `.*`) + `\z`)
		if got, want := g.Match(path), re.MatchString(path); got != want {
			t.Fatalf("%q matches %q: %v, want %v", pattern, path, got, want)
		}
	})
}
