package netcfg

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClaimed says that another running daemon uses a part of the number space.
var ErrClaimed = errors.New("network numbers are used by another wayout")

// claimPrefix begins the names of the abstract unix sockets that stand for claims:
//
//	@wayout-netcfg/TABLE-BASE/RULE-PRIORITY/MARK-MASK/PID
//
// Abstract names belong to the network namespace, as rules and routes do, whatever
// file systems the daemons see, and they go with the process, also after kill -9.
const claimPrefix = "@wayout-netcfg/"

// claimLock is held while a claim is compared with the others, so that of two
// daemons that start at once exactly one wins.
const claimLock = claimPrefix + "lock"

// claimWait is how long another daemon's comparison is waited for.
const claimWait = 3 * time.Second

// Claim is the right to a Layout's numbers in a network namespace.
type Claim struct {
	l    *net.UnixListener
	done sync.WaitGroup
}

// Claim takes the Layout's numbers for this process. The error wraps [ErrClaimed]
// when any of its tables, rule priorities or mark bits belong to the claim of
// another process of root's or of our own user; sockets of other users with such
// names have no say. What a killed daemon left is then no longer anybody else's.
func (k *Netlink) Claim() (*Claim, error) {
	if err := k.opt.Layout.Validate(); err != nil {
		return nil, err
	}
	var c *Claim
	err := k.inNamespace(func() (err error) {
		c, err = takeClaim(k.opt.Layout)
		return err
	})
	if err != nil {
		return nil, err
	}
	if k.journal != nil {
		addrs, whole, err := k.readAddrs()
		if err == nil && whole {
			err = k.journal.prune(addrs)
		}
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

func takeClaim(l Layout) (*Claim, error) {
	unlock, err := lockClaims()
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Bound before the others are looked at: even without the lock, of two at once
	// at least one sees the other.
	name := fmt.Sprintf("%s%d/%d/%x/%d", claimPrefix, l.TableBase, l.RulePriority, l.MarkMask, os.Getpid())
	own, err := bindClaim(name)
	if err != nil {
		return nil, fmt.Errorf("claim tables, priorities and marks: %w", busy(err, name))
	}
	if err := compareClaims(l, name); err != nil {
		return nil, errors.Join(err, own.Close())
	}
	c := &Claim{l: own}
	// Whoever asks for the credentials of the claim leaves a connection behind.
	c.done.Go(func() {
		for {
			conn, err := own.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	})
	return c, nil
}

// Close gives the numbers back.
func (c *Claim) Close() error {
	err := c.l.Close()
	c.done.Wait()
	return err
}

func bindClaim(name string) (*net.UnixListener, error) {
	return net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
}

// busy turns the error of a name that is taken, by this very process, into ErrClaimed.
func busy(err error, name string) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w: %s is taken", ErrClaimed, name)
	}
	return err
}

// lockClaims waits for the lock. It goes on without when a user who has no say holds
// it: the claim is as safe then, only less fair.
func lockClaims() (unlock func(), err error) {
	deadline := time.Now().Add(claimWait)
	for {
		lock, err := bindClaim(claimLock)
		if err == nil {
			return func() { _ = lock.Close() }, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("lock the claims: %w", err)
		}
		if time.Now().After(deadline) {
			if pid, say := claimOwner(claimLock); say {
				return nil, fmt.Errorf("%w: process %d holds the lock on claims", ErrClaimed, pid)
			}
			return func() {}, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// compareClaims looks for claims beside the one called own that overlap with l.
func compareClaims(l Layout, own string) error {
	table, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return fmt.Errorf("list the claims of others: %w", err)
	}
	for name, other := range parseClaims(string(table)) {
		if name == own {
			continue
		}
		what := l.overlaps(other)
		if what == "" {
			continue
		}
		if pid, say := claimOwner(name); say {
			return fmt.Errorf("%w: process %d has %s", ErrClaimed, pid, what)
		}
	}
	return nil
}

// parseClaims reads /proc/net/unix.
func parseClaims(table string) map[string]Layout {
	out := make(map[string]Layout)
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) != 8 || !strings.HasPrefix(f[7], claimPrefix) {
			continue
		}
		part := strings.Split(strings.TrimPrefix(f[7], claimPrefix), "/")
		if len(part) != 4 {
			continue
		}
		base, errBase := strconv.ParseUint(part[0], 10, 32)
		priority, errPriority := strconv.ParseUint(part[1], 10, 32)
		mask, errMask := strconv.ParseUint(part[2], 16, 32)
		if errors.Join(errBase, errPriority, errMask) == nil {
			out[f[7]] = Layout{TableBase: uint32(base), RulePriority: uint32(priority), MarkMask: uint32(mask)}
		}
	}
	return out
}

// claimOwner says whose socket that is, and whether that user has a say. A socket
// that has gone meanwhile has none; one that cannot be asked does, to be safe.
func claimOwner(name string) (pid int, say bool) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, true
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		return 0, !errors.Is(err, unix.ECONNREFUSED)
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, true
	}
	return int(cred.Pid), cred.Uid == 0 || int(cred.Uid) == os.Geteuid()
}
