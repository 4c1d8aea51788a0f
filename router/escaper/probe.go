package escaper

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"wayout/router/escaper/hop"
	"wayout/selection"
)

// Probe says how paths are tried, by the paths themselves. A path that nothing
// is known of is in state probing until its first probe has ended; after that
// it takes Fall failures in a row to turn it down, and Rise successes to give
// it back, after a hold of an Interval, or of Passive's, which doubles when it
// falls again soon.
type Probe struct {
	TCP      string // host:port that has to accept; or
	HTTP     string // URL, http or https, that has to be answered with 200 to 399
	Interval time.Duration
	Timeout  time.Duration
	Fall     int
	Rise     int
	// EIP: with HTTP, the first address in the body has to be the path's EIP of
	// that family, where it has one.
	EIP bool
	// Roots have signed the certificates of https; nil: the host's.
	Roots *x509.CertPool
}

// maxProbeBody is how much of an answer is searched for an address.
const maxProbeBody = 64 << 10

// errInconclusive: a probe that says nothing of its path.
var errInconclusive = errors.New("the probe says nothing of the path")

// what is the probe in a reason.
func (o *Probe) what() string {
	if o.HTTP != "" {
		return o.HTTP
	}
	return "tcp " + o.TCP
}

// target is where probes go.
func (o *Probe) target() (Target, *url.URL, error) {
	hostport := o.TCP
	var u *url.URL
	if o.HTTP != "" {
		var err error
		if u, err = url.Parse(o.HTTP); err != nil {
			return Target{}, nil, fmt.Errorf("probe: %w", err)
		}
		port := u.Port()
		switch {
		case port != "":
		case u.Scheme == "https":
			port = "443"
		default:
			port = "80"
		}
		hostport = net.JoinHostPort(u.Hostname(), port)
	}
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return Target{}, nil, fmt.Errorf("probe: %w", err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return Target{}, nil, fmt.Errorf("probe: %s: %w", hostport, err)
	}
	to := Target{Port: uint16(n)}
	if a, err := netip.ParseAddr(host); err == nil {
		to.Addr = a.Unmap()
	} else {
		to.Host = host
	}
	return to, u, nil
}

// judged reports whether probes judge a family: a literal target has only one.
func (d *Direct) judged(f selection.Family) bool {
	if d.probe == nil {
		return false
	}
	to, _, err := d.probe.target()
	return err == nil && (d.peers || !to.Addr.IsValid() || selection.FamilyOf(to.Addr) == f)
}

// probeAll probes the families of a path, side by side, and takes note of what
// came of it.
func (d *Direct) probeAll(ctx context.Context, t *Table, p *Path) {
	ctx, cancel := context.WithTimeout(ctx, d.probe.Timeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, f := range [...]selection.Family{selection.V4, selection.V6} {
		if p.state.Load().present()&p.alike(f) == 0 || !d.judged(f) || p.Peer != nil && f == selection.V6 {
			continue // a path to a peer is probed once
		}
		wg.Go(func() {
			err := d.probeOnce(ctx, t, p, f)
			if !errors.Is(ctx.Err(), context.Canceled) { // it was not the path that ended it
				d.probed(p, f, err)
			}
		})
	}
	wg.Wait()
}

// probed takes note of how a probe of a family ended.
func (d *Direct) probed(p *Path, f selection.Family, err error) {
	c := p.course(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	now, v := d.now(), p.verdict(f)
	switch {
	case errors.Is(err, errInconclusive):
		if v == unproved && errors.Is(err, selection.ErrFamily) {
			d.pronounce(p, f, sound, "") // the target is not of this family
		} else if v == unproved {
			d.pronounce(p, f, v, f.String()+" has not been probed yet: "+p.plain(err))
		}
	case err != nil:
		c.good = 0
		c.bad++
		why := fmt.Sprintf("probe %s: %s", d.probe.what(), p.plain(err))
		switch {
		case v == unproved, v == sound && (c.bad >= d.probe.Fall || broken(err)):
			d.fall(p, f, c, now, why)
		case v == failed:
			d.pronounce(p, f, v, why)
		}
	default:
		c.bad = 0
		c.good++
		if v == unproved || v != sound && c.good >= d.probe.Rise && !now.Before(c.until) {
			c.giveBack(now)
			d.pronounce(p, f, sound, "")
		}
	}
}

// probeOnce sends a probe by one family of a path, whatever the path's state.
// The filter is not asked: it is the operator's target.
func (d *Direct) probeOnce(ctx context.Context, t *Table, p *Path, f selection.Family) error {
	to, u, err := d.probe.target()
	if err != nil {
		return err
	}
	c := choice{t: t, d: d, p: p, selected: true, probe: true, want: f}
	if p.Peer != nil {
		c.want = selection.V4 | selection.V6
	}
	conn, err := c.open(ctx, &Request{Escaper: d.name, Target: to})
	var told *hop.Refused
	switch {
	case err == nil:
	case errors.Is(err, selection.ErrFamily), errors.Is(err, selection.ErrDown), errors.Is(err, ErrResources), errors.Is(err, selection.ErrPorts),
		(errors.Is(err, ErrDNS) || errors.Is(err, ErrDNSTimeout)) && d.bound == nil && !errors.As(err, &told):
		return errors.Join(errInconclusive, err)
	default:
		return err
	}
	defer conn.Close()
	if u == nil {
		return nil
	}
	err = d.probeHTTP(ctx, conn, u, p)
	if isTimeout(err) {
		return fmt.Errorf("no answer within %s", d.probe.Timeout)
	}
	return err
}

// probeHTTP asks for the URL on a connection.
func (d *Direct) probeHTTP(ctx context.Context, conn *Conn, u *url.URL, p *Path) error {
	// Whether its time is over or it is given up: what it waits for ends.
	defer context.AfterFunc(ctx, func() { _ = conn.TCP.SetDeadline(time.Unix(1, 0)) })()
	if len(conn.Early) > 0 {
		return errors.New("the target speaks before it is asked")
	}
	var stream net.Conn = conn.TCP
	if u.Scheme == "https" {
		secure := tls.Client(stream, &tls.Config{ServerName: u.Hostname(), RootCAs: d.probe.Roots, MinVersion: tls.VersionTLS12})
		if err := secure.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
		stream = secure
	}
	req := &http.Request{
		Method: http.MethodGet, URL: u, Host: u.Host, Close: true,
		Header: http.Header{"User-Agent": {"wayout"}, "Accept": {"*/*"}},
	}
	if err := req.Write(stream); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(stream), req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	if !d.probe.EIP || len(p.EIP) == 0 {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxProbeBody))
	if err != nil {
		return err
	}
	return compareEIP(p.EIP, body)
}

// compareEIP says what is wrong with the first address in a body.
func compareEIP(eip []netip.Addr, body []byte) error {
	got := firstAddr(body)
	if !got.IsValid() {
		return errors.New("no address in the answer to compare with the eip")
	}
	for _, want := range eip {
		if want.Is4() == got.Is4() && want != got {
			return fmt.Errorf("the public address is %s, and the eip of the node %s", got, want)
		}
	}
	return nil
}

// firstAddr finds the first IP address in a text, unmapped; the zero Addr when
// there is none.
func firstAddr(text []byte) netip.Addr {
	for word := range strings.FieldsFuncSeq(string(text), func(r rune) bool {
		return !strings.ContainsRune("0123456789abcdefABCDEF:.", r)
	}) {
		for _, w := range [...]string{word, strings.Trim(word, ".:")} {
			if a, err := netip.ParseAddr(w); err == nil && !a.IsUnspecified() {
				return a.Unmap()
			}
		}
	}
	return netip.Addr{}
}
