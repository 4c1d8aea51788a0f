package main_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// openTerminal makes a pseudoterminal (pty(7)) of a size.
func openTerminal(t *testing.T, columns, rows uint16) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err := errors.Join(err, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)); err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// drawn runs top on a terminal, calls keys once the first frame is there, and
// gives all that it wrote and its exit code.
func (s *scene) drawn(termType string, keys func(master *os.File), more ...string) (screen, stderr string, code int) {
	s.t.Helper()
	master, slave := openTerminal(s.t, 100, 30)
	var errs strings.Builder
	cmd, err := s.Host.Start(lab.Program{
		Path: binary, Args: append([]string{"top", "--config", s.config, "--sort", "name"}, more...),
		Env: append(os.Environ(), "TERM="+termType), Stdin: slave, Stdout: slave, Stderr: &errs,
	})
	slave.Close()
	if err != nil {
		s.t.Fatal(err)
	}
	var all strings.Builder
	b := make([]byte, 64<<10)
	for pressed := false; ; {
		n, err := master.Read(b)
		all.Write(b[:n])
		if err != nil {
			break // EIO: the program has ended
		}
		if !pressed && strings.Contains(all.String(), "9 paths") {
			pressed = true
			keys(master)
		}
	}
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code, err = exit.ExitCode(), nil
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return all.String(), errs.String(), code
}

func TestTopOnTerminal(t *testing.T) {
	t.Parallel()
	s := outScene(t, "")
	const leave = "\x1b[?1049l"
	press := func(master *os.File, keys string) {
		if _, err := master.WriteString(keys); err != nil {
			t.Error(err)
		}
	}
	draining := func(on bool) func(control.Path) bool {
		return func(p control.Path) bool { return (p.State == "draining") == on }
	}
	for _, termType := range []string{"xterm", "screen", "tmux-256color", "vt100"} {
		screen, errs, code := s.drawn(termType, func(master *os.File) {
			press(master, "jdn") // asked, and refused
			press(master, "jdy")
			s.until("out/p3", draining(true))
			if p := s.paths()["out/p2"]; p.State != "up" {
				t.Errorf("%s: out/p2 is %s", termType, p.State)
			}
			if _, errs, code := s.command("undrain", "out/p3", "--config", s.config); code != 0 {
				t.Error(errs)
			}
			s.until("out/p3", draining(false))
			press(master, "q")
		})
		if code != 0 || errs != "" || !strings.Contains(screen, leave) || !strings.Contains(screen, "out/p9") {
			t.Errorf("%s: %d %q\n%q", termType, code, errs, screen)
		}
	}
	for _, termType := range []string{"dumb", ""} {
		screen, errs, code := s.drawn(termType, func(*os.File) {})
		if code != 2 || screen != "" || !strings.Contains(errs, "paths --watch") {
			t.Errorf("TERM=%s: %d %q %q", termType, code, screen, errs)
		}
		sentence(t, "TERM="+termType, errs)
	}
	screen, errs, code := s.drawn("xterm", func(*os.File) {}, "--control", s.socket+".none")
	if code != 1 || screen != "" {
		t.Errorf("no daemon: %d %q", code, screen)
	}
	sentence(t, "no daemon", errs)
	screen, _, code = s.drawn("xterm", func(master *os.File) { press(master, "/p1\x03") })
	if code != 0 || !strings.Contains(screen, leave) {
		t.Errorf("ctrl+c: %d %q", code, screen)
	}
}

func TestTopAsText(t *testing.T) {
	t.Parallel()
	s := outScene(t, "")
	for _, c := range []struct {
		args []string
		want int
	}{{nil, 2}, {[]string{"--sort", "size", "--once"}, 2}, {[]string{"--sort", "columns", "--json"}, 2}, {[]string{"--once", "--control", "/none"}, 1}} {
		out, errs, code := s.command(append([]string{"top", "--config", s.config}, c.args...)...)
		if code != c.want || out != "" || c.args == nil && !strings.Contains(errs, "paths --watch --json") {
			t.Errorf("%q: %d %q %q", c.args, code, out, errs)
		}
		sentence(t, "top", errs)
	}
	if _, errs, code := s.command("drain", "out/p4", "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	out, errs, code := s.command("top", "--once", "--sort", "state", "--config", s.config)
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if code != 0 || errs != "" || len(lines) != 13 || !strings.HasPrefix(lines[0], "wayout  9 paths: 8 up, 1 draining") ||
		!strings.HasPrefix(lines[4], "out/p4           draining      0") || strings.Contains(out, "\x1b") {
		t.Errorf("%d %q\n%s", code, errs, out)
	}
	out, _, code = s.command("top", "--once", "--filter", "198.51 p4", "--config", s.config)
	if code != 0 || strings.Count(out, "\n") != 5 || !strings.Contains(out, `filter "198.51 p4": 1 of 9`) {
		t.Errorf("%d\n%s", code, out)
	}

	// As JSON it is the document of paths, and the rates.
	plain, _, _ := s.command("paths", "--json", "--config", s.config)
	keys := keysOf(t, plain)
	for _, k := range []string{"", ".bits_in", ".bits_out", ".connections", ".failures", ".interval_seconds", ".packets_out", ".retransmit_share", ".retransmits"} {
		keys = append(keys, "paths.rates"+k)
	}
	slices.Sort(keys)
	out, errs, code = s.command("top", "--once", "--json", "--config", s.config)
	if got := keysOf(t, out); code != 0 || errs != "" || strings.Count(out, "\n") != 1 || !slices.Equal(got, keys) {
		t.Errorf("%d %q %q", code, errs, out)
	}
}

// TestTopCounts sends requests while top looks, and adds up what it saw.
func TestTopCounts(t *testing.T) {
	t.Parallel()
	s := outScene(t, "")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd, err := s.Host.Start(lab.Program{Path: binary, Args: []string{"top", "--json", "--filter", "out/p1", "--config", s.config}, Stdout: w, Stderr: os.Stderr})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var made, failed, in float64
	next := bufio.NewScanner(r)
	next.Buffer(nil, 1<<20)
	var last *float64 // interval that was added up
	read := func() {
		t.Helper()
		if !next.Scan() {
			t.Fatalf("it ended: %v", next.Err())
		}
		var d struct {
			Paths []struct {
				Path  string
				Rates *struct {
					Interval    float64 `json:"interval_seconds"`
					BitsIn      float64 `json:"bits_in"`
					Connections float64
					Failures    float64
				}
			}
		}
		if err := json.Unmarshal(next.Bytes(), &d); err != nil || len(d.Paths) != 1 || d.Paths[0].Path != "out/p1" {
			t.Fatalf("%v in %q", err, next.Text())
		}
		r := d.Paths[0].Rates
		if r == nil || last != nil && *last == r.Interval {
			return // none yet, or that of the interval before
		}
		last = &r.Interval
		made += r.Connections * r.Interval
		failed += r.Failures * r.Interval
		in += r.BitsIn * r.Interval / 8
	}
	read()
	for range 7 {
		if told := s.ask(lab.Ask{Header: egress("p1"), Tunnel: true}); told.Status != 200 {
			t.Fatalf("%d %s", told.Status, told.Body)
		}
	}
	for range 3 {
		if told := s.ask(lab.Ask{Header: egress("p1"), Target: lab.OriginAddr4 + ":9"}); told.Status != 502 {
			t.Fatalf("%d %s", told.Status, told.Body)
		}
	}
	want := s.paths()["out/p1"]
	for made < 6.99 || failed < 2.99 || in < float64(want.Bytes.In)-1 {
		read()
	}
	if made > 7.01 || failed > 3.01 {
		t.Errorf("made %v, failed %v; want 7 and 3", made, failed)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for next.Scan() {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended by a signal: %v", err)
	}
}
