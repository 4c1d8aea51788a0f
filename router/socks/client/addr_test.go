package client_test

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"wayout/router/socks/client"
)

func TestParseTarget(t *testing.T) {
	for _, c := range []struct {
		in   string
		want client.Addr
		ok   bool
	}{
		{"192.0.2.1:80", client.Addr{IP: netip.MustParseAddr("192.0.2.1"), Port: 80}, true},
		{"[2001:db8::1]:443", client.Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 443}, true},
		{"host.example:1", client.Addr{Host: "host.example", Port: 1}, true},
		{strings.Repeat("a", 255) + ":1", client.Addr{Host: strings.Repeat("a", 255), Port: 1}, true},
		{strings.Repeat("a", 256) + ":1", client.Addr{}, false},
		{":80", client.Addr{}, false},
		{"host", client.Addr{}, false},
		{"host:", client.Addr{}, false},
		{"host:65536", client.Addr{}, false},
		{"host:http", client.Addr{}, false},
		{"[fe80::1%eth0]:80", client.Addr{}, false},
	} {
		got, err := client.ParseTarget(c.in)
		if (err == nil) != c.ok {
			t.Errorf("%q: %v", c.in, err)
		} else if c.ok && (got != c.want || got.String() != c.in) {
			t.Errorf("%q: got %+v, %s", c.in, got, got)
		}
	}
}

func TestAddrOnTheWire(t *testing.T) {
	for _, c := range []struct {
		addr client.Addr
		wire string
	}{
		{client.Addr{IP: netip.MustParseAddr("192.0.2.1"), Port: 0x1234}, "\x01\xc0\x00\x02\x01\x12\x34"},
		{client.Addr{IP: netip.MustParseAddr("::ffff:192.0.2.1"), Port: 80}, "\x01\xc0\x00\x02\x01\x00\x50"},
		{client.Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 80}, "\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50"},
		{client.Addr{Host: "a.b", Port: 80}, "\x03\x03a.b\x00\x50"},
	} {
		b, err := client.AppendAddr([]byte("x"), c.addr)
		if err != nil || string(b) != "x"+c.wire {
			t.Errorf("%s: got %x, %v", c.addr, b, err)
		}
		got, n, err := client.ParseAddr([]byte(c.wire + "rest"))
		if err != nil || n != len(c.wire) || got.String() != c.addr.String() && got.AddrPort() != c.addr.AddrPort() {
			t.Errorf("%x: got %s, %d, %v", c.wire, got, n, err)
		}
		for i := range len(c.wire) {
			if _, n, err := client.ParseAddr([]byte(c.wire[:i])); n != 0 || err != nil {
				t.Errorf("%x: got %d, %v of its first %d bytes", c.wire, n, err, i)
			}
		}
	}
	for _, a := range []client.Addr{
		{},
		{Host: strings.Repeat("a", 256)},
		{Host: "a", IP: netip.MustParseAddr("::1")},
		{IP: netip.MustParseAddr("fe80::1%eth0")},
	} {
		if b, err := client.AppendAddr(nil, a); !errors.Is(err, client.ErrAddr) {
			t.Errorf("%+v: got %x, %v", a, b, err)
		}
		if b, err := client.AppendHeader([]byte("x"), a); !errors.Is(err, client.ErrAddr) || string(b) != "x" {
			t.Errorf("%+v: got %q, %v", a, b, err)
		}
	}
}

func TestParseHeaderRefuses(t *testing.T) {
	for in, want := range map[string]error{
		"":             client.ErrAddr,
		"\x00\x00\x00": client.ErrAddr,
		"\x00\x00\x01\x01\x7f\x00\x00\x01\x00\x50": client.ErrFragment,
		"\x00\x00\x80": client.ErrFragment,
		"\x00\x00\x00\x02\x7f\x00\x00\x01\x00\x50": client.ErrAddrType,
		"\x00\x00\x00\x03\x00\x00\x50":             client.ErrAddr,
		"\x00\x00\x00\x01\x7f\x00\x00\x01\x00":     client.ErrAddr,
	} {
		if a, _, err := client.ParseHeader([]byte(in)); !errors.Is(err, want) {
			t.Errorf("%x: got %s, %v", in, a, err)
		}
	}
	// What stands in the reserved bytes is nobody's business.
	a, payload, err := client.ParseHeader([]byte("\xff\xff\x00\x01\x7f\x00\x00\x01\x00\x50hello"))
	if err != nil || a.String() != "127.0.0.1:80" || string(payload) != "hello" {
		t.Errorf("got %s, %q, %v", a, payload, err)
	}
}

func TestHeaderAllocates(t *testing.T) {
	a := client.AddrOf(netip.MustParseAddrPort("192.0.2.1:53"))
	buf := make([]byte, 0, client.MaxHeader)
	if n := testing.AllocsPerRun(100, func() {
		b, err := client.AppendHeader(buf, a)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := client.ParseHeader(b); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzHeader: what is read is written back as it was, but for the reserved
// bytes and for mapped addresses.
func FuzzHeader(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x50hello"))
	f.Add([]byte("\x00\x00\x00\x03\x03a.b\x00\x50"))
	f.Add([]byte("\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50x"))
	f.Add([]byte("\x00\x00\x01\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, payload, err := client.ParseHeader(b)
		if err != nil {
			if !errors.Is(err, client.ErrFragment) && !errors.Is(err, client.ErrAddr) {
				t.Fatalf("error %v", err)
			}
			return
		}
		out, err := client.AppendHeader(nil, a)
		if err != nil {
			t.Fatalf("%s cannot be written: %v", a, err)
		}
		out = append(out, payload...)
		if a.IP.Is4In6() {
			if len(out) != len(b)-12 || !bytes.Equal(out[8:], b[20:]) {
				t.Fatalf("got %x of %x", out, b)
			}
			return
		}
		if !bytes.Equal(out[2:], b[2:]) {
			t.Fatalf("got %x of %x", out, b)
		}
	})
}
