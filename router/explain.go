package router

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/selection"
)

// Question is a request that Explain is asked about.
type Question struct {
	Server   string         // "": the only one, or the first
	User     string         // of the server's user group, taken to be authenticated
	Username string         // a user name with parameters, in the place of User
	Header   string         // the value of the path selection header, or the payload of the SOCKS extension
	Client   netip.Addr     // who asks; the zero Addr: 127.0.0.1
	Local    netip.AddrPort // what the client connected to; the zero AddrPort: the server's first listener
	Target   escaper.Target
	Resolve  bool // ask name servers
}

// Verdict is the answer: an explanation, with the HTTP status that the request
// would get when it is refused.
type Verdict struct {
	escaper.Explanation
	Server string
	Status int   // 200: it would be dialled
	Err    error // why it would be refused
}

// Explain says what would become of a request under a configuration, on this
// host as it is: what apply would add is taken to be there. Nothing is changed,
// and nothing sent but, with Resolve, the questions to name servers. The error
// is about the question.
func Explain(ctx context.Context, c *config.Config, q Question) (v Verdict, err error) {
	r, err := newRouter(Options{Config: c, Stderr: io.Discard}, nil, nil)
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, r.plan.close(nil)) }()
	sc, err := findServer(c, q.Server)
	if err != nil {
		return v, err
	}
	v.Server = sc.Name
	if err := r.presume(); err != nil {
		return v, err
	}
	req := &escaper.Request{Server: sc.Name, Escaper: sc.Escaper, Target: q.Target, Local: q.Local}
	if !q.Client.IsValid() {
		q.Client = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	req.Client = netip.AddrPortFrom(q.Client.Unmap(), 0)
	if !req.Local.IsValid() && len(sc.Listen) > 0 {
		req.Local = sc.Listen[0]
	}
	if status, err := r.identify(req, sc, q); err != nil {
		v.Status, v.Err = status, err
		return v, nil
	}
	v.Explanation, v.Err = r.plan.table.Explain(ctx, req, q.Resolve)
	v.Status = escaper.StatusOf(v.Err)
	return v, nil
}

func findServer(c *config.Config, name string) (*config.Server, error) {
	var names []string
	for i := range c.Servers {
		if c.Servers[i].Name == name || name == "" {
			return &c.Servers[i], nil
		}
		names = append(names, c.Servers[i].Name)
	}
	if len(names) == 0 {
		return nil, errors.New("the configuration has no server")
	}
	return nil, fmt.Errorf("no server has the name %q, there are %s", name, strings.Join(names, ", "))
}

// identify fills in who asks, and what he selects: the front ends' part.
func (r *Router) identify(req *escaper.Request, sc *config.Server, q Question) (status int, err error) {
	const badRequest, unauthorized = 400, 407
	name, params := q.User, ""
	if q.Username != "" {
		name = q.Username
		if sc.UsernameParams {
			name, params = selection.SplitUsername(q.Username)
		}
	}
	if g := r.plan.groups[sc.UserGroup]; g != nil {
		u := g.From(req.Client.Addr())
		if name != "" {
			known, ok := g.User(name)
			if !ok {
				return unauthorized, fmt.Errorf("user group %s has no user %q", g.Name(), name)
			}
			u = known
		}
		if u == nil && sc.Type == "tproxy" {
			return unauthorized, fmt.Errorf("user group %s has no user whose \"from\" has %s: such a client is reset", g.Name(), req.Client.Addr())
		}
		if u == nil {
			return unauthorized, fmt.Errorf("server %s asks for a user of group %s: name one by --user", sc.Name, g.Name())
		}
		req.Group, req.User, req.Allow, req.Selection.User = g.Name(), u.Name, u.Allow, u.Selection
	}
	if sel := serverSelection(sc); sel != nil {
		req.Selection.Server = sel(req.Local)
	}
	if params != "" {
		p, err := selection.ParseParams(params, sc.Escaper)
		if err != nil {
			return badRequest, err
		}
		req.Selection.Username, req.Selection.Session = p.Layer, p.Session
	}
	if q.Header != "" {
		by := sc.PathSelectionHeader
		switch {
		case by != "":
		case sc.SOCKSExtension:
			by, req.Selection.ClientSource = "the SOCKS extension", selection.SourceSOCKS
		default:
			return badRequest, fmt.Errorf("server %s reads no selection from clients: it has neither path_selection_header nor socks_extension", sc.Name)
		}
		if req.Selection.Client, err = selection.ParseHeader(q.Header, sc.Escaper); err != nil {
			return badRequest, fmt.Errorf("%s: %w", by, err)
		}
	}
	return 0, nil
}

// presume gives the paths the states that they would have once the network is
// as wished.
func (r *Router) presume() error {
	k, err := netcfg.Open(netcfg.Options{Layout: r.want.Layout})
	if err != nil {
		return err
	}
	have, err := k.Read()
	if err = errors.Join(err, k.Close()); err != nil {
		return err
	}
	p := r.plan
	r.setSources(p, have)
	r.settlePrefixes(p, nil, r.want, have)
	r.judgePaths(p, have, p.table.Directs())
	for _, path := range p.table.Paths() {
		for _, f := range []selection.Family{selection.V4, selection.V6} {
			if path.Given()&f == 0 || path.Status().Of(f) == escaper.Up {
				continue
			}
			if r.appliedLater(have, path, f) {
				path.SetFamilyState(f, escaper.Up, "")
			}
		}
	}
	p.table.Publish()
	return nil
}

// appliedLater reports whether a family of a path lacks nothing that apply would
// not add.
func (r *Router) appliedLater(s *netcfg.Snapshot, path *escaper.Path, f selection.Family) bool {
	up, has := r.plan.uplinks[path.Uplink]
	if device := r.plan.device(path); device != "" {
		if l, ok := s.Link(device); !ok || !l.Up {
			return false
		}
	}
	if path.Net(f).IsValid() {
		return true
	}
	a := path.Source(f)
	if !a.IsValid() {
		return false
	}
	state, _ := s.Has(a, "")
	return has && (state == netcfg.Present || state == netcfg.Absent && up.ManageAddresses)
}
