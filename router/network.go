package router

import (
	"errors"
	"io"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
)

// Changes are changes of the kernel's network state, made or to be made.
type Changes struct {
	Commands []string `json:"commands"`        // as ip commands, in order
	Notes    []string `json:"notes,omitempty"` // what cannot be had at present
}

// PlanNetwork gives what ApplyNetwork would do. It changes nothing.
func PlanNetwork(c *config.Config) (Changes, error) {
	return withNetwork(c, func(*netcfg.Netlink, *difference) error { return nil })
}

// ApplyNetwork makes addresses, rules and routes as the configuration wants
// them. Twice is once.
func ApplyNetwork(c *config.Config) (Changes, error) {
	return withNetwork(c, func(k *netcfg.Netlink, d *difference) error { return applyHolding(c, k, d) })
}

func withNetwork(c *config.Config, do func(*netcfg.Netlink, *difference) error) (_ Changes, err error) {
	r, err := newRouter(Options{Config: c, Stderr: io.Discard}, nil, nil)
	if err != nil {
		return Changes{}, err
	}
	defer func() { err = errors.Join(err, r.plan.close(nil)) }()
	return diffNetwork(r.want, do)
}

// diffNetwork compares the kernel with a wish and lets do apply the difference.
func diffNetwork(want netcfg.Want, do func(*netcfg.Netlink, *difference) error) (_ Changes, err error) {
	k, err := netcfg.Open(netcfg.Options{Layout: want.Layout})
	if err != nil {
		return Changes{}, err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	have, err := k.Read()
	if err != nil {
		return Changes{}, err
	}
	d := &difference{k: k, have: have, want: want, plan: netcfg.Diff(have, want)}
	err = do(k, d)
	return Changes{d.plan.Commands(), append(d.plan.Notes, d.plan.Conflicts...)}, err
}

// difference is what there is to do, and does it.
type difference struct {
	k    *netcfg.Netlink
	have *netcfg.Snapshot
	want netcfg.Want
	plan netcfg.Plan
}

// apply carries out what pick leaves of it; nil: all.
func (d *difference) apply(pick func(netcfg.Plan) netcfg.Plan) error {
	_, err := netcfg.Make(d.k, d.have, d.want, pick)
	return err
}

// CleanNetwork removes all that is ours from the kernel: addresses, rules and
// routes, and what a daemon that was killed has left: guard, pins, and what stops
// diverted traffic. It refuses while a daemon with these numbers, or the command
// of an exec, runs.
func CleanNetwork(c *config.Config) (_ Changes, err error) {
	want := netcfg.Want{Layout: NetLayout(c)}
	changes, err := diffNetwork(want, func(k *netcfg.Netlink, d *difference) error {
		claim, err := k.Claim()
		if err != nil {
			return err
		}
		if err := cleanPins(c); err != nil {
			return errors.Join(err, claim.Close())
		}
		if err := d.apply(nil); err != nil {
			return errors.Join(err, claim.Close())
		}
		return errors.Join(cleanDiverter(c, k), cleanAnswers(c, k), claim.Close())
	})
	if err != nil {
		return Changes{}, err
	}
	dir, err := pinDir(c)
	if errors.Is(err, bpf.ErrNotMounted) {
		return changes, nil
	}
	if err != nil {
		return changes, err
	}
	return changes, bpf.Clean(dir)
}
