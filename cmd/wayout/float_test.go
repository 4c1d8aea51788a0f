package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
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

// floatScene is a kernelScene whose escaper dyn has the nodes that are
// published.
type floatScene struct {
	*kernelScene
	cache string
}

func newFloatScene(t *testing.T) *floatScene {
	t.Helper()
	k := newKernelScene(t)
	f := &floatScene{k, filepath.Join(k.dir, "cache", "dyn.json")}
	f.serveEcho()
	return f
}

// config is escaper dyn by two uplinks, with op, whose path the operator has
// described, and plain.
func (f *floatScene) floatConfig(inline string) string {
	h := hashOf(f.t, "secret")
	return fmt.Sprintf(`metrics: {listen: "10.0.0.1:9180"}
%s
escaper:
  - {name: dyn, type: direct_float, enable_path_selection: true, cache: %q}
user_group:
  - name: team
    users:
      - {name: op, password: %q, egress_path: {dyn: %s}}
      - {name: plain, password: %q}
server:
  - {name: web, type: http_proxy, listen: "10.0.0.1:3128", open: true, escaper: dyn, path_selection_header: X-Egress-Path, report_egress: true}
  - {name: named, type: http_proxy, listen: "10.0.0.1:3130", user_group: team, escaper: dyn, path_selection_header: X-Egress-Path}
`, twoUplinks, f.cache, h, inline, h)
}

const inlineOwn = `{ip: 203.0.113.14, id: own, uplink: isp2}`

// publish runs the command with a publication on its standard input.
func (f *floatScene) publish(text string, args ...string) (stdout, stderr string, code int) {
	f.t.Helper()
	var out, errs strings.Builder
	cmd, err := f.Host.Start(lab.Program{
		Path: binary, Args: append([]string{"publish", "--control", f.socket, "dyn", "-"}, args...),
		Stdin: strings.NewReader(text), Stdout: &out, Stderr: &errs,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) {
			f.t.Fatal(err)
		}
		code = exit.ExitCode()
	}
	return out.String(), errs.String(), code
}

func (f *floatScene) mustPublish(text string) {
	f.t.Helper()
	if out, errs, code := f.publish(text); code != 0 {
		f.t.Fatalf("publish: %d %s%s", code, out, errs)
	}
}

// asks sends one request to a port, and says what has to come of it.
func (s *scene) asks(name string, port uint16, header []string, source string, status int) {
	s.t.Helper()
	selectionCase{name: name, port: port, header: header, source: source, status: status}.check(s, false)
	selectionCase{name: name, port: port, header: header, source: source, status: status}.check(s, true)
}

// onHost says whether an address is on the host's interfaces.
func (f *floatScene) onHost(a netip.Addr) bool {
	f.t.Helper()
	return strings.Contains(f.ip("addr"), " "+a.String()+"/")
}

func TestPublish(t *testing.T) {
	t.Parallel()
	f := newFloatScene(t)
	f.start(f.floatConfig(inlineOwn))
	v4, v6 := lab.Egress4(), lab.Egress6()
	if told := f.ask(lab.Ask{}); told.Status != 503 {
		t.Errorf("before anything is published: %d %s", told.Status, told.Body)
	}
	f.asks("index of no nodes", 3128, egress("1"), "", 400)

	file := filepath.Join(f.dir, "nodes.json")
	first := fmt.Sprintf(`[
  {"ip": %q, "id": "a", "uplink": "isp1", "isp": "Hidden Telecom", "area": "hidden-area", "eip": "hidden-eip"},
  {"ipv4": %q, "ipv6": %q, "id": "b", "uplink": "isp1"},
  {"ip": %q, "uplink": "isp2"}
]`, v4[0], v4[1], v6[1], v4[4])
	if err := os.WriteFile(file, []byte(first), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code := f.command("publish", "--config", f.config, "dyn", file)
	if code != 0 || out != "dyn: 3 nodes\n" || errs != "" {
		t.Fatalf("publish: %d %q %q", code, out, errs)
	}
	f.until("dyn/b", func(p control.Path) bool { return p.Reason == "" }) // its IPv6 address may be looked for
	for _, c := range []struct {
		name, value, source string
	}{
		{"by ID", "a", v4[0].String()},
		{"by index", "2", v4[1].String()},
		{"by index, the last", "0", v4[4].String()},
		{"by an ID that is the address", v4[4].String(), v4[4].String()},
		{"by address", v4[0].String(), v4[0].String()},
	} {
		f.asks(c.name, 3128, egress(c.value), c.source, 0)
	}
	if told := f.ask(lab.Ask{Target: target6, Header: egress("b")}); told.Seen.Source != v6[1].String() {
		t.Errorf("IPv6: %d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
	for range 20 {
		told := f.ask(lab.Ask{})
		if a := told.Seen.Source; a != v4[0].String() && a != v4[1].String() && a != v4[4].String() {
			t.Errorf("the policy: %d %s from %q", told.Status, told.Body, a)
		}
	}
	for _, a := range []netip.Addr{v4[0], v4[1], v6[1], v4[4]} {
		if !f.onHost(a) {
			t.Errorf("%s is published and not on the host", a)
		}
	}

	// What goes on and what does not, when other nodes are published.
	stays, leaves := f.echo("a"), f.echo("b")
	before := f.paths()["dyn/a"]
	second := fmt.Sprintf(`[{"ip": %q, "id": "c", "uplink": "isp1"}, {"ip": %q, "id": "a", "uplink": "isp1"}, {"ip": %q, "uplink": "isp2", "id": "d"}]`, v4[2], v4[0], v4[4])
	out, errs, code = f.publish(second, "--json")
	var told struct {
		Escaper string `json:"escaper"`
		Nodes   int    `json:"nodes"`
	}
	if err := json.Unmarshal([]byte(out), &told); err != nil || code != 0 || told.Escaper != "dyn" || told.Nodes != 3 {
		t.Fatalf("publish --json: %d %q %q, %v", code, out, errs, err)
	}
	f.asks("new", 3128, egress("c"), v4[2].String(), 0)
	f.asks("gone", 3128, egress("b"), "", 400)
	f.asks("gone, by address", 3128, egress(v4[1].String()), "", 400)
	f.asks("called otherwise now", 3128, egress("d"), v4[4].String(), 0)
	f.asks("still by its address", 3128, egress(v4[4].String()), v4[4].String(), 0)
	f.asks("indexes follow the publication", 3128, egress("2"), v4[0].String(), 0)
	for name, c := range map[string]net.Conn{"stays": stays, "left": leaves} {
		if err := echoes(c); err != nil {
			t.Errorf("the tunnel of a node that %s: %v", name, err)
		}
	}
	after := f.paths()["dyn/a"]
	if after.Connections.Made < before.Connections.Made || after.Connections.Open < 1 || after.Bytes.Out < before.Bytes.Out || !after.Since.Equal(before.Since) {
		t.Errorf("the books of a node that stays: %+v before, %+v after", before, after)
	}
	if !f.onHost(v4[1]) {
		t.Errorf("%s has gone before its last connection", v4[1])
	}
	leaves.Close()
	eventually(t, "the address goes after its last connection", func() bool { return !f.onHost(v4[1]) && !f.onHost(v6[1]) })
	if err := echoes(stays); err != nil {
		t.Errorf("the tunnel of a node that stays: %v", err)
	}

	// Labels are for who publishes.
	f.mustPublish(first)
	all := f.metrics() + f.wayout("paths", "--json") + f.wayout("paths")
	res := f.ask(lab.Ask{Header: egress("a")})
	all += fmt.Sprint(res.Header) + fmt.Sprint(res.Seen.Header)
	for _, label := range []string{"Hidden Telecom", "hidden-area", "hidden-eip"} {
		if strings.Contains(all, label) {
			t.Errorf("the label %q shows", label)
		}
	}
	f.mustPublish("[]")
	f.asks("nothing is published", 3128, egress("a"), "", 400)
	if told := f.ask(lab.Ask{}); told.Status != 503 {
		t.Errorf("nothing is published: %d %s", told.Status, told.Body)
	}
	if err := echoes(stays); err != nil {
		t.Errorf("the tunnel of a node that has gone at last: %v", err)
	}
}

// TestPublishRefused: a publication that is broken changes nothing and says
// why.
func TestPublishRefused(t *testing.T) {
	t.Parallel()
	f := newFloatScene(t)
	f.start(f.floatConfig(inlineOwn))
	v4 := lab.Egress4()
	good := fmt.Sprintf(`[{"ip": %q, "id": "a", "uplink": "isp1"}, {"ip": %q, "id": "b"}]`, v4[0], v4[1])
	f.mustPublish(good)
	kept, err := os.ReadFile(f.cache)
	if err != nil || string(kept) != good {
		t.Fatalf("the cache file: %q, %v", kept, err)
	}
	state := f.state()
	tunnel := f.echo("a")
	for _, c := range []struct{ name, text, says string }{
		{"empty", "", "ends too early"},
		{"no JSON", "nodes", "not JSON"},
		{"an object", `{"ip": "198.51.100.13"}`, "array"},
		{"null", "null", "array"},
		{"a string", `["198.51.100.13"]`, "node 1"},
		{"cut off", `[{"ip": "198.51.100.13"`, "ends too early"},
		{"something follows", `[{"ip": "198.51.100.13"}] x`, "follows"},
		{"two arrays", `[][]`, "follows"},
		{"a comma too many", `[{"ip": "198.51.100.13"},]`, "not JSON"},
		{"no address", `[{"id": "x"}]`, "node 1: ip"},
		{"no such address", `[{"ip": "198.51.100.1300"}]`, `got "198.51.100.1300"`},
		{"a prefix", `[{"ip": "198.51.100.0/24"}]`, "node 1: ip"},
		{"a family in the wrong place", `[{"ipv6": "198.51.100.13"}]`, "node 1: ipv6"},
		{"unspecified", `[{"ip": "0.0.0.0"}]`, "unspecified"},
		{"multicast", `[{"ip": "ff02::1"}]`, "multicast"},
		{"with a zone", `[{"ip": "fe80::1%eth0"}]`, "zone"},
		{"a number", `[{"ip": 3232235777}]`, "want a string"},
		{"null within", `[{"ip": "198.51.100.13", "id": null}]`, "want a string"},
		{"a key twice", `[{"ip": "198.51.100.13", "ip": "198.51.100.14"}]`, "twice"},
		{"an ID of digits", `[{"ip": "198.51.100.13", "id": "12"}]`, "node 1: id"},
		{"an ID with a space", `[{"ip": "198.51.100.13", "id": "a b"}]`, "node 1: id"},
		{"an ID with a slash", `[{"ip": "198.51.100.13", "id": "a/b"}]`, "node 1: id"},
		{"an ID twice", `[{"ip": "198.51.100.13", "id": "x"}, {"ip": "198.51.100.14", "id": "x"}]`, "node 2: id"},
		{"an address twice", `[{"ip": "198.51.100.13", "id": "x"}, {"ip": "::ffff:198.51.100.13", "id": "y"}]`, "node 2"},
		{"an ID that is another's address", `[{"ip": "198.51.100.13", "id": "198.51.100.14"}, {"ip": "198.51.100.14"}]`, "node 1: id"},
		{"expiry is no time", `[{"ip": "198.51.100.13", "expire": "tomorrow"}]`, "RFC 3339"},
		{"expiry is a number", `[{"ip": "198.51.100.13", "expire": 1700000000}]`, "want a string"},
		{"expiry in capitals", `[{"ip": "198.51.100.13", "Expire": "2030-01-01T00:00:00Z"}]`, "write the key as expire"},
		{"no such uplink", `[{"ip": "198.51.100.13", "uplink": "isp9"}]`, `got "isp9"`},
		{"the last of three", `[{"ip": "198.51.100.13"}, {"ip": "198.51.100.14"}, {"ip": "x"}]`, "node 3"},
		{"the operator's ID", `[{"ip": "198.51.100.13", "id": "own"}]`, "own"},
		{"not UTF-8", "[{\"ip\": \"198.51.100.13\", \"area\": \"\xff\"}]", "UTF-8"},
		{"a gateway", `[{"ip": "` + lab.Gateway1Of4 + `", "uplink": "isp1"}]`, lab.Gateway1Of4},
	} {
		_, err := control.NewClient(f.socket).Publish(t.Context(), "dyn", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q in it", c.name, err, c.says)
		}
	}
	out, errs, code := f.publish(`[{"ip": "198.51.100.13"}, {"ip": "x"}]`)
	if code != 1 || out != "" || errs != "wayout: node 2: ip: want an IP address, got \"x\"\n" {
		t.Errorf("by the command: exit %d, %q %q", code, out, errs)
	}
	for name, args := range map[string][]string{
		"no such escaper": {"publish", "--control", f.socket, "nobody", "-"},
		"no such file":    {"publish", "--control", f.socket, "dyn", filepath.Join(f.dir, "nothing.json")},
	} {
		if _, errs, code := f.command(args...); code != 1 || errs == "" {
			t.Errorf("%s: %d %q", name, code, errs)
		}
	}
	if _, errs, code := f.command("publish", "--control", filepath.Join(f.dir, "no.sock"), "dyn", f.cache); code != 1 || !strings.Contains(errs, "does not answer") {
		t.Errorf("no daemon: %d %q", code, errs)
	}
	f.same("after all the broken ones", state)
	if now, err := os.ReadFile(f.cache); err != nil || string(now) != good {
		t.Errorf("the cache file is %q, %v", now, err)
	}
	f.asks("what was published", 3128, egress("a"), v4[0].String(), 0)
	f.asks("what was not", 3128, egress("198.51.100.13"), "", 400)
	if err := echoes(tunnel); err != nil {
		t.Error(err)
	}

	// A publication that cannot be kept is none: also for what it says of a
	// node that is there already.
	if err := os.Rename(filepath.Dir(f.cache), f.dir+"/away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Dir(f.cache), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs, code = f.publish(fmt.Sprintf(`[{"ip": %q, "id": "a", "uplink": "isp1", "expire": "2020-01-01T00:00:00Z"}, {"ip": %q, "id": "c", "uplink": "isp1"}]`, v4[0], v4[2]))
	if code != 1 || errs == "" {
		t.Errorf("no place for the cache file: %d %q", code, errs)
	}
	f.asks("what was published before", 3128, egress("a"), v4[0].String(), 0)
	f.asks("what could not be kept", 3128, egress("c"), "", 400)
	if p := f.paths()["dyn/a"]; p.State != "up" {
		t.Errorf("dyn/a is %s (%s)", p.State, p.Reason)
	}
	eventually(t, "the address of what could not be kept goes", func() bool { return !f.onHost(v4[2]) })
	if err := echoes(tunnel); err != nil {
		t.Error(err)
	}
}

// TestPublishCache: what was published is there again after a restart.
func TestPublishCache(t *testing.T) {
	t.Parallel()
	f := newFloatScene(t)
	f.start(f.floatConfig(inlineOwn))
	v4 := lab.Egress4()
	f.mustPublish(fmt.Sprintf(`[{"ip": %q, "id": "a", "uplink": "isp1"}]`, v4[0]))
	f.mustPublish(fmt.Sprintf(`[{"ip": %q, "id": "b", "uplink": "isp1"}, {"ip": %q, "id": "old", "uplink": "isp1", "expire": "2020-01-01T00:00:00Z"}]`, v4[1], v4[2]))
	left, err := os.ReadDir(filepath.Dir(f.cache))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the cache file: %v, %v", left, err)
	}
	check := func(when string) {
		t.Helper()
		f.asks(when, 3128, egress("b"), v4[1].String(), 0)
		f.asks(when+", not published any more", 3128, egress("a"), "", 400)
		f.asks(when+", expired", 3128, egress("old"), "", 503)
	}
	check("at first")
	f.reload(f.floatConfig(inlineOwn))
	check("after a reload")
	f.stop()
	f.run(lab.Program{})
	check("after a restart")
	if err := f.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	f.run(lab.Program{})
	check("after kill -9")
	f.stop()

	for name, text := range map[string]string{
		"cut off":           `[{"ip": "198.51.100.11", "id": "a"`,
		"empty":             "",
		"of another uplink": `[{"ip": "198.51.100.11", "id": "a", "uplink": "isp7"}]`,
		"an object":         "{}",
	} {
		if err := os.WriteFile(f.cache, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f.run(lab.Program{})
		if log := f.daemon.Log(); !strings.Contains(log, f.cache) || !strings.Contains(log, "published nodes cannot be taken up") {
			t.Errorf("%s: the log does not say so", name)
		}
		f.asks(name, 3128, egress("a"), "", 400)
		if now, err := os.ReadFile(f.cache); err != nil || string(now) != text {
			t.Errorf("%s: the file was changed: %q, %v", name, now, err)
		}
		f.mustPublish(`[{"ip": "198.51.100.11", "id": "a", "uplink": "isp1"}]`)
		f.asks(name+", published anew", 3128, egress("a"), "198.51.100.11", 0)
		f.stop()
	}
}

// TestPublishExpiry: a node's time is over when it is, for who selects it, for
// the policy and for who looks.
func TestPublishExpiry(t *testing.T) {
	t.Parallel()
	f := newFloatScene(t)
	f.start(f.floatConfig(inlineOwn))
	v4 := lab.Egress4()
	text := func(expire time.Time) string {
		return fmt.Sprintf(`[{"ip": %q, "id": "a", "uplink": "isp1", "expire": %q}, {"ip": %q, "id": "b", "uplink": "isp1"}]`,
			v4[0], expire.UTC().Format(time.RFC3339Nano), v4[1])
	}
	f.mustPublish(text(time.Now().Add(time.Hour)))
	f.asks("before", 3128, egress("a"), v4[0].String(), 0)
	tunnel := f.echo("a")
	at := time.Now().Add(1500 * time.Millisecond)
	f.mustPublish(text(at))
	for {
		told := f.ask(lab.Ask{Header: egress("a")})
		now := time.Now()
		if told.Status == 503 && strings.Contains(told.Body, "expired") && told.Header.Get("Retry-After") == "1" {
			if now.Before(at) {
				t.Errorf("expired %v too early", at.Sub(now))
			}
			break
		}
		if told.Status != 200 || now.After(at.Add(30*time.Second)) {
			t.Fatalf("%v after its time: %d %s", now.Sub(at), told.Status, told.Body)
		}
	}
	f.until("dyn/a", func(p control.Path) bool { return p.State == "expired" })
	for range 20 {
		if told := f.ask(lab.Ask{}); told.Seen.Source != v4[1].String() {
			t.Errorf("the policy: %d %s from %s", told.Status, told.Body, told.Seen.Source)
		}
	}
	f.asks("still known, by address", 3128, egress(v4[0].String()), "", 503)
	f.asks("still counted", 3128, egress("2"), v4[1].String(), 0)
	if err := echoes(tunnel); err != nil {
		t.Errorf("an open connection of an expired node: %v", err)
	}
	if out := f.wayout("paths"); !strings.Contains(out, "expired") {
		t.Errorf("paths: %s", out)
	}
	f.reload(f.floatConfig(inlineOwn))
	f.asks("after a reload", 3128, egress("a"), "", 503)
	f.mustPublish(text(time.Now().Add(time.Hour)))
	f.asks("published with more time", 3128, egress("a"), v4[0].String(), 0)
	if p := f.paths()["dyn/a"]; p.State != "up" {
		t.Errorf("state %s", p.State)
	}
	f.mustPublish(text(time.Now().Add(-time.Hour)))
	f.asks("published when its time was over", 3128, egress("a"), "", 503)
	if p := f.paths()["dyn/a"]; p.State != "expired" {
		t.Errorf("state %s", p.State)
	}
}

// TestInlineValue: the node that the operator's map describes is that user's
// alone.
func TestInlineValue(t *testing.T) {
	t.Parallel()
	f := newFloatScene(t)
	f.start(f.floatConfig(inlineOwn))
	v4 := lab.Egress4()
	own := v4[7].String()
	op, plain := basic("op", "secret"), basic("plain", "secret")
	f.asks("nothing published", 3130, []string{op}, own, 0)
	f.asks("nothing published, another user", 3130, []string{plain}, "", 503)
	f.mustPublish(fmt.Sprintf(`[{"ip": %q, "id": "a", "uplink": "isp1"}]`, v4[0]))
	f.asks("the operator's", 3130, []string{op}, own, 0)
	f.asks("the operator's, stronger than the header", 3130, append(egress("a"), op), own, 0)
	for _, value := range []string{"own", own, `{"dyn": "own"}`} {
		f.asks("another user, "+value, 3130, append(egress(value), plain), "", 400)
		f.asks("nobody, "+value, 3128, egress(value), "", 400)
	}
	for _, value := range []string{"0", "1", "2", "3"} {
		f.asks("indexes do not count it", 3128, egress(value), v4[0].String(), 0)
	}
	for range 10 {
		if told := f.ask(lab.Ask{}); told.Seen.Source != v4[0].String() {
			t.Errorf("the policy: %d from %s", told.Status, told.Seen.Source)
		}
	}
	// Published too, it is a node like others.
	f.mustPublish(fmt.Sprintf(`[{"ip": %q, "id": "own", "uplink": "isp2"}]`, own))
	f.asks("published, the operator's", 3130, []string{op}, own, 0)
	f.asks("published, selected", 3128, egress("own"), own, 0)

	// A map that has expired is a path that is down.
	f.reload(f.floatConfig(`{ip: 203.0.113.14, id: own, uplink: isp2, expire: "2020-01-01T00:00:00Z"}`))
	f.asks("expired, though it is published", 3130, []string{op}, "", 503)
	f.asks("the published one has not expired", 3128, egress("own"), own, 0)
	f.mustPublish("[]")
	f.asks("expired", 3130, []string{op}, "", 503)
	soon := time.Now().Add(1500 * time.Millisecond)
	f.reload(f.floatConfig(fmt.Sprintf(`{"ip": "203.0.113.14", "uplink": "isp2", "expire": %q}`, soon.UTC().Format(time.RFC3339Nano))))
	for {
		told := f.ask(lab.Ask{Proxy: proxyAt(3130), Header: []string{op}})
		if told.Status == 503 {
			if time.Now().Before(soon) && told.Seen.Source != "" {
				t.Error("expired too early")
			}
			break
		}
		if told.Status != 200 || time.Now().After(soon.Add(30*time.Second)) {
			t.Fatalf("%d %s", told.Status, told.Body)
		}
	}
}

// TestPublishMany: thousands of nodes are published in one go, and what changes
// little costs little.
func TestPublishMany(t *testing.T) {
	t.Parallel()
	f := newFloatScene(t)
	f.start(f.floatConfig(inlineOwn))
	const n = 10_000
	list := make([]string, n)
	at := netip.MustParseAddr("198.18.0.0")
	for i := range list {
		at = at.Next()
		list[i] = fmt.Sprintf(`{"ip": %q, "id": "n%d", "uplink": "isp1"}`, at, i)
	}
	begun := time.Now()
	f.mustPublish("[" + strings.Join(list, ",\n") + "]")
	took := time.Since(begun)
	if took > time.Minute {
		t.Errorf("%d nodes took %v", n, took)
	}
	if got := len(f.paths()); got != n+1 {
		t.Errorf("%d paths", got)
	}
	if p := f.paths()["dyn/n9999"]; p.State != "up" || !f.onHost(at) {
		t.Errorf("the last node: %+v", p)
	}
	all := netip.MustParsePrefix("198.18.0.0/16")
	if err := errors.Join(f.Origin.AddRoute(all, netip.MustParseAddr("192.0.2.1")), f.ISP1.AddRoute(all, netip.MustParseAddr(lab.Primary1Of4))); err != nil {
		t.Fatal(err)
	}
	f.asks("the last", 3128, egress("n9999"), at.String(), 0)
	begun = time.Now()
	f.mustPublish("[" + strings.Join(list[1:], ",\n") + "]")
	t.Logf("%d nodes took %v, one node less %v", n, took, time.Since(begun))
	f.asks("the one that has gone", 3128, egress("n0"), "", 400)
}
