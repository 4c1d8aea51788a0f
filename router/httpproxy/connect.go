package httpproxy

import (
	"net/http"
	"sync/atomic"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
)

// connect serves CONNECT.
func (x *exchange) connect() outcome {
	if x.c.task != nil {
		x.req.Task = x.c.task
	}
	conn, err := x.s.o.Open(x.s.front.Context(), x.req)
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
	if x.c.task != nil {
		err = x.c.establish(w.out)
	} else {
		err = w.flush()
	}
	if err != nil {
		_ = conn.Close()
		left := x.c.leaveWorker()
		x.observe(http.StatusOK, err)
		if !left {
			return over
		}
		return drop
	}
	return x.tunnel(http.StatusOK, conn.Early)
}

// A tunnel is what is left of a request once the relay moves its bytes.
type tunnel struct {
	relay.Bare // of the client's side; with a task where the connection began as one

	s     *Server
	conn  *escaper.Conn
	rec   escaper.Record
	shard *relay.Shard
	relay atomic.Pointer[relay.Tunnel]

	counted counted
}

// tunnel hands both connections to the relay, with what was read ahead: from
// the client what its reader holds, from the origin toClient.
func (x *exchange) tunnel(status int, toClient []byte) outcome {
	t := x.c.tunnel
	if t == nil {
		t = &tunnel{s: x.s}
	}
	t.conn, t.rec = x.conn, x.rec
	t.rec.Status = status
	a, b, err := x.handOver()
	if err != nil {
		if t.Task != nil {
			t.Task.Leave()
		}
		x.observe(status, err)
		if t.shard != nil {
			x.s.front.Untrack(t.shard, t)
		}
		return gone
	}
	if t.shard == nil {
		t.shard = x.s.front.Track(t)
	}
	t.counted, x.counted = x.counted, counted{}
	handle, err := x.s.o.Relay.Start(relay.Spec{
		A: a, B: b, Task: t.Task,
		ToB: x.c.in.unread(), ToA: toClient,
		Idle: x.s.o.Timeouts.TunnelIdle, Budgets: x.budgets(),
		Done: t.done, Prompt: x.s.o.Prompt,
	})
	if err != nil {
		t.done(relay.Result{Cause: err})
		return gone
	}
	t.relay.Store(handle)
	if t.Dead() {
		handle.Kill(escaper.ErrClosed)
	}
	// The path's address may have gone meanwhile: it is called at once then.
	x.conn.OnKill(handle.Kill)
	return gone
}

// done is told how the tunnel ended; its descriptors are closed.
func (t *tunnel) done(r relay.Result) {
	t.conn.Release(r.Cause)
	t.rec.Duration = time.Since(t.rec.Start)
	t.rec.BytesOut, t.rec.BytesIn, t.rec.Err = r.AToB, r.BToA, r.Cause
	t.s.observe(&t.rec)
	t.counted.end(t.s)
	t.s.front.Untrack(t.shard, t)
}

// Cut ends the tunnel, or what leads to it.
func (t *tunnel) Cut() {
	t.Bare.Cut()
	if h := t.relay.Load(); h != nil {
		h.Kill(escaper.ErrClosed)
	}
}
