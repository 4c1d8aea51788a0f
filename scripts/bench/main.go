// Command bench measures wayout beside other proxies, from outside: a load
// generator, the proxy and an origin, each in a network namespace of its own,
// on this machine and without any other network.
//
//	go run ./scripts/bench                              everything, 3 rounds
//	go run ./scripts/bench -rounds 5 -modes connect,http -peers wayout,squid,direct
//	go run ./scripts/bench -modes connect -peers wayout,nginx-stream -syscalls
//	go run ./scripts/bench -modes connect -peers wayout -flame docs
//	go run ./scripts/bench -modes connect -peers wayout,wayout-other -other /tmp/wayout
//
// It needs root. The CPU that it tells is the proxy's own, of all its processes
// in user and kernel mode, for one unit of work. It ends the processes that it
// has started and no others; its namespaces go with them. The origin tells every
// connection the source address that it sees, and a wrong one is an error.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// options are the flags.
type options struct {
	wayout       string
	other        string // "": none
	rounds       int
	peers, modes []string // empty: all
	base         string   // that ratios are to
	idle         int      // tunnels
	scale        float64  // of the amounts of work
	out          string   // JSON file
	flame        string   // directory for flame graphs
	syscalls     bool
	keep         bool
	log          io.Writer
}

func main() {
	if is, err := part(os.Args); is {
		exit(err)
	}
	o := options{log: os.Stderr}
	var peers, modes string
	flag.StringVar(&o.wayout, "wayout", "bin/wayout", "the program")
	flag.StringVar(&o.other, "other", "", "another build of the program, measured as the peer wayout-other")
	flag.IntVar(&o.rounds, "rounds", 3, "number of rounds; all peers are measured in each")
	flag.StringVar(&peers, "peers", "", "peers, with commas between them; default all that are installed")
	flag.StringVar(&modes, "modes", "", "modes, with commas between them; default all")
	flag.StringVar(&o.base, "base", "wayout", "the peer that ratios of CPU and memory are to")
	flag.IntVar(&o.idle, "idle", 2000, "tunnels of the mode idle; the limit of open files may allow less")
	flag.Float64Var(&o.scale, "scale", 1, "share of the usual work: 0.1 is quick and coarse")
	flag.StringVar(&o.out, "o", "bench.json", "JSON file to write")
	flag.StringVar(&o.flame, "flame", "", "directory: a flame graph (SVG) for each mode and peer, in an extra round; needs perf")
	flag.BoolVar(&o.syscalls, "syscalls", false, "count the system calls of the modes that have operations, in an extra round; needs strace")
	flag.BoolVar(&o.keep, "keep", false, "keep the directory with configurations and logs")
	flag.Parse()
	o.peers, o.modes = list(peers), list(modes)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	exit(run(ctx, o, os.Stdout))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func list(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// errWrong: what must never happen.
var errWrong = errors.New("connections have left by a wrong source address")

func run(ctx context.Context, o options, out io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	if o.wayout, err = filepath.Abs(o.wayout); err != nil {
		return err
	}
	if o.other != "" {
		if o.other, err = filepath.Abs(o.other); err != nil {
			return err
		}
	}
	b, err := newBench(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if o.keep {
		fmt.Fprintln(o.log, "configurations and logs:", b.dir)
	}
	if err := b.rounds(ctx); err != nil {
		return err
	}
	b.out.Summary = b.summarize()
	if err := b.report(out); err != nil {
		return err
	}
	if o.syscalls {
		if err := b.traceAll(ctx, out); err != nil {
			return err
		}
	}
	if o.flame != "" {
		if err := b.flameAll(ctx); err != nil {
			return err
		}
	}
	if o.out != "" {
		if err := b.save(o.out); err != nil {
			return err
		}
	}
	return b.verdict(ctx)
}

// verdict is the error that the run ends with.
func (b *bench) verdict(ctx context.Context) error {
	for _, s := range b.out.Samples {
		if s.Wrong > 0 {
			return fmt.Errorf("%w: %s in %s: %d of %d, %s for one", errWrong, s.Peer, s.Mode, s.Wrong, s.Checked, s.WrongAs)
		}
	}
	if ctx.Err() != nil {
		return errors.New("interrupted; what was measured until then is told")
	}
	return nil
}
