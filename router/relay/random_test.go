package relay_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

// exchangesEnv is how many exchanges TestRandomExchanges does; else 2,000, and
// 300 with -short. seedEnv repeats a run.
const (
	exchangesEnv = "WAYOUT_RELAY_EXCHANGES"
	seedEnv      = "WAYOUT_RELAY_SEED"
)

// stream is where all peers' bytes come from, each from an offset of its own.
var stream = sync.OnceValue(func() []byte { return pattern(6 << 20) })

// end is how a peer ends what it sends.
type end int

const (
	endHalf  end = iota // shuts its sending side down
	endWait             // closes when it has read the other's end
	endReset            // resets
)

func (e end) String() string { return [...]string{"half-close", "wait", "reset"}[e] }

// part is what one peer does in an exchange.
type part struct {
	offset int
	chunks []int
	pause  []int // before each chunk: 0 go on, 1 yield, 2 until the other has read all, else µs
	end    end
	stall  bool // reads only when the other's sending has ended or is held up
	slow   int  // bytes a read, 0: as many as there are
	prefix int  // bytes of the first chunk that the relay is given with the tunnel
}

func (p *part) total() int {
	n := 0
	for _, c := range p.chunks {
		n += c
	}
	return n
}

func (p *part) data() []byte { return stream()[p.offset : p.offset+p.total()] }

func randomPart(r *rand.Rand) part {
	p := part{offset: r.IntN(1 << 20), stall: r.IntN(5) == 0}
	for range r.IntN(6) {
		var n int
		switch k := r.IntN(100); {
		case k < 60:
			n = r.IntN(2000)
		case k < 90:
			n = r.IntN(100 << 10)
		case k < 98:
			n = 60<<10 + r.IntN(10<<10) // about the relay's buffer
		default:
			n = r.IntN(1 << 20)
		}
		pause := r.IntN(4)
		if pause == 3 {
			pause = 3 + r.IntN(300)
		}
		p.chunks, p.pause = append(p.chunks, n), append(p.pause, pause)
	}
	if r.IntN(4) == 0 {
		p.slow = 1 + r.IntN(20000)
	}
	switch k := r.IntN(20); {
	case k == 0:
		p.end = endReset
	case k < 8:
		p.end = endWait
	}
	if len(p.chunks) > 0 && r.IntN(3) == 0 {
		p.prefix = r.IntN(p.chunks[0] + 1)
	}
	return p
}

// outcome is what a peer saw.
type outcome struct {
	got  []byte
	err  error // reading's; nil: end of stream
	sent error // writing's
}

// peer plays one part over a connection.
type peer struct {
	part
	conn  *net.TCPConn
	other *peer

	mu    sync.Mutex
	moved *sync.Cond
	read  int  // bytes of the other's
	gate  bool // the other's sending has ended or is held up
	over  bool // reading has ended
	out   outcome
}

func (p *peer) open() {
	p.mu.Lock()
	p.gate = true
	p.moved.Broadcast()
	p.mu.Unlock()
}

func (p *peer) send() error {
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return err
	}
	left, sent := p.data()[p.prefix:], p.prefix
	skip := p.prefix
	for i, n := range p.chunks {
		n, skip = n-skip, 0
		switch pause := p.pause[i]; pause {
		case 0:
		case 1:
			time.Sleep(0)
		case 2:
			p.other.open() // it may be waiting for just this
			p.other.mu.Lock()
			for p.other.read < sent && !p.other.over {
				p.other.moved.Wait()
			}
			p.other.mu.Unlock()
		default:
			time.Sleep(time.Duration(pause) * time.Microsecond)
		}
		for n > 0 {
			var k int
			var opErr error
			if err := raw.Write(func(fd uintptr) bool {
				k, opErr = unix.Write(int(fd), left[:n])
				if opErr == unix.EAGAIN {
					p.other.open()
					return false
				}
				return true
			}); err != nil {
				return err
			}
			if opErr != nil {
				return opErr
			}
			left, n, sent = left[k:], n-k, sent+k
		}
	}
	return nil
}

func (p *peer) receive() {
	if p.stall {
		p.mu.Lock()
		for !p.gate {
			p.moved.Wait()
		}
		p.mu.Unlock()
	}
	size := p.slow
	if size == 0 {
		size = 128 << 10
	}
	buf := make([]byte, size)
	for {
		n, err := p.conn.Read(buf)
		p.mu.Lock()
		p.out.got = append(p.out.got, buf[:n]...)
		p.read += n
		if err != nil {
			p.over = true
			if !errors.Is(err, io.EOF) {
				p.out.err = err
			}
		}
		p.moved.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// play does both halves and closes the connection.
func (p *peer) play() {
	var wg sync.WaitGroup
	wg.Go(p.receive)
	err := p.send()
	p.out.sent = err
	p.other.open()
	switch {
	case p.end == endReset:
		_ = p.conn.SetLinger(0)
		p.conn.Close()
	case err == nil && p.end == endHalf:
		_ = p.conn.CloseWrite()
	case err == nil:
		// The other side must not wait for this one's end as well.
		wg.Wait()
	}
	wg.Wait()
	p.conn.Close()
}

// mover relays between two connections, with prefixes, and reports the end.
type mover func(t testing.TB, a, b *net.TCPConn, toB, toA []byte, done chan<- relay.Result)

func byEngine(e *relay.Engine) mover {
	return func(t testing.TB, a, b *net.TCPConn, toB, toA []byte, done chan<- relay.Result) {
		spec := relay.Spec{
			A: detach(t, a), B: detach(t, b), ToB: toB, ToA: toA, Idle: time.Minute,
			Done: func(r relay.Result) { done <- r },
		}
		if _, err := e.Start(spec); err != nil {
			t.Error(err)
			close(done)
		}
	}
}

// byCopy is the plain copy: two goroutines, two buffers.
func byCopy(_ testing.TB, a, b *net.TCPConn, toB, toA []byte, done chan<- relay.Result) {
	go func() {
		var r relay.Result
		var errs [2]error
		var wg sync.WaitGroup
		half := func(dst, src *net.TCPConn, first []byte, n *int64, err *error) {
			k, e := dst.Write(first)
			*n = int64(k)
			for buf := make([]byte, 32<<10); e == nil; {
				if k, e = src.Read(buf); e == nil {
					k, e = dst.Write(buf[:k])
					*n += int64(k)
				}
			}
			if errors.Is(e, io.EOF) {
				_ = dst.CloseWrite()
				return
			}
			*err = e
			for _, c := range []*net.TCPConn{a, b} {
				_ = c.SetLinger(0)
				c.Close()
			}
		}
		wg.Go(func() { half(b, a, toB, &r.AToB, &errs[0]) })
		wg.Go(func() { half(a, b, toA, &r.BToA, &errs[1]) })
		wg.Wait()
		a.Close()
		b.Close()
		r.Cause = errors.Join(errs[:]...)
		done <- r
	}()
}

// exchange plays two parts through a relay.
func exchange(t testing.TB, parts [2]part, move mover) ([2]outcome, relay.Result, error) {
	a, ra := connect(t)
	b, rb := connect(t)
	peers := [2]*peer{{part: parts[0], conn: a}, {part: parts[1], conn: b}}
	for i, p := range peers {
		p.other, p.moved = peers[1-i], sync.NewCond(&p.mu)
		_ = p.conn.SetDeadline(time.Now().Add(3 * patience))
	}
	done := make(chan relay.Result, 2)
	move(t, ra, rb, parts[0].data()[:parts[0].prefix], parts[1].data()[:parts[1].prefix], done)
	var wg sync.WaitGroup
	for _, p := range peers {
		wg.Go(p.play)
	}
	wg.Wait()
	select {
	case r := <-done:
		return [2]outcome{peers[0].out, peers[1].out}, r, nil
	case <-time.After(patience):
		return [2]outcome{}, relay.Result{}, errors.New("the relay does not end")
	}
}

// judge says what is wrong with what two peers saw of each other.
func judge(parts [2]part, out [2]outcome, r relay.Result) error {
	counts := [2]int64{r.BToA, r.AToB} // as received by A and by B
	clean := parts[0].end != endReset && parts[1].end != endReset
	for i, o := range out {
		want := parts[1-i].data()
		switch {
		case clean && (o.err != nil || !bytes.Equal(o.got, want)):
			return fmt.Errorf("peer %d got %d bytes of %d, %w", i, len(o.got), len(want), o.err)
		case clean && counts[i] != int64(len(want)):
			return fmt.Errorf("peer %d: %d counted of %d", i, counts[i], len(want))
		case !bytes.HasPrefix(want, o.got):
			return fmt.Errorf("peer %d got %d bytes that were not sent", i, len(o.got))
		case counts[i] < int64(len(o.got)) || counts[i] > int64(len(want)):
			return fmt.Errorf("peer %d: %d counted, %d got, %d sent", i, counts[i], len(o.got), len(want))
		case parts[1-i].end == endReset && o.err == nil && o.sent == nil:
			// The kernel tells of a reset once: the reader or the writer.
			return fmt.Errorf("peer %d saw an end of stream for a reset", i)
		}
	}
	if clean != (r.Cause == nil) {
		return fmt.Errorf("cause %w", r.Cause)
	}
	return nil
}

// TestRandomExchanges plays random exchanges through the engine, and those that
// end well through a plain copy too: the peers must get the same bytes.
func TestRandomExchanges(t *testing.T) {
	n, seed := 2000, int(time.Now().UnixNano())
	if testing.Short() {
		n = 300
	}
	for _, v := range []struct {
		name string
		to   *int
	}{{exchangesEnv, &n}, {seedEnv, &seed}} {
		if s := os.Getenv(v.name); s != "" {
			var err error
			if *v.to, err = strconv.Atoi(s); err != nil {
				t.Fatal(v.name, err)
			}
		}
	}
	t.Logf("%s=%d %s=%d", seedEnv, seed, exchangesEnv, n)
	// As set, with small pieces and few pipes so that every switch is taken
	// often, and in memory only.
	engines := []mover{
		byEngine(engine(t, relay.Options{}, relay.Tuning{})),
		byEngine(engine(t, relay.Options{Pipes: 3}, relay.Tuning{
			Buffer: 1000, Pipe: 4 << 10, Passes: 2, Large: 900, Small: 600,
		})),
		byEngine(engine(t, relay.Options{}, relay.Tuning{Buffer: 3000, Large: 1 << 20})),
	}
	jobs := make(chan int)
	var wg sync.WaitGroup
	var resets, bytesMoved int
	var mu sync.Mutex
	for range 16 {
		wg.Go(func() {
			for i := range jobs {
				r := rand.New(rand.NewPCG(uint64(seed), uint64(i)))
				parts := [2]part{randomPart(r), randomPart(r)}
				if parts[0].end == endWait && parts[1].end == endWait {
					parts[r.IntN(2)].end = endHalf // else neither would ever end
				}
				got, res, err := exchange(t, parts, engines[i%len(engines)])
				if err == nil {
					err = judge(parts, got, res)
				}
				if err == nil && res.Cause == nil {
					// A plain copy turns some resets into ends of stream (one half
					// meets the error, the other then reads the end), so it is no
					// measure for those.
					var want [2]outcome
					if want, _, err = exchange(t, parts, byCopy); err == nil {
						for k := range got {
							if !bytes.Equal(got[k].got, want[k].got) {
								t.Errorf("exchange %d: peer %d got other bytes than by the plain copy", i, k)
							}
						}
					}
				}
				if err != nil {
					t.Errorf("exchange %d (%s=%d): %v\n A: %+v\n B: %+v", i, seedEnv, seed, err, parts[0], parts[1])
				}
				mu.Lock()
				if res.Cause != nil {
					resets++
				}
				bytesMoved += len(got[0].got) + len(got[1].got)
				mu.Unlock()
			}
		})
	}
	for i := range n {
		if t.Failed() {
			break
		}
		jobs <- i
	}
	close(jobs)
	wg.Wait()
	t.Logf("%d exchanges, %d ended by a reset, %d MB", n, resets, bytesMoved>>20)
}
