package escaper_test

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/selection"
)

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, addr(s))
	}
	return out
}

// names is a resolver that knows a few names.
type names struct {
	mu    sync.Mutex
	hosts map[string]resolve.Answer
	late  map[string][]netip.Addr // IPv6 addresses that come only when asked for alone
	errs  map[string]error
	asked []string
}

func (n *names) Ready(string, selection.Family) bool { return true }

func (n *names) Lookup(_ context.Context, host string, want selection.Family) (resolve.Answer, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, host+" "+want.String())
	if err := n.errs[host]; err != nil {
		return resolve.Answer{}, err
	}
	a := n.hosts[host]
	if want != selection.V4|selection.V6 {
		a.Pending = 0 // a family asked for alone is waited for
		a.V6 = append(slices.Clone(a.V6), n.late[host]...)
	}
	if want&selection.V4 == 0 {
		a.V4 = nil
	}
	if want&selection.V6 == 0 {
		a.V6 = nil
	}
	if len(a.V4)+len(a.V6) == 0 && a.Pending == 0 {
		return resolve.Answer{}, &resolve.Error{Host: host, Kind: resolve.ErrNoData}
	}
	return a, nil
}

func (n *names) questions() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.asked...)
}

// filter makes a filter that lets loopback through.
func filter(tb testing.TB, host *escaper.Host, deny ...string) *escaper.Filter {
	tb.Helper()
	f, err := escaper.NewFilter(host, []string{"loopback"}, deny)
	if err != nil {
		tb.Fatal(err)
	}
	return f
}

// direct makes an escaper that may dial loopback, with all its paths up.
func direct(tb testing.TB, o escaper.Options) *escaper.Direct {
	tb.Helper()
	if o.Name == "" {
		o.Name = "out"
	}
	if o.Filter == nil {
		o.Filter = filter(tb, nil)
	}
	d, err := escaper.NewDirect(o)
	if err != nil {
		tb.Fatal(err)
	}
	for _, p := range d.Paths() {
		p.SetFamilyState(selection.V4, escaper.Up, "")
		p.SetFamilyState(selection.V6, escaper.Up, "")
	}
	d.Publish()
	return d
}

func door(tb testing.TB, ds ...escaper.Escaper) *escaper.Door {
	tb.Helper()
	t, err := escaper.NewTable(ds...)
	if err != nil {
		tb.Fatal(err)
	}
	d := escaper.NewDoor(t)
	tb.Cleanup(func() { d.Swap(nil) })
	return d
}

// origin accepts connections and says where each came from. What it accepts
// stays open to the end of the test, unless serve says otherwise.
type origin struct {
	*net.TCPListener
	addr netip.AddrPort
	seen chan netip.AddrPort
}

func listen(tb testing.TB, at string) *origin {
	tb.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", at)
	if err != nil {
		tb.Fatal(err)
	}
	l, ok := ln.(*net.TCPListener)
	if !ok {
		tb.Fatalf("listener is a %T", ln)
	}
	tb.Cleanup(func() { _ = l.Close() })
	return &origin{TCPListener: l, addr: l.Addr().(*net.TCPAddr).AddrPort()}
}

// hold accepts until the listener closes and reports sources to seen.
func (o *origin) hold(tb testing.TB) *origin {
	tb.Helper()
	o.seen = make(chan netip.AddrPort, 4096)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var held []net.Conn
		defer func() {
			for _, c := range held {
				_ = c.Close()
			}
		}()
		for {
			c, err := o.AcceptTCP()
			if err != nil {
				return
			}
			held = append(held, c)
			ap := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			o.seen <- netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		}
	}()
	tb.Cleanup(func() {
		_ = o.Close()
		<-done
	})
	return o
}

func (o *origin) next(tb testing.TB) netip.AddrPort {
	tb.Helper()
	select {
	case a := <-o.seen:
		return a
	case <-time.After(5 * time.Second):
		tb.Fatal("the origin saw no connection")
		return netip.AddrPort{}
	}
}

func literal(a netip.AddrPort) escaper.Target {
	return escaper.Target{Addr: a.Addr().Unmap(), Port: a.Port()}
}

func byClient(entries ...selection.Entry) selection.Selection {
	return selection.Selection{Client: entries}
}

func pathID(id string) selection.Entry {
	return selection.Entry{Escaper: "out", Value: selection.ID(id)}
}

func request(t escaper.Target, s selection.Selection) *escaper.Request {
	return &escaper.Request{Server: "web", Escaper: "out", Client: netip.MustParseAddrPort("192.0.2.1:1000"), Target: t, Selection: s}
}

// one is the prefix of a single address.
func one(s string) netip.Prefix {
	a := addr(s)
	return netip.PrefixFrom(a, a.BitLen())
}
