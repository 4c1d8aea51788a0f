package main_test

import (
	"os"
	"testing"

	"wayout/scripts/lab"
)

// newDiverting gives one daemon twice: as a proxy that is asked by CONNECT, and as
// the gateway of clients that know nothing of it.
func newDiverting(b *testing.B) (asked, diverted *crowd) {
	b.Helper()
	asked = newCrowd(b, 16, "")
	f, err := os.OpenFile(asked.config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	_, err = f.WriteString("  - {name: lan, type: tproxy, interface: lan0, divert: [tcp/*], escaper: out}\n")
	if err := f.Close(); err != nil {
		b.Error(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { // when the daemon has ended
		path, err := plain()
		if err != nil {
			b.Fatal(err)
		}
		clean, err := asked.Host.Start(lab.Program{Path: path, Args: []string{"clean", "--config", asked.config}})
		if err == nil {
			err = clean.Wait()
		}
		if err != nil {
			b.Errorf("clean: %v", err)
		}
	})
	asked.sink()
	asked.start()
	other := *asked
	other.divert = true
	return asked, &other
}

// BenchmarkDivertedConnect reports what a diverted connection costs: ratios to a
// tunnel by CONNECT of the same daemon.
func BenchmarkDivertedConnect(b *testing.B) {
	asked, diverted := newDiverting(b)
	compare(b, "diverted/connect", asked, diverted, connects, 10)
}

// BenchmarkDivertedBulk is the same for bytes in bulk.
func BenchmarkDivertedBulk(b *testing.B) {
	asked, diverted := newDiverting(b)
	compare(b, "diverted/connect", asked, diverted, load{workers: 1, bytes: 128 << 20}, 10)
}
