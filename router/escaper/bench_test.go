package escaper_test

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"testing"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/selection"
)

// drain accepts one connection at a time and waits for its end.
func (o *origin) drain(tb testing.TB) *origin {
	tb.Helper()
	done := make(chan struct{})
	go func() {
		var b [1]byte
		defer close(done)
		for {
			c, err := o.AcceptTCP()
			if err != nil {
				return
			}
			_, _ = c.Read(b[:]) // the other side's reset
			_ = c.Close()
		}
	}()
	tb.Cleanup(func() {
		_ = o.Close()
		<-done
	})
	return o
}

func BenchmarkOpenLiteral(b *testing.B) {
	o := listen(b, "127.0.0.1:0").drain(b)
	d := door(b, direct(b, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r := request(literal(o.addr), byClient(pathID("a")))
	b.ReportAllocs()
	for b.Loop() {
		c, err := d.Open(ctx, r)
		if err != nil {
			b.Fatal(err)
		}
		_ = c.TCP.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
}

// BenchmarkOpenName resolves a name with four addresses, so that a race is set
// up; the first attempt wins.
func BenchmarkOpenName(b *testing.B) {
	o := listen(b, "127.0.0.1:0").drain(b)
	n := &names{hosts: map[string]resolve.Answer{"www.example": {V4: addrs("127.0.0.1", "127.0.0.1", "127.0.0.1"), V6: addrs("::1")}}}
	d := door(b, direct(b, escaper.Options{Resolver: quiet{n}, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	r := request(escaper.Target{Host: "www.example", Port: o.addr.Port()}, selection.Selection{})
	b.ReportAllocs()
	for b.Loop() {
		c, err := d.Open(context.Background(), r)
		if err != nil {
			b.Fatal(err)
		}
		_ = c.TCP.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
}

// quiet is names without its notes.
type quiet struct{ *names }

func (q quiet) Ready(string, selection.Family) bool { return true }

func (q quiet) Lookup(context.Context, string, selection.Family) (resolve.Answer, error) {
	a := q.hosts["www.example"]
	return resolve.Answer{V4: a.V4}, nil
}

// BenchmarkRefused is what a bad selection costs.
func BenchmarkRefused(b *testing.B) {
	d := door(b, direct(b, escaper.Options{EnableSelection: true, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	r := request(escaper.Target{Addr: addr("127.0.0.1"), Port: 80}, byClient(pathID("nobody")))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Open(context.Background(), r); err == nil {
			b.Fatal("opened")
		}
	}
}

// BenchmarkManyPaths makes an escaper of 65,000 paths and tells it that all of
// them are up.
func BenchmarkManyPaths(b *testing.B) {
	nodes := make([]escaper.NodeOptions, 65000)
	for i := range nodes {
		nodes[i] = escaper.NodeOptions{ID: "n" + strconv.Itoa(i), V4: netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), Weight: 1}
	}
	b.ReportAllocs()
	for b.Loop() {
		d, err := escaper.NewDirect(escaper.Options{Name: "out", Nodes: nodes})
		if err != nil {
			b.Fatal(err)
		}
		for _, p := range d.Paths() {
			p.SetFamilyState(selection.V4, escaper.Up, "")
		}
		d.Publish()
	}
}
