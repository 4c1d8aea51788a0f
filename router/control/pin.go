package control

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
)

// Sentinels of pins.
var (
	// ErrUnknownCgroup: no cgroup of that name is pinned, or there.
	ErrUnknownCgroup = errors.New("no such cgroup")
	// ErrPinned: a pin that is there is in the way.
	ErrPinned = errors.New("is pinned already")
)

// PinsVersion is the version of the document that `wayout pin --json` prints.
const PinsVersion = 1

// Pins are the cgroups whose processes leave by a path.
type Pins struct {
	Version int   `json:"version"`
	Pins    []Pin `json:"pins"`
}

// Who asked for a pin.
const (
	ByConfig  = "config"
	ByCommand = "command"
	ByExec    = "exec" // for as long as it runs
)

// States of a pin.
const (
	PinInForce = "pinned"
	PinWaiting = "waiting" // its cgroup is not there
	PinBlocked = "blocked" // its path is not there: nothing leaves
	PinFailed  = "failed"  // see Reason
)

// Pin is one of them.
type Pin struct {
	Cgroup      string      `json:"cgroup"` // below the cgroup v2 mount
	Path        string      `json:"path"`
	By          string      `json:"by"`
	State       string      `json:"state"`
	Reason      string      `json:"reason"`
	Connections Connections `json:"connections"` // of TCP, since the daemon started
}

// PinAsk is the body of the commands about pins.
type PinAsk struct {
	Cgroup string `json:"cgroup"`
	Path   string `json:"path,omitempty"`
	Kill   bool   `json:"kill,omitempty"` // end the connections that do not leave by it
	PID    int    `json:"pid,omitempty"`  // of the exec that holds a pin
}

// PinDone is the answer.
type PinDone struct {
	Pin
	Ended int `json:"ended"` // connections

	// For exec: the path's addresses, and the directory of the pin in the bpf file
	// system, for when no daemon is there to remove it.
	IPv4 netip.Addr `json:"ipv4,omitzero"`
	IPv6 netip.Addr `json:"ipv6,omitzero"`
	Dir  string     `json:"dir,omitempty"`
}

// PinBackend is what the control socket can ask about pins.
type PinBackend struct {
	List  func() Pins
	Pin   func(PinAsk) (PinDone, error)
	Unpin func(PinAsk) (PinDone, error)
	// Hold pins the cgroup of an exec, until Release or until PID has ended and the
	// cgroup is empty.
	Hold    func(PinAsk) (PinDone, error)
	Release func(PinAsk) (PinDone, error)
}

func (b PinBackend) register(mux *http.ServeMux) {
	mux.HandleFunc("GET /pins", func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, b.List()) })
	for verb, f := range map[string]func(PinAsk) (PinDone, error){
		"/pin": b.Pin, "/unpin": b.Unpin, "/hold": b.Hold, "/release": b.Release,
	} {
		mux.HandleFunc("POST "+verb, command(func(ask PinAsk) (any, error) { return f(ask) }))
	}
}

// Pins lists the pins.
func (c *Client) Pins(ctx context.Context) (Pins, error) {
	var p Pins
	err := c.get(ctx, "/pins", func(dec *json.Decoder) error { return dec.Decode(&p) })
	return p, err
}

// Pin holds the processes of a cgroup to a path.
func (c *Client) Pin(ctx context.Context, ask PinAsk) (PinDone, error) {
	return c.pin(ctx, "/pin", ask)
}

// Unpin lets them go.
func (c *Client) Unpin(ctx context.Context, ask PinAsk) (PinDone, error) {
	return c.pin(ctx, "/unpin", ask)
}

// Hold pins the cgroup of an exec.
func (c *Client) Hold(ctx context.Context, ask PinAsk) (PinDone, error) {
	return c.pin(ctx, "/hold", ask)
}

// Release takes back Hold.
func (c *Client) Release(ctx context.Context, ask PinAsk) (PinDone, error) {
	return c.pin(ctx, "/release", ask)
}

func (c *Client) pin(ctx context.Context, verb string, ask PinAsk) (PinDone, error) {
	body, err := json.Marshal(ask)
	if err != nil {
		return PinDone{}, err
	}
	var done PinDone
	err = c.do(ctx, http.MethodPost, verb, body, func(dec *json.Decoder) error { return dec.Decode(&done) })
	return done, err
}
