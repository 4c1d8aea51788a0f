package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"wayout/router/resolve"
)

// resolverVerb is the command by which exec runs the name server of its command,
// in the command's cgroup.
const resolverVerb = "exec-resolver"

// namePort is where the C library asks; resolv.conf(5) cannot say another.
const namePort = 53

// nameAddrs is how many addresses are tried before the port is taken for used up.
const nameAddrs = 50

// serveNames answers on a loopback address of its own, which it prints, by asking
// the servers that are its arguments.
func serveNames(e *env, args []string) error {
	f := &resolve.Forwarder{Dial: new(net.Dialer).DialContext}
	for _, a := range args {
		s, err := netip.ParseAddrPort(a)
		if err != nil {
			return usageError("%s: %s", resolverVerb, err)
		}
		f.Servers = append(f.Servers, s)
	}
	u, l, err := listenNames()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(e.stdout, u.LocalAddr().(*net.UDPAddr).AddrPort().Addr()); err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- f.ServeUDP(u) }()
	go func() { failed <- f.ServeTCP(l) }()
	return <-failed
}

// listenNames finds a loopback address whose port 53 is free: others may have
// 127.0.0.1 or 127.0.0.53.
func listenNames() (*net.UDPConn, *net.TCPListener, error) {
	var last error
	for range nameAddrs {
		var b [2]byte
		_, _ = rand.Read(b[:]) // never fails
		a := netip.AddrFrom4([4]byte{127, 80 + b[0]%64, b[1], 53})
		u, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, namePort)))
		if err != nil {
			last = err
			continue
		}
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err := lc.Listen(context.Background(), "tcp4", netip.AddrPortFrom(a, namePort).String())
		if err == nil {
			return u, l.(*net.TCPListener), nil
		}
		last = errors.Join(err, u.Close())
	}
	if errors.Is(last, unix.EADDRINUSE) {
		last = fmt.Errorf("a name server of this host listens on all addresses: %w", last)
	}
	return nil, nil, last
}
