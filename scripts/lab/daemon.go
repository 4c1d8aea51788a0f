package lab

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is a running `wayout serve`.
type Daemon struct {
	cmd   *exec.Cmd
	ready chan struct{}
	done  chan struct{}

	mu    sync.Mutex
	grown *sync.Cond // of mu: there is more in the log
	log   bytes.Buffer
	err   error
	ended bool
}

// StartDaemon runs the program in a namespace and waits until it says that it
// is ready, so its log has to be at level info.
func StartDaemon(n *NS, p Program) (*Daemon, error) {
	d := &Daemon{ready: make(chan struct{}), done: make(chan struct{})}
	d.grown = sync.NewCond(&d.mu)
	r, w := io.Pipe()
	if p.Stderr != nil {
		p.Stderr = io.MultiWriter(p.Stderr, w)
	} else {
		p.Stderr = w
	}
	cmd, err := n.Start(p)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	d.cmd = cmd
	go d.read(r)
	go func() {
		err := cmd.Wait()
		d.mu.Lock()
		d.err = err
		d.ended = true
		d.grown.Broadcast()
		d.mu.Unlock()
		w.Close()
		close(d.done)
	}()
	select {
	case <-d.ready:
		return d, nil
	case <-d.done:
		return nil, fmt.Errorf("%s ended before it was ready: %w\n%s", p.Path, d.err, d.Log())
	case <-time.After(time.Minute):
		return nil, errors.Join(fmt.Errorf("%s is not ready after a minute\n%s", p.Path, d.Log()), d.Kill())
	}
}

func (d *Daemon) read(r io.Reader) {
	said := false
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		d.mu.Lock()
		d.log.Write(in.Bytes())
		d.log.WriteByte('\n')
		d.grown.Broadcast()
		d.mu.Unlock()
		if !said && isReady(in.Bytes()) {
			said = true
			close(d.ready)
		}
	}
	// A line over the limit ends the scanner; the program must not block on it.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return
	}
}

// isReady knows the line of either log format.
func isReady(line []byte) bool {
	return bytes.Contains(line, []byte(" msg=ready")) || bytes.Contains(line, []byte(`"msg":"ready"`))
}

// Log is what the daemon has logged until here.
func (d *Daemon) Log() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.String()
}

// Await waits until the log satisfies a condition. It is false when the daemon
// ended, or half a minute passed, before it did.
func (d *Daemon) Await(ok func(log string) bool) bool {
	late := false
	stop := time.AfterFunc(30*time.Second, func() {
		d.mu.Lock()
		late = true
		d.grown.Broadcast()
		d.mu.Unlock()
	})
	defer stop.Stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for !ok(d.log.String()) {
		if d.ended || late {
			return false
		}
		d.grown.Wait()
	}
	return true
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Signal sends a signal.
func (d *Daemon) Signal(s unix.Signal) error { return d.cmd.Process.Signal(s) }

// Stop ends the daemon as a service manager would, and waits for it.
func (d *Daemon) Stop() error {
	if err := d.Signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.done:
		return d.exit()
	case <-time.After(time.Minute):
		return errors.Join(fmt.Errorf("the daemon does not stop\n%s", d.Log()), d.Kill())
	}
}

// Kill ends the daemon without a chance to clean up, and waits for it.
func (d *Daemon) Kill() error {
	if err := d.cmd.Process.Kill(); err != nil {
		return err
	}
	<-d.done
	return nil
}

// Done is closed when the daemon has ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

func (d *Daemon) exit() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return fmt.Errorf("the daemon: %w\n%s", d.err, d.log.String())
	}
	return nil
}
