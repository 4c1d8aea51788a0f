package main_test

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// uplinkNode is a path of the usual uplink scene.
type uplinkNode struct {
	id     string
	v4, v6 netip.Addr
	uplink int // 0 or 1
}

func (n uplinkNode) source(target string) netip.Addr {
	if target == target6 {
		return n.v6
	}
	return n.v4
}

// uplinkNodes are p1 to p4 by isp1 and p5 to p8 by isp2, dual-stack.
func uplinkNodes() []uplinkNode {
	v4, v6 := lab.Egress4(), lab.Egress6()
	all := make([]uplinkNode, len(v4))
	for i := range all {
		all[i] = uplinkNode{fmt.Sprintf("p%d", i+1), v4[i], v6[i], i / (len(v4) / 2)}
	}
	return all
}

// uplinkConfig is escaper out with uplinkNodes, whose addresses wayout puts on
// the interfaces itself, and an open proxy on 3128.
func uplinkConfig(more string) string {
	var b strings.Builder
	b.WriteString(twoUplinks)
	b.WriteString("escaper:\n  - name: out\n    type: direct_fixed\n    enable_path_selection: true\n    nodes:\n")
	for _, n := range uplinkNodes() {
		fmt.Fprintf(&b, "      - {id: %s, ipv4: %s, ipv6: %q, uplink: isp%d}\n", n.id, n.v4, n.v6, n.uplink+1)
	}
	b.WriteString(more)
	if !strings.Contains(more, "server:") {
		b.WriteString(openServer)
	}
	return b.String()
}

const twoUplinks = `uplink:
  - {name: isp1, interface: eth0, gateway4: ` + lab.Gateway1Of4 + `, gateway6: "` + lab.Gateway1Of6 + `", manage_addresses: true}
  - {name: isp2, interface: eth1, gateway4: ` + lab.Gateway2Of4 + `, gateway6: "` + lab.Gateway2Of6 + `", manage_addresses: true}
`

// kernelScene is a scene whose daemon looks after the kernel's state itself,
// with the ip program as the judge of it.
type kernelScene struct {
	*scene
	program string // ip
}

// newKernelScene makes the world without egress addresses.
func newKernelScene(t *testing.T) *kernelScene {
	t.Helper()
	return kernelSceneOf(t, newScene(t, false))
}

func kernelSceneOf(t *testing.T, s *scene) *kernelScene {
	t.Helper()
	program, err := exec.LookPath("ip")
	if err != nil {
		lab.Missing(t, "ip")
	}
	k := &kernelScene{s, program}
	// What the kernel adds for its own addresses is there before the tests look.
	eventually(t, "the host's own addresses are usable", func() bool { return !strings.Contains(k.ip("-6", "addr", "show", "tentative"), "inet6") })
	t.Cleanup(func() { // after the daemon's stop
		if t.Failed() {
			_, _, _ = k.command("clean", "--config", k.config)
		}
	})
	return k
}

// ip runs the program in the host's namespace and gives what it printed.
func (k *kernelScene) ip(args ...string) string {
	k.t.Helper()
	out, err := k.tryIP(args...)
	if err != nil {
		k.t.Fatal(err)
	}
	return out
}

func (k *kernelScene) tryIP(args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd, err := k.Host.Start(lab.Program{Path: k.program, Args: args, Stdout: &out, Stderr: &errs})
	if err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, &errs)
	}
	return out.String(), nil
}

// netState is what the ip program shows of the host, by its arguments.
type netState map[string]string

const (
	rules4  = "-4 -d rule"
	rules6  = "-6 -d rule"
	routes4 = "-4 -d route show table all"
	routes6 = "-6 -d route show table all"
	addrs   = "addr"
)

func (k *kernelScene) state() netState {
	k.t.Helper()
	s := netState{}
	for _, q := range []string{rules4, rules6, routes4, routes6, addrs} {
		s[q] = k.ask1(q)
	}
	return s
}

// ask1 is one question to the ip program. Lifetimes, which run, are left out, and that
// older kernels (5.15) know of an interface's state a while later.
func (k *kernelScene) ask1(question string) string {
	k.t.Helper()
	out := k.ip(strings.Fields(question)...)
	if question != addrs {
		return out
	}
	lines := slices.DeleteFunc(strings.SplitAfter(out, "\n"), func(l string) bool { return strings.Contains(l, "valid_lft") })
	return strings.ReplaceAll(strings.Join(lines, ""), " state UNKNOWN ", " state UP ")
}

// difference is the lines that one state has and the other has not, with the
// question that they answer, as a diff prints them; "" when both are equal byte
// for byte.
func (s netState) difference(o netState) string {
	var b strings.Builder
	for _, q := range []string{rules4, rules6, routes4, routes6, addrs} {
		if s[q] == o[q] {
			continue
		}
		fmt.Fprintf(&b, "ip %s:\n", q)
		here, there := strings.Split(s[q], "\n"), strings.Split(o[q], "\n")
		for _, l := range here {
			if !slices.Contains(there, l) {
				fmt.Fprintf(&b, "  - %s\n", l)
			}
		}
		for _, l := range there {
			if !slices.Contains(here, l) {
				fmt.Fprintf(&b, "  + %s\n", l)
			}
		}
	}
	return b.String()
}

// added are the lines of an answer that were not there before.
func (s netState) added(before netState, question string) []string {
	old := strings.Split(before[question], "\n")
	return slices.DeleteFunc(strings.Split(s[question], "\n"), func(l string) bool { return slices.Contains(old, l) })
}

// sorted is an answer whatever its order.
func sorted(answer string) string {
	lines := strings.Split(answer, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// same fails the test when the state is not what it was.
func (k *kernelScene) same(when string, before netState) {
	k.t.Helper()
	if d := before.difference(k.state()); d != "" {
		k.t.Errorf("%s:\n%s", when, d)
	}
}

// wayout runs a command with the scene's configuration, that has to end well.
func (k *kernelScene) wayout(args ...string) string {
	k.t.Helper()
	out, errs, code := k.command(append(args, "--config", k.config)...)
	if code != 0 {
		k.t.Fatalf("wayout %s: exit %d: %s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// stop ends the daemon as a service manager does.
func (k *kernelScene) stop() {
	k.t.Helper()
	if err := k.daemon.Stop(); err != nil {
		k.t.Fatal(err)
	}
}

// capture watches an interface until the end of the test.
func (k *kernelScene) capture(n *lab.NS, link string) *lab.Capture {
	k.t.Helper()
	c, err := n.Capture(link)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			k.t.Error(err)
		}
	})
	return c
}

// settled gives the packets of a capture once it has all that its interface
// counted.
func settled(t testing.TB, c *lab.Capture) []lab.Packet {
	t.Helper()
	var pkts []lab.Packet
	eventually(t, "the capture has what the interface counted", func() bool {
		pkts = c.Packets()
		in, out, err := c.Truth()
		if err != nil {
			t.Fatal(err)
		}
		return uint64(len(pkts)) == in.Packets+out.Packets
	})
	return pkts
}

// eventually asks until it is so. What state points to is told when it never is.
func eventually(t testing.TB, what string, is func() bool, state ...*string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			for _, s := range state {
				what += ": " + *s
			}
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// fair measures how long something took on a machine that others share: what
// the machine did not let the test itself do is no fault of the daemon's.
type fair struct {
	begun time.Time
	stop  chan struct{}
	lost  atomic.Int64
}

func newFair(t testing.TB) *fair {
	f := &fair{begun: time.Now(), stop: make(chan struct{})}
	t.Cleanup(f.end)
	go func() {
		const step, usual = 5 * time.Millisecond, 10 * time.Millisecond
		for last := time.Now(); ; {
			select {
			case <-f.stop:
				return
			case <-time.After(step):
			}
			now := time.Now()
			if over := now.Sub(last) - step; over > usual {
				f.lost.Add(int64(over))
			}
			last = now
		}
	}()
	return f
}

func (f *fair) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
	}
}

// took returns the time since newFair, and how much of it is the daemon's to
// answer for. It is called once.
func (f *fair) took() (all, own time.Duration) {
	f.end()
	all = time.Since(f.begun)
	return all, all - time.Duration(f.lost.Load())
}

// mustAwait waits for a packet.
func mustAwait(t testing.TB, c *lab.Capture, what string, is func(lab.Packet) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.Await(ctx, is); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// carried says what an uplink's capture, on the far side, shows: connections of
// all of the uplink's own sources that are in want, and of nothing else.
func carried(t *testing.T, name string, pkts []lab.Packet, want ...netip.Addr) {
	t.Helper()
	seen := map[netip.Addr]int{}
	for _, p := range pkts {
		if p.Proto != unix.IPPROTO_TCP && p.Proto != unix.IPPROTO_UDP {
			continue
		}
		near := p.Src.Addr()
		if p.Out {
			near = p.Dst.Addr()
		}
		seen[near]++
		if !slices.Contains(want, near) && seen[near] <= 3 {
			t.Errorf("%s carries %s", name, p)
		}
	}
	for _, a := range want {
		if seen[a] == 0 {
			t.Errorf("%s carries nothing of %s", name, a)
		}
	}
}

// through asks by a path in all four ways: both families, forwarded and through
// a tunnel.
func (k *kernelScene) through(n uplinkNode, check func(ask lab.Ask, told lab.Told)) {
	k.t.Helper()
	for _, target := range []string{target4, target6} {
		for _, tunnel := range []bool{false, true} {
			ask := lab.Ask{Header: egress(n.id), Target: target, Tunnel: tunnel}
			check(ask, k.ask(ask))
		}
	}
}

// works asks by paths in all four ways, and each has to leave as itself.
func (k *kernelScene) works(when string, nodes ...uplinkNode) {
	k.t.Helper()
	for _, n := range nodes {
		k.through(n, func(ask lab.Ask, told lab.Told) {
			if told.Status != 200 || told.Seen.Source != n.source(ask.Target).String() {
				k.t.Errorf("%s: %s to %s (tunnel %v): %d %q from %s", when, n.id, ask.Target, ask.Tunnel, told.Status, told.Body, told.Seen.Source)
			}
		})
	}
}

// refuses asks by paths in all four ways, and each has to be refused.
func (k *kernelScene) refuses(when string, nodes ...uplinkNode) {
	k.t.Helper()
	for _, n := range nodes {
		k.through(n, func(ask lab.Ask, told lab.Told) {
			if told.Status != 503 || told.Header.Get("Retry-After") != "1" {
				k.t.Errorf("%s: %s to %s (tunnel %v): %d %q from %s", when, n.id, ask.Target, ask.Tunnel, told.Status, told.Body, told.Seen.Source)
			}
		})
	}
}

func sources(nodes []uplinkNode) []netip.Addr {
	var all []netip.Addr
	for _, n := range nodes {
		all = append(all, n.v4, n.v6)
	}
	return all
}
