package router

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/selection"
)

// peers lists the paths of an escaper whose nodes are next-hop proxies: those of
// the configuration, or those that are published, in their order.
func (p *plan) peers(e *config.Escaper) ([]escaper.NodeOptions, error) {
	authorities := escaper.NewAuthorities()
	nodes := make([]escaper.NodeOptions, 0, len(e.Peers))
	add := func(n *config.Peer, po escaper.PeerOptions) error {
		po.Addr, po.Username, po.Password, po.Timeout = n.Addr, n.Username, n.Password, e.HandshakeTimeout
		o, err := p.local(n.Path)
		if err == nil {
			o.Peer, err = escaper.NewPeer(po, authorities)
		}
		if err != nil {
			return fmt.Errorf("node %s: %w", n.ID, err)
		}
		o.ID, o.Weight, o.EIP = n.ID, n.Weight, n.EIP
		nodes = append(nodes, o)
		return nil
	}
	for i := range e.Peers {
		po := escaper.PeerOptions{Kind: e.Type, SelectionHeader: e.PeerSelectionHeader, TLSName: e.TLSName, TLSCA: e.TLSCA}
		if err := add(&e.Peers[i], po); err != nil {
			return nil, err
		}
	}
	if !e.Float() {
		return nodes, nil
	}
	published := p.published[e.Name].peers
	for i := range published {
		n := &published[i]
		po := escaper.PeerOptions{Kind: n.Kind}
		if n.Kind != "proxy_socks5" {
			po.SelectionHeader = e.PeerSelectionHeader
		}
		if n.Kind == "proxy_https" {
			po.TLSName, po.TLSCA = cmp.Or(n.TLSName, e.TLSName), authoritiesOf(e, n)
		}
		if err := add(&n.Peer, po); err != nil {
			return nil, err
		}
		last := &nodes[len(nodes)-1]
		last.Expire, last.Labels = n.Expire, n.Labels
	}
	return nodes, nil
}

// authoritiesOf is the file of those that may have signed a proxy's certificate.
func authoritiesOf(e *config.Escaper, n *config.PublishedPeer) string {
	return cmp.Or(n.TLSCA, e.TLSCA)
}

// fitPeers is fits for proxies.
func (p *plan) fitPeers(e *config.Escaper, published []config.PublishedPeer) error {
	authorities := escaper.NewAuthorities()
	var errs []error
	for i := range published {
		n := &published[i]
		if _, err := p.local(n.Path); err != nil {
			errs = append(errs, fmt.Errorf("node %d: path: %w", i+1, err))
		}
		if file := authoritiesOf(e, n); n.Kind == "proxy_https" && file != "" {
			if err := authorities.Read(file); err != nil {
				errs = append(errs, fmt.Errorf("node %d: tls_ca: %w", i+1, err))
			}
		}
	}
	return errors.Join(errs...)
}

// local is what the sockets to a next-hop proxy are bound to: what those of a path
// ("out/fra-2") are or, without one, what the host's main routing has them be.
func (p *plan) local(path string) (escaper.NodeOptions, error) {
	if path == "" {
		return escaper.NodeOptions{AnySource: true, Unbound: selection.V4 | selection.V6}, nil
	}
	name, _, _ := strings.Cut(path, "/")
	switch e := findEscaper(p.config, name); {
	case e == nil:
		return escaper.NodeOptions{}, fmt.Errorf("there is no path %s", path)
	case e.Type != "direct_fixed":
		return escaper.NodeOptions{}, fmt.Errorf("want a path of a direct_fixed, and %s is a %s", name, e.Type)
	}
	if p.table != nil { // of the plan in force, whose configuration has no nodes
		at := p.table.Path(path)
		if at == nil {
			return escaper.NodeOptions{}, fmt.Errorf("there is no path %s", path)
		}
		return escaper.NodeOptions{
			V4: at.V4, V6: at.V6, Net4: at.Net4, Net6: at.Net6, Unbound: at.Unbound,
			Interface: at.Interface, BindToDevice: at.BindToDevice, Uplink: at.Uplink,
		}, nil
	}
	if p.fixed == nil {
		p.fixed = map[string]*config.Node{}
		for i := range p.config.Escapers {
			e := &p.config.Escapers[i]
			for j := range e.Nodes {
				p.fixed[e.Name+"/"+e.Nodes[j].ID] = &e.Nodes[j]
			}
		}
	}
	n := p.fixed[path]
	if n == nil {
		return escaper.NodeOptions{}, fmt.Errorf("there is no path %s", path)
	}
	return p.node(n), nil
}
