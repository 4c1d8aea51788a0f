//go:build race

package httpproxy

import (
	"errors"
	"syscall"
)

// moveBytes is the other moveBytes for the race detector, which has to be told
// that what is read comes after what was written.
func moveBytes(call, fd uintptr, b []byte) (int, syscall.Errno) {
	move := syscall.Read
	if call == syscall.SYS_WRITE {
		move = syscall.Write
	}
	for {
		n, err := move(int(fd), b)
		var no syscall.Errno
		switch {
		case err == nil:
			return n, 0
		case errors.As(err, &no) && no == syscall.EINTR:
		default:
			return 0, no
		}
	}
}
