package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// A proxy is a peer that can be run.
type proxy struct {
	*peer
	path    string // of its program
	Version string `json:"version,omitempty"`
	Note    string `json:"note"`

	group *group
	ended chan struct{}
	cmd   *exec.Cmd
}

// find looks a program up where users and daemons have theirs.
func find(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", err
}

// listenPort is the same for all: never two run at a time.
const (
	listenPort = 3128
	socksPort  = 1080 // of a peer that has a port for each protocol
)

func (b *bench) vars(p *proxy) *vars {
	v := &vars{
		Dir: filepath.Join(b.dir, p.name), Listen: hostInner, Port: listenPort, SOCKSPort: socksPort, Origin: target(0),
		Inner: innerLink, OriginPort: originPort,
		// Two descriptors for a connection, and some proxies count on pipes.
		Files: b.files, Conns: b.files * 3 / 8, CPUs: b.out.CPUs,
	}
	v.Sources = egressAddrs()
	if !p.sources {
		// One of its own: ports that another's closed connections hold (for a
		// minute, TIME_WAIT) make the kernel search for free ones.
		at := slices.Index(b.proxies, p) % len(v.Sources)
		v.Sources = v.Sources[at : at+1]
	}
	v.Source = v.Sources[0]
	return v
}

// start runs a proxy and waits until it listens.
func (b *bench) start(ctx context.Context, p *proxy) (err error) {
	if p.tunnel == viaDirect || p.cmd != nil {
		return nil
	}
	v := b.vars(p)
	if err := os.MkdirAll(v.Dir, 0o755); err != nil {
		return err
	}
	if err := p.configure(v); err != nil {
		return err
	}
	args, err := v.fillAll(p.args)
	if err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(v.Dir, "output.log"))
	if err != nil {
		return err
	}
	defer out.Close()
	b.groups++
	if p.group, err = newGroup(b.cgroups, fmt.Sprintf("%s-%d", p.name, b.groups)); err != nil {
		return err
	}
	program := lab.Program{Path: p.path, Args: args, Stdout: out, Stderr: out, Dir: v.Dir}
	if p.group.Dir != "" {
		if program.Cgroup, err = os.Open(p.group.Dir); err != nil {
			return errors.Join(err, p.group.end())
		}
		defer program.Cgroup.Close()
	}
	cmd, err := b.world.host.Start(program)
	if err != nil {
		return errors.Join(err, p.group.end())
	}
	p.cmd, p.group.PID, p.ended = cmd, cmd.Process.Pid, make(chan struct{})
	go func(ended chan struct{}) {
		// How a proxy ends says nothing: it is told to.
		_ = cmd.Wait()
		close(ended)
	}(p.ended)
	if err := b.awaitListening(ctx, p); err != nil {
		text, _ := os.ReadFile(out.Name()) // the most that can be said
		return errors.Join(fmt.Errorf("%s: %w\n%s", p.name, err, text), b.stop(p))
	}
	return nil
}

// configure writes the proxy's configuration and hands its directory over.
func (p *proxy) configure(v *vars) error {
	if p.file != "" {
		text, err := v.fill(p.config)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(v.Dir, p.file), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if p.owner == "" {
		return nil
	}
	u, err := user.Lookup(p.owner)
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return err
	}
	return os.Chown(v.Dir, uid, -1)
}

func (b *bench) awaitListening(ctx context.Context, p *proxy) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		err := b.listens(p)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("does not listen: %w", err)
		case <-p.ended:
			return errors.New("ended at once")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// listens tries whether a proxy serves.
func (b *bench) listens(p *proxy) error {
	if p.tunnel != viaDivert {
		c, err := b.world.client.Dial(netip.AddrPortFrom(netip.MustParseAddr(hostInner), listenPort))
		if err != nil {
			return err
		}
		return c.Close()
	}
	// The origin is reached before as well: it says by whom.
	c, err := b.world.client.DialFrom(netip.MustParseAddr(clientAddrs()[0]), netip.MustParseAddrPort(target(0)))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "echo\n"); err != nil {
		return err
	}
	saw, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if saw = strings.TrimSpace(saw); !slices.Contains(egressAddrs(), saw) {
		return fmt.Errorf("the origin is reached from %s", saw)
	}
	return nil
}

// stop ends what start started and nothing else.
func (b *bench) stop(p *proxy) error {
	if p.cmd == nil {
		return nil
	}
	// An error says that it has ended already.
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(2 * time.Second): // some wait for their connections
	}
	err := p.group.end()
	if p.group.Dir == "" {
		// It leads a process group of its own, see lab.
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	}
	<-p.ended
	p.cmd = nil
	return errors.Join(err, b.after(p))
}

// after takes back what a proxy has left on the host.
func (b *bench) after(p *proxy) error {
	if len(p.after) == 0 {
		return nil
	}
	args, err := b.vars(p).fillAll(p.after)
	if err != nil {
		return err
	}
	var said bytes.Buffer
	cmd, err := b.world.host.Start(lab.Program{Path: p.path, Args: args, Stdout: &said, Stderr: &said})
	if err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %v: %w: %s", p.name, args, err, &said)
	}
	return nil
}
