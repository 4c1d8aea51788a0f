package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/socks/client"
	"wayout/selection"
)

// An association passes the datagrams of one client (RFC 1928, section 7). What
// is wrong with a datagram is that datagram's end alone.
type association struct {
	s      *Server
	k      *relay.Task
	ctx    context.Context // ends with the association
	near   *net.UDPConn    // the client's side
	police [2]relay.Police // from the client, and to it
	far    escaper.PacketConn
	owner  netip.Addr // whose datagrams these are
	port   uint16     // that the client said it would send from; 0: that of its first datagram

	peer     atomic.Pointer[netip.AddrPort] // where the client sends from; nil: it has not yet
	last     atomic.Int64                   // when a datagram passed, either way: Unix time, ns
	in, out  atomic.Int64                   // payload bytes
	dropped  atomic.Int64
	senders  sync.WaitGroup
	names    map[string][]datagram // waiting for their name, by name; present: somebody sends them
	waiting  int                   // what is in names comes to, with overhead
	namesMux sync.Mutex
}

type datagram struct {
	to      escaper.Target
	payload []byte
}

const (
	maxDatagram = 1<<16 - 1
	// What an association may have waiting for names to be resolved.
	maxNames   = 16
	maxWaiting = 256 << 10
	overhead   = 64 // of each datagram that waits
	// maxFailures is how often in a row a socket may fail before it is given up.
	maxFailures = 100
)

// associate serves UDP ASSOCIATE. The association lasts as long as the control
// connection, which waits on the worker.
func (c *conn) associate(from client.Addr) bool {
	c.rec.Method = "UDP"
	if err := c.admit(); err != nil {
		return c.refuseRequest(err)
	}
	c.k.Leave() // what follows may block
	c.req.Task = nil
	far, err := c.s.o.OpenPacket(c.s.front.Context(), c.req)
	c.rec.Choice = c.req.Choice
	if err != nil {
		return c.refuseRequest(err)
	}
	near, err := c.s.o.ListenPacket(netip.AddrPortFrom(c.local.Addr(), 0))
	if err != nil {
		_ = far.Close()
		return c.refuseRequest(fmt.Errorf("%w: %w", escaper.ErrResources, err))
	}
	if c.rec.Source = far.Source(selection.V4); !c.rec.Source.IsValid() {
		c.rec.Source = far.Source(selection.V6)
	}
	bound, _ := near.LocalAddr().(*net.UDPAddr)
	if err := c.write(appendReply(c.out[:0], replyOK, bound.AddrPort())); err != nil {
		c.k.Leave()
		_ = far.Close()
		_ = near.Close()
		c.observe(http.StatusOK, err)
		return false
	}
	c.drop()
	a := &association{police: c.police(), s: c.s, k: c.k, near: near, far: far, owner: c.client.Addr(), names: map[string][]datagram{}}
	// An address that is not the client's own, as behind an address
	// translation, says nothing of the port either.
	if ip := from.IP.Unmap(); ip.IsValid() && (ip.IsUnspecified() || ip == a.owner) {
		a.port = from.Port
	}
	err = a.run(c)
	c.rec.BytesIn, c.rec.BytesOut, c.rec.Dropped = a.in.Load(), a.out.Load(), a.dropped.Load()
	c.observe(http.StatusOK, err)
	return false
}

// police bounds the datagrams of the server and the user, from the client and to
// it.
func (c *conn) police() [2]relay.Police {
	up, down := auth.Bytes(c.s.o.Meter, c.t.meter())
	ownUp, ownDown := auth.Datagrams(c.s.o.Meter, c.t.meter())
	return [2]relay.Police{{Own: ownUp, Of: up}, {Own: ownDown, Of: down}}
}

// run passes datagrams until the association ends, and says why it ended: nil
// when the client closed.
func (a *association) run(c *conn) error {
	ctx, cancel := context.WithCancel(a.s.front.Context())
	a.ctx = ctx
	a.s.o.AssociationsOpen.Add(1)
	defer a.s.o.AssociationsOpen.Add(-1)
	a.touch()
	a.far.OnKill(a.k.Kill)
	var loops sync.WaitGroup
	loops.Go(a.toFar)
	loops.Go(a.toNear)
	err := a.await(c.fd)
	a.k.Leave()
	cancel()
	// Whatever a close says, its loop ends.
	_ = a.far.Close()
	_ = a.near.Close()
	loops.Wait()
	a.senders.Wait()
	if errors.Is(err, relay.ErrStopped) {
		err = escaper.ErrClosed
	}
	return err
}

// await waits for the end of the control connection. What is said on it means
// nothing.
func (a *association) await(fd int) error {
	var junk [512]byte
	for {
		var until time.Time
		if d := a.s.o.Timeouts.UDPIdle; d > 0 {
			until = time.Unix(0, a.last.Load()).Add(d)
			if !until.After(time.Now()) {
				return relay.ErrIdle
			}
		}
		_, err := a.k.Wait(fd, unix.EPOLLIN|unix.EPOLLRDHUP, until)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return err
		}
		n, err := syscall.Read(fd, junk[:])
		switch {
		case n > 0, errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EINTR):
		case err == nil, errors.Is(err, io.EOF):
			return nil
		default:
			return &connError{err}
		}
	}
}

// drop counts a datagram that is not passed on.
func (a *association) drop() {
	a.dropped.Add(1)
	a.s.o.DatagramsDropped.Add(1)
}

func (a *association) touch() { a.last.Store(time.Now().UnixNano()) }

// A patience tells errors that pass from a socket that is of no more use.
type patience struct{ failed int }

func (p *patience) goesOn(a *association, err error) bool {
	if err == nil {
		p.failed = 0
		return true
	}
	if a.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return false
	}
	a.drop()
	if p.failed++; p.failed >= maxFailures {
		a.k.Kill(err)
		return false
	}
	return true
}

// toFar passes what the client sends.
func (a *association) toFar() {
	buf := a.s.datagrams.get()
	defer a.s.datagrams.put(buf)
	var p patience
	for {
		n, src, err := a.near.ReadFromUDPAddrPort(buf[:])
		if !p.goesOn(a, err) {
			return
		}
		if err == nil && !a.take(buf[:n], src) {
			a.drop()
		}
	}
}

// take passes one datagram on, and reports false when it is dropped at once.
func (a *association) take(b []byte, src netip.AddrPort) bool {
	if !a.owns(src) {
		return false
	}
	addr, payload, err := client.ParseHeader(b)
	if err != nil {
		return false
	}
	to, err := target(addr)
	if err != nil {
		return false
	}
	if a.peer.Load() == nil {
		a.peer.Store(&src)
	}
	a.touch()
	if !a.police[0].Pass(time.Now(), len(payload)) {
		return false
	}
	if to.Host != "" {
		return a.later(to, payload)
	}
	a.send(to, payload)
	return true
}

// owns says whether a datagram comes from who the association belongs to.
func (a *association) owns(src netip.AddrPort) bool {
	if peer := a.peer.Load(); peer != nil {
		return src == *peer
	}
	return src.Addr().WithZone("").Unmap() == a.owner && (a.port == 0 || a.port == src.Port())
}

func (a *association) send(to escaper.Target, payload []byte) {
	if a.far.Send(a.ctx, to, payload) != nil {
		a.drop()
		return
	}
	a.out.Add(int64(len(payload)))
}

// later sends a datagram to a name, whose resolution may take its time, without
// holding up those that follow. The order of those to one name is kept.
func (a *association) later(to escaper.Target, payload []byte) bool {
	a.namesMux.Lock()
	defer a.namesMux.Unlock()
	queue, busy := a.names[to.Host]
	size := len(payload) + overhead
	if !busy && len(a.names) >= maxNames || a.waiting+size > maxWaiting {
		return false
	}
	a.waiting += size
	a.names[to.Host] = append(queue, datagram{to, append([]byte(nil), payload...)})
	if !busy {
		a.senders.Go(func() { a.sendTo(to.Host) })
	}
	return true
}

// sendTo sends what waits for a name until nothing does.
func (a *association) sendTo(name string) {
	for {
		a.namesMux.Lock()
		queue := a.names[name]
		if len(queue) == 0 {
			delete(a.names, name)
			a.namesMux.Unlock()
			return
		}
		a.names[name] = nil
		a.namesMux.Unlock()
		for _, d := range queue {
			a.send(d.to, d.payload)
			a.namesMux.Lock()
			a.waiting -= len(d.payload) + overhead
			a.namesMux.Unlock()
		}
	}
}

// toNear passes what comes back, to nobody but the client.
func (a *association) toNear() {
	const room = 3 + 1 + 16 + 2 // for a header with an IP address
	buf := a.s.datagrams.get()
	defer a.s.datagrams.put(buf)
	var p patience
	for {
		n, from, err := a.far.Receive(buf[room:])
		if !p.goesOn(a, err) {
			return
		}
		peer := a.peer.Load()
		if err != nil || peer == nil {
			if err == nil {
				a.drop()
			}
			continue
		}
		if !a.police[1].Pass(time.Now(), n) {
			a.drop()
			continue
		}
		var head [room]byte
		h, err := client.AppendHeader(head[:0], client.AddrOf(netip.AddrPortFrom(from.Addr().WithZone(""), from.Port())))
		if err == nil {
			begin := room - len(h)
			copy(buf[begin:], h)
			_, err = a.near.WriteToUDPAddrPort(buf[begin:room+n], *peer)
		}
		if err != nil {
			a.drop()
			continue
		}
		a.touch()
		a.in.Add(int64(n))
	}
}

// datagrams lends buffers of a whole datagram and its header.
type datagrams struct{ pool sync.Pool }

func (d *datagrams) get() *[maxDatagram]byte {
	if b, ok := d.pool.Get().(*[maxDatagram]byte); ok {
		return b
	}
	return new([maxDatagram]byte)
}

func (d *datagrams) put(b *[maxDatagram]byte) { d.pool.Put(b) }
