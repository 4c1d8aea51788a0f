package lab

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Traffic is a number of packets and their bytes, IP headers included.
type Traffic struct{ Packets, Bytes uint64 }

// Add counts one packet.
func (t *Traffic) Add(length int) {
	t.Packets++
	t.Bytes += uint64(length)
}

// Plus is the sum of two.
func (t Traffic) Plus(o Traffic) Traffic {
	return Traffic{t.Packets + o.Packets, t.Bytes + o.Bytes}
}

// Minus is what t has more than o.
func (t Traffic) Minus(o Traffic) Traffic {
	return Traffic{t.Packets - o.Packets, t.Bytes - o.Bytes}
}

// ethernetHeader is what an interface counts of each packet beside IP.
const ethernetHeader = 14

// Truth is what an interface itself has counted since it was made, less the
// Ethernet headers.
func (n *NS) Truth(link string) (in, out Traffic, err error) {
	l, err := n.nl.LinkByName(link)
	if err != nil {
		return in, out, fmt.Errorf("interface %s in %s: %w", link, n.Name, err)
	}
	s := l.Attrs().Statistics
	in = Traffic{s.RxPackets, s.RxBytes - ethernetHeader*s.RxPackets}
	out = Traffic{s.TxPackets, s.TxBytes - ethernetHeader*s.TxPackets}
	return in, out, nil
}

// WholePackets makes an interface send no packets that stand for several (GSO),
// so that its counters and captures have the packets of a wire.
func (n *NS) WholePackets(link string) error {
	l, err := n.nl.LinkByName(link)
	if err != nil {
		return fmt.Errorf("interface %s in %s: %w", link, n.Name, err)
	}
	if err := n.nl.LinkSetGSOMaxSegs(l, 1); err != nil {
		return fmt.Errorf("interface %s in %s: segmentation off: %w", link, n.Name, err)
	}
	return nil
}

// DelLink deletes an interface; of a pair, both.
func (n *NS) DelLink(link string) error { return n.onLink(link, n.nl.LinkDel) }

// TCPCounter gives one of the namespace's own counters of TCP, by its name in
// /proc/net/snmp (RFC 4022), for example RetransSegs.
func (n *NS) TCPCounter(name string) (uint64, error) {
	var v uint64
	err := n.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			switch {
			case len(f) == 0 || f[0] != "Tcp:":
			case names == nil:
				names = f
			default:
				for i, found := range names {
					if found == name && i < len(f) {
						v, err = strconv.ParseUint(f[i], 10, 64)
						return err
					}
				}
			}
		}
		return fmt.Errorf("not in %q", names)
	})
	if err != nil {
		return 0, fmt.Errorf("counter %s of TCP in %s: %w", name, n.Name, err)
	}
	return v, nil
}
