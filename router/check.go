package router

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"wayout/netcfg"
	"wayout/router/config"
)

// ErrNoAddress: without a configuration the daemon goes by the host's global
// addresses, and there are none.
var ErrNoAddress = errors.New("no configuration, and the host has no global address to make a path of")

// FindConfig makes a configuration out of what the host has: a path for each
// global address.
func FindConfig() (*config.Config, error) {
	s, err := netcfg.Read()
	if err != nil {
		return nil, fmt.Errorf("read the host's addresses: %w", err)
	}
	// An address without a way out makes no path.
	addrs := slices.DeleteFunc(s.GlobalAddrs(), func(a netip.Addr) bool {
		f, other := netcfg.IPv4, netcfg.IPv6
		if a.Is6() {
			f, other = other, f
		}
		return !s.DefaultRoute(f) && s.DefaultRoute(other)
	})
	if len(addrs) == 0 {
		return nil, ErrNoAddress
	}
	return config.Default(addrs), nil
}

// CheckConfig builds all that a configuration asks for, and lets it go again:
// it finds the mistakes that can only be seen in doing so.
func CheckConfig(c *config.Config) error {
	r, err := newRouter(Options{Config: c, Stderr: io.Discard}, nil, nil)
	if err != nil {
		return err
	}
	return r.plan.close(nil)
}

// CheckHost says what the host lacks for a configuration, a sentence each. It
// changes nothing.
func CheckHost(c *config.Config) ([]string, error) {
	s, err := netcfg.Read()
	if err != nil {
		return nil, fmt.Errorf("read the host's state: %w", err)
	}
	var found []string
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	if may, err := Privileged(); err != nil {
		return nil, err
	} else if !may {
		say("CAP_NET_ADMIN is missing: sockets cannot be marked (run as root)")
	}
	managed := map[string]string{} // uplink -> its interface
	devices := map[string]string{}
	for _, u := range c.Uplinks {
		devices[u.Name] = u.Interface
		if u.ManageAddresses {
			managed[u.Name] = u.Interface
		}
		if l, ok := s.Link(u.Interface); !ok {
			say("uplink %s: interface %s does not exist", u.Name, u.Interface)
		} else if !l.Up {
			say("uplink %s: %s", u.Name, l.Reason)
		}
	}
	for _, e := range c.Escapers {
		for _, n := range e.Nodes {
			if n.Interface != "" {
				if l, ok := s.Link(n.Interface); !ok {
					say("path %s/%s: interface %s does not exist", e.Name, n.ID, n.Interface)
					continue
				} else if !l.Up {
					say("path %s/%s: %s", e.Name, n.ID, l.Reason)
					continue
				}
			}
			if managed[n.Uplink] != "" {
				continue // wayout puts the address there itself
			}
			device := n.Interface
			if device == "" {
				device = devices[n.Uplink]
			}
			for _, a := range []netip.Addr{n.IPv4, n.IPv6} {
				if !a.IsValid() {
					continue
				}
				if state, reason := s.Has(a, device); state != netcfg.Present {
					say("path %s/%s: %s", e.Name, n.ID, reason)
				}
			}
		}
	}
	return found, nil
}

// Privileged says whether this process may do what the daemon has to: mark
// sockets and change the network (CAP_NET_ADMIN).
func Privileged() (bool, error) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false, fmt.Errorf("read the capabilities: %w", err)
	}
	return data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0, nil
}
