package httpproxy

import (
	"bytes"
	"syscall"

	"wayout/router/relay"
)

// A new connection begins on the worker that accepted it, as a task on a bare
// descriptor. A CONNECT whose head comes in one piece stays there: dial, answer
// and tunnel wake no other thread. Everything else becomes a Go connection with
// a goroutine of its own, which is what conn.own does.

// Begin serves a new client connection, as a task. It returns when the
// connection has ended, has become a tunnel, or is served elsewhere.
func (s *Server) Begin(k *relay.Task, a relay.Accepted) {
	c := s.newBare(k, a)
	if !c.first() {
		c.leave()
		_ = syscall.Close(a.FD)
		return
	}
	if !c.isWholeConnect() {
		if c.own() {
			go func() {
				c.serve()
				s.front.Untrack(c.shard, c)
			}()
		}
		return
	}
	x := s.newExchange(c)
	o := x.run()
	x.free()
	c.finish(o)
	if c.shard != nil { // it has left the worker
		s.front.Untrack(c.shard, c)
	}
}

func (s *Server) newBare(k *relay.Task, a relay.Accepted) *conn {
	c := &conn{s: s, task: k, fd: a.FD, client: a.Remote, local: a.Local}
	c.in.pool, c.in.dead = &s.buffers, &c.dead
	c.out.limit, c.out.dead = s.o.Timeouts.Write, &c.dead
	c.tunnel = &tunnel{Bare: relay.Bare{Task: k}, s: s}
	c.tunnel.shard = s.front.Track(c.tunnel)
	return c
}

// leave ends a bare connection's being tracked.
func (c *conn) leave() {
	c.in.drop()
	c.s.front.Untrack(c.tunnel.shard, c.tunnel)
}

// first reads what the client begins with.
func (c *conn) first() bool {
	for {
		if c.readable(uintptr(c.fd)) {
			return c.readErr == nil && c.in.buffered() > 0
		}
		if !c.tunnel.AwaitFirst(c.s.front, c.fd, c.s.o.Timeouts.Idle) {
			return false
		}
	}
}

// isWholeConnect says whether what was read is a CONNECT's whole head.
func (c *conn) isWholeConnect() bool {
	b := c.in.unread()
	if !bytes.HasPrefix(b, []byte("CONNECT ")) {
		return false
	}
	var end headEnd
	n, err := end.find(b)
	return err == nil && n > 0
}

// leaveWorker makes a bare connection an ordinary one on a goroutine of the
// task's own, because what comes next may wait for the client. It reports false
// when that has ended the connection.
func (c *conn) leaveWorker() bool {
	if c.task != nil {
		c.task.Leave()
	}
	return c.own()
}

// own makes a bare connection an ordinary one, which may block. It reports
// false when that has ended it.
func (c *conn) own() bool {
	k, t := c.task, c.tunnel
	if k == nil {
		return true
	}
	tcp, err := k.Attach(c.fd)
	if err == nil {
		c.raw, err = tcp.SyscallConn()
	}
	if err != nil {
		c.s.o.Logger.Warn("client connection lost", "server", c.s.o.Name, "client", c.client, "err", err)
		if tcp != nil {
			_ = tcp.Close()
		}
		c.leave()
		c.task, c.fd, c.tunnel = nil, -1, nil
		return false
	}
	c.tcp = tcp
	c.in.use(tcp, c.raw)
	c.out.use(tcp, c.raw)
	c.task, c.fd, c.tunnel = nil, -1, nil
	c.wake = c.readable
	// Tracked twice for a moment rather than not at all.
	c.shard = c.s.front.Track(c)
	if t.Dead() {
		c.Cut()
	}
	c.s.front.Untrack(t.shard, t)
	return true
}

// establish tells the client of a bare connection that its tunnel stands. A
// client that cannot take a head is no client.
func (c *conn) establish(b []byte) error {
	n, err := syscall.Write(c.fd, b)
	if err == nil && n < len(b) {
		err = syscall.EAGAIN
	}
	return err
}

// handOver gives the descriptors of both connections to the relay's keeping.
func (x *exchange) handOver() (a, b int, err error) {
	if a = x.c.fd; x.c.task == nil {
		if a, err = relay.Detach(x.c.tcp); err != nil {
			_ = x.conn.Close()
			return -1, -1, err
		}
	}
	if b = x.conn.FD; x.conn.TCP != nil {
		if b, err = relay.Detach(x.conn.TCP); err != nil {
			_ = syscall.Close(a)
			x.conn.Release(err)
			return -1, -1, err
		}
	}
	return a, b, nil
}
