package bpf

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// compare runs rounds of the same work without and with the programs, turn by
// turn: this process moves between the leaf and the cgroup above, and a socket
// belongs to where it was made. It reports the medians and that of the ratios
// of each round.
func compare(b *testing.B, w *wire, unit string, work func() (rate, cpu float64)) {
	b.Helper()
	var rates, ratios, cpus []float64
	first := 0
	round := func() (rate, cpu [2]float64) {
		first = 1 - first // each goes first in half of the rounds
		for _, with := range []int{first, 1 - first} {
			dir := w.leaf.parent
			if with == 1 {
				dir = w.leaf.Path()
			}
			must(b, join(dir))
			rate[with], cpu[with] = work()
		}
		must(b, join(w.leaf.Path()))
		return rate, cpu
	}
	round() // warm
	for b.Loop() {
		rate, cpu := round()
		rates = append(rates, rate[1])
		ratios = append(ratios, rate[1]/rate[0])
		cpus = append(cpus, cpu[1]/cpu[0])
	}
	b.ReportMetric(median(rates), unit)
	b.ReportMetric(median(ratios), "of-rate-without")
	b.ReportMetric(median(cpus), "of-CPU-without")
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// cpuTime is what this process, which is both ends of the wire, has used.
func cpuTime(b *testing.B) time.Duration {
	var r unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkConnect is the price of the programs for connections that carry
// nothing.
func BenchmarkConnect(b *testing.B) {
	w := newWire(b)
	w.load(b, Options{Paths: 1})
	m := int(mark(b, w.layout, ClassPath, 1, 1))
	src := unix.SockaddrInet4{Addr: netip.MustParseAddr(right4).As4()}
	dst := unix.SockaddrInet4{Addr: netip.MustParseAddr(far4).As4(), Port: tcpPort}
	connect := func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, err := range []error{
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, m),
			unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
			// Ends by a reset: no port waits in TIME_WAIT.
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
			unix.Bind(fd, &src),
			unix.Connect(fd, &dst),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	}
	compare(b, w, "connects/s", func() (float64, float64) {
		const n = 200
		start, used := time.Now(), cpuTime(b)
		must(b, w.host.Do(func() error {
			for range n {
				if err := connect(); err != nil {
					return err
				}
			}
			return nil
		}))
		return n / time.Since(start).Seconds(), float64(cpuTime(b) - used)
	})
}

// BenchmarkBulk is their price for one connection that sends all it can.
func BenchmarkBulk(b *testing.B) {
	w := newWire(b)
	w.load(b, Options{Paths: 1})
	m := mark(b, w.layout, ClassPath, 1, 1)
	const size = 256 << 20
	block := make([]byte, 256<<10)
	b.SetBytes(2 * size)
	compare(b, w, "MB/s", func() (float64, float64) {
		c, err := w.dial(ask{network: "tcp4", src: right4, mark: m}, 0)
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
