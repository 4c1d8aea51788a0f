package config_test

import (
	"slices"
	"strings"
	"testing"

	"wayout/router/config"
)

const pinEscaper = "escaper: [{name: out, type: direct_fixed, nodes: [{id: fra-1, ipv4: 192.0.2.1}, {id: r, ipv4: 192.0.2.8-192.0.2.9}]}]\n"

func TestPins(t *testing.T) {
	c, err := config.Parse("w.yaml", []byte(pinEscaper+`pin:
- {cgroup: /system.slice/backup.service, path: out/fra-1}
- {cgroup: /machine.slice//x/, path: out/r/192.0.2.9}
- {cgroup: /system.slice/backup.service2, path: out/fra-1}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []config.Pin{
		{Cgroup: "/system.slice/backup.service", Path: "out/fra-1"},
		{Cgroup: "/machine.slice/x", Path: "out/r/192.0.2.9"},
		{Cgroup: "/system.slice/backup.service2", Path: "out/fra-1"},
	}
	if !slices.Equal(c.Pins, want) {
		t.Errorf("got %+v", c.Pins)
	}
}

func TestPinMistakes(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"no escaper", "{cgroup: /a, path: in/fra-1}", []string{`2: pin[0].path: no escaper has the name in, got "in/fra-1"`}},
		{"no node", "{cgroup: /a, path: out/fra-2}", []string{`2: pin[0].path: no node of escaper out has the ID fra-2, got "out/fra-2"`}},
		{"an escaper alone", "{cgroup: /a, path: out}", []string{`2: pin[0].path: want ESCAPER/ID, got "out"`}},
		{"nothing behind the slash", "{cgroup: /a, path: out/}", []string{`2: pin[0].path: want ESCAPER/ID, got "out/"`}},
		{"relative", "{cgroup: a/b, path: out/fra-1}", []string{`2: pin[0].cgroup: want a path below the cgroup v2 mount that begins with /, got "a/b"`}},
		{"upwards", "{cgroup: /a/../b, path: out/fra-1}", []string{`2: pin[0].cgroup: must not hold .., got "/a/../b"`}},
		{"the root", "{cgroup: /./, path: out/fra-1}", []string{`2: pin[0].cgroup: is every process of the host, wayout among them, got "/./"`}},
		{"a zero byte", `{cgroup: "/a\0", path: out/fra-1}`, []string{`2: pin[0].cgroup: holds a zero byte, got "/a\x00"`}},
		{"too long", "{cgroup: /" + strings.Repeat("a", 4000) + ", path: out/fra-1}", []string{`2: pin[0].cgroup: is over 4000 bytes, got "/` + strings.Repeat("a", 79) + `..."`}},
		{"no cgroup", "{path: out/fra-1}", []string{`2: pin[0].cgroup: is required, got ""`}},
		{"no path", "{cgroup: /a}", []string{`2: pin[0].path: is required, got ""`}},
		{"twice", "{cgroup: /a, path: out/fra-1}, {cgroup: /a/, path: out/fra-1}", []string{`2: pin[1].cgroup: is pinned already, see line 2, got "/a/"`}},
		{"one in the other", "{cgroup: /a/b, path: out/fra-1}, {cgroup: /a, path: out/fra-1}", []string{
			`2: pin[1].cgroup: and /a/b (line 2): a process in both would be pinned twice, got "/a"`,
		}},
		{"unknown key", "{cgroup: /a, path: out/fra-1, kill: on}", []string{`2: pin[0].kill: unknown key, got "kill"`}},
	} {
		t.Run(tt.name, func(t *testing.T) { wantMistakes(t, pinEscaper+"pin: ["+tt.text+"]", tt.want...) })
	}
	t.Run("without eBPF", func(t *testing.T) {
		wantMistakes(t, pinEscaper+"accounting: off\npin:\n- {cgroup: /a, path: out/fra-1}\n- {cgroup: /b, path: out/fra-1}\n",
			`4: pin[0]: pins need the eBPF programs that accounting: off does without, got "{...}"`)
	})
	t.Run("not a list", func(t *testing.T) {
		for _, text := range mistakes(t, pinEscaper+"pin: {cgroup: /a, path: out/fra-1}") {
			if !strings.Contains(text, "want a list") {
				t.Error(text)
			}
		}
	})
	// Of nodes that could not be read nothing is said a second time.
	t.Run("broken nodes", func(t *testing.T) {
		got := mistakes(t, strings.Replace(pinEscaper, "192.0.2.1}", "192.0.2.256}", 1)+"pin: [{cgroup: /a, path: out/fra-1}]")
		if len(got) != 1 || !strings.Contains(got[0], "nodes[0].ipv4") {
			t.Errorf("got %q", got)
		}
	})
}

func FuzzCleanCgroup(f *testing.F) {
	for _, s := range []string{"/a/b", "/", "a", "/a/../b", "/a//b/.", "/..", "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		clean, bad := config.CleanCgroup(s)
		if (clean == "") == (bad == "") {
			t.Fatalf("%q: %q, %q", s, clean, bad)
		}
		if bad != "" {
			return
		}
		if again, bad := config.CleanCgroup(clean); again != clean || bad != "" {
			t.Errorf("%q is cleaned to %q, and that to %q (%s)", s, clean, again, bad)
		}
		if !config.Nested(clean, clean) || !config.Nested(clean, clean+"/x") || !config.Nested(clean+"/x", clean) || config.Nested(clean, clean+"x") {
			t.Errorf("%q is nested wrongly", clean)
		}
	})
}
