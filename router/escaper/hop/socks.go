package hop

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"wayout/router/socks/client"
)

// askSOCKS asks for a tunnel. Nothing beyond the reply is read.
func (p *Peer) askSOCKS(ctx context.Context, conn *net.TCPConn, to Target, selection string) error {
	d, err := p.dialer(selection)
	if err == nil {
		_, err = d.Handshake(ctx, conn, to.String())
	}
	return socksError(err, selection)
}

// Associate asks a SOCKS5 peer, on a new connection to it, for a relay of
// datagrams, and returns where they go (see [Wrap]); an unspecified address in
// the answer is the peer's own. The association lasts as long as conn, which
// stays the caller's and on which nothing more is said; after an error it is
// closed. Errors and the selection are as with Connect.
func (p *Peer) Associate(ctx context.Context, conn *net.TCPConn, selection string) (relay netip.AddrPort, err error) {
	ask := func() error {
		d, err := p.dialer(selection)
		if err == nil {
			relay, err = d.Associate(ctx, conn)
		}
		if err == nil && relay.Port() == 0 {
			err = fail(ErrProtocol, nil, "the peer's relay of datagrams has no port")
		}
		return socksError(err, selection)
	}
	if p.Kind != SOCKS5 {
		err = fail(ErrNoUDP, nil, "%s: it is %s", ErrNoUDP, p.Kind)
	} else {
		err = p.converse(ctx, conn, ask)
	}
	if err != nil {
		_ = conn.Close()
		return netip.AddrPort{}, fmt.Errorf("peer %s: associate: %w", p.Name, err)
	}
	return relay, nil
}

func (p *Peer) dialer(selection string) (*client.Dialer, error) {
	if len(selection) > client.MaxExtension {
		return nil, fail(ErrSelection, nil, "a selection of %d bytes, %d at most", len(selection), client.MaxExtension)
	}
	return &client.Dialer{Username: p.Username, Password: p.Password, Extension: selection}, nil
}

// socksError makes the client package's errors ours.
func socksError(err error, selection string) error {
	var reply *client.ReplyError
	switch {
	case errors.As(err, &reply):
		return &Refused{Code: reply.Code}
	case errors.Is(err, client.ErrAuth):
		return fail(ErrAuth, err, "%s", ErrAuth)
	case errors.Is(err, client.ErrMethod) && selection != "":
		return fail(ErrSelection, err, "the peer takes no selection, or none of our ways to authenticate")
	case errors.Is(err, client.ErrMethod):
		return fail(ErrAuth, err, "the peer takes none of our ways to authenticate")
	case errors.Is(err, client.ErrSelection):
		return fail(ErrSelection, err, "the peer cannot read the selection %q", selection)
	case errors.Is(err, client.ErrProtocol):
		return fail(ErrProtocol, err, "%s", err)
	}
	return err
}

// Wrap appends to b the datagram that the relay of an association passes on to
// a target.
func Wrap(b []byte, to Target, payload []byte) ([]byte, error) {
	if err := to.check(); err != nil {
		return b, err
	}
	out, err := client.AppendHeader(b, to.socks())
	if err != nil {
		return b, fail(ErrTarget, err, "%s", err)
	}
	return append(out, payload...), nil
}

// Unwrap takes a datagram apart that came from the relay of an association.
// payload refers to b. The error is ErrProtocol, for fragments as well.
func Unwrap(b []byte) (from Target, payload []byte, err error) {
	a, payload, err := client.ParseHeader(b)
	if err != nil {
		return Target{}, nil, fail(ErrProtocol, err, "datagram of the peer: %s", err)
	}
	return Target{Host: a.Host, Addr: a.IP.Unmap(), Port: a.Port}, payload, nil
}
