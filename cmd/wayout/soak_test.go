package main_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// soakEnv is how many operations the hunt has, soakSeedEnv the seed of what is done
// meanwhile.
const (
	soakEnv     = "WAYOUT_SOAK"
	soakSeedEnv = "WAYOUT_SOAK_SEED"
	soakUsual   = 3000
)

// soakSize is what the environment says of a hunt: how many operations, and the
// seed of what is done meanwhile.
func soakSize(t *testing.T) (total int, seed uint64) {
	t.Helper()
	total, seed = soakUsual, uint64(time.Now().UnixNano())
	if s := os.Getenv(soakEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%s: %v", soakEnv, err)
		}
		total = n
	}
	if s := os.Getenv(soakSeedEnv); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", soakSeedEnv, err)
		}
		seed = n
	}
	t.Logf("%s=%d %s=%d", soakEnv, total, soakSeedEnv, seed)
	return total, seed
}

// soakPath is a path of the hunt, and every source that it may have: by another
// configuration or publication it has another one.
type soakPath struct {
	escaper, id string
	uplink      int
	v4, v6      []netip.Addr
	fleeting    bool // it is not always there
}

func (p soakPath) sources() []netip.Addr { return slices.Concat(p.v4, p.v6) }

// usual is which of them it has in the usual configuration, or published under its
// own address.
func (p soakPath) usual() int {
	if p.id == "d2" || p.id == "d4" {
		return 1
	}
	return 0
}

// has says whether a source is the path's.
func (p soakPath) has(a netip.Addr) bool { return slices.Contains(p.v4, a) || slices.Contains(p.v6, a) }

// soak is the hunt for a wrong source address.
type soak struct {
	*pinScene
	out, dyn []soakPath
	hash     string
	service  *service
	pace     int  // operations between two things that are done to the host, at most
	keep     bool // keep_on_stop
	weather  *weather
	answers  tally
	chaos    tally
}

func newSoak(t *testing.T, total int) *soak {
	k := &soak{pinScene: newPinScene(t), hash: hashOf(t, "secret"), weather: newWeather(total), keep: true, pace: min(max(total/60, 50), 300)}
	k.serveDatagrams(t)
	path := func(escaper, id string, uplink int, fleeting bool, hosts ...string) soakPath {
		p := soakPath{escaper: escaper, id: id, uplink: uplink, fleeting: fleeting}
		for _, h := range hosts {
			v4, v6 := "198.51.100."+h, "2001:db8:100::"+h
			if uplink == 1 {
				v4, v6 = "203.0.113."+h, "2001:db8:200::"+h
			}
			p.v4, p.v6 = append(p.v4, netip.MustParseAddr(v4)), append(p.v6, netip.MustParseAddr(v6))
		}
		return p
	}
	k.out = []soakPath{
		path("out", "p1", 0, false, "11"), path("out", "p2", 0, false, "12", "22"), path("out", "p3", 0, true, "13"),
		path("out", "p5", 1, false, "11"), path("out", "p6", 1, false, "12"), path("out", "p7", 1, true, "13"),
	}
	k.dyn = []soakPath{
		path("dyn", "d1", 0, true, "14", "21"), path("dyn", "d2", 0, true, "14", "21"),
		path("dyn", "d3", 1, true, "14", "21"), path("dyn", "d4", 1, true, "14", "21"),
	}
	k.service = k.newService()
	k.service.make()
	return k
}

// of gives the paths of an uplink that have addresses of their own.
func (k *soak) of(uplink int) []soakPath {
	return slices.DeleteFunc(slices.Concat(k.out, k.dyn), func(p soakPath) bool { return p.uplink != uplink })
}

// carries says whether a source is of an uplink's paths.
func (k *soak) carries(uplink int) func(netip.Addr) bool {
	own := k.of(uplink)
	return func(a netip.Addr) bool {
		return slices.ContainsFunc(own, func(p soakPath) bool { return p.has(a) }) || uplink == 0 && ofPrefix(a)
	}
}

// ofPrefix says whether a source is of the prefixes, that come by isp1.
func ofPrefix(a netip.Addr) bool { return routed4.Contains(a) || routed6.Contains(a) }

// anyOf says whether a source is of an escaper's paths.
func anyOf(paths []soakPath, prefixes bool) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		return slices.ContainsFunc(paths, func(p soakPath) bool { return p.has(a) }) || prefixes && ofPrefix(a)
	}
}

// configuration is the usual one, or another: without the fleeting paths, with
// another address of p2, in another order, by another policy and with another pin.
// Of isp2 the host has the addresses by itself.
func (k *soak) configuration(other bool) string {
	var nodes []string
	for _, p := range k.out {
		at := 0
		if other {
			at = len(p.v4) - 1
		}
		if !other || !p.fleeting {
			nodes = append(nodes, fmt.Sprintf("      - {id: %s, ipv4: %s, ipv6: %q, uplink: isp%d}\n", p.id, p.v4[at], p.v6[at], p.uplink+1))
		}
	}
	nodes = append(nodes,
		fmt.Sprintf("      - {id: four, ipv4: %q, uplink: isp1}\n", routed4),
		fmt.Sprintf("      - {id: six, ipv6: %q, uplink: isp1}\n", routed6))
	policy, pinned := "random", "out/p6"
	if other {
		policy, pinned = "round_robin", "out/p2"
		slices.Reverse(nodes)
	}
	managed, own, _ := strings.Cut(twoUplinks, "  - {name: isp2")
	return managed + "  - {name: isp2" + strings.ReplaceAll(own, ", manage_addresses: true", "") + fmt.Sprintf(`
keep_on_stop: %t
drain_timeout: 1s
escaper:
  - {name: dyn, type: direct_float, enable_path_selection: true, connect_timeout: 5s, cache: %q}
  - name: out
    type: direct_fixed
    enable_path_selection: true
    connect_timeout: 5s
    pick_policy: %s
    nodes:
%suser_group:
  - {name: team, users: [{name: alice, password: %q}]}
pin: [{cgroup: %s, path: %s}]
`, k.keep, filepath.Join(k.dir, "dyn.json"), policy, strings.Join(nodes, ""), k.hash, k.service.cgroup, pinned) +
		fronts("open: true, "+selects+"escaper: out", "user_group: team, username_params: true, escaper: out", "open: true, "+selects+"escaper: dyn")
}

// file writes a file of the scene.
func (k *soak) file(name, text string) string {
	at := filepath.Join(k.dir, name)
	if err := os.WriteFile(at, []byte(text), 0o600); err != nil {
		k.t.Error(err)
	}
	return at
}

// soakOp is one thing that a client asks for, and what may come of it.
type soakOp struct {
	kind     string
	p        protocol
	a        said
	right    func(netip.Addr) bool
	fleeting bool // it may be asked for what is not there
}

// draw chooses an operation.
func (k *soak) draw(rng *rand.Rand) soakOp {
	op := soakOp{p: protocols()[rng.IntN(4)], a: said{six: rng.IntN(2) == 0}}
	by := func(p soakPath) { op.right, op.fleeting = p.has, p.fleeting }
	switch rng.IntN(8) {
	case 0, 1:
		p := k.out[rng.IntN(len(k.out))]
		by(p)
		op.kind, op.a.selection = "by header", p.id
		if rng.IntN(3) == 0 {
			op.a.selection = `{"out": "` + p.id + `"}`
		}
	case 2:
		p := k.out[rng.IntN(len(k.out))]
		by(p)
		op.kind, op.a.front, op.a.user = "by user name", 1, "alice-path-"+p.id
		op.a.password = "secret"
	case 3:
		op.kind, op.a.front, op.a.user = "session", 1, fmt.Sprintf("alice-session-s%d", rng.IntN(32))
		op.a.password = "secret"
		op.right = anyOf(k.out, true)
	case 4:
		op.kind = "address of a prefix"
		of := routed4
		if op.a.six {
			of = routed6
		}
		b := of.Addr().AsSlice()
		b[len(b)-1] |= byte(1 + rng.IntN(126))
		a, _ := netip.AddrFromSlice(b)
		op.a.selection = a.String()
		op.right = func(seen netip.Addr) bool { return seen == a }
	case 5:
		op.kind, op.a.selection, op.right = "prefix", "four", ofPrefix
		if op.a.six {
			op.a.selection = "six"
		}
	case 6:
		p := k.dyn[rng.IntN(len(k.dyn))]
		by(p)
		op.kind, op.a.front, op.a.selection = "published", 2, p.id
	case 7:
		op.kind, op.right = "by policy", anyOf(k.out, true)
		if rng.IntN(2) == 0 {
			op.a.front, op.right = 2, anyOf(k.dyn, false)
		}
	}
	if op.p != connect && op.p != associate && op.a.user == "" && rng.IntN(2) == 0 {
		op.p = keptAlive
	}
	return op
}

// keptAlive is HTTP on connections that the client keeps.
const keptAlive protocol = "HTTP, kept alive"

// client asks one thing after the other.
func (k *soak) client(rng *rand.Rand) {
	var keeps []*http.Client
	for front := range 3 {
		keeps = append(keeps, k.httpClient("http://"+proxyAt(uint16(3100+front)).String()))
	}
	for k.weather.goes(clients) {
		op := k.draw(rng)
		before := k.weather.now()
		switch op.p {
		case associate:
			k.weather.ended(clients, k.datagrams(op, before))
			continue
		case keptAlive:
			seen, status, err := get(k.t.Context(), keeps[op.a.front], op.a.httpTarget(), op.a.selection)
			g := got{answer: strconv.Itoa(status), kind: "not told"}
			if status == http.StatusOK {
				g = got{answer: "ok", source: seenAt(seen)}
			}
			k.came(op, before, g, err)
		default:
			g, err := k.say(op.p, op.a)
			k.came(op, before, g, err)
		}
		k.weather.ended(clients, 1)
	}
}

// datagrams sends some by one association, and gives how many.
func (k *soak) datagrams(op soakOp, before report) int {
	as, err := k.associate(op.a)
	if r := refusedError(""); errors.As(err, &r) {
		k.came(op, before, got{answer: string(r)}, nil)
		return 1
	}
	if err != nil {
		k.came(op, before, got{}, err)
		return 1
	}
	defer as.Close()
	to := echo4
	if op.a.six {
		to = echo6
	}
	const many = 4
	for i := range many {
		source, err := as.once(to, strconv.Itoa(i))
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
			k.came(op, before, got{answer: "no answer"}, nil)
			return i + 1
		}
		if err != nil {
			k.came(op, before, got{}, err)
			return i + 1
		}
		k.came(op, before, got{answer: "ok", source: source}, nil)
	}
	return many
}

// once is echoed with little patience, and with a single datagram.
func (a *association) once(to, payload string) (source netip.AddrPort, err error) {
	if err := a.udp.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return source, err
	}
	if err := a.send(to, []byte(payload)); err != nil {
		return source, err
	}
	_, b, err := a.receive()
	if err != nil {
		return source, err
	}
	seen, back, _ := strings.Cut(string(b), " ")
	if back != payload {
		return source, fmt.Errorf("%q came back as %q", payload, back)
	}
	return netip.ParseAddrPort(seen)
}

// honest are the answers that say that a path does not serve now, and what they
// need: nothing, a path that may not be there, or something that was done to the
// host.
var honest = map[string]string{
	"502": "weather", "503": "weather", "504": "weather", "reply 0x01": "weather", "reply 0x04": "weather", "no answer": "weather",
	"400": "fleeting", "reply 0x02": "fleeting", "authentication": "fleeting",
}

// came judges what came of an operation.
func (k *soak) came(op soakOp, before report, g got, err error) {
	kind := op.kind + ", " + string(op.p)
	switch {
	case err != nil && k.weather.badSince(before):
		k.answers.count(kind, "cut")
	case err != nil:
		k.answers.count(kind, "error")
		k.t.Errorf("%s by %q%s (IPv6 %v): %v", kind, op.a.selection, op.a.user, op.a.six, err)
	case g.answer == "ok" && op.right(g.source.Addr()) && g.source.Addr().Is6() == op.a.six:
		k.answers.count(kind, "ok")
	case g.answer == "ok":
		k.answers.count(kind, "WRONG")
		k.t.Errorf("%s by %q%s (IPv6 %v) left by %s", kind, op.a.selection, op.a.user, op.a.six, g.source)
	default:
		k.answers.count(kind, g.answer)
		why := honest[g.answer]
		if why == "fleeting" && !op.fleeting || why == "weather" && !k.weather.badSince(before) || why == "" || g.header != nil && g.kind == "" {
			k.t.Errorf("%s by %q%s (IPv6 %v): %s %s %v", kind, op.a.selection, op.a.user, op.a.six, g, g.kind, g.header["Proxy-Status"])
		}
	}
}

// held is a tunnel or an association that stays open, and how its path is seen by
// the other side.
type held struct {
	path soakPath
	six  bool
	ask  func() (netip.AddrPort, error)
	io.Closer
}

// stays keeps some tunnels and associations open over all that happens, and asks by
// one of them at a time.
func (k *soak) stays(rng *rand.Rand) {
	open := make([]*held, 12)
	defer func() {
		for _, h := range open {
			if h != nil {
				h.Close()
			}
		}
	}()
	for k.weather.goes(kept) {
		i := rng.IntN(len(open))
		before := k.weather.now()
		op := soakOp{kind: "stays open", p: tunnel}
		begin := k.holdTunnel
		if i%2 == 0 {
			op.p, begin = associate, k.holdAssociation
		}
		var g got
		var err error
		if open[i] == nil {
			p := k.out[rng.IntN(len(k.out))]
			op.a, op.fleeting = said{selection: p.id, six: rng.IntN(2) == 0}, p.fleeting
			open[i], g, err = begin(p, op.a)
		}
		if h := open[i]; h != nil {
			op.a.six, op.right = h.six, h.path.has
			g.answer = "ok"
			if g.source, err = h.ask(); err != nil {
				h.Close()
				open[i] = nil
			}
		}
		k.came(op, before, g, err)
		k.weather.ended(kept, 1)
	}
}

// holdTunnel opens a tunnel to where each line is answered by its source.
func (k *soak) holdTunnel(p soakPath, a said) (*held, got, error) {
	c, err := k.Client.Dial(proxyAt(3100))
	if err != nil {
		return nil, got{}, err
	}
	r := bufio.NewReader(c)
	target := who4
	if a.six {
		target = who6
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, got{}, errors.Join(err, c.Close())
	}
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: x\r\nX-Egress-Path: %s\r\n\r\n", target, a.selection)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, got{}, errors.Join(err, c.Close())
	}
	if resp.StatusCode != http.StatusOK {
		return nil, got{answer: strconv.Itoa(resp.StatusCode), kind: "not told"}, c.Close()
	}
	return &held{p, a.six, func() (netip.AddrPort, error) { return line(c, r) }, c}, got{}, nil
}

func line(c net.Conn, r *bufio.Reader) (seen netip.AddrPort, err error) {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return seen, err
	}
	if _, err := c.Write([]byte("who\n")); err != nil {
		return seen, err
	}
	text, err := r.ReadString('\n')
	if err != nil {
		return seen, err
	}
	a, err := netip.ParseAddr(strings.TrimSpace(text))
	return netip.AddrPortFrom(a, 0), err
}

// holdAssociation opens an association, by which datagrams are sent.
func (k *soak) holdAssociation(p soakPath, a said) (*held, got, error) {
	as, err := k.associate(a)
	if r := refusedError(""); errors.As(err, &r) {
		return nil, got{answer: string(r)}, nil
	}
	if err != nil {
		return nil, got{}, err
	}
	to := echo4
	if a.six {
		to = echo6
	}
	n := 0
	ask := func() (netip.AddrPort, error) { n++; return as.once(to, strconv.Itoa(n)) }
	return &held{p, a.six, ask, closer(as.Close)}, got{}, nil
}

type closer func()

func (c closer) Close() error { c(); return nil }

// dials is what a pinned process does: each in both families.
func dials(many int) []string {
	return []string{
		"patience", "2s", "many", strconv.Itoa(many),
		"tcp", who4, "udp", who4, "conn", who4, "tcp", who6, "udp", who6, "conn", who6,
	}
}

const dialsEach = 6

// execs runs commands by a path, one after the other.
func (k *soak) execs(rng *rand.Rand) {
	const many = 6
	all := slices.Concat(k.out, k.dyn)
	for k.weather.goes(executed) {
		p := all[rng.IntN(len(all))]
		before := k.weather.now()
		var out, errs bytes.Buffer
		args := append([]string{"exec", "--config", k.config, "--path", p.escaper + "/" + p.id, "--", k.dialler}, dials(many)...)
		code := k.runs(lab.Program{Path: binary, Args: args, Stdout: &out, Stderr: &errs})
		if code != 0 {
			k.answers.count("exec", "exit "+strconv.Itoa(code))
			if code != 125 || !p.fleeting && !k.weather.badSince(before) {
				k.t.Errorf("exec by %s: exit %d: %s%s", p.id, code, &out, &errs)
			}
			k.weather.ended(executed, 1)
			continue
		}
		k.weather.ended(executed, k.lines("exec", p, before, out.String(), many))
	}
}

// serviceRuns runs programs in the pinned cgroup, one after the other.
func (k *soak) serviceRuns() {
	const many = 8
	dir, err := os.Open(k.service.dir)
	if err != nil {
		k.t.Error(err)
		return
	}
	defer dir.Close()
	// By either configuration.
	p := soakPath{id: "the pin", v4: slices.Concat(k.out[1].v4, k.out[4].v4), v6: slices.Concat(k.out[1].v6, k.out[4].v6)}
	for k.weather.goes(pinned) {
		before := k.weather.now()
		var out, errs bytes.Buffer
		code := k.runs(lab.Program{Path: k.dialler, Args: dials(many), Stdout: &out, Stderr: &errs, Cgroup: dir})
		if code != 0 {
			k.t.Errorf("in the pinned cgroup: exit %d: %s%s", code, &out, &errs)
		}
		k.weather.ended(pinned, k.lines("pinned cgroup", p, before, out.String(), many))
	}
}

// runs runs a program on the host and gives its exit code.
func (k *soak) runs(p lab.Program) int {
	cmd, err := k.Host.Start(p)
	if err != nil {
		k.t.Error(err)
		return -1
	}
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		k.t.Error(err)
	}
	return cmd.ProcessState.ExitCode()
}

// lines judges what the dialler has printed, and gives how many operations that
// were.
func (k *soak) lines(kind string, p soakPath, before report, out string, many int) int {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != many*dialsEach {
		k.t.Errorf("%s by %s: %d lines, want %d: %q", kind, p.id, len(lines), many*dialsEach, out)
	}
	for i, l := range lines {
		a, err := netip.ParseAddr(l)
		switch six := i%dialsEach >= dialsEach/2; {
		case err == nil && p.has(a) && a.Is6() == six:
			k.answers.count(kind, "ok")
		case err == nil:
			k.answers.count(kind, "WRONG")
			k.t.Errorf("%s by %s left by %s", kind, p.id, a)
		default:
			if strings.HasSuffix(l, "i/o timeout") { // it names the socket
				l = "timeout"
			}
			k.answers.count(kind, "error "+l)
			if !k.weather.badSince(before) {
				k.t.Errorf("%s by %s: %s", kind, p.id, l)
			}
		}
	}
	return len(lines)
}

// calmed has every path serve again, in every way, as if nothing had been.
func (k *soak) calmed() {
	k.t.Helper()
	k.keep = false
	k.write(k.configuration(false))
	k.ok("reload")
	k.publishAll()
	k.untilUp()
	all := slices.Concat(k.out, k.dyn)
	for _, p := range all {
		front := 0
		if p.escaper == "dyn" {
			front = 2
		}
		for _, by := range protocols() {
			for _, six := range []bool{false, true} {
				want := p.v4[p.usual()]
				if six {
					want = p.v6[p.usual()]
				}
				if g, err := k.say(by, said{front: front, selection: p.id, six: six}); err != nil || g.answer != "ok" || g.source.Addr() != want {
					k.t.Errorf("in the end: %s/%s by %s: %s %s, %v", p.escaper, p.id, by, g, g.kind, err)
				}
			}
		}
		if got := k.dial(p.escaper+"/"+p.id, "tcp", who4, "udp", who6); !slices.Equal(got, []string{p.v4[p.usual()].String(), p.v6[p.usual()].String()}) {
			k.t.Errorf("in the end: exec by %s/%s: %v", p.escaper, p.id, got)
		}
	}
	six := k.out[4]
	if got := k.service.dial("tcp", who4, "conn", who6); !slices.Equal(got, []string{six.v4[0].String(), six.v6[0].String()}) {
		k.t.Errorf("in the end: the pinned cgroup: %v", got)
	}
	k.nothingLeft()
}

// TestSoak hunts for a packet from a wrong address: WAYOUT_SOAK connections and
// datagrams of the proxies' clients and of pinned processes, while addresses, links
// and routes go and come, paths are drained, nodes published, the configuration is
// reloaded and applied, and the daemon is killed and started again.
func TestSoak(t *testing.T) {
	total, seed := soakSize(t)
	k := newSoak(t, total)
	if err := k.restore(); err != nil {
		t.Fatal(err)
	}
	before := k.state()
	lookouts := []*lookout{
		newLookout(t, k.ISP1, uplinkRules{linksOf(0), k.carries(0)}.judge),
		newLookout(t, k.ISP2, uplinkRules{linksOf(1), k.carries(1)}.judge),
	}
	k.start(k.configuration(false))
	k.untilPin(k.service, control.PinInForce)
	k.publishAll()

	if end, ok := t.Deadline(); ok {
		timer := time.AfterFunc(time.Until(end)-3*time.Minute, k.weather.over)
		defer timer.Stop()
	}
	var all sync.WaitGroup
	var workers uint64
	begin := func(f func(*rand.Rand)) {
		workers++
		rng := rand.New(rand.NewPCG(seed, workers))
		all.Go(func() { f(rng) })
	}
	for range 6 {
		begin(k.client)
	}
	begin(k.stays)
	begin(k.execs)
	begin(k.execs)
	begin(func(*rand.Rand) { k.serviceRuns() })
	begin(k.network)
	begun := time.Now()
	k.operator(rand.New(rand.NewPCG(seed, 0)))
	all.Wait()
	took := time.Since(begun)
	t.Logf("%d operations in %v\n%s\n%s", k.weather.done, took.Round(time.Second), &k.answers, &k.chaos)
	if k.weather.done < total {
		t.Logf("of %d: the time was up", total)
	}
	if k.weather.done < total/10 {
		t.Errorf("%d of %d operations: that proves little; more time is to be had by -timeout", k.weather.done, total)
	}

	if all := k.answers.all(); all["ok"] < sum(all)/3 {
		t.Error("most of it was refused: that proves little")
	}
	select {
	case <-k.daemon.Done():
		t.Fatal("the daemon has ended")
	default:
	}
	k.calmed()
	leaf := k.leaf()
	for _, l := range lookouts {
		l.verdict(t)
	}
	k.stop()
	k.sane(k.daemon)
	k.gone(leaf)
	k.noPins(k.service)
	after := k.state()
	for q := range before {
		before[q], after[q] = sorted(before[q]), sorted(after[q])
	}
	if d := before.difference(after); d != "" {
		t.Errorf("after SIGTERM:\n%s", d)
	}
	for _, l := range lookouts {
		l.verdict(t)
	}
}
