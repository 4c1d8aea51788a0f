package escaper_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/selection"
)

// prefixNode is a path of loopback addresses, each of which is the host's own.
func prefixNode(net string) []escaper.NodeOptions {
	return []escaper.NodeOptions{{ID: "net", Net4: netip.MustParsePrefix(net), Weight: 1}}
}

func bySession(user, name string) *escaper.Request {
	r := &escaper.Request{Server: "web", Escaper: "out", Group: "team", User: user, Client: netip.MustParseAddrPort("192.0.2.1:1000")}
	r.Selection.Session = selection.Session{Name: name}
	return r
}

// sourceOf opens and closes a connection, and gives its source.
func sourceOf(t *testing.T, d *escaper.Door, r *escaper.Request) (netip.Addr, error) {
	t.Helper()
	c, err := d.Open(t.Context(), r)
	if err != nil {
		return netip.Addr{}, err
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return c.Source.Addr(), nil
}

func TestPrefixSources(t *testing.T) {
	t.Parallel()
	to := literal(listen(t, "127.0.0.1:0").hold(t).addr)
	e := direct(t, escaper.Options{EnableSelection: true, Nodes: prefixNode("127.64.0.0/16")})
	d := door(t, e)
	net := netip.MustParsePrefix("127.64.0.0/16")
	seen := map[netip.Addr]bool{}
	for range 100 {
		a, err := sourceOf(t, d, request(to, selection.Selection{}))
		if err != nil || !net.Contains(a) {
			t.Fatalf("%s, %v", a, err)
		}
		seen[a] = true
	}
	if len(seen) < 95 { // of 65,534: two alike are rare
		t.Errorf("%d sources in 100 requests", len(seen))
	}
	a, err := sourceOf(t, d, request(to, byClient(pathID("127.64.3.4"))))
	if err != nil || a != addr("127.64.3.4") {
		t.Errorf("selected: %s, %v", a, err)
	}
	// A session has one, and it is its own.
	of := map[string]netip.Addr{}
	for range 3 {
		for _, s := range [][2]string{{"alice", "a"}, {"alice", "b"}, {"bob", "a"}} {
			r := bySession(s[0], s[1])
			r.Target = to
			a, err := sourceOf(t, d, r)
			key := s[0] + " " + s[1]
			if err != nil || of[key].IsValid() && of[key] != a {
				t.Errorf("%s: %s, then %s, %v", key, of[key], a, err)
			}
			of[key] = a
		}
	}
	if of["alice a"] == of["alice b"] || of["alice a"] == of["bob a"] {
		t.Errorf("sessions share an address: %v", of)
	}
	// Nothing of the other family.
	_, err = sourceOf(t, d, request(escaper.Target{Addr: addr("2001:db8::1"), Port: 80}, byClient(pathID("net"))))
	if !errors.Is(err, selection.ErrFamily) {
		t.Errorf("IPv6: %v", err)
	}
}

// TestReserved: what is somebody else's is drawn for nobody.
func TestReserved(t *testing.T) {
	t.Parallel()
	to := literal(listen(t, "127.0.0.1:0").hold(t).addr)
	e := direct(t, escaper.Options{EnableSelection: true, Nodes: prefixNode("127.65.0.0/30")}) // .1 and .2 are to have
	d := door(t, e)
	e.Paths()[0].Reserve(addrs("127.65.0.1", "2001:db8::1"))
	for i := range 20 {
		for _, r := range []*escaper.Request{request(to, selection.Selection{}), bySession("alice", "s"), bySession("alice", string(rune('a'+i)))} {
			r.Target = to
			if a, err := sourceOf(t, d, r); err != nil || a != addr("127.65.0.2") {
				t.Fatalf("%s, %v", a, err)
			}
		}
	}
	if _, err := sourceOf(t, d, request(to, byClient(pathID("127.65.0.1")))); !errors.Is(err, selection.ErrDown) || escaper.StatusOf(err) != 503 {
		t.Errorf("selected: %v", err)
	}
	e.Paths()[0].Reserve(nil)
	if a, err := sourceOf(t, d, request(to, byClient(pathID("127.65.0.1")))); err != nil || a != addr("127.65.0.1") {
		t.Errorf("no longer reserved: %s, %v", a, err)
	}
}

// TestSessionLifetime: when its time is over a session moves on as a whole, and
// not before.
func TestSessionLifetime(t *testing.T) {
	t.Parallel()
	to := literal(listen(t, "127.0.0.1:0").hold(t).addr)
	now := time.Unix(1_800_000_000, 0)
	sessions := escaper.NewSessions()
	sessions.SetNow(func() time.Time { return now })
	d := door(t, direct(t, escaper.Options{Nodes: prefixNode("127.66.0.0/16"), Sessions: sessions}))
	ask := func() netip.Addr {
		t.Helper()
		r := bySession("alice", "s")
		r.Target, r.Selection.Session.Lifetime = to, time.Minute
		a, err := sourceOf(t, d, r)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	seen := map[netip.Addr]bool{}
	for generation := range 4 {
		first := ask()
		if seen[first] {
			t.Errorf("generation %d has an earlier one's address", generation)
		}
		seen[first] = true
		now = now.Add(time.Minute - time.Nanosecond)
		if a := ask(); a != first {
			t.Errorf("generation %d moved too early", generation)
		}
		now = now.Add(time.Nanosecond)
	}
	// The memory has an end: the oldest give way, and begin again.
	const keys = 2 * escaper.MaxSessions
	for key := range uint64(keys) {
		if g := sessions.Age(key, time.Hour); g != 0 {
			t.Fatalf("session %d begins with generation %d", key, g)
		}
		now = now.Add(time.Millisecond)
	}
	if n := sessions.Known(); n > escaper.MaxSessions || n < escaper.MaxSessions/2 {
		t.Errorf("%d sessions are remembered, %d are the most", n, escaper.MaxSessions)
	}
	now = now.Add(2 * time.Hour)
	if g := sessions.Age(keys-1, time.Hour); g != 1 {
		t.Errorf("the newest session is in generation %d", g)
	}
}
