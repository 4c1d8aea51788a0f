package relay

import (
	"errors"
	"syscall"
	"time"
)

// Mixed tells protocols on one port apart by the first byte that the client
// says. It is one with the front ends that it hands connections to when they
// share its Front.
type Mixed struct {
	Front *Front
	Idle  time.Duration // how long a client may say nothing; 0: for ever
	// Begin returns what serves a client that begins with a byte. It is to find
	// the byte, which has not been read.
	Begin func(first byte) func(*Task, Accepted)
}

// Serve is Front.Serve.
func (m *Mixed) Serve(l *Listener) error { return m.Front.Serve(l, m.begin) }

func (m *Mixed) begin(k *Task, a Accepted) {
	// It stays tracked until the front end that goes on has its own: else a
	// Shutdown could find nothing open between the two.
	b := &Bare{Task: k}
	place := m.Front.Track(b)
	defer m.Front.Untrack(place, b)
	first, ok := m.peek(b, a.FD)
	if !ok {
		_ = syscall.Close(a.FD)
		return
	}
	m.Begin(first)(k, a)
}

// peek waits for the first byte, and leaves it unread.
func (m *Mixed) peek(b *Bare, fd int) (first byte, ok bool) {
	var buf [1]byte
	for {
		n, _, err := syscall.Recvfrom(fd, buf[:], syscall.MSG_PEEK)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			if !b.AwaitFirst(m.Front, fd, m.Idle) {
				return 0, false
			}
		default:
			return buf[0], err == nil && n > 0
		}
	}
}
