package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// ErrInUse: another daemon answers on the control socket.
var ErrInUse = errors.New("another wayout answers there")

// watchEvery is how often a watcher gets the paths when nothing happens to
// them: their counters move all the same.
const watchEvery = time.Second

// Backend is what the control socket can ask of the daemon.
type Backend struct {
	Paths  func() Paths
	Drain  func(path string, on bool) error // ErrUnknownPath
	Prove  func(path string, target netip.AddrPort) (Proof, error)
	Reload func() error
	// Publish replaces the nodes of an escaper by those of a JSON array, and
	// returns how many there are now.
	Publish func(escaper string, nodes []byte) (int, error) // ErrUnknownPath
	Pins    PinBackend
	Version string
}

// Socket is the control socket: HTTP with JSON bodies over a unix socket that
// only root can open.
type Socket struct {
	l    net.Listener
	srv  *http.Server
	stop chan struct{}

	mu       sync.Mutex
	watchers map[chan struct{}]struct{}
}

// Listen binds the control socket. A file that an ended daemon left there is
// removed, but only after a connect to it has failed; a daemon that answers
// is ErrInUse.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("directory of the control socket: %w", err)
	}
	if _, err := os.Lstat(path); err == nil {
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			return nil, errors.Join(fmt.Errorf("control socket %s: %w (give each daemon its own control.socket)", path, ErrInUse), conn.Close())
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("stale control socket: %w", err)
		}
	}
	// The name appears with its final rights: bound under a private one
	// first, so that at no moment can anyone else connect.
	private := fmt.Sprintf("%s.%d", path, os.Getpid())
	l, err := net.Listen("unix", private)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(private, 0o600), os.Rename(private, path)); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close(), os.Remove(private))
	}
	return &namedListener{Listener: l, path: path}, nil
}

// namedListener removes the socket's file when it is closed.
type namedListener struct {
	net.Listener
	path string
	once sync.Once
	err  error
}

func (l *namedListener) Close() error {
	l.once.Do(func() { l.err = errors.Join(os.Remove(l.path), l.Listener.Close()) })
	return l.err
}

// NewSocket makes the server of the control socket.
func NewSocket(l net.Listener, b Backend) *Socket {
	s := &Socket{l: l, stop: make(chan struct{}), watchers: map[chan struct{}]struct{}{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /paths", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "" {
			reply(w, http.StatusOK, b.Paths())
			return
		}
		s.watch(w, r, b)
	})
	drain := func(on bool) http.HandlerFunc {
		return command(func(ask Ask) (any, error) { return ask, b.Drain(ask.Path, on) })
	}
	mux.HandleFunc("POST /drain", drain(true))
	mux.HandleFunc("POST /undrain", drain(false))
	mux.HandleFunc("POST /prove-guard", command(func(ask Ask) (any, error) { return b.Prove(ask.Path, ask.Target) }))
	mux.HandleFunc("POST /reload", command(func(ask Ask) (any, error) { return ask, b.Reload() }))
	mux.HandleFunc("POST /publish", func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxPublication))
		if err != nil {
			reply(w, http.StatusBadRequest, failure{err.Error()})
			return
		}
		name := r.URL.Query().Get("escaper")
		n, err := b.Publish(name, text)
		answer(w, Published{Escaper: name, Nodes: n}, err)
	})
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, map[string]string{"version": b.Version})
	})
	b.Pins.register(mux)
	s.srv = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	return s
}

// Ask is the body of every command.
type Ask struct {
	Path   string         `json:"path"`
	Target netip.AddrPort `json:"target,omitzero"`
}

// command answers a command by what f makes of it.
func command[A any](f func(A) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var ask A
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&ask); err != nil {
			reply(w, http.StatusBadRequest, failure{err.Error()})
			return
		}
		done, err := f(ask)
		answer(w, done, err)
	}
}

func answer(w http.ResponseWriter, done any, err error) {
	switch {
	case errors.Is(err, ErrUnknownPath), errors.Is(err, ErrUnknownCgroup):
		reply(w, http.StatusNotFound, failure{err.Error()})
	case err != nil:
		reply(w, http.StatusInternalServerError, failure{err.Error()})
	default:
		reply(w, http.StatusOK, done)
	}
}

// MaxPublication bounds the text of a publication, in bytes.
const MaxPublication = 64 << 20

// Published is the answer to a publication.
type Published struct {
	Escaper string `json:"escaper"`
	Nodes   int    `json:"nodes"`
}

// failure is the body of every answer that is not a success.
type failure struct {
	Error string `json:"error"`
}

func reply(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that went away is no fault of the daemon's.
	_ = json.NewEncoder(w).Encode(body)
}

// Serve answers until Close. It returns nil then.
func (s *Socket) Serve() error {
	if err := s.srv.Serve(s.l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// Close ends the socket and every watcher, and removes its file.
func (s *Socket) Close() error {
	close(s.stop)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := s.srv.Shutdown(ctx); err != nil {
		return errors.Join(err, s.srv.Close())
	}
	return nil
}

// Changed tells the watchers that the state of a path has changed.
func (s *Socket) Changed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.watchers {
		select {
		case c <- struct{}{}:
		default: // it has not yet looked at the change before: it will see both
		}
	}
}

// watch sends the paths, one object a line: at once, at every change and
// once in watchEvery.
func (s *Socket) watch(w http.ResponseWriter, r *http.Request, b Backend) {
	changed := make(chan struct{}, 1)
	s.mu.Lock()
	s.watchers[changed] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, changed)
		s.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/x-ndjson")
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	out := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	for {
		if out.Encode(b.Paths()) != nil || flush.Flush() != nil {
			return
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-s.stop:
			return
		}
	}
}
