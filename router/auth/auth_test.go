package auth_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"

	"wayout/router/auth"
	"wayout/selection"
)

// cheap is an argon2id hash that costs microseconds.
func cheap(password string) string {
	salt := []byte("saltsaltsalt")
	key := argon2.IDKey([]byte(password), salt, 1, 8, 1, 16)
	b := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=19$m=8,t=1,p=1$%s$%s", b.EncodeToString(salt), b.EncodeToString(key))
}

func cred(name, hash string) auth.Credential {
	return auth.Credential{User: auth.User{Name: name}, Hash: hash}
}

func newGroup(t testing.TB, o auth.Options, users ...auth.Credential) *auth.Group {
	t.Helper()
	g, err := auth.NewGroup("team", users, o)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestVerify(t *testing.T) {
	bc, err := bcrypt.GenerateFromPassword([]byte("blowfish"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	made, err := auth.HashPassword("pässwörd: with colon")
	if err != nil {
		t.Fatal(err)
	}
	sel := selection.Layer{{Escaper: "out", Value: selection.ID("fra-2")}}
	alice := cred("alice", cheap("secret"))
	alice.Selection = sel
	g := newGroup(t, auth.Options{},
		alice, cred("bob", string(bc)), cred("yves", "$2y$"+string(bc[4:])), cred("made", made))

	tests := []struct {
		name, user, pass string
		ok               bool
	}{
		{"argon2id", "alice", "secret", true},
		{"argon2id again, from the cache", "alice", "secret", true},
		{"bcrypt", "bob", "blowfish", true},
		{"bcrypt 2y", "yves", "blowfish", true},
		{"made by HashPassword", "made", "pässwörd: with colon", true},
		{"wrong password", "alice", "Secret", false},
		{"wrong bcrypt password", "bob", "blowfis", false},
		{"another user's password", "alice", "blowfish", false},
		{"empty password", "alice", "", false},
		{"unknown user", "mallory", "secret", false},
		{"name in another case", "Alice", "secret", false},
		{"empty name", "", "secret", false},
		{"the hash is no password", "alice", cheap("secret"), false},
		{"colon moved", "alice:", "secret", false},
		{"name and password joined elsewhere", "alic", "esecret", false},
		{"NUL", "alice", "secret\x00", false},
		{"over-long name", strings.Repeat("a", 256), "x", false},
		{"over-long password", "alice", strings.Repeat("a", 1025), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, err := g.Verify(t.Context(), tt.user, tt.pass)
			if !tt.ok {
				if !errors.Is(err, auth.ErrAuth) || u != nil {
					t.Fatalf("got %v, %v; want ErrAuth", u, err)
				}
				return
			}
			if err != nil || u.Name != tt.user {
				t.Fatalf("got %v, %v; want the user", u, err)
			}
		})
	}

	u, err := g.Verify(t.Context(), "alice", "secret")
	if err != nil || len(u.Selection) != 1 || u.Selection[0] != sel[0] {
		t.Fatalf("alice's selection: %v, %v", u, err)
	}
	if again, ok := g.User("alice"); !ok || again != u {
		t.Fatalf("User: %v %v, want what Verify returned", again, ok)
	}
	if _, ok := g.User("mallory"); ok {
		t.Fatal("User knows mallory")
	}
	if g.Name() != "team" || g.Len() != 4 {
		t.Fatalf("group %q of %d", g.Name(), g.Len())
	}
}

func TestEmptyGroup(t *testing.T) {
	g := newGroup(t, auth.Options{})
	if _, err := g.Verify(t.Context(), "alice", "x"); !errors.Is(err, auth.ErrAuth) {
		t.Fatalf("got %v, want ErrAuth", err)
	}
}

func TestBadHashes(t *testing.T) {
	const salt, key = "c2FsdHNhbHRzYWx0", "AAAAAAAAAAAAAAAAAAAAAA"
	argon := func(params string) string { return "$argon2id$v=19$" + params + "$" + salt + "$" + key }
	long := base64.RawStdEncoding.EncodeToString(make([]byte, 65))
	if err := auth.ValidateHash(argon("m=8,t=1,p=1")); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	bad := map[string]string{
		"plain text":         "hunter2",
		"empty":              "",
		"argon2i":            "$argon2i$v=19$m=8,t=1,p=1$" + salt + "$" + key,
		"SHA-512 crypt":      "$6$salt$hash",
		"old version":        "$argon2id$v=16$m=8,t=1,p=1$" + salt + "$" + key,
		"no version":         "$argon2id$m=8,t=1,p=1$" + salt + "$" + key,
		"too few parts":      "$argon2id$v=19$m=8,t=1,p=1$" + salt,
		"too many parts":     argon("m=8,t=1,p=1") + "$x",
		"parameter missing":  argon("m=8,t=1"),
		"parameter order":    argon("t=1,m=8,p=1"),
		"parameter added":    argon("m=8,t=1,p=1,keyid=x"),
		"memory over bounds": argon("m=262145,t=1,p=1"),
		"memory overflows":   argon("m=4294967304,t=1,p=1"),
		"work over bounds":   argon("m=262144,t=5,p=1"),
		"lanes over bounds":  argon("m=8192,t=1,p=17"),
		"memory under lanes": argon("m=8,t=1,p=2"),
		"zero passes":        argon("m=8,t=0,p=1"),
		"zero lanes":         argon("m=8,t=1,p=0"),
		"sign":               argon("m=+8,t=1,p=1"),
		"leading zero":       argon("m=08,t=1,p=1"),
		"short salt":         "$argon2id$v=19$m=8,t=1,p=1$c2FsdA$" + key,
		"long salt":          "$argon2id$v=19$m=8,t=1,p=1$" + long + "$" + key,
		"broken salt":        "$argon2id$v=19$m=8,t=1,p=1$!!!!!!!!!!!!$" + key,
		"padded key":         argon("m=8,t=1,p=1") + "==",
		"short key":          "$argon2id$v=19$m=8,t=1,p=1$" + salt + "$AAAA",
		"long key":           "$argon2id$v=19$m=8,t=1,p=1$" + salt + "$" + long,
		"bcrypt cut":         "$2a$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhW",
		"bcrypt cost":        "$2a$17$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
		"bcrypt cost word":   "$2a$xx$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
		"bcrypt character":   "$2a$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lh$y",
		"bcrypt 2x":          "$2x$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
	}
	for name, hash := range bad {
		t.Run(name, func(t *testing.T) {
			err := auth.ValidateHash(hash)
			if !errors.Is(err, auth.ErrHash) {
				t.Fatalf("got %v, want ErrHash", err)
			}
			if hash != "" && strings.Contains(err.Error(), hash) {
				t.Fatalf("the error holds what may be a password: %v", err)
			}
		})
	}
}

func TestNewGroupReportsAll(t *testing.T) {
	g, err := auth.NewGroup("team", []auth.Credential{
		cred("alice", cheap("a")), cred("alice", cheap("b")), cred("bob", "hunter2"),
		cred("a:b", cheap("c")), cred("", cheap("d")), cred("carol", "$2a$"),
	}, auth.Options{})
	if g != nil || !errors.Is(err, auth.ErrHash) {
		t.Fatalf("got %v, %v", g, err)
	}
	if n := strings.Count(err.Error(), "\n") + 1; n != 5 {
		t.Fatalf("%d errors, want 5:\n%v", n, err)
	}
	if strings.Contains(err.Error(), "hunter2") {
		t.Fatalf("the error holds a password: %v", err)
	}
}

func TestHashPassword(t *testing.T) {
	a, err := auth.HashPassword("secret")
	if err != nil {
		t.Fatal(err)
	}
	b, err := auth.HashPassword("secret")
	if err != nil {
		t.Fatal(err)
	}
	if a == b {
		t.Fatal("two hashes of one password are equal: no salt")
	}
	if err := auth.ValidateHash(a); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", strings.Repeat("x", 1025), "a\nb", "a\x00", "\x7f"} {
		if h, err := auth.HashPassword(bad); !errors.Is(err, auth.ErrPassword) {
			t.Errorf("%.10q: got %q, %v; want ErrPassword", bad, h, err)
		}
	}
}

func TestParseBasic(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	good := []struct{ name, in, user, pass string }{
		{"RFC 7617 section 2", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", "Aladdin", "open sesame"},
		{"scheme in any case", "bAsIc " + b64("a:b"), "a", "b"},
		{"several spaces", " Basic   " + b64("a:b") + "\t", "a", "b"},
		{"colons in the password", "Basic " + b64("a:b:c:"), "a", "b:c:"},
		{"empty password", "Basic " + b64("a:"), "a", ""},
		{"empty name", "Basic " + b64(":b"), "", "b"},
		{"UTF-8", "Basic dGVzdDoxMjPCow==", "test", "123£"},
		{"longest", "Basic " + b64(strings.Repeat("u", 255)+":"+strings.Repeat("p", 1024)), strings.Repeat("u", 255), strings.Repeat("p", 1024)},
	}
	for _, tt := range good {
		t.Run(tt.name, func(t *testing.T) {
			u, p, err := auth.ParseBasic(tt.in)
			if err != nil || u != tt.user || p != tt.pass {
				t.Fatalf("got %q %q %v", u, p, err)
			}
		})
	}
	bad := map[string]string{
		"empty":               "",
		"scheme only":         "Basic",
		"scheme and space":    "Basic ",
		"another scheme":      "Bearer abcdef",
		"no space":            "Basic" + b64("a:b"),
		"tab after scheme":    "Basic\t" + b64("a:b"),
		"no colon":            "Basic " + b64("ab"),
		"not base64":          "Basic a:b",
		"padding missing":     "Basic YTpiYw",
		"URL alphabet":        "Basic " + base64.URLEncoding.EncodeToString([]byte("\xfb\xff:x")),
		"newline in base64":   "Basic YTpi\r\nYTpi",
		"something after":     "Basic " + b64("a:b") + " x",
		"two":                 "Basic " + b64("a:b") + ", Basic " + b64("c:d"),
		"control in name":     "Basic " + b64("a\n:b"),
		"NUL in the password": "Basic " + b64("a:b\x00"),
		"DEL":                 "Basic " + b64("a:\x7f"),
		"over-long":           "Basic " + b64("u:"+strings.Repeat("p", 2000)),
	}
	for name, in := range bad {
		t.Run(name, func(t *testing.T) {
			if u, p, err := auth.ParseBasic(in); !errors.Is(err, auth.ErrMalformed) || u != "" || p != "" {
				t.Fatalf("got %q %q %v, want ErrMalformed", u, p, err)
			}
		})
	}
}

func FuzzParseBasic(f *testing.F) {
	for _, s := range []string{"Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", "basic  Og==", "Basic YTpi\r\n", "Bearer x", "Basic", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		u, p, err := auth.ParseBasic(in)
		if err != nil {
			if !errors.Is(err, auth.ErrMalformed) || u != "" || p != "" {
				t.Fatalf("%q: %q %q %v", in, u, p, err)
			}
			return
		}
		if strings.Contains(u, ":") || strings.ContainsAny(u+p, "\x00\r\n\x7f") {
			t.Fatalf("%q gave %q %q", in, u, p)
		}
		again := "Basic " + base64.StdEncoding.EncodeToString([]byte(u+":"+p))
		if u2, p2, err := auth.ParseBasic(again); err != nil || u2 != u || p2 != p {
			t.Fatalf("%q does not survive: %q %q %v", in, u2, p2, err)
		}
	})
}

func FuzzValidateHash(f *testing.F) {
	f.Add(cheap("x"))
	f.Add("$2a$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy")
	f.Add("$argon2id$v=19$m=262144,t=4,p=16$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAA")
	f.Add("$argon2id$$$$")
	f.Fuzz(func(t *testing.T, hash string) {
		err := auth.ValidateHash(hash)
		if err != nil && !errors.Is(err, auth.ErrHash) {
			t.Fatalf("%q: %v", hash, err)
		}
		_, gerr := auth.NewGroup("g", []auth.Credential{cred("u", hash)}, auth.Options{})
		if (err == nil) != (gerr == nil) {
			t.Fatalf("%q: ValidateHash %v, NewGroup %v", hash, err, gerr)
		}
	})
}

// Many clients with right, wrong and unknown credentials at once: each gets its own answer.
func TestConcurrent(t *testing.T) {
	const users = 20
	creds := make([]auth.Credential, users)
	for i := range creds {
		creds[i] = cred(fmt.Sprintf("u%d", i), cheap(fmt.Sprintf("p%d", i)))
	}
	g := newGroup(t, auth.Options{CacheSize: 64, Gate: auth.NewGate(2)}, creds...)
	var wg sync.WaitGroup
	for c := range 16 {
		wg.Go(func() {
			for i := range 200 {
				n := (i*7 + c) % (users + 2) // the last two are unknown
				name := fmt.Sprintf("u%d", n)
				right := i%3 != 0
				pass := fmt.Sprintf("p%d", n)
				if !right {
					pass = "wrong"
				}
				u, err := g.Verify(context.Background(), name, pass)
				if want := right && n < users; (err == nil) != want || want && u.Name != name {
					t.Errorf("%s/%s: %v, %v", name, pass, u, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkVerifyCached(b *testing.B) {
	g := newGroup(b, auth.Options{}, cred("alice", cheap("correct horse battery staple")))
	ctx := b.Context()
	if _, err := g.Verify(ctx, "alice", "correct horse battery staple"); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := g.Verify(ctx, "alice", "correct horse battery staple"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyCachedParallel(b *testing.B) {
	g := newGroup(b, auth.Options{}, cred("alice", cheap("correct horse battery staple")))
	ctx := b.Context()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := g.Verify(ctx, "alice", "correct horse battery staple"); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkVerifyHashed(b *testing.B) {
	h, err := auth.HashPassword("secret")
	if err != nil {
		b.Fatal(err)
	}
	g := newGroup(b, auth.Options{CacheTTL: -1}, cred("alice", h))
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := g.Verify(ctx, "alice", "secret"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseBasic(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := auth.ParseBasic("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="); err != nil {
			b.Fatal(err)
		}
	}
}
