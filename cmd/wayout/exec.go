package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/router"
	"wayout/router/control"
	"wayout/router/resolve"
)

// Exit codes of exec, besides the command's own.
const (
	exitOurs     = 125 // exec itself failed
	exitCannot   = 126 // the command is there and cannot be run
	exitNotFound = 127
	exitSignal   = 128 // and the number of the signal that ended the command
)

// endTimeout bounds the wait for killed processes to be gone.
const endTimeout = 10 * time.Second

// runExec runs a command whose processes leave by one path.
func runExec(e *env, args []string) error {
	f := newFlags(e, "exec").withControl()
	x := &execution{env: e, flags: f}
	f.StringVar(&x.path, "path", "", "`ESCAPER/ID` of the path that the command leaves by")
	f.BoolVar(&x.dns, "dns", false, "name lookups too: in the place of the host's resolver, by the path")
	servers := f.String("dns-server", "", "with --dns: `addresses` of name servers, by commas, in the place of the host's")
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return err
	case err != nil:
		return &exitError{code: exitOurs}
	case x.path == "" || f.NArg() == 0:
		return ours(errors.New("usage: wayout exec --path ESCAPER/ID [--dns] [--config F | --control S] -- COMMAND [ARGUMENT...]"))
	case *servers != "" && !x.dns:
		return ours(errors.New("--dns-server is for --dns"))
	}
	if x.servers, err = parseServers(*servers); err != nil {
		return ours(err)
	}
	x.argv = f.Args()
	code, err := x.run()
	if err == nil && code == exitOK {
		return nil
	}
	if own := (*exitError)(nil); errors.As(err, &own) && own.code > exitUsage {
		return err
	}
	if err != nil {
		return ours(err)
	}
	return &exitError{code: code}
}

func ours(err error) error { return &exitError{code: exitOurs, err: err} }

func parseServers(list string) ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	for word := range strings.SplitSeq(list, ",") {
		if word == "" && list == "" {
			break
		}
		a, err := netip.ParseAddr(word)
		if err != nil || a.IsLoopback() || a.IsUnspecified() {
			return nil, fmt.Errorf("--dns-server: want addresses that are not this host's own, got %q", word)
		}
		all = append(all, netip.AddrPortFrom(a.Unmap(), 53))
	}
	return all, nil
}

// execution is one run of exec.
type execution struct {
	*env
	*flags
	path    string
	dns     bool
	servers []netip.AddrPort
	argv    []string

	group  *bpf.Group
	cgroup string // of group, below the mount
	done   control.PinDone
	free   func() error // lets go of the pin
}

// run gives the command's exit code, or an error of our own.
func (x *execution) run() (code int, err error) {
	program, err := lookUp(x.argv[0])
	if err != nil {
		return 0, err
	}
	if err := x.privileged(); err != nil {
		return 0, err
	}
	// From here on signals are the command's, not ours.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedOn()...)
	defer signal.Stop(signals)

	if x.group, err = bpf.MakeGroup(); err != nil {
		return 0, err
	}
	ran := false
	defer func() {
		left := x.end()
		if ran && left != nil { // the code stays the command's
			fmt.Fprintf(x.stderr, "wayout: %v\n", left)
			return
		}
		err = errors.Join(err, left)
	}()
	if err := x.pin(); err != nil {
		return 0, err
	}
	var files map[string][]byte
	if x.dns {
		if files, err = x.serveNames(); err != nil {
			return 0, fmt.Errorf("--dns: %w", err)
		}
	}
	cmd := &exec.Cmd{
		Path: program, Args: x.argv, Stdin: x.stdin, Stdout: x.stdout, Stderr: x.stderr,
		SysProcAttr: &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: x.group.FD()},
	}
	if err := start(cmd, files); err != nil {
		return 0, err
	}
	ran = true
	ended := make(chan struct{})
	defer close(ended)
	go passOn(cmd.Process, signals, ended)
	return wait(cmd)
}

// lookUp finds the program as a shell would, and fails as one.
func lookUp(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil, errors.Is(err, exec.ErrDot):
		return path, nil
	case errors.Is(err, fs.ErrPermission):
		return "", &exitError{exitCannot, fmt.Errorf("%s: permission denied", name)}
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return "", &exitError{exitNotFound, fmt.Errorf("%s: command not found", name)}
	}
	return "", &exitError{exitCannot, err} // a directory, say
}

// startError tells what is wrong with the command from what is wrong with us.
func startError(program string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT): // its interpreter is missing
		return &exitError{exitNotFound, fmt.Errorf("%s: cannot be run: %w", program, err)}
	case slices.ContainsFunc([]unix.Errno{unix.EACCES, unix.ENOEXEC, unix.EISDIR, unix.ETXTBSY, unix.E2BIG, unix.ELOOP, unix.ELIBBAD},
		func(e unix.Errno) bool { return errors.Is(err, e) }):
		return &exitError{exitCannot, fmt.Errorf("%s: cannot be run: %w", program, err)}
	}
	return fmt.Errorf("start %s: %w", program, err)
}

// wait gives the command's exit code as a shell does.
func wait(cmd *exec.Cmd) (int, error) {
	err := cmd.Wait()
	if cmd.ProcessState == nil {
		return 0, fmt.Errorf("wait for the command: %w", err)
	}
	s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case ok && s.Signaled():
		return exitSignal + int(s.Signal()), nil
	case ok && s.Exited():
		return s.ExitStatus(), nil
	}
	return 0, fmt.Errorf("wait for the command: %w", err)
}

// passedOn are the signals that are the command's. One that we were told to
// ignore (nohup) stays ignored, by the command too.
func passedOn() []os.Signal {
	all := []os.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGCONT,
		unix.SIGIO, unix.SIGPWR, unix.SIGVTALRM,
	}
	return slices.DeleteFunc(all, signal.Ignored)
}

// passOn hands signals to the command until it has ended.
func passOn(p *os.Process, signals <-chan os.Signal, ended <-chan struct{}) {
	for {
		select {
		case s := <-signals:
			if (s == unix.SIGINT || s == unix.SIGQUIT) && inForeground() {
				continue // the terminal has sent it to the command as well
			}
			_ = p.Signal(s) // it may have ended meanwhile
		case <-ended:
			return
		}
	}
}

// inForeground says whether we, and so the command, are what a terminal talks to.
func inForeground() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// pin has the daemon hold the group to the path, or does it itself where none
// answers and a configuration is given.
func (x *execution) pin() error {
	root, err := bpf.FindCgroup2()
	if err != nil {
		return err
	}
	x.cgroup = "/" + strings.TrimPrefix(strings.TrimPrefix(x.group.Path(), root), "/")
	c, err := x.client()
	if err != nil {
		return err
	}
	ctx := context.Background()
	x.done, err = c.Hold(ctx, control.PinAsk{Cgroup: x.cgroup, Path: x.path, PID: os.Getpid()})
	switch {
	case err == nil:
		x.free = func() error { return x.release(c) }
		return nil
	case !errors.Is(err, control.ErrNoDaemon):
		return explainPath(ctx, c, x.path, err)
	case *x.config == "":
		return fmt.Errorf("%w; --config FILE pins without a daemon", err)
	}
	conf, err := x.loadConfig()
	if err != nil {
		return err
	}
	alone, err := router.PinAlone(conf, x.path, x.group, x.cgroup)
	if err != nil {
		return err
	}
	x.done = alone.Done
	x.free = func() error {
		err := alone.Close()
		return errors.Join(err, x.release(c)) // to a daemon that has been started meanwhile
	}
	return nil
}

// release gives the pin back to the daemon. One that is not there any more, or
// knows nothing of it, leaves the removing to us.
func (x *execution) release(c *control.Client) error {
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	_, _ = c.Release(ctx, control.PinAsk{Cgroup: x.cgroup})
	return bpf.RemovePin(x.done.Dir)
}

// end ends what the command has left running, and takes down what was put up.
// The pin goes last.
func (x *execution) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	err := x.group.End(ctx)
	if err != nil || x.free == nil {
		return err // with processes left the pin stays
	}
	return x.free()
}

// start starts the command, with files of its own in the place of others.
func start(cmd *exec.Cmd, files map[string][]byte) error {
	if files == nil {
		return startError(cmd.Path, cmd.Start())
	}
	started := make(chan error)
	go func() {
		// Never unlocked: the thread has mounts that nobody else is to see, and
		// ends with this goroutine.
		runtime.LockOSThread()
		err := mountFiles(files)
		if err == nil {
			err = startError(cmd.Path, cmd.Start())
		}
		started <- err
	}()
	return <-started
}

// mountFiles gives the calling thread mounts of its own, with files in the place
// of those of their names. nil is a file that nothing can be read from.
func mountFiles(files map[string][]byte) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mounts of its own: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("mounts of its own: %w", err)
	}
	for at, content := range files {
		if err := mountFile(at, content); err != nil {
			return err
		}
	}
	return nil
}

func mountFile(at string, content []byte) error {
	from := "/dev/null"
	if content != nil {
		f, err := os.CreateTemp("", "wayout-"+filepath.Base(at)+"-")
		if err != nil {
			return err
		}
		from = f.Name()
		defer os.Remove(from) // the mount keeps the file
		_, err = f.Write(content)
		if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
			return err
		}
	}
	err := unix.Mount(from, at, "", unix.MS_BIND, "")
	// On a mounted file that has been removed since, as ours are, nothing can be
	// mounted: in its place, then.
	if errors.Is(err, unix.ENOENT) && unix.Unmount(at, unix.MNT_DETACH) == nil {
		err = unix.Mount(from, at, "", unix.MS_BIND, "")
	}
	if err != nil {
		return fmt.Errorf("mount over %s: %w", at, err)
	}
	return nil
}

const (
	resolvConf = "/etc/resolv.conf"
	nsswitch   = "/etc/nsswitch.conf"
	// upstreams is where systemd-resolved names the servers that it asks itself.
	upstreams = "/run/systemd/resolve/resolv.conf"
)

// askers are the sockets by which the C library has others look up names.
func askers() []string {
	return []string{"/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/var/run/nscd/socket"}
}

// serveNames starts a name server for the command, in its cgroup: what it asks
// leaves by the path as well. It gives the files that lead the command there.
func (x *execution) serveNames() (map[string][]byte, error) {
	conf, err := os.ReadFile(resolvConf)
	if err != nil {
		return nil, err
	}
	servers, err := x.nameServers(conf)
	if err != nil {
		return nil, err
	}
	at, err := x.startResolver(servers)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{resolvConf: resolve.WithNameServer(conf, at)}
	switch old, err := os.ReadFile(nsswitch); {
	case err == nil:
		files[nsswitch] = hostsByDNS(old)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	for _, s := range askers() {
		if real, err := filepath.EvalSymlinks(s); err == nil {
			files[real] = nil
		}
	}
	return files, nil
}

// nameServers are those to ask: given, or the host's, of the families that the
// path has.
func (x *execution) nameServers(conf []byte) ([]netip.AddrPort, error) {
	servers, local := x.servers, false
	if servers == nil {
		servers, local = resolve.NameServers(conf)
	}
	if servers == nil && local {
		if text, err := os.ReadFile(upstreams); err == nil {
			servers, _ = resolve.NameServers(text)
		}
	}
	if servers == nil {
		return nil, fmt.Errorf("%s names only servers on this host, which ask by ways of their own; name others by --dns-server ADDRESS", resolvConf)
	}
	usable := slices.DeleteFunc(slices.Clone(servers), func(s netip.AddrPort) bool {
		return s.Addr().Is4() && !x.done.IPv4.IsValid() || s.Addr().Is6() && !x.done.IPv6.IsValid()
	})
	if len(usable) == 0 {
		return nil, fmt.Errorf("path %s has no address of the family of any name server (%v)", x.path, servers)
	}
	return usable, nil
}

// hostsByDNS is a nsswitch.conf(5) that looks for hosts in /etc/hosts and in the
// DNS, and nowhere else.
func hostsByDNS(conf []byte) []byte {
	var out []byte
	for line := range strings.Lines(string(conf)) {
		if name, _, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "hosts" {
			continue
		}
		out = append(out, line...)
	}
	return append(out, "\nhosts: files dns\n"...)
}

// startResolver runs this program as the command's name server and gives its
// address.
func (x *execution) startResolver(servers []netip.AddrPort) (netip.Addr, error) {
	var words []string
	for _, s := range servers {
		words = append(words, s.String())
	}
	cmd := exec.Command("/proc/self/exe", append([]string{resolverVerb}, words...)...)
	cmd.Stderr = x.stderr
	// Signals of the terminal are not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: x.group.FD(), Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return netip.Addr{}, err
	}
	if err := cmd.Start(); err != nil {
		return netip.Addr{}, fmt.Errorf("start the name server: %w", err)
	}
	go func() { _ = cmd.Wait() }() // it is killed with the group
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return netip.Addr{}, fmt.Errorf("the name server has not started: %w", err)
	}
	return netip.ParseAddr(strings.TrimSpace(line))
}
