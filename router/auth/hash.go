package auth

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
)

// What HashPassword makes: argon2id with OWASP's parameters. 19 MiB for each check lets a daemon verify several
// passwords at once without a configured memory limit noticing.
const (
	defaultMemory  = 19 * 1024 // KiB
	defaultTime    = 2
	defaultThreads = 1
	saltLen        = 16
	keyLen         = 32
)

// What a configured hash may ask for: a hash is data, and data must not be able to take the host's memory or a core
// for minutes.
const (
	maxMemory  = 256 * 1024  // KiB
	maxWork    = 1024 * 1024 // KiB: memory times passes
	maxThreads = 16
	maxBcrypt  = 16 // cost: about four seconds of one core
	bcryptLen  = 60
	maxField   = 64 // bytes of salt or key
)

// maxPassword is the longest password in bytes that is hashed or checked.
const maxPassword = 1024

// maxName is the longest user name in bytes that is looked up.
const maxName = 255

// ErrHash says that a configured password is not an argon2id or bcrypt hash that can be used. Errors that wrap it never
// hold the text of the hash, which may be a plain password put there by mistake.
var ErrHash = errors.New("not a usable password hash")

// ErrPassword says that a password cannot be hashed: empty, over 1024 bytes, or with characters that no client can send.
var ErrPassword = errors.New("unusable password")

// A secret is a parsed hash: what it takes to check a password.
type secret struct {
	bcrypt       []byte // the whole hash; nil: argon2id
	salt, key    []byte
	memory, time uint32
	threads      uint8
}

// HashPassword returns a fresh argon2id hash of password in the PHC string format, for the `password` key of a user.
// It refuses, with ErrPassword, what could never be checked: an empty or over-long password, and control characters
// (RFC 7617 section 2 bars them).
func HashPassword(password string) (string, error) {
	switch {
	case password == "":
		return "", fmt.Errorf("%w: it is empty", ErrPassword)
	case len(password) > maxPassword:
		return "", fmt.Errorf("%w: over %d bytes", ErrPassword, maxPassword)
	case hasControl(password):
		return "", fmt.Errorf("%w: it holds a control character", ErrPassword)
	}
	salt := make([]byte, saltLen)
	rand.Read(salt) //nolint:errcheck // never fails: it ends the program instead
	key := argon2.IDKey([]byte(password), salt, defaultTime, defaultMemory, defaultThreads, keyLen)
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, defaultMemory, defaultTime, defaultThreads,
		b64.EncodeToString(salt), b64.EncodeToString(key)), nil
}

// ValidateHash says whether a group can be made with this hash: argon2id ($argon2id$v=19$m=,t=,p=$salt$hash) with at
// most 256 MiB, 1 GiB of memory times passes and 16 lanes, or bcrypt ($2a, $2b, $2y) up to cost 16. Errors wrap ErrHash.
func ValidateHash(hash string) error {
	_, err := parseHash(hash)
	return err
}

func parseHash(hash string) (*secret, error) {
	switch {
	case strings.HasPrefix(hash, "$argon2id$"):
		return parseArgon2(hash)
	case strings.HasPrefix(hash, "$2a$"), strings.HasPrefix(hash, "$2b$"), strings.HasPrefix(hash, "$2y$"):
		return parseBcrypt(hash)
	case strings.HasPrefix(hash, "$"):
		return nil, fmt.Errorf("%w: only argon2id and bcrypt are", ErrHash)
	}
	return nil, fmt.Errorf("%w: it is plain text", ErrHash)
}

func parseBcrypt(hash string) (*secret, error) {
	if len(hash) != bcryptLen {
		return nil, fmt.Errorf("%w: a bcrypt hash has %d characters, this has %d", ErrHash, bcryptLen, len(hash))
	}
	cost, err := bcrypt.Cost([]byte(hash))
	if err != nil {
		return nil, fmt.Errorf("%w: its bcrypt cost cannot be read", ErrHash)
	}
	if cost > maxBcrypt {
		return nil, fmt.Errorf("%w: bcrypt cost %d is over %d", ErrHash, cost, maxBcrypt)
	}
	for _, c := range []byte(hash[7:]) {
		if c != '.' && c != '/' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return nil, fmt.Errorf("%w: a character that bcrypt does not use", ErrHash)
		}
	}
	return &secret{bcrypt: []byte(hash)}, nil
}

func parseArgon2(hash string) (*secret, error) {
	f := strings.Split(hash, "$") // "", argon2id, v=, parameters, salt, key
	if len(f) != 6 {
		return nil, fmt.Errorf("%w: argon2id has the form $argon2id$v=19$m=M,t=T,p=P$SALT$HASH", ErrHash)
	}
	if f[2] != "v=19" {
		return nil, fmt.Errorf("%w: argon2id version 19 is needed", ErrHash)
	}
	p := strings.Split(f[3], ",")
	if len(p) != 3 {
		return nil, fmt.Errorf("%w: argon2id has the parameters m=M,t=T,p=P", ErrHash)
	}
	s := &secret{}
	memory, okM := number(p[0], "m=", maxMemory)
	passes, okT := number(p[1], "t=", maxWork)
	threads, okP := number(p[2], "p=", maxThreads)
	switch {
	case !okM:
		return nil, fmt.Errorf("%w: argon2id m= is not 1 to %d", ErrHash, maxMemory)
	case !okT:
		return nil, fmt.Errorf("%w: argon2id t= is not a number from 1", ErrHash)
	case !okP:
		return nil, fmt.Errorf("%w: argon2id p= is not 1 to %d", ErrHash, maxThreads)
	case memory < 8*threads:
		return nil, fmt.Errorf("%w: argon2id m= is under 8 times p=", ErrHash)
	case memory*passes > maxWork:
		return nil, fmt.Errorf("%w: argon2id m= times t= is over %d", ErrHash, maxWork)
	}
	s.memory, s.time, s.threads = uint32(memory), uint32(passes), uint8(threads)
	var err error
	if s.salt, err = base64.RawStdEncoding.Strict().DecodeString(f[4]); err != nil || len(s.salt) < 8 || len(s.salt) > maxField {
		return nil, fmt.Errorf("%w: the argon2id salt is not 8 to %d bytes of base64", ErrHash, maxField)
	}
	if s.key, err = base64.RawStdEncoding.Strict().DecodeString(f[5]); err != nil || len(s.key) < 16 || len(s.key) > maxField {
		return nil, fmt.Errorf("%w: the argon2id hash is not 16 to %d bytes of base64", ErrHash, maxField)
	}
	return s, nil
}

// number reads prefix and a decimal number from 1 to limit without sign or leading zero.
func number(s, prefix string, limit uint64) (uint64, bool) {
	s, ok := strings.CutPrefix(s, prefix)
	if !ok || s == "" || s[0] < '1' || s[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return n, err == nil && n <= limit
}

// matches does the whole work whatever the password is, and compares in constant time.
func (s *secret) matches(password string) bool {
	if s.bcrypt != nil {
		return bcrypt.CompareHashAndPassword(s.bcrypt, []byte(password)) == nil
	}
	key := argon2.IDKey([]byte(password), s.salt, s.time, s.memory, s.threads, uint32(len(s.key)))
	return subtle.ConstantTimeCompare(key, s.key) == 1
}

// A Gate bounds how many password hashes are computed at one time, so that a flood of wrong passwords takes neither all
// the memory nor all the processors. One Gate may serve many groups.
type Gate struct {
	slots chan struct{}
}

// NewGate makes a Gate for n computations at one time; below 1: half of the processors, at least one.
func NewGate(n int) *Gate {
	if n < 1 {
		n = max(1, runtime.GOMAXPROCS(0)/2)
	}
	return &Gate{slots: make(chan struct{}, n)}
}
