package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"wayout/router/socks/client"
)

// Ask is one request through a proxy to an Origin.
type Ask struct {
	From   *NS // the client's namespace
	Proxy  netip.AddrPort
	Target string   // host:port of the origin
	Tunnel bool     // CONNECT, then GET inside; else an absolute-form GET
	Header []string // "Name: value", of the request that the proxy reads

	// SOCKS asks for the tunnel by SOCKS5, with its credentials and its extension;
	// nil: HTTP does.
	SOCKS *client.Dialer
}

// Told is what came back.
type Told struct {
	Status int         // of the proxy, or of the origin through it; 0 when Reply is not
	Reply  byte        // of a SOCKS5 proxy that refuses
	Header http.Header // of the proxy's answer
	Body   string      // of a refusal
	Seen   Seen        // when the origin was reached
}

// Do sends the request on a new connection and reads the answer.
func (a Ask) Do() (told Told, err error) {
	conn, err := a.From.Dial(a.Proxy)
	if err != nil {
		return Told{}, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return Told{}, err
	}
	if a.SOCKS != nil {
		return a.bySOCKS(conn)
	}
	r := bufio.NewReader(conn)
	var lines strings.Builder
	for _, h := range a.Header {
		lines.WriteString(h + "\r\n")
	}
	if !a.Tunnel {
		if _, err := fmt.Fprintf(conn, "GET http://%s/ HTTP/1.1\r\nHost: %s\r\n%s\r\n", a.Target, a.Target, &lines); err != nil {
			return Told{}, err
		}
		return answer(r, http.MethodGet)
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", a.Target, a.Target, &lines); err != nil {
		return Told{}, err
	}
	told, err = answer(r, http.MethodConnect)
	if err != nil || told.Status != http.StatusOK {
		return told, err
	}
	inner, err := a.inside(conn, r)
	told.Seen = inner.Seen
	return told, err
}

// bySOCKS makes the tunnel by SOCKS5.
func (a Ask) bySOCKS(conn net.Conn) (Told, error) {
	_, err := a.SOCKS.Handshake(context.Background(), conn, a.Target)
	var refused *client.ReplyError
	switch {
	case errors.As(err, &refused):
		return Told{Reply: refused.Code, Body: refused.Error()}, nil
	case err != nil:
		return Told{}, err
	}
	return a.inside(conn, bufio.NewReader(conn))
}

// inside sends the request through a tunnel.
func (a Ask) inside(conn net.Conn, r *bufio.Reader) (Told, error) {
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", a.Target); err != nil {
		return Told{}, err
	}
	return answer(r, http.MethodGet)
}

// Get asks an Origin for / from the namespace, without any proxy.
func (n *NS) Get(origin netip.AddrPort, within time.Duration) (seen Seen, err error) {
	var conn net.Conn
	if err := n.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", origin.String(), within)
		return err
	}); err != nil {
		return Seen{}, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(within)); err != nil {
		return Seen{}, err
	}
	told, err := Ask{Target: origin.String()}.inside(conn, bufio.NewReader(conn))
	return told.Seen, err
}

func answer(r *bufio.Reader, method string) (Told, error) {
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		return Told{}, fmt.Errorf("answer to %s: %w", method, err)
	}
	t := Told{Status: resp.StatusCode, Header: resp.Header}
	if method == http.MethodConnect && t.Status == http.StatusOK {
		return t, nil // what follows is the tunnel
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return t, fmt.Errorf("body of the answer to %s: %w", method, err)
	}
	if t.Status != http.StatusOK {
		t.Body = strings.TrimSpace(string(body))
		return t, nil
	}
	if err := json.Unmarshal(body, &t.Seen); err != nil {
		return t, fmt.Errorf("what the origin saw: %w", err)
	}
	return t, nil
}
