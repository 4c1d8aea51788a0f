package router

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/selection"
)

// pinBackend is what commands can ask.
func (r *Router) pinBackend() control.PinBackend {
	return control.PinBackend{List: r.listPins, Pin: r.askPin, Unpin: r.askUnpin, Hold: r.askHold, Release: r.askRelease}
}

// askPin holds a cgroup that is there to a path.
func (r *Router) askPin(ask control.PinAsk) (done control.PinDone, err error) {
	return r.withPins(func() error {
		cgroup, bad := config.CleanCgroup(ask.Cgroup)
		if bad != "" {
			return fmt.Errorf("cgroup %q %s", ask.Cgroup, bad)
		}
		path := r.plan.table.Path(ask.Path)
		if path == nil {
			return fmt.Errorf("%w: %q", control.ErrUnknownPath, ask.Path)
		}
		if err := pinnable(path); err != nil {
			return err
		}
		if err := r.free(cgroup, func(*pinned) bool { return false }); err != nil {
			return err
		}
		p := r.pins.all[cgroup]
		if p != nil && p.By == control.ByExec {
			return fmt.Errorf("%s %w by wayout exec (process %d)", cgroup, control.ErrPinned, p.PID)
		}
		if err := r.there(cgroup); err != nil {
			return err
		}
		if p == nil {
			p = &pinned{Cgroup: cgroup, name: pinName(cgroup)}
		}
		r.renamePin(p, ask.Path, control.ByCommand)
		if err := r.startPin(p); err != nil {
			return err
		}
		done.Pin = r.pinState(p)
		if ask.Kill {
			done.Ended, err = r.endForeign(p)
		}
		return err
	}, &done)
}

// withPins runs f on the pins that this daemon has.
func (r *Router) withPins(f func() error, done *control.PinDone) (control.PinDone, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	switch {
	case !r.ready.Load():
		return *done, escaper.ErrClosed
	case !r.accounted():
		return *done, errNoPins
	case r.pins.dir == "":
		return *done, fmt.Errorf("pins have to outlive the daemon: bpf file system %w", bpf.ErrNotMounted)
	}
	err := f()
	return *done, err
}

func (r *Router) there(cgroup string) error {
	id, err := bpf.CgroupID(filepath.Join(r.pins.root, cgroup))
	if err == nil && id == 0 {
		err = fmt.Errorf("%w: %q below %s", control.ErrUnknownCgroup, cgroup, r.pins.root)
	}
	return err
}

// startPin puts a pin in force. With an error one that is new is as if it had
// never been, and another is tried again until it succeeds.
func (r *Router) startPin(p *pinned) error {
	fresh := r.pins.all[p.Cgroup] == nil
	r.pins.all[p.Cgroup] = p
	r.followCgroups()
	p.state, p.why = r.syncPin(r.plan, p)
	if p.state == control.PinInForce {
		r.log.Info("pin", "cgroup", p.Cgroup, "path", p.Path, "state", p.state, "by", p.By)
		return nil
	}
	err := fmt.Errorf("pin %s to %s: %s", p.Cgroup, p.Path, p.why)
	if fresh {
		err = errors.Join(err, r.dropPin(p))
	}
	return err
}

// askUnpin lets the processes of a cgroup go.
func (r *Router) askUnpin(ask control.PinAsk) (done control.PinDone, err error) {
	return r.withPins(func() error {
		p := r.pins.all[filepath.Clean(ask.Cgroup)]
		if p == nil {
			return fmt.Errorf("%w is pinned: %q", control.ErrUnknownCgroup, ask.Cgroup)
		}
		if p.By == control.ByExec {
			return fmt.Errorf("%s %w by wayout exec (process %d), and goes with it", p.Cgroup, control.ErrPinned, p.PID)
		}
		done.Pin = r.pinState(p)
		r.log.Info("unpinned", "cgroup", p.Cgroup, "path", p.Path)
		return r.dropPin(p)
	}, &done)
}

// askHold pins the cgroup of an exec.
func (r *Router) askHold(ask control.PinAsk) (done control.PinDone, err error) {
	return r.withPins(func() error {
		cgroup, bad := config.CleanCgroup(ask.Cgroup)
		if bad != "" {
			return fmt.Errorf("cgroup %q %s", ask.Cgroup, bad)
		}
		path := r.plan.table.Path(ask.Path)
		if path == nil {
			return fmt.Errorf("%w: %q", control.ErrUnknownPath, ask.Path)
		}
		if err := pinnable(path); err != nil {
			return err
		}
		if s := path.Status(); s.State != escaper.StateUp && s.State != escaper.StateProbing {
			return fmt.Errorf("path %s is %s%s", path.Name, s.State, because(s.Reason))
		}
		if r.pins.all[cgroup] != nil {
			return fmt.Errorf("%s %w", cgroup, control.ErrPinned)
		}
		if err := errors.Join(r.there(cgroup), r.free(cgroup, func(*pinned) bool { return false })); err != nil {
			return err
		}
		p := &pinned{Cgroup: cgroup, Path: path.Name, By: control.ByExec, PID: ask.PID, name: filepath.Base(cgroup)}
		if err := r.startPin(p); err != nil {
			return err
		}
		done.Pin, done.Dir = r.pinState(p), filepath.Join(r.pins.dir, p.name)
		done.IPv4, done.IPv6 = path.Source(selection.V4), path.Source(selection.V6)
		return nil
	}, &done)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

// askRelease forgets the pin of an exec that has ended.
func (r *Router) askRelease(ask control.PinAsk) (done control.PinDone, err error) {
	return r.withPins(func() error {
		p := r.pins.all[ask.Cgroup]
		if p == nil || p.By != control.ByExec {
			return fmt.Errorf("%w is held: %q", control.ErrUnknownCgroup, ask.Cgroup)
		}
		done.Pin = r.pinState(p)
		return r.dropPin(p)
	}, &done)
}

// listPins is the state of all pins, in the order of their cgroups.
func (r *Router) listPins() control.Pins {
	r.pins.mu.Lock()
	defer r.pins.mu.Unlock()
	all := control.Pins{Version: control.PinsVersion, Pins: []control.Pin{}}
	for _, p := range r.pins.all {
		all.Pins = append(all.Pins, r.pinState(p))
	}
	slices.SortFunc(all.Pins, func(a, b control.Pin) int { return cmp.Compare(a.Cgroup, b.Cgroup) })
	return all
}

func (r *Router) pinState(p *pinned) control.Pin {
	s := control.Pin{Cgroup: p.Cgroup, Path: p.Path, By: p.By, State: p.state, Reason: p.why}
	if p.pin != nil {
		s.Connections = addConns(control.Connections{}, p.pin.Conns())
	}
	return s
}

// endForeign ends the connections of a pinned cgroup that do not leave by its
// path: they would hang, because what they send is dropped.
func (r *Router) endForeign(p *pinned) (int, error) {
	to := p.pin.Exit()
	uplink := r.plan.table.Path(p.Path).Uplink
	n, err := r.endWrong(p, func(s netcfg.Socket) bool {
		return (s.Local == to.V4 || s.Local == to.V6) && (uplink == "" || s.Mark == to.Mark)
	})
	if err != nil {
		err = fmt.Errorf("%s is pinned; its other connections cannot be ended: %w", p.Cgroup, err)
	}
	return n, err
}
