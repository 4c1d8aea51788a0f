package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// Seen is what an origin tells about a request: the answer's body, as JSON.
type Seen struct {
	Source string      `json:"source"` // the address that the request came from
	Port   uint16      `json:"port"`
	Method string      `json:"method"`
	Path   string      `json:"path"`
	Proto  string      `json:"proto"`
	Host   string      `json:"host"`
	Header http.Header `json:"header"`
	Body   int64       `json:"body"` // bytes of the request's body
	Conn   int         `json:"conn"` // number of the connection, from 1
}

// Origin is a web server that tells each client what it saw.
type Origin struct {
	srv *http.Server

	mu    sync.Mutex
	conns int
	seen  map[netip.Addr]int // requests by source
	wg    sync.WaitGroup
}

// StartOrigin serves on the listeners until Close.
func StartOrigin(listeners ...net.Listener) *Origin {
	o := &Origin{seen: map[netip.Addr]int{}}
	numbers := map[string]int{}
	o.srv = &http.Server{
		ConnState: func(c net.Conn, s http.ConnState) {
			o.mu.Lock()
			defer o.mu.Unlock()
			switch s {
			case http.StateNew:
				o.conns++
				numbers[c.RemoteAddr().String()] = o.conns
			case http.StateClosed, http.StateHijacked:
				delete(numbers, c.RemoteAddr().String())
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n, err := io.Copy(io.Discard, r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			from := netip.MustParseAddrPort(r.RemoteAddr)
			o.mu.Lock()
			o.seen[from.Addr().Unmap()]++
			conn := numbers[r.RemoteAddr]
			o.mu.Unlock()
			w.Header().Set("Content-Type", "application/json")
			if err := json.NewEncoder(w).Encode(Seen{
				Source: from.Addr().Unmap().String(), Port: from.Port(),
				Method: r.Method, Path: r.URL.RequestURI(), Proto: r.Proto, Host: r.Host,
				Header: r.Header, Body: n, Conn: conn,
			}); err != nil {
				return // the client went away
			}
		}),
	}
	for _, l := range listeners {
		o.wg.Go(func() {
			if err := o.srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				panic(fmt.Sprintf("origin: %v", err))
			}
		})
	}
	return o
}

// Sources gives the number of requests by the address they came from, since
// the start.
func (o *Origin) Sources() map[netip.Addr]int {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make(map[netip.Addr]int, len(o.seen))
	for a, n := range o.seen {
		all[a] = n
	}
	return all
}

// Close ends the server and its connections.
func (o *Origin) Close() error {
	err := o.srv.Close()
	o.wg.Wait()
	return err
}
