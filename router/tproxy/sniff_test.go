package tproxy

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
)

// helloOf is the ClientHello that crypto/tls sends for a name, in its record.
func helloOf(t testing.TB, name string) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	done := make(chan error, 1)
	go func() {
		c := tls.Client(near, &tls.Config{ServerName: name, InsecureSkipVerify: name == ""}) //nolint:gosec // only its first message is of interest
		done <- c.Handshake()
	}()
	var head [recordHeader]byte
	if _, err := io.ReadFull(far, head[:]); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	far.Close()
	if err := <-done; err == nil {
		t.Fatal("a handshake without a server")
	}
	return append(head[:], body...)
}

// records puts a handshake message into records of so many bytes each.
func records(message []byte, size int) []byte {
	var out []byte
	for part := range slices.Chunk(message, size) {
		out = append(out, recordHandshake, 3, 1, byte(len(part)>>8), byte(len(part)))
		out = append(out, part...)
	}
	return out
}

// sees is what sniff says of each beginning of b, which has to be unclear until
// it is what it stays.
func sees(t *testing.T, what string, b []byte, want string, s sight) {
	t.Helper()
	got, at := "", unclear
	for n := range len(b) + 1 {
		name, now := sniff(b[:n:n])
		if at != unclear && (now != at || name != got) {
			t.Fatalf("%s: after %d bytes %q (%d), after %d %q (%d)", what, n-1, got, at, n, name, now)
		}
		got, at = name, now
	}
	if got != want || at != s {
		t.Errorf("%s: %q (%d), want %q (%d)", what, got, at, want, s)
	}
}

func TestSniffTLS(t *testing.T) {
	hello := helloOf(t, "Www.Example.COM")
	sees(t, "a ClientHello", hello, "www.example.com", named)
	for _, size := range []int{1, 7, 100} {
		sees(t, "a ClientHello in small records", records(hello[recordHeader:], size), "www.example.com", named)
	}
	sees(t, "a ClientHello and more", append(slices.Clone(hello), "more"...), "www.example.com", named)
	sees(t, "a ClientHello without a name", helloOf(t, ""), "", nameless)
	sees(t, "a ClientHello that is not all there", hello[:len(hello)-1], "", unclear)
	change := func(at int, to byte) []byte {
		b := slices.Clone(hello)
		b[at] = to
		return b
	}
	sees(t, "another handshake message", change(5, 2), "", nameless)
	sees(t, "a record of SSL 2", change(1, 2), "", nameless)
	sees(t, "an empty record", change(4, 0)[:3:3], "", unclear)
	sees(t, "a record of no length", append([]byte{22, 3, 1, 0, 0}, 1), "", nameless)
	sees(t, "a record that is too long", []byte{22, 3, 1, 0xff, 0xff}, "", nameless)
	sees(t, "a message that is too long", []byte{22, 3, 1, 0, 8, 1, 0xff, 0xff, 0xff, 0, 0, 0, 0}, "", nameless)
	sees(t, "an alert in the middle", append(records(hello[recordHeader:recordHeader+20], 20), 21, 3, 1, 0, 2, 1, 1), "", nameless)
	for cut := recordHeader + handshakeHeader; cut < len(hello); cut++ {
		// A whole message whose inside ends too early.
		body := slices.Clone(hello[recordHeader:cut])
		binary.BigEndian.PutUint16(body[2:], uint16(len(body)-handshakeHeader))
		body[1] = 0
		if name, s := sniff(records(body, len(body))); s != nameless && (s != named || name != "www.example.com") {
			t.Fatalf("cut at %d: %q (%d)", cut, name, s)
		}
	}
}

func TestSniffHTTP(t *testing.T) {
	for _, tt := range []struct {
		name, text, want string
		s                sight
	}{
		{"a request", "GET / HTTP/1.1\r\nHost: Example.com\r\n\r\n", "example.com", named},
		{"with a port", "GET / HTTP/1.1\r\nUser-Agent: x\r\nhOST:\texample.com:8080 \r\n\r\nbody", "example.com", named},
		{"a dot at the end", "HEAD /a?b HTTP/1.0\r\nHost: example.com.\r\n\r\n", "example.com", named},
		{"not at the end of its head", "GET / HTTP/1.1\r\nHost: example.com\r\n", "", unclear},
		{"a method alone", "GET", "", unclear},
		{"nothing", "", "", unclear},
		{"no Host", "GET / HTTP/1.1\r\nX: y\r\n\r\n", "", nameless},
		{"two Hosts", "GET / HTTP/1.1\r\nHost: a.example\r\nHost: a.example\r\n\r\n", "", nameless},
		{"an address", "GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", "", nameless},
		{"an IPv6 address", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", "", nameless},
		{"a bad port", "GET / HTTP/1.1\r\nHost: example.com:x\r\n\r\n", "", nameless},
		{"an empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", "", nameless},
		{"a folded line", "GET / HTTP/1.1\r\nHost: example.com\r\n folded\r\n\r\n", "", nameless},
		{"a space before the colon", "GET / HTTP/1.1\r\nHost : example.com\r\n\r\n", "", nameless},
		{"bare line feeds", "GET / HTTP/1.1\nHost: example.com\n\n", "", nameless},
		{"a bare line feed", "GET / HTTP/1.1\r\nX: y\nHost: example.com\r\n\r\n", "", nameless},
		{"a line without a colon", "GET / HTTP/1.1\r\nHost\r\n\r\n", "", nameless},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", nameless},
		{"SSH", "SSH-2.0-OpenSSH_9.2\r\n", "", nameless},
		{"SMTP", "EHLO example.com\r\n", "", nameless},
		{"binary", "\x00\x01\x02", "", nameless},
		{"a long method", strings.Repeat("A", 40), "", nameless},
		{"a long head", "GET / HTTP/1.1\r\nX: " + strings.Repeat("y", mostSniffed), "", nameless},
	} {
		if len(tt.text) > 1000 {
			if name, s := sniff([]byte(tt.text)[:mostSniffed]); name != tt.want || s != tt.s {
				t.Errorf("%s: %q (%d)", tt.name, name, s)
			}
			continue
		}
		sees(t, tt.name, []byte(tt.text), tt.want, tt.s)
	}
}

func TestHostOf(t *testing.T) {
	for in, want := range map[string]string{
		"example.com": "example.com", "A_b-c.Example.": "a_b-c.example", "localhost": "localhost", "xn--bcher-kva.example": "xn--bcher-kva.example",
		"": "", ".": "", "a..b": "", ".a": "", "192.0.2.1": "", "a b": "", "a/b": "", "ex\x00.com": "", "bücher.example": "",
		strings.Repeat("a", 64) + ".b": "", strings.Repeat("a.", 127) + "a": "",
	} {
		if got, ok := hostOf([]byte(in)); got != want || ok != (want != "") {
			t.Errorf("%q is %q, %v", in, got, ok)
		}
	}
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seal makes an Initial packet of a client, as open takes it apart.
func seal(t testing.TB, version uint32, id []byte, number uint32, body []byte) []byte {
	t.Helper()
	d := dialectOf(version)
	k, err := keysFor(d, id)
	if err != nil {
		t.Fatal(err)
	}
	b := []byte{longHeader | fixedBit | d.initial | 3}
	b = binary.BigEndian.AppendUint32(b, version)
	b = append(b, byte(len(id)))
	b = append(b, id...)
	b = append(b, 0, 0) // no connection ID of its own, no token
	b = binary.BigEndian.AppendUint16(b, 0x4000|uint16(4+len(body)+tagSize))
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, number)
	nonce := slices.Clone(k.iv)
	for i := range 4 {
		nonce[len(nonce)-4+i] ^= b[at+i]
	}
	b = k.aead.Seal(b, nonce, body, b[:len(b):len(b)])
	var mask [aes.BlockSize]byte
	k.hp.Encrypt(mask[:], b[at+sampleAt:at+sampleAt+sampleSize])
	b[0] ^= mask[0] & 0x0f
	for i := range 4 {
		b[at+i] ^= mask[1+i]
	}
	return b
}

func cryptoFrame(at int, data []byte) []byte {
	b := []byte{frameCrypto}
	b = binary.BigEndian.AppendUint32(b, 0x80000000|uint32(at))
	b = binary.BigEndian.AppendUint16(b, 0x4000|uint16(len(data)))
	return append(b, data...)
}

// The ClientHello of RFC 9001 appendix A.2.
const helloOfRFC = "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e86804fe3a47f06a2b69484c00000413011302010000c0" +
	"00000010000e00000b6578616d706c652e636f6dff01000100000a00080006001d0017001800100007000504616c706e00050005010000000000330026" +
	"0024001d00209370b2c9caa47fbabaf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b0003020304000d0010000e040305030603020308040805" +
	"0806002d00020101001c00024001003900320408ffffffffffffffff05048000ffff07048000ffff0801100104800075300901100f088394c8f03e51570806048000ffff"

// TestQUICVectors: the keys of RFC 9001 appendix A.1 and RFC 9369 appendix A.1,
// and the beginning of the packet of RFC 9001 appendix A.2.
func TestQUICVectors(t *testing.T) {
	id := unhex(t, "8394c8f03e515708")
	for _, tt := range []struct {
		version uint32
		iv, hp  string
	}{
		{quicV1, "fa044b2f42a3fd3b46fb255c", "9f50449e04a0e810283a1e9933adedd2"},
		{quicV2, "91f73e2351d8fa91660e909f", "45b95e15235d6f45a6b19cbcb0294ba9"},
	} {
		k, err := keysFor(dialectOf(tt.version), id)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(k.iv); got != tt.iv {
			t.Errorf("version %#x: iv %s", tt.version, got)
		}
		hp, err := aes.NewCipher(unhex(t, tt.hp))
		if err != nil {
			t.Fatal(err)
		}
		var got, want [aes.BlockSize]byte
		k.hp.Encrypt(got[:], got[:])
		hp.Encrypt(want[:], want[:])
		if got != want {
			t.Errorf("version %#x: not the key of header protection", tt.version)
		}
	}
	body := make([]byte, 1162)
	copy(body, unhex(t, helloOfRFC))
	packet := seal(t, quicV1, id, 2, body)
	const begins = "c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11d242b123dc9b"
	if got := hex.EncodeToString(packet[:len(begins)/2]); got != begins {
		t.Errorf("the packet begins with\n%s, want\n%s", got, begins)
	}
	var g greeting
	if name, s := g.add(packet); name != "example.com" || s != named {
		t.Errorf("%q (%d)", name, s)
	}
}

// quicHello is the first message of a handshake that crypto/tls makes for QUIC.
func quicHello(t testing.TB, name string) []byte {
	t.Helper()
	c := tls.QUICClient(&tls.QUICConfig{TLSConfig: &tls.Config{ServerName: name, MinVersion: tls.VersionTLS13, NextProtos: []string{"h3"}}})
	c.SetTransportParameters([]byte("parameters"))
	if err := c.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var out []byte
	for {
		switch e := c.NextEvent(); e.Kind {
		case tls.QUICNoEvent:
			return out
		case tls.QUICWriteData:
			out = append(out, e.Data...)
		default:
		}
	}
}

func TestSniffQUIC(t *testing.T) {
	id := []byte("a connection id")
	hello := quicHello(t, "Quic.Example")
	half := len(hello) / 2
	for _, v := range []uint32{quicV1, quicV2} {
		packet := func(number uint32, frames ...[]byte) []byte {
			return seal(t, v, id, number, append(slices.Concat(frames...), make([]byte, 100)...))
		}
		first, second := cryptoFrame(0, hello[:half]), cryptoFrame(half, hello[half:])
		for _, tt := range []struct {
			name      string
			datagrams [][]byte
		}{
			{"one packet", [][]byte{packet(0, cryptoFrame(0, hello))}},
			{"two frames the wrong way round", [][]byte{packet(0, second, first)}},
			{"with what else there may be", [][]byte{packet(0, []byte{framePing, frameACK, 1, 0, 1, 0, 0, 0}, first, []byte{frameACKECN, 0, 0, 0, 0, 1, 2, 3}, second)}},
			{"two datagrams", [][]byte{packet(0, first), packet(1, second)}},
			{"two datagrams the wrong way round", [][]byte{packet(1, second), packet(0, first)}},
			{"the same again between", [][]byte{packet(0, first), packet(0, first), packet(1, second)}},
			{"packets in one datagram", [][]byte{append(packet(0, first), packet(1, second)...)}},
			{"overlapping parts", [][]byte{packet(0, cryptoFrame(10, hello[10:50]), cryptoFrame(70, hello[70:80])), packet(1, cryptoFrame(40, hello[40:90]), cryptoFrame(0, hello[:60])), packet(2, cryptoFrame(20, hello[20:]))}},
		} {
			var g greeting
			for i, d := range tt.datagrams {
				name, s := g.add(d)
				last := i == len(tt.datagrams)-1
				if !last && s != unclear || last && (s != named || name != "quic.example") {
					t.Errorf("version %#x, %s: datagram %d: %q (%d)", v, tt.name, i, name, s)
				}
			}
		}
		spoilt := packet(0, cryptoFrame(0, hello))
		spoilt[60] ^= 1
		for name, d := range map[string][]byte{
			"nothing":            {},
			"DNS":                []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01"),
			"a short header":     append([]byte{0x40}, make([]byte, 40)...),
			"spoilt":             spoilt,
			"cut":                packet(0, cryptoFrame(0, hello))[:80],
			"a close":            packet(0, []byte{0x1c, 0, 0, 0}),
			"a frame cut short":  packet(0, []byte{frameCrypto, 0x40})[:0],
			"too far":            packet(0, cryptoFrame(longestCrypto, []byte("x"))),
			"another version":    append(binary.BigEndian.AppendUint32([]byte{0xc0}, 0xff00001d), make([]byte, 100)...),
			"no server's name":   packet(0, cryptoFrame(0, []byte{2, 0, 0, 0})),
			"an over-long ID":    slices.Concat([]byte{0xc0, 0, 0, 0, 1, 21}, make([]byte, 100)),
			"a length too large": slices.Concat([]byte{0xc0, 0, 0, 0, 1, 0, 0, 0, 0x7f, 0xff}, make([]byte, 100)),
		} {
			var g greeting
			if got, s := g.add(d); s != nameless || got != "" {
				t.Errorf("version %#x, %s: %q (%d)", v, name, got, s)
			}
		}
	}
}

func FuzzSniff(f *testing.F) {
	f.Add(helloOf(f, "www.example.com"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: example.com:80\r\nX: y\r\n\r\n"))
	f.Add(records([]byte{1, 0, 0, 3, 3, 3, 0}, 2))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 {
			return
		}
		before := slices.Clone(b)
		got, at := "", unclear
		for n := 0; n <= len(b); n += 1 + len(b)/64 {
			name, s := sniff(b[:n])
			if at != unclear && (s != at || name != got) {
				t.Fatalf("%q (%d), and later %q (%d)", got, at, name, s)
			}
			if (s == named) != (name != "") {
				t.Fatalf("%q (%d)", name, s)
			}
			got, at = name, s
		}
		if !bytes.Equal(b, before) {
			t.Fatal("what was looked at is changed")
		}
	})
}

func FuzzQUIC(f *testing.F) {
	hello := quicHello(f, "quic.example")
	f.Add(seal(f, quicV1, []byte("12345678"), 0, append(cryptoFrame(0, hello), make([]byte, 50)...)), []byte{})
	f.Add(seal(f, quicV2, []byte("12345678"), 0, cryptoFrame(0, hello[:99])), seal(f, quicV2, []byte("12345678"), 1, cryptoFrame(99, hello[99:])))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var g greeting
		before := bytes.Clone(a)
		name, s := g.add(a)
		if !bytes.Equal(a, before) {
			t.Fatal("the datagram is changed")
		}
		if s == unclear {
			name, s = g.add(b)
		}
		if (s == named) != (name != "") || len(g.hello) > longestCrypto {
			t.Fatalf("%q (%d), %d bytes of hello", name, s, len(g.hello))
		}
	})
}

// FuzzFrames looks behind the encryption.
func FuzzFrames(f *testing.F) {
	hello := quicHello(f, "quic.example")
	f.Add(cryptoFrame(0, hello))
	f.Add(slices.Concat(cryptoFrame(10, hello[10:20]), []byte{framePing, frameACK, 1, 0, 1, 0, 0, 0}, cryptoFrame(0, hello[:15])))
	f.Fuzz(func(t *testing.T, b []byte) {
		var g greeting
		g.frames(b)
		for i, s := range g.have {
			if s.from >= s.to || s.to > len(g.hello) || i > 0 && s.from <= g.have[i-1].to {
				t.Fatalf("%v of %d", g.have, len(g.hello))
			}
		}
	})
}

// TestHelloIsWhole holds that the helper above reads one record and no more.
func TestHelloIsWhole(t *testing.T) {
	b := helloOf(t, "a.example")
	c := tls.Server(&replay{Reader: bytes.NewReader(b)}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if h.ServerName != "a.example" {
			t.Errorf("the name is %q", h.ServerName)
		}
		return nil, errors.New("seen")
	}})
	if err := c.Handshake(); err == nil || !strings.Contains(err.Error(), "seen") {
		t.Error(err)
	}
}

// replay is a connection on which only reading counts.
type replay struct {
	net.Conn
	io.Reader
}

func (r *replay) Read(b []byte) (int, error)  { return r.Reader.Read(b) }
func (r *replay) Write(b []byte) (int, error) { return len(b), nil }
func (r *replay) Close() error                { return nil }
