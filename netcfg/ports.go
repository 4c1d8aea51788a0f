package netcfg

import (
	"context"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// PortUse is how many local ports of an address are taken: by TCP for one target,
// where a port serves one connection, the time after it included; by UDP for all
// targets together.
type PortUse struct {
	Mark     uint32 // of the sockets, all bits of it
	Source   netip.Addr
	Target   netip.AddrPort // the zero AddrPort: by UDP
	InUse    int            // by sockets and by what is being closed
	TimeWait int            // besides: what is kept after a connection
}

// Total is the number of ports taken.
func (u PortUse) Total() int { return u.InUse + u.TimeWait }

// CountPorts counts the ports that sockets with a mark have taken, for each mark,
// source and target where there are at least so many. It lists all of those
// sockets, in about a microsecond each, and is otherwise as CountSockets. On a kernel
// without CONFIG_INET_UDP_DIAG those of UDP are not counted.
func (k *Netlink) CountPorts(ctx context.Context, m Mark, least int) ([]PortUse, error) {
	if err := m.usable(); err != nil {
		return nil, err
	}
	d, err := k.openDiag()
	if err != nil {
		return nil, err
	}
	defer d.close()
	type key struct {
		mark   uint32
		source netip.Addr
		target netip.AddrPort
	}
	taken := map[key]*PortUse{}
	count := func(s tcpSocket, local netip.Addr, remote netip.AddrPort) {
		at := key{s.mark, local, remote}
		u := taken[at]
		if u == nil {
			u = &PortUse{Mark: s.mark, Source: local, Target: remote}
			taken[at] = u
		}
		if s.state == TimeWait {
			u.TimeWait++
		} else {
			u.InUse++
		}
	}
	err = d.each(ctx, m.choice(), func(s tcpSocket) {
		if s.state != Listen {
			local, remote := s.ends()
			count(s, local.Addr(), remote)
		}
	})
	if err == nil {
		err = d.each(ctx, m.choice().udp(), func(s tcpSocket) {
			local, _ := s.ends()
			count(s, local.Addr(), netip.AddrPort{})
		})
		if errors.Is(err, unix.ENOENT) {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	var list []PortUse
	for _, u := range taken {
		if u.Total() >= least {
			list = append(list, *u)
		}
	}
	return list, nil
}
