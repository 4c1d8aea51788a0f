package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"go.uber.org/goleak"

	"wayout/selection"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func text(s string) *string { return &s }

func somePaths() Paths {
	return Paths{Version: PathsVersion, Paths: []Path{{
		Path: "out/fra-2", Escaper: "out", ID: "fra-2", State: "up",
		Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		IPv4:  text("198.51.100.12"), Uplink: text("isp1"), Weight: 1,
		Connections: Connections{Open: 1, Made: 3, Failed: 2, Closed: 2},
		Bytes:       InOut{In: 10, Out: 20}, Packets: InOut{In: 1, Out: 2},
		Retransmits: 7, GuardDrops: 5,
		Results:    map[string]uint64{"ok": 3, "refused": 2},
		RTTBuckets: Histogram{Bounds: []float64{0.001, 0.002}, Counts: []uint64{1, 4}, Count: 4, Sum: 0.005},
	}}}
}

// serveSocket runs a control socket and gives its path.
func serveSocket(t *testing.T, b Backend) (string, *Socket) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "control.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewSocket(l, b)
	done := make(chan error)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket's file is still there: %v", err)
		}
	})
	return path, s
}

func client(t *testing.T, path string) *Client {
	c := NewClient(path)
	t.Cleanup(c.http.CloseIdleConnections)
	return c
}

func TestPathsJSONHasTheDocumentedShape(t *testing.T) {
	got, err := json.Marshal(somePaths())
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"version":1,"paths":[{"path":"out/fra-2","escaper":"out","id":"fra-2","state":"up","reason":"",` +
		`"since":"2026-01-02T03:04:05Z","ipv4":"198.51.100.12","ipv6":null,"uplink":"isp1","interface":null,"weight":1,` +
		`"connections":{"open":1,"made":3,"failed":2,"closed":2},"bytes":{"in":10,"out":20},"packets":{"in":1,"out":2},` +
		`"retransmits":7,"rtt_seconds":{"p50":0,"p99":0},"guard_drops":5}]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestPathsJSONBesidePaths: what is not about paths is there only when there is
// anything to say.
func TestPathsJSONBesidePaths(t *testing.T) {
	n := uint64(4)
	got, err := json.Marshal(Paths{
		Version: PathsVersion, Paths: []Path{},
		Interfaces: []Interface{{Interface: "eth0", NeighbourAnswers: &n}, {Interface: "lan0", Diverted: &Diverted{FragmentsDropped: 2, UnservedDropped: 3}}},
		Datagrams:  []Datagrams{{Server: "lan", Open: 5, Dropped: 6}},
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"version":1,"paths":[],"interfaces":[{"interface":"eth0","neighbour_answers":4},` +
		`{"interface":"lan0","diverted":{"fragments_dropped":2,"unserved_dropped":3}}],"datagrams":[{"server":"lan","open":5,"dropped":6}]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestCommandsOverTheSocket(t *testing.T) {
	var drained atomic.Value
	path, _ := serveSocket(t, Backend{
		Paths: somePaths,
		Drain: func(p string, on bool) error {
			if p != "out/fra-2" {
				return fmt.Errorf("%w: %q", ErrUnknownPath, p)
			}
			drained.Store(on)
			return nil
		},
	})
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket: %v, %v; want 0600", fi.Mode(), err)
	}
	c := client(t, path)
	got, err := c.Paths(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := somePaths()
	want.Paths[0].Results, want.Paths[0].RTTBuckets = nil, Histogram{} // for the metrics alone
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("paths (-want +got):\n%s", d)
	}
	for _, on := range []bool{true, false} {
		if err := c.Drain(t.Context(), "out/fra-2", on); err != nil || drained.Load() != on {
			t.Errorf("drain %v: %v, the daemon heard %v", on, err, drained.Load())
		}
	}
	err = c.Drain(t.Context(), `out/"nothing"`, true)
	if err == nil || !strings.Contains(err.Error(), `no such path: "out/\"nothing\""`) {
		t.Errorf("drain of an unknown path: %v", err)
	}
}

func TestWatchTellsOfEachChange(t *testing.T) {
	var turn atomic.Int64
	path, s := serveSocket(t, Backend{Paths: func() Paths {
		p := somePaths()
		p.Paths[0].Connections.Open = turn.Load()
		return p
	}})
	c := client(t, path)
	enough := errors.New("enough")
	begun := time.Now()
	err := c.Watch(t.Context(), func(p Paths) error {
		if n := p.Paths[0].Connections.Open; n < 20 {
			if n == turn.Load() {
				turn.Add(1)
				s.Changed()
			}
			return nil
		}
		return enough
	})
	if !errors.Is(err, enough) {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 10*watchEvery {
		t.Errorf("20 changes took %v: the watcher was told by the clock only", took)
	}
}

func TestSocketOfAnotherDaemon(t *testing.T) {
	path, _ := serveSocket(t, Backend{Paths: somePaths})
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("a second daemon on the socket: %v, want ErrInUse", err)
	}
	if _, err := client(t, path).Paths(t.Context()); err != nil {
		t.Errorf("the first daemon after the second one's try: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	old, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false) // as kill -9 leaves it
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestNoDaemonIsSaidInASentence(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	_, err := client(t, path).Paths(t.Context())
	if !errors.Is(err, ErrNoDaemon) {
		t.Fatalf("got %v, want ErrNoDaemon", err)
	}
	if got, want := err.Error(), "control socket "+path+" does not answer: no wayout is running there"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func newCollector(accounted bool) *Collector {
	c := NewCounters()
	c.Server("web").Request(200)
	c.Server("web").Request(503)
	c.Server("web").Request(503)
	c.Server("web").AuthFailure()
	c.Selection(selection.SourceHeader, "unknown")
	c.Reload(nil)
	c.Reload(io.EOF)
	return NewCollector(c, somePaths, func() uint64 { return 9 }, func() bool { return accounted })
}

func TestMetrics(t *testing.T) {
	want := `
# HELP wayout_auth_failures_total Requests without valid credentials.
# TYPE wayout_auth_failures_total counter
wayout_auth_failures_total{server="web"} 1
# HELP wayout_config_reload_total Attempts to load a new configuration.
# TYPE wayout_config_reload_total counter
wayout_config_reload_total{result="error"} 1
wayout_config_reload_total{result="ok"} 1
# HELP wayout_path_bytes_total IP bytes with headers; in: from the far side.
# TYPE wayout_path_bytes_total counter
wayout_path_bytes_total{direction="in",escaper="out",path="fra-2"} 10
wayout_path_bytes_total{direction="out",escaper="out",path="fra-2"} 20
# HELP wayout_path_connections_open Connections open.
# TYPE wayout_path_connections_open gauge
wayout_path_connections_open{escaper="out",path="fra-2"} 1
# HELP wayout_path_connections_total Connection attempts by their result.
# TYPE wayout_path_connections_total counter
wayout_path_connections_total{escaper="out",path="fra-2",result="ok"} 3
wayout_path_connections_total{escaper="out",path="fra-2",result="refused"} 2
# HELP wayout_path_guard_drops_total Packets stopped because they would leave by another source or interface; unmarked ones under empty labels.
# TYPE wayout_path_guard_drops_total counter
wayout_path_guard_drops_total{escaper="",path=""} 9
wayout_path_guard_drops_total{escaper="out",path="fra-2"} 5
# HELP wayout_path_packets_total Packets on the wire; in: from the far side.
# TYPE wayout_path_packets_total counter
wayout_path_packets_total{direction="in",escaper="out",path="fra-2"} 1
wayout_path_packets_total{direction="out",escaper="out",path="fra-2"} 2
# HELP wayout_path_retransmits_total TCP segments sent again.
# TYPE wayout_path_retransmits_total counter
wayout_path_retransmits_total{escaper="out",path="fra-2"} 7
# HELP wayout_path_rtt_seconds Smoothed round-trip times as TCP samples them.
# TYPE wayout_path_rtt_seconds histogram
wayout_path_rtt_seconds_bucket{escaper="out",path="fra-2",le="0.001"} 1
wayout_path_rtt_seconds_bucket{escaper="out",path="fra-2",le="0.002"} 4
wayout_path_rtt_seconds_bucket{escaper="out",path="fra-2",le="+Inf"} 4
wayout_path_rtt_seconds_sum{escaper="out",path="fra-2"} 0.005
wayout_path_rtt_seconds_count{escaper="out",path="fra-2"} 4
# HELP wayout_path_up 1 when the path's state is up.
# TYPE wayout_path_up gauge
wayout_path_up{escaper="out",path="fra-2"} 1
# HELP wayout_requests_total Requests by HTTP status or its equivalent.
# TYPE wayout_requests_total counter
wayout_requests_total{code="200",server="web"} 1
wayout_requests_total{code="503",server="web"} 2
`
	names := []string{
		"wayout_auth_failures_total", "wayout_config_reload_total", "wayout_path_bytes_total", "wayout_path_connections_open",
		"wayout_path_connections_total", "wayout_path_guard_drops_total", "wayout_path_packets_total",
		"wayout_path_retransmits_total", "wayout_path_rtt_seconds", "wayout_path_up", "wayout_requests_total",
	}
	if err := testutil.CollectAndCompare(newCollector(true), strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
	got, err := testutil.CollectAndFormat(newCollector(true), expfmt.TypeTextPlain, "wayout_selection_total")
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"user", "header", "socks", "username", "server", "policy"} {
		for _, result := range []string{"ok", "malformed", "unknown", "disabled", "forbidden", "down", "family", "bind"} {
			n := 0
			if source == "header" && result == "unknown" {
				n = 1
			}
			line := fmt.Sprintf("wayout_selection_total{result=%q,source=%q} %d", result, source, n)
			if !strings.Contains(string(got), line+"\n") {
				t.Errorf("no line %s in\n%s", line, got)
			}
		}
	}
	if n := testutil.CollectAndCount(newCollector(false), "wayout_path_bytes_total", "wayout_path_guard_drops_total"); n != 0 {
		t.Errorf("%d kernel metrics while the kernel does not count", n)
	}
}

func TestMonitor(t *testing.T) {
	var ready atomic.Bool
	m := NewMonitor(newCollector(true), somePaths, ready.Load)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- m.Serve(l) }()
	defer func() {
		http.DefaultClient.CloseIdleConnections()
		if err := errors.Join(m.Close(), <-done); err != nil {
			t.Error(err)
		}
	}()
	get := func(path string) (int, string) {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+l.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if code, _ := get("/healthz"); code != http.StatusServiceUnavailable {
		t.Errorf("/healthz before ready: %d", code)
	}
	ready.Store(true)
	if code, body := get("/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/healthz: %d %q", code, body)
	}
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(body, `wayout_path_up{escaper="out",path="fra-2"} 1`) {
		t.Errorf("/metrics: %d\n%s", code, body)
	}
	if code, body := get("/"); code != http.StatusOK || !strings.Contains(body, "out/fra-2") {
		t.Errorf("dashboard: %d\n%s", code, body)
	}
	if code, _ := get("/other"); code != http.StatusNotFound {
		t.Errorf("another page: %d", code)
	}
}

func TestQuantile(t *testing.T) {
	h := Histogram{Bounds: []float64{1, 2, 4}, Counts: []uint64{50, 98, 100}, Count: 100}
	for _, c := range []struct{ q, want float64 }{{0.5, 1}, {0.51, 2}, {0.99, 4}, {1, 4}} {
		if got := h.Quantile(c.q); got != c.want {
			t.Errorf("quantile %v: %v, want %v", c.q, got, c.want)
		}
	}
	if got := (Histogram{}).Quantile(0.5); got != 0 {
		t.Errorf("quantile of nothing: %v", got)
	}
}
