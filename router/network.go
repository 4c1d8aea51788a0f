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
	return withNetwork(c, func(*netcfg.Netlink, netcfg.Plan, func() error) error { return nil })
}

// ApplyNetwork makes addresses, rules and routes as the configuration wants
// them. Twice is once.
func ApplyNetwork(c *config.Config) (Changes, error) {
	return withNetwork(c, func(k *netcfg.Netlink, p netcfg.Plan, apply func() error) error {
		return applyHolding(c, k, p, apply)
	})
}

func withNetwork(c *config.Config, do func(k *netcfg.Netlink, p netcfg.Plan, apply func() error) error) (_ Changes, err error) {
	r, err := newRouter(Options{Config: c, Stderr: io.Discard}, nil, nil)
	if err != nil {
		return Changes{}, err
	}
	defer func() { err = errors.Join(err, r.plan.close(nil)) }()
	return diffNetwork(r.want, do)
}

// diffNetwork compares the kernel with a wish and lets do apply the difference.
func diffNetwork(want netcfg.Want, do func(k *netcfg.Netlink, p netcfg.Plan, apply func() error) error) (_ Changes, err error) {
	k, err := netcfg.Open(netcfg.Options{Layout: want.Layout})
	if err != nil {
		return Changes{}, err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	have, err := k.Read()
	if err != nil {
		return Changes{}, err
	}
	p := netcfg.Diff(have, want)
	return Changes{p.Commands(), append(p.Notes, p.Conflicts...)}, do(k, p, func() error {
		_, err := netcfg.Make(k, have, want, nil)
		return err
	})
}

// CleanNetwork removes all that is ours from the kernel: addresses, rules and
// routes, and what a daemon that was killed has left: guard, pins, and what stops
// diverted traffic. It refuses while a daemon with these numbers, or the command
// of an exec, runs.
func CleanNetwork(c *config.Config) (_ Changes, err error) {
	want := netcfg.Want{Layout: NetLayout(c)}
	changes, err := diffNetwork(want, func(k *netcfg.Netlink, _ netcfg.Plan, apply func() error) error {
		claim, err := k.Claim()
		if err != nil {
			return err
		}
		if err := cleanPins(c); err != nil {
			return errors.Join(err, claim.Close())
		}
		if err := apply(); err != nil {
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
