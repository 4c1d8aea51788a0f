// Package auth says who a client is: groups of users, their password hashes (argon2id, bcrypt), and a short memory of
// credentials that were verified, so that a request on a busy proxy does not cost a password hash.
//
// A Group never changes: a reload makes new ones. What it knows of a user (the operator's selection and the paths that
// the user may choose) is handed out, and judged elsewhere.
package auth

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"wayout/selection"
)

// Defaults of Options.
const (
	DefaultCacheTTL  = 60 * time.Second
	DefaultCacheSize = 8192
)

var (
	// ErrAuth says that name and password are not those of a user. It does not say which of the two is wrong, and
	// finding out costs the same work in both cases.
	ErrAuth = errors.New("authentication failed")
	// ErrMalformed says that a Proxy-Authorization value is not Basic credentials (RFC 7617).
	ErrMalformed = errors.New("malformed credentials")
)

// A User is who a verified client is. It is shared by all requests of the user and is not to be changed.
type User struct {
	Name      string
	Selection selection.Layer  // the operator's egress_path
	Allow     *selection.Globs // the paths that the user may choose; nil: any
	From      []netip.Prefix   // the networks that the client has to be in, see Allows; empty: any
	Meter     *Meter           // what the user's limits count; nil: none
}

// A Credential is a user with the hash of the password, argon2id or bcrypt. With an empty Hash, which a user with From may
// have, no password is right and the address alone says who it is: see Group.From.
type Credential struct {
	User
	Hash string
}

// Options of a Group. The zero value is good.
type Options struct {
	// CacheTTL is how long a verified credential is good without hashing it again. 0: DefaultCacheTTL; negative: every
	// request is hashed.
	CacheTTL time.Duration
	// CacheSize bounds the number of verified credentials that are remembered. 0: DefaultCacheSize.
	CacheSize int
	// Gate bounds the computations of hashes, for all groups that share it. nil: a Gate of the group's own.
	Gate *Gate
}

// A Group is a set of users that a server authenticates. Its methods may be called from many goroutines.
type Group struct {
	name     string
	users    map[string]*member
	secrets  []*secret // of all users that have one
	networks networks  // of those that have none
	gate     *Gate
	cache    *cache

	mu     sync.Mutex
	flying map[tag]*flight
}

type member struct {
	user   User
	secret *secret // nil: the user is known by the address
}

// A flight is one verification that is under way; clients that bring the same credential meanwhile wait for its end.
type flight struct {
	done chan struct{}
	ok   bool
	quit bool // given up before there was an answer
}

// NewGroup makes a group. All bad users are reported at once, as errors that wrap ErrHash where the hash is at fault;
// no error holds the text of a hash.
func NewGroup(name string, users []Credential, o Options) (*Group, error) {
	if o.CacheTTL == 0 {
		o.CacheTTL = DefaultCacheTTL
	}
	if o.CacheSize == 0 {
		o.CacheSize = DefaultCacheSize
	}
	if o.Gate == nil {
		o.Gate = NewGate(0)
	}
	g := &Group{
		name:    name,
		users:   make(map[string]*member, len(users)),
		secrets: make([]*secret, 0, len(users)),
		gate:    o.Gate,
		cache:   newCache(o.CacheTTL, o.CacheSize),
		flying:  make(map[tag]*flight),
	}
	var errs []error
	for i := range users {
		c := &users[i]
		var s *secret
		var err error
		if byAddress := c.Hash == "" && len(c.From) > 0; !byAddress {
			s, err = parseHash(c.Hash)
		}
		switch {
		case c.Name == "" || len(c.Name) > maxName || strings.Contains(c.Name, ":") || hasControl(c.Name):
			errs = append(errs, fmt.Errorf("user group %q: a user name is 1 to %d bytes without colon or control characters, got %q",
				name, maxName, c.Name))
			continue
		case err != nil:
			errs = append(errs, fmt.Errorf("user group %q: password of %q: %w", name, c.Name, err))
			continue
		case g.users[c.Name] != nil:
			errs = append(errs, fmt.Errorf("user group %q: two users named %q", name, c.Name))
			continue
		}
		m := &member{user: c.User, secret: s}
		g.users[c.Name] = m
		if s != nil {
			g.secrets = append(g.secrets, s)
			continue
		}
		if err := g.networks.add(&m.user); err != nil {
			errs = append(errs, fmt.Errorf("user group %q: %w", name, err))
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return g, nil
}

// Name returns the group's name.
func (g *Group) Name() string { return g.name }

// Len returns the number of users.
func (g *Group) Len() int { return len(g.users) }

// User returns a user by name, unauthenticated: for a command that explains what the user would get.
func (g *Group) User(name string) (*User, bool) {
	m, ok := g.users[name]
	if !ok {
		return nil, false
	}
	return &m.user, true
}

// Verify returns the user with this name and password, or an error that wraps ErrAuth. An error that wraps ctx's means
// that no answer was found in time: too many other passwords were being checked.
//
// A credential that was verified a short time ago is answered from memory, without hashing and without allocating. An
// unknown name takes the same work as a wrong password.
func (g *Group) Verify(ctx context.Context, name, password string) (*User, error) {
	if len(name) > maxName || len(password) > maxPassword {
		return nil, fmt.Errorf("%w: over-long credentials", ErrAuth)
	}
	t := g.cache.tag(name, password)
	if u := g.cache.get(&t); u != nil {
		return u, nil
	}
	return g.verify(ctx, &t, name, password)
}

// Verified returns the user whose credentials were verified lately, or nil. It
// never blocks.
func (g *Group) Verified(name, password string) *User {
	if len(name) > maxName || len(password) > maxPassword {
		return nil
	}
	t := g.cache.tag(name, password)
	return g.cache.get(&t)
}

// verify is the way with hashing: one computation for all who bring the same credential at one time.
func (g *Group) verify(ctx context.Context, t *tag, name, password string) (*User, error) {
	m := g.users[name]
	for {
		f, mine := g.join(t)
		if mine {
			ok, err := g.compute(ctx, m, name, password)
			if ok {
				g.cache.put(t, &m.user) // before the flight ends: who comes next finds one or the other
			}
			g.leave(t, f, ok, err != nil)
			if err != nil {
				return nil, err
			}
			return answer(m, ok)
		}
		select {
		case <-f.done:
			if !f.quit {
				return answer(m, f.ok)
			}
			// The one who computed lost patience. That says nothing of the credential: compute it here.
		case <-ctx.Done():
			return nil, waited(ctx)
		}
	}
}

func answer(m *member, ok bool) (*User, error) {
	if !ok {
		return nil, ErrAuth
	}
	return &m.user, nil
}

// join returns the flight of a credential, and whether it was started by this call.
func (g *Group) join(t *tag) (*flight, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if f := g.flying[*t]; f != nil {
		return f, false
	}
	f := &flight{done: make(chan struct{})}
	g.flying[*t] = f
	return f, true
}

func (g *Group) leave(t *tag, f *flight, ok, quit bool) {
	g.mu.Lock()
	delete(g.flying, *t)
	g.mu.Unlock()
	f.ok, f.quit = ok, quit
	close(f.done)
}

// compute checks the password inside the gate. For an unknown name (m nil) and for a user without a password it does the work of some user of the group,
// always the same one for the same name, and answers no: a group may mix cheap and dear hashes, and an unknown name must
// look like one of them.
func (g *Group) compute(ctx context.Context, m *member, name, password string) (bool, error) {
	if ctx.Err() != nil {
		return false, waited(ctx)
	}
	select {
	case g.gate.slots <- struct{}{}:
	case <-ctx.Done():
		return false, waited(ctx)
	}
	defer func() { <-g.gate.slots }()
	if m != nil && m.secret != nil {
		return m.secret.matches(password), nil
	}
	g.stranger(name).matches(password)
	return false, nil
}

// stranger returns the secret whose work an unknown name takes.
func (g *Group) stranger(name string) *secret {
	if len(g.secrets) == 0 {
		return &secret{
			salt: make([]byte, saltLen), key: make([]byte, keyLen),
			memory: defaultMemory, time: defaultTime, threads: defaultThreads,
		}
	}
	t := g.cache.tag(name, "")
	return g.secrets[binary.BigEndian.Uint64(t[sha256.Size-8:])%uint64(len(g.secrets))]
}

func waited(ctx context.Context) error {
	return fmt.Errorf("waiting for a password check: %w", ctx.Err())
}

// maxBasic bounds the value that ParseBasic looks at: base64 of the longest name, a colon and the longest password.
const maxBasic = (maxName + 1 + maxPassword + 2) / 3 * 4

// ParseBasic reads the value of a Proxy-Authorization or Authorization header of the scheme Basic (RFC 7617): the scheme
// in any case, spaces, base64 with its padding. The name ends at the first colon, the password may hold more. Control
// characters, a missing colon and anything else are errors that wrap ErrMalformed; they never hold the credentials.
func ParseBasic(headerValue string) (user, pass string, err error) {
	const scheme = "basic"
	v := strings.Trim(headerValue, " \t")
	if len(v) <= len(scheme) || !strings.EqualFold(v[:len(scheme)], scheme) || v[len(scheme)] != ' ' {
		return "", "", fmt.Errorf("%w: not of the scheme Basic", ErrMalformed)
	}
	v = strings.TrimLeft(v[len(scheme):], " ")
	if len(v) > maxBasic {
		return "", "", fmt.Errorf("%w: over %d bytes", ErrMalformed, maxBasic)
	}
	if strings.ContainsAny(v, "\r\n") { // the decoder would skip them
		return "", "", fmt.Errorf("%w: not base64", ErrMalformed)
	}
	var in, out [maxBasic]byte
	n, derr := base64.StdEncoding.Decode(out[:], in[:copy(in[:], v)])
	if derr != nil {
		return "", "", fmt.Errorf("%w: not base64", ErrMalformed)
	}
	s := string(out[:n])
	user, pass, found := strings.Cut(s, ":")
	if !found {
		return "", "", fmt.Errorf("%w: no colon after the user name", ErrMalformed)
	}
	if hasControl(s) {
		return "", "", fmt.Errorf("%w: a control character", ErrMalformed)
	}
	return user, pass, nil
}

func hasControl(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f {
			return true
		}
	}
	return false
}
