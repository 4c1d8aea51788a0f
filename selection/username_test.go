package selection_test

import (
	"errors"
	"math/big"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"wayout/selection"
)

func TestSplitUsername(t *testing.T) {
	for _, c := range []struct{ name, base, rest string }{
		{"", "", ""},
		{"alice", "alice", ""},
		{"alice-smith", "alice-smith", ""},
		{"alice-", "alice-", ""},
		{"-", "-", ""},
		{"--", "--", ""},
		{"alice-path", "alice-path", ""},
		{"alice-path-", "alice", "-path-"},
		{"alice-path-3", "alice", "-path-3"},
		{"alice-smith-path-3", "alice-smith", "-path-3"},
		{"alice-paths-3", "alice-paths-3", ""},
		{"alice-xpath-3", "alice-xpath-3", ""},
		{"alice-Path-3", "alice-Path-3", ""},
		{"alice-SESSION-3", "alice-SESSION-3", ""},
		{"alice--path-3", "alice-", "-path-3"},
		{"alice-path--3", "alice", "-path--3"},
		{"path-3", "path-3", ""},
		{"-path-3", "", "-path-3"},
		{"alice-zone-eu-ip-192.0.2.1-path-3", "alice-zone-eu", "-ip-192.0.2.1-path-3"},
		{"alice-pa\xffth-3-sid-1", "alice-pa\xffth-3", "-sid-1"},
		{"a-session-1", "a", "-session-1"},
		{"a-sessid-1", "a", "-sessid-1"},
		{"a-sid-1", "a", "-sid-1"},
		{"a-sessionid-1", "a", "-sessionid-1"},
		{"a-lifetime-1", "a", "-lifetime-1"},
		{"a-sesstime-1", "a", "-sesstime-1"},
		{"a-sessionduration-1", "a", "-sessionduration-1"},
		{"a-sessttl-1", "a", "-sessttl-1"},
		{"a-sessionlength-1", "a", "-sessionlength-1"},
		{"a-strict-1", "a", "-strict-1"},
		{"a-sess-1", "a-sess-1", ""},
	} {
		if base, rest := selection.SplitUsername(c.name); base != c.base || rest != c.rest {
			t.Errorf("SplitUsername(%q) = %q, %q, want %q, %q", c.name, base, rest, c.base, c.rest)
		}
	}
}

func TestParseParams(t *testing.T) {
	idx, id := selection.Index, selection.ID
	session := func(name string) selection.Session { return selection.Session{Name: name} }
	lasting := func(d time.Duration) selection.Session { return selection.Session{Name: "s", Lifetime: d} }
	long := strings.Repeat("x", 64)
	for _, c := range []struct {
		rest    string
		layer   selection.Layer
		session selection.Session
	}{
		{"", nil, session("")},
		{"-path-3", one(idx(3)), session("")},
		{"-path-007", one(idx(7)), session("")},
		{"-path-18446744073709551615", one(idx(1<<64 - 1)), session("")},
		{"-path-fra-2", one(id("fra-2")), session("")},
		{"-path-3a", one(id("3a")), session("")},
		{"-path-198.51.100.11", one(id("198.51.100.11")), session("")},
		{"-path-a_b", one(id("a_b")), session("")},
		{"-path-out~fra-2", selection.Layer{entry("out", id("fra-2"))}, session("")},
		{"-path-by-city~out", selection.Layer{entry("by-city", id("out"))}, session("")},
		{"-path-out~2", selection.Layer{entry("out", idx(2))}, session("")},
		{"-path-" + long, one(id(long)), session("")},
		{"-path-path", one(id("path")), session("")},
		{"-path-session-x", one(id("session-x")), session("")}, // the dash is path's
		{"-session-path-1", nil, session("path-1")},

		{"-ip-198.51.100.11", one(selection.Address(addr("198.51.100.11"))), session("")},
		{"-ip-2001_db8__11", one(selection.Address(addr("2001:db8::11"))), session("")},
		{"-ip-2001_DB8_0__11", one(selection.Address(addr("2001:db8::11"))), session("")},
		{"-ip-__ffff_198.51.100.11", one(selection.Address(addr("198.51.100.11"))), session("")},
		{"-path-six-ip-2001_db8__11", one(id("six").At(addr("2001:db8::11"))), session("")},
		{"-ip-2001_db8__11-path-six", one(id("six").At(addr("2001:db8::11"))), session("")},
		{"-ip-192.0.2.1-path-out~4", selection.Layer{entry("out", idx(4).At(addr("192.0.2.1")))}, session("")},

		{"-session-abc", nil, session("abc")},
		{"-sid-1", nil, session("1")},
		{"-sessid-a-b--c", nil, session("a-b--c")},
		{"-sessionid--", nil, session("-")},
		{"-sessionid-" + long, nil, session(long)},
		{"-session-s-lifetime-10", nil, lasting(10 * time.Minute)},
		{"-lifetime-10-session-s", nil, lasting(10 * time.Minute)},
		{"-session-s-lifetime-010", nil, lasting(10 * time.Minute)},
		{"-session-s-lifetime-10s", nil, lasting(10 * time.Second)},
		{"-session-s-sesstime-10m", nil, lasting(10 * time.Minute)},
		{"-session-s-sessionduration-10h", nil, lasting(10 * time.Hour)},
		{"-session-s-sessttl-10d", nil, lasting(240 * time.Hour)},
		{"-session-s-sessionlength-10", nil, lasting(10 * time.Second)},
		{"-session-s-sessionlength-10m", nil, lasting(10 * time.Minute)},
		{"-session-s-sessionlength-31536000", nil, lasting(365 * 24 * time.Hour)},
		{"-session-s-lifetime-525600", nil, lasting(365 * 24 * time.Hour)},
		{"-session-s-lifetime-365d", nil, lasting(365 * 24 * time.Hour)},
		{"-session-s-strict-on", nil, selection.Session{Name: "s", Strict: true}},
		{"-strict-off-session-s", nil, session("s")},
		{"-strict-on-sid-s-ip-192.0.2.1-lifetime-5-path-a~b", selection.Layer{entry("a", id("b").At(addr("192.0.2.1")))}, selection.Session{Name: "s", Strict: true, Lifetime: 5 * time.Minute}},
	} {
		got, err := selection.ParseParams(c.rest, "srv")
		if err != nil || !slices.Equal(got.Layer, c.layer) || got.Session != c.session {
			t.Errorf("ParseParams(%q) = %v, %v, want %v, %v", c.rest, got, err, c.layer, c.session)
		}
	}
}

func TestParseParamsErrors(t *testing.T) {
	for _, c := range []struct{ rest, err string }{
		{"-path-", "an empty path"},
		{"-path--session-s", "an empty path"},
		{"-session-", "an empty session"},
		{"-path-1-session-", "an empty session"},
		{"-sid--path-1", "an empty sid"},
		{"-path-1-path-1", "gives path twice"},
		{"-path-1-ip-192.0.2.1-path-", "gives path twice"},
		{"-session-a-sid-a", "gives session twice"},
		{"-session-a-lifetime-1-sessionlength-60", "gives lifetime twice"},
		{"-session-a-strict-on-strict-on", "gives strict twice"},
		{"-ip-192.0.2.1-ip-192.0.2.1", "gives ip twice"},
		{"-lifetime-5", "gives lifetime without session"},
		{"-path-1-sessionlength-5", "gives lifetime without session"},
		{"-strict-on", "gives strict without session"},
		{"-strict-off", "gives strict without session"},
		{"-path-18446744073709551616", `has path "18446744073709551616", want an index`},
		{"-path-~a", "has path"},
		{"-path-a~", "has path"},
		{"-path-a~b~c", "has path"},
		{"-path-~", "has path"},
		{"-path-a~18446744073709551616", "has path"},
		{"-path-fra 1", "a character other than"},
		{"-path-2001:db8::1", "a character other than"},
		{"-path-\u0661", "a character other than"},
		{"-path-a/b", "a character other than"},
		{"-session-a\x00", "a character other than"},
		{"-session-" + strings.Repeat("x", 65), "65 bytes, 64 at most"},
		{"-ip-fra-2", `has ip "fra-2", want an address`},
		{"-ip-192.0.2", "has ip"},
		{"-ip-192.0.2.01", "has ip"},
		{"-ip-1", "has ip"},
		{"-ip-2001-db8--1", "has ip"},
		{"-ip-_", "has ip"},
		{"-session-s-lifetime-0", `has lifetime "0", want a number above 0`},
		{"-session-s-lifetime-0d", "has lifetime"},
		{"-session-s-lifetime--5", "has lifetime"},
		{"-session-s-lifetime-1.5", "has lifetime"},
		{"-session-s-lifetime-m", "has lifetime"},
		{"-session-s-lifetime-5M", "has lifetime"},
		{"-session-s-lifetime-5ms", "has lifetime"},
		{"-session-s-lifetime-1h30m", "has lifetime"},
		{"-session-s-lifetime-1_0", "has lifetime"},
		{"-session-s-lifetime-525601", "has lifetime"},
		{"-session-s-lifetime-366d", "has lifetime"},
		{"-session-s-sessionlength-31536001", "has sessionlength"},
		{"-session-s-lifetime-18446744073709551617", "has lifetime"},
		{"-session-s-strict-yes", `has strict "yes", want on or off`},
		{"-session-s-strict-ON", "has strict"},
		{"x", "no known key"},
		{"path-1", "no known key"},
		{"x-path-1", "no known key"},
		{"-zone-1", "no known key"},
		{"-path", "no known key"},
		{"-", "no known key"},
	} {
		got, err := selection.ParseParams(c.rest, "srv")
		if !errors.Is(err, selection.ErrMalformed) || !strings.Contains(err.Error(), c.err) || got.Layer != nil || got.Session != (selection.Session{}) {
			t.Errorf("ParseParams(%q) = %v, %v, want the error %q", c.rest, got, err, c.err)
		}
	}
}

// reference reads user names by the contract's words and regular expressions.
type reference struct {
	key, value, path, number, digits *regexp.Regexp
}

func newReference() *reference {
	return &reference{
		key:    regexp.MustCompile(`-(path|ip|session|sessid|sid|sessionid|lifetime|sesstime|sessionduration|sessttl|sessionlength|strict)-`),
		value:  regexp.MustCompile(`\A[A-Za-z0-9_.~-]{1,64}\z`),
		path:   regexp.MustCompile(`\A(?:([^~]+)~)?([^~]+)\z`),
		number: regexp.MustCompile(`\A([0-9]+)([smhd]?)\z`),
		digits: regexp.MustCompile(`\A[0-9]+\z`),
	}
}

// split returns the base and the pairs of key and value.
func (r *reference) split(name string) (base string, pairs [][2]string) {
	at := r.key.FindAllStringSubmatchIndex(name, -1)
	for i, m := range at {
		end := len(name)
		if i+1 < len(at) {
			end = at[i+1][0]
		}
		pairs = append(pairs, [2]string{name[m[2]:m[3]], name[m[1]:end]})
	}
	if len(at) == 0 {
		return name, nil
	}
	return name[:at[0][0]], pairs
}

// parse returns false for what is refused.
func (r *reference) parse(pairs [][2]string) (ps selection.Params, ok bool) {
	given := map[string]string{}
	for _, kv := range pairs {
		key, value := kv[0], kv[1]
		switch key {
		case "sessid", "sid", "sessionid":
			key = "session"
		case "sesstime", "sessionduration", "sessttl", "lifetime":
			key = "lifetime"
			if r.digits.MatchString(value) {
				value += "m"
			}
		case "sessionlength":
			key = "lifetime"
			if r.digits.MatchString(value) {
				value += "s"
			}
		}
		if _, twice := given[key]; twice || !r.value.MatchString(kv[1]) {
			return ps, false
		}
		given[key] = value
	}
	session, hasSession := given["session"]
	ps.Session.Name = session
	if s, has := given["strict"]; has {
		if !hasSession || s != "on" && s != "off" {
			return ps, false
		}
		ps.Session.Strict = s == "on"
	}
	if s, has := given["lifetime"]; has {
		m := r.number.FindStringSubmatch(s)
		if !hasSession || m == nil {
			return ps, false
		}
		n, _ := new(big.Int).SetString(m[1], 10)
		n.Mul(n, big.NewInt(map[string]int64{"s": 1, "m": 60, "h": 3600, "d": 86400}[m[2]]))
		if n.Sign() == 0 || n.Cmp(big.NewInt(365*86400)) > 0 {
			return ps, false
		}
		ps.Session.Lifetime = time.Duration(n.Int64()) * time.Second
	}
	var ip netip.Addr
	if s, has := given["ip"]; has {
		a, err := netip.ParseAddr(strings.ReplaceAll(s, "_", ":"))
		if err != nil {
			return ps, false
		}
		ip = a.Unmap()
		ps.Layer = selection.Layer{entry("srv", selection.Address(ip))}
	}
	if s, has := given["path"]; has {
		m := r.path.FindStringSubmatch(s)
		if m == nil {
			return ps, false
		}
		escaper, v := m[1], selection.ID(m[2])
		if escaper == "" {
			escaper = "srv"
		}
		if r.digits.MatchString(m[2]) {
			n, _ := new(big.Int).SetString(m[2], 10)
			if !n.IsUint64() {
				return ps, false
			}
			v = selection.Index(n.Uint64())
		}
		ps.Layer = selection.Layer{entry(escaper, v.At(ip))}
	}
	return ps, true
}

func FuzzUsername(f *testing.F) {
	for _, s := range []string{
		"alice", "alice-path", "alice-path-", "a-b-path-3", "a-path-out~fra-2-session-x-lifetime-10-strict-on",
		"a-ip-2001_db8__1-path-six", "a-ip-192.0.2.1", "a-sid-1-sessionlength-60", "a-sid-1-sessttl-90d", "a-sessid-1-sid-2",
		"a-path--session-x", "a-path-session-x", "a--path-1", "-path-1", "a-path-18446744073709551616", "a-path-~x",
		"a-sessionid-b-sesstime-31536000s", "a-session-b-sessionduration-0", "a-lifetime-4", "a-strict-off", "a-Path-1-ip-::1", "a-sid-\xff",
	} {
		f.Add(s)
	}
	ref := newReference()
	f.Fuzz(func(t *testing.T, name string) {
		base, rest := selection.SplitUsername(name)
		wantBase, pairs := ref.split(name)
		if base != wantBase || base+rest != name {
			t.Fatalf("SplitUsername(%q) = %q, %q, want the base %q", name, base, rest, wantBase)
		}
		got, err := selection.ParseParams(rest, "srv")
		want, ok := ref.parse(pairs)
		switch {
		case (err == nil) != ok:
			t.Fatalf("ParseParams(%q) = %v, %v, want ok %v", rest, got, err, ok)
		case err != nil && (!errors.Is(err, selection.ErrMalformed) || len(err.Error()) > 500):
			t.Fatalf("ParseParams(%q): %v", rest, err)
		case err == nil && (!slices.Equal(got.Layer, want.Layer) || got.Session != want.Session):
			t.Fatalf("ParseParams(%q) = %v, want %v", rest, got, want)
		}
	})
}
