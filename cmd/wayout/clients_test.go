package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"wayout/scripts/lab"
)

// mixed is one of many different requests.
type mixed struct {
	method string
	size   int // of the body; -1: none
	path   int // selection, 1 to 8; 0: none
	tunnel bool
}

func mix(n int, seed uint64) []mixed {
	r := rand.New(rand.NewPCG(seed, 1))
	all := make([]mixed, n)
	for i := range all {
		m := mixed{method: http.MethodGet, size: -1, path: r.IntN(9)}
		switch r.IntN(5) {
		case 0:
			m.method, m.size = http.MethodPost, r.IntN(200_000)
		case 1:
			m.method, m.size = http.MethodPut, r.IntN(100)
		case 2:
			m.method = http.MethodHead
		case 3:
			m.tunnel = true
		}
		all[i] = m
	}
	return all
}

// right says what is wrong with what the origin saw; "" when nothing is.
func (m mixed) right(seen lab.Seen) string {
	v4 := fmt.Sprint(lab.Egress4())
	switch {
	case m.path > 0 && seen.Source != lab.Egress4()[m.path-1].String():
		return fmt.Sprintf("path %d left by %s", m.path, seen.Source)
	case !strings.Contains(v4, seen.Source):
		return "left by " + seen.Source
	case seen.Method != m.method:
		return fmt.Sprintf("%s became %s", m.method, seen.Method)
	case seen.Body != int64(max(m.size, 0)):
		return fmt.Sprintf("a body of %d became %d", m.size, seen.Body)
	}
	return ""
}

// TestGoClient sends 1,000 mixed requests by net/http.
func TestGoClient(t *testing.T) {
	s := outScene(t, "")
	c := s.httpClient("http://" + proxyAt(3128).String())
	for i, m := range mix(1000, 1) {
		if err := m.send(c); err != nil {
			t.Fatalf("request %d, %+v: %v", i, m, err)
		}
	}
}

func (m mixed) send(c *http.Client) error {
	var body io.Reader
	if m.size >= 0 {
		body = bytes.NewReader(make([]byte, m.size))
	}
	req, err := http.NewRequest(m.method, "http://"+target4+"/x?y=z", body)
	if err != nil {
		return err
	}
	if m.path > 0 {
		req.Header.Set("X-Egress-Path", strconv.Itoa(m.path))
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", resp.Status)
	}
	if m.method == http.MethodHead {
		return nil
	}
	var seen lab.Seen
	if err := json.NewDecoder(resp.Body).Decode(&seen); err != nil {
		return err
	}
	if wrong := m.right(seen); wrong != "" {
		return fmt.Errorf("%s", wrong)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// program runs a client program in the client's namespace.
func (s *scene) program(path string, args ...string) string {
	s.t.Helper()
	var out, errs bytes.Buffer
	cmd, err := s.Client.Start(lab.Program{Path: path, Args: args, Stdout: &out, Stderr: &errs})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		s.t.Fatalf("%s: %v\n%s", path, err, &errs)
	}
	return out.String()
}

func lookPath(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		lab.Missing(t, name)
	}
	return path
}

// TestCurl sends 1,000 mixed requests by curl, which keeps its connections.
func TestCurl(t *testing.T) {
	s := outScene(t, "")
	curl := lookPath(t, "curl")
	requests := mix(1000, 2)
	dir := t.TempDir()
	var config strings.Builder
	for i, m := range requests {
		if i > 0 {
			config.WriteString("next\n")
		}
		fmt.Fprintf(&config, "url = \"http://%s/x\"\nproxy = \"http://%s\"\nsilent\nshow-error\nfail\nmax-time = 60\n", target4, proxyAt(3128))
		fmt.Fprintf(&config, "output = \"%s\"\n", filepath.Join(dir, strconv.Itoa(i)))
		selection := "header"
		if m.tunnel {
			// curl uses a tunnel again whatever it said to the proxy for it.
			config.WriteString("proxytunnel\nheader = \"Connection: close\"\n")
			selection = "proxy-header"
		}
		if m.path > 0 {
			fmt.Fprintf(&config, "%s = \"X-Egress-Path: %d\"\n", selection, m.path)
		}
		switch {
		case m.method == http.MethodHead:
			config.WriteString("head\n")
		case m.size >= 0:
			file := filepath.Join(dir, "body-"+strconv.Itoa(i))
			if err := os.WriteFile(file, make([]byte, m.size), 0o600); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&config, "request = \"%s\"\ndata-binary = \"@%s\"\n", m.method, file)
		}
	}
	file := filepath.Join(dir, "config")
	if err := os.WriteFile(file, []byte(config.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	s.program(curl, "--config", file)
	for i, m := range requests {
		b, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		if m.method == http.MethodHead {
			if !bytes.HasPrefix(b, []byte("HTTP/1.1 200 ")) {
				t.Errorf("request %d, %+v: %q", i, m, b)
			}
			continue
		}
		var seen lab.Seen
		if err := json.Unmarshal(b, &seen); err != nil {
			t.Fatalf("request %d, %+v: %v in %q", i, m, err, b)
		}
		if wrong := m.right(seen); wrong != "" {
			t.Errorf("request %d, %+v: %s", i, m, wrong)
		}
	}
}

// pythonClient sends the requests of a JSON list by http.client and prints
// what came back as another.
const pythonClient = `
import http.client, json, sys
proxy, origin, requests = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
host, port = proxy.split(":")
kept, out = None, []
for m in requests:
    head = {"X-Egress-Path": str(m["path"])} if m["path"] else {}
    if m["tunnel"]:
        c = http.client.HTTPConnection(host, int(port), timeout=60)
        name, at = origin.split(":")
        c.set_tunnel(name, int(at), headers=head)
        c.request("GET", "/x")
    else:
        if kept is None:
            kept = http.client.HTTPConnection(host, int(port), timeout=60)
        c = kept
        body = None if m["size"] < 0 else bytes(m["size"])
        if body and m["size"] % 2:
            body = iter([body[:len(body) // 2], body[len(body) // 2:]])  # chunked
        c.request(m["method"], "http://" + origin + "/x", body=body, headers=head, encode_chunked=True)
    r = c.getresponse()
    out.append([r.status, r.read().decode()])
    if m["tunnel"]:
        c.close()
json.dump(out, sys.stdout)
`

func TestPythonClient(t *testing.T) {
	s := outScene(t, "")
	python := lookPath(t, "python3")
	requests := mix(1000, 3)
	type ask struct {
		Method string `json:"method"`
		Size   int    `json:"size"`
		Path   int    `json:"path"`
		Tunnel bool   `json:"tunnel"`
	}
	asks := make([]ask, len(requests))
	for i, m := range requests {
		asks[i] = ask{m.method, m.size, m.path, m.tunnel}
	}
	b, err := json.Marshal(asks)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "requests")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var got [][2]any
	if err := json.Unmarshal([]byte(s.program(python, "-c", pythonClient, proxyAt(3128).String(), target4, file)), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != len(requests) {
		t.Fatalf("%d answers to %d requests", len(got), len(requests))
	}
	for i, m := range requests {
		if got[i][0] != 200.0 {
			t.Errorf("request %d, %+v: %v", i, m, got[i])
			continue
		}
		if m.method == http.MethodHead {
			continue
		}
		var seen lab.Seen
		if err := json.Unmarshal([]byte(got[i][1].(string)), &seen); err != nil {
			t.Fatal(err)
		}
		if wrong := m.right(seen); wrong != "" {
			t.Errorf("request %d, %+v: %s", i, m, wrong)
		}
	}
}

// TestManyRequestsAtOnce sends 10,000 requests by 64 clients and then looks
// for what the daemon has kept: goroutines and descriptors.
func TestManyRequestsAtOnce(t *testing.T) {
	const total, clients = 10_000, 64
	s := outScene(t, "metrics: {listen: \"10.0.0.1:9180\"}\n")
	goroutines := func() int {
		told, err := s.Client.Dial(proxyAt(9180))
		if err != nil {
			t.Fatal(err)
		}
		defer told.Close()
		fmt.Fprint(told, "GET /metrics HTTP/1.0\r\n\r\n")
		b, err := io.ReadAll(told)
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`(?m)^go_goroutines (\d+)$`).FindSubmatch(b)
		if m == nil {
			t.Fatalf("no go_goroutines in %s", b)
		}
		n, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if told := s.ask(lab.Ask{}); told.Status != 200 {
		t.Fatal(told.Status)
	}
	fds, routines := descriptorsOf(t, s.daemon.PID()), goroutines()

	proxy := "http://" + proxyAt(3128).String()
	requests := mix(total, 4)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		c := s.httpClient(proxy)
		wg.Go(func() {
			defer c.CloseIdleConnections()
			for {
				i := next.Add(1) - 1
				if i >= total {
					return
				}
				m := requests[i]
				if m.tunnel {
					told, err := s.try(lab.Ask{Tunnel: true, Header: egress(strconv.Itoa(max(m.path, 1)))})
					if err != nil || told.Status != 200 || told.Seen.Source != lab.Egress4()[max(m.path, 1)-1].String() {
						t.Errorf("request %d, %+v: %v, %d from %s", i, m, err, told.Status, told.Seen.Source)
					}
					continue
				}
				if err := m.send(c); err != nil {
					t.Errorf("request %d, %+v: %v", i, m, err)
				}
			}
		})
	}
	wg.Wait()
	// What stays open is idle connections to the origin: they end with it. What
	// stays of goroutines is the coroutines that the workers keep for the next
	// tasks, 64 for each of two at most: as many as ran at once.
	if err := s.origin.Close(); err != nil {
		t.Fatal(err)
	}
	const spare = 2 * 64
	var kept string
	eventually(t, "nothing is left behind", func() bool {
		open := int64(0)
		for _, p := range s.paths() {
			open += p.Connections.Open
		}
		fdsNow, routinesNow := descriptorsOf(t, s.daemon.PID()), goroutines()
		if open > 0 || fdsNow > fds+8 || routinesNow > routines+spare+8 {
			kept = fmt.Sprintf("%d connections open, %d descriptors (%d at first), %d goroutines (%d at first)", open, fdsNow, fds, routinesNow, routines)
			return false
		}
		return true
	}, &kept)
}
