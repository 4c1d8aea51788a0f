package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
)

// ErrNoDaemon: nothing answers on the control socket.
var ErrNoDaemon = errors.New("no wayout is running there")

// Client speaks to a daemon's control socket.
type Client struct {
	path string
	http *http.Client
}

// NewClient makes a client of the control socket at path. It connects with
// the first call.
func NewClient(path string) *Client {
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", path)
			if err != nil {
				return nil, errors.Join(ErrNoDaemon, err)
			}
			return conn, nil
		},
		DisableKeepAlives: true, // a command asks once, and a Client is never closed
	}}}
}

// Paths reads the state of all paths.
func (c *Client) Paths(ctx context.Context) (Paths, error) {
	var p Paths
	err := c.get(ctx, "/paths", func(dec *json.Decoder) error { return dec.Decode(&p) })
	return p, err
}

// Watch calls f with the state of all paths at every change, and about once a
// second without one, until ctx ends, f fails or the daemon stops.
func (c *Client) Watch(ctx context.Context, f func(Paths) error) error {
	return c.get(ctx, "/paths?watch=1", func(dec *json.Decoder) error {
		for dec.More() {
			var p Paths
			if err := dec.Decode(&p); err != nil {
				return err
			}
			if err := f(p); err != nil {
				return err
			}
		}
		return nil
	})
}

// get asks for a resource and hands its body to read.
func (c *Client) get(ctx context.Context, resource string, read func(*json.Decoder) error) error {
	return c.do(ctx, http.MethodGet, resource, nil, read)
}

// Drain takes a path out of use for new connections, or gives it back.
func (c *Client) Drain(ctx context.Context, path string, on bool) error {
	verb := "/undrain"
	if on {
		verb = "/drain"
	}
	return c.command(ctx, verb, Ask{Path: path}, &Ask{})
}

// Prove has the daemon try to leave by a path with a wrong source, which the
// kernel has to refuse: the error says that it did not.
func (c *Client) Prove(ctx context.Context, path string, target netip.AddrPort) (Proof, error) {
	var p Proof
	err := c.command(ctx, "/prove-guard", Ask{Path: path, Target: target}, &p)
	return p, err
}

// Reload has the daemon read its configuration again.
func (c *Client) Reload(ctx context.Context) error {
	return c.command(ctx, "/reload", Ask{}, &Ask{})
}

// Publish has the daemon put nodes, a JSON array, in the place of an escaper's.
func (c *Client) Publish(ctx context.Context, escaper string, nodes []byte) (Published, error) {
	var p Published
	err := c.do(ctx, http.MethodPost, "/publish?escaper="+url.QueryEscape(escaper), nodes, func(dec *json.Decoder) error { return dec.Decode(&p) })
	return p, err
}

func (c *Client) command(ctx context.Context, verb string, ask Ask, answer any) error {
	body, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, verb, body, func(dec *json.Decoder) error { return dec.Decode(answer) })
}

func (c *Client) do(ctx context.Context, method, resource string, body []byte, read func(*json.Decoder) error) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://wayout"+resource, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// What net/http wraps around it names a URL that means nothing here.
		if errors.Is(err, ErrNoDaemon) {
			return fmt.Errorf("control socket %s does not answer: %w", c.path, ErrNoDaemon)
		}
		return err
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(resp.Body)
	if resp.StatusCode != http.StatusOK {
		var f failure
		if err := dec.Decode(&f); err != nil || f.Error == "" {
			f.Error = resp.Status
		}
		return errors.New(f.Error)
	}
	return read(dec)
}
