package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// plainly is what a program of the client's asks for that knows of no proxy.
type plainly struct {
	say    string
	within time.Duration
	origin string
	source string // that the origin has to see; "": nothing is to get there
}

// gateway shows the host as a gateway, for a client without any setting.
func (d *demo) gateway(context.Context) error {
	if err := d.world.Host.Forward(); err != nil {
		return err
	}
	const soon = 300 * time.Millisecond // for what must not come about
	v4, v6 := lab.Egress4()[6].String(), lab.Egress6()[6].String()
	fmt.Print("\nNo proxy at all: the host is the client's gateway, and the server lan takes what comes by lan0 for TCP port 80:\n\n")
	if err := d.plainly(
		plainly{"GET /, IPv4", patience, lab.OriginAddr4 + ":80", v4},
		plainly{"GET /, IPv6", patience, origin6(), v6},
	); err != nil {
		return err
	}

	fmt.Print("\nThe daemon is killed, and nothing of that leaves the host, though it forwards what else there is:\n\n")
	if err := d.daemon.Kill(); err != nil {
		return err
	}
	left, err := d.leaving(func() error {
		return d.plainly(
			plainly{"GET /, IPv4", soon, lab.OriginAddr4 + ":80", ""},
			plainly{"GET /, IPv6", soon, origin6(), ""},
		)
	})
	if err != nil {
		return err
	}
	fmt.Printf("\n  connections to port 80 on the uplinks: %d\n", left)
	if left > 0 {
		return errors.New("diverted traffic has left without the daemon")
	}
	if d.daemon, err = lab.StartDaemon(d.world.Host, lab.Program{Path: d.binary, Args: []string{"serve", "--config", d.config}}); err != nil {
		return err
	}
	fmt.Print("\nStarted again:\n\n")
	return d.plainly(plainly{"GET /, IPv4", patience, lab.OriginAddr4 + ":80", v4})
}

// patience is for what has to come about.
const patience = 30 * time.Second

// plainly asks without a proxy, and prints what the origin saw.
func (d *demo) plainly(rows ...plainly) error {
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "  asked\tthe origin saw\t")
	for _, r := range rows {
		seen, err := d.world.Client.Get(netip.MustParseAddrPort(r.origin), r.within)
		saw, verdict := seen.Source, asAsked
		switch {
		case err != nil && r.source != "":
			return fmt.Errorf("%s: %w", r.say, err)
		case err != nil:
			saw, verdict = "nothing", ""
		case seen.Source != r.source:
			verdict = "WRONG"
			d.wrong++
		}
		fmt.Fprintf(out, "  %s\t%s\t%s\n", r.say, saw, verdict)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return d.verdict()
}

// leaving counts the connections to port 80 that leave by the uplinks meanwhile: of
// the killed daemon's own the kernel may still have ends to send.
func (d *demo) leaving(meanwhile func() error) (n int, err error) {
	var all []*lab.Capture
	for _, isp := range []*lab.NS{d.world.ISP1, d.world.ISP2} {
		c, err := isp.Capture("host0")
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, c.Close()) }()
		all = append(all, c)
	}
	err = meanwhile()
	for _, c := range all {
		for _, p := range c.Packets() {
			if p.Proto == unix.IPPROTO_TCP && p.Dst.Port() == 80 && p.Flags&lab.SYN != 0 {
				n++
			}
		}
	}
	return n, err
}
