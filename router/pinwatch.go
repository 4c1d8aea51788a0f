package router

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// watchCgroups has pins follow the cgroups that come and go.
func (r *Router) watchCgroups() (stop func() error, err error) {
	k := &r.pins
	if k.fd, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err != nil {
		return nil, fmt.Errorf("watch cgroups: %w", os.NewSyscallError("inotify_init1", err))
	}
	k.events = os.NewFile(uintptr(k.fd), "cgroups")
	r.syncPins(r.plan)
	var done sync.WaitGroup
	done.Go(func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := k.events.Read(b); err != nil {
				if !errors.Is(err, os.ErrClosed) {
					r.log.Error("cgroups are not watched any more", "err", err)
				}
				return
			}
			r.mu.Lock()
			r.refreshPins(r.plan, nil)
			r.mu.Unlock()
		}
	})
	return func() error {
		err := k.events.Close()
		done.Wait()
		return err
	}, nil
}

// followCgroups watches the directories that pinned cgroups are in, from the top
// down as far as they are there: a cgroup that is made, however deep, is then
// either told of or seen by who looks after this.
func (r *Router) followCgroups() {
	k := &r.pins
	if k.events == nil {
		return
	}
	for _, p := range k.all {
		dir := k.root
		for part := range strings.SplitSeq(strings.TrimPrefix(p.Cgroup, "/"), "/") {
			// What is watched already stays so.
			if _, err := unix.InotifyAddWatch(k.fd, dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_TO|unix.IN_ONLYDIR); err != nil {
				break // it is not there; sweep looks again
			}
			dir = filepath.Join(dir, part)
		}
	}
}
