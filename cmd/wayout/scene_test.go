package main_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// binary is the program under test, built once with the race detector;
// WAYOUT_TEST_BINARY names one for where it cannot be built (scripts/vm).
var binary string

func TestMain(m *testing.M) {
	if what := os.Getenv(dialEnv); what != "" {
		os.Exit(dialFromCgroup(what))
	}
	// Programs with the race detector sleep for a second before they end, unless
	// they are told otherwise.
	os.Setenv("GORACE", "atexit_sleep_ms=20 "+os.Getenv("GORACE"))
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "wayout-test-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if binary = os.Getenv("WAYOUT_TEST_BINARY"); binary != "" {
			return m.Run()
		}
		binary = filepath.Join(dir, "wayout")
		if out, err := exec.Command("go", "build", "-race", "-o", binary, ".").CombinedOutput(); err != nil {
			panic(fmt.Sprintf("build: %v\n%s", err, out))
		}
		return m.Run()
	}())
}

const (
	target4 = lab.OriginAddr4 + ":80"
	target6 = "[" + lab.OriginAddr6 + "]:80"
)

func proxyAt(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(lab.HostAddr4), port)
}

// scene is the world with an origin and a daemon in it.
type scene struct {
	*lab.World
	t      *testing.T
	dir    string
	config string // the file
	socket string
	origin *lab.Origin
	daemon *lab.Daemon
}

// newScene makes the world and the origin.
func newScene(t *testing.T, egress bool) *scene {
	t.Helper()
	lab.Require(t)
	w, err := lab.NewWorld(egress)
	if err != nil {
		t.Fatal(err)
	}
	return sceneIn(t, w, w.Close)
}

// sceneIn starts the origin of a world, which ends with the test.
func sceneIn(t *testing.T, w *lab.World, end func() error) *scene {
	t.Helper()
	dir := t.TempDir()
	s := &scene{World: w, t: t, dir: dir, config: filepath.Join(dir, "wayout.yaml"), socket: filepath.Join(dir, "control.sock")}
	t.Cleanup(func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	s.origin = lab.StartOrigin(s.listen(target4), s.listen(target6))
	t.Cleanup(func() {
		if err := s.origin.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// listen opens a listener at the origin.
func (s *scene) listen(at string) *net.TCPListener {
	s.t.Helper()
	l, err := s.Origin.Listen(netip.MustParseAddrPort(at))
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

// write puts the configuration in its place. The control socket is added.
func (s *scene) write(config string) {
	s.t.Helper()
	config = fmt.Sprintf("control: {socket: %s}\n%s", s.socket, config)
	if err := os.WriteFile(s.config, []byte(config), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// start runs the daemon and stops it at the end of the test, when it has to
// end well and without a race.
func (s *scene) start(config string) {
	s.t.Helper()
	s.write(config)
	s.run(lab.Program{})
}

func (s *scene) run(p lab.Program) {
	s.t.Helper()
	p.Path, p.Args = binary, []string{"serve", "--config", s.config}
	d, err := lab.StartDaemon(s.Host, p)
	if err != nil {
		s.t.Fatal(err)
	}
	s.watchOver(d)
}

// watchOver makes a daemon the scene's: it has to end well, and without a race.
func (s *scene) watchOver(d *lab.Daemon) {
	s.daemon = d
	s.t.Cleanup(func() {
		select {
		case <-d.Done():
		default:
			if err := d.Stop(); err != nil {
				s.t.Error(err)
			}
		}
		if strings.Contains(d.Log(), "DATA RACE") || strings.Contains(d.Log(), "panic:") {
			s.t.Errorf("the daemon's log:\n%s", d.Log())
		}
		if s.t.Failed() {
			log := d.Log()
			s.t.Logf("the daemon's log ends with:\n%s", log[max(0, len(log)-8000):])
		}
	})
}

// ask sends one request from the client.
func (s *scene) ask(a lab.Ask) lab.Told {
	s.t.Helper()
	told, err := s.try(a)
	if err != nil {
		s.t.Fatalf("%+v: %v", a.Header, err)
	}
	return told
}

func (s *scene) try(a lab.Ask) (lab.Told, error) {
	a.From = s.Client
	if !a.Proxy.IsValid() {
		a.Proxy = proxyAt(3128)
	}
	if a.Target == "" {
		a.Target = target4
	}
	return a.Do()
}

// command runs the program in the host's namespace and gives what it printed
// and its exit code.
func (s *scene) command(args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	var out, errs strings.Builder
	cmd, err := s.Host.Start(lab.Program{Path: binary, Args: args, Stdout: &out, Stderr: &errs})
	if err != nil {
		s.t.Fatal(err)
	}
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return out.String(), errs.String(), exit.ExitCode()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return out.String(), errs.String(), 0
}

// paths asks the daemon for its paths.
func (s *scene) paths() map[string]control.Path {
	s.t.Helper()
	p, err := control.NewClient(s.socket).Paths(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	m := make(map[string]control.Path, len(p.Paths))
	for _, p := range p.Paths {
		m[p.Path] = p
	}
	return m
}

// until waits for a path to satisfy a condition, and gives how long that took.
func (s *scene) until(path string, ok func(control.Path) bool) time.Duration {
	s.t.Helper()
	begun := time.Now()
	noticed := errors.New("noticed")
	var last control.Path
	err := control.NewClient(s.socket).Watch(s.t.Context(), func(all control.Paths) error {
		for _, p := range all.Paths {
			if p.Path == path {
				last = p
				if ok(p) {
					return noticed
				}
			}
		}
		if time.Since(begun) > 10*time.Second {
			return errors.New("not within 10 s")
		}
		return nil
	})
	if !errors.Is(err, noticed) {
		s.t.Fatalf("waiting for %s: %v; its last state: %+v", path, err, last)
	}
	return time.Since(begun)
}

// outScene is the usual scene: escaper out with eight dual-stack paths p1 to
// p8, p9 with IPv4 alone (eth0's primary address) and an open proxy on 3128.
func outScene(t *testing.T, more string) *scene {
	t.Helper()
	s := newScene(t, true)
	s.start(outConfig(more))
	return s
}

func outConfig(more string) string {
	var b strings.Builder
	b.WriteString("escaper:\n  - name: out\n    type: direct_fixed\n    enable_path_selection: true\n    nodes:\n")
	v6 := lab.Egress6()
	for i, a := range lab.Egress4() {
		fmt.Fprintf(&b, "      - {id: p%d, ipv4: %s, ipv6: %q}\n", i+1, a, v6[i])
	}
	fmt.Fprintf(&b, "      - {id: p9, ipv4: %s, weight: 0}\n", lab.Primary1Of4)
	b.WriteString(more)
	if !strings.Contains(more, "server:") {
		b.WriteString(openServer)
	}
	return b.String()
}

const openServer = `server:
  - {name: web, type: http_proxy, listen: "` + lab.HostAddr4 + `:3128", open: true, escaper: out, path_selection_header: X-Egress-Path, report_egress: true}
`

// httpClient is Go's own client, in the client's namespace, through the proxy.
func (s *scene) httpClient(proxy string) *http.Client {
	u := mustURL(proxy)
	tr := &http.Transport{
		Proxy: http.ProxyURL(u), MaxIdleConnsPerHost: 256,
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			return s.Client.Dial(netip.MustParseAddrPort(addr))
		},
	}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// descriptorsOf counts the daemon's descriptors.
func descriptorsOf(t *testing.T, pid int) int {
	t.Helper()
	e, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}
