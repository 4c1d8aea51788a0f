package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const insideTunnel = "GET /source HTTP/1.1\r\nHost: origin\r\n\r\n"

// each runs f on as many goroutines as there are clients.
func (l *loader) each(f func(client int)) {
	var wg sync.WaitGroup
	for i := range l.Clients {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// tunnels makes a tunnel for each request.
func (l *loader) tunnels() (r result, err error) {
	run := func(ops int64) []time.Duration {
		var begun atomic.Int64
		until := time.Now().Add(l.For)
		all := make([][]time.Duration, l.Clients)
		l.each(func(client int) {
			buf, in := make([]byte, 4096), bufio.NewReaderSize(nil, 4096)
			for begun.Add(1) <= ops && l.errs.Load() < mostErrors {
				from := time.Now()
				if from.After(until) {
					return
				}
				if err := l.once(buf, in); err != nil {
					l.fail(err)
					continue
				}
				all[client] = append(all[client], time.Since(from))
			}
		})
		return slices.Concat(all...)
	}
	run(l.WarmOps)
	from, err := l.begin()
	if err != nil {
		return r, err
	}
	took := run(l.Ops)
	if err := l.end(from, &r); err != nil {
		return r, err
	}
	r.Ops = int64(len(took))
	quantiles(&r, took)
	return r, nil
}

func (l *loader) once(buf []byte, in *bufio.Reader) error {
	c, w, err := l.tunnel(buf)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, insideTunnel); err != nil {
		return err
	}
	in.Reset(c)
	saw, _, err := readAnswer(in)
	if err != nil {
		return err
	}
	l.check(saw, w.right)
	return nil
}

// readAnswer reads an answer of the origin and gives the address in it, and
// whether the connection may be kept. net/http reads it, which costs the load
// generator and not the proxy.
func readAnswer(in *bufio.Reader) (saw string, keep bool, err error) {
	response, err := http.ReadResponse(in, nil)
	if err != nil {
		return "", false, err
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, 4096))
	if err := errors.Join(err, response.Body.Close()); err != nil {
		return "", false, err
	}
	if response.StatusCode != http.StatusOK {
		return "", false, errors.New(response.Status + ": " + string(body))
	}
	return strings.TrimSpace(string(body)), !response.Close, nil
}

// forward sends GETs one after the other on connections that are kept.
func (l *loader) forward() (r result, err error) {
	var counting, stopped atomic.Bool
	all := make([][]time.Duration, l.Clients)
	var wg sync.WaitGroup
	for i := range l.Clients {
		wg.Go(func() {
			for !stopped.Load() && l.errs.Load() < mostErrors {
				if err := l.keptClient(&counting, &stopped, &all[i]); err != nil {
					l.fail(err)
				}
			}
		})
	}
	time.Sleep(l.Warm)
	from, err := l.begin()
	counting.Store(true)
	time.Sleep(l.For)
	counting.Store(false)
	err = errors.Join(err, l.end(from, &r))
	stopped.Store(true)
	wg.Wait()
	took := slices.Concat(all...)
	r.Ops = int64(len(took))
	quantiles(&r, took)
	return r, err
}

// keptClient uses one connection for as long as the proxy keeps it.
func (l *loader) keptClient(counting, stopped *atomic.Bool, took *[]time.Duration) error {
	began := time.Now()
	w := l.way()
	addr, uri := l.Proxy, "http://"+w.target+"/source"
	switch l.Via {
	case viaDirect:
		addr, uri = w.target, "/source"
	case viaRelay:
		uri = "/source"
	}
	c, err := l.dial(&w, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	// Proxy-Connection as curl sends it: some proxies keep nothing without it.
	request := "GET " + uri + " HTTP/1.1\r\nHost: " + w.target + "\r\n" + w.header + "Proxy-Connection: Keep-Alive\r\n\r\n"
	in := bufio.NewReaderSize(c, 4096)
	for used := false; !stopped.Load(); used = true {
		_, err := io.WriteString(c, request)
		var saw string
		keep := false
		if err == nil {
			saw, keep, err = readAnswer(in)
		}
		if used && closed(err) {
			return nil // between two requests a proxy may end a connection
		}
		if err != nil {
			return err
		}
		l.check(saw, w.right)
		if counting.Load() {
			*took = append(*took, time.Since(began))
		}
		if !keep {
			return nil
		}
		began = time.Now()
	}
	return nil
}

func closed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// bulk moves bytes one way through all tunnels.
func (l *loader) bulk() (r result, err error) {
	word := "send"
	if l.Kind == "up" {
		word = "take"
	}
	conns := make([]*net.TCPConn, l.Clients)
	for i := range conns {
		if conns[i], err = l.stream(word, make([]byte, 4096)); err != nil {
			l.fail(err)
			return r, nil
		}
	}
	var total atomic.Int64
	var stopped atomic.Bool
	var wg sync.WaitGroup
	for _, c := range conns {
		move := c.Read
		if l.Kind == "up" {
			move = c.Write
		}
		wg.Go(func() {
			for buf := make([]byte, bulkBuffer); ; {
				n, err := move(buf)
				total.Add(int64(n))
				if err != nil {
					if !stopped.Load() {
						l.fail(err)
					}
					return
				}
			}
		})
	}
	time.Sleep(l.Warm)
	from, err := l.begin()
	before := total.Load()
	time.Sleep(l.For)
	r.Bytes = total.Load() - before
	err = errors.Join(err, l.end(from, &r))
	stopped.Store(true)
	for _, c := range conns {
		// A reset: what is under way is not waited for.
		err = errors.Join(err, c.SetLinger(0), c.Close())
	}
	wg.Wait()
	return r, err
}

// ping sends small messages to and fro.
func (l *loader) ping() (r result, err error) {
	const size = 128
	buf := make([]byte, 4096)
	c, err := l.stream("echo", buf)
	if err != nil {
		l.fail(err)
		return r, nil
	}
	defer c.Close()
	run := func(d time.Duration) (took []time.Duration, err error) {
		for from, until := time.Now(), time.Now().Add(d); from.Before(until); {
			if _, err := c.Write(buf[:size]); err != nil {
				return nil, err
			}
			if _, err := io.ReadFull(c, buf[:size]); err != nil {
				return nil, err
			}
			to := time.Now()
			took = append(took, to.Sub(from))
			from = to
		}
		return took, nil
	}
	if _, err := run(l.Warm); err != nil {
		return r, err
	}
	from, err := l.begin()
	if err != nil {
		return r, err
	}
	took, err := run(l.For)
	if err := errors.Join(err, l.end(from, &r)); err != nil {
		return r, err
	}
	r.Ops = int64(len(took))
	quantiles(&r, took)
	return r, nil
}

// hold opens tunnels up to each step, tells so, and waits for a line of in.
func (l *loader) hold(in *bufio.Reader, out *json.Encoder) error {
	var mu sync.Mutex
	var held []*net.TCPConn
	for _, step := range l.Steps {
		var begun atomic.Int64
		need, until := int64(step-len(held)), time.Now().Add(l.For)
		l.each(func(int) {
			buf := make([]byte, 4096)
			for begun.Add(1) <= need && time.Now().Before(until) && l.errs.Load() < mostErrors {
				c, err := l.stream("echo", buf)
				if err != nil {
					l.fail(err)
					continue
				}
				mu.Lock()
				held = append(held, c)
				mu.Unlock()
			}
		})
		r := result{Held: len(held)}
		l.sum(&r)
		if err := out.Encode(r); err != nil {
			return err
		}
		if _, err := in.ReadString('\n'); err != nil {
			return err
		}
	}
	return nil
}
