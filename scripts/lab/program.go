package lab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Program is a process to run in a namespace.
type Program struct {
	Path   string
	Args   []string
	Env    []string // in place of our own, when not nil
	Stdout io.Writer
	Stderr io.Writer
	Stdin  io.Reader
	Dir    string   // working directory, ours when empty
	Cgroup *os.File // directory of the cgroup (v2) to start in, nil for ours

	// Files are bind-mounted for the program alone: from a path of this
	// machine (/etc/resolv.conf, say), to its content. The path has to exist.
	Files map[string]string
}

// Start runs a program in the namespace. It is killed when we end.
func (n *NS) Start(p Program) (*exec.Cmd, error) {
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Env, cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = p.Env, p.Dir, p.Stdin, p.Stdout, p.Stderr
	// The signal that comes when a parent ends is tied to the thread that
	// started the child, so that thread has to stay: it parks until the child
	// has been waited for.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if p.Cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(p.Cgroup.Fd())
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, as in NewNS
		err := n.enter(p.Files)
		if err == nil {
			err = cmd.Start()
		}
		started <- err
		if err != nil {
			return
		}
		// Waits without reaping: the caller's Wait does that.
		for {
			err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", p.Path, n.Name, err)
	}
	return cmd, nil
}

// enter puts the calling thread into the namespace, with mounts of its own
// when there are files to be put in place.
func (n *NS) enter(files map[string]string) error {
	if err := netns.Set(n.fd); err != nil {
		return fmt.Errorf("enter namespace: %w", err)
	}
	if len(files) == 0 {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	for path, content := range files {
		if err := mountFile(path, content); err != nil {
			return err
		}
	}
	return nil
}

// mountFile puts content in the place of a file.
func mountFile(path, content string) error {
	f, err := os.CreateTemp("", "lab-"+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	// The mount keeps the file; its name is not needed any longer.
	defer os.Remove(f.Name())
	_, err = f.WriteString(content)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount over %s: %w", path, err)
	}
	return nil
}
