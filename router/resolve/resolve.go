// Package resolve turns host names into addresses as the host's own stub resolver would, over sockets that are ours.
//
// A [Resolver] reads /etc/resolv.conf and /etc/hosts, or is given its servers, asks them through an injected dial function (so
// that every socket carries the daemon's mark), and remembers what it was told. A name that is remembered is found without a
// lock and without an allocation. [Resolver.Bound] makes resolvers that ask the same by sockets of another kind, such as those
// of one egress path.
//
// What is answered without a query: address literals, Options.Static, /etc/hosts, localhost and *.localhost (RFC 6761), and the
// refusal of what can be no host name. A name that ends in a number, such as 127.1 or 0x7f.1, is one of those: it is neither an
// address nor a name, and is not handed to anything that might think otherwise.
package resolve

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"wayout/selection"
)

// What Options stand for when they are left zero.
const (
	DefaultResolvConf = "/etc/resolv.conf"
	DefaultHosts      = "/etc/hosts"
	DefaultRefresh    = 5 * time.Second
	DefaultSize       = 8192
	DefaultMinTTL     = time.Second
	DefaultMaxTTL     = time.Hour
	DefaultMaxNegTTL  = 5 * time.Minute
	DefaultDelay      = 50 * time.Millisecond
	DefaultInflight   = 4096
)

// failTTL is how long a question that no server answered is not put again (RFC 9520 section 3.2 asks for at least a second):
// without it every request for a name of a dead server would wait for that server anew.
const failTTL = time.Second

// Options say how a Resolver works. Only Dial is needed.
type Options struct {
	// Dial opens the socket of one query. Network is "udp" or "tcp", addr an address literal with port; a UDP socket is to be
	// connected, and to have a port of its own. It must return when ctx ends, or Close does not. A nil Dial makes every query
	// fail: there is no falling back to sockets of another kind.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	// Servers are asked in this order when there are any (port 0 is 53). Then neither of the two files is read, and names are
	// asked as they are: there is no search list.
	Servers []netip.AddrPort

	// Static gives names their addresses, before all else that could. A name that it knows is never asked of a server, not
	// even for a family of which it gives no address. Addresses with a zone are passed over, and so are more than 64 of a
	// family.
	Static map[string][]netip.Addr

	ResolvConf string // path; DefaultResolvConf when empty
	Hosts      string // path; DefaultHosts when empty

	// Refresh is how often the two files are looked at (by their identity, size and time of change); the looking is done
	// beside the requests, never by one.
	Refresh time.Duration

	// Timeout is the wait for one server, in place of resolv.conf's "options timeout" (5 s where that is not there either) when
	// it is not zero.
	Timeout time.Duration

	// QueryCase spells the name of each query over UDP in letters of random case, and passes over answers that do not spell it
	// the same: bits that who forges an answer must guess beside port and number (draft-vixie-dnsext-dns0x20-00). A server
	// that does not keep the case is asked over TCP.
	QueryCase bool

	// ServeStale is how long past its time an answer may still be given when no server gives another (RFC 8767): all fail, or
	// are silent for 1.8 s. A server's denial ends it. Such an answer is given for 30 s before the servers are asked again.
	// None is given when it is zero.
	ServeStale time.Duration

	Size      int           // names remembered, at most (rounded up to the cache's own grain of 16)
	MinTTL    time.Duration // floor of what is remembered, of addresses and denials alike
	MaxTTL    time.Duration // ceiling for addresses
	MaxNegTTL time.Duration // ceiling for denials (RFC 2308)

	// Delay is the wait for the second family once the first has given addresses (RFC 8305 section 3, "Resolution Delay").
	Delay time.Duration

	Inflight int              // questions under way at one time, at most; what comes on top fails with ErrServer
	Now      func() time.Time // clock of the cache; time.Now when nil. The waits for servers follow the real clock
	Log      *slog.Logger     // what is wrong with the files; nowhere when nil
}

// Answer is what a name stands for, each family in the order in which it was answered. The slices are shared with the cache
// and with other callers: they are not to be changed (appending is safe, they have no spare room).
type Answer struct {
	V4, V6 []netip.Addr

	// Pending tells which family was asked for and had not been answered when the other one's Delay was over. Its question
	// goes on: a caller whose every attempt on the addresses here fails may ask for that family alone and find it answered.
	Pending selection.Family
}

// Resolver resolves names. It is safe for concurrent use; New makes one, Close ends it.
type Resolver struct {
	opt     Options
	epoch   time.Time // the cache counts nanoseconds from here, so that a clock that is set back revives nothing
	loop4   []netip.Addr
	loop6   []netip.Addr
	current atomic.Pointer[state]
	files   files
	own     hosts     // Options.Static
	parent  *Resolver // whose settings and hosts a bound resolver has; else nil

	ctx    context.Context // of the questions under way: theirs, not a caller's
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex // guards the rest; taken for a question that goes out, never for a hit
	closed   bool
	inflight int
	bound    map[*Resolver]struct{} // those that are not closed
}

// state is all that a lookup reads: one pointer load gives it settings, hosts and cache that belong together. Settings that
// change bring an empty cache, since the answers of other servers may be answers of another network.
type state struct {
	conf  *conf
	hosts hosts // a bound resolver's are its parent's
	cache *cache
	from  *conf // of a bound resolver: its parent's, whose settings conf has
}

// New makes a resolver and, unless Options.Servers says what they would, reads its files and starts to watch them. It never
// fails: files that are missing or cannot be read mean what they mean to the C library, a server at 127.0.0.1 and no hosts.
func New(o Options) *Resolver {
	o.Dial = orNone(o.Dial)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.ResolvConf = orDefault(o.ResolvConf, DefaultResolvConf)
	o.Hosts = orDefault(o.Hosts, DefaultHosts)
	o.Refresh = orDefault(o.Refresh, DefaultRefresh)
	o.Size = orDefault(o.Size, DefaultSize)
	o.MinTTL = orDefault(o.MinTTL, DefaultMinTTL)
	o.MaxTTL = max(orDefault(o.MaxTTL, DefaultMaxTTL), o.MinTTL)
	o.MaxNegTTL = max(orDefault(o.MaxNegTTL, DefaultMaxNegTTL), o.MinTTL)
	o.Delay = orDefault(o.Delay, DefaultDelay)
	o.Inflight = orDefault(o.Inflight, DefaultInflight)

	r := &Resolver{
		opt:   o,
		epoch: o.Now(),
		loop4: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})},
		loop6: []netip.Addr{netip.IPv6Loopback()},
	}
	r.own = r.staticHosts()
	r.ctx, r.cancel = context.WithCancel(context.Background())
	if len(o.Servers) > 0 {
		r.current.Store(&state{conf: newConf(o.settings()), cache: newCache(o.Size)})
		return r
	}
	r.files.resolv = source{path: o.ResolvConf, limit: maxResolvConf}
	r.files.hosts = source{path: o.Hosts, limit: maxHosts}
	r.Reload()
	r.work.Go(r.watch)
	return r
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// orNone is dial, or where there is none one that fails.
func orNone(dial dialFunc) dialFunc {
	if dial != nil {
		return dial
	}
	return func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no dial function given")
	}
}

// Close ends the questions under way and waits until nothing of the resolver runs, nor of those bound to it. Lookups that wait
// return an error that wraps net.ErrClosed, and so do later ones that the cache cannot answer.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	bound := r.bound
	r.bound = nil
	r.mu.Unlock()
	r.cancel() // of the bound ones too, so that they end at the same time
	for b := range bound {
		b.Close()
	}
	if r.parent != nil {
		r.parent.forget(r)
	}
	r.work.Wait()
}

// now is the cache's clock: nanoseconds since the resolver was made.
func (r *Resolver) now() int64 { return int64(r.opt.Now().Sub(r.epoch)) }

// Lookup gives the addresses of host, of the families in want. Both families are asked at the same time; when one has
// addresses and the other fails or has none, the answer is what there is, and when the other is late, it is waited for no
// longer than Options.Delay (see Answer.Pending).
//
// A literal is returned whatever want says, without its zone, IPv4 mapped into IPv6 as the IPv4 address that it stands for; an
// AAAA record that holds such an address counts as IPv4 too, and is dropped when want has no IPv4. A name without a trailing
// dot goes through resolv.conf's search list by its ndots; only a denial leads to the next name of the list, a failure ends it,
// since the next name would be another host's.
//
// An error is an *Error that wraps ErrNotFound (ErrNoData when the name exists), ErrTimeout or ErrServer, or context.Canceled.
// A deadline of ctx wraps ErrTimeout and context.DeadlineExceeded. The end of ctx ends the wait of this caller, not the
// question, which others may share and which is remembered for the next. With Options.ServeStale, what is past its time stands
// in for a failure.
func (r *Resolver) Lookup(ctx context.Context, host string, want selection.Family) (Answer, error) {
	if a, ok := literal(host); ok {
		if a.Is4() {
			return Answer{V4: []netip.Addr{a}}, nil
		}
		return Answer{V6: []netip.Addr{a}}, nil
	}
	var n name
	if !n.set(host) {
		return Answer{}, &Error{Host: host, Kind: ErrNotFound, Err: errBadName}
	}
	if a, ok := r.own[string(n.host())]; ok {
		return r.static(host, a.V4, a.V6, want)
	}
	if n.under("localhost") {
		return r.static(host, r.loop4, r.loop6, want)
	}
	// RFC 6761 section 6.4, RFC 7686 section 2: never asked of a server.
	if n.under("invalid") || n.under("onion") {
		return Answer{}, &Error{Host: host, Kind: ErrNotFound}
	}
	base := r.base()
	if a, ok := base.hosts[string(n.host())]; ok {
		return r.static(host, a.V4, a.V6, want)
	}
	return r.search(ctx, base, host, &n, want)
}

// Ready reports whether Lookup has the answer at hand, so that it does not block.
func (r *Resolver) Ready(host string, want selection.Family) bool {
	if _, ok := literal(host); ok {
		return true
	}
	var n name
	if !n.set(host) {
		return true
	}
	if _, ok := r.own[string(n.host())]; ok || n.under("localhost") || n.under("invalid") || n.under("onion") {
		return true
	}
	base := r.base()
	if _, ok := base.hosts[string(n.host())]; ok {
		return true
	}
	if base.conf.noAAAA {
		want &^= selection.V6
	}
	if want&(selection.V4|selection.V6) == 0 {
		return true
	}
	st := r.state(base)
	if st == nil {
		return false
	}
	for i := range st.conf.tries(&n) {
		full, ok := st.conf.try(&n, i)
		if !ok {
			continue
		}
		sets := st.cache.get(full, r.now())
		if missing(sets, want) {
			return false
		}
		if _, bad := assemble(sets, want); bad == nil || bad.kind == failed {
			return true
		}
	}
	return true
}

// static is the answer of a name whose addresses are all known beforehand.
func (r *Resolver) static(host string, v4, v6 []netip.Addr, want selection.Family) (Answer, error) {
	var a Answer
	if want&selection.V4 != 0 {
		a.V4 = v4
	}
	if want&selection.V6 != 0 {
		a.V6 = v6
	}
	if len(a.V4)+len(a.V6) == 0 {
		return Answer{}, &Error{Host: host, Kind: ErrNoData}
	}
	return a, nil
}

// search puts the names that n may stand for, one after the other, until one is not denied.
func (r *Resolver) search(ctx context.Context, base *state, host string, n *name, want selection.Family) (Answer, error) {
	if base.conf.noAAAA {
		want &^= selection.V6
	}
	if want&(selection.V4|selection.V6) == 0 {
		return Answer{}, &Error{Host: host, Kind: ErrNoData}
	}
	st := r.state(base)
	if st == nil {
		st = r.follow(base)
	}
	var denied *rrset // set by the end of the loop: the name as it is is among the tries, and never too long
	for i := range st.conf.tries(n) {
		full, ok := st.conf.try(n, i)
		if !ok {
			continue
		}
		sets := st.cache.get(full, r.now())
		if missing(sets, want) {
			var err error
			if sets, err = r.ask(ctx, st, string(full), sets, want); err != nil {
				return Answer{}, ended(host, err)
			}
		}
		a, bad := assemble(sets, want)
		switch {
		case bad == nil:
			return a, nil
		case bad.kind == failed:
			return Answer{}, bad.fail(host)
		case denied == nil || denied.kind == noName:
			denied = bad
		}
	}
	return Answer{}, denied.fail(host)
}

// ended is the error of a lookup whose caller's context came to its end.
func ended(host string, err error) *Error {
	if errors.Is(err, context.DeadlineExceeded) {
		return &Error{Host: host, Kind: ErrTimeout, Err: err}
	}
	return &Error{Host: host, Kind: err}
}

func missing(sets [2]*rrset, want selection.Family) bool {
	return want&selection.V4 != 0 && sets[v4] == nil || want&selection.V6 != 0 && sets[v6] == nil
}

// assemble makes the answer of one name from its sets; a nil set is one that is still being asked. When there is no address
// it returns the set that says best why: a failure before a name without addresses before a name that does not exist.
func assemble(sets [2]*rrset, want selection.Family) (a Answer, bad *rrset) {
	for i, f := range [2]selection.Family{selection.V4, selection.V6} {
		if want&f == 0 {
			continue
		}
		s := sets[i]
		switch {
		case s == nil:
			a.Pending |= f
		case s.kind != found:
			if bad == nil || s.kind > bad.kind {
				bad = s
			}
		case i == v4:
			a.V4 = s.addrs
		default:
			a.V6 = s.addrs
			if len(s.mapped) > 0 && want&selection.V4 != 0 {
				a.V4 = append(a.V4, s.mapped...) // a copy: the slices of a set have no spare room
			}
		}
	}
	if len(a.V4)+len(a.V6) > 0 {
		return a, nil
	}
	if bad == nil { // only mapped addresses, and no IPv4 wanted
		bad = &rrset{kind: noData}
	}
	return Answer{}, bad
}
