package escaper_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/selection"
)

// tunnelPeer is an HTTP proxy that says yes to every CONNECT, connects nowhere
// and remembers from where it was asked, and what.
type tunnelPeer struct {
	addr string

	mu   sync.Mutex
	from []netip.Addr
	said []string // the selection that was handed on
}

func newTunnelPeer(t *testing.T) *tunnelPeer {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	p := &tunnelPeer{addr: l.addr.String()}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				req, err := http.ReadRequest(bufio.NewReader(c))
				if err != nil {
					return
				}
				p.mu.Lock()
				p.from = append(p.from, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
				p.said = append(p.said, req.Header.Get("X-Way"))
				p.mu.Unlock()
				if strings.HasPrefix(req.Host, "bad") {
					_, _ = io.WriteString(c, "HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
					return
				}
				_, _ = io.WriteString(c, "HTTP/1.1 200 Yes\r\n\r\n")
				_, _ = io.Copy(io.Discard, c)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return p
}

func (p *tunnelPeer) seen() (from []netip.Addr, said []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append(from, p.from...), append(said, p.said...)
}

func peerAt(t *testing.T, at string) *escaper.Peer {
	t.Helper()
	p, err := escaper.NewPeer(escaper.PeerOptions{Kind: "proxy_http", Addr: at, SelectionHeader: "X-Way", Timeout: 10 * time.Second}, escaper.NewAuthorities())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPeerConnectionsApart: a kept connection to a peer is that of one user,
// target and session.
func TestPeerConnectionsApart(t *testing.T) {
	t.Parallel()
	p := newTunnelPeer(t)
	e := direct(t, escaper.Options{
		Peers: true, Idle: escaper.NewIdle(8, 64, time.Minute), EnableSelection: true, PassSelection: true,
		Nodes: []escaper.NodeOptions{
			{ID: "net", Net4: netip.MustParsePrefix("127.67.0.0/16"), Peer: peerAt(t, p.addr), Weight: 1},
			{ID: "one", V4: addr("127.0.0.2"), Peer: peerAt(t, p.addr)},
		},
	})
	d := door(t, e)
	ask := func(id, user, session, host string) (reused bool) {
		t.Helper()
		r := bySession(user, session)
		r.Target, r.Reuse = escaper.Target{Host: host, Port: 80}, true
		if id != "" {
			r.Selection.Client = selection.Layer{pathID(id)}
		}
		c, err := d.Open(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		reused = c.Reused
		c.Park()
		return reused
	}
	for i, x := range []struct {
		id, user, session, host string
		reused                  bool
	}{
		{"", "alice", "", "x.test", false},
		{"", "alice", "", "x.test", false}, // an address of its own each time
		{"", "alice", "a", "x.test", false},
		{"", "alice", "b", "x.test", false},
		{"", "alice", "a", "x.test", true},
		{"", "alice", "b", "x.test", true},
		{"", "alice", "a", "y.test", false},
		{"", "bob", "a", "x.test", false},
		{"one", "alice", "", "x.test", false},
		{"one", "alice", "", "x.test", true},
		{"one", "alice", "a", "x.test", true}, // it has but the one address
		{"one", "bob", "", "x.test", false},
	} {
		if got := ask(x.id, x.user, x.session, x.host); got != x.reused {
			t.Errorf("request %d (%+v): reused %v", i, x, got)
		}
	}
	from, _ := p.seen()
	distinct := map[netip.Addr]int{}
	for _, a := range from {
		distinct[a]++
	}
	// Two fresh ones, three sessions (alice's a has two targets), one fixed (two users).
	if len(from) != 8 || len(distinct) != 6 || distinct[addr("127.0.0.2")] != 2 {
		t.Errorf("the peer was asked from %v", from)
	}
}

func TestPeerPassesSelectionOn(t *testing.T) {
	t.Parallel()
	p := newTunnelPeer(t)
	open := func(pass bool, entries ...selection.Entry) (*escaper.Request, error) {
		d := door(t, direct(t, escaper.Options{
			Peers: true, EnableSelection: true, PassSelection: pass,
			Nodes: []escaper.NodeOptions{{ID: "h", V4: addr("127.0.0.2"), Peer: peerAt(t, p.addr), Weight: 1}},
		}))
		r := request(escaper.Target{Host: "x.test", Port: 80}, byClient(entries...))
		c, err := d.Open(t.Context(), r)
		if err == nil {
			err = c.Close()
		}
		return r, err
	}
	far := func(name string, v selection.Value) selection.Entry { return selection.Entry{Escaper: name, Value: v} }
	for _, x := range []struct {
		pass    bool
		entries []selection.Entry
		said    string
		err     error
	}{
		{true, nil, "", nil},
		{true, []selection.Entry{pathID("h")}, "", nil},
		{true, []selection.Entry{far("far", selection.ID("q")), pathID("h"), far("more", selection.Index(0))}, `{"far":"q","more":0}`, nil},
		{true, []selection.Entry{far("far", selection.Address(addr("2001:db8::1")))}, `{"far":"2001:db8::1"}`, nil},
		{true, []selection.Entry{pathID("nobody"), far("far", selection.ID("q"))}, "", selection.ErrUnknown},
		{false, []selection.Entry{far("far", selection.ID("q"))}, "", selection.ErrUnknown},
	} {
		_, before := p.seen()
		_, err := open(x.pass, x.entries...)
		_, said := p.seen()
		switch {
		case x.err != nil:
			if !errors.Is(err, x.err) || len(said) != len(before) {
				t.Errorf("%v: %v, and the peer got %q", x.entries, err, said[len(before):])
			}
		case err != nil || len(said) != len(before)+1 || said[len(before)] != x.said:
			t.Errorf("%v: %v, the peer got %q, want %q", x.entries, err, said[len(before):], x.said)
		}
	}
}

// TestPeerOfAnotherFamily: the policy passes by a path that has lost what leads
// to its peer, and one that never had it is an error that says so.
func TestPeerOfAnotherFamily(t *testing.T) {
	t.Parallel()
	p := newTunnelPeer(t)
	e := direct(t, escaper.Options{
		Peers: true, Policy: selection.Serial, EnableSelection: true,
		Nodes: []escaper.NodeOptions{
			{ID: "first", V4: addr("127.0.0.2"), V6: addr("::1"), Peer: peerAt(t, p.addr), Weight: 1},
			{ID: "second", V4: addr("127.0.0.3"), Peer: peerAt(t, p.addr), Weight: 1},
			{ID: "six", V6: addr("2001:db8::1"), Peer: peerAt(t, p.addr)},
		},
	})
	d := door(t, e)
	ask := func(entries ...selection.Entry) (string, error) {
		r := request(escaper.Target{Host: "x.test", Port: 80}, byClient(entries...))
		c, err := d.Open(t.Context(), r)
		if err != nil {
			return "", err
		}
		return r.Choice.Path, c.Close()
	}
	if path, err := ask(); path != "out/first" || err != nil {
		t.Errorf("%s, %v", path, err)
	}
	e.Paths()[0].SetFamilyState(selection.V4, escaper.Down, "gone")
	e.Publish()
	if path, err := ask(); path != "out/second" || err != nil {
		t.Errorf("without the family of the peer: %s, %v", path, err)
	}
	if _, err := ask(pathID("first")); !errors.Is(err, selection.ErrDown) {
		t.Errorf("selected: %v", err)
	}
	if _, err := ask(pathID("six")); !errors.Is(err, escaper.ErrUnreachable) || escaper.StatusOf(err) != 502 {
		t.Errorf("never of the family: %v", err)
	}
	x, err := d.Table().Explain(t.Context(), request(escaper.Target{Host: "x.test", Port: 80}, selection.Selection{}), false)
	if err != nil || x.Choice.Path != "out/second" || x.Source != addr("127.0.0.3") {
		t.Errorf("explain: %+v, %v", x, err)
	}
}

func TestPeerRefuses(t *testing.T) {
	t.Parallel()
	p := newTunnelPeer(t)
	d := door(t, direct(t, escaper.Options{Peers: true, Nodes: []escaper.NodeOptions{{ID: "h", V4: addr("127.0.0.2"), Peer: peerAt(t, p.addr), Weight: 1}}}))
	_, err := d.Open(t.Context(), request(escaper.Target{Host: "bad.test", Port: 80}, selection.Selection{}))
	if err == nil || escaper.StatusOf(err) == 500 {
		t.Errorf("%v", err)
	}
	if _, err := d.OpenPacket(t.Context(), request(escaper.Target{}, selection.Selection{})); !errors.Is(err, escaper.ErrNoDatagrams) {
		t.Errorf("datagrams: %v", err)
	}
	if n := d.Table().Paths()[0].Counters(); n.Open != 0 {
		t.Errorf("%+v", n)
	}
	for _, o := range []escaper.PeerOptions{
		{Kind: "proxy_http", Addr: "nowhere"},
		{Kind: "proxy_http", Addr: "127.0.0.1:0"},
		{Kind: "proxy_ftp", Addr: "127.0.0.1:1"},
		{Kind: "proxy_https", Addr: "127.0.0.1:1", TLSCA: "/nonexistent"},
	} {
		if _, err := escaper.NewPeer(o, escaper.NewAuthorities()); err == nil {
			t.Errorf("%+v is a peer", o)
		}
	}
}
