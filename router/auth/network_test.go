package auth_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"wayout/router/auth"
)

func from(name, hash string, networks ...string) auth.Credential {
	c := cred(name, hash)
	for _, s := range networks {
		c.From = append(c.From, netip.MustParsePrefix(s))
	}
	return c
}

func TestFrom(t *testing.T) {
	g := newGroup(t, auth.Options{},
		from("wide", "", "10.0.0.0/8", "2001:db8::/32"),
		from("cam", "", "10.1.0.0/16"),
		from("one", "", "10.1.2.3/32", "2001:db8::7/128"),
		from("alice", cheap("secret"), "10.1.2.0/24", "192.0.2.0/24"),
		cred("bob", cheap("other")))
	tests := []struct{ client, want string }{
		{"10.9.9.9", "wide"},
		{"10.1.9.9", "cam"},
		{"10.1.2.3", "one"},
		{"10.1.2.4", "cam"}, // alice's network is longer, but she has a password
		{"::ffff:10.1.2.3", "one"},
		{"2001:db8::7", "one"},
		{"2001:db8::8%eth0", "wide"},
		{"192.0.2.1", ""},
		{"11.0.0.0", ""},
		{"2001:db9::", ""},
		{"::a01:203", ""},
	}
	for _, tt := range tests {
		got := ""
		if u := g.From(netip.MustParseAddr(tt.client)); u != nil {
			got = u.Name
		}
		if got != tt.want {
			t.Errorf("%s is %q, want %q", tt.client, got, tt.want)
		}
	}
	if u := g.From(netip.Addr{}); u != nil {
		t.Errorf("no address is %q", u.Name)
	}
	if g.Len() != 5 {
		t.Errorf("%d users", g.Len())
	}
	if u, ok := g.User("cam"); !ok || u != g.From(netip.MustParseAddr("10.1.0.1")) {
		t.Error("User and From do not return the same")
	}
}

// No password is that of a user without one.
func TestVerifyWithoutPassword(t *testing.T) {
	for name, g := range map[string]*auth.Group{
		"alone":     newGroup(t, auth.Options{}, from("cam", "", "10.0.0.0/8")),
		"with more": newGroup(t, auth.Options{}, from("cam", "", "10.0.0.0/8"), cred("alice", cheap("secret"))),
	} {
		for _, pass := range []string{"", "secret", "x"} {
			for range 2 {
				if u, err := g.Verify(t.Context(), "cam", pass); !errors.Is(err, auth.ErrAuth) || u != nil {
					t.Errorf("%s: password %q: %v, %v", name, pass, u, err)
				}
			}
			if g.Verified("cam", pass) != nil {
				t.Errorf("%s: password %q is remembered", name, pass)
			}
		}
	}
}

func TestAllows(t *testing.T) {
	g := newGroup(t, auth.Options{}, from("alice", cheap("secret"), "10.1.0.0/16", "2001:db8::/64"), cred("bob", cheap("other")))
	alice, err := g.Verify(t.Context(), "alice", "secret")
	if err != nil {
		t.Fatal(err)
	}
	for client, want := range map[string]bool{
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "10.2.0.0": false, "2001:db8::1": true, "2001:db8::1%eth0": true, "2001:db8:0:1::": false, "::1": false,
	} {
		if got := auth.Allows(alice, netip.MustParseAddr(client)); got != want {
			t.Errorf("alice from %s: %v", client, got)
		}
	}
	if auth.Allows(alice, netip.Addr{}) {
		t.Error("alice from nowhere")
	}
	if bob, _ := g.User("bob"); !auth.Allows(bob, netip.MustParseAddr("203.0.113.9")) || !auth.Allows(bob, netip.Addr{}) {
		t.Error("bob may come from anywhere")
	}
}

func TestNetworksOfTwo(t *testing.T) {
	_, err := auth.NewGroup("team", []auth.Credential{
		from("a", "", "10.0.0.0/8"), from("b", "", "10.0.0.0/8"), from("c", cheap("x"), "10.0.0.0/8"), cred("d", ""),
	}, auth.Options{})
	if err == nil || !errors.Is(err, auth.ErrHash) || !strings.Contains(err.Error(), `10.0.0.0/8 is the network of two users without a password, "a" and "b"`) ||
		strings.Contains(err.Error(), `"c"`) {
		t.Errorf("got %v", err)
	}
}
