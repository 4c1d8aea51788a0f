package router

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/selection"
)

// errNoPins: pins are made of eBPF programs.
var errNoPins = errors.New("processes cannot be pinned: accounting is off")

// pins are the cgroups whose processes leave by a path. Its mutex comes after
// the router's own.
type pins struct {
	mu   sync.Mutex
	root string // where cgroup v2 is mounted
	dir  string // of the pins, in the bpf file system; "" while there is none
	all  map[string]*pinned
	past map[string]control.Connections // of pins that are gone, by path

	events *os.File // inotify, nil without
	fd     int      // of events
}

// pinned is one cgroup. What is exported is written down in the bpf file system,
// for the next daemon.
type pinned struct {
	Cgroup string `json:"cgroup"` // below root, clean
	Path   string `json:"path"`
	By     string `json:"by"`
	PID    int    `json:"pid,omitempty"` // of the exec

	name  string   // of its directory
	pin   *bpf.Pin // nil while there is no such cgroup
	state string
	why   string
	gone  map[netip.Addr]bool // addresses that the host has lost, whose connections were ended
}

// pinsDir is the directory of a daemon's pins, beside that of its own programs:
// they may outlive these.
func pinsDir(mount string, c *config.Config) string {
	return filepath.Join(mount, "wayout", instance(c)+"-pins")
}

// findPins lists what pins there are for a configuration, changing nothing.
func findPins(c *config.Config) ([]bpf.FoundPin, error) {
	mount, err := bpf.BPFFS(false)
	if errors.Is(err, bpf.ErrNotMounted) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return bpf.FindPins(pinsDir(mount, c))
}

func readPinned(f bpf.FoundPin) (*pinned, error) {
	p := &pinned{name: filepath.Base(f.Dir)}
	if err := json.Unmarshal(f.About, p); err != nil {
		return nil, fmt.Errorf("pin %s: %w", f.Dir, err)
	}
	return p, nil
}

// pinName is the directory of a cgroup's pin: the bpf file system has no names
// with a dot.
func pinName(cgroup string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(cgroup)) // never fails
	return fmt.Sprintf("pin-%016x", h.Sum64())
}

// pinnedCgroups lists what the kernel calls the cgroups that this daemon, an
// earlier one, or an exec without one, has pinned: their sockets are not the
// daemon's.
func (r *Router) pinnedCgroups() ([]uint64, error) {
	found, err := findPins(r.o.Config)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	root, err := bpf.FindCgroup2()
	if err != nil {
		return nil, err
	}
	var all []uint64
	for _, f := range found {
		p, err := readPinned(f)
		if err != nil {
			continue // openPins says so
		}
		ids, err := bpf.CgroupTree(filepath.Join(root, p.Cgroup))
		if err != nil {
			return nil, err
		}
		all = append(all, ids...)
	}
	return all, nil
}

// openPins takes over the pins of an earlier daemon and makes those of the
// configuration. It runs once the guards of the paths are in force. The function
// that it returns ends the watch for cgroups.
func (r *Router) openPins() (stop func() error, err error) {
	nothing := func() error { return nil }
	if !r.accounted() {
		return nothing, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	k := &r.pins
	k.mu.Lock()
	defer k.mu.Unlock()
	k.all, k.past = map[string]*pinned{}, map[string]control.Connections{}
	mount, err := bpf.BPFFS(true)
	if err != nil {
		if len(r.plan.config.Pins) > 0 {
			return nil, fmt.Errorf("pins have to outlive the daemon: %w", err)
		}
		return nothing, nil
	}
	if k.root, err = bpf.FindCgroup2(); err != nil {
		return nil, err
	}
	k.dir = pinsDir(mount, r.o.Config)
	if err := r.inheritPins(); err != nil {
		return nil, err
	}
	if err := r.mayConfigure(r.plan.config); err != nil {
		return nil, err
	}
	r.configurePins(r.plan)
	return r.watchCgroups()
}

// inheritPins takes up what there is in the bpf file system.
func (r *Router) inheritPins() error {
	k := &r.pins
	found, err := bpf.FindPins(k.dir)
	if err != nil {
		return err
	}
	for _, f := range found {
		p, err := readPinned(f)
		switch {
		case err != nil: // begun and not finished: nothing is known to be pinned
			r.log.Warn("a pin that cannot be read is removed", "err", err)
			err = bpf.RemovePin(f.Dir)
		case p.By == control.ByConfig && !slices.ContainsFunc(r.plan.config.Pins, func(c config.Pin) bool { return c.Cgroup == p.Cgroup }):
			r.log.Info("unpinned: no longer in the configuration", "cgroup", p.Cgroup, "path", p.Path)
			err = bpf.RemovePin(f.Dir)
		default:
			k.all[p.Cgroup] = p
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mayConfigure says whether a configuration's pins are in the way of pins that
// it does not know of, or of the daemon.
func (r *Router) mayConfigure(c *config.Config) error {
	if len(c.Pins) > 0 && r.accounted() && r.pins.dir == "" {
		return fmt.Errorf("pins have to outlive the daemon: %w", bpf.ErrNotMounted)
	}
	for _, want := range c.Pins {
		if err := r.free(want.Cgroup, func(p *pinned) bool { return p.By == control.ByConfig }); err != nil {
			return &Mistake{err}
		}
	}
	return nil
}

// free says whether a cgroup may be pinned besides those that are, but for some.
func (r *Router) free(cgroup string, but func(*pinned) bool) error {
	k := &r.pins
	own, err := filepath.Rel(k.root, r.kernel.leaf.Path())
	if err != nil {
		return err
	}
	if own = "/" + own; config.Nested(cgroup, own) {
		return fmt.Errorf("pin %s: it holds wayout itself (%s)", cgroup, own)
	}
	for _, p := range k.all {
		if p.Cgroup != cgroup && config.Nested(cgroup, p.Cgroup) && !but(p) {
			return fmt.Errorf("pin %s: %s %w: a process in both would be pinned twice", cgroup, p.Cgroup, control.ErrPinned)
		}
	}
	return nil
}

// configurePins brings the pins in line with a plan that has come into force.
func (r *Router) configurePins(p *plan) {
	k := &r.pins
	if k.dir == "" {
		return
	}
	for cgroup, have := range k.all {
		if have.By == control.ByConfig && !slices.ContainsFunc(p.config.Pins, func(c config.Pin) bool { return c.Cgroup == cgroup }) {
			if err := r.dropPin(have); err != nil {
				r.log.Error("cgroup cannot be unpinned", "cgroup", cgroup, "err", err)
			}
		}
	}
	for _, want := range p.config.Pins {
		have := k.all[want.Cgroup]
		if have == nil {
			have = &pinned{Cgroup: want.Cgroup, name: pinName(want.Cgroup)}
			k.all[want.Cgroup] = have
		}
		r.renamePin(have, want.Path, control.ByConfig)
	}
	r.syncPins(p)
}

// renamePin says that a pin leads to another path, or is somebody else's: what
// is written of it is to be written anew.
func (r *Router) renamePin(p *pinned, path, by string) {
	if p.Path == path && p.By == by {
		return
	}
	r.bank(p)
	p.Path, p.By = path, by
	if p.pin != nil { // taken over by attachPin, with the program links that it has
		if err := p.pin.Leave(); err != nil {
			r.log.Error("pin cannot be let go", "cgroup", p.Cgroup, "err", err)
		}
		p.pin = nil
	}
}

// bank keeps what a pin has counted. Nobody sees any more what is still open.
func (r *Router) bank(p *pinned) {
	if p.pin != nil {
		sum := addConns(r.pins.past[p.Path], p.pin.Conns())
		sum.Open = 0
		r.pins.past[p.Path] = sum
	}
}

func addConns(c control.Connections, n bpf.Conns) control.Connections {
	c.Made += n.Made
	c.Failed += n.Failed
	c.Closed += n.Closed
	c.Open += int64(n.Made - min(n.Made, n.Closed))
	return c
}

// dropPin unpins a cgroup and forgets it.
func (r *Router) dropPin(p *pinned) error {
	r.bank(p)
	delete(r.pins.all, p.Cgroup)
	if p.pin != nil {
		return p.pin.Remove()
	}
	return bpf.RemovePin(filepath.Join(r.pins.dir, p.name))
}

// refreshPins brings the pins in line with a plan and with the cgroups that are
// there. With a snapshot it ends the connections of addresses that have gone: the
// kernel does not.
func (r *Router) refreshPins(p *plan, s *netcfg.Snapshot) {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	if s != nil {
		for _, pin := range r.pins.all {
			r.endGone(s, pin)
		}
	}
	r.syncPins(p)
}

func (r *Router) endGone(s *netcfg.Snapshot, p *pinned) {
	if p.pin == nil {
		return
	}
	to := p.pin.Exit()
	for _, a := range []netip.Addr{to.V4, to.V6} {
		if !a.IsValid() {
			continue
		}
		state, _ := s.Has(a, "")
		was := p.gone[a]
		if p.gone == nil {
			p.gone = map[netip.Addr]bool{}
		}
		p.gone[a] = state == netcfg.Absent
		if state != netcfg.Absent || was {
			continue
		}
		n, err := r.endWrong(p, func(s netcfg.Socket) bool { return s.Local != a })
		switch {
		case err != nil:
			r.log.Error("connections of an address that has gone cannot be ended", "cgroup", p.Cgroup, "address", a, "err", err)
		case n > 0:
			r.log.Warn("connections ended", "cgroup", p.Cgroup, "address", a, "connections", n, "reason", "the address has gone")
		}
	}
}

// endWrong ends the connections of a pinned cgroup that are not right.
func (r *Router) endWrong(p *pinned, right func(netcfg.Socket) bool) (int, error) {
	ids, err := bpf.CgroupTree(filepath.Join(r.pins.root, p.Cgroup))
	if err != nil || len(ids) == 0 {
		return 0, err
	}
	return r.kernel.net.EndSocketsOf(context.Background(), ids, right)
}

func (r *Router) syncPins(p *plan) {
	if r.pins.dir == "" {
		return
	}
	r.followCgroups()
	for _, pin := range r.pins.all {
		state, why := r.syncPin(p, pin)
		if state == pin.state && why == pin.why {
			continue
		}
		pin.state, pin.why = state, why
		if pin.By == control.ByExec && state == control.PinWaiting {
			continue // about to be released
		}
		log := r.log.Info
		if state == control.PinFailed || state == control.PinBlocked {
			log = r.log.Error
		}
		log("pin", "cgroup", pin.Cgroup, "path", pin.Path, "state", state, "reason", why) //nolint:sloglint // constant all the same
	}
}

// syncPin makes one pin as it should be and says what has come of it.
func (r *Router) syncPin(p *plan, pin *pinned) (state, why string) {
	to, blocked := exit(p, pin.Path)
	dir := filepath.Join(r.pins.root, pin.Cgroup)
	id, err := bpf.CgroupID(dir)
	switch {
	case err != nil:
	case id == 0:
		return control.PinWaiting, "there is no such cgroup"
	case pin.pin == nil || pin.pin.Cgroup() != id:
		err = r.attachPin(pin, dir, to)
	case pin.pin.Exit() != to:
		err = pin.pin.Point(to)
	}
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return control.PinWaiting, "there is no such cgroup" // it went meanwhile
		}
		return control.PinFailed, err.Error()
	}
	if blocked != "" {
		return control.PinBlocked, blocked
	}
	return control.PinInForce, ""
}

// attachPin pins a cgroup that is there for the first time, or again.
func (r *Router) attachPin(p *pinned, dir string, to bpf.Exit) error {
	about, err := json.Marshal(p)
	if err != nil {
		return err
	}
	pin, err := r.kernel.progs.Pin(dir, filepath.Join(r.pins.dir, p.name), about, to)
	if err != nil {
		return err
	}
	r.bank(p)
	if p.pin != nil {
		if err := p.pin.Leave(); err != nil {
			r.log.Error("pin cannot be let go", "cgroup", p.Cgroup, "err", err)
		}
	}
	p.pin = pin
	return nil
}

// exit is what a path means for the processes that are pinned to it. For one
// that is not there it is the zero Exit, by which nothing leaves.
func exit(p *plan, name string) (to bpf.Exit, blocked string) {
	path := p.table.Path(name)
	if path == nil {
		return bpf.Exit{}, fmt.Sprintf("there is no path %s any more", name)
	}
	if err := pinnable(path); err != nil {
		return bpf.Exit{}, err.Error()
	}
	to = bpf.Exit{Num: path.Number, Mark: path.Mark, V4: path.Source(selection.V4), V6: path.Source(selection.V6)}
	if path.BindToDevice {
		to.Device = path.Interface
	}
	return to, ""
}

// pinnable says what keeps processes from being held to a path: they need one
// address of each family, on this host.
func pinnable(path *escaper.Path) error {
	switch {
	case path.Peer != nil:
		return fmt.Errorf("path %s is a next-hop proxy, which processes know nothing of", path.Name)
	case path.Net4.IsValid() || path.Net6.IsValid():
		return fmt.Errorf("path %s is a whole prefix: processes are held to a single address, so give it a node of its own", path.Name)
	}
	return nil
}

// reconfigurePins is configurePins for a reload.
func (r *Router) reconfigurePins(p *plan) {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	r.configurePins(p)
}

// pinnedConnections adds up the connections of the processes that are, or have
// been, pinned to a path.
func (r *Router) pinnedConnections(path string) control.Connections {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	sum := r.pins.past[path]
	for _, p := range r.pins.all {
		if p.Path == path && p.pin != nil {
			sum = addConns(sum, p.pin.Conns())
		}
	}
	return sum
}

// sweepPins lets go of what an exec that was killed has left behind, once its
// last process is gone.
func (r *Router) sweepPins() {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	for _, p := range r.pins.all {
		if p.By != control.ByExec || unix.Kill(p.PID, 0) == nil {
			continue
		}
		dir := filepath.Join(r.pins.root, p.Cgroup)
		if busy, err := bpf.Populated(dir); busy || err != nil {
			continue
		}
		if err := errors.Join(r.dropPin(p), bpf.EndGroup(context.Background(), dir)); err != nil {
			r.log.Error("what an exec has left cannot be removed", "cgroup", p.Cgroup, "err", err)
		}
	}
}

// blockPins lets nothing leave of the pinned cgroups any more: the rules that
// they go by are about to be removed.
func (r *Router) blockPins() error {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	var errs []error
	for _, p := range r.pins.all {
		if p.pin == nil {
			continue
		}
		id, err := bpf.CgroupID(filepath.Join(r.pins.root, p.Cgroup))
		if err == nil && id == p.pin.Cgroup() { // else there is nobody to be let out
			err = p.pin.Point(bpf.Exit{})
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// closePins unpins all cgroups but those of an exec that goes on: there nothing
// leaves until it ends, or until a daemon is there again.
func (r *Router) closePins() error {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	var errs []error
	for _, p := range slices.Collect(maps.Values(r.pins.all)) {
		if p.By != control.ByExec {
			errs = append(errs, r.dropPin(p))
		}
	}
	if r.pins.dir != "" {
		if err := os.Remove(r.pins.dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// cleanPins removes what pins a daemon that was killed has left. It refuses, and
// changes nothing, while commands of an exec run: they would leave unpinned.
func cleanPins(c *config.Config) error {
	found, err := findPins(c)
	if err != nil || len(found) == 0 {
		return err
	}
	root, err := bpf.FindCgroup2()
	if err != nil {
		return err
	}
	var groups []string
	for _, f := range found {
		p, err := readPinned(f)
		if err != nil || p.By != control.ByExec {
			continue
		}
		dir := filepath.Join(root, p.Cgroup)
		busy, err := bpf.Populated(dir)
		if err != nil {
			return err
		}
		if busy {
			return fmt.Errorf("wayout exec runs processes in %s, pinned to %s: end them first", p.Cgroup, p.Path)
		}
		groups = append(groups, dir)
	}
	var errs []error
	for _, f := range found {
		errs = append(errs, bpf.RemovePin(f.Dir))
	}
	for _, g := range groups {
		errs = append(errs, bpf.EndGroup(context.Background(), g))
	}
	return errors.Join(append(errs, os.Remove(filepath.Dir(found[0].Dir)))...)
}
