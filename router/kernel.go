package router

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/selection"
)

// dadTimeout bounds the wait for duplicate address detection before the
// daemon says that it is ready: it takes about 1.5 s (RFC 4862), and a path
// whose address is still tentative then has a state of its own.
const dadTimeout = 5 * time.Second

// closeTimeout is how long sockets that the kernel is closing may take before
// the rules that they go by are removed, and closeEvery how often it is asked.
// endTimeout is how long it may take after that to list and end them: a list of
// 80,000 on a busy host takes more than a second (measured, Linux 6.18).
const (
	closeTimeout = time.Second
	closeEvery   = 20 * time.Millisecond
	endTimeout   = 20 * time.Second
)

// noInterface is the index of no interface: a guard with it lets nothing out.
// 0 would let out by any.
const noInterface = 1<<31 - 1

// kernel is what the daemon holds of the kernel while it runs.
type kernel struct {
	net   *netcfg.Netlink
	claim *netcfg.Claim
	leaf  *bpf.Leaf
	progs *bpf.Programs

	diverter *bpf.Diverter     // nil: nothing is diverted
	diverted []bpf.DivertEntry // what is

	answering map[int]*answering         // by interface: prefixes whose neighbours are answered
	guarded   map[*escaper.Direct]string // whose guards are in force, and what they were made of; nil: those of leaving paths
	inherited []uint32                   // path numbers of a killed daemon with sockets left, maybe
}

// instance names what the daemon leaves in cgroups and bpffs, so that its next
// start finds it again. A control socket belongs to one daemon.
func instance(c *config.Config) string {
	path := c.Control.Socket
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(path)) // never fails
	return fmt.Sprintf("wayout-%016x", h.Sum64())
}

// NetLayout is the part of the host's number spaces that a configuration
// claims.
func NetLayout(c *config.Config) netcfg.Layout {
	l := netcfg.Layout{TableBase: c.Netcfg.TableBase, RulePriority: c.Netcfg.RulePriority, MarkMask: markMask(c)}
	if l.TableBase == 0 {
		l.TableBase = netcfg.DefaultTableBase
	}
	if l.RulePriority == 0 {
		l.RulePriority = netcfg.DefaultRulePriority
	}
	return l
}

// want is the state of the network that the configuration asks for, with the
// addresses of paths that are on their way out.
func (p *plan) want(leaving []*escaper.Path) (netcfg.Want, error) {
	w := netcfg.Want{Layout: NetLayout(p.config)}
	addrs, bare := map[string][]netip.Addr{}, map[string]bool{}
	nets := map[string][]netip.Prefix{}
	for _, h := range append(p.holds(), p.hold(leaving)) {
		for uplink, list := range h.nets {
			for _, n := range list {
				if !slices.Contains(nets[uplink], n) {
					nets[uplink] = append(nets[uplink], n)
				}
			}
		}
		for uplink, list := range h.addrs {
			addrs[uplink] = append(addrs[uplink], list...)
		}
		for uplink := range h.bare {
			bare[uplink] = true
		}
	}
	for _, uc := range p.config.Uplinks {
		u := p.uplinks[uc.Name]
		value, mask, err := p.layout.UplinkMatch(u.number)
		if err != nil {
			return w, fmt.Errorf("uplink %s: %w", u.Name, err)
		}
		w.Uplinks = append(w.Uplinks, netcfg.Uplink{
			Name: u.Name, Number: int(u.number), Interface: u.Interface, Gateway4: u.Gateway4, Gateway6: u.Gateway6,
			Mark:            netcfg.Mark{Value: value, Mask: mask},
			ManageAddresses: u.ManageAddresses, Addresses: addrs[u.Name], Bare: bare[u.Name], Local: nets[u.Name],
		})
	}
	w.Local = nets[""]
	w.Diverts, w.Answers = diverts(p.config), p.answers
	w.Clients = netcfg.Mark{Value: p.client, Mask: p.answers.Mask}
	if err := w.Validate(); err != nil {
		return w, err
	}
	return w, nil
}

// openKernel takes the daemon's number spaces and attaches counters and guard.
// It runs before the first socket is made: a socket stays in the cgroup that
// it was made in.
func (r *Router) openKernel() (err error) {
	k := &kernel{}
	r.kernel = k
	defer func() {
		if err != nil {
			err = errors.Join(err, r.closeKernel())
		}
	}()
	if k.net, err = netcfg.Open(netcfg.Options{Layout: r.want.Layout}); err != nil {
		return err
	}
	if k.claim, err = k.net.Claim(); err != nil {
		return fmt.Errorf("%w (give each daemon its own netcfg.mark_mask, table_base and rule_priority)", err)
	}
	// Sockets that a killed daemon has left still carry marks, and its uplinks
	// may have had other numbers: ended while its rules stand.
	spared, err := r.pinnedCgroups()
	if err != nil {
		return err
	}
	if err = r.endSockets(0, netcfg.Spare{Cgroups: spared}); err != nil {
		return err
	}
	if err = cleanAnswers(r.o.Config, k.net); err != nil {
		return err
	}
	if !r.o.Config.Accounting {
		r.log.Warn("accounting is off: the kernel neither counts nor guards")
	} else if err = r.loadPrograms(); err != nil {
		return fmt.Errorf("counters and guard (accounting: off is the only way to run without): %w", err)
	}
	// Before the rules that lead anything here.
	have, err := k.net.Read()
	if err == nil {
		err = r.divert(unopened(r.o.Config), have)
	}
	return err
}

// pinDir is where the programs of a daemon are pinned. It only looks; the
// error wraps bpf.ErrNotMounted when there is no bpf file system.
func pinDir(c *config.Config) (string, error) {
	mount, err := bpf.BPFFS(false)
	if err != nil {
		return "", err
	}
	return filepath.Join(mount, "wayout", instance(c)), nil
}

// pinnedNumbers lists the path numbers that sockets of a killed daemon may
// still carry: with them its last packets would count as, or be judged by,
// another path's.
func pinnedNumbers(c *config.Config) ([]uint32, error) {
	layout, err := markLayout(c)
	if err != nil {
		return nil, &Mistake{err}
	}
	if !c.Accounting {
		return nil, nil
	}
	dir, err := pinDir(c)
	if errors.Is(err, bpf.ErrNotMounted) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return bpf.PinnedNumbers(dir, layout)
}

// markLayout divides the bits of the mark that are ours.
func markLayout(c *config.Config) (bpf.Layout, error) {
	l, err := bpf.NewLayout(markMask(c))
	if err != nil {
		return l, fmt.Errorf("netcfg.mark_mask: %w", err)
	}
	return l, nil
}

func markMask(c *config.Config) uint32 {
	if c.Netcfg.MarkMask == 0 {
		return bpf.DefaultMask
	}
	return c.Netcfg.MarkMask
}

func (r *Router) loadPrograms() (err error) {
	k, name := r.kernel, instance(r.o.Config)
	if k.leaf, err = bpf.MakeLeaf(name); err != nil {
		return err
	}
	o := bpf.Options{Layout: r.plan.layout, Paths: len(r.plan.table.Paths()), Cgroup: k.leaf.Path()}
	if mount, err := bpf.BPFFS(true); err != nil {
		r.log.Warn("the guard ends with the daemon: nothing can be pinned", "err", err)
	} else {
		o.PinDir = filepath.Join(mount, "wayout", name)
	}
	if k.progs, err = bpf.Load(o); err != nil {
		return err
	}
	k.inherited = k.progs.Inherited()
	return nil
}

// applyNetwork makes rules, routes and addresses as wished, and waits for the
// new addresses to become usable.
func (r *Router) applyNetwork(ctx context.Context) error {
	k := r.kernel
	have, err := k.net.Read()
	if err != nil {
		return fmt.Errorf("read the network's state: %w", err)
	}
	p, err := netcfg.Make(k.net, have, r.want, nil)
	for _, n := range p.Notes {
		r.log.Warn("network not as wished", "note", n)
	}
	if err != nil {
		return fmt.Errorf("make the network as wished: %w", err)
	}
	if !p.Empty() {
		r.log.Info("network made as wished", "changes", len(p.Ops))
	}
	if k.diverter == nil { // of another configuration; its rules have just gone
		err = cleanDiverter(r.o.Config, k.net)
	} else { // addresses that were just added are the host's own from the first
		err = r.knowOwn()
	}
	if err != nil {
		return err
	}
	if len(r.want.Uplinks) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, dadTimeout)
	defer cancel()
	dups, err := netcfg.AwaitDAD(ctx, k.net)
	for _, a := range dups {
		r.log.Error("address is used by another host", "address", a)
	}
	if err != nil {
		r.log.Warn("addresses are not usable yet", "err", err)
	}
	return nil
}

// closeKernel takes down what openKernel put up. With keep_on_stop the network
// and the pinned guard stay as they are.
func (r *Router) closeKernel() error {
	k := r.kernel
	if k == nil {
		return nil
	}
	errs := []error{k.stopAnswering()}
	keep := r.plan.config.KeepOnStop
	if k.claim != nil && !keep { // without the claim it is another daemon's
		// What the kernel still closes by itself would go by the main table
		// once the rules are gone, and what pinned processes send.
		errs = append(errs, r.blockPins())
		spared, err := r.pinnedCgroups()
		errs = append(errs, err, r.endSockets(closeTimeout, netcfg.Spare{Cgroups: spared, Listeners: true}))
		if err := clean(k.net, netcfg.Want{Layout: r.want.Layout, Diverts: r.want.Diverts, Answers: r.want.Answers}, r.log); err != nil {
			errs = append(errs, fmt.Errorf("clean the network: %w", err))
		}
		errs = append(errs, r.closePins())
	}
	errs = append(errs, r.closeDiverter())
	if k.progs != nil {
		if keep {
			errs = append(errs, k.progs.Leave())
		} else {
			errs = append(errs, k.progs.Close())
		}
	}
	if k.leaf != nil && !keep {
		errs = append(errs, k.leaf.Remove())
	}
	if k.claim != nil {
		errs = append(errs, k.claim.Close())
	}
	if k.net != nil {
		errs = append(errs, k.net.Close())
	}
	return errors.Join(errs...)
}

// endSockets ends the paths' sockets that the kernel goes on closing when their
// process does not have them any more, after giving them a while to close by
// themselves. Those that are spared go on. Without uplinks there is nothing that
// they could miss.
func (r *Router) endSockets(patience time.Duration, spared netcfg.Spare) error {
	if len(r.want.Uplinks) == 0 {
		return nil
	}
	one, err := r.plan.layout.Mark(bpf.ClassPath, 0, 1)
	if err != nil {
		return err
	}
	class := r.plan.layout.ClassMask
	m := netcfg.Mark{Value: one & class, Mask: class}
	ctx, cancel := context.WithTimeout(context.Background(), patience+endTimeout)
	defer cancel()
	// The kernel tells of no socket's end, so it is asked again and again.
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(closeEvery) {
		n, err := r.kernel.net.CountSockets(ctx, m)
		if err != nil {
			return err
		}
		if n.Total() == n[netcfg.TimeWait] { // these have nothing left to say
			break
		}
	}
	n, err := r.kernel.net.EndSocketsBut(ctx, m, spared)
	if errors.Is(err, netcfg.ErrNoDestroy) {
		r.log.Warn("the kernel cannot end sockets: the last packets of those that it is closing may leave by the main table", "err", err)
		return nil
	}
	if n > 0 {
		r.log.Info("sockets ended that were left to the kernel", "sockets", n)
	}
	return err
}

// clean removes all that is ours of the network's state, but for the rest.
func clean(k *netcfg.Netlink, rest netcfg.Want, log *slog.Logger) error {
	have, err := k.Read()
	if err != nil {
		return err
	}
	p := netcfg.Diff(have, rest)
	if p.Empty() {
		return nil
	}
	if err := p.Apply(k); err != nil {
		return err
	}
	log.Info("network cleaned", "changes", len(p.Ops))
	return nil
}

// watch follows the kernel's network state, and the health and the ports of
// paths, until the function it returns is called, and lets go of what reloads
// have left behind. The paths have their
// states when it returns.
func (r *Router) watch(ctx context.Context) (stop func() error, err error) {
	// Not ended by the signal that stops the daemon: paths have to go on
	// knowing their state while it drains.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w, err := netcfg.Watch(ctx, netcfg.WatchOptions{Kernel: r.kernel.net, Logger: r.log, OnChange: r.onChange})
	if err != nil {
		cancel()
		return nil, err
	}
	r.mu.Lock()
	r.watcher = w
	r.mu.Unlock()
	r.health.Use(r.plan.table)
	var others sync.WaitGroup
	others.Go(func() { r.health.Run(ctx) })
	others.Go(func() { r.watchPorts(ctx) })
	others.Go(func() {
		tick := time.NewTicker(sweepEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				r.sweep()
			case <-ctx.Done():
				return
			}
		}
	})
	return func() error {
		cancel()
		<-w.Done()
		others.Wait()
		return nil
	}, nil
}

// onChange brings everything in line with what the kernel's network has
// become: what is ours and has vanished is put back, the guards know the
// interfaces, the paths their states.
func (r *Router) onChange(s *netcfg.Snapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.settled.after(s) {
		// It may lack what was added since: paths would be down for a moment.
		r.watcher.Refresh()
		return
	}
	r.have = s
	r.followDiverts(s)
	n, err := netcfg.Reconcile(r.kernel.net, s, r.want, r.log)
	if n > 0 {
		err = errors.Join(err, r.putBack(s))
	}
	if err != nil {
		r.log.Error("network state cannot be put back", "err", err)
	}
	r.setSources(r.plan, s)
	r.settlePrefixes(r.plan, r.leaving, r.want, s)
	// Guards before states: a path that comes up must find its own.
	if err := r.setGuards(r.plan, s); err != nil {
		r.log.Error("guards cannot be set", "err", err)
	}
	r.refreshPins(r.plan, s)
	if r.judgePaths(r.plan, s, nil) {
		r.socket.Changed()
	}
}

// setGuards puts the guard of every path in force for which anything has changed
// that it is made of.
func (r *Router) setGuards(p *plan, s *netcfg.Snapshot) error {
	if r.kernel.progs == nil {
		return nil
	}
	index := indexes(s)
	var all []bpf.Entry
	add := func(paths []*escaper.Path) {
		for _, path := range paths {
			g := p.guard(path, index)
			if !g.V4.IsValid() && !g.V6.IsValid() {
				continue // its interface has no address: a number without a guard sends nothing
			}
			all = append(all, bpf.Entry{Num: path.Number, Guard: g})
		}
	}
	now := map[*escaper.Direct]string{}
	for d, h := range p.holdings {
		now[d] = h.guardFacts(index)
		if was, set := r.kernel.guarded[d]; !set || was != now[d] {
			add(d.Paths())
		}
	}
	if len(r.leaving) > 0 {
		now[nil] = p.hold(r.leaving).guardFacts(index)
		if now[nil] != r.kernel.guarded[nil] {
			add(r.leaving)
		}
	}
	if err := r.kernel.progs.SetPaths(all); err != nil {
		return err
	}
	r.kernel.guarded = now
	return nil
}

// indexes are the numbers of the interfaces.
func indexes(s *netcfg.Snapshot) map[string]uint32 {
	index := map[string]uint32{}
	for _, l := range s.Links {
		index[l.Name] = uint32(l.Index)
	}
	return index
}

// guard is what a path may send now.
func (p *plan) guard(path *escaper.Path, index map[string]uint32) bpf.Guard {
	g := bpf.Guard{V4: path.Sources(selection.V4), V6: path.Sources(selection.V6)}
	if device := p.device(path); device != "" {
		g.IfIndex = noInterface
		if i, ok := index[device]; ok {
			g.IfIndex = i
		}
	}
	return g
}

// device is the interface that a path has to leave by, "" when main routing
// decides.
func (p *plan) device(path *escaper.Path) string {
	if path.Interface != "" {
		return path.Interface
	}
	return p.uplinks[path.Uplink].Interface
}

// judgeUplink says whether an uplink can carry a family.
func (r *Router) judgeUplink(s *netcfg.Snapshot, up uplink, f netcfg.Family) (escaper.Condition, string) {
	gateway := up.Gateway4
	if f == netcfg.IPv6 {
		gateway = up.Gateway6
	}
	table := r.want.Table(netcfg.Uplink{Number: int(up.number)})
	if gateway.IsValid() && !s.HasDefault(f, table) {
		return escaper.Down, fmt.Sprintf("the route of uplink %s by gateway %s is gone", up.Name, gateway)
	}
	return escaper.Up, ""
}

// accounted says whether the kernel counts and guards.
func (r *Router) accounted() bool { return r.kernel != nil && r.kernel.progs != nil }

func (r *Router) kernelCounters(number uint32) (bpf.Counters, bool) {
	if !r.accounted() {
		return bpf.Counters{}, false
	}
	return r.kernel.progs.Read(number), true
}

func (r *Router) unmarkedDrops() uint64 {
	if !r.accounted() {
		return 0
	}
	return r.kernel.progs.Unmarked()
}
