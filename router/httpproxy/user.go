package httpproxy

import (
	"context"
	"errors"
	"fmt"

	"wayout/router/auth"
	"wayout/router/relay"
	"wayout/selection"
)

// Failures of authentication.
var (
	errCredentialsMissing = errors.New("proxy authentication required")
	errCredentials        = errors.New("proxy authentication failed")
	errAuthBusy           = errors.New("password not checked in time")
)

// authenticate finds out who the client is, if the server asks for that: by its
// credentials or, when it brings none, by its network. Then it reads the
// parameters of the user name.
func (x *exchange) authenticate() error {
	g := x.s.o.Group
	if g == nil {
		return nil
	}
	if x.head.authorization < 0 {
		u := g.From(x.c.client.Addr())
		if u == nil {
			return errCredentialsMissing
		}
		x.known(u)
		return nil
	}
	name, password, err := auth.ParseBasic(string(x.head.value(x.head.authorization)))
	if err != nil {
		return fmt.Errorf("%w: %w", errCredentials, err)
	}
	params := ""
	if x.s.o.UsernameParams {
		name, params = selection.SplitUsername(name)
	}
	u := g.Verified(name, password)
	if u == nil {
		u, err = x.verify(g, name, password)
	}
	switch {
	case errors.Is(err, auth.ErrAuth):
		return fmt.Errorf("%w: %w", errCredentials, err)
	case err != nil:
		return fmt.Errorf("%w: %w", errAuthBusy, err)
	case !auth.Allows(u, x.c.client.Addr()):
		return fmt.Errorf("%w: %s may not come from %s", errCredentials, u.Name, x.c.client.Addr())
	}
	x.known(u)
	if params == "" {
		return nil
	}
	return x.readParams(params)
}

// verify checks credentials that are not known: that may take its time.
func (x *exchange) verify(g *auth.Group, name, password string) (*auth.User, error) {
	if x.c.task != nil {
		x.c.task.Leave()
	}
	ctx := x.s.front.Context()
	if d := x.s.o.Timeouts.Auth; d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	return g.Verify(ctx, name, password)
}

// known takes up who the client is.
func (x *exchange) known(u *auth.User) {
	x.user = u
	x.rec.User, x.req.User, x.req.Group = u.Name, u.Name, x.s.o.Group.Name()
	x.req.Allow = u.Allow
	x.req.Selection.User = u.Selection
}

// readParams reads the parameters of the user name.
func (x *exchange) readParams(params string) error {
	p, err := selection.ParseParams(params, x.s.o.Escaper)
	if err == nil {
		x.req.Selection.Username, x.req.Selection.Session = p.Layer, p.Session
		if x.s.o.Vet != nil {
			err = x.s.o.Vet(x.req)
		}
	}
	if err != nil {
		x.rec.Choice.Source, x.rec.Choice.Asked = selection.SourceUsername, clip(params, maxAsked)
	}
	return err
}

// counted is what of a request the meters count, from its being let through to
// the end of its answer or of its tunnel.
type counted struct {
	by   *auth.Meter // the user's
	open bool
}

// count lets the request through, if server and user may have one more.
func (x *exchange) count() error {
	if err := x.s.o.Meter.Begin(); err != nil {
		return fmt.Errorf("server: %w", err)
	}
	var by *auth.Meter
	if x.user != nil {
		by = x.user.Meter
	}
	if err := by.Begin(); err != nil {
		x.s.o.Meter.End()
		return fmt.Errorf("user %s: %w", x.user.Name, err)
	}
	x.counted = counted{by: by, open: true}
	return nil
}

// budgets bound what the server and the user have passed, from the client and to
// it.
func (x *exchange) budgets() [2]relay.Budget {
	var by *auth.Meter
	if x.user != nil {
		by = x.user.Meter
	}
	up, down := auth.Bytes(x.s.o.Meter, by)
	return [2]relay.Budget{up, down}
}

// end takes back what is counted, once.
func (c *counted) end(s *Server) {
	if c.open {
		c.by.End()
		s.o.Meter.End()
	}
	*c = counted{}
}
