package router

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/selection"
)

// ErrNotApplied: rules, routes or addresses that a path needs are not there.
var ErrNotApplied = errors.New("the network is not as the configuration wants it; wayout apply makes it so")

// Alone is a pinned cgroup of an exec that no daemon looks after.
type Alone struct {
	Done control.PinDone
	r    *Router
	p    *bpf.Programs
	pin  *bpf.Pin
}

// PinAlone holds the processes of a group to a path without a daemon: guard and
// counters are loaded for it alone. It changes nothing of the network: what the
// path needs has to be there.
func PinAlone(c *config.Config, name string, g *bpf.Group, cgroup string) (_ *Alone, err error) {
	r, err := newRouter(Options{Config: c, Stderr: io.Discard}, nil, nil)
	if err != nil {
		return nil, err
	}
	a := &Alone{r: r}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	path := r.plan.table.Path(name)
	if path == nil {
		return nil, fmt.Errorf("%w: %q", control.ErrUnknownPath, name)
	}
	if err := pinnable(path); err != nil {
		return nil, err
	}
	guard, err := r.standing(path)
	if err != nil {
		return nil, err
	}
	mount, err := bpf.BPFFS(true)
	if err != nil {
		return nil, fmt.Errorf("a pin has to outlive this process: %w", err)
	}
	if a.p, err = bpf.LoadTables(bpf.Options{Layout: r.plan.layout, Paths: int(path.Number)}); err != nil {
		return nil, err
	}
	if err := a.p.SetPath(path.Number, guard); err != nil {
		return nil, err
	}
	dir := filepath.Join(pinsDir(mount, c), g.Name())
	p := pinned{Cgroup: cgroup, Path: name, By: control.ByExec, PID: os.Getpid()}
	about, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	if err := notNested(c, cgroup); err != nil {
		return nil, err
	}
	to, _ := exit(r.plan, name)
	if a.pin, err = a.p.Pin(g.Path(), dir, about, to); err != nil {
		return nil, err
	}
	a.Done = control.PinDone{IPv4: to.V4, IPv6: to.V6, Dir: dir}
	return a, nil
}

// notNested refuses a cgroup that a killed daemon, or another exec, has pinned
// with one above it.
func notNested(c *config.Config, cgroup string) error {
	found, err := findPins(c)
	if err != nil {
		return err
	}
	for _, f := range found {
		if p, err := readPinned(f); err == nil && config.Nested(p.Cgroup, cgroup) {
			return fmt.Errorf("%s %w to %s", p.Cgroup, control.ErrPinned, p.Path)
		}
	}
	return nil
}

// standing checks that the network has what a path needs, and gives its guard.
func (r *Router) standing(path *escaper.Path) (_ bpf.Guard, err error) {
	k, err := netcfg.Open(netcfg.Options{Layout: r.want.Layout})
	if err != nil {
		return bpf.Guard{}, err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	have, err := k.Read()
	if err != nil {
		return bpf.Guard{}, fmt.Errorf("read the network's state: %w", err)
	}
	r.setSources(r.plan, have)
	want := r.want
	want.Uplinks = nil
	for _, u := range r.want.Uplinks {
		if u.Name == path.Uplink {
			u.Addresses = slices.DeleteFunc(slices.Clone(u.Addresses), func(a netip.Addr) bool { return a != path.V4 && a != path.V6 })
			want.Uplinks = append(want.Uplinks, u)
		}
	}
	if lacks := netcfg.Diff(have, want).Adds(); !lacks.Empty() {
		return bpf.Guard{}, fmt.Errorf("path %s: %w (it lacks: %s)", path.Name, ErrNotApplied, lacks.Commands()[0])
	}
	usable, reason := false, ""
	for _, f := range []selection.Family{selection.V4, selection.V6} {
		if path.Given()&f == 0 {
			continue
		}
		cond, why := r.judge(r.plan, have, path, f)
		if cond == escaper.Up {
			usable = true
		} else {
			reason = why
		}
	}
	if !usable {
		return bpf.Guard{}, fmt.Errorf("path %s is down: %s", path.Name, reason)
	}
	return r.plan.guard(path, indexes(have)), nil
}

// Close lets go of the pin.
func (a *Alone) Close() error {
	var errs []error
	if a.pin != nil {
		errs = append(errs, a.pin.Remove())
		if err := os.Remove(filepath.Dir(a.Done.Dir)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	if a.p != nil {
		errs = append(errs, a.p.Close())
	}
	return errors.Join(append(errs, a.r.plan.close(nil))...)
}
