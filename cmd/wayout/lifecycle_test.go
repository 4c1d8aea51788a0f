package main_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/control"
	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// monitored is the usual configuration with metrics.
func monitored(more string) string {
	return "metrics: {listen: \"10.0.0.1:9180\"}\n" + more + outConfig("")
}

// health asks /healthz from the client's side.
func (s *scene) health(t *testing.T) (int, string) {
	t.Helper()
	w := s.dial(t, 9180)
	w.say("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	resp, body := w.answer("GET")
	return resp.StatusCode, body
}

// echoTunnel opens a tunnel to an echo of this test's.
func (s *scene) echoTunnel(t *testing.T) *peer {
	t.Helper()
	at := s.serve(t, func(_ int, o *peer) {
		b := make([]byte, 1024)
		for {
			n, err := o.r.Read(b)
			if err != nil {
				return
			}
			o.say(string(b[:n]))
		}
	})
	w := s.connect(t, at)
	w.alive()
	return w
}

// alive checks that the tunnel carries bytes both ways.
func (w *peer) alive() {
	w.t.Helper()
	w.say("alive?")
	w.expect("alive?")
}

// stopping sends SIGTERM and waits until the daemon says that it stops. What
// comes is the end of the process: nil for exit code 0.
func (s *scene) stopping(t *testing.T) <-chan error {
	t.Helper()
	end := make(chan error, 1)
	go func() { end <- s.daemon.Stop() }()
	if !s.daemon.Await(func(log string) bool { return strings.Contains(log, "msg=stopping") }) {
		t.Fatalf("no msg=stopping in the log:\n%s", s.daemon.Log())
	}
	return end
}

// endsBy waits for the end of the daemon, which has to be a good one.
func endsBy(t *testing.T, end <-chan error, limit time.Duration) {
	t.Helper()
	select {
	case err := <-end:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(limit):
		t.Fatalf("the daemon has not ended after %v", limit)
	}
}

// refusesConnections waits until the proxy's port is closed: that it stops is
// logged a moment before it does.
func (s *scene) refusesConnections(t *testing.T) {
	t.Helper()
	for begun := time.Now(); ; {
		c, err := s.Client.Dial(proxyAt(3128))
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if err == nil {
			c.Close()
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("new connections are not refused: %v", err)
		}
	}
}

func TestReadyAndStop(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(monitored(""))
	ready := regexp.MustCompile(`(?m)^time=\S+ level=INFO msg=ready .*paths=9\b`)
	if log := s.daemon.Log(); len(ready.FindAllString(log, -1)) != 1 {
		t.Errorf("no ready line, or several, in\n%s", log)
	}
	if code, body := s.health(t); code != 200 || body != "ok\n" {
		t.Errorf("/healthz: %d %q", code, body)
	}
	if told := s.ask(lab.Ask{}); told.Status != 200 {
		t.Errorf("%d %s", told.Status, told.Body)
	}
	// An idle client connection is nothing that is open, and neither is an
	// idle upstream connection.
	w := s.dial(t, 3128)
	w.say(requestTo("GET", target4) + "\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("%s", resp.Status)
	}
	if info, err := os.Stat(s.socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the control socket is %v, %v", info, err)
	}
	begun := time.Now()
	endsBy(t, s.stopping(t), 30*time.Second)
	if took := time.Since(begun); took > 15*time.Second {
		t.Errorf("with nothing open it took %v to stop", took)
	}
	w.ended()
	if _, err := os.Stat(s.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket's file is still there: %v", err)
	}
	s.refusesConnections(t)
}

// TestJSONLog has the daemon's own lines as JSON, each of them.
func TestJSONLog(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start("log: {format: json}\n" + outConfig(""))
	s.ask(lab.Ask{})
	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(s.daemon.Log()) {
		if !strings.HasPrefix(line, `{"time":"`) || !strings.HasSuffix(line, "}\n") {
			t.Errorf("%q", line)
		}
	}
}

func TestDrainOnStop(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(monitored("drain_timeout: 1h\n"))
	tunnel := s.echoTunnel(t)
	// A request under way is served to its end, and its connection ends then.
	answer := make(chan struct{})
	at := s.serve(t, func(_ int, o *peer) {
		o.head()
		o.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
		<-answer
		o.say("hi")
	})
	w := s.dial(t, 3128)
	w.say(requestTo("GET", at) + "\r\n")
	w.head()
	end := s.stopping(t)
	s.refusesConnections(t)
	if code, _ := s.health(t); code != 503 {
		t.Errorf("/healthz while draining: %d", code)
	}
	if out, errs, code := s.command("paths", "--config", s.config); code != 0 || !strings.Contains(out, "out/p1") {
		t.Errorf("paths while draining: %d %q", code, errs)
	}
	tunnel.alive()
	close(answer)
	w.expect("hi")
	w.ended()
	tunnel.alive()
	select {
	case err := <-end:
		t.Fatalf("the daemon has ended with a tunnel open: %v", err)
	default:
	}
	tunnel.Close()
	endsBy(t, end, 30*time.Second)
}

func TestDrainTimeout(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(monitored("drain_timeout: 500ms\n"))
	tunnel := s.echoTunnel(t)
	begun := time.Now()
	end := s.stopping(t)
	tunnel.ended()
	if took := time.Since(begun); took < 400*time.Millisecond {
		t.Errorf("the tunnel was cut after %v", took)
	}
	endsBy(t, end, 30*time.Second)
	if !strings.Contains(s.daemon.Log(), "connections cut") {
		t.Errorf("nothing of the cut in the log")
	}
}

func TestSecondSignal(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(monitored("drain_timeout: 1h\n"))
	tunnel := s.echoTunnel(t)
	end := s.stopping(t)
	tunnel.alive()
	if err := s.daemon.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	tunnel.ended()
	endsBy(t, end, 30*time.Second)
	if got := s.ours(t); len(got) != 16 {
		t.Errorf("what is left: %q", got)
	}
}

// TestStaleSocket starts over the control socket that a killed daemon left,
// and over one that never was a daemon's.
func TestStaleSocket(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(outConfig(""))
	if err := s.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.socket); err != nil {
		t.Fatalf("the killed daemon's socket: %v", err)
	}
	s.run(lab.Program{})
	if p := s.paths(); len(p) != 9 {
		t.Errorf("%d paths", len(p))
	}
	if told := s.ask(lab.Ask{Header: egress("p3")}); told.Status != 200 || told.Seen.Source != lab.Egress4()[2].String() {
		t.Errorf("%d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	staleSocket(t, s.socket)
	s.run(lab.Program{})
	if p := s.paths(); len(p) != 9 {
		t.Errorf("%d paths", len(p))
	}
}

// failsToStart runs a daemon that has to end by itself with exit code 1, and
// gives what it said.
func (s *scene) failsToStart(t *testing.T, config string) string {
	t.Helper()
	out, errs, code := s.command("serve", "--config", config)
	if code != 1 || out != "" {
		t.Errorf("%d %q %q, want exit code 1", code, out, errs)
	}
	lines := strings.Split(strings.TrimSuffix(errs, "\n"), "\n")
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "wayout: ") {
		t.Errorf("the last line is %q", last)
	}
	if strings.Contains(errs, "msg=ready") || strings.Contains(errs, "panic") || strings.Contains(errs, "DATA RACE") {
		t.Errorf("%s", errs)
	}
	return errs
}

// TestSecondDaemonOnTheSocket starts another daemon whose control socket is
// that of one that runs, and that has nothing else in common with it. The first
// one goes on.
func TestSecondDaemonOnTheSocket(t *testing.T) {
	t.Parallel()
	s := newScene(t, false)
	uplinks := `uplink: [{name: isp1, interface: eth0, gateway4: ` + lab.Gateway1Of4 + `, manage_addresses: true}]
escaper: [{name: out, type: direct_fixed, enable_path_selection: true, uplink: isp1, bind_ip: [198.51.100.11, 198.51.100.12]}]
`
	s.start(uplinks + openServer)
	before := s.ours(t)
	tunnel := s.echoTunnel(t)
	second := filepath.Join(s.dir, "second.yaml")
	write(t, second, "control: {socket: "+s.socket+"}\nnetcfg: {mark_mask: 0xffff0000, table_base: 20000, rule_priority: 20000}\n"+
		strings.NewReplacer("100.11", "100.13", "100.12", "100.14").Replace(uplinks)+strings.Replace(openServer, ":3128", ":3999", 1))
	if errs := s.failsToStart(t, second); !strings.Contains(errs, "another wayout answers") {
		t.Errorf("%q", errs)
	}
	tunnel.alive()
	if told := s.ask(lab.Ask{Header: egress("198.51.100.12")}); told.Status != 200 || told.Seen.Source != "198.51.100.12" {
		t.Errorf("the first daemon: %d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
	if p := s.paths(); p["out/198.51.100.11"].State != "up" {
		t.Errorf("the first daemon's paths: %+v", p)
	}
	if got := s.ours(t); !slices.Equal(got, before) {
		t.Errorf("what is in the kernel became\n%s\nfrom\n%s", strings.Join(got, "\n"), strings.Join(before, "\n"))
	}
}

// TestPortTaken starts a daemon whose port another program has: it ends, and
// leaves nothing of itself.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	s := newScene(t, false)
	l, err := s.Host.Listen(proxyAt(3128))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.write(`uplink: [{name: isp1, interface: eth0, gateway4: ` + lab.Gateway1Of4 + `, manage_addresses: true}]
escaper: [{name: out, type: direct_fixed, uplink: isp1, bind_ip: [198.51.100.11]}]
` + openServer)
	if errs := s.failsToStart(t, s.config); !strings.Contains(errs, "10.0.0.1:3128") || !strings.Contains(errs, "in use") {
		t.Errorf("%q", errs)
	}
	if got := s.ours(t); len(got) != 0 {
		t.Errorf("what is left: %q", got)
	}
	if _, err := os.Stat(s.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket: %v", err)
	}
}

// TestZeroConfiguration runs the daemon without a file, in mounts of its own
// so that its control socket has the usual place.
func TestZeroConfiguration(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	if _, err := os.Stat("/etc/wayout/wayout.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("/etc/wayout/wayout.yaml is there (%v): this test is about what is done without", err)
	}
	var mu sync.Mutex
	var table strings.Builder
	d, err := lab.StartDaemon(s.Host, lab.Program{
		Path: "/bin/sh", Args: []string{"-c", `mount -t tmpfs none /run && exec "$0" serve`, binary},
		// It is the files that give a program mounts of its own.
		Files: map[string]string{"/etc/hosts": "127.0.0.1 localhost\n"}, Stdout: writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return table.Write(p)
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.watchOver(d)
	mu.Lock()
	text := table.String()
	mu.Unlock()

	// The table names each global address, in order.
	rows := regexp.MustCompile(`(?m)^ *(\d+)  out/(\S+)$`).FindAllStringSubmatch(text, -1)
	var named []string
	for i, r := range rows {
		if r[1] != fmt.Sprint(i+1) {
			t.Errorf("row %d is %q", i+1, r[0])
		}
		named = append(named, r[2])
	}
	want := []string{lab.HostAddr4, lab.HostAddr6, lab.Primary1Of4, lab.Primary2Of4, lab.Primary1Of6, lab.Primary2Of6}
	for i, a := range lab.Egress4() {
		want = append(want, a.String(), lab.Egress6()[i].String())
	}
	sorted := slices.Sorted(slices.Values(named))
	slices.Sort(want)
	if !slices.Equal(sorted, want) {
		t.Fatalf("the table\n%s\nnames %q, want %q", text, sorted, want)
	}
	for _, words := range []string{"127.0.0.1:3128", "X-Egress-Path"} {
		if !strings.Contains(text, words) {
			t.Errorf("the table says nothing of %s:\n%s", words, text)
		}
	}

	ask := func(a lab.Ask) lab.Told {
		t.Helper()
		a.From, a.Proxy = s.Host, netip.MustParseAddrPort("127.0.0.1:3128")
		if a.Target == "" {
			a.Target = target4
		}
		told, err := a.Do()
		if err != nil {
			t.Fatalf("%v: %v", a.Header, err)
		}
		return told
	}
	for i, name := range named {
		a := netip.MustParseAddr(name)
		if name == lab.HostAddr4 || name == lab.HostAddr6 {
			continue // the origin knows no way back to these
		}
		target := target4
		if a.Is6() {
			target = target6
		}
		for _, value := range []string{name, fmt.Sprint(i + 1), fmt.Sprintf(`{"out":%d}`, i+1+len(named))} {
			told := ask(lab.Ask{Header: egress(value), Target: target, Tunnel: i%2 == 0})
			if told.Status != http.StatusOK || told.Seen.Source != name {
				t.Errorf("%s: %d %q from %s, want %s", value, told.Status, told.Body, told.Seen.Source, name)
			}
		}
	}
	if told := ask(lab.Ask{Header: egress("nobody")}); told.Status != 400 {
		t.Errorf("%d", told.Status)
	}
	// SOCKS is on the same port, and leaves by any of them. The way back is made
	// for that.
	for _, r := range []struct {
		ns       *lab.NS
		dst, via string
	}{
		{s.ISP1, lab.HostAddr4 + "/32", lab.Primary1Of4},
		{s.ISP1, lab.HostAddr6 + "/128", lab.Primary1Of6},
		{s.Origin, lab.HostAddr4 + "/32", "192.0.2.1"},
		{s.Origin, lab.HostAddr6 + "/128", "2001:db8:1::1"},
	} {
		if err := r.ns.AddRoute(netip.MustParsePrefix(r.dst), netip.MustParseAddr(r.via)); err != nil {
			t.Fatal(err)
		}
	}
	for i, target := range []string{target4, target4, target6} {
		c, err := s.Host.Dial(netip.MustParseAddrPort("127.0.0.1:3128"))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		var bound netip.AddrPort
		if i == 0 {
			_, bound, err = connect4(c, target)
		} else {
			bound, err = new(client.Dialer).Handshake(t.Context(), c, target)
		}
		if err != nil || !slices.Contains(named, bound.Addr().String()) {
			t.Fatalf("SOCKS to %s: told %s, %v", target, bound, err)
		}
		if seen, err := getThrough(c, target); err != nil || seenAt(seen) != bound {
			t.Errorf("SOCKS to %s: told %s, seen %s, %v", target, bound, seenAt(seen), err)
		}
		c.Close()
	}
	// From the outside there is nothing.
	if c, err := s.Client.Dial(proxyAt(3128)); err == nil {
		c.Close()
		t.Error("it listens on other addresses than loopback")
	}
	p, err := control.NewClient(fmt.Sprintf("/proc/%d/root/run/wayout/control.sock", d.PID())).Paths(t.Context())
	if err != nil || len(p.Paths) != len(named) {
		t.Errorf("%d paths, %v", len(p.Paths), err)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestNothingToStartWith has neither a configuration nor an address.
func TestNothingToStartWith(t *testing.T) {
	t.Parallel()
	n := lab.TestNS(t, "bare")
	var errs strings.Builder
	cmd, err := n.Start(lab.Program{Path: binary, Args: []string{"serve"}, Stderr: &errs})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v", err)
	}
	sentence(t, "serve", errs.String())
}

// TestNotify listens as a service manager would.
func TestNotify(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.write(monitored(""))
	path := filepath.Join(s.dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.SetReadDeadline(time.Now().Add(peerTime)); err != nil {
		t.Fatal(err)
	}
	var said []string
	until := func(want string) {
		t.Helper()
		b := make([]byte, 4096)
		for {
			n, err := l.Read(b)
			if err != nil {
				t.Fatalf("%v after %q, waiting for %s", err, said, want)
			}
			lines := strings.Split(strings.TrimSpace(string(b[:n])), "\n")
			said = append(said, lines...)
			if slices.Contains(lines, want) {
				return
			}
		}
	}
	s.run(lab.Program{Env: append(os.Environ(), "NOTIFY_SOCKET="+path)})
	until("READY=1")
	if code, _ := s.health(t); code != 200 {
		t.Errorf("READY=1, and /healthz is %d", code)
	}
	if told := s.ask(lab.Ask{}); told.Status != 200 {
		t.Errorf("READY=1, and a request gets %d", told.Status)
	}
	end := s.stopping(t)
	until("STOPPING=1")
	endsBy(t, end, 30*time.Second)
	if n := len(said); said[n-1] != "STOPPING=1" || slices.Index(said, "READY=1") > n-2 {
		t.Errorf("said %q", said)
	}
}
