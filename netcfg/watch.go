package netcfg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// pace is the least time between two reads; after a read that took long it is
	// twice what that read took, so that a flood of events costs at most a third of
	// a core, but no more than maxPace.
	pace    = 20 * time.Millisecond
	maxPace = 200 * time.Millisecond

	// settle is when an interrupted read is tried again, if no event comes first.
	settle = 50 * time.Millisecond

	// defaultResync is how often everything is read without any event: some
	// changes have none (an IPv4 route that goes with its interface or its source
	// address).
	defaultResync = time.Minute

	receiveBuffer = 16 << 20
)

// WatchOptions are the options of [Watch].
type WatchOptions struct {
	Options

	// Kernel is read instead of one opened for the purpose; it stays open. It has
	// to be that of the calling thread's namespace. Options are then not looked at.
	Kernel *Netlink

	// Logger gets a line when a subscription is lost or a read fails; nil: none.
	Logger *slog.Logger

	// OnChange gets the first snapshot before Watch returns, and then one after every
	// change, one after the other on one goroutine. A slow OnChange delays the next
	// read; it then sees the sum of the changes. A snapshot can equal the one before:
	// something was changed and changed back, perhaps what OnChange itself had put
	// right meanwhile.
	OnChange func(*Snapshot)

	// Resync is how often everything is read without an event; 0: every minute.
	Resync time.Duration
}

// Watcher follows the state of a network namespace. Events of the kernel are only
// a hint to read again: the first of a burst leads to a read at once, the rest to
// one read each 20 ms (more when reads are slow).
type Watcher struct {
	k       *Netlink
	opt     WatchOptions
	log     *slog.Logger
	current atomic.Pointer[Snapshot]
	wake    chan struct{}
	done    chan struct{}

	mu      sync.Mutex
	sub     *nl.NetlinkSocket
	closed  bool
	dirty   part
	lossy   bool                // events were lost since the last whole read
	undone  bool                // something other than an address's lifetime changed since the last publication
	deleted map[journalKey]bool // addresses that events say have gone, since the last whole read
}

// Watch subscribes to the network namespace of the calling thread, takes a first
// snapshot and follows the changes until ctx is done.
func Watch(ctx context.Context, opt WatchOptions) (*Watcher, error) {
	if opt.Resync <= 0 {
		opt.Resync = defaultResync
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	k, release := opt.Kernel, func() error { return nil }
	if k == nil {
		var err error
		if k, err = Open(opt.Options); err != nil {
			return nil, err
		}
		release = k.Close
	}
	w := &Watcher{
		k: k, opt: opt, log: opt.Logger,
		wake: make(chan struct{}, 1), done: make(chan struct{}),
		deleted: make(map[journalKey]bool),
	}
	// Subscribed before the first read, so that no change falls between the two.
	if err := w.subscribe(); err != nil {
		return nil, errors.Join(err, release())
	}
	s, err := k.Read()
	if err != nil {
		w.unsubscribe()
		return nil, errors.Join(err, release())
	}
	w.publish(s)

	var both sync.WaitGroup
	both.Go(func() { w.listen(ctx) })
	both.Go(func() { w.follow(ctx) })
	stop := context.AfterFunc(ctx, w.unsubscribe)
	go func() {
		both.Wait()
		stop()
		w.unsubscribe()
		_ = release()
		close(w.done)
	}()
	return w, nil
}

// Done is closed when the watcher has stopped and OnChange is not called again.
func (w *Watcher) Done() <-chan struct{} { return w.done }

// Refresh asks for a whole read at the next moment, that OnChange gets even when
// nothing has changed.
func (w *Watcher) Refresh() {
	w.mu.Lock()
	w.undone = true
	w.mu.Unlock()
	w.mark(partAll)
}

func (w *Watcher) publish(s *Snapshot) {
	w.current.Store(s)
	if w.opt.OnChange != nil {
		w.opt.OnChange(s)
	}
}

// mark notes what to read again and wakes the reader.
func (w *Watcher) mark(p part) {
	if p == 0 {
		return
	}
	w.mu.Lock()
	w.dirty |= p
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// subscribe opens the socket for events of interfaces, addresses, routes and rules
// of both families.
func (w *Watcher) subscribe() error {
	var sub *nl.NetlinkSocket
	err := w.k.inNamespace(func() (err error) {
		sub, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
			unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
			unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
		return err
	})
	if err != nil {
		return fmt.Errorf("subscribe to network changes: %w", err)
	}
	// More than the sysctl's limit takes CAP_NET_ADMIN.
	if sub.SetReceiveBufferSize(receiveBuffer, true) != nil {
		_ = sub.SetReceiveBufferSize(receiveBuffer, false)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		sub.Close()
		return context.Canceled
	}
	w.sub = sub
	return nil
}

func (w *Watcher) unsubscribe() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.sub.Close()
}

// listen turns events into marks, and makes the subscription again when it breaks.
func (w *Watcher) listen(ctx context.Context) {
	for {
		err := w.receive()
		if ctx.Err() != nil {
			return
		}
		w.log.Warn("subscription to network changes lost", "error", err)
		w.sub.Close()
		for {
			if err = w.subscribe(); err == nil {
				break
			}
			if ctx.Err() != nil {
				return
			}
			w.log.Error("no subscription to network changes", "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
		w.log.Info("subscription to network changes made again")
		w.mark(partAll)
	}
}

// receive reads events until the socket fails.
func (w *Watcher) receive() error {
	for {
		msgs, from, err := w.sub.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			w.log.Warn("network changes came faster than they were read")
			w.mu.Lock()
			w.lossy = true
			w.mu.Unlock()
			w.mark(partAll)
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return err
		case from.Pid != nl.PidKernel:
			continue
		}
		var p part
		undone := false
		for _, m := range msgs {
			what := w.event(m.Header.Type, m.Data)
			p |= what
			undone = undone || what != 0 && m.Header.Type != unix.RTM_NEWADDR
		}
		if undone {
			w.mu.Lock()
			w.undone = true
			w.mu.Unlock()
		}
		w.mark(p)
	}
}

// event says what an event makes necessary to read. What cannot be parsed leads
// to reading everything.
func (w *Watcher) event(typ uint16, body []byte) part {
	switch typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return partAll
	case unix.RTM_NEWADDR:
		return partAddrs
	case unix.RTM_DELADDR:
		a, err := parseAddr(body)
		if err != nil {
			return partAll
		}
		w.mu.Lock()
		w.deleted[journalKey{a.LinkIndex, a.Addr}] = true
		w.mu.Unlock()
		// IPv4 routes with that source go without an event.
		return partAddrs | partRoutes
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		r, ok, err := parseRoute(body)
		if err != nil {
			return partAll
		}
		if ok && w.k.keeps(r) {
			return partRoutes
		}
		return 0
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return partRules
	}
	return 0
}

// follow reads again after events, and now and then without.
func (w *Watcher) follow(ctx context.Context) {
	resync := time.NewTicker(w.opt.Resync)
	defer resync.Stop()
	retry := time.NewTimer(0)
	retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-retry.C:
		case <-resync.C:
			w.mark(partAll)
		}
		began := time.Now()
		again, err := w.refresh()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			w.log.Error("network state cannot be read", "error", err)
		}
		if again {
			retry.Reset(settle)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(min(max(pace, 2*time.Since(began)), maxPace)):
		}
	}
}

// refresh reads what is marked and publishes it when it differs. again: the read
// failed or was interrupted, and what was marked is still marked.
func (w *Watcher) refresh() (again bool, err error) {
	w.mu.Lock()
	what, lossy, deleted, undone := w.dirty, w.lossy, w.deleted, w.undone
	w.dirty, w.lossy, w.deleted, w.undone = 0, false, make(map[journalKey]bool), false
	w.mu.Unlock()
	if what == 0 {
		return false, nil
	}
	old := w.current.Load()
	s, err := w.k.reread(old, what)
	if err != nil || s.partial {
		w.mu.Lock()
		w.dirty |= what
		w.lossy = w.lossy || lossy
		w.undone = w.undone || undone && err != nil
		maps.Copy(w.deleted, deleted)
		lossy, deleted = w.lossy, maps.Clone(w.deleted)
		w.mu.Unlock()
		if err != nil {
			return true, err
		}
		if !lossy {
			s = s.carryOver(old, deleted)
		}
	}
	if undone || !s.Equal(old) {
		w.publish(s)
	}
	return s.partial, nil
}

// carryOver completes an interrupted read. While addresses come and go in great
// number, the kernel's list skips some that are there; one that was there before
// and of which no event says that it went is still there. Else its connections
// would be ended for nothing. The next whole read puts right what this gets wrong.
func (s *Snapshot) carryOver(old *Snapshot, gone map[journalKey]bool) *Snapshot {
	seen := make(map[journalKey]bool, len(s.list))
	for _, a := range s.list {
		seen[journalKey{a.LinkIndex, a.Addr}] = true
	}
	list := append([]Address(nil), s.list...)
	for _, a := range old.list {
		k := journalKey{a.LinkIndex, a.Addr}
		if _, link := s.Links[a.LinkIndex]; link && !seen[k] && !gone[k] {
			list = append(list, a)
		}
	}
	out := newSnapshot(s.Links, list, s.Routes, s.Rules)
	out.IPv6, out.AddrProto, out.partial, out.begun = s.IPv6, s.AddrProto, true, s.begun
	return out
}
