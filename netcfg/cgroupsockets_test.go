package netcfg_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
)

// ownCgroup is the ID of the cgroup that this process is in.
func ownCgroup(t *testing.T) uint64 {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	own, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	for m := range strings.Lines(string(mounts)) {
		for l := range strings.Lines(string(own)) {
			path, ok := strings.CutPrefix(strings.TrimSpace(l), "0::")
			if f := strings.Fields(m); ok && f[2] == "cgroup2" {
				var st unix.Stat_t
				must(t, unix.Stat(filepath.Join(f[1], path), &st))
				return st.Ino
			}
		}
	}
	t.Fatal("no cgroup of version 2")
	return 0
}

// TestEndSocketsOfACgroup ends what is not right and belongs to the cgroup; what goes
// to loopback addresses and listeners stay.
func TestEndSocketsOfACgroup(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	own := ownCgroup(t)
	outside := loopback{"outside", unix.AF_INET, netip.MustParseAddr("192.0.2.1")}
	mapped := loopback{"outside, mapped", unix.AF_INET6, netip.MustParseAddr("::ffff:192.0.2.1")}
	rightly := loopback{"rightly", unix.AF_INET, netip.MustParseAddr("192.0.2.2")}
	ip(t, "addr add 192.0.2.1/32 dev lo")
	ip(t, "addr add 192.0.2.2/32 dev lo")
	wrong, right := outside.connect(t, 0), rightly.connect(t, ourMark.Value)
	wrong6, inside := mapped.connect(t, 0), loopbacks()[0].connect(t, 0)
	listener, at := outside.listener(t, 0, 8)
	defer unix.Close(listener)
	var asked []netcfg.Socket
	judge := func(s netcfg.Socket) bool {
		asked = append(asked, s)
		return s.Local == rightly.addr
	}
	if n, err := k.EndSocketsOf(t.Context(), []uint64{own + 1}, judge); n != 0 || err != nil || len(asked) != 0 {
		t.Errorf("of another cgroup: %d ended, error %v, asked %v", n, err, asked)
	}
	// Both ends of a connection are here.
	if n, err := k.EndSocketsOf(t.Context(), []uint64{own + 1, own}, judge); n != 4 || err != nil {
		t.Errorf("%d ended, error %v, asked %v", n, err, asked)
	}
	marked := 0
	for _, s := range asked {
		if s.Local != s.Remote || s.Local != outside.addr && s.Local != rightly.addr || s.Mark != 0 && s.Local != rightly.addr {
			t.Errorf("asked about %+v", s)
		}
		if s.Mark == ourMark.Value {
			marked++
		}
	}
	if marked == 0 {
		t.Errorf("no mark was told: %+v", asked)
	}
	wrong.await("")
	wrong6.await("")
	right.await("ESTAB")
	inside.await("ESTAB")
	if ss(t)[at] != "LISTEN" {
		t.Error("the listener is gone")
	}
}

// TestEndSocketsButOfACgroup spares them, or their listeners, and what is kept of
// sockets whose cgroup is not known.
func TestEndSocketsButOfACgroup(t *testing.T) {
	inNamespace(t)
	k := open(t, netcfg.Options{})
	v4 := loopbacks()[0]
	w := v4.connect(t, ourMark.Value)
	listener, at := v4.listener(t, ourMark.Value, 8)
	defer unix.Close(listener)
	kept := lead((*wire).closeNear, (*wire).closeFar)(t, v4, ourMark.Value)
	kept.await("TIME-WAIT")
	own := ownCgroup(t)
	if n, err := k.EndSocketsBut(t.Context(), ourMark, netcfg.Spare{Cgroups: []uint64{own}}); n != 0 || err != nil {
		t.Errorf("%d ended, error %v", n, err)
	}
	w.await("ESTAB")
	kept.await("TIME-WAIT")
	if n, err := k.EndSocketsBut(t.Context(), ourMark, netcfg.Spare{Cgroups: []uint64{own}, Listeners: true}); n != 2 || err != nil {
		t.Errorf("%d ended, error %v", n, err)
	}
	w.await("")
	kept.await("")
	awaitState(t, at, "LISTEN")
	if n, err := k.EndSocketsBut(t.Context(), ourMark, netcfg.Spare{Cgroups: []uint64{own + 1}}); n != 1 || err != nil {
		t.Errorf("%d ended, error %v", n, err)
	}
	awaitState(t, at, "")
}
