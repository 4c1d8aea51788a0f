package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"wayout/router/control"
)

// instead is what to do where there is no terminal to draw on.
const instead = "`wayout paths --watch --json` prints the same as text"

// top shows the paths live, in the terminal.
func top(e *env, args []string) error {
	f := newFlags(e, "top").withControl().withJSON()
	once := f.Bool("once", false, "print one frame as text, after one interval, and end;\nas wide as the terminal, or as COLUMNS says, else 80")
	by := f.String("sort", "in", "`column` to sort by: "+strings.Join(columnNames(), ", "))
	filter := f.String("filter", "", "show only paths in which each of these `words` stands:\nin name, state, reason, address, uplink or interface")
	if _, err := f.parse(args); err != nil {
		return err
	}
	c := column(slices.Index(columnNames(), *by))
	if c < 0 {
		return usageError("--sort is one of %s, got %q", strings.Join(columnNames(), ", "), *by)
	}
	s := screen{order: order{c, c.descending()}, filter: *filter}
	if !*f.json && !*once {
		if err := drawable(e); err != nil {
			return err
		}
	}
	client, err := f.client()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	switch {
	case *f.json:
		return topJSON(ctx, client, e.stdout, *filter, *once)
	case *once:
		return topOnce(ctx, client, e, s)
	}
	return topLive(ctx, client, e, newModel(s.order, s.filter, func(path string, on bool) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return client.Drain(ctx, path, on)
	}))
}

// drawable refuses what cannot be drawn on or typed at.
func drawable(e *env) error {
	out, ok := e.stdout.(*os.File)
	if !ok || !term.IsTerminal(int(out.Fd())) || !term.IsTerminal(int(e.stdin.Fd())) {
		return usageError("top needs a terminal; %s", instead)
	}
	if t := e.getenv("TERM"); t == "" || t == "dumb" {
		return usageError("a terminal of type %q cannot be drawn on (TERM); %s", t, instead)
	}
	return nil
}

// topLive runs on the terminal until a key or a signal ends it. That there is
// no daemon is an error only at the start.
func topLive(ctx context.Context, client *control.Client, e *env, m *model) error {
	first, err := client.Paths(ctx)
	if err != nil {
		return err
	}
	m.take(update{at: time.Now(), paths: first})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// What it draws is only what has changed. Snapshots are paced by the feed;
	// the rest answers keys.
	p := tea.NewProgram(m, tea.WithInput(e.stdin), tea.WithOutput(e.stdout), tea.WithFPS(20))
	go feed(ctx, client.Watch, func(u update) { p.Send(u) })
	if _, err := p.Run(); err != nil && !errors.Is(err, tea.ErrInterrupted) {
		return fmt.Errorf("draw on the terminal: %w", err)
	}
	return nil
}

// errSeen ends a watch that has seen enough.
var errSeen = errors.New("seen")

// watched is what is left of the error of a watch that was ended by ourselves
// or by a signal.
func watched(err error) error {
	if errors.Is(err, errSeen) || errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// topJSON prints the paths that a filter lets through, with their rates and as
// the daemon lists them, one object a line; once: only the first with rates.
func topJSON(ctx context.Context, client *control.Client, w io.Writer, filter string, once bool) error {
	var m meter
	out := json.NewEncoder(w)
	words := filterWords(filter)
	return watched(client.Watch(ctx, func(p control.Paths) error {
		rows := slices.DeleteFunc(m.add(time.Now(), p), func(r row) bool { return !matches(&r, words) })
		if once && m.intervals == 0 {
			return nil
		}
		if err := out.Encode(rated{p.Version, rows}); err != nil || !once {
			return err
		}
		return errSeen
	}))
}

// topOnce prints one frame.
func topOnce(ctx context.Context, client *control.Client, e *env, s screen) error {
	var m meter
	s.width, s.dull = frameWidth(e), true
	err := client.Watch(ctx, func(p control.Paths) error {
		now := time.Now()
		rows := m.add(now, p)
		if m.intervals == 0 {
			return nil
		}
		s.height = len(rows) + frameLines
		s.set(now, rows)
		if _, err := io.WriteString(e.stdout, strings.Join(s.frame(), "\n")+"\n"); err != nil {
			return err
		}
		return errSeen
	})
	if err == nil {
		return errors.New("the daemon stopped before there was something to show")
	}
	return watched(err)
}

// frameWidth is how wide a frame is that is printed as text.
func frameWidth(e *env) int {
	if n, err := strconv.Atoi(e.getenv("COLUMNS")); err == nil && n > 0 {
		return n
	}
	if out, ok := e.stdout.(*os.File); ok {
		if w, _, err := term.GetSize(int(out.Fd())); err == nil && w > 0 {
			return w
		}
	}
	return 80
}
