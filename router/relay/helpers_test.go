package relay_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// engine makes an engine that the test's end closes; goroutines and descriptors
// must then be as before.
func engine(t *testing.T, o relay.Options, tune relay.Tuning) *relay.Engine {
	t.Helper()
	unleaked(t)
	if o.Workers == 0 {
		o.Workers = workers
	}
	e, err := relay.NewTuned(o, tune)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if n := e.Open(); n != 0 {
			t.Errorf("%d tunnels open after Close", n)
		}
		if n := e.Pipes(); n != 0 {
			t.Errorf("%d pipes after Close", n)
		}
	})
	return e
}

// unleaked checks at the test's end that it left no goroutine and no descriptor.
func unleaked(t *testing.T) {
	t.Helper()
	// The poller's own descriptors come with the first socket.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	before := files(t)
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore)
		var after []string
		within(func() bool {
			after = files(t)
			return len(after) <= len(before)
		})
		if len(after) > len(before) {
			t.Errorf("descriptors: %d before, %d after: %v", len(before), len(after), after)
		}
	})
}

func files(t *testing.T) []string {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, n := range names {
		to, err := os.Readlink("/proc/self/fd/" + n.Name())
		if err == nil && !strings.HasPrefix(to, "/proc/") {
			out = append(out, n.Name()+" "+to)
		}
	}
	return out
}

// within polls for what has no event to await.
func within(ok func() bool) bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return true
		}
	}
	return ok()
}

// connect returns the ends of a TCP connection over loopback.
func connect(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	return c, d
}

func detach(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	fd, err := relay.Detach(c)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// tunnel is a relayed pair of peers.
type tunnel struct {
	*relay.Tunnel
	a, b *net.TCPConn // the peers
	fd   [2]int       // the engine's ends
	done chan relay.Result
}

// start relays between two peers, with the rest of spec as given.
func start(t testing.TB, e *relay.Engine, spec relay.Spec) *tunnel {
	t.Helper()
	a, ra := connect(t)
	b, rb := connect(t)
	x := &tunnel{a: a, b: b, done: make(chan relay.Result, 2)}
	x.fd = [2]int{detach(t, ra), detach(t, rb)}
	spec.A, spec.B = x.fd[0], x.fd[1]
	spec.Done = func(r relay.Result) { x.done <- r }
	var err error
	if x.Tunnel, err = e.Start(spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	for _, c := range []*net.TCPConn{a, b} {
		if err := c.SetDeadline(time.Now().Add(3 * patience)); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// result waits for the end, and checks that it comes once.
func (x *tunnel) result(t testing.TB) relay.Result {
	t.Helper()
	select {
	case r := <-x.done:
		select {
		case <-x.done:
			t.Error("Done called twice")
		default:
		}
		return r
	case <-time.After(patience):
		t.Fatal("the tunnel does not end")
		return relay.Result{}
	}
}

func send(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != s {
		t.Fatalf("got %q, %v; want %q", b, err, s)
	}
}

func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("got %d bytes, %v; want EOF", n, err)
	}
}

// expectReset reads c dry and checks that a reset ends it.
func expectReset(t testing.TB, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v; want a reset", err)
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// fillUp writes the pattern, over and over, to c until nothing on its way moves,
// and returns how much it took.
func fillUp(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	block := pattern(fillBlock)
	total, still := 0, 0
	for still < 20 {
		n := 0
		if err := raw.Control(func(fd uintptr) { n, err = unix.Write(int(fd), block[total%fillBlock:]) }); err != nil {
			t.Fatal(err)
		}
		if errors.Is(err, unix.EAGAIN) {
			// Whether it is over, nothing but time can tell.
			still++
			time.Sleep(2 * time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		total, still = total+n, 0
	}
	return total
}

const fillBlock = 256 << 10

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func sysfd(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := raw.Control(func(fd uintptr) { n = int(fd) }); err != nil {
		t.Fatal(err)
	}
	return n
}

func queued(t testing.TB, fd int, what uint) int {
	t.Helper()
	n, err := unix.IoctlGetInt(fd, what)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
