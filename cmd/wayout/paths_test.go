package main_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// pathsDocument is what `paths --json` prints, field by field as it is
// documented.
type pathsDocument struct {
	Version *int `json:"version"`
	Paths   *[]struct {
		Path        *string    `json:"path"`
		Escaper     *string    `json:"escaper"`
		ID          *string    `json:"id"`
		State       *string    `json:"state"`
		Reason      *string    `json:"reason"`
		Since       *time.Time `json:"since"`
		IPv4        *string    `json:"ipv4"`
		IPv6        *string    `json:"ipv6"`
		Uplink      *string    `json:"uplink"`
		Interface   *string    `json:"interface"`
		Weight      *int       `json:"weight"`
		Connections *struct {
			Open   *int64 `json:"open"`
			Made   *int64 `json:"made"`
			Failed *int64 `json:"failed"`
			Closed *int64 `json:"closed"`
		} `json:"connections"`
		Bytes *struct {
			In  *int64 `json:"in"`
			Out *int64 `json:"out"`
		} `json:"bytes"`
		Packets *struct {
			In  *int64 `json:"in"`
			Out *int64 `json:"out"`
		} `json:"packets"`
		Retransmits *int64 `json:"retransmits"`
		RTT         *struct {
			P50 *float64 `json:"p50"`
			P99 *float64 `json:"p99"`
		} `json:"rtt_seconds"`
		GuardDrops *int64 `json:"guard_drops"`
	} `json:"paths"`
}

// keysOf gives all keys of a JSON document, sorted: a key that is null counts.
func keysOf(t *testing.T, text string) []string {
	t.Helper()
	seen := map[string]bool{}
	var walk func(prefix string, v any)
	walk = func(prefix string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				seen[prefix+k] = true
				walk(prefix+k+".", e)
			}
		case []any:
			for _, e := range v {
				walk(prefix, e)
			}
		}
	}
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	walk("", v)
	var all []string
	for k := range seen {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}

func decodePaths(t *testing.T, text string) pathsDocument {
	t.Helper()
	var d pathsDocument
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	if d.Version == nil || *d.Version != 1 || d.Paths == nil {
		t.Fatalf("%q", text)
	}
	return d
}

func TestPathsCommand(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(`uplink: [{name: isp1, interface: eth0, gateway4: ` + lab.Gateway1Of4 + `, gateway6: "` + lab.Gateway1Of6 + `"}]
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    nodes:
      - {id: both, ipv4: 198.51.100.11, ipv6: "2001:db8:100::11", uplink: isp1, weight: 7}
      - {id: four, ipv4: 203.0.113.11}
      - {id: six, ipv6: "2001:db8:200::11", interface: eth1}
      - {id: gone, ipv4: 198.51.100.77}
` + openServer)
	if told := s.ask(lab.Ask{Header: egress("both"), Tunnel: true}); told.Status != 200 {
		t.Fatalf("%d %s", told.Status, told.Body)
	}
	if told := s.ask(lab.Ask{Header: egress("both"), Target: lab.OriginAddr4 + ":9"}); told.Status != 502 {
		t.Fatalf("%d %s", told.Status, told.Body)
	}
	// The tunnel is over when it is off the books.
	s.daemon.Await(func(log string) bool { return strings.Count(log, `"msg":"request"`) == 2 })
	out, errs, code := s.command("paths", "--json", "--config", s.config)
	if code != 0 || errs != "" || strings.Count(out, "\n") != 1 {
		t.Fatalf("%d %q %q", code, out, errs)
	}
	d := decodePaths(t, out)
	want := strings.Fields(`paths paths.bytes paths.bytes.in paths.bytes.out paths.connections paths.connections.closed paths.connections.failed
		paths.connections.made paths.connections.open paths.escaper paths.guard_drops paths.id paths.interface paths.ipv4 paths.ipv6
		paths.packets paths.packets.in paths.packets.out paths.path paths.reason paths.retransmits paths.rtt_seconds paths.rtt_seconds.p50
		paths.rtt_seconds.p99 paths.since paths.state paths.uplink paths.weight version`)
	if got := keysOf(t, out); !slices.Equal(got, want) {
		t.Errorf("keys\n%q, want\n%q", got, want)
	}
	text := func(p *string) string {
		if p == nil {
			return "null"
		}
		return *p
	}
	var rows []string
	for _, p := range *d.Paths {
		rows = append(rows, fmt.Sprintln(*p.Path, *p.Escaper, *p.ID, *p.State, text(p.IPv4), text(p.IPv6), text(p.Uplink), text(p.Interface), *p.Weight,
			*p.Connections.Open, *p.Connections.Made, *p.Connections.Failed, *p.Connections.Closed))
		if age := time.Since(*p.Since); age < 0 || age > time.Hour {
			t.Errorf("%s: since %v", *p.Path, *p.Since)
		}
	}
	if got, want := strings.Join(rows, ""), `out/both out both up 198.51.100.11 2001:db8:100::11 isp1 eth0 7 0 1 1 1
out/four out four up 203.0.113.11 null null null 1 0 0 0 0
out/six out six up null 2001:db8:200::11 null eth1 1 0 0 0 0
out/gone out gone down 198.51.100.77 null null null 1 0 0 0 0
`; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	p := (*d.Paths)[0]
	if *p.Bytes.In < 500 || *p.Bytes.Out < 300 || *p.Packets.In < 4 || *p.Packets.Out < 4 || *p.RTT.P50 <= 0 || *p.RTT.P99 < *p.RTT.P50 {
		t.Errorf("the kernel's counters of out/both: %s", out)
	}
	if gone := (*d.Paths)[3]; !strings.Contains(*gone.Reason, "198.51.100.77") || *(*d.Paths)[1].Reason != "" {
		t.Errorf("reasons %q", *gone.Reason)
	}

	// The table has a line for each.
	out, _, code = s.command("paths", "--control", s.socket)
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if code != 0 || len(lines) != 5 || !strings.HasPrefix(lines[0], "PATH") || !strings.HasPrefix(lines[4], "out/gone") || !strings.Contains(lines[4], "down") {
		t.Errorf("%d\n%s", code, out)
	}

	// drain and undrain say what they did where that is asked for.
	for _, verb := range []string{"drain", "undrain"} {
		if out, errs, code := s.command(verb, "out/four", "--config", s.config); code != 0 || strings.Count(out, "\n") > 1 || errs != "" {
			t.Errorf("%s: %d %q %q", verb, code, out, errs)
		}
		out, _, code := s.command(verb, "--json", "out/four", "--config", s.config)
		if got := keysOf(t, out); code != 0 || !slices.Equal(got, []string{"draining", "path"}) || strings.Contains(out, "true") != (verb == "drain") {
			t.Errorf("%s: %d %q", verb, code, out)
		}
	}
	for _, name := range []string{"out/none", "none/four", "four", "out", "", "out/four/"} {
		out, errs, code := s.command("drain", name, "--config", s.config)
		if code != 1 || out != "" {
			t.Errorf("drain %q: %d %q", name, code, out)
		}
		sentence(t, "drain", errs)
	}
}

// TestWatch reads `paths --watch --json` while a path is drained and given
// back.
func TestWatch(t *testing.T) {
	t.Parallel()
	s := outScene(t, "")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd, err := s.Host.Start(lab.Program{Path: binary, Args: []string{"paths", "--watch", "--json", "--config", s.config}, Stdout: w, Stderr: os.Stderr})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	state := func(want string) {
		t.Helper()
		begun := time.Now()
		for lines.Scan() {
			d := decodePaths(t, lines.Text())
			if n := len(*d.Paths); n != 9 {
				t.Fatalf("%d paths in a line", n)
			}
			if *(*d.Paths)[0].State == want {
				return
			}
			if time.Since(begun) > 10*time.Second {
				break
			}
		}
		t.Fatalf("no line with state %s: %v", want, lines.Err())
	}
	state("up")
	for range 3 {
		if _, errs, code := s.command("drain", "out/p1", "--config", s.config); code != 0 {
			t.Fatal(errs)
		}
		state("draining")
		if _, errs, code := s.command("undrain", "out/p1", "--config", s.config); code != 0 {
			t.Fatal(errs)
		}
		state("up")
	}
	if err := cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("a watch that is ended by a signal: %v", err)
	}
}
