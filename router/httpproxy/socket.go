package httpproxy

import (
	"io"
	"net"
	"os"
	"syscall"
)

// The sockets of requests do not block, and Go's scheduler is not told of their
// system calls. Of those that it is told of, one takes some 20 us with the
// network's half of the work, which is how long the scheduler lets a thread be
// in a call: then it gives the thread's place to another, and wakes one for that.
// It came to a twentieth of what a forwarded request costs.

// A socket is one way of a connection: of a reader, or of a writer.
type socket struct {
	raw  syscall.RawConn
	call func(fd uintptr) bool // bound once: of the reader's or the writer's system call
	b    []byte
	n    int
	err  syscall.Errno
}

// rawOf gives what moves bytes on a connection, nil when that is closed.
func rawOf(s syscall.Conn) syscall.RawConn {
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// read reads once, waiting for as long as the connection's deadline allows. The
// end of the stream is io.EOF.
func (s *socket) read(b []byte) (int, error) {
	if s.raw == nil {
		return 0, net.ErrClosed
	}
	if s.call == nil {
		s.call = func(fd uintptr) bool { return s.once(syscall.SYS_READ, fd) }
	}
	s.b = b
	n, err := s.result(s.raw.Read(s.call), "read")
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// write writes once, waiting likewise: at least a byte, unless it fails.
func (s *socket) write(b []byte) (int, error) {
	if s.raw == nil {
		return 0, net.ErrClosed
	}
	if s.call == nil {
		s.call = func(fd uintptr) bool { return s.once(syscall.SYS_WRITE, fd) }
	}
	s.b = b
	return s.result(s.raw.Write(s.call), "write")
}

// once makes the system call. It reports false when the socket is to be waited
// for.
func (s *socket) once(call, fd uintptr) bool {
	s.n, s.err = moveBytes(call, fd, s.b)
	return s.err != syscall.EAGAIN
}

// result is what became of a wait, and of the call at its end.
func (s *socket) result(err error, name string) (int, error) {
	s.b = nil
	if err != nil {
		return 0, err // and the call, if there was one, had nothing
	}
	if s.err != 0 {
		return 0, os.NewSyscallError(name, s.err)
	}
	return s.n, nil
}
