package resolve

import (
	"context"
	"net"
)

// What a bound resolver has of its parent's Size and Inflight: a share of them, so that many have room, and no less than the
// floor, so that each is of use.
const (
	boundShare = 16
	boundFloor = 64
)

// Bound makes a resolver with r's configuration whose queries go by dial (see Options.Dial), and only by it. It has a cache of
// its own, since what a server answers may depend on who asks, and an own opinion of which server is silent. Servers, search
// list and hosts are r's at any time; Reload is r's too. Size and Inflight are a sixteenth of r's, 64 at least.
//
// Until it has put a question it costs about a kilobyte, and it never has a goroutine but for questions under way. r's Close
// closes it; one that is of no more use before that is to be closed by itself. What is bound to a bound resolver is bound to r.
func (r *Resolver) Bound(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *Resolver {
	if r.parent != nil {
		return r.parent.Bound(dial)
	}
	b := &Resolver{opt: r.opt, epoch: r.epoch, loop4: r.loop4, loop6: r.loop6, own: r.own, parent: r}
	b.opt.Dial = orNone(dial)
	b.opt.Size = max(r.opt.Size/boundShare, boundFloor)
	b.opt.Inflight = max(r.opt.Inflight/boundShare, boundFloor)
	b.ctx, b.cancel = context.WithCancel(r.ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		b.closed = true
		return b
	}
	if r.bound == nil {
		r.bound = map[*Resolver]struct{}{}
	}
	r.bound[b] = struct{}{}
	return b
}

// forget takes a bound resolver that is closed off the list.
func (r *Resolver) forget(b *Resolver) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.bound, b)
}

// base is the state in force of the resolver that reads the files: settings and hosts are taken from there.
func (r *Resolver) base() *state {
	if r.parent != nil {
		return r.parent.current.Load()
	}
	return r.current.Load()
}

// state is what r knows under base's settings; nil when that is nothing yet. What it knew under others is not used.
func (r *Resolver) state(base *state) *state {
	if r.parent == nil {
		return base
	}
	if st := r.current.Load(); st != nil && st.from == base.conf {
		return st
	}
	return nil
}

// follow makes a bound resolver's state under base's settings. It holds nothing of base that is large: a resolver that is idle
// from then on keeps no cache and no hosts file of the past alive.
func (r *Resolver) follow(base *state) *state {
	r.mu.Lock()
	defer r.mu.Unlock()
	st := r.state(base)
	if st == nil {
		st = &state{conf: newConf(base.conf.settings), cache: newCache(r.opt.Size), from: base.conf}
		r.current.Store(st)
	}
	return st
}
