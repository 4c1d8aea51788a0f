package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"wayout/scripts/lab"
)

// clientCase is a request of a program that knows nothing of the extension, and
// the path that it takes.
type clientCase struct {
	front int
	user  string // "": no credentials
	path  int    // of lab.Egress4 and lab.Egress6
}

// clientCases has what such a program can say: user names, and what the
// operator, the server and the policy say for it. The session's path is what
// HTTP says.
func (s *scene) clientCases(t *testing.T) []clientCase {
	t.Helper()
	told, err := s.say(forward, said{front: frontUsers, user: "alice-session-x", password: "secret"})
	if err != nil || told.answer != "ok" {
		t.Fatalf("%s, %v", told, err)
	}
	session := 0
	for i, a := range lab.Egress4() {
		if a == told.source.Addr() {
			session = i + 1
		}
	}
	return []clientCase{
		{frontUsers, "alice-path-p3", 3},
		{frontUsers, "alice-path-5", 5},
		{frontUsers, "alice-path-out~p4", 4},
		{frontUsers, "alice-path-p6-session-y-lifetime-10", 6},
		{frontUsers, "alice-session-x", session},
		{frontUsers, "bob", 2},
		{frontUsers, "bob-path-p5", 2},
		{frontChain, "alice-path-out~p5", 5},
		{frontFixed, "alice", 7},
		{frontShut, "alice", 8},
		{frontKnown, "", 5},
		{frontAlways, "", 7},
		{frontPolicy, "", 8},
	}
}

// clientWay is how a program is told to connect: the words are curl's.
type clientWay struct {
	option  string // of curl
	host    string // as the program is to say it
	six     bool
	users   bool // credentials can be said
	tunnels bool // of an HTTP proxy
}

func clientWays() []clientWay {
	return []clientWay{
		{option: "socks5-hostname", host: name4, users: true},
		{option: "socks5-hostname", host: name6, six: true, users: true},
		{option: "socks5-hostname", host: lab.OriginAddr4, users: true},
		{option: "socks5", host: lab.OriginAddr4, users: true},
		{option: "socks5", host: "[" + lab.OriginAddr6 + "]", six: true, users: true},
		{option: "socks4", host: lab.OriginAddr4},
		{option: "socks4a", host: name4},
		{option: "socks4a", host: name6, six: true},
		{option: "proxy", host: name4, users: true},
		{option: "proxy", host: "[" + lab.OriginAddr6 + "]", six: true, users: true},
		{option: "proxy", host: name6, six: true, users: true, tunnels: true},
		{option: "proxy", host: lab.OriginAddr4, users: true, tunnels: true},
	}
}

// clientAsk is one request of a program.
type clientAsk struct {
	Option string `json:"option"`
	Proxy  string `json:"proxy"` // its address; the port is below
	Port   int    `json:"port"`
	User   string `json:"user"`
	Host   string `json:"host"`
	Tunnel bool   `json:"tunnel"`
	want   netip.Addr
}

// clientAsks are all ways for all cases.
func (s *scene) clientAsks(t *testing.T) []clientAsk {
	var all []clientAsk
	for _, w := range clientWays() {
		for _, c := range s.clientCases(t) {
			if c.user != "" && !w.users {
				continue
			}
			a := clientAsk{Option: w.option, Proxy: lab.HostAddr4, Port: 1100 + c.front, User: c.user, Host: w.host, Tunnel: w.tunnels, want: lab.Egress4()[c.path-1]}
			if w.option == "proxy" {
				a.Port = 3100 + c.front
			}
			if w.six {
				a.want = lab.Egress6()[c.path-1]
			}
			all = append(all, a)
		}
	}
	return all
}

func (a clientAsk) check(t *testing.T, text []byte) {
	t.Helper()
	var seen lab.Seen
	if err := json.Unmarshal(text, &seen); err != nil {
		t.Errorf("%+v: %v in %q", a, err, text)
	} else if seen.Source != a.want.String() {
		t.Errorf("%+v: the origin saw %s", a, seen.Source)
	}
}

// TestSOCKSByCurl says by curl what curl can say.
func TestSOCKSByCurl(t *testing.T) {
	t.Parallel()
	curl := lookPath(t, "curl")
	s := selectionScene(t)
	dir := t.TempDir()
	var config strings.Builder
	asks := s.clientAsks(t)
	for i, a := range asks {
		if i > 0 {
			config.WriteString("next\n")
		}
		// Each has its own connection: curl would use one again for another user.
		fmt.Fprintf(&config, "url = \"http://%s/x\"\n%s = \"%s:%d\"\nsilent\nshow-error\nfail\nmax-time = 60\nheader = \"Connection: close\"\noutput = \"%s\"\n",
			a.Host, a.Option, a.Proxy, a.Port, filepath.Join(dir, strconv.Itoa(i)))
		if a.User != "" {
			fmt.Fprintf(&config, "proxy-user = \"%s:secret\"\n", a.User)
		}
		if a.Tunnel {
			config.WriteString("proxytunnel\n")
		}
	}
	file := filepath.Join(dir, "config")
	write(t, file, config.String())
	s.program(curl, "--config", file)
	for i, a := range asks {
		b, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		a.check(t, b)
	}
	// What is refused is refused for curl too: 97 is an error of a proxy, 22 of HTTP.
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"--socks5-hostname", "10.0.0.1:1101", "--proxy-user", "alice-path-p1:wrong"}, 97},
		{[]string{"--socks5-hostname", "10.0.0.1:1101", "--proxy-user", "alice-path-p1-path-p1:secret"}, 97},
		{[]string{"--socks5-hostname", "10.0.0.1:1101", "--proxy-user", "alice-path-p77:secret"}, 97},
		{[]string{"--socks5", "10.0.0.1:1101"}, 97},
		{[]string{"--socks4", "10.0.0.1:1101"}, 97},
		{[]string{"--socks4a", "10.0.0.1:1101"}, 97},
		{[]string{"--proxy", "10.0.0.1:3101", "--proxy-user", "alice-path-p8:secret"}, 22},
	} {
		cmd, err := s.Client.Start(lab.Program{Path: curl, Args: append(c.args, "--silent", "--fail", "--max-time", "60", "http://"+target4+"/")})
		if err != nil {
			t.Fatal(err)
		}
		err = cmd.Wait()
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != c.code {
			t.Errorf("curl %q: %v, want exit code %d", c.args, err, c.code)
		}
	}
}

// pySocksClient sends the requests of a JSON list by PySocks, and prints what
// came back: [body, what the proxy says it leaves by] or [what went wrong].
const pySocksClient = `
import json, socks, sys
kinds = {"socks5": (socks.SOCKS5, False), "socks5-hostname": (socks.SOCKS5, True),
         "socks4": (socks.SOCKS4, False), "socks4a": (socks.SOCKS4, True), "proxy": (socks.HTTP, True)}
out = []
for a in json.load(open(sys.argv[1])):
    s = socks.socksocket()
    s.settimeout(60)
    kind, remote = kinds[a["option"]]
    s.set_proxy(kind, a["proxy"], a["port"], remote, a["user"] or None, "secret" if a["user"] else None)
    try:
        s.connect((a["host"].strip("[]"), 80))
    except socks.ProxyError as e:
        out.append([type(e).__name__ + ": " + str(e)])
        continue
    s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    b = b""
    while True:
        more = s.recv(65536)
        if not more:
            break
        b += more
    at = s.get_proxy_sockname()
    out.append([b.split(b"\r\n\r\n", 1)[1].decode(), [str(at[0], "ascii") if isinstance(at[0], bytes) else at[0], at[1]]])
    s.close()
json.dump(out, sys.stdout)
`

// TestSOCKSByPySocks says by PySocks what it can say.
func TestSOCKSByPySocks(t *testing.T) {
	t.Parallel()
	const python = "/usr/bin/python3" // whose packages are the distribution's
	if err := exec.Command(python, "-c", "import socks").Run(); err != nil {
		lab.Missing(t, "python3-socks")
	}
	s := selectionScene(t)
	var asks []clientAsk
	for _, a := range s.clientAsks(t) {
		// PySocks has no credentials for HTTP, and looks up names for IPv4 alone.
		if a.Option != "proxy" && (a.Option != "socks5" || !a.want.Is6()) {
			asks = append(asks, a)
		}
	}
	good := len(asks)
	bad := []struct{ option, user, want string }{
		{"socks5", "alice-path-p1-path-p1", "authentication failed"},
		{"socks5", "mallory", "authentication failed"},
		{"socks5", "", "methods were rejected"},
		{"socks5", "alice-path-p77", "0x02"},
		{"socks5", "carol-path-p2", "0x02"},
		{"socks5", "alice-path-p8", "0x01"},
		{"socks4", "alice", "0x5b"},
	}
	for _, b := range bad {
		asks = append(asks, clientAsk{Option: b.option, Proxy: lab.HostAddr4, Port: 1100 + frontUsers, User: b.user, Host: lab.OriginAddr4})
	}
	text, err := json.Marshal(asks)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "asks")
	write(t, file, string(text))
	var answers [][]json.RawMessage
	if err := json.Unmarshal([]byte(s.program(python, "-c", pySocksClient, file)), &answers); err != nil {
		t.Fatal(err)
	}
	if len(answers) != len(asks) {
		t.Fatalf("%d answers to %d requests", len(answers), len(asks))
	}
	for i, a := range asks {
		var body string
		if err := json.Unmarshal(answers[i][0], &body); err != nil {
			t.Fatal(err)
		}
		if i >= good {
			if b := bad[i-good]; len(answers[i]) != 1 || !strings.Contains(body, b.want) {
				t.Errorf("%+v: %s, want %s", a, answers[i], b.want)
			}
			continue
		}
		if a.check(t, []byte(body)); len(answers[i]) != 2 || strings.HasPrefix(a.Option, "socks4") && a.want.Is6() {
			continue // SOCKS4 cannot tell an IPv6 address
		}
		var seen lab.Seen
		_ = json.Unmarshal([]byte(body), &seen) // check minds it
		if want := fmt.Sprintf("[%q, %d]", seen.Source, seen.Port); string(answers[i][1]) != want {
			t.Errorf("%+v: the proxy tells %s, the origin saw %s", a, answers[i][1], want)
		}
	}
}

// dialFrom is a proxy.Dialer of a namespace.
type dialFrom struct{ ns *lab.NS }

func (d dialFrom) Dial(_, addr string) (net.Conn, error) {
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return d.ns.Dial(at)
}

// TestSOCKSByXNet says by golang.org/x/net/proxy what it can say.
func TestSOCKSByXNet(t *testing.T) {
	t.Parallel()
	s := selectionScene(t)
	ask := func(a clientAsk, password string) ([]byte, error) {
		var auth *proxy.Auth
		if a.User != "" {
			auth = &proxy.Auth{User: a.User, Password: password}
		}
		d, err := proxy.SOCKS5("tcp", fmt.Sprintf("%s:%d", a.Proxy, a.Port), auth, dialFrom{s.Client})
		if err != nil {
			return nil, err
		}
		c, err := d.Dial("tcp", a.Host+":80")
		if err != nil {
			return nil, err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return nil, err
		}
		seen, err := getThrough(c, a.Host)
		if err != nil {
			return nil, err
		}
		return json.Marshal(seen)
	}
	for _, a := range s.clientAsks(t) {
		if !strings.HasPrefix(a.Option, "socks5") {
			continue
		}
		text, err := ask(a, "secret")
		if err != nil {
			t.Errorf("%+v: %v", a, err)
			continue
		}
		a.check(t, bytes.TrimSpace(text))
	}
	for user, want := range map[string]string{
		"mallory": "authentication failed", "alice-path-p1-path-p1": "authentication failed",
		"alice-path-p77": "not allowed by ruleset", "alice-path-p8": "general SOCKS server failure", "": "no acceptable authentication methods",
	} {
		a := clientAsk{Proxy: lab.HostAddr4, Port: 1100 + frontUsers, User: user, Host: lab.OriginAddr4}
		if _, err := ask(a, "secret"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", user, err, want)
		}
	}
}
