package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// attached runs a program that watches the processes of a group until it is
// interrupted. said is a file that is not empty once it watches.
func attached(said string, name string, args ...string) (func() error, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(said)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is ours alone
	if err := errors.Join(cmd.Start(), log.Close()); err != nil {
		return nil, err
	}
	// Both tools need a moment, and only one of them says when it is over.
	time.Sleep(settle)
	return func() error {
		if err := cmd.Process.Signal(unix.SIGINT); err != nil {
			return err
		}
		// strace ends by the signal that it was sent, perf by a status of its own.
		_ = cmd.Wait()
		return nil
	}, nil
}

func (g *group) pidArgs(flag string) ([]string, error) {
	pids, err := g.pids()
	if err != nil {
		return nil, err
	}
	var args []string
	for _, p := range pids {
		args = append(args, flag, strconv.Itoa(p))
	}
	return args, nil
}

// calls counts one system call.
type calls struct {
	name string
	n    int64
}

// readCalls reads the table that strace -c prints.
func readCalls(text string) ([]calls, error) {
	var all []calls
	inTable := false
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) > 0 && strings.HasPrefix(f[0], "------"):
			if inTable {
				return all, nil
			}
			inTable = true
		case inTable && len(f) >= 5:
			// % time, seconds, usecs/call, calls, maybe errors, syscall
			n, err := strconv.ParseInt(f[3], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("table of strace: %w", err)
			}
			all = append(all, calls{f[len(f)-1], n})
		}
	}
	return nil, errors.New("strace has printed no table")
}

// traceAll counts the system calls of each mode that consists of operations.
func (b *bench) traceAll(ctx context.Context, out io.Writer) error {
	for _, m := range b.modes {
		if m.fresh || m.scale != 1e6 {
			continue
		}
		for _, p := range b.proxies {
			via := p.via(&m)
			if via == "" || via == viaDirect {
				continue
			}
			if ctx.Err() != nil {
				return nil
			}
			table := filepath.Join(b.dir, "strace")
			m := m
			m.job.WarmOps, m.job.Warm = 0, 0 // it would be counted
			s, err := b.measure(ctx, p, m, via, func(g *group) (func() error, error) {
				args, err := g.pidArgs("-p")
				if err != nil {
					return nil, err
				}
				return attached(table, "strace", append([]string{"-f", "-c", "-q"}, args...)...)
			})
			if err != nil {
				return err
			}
			text, err := os.ReadFile(table)
			if err != nil {
				return err
			}
			counted, err := readCalls(string(text))
			if err != nil {
				return fmt.Errorf("%s in %s: %w", p.name, m.name, err)
			}
			if err := tellCalls(out, &s, counted); err != nil {
				return err
			}
		}
	}
	return nil
}

// tellCalls prints what one operation costs in system calls.
func tellCalls(out io.Writer, s *sample, counted []calls) error {
	if s.Ops == 0 {
		fmt.Fprintf(out, "\n%s in %s: nothing done: %s%s\n", s.Peer, s.Mode, s.Failed, s.Error)
		return nil
	}
	slices.SortFunc(counted, func(x, y calls) int { return cmp.Compare(y.n, x.n) })
	sum := 0.0
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	var rows strings.Builder
	for _, c := range counted {
		each := float64(c.n) / float64(s.Ops)
		sum += each
		if each >= 0.02 {
			fmt.Fprintf(&rows, "| %s\t| %.2f\t|\n", c.name, each)
		}
	}
	fmt.Fprintf(out, "\n%s: system calls for one operation of %s (%d counted)\n\n", s.Peer, s.Mode, s.Ops)
	fmt.Fprintf(w, "| call\t| each\t|\n|---\t|---\t|\n%s| all\t| %.1f\t|\n", &rows, sum)
	return w.Flush()
}
