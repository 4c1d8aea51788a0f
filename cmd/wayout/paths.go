package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"wayout/router/control"
)

// paths prints the state of each path.
func paths(e *env, args []string) error {
	f := newFlags(e, "paths").withControl().withJSON()
	watch := f.Bool("watch", false, "go on: print again whenever something changes, at least once a second")
	if _, err := f.parse(args); err != nil {
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	show := func(p control.Paths) error { return printPaths(e.stdout, p) }
	if *f.json {
		out := json.NewEncoder(e.stdout)
		show = func(p control.Paths) error { return out.Encode(p) }
	}
	if !*watch {
		p, err := c.Paths(ctx)
		if err != nil {
			return err
		}
		return show(p)
	}
	err = c.Watch(ctx, show)
	if errors.Is(err, context.Canceled) {
		return nil // by the signal that ends a watch
	}
	return err
}

// printPaths prints the paths as a table.
func printPaths(w io.Writer, p control.Paths) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "PATH\tSTATE\tIPV4\tIPV6\tUPLINK\tINTERFACE\tWEIGHT\tOPEN\tMADE\tFAILED\tBYTES IN\tBYTES OUT\tDROPS\tREASON")
	dash := func(s *string) string {
		if s == nil {
			return "-"
		}
		return *s
	}
	for _, r := range p.Paths {
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n",
			r.Path, r.State, dash(r.IPv4), dash(r.IPv6), dash(r.Uplink), dash(r.Interface), r.Weight,
			r.Connections.Open, r.Connections.Made, r.Connections.Failed, r.Bytes.In, r.Bytes.Out, r.GuardDrops, r.Reason)
	}
	return out.Flush()
}

// drain takes a path out of use for new connections.
func drain(e *env, args []string) error { return setDrain(e, "drain", args, true) }

// undrain gives it back.
func undrain(e *env, args []string) error { return setDrain(e, "undrain", args, false) }

func setDrain(e *env, name string, args []string, on bool) error {
	f := newFlags(e, name).withControl().withJSON()
	rest, err := f.parse(args, "PATH")
	if err != nil {
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	ctx := context.Background()
	if err := c.Drain(ctx, rest[0], on); err != nil {
		return explainPath(ctx, c, rest[0], err)
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(map[string]any{"path": rest[0], "draining": on})
	}
	if on {
		fmt.Fprintf(e.stdout, "%s is draining\n", rest[0])
	} else {
		fmt.Fprintf(e.stdout, "%s is not draining\n", rest[0])
	}
	return nil
}

// explainPath adds to a daemon's refusal what a path is called, when it has
// none of that name.
func explainPath(ctx context.Context, c *control.Client, path string, err error) error {
	p, listErr := c.Paths(ctx)
	if listErr != nil || slices.ContainsFunc(p.Paths, func(r control.Path) bool { return r.Path == path }) {
		return err
	}
	return fmt.Errorf("%w; a path is ESCAPER/ID; `wayout paths` lists them", err)
}

// reload has the daemon read its configuration again.
func reload(e *env, args []string) error {
	f := newFlags(e, "reload").withControl().withJSON()
	if _, err := f.parse(args); err != nil {
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	if err := c.Reload(context.Background()); err != nil {
		return err
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(map[string]bool{"reloaded": true})
	}
	return nil
}
