package router

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"wayout/bpf"
)

// What admit refuses with.
var (
	errFiles  = errors.New("the proxy is out of file descriptors")
	errMemory = errors.New("the proxy is out of memory")
)

const (
	lookEvery = 100 * time.Millisecond
	// A request may take a descriptor for its origin, and its client has taken
	// one since the last look.
	filesOfRequest = 2
	// So far below the ceiling admit need not count: no machine uses up as
	// many descriptors between two looks.
	plentyOfFiles = 32 << 10
	// quietLooks without a refusal end a burst.
	quietLooks = 10
)

// limits says when the daemon takes no new work: before its descriptors or its
// memory run short, so that what is under way goes on.
//
// Descriptors are counted by the kernel every 100 ms, and once more before a
// request is refused; between two counts each request is taken to use as many
// as it can. What requests that are still looking up a name will open is not in
// the count; the reserve is there for that, for clients that are to be told, for
// pipes, and for the daemon's own files.
//
// Memory is compared every 100 ms with GOMEMLIMIT, and with memory.max of the
// cgroups that the daemon is in. Of the Go heap only what the last collection
// found alive counts: garbage is no reason to refuse.
type limits struct {
	log    *slog.Logger
	most   int64 // descriptors in use with which new work is refused
	count  func() (int64, error)
	memory func() (memory, error)

	files   atomic.Int64 // in use, at most
	full    atomic.Bool  // memory
	refused atomic.Int64 // since the start
	burst   atomic.Bool  // refusing, and the log says so
	broken  atomic.Bool  // looking fails, and the log says so

	mu    sync.Mutex // of looking at the descriptors
	again time.Time  // not before

	before, quiet int64 // of watch: refused at the last look, looks since it rose
	goLimit       int64 // to put back; 0: it is as it was
	stop          chan struct{}
	done          sync.WaitGroup
}

// memory in use of what there may be, both in bytes.
type memory struct{ used, most int64 }

func (m memory) full() bool { return m.used >= m.most-m.most/10 }

// openLimits raises the soft limit of descriptors to the hard one, and keeps
// watch until close. Where a cgroup bounds the daemon's memory and GOMEMLIMIT
// is not set, Go's own limit becomes three quarters of that: the kernel's
// buffers have to fit in beside it.
func openLimits(log *slog.Logger) (*limits, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return nil, fmt.Errorf("limit of descriptors: %w", err)
	}
	if lim.Cur < lim.Max {
		lim.Cur = lim.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
			return nil, fmt.Errorf("raise the limit of descriptors: %w", err)
		}
	}
	groups, err := ownMemoryGroups()
	if err != nil {
		return nil, fmt.Errorf("memory limit of the cgroup: %w", err)
	}
	l := newLimits(log, int64(min(lim.Cur, math.MaxInt64)))
	if len(groups) > 0 && os.Getenv("GOMEMLIMIT") == "" {
		least := int64(math.MaxInt64)
		for _, g := range groups {
			least = min(least, g.most)
		}
		l.goLimit = debug.SetMemoryLimit(least / 4 * 3)
	}
	l.memory = memoryOf(groups)
	if err := l.lookAtFiles(); err != nil {
		return nil, fmt.Errorf("count the descriptors in use: %w", err)
	}
	l.done.Go(l.watch)
	return l, nil
}

// newLimits is openLimits without the system's part.
func newLimits(log *slog.Logger, files int64) *limits {
	reserve := min(max(files/8, 16), 4096)
	return &limits{log: log, most: files - reserve, count: openFiles, stop: make(chan struct{})}
}

func (l *limits) close() error {
	close(l.stop)
	l.done.Wait()
	if l.goLimit != 0 {
		debug.SetMemoryLimit(l.goLimit)
	}
	return nil
}

// admit says whether there is room for one more request: nil, errFiles or
// errMemory. It may be called from any goroutine, and takes no lock and makes no
// garbage while there is room.
func (l *limits) admit() error {
	if l.full.Load() {
		return l.refuse(errMemory)
	}
	if l.files.Load() < l.most-plentyOfFiles || l.files.Add(filesOfRequest) <= l.most {
		return nil
	}
	if err := l.lookAtFiles(); err != nil {
		l.complain(err)
	}
	if l.files.Add(filesOfRequest) <= l.most {
		return nil
	}
	return l.refuse(errFiles)
}

func (l *limits) refuse(err error) error {
	l.refused.Add(1)
	if !l.burst.Swap(true) {
		l.log.Warn("new work is refused", "err", err, "descriptors", l.files.Load(), "ceiling", l.most)
	}
	return err
}

func (l *limits) complain(err error) {
	if !l.broken.Swap(true) {
		l.log.Error("limits are not watched", "err", err)
	}
}

// lookAtFiles counts the descriptors in use. Where counting takes long it is
// done less often: at most a tenth of a core's time goes there.
func (l *limits) lookAtFiles() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	from := time.Now()
	if from.Before(l.again) {
		return nil
	}
	n, err := l.count()
	if err != nil {
		return err
	}
	l.files.Store(n)
	to := time.Now()
	l.again = to.Add(9 * to.Sub(from))
	return nil
}

// watch looks at everything, until close.
func (l *limits) watch() {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.look()
		case <-l.stop:
			return
		}
	}
}

func (l *limits) look() {
	if err := l.lookAtFiles(); err != nil {
		l.complain(err)
	}
	if m, err := l.memory(); err != nil {
		l.complain(err)
	} else {
		l.full.Store(m.full())
	}
	refused := l.refused.Load()
	switch {
	case !l.burst.Load() || refused != l.before:
		l.quiet = 0
	case l.quiet < quietLooks:
		l.quiet++
	default:
		l.burst.Store(false)
		l.log.Info("new work is taken again", "refused", refused)
	}
	l.before = refused
}

// openFiles counts our descriptors. From Linux 6.2 on their number is the size
// of the directory (proc_fd_getattr); before, the entries have to be counted.
func openFiles() (int64, error) {
	const dir = "/proc/self/fd"
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", dir, err)
	}
	if st.Size > 0 {
		return st.Size, nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	return int64(len(names)) - 1, err // without the directory's own
}

// memoryOf gives the tightest of Go's limit and those of cgroups.
func memoryOf(groups []memoryGroup) func() (memory, error) {
	samples := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/gc/heap/live:bytes"},
	}
	return func() (memory, error) {
		tightest := memory{most: math.MaxInt64}
		if most := debug.SetMemoryLimit(-1); most != math.MaxInt64 {
			metrics.Read(samples)
			v := make([]int64, len(samples))
			for i, s := range samples {
				v[i] = int64(s.Value.Uint64())
			}
			tightest = memory{used: v[0] - v[1] - v[2] - v[3] - v[4] + v[5], most: most}
		}
		for _, g := range groups {
			m, err := g.read()
			if err != nil {
				return tightest, err
			}
			if m.full() {
				tightest = m
			}
		}
		return tightest, nil
	}
}

// memoryGroup is a cgroup (v2) whose memory is bounded.
type memoryGroup struct {
	dir  string
	most int64 // memory.max, bytes
}

// read gives what of the group's memory cannot be had back by dropping caches.
func (g memoryGroup) read() (memory, error) {
	m := memory{most: g.most}
	text, err := os.ReadFile(filepath.Join(g.dir, "memory.current"))
	if err != nil {
		return m, err
	}
	if m.used, err = strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err != nil || !m.full() {
		return m, err
	}
	if text, err = os.ReadFile(filepath.Join(g.dir, "memory.stat")); err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch name {
		case "active_file", "inactive_file", "slab_reclaimable":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return m, fmt.Errorf("%s/memory.stat: %w", g.dir, err)
			}
			m.used -= n
		}
	}
	return m, nil
}

// memoryGroups lists the cgroups with a memory limit that a process is in, from
// its own up. mount is where cgroup v2 is mounted, text the process's
// /proc/PID/cgroup, whose line of v2 starts with "0::".
func memoryGroups(mount, text string) ([]memoryGroup, error) {
	own, found := "", false
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			own, found = path, true
		}
	}
	if !found {
		return nil, nil
	}
	var all []memoryGroup
	for path := filepath.Join("/", own); ; path = filepath.Dir(path) {
		dir := filepath.Join(mount, path)
		limit, err := os.ReadFile(filepath.Join(dir, "memory.max"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		// No file: the root, or a group without the memory controller.
		if word := strings.TrimSpace(string(limit)); err == nil && word != "max" {
			most, err := strconv.ParseInt(word, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s/memory.max: %w", dir, err)
			}
			all = append(all, memoryGroup{dir, most})
		}
		if path == "/" {
			return all, nil
		}
	}
}

func ownMemoryGroups() ([]memoryGroup, error) {
	mount, err := bpf.FindCgroup2()
	if errors.Is(err, bpf.ErrNotMounted) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	return memoryGroups(mount, string(text))
}
