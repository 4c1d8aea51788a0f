package main_test

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// nameServer answers at the origin, over UDP and TCP: names.test is the origin,
// all in capitals of a text over 512 bytes.
func (p *pinScene) nameServer() {
	p.t.Helper()
	long := strings.Repeat("x", 200)
	h := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		m := new(dns.Msg).SetReply(req)
		m.RecursionAvailable = true
		for _, text := range []string{
			"names.test. 60 A " + lab.OriginAddr4, "names.test. 60 AAAA " + lab.OriginAddr6,
			"long.test. 60 TXT " + strings.Repeat(`"`+long+`" `, 10),
		} {
			rr, err := dns.NewRR(text)
			if err != nil {
				panic(err)
			}
			if h := rr.Header(); h.Name == req.Question[0].Name && h.Rrtype == req.Question[0].Qtype {
				m.Answer = append(m.Answer, rr)
			}
		}
		if w.LocalAddr().Network() == "udp" {
			m.Truncate(dns.MinMsgSize)
		}
		_ = w.WriteMsg(m)
	})
	for _, at := range []string{lab.OriginAddr4 + ":53", "[" + lab.OriginAddr6 + "]:53"} {
		l, err := p.Origin.Listen(netip.MustParseAddrPort(at))
		if err != nil {
			p.t.Fatal(err)
		}
		var u net.PacketConn
		if err := p.Origin.Do(func() error {
			u, err = net.ListenPacket("udp", at)
			return err
		}); err != nil {
			p.t.Fatal(err)
		}
		for _, s := range []*dns.Server{{PacketConn: u, Handler: h}, {Listener: l, Handler: h}} {
			done, started := make(chan error, 1), make(chan struct{})
			s.NotifyStartedFunc = func() { close(started) }
			go func() { done <- s.ActivateAndServe() }()
			<-started
			p.t.Cleanup(func() {
				if err := errors.Join(s.Shutdown(), <-done); err != nil {
					p.t.Error(err)
				}
			})
		}
	}
}

const pythonLooksUp = `
import socket
print(sorted({a[4][0] for a in socket.getaddrinfo("names.test", 80, type=socket.SOCK_STREAM)}))
with open("/etc/resolv.conf") as f: print(f.read())
`

// TestExecNames sends a command's lookups by its path, wherever the host's own
// would go.
func TestExecNames(t *testing.T) {
	t.Parallel()
	p := newPinScene(t)
	python, err := exec.LookPath("python3")
	if err != nil {
		lab.Missing(t, "python3")
	}
	p.nameServer()
	p.start(oneFamily())
	far := []*lab.Capture{p.capture(p.ISP1, "host0"), p.capture(p.ISP2, "host0")}
	six, four := uplinkNodes()[5], netip.MustParseAddr("198.51.100.21")
	run := func(conf string, args ...string) (string, string, int) {
		t.Helper()
		x := p.run1(lab.Program{
			Path: binary, Args: append([]string{"exec", "--config", p.config}, args...),
			Files: map[string]string{"/etc/resolv.conf": conf, "/etc/nsswitch.conf": "hosts: nothing\n"},
		})
		code := x.wait()
		_ = x.cmd.Wait() // for its output
		x.mu.Lock()
		defer x.mu.Unlock()
		return strings.Join(x.out, "\n"), x.errs.String(), code
	}
	both := "nameserver " + lab.OriginAddr4 + "\nnameserver " + lab.OriginAddr6 + "\nsearch a.test\noptions timeout:7\n"
	const local = "nameserver 127.0.0.53\n"
	for _, c := range []struct {
		name, conf string
		args       []string
	}{
		{"the host's servers", both, []string{"--path", "out/p6", "--dns", "--"}},
		{"others", local, []string{"--path", "out/p6", "--dns", "--dns-server", lab.OriginAddr6 + "," + lab.OriginAddr4, "--"}},
		{"of the path's family", both, []string{"--path", "out/six", "--dns", "--"}},
		{"of its other family", both, []string{"--path", "out/four", "--dns", "--"}},
	} {
		out, errs, code := run(c.conf, append(c.args, python, "-c", pythonLooksUp)...)
		if code != 0 || !strings.Contains(out, lab.OriginAddr4) || !strings.Contains(out, lab.OriginAddr6) || !strings.Contains(out, "nameserver 127.") || errs != "" {
			t.Errorf("%s: exit %d: %s%s", c.name, code, out, errs)
		}
		if c.conf == both && !strings.Contains(out, "search a.test\noptions timeout:7") {
			t.Errorf("%s: the rest of resolv.conf is gone: %s", c.name, out)
		}
		// A static program has a resolver of its own.
		out, errs, code = run(c.conf, append(c.args, p.dialler, "txt", "long.test")...)
		if code != 0 || len(out) < 1000 {
			t.Errorf("%s, a long answer: exit %d: %q %s", c.name, code, out, errs)
		}
	}
	for _, c := range []struct {
		says, conf string
		args       []string
	}{
		{"names only servers on this host", local, []string{"--path", "out/p6", "--dns", "--"}},
		{"no address of the family", "nameserver " + lab.OriginAddr6 + "\n", []string{"--path", "out/four", "--dns", "--"}},
	} {
		if out, errs, code := run(c.conf, append(c.args, "true")...); code != 125 || !strings.Contains(errs, c.says) {
			t.Errorf("exit %d: %s%s, want %q", code, out, errs, c.says)
		}
	}
	asked := map[netip.Addr]int{}
	for i, c := range far {
		for _, pkt := range settled(t, c) {
			if (pkt.Proto == unix.IPPROTO_UDP || pkt.Proto == unix.IPPROTO_TCP) && !pkt.Out {
				if pkt.Dst.Port() != 53 {
					t.Errorf("isp%d has seen %s", i+1, pkt)
				}
				asked[pkt.Src.Addr()]++
			}
		}
	}
	if len(asked) != 4 || asked[six.v4] == 0 || asked[six.v6] == 0 || asked[four] == 0 {
		t.Errorf("asked from %v", asked)
	}
	if text, _, _ := run(both, "--path", "out/p6", "--", "cat", "/etc/resolv.conf"); strings.Contains(text, "127.") {
		t.Errorf("without --dns: %s", text)
	}
	p.nothingLeft()
}
