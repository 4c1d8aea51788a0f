package router

import (
	"bytes"
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"
)

// testLimits has room for 84 of 100 descriptors; the counts are the test's.
func testLimits(t *testing.T, files *int64) (*limits, *bytes.Buffer) {
	t.Helper()
	var log bytes.Buffer
	l := newLimits(slog.New(slog.NewTextHandler(&log, nil)), 100)
	l.count = func() (int64, error) { return *files, nil }
	l.memory = func() (memory, error) { return memory{most: math.MaxInt64}, nil }
	l.look()
	return l, &log
}

func TestLimitsCountsBeforeItRefuses(t *testing.T) {
	files := int64(10)
	l, log := testLimits(t, &files)
	// Requests that take no descriptor for good are never refused, however
	// many come between two looks.
	for i := range 10_000 {
		l.again = time.Time{}
		if err := l.admit(); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	files = 84
	l.look()
	if err := l.admit(); !errors.Is(err, errFiles) {
		t.Fatalf("with 84 descriptors in use of 100: %v", err)
	}
	files = 82
	l.again = time.Time{}
	if err := l.admit(); err != nil {
		t.Fatalf("with 82 in use: %v", err)
	}
	l.again = time.Now().Add(time.Hour) // as where counting takes long
	if err := l.admit(); !errors.Is(err, errFiles) {
		t.Fatalf("after one more that nobody has counted: %v", err)
	}
	if n := strings.Count(log.String(), "new work is refused"); n != 1 {
		t.Fatalf("%d lines for one burst:\n%s", n, log)
	}
}

func TestLimitsTellEachBurstOnce(t *testing.T) {
	files := int64(99)
	l, log := testLimits(t, &files)
	for burst := 1; burst <= 2; burst++ {
		files = 99
		l.look()
		for range 50 {
			if err := l.admit(); !errors.Is(err, errFiles) {
				t.Fatal(err)
			}
			l.look()
		}
		files = 10
		for range quietLooks {
			l.look()
		}
		if n := strings.Count(log.String(), "taken again"); n != burst-1 {
			t.Fatalf("burst %d has ended too soon:\n%s", burst, log)
		}
		l.look()
		for _, line := range []string{"new work is refused", "new work is taken again"} {
			if n := strings.Count(log.String(), line); n != burst {
				t.Fatalf("%q %d times after %d bursts:\n%s", line, n, burst, log)
			}
		}
	}
}

func TestLimitsOfMemory(t *testing.T) {
	files := int64(10)
	l, log := testLimits(t, &files)
	used := int64(899)
	l.memory = func() (memory, error) { return memory{used, 1000}, nil }
	l.look()
	if err := l.admit(); err != nil {
		t.Fatalf("899 of 1000 bytes: %v", err)
	}
	used = 900
	l.look()
	if err := l.admit(); !errors.Is(err, errMemory) {
		t.Fatalf("900 of 1000 bytes: %v", err)
	}
	// What cannot be read refuses nobody more, and is told once.
	l.memory = func() (memory, error) { return memory{}, errors.New("gone") }
	used = 0
	l.look()
	l.look()
	if n := strings.Count(log.String(), "limits are not watched"); n != 1 {
		t.Fatalf("told %d times:\n%s", n, log)
	}
}

// TestGoMemoryLimit fills the heap of the test itself.
func TestGoMemoryLimit(t *testing.T) {
	const mib = 1 << 20
	read := memoryOf(nil)
	if m, err := read(); err != nil || m.full() {
		t.Fatalf("without a limit: %+v, %v", m, err)
	}
	old := debug.SetMemoryLimit(1 << 40)
	defer debug.SetMemoryLimit(old)
	runtime.GC()
	m, err := read()
	if err != nil || m.used < mib/4 {
		t.Fatalf("%+v, %v", m, err)
	}
	debug.SetMemoryLimit(m.used + 128*mib)
	if m, err = read(); err != nil || m.full() {
		t.Fatalf("with room: %+v, %v", m, err)
	}
	held := make([]byte, 125*mib)
	for i := 0; i < len(held); i += 4096 {
		held[i] = 1
	}
	runtime.GC()
	if m, err = read(); err != nil || !m.full() {
		t.Fatalf("with 125 MiB more: %+v, %v", m, err)
	}
	runtime.KeepAlive(held) // and not beyond
	runtime.GC()
	if m, err = read(); err != nil || m.full() {
		t.Fatalf("with these let go: %+v, %v", m, err)
	}
}

func TestMemoryGroups(t *testing.T) {
	mount := t.TempDir()
	const text = "4:memory:/elsewhere\n0::/slice/service/leaf\n"
	memoryGroups := func() ([]memoryGroup, error) { return memoryGroups(mount, text) }
	write(t, filepath.Join(mount, "slice/memory.max"), "max\n")
	write(t, filepath.Join(mount, "slice/service/leaf/cgroup.procs"), "") // no controller there
	if g, err := memoryGroups(); err != nil || len(g) != 0 {
		t.Fatalf("no limit: %v, %v", g, err)
	}
	service := filepath.Join(mount, "slice/service")
	write(t, filepath.Join(service, "memory.max"), "1000\n")
	g, err := memoryGroups()
	if err != nil || len(g) != 1 || g[0] != (memoryGroup{service, 1000}) {
		t.Fatalf("one limit: %v, %v", g, err)
	}
	read := memoryOf(g)
	for _, c := range []struct {
		current, stat string
		full          bool
	}{
		{"899", "", false},
		{"950", "anon 900\nactive_file 0\n", true},
		{"950", "anon 500\nactive_file 50\ninactive_file 100\nslab_reclaimable 1\n", false},
	} {
		write(t, filepath.Join(service, "memory.current"), c.current+"\n")
		write(t, filepath.Join(service, "memory.stat"), c.stat)
		if m, err := read(); err != nil || m.full() != c.full {
			t.Errorf("%s bytes with %q: %+v, %v", c.current, c.stat, m, err)
		}
	}
	write(t, filepath.Join(service, "memory.max"), "much\n")
	if _, err := memoryGroups(); err == nil {
		t.Error("a limit that is no number is let pass")
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestOpenFilesAreCounted(t *testing.T) {
	before, err := openFiles()
	if err != nil {
		t.Fatal(err)
	}
	const more = 100
	for range more {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	// The runtime may open one of its own meanwhile.
	if n, err := openFiles(); err != nil || n < before+more || n > before+more+2 {
		t.Fatalf("%d, then %d, %v", before, n, err)
	}
}

func TestLimitsWatchAndClose(t *testing.T) {
	l, err := openLimits(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				if err := l.admit(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
}

func TestAdmitDoesNotAllocate(t *testing.T) {
	files := int64(99)
	for range 2 { // refusing, then not
		l, _ := testLimits(t, &files)
		// The first refusal logs.
		_ = l.admit()
		if n := testing.AllocsPerRun(100, func() { _ = l.admit() }); n != 0 {
			t.Errorf("%v allocations with %d descriptors in use", n, files)
		}
		files = 10
	}
}

func BenchmarkAdmit(b *testing.B) {
	for _, c := range []struct {
		name  string
		limit int64
	}{{"plenty", 1 << 20}, {"few", 20_000}} {
		b.Run(c.name, func(b *testing.B) {
			l := newLimits(slog.New(slog.DiscardHandler), c.limit)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					_ = l.admit() // with few it may refuse: these come faster than any clients
				}
			})
		})
	}
}

func BenchmarkOpenFiles(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := openFiles(); err != nil {
			b.Fatal(err)
		}
	}
}
