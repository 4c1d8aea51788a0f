package tproxy

import (
	"errors"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/escaper"
	"wayout/router/relay"
)

// method is what records call a diverted connection.
const method = "TPROXY"

// A conn is a diverted connection, from its accept to the end of its tunnel.
type conn struct {
	relay.Bare

	s        *Server
	k        *relay.Task
	fd       int
	admitted *admission // nil: not yet, or not any more
	conn     *escaper.Conn
	rec      escaper.Record
	place    *relay.Shard
	relay    atomic.Pointer[relay.Tunnel]
}

// begin serves a new connection, as a task. It returns when the connection has
// ended or has become a tunnel.
func (s *Server) begin(k *relay.Task, a relay.Accepted, own netip.AddrPort) {
	c := &conn{Bare: relay.Bare{Task: k}, s: s, k: k, fd: a.FD}
	c.place = s.front.Track(c)
	c.rec = escaper.Record{Start: time.Now(), Server: s.o.Name, Client: a.Remote, Method: method}
	r := s.o.request(a.Remote, a.Local)
	r.Task = k
	if s.o.Observe != nil {
		c.rec.Target = r.Target.String()
	}
	if err := c.open(r, a.Local == own); err != nil {
		c.refuse(err)
		return
	}
	c.tunnel()
}

// open connects to where the client wanted to go.
func (c *conn) open(r *escaper.Request, own bool) (err error) {
	if own {
		return errOwn
	}
	if c.admitted, err = c.s.o.admit(r); err != nil {
		return err
	}
	c.rec.User = r.User
	if c.s.o.Sniff > 0 {
		if r.Name, err = c.sniff(); err != nil {
			return err
		}
		c.rec.Name = r.Name
	}
	c.conn, err = c.s.o.Open(c.s.front.Context(), r)
	c.rec.Choice = r.Choice
	return err
}

// sniff waits for what the client says first, and leaves it unread. A client
// that says nothing, as one that the server greets first, has no name for its
// destination. The error is that the connection is to be given up.
func (c *conn) sniff() (string, error) {
	until := time.Now().Add(c.s.o.Sniff)
	var buf *peek
	defer func() { c.s.peeks.put(buf) }()
	seen := 0
	for {
		if buf == nil {
			buf = c.s.peeks.get()
		}
		n, _, err := syscall.Recvfrom(c.fd, buf[:], syscall.MSG_PEEK)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN) && seen == 0:
			// Nothing is lent to a connection that waits for its first byte.
			c.s.peeks.put(buf)
			buf = nil
			if err := c.await(until); err != nil {
				return "", ignoreLate(err)
			}
			continue
		case errors.Is(err, syscall.EAGAIN):
		case err != nil:
			return "", os.NewSyscallError("recvfrom", err)
		case n == seen: // woken by its end
			return "", nil
		default:
			seen = n
		}
		name, s := sniff(buf[:seen])
		if s != unclear || seen == len(buf) {
			return name, nil
		}
		// More than is there already has to come before it is woken again.
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, seen+1); err != nil {
			return "", os.NewSyscallError("setsockopt SO_RCVLOWAT", err)
		}
		waited := c.await(until)
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1); err != nil {
			return "", os.NewSyscallError("setsockopt SO_RCVLOWAT", err)
		}
		if waited != nil {
			return "", ignoreLate(waited)
		}
	}
}

func (c *conn) await(until time.Time) error {
	_, err := c.k.Wait(c.fd, unix.EPOLLIN, until)
	return err
}

// ignoreLate takes a deadline for what it is: no reason to give up.
func ignoreLate(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// refuse resets the connection: there are no words that every client knows.
func (c *conn) refuse(err error) {
	_ = unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = syscall.Close(c.fd)
	c.rec.Status, c.rec.Err = statusOf(err), err
	c.observe(true)
	c.release()
}

// observe reports the connection; onTask says that the caller must not block.
func (c *conn) observe(onTask bool) {
	if c.s.o.Observe == nil {
		return
	}
	if onTask && !c.s.o.Prompt {
		c.k.Leave()
	}
	c.rec.Duration = time.Since(c.rec.Start)
	c.s.o.Observe(&c.rec)
}

func (c *conn) release() {
	c.admitted.end()
	c.s.front.Untrack(c.place, c)
}

// tunnel hands both connections to the relay.
func (c *conn) tunnel() {
	c.rec.Source, c.rec.Status = c.conn.Source, http.StatusOK
	far := c.conn.FD
	if c.conn.TCP != nil {
		var err error
		if far, err = relay.Detach(c.conn.TCP); err != nil {
			_ = c.conn.Close()
			c.refuse(err)
			return
		}
	}
	handle, err := c.s.o.Relay.Start(relay.Spec{
		A: c.fd, B: far, Task: c.k, ToA: c.conn.Early, Budgets: c.admitted.budgets(),
		Idle: c.s.o.TunnelIdle, Done: c.done, Prompt: c.s.o.Prompt,
	})
	if err != nil {
		if !c.s.o.Prompt {
			c.k.Leave()
		}
		c.done(relay.Result{Cause: err})
		return
	}
	c.relay.Store(handle)
	if c.Dead() {
		handle.Kill(escaper.ErrClosed)
	}
	// The path's address may have gone meanwhile: it is called at once then.
	c.conn.OnKill(handle.Kill)
}

// done is told how the tunnel ended; its descriptors are closed.
func (c *conn) done(r relay.Result) {
	c.conn.Release(r.Cause)
	c.rec.BytesOut, c.rec.BytesIn, c.rec.Err = r.AToB, r.BToA, r.Cause
	c.observe(false)
	c.release()
}

// Cut ends the tunnel, or what leads to it.
func (c *conn) Cut() {
	c.Bare.Cut()
	if h := c.relay.Load(); h != nil {
		h.Kill(escaper.ErrClosed)
	}
}

// peek is room for what is looked at.
type peek [mostSniffed]byte

// peeks lends such room.
type peeks struct{ pool sync.Pool }

func (p *peeks) get() *peek {
	if b, ok := p.pool.Get().(*peek); ok {
		return b
	}
	return new(peek)
}

// put takes it back; nil is nothing.
func (p *peeks) put(b *peek) {
	if b != nil {
		p.pool.Put(b)
	}
}
