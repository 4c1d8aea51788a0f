package router_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router"
	"wayout/router/config"
	"wayout/scripts/lab"
)

// daemon is a Router that runs in a namespace of its own, with one interface,
// eth0, and answers to Publish.
type daemon struct {
	*router.Router
	tb testing.TB
}

func runDaemon(tb testing.TB, yaml string) *daemon {
	tb.Helper()
	host, beyond := lab.TestNS(tb, "host"), lab.TestNS(tb, "beyond")
	if err := lab.Veth(host, "eth0", beyond, "eth0"); err != nil {
		tb.Fatal(err)
	}
	dir := tb.TempDir()
	c, err := config.Loader{}.Parse("bench.yaml", []byte(fmt.Sprintf("control: {socket: %s}\n%s", filepath.Join(dir, "c.sock"), yaml)))
	if err != nil {
		tb.Fatal(err)
	}
	ready := make(chan struct{})
	r, err := router.New(router.Options{Config: c, Stderr: io.Discard, Notify: func(state string) {
		if state == "READY=1" {
			close(ready)
		}
	}})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- host.Do(func() error { return r.Run(ctx, ctx) }) }()
	select {
	case <-ready:
	case err := <-ended:
		stop()
		tb.Fatal(errors.Join(errors.New("the daemon ended"), err))
	}
	tb.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			tb.Error(err)
		}
	})
	return &daemon{r, tb}
}

func (d *daemon) publish(nodes []string) {
	d.tb.Helper()
	if n, err := d.Publish("dyn", []byte("["+strings.Join(nodes, ",\n")+"]")); err != nil || n != len(nodes) {
		d.tb.Fatal(n, err)
	}
}

// published are so many nodes, as a publication lists them.
func published(first string, n int) []string {
	list := make([]string, n)
	at := netip.MustParseAddr(first)
	for i := range list {
		list[i] = fmt.Sprintf(`{"ip": %q, "id": "n-%s", "uplink": "isp1"}`, at, at)
		at = at.Next()
	}
	return list
}

// cpu is what the process has used of the cores, the kernel's work for it
// included.
func cpu(tb testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

const benchUplink = "uplink: [{name: isp1, interface: eth0, manage_addresses: %s}]\n"

// BenchmarkPublish publishes by a whole daemon, whose kernel's part is real. It
// needs root. cpu-ms/op is the process's time on all cores, with that of what
// follows from the kernel's events.
func BenchmarkPublish(b *testing.B) {
	lab.Require(b)
	dyn := "escaper:\n  - {name: dyn, type: direct_float}\n"
	measure := func(b *testing.B, publish func(round int)) {
		b.Helper()
		begun, round := cpu(b), 0
		for b.Loop() {
			round++
			publish(round)
		}
		b.ReportMetric(float64((cpu(b)-begun).Microseconds())/1000/float64(b.N), "cpu-ms/op")
	}
	for _, manage := range []string{"on", "off"} {
		b.Run("first 10000/addresses "+manage, func(b *testing.B) {
			all := published("198.18.0.1", 10_000)
			for b.Loop() {
				b.StopTimer()
				d := runDaemon(b, fmt.Sprintf(benchUplink, manage)+dyn)
				begun := cpu(b)
				b.StartTimer()
				d.publish(all)
				b.ReportMetric(float64((cpu(b)-begun).Microseconds())/1000, "cpu-ms/op")
			}
		})
		b.Run("10 of 10000/addresses "+manage, func(b *testing.B) {
			d := runDaemon(b, fmt.Sprintf(benchUplink, manage)+dyn)
			all := published("198.18.0.1", 10_000)
			d.publish(all)
			measure(b, func(round int) {
				d.publish(append(all[10:len(all):len(all)], published(fmt.Sprintf("198.19.%d.1", round%250), 10)...))
			})
		})
	}
	b.Run("10 of 10000/proxies", func(b *testing.B) {
		d := runDaemon(b, "escaper:\n  - {name: dyn, type: proxy_float}\n  - {name: out, type: direct_fixed, bind_ip: 192.0.2.1}\n")
		peers := func(first string, n int) []string {
			list := published(first, n)
			for i := range list {
				list[i] = fmt.Sprintf(`{"type": "http", "username": "u", "password": "p", "path": "out/192.0.2.1", "addr": "%d.proxy.example:3128", "id": %s`, i, strings.Split(strings.SplitN(list[i], `"id": `, 2)[1], ",")[0]+"}")
			}
			return list
		}
		all := peers("198.18.0.1", 10_000)
		d.publish(all)
		measure(b, func(round int) {
			d.publish(append(all[10:len(all):len(all)], peers(fmt.Sprintf("198.19.%d.1", round%250), 10)...))
		})
	})
	b.Run("10 beside 65000", func(b *testing.B) {
		d := runDaemon(b, fmt.Sprintf(benchUplink, "on")+dyn+"  - {name: out, type: direct_fixed, nodes: [{ipv4: 10.0.0.1-10.0.253.232}]}\n")
		measure(b, func(round int) { d.publish(published(fmt.Sprintf("198.19.%d.1", round%250), 10)) })
	})
}
