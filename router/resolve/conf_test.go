package resolve

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseResolvConf(t *testing.T) {
	local := []string{"127.0.0.1:53"}
	std := func(change func(*settings)) settings {
		s := settings{servers: local, ndots: 1, timeout: 5 * time.Second, attempts: 2}
		change(&s)
		return s
	}
	for _, tt := range []struct {
		what, text, hostname string
		want                 settings
	}{
		{"empty", "", "box", std(func(*settings) {})},
		{"domain of the host name", "", "box.Example.com", std(func(s *settings) { s.search = []string{"example.com"} })},
		{"an empty list is a list", "search .\n", "box.example.com", std(func(*settings) {})},
		{"servers", "nameserver 192.0.2.1\nnameserver\t2001:db8::1 \n nameserver fe80::1%eth0\nnameserver 192.0.2.4", "", std(func(s *settings) {
			s.servers = []string{"192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%eth0]:53"}
		})},
		{"bad servers", "nameserver\nnameserver dns.test\nnameserver 192.0.2.1:5353\nnameserver 192.0.2\nserver 192.0.2.1\n", "", std(func(*settings) {})},
		{"comments", "# nameserver 192.0.2.1\n;nameserver 192.0.2.2\nnameserver 192.0.2.3 # mine\nsearch a.test ; b.test\n", "", std(func(s *settings) {
			s.servers, s.search = []string{"192.0.2.3:53"}, []string{"a.test"}
		})},
		{"the last list wins", "search a.test b.test\ndomain c.test d.test\n", "", std(func(s *settings) { s.search = []string{"c.test"} })},
		{"bad domains", "search a..test b.test. -x *.test B\u00fccher.test x/y\n", "", std(func(s *settings) { s.search = []string{"b.test"} })},
		{"options", "options ndots:3 timeout:7 attempts:4 rotate use-vc no-aaaa\n", "", std(func(s *settings) {
			s.ndots, s.timeout, s.attempts, s.rotate, s.tcp, s.noAAAA = 3, 7*time.Second, 4, true, true, true
		})},
		{"limits", "options ndots:99 timeout:99 attempts:99\n", "", std(func(s *settings) {
			s.ndots, s.timeout, s.attempts = 15, 30*time.Second, 5
		})},
		{"zeros", "options ndots:0 timeout:0 attempts:0\n", "", std(func(s *settings) {
			s.ndots, s.timeout, s.attempts = 0, time.Second, 1
		})},
		{"bad options", "options ndots timeout: attempts:x ndots:-1 rotate:1 ndots:99999999999999999999 edns0 \x00\n", "", std(func(*settings) {})},
		{"lines of Windows", "nameserver 192.0.2.1\r\nsearch a.test\r\n", "", std(func(s *settings) {
			s.servers, s.search = []string{"192.0.2.1:53"}, []string{"a.test"}
		})},
	} {
		if d := cmp.Diff(tt.want, parseResolvConf([]byte(tt.text), tt.hostname), cmp.AllowUnexported(settings{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.what, d)
		}
	}
	many := parseResolvConf([]byte("search"+strings.Repeat(" a.test", 100)), "")
	if len(many.search) != maxSearch {
		t.Errorf("%d domains", len(many.search))
	}
}

func TestParseHosts(t *testing.T) {
	h := parseHosts([]byte(strings.Join([]string{
		"# a comment", "", "   ", "10.0.0.1", "10.0.0.1\tOne uno. # eins",
		" 10.0.0.2  one", "10.0.0.1 one", "2001:db8::1 one", "::ffff:10.0.0.3 one",
		"fe80::1%lo0 zoned", "10.0.0.256 bad", "name 10.0.0.1", "10.0.0.4 good 1.2.3.4 -x b\u00fccher x/y other",
		"10.0.0.5 under_score#not", "10.0.0.6 last",
	}, "\n")))
	ips := func(list ...string) (a []netip.Addr) {
		for _, s := range list {
			a = append(a, netip.MustParseAddr(s))
		}
		return a
	}
	want := hosts{
		"one":         {V4: ips("10.0.0.1", "10.0.0.2", "10.0.0.3"), V6: ips("2001:db8::1")},
		"uno":         {V4: ips("10.0.0.1")},
		"good":        {V4: ips("10.0.0.4")},
		"other":       {V4: ips("10.0.0.4")},
		"under_score": {V4: ips("10.0.0.5")},
		"last":        {V4: ips("10.0.0.6")},
	}
	if d := cmp.Diff(want, h, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// The order of the names that are tried is in TestSearch; this is that of the servers.
func TestOrder(t *testing.T) {
	c := newConf(settings{servers: []string{"a", "b", "c"}, rotate: true})
	order := func() (s string) {
		for _, x := range c.order(100) {
			s += x.addr
		}
		return s
	}
	var got []string
	for range 4 {
		got = append(got, order())
	}
	c.asked[1].last.Store(101)
	for range 3 {
		got = append(got, order())
	}
	c.asked[1].last.Store(100) // over
	got = append(got, order())
	if want := strings.Fields("abc bca cab abc cab cab acb bca"); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	c = newConf(settings{servers: []string{"a", "b"}})
	c.turn.Store(1<<32 - 1) // the count of turns wraps
	c.rotate = true
	if a, b := order(), order(); a != "ba" || b != "ab" {
		t.Errorf("%s, %s", a, b)
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a.test b.test\noptions ndots:2 timeout:1 rotate\n"), "box.example.com")
	f.Add([]byte("nameserver fe80::1%eth0\n;x\n#y\ndomain .\n"), "")
	f.Add([]byte("options ndots:99999999999999999999 attempts:-1\nnameserver"), ".")
	f.Add([]byte("search \xff \x00\r\n\n\n"), "a..b")
	f.Fuzz(func(t *testing.T, data []byte, hostname string) {
		s := parseResolvConf(data, hostname)
		if len(s.servers) < 1 || len(s.servers) > maxServers || len(s.search) > maxSearch || s.ndots < 0 || s.ndots > maxNdots ||
			s.attempts < 1 || s.attempts > maxAttempts || s.timeout < time.Second || s.timeout > maxTimeout*time.Second {
			t.Fatalf("%+v", s)
		}
		for _, addr := range s.servers {
			host, port, err := net.SplitHostPort(addr)
			if _, perr := netip.ParseAddr(host); err != nil || perr != nil || port != "53" {
				t.Errorf("server %q", addr)
			}
		}
		for _, d := range s.search {
			var n name
			if !n.set(d) || string(n.host()) != d || n.absolute {
				t.Errorf("domain %q", d)
			}
		}
		c := newConf(s)
		var n name
		if !n.set("host") {
			t.Fatal("host is a name")
		}
		for i := range c.tries(&n) {
			if full, ok := c.try(&n, i); ok && !strings.HasPrefix(string(full), "host") {
				t.Errorf("try %d is %q", i, full)
			}
		}
	})
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("127.0.0.1 localhost\n::1 ip6-localhost # x\n10.0.0.1 a b. C\n"))
	f.Add([]byte("::ffff:10.0.0.1 a\nfe80::1%1 b\n1.2.3.4\n\r\n#"))
	f.Add([]byte("1.2.3.4 \x00 \xff ..\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for host, a := range parseHosts(data) {
			var n name
			if !n.set(host) || string(n.host()) != host || n.absolute {
				t.Errorf("name %q", host)
			}
			if len(a.V4)+len(a.V6) == 0 || len(a.V4) > maxAddrs || len(a.V6) > maxAddrs {
				t.Errorf("%q has %v", host, a)
			}
			for _, ip := range a.V4 {
				if !ip.Is4() {
					t.Errorf("%q has %v as IPv4", host, ip)
				}
			}
			for _, ip := range a.V6 {
				if !ip.Is6() || ip.Is4In6() || ip.Zone() != "" {
					t.Errorf("%q has %v as IPv6", host, ip)
				}
			}
		}
	})
}

// However the hosts of the options are written, what is looked up is a name as Lookup spells it, with addresses that can be dialled.
func FuzzStaticHosts(f *testing.F) {
	f.Add("www.Test.", "192.0.2.1", "2001:db8::1")
	f.Add("www.test", "::ffff:192.0.2.1", "192.0.2.1")
	f.Add("127.1", "fe80::1%eth0", "")
	f.Fuzz(func(t *testing.T, host, one, two string) {
		a, _ := netip.ParseAddr(one) // the zero Addr is among the cases
		b, _ := netip.ParseAddr(two)
		r := &Resolver{opt: Options{Static: map[string][]netip.Addr{host: {a, b}}, Log: slog.New(slog.DiscardHandler)}}
		h := r.staticHosts()
		var n name
		if n.set(host) != (len(h) == 1) {
			t.Fatalf("%q: %v", host, h)
		}
		got, ok := h[string(n.host())]
		if len(h) == 1 && !ok {
			t.Fatalf("%q is under another name: %v", host, h)
		}
		for _, want := range []netip.Addr{a, b} {
			in := slices.Contains(got.V4, want.Unmap()) || slices.Contains(got.V6, want.Unmap())
			if use := ok && want.IsValid() && want.Zone() == ""; in != use {
				t.Errorf("%q: %v in %v: %v", host, want, got, in)
			}
		}
		for _, ip := range got.V4 {
			if !ip.Is4() {
				t.Errorf("%v as IPv4", ip)
			}
		}
		for _, ip := range got.V6 {
			if !ip.Is6() || ip.Is4In6() {
				t.Errorf("%v as IPv6", ip)
			}
		}
	})
}

// A name that passes is one that goes over the wire as it is, and no address in anybody's reading.
func FuzzName(f *testing.F) {
	for _, s := range []string{"www.Example.com.", "127.1", "0x7f.1", "a..b", "_x-y", "\xff", "1.2.3.4", "::1", "::ffff:1.2.3.4%x", strings.Repeat("a.", 130)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		if a, ok := literal(host); ok && (a.Zone() != "" || a.Is4In6()) {
			t.Errorf("literal(%q) = %v", host, a)
		}
		var n name
		if !n.set(host) {
			return
		}
		full := string(n.host())
		if want := strings.ToLower(strings.TrimSuffix(host, ".")); full != want {
			t.Errorf("%q is %q, want %q", host, full, want)
		}
		if _, err := netip.ParseAddr(full); err == nil {
			t.Errorf("%q is an address", full)
		}
		if _, _, err := (question{name: full}).pack(mixed(full+"."), true); err != nil {
			t.Errorf("%q: %v", full, err)
		}
		if _, ok := n.with(strings.Repeat("d", maxName-len(full))); ok {
			t.Errorf("%q has room for too much", full)
		}
	})
}
