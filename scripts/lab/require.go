package lab

import (
	"os"
	"testing"
)

// Require lets a live test run only where it can: it needs root, for
// namespaces and eBPF. Elsewhere the test is skipped, or fails when
// WAYOUT_TEST_LIVE=1 says that this machine is meant to run it.
func Require(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("WAYOUT_TEST_LIVE") == "1" {
		tb.Fatal("live test: WAYOUT_TEST_LIVE=1, but not root")
	}
	tb.Skip("live test: needs root")
}

// TestNS makes a namespace for the length of a test.
func TestNS(tb testing.TB, name string) *NS {
	tb.Helper()
	Require(tb)
	n, err := NewNS(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := n.Close(); err != nil {
			tb.Errorf("close namespace %s: %v", name, err)
		}
	})
	return n
}

// Missing reports that a program which a live test needs is not installed:
// the test is skipped, or fails when WAYOUT_TEST_LIVE=1.
func Missing(tb testing.TB, program string) {
	tb.Helper()
	if os.Getenv("WAYOUT_TEST_LIVE") == "1" {
		tb.Fatalf("live test: %s is not installed", program)
	}
	tb.Skipf("live test: needs %s", program)
}
