package escaper_test

import (
	"context"
	"testing"

	"wayout/router/escaper"
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
		_ = c.TCP.SetLinger(0)
		_ = c.Close()
	}
}

var _ selection.Family
