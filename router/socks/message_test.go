package socks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"

	"wayout/router/socks/client"
)

// The references read a byte at a time and know nothing of how much there is.
// io.EOF is that there is not enough.

type slow struct {
	b []byte
	n int
}

func (s *slow) byte() byte {
	if s.n == len(s.b) {
		panic(io.EOF)
	}
	s.n++
	return s.b[s.n-1]
}

func (s *slow) bytes(n int) []byte {
	out := []byte{}
	for range n {
		out = append(out, s.byte())
	}
	return out
}

func (s *slow) port() uint16 { return binary.BigEndian.Uint16(s.bytes(2)) }

func (s *slow) untilNUL(most int) []byte {
	out := []byte{}
	for {
		c := s.byte()
		if c == 0 {
			return out
		}
		if out = append(out, c); len(out) > most {
			panic(errRequest)
		}
	}
}

// try runs a reference and returns what it panics with.
func try(b []byte, read func(s *slow)) (n int, err error) {
	s := &slow{b: b}
	defer func() {
		if e, ok := recover().(error); ok {
			n, err = 0, e
		}
	}()
	read(s)
	return s.n, nil
}

// same compares how far a parser and its reference got.
func same(t *testing.T, n int, err error, wantN int, wantErr error) (whole bool) {
	t.Helper()
	if errors.Is(wantErr, io.EOF) {
		wantErr = nil
	}
	if n != wantN || (err == nil) != (wantErr == nil) || wantErr != nil && !errors.Is(err, wantErr) {
		t.Fatalf("got %d, %v; want %d, %v", n, err, wantN, wantErr)
	}
	return n > 0
}

func FuzzGreeting(f *testing.F) {
	for _, s := range []string{"\x05\x01\x00", "\x05\x00", "\x05\x02\x00\x02rest", "\x05", "", "\x04\x01"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var want []byte
		wantN, wantErr := try(b, func(s *slow) {
			if s.byte() != 5 {
				panic(errVersion)
			}
			want = s.bytes(int(s.byte()))
		})
		got, n, err := parseGreeting(b)
		if same(t, n, err, wantN, wantErr) && !bytes.Equal(got, want) {
			t.Fatalf("got %x, want %x", got, want)
		}
	})
}

func FuzzExtension(f *testing.F) {
	for _, s := range []string{
		"\x01\x00\x01a\x01\x00", "\x01\x00\x00\x01\x00", "\x01\x10\x00", "\x01\x10\x01", "\x01\x00\x02ab\x02\x00\x02rest", "\x02", "",
		"\x01\x10\x00" + strings.Repeat("x", 4096) + "\x01\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var payload, methods []byte
		wantN, wantErr := try(b, func(s *slow) {
			if s.byte() != 1 {
				panic(errExtension)
			}
			size := s.port()
			if size < 1 || size > 4096 {
				panic(errExtension)
			}
			payload = s.bytes(int(size))
			methods = s.bytes(int(s.byte()))
		})
		p, m, n, err := parseExtension(b)
		if same(t, n, err, wantN, wantErr) && (!bytes.Equal(p, payload) || !bytes.Equal(m, methods)) {
			t.Fatalf("got %x, %x; want %x, %x", p, m, payload, methods)
		}
		if n == 0 && err == nil && len(b) >= maxMessage {
			t.Fatalf("%d bytes, and more is wanted", len(b))
		}
	})
}

func FuzzPassword(f *testing.F) {
	for _, s := range []string{"\x01\x02al\x02pw", "\x01\x00\x00", "\x01\x02al", "\x01\x02al\x02pwrest", "\x05", ""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var name, password []byte
		wantN, wantErr := try(b, func(s *slow) {
			if s.byte() != 1 {
				panic(errPassword)
			}
			name = s.bytes(int(s.byte()))
			password = s.bytes(int(s.byte()))
		})
		u, p, n, err := parsePassword(b)
		if same(t, n, err, wantN, wantErr) && (!bytes.Equal(u, name) || !bytes.Equal(p, password)) {
			t.Fatalf("got %x, %x; want %x, %x", u, p, name, password)
		}
	})
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50rest", "\x05\x01\x00\x03\x03a.b\x00\x50", "\x05\x03\x00\x04" + strings.Repeat("\x00", 18),
		"\x05\x01\x00\x02", "\x05\x01\x00\x03\x00\x00\x50", "\x05\x01\x00", "\x04", "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var command byte
		var to client.Addr
		wantN, wantErr := try(b, func(s *slow) {
			if s.byte() != 5 {
				panic(errRequest)
			}
			command = s.byte()
			s.byte()
			switch s.byte() {
			case 1:
				to.IP = netip.AddrFrom4([4]byte(s.bytes(4)))
			case 4:
				to.IP = netip.AddrFrom16([16]byte(s.bytes(16)))
			case 3:
				n := s.byte()
				if n == 0 {
					panic(client.ErrAddr)
				}
				to.Host = string(s.bytes(int(n)))
			default:
				panic(client.ErrAddrType)
			}
			to.Port = s.port()
		})
		c, a, n, err := parseRequest(b)
		if same(t, n, err, wantN, wantErr) && (c != command || a != to) {
			t.Fatalf("got %d, %+v; want %d, %+v", c, a, command, to)
		}
	})
}

func FuzzRequest4(f *testing.F) {
	for _, s := range []string{
		"\x04\x01\x00\x50\x7f\x00\x00\x01me\x00rest", "\x04\x01\x00\x50\x00\x00\x00\x01\x00a.b\x00rest", "\x04\x01\x00\x50\x00\x00\x00\x00\x00",
		"\x04\x01\x00\x50\x00\x00\x00\x01\x00\x00", "\x04\x02\x00\x50\x7f\x00\x00\x01\x00", "\x04\x01", "\x05", "",
		"\x04\x01\x00\x50\x7f\x00\x00\x01" + strings.Repeat("x", 256),
		"\x04\x01\x00\x50\x00\x00\x00\x01\x00" + strings.Repeat("x", 255) + "\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var command byte
		var to client.Addr
		wantN, wantErr := try(b, func(s *slow) {
			if s.byte() != 4 {
				panic(errRequest)
			}
			command = s.byte()
			to.Port = s.port()
			ip := s.bytes(4)
			s.untilNUL(255)
			if ip[0]|ip[1]|ip[2] != 0 || ip[3] == 0 {
				to.IP = netip.AddrFrom4([4]byte(ip))
				return
			}
			if to.Host = string(s.untilNUL(255)); to.Host == "" {
				panic(errRequest)
			}
		})
		c, a, n, err := parseRequest4(b)
		if same(t, n, err, wantN, wantErr) && (c != command || a != to) {
			t.Fatalf("got %d, %+v; want %d, %+v", c, a, command, to)
		}
		if n == 0 && err == nil && len(b) >= maxMessage {
			t.Fatalf("%d bytes, and more is wanted", len(b))
		}
	})
}

// FuzzDatagram: whatever a client's datagram holds, the target that comes of it
// is one, and says the same when it is written again.
func FuzzDatagram(f *testing.F) {
	for _, s := range []string{
		"\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x50hello", "\x00\x00\x00\x03\x03a.b\x00\x50", "\x00\x00\x00\x03\x03::1\x00\x50",
		"\x00\x00\x00\x03\x071.2.3.4\x00\x50", "\x00\x00\x00\x03\x05127.1\x00\x50", "\x00\x00\x01\x01",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, payload, err := client.ParseHeader(b)
		if err != nil {
			return
		}
		to, err := target(a)
		if err != nil {
			return
		}
		if (to.Host == "") == !to.Addr.IsValid() || to.Port == 0 || to.Addr.Zone() != "" || to.Addr.Is4In6() {
			t.Fatalf("target %+v", to)
		}
		out, err := client.AppendHeader(nil, client.Addr{Host: to.Host, IP: to.Addr, Port: to.Port})
		if err != nil {
			t.Fatal(err)
		}
		again, p, err := client.ParseHeader(append(out, payload...))
		if err != nil || !bytes.Equal(p, payload) {
			t.Fatalf("%q, %v", p, err)
		}
		if back, err := target(again); err != nil || back != to {
			t.Fatalf("got %+v, %v; want %+v", back, err, to)
		}
	})
}

func TestReplyLength(t *testing.T) {
	six := netip.MustParseAddrPort("[fe80::1%lo]:65535")
	if b := appendReply(nil, replyOK, six); len(b) != maxReply {
		t.Errorf("%x", b)
	}
	if b := appendReply4(nil, reply4OK, six); string(b) != "\x00\x5a\xff\xff\x00\x00\x00\x00" {
		t.Errorf("%x", b)
	}
}
