// Command demo shows wayout at work: it makes a host with many addresses, a
// client and an origin in network namespaces of their own, runs the real
// binary with a real configuration, asks for paths in every way there is, and
// prints what was asked beside what the origin saw. It leaves nothing behind.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/scripts/lab"
)

func main() {
	binary := flag.String("wayout", "bin/wayout", "the program to show")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, *binary); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1) //nolint:gocritic // nothing is left for stop to do
	}
}

func run(ctx context.Context, binary string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root: sudo make demo")
	}
	binary, err = filepath.Abs(binary)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "wayout-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d, err := start(dir, binary)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	for _, show := range []func(context.Context) error{
		d.selections, d.userNames, d.socks, d.routes, d.publication, d.refusals, d.explain, d.uplinkDown, d.wrongDial, d.paths, d.gateway,
	} {
		if err := show(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return errors.New("interrupted; everything is taken down again")
		}
	}
	return nil
}

// demo is the running scene.
type demo struct {
	binary         string
	config, socket string
	world          *lab.World
	origin         *lab.Origin
	daemon         *lab.Daemon
	wrong          int // answers that were not as they should be
}

func start(dir, binary string) (*demo, error) {
	fmt.Println("A host with two uplinks, each by a provider of its own; a client behind it; an origin that both reach.")
	w, err := lab.NewWorld(false)
	if err != nil {
		return nil, err
	}
	d := &demo{
		binary: binary, world: w, config: filepath.Join(dir, "wayout.yaml"), socket: filepath.Join(dir, "control.sock"),
	}
	if err := d.begin(); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func (d *demo) begin() error {
	if err := d.startOrigin(); err != nil {
		return err
	}
	config, err := d.configuration()
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.config, []byte(config), 0o600); err != nil {
		return err
	}
	fmt.Printf("\nIts configuration:\n\n%s\n$ wayout serve --config wayout.yaml\n", indent(config))
	d.daemon, err = lab.StartDaemon(d.world.Host, lab.Program{Path: d.binary, Args: []string{"serve", "--config", d.config}})
	return err
}

func (d *demo) startOrigin() error {
	at4 := netip.AddrPortFrom(netip.MustParseAddr(lab.OriginAddr4), 80)
	at6 := netip.AddrPortFrom(netip.MustParseAddr(lab.OriginAddr6), 80)
	l4, err := d.world.Origin.Listen(at4)
	if err != nil {
		return err
	}
	l6, err := d.world.Origin.Listen(at6)
	if err != nil {
		return errors.Join(err, l4.Close())
	}
	d.origin = lab.StartOrigin(l4, l6)
	return nil
}

func (d *demo) close() error {
	var errs []error
	if d.daemon != nil {
		errs = append(errs, d.daemon.Stop(), d.clean())
	}
	if d.origin != nil {
		errs = append(errs, d.origin.Close())
	}
	return errors.Join(append(errs, d.world.Close())...)
}

// clean takes away what goes on to stop diverted traffic.
func (d *demo) clean() error {
	cmd, err := d.world.Host.Start(lab.Program{Path: d.binary, Args: []string{"clean", "--config", d.config}, Stderr: os.Stderr})
	if err != nil {
		return err
	}
	return cmd.Wait()
}

const password = "wonderland"

func (d *demo) configuration() (string, error) {
	var hash bytes.Buffer
	cmd, err := d.world.Host.Start(lab.Program{
		Path: d.binary, Args: []string{"hash-password"},
		Stdin: strings.NewReader(password + "\n"), Stdout: &hash, Stderr: os.Stderr,
	})
	if err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("hash-password: %w", err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `control: {socket: %s}
uplink:
  - {name: isp1, interface: eth0, gateway4: %s, gateway6: %q, manage_addresses: true}
  - {name: isp2, interface: eth1, gateway4: %s, gateway6: %q, manage_addresses: true}
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    pick_policy: round_robin
    nodes:
`, d.socket, lab.Gateway1Of4, lab.Gateway1Of6, lab.Gateway2Of4, lab.Gateway2Of6)
	v4, v6 := lab.Egress4(), lab.Egress6()
	for i := range v4 {
		uplink := "isp1"
		if i >= len(v4)/2 {
			uplink = "isp2"
		}
		if i == len(v4)-1 { // one path that owns no IPv6
			fmt.Fprintf(&b, "      - {id: %s, ipv4: %s, uplink: %s}\n", id(i), v4[i], uplink)
			continue
		}
		fmt.Fprintf(&b, "      - {id: %s, ipv4: %s, ipv6: %q, uplink: %s}\n", id(i), v4[i], v6[i], uplink)
	}
	fmt.Fprintf(&b, `  - name: wide
    type: direct_fixed
    enable_path_selection: true
    neighbour: answer
    nodes: [{id: whole, ipv6: %q, uplink: isp1}]
  - {name: dyn, type: direct_float, enable_path_selection: true, uplink: isp1}
  - name: by-name
    type: route_select
    enable_path_selection: true
    next: [out, {escaper: wide, weight: 0}, {escaper: dyn, weight: 0}]
user_group:
  - name: team
    users:
      - name: alice
        password: %q
        allow_path: ["out/fra-*"]
      - name: bob
        password: %q
        egress_path: {out: lon-2}
server:
  - {name: open, type: mixed_proxy, listen: "%s", open: true, escaper: out, path_selection_header: X-Egress-Path, socks_extension: true}
  - {name: team, type: mixed_proxy, listen: "%s", user_group: team, escaper: out, path_selection_header: X-Egress-Path, username_params: true}
  - {name: route, type: mixed_proxy, listen: "%s", open: true, escaper: by-name, path_selection_header: X-Egress-Path}
  - {name: lan, type: tproxy, interface: lan0, divert: tcp/80, escaper: out, select: {out: lon-3}}
`, lab.SharedNet6, hash0(&hash), hash0(&hash), d.at(open), d.at(team), d.at(route))
	return b.String(), nil
}

// hash0 is the hash that hash-password printed: its last line.
func hash0(out *bytes.Buffer) string {
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	return lines[len(lines)-1]
}

// id names the nodes by city: four of each uplink.
func id(i int) string {
	return []string{"fra-1", "fra-2", "fra-3", "fra-4", "lon-1", "lon-2", "lon-3", "lon-4"}[i]
}

func indent(s string) string {
	return "    " + strings.ReplaceAll(strings.TrimSuffix(s, "\n"), "\n", "\n    ") + "\n"
}

// uplinkDown takes an uplink away and gives it back.
func (d *demo) uplinkDown(ctx context.Context) error {
	lon := lab.Egress4()[4]
	fmt.Print("\nThe interface of isp2 goes down. Its paths refuse; nothing is sent by the other uplink:\n\n")
	if err := d.world.Host.Down("eth1"); err != nil {
		return err
	}
	if err := d.until(ctx, "out/lon-1", "down"); err != nil {
		return err
	}
	if err := d.table(ctx, []row{
		{say: "lon-1", ask: lab.Ask{Header: header("lon-1")}, status: 503},
		{say: "fra-1, of the other uplink", ask: lab.Ask{Header: header("fra-1")}, source: lab.Egress4()[0].String()},
	}); err != nil {
		return err
	}
	fmt.Print("\nIt comes back, and wayout puts back the routes and addresses that went with it:\n\n")
	if err := d.world.Host.Up("eth1"); err != nil {
		return err
	}
	if err := d.until(ctx, "out/lon-1", "up"); err != nil {
		return err
	}
	return d.table(ctx, []row{
		{say: "lon-1", ask: lab.Ask{Header: header("lon-1")}, source: lon.String()},
	})
}

// until waits for the daemon to see a path in a state, whole: with nothing
// left to say about it.
func (d *demo) until(ctx context.Context, path, state string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	noticed := errors.New("noticed")
	err := control.NewClient(d.socket).Watch(ctx, func(all control.Paths) error {
		for _, p := range all.Paths {
			if p.Path == path && p.State == state && (state != "up" || p.Reason == "") {
				return noticed
			}
		}
		return nil
	})
	if errors.Is(err, noticed) {
		return nil
	}
	return fmt.Errorf("the daemon does not see what happened to %s: %w", path, err)
}

// wrongDial has the daemon do what it must never do.
func (d *demo) wrongDial(context.Context) error {
	before := d.requests()
	target := lab.OriginAddr4 + ":80"
	fmt.Printf("\nA deliberately wrong dial: the mark of one path, the address of another.\n\n$ wayout doctor --prove-guard out/fra-1 %s\n", target)
	if err := d.command("doctor", "--config", d.config, "--prove-guard", "out/fra-1", target); err != nil {
		return err
	}
	if now := d.requests(); now != before {
		return fmt.Errorf("the origin saw %d requests more", now-before)
	}
	return nil
}

// requests counts what the origin has seen.
func (d *demo) requests() int {
	n := 0
	for _, c := range d.origin.Sources() {
		n += c
	}
	return n
}

// command runs the program on the host, for its output to be seen.
func (d *demo) command(args ...string) error { return d.feed("", args...) }

// feed is command for one that reads its standard input.
func (d *demo) feed(input string, args ...string) error {
	cmd, err := d.world.Host.Start(lab.Program{
		Path: d.binary, Args: args, Stdin: strings.NewReader(input), Stdout: os.Stdout, Stderr: os.Stderr,
	})
	if err != nil {
		return err
	}
	return cmd.Wait()
}

// paths shows what the operator sees: the kernel's counters, and beside them
// what the origin has counted.
func (d *demo) paths(context.Context) error {
	fmt.Print("\n$ wayout paths\n\n")
	if err := d.command("paths", "--config", d.config); err != nil {
		return err
	}
	fmt.Print("\nRequests that the origin has seen, by their source:\n\n")
	seen := d.origin.Sources()
	for _, a := range slices.SortedFunc(maps.Keys(seen), netip.Addr.Compare) {
		fmt.Printf("  %3d  %s\n", seen[a], a)
	}
	return nil
}
