package router

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"wayout/router/auth"
	"wayout/router/config"
	"wayout/router/httpproxy"
	"wayout/router/relay"
	"wayout/router/socks"
	"wayout/selection"
)

// server is a front end with its listeners.
type server struct {
	conf      *config.Server
	front     *relay.Front
	serve     func(*relay.Listener) error
	listeners []*relay.Listener // those of conf.Listen, in order, and of its tap
	tap       tap
}

// openServers builds a plan's front ends and binds their listeners. A listener
// that one of the old servers has is shared with it, so that no connection is
// lost between the two.
func (r *Router) openServers(p *plan, old []*server) ([]*server, error) {
	var all []*server
	for i := range p.config.Servers {
		s, err := r.buildServer(p, &p.config.Servers[i])
		if err != nil {
			return all, fmt.Errorf("server %s: %w", p.config.Servers[i].Name, err)
		}
		all = append(all, s)
		for _, at := range s.conf.Listen {
			l, err := share(old, at)
			if err == nil && l == nil {
				l, err = listenBeside(old, at, p.client)
			}
			if err != nil {
				return all, fmt.Errorf("server %s: %w", s.conf.Name, err)
			}
			s.listeners = append(s.listeners, l)
		}
		if err := r.openTap(p, s, old); err != nil {
			return all, fmt.Errorf("server %s: %w", s.conf.Name, err)
		}
	}
	return all, nil
}

// buildServer makes a front end of the protocols that its type names.
func (r *Router) buildServer(p *plan, sc *config.Server) (*server, error) {
	front := relay.NewFront(relay.FrontOptions{Name: sc.Name, Relay: r.relay, Logger: r.log})
	s := &server{conf: sc, front: front}
	if sc.Type == "tproxy" {
		return s, r.buildTransparent(p, s)
	}
	var web *httpproxy.Server
	var sock *socks.Server
	var err error
	if sc.Type != "socks_proxy" {
		if web, err = r.buildHTTP(p, sc, front); err != nil {
			return nil, err
		}
		s.serve = web.Serve
	}
	if sc.Type != "http_proxy" {
		if sock, err = r.buildSOCKS(p, sc, front); err != nil {
			return nil, err
		}
		s.serve = sock.Serve
	}
	if sc.Type == "mixed_proxy" {
		m := &relay.Mixed{
			Front: front, Idle: sc.PipelineReadIdleTimeout,
			Begin: func(first byte) func(*relay.Task, relay.Accepted) {
				if socks.Speaks(first) {
					return sock.Begin
				}
				return web.Begin
			},
		}
		s.serve = m.Serve
	}
	return s, nil
}

func (r *Router) buildHTTP(p *plan, sc *config.Server, front *relay.Front) (*httpproxy.Server, error) {
	return httpproxy.New(httpproxy.Options{
		Name: sc.Name, Escaper: sc.Escaper, Group: p.groups[sc.UserGroup],
		SelectionHeader: sc.PathSelectionHeader, ReportEgress: sc.ReportEgress,
		UsernameParams: sc.UsernameParams, ServerSelection: serverSelection(sc), Meter: r.meters.of("server "+sc.Name, sc.Limits),
		Limits: httpproxy.Limits{
			Head: sc.ReqHeaderMaxSize, Fields: sc.ReqHeaderMaxCount, Target: sc.ReqTargetMaxSize,
			ResponseHead: sc.RspHeaderMaxSize, ResponseFields: sc.RspHeaderMaxCount,
		},
		Timeouts: httpproxy.Timeouts{
			Idle: sc.PipelineReadIdleTimeout, Head: sc.ReqHeaderRecvTimeout, Auth: sc.AuthTimeout,
			Response: sc.RspHeaderRecvTimeout, Stall: sc.BodyStallTimeout, Write: sc.SendTimeout, TunnelIdle: sc.TunnelIdleTimeout,
		},
		Admit: r.limits.admit, Vet: p.door.Vet, Open: p.door.Open, Relay: r.relay, Front: front, Logger: r.log,
		Observe: observe(r.access, r.counters, r.counters.Server(sc.Name)), Prompt: r.access.log == nil,
	})
}

func (r *Router) buildSOCKS(p *plan, sc *config.Server, front *relay.Front) (*socks.Server, error) {
	open, dropped := r.counters.Server(sc.Name).CountDatagrams()
	return socks.New(socks.Options{
		AssociationsOpen: open, DatagramsDropped: dropped,
		Name: sc.Name, Escaper: sc.Escaper, Group: p.groups[sc.UserGroup],
		Extension: sc.SOCKSExtension, UsernameParams: sc.UsernameParams, ServerSelection: serverSelection(sc),
		Meter: r.meters.of("server "+sc.Name, sc.Limits),
		Timeouts: socks.Timeouts{
			Idle: sc.PipelineReadIdleTimeout, Handshake: sc.ReqHeaderRecvTimeout, Auth: sc.AuthTimeout,
			Write: sc.SendTimeout, TunnelIdle: sc.TunnelIdleTimeout, UDPIdle: sc.UDPIdleTimeout,
		},
		Admit: r.limits.admit, Vet: p.door.Vet, Open: p.door.Open, OpenPacket: p.door.OpenPacket,
		ListenPacket: func(at netip.AddrPort) (*net.UDPConn, error) { return listenPacket(at, p.client) },
		Relay:        r.relay, Front: front, Logger: r.log,
		Observe: observe(r.access, r.counters, r.counters.Server(sc.Name)), Prompt: r.access.log == nil,
	})
}

// serverSelection is what a server selects by itself; nil: nothing.
func serverSelection(sc *config.Server) func(local netip.AddrPort) selection.Layer {
	switch sc.Select.Mode {
	case "map":
		l := sc.Select.Map
		return func(netip.AddrPort) selection.Layer { return l }
	case "ingress_ip":
		return func(local netip.AddrPort) selection.Layer {
			return selection.Layer{{Escaper: sc.Escaper, Value: selection.Address(local.Addr().Unmap())}}
		}
	case "port":
		// Made at load: one layer for each port, of its first place in listen.
		layers := map[uint16]selection.Layer{}
		for i, at := range sc.Listen {
			if _, known := layers[at.Port()]; !known {
				layers[at.Port()] = selection.Layer{{Escaper: sc.Escaper, Value: selection.Index(uint64(i + 1))}}
			}
		}
		place := uint64(len(sc.Listen))
		for _, n := range sc.ListenNets {
			for port := uint32(n.First); port <= uint32(n.Last); port++ {
				place++
				if _, known := layers[uint16(port)]; !known {
					layers[uint16(port)] = selection.Layer{{Escaper: sc.Escaper, Value: selection.Index(place)}}
				}
			}
		}
		return func(local netip.AddrPort) selection.Layer { return layers[local.Port()] }
	}
	return nil
}

// meters are what limits are counted by, under the names of servers and users.
// A reload that leaves limits as they are leaves their counts as they are.
type meters map[string]metered

type metered struct {
	limits config.Limits
	meter  *auth.Meter
}

// of returns the meter for limits; nil when there are none.
func (m *meters) of(name string, l config.Limits) *auth.Meter {
	if l == (config.Limits{}) {
		return nil
	}
	if was, ok := (*m)[name]; ok && was.limits == l {
		return was.meter
	}
	o := auth.Limits{Connections: l.Connections, Bandwidth: l.Bandwidth, BandwidthBurst: relay.Burst(float64(l.Bandwidth) / 8)}
	if l.Rate.Count > 0 {
		o.Rate = float64(l.Rate.Count) / l.Rate.Per.Seconds()
	}
	now := metered{l, auth.NewMeter(o, nil)}
	if *m == nil {
		*m = meters{}
	}
	(*m)[name] = now
	return now.meter
}

// listenBeside opens a listener. The kernel refuses that while an old server listens
// on the port at all addresses and this one at a single one of them, or the other way
// round; the old one lets it by then. It stays bound until the reload has succeeded.
func listenBeside(old []*server, at netip.AddrPort, mark uint32) (_ *relay.Listener, err error) {
	l, err := listenBare(at, mark)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	ours := false
	for _, s := range old {
		for i, o := range s.listeners[:len(s.conf.Listen)] {
			if s.conf.Listen[i].Port() != at.Port() || s.conf.Listen[i] == at {
				continue
			}
			if err := letBy(o, true); err != nil {
				return nil, err
			}
			ours = true
			defer func() { err = errors.Join(err, letBy(o, false)) }()
		}
	}
	if !ours {
		return nil, err
	}
	if l, err = listenBare(at, mark, func(l lender) error { return letBy(l, true) }); err != nil {
		return nil, err
	}
	return l, letBy(l, false)
}

// share gives a second handle of the listener that an old server has at an
// address, nil when none has. Port 0 asks for a port of its own each time.
func share(old []*server, at netip.AddrPort) (*relay.Listener, error) {
	for _, s := range old {
		for i, l := range s.listeners[:len(s.conf.Listen)] {
			if s.conf.Listen[i] != at || at.Port() == 0 {
				continue
			}
			dup, err := l.Share()
			if err != nil {
				return nil, fmt.Errorf("share the listener on %s: %w", at, err)
			}
			return dup, nil
		}
	}
	return nil, nil //nolint:nilnil // documented: nobody listens there
}
