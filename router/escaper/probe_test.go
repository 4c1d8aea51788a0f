package escaper_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"wayout/router/escaper"
	"wayout/router/resolve"
	"wayout/scripts/lab"
	"wayout/selection"
)

// answering is a web server on loopback that says what it is told to.
func answering(t *testing.T, body *atomic.Value, secure bool) *httptest.Server {
	t.Helper()
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch text := body.Load().(string); {
		case text == "503":
			w.WriteHeader(http.StatusServiceUnavailable)
		case strings.Contains(text, "%s"):
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, text, host)
		default:
			fmt.Fprint(w, text)
		}
	})
	var s *httptest.Server
	if secure {
		s = httptest.NewTLSServer(h)
	} else {
		s = httptest.NewServer(h)
	}
	t.Cleanup(s.Close)
	return s
}

func probe() *escaper.Probe {
	return &escaper.Probe{Interval: 10 * time.Second, Timeout: 5 * time.Second, Fall: 3, Rise: 2}
}

// A probed path is probing until its first probe has ended, falls after Fall
// failures, and rises after Rise successes and its hold.
func TestProbeHTTP(t *testing.T) {
	var body atomic.Value
	body.Store("hello from %s")
	s := answering(t, &body, false)
	o := probe()
	o.HTTP = s.URL
	w := watch(t, escaper.Options{Probe: o, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), V6: addr("2001:db8::1"), Weight: 1}}})
	p := w.path("a")
	// The target has no IPv6 address, so that nothing judges IPv6.
	if st := p.Status(); st.V4 != escaper.Probing || st.V6 != escaper.Up || st.Reason != "IPv4 has not been probed yet" {
		t.Errorf("before the first probe: %+v", st)
	}
	to := escaper.Target{Addr: addr("127.0.0.1"), Port: 1}
	if _, err := w.Open(context.Background(), request(to, byClient(pathID("a")))); !errors.Is(err, selection.ErrDown) || !strings.Contains(err.Error(), "IPv4 has not been probed yet") {
		t.Errorf("selected before the first probe: %v", err)
	}
	if _, err := w.Open(context.Background(), request(to, selection.Selection{})); !errors.Is(err, escaper.ErrNoPath) {
		t.Errorf("by policy before the first probe: %v", err)
	}
	if got := w.step(0); got != "a up" || p.Status().V4 != escaper.Up {
		t.Fatalf("after the first probe: %q, %+v", got, p.Status())
	}
	if n := p.Counters(); n.Attempts[escaper.ResultOK] != 1 || n.Open != 0 {
		t.Errorf("counted: %+v", n)
	}
	body.Store("503")
	for range 2 {
		if got := w.step(11 * time.Second); got != "" {
			t.Fatalf("before Fall: %q", got)
		}
	}
	if got := w.step(11 * time.Second); got != "a up" || p.Status().V4 != escaper.Down { // by IPv6
		t.Fatalf("after Fall: %q, %+v", got, p.Status())
	}
	if st := p.Status(); st.Reason != "probe "+s.URL+": status 503" {
		t.Errorf("%+v", st)
	}
	body.Store("fine")
	if got := w.step(11 * time.Second); got != "" {
		t.Errorf("before Rise: %q", got)
	}
	if got := w.step(11 * time.Second); got != "a up" || p.Status().Reason != "" {
		t.Errorf("after Rise: %q, %+v", got, p.Status())
	}
	// It falls again soon: now it takes two intervals at least.
	body.Store("503")
	for range 3 {
		w.step(11 * time.Second)
	}
	body.Store("fine")
	o.Rise = 1
	if got := w.step(11 * time.Second); got != "" {
		t.Errorf("within the hold: %q", got)
	}
	if got := w.step(11 * time.Second); got != "a up" {
		t.Errorf("after the hold: %q", got)
	}
}

func TestProbeFirstFailure(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	at := l.addr.String()
	_ = l.Close()
	o := probe()
	o.TCP = at
	w := watch(t, escaper.Options{Probe: o, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}})
	if got := w.step(0); got != "a down" {
		t.Fatalf("%q", got)
	}
	if st := w.path("a").Status(); st.Reason != "probe tcp "+at+": connect to "+at+": refused" {
		t.Errorf("%+v", st)
	}
	listen(t, at).hold(t)
	w.step(11 * time.Second)
	if got := w.step(11 * time.Second); got != "a up" {
		t.Errorf("%q, %+v", got, w.path("a").Status())
	}
}

// An error of the host's own needs no second probe.
func TestProbeCannotBind(t *testing.T) {
	o := probe()
	o.TCP = "192.0.2.1:80"
	w := watch(t, escaper.Options{Probe: o, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("192.0.2.77"), Weight: 1}}})
	if got := w.step(0); got != "a down" || !strings.Contains(w.path("a").Status().Reason, "cannot bind 192.0.2.77: it is not on this host") {
		t.Errorf("%q, %+v", got, w.path("a").Status())
	}
}

// Of a name that cannot be resolved, nothing is learnt of the path; of one
// without addresses of a family, nothing of that family.
func TestProbeOfName(t *testing.T) {
	l := listen(t, "127.0.0.1:0").hold(t)
	n := &names{hosts: map[string]resolve.Answer{}, errs: map[string]error{"x.example": resolve.ErrTimeout}}
	o := probe()
	o.TCP = fmt.Sprintf("x.example:%d", l.addr.Port())
	w := watch(t, escaper.Options{Probe: o, Resolver: n, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), V6: addr("2001:db8::1"), Weight: 1}}})
	w.step(0)
	if st := w.path("a").Status(); st.State != "probing" || !strings.Contains(st.Reason, "IPv4 has not been probed yet: ") {
		t.Errorf("%+v", st)
	}
	n.mu.Lock()
	n.errs, n.hosts["x.example"] = nil, resolve.Answer{V4: addrs("127.0.0.1")}
	n.mu.Unlock()
	if got := w.step(11 * time.Second); got != "a up" || w.path("a").Status().Reason != "" {
		t.Errorf("%q, %+v", got, w.path("a").Status())
	}
	n.mu.Lock()
	n.errs = map[string]error{"x.example": resolve.ErrTimeout}
	n.mu.Unlock()
	for range 5 {
		if got := w.step(11 * time.Second); got != "" {
			t.Errorf("%q, %+v", got, w.path("a").Status())
		}
	}
}

// The public address is compared with what the node says that it is.
func TestProbeEIP(t *testing.T) {
	var body atomic.Value
	body.Store("{\"ip\": \"%s\"}")
	s := answering(t, &body, false)
	o := probe()
	o.HTTP, o.EIP = s.URL, true
	w := watch(t, escaper.Options{Probe: o, Nodes: []escaper.NodeOptions{
		{ID: "good", V4: addr("127.0.0.2"), Weight: 1, EIP: addrs("127.0.0.2")},
		{ID: "bad", V4: addr("127.0.0.3"), Weight: 1, EIP: addrs("2001:db8::1", "192.0.2.3")},
		{ID: "silent", V4: addr("127.0.0.4"), Weight: 1},
		{ID: "six", V4: addr("127.0.0.5"), Weight: 1, EIP: addrs("2001:db8::1")},
	}})
	w.pass(time.Second) // one after the other
	if got := w.step(0); got != "good up, bad down, silent up, six up" {
		t.Errorf("%q", got)
	}
	if st := w.path("bad").Status(); st.Reason != "probe "+s.URL+": the public address is 127.0.0.3, and the eip of the node 192.0.2.3" {
		t.Errorf("%+v", st)
	}
	body.Store("nothing to see")
	for range 3 {
		w.step(11 * time.Second)
	}
	if st := w.path("good").Status(); st.State != "down" || !strings.HasSuffix(st.Reason, "no address in the answer to compare with the eip") {
		t.Errorf("%+v", st)
	}
	if st := w.path("silent").Status(); st.State != "up" {
		t.Errorf("%+v", st)
	}
}

// A certificate is verified.
func TestProbeHTTPS(t *testing.T) {
	var body atomic.Value
	body.Store("fine")
	s := answering(t, &body, true)
	s.Config.ErrorLog = nil
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	for _, trusted := range []bool{true, false} {
		o := probe()
		o.HTTP = s.URL
		o.Roots = x509.NewCertPool()
		if trusted {
			o.Roots = roots
		}
		w := watch(t, escaper.Options{Probe: o, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}})
		w.step(0)
		if st := w.path("a").Status(); trusted != (st.State == "up") || !trusted && !strings.Contains(st.Reason, "TLS: ") {
			t.Errorf("trusted %t: %+v", trusted, st)
		}
	}
}

// A path to a proxy is probed through the proxy.
func TestProbeThroughPeer(t *testing.T) {
	var body atomic.Value
	body.Store("fine")
	s := answering(t, &body, false)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to := strings.Replace(r.Host, "target.invalid", "127.0.0.1", 1)
		far, err := net.Dial("tcp", to)
		if r.Method != http.MethodConnect || err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		near, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		fmt.Fprint(near, "HTTP/1.1 200 OK\r\n\r\n")
		go func() {
			_, _ = far.(*net.TCPConn).ReadFrom(near)
			_ = far.(*net.TCPConn).CloseWrite()
		}()
		go func() {
			_, _ = near.(*net.TCPConn).ReadFrom(far)
			_ = near.Close()
		}()
	}))
	t.Cleanup(proxy.Close)
	peer, err := escaper.NewPeer(escaper.PeerOptions{Kind: "proxy_http", Addr: proxy.Listener.Addr().String(), Timeout: 5 * time.Second}, escaper.NewAuthorities())
	if err != nil {
		t.Fatal(err)
	}
	o := probe()
	o.Fall = 1
	// The name is the proxy's to resolve.
	o.HTTP = strings.Replace(s.URL, "127.0.0.1", "target.invalid", 1)
	w := watch(t, escaper.Options{Probe: o, Peers: true, Nodes: []escaper.NodeOptions{
		{ID: "a", Peer: peer, AnySource: true, Unbound: selection.V4 | selection.V6, Weight: 1},
	}})
	if got := w.step(0); got != "a up" {
		t.Errorf("%q, %+v", got, w.path("a").Status())
	}
	s.Close()
	if got := w.step(11 * time.Second); got != "a down" {
		t.Errorf("%q, %+v", got, w.path("a").Status())
	}
}

// Thousands of paths are probed a few at a time, spread over the interval, and
// none twice at once.
func TestProbesAreBounded(t *testing.T) {
	const n = 3000
	var nodes []escaper.NodeOptions
	for i := range n {
		nodes = append(nodes, escaper.NodeOptions{ID: fmt.Sprintf("n%d", i), V4: netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), Weight: 1})
	}
	o := probe()
	o.TCP = "127.0.0.1:9"
	w := watch(t, escaper.Options{Probe: o, Nodes: nodes})
	under := map[*escaper.Path]func(){}
	begun := map[*escaper.Path]int{}
	most, before := 0, w.now()
	for w.now().Sub(before) < 35*time.Second {
		round := 0
		w.health.StepAt(w.now(), func(p *escaper.Path, done func()) {
			if under[p] != nil {
				t.Errorf("%s is probed twice at once", p.Name)
			}
			under[p], round = done, round+1
			begun[p]++
		})
		most = max(most, round)
		if len(under) > escaper.MaxProbes {
			t.Fatalf("%d probes at once", len(under))
		}
		for p, done := range under { // each takes a round, 10 ms
			delete(under, p)
			done()
		}
		w.pass(10 * time.Millisecond)
	}
	if len(begun) != n {
		t.Errorf("%d paths of %d were probed", len(begun), n)
	}
	for p, k := range begun {
		if k < 3 || k > 5 {
			t.Errorf("%s was probed %d times in 35 s", p.Name, k)
			break
		}
	}
	if most > escaper.MaxProbes {
		t.Errorf("%d began at once", most)
	}
}

// Run probes by itself and ends with its context.
func TestHealthRuns(t *testing.T) {
	l := listen(t, "127.0.0.1:0").hold(t)
	o := probe()
	o.TCP = l.addr.String()
	changed := make(chan *escaper.Path, 16)
	h := escaper.NewHealth(func(list []*escaper.Path) {
		for _, p := range list {
			changed <- p
		}
	})
	d := door(t, direct(t, escaper.Options{Probe: o, Health: h, Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}}}))
	h.Use(d.Table())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		h.Run(ctx)
		close(ended)
	}()
	if p := <-changed; p.Status().State != "up" {
		t.Errorf("%+v", p.Status())
	}
	if from := l.next(t); from.Addr() != addr("127.0.0.2") {
		t.Errorf("probed from %s", from)
	}
	c, err := d.Open(context.Background(), request(literal(l.addr), selection.Selection{}))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	cancel()
	<-ended
}

func TestFirstAddr(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "nothing": "", "192.0.2.1": "192.0.2.1", "192.0.2.1\n": "192.0.2.1", `{"ip":"2001:db8::1"}`: "2001:db8::1",
		"Current IP Address: 192.0.2.1.": "192.0.2.1", "<b>192.0.2.1</b> 192.0.2.2": "192.0.2.1", "at 12:34:56 from ::ffff:192.0.2.1": "192.0.2.1",
		"version 1.2.3": "", "0.0.0.0 then 192.0.2.9": "192.0.2.9", "ip=::1": "::1", "face 10.0.0.1": "10.0.0.1", "192.0.2.300": "", "h=x.example\nip=2001:DB8::5\nts=1.5": "2001:db8::5",
	} {
		got := ""
		if a := escaper.FirstAddr([]byte(text)); a.IsValid() {
			got = a.String()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzFirstAddr(f *testing.F) {
	for _, s := range []string{"", "192.0.2.1", "ip: 2001:db8::1.", "a.b.c.d 1.2.3.4:80", "::::", "::ffff:1.2.3.4", "\xff1.2.3.4"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a := escaper.FirstAddr(b)
		if !a.IsValid() {
			return
		}
		if a.IsUnspecified() || a.Is4In6() || a.Zone() != "" {
			t.Errorf("%q: %s", b, a)
		}
		if again := escaper.FirstAddr([]byte("(" + a.String() + ")")); again != a {
			t.Errorf("%s is read as %s", a, again)
		}
	})
}

// smallRange makes sockets that have few ports.
func smallRange(t *testing.T, n uint16) *escaper.Sockets {
	t.Helper()
	s, err := escaper.NewSockets(41000, 41000+n-1)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, ok := s.PortRange(); !ok {
		t.Fatal("the kernel has no IP_LOCAL_PORT_RANGE (6.3)")
	}
	return s
}

// Where the policy's path has no ports left, another is taken, unless somebody
// selected it.
func TestSpill(t *testing.T) {
	if !isChild(t) { // nobody else is to have one of the few ports
		runChildIn(t, lab.TestNS(t, "spill"))
		return
	}
	const ports = 4
	for _, spill := range []bool{true, false} {
		o := listen(t, "127.0.0.1:0").hold(t)
		d := door(t, direct(t, escaper.Options{
			Spill: spill, Policy: selection.Serial, EnableSelection: true, Sockets: smallRange(t, ports),
			Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}},
		}))
		var ids []string
		for i := range 2*ports + 1 {
			r := request(literal(o.addr), selection.Selection{})
			c, err := d.Open(context.Background(), r)
			if err != nil {
				if !errors.Is(err, selection.ErrPorts) || spill && i < 2*ports {
					t.Errorf("spill %t: %d: %v", spill, i, err)
				}
				ids = append(ids, "-")
				continue
			}
			t.Cleanup(func() { _ = c.Close() })
			if r.Choice.Path != c.Path.Name {
				t.Errorf("chose %s and went by %s", r.Choice.Path, c.Path.Name)
			}
			ids = append(ids, c.Path.ID)
		}
		want := "a a a a b b b b -"
		if !spill {
			want = "a a a a - - - - -"
		}
		if got := strings.Join(ids, " "); got != want {
			t.Errorf("spill %t: %s, want %s", spill, got, want)
		}
		for _, s := range []selection.Selection{
			byClient(pathID("a")),
			{Session: strictSession(t, d, "a", o)},
		} {
			if _, err := d.Open(context.Background(), request(literal(o.addr), s)); !errors.Is(err, selection.ErrPorts) {
				t.Errorf("spill %t: selected: %v", spill, err)
			}
		}
	}
}

// TestSpillOfDatagrams: a socket for datagrams takes a port of the path for itself.
func TestSpillOfDatagrams(t *testing.T) {
	if !isChild(t) {
		runChildIn(t, lab.TestNS(t, "spill"))
		return
	}
	const ports = 4
	for _, spill := range []bool{true, false} {
		d := door(t, direct(t, escaper.Options{
			Spill: spill, Policy: selection.Serial, EnableSelection: true, Sockets: smallRange(t, ports),
			Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}},
		}))
		var ids []string
		var all []escaper.PacketConn
		for i := range 2*ports + 1 {
			r := request(escaper.Target{}, selection.Selection{})
			p, err := d.OpenPacket(context.Background(), r)
			if err != nil {
				if !errors.Is(err, selection.ErrPorts) || spill && i < 2*ports {
					t.Errorf("spill %t: %d: %v", spill, i, err)
				}
				ids = append(ids, "-")
				continue
			}
			if p.Source(selection.V4).Port() == 0 {
				t.Errorf("spill %t: %d has no port", spill, i)
			}
			all = append(all, p)
			ids = append(ids, strings.TrimPrefix(r.Choice.Path, "out/"))
		}
		want := "a a a a b b b b -"
		if !spill {
			want = "a a a a - - - - -"
		}
		if got := strings.Join(ids, " "); got != want {
			t.Errorf("spill %t: %s, want %s", spill, got, want)
		}
		if _, err := d.OpenPacket(context.Background(), request(escaper.Target{}, byClient(pathID("a")))); !errors.Is(err, selection.ErrPorts) {
			t.Errorf("spill %t: selected: %v", spill, err)
		}
		for _, p := range all {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// strictSession finds a strict session that is bound to a path.
func strictSession(t *testing.T, d *escaper.Door, id string, o *origin) selection.Session {
	t.Helper()
	for i := range 100 {
		s := selection.Session{Name: fmt.Sprintf("s%d", i), Strict: true}
		r := request(literal(o.addr), selection.Selection{Session: s})
		c, err := d.Open(context.Background(), r)
		if err == nil {
			_ = c.Close()
		}
		if r.Choice.Path == "out/"+id {
			return s
		}
	}
	t.Fatal("no session")
	return selection.Session{}
}

// A path whose ports are nearly used up is passed by before it has none.
func TestSpillAhead(t *testing.T) {
	o := listen(t, "127.0.0.1:0").hold(t)
	d := door(t, direct(t, escaper.Options{
		Spill: true, Policy: selection.Serial, EnableSelection: true,
		Nodes: []escaper.NodeOptions{{ID: "a", V4: addr("127.0.0.2"), Weight: 1}, {ID: "b", V4: addr("127.0.0.3"), Weight: 1}},
	}))
	by := func(s selection.Selection) string {
		t.Helper()
		c, err := d.Open(context.Background(), request(literal(o.addr), s))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.Path.ID
	}
	a, b := d.Table().Path("out/a"), d.Table().Path("out/b")
	target := []netip.AddrPort{o.addr}
	for _, tt := range []struct {
		a, b []netip.AddrPort
		want string
	}{{nil, nil, "a"}, {target, nil, "b"}, {target, target, "a"}, {nil, target, "a"}, {[]netip.AddrPort{netip.AddrPortFrom(o.addr.Addr(), 9)}, nil, "a"}} {
		a.SetCrowded(tt.a)
		b.SetCrowded(tt.b)
		if got := by(selection.Selection{}); got != tt.want {
			t.Errorf("crowded %v, %v: by %s", tt.a, tt.b, got)
		}
		if got := by(byClient(pathID("a"))); got != "a" {
			t.Errorf("selected: by %s", got)
		}
	}
}
