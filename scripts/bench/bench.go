package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// bench is one run.
type bench struct {
	o       options
	world   *world
	dir     string
	self    string // our own program
	cgroups string // mount point, "" when there is none
	groups  int    // made so far
	ports   int    // runs of the mode "ports"
	files   int    // limit of open files
	origin  *exec.Cmd
	proxies []*proxy
	modes   []mode
	out     output
}

// output is the JSON file.
type output struct {
	When    string            `json:"when"`
	Kernel  string            `json:"kernel"`
	CPUs    int               `json:"cpus"`
	Files   int               `json:"file_limit"`
	Rounds  int               `json:"rounds"`
	Base    string            `json:"base"`
	Peers   map[string]*proxy `json:"peers"`
	Missing []string          `json:"missing"`
	Samples []sample          `json:"samples"`
	Summary []summary         `json:"summary"`
}

// sample is what one mode gave for one peer in one round.
type sample struct {
	Peer  string `json:"peer"`
	Mode  string `json:"mode"`
	Round int    `json:"round"`
	result
	Steps  []step `json:"steps,omitempty"`
	Failed string `json:"failed,omitempty"`
}

// step is what a proxy held at a number of tunnels.
type step struct {
	Tunnels int `json:"tunnels"`
	footprint
}

// Names by which the program is called for its parts.
const (
	partLoad   = "part:load"
	partOrigin = "part:origin"
)

// part runs a part of the program when args ask for one.
func part(args []string) (bool, error) {
	if len(args) < 2 {
		return false, nil
	}
	switch args[1] {
	case partLoad:
		return true, serveLoad(os.Stdin, os.Stdout)
	case partOrigin:
		return true, serveOrigin(args[2:])
	}
	return false, nil
}

func newBench(o options) (_ *bench, err error) {
	b := &bench{o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if b.cgroups, err = cgroupMount(); err != nil {
		return nil, err
	}
	if b.files, err = raiseFiles(); err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	b.out = output{
		When: time.Now().UTC().Format(time.RFC3339), Kernel: strings.TrimSpace(string(kernel)), CPUs: runtime.NumCPU(),
		Files: b.files, Base: o.base, Peers: map[string]*proxy{}, Missing: []string{},
	}
	if err := b.choose(); err != nil {
		return nil, err
	}
	if b.dir, err = os.MkdirTemp("", "wayout-bench-"); err != nil {
		return nil, err
	}
	if err := os.Chmod(b.dir, 0o755); err != nil { // some proxies run as a user of their own
		return nil, err
	}
	if b.world, err = newWorld(); err != nil {
		return nil, err
	}
	return b, b.startOrigin()
}

// raiseFiles gives us, and what we start, all the descriptors that there are.
func raiseFiles() (int, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, err
	}
	lim.Cur = lim.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("raise the limit of open files: %w", err)
	}
	const enough = 1 << 17 // some size tables by it
	if lim.Max > enough {
		lim = unix.Rlimit{Cur: enough, Max: lim.Max}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
			return 0, fmt.Errorf("limit of open files: %w", err)
		}
	}
	return int(lim.Cur), nil
}

// choose finds the peers and modes that were asked for.
func (b *bench) choose() error {
	wanted := slices.Clone(b.o.peers)
	for _, p := range allPeers() {
		if len(b.o.peers) > 0 && !slices.Contains(b.o.peers, p.name) {
			continue
		}
		wanted = slices.DeleteFunc(wanted, func(s string) bool { return s == p.name })
		run := &proxy{peer: p, Note: p.note}
		var err error
		switch p.program {
		case "":
		case ourProgram:
			run.path = b.o.wayout
			_, err = os.Stat(run.path)
		case otherProgram:
			if run.path = b.o.other; run.path == "" && len(b.o.peers) == 0 {
				continue
			}
			_, err = os.Stat(run.path)
		default:
			run.path, err = find(p.program)
		}
		if err != nil {
			fmt.Fprintf(b.o.log, "%s is left out: %v\n", p.name, err)
			b.out.Missing = append(b.out.Missing, p.name)
			continue
		}
		if len(p.version) > 0 {
			text, err := exec.Command(run.path, p.version...).CombinedOutput()
			run.Version, _, _ = strings.Cut(strings.TrimSpace(string(text)), "\n")
			if run.Version == "" && err != nil {
				return fmt.Errorf("version of %s: %w", p.name, err)
			}
		}
		b.out.Peers[p.name] = run
		b.proxies = append(b.proxies, run)
	}
	if len(wanted) > 0 {
		return fmt.Errorf("no such peers: %v", wanted)
	}
	if len(b.proxies) == 0 {
		return errors.New("there is nothing to measure")
	}
	hold := min(b.o.idle, b.files*2/5) // two descriptors each, and some to spare
	wanted = slices.Clone(b.o.modes)
	for _, m := range modes(b.o.scale, hold) {
		if len(b.o.modes) > 0 && !slices.Contains(b.o.modes, m.name) {
			continue
		}
		wanted = slices.DeleteFunc(wanted, func(s string) bool { return s == m.name })
		b.modes = append(b.modes, m)
	}
	if len(wanted) > 0 {
		return fmt.Errorf("no such modes: %v", wanted)
	}
	return nil
}

func (b *bench) startOrigin() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	b.origin, err = b.world.origin.Start(lab.Program{
		Path: b.self, Args: []string{partOrigin, target(0), target(1)}, Stdout: w, Stderr: b.o.log,
	})
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	if _, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		return fmt.Errorf("the origin does not start: %w", err)
	}
	return nil
}

func (b *bench) close() error {
	var errs []error
	for _, p := range b.proxies {
		errs = append(errs, b.stop(p))
	}
	if b.origin != nil {
		errs = append(errs, b.origin.Process.Kill())
		_ = b.origin.Wait() // it says that it was killed
	}
	if b.world != nil {
		errs = append(errs, b.world.close())
	}
	if b.dir != "" && !b.o.keep {
		errs = append(errs, os.RemoveAll(b.dir))
	}
	return errors.Join(errs...)
}

// rounds measures everything, mode by mode, in each round beginning with
// another peer. It ends early, without an error, when ctx does.
func (b *bench) rounds(ctx context.Context) error {
	began := time.Now()
	for round := range b.o.rounds {
		for _, m := range b.modes {
			for i := range b.proxies {
				p := b.proxies[(i+round)%len(b.proxies)]
				via := p.via(&m)
				if via == "" {
					continue
				}
				s, err := b.measure(ctx, p, m, via, nil)
				if ctx.Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				s.Round = round + 1
				b.out.Samples = append(b.out.Samples, s)
				fmt.Fprintf(b.o.log, "%4.0fs  round %d  %-10s %-13s %s\n", time.Since(began).Seconds(), s.Round, m.name, p.name, s.line(&m))
			}
		}
		b.out.Rounds = round + 1
	}
	return nil
}

// measure runs a proxy for one job. beside, when not nil, is called when the
// proxy runs, and what it returns when the job is done.
func (b *bench) measure(ctx context.Context, p *proxy, m mode, via string, beside func(*group) (func() error, error)) (s sample, err error) {
	s = sample{Peer: p.name, Mode: m.name}
	if m.name == "ports" {
		// Above all others, and moved on each time: no connection of before
		// holds one of them in TIME_WAIT.
		const count = 500
		low := highPort + 1 + b.ports%30*count
		b.ports++
		if err := b.world.hostPorts(low, low+count-1); err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, b.world.hostPorts(lowPort, highPort)) }()
	}
	if err := b.start(ctx, p); err != nil {
		s.Failed = err.Error()
		return s, nil
	}
	defer func() { err = errors.Join(err, b.stop(p)) }()
	var done func() error
	if beside != nil {
		if done, err = beside(p.group); err != nil {
			return s, err
		}
	}
	j := m.job
	v := b.vars(p)
	j.Via, j.Proxy, j.Local, j.Header = via, fmt.Sprintf("%s:%d", hostInner, listenPort), clientAddrs(), p.header
	if via == viaSOCKS && p.both {
		j.Proxy, j.Header = fmt.Sprintf("%s:%d", hostInner, socksPort), "" // the policy chooses: any of the sources is right
	}
	j.Targets = []string{target(0)}
	if p.tunnel != viaDirect {
		j.Sources, j.Group = v.Sources, *p.group
	}
	if m.name == "ports" {
		j.Targets = append(j.Targets, target(1))
		j.Sources = j.Sources[:1]
	}
	if err := b.load(ctx, j, &s, p.group); err != nil {
		s.Failed = err.Error()
	}
	if done != nil {
		err = done()
	}
	return s, err
}

// settle is how long a proxy has to come to rest before its memory is read.
const settle = time.Second

// load runs the load generator.
func (b *bench) load(ctx context.Context, j job, s *sample, g *group) error {
	text, err := json.Marshal(j)
	if err != nil {
		return err
	}
	in, toLoad, err := os.Pipe()
	if err != nil {
		return err
	}
	defer toLoad.Close()
	fromLoad, out, err := os.Pipe()
	if err != nil {
		return errors.Join(err, in.Close())
	}
	defer fromLoad.Close()
	var stderr bytes.Buffer
	cmd, err := b.world.client.Start(lab.Program{Path: b.self, Args: []string{partLoad}, Stdin: in, Stdout: out, Stderr: &stderr})
	if err := errors.Join(err, in.Close(), out.Close()); err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, 2*(j.For+j.Warm+patience)*time.Duration(max(1, len(j.Steps))))
	defer cancel()
	// Nothing to be done about one that has come to its end.
	defer context.AfterFunc(limit, func() { _ = cmd.Process.Kill() })()
	err = b.follow(j, s, g, toLoad, fromLoad, append(text, '\n'))
	if err := errors.Join(err, toLoad.Close(), cmd.Wait()); err != nil {
		return fmt.Errorf("load generator: %w: %s", err, &stderr)
	}
	return nil
}

// follow hands the load generator its job and takes its results.
func (b *bench) follow(j job, s *sample, g *group, toLoad io.Writer, fromLoad io.Reader, text []byte) error {
	if _, err := toLoad.Write(text); err != nil {
		return err
	}
	results := json.NewDecoder(fromLoad)
	for range max(1, len(j.Steps)) {
		if err := results.Decode(&s.result); err != nil {
			return err
		}
		if len(j.Steps) == 0 {
			break
		}
		time.Sleep(settle)
		f, err := g.footprint()
		if err != nil {
			return err
		}
		s.Steps = append(s.Steps, step{s.Held, f})
		if _, err := io.WriteString(toLoad, "\n"); err != nil {
			return err
		}
	}
	return nil
}

// save writes the JSON file.
func (b *bench) save(name string) error {
	text, err := json.MarshalIndent(b.out, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, append(text, '\n'), 0o644)
}
