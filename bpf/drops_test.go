package bpf

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestDivertDrops: what is dropped for want of a socket counts by interface, over
// the ends of Diverters, for as long as the interface is of interest.
func TestDivertDrops(t *testing.T) {
	w := newDivertWorld(t)
	drops := func() map[uint32]DivertDrops {
		t.Helper()
		m, err := w.d.Drops()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := drops(); len(m) != 0 {
		t.Errorf("before the first Set: %v", m)
	}
	w.set()
	if m := drops(); len(m) != 1 || m[w.lan] != (DivertDrops{}) {
		t.Errorf("with nothing dropped: %v, lan0 is %d", m, w.lan)
	}
	w.tcp4.Close()
	w.tcp6.Close()
	if err := w.d.Close(); err != nil {
		t.Fatal(err)
	}
	w.wants("without sockets", map[string]string{"203.0.113.99:443": "nobody", "[2001:db8:9::9]:443": "nobody"})
	// A daemon that was killed while it pinned.
	left := filepath.Join(w.dir, pinDrops+"-new")
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.dir, pinDrops), nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := m.Clone() // which knows of no pin
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Pin(left), again.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	w.open()
	if _, err := os.Lstat(left); !os.IsNotExist(err) {
		t.Errorf("the unfinished pin is still there: %v", err)
	}
	before := drops()[w.lan]
	if before.Unserved < 2 || before.Fragments != 0 {
		t.Errorf("two connections found no socket: %+v", before)
	}
	w.set()
	if m := drops(); m[w.lan] != before {
		t.Errorf("after another Set %+v, before %+v", m[w.lan], before)
	}
	w.do(func() error {
		return w.d.Set(Diversion{
			Entries: []DivertEntry{{Prefix: netip.MustParsePrefix("10.0.0.0/30"), Protocol: unix.IPPROTO_TCP, First: 440, Last: 450}},
			Sockets: []DivertSockets{{}},
		})
	})
	w.wants("a prefix without a socket", map[string]string{"10.0.0.1:443": "nobody"})
	if m := drops(); len(m) != 1 || m[0].Unserved == 0 {
		t.Errorf("for a prefix alone: %v", m)
	}
	if err := w.d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := CleanDivert(w.dir, w.in); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(w.dir); !os.IsNotExist(err) {
		t.Errorf("the directory of pins is still there: %v", err)
	}
}
