package hop_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"wayout/router/escaper/hop"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// unleaked checks at the test's end that it left no goroutine and no descriptor.
func unleaked(t *testing.T) {
	t.Helper()
	a, b := connect(t) // the poller's own descriptors come with the first socket
	a.Close()
	b.Close()
	before := files(t)
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore)
		var after []string
		if !within(func() bool {
			after = files(t)
			return len(after) <= len(before)
		}) {
			t.Errorf("descriptors: %d before, %d after: %v", len(before), len(after), after)
		}
	})
}

func files(t testing.TB) []string {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, n := range names {
		to, err := os.Readlink("/proc/self/fd/" + n.Name())
		if err == nil && !strings.HasPrefix(to, "/proc/") {
			out = append(out, n.Name()+" "+to)
		}
	}
	return out
}

// within polls for what has no event to await.
func within(ok func() bool) bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return true
		}
	}
	return ok()
}

// connect returns the ends of a TCP connection over loopback.
func connect(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	far, err = l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	for _, c := range []*net.TCPConn{near, far} {
		if err := c.SetDeadline(time.Now().Add(3 * patience)); err != nil {
			t.Fatal(err)
		}
	}
	return near, far
}

// step is a message that the fake peer expects, and its answer.
type step struct{ want, answer string }

// play is a fake peer: it plays the steps on c, the answers in pieces of size
// bytes, and returns an error when it hears something else.
func play(c net.Conn, size int, steps ...step) error {
	for _, s := range steps {
		b := make([]byte, len(s.want))
		if n, err := io.ReadFull(c, b); err != nil {
			return errors.New("heard " + string(b[:n]) + ", then " + err.Error())
		}
		if string(b) != s.want {
			return errors.New("heard " + string(b) + "\nnot   " + s.want)
		}
		for a := s.answer; a != ""; {
			n := min(size, len(a))
			if _, err := io.WriteString(c, a[:n]); err != nil {
				return nil //nolint:nilerr // whoever has heard enough may go
			}
			a = a[n:]
		}
	}
	return nil
}

// inBackground runs f, and the test's end waits for it and takes its error for
// the test's.
func inBackground(t testing.TB, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func target(s string, port uint16) hop.Target { return hop.Target{Host: s, Port: port} }

// quickly is a context for what is not to wait.
func quickly(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// expectOpen checks that two ends are those of one connection, with no deadline
// left on the near one, and nothing in between.
func expectOpen(t testing.TB, near, far net.Conn) {
	t.Helper()
	for _, c := range [][2]net.Conn{{near, far}, {far, near}} {
		if _, err := io.WriteString(c[0], "hello"); err != nil {
			t.Fatal(err)
		}
		expect(t, c[1], "hello")
	}
}

func expect(t testing.TB, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != s {
		t.Fatalf("got %q, %v; want %q", b[:n], err, s)
	}
}

func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("got %d bytes, %v; want EOF", n, err)
	}
}

// expectReset reads c dry and checks that a reset ends it.
func expectReset(t testing.TB, c io.Reader) {
	t.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %d bytes and %v; want a reset", n, err)
	}
}

// peerName is what the certificate of authority is for.
const peerName = "peer.example"

// authority makes the TLS configurations of a peer and of those that trust it.
func authority(t testing.TB) (peer, us *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: peerName}, DNSNames: []string{peerName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	peer = &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		NextProtos:   []string{"http/1.1"},
	}
	return peer, &tls.Config{RootCAs: roots}
}
