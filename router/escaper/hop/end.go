package hop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// end is a bridge's end of a pair of Unix sockets. Such sockets have no reset,
// and only one way to end that the far end does not take for an end of stream:
// when an end is closed with bytes in it unread, the other one's reads fail with
// ECONNRESET. So the last byte that has come is always left unread, though it
// has been looked at and passed on (at first, one that pair puts there), until
// the end closes well.
//
// A byte keeps the whole message in the kernel that it came in, and that counts
// for the far end's send buffer. A far end that waits for room is not told of
// any while more than a quarter is in use; so where a message may be that large,
// its last byte is read too, and the end is bare until more comes.
type end struct {
	conn *net.UnixConn
	raw  syscall.RawConn

	// Of the reader.
	bare  bool // no byte is left from before
	burst int  // bytes taken since nothing was left to take: the last message has no more
	most  int  // the largest message whose last byte can be left
}

const (
	// mostMessage is what one message in the kernel holds at most: by splice 16
	// buffers of a pipe, each up to 32 KiB and more; by write less than 40 KiB.
	mostMessage = 1 << 20
	// overhead is what a message takes beyond its bytes.
	overhead = 16 << 10
	// mostSend is half of what the kernel makes of it.
	mostSend = 2 * (mostMessage + overhead)
)

// pair makes the two ends. send is how large the stream's send buffer is to be;
// without CAP_NET_ADMIN it becomes what net.core.wmem_max allows.
func pair(send int) (*end, *net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	most, err := prepare(fds[1], send)
	ours, err1 := unixConn(fds[0])
	stream, err2 := unixConn(fds[1])
	err = errors.Join(err, err1, err2)
	e := &end{conn: ours, most: most}
	if err == nil {
		e.raw, err = ours.SyscallConn()
	}
	if err == nil {
		return e, stream, nil
	}
	for _, c := range []*net.UnixConn{ours, stream} {
		if c != nil {
			_ = c.Close()
		}
	}
	return nil, nil, fmt.Errorf("make a pair of sockets: %w", err)
}

// prepare puts the first byte into the far end of a stream, and returns the
// largest message that can be left there.
func prepare(stream, send int) (most int, err error) {
	if unix.SetsockoptInt(stream, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, send) != nil {
		if err := unix.SetsockoptInt(stream, unix.SOL_SOCKET, unix.SO_SNDBUF, send); err != nil {
			return 0, os.NewSyscallError("setsockopt SO_SNDBUF", err)
		}
	}
	got, err := unix.GetsockoptInt(stream, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return 0, os.NewSyscallError("getsockopt SO_SNDBUF", err)
	}
	if _, err := unix.Write(stream, []byte{0}); err != nil {
		return 0, os.NewSyscallError("write", err)
	}
	return got/4 - overhead, nil
}

// unixConn takes fd over, also when it fails.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "pair")
	c, err := net.FileConn(f)
	err = errors.Join(err, f.Close())
	if u, ok := c.(*net.UnixConn); ok && err == nil {
		return u, nil
	}
	if c != nil {
		_ = c.Close()
	}
	return nil, errors.Join(err, unix.EPROTOTYPE)
}

// wait waits until there is something to take, or returns io.EOF when nothing
// more comes.
func (e *end) wait() (err error) {
	ctlErr := e.raw.Read(func(fd uintptr) bool {
		err = e.look(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if ctlErr != nil {
		return ctlErr
	}
	return err
}

func (e *end) look(fd int) error {
	if n, err := e.fresh(fd); n > 0 || err != nil {
		return err
	}
	got := poll(fd, unix.POLLRDHUP)
	if got&unix.POLLERR != 0 {
		return unix.ECONNRESET
	}
	if got&unix.POLLRDHUP == 0 {
		return unix.EAGAIN
	}
	// What came before the end is all there by now.
	n, err := e.fresh(fd)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return err
}

// fresh returns how many bytes there are to take.
func (e *end) fresh(fd int) (int, error) {
	n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	if err != nil {
		return 0, os.NewSyscallError("ioctl SIOCINQ", err)
	}
	return max(0, n-e.kept()), nil
}

// kept is the number of bytes that are left from before.
func (e *end) kept() int {
	if e.bare {
		return 0
	}
	return 1
}

// take returns what has come, in b, or unix.EAGAIN.
func (e *end) take(b []byte) (p []byte, err error) {
	ctlErr := e.raw.Control(func(fd uintptr) { p, err = e.takeFrom(int(fd), b) })
	if ctlErr != nil {
		return nil, ctlErr
	}
	return p, err
}

func (e *end) takeFrom(fd int, b []byte) ([]byte, error) {
	fresh, err := e.fresh(fd)
	switch {
	case err != nil:
		return nil, err
	case fresh == 0:
		return nil, unix.EAGAIN
	}
	kept := e.kept()
	n := min(fresh, len(b)-kept)
	// The byte that is kept, and all but the last of what has come: n-1+kept.
	read := n - 1 + kept
	for got := 0; got < read; {
		m, err := unix.Read(fd, b[got:read])
		if err != nil && !errors.Is(err, unix.EINTR) {
			return nil, os.NewSyscallError("read", err)
		}
		got += max(m, 0)
	}
	if _, _, err := unix.Recvfrom(fd, b[read:read+1], unix.MSG_PEEK); err != nil {
		return nil, os.NewSyscallError("recvfrom", err)
	}
	e.bare = false
	e.burst += n
	if n == fresh {
		if min(e.burst, mostMessage) > e.most {
			if err := e.drop(fd); err != nil {
				return nil, err
			}
		}
		e.burst = 0
	}
	return b[kept : kept+n], nil
}

// drop reads the byte that is kept.
func (e *end) drop(fd int) error {
	var b [1]byte
	if _, err := unix.Read(fd, b[:e.kept()]); err != nil {
		return os.NewSyscallError("read", err)
	}
	e.bare = true
	return nil
}

// closed reports whether the stream has been closed both ways, by its holder or,
// when it has ended one way and we the other, by both.
func (e *end) closed() bool {
	closed := true // as is our own end when Control fails
	_ = e.raw.Control(func(fd uintptr) { closed = poll(int(fd), 0)&unix.POLLHUP != 0 })
	return closed
}

// waitClosed waits until closed.
func (e *end) waitClosed() error {
	return e.raw.Read(func(fd uintptr) bool { return poll(int(fd), 0)&unix.POLLHUP != 0 })
}

// sever closes the end so that the stream's holder sees a reset. A bare end has
// to wait for a byte to leave unread, or for the holder to go: the stream stands
// still rather than end as if it were whole.
func (e *end) sever() {
	if e.bare {
		_ = e.conn.SetReadDeadline(time.Time{})
		_ = e.raw.Read(func(fd uintptr) bool {
			n, err := e.fresh(int(fd))
			return n > 0 || err != nil || poll(int(fd), 0)&unix.POLLHUP != 0
		})
	}
	_ = e.conn.Close()
}

// close closes the end so that the stream's holder sees it end.
func (e *end) close() {
	// When a holder that is still there has ended its half, nothing is unread now
	// but the byte that is kept.
	_ = e.raw.Control(func(fd uintptr) { _ = e.drop(int(fd)) })
	_ = e.conn.Close()
}

// poll returns what fd is ready for, of events, errors and ends.
func poll(fd int, events int16) int16 {
	p := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(p, 0)
		if !errors.Is(err, unix.EINTR) {
			return p[0].Revents
		}
	}
}
