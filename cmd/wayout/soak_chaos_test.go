package main_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"wayout/scripts/lab"
)

// crew is who does operations. Each but the clients has to leave the others their
// share.
type crew int

const (
	clients crew = iota
	kept
	executed
	pinned
	pressing
	crews
)

// share is the most that a crew may do of all operations, in percent.
func (c crew) share() int { return [crews]int{100, 12, 20, 20, 25}[c] }

// served says whether a crew needs the daemon.
func (c crew) served() bool { return c == clients || c == kept }

// weather is what is being done to the host while it is asked, and how many
// operations have ended.
type weather struct {
	mu      sync.Mutex
	changed *sync.Cond // of mu

	storms, open int       // begun, and not over
	calm         time.Time // when the last was over
	done, total  int       // operations
	by           [crews]int
	late         bool // no more of them
	sheltered    bool // the daemon is not there
}

func newWeather(total int) *weather {
	w := &weather{total: total}
	w.changed = sync.NewCond(&w.mu)
	return w
}

// storm does something to the host for as long as f takes.
func (w *weather) storm(f func()) {
	w.mu.Lock()
	w.storms++
	w.open++
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.open--
		w.calm = time.Now()
		w.mu.Unlock()
	}()
	f()
}

// aftermath is how long after a storm an operation may still suffer from it: for
// what TCP sends again, and for what the daemon puts back.
const aftermath = 10 * time.Second

// report is the weather as an operation begins.
type report struct {
	storms int
	bad    bool
}

func (w *weather) now() report {
	w.mu.Lock()
	defer w.mu.Unlock()
	return report{w.storms, w.open > 0 || time.Since(w.calm) < aftermath}
}

// badSince says whether anything was done to the host since, or shortly before.
func (w *weather) badSince(r report) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return r.bad || w.storms != r.storms
}

// ended counts operations of a crew.
func (w *weather) ended(c crew, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done += n
	w.by[c] += n
	w.changed.Broadcast()
}

// over ends the hunt before its time.
func (w *weather) over() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.late = true
	w.changed.Broadcast()
}

// goes waits for a crew's turn. It is false when there is no more to be done.
func (w *weather) goes(c crew) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.more() && (w.sheltered && c.served() || w.by[c]*100 > (w.done+100)*c.share()) {
		w.changed.Wait()
	}
	return w.more()
}

func (w *weather) more() bool { return w.done < w.total && !w.late }

// shelter keeps those who need the daemon from asking.
func (w *weather) shelter(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sheltered = on
	w.changed.Broadcast()
}

// after waits until n more operations have ended. It is false when there are no
// more.
func (w *weather) after(n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for end := w.done + n; w.done < end && w.more(); {
		w.changed.Wait()
	}
	return w.more()
}

// network does things to addresses, links and routes, one after the other, until
// all operations have ended.
func (k *soak) network(rng *rand.Rand) {
	for k.weather.after(1 + rng.IntN(k.pace)) {
		what, do, undo := k.disaster(rng)
		k.weather.storm(func() {
			k.chaos.count("network", what)
			err := do()
			k.weather.after(1 + rng.IntN(k.pace))
			if err := errors.Join(err, undo()); err != nil {
				k.t.Errorf("%s: %v", what, err)
			}
		})
	}
}

// disaster is what befalls the network, and how it is undone. What the daemon has
// put there it puts back itself.
func (k *soak) disaster(rng *rand.Rand) (what string, do, undo func() error) {
	nothing := func() error { return nil }
	switch rng.IntN(9) {
	case 0, 1:
		p := k.of(0)[rng.IntN(len(k.of(0)))]
		return "managed addresses deleted", func() error { return k.drop("eth0", false, p.sources()...) }, nothing
	case 2, 3:
		p := k.of(1)[rng.IntN(len(k.of(1)))]
		all := p.v4
		if rng.IntN(2) == 0 {
			all = p.v6
		}
		return "addresses deleted and put back", func() error { return k.drop("eth1", true, all...) }, k.restore
	case 4:
		return "eth0 down and up", func() error { return k.Host.Down("eth0") }, func() error { return errors.Join(k.Host.Up("eth0"), k.restore()) }
	case 5:
		return "eth1 down and up", func() error { return k.Host.Down("eth1") }, func() error { return errors.Join(k.Host.Up("eth1"), k.restore()) }
	case 6:
		table := func(r *netlink.Route) bool { return r.Table != unix.RT_TABLE_LOCAL && r.Type == unix.RTN_UNICAST }
		return "routes of uplinks deleted", func() error { return k.dropRoutes(table) }, nothing
	case 7:
		return "rules by mark deleted", k.dropMarkRules, nothing
	}
	local := func(r *netlink.Route) bool { return r.Type == unix.RTN_LOCAL }
	return "local routes of prefixes deleted", func() error { return k.dropRoutes(local) }, nothing
}

// drop takes addresses off an interface; some may have gone already.
func (k *soak) drop(link string, whole bool, all ...netip.Addr) error {
	var errs []error
	for _, a := range all {
		at := netip.PrefixFrom(a, a.BitLen())
		if whole {
			at = lab.EgressPrefix(a)
		}
		if err := k.Host.DelAddr(link, at); !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ours is wayout's mark on rules and routes.
const ours = 119

// dropRoutes deletes those of wayout's routes that are meant.
func (k *soak) dropRoutes(meant func(*netlink.Route) bool) error {
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all, err := k.Host.Netlink().RouteListFiltered(family, &netlink.Route{Protocol: ours}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		errs = append(errs, err)
		for _, r := range all {
			if meant(&r) {
				if err := k.Host.Netlink().RouteDel(&r); !errors.Is(err, unix.ESRCH) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// dropMarkRules deletes the rules that lead the paths' sockets to their uplinks. Those
// by source stay, for what the kernel sends without a socket.
func (k *soak) dropMarkRules() error {
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all, err := k.Host.Netlink().RuleList(family)
		errs = append(errs, err)
		for _, r := range all {
			if r.Protocol == ours && r.Mark != 0 {
				if err := k.Host.Netlink().RuleDel(&r); !errors.Is(err, unix.ENOENT) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// restore puts back what is not the daemon's to put back.
func (k *soak) restore() error {
	var errs []error
	there := func(err error) {
		if !errors.Is(err, unix.EEXIST) {
			errs = append(errs, err)
		}
	}
	there(k.Host.AddAddr("eth0", netip.MustParsePrefix(lab.Primary1Of6+"/64")))
	there(k.Host.AddAddr("eth1", netip.MustParsePrefix(lab.Primary2Of6+"/64")))
	for _, p := range k.of(1) {
		for _, a := range p.sources() {
			there(k.Host.AddAddr("eth1", lab.EgressPrefix(a)))
		}
	}
	there(k.Host.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(lab.Gateway1Of4)))
	there(k.Host.AddRoute(netip.MustParsePrefix("::/0"), netip.MustParseAddr(lab.Gateway1Of6)))
	return errors.Join(errs...)
}

// operator does what operators do, and kills the daemon, until all operations have
// ended.
func (k *soak) operator(rng *rand.Rand) {
	for k.weather.after(1 + rng.IntN(k.pace)) {
		k.weather.storm(func() {
			what := k.order(rng)
			k.chaos.count("operator", what)
		})
	}
}

func (k *soak) order(rng *rand.Rand) string {
	switch rng.IntN(11) {
	case 0, 1:
		path := "out/" + []string{"p1", "p2", "p5", "p6"}[rng.IntN(4)]
		k.ok("drain", path)
		k.weather.after(1 + rng.IntN(k.pace))
		k.ok("undrain", path)
		return "drain and undrain"
	case 2, 3, 4:
		k.write(k.configuration(rng.IntN(2) == 0))
		k.ok("reload")
		return "reload"
	case 5, 6, 7:
		k.ok("publish", "dyn", k.publication(rng))
		return "publish"
	case 8:
		k.ok("apply")
		return "apply"
	case 9:
		k.again(k.daemon.Stop)
		return "stop, keeping, and start"
	}
	k.again(k.daemon.Kill)
	return "kill -9 and start"
}

// again has the daemon end, and starts another.
func (k *soak) again(end func() error) {
	k.weather.shelter(true)
	defer k.weather.shelter(false)
	if err := end(); err != nil {
		k.t.Errorf("the daemon: %v\n%s", err, k.daemon.Log())
	}
	k.sane(k.daemon)
	d, err := lab.StartDaemon(k.Host, lab.Program{Path: binary, Args: []string{"serve", "--config", k.config}})
	if err != nil {
		k.weather.over()
		k.t.Error(err)
		return
	}
	k.daemon = d
}

// sane says whether a daemon's log is that of one.
func (k *soak) sane(d *lab.Daemon) {
	log := d.Log()
	for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
		if i := strings.Index(log, bad); i >= 0 {
			k.t.Errorf("the daemon's log:\n%s", log[max(0, i-500):min(len(log), i+8000)])
		}
	}
}

// publication draws nodes of dyn, of each uplink some under another's address.
func (k *soak) publication(rng *rand.Rand) string {
	swapped := []bool{rng.IntN(3) == 0, rng.IntN(3) == 0}
	return k.published(func(int) bool { return rng.IntN(4) > 0 }, func(uplink int) bool { return swapped[uplink] })
}

// published writes a publication: of the nodes of dyn those that are meant, and the
// two of an uplink under each other's address where they are swapped.
func (k *soak) published(meant, swapped func(int) bool) string {
	var nodes []string
	for i, p := range k.dyn {
		at := p.usual()
		if swapped(p.uplink) {
			at = 1 - at
		}
		if meant(i) {
			nodes = append(nodes, fmt.Sprintf(`{"id": %q, "ipv4": %q, "ipv6": %q, "uplink": "isp%d"}`, p.id, p.v4[at], p.v6[at], p.uplink+1))
		}
	}
	return k.file("nodes.json", "["+strings.Join(nodes, ",\n")+"]\n")
}

func (k *soak) publishAll() {
	k.t.Helper()
	k.ok("publish", "dyn", k.published(func(int) bool { return true }, func(int) bool { return false }))
}

// untilUp waits for every path of the usual configuration to serve.
func (k *soak) untilUp() {
	k.t.Helper()
	var lacking string
	eventually(k.t, "all paths are up", func() bool {
		lacking = ""
		states := k.paths()
		for _, p := range slices.Concat(k.out, k.dyn) {
			if s := states[p.escaper+"/"+p.id]; s.State != "up" || s.Reason != "" {
				lacking += fmt.Sprintf("%s/%s %s %q; ", p.escaper, p.id, s.State, s.Reason)
			}
		}
		return lacking == ""
	}, &lacking)
}
