package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router"
	"wayout/router/config"
)

// Levels of a finding.
const (
	levelOK      = "ok"
	levelNote    = "note"    // works, and here is what to know; or it could not be looked at
	levelWarning = "warning" // works, and not well, or not always
	levelBlocker = "blocker" // does not work
)

// finding is one thing that doctor looked at.
type finding struct {
	Name   string `json:"name"`
	Level  string `json:"level"`
	Found  string `json:"found,omitempty"`
	Means  string `json:"means,omitempty"`  // for wayout
	Remedy string `json:"remedy,omitempty"` // a command, or what to write where

	fix *fix // nil: nothing that can be done without asking
}

// diagnosis is what `wayout doctor --json` prints.
type diagnosis struct {
	OK       bool      `json:"ok"` // no blocker is left, and no fix has failed
	Findings []finding `json:"findings"`
	*treatment
}

// doctor says what this host allows and lacks, with the remedy for each.
func doctor(e *env, args []string) error {
	f := newFlags(e, "doctor").withControl().withJSON()
	prove := f.String("prove-guard", "", "have the running daemon try to leave by this `path` with a wrong source,\nto the address:port that is given as the argument; the kernel has to refuse it")
	fix := f.Bool("fix", false, "put right what is safe to: sysctls and the bpf file system, until the next boot;\nit says what it did, and what is left to do by hand")
	if err := f.Parse(args); err != nil {
		return parseError(err)
	}
	if *prove != "" && *fix {
		return usageError("--fix and --prove-guard are two commands")
	}
	if *prove != "" {
		return proveGuard(e, f, *prove)
	}
	if _, err := f.parse(f.Args()); err != nil {
		return err
	}
	c, err := f.loadConfig()
	if err != nil {
		return err
	}
	if c == nil {
		c = config.Default(nil)
	}
	var d diagnosis
	if d.Findings, err = examine(c); err != nil {
		return err
	}
	if *fix {
		t := treat(d.Findings)
		d.treatment = &t
		if d.Findings, err = examine(c); err != nil {
			return err
		}
	}
	d.judge()
	if *f.json {
		err = json.NewEncoder(e.stdout).Encode(d)
	} else {
		d.print(e.stdout)
	}
	if !d.OK {
		return errors.Join(err, &exitError{code: exitFailed})
	}
	return err
}

// judge says whether all is well enough.
func (d *diagnosis) judge() {
	d.OK = d.treatment == nil || len(d.Failed) == 0
	for _, x := range d.Findings {
		d.OK = d.OK && x.Level != levelBlocker
	}
}

func (d *diagnosis) print(w io.Writer) {
	if d.treatment != nil {
		d.treatment.print(w)
	}
	for _, x := range d.Findings {
		fmt.Fprintf(w, "%-8s %s", x.Level, x.Name)
		if x.Found != "" {
			fmt.Fprintf(w, ": %s", x.Found)
		}
		fmt.Fprintln(w)
		if x.Means != "" {
			fmt.Fprintf(w, "         means: %s\n", x.Means)
		}
		if x.Remedy != "" {
			fmt.Fprintf(w, "         remedy: %s\n", x.Remedy)
		}
	}
}

// proveGuard asks the daemon for a deliberately wrong attempt.
func proveGuard(e *env, f *flags, path string) error {
	f.form = " --prove-guard PATH"
	rest, err := f.parse(f.Args(), "ADDRESS:PORT")
	if err != nil {
		return err
	}
	target, err := netip.ParseAddrPort(rest[0])
	if err != nil {
		return usageError("the target is an address and a port, got %q", rest[0])
	}
	client, err := f.client()
	if err != nil {
		return err
	}
	ctx := context.Background()
	p, err := client.Prove(ctx, path, target)
	if err != nil {
		return explainPath(ctx, client, path, err)
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(p)
	}
	fmt.Fprintf(e.stdout, "the kernel refused %s to connect and to send to %s from %s\n", p.Path, p.Target, p.Source)
	return nil
}

// examine looks at everything. It changes nothing.
func examine(c *config.Config) ([]finding, error) {
	k, err := netcfg.Open(netcfg.Options{Layout: router.NetLayout(c)})
	if err != nil {
		return nil, err
	}
	all, err := examineWith(k, c)
	return all, errors.Join(err, k.Close())
}

func examineWith(k *netcfg.Netlink, c *config.Config) ([]finding, error) {
	s, err := k.Sysctls()
	if err != nil {
		return nil, err
	}
	snapshot, err := k.Read()
	if err != nil {
		return nil, err
	}
	nat, err := k.NAT()
	if err != nil {
		return nil, err
	}
	rights, err := examineRights(c)
	if err != nil {
		return nil, err
	}
	kernel, err := examineKernel()
	if err != nil {
		return nil, err
	}
	files, err := examineFiles()
	if err != nil {
		return nil, err
	}
	unit, err := examineUnit("/", c)
	if err != nil {
		return nil, err
	}
	var all []finding
	for _, part := range [][]finding{
		kernel, rights, examineFeatures(bpf.Probe(), c.Accounting),
		{files},
		unit,
		examineSysctls(s), examineReversePath(s, c), examineIPv6(procSys, c),
		examineRules(snapshot, router.NetLayout(c)), examineNAT(nat),
		examinePrefixes(snapshot, s, bpf.ProbeResponder(netcfg.TryIngress), c),
		examineDiverts(snapshot, router.NetLayout(c), bpf.ProbeDivert(), bpf.ProbeFragments(netcfg.TryIngress), c), examineRedirects(procSys, snapshot, c),
	} {
		all = append(all, part...)
	}
	return all, nil
}
