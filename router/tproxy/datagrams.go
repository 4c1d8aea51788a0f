package tproxy

import (
	"container/list"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"wayout/router/escaper"
)

// maxDatagram is the largest payload of UDP, jumbograms aside.
const maxDatagram = 1<<16 - 1

// Datagrams is the UDP half of a server. It outlives the server's Options: flows
// go on with those that they began with, which is how a reload does not cut
// them.
type Datagrams struct {
	o       atomic.Pointer[Options] // of flows to come
	sockets *Sockets
	buffers datagramBuffers

	mu      sync.Mutex
	flows   map[flowKey]*list.Element // of *flow
	order   *list.List                // of flows, roughly by when they were last heard of
	closing bool

	tick    *time.Ticker
	stop    chan struct{}
	readers sync.WaitGroup
	running sync.WaitGroup // flows
}

// flowKey is the two ends of a flow.
type flowKey struct{ client, to netip.AddrPort }

// NewDatagrams takes sockets over and serves them until Close. With an error
// they are left as they are.
func NewDatagrams(o Options, s *Sockets) (*Datagrams, error) {
	d := &Datagrams{sockets: s, flows: map[flowKey]*list.Element{}, order: list.New(), stop: make(chan struct{})}
	if err := d.Use(o); err != nil {
		return nil, err
	}
	d.tick = time.NewTicker(d.period())
	d.readers.Go(d.expire)
	for _, c := range s.near {
		d.readers.Go(func() { d.read(c) })
	}
	return d, nil
}

// Use puts other Options in force, for the flows to come.
func (d *Datagrams) Use(o Options) error {
	if err := o.complete(); err != nil {
		return err
	}
	d.o.Store(&o)
	if d.tick != nil {
		d.tick.Reset(d.period())
	}
	return nil
}

// Sockets lends the sockets.
func (d *Datagrams) Sockets() *Sockets { return d.sockets }

// Open returns the number of flows.
func (d *Datagrams) Open() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.flows)
}

// Quiesce lets no flow begin any more.
func (d *Datagrams) Quiesce() {
	d.mu.Lock()
	d.closing = true
	d.mu.Unlock()
}

// Close ends all flows and closes the sockets.
func (d *Datagrams) Close() error {
	d.Quiesce()
	d.mu.Lock()
	for e := d.order.Front(); e != nil; e = e.Next() {
		flowOf(e).end(escaper.ErrClosed)
	}
	d.mu.Unlock()
	close(d.stop)
	d.tick.Stop()
	d.running.Wait()
	err := d.sockets.Close()
	d.readers.Wait()
	return err
}

// read sorts what comes to one socket into flows.
func (d *Datagrams) read(s *net.UDPConn) {
	buf := d.buffers.get()
	defer d.buffers.put(buf)
	var oob [128]byte
	own := s.LocalAddr().(*net.UDPAddr).AddrPort()
	for {
		n, oobn, _, client, err := s.ReadMsgUDPAddrPort(buf[:], oob[:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of an earlier datagram, as ICMP tells it
		}
		to := destination(oob[:oobn])
		if !to.IsValid() || to == own {
			d.o.Load().DatagramsDropped.Add(1)
			continue
		}
		client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
		d.pass(flowKey{client, to}, buf[:n])
	}
}

// pass gives a datagram to its flow.
func (d *Datagrams) pass(key flowKey, b []byte) {
	if f, begins := d.flow(key, b); f == nil {
		d.o.Load().DatagramsDropped.Add(1)
	} else if !begins {
		f.take(b)
	}
}

// flow finds the flow of a datagram, or begins one, which has taken that then;
// nil: none may begin.
func (d *Datagrams) flow(key flowKey, first []byte) (f *flow, begins bool) {
	now := time.Now().UnixNano()
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.flows[key]; e != nil {
		f := flowOf(e)
		if !f.refused.Load() { // else its time runs out, however often it is asked for
			f.last.Store(now)
			f.filed = now
			d.order.MoveToBack(e)
		}
		return f, false
	}
	if d.closing {
		return nil, false
	}
	o := d.o.Load()
	for len(d.flows) >= o.Flows {
		if !d.evict() {
			return nil, false
		}
	}
	f = newFlow(d, o, key)
	f.take(first) // before it runs: if it is refused at once, its record has that
	f.last.Store(now)
	f.filed = now
	d.flows[key] = d.order.PushBack(f)
	d.running.Go(f.run)
	return f, true
}

func flowOf(e *list.Element) *flow { return e.Value.(*flow) }

// evict ends the flow that was silent the longest. It needs the lock.
func (d *Datagrams) evict() bool {
	for e := d.order.Front(); e != nil; e = d.order.Front() {
		f := flowOf(e)
		if d.refile(e, f) {
			continue
		}
		d.remove(f)
		f.end(errEvicted)
		return true
	}
	return false
}

// refile puts a flow back in order that was heard of since: answers do not move
// it. It needs the lock.
func (d *Datagrams) refile(e *list.Element, f *flow) bool {
	last := f.last.Load()
	if last <= f.filed {
		return false
	}
	f.filed = last
	d.order.MoveToBack(e)
	return true
}

// remove takes a flow out of the tables. It needs the lock.
func (d *Datagrams) remove(f *flow) {
	e := d.flows[f.key]
	if e == nil || flowOf(e) != f {
		return
	}
	delete(d.flows, f.key)
	d.order.Remove(e)
}

// period is how often silent flows are looked for.
func (d *Datagrams) period() time.Duration {
	return min(max(d.o.Load().FlowIdle/8, 10*time.Millisecond), time.Second)
}

// refusedFor is how long a flow that was refused stays: so long nothing is asked
// anew for its datagrams.
const refusedFor = 3 * time.Second

// expire ends silent flows.
func (d *Datagrams) expire() {
	for {
		select {
		case <-d.stop:
			return
		case <-d.tick.C:
		}
		now := time.Now().UnixNano()
		d.mu.Lock()
		for e := d.order.Front(); e != nil; {
			f, next := flowOf(e), e.Next()
			idle := f.o.FlowIdle
			if f.refused.Load() {
				idle = min(idle, refusedFor)
			}
			switch {
			case d.refile(e, f):
			case now-f.filed >= int64(idle):
				d.remove(f)
				f.end(nil)
			}
			e = next
		}
		d.mu.Unlock()
	}
}

// datagramBuffers lends buffers of a whole datagram, with its header.
type datagramBuffers struct{ pool sync.Pool }

func (p *datagramBuffers) get() *[udpHeader + maxDatagram]byte {
	if b, ok := p.pool.Get().(*[udpHeader + maxDatagram]byte); ok {
		return b
	}
	return new([udpHeader + maxDatagram]byte)
}

func (p *datagramBuffers) put(b *[udpHeader + maxDatagram]byte) { p.pool.Put(b) }
