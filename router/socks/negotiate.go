package socks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"wayout/router/auth"
	"wayout/router/socks/client"
	"wayout/selection"
)

// serve5 serves a SOCKS5 client.
func (c *conn) serve5() bool {
	method, ok := c.greet()
	if !ok {
		return false
	}
	if method == methodPassword && !c.authenticate() {
		return false
	}
	var command byte
	var to client.Addr
	err := c.read(func(b []byte) (n int, err error) {
		command, to, n, err = parseRequest(b)
		return n, err
	})
	if err != nil {
		return c.refuseRequest(err)
	}
	switch {
	case command == commandAssociate && c.s.o.OpenPacket != nil:
		return c.associate(to)
	case command != commandConnect:
		return c.refuseRequest(errCommand)
	}
	return c.connect(to)
}

// serve4 serves a SOCKS4 client, who is authenticated by his network or not at
// all.
func (c *conn) serve4() bool {
	c.old = true
	var command byte
	var to client.Addr
	err := c.read(func(b []byte) (n int, err error) {
		command, to, n, err = parseRequest4(b)
		return n, err
	})
	switch {
	case err != nil:
		return c.refuseRequest(err)
	case c.s.o.Group != nil && !c.recognise():
		return c.refuseRequest(errUser4)
	case command != commandConnect:
		return c.refuseRequest(errCommand)
	}
	return c.connect(to)
}

// refuseRequest refuses what the client asks for, by the code of the error.
func (c *conn) refuseRequest(err error) bool {
	_, code := judge(err)
	return c.refuse(err, c.appendReply(code))
}

// greet comes to an authentication method.
func (c *conn) greet() (method byte, ok bool) {
	extended := false
	err := c.read(func(b []byte) (int, error) {
		methods, n, err := parseGreeting(b)
		if n > 0 {
			extended = c.s.o.Extension && bytes.IndexByte(methods, methodExtension) >= 0
			method = c.choose(methods)
		}
		return n, err
	})
	switch {
	case err != nil:
		return 0, c.refuse(err, nil)
	case extended:
		return c.extend()
	}
	answer := append(c.out[:0], version5, method)
	if method == methodNoneFits {
		return 0, c.refuse(errMethods, answer)
	}
	return method, c.tell(answer)
}

// tell sends an answer after which the handshake goes on.
func (c *conn) tell(answer []byte) bool {
	if err := c.write(answer); err != nil {
		return c.refuse(&connError{err}, nil)
	}
	return true
}

// choose picks the method: with credentials where there are users, unless the
// client brings none and is known by its network.
func (c *conn) choose(methods []byte) byte {
	has := func(m byte) bool { return bytes.IndexByte(methods, m) >= 0 }
	switch {
	case c.s.o.Group == nil && has(methodNone):
		return methodNone
	case c.s.o.Group == nil:
		return methodNoneFits
	case has(methodPassword):
		return methodPassword
	case has(methodNone) && c.recognise():
		return methodNone
	}
	return methodNoneFits
}

// extend speaks the path selection extension.
func (c *conn) extend() (method byte, ok bool) {
	if !c.tell(append(c.out[:0], version5, methodExtension)) {
		return 0, false
	}
	asked := ""
	err := c.read(func(b []byte) (int, error) {
		payload, methods, n, err := parseExtension(b)
		if n > 0 {
			asked = string(payload) // the layer refers to it
			method = c.choose(methods)
		}
		return n, err
	})
	if err == nil {
		c.req.Selection.ClientSource = selection.SourceSOCKS
		c.req.Selection.Client, err = selection.ParseHeader(asked, c.s.o.Escaper)
	}
	const good, malformed = 0, 1
	switch {
	case errors.Is(err, selection.ErrMalformed):
		c.selected(selection.SourceSOCKS, asked)
		return 0, c.refuse(err, append(c.out[:0], versionAuth, malformed, methodNoneFits))
	case err != nil:
		return 0, c.refuse(err, nil)
	case method == methodNoneFits:
		return 0, c.refuse(errMethods, append(c.out[:0], versionAuth, good, method))
	}
	return method, c.tell(append(c.out[:0], versionAuth, good, method))
}

// authenticate checks user name and password, and the parameters of the name.
func (c *conn) authenticate() bool {
	var name, password string
	err := c.read(func(b []byte) (int, error) {
		u, p, n, err := parsePassword(b)
		if n > 0 {
			name, password = string(u), string(p)
		}
		return n, err
	})
	if err == nil {
		err = c.login(name, password)
	}
	const good, failed = 0, 1
	if err != nil {
		return c.refuse(err, append(c.out[:0], versionAuth, failed))
	}
	return c.tell(append(c.out[:0], versionAuth, good))
}

// login is authenticate without its messages.
func (c *conn) login(name, password string) error {
	rest := ""
	if c.s.o.UsernameParams {
		name, rest = selection.SplitUsername(name)
	}
	u := c.s.o.Group.Verified(name, password)
	if u == nil {
		var err error
		if u, err = c.verify(name, password); err != nil {
			return err
		}
	}
	if !auth.Allows(u, c.client.Addr()) {
		return fmt.Errorf("%w: %s may not come from %s", errCredentials, u.Name, c.client.Addr())
	}
	c.known(u)
	if rest == "" {
		return nil
	}
	p, err := selection.ParseParams(rest, c.s.o.Escaper)
	if err == nil {
		c.req.Selection.Username, c.req.Selection.Session = p.Layer, p.Session
		if c.s.o.Vet != nil {
			err = c.s.o.Vet(c.req)
		}
	}
	if err != nil {
		c.selected(selection.SourceUsername, rest)
	}
	return err
}

// verify checks credentials that are not known: that may take its time.
func (c *conn) verify(name, password string) (*auth.User, error) {
	// A password that has to be hashed takes memory.
	if err := c.room(); err != nil {
		return nil, err
	}
	c.k.Leave()
	ctx := c.s.front.Context()
	if d := c.s.o.Timeouts.Auth; d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	began := time.Now()
	u, err := c.s.o.Group.Verify(ctx, name, password)
	if !c.until.IsZero() {
		c.until = c.until.Add(time.Since(began)) // the client's time is its own
	}
	switch {
	case err == nil:
		return u, nil
	case errors.Is(err, auth.ErrAuth):
		return nil, fmt.Errorf("%w: %w", errCredentials, err)
	}
	return nil, fmt.Errorf("%w: %w", errAuthBusy, err)
}

// recognise looks for the user that the client's network belongs to.
func (c *conn) recognise() bool {
	u := c.s.o.Group.From(c.client.Addr())
	if u != nil {
		c.known(u)
	}
	return u != nil
}

// known takes up who the client is.
func (c *conn) known(u *auth.User) {
	c.rec.User, c.req.User, c.req.Group = u.Name, u.Name, c.s.o.Group.Name()
	c.req.Allow = u.Allow
	c.req.Selection.User = u.Selection
	c.t.user = u
}
