package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"wayout/router"
	"wayout/router/config"
)

// serve runs the daemon in the foreground.
func serve(e *env, args []string) error {
	f := newFlags(e, "serve").withConfig()
	if _, err := f.parse(args); err != nil {
		return err
	}
	c, found, err := f.hostConfig()
	if err != nil {
		return err
	}
	if err := f.privileged(); err != nil {
		return err
	}
	if found {
		printFoundConfig(e.stdout, c)
	}
	r, err := router.New(router.Options{
		Config: c, Version: version, Stderr: e.stderr,
		Load: func() (*config.Config, error) {
			c, _, err := f.hostConfig()
			return c, err
		},
		Notify: func(state string) {
			// Without a service manager there is nobody to tell.
			_, _ = daemon.SdNotify(false, state)
		},
	})
	if err != nil {
		return built(err)
	}

	// ---- Nothing above this line touches the system. ----

	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	now, cut := context.WithCancel(context.Background())
	defer cut()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)
	go func() {
		for s := range signals {
			switch {
			case s == unix.SIGHUP:
				_ = r.Reload() // it has been logged
			case ctx.Err() == nil:
				stop()
			default:
				cut()
			}
		}
	}()
	return r.Run(ctx, now)
}

// printFoundConfig prints what the daemon goes by without a configuration.
func printFoundConfig(w io.Writer, c *config.Config) {
	fmt.Fprintf(w, "no configuration: a path for each global address of the host\n\nINDEX  PATH\n")
	for _, e := range c.Escapers {
		for i, n := range e.Nodes {
			fmt.Fprintf(w, "%5d  %s/%s\n", i+1, e.Name, n.ID)
		}
	}
	for _, s := range c.Servers {
		for _, l := range s.Listen {
			fmt.Fprintf(w, "\n%s on %s; choose by header %s: an index, an address\n", s.Type, l, s.PathSelectionHeader)
		}
	}
}
