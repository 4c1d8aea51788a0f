package tproxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/selection"
)

// What a flow may have waiting until it is open.
const (
	maxWaiting      = 16
	maxWaitingBytes = 64 << 10
)

// A flow is the datagrams of one client's address and port to one destination's.
type flow struct {
	d        *Datagrams
	o        *Options
	key      flowKey
	ctx      context.Context // ends with the flow
	cancel   context.CancelCauseFunc
	admitted *admission
	rec      escaper.Record

	last    atomic.Int64 // when it was last heard of, either way: Unix time, ns
	filed   int64        // the same, as of its place in the order; under the table's lock
	refused atomic.Bool  // it leads nowhere

	in, out, dropped atomic.Int64

	mu      sync.Mutex
	open    bool
	waiting [][]byte
	bytes   int           // in waiting
	more    chan struct{} // told when there is more in waiting
	far     escaper.PacketConn
	police  [2]relay.Police // from the client, and to it
}

func newFlow(d *Datagrams, o *Options, key flowKey) *flow {
	f := &flow{d: d, o: o, key: key, more: make(chan struct{}, 1)}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	f.rec = escaper.Record{
		Start: time.Now(), Server: o.Name, Client: key.client, Method: "UDP", Target: key.to.String(),
	}
	return f
}

// take passes a datagram of the client's on, or keeps it until the flow is open.
func (f *flow) take(b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.open:
		f.send(b)
	case f.refused.Load(), len(f.waiting) >= maxWaiting, f.bytes+len(b) > maxWaitingBytes:
		f.drop(1)
	default:
		f.waiting = append(f.waiting, append([]byte(nil), b...))
		f.bytes += len(b)
		select {
		case f.more <- struct{}{}:
		default:
		}
	}
}

// drop counts datagrams that are not passed on.
func (f *flow) drop(n int) {
	f.dropped.Add(int64(n))
	f.o.DatagramsDropped.Add(uint64(n))
}

// send passes a datagram on. It needs the lock, so that the order is kept.
func (f *flow) send(b []byte) {
	if !f.police[0].Pass(time.Now(), len(b)) || f.far.Send(f.ctx, f.target(), b) != nil {
		f.drop(1)
		return
	}
	f.out.Add(int64(len(b)))
}

func (f *flow) target() escaper.Target {
	return escaper.Target{Addr: f.key.to.Addr(), Port: f.key.to.Port()}
}

// run is the flow's life.
func (f *flow) run() {
	near, err := f.begin()
	if err != nil {
		// It stays for a while, so that the client's next datagram does not ask the
		// same again.
		f.refused.Store(true)
		f.mu.Lock()
		f.drop(len(f.waiting))
		f.waiting = nil
		f.mu.Unlock()
		f.observe(statusOf(err), err)
		return
	}
	f.o.FlowsOpen.Add(1)
	f.far.OnKill(f.end)
	end := context.AfterFunc(f.ctx, func() { _ = f.far.Close() })
	f.end(f.receive(near))
	end()
	f.mu.Lock()
	f.open = false
	f.refused.Store(true)
	f.mu.Unlock()
	_ = f.far.Close() // a second one does nothing
	f.admitted.end()
	f.o.FlowsOpen.Add(-1)
	f.d.mu.Lock()
	f.d.remove(f)
	f.d.mu.Unlock()
	err = context.Cause(f.ctx)
	if errors.Is(err, errSilent) {
		err = nil // that is how flows end
	}
	f.observe(http.StatusOK, err)
}

// errSilent ends a flow in which nothing passes any more.
var errSilent = errors.New("silent")

// end ends the flow; nil: because it is silent.
func (f *flow) end(why error) {
	if why == nil {
		why = errSilent
	}
	f.cancel(why)
}

// begin opens the flow: both of its sides, and what waits goes out.
func (f *flow) begin() (near *reply, err error) {
	r := f.o.request(f.key.client, f.key.to)
	if f.admitted, err = f.o.admit(r); err != nil {
		return nil, err
	}
	f.rec.User, f.police = r.User, f.admitted.police()
	defer func() {
		if err != nil {
			f.admitted.end()
		}
	}()
	if f.o.Sniff > 0 {
		r.Name = f.sniff()
		f.rec.Name = r.Name
	}
	if near, err = f.d.sockets.answers[f.key.to.Addr().Is4()].reply(f.key.to, f.key.client); err != nil {
		return nil, err
	}
	far, err := f.o.OpenPacket(f.ctx, r)
	f.rec.Choice = r.Choice
	if err != nil {
		return nil, err
	}
	f.rec.Source = far.Source(selection.FamilyOf(f.key.to.Addr()))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.far, f.open = far, true
	for _, b := range f.waiting {
		f.send(b)
	}
	f.waiting, f.bytes = nil, 0
	return near, nil
}

// sniff looks for a name in what the client says first, if that is QUIC.
func (f *flow) sniff() string {
	late := time.NewTimer(f.o.Sniff)
	defer late.Stop()
	var g greeting
	for seen := 0; ; {
		f.mu.Lock()
		waiting := f.waiting[:len(f.waiting):len(f.waiting)]
		f.mu.Unlock()
		for ; seen < len(waiting); seen++ {
			if name, s := g.add(waiting[seen]); s != unclear {
				return name
			}
		}
		if seen >= maxWaiting {
			return ""
		}
		select {
		case <-f.more:
		case <-late.C:
			return ""
		case <-f.ctx.Done():
			return ""
		}
	}
}

// receive passes answers until the flow ends, or its socket is of no more use,
// which is the error. Those of others than the destination are not for the
// client.
func (f *flow) receive(near *reply) error {
	const maxFailures = 100
	for failed := 0; ; {
		if w, ok := f.far.(waiter); ok {
			if err := w.AwaitReceive(); err != nil {
				return err
			}
		}
		buf := f.d.buffers.get()
		n, from, err := f.far.Receive(buf[udpHeader:])
		switch {
		case err == nil && from != f.key.to:
			f.drop(1)
		case err == nil:
			if !f.police[1].Pass(time.Now(), n) || near.send(buf[:udpHeader+n]) != nil {
				f.drop(1)
				break
			}
			f.last.Store(time.Now().UnixNano())
			f.in.Add(int64(n))
		}
		f.d.buffers.put(buf)
		switch {
		case f.ctx.Err() != nil:
			return nil // it has its cause
		case err == nil:
			failed = 0
		default:
			if failed++; failed >= maxFailures || errors.Is(err, net.ErrClosed) {
				return err
			}
		}
	}
}

// waiter is a PacketConn that can be waited for without a buffer.
type waiter interface{ AwaitReceive() error }

func (f *flow) observe(status int, err error) {
	if f.o.Observe == nil {
		return
	}
	f.rec.Duration = time.Since(f.rec.Start)
	f.rec.Status, f.rec.Err = status, err
	f.rec.BytesIn, f.rec.BytesOut, f.rec.Dropped = f.in.Load(), f.out.Load(), f.dropped.Load()
	f.o.Observe(&f.rec)
}
