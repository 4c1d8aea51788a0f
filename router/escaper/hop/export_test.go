package hop

import (
	"bytes"
	"net"
	"time"
)

// Tune shortens the times of p's bridges, and sets the send buffer that is asked
// for their streams; 0 leaves a figure as it is.
func (p *Peer) Tune(glance, linger time.Duration, send int) {
	p.tune = tuning{glance: glance, linger: linger, send: send}
}

// ReadAnswer reads an answer from b.
func ReadAnswer(b []byte) (status int, problem string, early []byte, err error) {
	a, early, err := readAnswer(bytes.NewReader(b))
	return a.status, a.problem, early, err
}

// Pair is a pair of sockets as a bridge has it.
type Pair struct {
	Stream *net.UnixConn
	end    *end
}

// NewPair makes one, with a send buffer for the stream as small as can be.
func NewPair(send int) (*Pair, error) {
	e, s, err := pair(send)
	return &Pair{s, e}, err
}

// Take waits for bytes and takes them.
func (p *Pair) Take(b []byte) ([]byte, error) {
	if err := p.end.wait(); err != nil {
		return nil, err
	}
	return p.end.take(b)
}

// Sever, Close and Bare are the end's.
func (p *Pair) Sever()     { p.end.sever() }
func (p *Pair) Close()     { p.end.close() }
func (p *Pair) Bare() bool { return p.end.bare }
