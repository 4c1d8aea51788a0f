package escaper_test

import (
	"net/netip"
	"strings"
	"testing"

	"wayout/router/escaper"
)

func TestParseHost(t *testing.T) {
	for in, want := range map[string]string{
		"1.2.3.4": "1.2.3.4", "255.255.255.255": "255.255.255.255", "0.0.0.0": "0.0.0.0",
		"a": "name", "A-b_c.d9": "name", "host.example.": "name", "1.2.3.a": "name", "0xfg": "name",
		strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("a", 61): "name",
		strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("a", 62): "",
		strings.Repeat("a", 64): "", strings.Repeat("a", 64) + ".b": "",
		"": "", ".": "", "..": "", "a..b": "", ".a": "", "a..": "", "a b": "", "a\x00": "", "\xc3\xa9": "", "a:1": "", "::1": "", "[::1]": "",
		"1.2.3": "", "1.2.3.4.5": "", "1.2.3.": "", ".1.2.3": "", "1..2.3": "", "127.1": "", "2130706433": "",
		"256.1.1.1": "", "01.2.3.4": "", "1.2.3.4.": "", "1111.1.1.1": "", "0x7f000001": "", "0X7F.1": "", "a.0x": "", "a.1": "",
	} {
		addr, ok := escaper.ParseHost([]byte(in))
		got := ""
		switch {
		case ok && addr.IsValid():
			got = addr.String()
		case ok:
			got = "name"
		case addr.IsValid():
			t.Errorf("%q: refused, with %s", in, addr)
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

// FuzzParseHost: a literal address is what net/netip reads too, and the reverse.
func FuzzParseHost(f *testing.F) {
	for _, s := range []string{"1.2.3.4", "01.2.3.4", "host.example.", "127.1", "0x7f000001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		addr, ok := escaper.ParseHost([]byte(s))
		want, err := netip.ParseAddr(s)
		if v4 := err == nil && want.Is4(); v4 != addr.IsValid() || v4 && want != addr {
			t.Fatalf("%q: got %v, net/netip says %v", s, addr, want)
		}
		if ok && !addr.IsValid() && strings.Trim(strings.ToLower(s), "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
			t.Fatalf("%q is a name", s)
		}
	})
}
