package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A loader does one job.
type loader struct {
	job
	next    atomic.Int64 // number of the next connection
	errs    atomic.Int64
	checked atomic.Int64
	wrong   atomic.Int64

	mu      sync.Mutex
	first   string // error
	wrongAs string
}

// mostErrors is how many errors end a job early.
const mostErrors = 100

// serveLoad reads a job from in and writes results to out.
func serveLoad(in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	text, err := lines.ReadBytes('\n')
	if err != nil {
		return err
	}
	l := &loader{}
	if err := json.Unmarshal(text, &l.job); err != nil {
		return err
	}
	tell := json.NewEncoder(out)
	var r result
	switch l.Kind {
	case "tunnel":
		r, err = l.tunnels()
	case "http":
		r, err = l.forward()
	case "down", "up":
		r, err = l.bulk()
	case "ping":
		r, err = l.ping()
	case "hold":
		return l.hold(lines, tell)
	default:
		return fmt.Errorf("unknown kind of job %q", l.Kind)
	}
	if err != nil {
		return err
	}
	l.sum(&r)
	return tell.Encode(r)
}

func (l *loader) sum(r *result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.Errors, r.Error = l.errs.Load(), l.first
	r.Checked, r.Wrong, r.WrongAs = l.checked.Load(), l.wrong.Load(), l.wrongAs
}

func (l *loader) fail(err error) {
	l.errs.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == "" {
		l.first = err.Error()
	}
}

// check compares the source that the origin saw with those that are right.
func (l *loader) check(saw string, right []string) {
	l.checked.Add(1)
	if slices.Contains(right, saw) {
		return
	}
	l.wrong.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wrongAs == "" {
		l.wrongAs = saw
	}
}

// A way is how one connection is made, and the sources that are right for it.
type way struct {
	number int64
	target string
	header string
	right  []string
}

func (l *loader) way() way {
	w := way{number: l.next.Add(1)}
	w.target = l.Targets[int(w.number)%len(l.Targets)]
	w.right = l.Sources
	if l.Header != "" {
		source := l.Sources[int(w.number)%len(l.Sources)]
		w.header = fmt.Sprintf(l.Header, source) + "\r\n"
		w.right = []string{source}
	}
	return w
}

const patience = 10 * time.Second // beyond a job's own time

func (l *loader) dial(w *way, addr string) (*net.TCPConn, error) {
	local := l.Local[int(w.number)%len(l.Local)]
	d := net.Dialer{
		Timeout: patience, KeepAlive: -1, LocalAddr: &net.TCPAddr{IP: net.ParseIP(local)},
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			ctl := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
			})
			return errors.Join(ctl, err)
		},
	}
	c, err := d.Dial("tcp4", addr)
	if err != nil {
		return nil, err
	}
	if len(l.Sources) == 0 {
		w.right = []string{local}
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, errors.New("not TCP")
	}
	return tcp, tcp.SetDeadline(time.Now().Add(l.For + l.Warm + patience))
}

// tunnel makes a stream to the origin. buf is scratch.
func (l *loader) tunnel(buf []byte) (*net.TCPConn, way, error) {
	w := l.way()
	addr := l.Proxy
	if l.Via == viaDirect || l.Via == viaDivert {
		addr = w.target
	}
	c, err := l.dial(&w, addr)
	if err != nil {
		return nil, w, err
	}
	switch l.Via {
	case viaConnect:
		err = connect(c, &w, buf)
	case viaSOCKS:
		err = socks(c, &w, buf)
	}
	if err != nil {
		return nil, w, errors.Join(err, c.Close())
	}
	return c, w, nil
}

func connect(c net.Conn, w *way, buf []byte) error {
	request := fmt.Appendf(buf[:0], "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", w.target, w.target, w.header)
	if _, err := c.Write(request); err != nil {
		return err
	}
	for n := 0; n < len(buf); {
		k, err := c.Read(buf[n:])
		n += k
		head, after, whole := strings.Cut(string(buf[:n]), "\r\n\r\n")
		switch {
		case whole && (len(head) < 12 || head[9:12] != "200"):
			status, _, _ := strings.Cut(head, "\r\n")
			return fmt.Errorf("answer to CONNECT: %s", status)
		case whole && after != "":
			return fmt.Errorf("%d bytes after the answer to CONNECT", len(after))
		case whole:
			return nil
		case err != nil:
			return fmt.Errorf("answer to CONNECT: %w", err)
		}
	}
	return errors.New("the answer to CONNECT has no end")
}

// socks asks for a tunnel by RFC 1928, to an IPv4 target.
func socks(c net.Conn, w *way, buf []byte) error {
	if _, err := c.Write([]byte{5, 1, 0}); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, buf[:2]); err != nil || buf[0] != 5 || buf[1] != 0 {
		return fmt.Errorf("SOCKS greeting: % x: %w", buf[:2], errors.Join(err, errRefused))
	}
	at, err := net.ResolveTCPAddr("tcp4", w.target)
	if err != nil {
		return err
	}
	request := append(buf[:0], 5, 1, 0, 1)
	request = append(request, at.IP.To4()...)
	request = append(request, byte(at.Port>>8), byte(at.Port))
	if _, err := c.Write(request); err != nil {
		return err
	}
	const reply = 10 // with an IPv4 address
	if _, err := io.ReadFull(c, buf[:reply]); err != nil || buf[1] != 0 || buf[3] != 1 {
		return fmt.Errorf("SOCKS reply: % x: %w", buf[:4], errors.Join(err, errRefused))
	}
	return nil
}

var errRefused = errors.New("no tunnel")

// stream makes a tunnel and asks the origin for a kind of stream.
func (l *loader) stream(word string, buf []byte) (*net.TCPConn, error) {
	c, w, err := l.tunnel(buf)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, word+"\n"); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	for n := 0; n < 64; n++ { // byte by byte: what follows is not ours
		if _, err := io.ReadFull(c, buf[n:n+1]); err != nil {
			return nil, errors.Join(fmt.Errorf("first line of the origin: %w", err), c.Close())
		}
		if buf[n] == '\n' {
			l.check(string(buf[:n]), w.right)
			return c, nil
		}
	}
	return nil, errors.Join(errors.New("the origin does not answer as it should"), c.Close())
}

// A window is a stretch of time whose CPU is counted.
type window struct {
	at  time.Time
	cpu float64
}

func (l *loader) begin() (window, error) {
	w := window{at: time.Now()}
	if l.Via == viaDirect {
		return w, nil
	}
	var err error
	w.cpu, err = l.Group.cpu()
	return w, err
}

func (l *loader) end(from window, r *result) error {
	to, err := l.begin()
	r.Seconds, r.CPU = to.at.Sub(from.at).Seconds(), to.cpu-from.cpu
	return err
}

func quantiles(r *result, took []time.Duration) {
	if len(took) == 0 {
		return
	}
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))]) / 1e3 }
	r.P50, r.P99 = at(0.5), at(0.99)
}
