package router

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"

	"wayout/router/config"
	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/selection"
)

// publications are the nodes that were published at run time, by the name of
// their escaper.
type publications map[string]publication

// publication is what was published last for one escaper.
type publication struct {
	kind  string                 // the escaper's type
	text  []byte                 // as it was given, and as the cache file keeps it
	nodes []config.Inline        // of a direct_float
	peers []config.PublishedPeer // of a proxy_float
}

func parsePublication(e *config.Escaper, text []byte) (p publication, err error) {
	p.kind, p.text = e.Type, text
	if e.Proxy() {
		p.peers, err = config.ParsePeers(text)
	} else {
		p.nodes, err = config.ParsePublication(text)
	}
	return p, err
}

// takePublished gives a new plan the nodes that are published: those of the
// plan before, else those of the cache files. A cache file that cannot be read
// is told, and its escaper begins without nodes.
func (r *Router) takePublished(p, prior *plan) {
	p.published = publications{}
	for i := range p.config.Escapers {
		e := &p.config.Escapers[i]
		if !e.Float() {
			continue
		}
		if prior != nil {
			if was, ok := prior.published[e.Name]; ok && was.kind == e.Type {
				p.published[e.Name] = was
				continue
			}
		}
		if e.Cache == "" {
			continue
		}
		was, err := readCache(e)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = p.fits(e, &was)
		}
		if err != nil {
			r.log.Error("published nodes cannot be taken up, the escaper has none", "escaper", e.Name, "cache", e.Cache, "err", err)
			continue
		}
		p.published[e.Name] = was
	}
}

func readCache(e *config.Escaper) (publication, error) {
	text, err := os.ReadFile(e.Cache)
	if err != nil {
		return publication{}, err
	}
	return parsePublication(e, text)
}

// writeCache puts a publication in the place of the one before, whole or not at
// all, also when the machine stops meanwhile. It is for root alone: there may be
// passwords in it.
func writeCache(file string, text []byte) (err error) {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// fits says what keeps nodes from being those of an escaper: an uplink that is
// not configured, an eip that its probes cannot compare with, an ID that the operator's maps give to another address; of
// proxies a path or a file that there is not.
func (p *plan) fits(e *config.Escaper, now *publication) error {
	if e.Proxy() {
		return p.fitPeers(e, now.peers)
	}
	inline := map[string]config.Inline{}
	for _, n := range p.inline(e.Name) {
		inline[n.ID] = n
	}
	var errs []error
	for i, n := range now.nodes {
		if _, known := p.uplinks[n.Uplink]; n.Uplink != "" && !known {
			errs = append(errs, fmt.Errorf("node %d: uplink: no uplink has this name, got %q", i+1, n.Uplink))
		}
		if text, said := n.Labels[labelEIP]; said && e.Probe.EIP && eipOf(n.Labels) == nil {
			errs = append(errs, fmt.Errorf("node %d: %s: want an IP address, for the probe to compare with, got %q", i+1, labelEIP, text))
		}
		if was, taken := inline[n.ID]; taken && (was.V4 != n.V4 || was.V6 != n.V6) {
			errs = append(errs, fmt.Errorf("node %d: id: is that of a node in a user's egress_path, got %q", i+1, n.ID))
		}
	}
	return errors.Join(errs...)
}

// inline lists the nodes of an escaper that the operator's maps describe, each
// once.
func (p *plan) inline(name string) []config.Inline {
	var all []config.Inline
	seen := map[string]bool{}
	for _, g := range p.config.UserGroups {
		for i := range g.Users {
			n, ok := g.Users[i].Inline[name]
			key := n.V4.String() + " " + n.V6.String()
			if !ok || seen[key] {
				continue
			}
			seen[key] = true
			all = append(all, n)
		}
	}
	return all
}

// floating lists the paths of a direct_float: what is published, in its order,
// and after it what only the operator's maps lead to.
func (p *plan) floating(e *config.Escaper) []escaper.NodeOptions {
	list, inline := p.published[e.Name].nodes, p.inline(e.Name)
	nodes := make([]escaper.NodeOptions, 0, len(list)+len(inline))
	option := func(n *config.Inline) escaper.NodeOptions {
		o := escaper.NodeOptions{
			ID: n.ID, V4: n.V4, V6: n.V6, Uplink: n.Uplink, Interface: e.Interface, BindToDevice: e.Interface != "",
			Weight: 1, Expire: n.Expire, Labels: n.Labels, EIP: eipOf(n.Labels),
		}
		if o.Uplink == "" {
			o.Uplink = e.Uplink
		}
		return o
	}
	for i := range list {
		nodes = append(nodes, option(&list[i]))
	}
	published := map[netip.Addr]bool{}
	if len(inline) > 0 {
		for i := range list {
			published[list[i].V4], published[list[i].V6] = true, true
		}
	}
	for _, n := range inline {
		if n.V4.IsValid() && published[n.V4] || n.V6.IsValid() && published[n.V6] {
			continue // the published node is what the map leads to
		}
		o := option(&n)
		o.Unlisted, o.Weight = true, 0
		o.Expire = n.Expire
		nodes = append(nodes, o)
	}
	return nodes
}

// egressPath is the operator's map of a user, with the nodes that it describes
// in place.
func egressPath(u *config.User) selection.Layer {
	l := append(selection.Layer(nil), u.EgressPath...)
	for name, n := range u.Inline {
		l = append(l, selection.Entry{Escaper: name, Value: selection.Inline(selection.InlineNode{ID: n.ID, V4: n.V4, V6: n.V6, Expire: n.Expire})})
	}
	return l
}

// Publish replaces the nodes of a direct_float or proxy_float by those of a JSON array. With
// an error nothing has changed.
func (r *Router) Publish(name string, text []byte) (nodes int, err error) {
	nodes, err = r.publish(name, text)
	if err != nil {
		r.log.Error("nodes not published", "escaper", name, "err", err)
		return 0, err
	}
	r.log.Info("nodes published", "escaper", name, "nodes", nodes)
	r.socket.Changed()
	return nodes, nil
}

func (r *Router) publish(name string, text []byte) (nodes int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ready.Load() {
		return 0, escaper.ErrClosed
	}
	old := r.plan
	e := findEscaper(old.config, name)
	if e == nil || !e.Float() {
		return 0, fmt.Errorf("%w: no direct_float or proxy_float has the name %q", control.ErrUnknownPath, name)
	}
	now, err := parsePublication(e, text)
	if err != nil {
		return 0, err
	}
	if err := old.fits(e, &now); err != nil {
		return 0, err
	}
	p := *old
	p.taken = nil
	p.published = maps.Clone(old.published)
	p.published[name] = now
	if err := r.buildTable(&p, old, func(c *config.Escaper) bool { return c.Name == name }); err != nil {
		return 0, errors.Join(err, r.giveBack(&p))
	}
	install, err := r.prepareNodes(&p, old)
	if err == nil && e.Cache != "" {
		err = writeCache(e.Cache, text)
	}
	if err != nil {
		return 0, errors.Join(err, r.giveBack(&p))
	}
	install()
	return len(now.nodes) + len(now.peers), nil
}

func findEscaper(c *config.Config, name string) *config.Escaper {
	for i := range c.Escapers {
		if c.Escapers[i].Name == name {
			return &c.Escapers[i]
		}
	}
	return nil
}
