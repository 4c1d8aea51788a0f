package httpproxy

import (
	"net/http"
	"sync/atomic"
	"syscall"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
)

// connect serves CONNECT.
func (x *exchange) connect() outcome {
	conn, err := x.s.o.Open(x.s.ctx, x.req)
	x.rec.Choice = x.req.Choice
	if err != nil {
		return x.refuse(err)
	}
	x.conn = conn
	x.rec.Source = conn.Source
	w := x.out(smallBuffer)
	w.out = append(w.out, "HTTP/1.1 200 Connection established\r\n"...)
	w.out = x.appendEgress(w.out)
	w.out = append(w.out, "\r\n"...)
	if err := w.flush(); err != nil {
		_ = conn.Close()
		x.observe(http.StatusOK, err)
		return drop
	}
	return x.tunnel(http.StatusOK, nil)
}

// A tunnel is what is left of a request once the relay moves its bytes.
type tunnel struct {
	s     *Server
	conn  *escaper.Conn
	rec   escaper.Record
	shard *shard
	relay atomic.Pointer[relay.Tunnel]
	dead  atomic.Bool
}

// tunnel hands both connections to the relay, with what was read ahead: from
// the client what its reader holds, from the origin toClient.
func (x *exchange) tunnel(status int, toClient []byte) outcome {
	t := &tunnel{s: x.s, conn: x.conn, rec: x.rec}
	t.rec.Status = status
	a, err := relay.Detach(x.c.tcp)
	if err != nil {
		_ = x.conn.Close()
		x.observe(status, err)
		return gone
	}
	b, err := relay.Detach(x.conn.TCP)
	if err != nil {
		_ = syscall.Close(a)
		x.conn.Release()
		x.observe(status, err)
		return gone
	}
	t.shard = x.s.track(t)
	handle, err := x.s.o.Relay.Start(relay.Spec{
		A: a, B: b,
		ToB: x.c.in.unread(), ToA: toClient,
		Idle: x.s.o.Timeouts.TunnelIdle,
		Done: t.done,
	})
	if err != nil {
		t.done(relay.Result{Cause: err})
		return gone
	}
	t.relay.Store(handle)
	if t.dead.Load() {
		handle.Kill(escaper.ErrClosed)
	}
	// The path's address may have gone meanwhile: it is called at once then.
	t.conn.OnKill(handle.Kill)
	return gone
}

// done is told how the tunnel ended; its descriptors are closed.
func (t *tunnel) done(r relay.Result) {
	t.conn.Release()
	t.rec.Duration = time.Since(t.rec.Start)
	t.rec.BytesOut, t.rec.BytesIn, t.rec.Err = r.AToB, r.BToA, r.Cause
	t.s.observe(&t.rec)
	t.s.untrack(t.shard, t)
}

func (t *tunnel) endIdle() {}

func (t *tunnel) cut() {
	t.dead.Store(true)
	if h := t.relay.Load(); h != nil {
		h.Kill(escaper.ErrClosed)
	}
}
