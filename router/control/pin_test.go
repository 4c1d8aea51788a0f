package control

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestPinsOverTheSocket asks each of the commands and hands back what the daemon
// answers.
func TestPinsOverTheSocket(t *testing.T) {
	var asked []string
	answer := func(verb string) func(PinAsk) (PinDone, error) {
		return func(ask PinAsk) (PinDone, error) {
			asked = append(asked, fmt.Sprintf("%s %+v", verb, ask))
			if ask.Cgroup == "/none" {
				return PinDone{}, fmt.Errorf("%w: %q", ErrUnknownCgroup, ask.Cgroup)
			}
			return PinDone{
				Pin:   Pin{Cgroup: ask.Cgroup, Path: ask.Path, By: ByExec, State: PinInForce, Connections: Connections{Made: 2}},
				Ended: 3, IPv6: netip.MustParseAddr("2001:db8::1"), Dir: "/sys/fs/bpf/x",
			}, nil
		}
	}
	all := Pins{Version: PinsVersion, Pins: []Pin{{Cgroup: "/a", Path: "out/x", By: ByConfig, State: PinWaiting, Reason: "why"}}}
	path, _ := serveSocket(t, Backend{Pins: PinBackend{
		List: func() Pins { return all },
		Pin:  answer("pin"), Unpin: answer("unpin"), Hold: answer("hold"), Release: answer("release"),
	}})
	c := NewClient(path)
	if got, err := c.Pins(t.Context()); err != nil || !cmp.Equal(got, all) {
		t.Errorf("pins: %+v, %v", got, err)
	}
	ask := PinAsk{Cgroup: "/a.slice", Path: "out/x", Kill: true, PID: 7}
	for verb, f := range map[string]func(PinAsk) (PinDone, error){
		"pin":     func(a PinAsk) (PinDone, error) { return c.Pin(t.Context(), a) },
		"unpin":   func(a PinAsk) (PinDone, error) { return c.Unpin(t.Context(), a) },
		"hold":    func(a PinAsk) (PinDone, error) { return c.Hold(t.Context(), a) },
		"release": func(a PinAsk) (PinDone, error) { return c.Release(t.Context(), a) },
	} {
		asked = nil
		want, err := answer(verb)(ask)
		if err != nil {
			t.Fatal(err)
		}
		got, err := f(ask)
		if err != nil || got != want || len(asked) != 2 || asked[0] != asked[1] {
			t.Errorf("%s: %+v, %v, asked %q", verb, got, err, asked)
		}
		if _, err := f(PinAsk{Cgroup: "/none"}); err == nil || err.Error() != `no such cgroup: "/none"` {
			t.Errorf("%s of none: %v", verb, err)
		}
	}
	_, err := NewClient(filepath.Join(t.TempDir(), "none")).Hold(t.Context(), ask)
	if !errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("without a daemon: %v", err)
	}
}
