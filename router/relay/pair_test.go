package relay_test

import (
	"errors"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// pair is the relay that the engine is compared with: two goroutines for each
// tunnel on Go's poller. It waits for readability with no buffer in hand, copies
// small talk through a pooled buffer and leaves bulk to io.Copy, which splices.
type pair struct{ buffers sync.Pool }

func newPair() *pair {
	return &pair{buffers: sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}}
}

func (p *pair) relay(a, b *net.TCPConn) {
	var wg sync.WaitGroup
	wg.Go(func() { p.half(b, a) })
	wg.Go(func() { p.half(a, b) })
	wg.Wait()
	a.Close()
	b.Close()
}

func (p *pair) half(dst, src *net.TCPConn) {
	err := p.move(dst, src)
	if err != nil {
		// Both sides are reset, as the engine does it.
		_ = src.SetLinger(0)
		_ = dst.SetLinger(0)
		src.Close()
		dst.Close()
		return
	}
	_ = dst.CloseWrite()
}

func (p *pair) move(dst, src *net.TCPConn) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	full := 0
	for {
		var n int
		var held *[]byte
		var opErr error
		err := raw.Read(func(fd uintptr) bool {
			held = p.buffers.Get().(*[]byte)
			n, opErr = unix.Read(int(fd), *held)
			if opErr == unix.EAGAIN {
				p.buffers.Put(held)
				return false
			}
			return true
		})
		if err = errors.Join(err, opErr); err == nil && n > 0 {
			_, err = dst.Write((*held)[:n])
		}
		size := len(*held)
		p.buffers.Put(held)
		if err != nil || n == 0 {
			return err
		}
		if full++; n < size {
			full = 0
		}
		if full >= 2 {
			// Bulk: a splice of so much at a time, and then a look at whether
			// there is more, without holding a pipe.
			full = 1
			const most = 16 << 20
			k, err := dst.ReadFrom(&io.LimitedReader{R: src, N: most})
			if err != nil || k < most {
				return err
			}
		}
	}
}
