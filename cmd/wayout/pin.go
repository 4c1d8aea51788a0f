package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"wayout/bpf"
	"wayout/router/control"
)

// pin holds the processes of a cgroup to a path, or lists the pins.
func pin(e *env, args []string) error {
	f := newFlags(e, "pin").withControl().withJSON()
	kill := f.Bool("kill", false, "end the connections that do not leave by the path")
	names := []string{"CGROUP", "PATH"}
	if list, err := f.only(args); err != nil {
		return err
	} else if list {
		names = nil
	}
	rest, err := f.parse(args, names...)
	if err != nil {
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	ctx := context.Background()
	if names == nil {
		return listPins(e, f, c)
	}
	done, err := c.Pin(ctx, control.PinAsk{Cgroup: below(rest[0]), Path: rest[1], Kill: *kill})
	if err != nil {
		return explainPath(ctx, c, rest[1], err)
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(done)
	}
	fmt.Fprintf(e.stdout, "%s is pinned to %s\n", done.Cgroup, done.Path)
	if *kill {
		fmt.Fprintf(e.stdout, "connections ended: %d\n", done.Ended)
	}
	return nil
}

// only says whether a command line has flags alone. It reads them.
func (f *flags) only(args []string) (bool, error) {
	if err := f.Parse(args); err != nil {
		return false, parseError(err)
	}
	return f.NArg() == 0, nil
}

// unpin lets the processes of a cgroup go.
func unpin(e *env, args []string) error {
	f := newFlags(e, "unpin").withControl().withJSON()
	rest, err := f.parse(args, "CGROUP")
	if err != nil {
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	done, err := c.Unpin(context.Background(), control.PinAsk{Cgroup: below(rest[0])})
	if err != nil {
		return err
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(done)
	}
	fmt.Fprintf(e.stdout, "%s is not pinned\n", done.Cgroup)
	if done.By == control.ByConfig {
		fmt.Fprintln(e.stderr, "note: the configuration pins it: so it will be again after a reload")
	}
	return nil
}

// below takes a cgroup's directory for the cgroup.
func below(cgroup string) string {
	root, err := bpf.FindCgroup2()
	if err != nil {
		return cgroup // the daemon says what is wrong
	}
	if rest, ok := strings.CutPrefix(filepath.Clean(cgroup), strings.TrimSuffix(root, "/")+"/"); ok {
		return "/" + rest
	}
	return cgroup
}

func listPins(e *env, f *flags, c *control.Client) error {
	p, err := c.Pins(context.Background())
	if err != nil {
		return err
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(p)
	}
	out := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "CGROUP\tPATH\tBY\tSTATE\tOPEN\tMADE\tFAILED\tREASON")
	for _, r := range p.Pins {
		n := r.Connections
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n", r.Cgroup, r.Path, r.By, r.State, n.Open, n.Made, n.Failed, r.Reason)
	}
	return out.Flush()
}
