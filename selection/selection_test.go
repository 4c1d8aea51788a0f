package selection_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"wayout/selection"
)

func TestPrecedence(t *testing.T) {
	s := selection.Selection{
		User:     selection.Layer{{Escaper: "a", Value: selection.ID("user")}},
		Client:   selection.Layer{{Escaper: "b", Value: selection.ID("client")}, {Escaper: "a", Value: selection.ID("client")}},
		Username: selection.Layer{{Escaper: "a", Value: selection.ID("name")}, {Escaper: "b", Value: selection.ID("name")}, {Escaper: "c", Value: selection.ID("name")}},
		Server: selection.Layer{
			{Escaper: "a", Value: selection.ID("server")},
			{Escaper: "b", Value: selection.ID("server")},
			{Escaper: "c", Value: selection.ID("server")},
			{Escaper: "d", Value: selection.Index(4)},
		},
	}
	want := []struct {
		escaper, value string
		source         selection.Source
	}{
		{"a", "user", selection.SourceUser},
		{"b", "client", selection.SourceHeader},
		{"c", "name", selection.SourceUsername},
		{"d", "4", selection.SourceServer},
	}
	for _, w := range want {
		v, src, ok := s.For(w.escaper)
		if !ok || v.String() != w.value || src != w.source {
			t.Errorf("For(%q) = %v, %v, %v, want %v, %v", w.escaper, v, src, ok, w.value, w.source)
		}
	}
	if v, src, ok := s.For("e"); ok || src != selection.SourcePolicy || v != (selection.Value{}) {
		t.Errorf("For of an unnamed escaper = %v, %v, %v", v, src, ok)
	}
	i := 0
	for e, src := range s.Entries {
		if i < len(want) && (e.Escaper != want[i].escaper || e.Value.String() != want[i].value || src != want[i].source) {
			t.Errorf("entry %d = %v from %v, want %v", i, e, src, want[i])
		}
		i++
	}
	if i != len(want) {
		t.Errorf("%d entries, want %d", i, len(want))
	}
	for range s.Entries {
		break // the iterator must stop: ranging on after false panics
	}
}

// A client's layer must never pass as the operator's, whatever ClientSource is.
func TestClientSource(t *testing.T) {
	for src := selection.SourcePolicy; src < 10; src++ {
		s := selection.Selection{Client: selection.Layer{{Escaper: "a"}}, ClientSource: src}
		want := selection.SourceHeader
		if src == selection.SourceSOCKS {
			want = selection.SourceSOCKS
		}
		if _, got, _ := s.For("a"); got != want || !got.ByClient() {
			t.Errorf("ClientSource %v: source %v, want %v", src, got, want)
		}
	}
}

func TestEmptySelection(t *testing.T) {
	var s selection.Selection
	for e := range s.Entries {
		t.Errorf("an entry %v of nothing", e)
	}
	if _, src, ok := s.For(""); ok || src != selection.SourcePolicy {
		t.Errorf("For = %v, %v", src, ok)
	}
}

func TestWords(t *testing.T) {
	var got []string
	for s := selection.SourcePolicy; s <= selection.SourceServer+1; s++ {
		got = append(got, fmt.Sprint(s, s.ByClient()))
	}
	want := []string{"policy false", "user false", "header true", "socks true", "username true", "server false", "source(6) false"}
	if !slices.Equal(got, want) {
		t.Errorf("sources %q, want %q", got, want)
	}
	for f, want := range []string{"no family", "IPv4", "IPv6", "IPv4 or IPv6"} {
		if got := selection.Family(f).String(); got != want {
			t.Errorf("family %d is %q, want %q", f, got, want)
		}
	}
	for addr, want := range map[string]selection.Family{"192.0.2.1": selection.V4, "::ffff:192.0.2.1": selection.V4, "2001:db8::1": selection.V6, "fe80::1%lo": selection.V6} {
		if got := selection.FamilyOf(netip.MustParseAddr(addr)); got != want {
			t.Errorf("FamilyOf(%s) = %v, want %v", addr, got, want)
		}
	}
	if got := selection.FamilyOf(netip.Addr{}); got != 0 {
		t.Errorf("FamilyOf(zero) = %v", got)
	}
}

func TestPolicyWords(t *testing.T) {
	for _, w := range []string{"random", "serial", "round_robin", "rendezvous", "least_conn", "jump", "ketama"} {
		p, err := selection.ParsePolicy(w)
		if err != nil || p.String() != w {
			t.Errorf("ParsePolicy(%q) = %v, %v", w, p, err)
		}
	}
	for _, w := range []string{"", "Random", "policy(5)", "round-robin"} {
		if p, err := selection.ParsePolicy(w); err == nil {
			t.Errorf("ParsePolicy(%q) = %v, want an error", w, p)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", w)) {
			t.Errorf("ParsePolicy(%q): %v", w, err)
		}
	}
}

func TestUnknownPolicyWord(t *testing.T) {
	if got := selection.Policy(200).String(); got != "policy(200)" {
		t.Errorf("String = %q", got)
	}
}

func TestResult(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, "ok"},
		{errors.New("connection refused"), "ok"},
		{selection.ErrMalformed, "malformed"},
		{selection.ErrUnknown, "unknown"},
		{selection.ErrNotPassed, "unknown"},
		{selection.ErrDisabled, "disabled"},
		{selection.ErrForbidden, "forbidden"},
		{selection.ErrDown, "down"},
		{selection.ErrFamily, "family"},
		{selection.ErrBind, "bind"},
		{selection.ErrPorts, "bind"},
		{selection.ErrMismatch, "malformed"},
	} {
		for _, err := range []error{c.err, fmt.Errorf("open: %w", c.err)} {
			if c.err == nil {
				err = nil
			}
			if got := selection.Result(err); got != c.want {
				t.Errorf("Result(%v) = %q, want %q", err, got, c.want)
			}
		}
	}
	err := selection.Refuse(selection.ErrDown, "path %s is draining", "out/a")
	if !errors.Is(err, selection.ErrDown) || err.Error() != "path out/a is draining" {
		t.Errorf("Refuse = %v", err)
	}
}
