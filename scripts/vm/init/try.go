package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
)

// version is what a kernel's release begins with.
type version struct{ major, minor int }

// Floors of the documentation.
func all() version { return version{5, 15} }

func (v version) before(o version) bool {
	return v.major < o.major || v.major == o.major && v.minor < o.minor
}

// release is a kernel's name for itself.
type release string

func kernel() (release, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	return release(unix.ByteSliceToString(u.Release[:])), nil
}

func (r release) version() (v version, err error) {
	if _, err := fmt.Sscanf(string(r), "%d.%d", &v.major, &v.minor); err != nil {
		return v, fmt.Errorf("release %q: %w", r, err)
	}
	return v, nil
}

// tryAll tries each object and wants of each what is documented: that it works
// from the floor on.
func tryAll(r release) error {
	v, err := r.version()
	if err != nil {
		return err
	}
	var errs []error
	more := []bpf.Feature{bpf.ProbeResponder(netcfg.TryIngress), bpf.ProbeDivert(), bpf.ProbeFragments(netcfg.TryIngress)}
	for _, f := range append(bpf.Probe(), more...) {
		if f.OK {
			tell("probe: %s (%s): yes", f.Name, f.Since)
		} else {
			tell("probe: %s (%s): no: %s", f.Name, f.Since, explain(f.Err))
		}
	}
	for _, f := range more {
		if !f.OK && !v.before(all()) {
			errs = append(errs, fmt.Errorf("the probe for %q is wrong", f.Name))
		}
	}
	ports, err := tryPorts()
	if err != nil {
		return err
	}
	tell("local ports of a socket with a range of its own: %s", ports)
	in, err := netcfg.Open(netcfg.Options{})
	if err != nil {
		return err
	}
	defer in.Close()
	for _, one := range []struct {
		name string
		try  func() error
	}{
		{"counters and guard", tryGuard},
		{"pins", tryPin},
		{"responder", func() error { return tryResponder(in) }},
		{"diverter", func() error { return tryDiverter(in) }},
	} {
		err := one.try()
		switch {
		case err == nil:
			tell("%s: works", one.name)
		case v.before(all()):
			tell("%s: fails, which nobody has promised otherwise below %d.%d: %s", one.name, all().major, all().minor, explain(err))
		default:
			tell("%s: fails: %s", one.name, explain(err))
			errs = append(errs, fmt.Errorf("%s: promised from %d.%d on", one.name, all().major, all().minor))
		}
	}
	return errors.Join(errs...)
}

// explain gives an error, and below it all of the verifier's log where one is in
// its chain: that is formatted by the error which holds it alone.
func explain(err error) string {
	text := err.Error()
	for e := err; e != nil; e = errors.Unwrap(e) {
		if log := fmt.Sprintf("%+v", e); log != e.Error() {
			return text + "\n" + log
		}
	}
	return text
}

const paths = 10

func layout() (bpf.Layout, error) { return bpf.NewLayout(bpf.DefaultMask) }

// tryGuard has a connection leave by its path's address and one by another's.
func tryGuard() (err error) {
	l, err := layout()
	if err != nil {
		return err
	}
	leaf, err := bpf.MakeLeaf("wayout-vm")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, leaf.Remove()) }()
	progs, err := bpf.Load(bpf.Options{Layout: l, Paths: paths, Cgroup: leaf.Path(), PinDir: "/sys/fs/bpf/wayout-vm"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, progs.Close()) }()
	const num = 7
	right, wrong := netip.MustParseAddr("127.0.0.7"), netip.MustParseAddr("127.0.0.8")
	if err := progs.SetPath(num, bpf.Guard{V4: netip.PrefixFrom(right, 32)}); err != nil {
		return err
	}
	mark, err := l.Mark(bpf.ClassPath, 0, num)
	if err != nil {
		return err
	}
	if err := connect(mark, right); err != nil {
		return fmt.Errorf("connect from the path's own address: %w", err)
	}
	if err := connect(mark, wrong); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("connect from another address than the path's: %w", err)
	}
	c := progs.Read(num)
	tell("the guard let %d packets pass and refused %d connects; %d connections were made", c.PacketsOut, c.Refused, c.Made)
	if c.PacketsOut == 0 || c.Refused != 1 || c.Made != 1 {
		return fmt.Errorf("counted %+v", c)
	}
	return nil
}

// connect makes a TCP connection to the host itself.
func connect(mark uint32, from netip.Addr) (err error) {
	marked := func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) {
			set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		})
		return errors.Join(err, set)
	}
	ctx := context.Background()
	listen := net.ListenConfig{Control: marked}
	ln, err := listen.Listen(ctx, "tcp4", netip.AddrPortFrom(from, 0).String())
	if err != nil {
		return err
	}
	defer ln.Close()
	dial := net.Dialer{Control: marked, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	c, err := dial.DialContext(ctx, "tcp4", ln.Addr().String())
	if err != nil {
		return err
	}
	return c.Close()
}

// tryPorts says which local ports the kernel takes for connections to one destination.
// Those of one parity come first unless the search by parity is off, and connects get
// slow once they are used up.
func tryPorts() (string, error) {
	const localPortRange = 51 // IP_LOCAL_PORT_RANGE, linux/in.h
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	dial := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}, Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) {
			set = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_IP, localPortRange, 60999<<16|32768),
			)
		})
		return errors.Join(err, set)
	}}
	const connections = 32
	var odd int
	for range connections {
		c, err := dial.Dial("tcp4", ln.Addr().String())
		if errors.Is(err, unix.ENOPROTOOPT) {
			return "cannot have one", nil
		}
		if err != nil {
			return "", err
		}
		defer c.Close()
		odd += c.LocalAddr().(*net.TCPAddr).Port % 2
	}
	if odd == 0 || odd == connections {
		return "of one parity", nil
	}
	return "of both parities", nil
}

func tryPin() (err error) {
	l, err := layout()
	if err != nil {
		return err
	}
	group, err := bpf.MakeGroup()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.End(context.Background())) }()
	progs, err := bpf.LoadTables(bpf.Options{Layout: l, Paths: paths})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, progs.Close()) }()
	mark, err := l.Mark(bpf.ClassPath, 0, 1)
	if err != nil {
		return err
	}
	exit := bpf.Exit{Num: 1, Mark: mark, V4: netip.MustParseAddr("127.0.0.7"), V6: netip.IPv6Loopback(), Device: "lo"}
	pin, err := progs.Pin(group.Path(), "/sys/fs/bpf/wayout-vm-pins/one", []byte("vm"), exit)
	if err != nil {
		return err
	}
	return errors.Join(pin.Point(bpf.Exit{}), pin.Remove())
}

// loopback is the one interface that is always there, and its index.
const loopback = 1

func tryResponder(in bpf.Ingress) error {
	r, err := bpf.NewResponder(bpf.ResponderOptions{
		Interface: loopback, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/64")},
		Ingress:  in, Name: "wayout-vm-neighbours",
	})
	if err != nil {
		return err
	}
	return r.Close()
}

func tryDiverter(in bpf.Ingress) (err error) {
	const dir = "/sys/fs/bpf/wayout-vm-divert"
	d, err := bpf.NewDiverter(dir, in)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close(), bpf.CleanDivert(dir, in)) }()
	return d.Set(bpf.Diversion{
		Entries: []bpf.DivertEntry{{Interface: loopback, Protocol: unix.IPPROTO_TCP, First: 443, Last: 443}},
		Sockets: []bpf.DivertSockets{{}},
	})
}
