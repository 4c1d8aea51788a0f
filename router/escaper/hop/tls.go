package hop

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"time"
)

// errTruncated: the TCP connection ended without TLS saying that it would
// (RFC 8446, section 6.1). Package tls itself takes that for an end.
var errTruncated = errors.New("TLS: the connection was cut off")

// secured is a TLS connection to a peer.
type secured struct {
	*tls.Conn
	wire *wire
}

// secure makes the handshake.
func (p *Peer) secure(conn *net.TCPConn) (*secured, error) {
	cfg := &tls.Config{}
	if p.TLS != nil {
		cfg = p.TLS.Clone()
	}
	cfg.MinVersion = max(cfg.MinVersion, tls.VersionTLS12)
	cfg.NextProtos = []string{"http/1.1"}
	if cfg.ServerName == "" {
		host, err := p.host()
		if err != nil {
			return nil, err
		}
		cfg.ServerName = host
	}
	w := &wire{TCPConn: conn}
	s := &secured{Conn: tls.Client(w, cfg), wire: w}
	err := s.Handshake()
	if err != nil && !isEnd(err) && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
		err = fail(ErrTLS, err, "%s: %s", ErrTLS, err)
	}
	return s, err
}

// wire is a TCP connection as package tls is to see it.
type wire struct {
	*net.TCPConn

	// Of a bridge: how long a write may do nothing before stalled is asked, with
	// whether it did something, if it is to go on. nil: as the deadline says.
	glance  time.Duration
	stalled func(progress bool) error
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.TCPConn.Read(b)
	if errors.Is(err, io.EOF) {
		err = errTruncated // after close_notify nobody reads
	}
	return n, err
}

func (w *wire) Write(b []byte) (int, error) {
	if w.stalled == nil {
		return w.TCPConn.Write(b)
	}
	done := 0
	for {
		if err := w.TCPConn.SetWriteDeadline(time.Now().Add(w.glance)); err != nil {
			return done, err
		}
		n, err := w.TCPConn.Write(b[done:])
		done += n
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return done, err
		}
		if err := w.stalled(n > 0); err != nil {
			return done, err
		}
	}
}

// SetWriteDeadline does nothing: package tls would give close_notify five
// seconds, and a peer that is slow to take what comes before may need longer.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }
