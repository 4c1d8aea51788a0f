package bpf

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plainly is what any program does: a socket, a connect, nothing else.
func plainly(to unix.Sockaddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Ends by a reset: no port waits in TIME_WAIT.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	return unix.Connect(fd, to)
}

// BenchmarkPinnedConnect is the price of a pin for connections that carry
// nothing.
func BenchmarkPinnedConnect(b *testing.B) {
	s := newPinScene(b, bpffs(b))
	to := &unix.SockaddrInet4{Addr: netip.MustParseAddr(far4).As4(), Port: tcpPort}
	compare(b, s.wire, "connects/s", func() (float64, float64) {
		const n = 200
		start, used := time.Now(), cpuTime(b)
		must(b, s.host.Do(func() error {
			for range n {
				if err := plainly(to); err != nil {
					return err
				}
			}
			return nil
		}))
		return n / time.Since(start).Seconds(), float64(cpuTime(b) - used)
	})
}

// BenchmarkPinnedBulk is its price for one connection that sends all it can.
func BenchmarkPinnedBulk(b *testing.B) {
	s := newPinScene(b, bpffs(b))
	const size = 256 << 20
	block := make([]byte, 256<<10)
	b.SetBytes(2 * size)
	compare(b, s.wire, "MB/s", func() (float64, float64) {
		c, err := s.dial(ask{network: "tcp4"}, 0)
		must(b, err)
		defer c.Close()
		_, err = fmt.Fprintf(c, "%d 1\n", size)
		must(b, err)
		start, used := time.Now(), cpuTime(b)
		for range size / len(block) {
			_, err := c.(*net.TCPConn).Write(block)
			must(b, err)
		}
		_, err = io.ReadFull(c, make([]byte, 1))
		must(b, err)
		return size / 1e6 / time.Since(start).Seconds(), float64(cpuTime(b) - used)
	})
}

// BenchmarkPin is how long it takes to pin a cgroup and to let it go.
func BenchmarkPin(b *testing.B) {
	s := newPinScene(b, bpffs(b))
	must(b, s.pin.Remove())
	for b.Loop() {
		pin, err := s.progs.Pin(s.leaf.Path(), s.dir, nil, s.exit(b, 1))
		must(b, err)
		must(b, pin.Remove())
	}
}
