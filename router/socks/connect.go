package socks

import (
	"fmt"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/socks/client"
)

// A tunnel is what is left of a connection once the relay moves its bytes. It
// is there from the beginning, because it is what is tracked.
type tunnel struct {
	relay.Bare

	s     *Server
	user  *auth.User // nil: nobody in particular
	begun bool       // the meters count it
	conn  *escaper.Conn
	rec   escaper.Record
	place *relay.Shard
	relay atomic.Pointer[relay.Tunnel]
}

// appendReply puts together the reply to the request.
func (c *conn) appendReply(code byte) []byte {
	if c.old {
		return appendReply4(c.out[:0], reply4Refused, netip.AddrPort{})
	}
	return appendReply(c.out[:0], code, netip.AddrPort{})
}

// admit says whether there is room for the request, for the server and for its
// user. What is admitted is counted until it is refused after all, or over.
func (c *conn) admit() error {
	if err := c.room(); err != nil {
		return err
	}
	if err := c.s.o.Meter.Begin(); err != nil {
		return fmt.Errorf("server: %w", err)
	}
	if err := c.t.meter().Begin(); err != nil {
		c.s.o.Meter.End()
		return fmt.Errorf("user %s: %w", c.t.user.Name, err)
	}
	c.t.begun = true
	return nil
}

// room says whether the daemon's means allow for more.
func (c *conn) room() error {
	if c.s.o.Admit == nil {
		return nil
	}
	if err := c.s.o.Admit(); err != nil {
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	return nil
}

// meter is the user's, nil where there is none.
func (t *tunnel) meter() *auth.Meter {
	if t.user == nil {
		return nil
	}
	return t.user.Meter
}

// uncount takes back what the meters count, once.
func (t *tunnel) uncount() {
	if t.begun {
		t.meter().End()
		t.s.o.Meter.End()
	}
	t.begun = false
}

// release lets go of a connection that is over.
func (t *tunnel) release() {
	t.uncount()
	t.s.front.Untrack(t.place, t)
}

// connect serves CONNECT.
func (c *conn) connect(to client.Addr) bool {
	c.rec.Method = http.MethodConnect
	t, err := target(to)
	if err != nil {
		return c.refuseRequest(err)
	}
	c.req.Target = t
	if c.s.o.Observe != nil {
		c.rec.Target = t.String()
	}
	if err := c.admit(); err != nil {
		return c.refuseRequest(err)
	}
	conn, err := c.s.o.Open(c.s.front.Context(), c.req)
	c.rec.Choice = c.req.Choice
	if err != nil {
		return c.refuseRequest(err)
	}
	c.rec.Source = conn.Source
	var answer []byte
	if c.old {
		answer = appendReply4(c.out[:0], reply4OK, conn.Source)
	} else {
		answer = appendReply(c.out[:0], replyOK, conn.Source)
	}
	if err := c.write(answer); err != nil {
		_ = conn.Close()
		c.observe(http.StatusOK, err)
		return false
	}
	return c.tunnel(conn)
}

// tunnel hands both connections to the relay, with what the client has said
// already.
func (c *conn) tunnel(conn *escaper.Conn) bool {
	far := conn.FD
	if conn.TCP != nil {
		var err error
		if far, err = relay.Detach(conn.TCP); err != nil {
			_ = conn.Close()
			c.observe(http.StatusOK, err)
			return false
		}
	}
	t := c.t
	t.conn = conn
	up, down := auth.Bytes(c.s.o.Meter, t.meter())
	t.rec.Status = http.StatusOK
	handle, err := c.s.o.Relay.Start(relay.Spec{
		A: c.fd, B: far, Task: c.k, ToB: c.unread(), ToA: conn.Early,
		Budgets: [2]relay.Budget{up, down},
		Idle:    c.s.o.Timeouts.TunnelIdle, Done: t.done, Prompt: c.s.o.Prompt,
	})
	c.drop()
	if err != nil {
		if !c.s.o.Prompt {
			c.k.Leave()
		}
		t.done(relay.Result{Cause: err})
		return true
	}
	t.relay.Store(handle)
	if t.Dead() {
		handle.Kill(escaper.ErrClosed)
	}
	// The path's address may have gone meanwhile: it is called at once then.
	conn.OnKill(handle.Kill)
	return true
}

// done is told how the tunnel ended; its descriptors are closed.
func (t *tunnel) done(r relay.Result) {
	t.conn.Release(r.Cause)
	if t.s.o.Observe != nil {
		t.rec.Duration = time.Since(t.rec.Start)
		t.rec.BytesOut, t.rec.BytesIn, t.rec.Err = r.AToB, r.BToA, r.Cause
		t.s.o.Observe(&t.rec)
	}
	t.release()
}

// Cut ends the tunnel, or what leads to it.
func (t *tunnel) Cut() {
	t.Bare.Cut()
	if h := t.relay.Load(); h != nil {
		h.Kill(escaper.ErrClosed)
	}
}
