package bpf

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// TestDivertFull: the kernel's verifier takes as many entries as there may be,
// whatever they are.
func TestDivertFull(t *testing.T) {
	lab.Require(t)
	protocol := func(i int) uint8 { return []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP}[i%2] }
	behind := func(i int) DivertEntry {
		return DivertEntry{Interface: uint32(2 + i), Protocol: protocol(i), First: uint16(i), Last: uint16(i), Server: i % 64}
	}
	prefix := func(i int) DivertEntry {
		p := netip.MustParsePrefix([]string{"10.0.0.0/8", "2001:db8::/48", "0.0.0.0/0", "::/0"}[i/3%4])
		return DivertEntry{Prefix: p, Protocol: protocol(i / 2), First: uint16(i), Last: uint16(2 * i), Server: i % 64}
	}
	for name, entry := range map[string]func(i int) DivertEntry{
		"a port of each interface": behind,
		"one port of interfaces": func(i int) DivertEntry {
			e := behind(i)
			e.First, e.Last = 443, 443
			return e
		},
		"all ports of interfaces": func(i int) DivertEntry {
			e := behind(i)
			e.First, e.Last = 0, AnyPort
			return e
		},
		"ports of one interface": func(i int) DivertEntry {
			e := behind(i)
			e.Interface = 2
			return e
		},
		"interfaces to come": func(i int) DivertEntry {
			e := behind(i)
			e.Interface, e.Absent = 0, true
			return e
		},
		"prefixes": prefix,
		"prefixes, then interfaces": func(i int) DivertEntry {
			if i < MaxDivertEntries/2 {
				return prefix(i)
			}
			return behind(i)
		},
		"interfaces, then prefixes": func(i int) DivertEntry {
			if i < MaxDivertEntries/2 {
				return behind(i)
			}
			return prefix(i)
		},
		"now this, now that": func(i int) DivertEntry {
			if i%3 == 0 {
				return prefix(i)
			}
			return behind(i)
		},
	} {
		v := Diversion{Sockets: make([]DivertSockets, 64), Mark: 1, Mask: 0xff}
		for i := range MaxDivertEntries {
			v.Entries = append(v.Entries, entry(i))
		}
		var entries [MaxDivertEntries]divertEntry
		for i, e := range v.Entries {
			entries[i] = e.encode()
		}
		for _, byInterface := range []bool{tellsInterface(), false} {
			o, err := loadEntries(v, entries, nil, byInterface)
			if err != nil {
				t.Errorf("%s, told apart %v: %v", name, byInterface, err)
				continue
			}
			if err := o.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
