package relay_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

// The relays run in processes of their own, so that what getrusage says of them
// is the relay's and not the load's. The test binary is that process when
// childEnv is set.
const childEnv = "WAYOUT_RELAY_BENCH_CHILD"

type childSpec struct {
	Engine bool // else goroutine pairs
	Target string
	Tuning relay.Tuning
}

// workers is how many the tests' engines have.
const workers = 2

type childStat struct {
	CPU   time.Duration
	RSS   int64 // bytes
	Files int
}

func TestMain(m *testing.M) {
	if s := os.Getenv(childEnv); s != "" {
		var spec childSpec
		if err := json.Unmarshal([]byte(s), &spec); err != nil {
			panic(err)
		}
		if err := serveChild(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// As Options.Workers advises: with no P to spare, tests of bulk wait for
	// their own accepts.
	runtime.GOMAXPROCS(runtime.NumCPU() + workers)
	os.Exit(m.Run())
}

func serveChild(spec childSpec) error {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	target, err := net.ResolveTCPAddr("tcp4", spec.Target)
	if err != nil {
		return err
	}
	var e *relay.Engine
	if spec.Engine {
		if e, err = relay.NewTuned(relay.Options{}, spec.Tuning); err != nil {
			return err
		}
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0)) // as Options.Workers advises
	}
	p := newPair()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				up, err := net.DialTCP("tcp4", nil, target)
				if err != nil {
					c.Close()
					return
				}
				if e == nil {
					p.relay(c.(*net.TCPConn), up)
					return
				}
				a, _ := relay.Detach(c.(*net.TCPConn))
				b, _ := relay.Detach(up)
				_, _ = e.Start(relay.Spec{A: a, B: b, Idle: time.Hour})
			}()
		}
	}()
	fmt.Println(l.Addr())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if in.Text() == "gc" {
			runtime.GC()
		}
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			return err
		}
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return err
		}
		s := childStat{CPU: time.Duration(u.Utime.Nano() + u.Stime.Nano()), RSS: rss(), Files: len(files) - 1}
		if err := json.NewEncoder(os.Stdout).Encode(s); err != nil {
			return err
		}
	}
	return nil
}

func rss() int64 {
	b, _ := os.ReadFile("/proc/self/statm")
	var size, pages int64
	_, _ = fmt.Sscan(string(b), &size, &pages)
	return pages * int64(os.Getpagesize())
}

type child struct {
	addr string
	in   io.Writer
	out  *bufio.Reader
}

func startChild(b *testing.B, spec childSpec) *child {
	b.Helper()
	js, err := json.Marshal(spec)
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(js))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close() // ends the child, as the end of this process does
		_ = cmd.Wait()
	})
	c := &child{in: in, out: bufio.NewReader(out)}
	line, err := c.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	c.addr = strings.TrimSpace(line)
	return c
}

func (c *child) stat(b *testing.B, what string) childStat {
	b.Helper()
	if _, err := fmt.Fprintln(c.in, what); err != nil {
		b.Fatal(err)
	}
	line, err := c.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	var s childStat
	if err := json.Unmarshal([]byte(line), &s); err != nil {
		b.Fatal(err)
	}
	return s
}

// origin does to each connection what its first byte asks for.
func origin(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var what [1]byte
				if _, err := io.ReadFull(c, what[:]); err != nil {
					return
				}
				buf := make([]byte, 256<<10)
				switch what[0] {
				case 'd':
					for err == nil {
						_, err = c.Write(buf)
					}
				case 'e':
					for err == nil {
						var n int
						if n, err = c.Read(buf); err == nil {
							_, err = c.Write(buf[:n])
						}
					}
				default:
					for err == nil {
						_, err = c.Read(buf)
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

// load runs n clients of a kind against addr for as long as window takes, and
// returns how many bytes (bulk) or exchanges (echo) there were meanwhile.
func load(b *testing.B, addr string, kind byte, n, size int, window func()) int64 {
	b.Helper()
	var count atomic.Int64
	var wg sync.WaitGroup
	conns := make([]net.Conn, 0, n)
	for range n {
		c, err := net.Dial("tcp4", addr)
		if err != nil {
			b.Fatal(err)
		}
		conns = append(conns, c)
		wg.Go(func() {
			buf := make([]byte, max(size, 1))
			_, err := c.Write([]byte{kind})
			for err == nil {
				var k int
				switch kind {
				case 'd':
					k, err = c.Read(buf)
				case 'u':
					k, err = c.Write(buf)
				default:
					if _, err = c.Write(buf); err == nil {
						if _, err = io.ReadFull(c, buf); err == nil {
							k = 1
						}
					}
				}
				count.Add(int64(k))
			}
		})
	}
	time.Sleep(50 * time.Millisecond) // slow start is not what is measured
	before := count.Load()
	window()
	did := count.Load() - before
	for _, c := range conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	wg.Wait()
	return did
}

const window = 300 * time.Millisecond

// figures are what a window showed of one relay: CPU seconds for each unit that
// its process used, and units a second.
type figures struct{ cpu, rate float64 }

// measure takes a window of each child, in an order that changes with turn.
func measure(b *testing.B, turn int, kind byte, n, size int, children ...*child) []figures {
	b.Helper()
	out := make([]figures, len(children))
	for i := range children {
		k := (i + turn) % len(children)
		c := children[k]
		var used, took time.Duration
		did := load(b, c.addr, kind, n, size, func() {
			start, from := time.Now(), c.stat(b, "").CPU
			time.Sleep(window)
			used, took = c.stat(b, "").CPU-from, time.Since(start)
		})
		if did == 0 {
			b.Fatal("nothing was relayed")
		}
		out[k] = figures{used.Seconds() / float64(did), float64(did) / took.Seconds()}
	}
	return out
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// BenchmarkEngines compares the engine with goroutine pairs: an iteration is one
// window of each, so -benchtime=9x makes nine interleaved rounds. The metrics are
// medians: CPU of each relay per unit (GB, or exchange in µs), and the engine's
// CPU and rate by those of the pairs in the same round.
func BenchmarkEngines(b *testing.B) {
	target := origin(b)
	engine := startChild(b, childSpec{Engine: true, Target: target})
	pairs := startChild(b, childSpec{Target: target})
	for _, s := range []struct {
		name string
		kind byte
		n    int
		size int
	}{
		{"down-1", 'd', 1, 256 << 10},
		{"down-16", 'd', 16, 256 << 10},
		{"up-1", 'u', 1, 256 << 10},
		{"up-16", 'u', 16, 256 << 10},
		{"pingpong-1", 'e', 1, 128},
		{"pingpong-64", 'e', 64, 128},
	} {
		b.Run(s.name, func(b *testing.B) {
			var cpuE, cpuP, cpuR, rateE, rateR []float64
			for turn := 0; b.Loop(); turn++ {
				two := measure(b, turn, s.kind, s.n, s.size, engine, pairs)
				ce, re, cp, rp := two[0].cpu, two[0].rate, two[1].cpu, two[1].rate
				cpuE, cpuP, cpuR = append(cpuE, ce), append(cpuP, cp), append(cpuR, ce/cp)
				rateE, rateR = append(rateE, re), append(rateR, re/rp)
			}
			scale, unit := 1e9, "s/GB"
			if s.kind == 'e' {
				scale, unit = 1e6, "us"
			}
			b.ReportMetric(median(cpuE)*scale, "engine-cpu-"+unit)
			b.ReportMetric(median(cpuP)*scale, "pair-cpu-"+unit)
			b.ReportMetric(median(cpuR), "cpu-ratio")
			b.ReportMetric(median(rateE), "engine-rate")
			b.ReportMetric(median(rateR), "rate-ratio")
		})
	}
}

// BenchmarkIdle measures what a tunnel at rest, over which 128 bytes went each
// way, costs the relay process.
func BenchmarkIdle(b *testing.B) {
	const tunnels = 1000
	target := origin(b)
	for _, s := range []struct {
		name string
		spec childSpec
	}{
		{"engine", childSpec{Engine: true, Target: target}},
		{"pair", childSpec{Target: target}},
	} {
		b.Run(s.name, func(b *testing.B) {
			c := startChild(b, s.spec)
			var mem, files float64
			for b.Loop() {
				var conns []net.Conn
				grow := func(n int) {
					for range n {
						conn, err := net.Dial("tcp4", c.addr)
						if err != nil {
							b.Fatal(err)
						}
						conns = append(conns, conn)
						buf := make([]byte, 128)
						buf[0] = 'e'
						if _, err := conn.Write(buf); err != nil {
							b.Fatal(err)
						}
						if _, err := io.ReadFull(conn, buf[1:]); err != nil {
							b.Fatal(err)
						}
					}
				}
				grow(100)
				from := c.stat(b, "gc")
				grow(tunnels)
				to := c.stat(b, "gc")
				mem = float64(to.RSS-from.RSS) / tunnels
				files = float64(to.Files-from.Files) / tunnels
				for _, c := range conns {
					c.Close()
				}
				for c.stat(b, "").Files > from.Files-200 {
					time.Sleep(time.Millisecond)
				}
			}
			b.ReportMetric(mem, "B/tunnel")
			b.ReportMetric(files, "files/tunnel")
		})
	}
}

// BenchmarkCrossover is where the figures of tuning come from: what it takes to
// move a message that has arrived whole from one socket to another, copied and
// spliced. An iteration is one move of each, in turn, on one thread.
func BenchmarkCrossover(b *testing.B) {
	for _, size := range []int{128, 1 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			near, src := sockets(b)
			dst, far := sockets(b)
			var p [2]int
			if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
				b.Fatal(err)
			}
			defer unix.Close(p[0])
			defer unix.Close(p[1])
			if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, 1<<20); err != nil {
				b.Fatal(err)
			}
			for _, fd := range []int{near, far} {
				if err := unix.SetNonblock(fd, false); err != nil {
					b.Fatal(err)
				}
			}
			buf, piece := make([]byte, size), make([]byte, 64<<10)
			wait := []unix.PollFd{{Fd: int32(src), Events: unix.POLLIN}}
			var took [2][]float64
			for b.Loop() {
				for how := range took {
					go func() { _, _ = unix.Write(near, buf) }()
					for {
						// All of it is there, as in bulk, before the clock starts.
						n, err := unix.IoctlGetInt(src, unix.TIOCINQ)
						if err != nil {
							b.Fatal(err)
						}
						if n == size {
							break
						}
						_, _ = unix.Poll(wait, 1)
					}
					start := time.Now()
					for left := size; left > 0; {
						var n int
						var err error
						if how == 0 {
							if n, err = unix.Read(src, piece); err == nil {
								_, err = unix.Write(dst, piece[:n])
							}
						} else {
							var k int64
							if k, err = unix.Splice(src, nil, p[1], nil, left, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK); err == nil {
								n = int(k)
								_, err = unix.Splice(p[0], nil, dst, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
							}
						}
						if err != nil {
							b.Fatal(err)
						}
						left -= n
					}
					took[how] = append(took[how], float64(time.Since(start)))
					for left := size; left > 0; {
						n, err := unix.Read(far, buf[:left])
						if err != nil {
							b.Fatal(err)
						}
						left -= n
					}
				}
			}
			b.ReportMetric(median(took[0]), "copy-ns")
			b.ReportMetric(median(took[1]), "splice-ns")
			b.ReportMetric(median(took[1])/median(took[0]), "splice/copy")
		})
	}
}

// sockets returns the two ends of a TCP connection over loopback, non-blocking
// and with room for a quarter of a MiB on its way.
func sockets(b *testing.B) (int, int) {
	b.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	d, err := l.AcceptTCP()
	if err != nil {
		b.Fatal(err)
	}
	var fds [2]int
	for i, c := range []*net.TCPConn{c.(*net.TCPConn), d} {
		_ = c.SetWriteBuffer(1 << 20)
		_ = c.SetReadBuffer(1 << 20)
		if fds[i], err = relay.Detach(c); err != nil {
			b.Fatal(err)
		}
	}
	b.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds[0], fds[1]
}
