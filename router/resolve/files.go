package resolve

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"sync"
	"syscall"
	"time"
)

// What is read of a file at most.
const (
	maxResolvConf = 64 << 10
	maxHosts      = 16 << 20
)

// racy is how old a file must have been when it was read for its time of change to tell the next change: one that comes within
// the same tick of the filesystem's clock, and keeps the size, would else not be seen.
const racy = 2 * time.Second

// files are the two files of a resolver.
type files struct {
	mu     sync.Mutex
	resolv source
	hosts  source
}

// source is one file and what it was when last read.
type source struct {
	path  string
	limit int64
	read  bool // at least once, or found missing
	seen  stamp
	young bool   // see racy
	fault string // what was last logged about it
}

// stamp tells one state of a file from another; the zero stamp is that of a missing file.
type stamp struct {
	dev, inode uint64
	size       int64
	mtime      time.Time
}

func stampOf(info fs.FileInfo) stamp {
	s := stamp{size: info.Size(), mtime: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.dev, s.inode = st.Dev, st.Ino
	}
	return s
}

// look reads the file when it is not what it was at the last look. A file that is missing, or no regular file, is empty. A
// file that cannot be read is an error and changes nothing, except at the first look, when it is empty too.
func (s *source) look() (data []byte, changed bool, err error) {
	first := !s.read
	s.read = true
	info, err := os.Stat(s.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		changed = first || s.seen != stamp{}
		s.seen, s.young = stamp{}, false
		return nil, changed, nil
	}
	if err != nil {
		return nil, first, fmt.Errorf("look at the file: %w", err)
	}
	if stampOf(info) == s.seen && !s.young {
		return nil, false, nil
	}
	f, err := os.OpenFile(s.path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe that took the file's place must not hold us up
	if err != nil {
		return nil, first, fmt.Errorf("open the file: %w", err)
	}
	defer func() { _ = f.Close() }() // only read from
	if info, err = f.Stat(); err != nil {
		return nil, first, fmt.Errorf("look at the open file: %w", err)
	}
	if data, err = io.ReadAll(io.LimitReader(f, s.limit)); err != nil {
		return nil, first, fmt.Errorf("read the file: %w", err)
	}
	s.seen, s.young = stampOf(info), time.Since(info.ModTime()) < racy
	return data, true, nil
}

// watch looks at the files until the resolver is closed.
func (r *Resolver) watch() {
	t := time.NewTicker(r.opt.Refresh)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			r.Reload()
		case <-r.ctx.Done():
			return
		}
	}
}

// Reload looks at the files at once and takes what has changed, for the bound resolvers too. Lookups that are under way end with
// what they began with. Options.Refresh does the same by itself. With Options.Servers there is nothing to look at.
func (r *Resolver) Reload() {
	if r.parent != nil {
		r.parent.Reload()
		return
	}
	if len(r.opt.Servers) > 0 {
		return
	}
	r.files.mu.Lock()
	defer r.files.mu.Unlock()
	var next state
	if old := r.current.Load(); old != nil {
		next = *old
	}
	if data, changed := r.look(&r.files.resolv); changed {
		hostname, err := os.Hostname()
		if err != nil {
			r.opt.Log.Warn("host name unknown, so is its domain", "error", err)
		}
		s := parseResolvConf(data, hostname)
		if r.opt.Timeout > 0 {
			s.timeout = r.opt.Timeout
		}
		if next.conf == nil || !reflect.DeepEqual(s, next.conf.settings) {
			next.conf, next.cache = newConf(s), newCache(r.opt.Size)
			r.opt.Log.Info("resolver settings read", "file", r.opt.ResolvConf, "servers", s.servers, "search", s.search)
		}
	}
	if data, changed := r.look(&r.files.hosts); changed {
		next.hosts = parseHosts(data)
	}
	r.current.Store(&next)
}

// look is source.look with its error logged, once for each that is different.
func (r *Resolver) look(s *source) (data []byte, changed bool) {
	data, changed, err := s.look()
	fault := ""
	if err != nil {
		fault = err.Error()
	}
	if fault != "" && fault != s.fault {
		r.opt.Log.Warn("resolver file cannot be read", "file", s.path, "error", err)
	}
	s.fault = fault
	return data, changed
}
