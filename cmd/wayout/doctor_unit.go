package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"wayout/router/config"
)

// unitName is what the service is called when it is installed as shipped.
const unitName = "wayout.service"

// unitDirs are where units are looked for, the strongest first
// (systemd.unit(5)).
func unitDirs() []string {
	return []string{"etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"}
}

// unit is the section [Service] of a unit with its drop-ins: the values of
// each key in the order in which they stand; an empty one takes back all that
// stood before it.
type unit map[string][]string

// readUnit reads the unit below root. It is nil without one.
func readUnit(root string) (unit, string, error) {
	main := ""
	dropins := map[string]string{} // by name: the same name in a stronger place wins
	for _, dir := range unitDirs() {
		file := filepath.Join(root, dir, unitName)
		if _, err := os.Stat(file); err == nil && main == "" {
			main = file
		}
		more, err := filepath.Glob(filepath.Join(root, dir, unitName+".d", "*.conf"))
		if err != nil {
			return nil, "", err
		}
		for _, m := range more {
			if _, ok := dropins[filepath.Base(m)]; !ok {
				dropins[filepath.Base(m)] = m
			}
		}
	}
	if main == "" {
		return nil, "", nil
	}
	names := make([]string, 0, len(dropins))
	for n := range dropins {
		names = append(names, n)
	}
	slices.Sort(names)
	files := []string{main}
	for _, n := range names {
		files = append(files, dropins[n])
	}
	u := unit{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, "", fmt.Errorf("read the unit: %w", err)
		}
		u.parse(string(text))
	}
	return u, main, nil
}

// parse adds what a file says (systemd.syntax(7)).
func (u unit) parse(text string) {
	section, held := "", ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line != "" && (line[0] == '#' || line[0] == ';') {
			continue // within a continued line too
		}
		if rest, more := strings.CutSuffix(line, `\`); more {
			held += rest + " "
			continue
		}
		line, held = held+line, ""
		if strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]") {
			section = line
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || section != "[Service]" {
			continue
		}
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if value == "" {
			u[key] = nil
			continue
		}
		u[key] = append(u[key], value)
	}
}

// last is the value of a key that has one.
func (u unit) last(key string) string {
	if v := u[key]; len(v) > 0 {
		return v[len(v)-1]
	}
	return ""
}

// words are all words of a key that is a list.
func (u unit) words(key string) []string { return strings.Fields(strings.Join(u[key], " ")) }

// yes says whether a switch is on.
func (u unit) yes(key string) bool {
	return slices.Contains([]string{"yes", "true", "on", "1"}, strings.ToLower(u.last(key)))
}

// allows says whether a list lets a word through: an absent one lets all, and
// one that begins with ~ all but its words.
func (u unit) allows(key, word string) bool {
	w := u.words(key)
	if len(w) == 0 {
		return true
	}
	if rest, inverted := strings.CutPrefix(w[0], "~"); inverted {
		return rest != word && !slices.Contains(w[1:], word)
	}
	return slices.Contains(w, word)
}

// long is longer than any timeout.
const long = 10000 * time.Hour

// span reads a time span of seconds, or of numbers with units; ok is false for
// infinity and for what is none (systemd.time(7)).
func span(text string) (d time.Duration, ok bool) {
	if text == "" {
		return 0, false
	}
	units := map[string]time.Duration{
		"": time.Second, "s": time.Second, "sec": time.Second, "second": time.Second, "seconds": time.Second,
		"ms": time.Millisecond, "msec": time.Millisecond,
		"m": time.Minute, "min": time.Minute, "minute": time.Minute, "minutes": time.Minute,
		"h": time.Hour, "hr": time.Hour, "hour": time.Hour, "hours": time.Hour,
	}
	for text = strings.TrimSpace(text); text != ""; text = strings.TrimLeft(text, " ") {
		number := digits(text)
		n, err := strconv.ParseInt(number, 10, 32)
		if err != nil {
			return 0, false
		}
		text = strings.TrimLeft(text[len(number):], " ")
		word := text
		if i := strings.IndexAny(text, " 0123456789"); i >= 0 {
			word = text[:i]
		}
		unit, known := units[word]
		if !known || d > long || time.Duration(n) > long/unit {
			return 0, false // as good as infinity
		}
		text = text[len(word):]
		d += time.Duration(n) * unit
	}
	return d, d >= 0
}

// hardLimit reads the second of SOFT:HARD, or the only one; -1 is infinity.
func hardLimit(text string) (int64, error) {
	_, hard, two := strings.Cut(text, ":")
	if !two {
		hard = text
	}
	if hard == "infinity" {
		return -1, nil
	}
	return strconv.ParseInt(hard, 10, 64)
}

// stopTimeout is what systemd waits after SIGTERM unless the unit says
// otherwise (DefaultTimeoutStopSec=).
const stopTimeout = 90 * time.Second

// examineUnit looks at the unit of the service below root: what it takes away
// from the daemon that this process may have. Without a unit there is nothing
// to say.
func examineUnit(root string, c *config.Config) ([]finding, error) {
	u, file, err := readUnit(root)
	if errors.Is(err, fs.ErrPermission) {
		return []finding{{Name: "systemd unit", Level: levelNote, Found: "cannot be read: " + err.Error()}}, nil
	}
	if u == nil || err != nil {
		return nil, err
	}
	all := u.examine(c)
	if len(all) == 0 {
		all = []finding{{Name: "systemd unit", Level: levelOK, Found: file}}
	}
	return all, nil
}

func (u unit) examine(c *config.Config) []finding {
	var all []finding
	say := func(level, found, means, remedy string) {
		all = append(all, finding{
			Name: "systemd unit", Level: level, Found: found, Means: means,
			Remedy: "systemctl edit " + unitName + ", and below [Service]: " + remedy,
		})
	}
	if text := u.last("LimitNOFILE"); text != "" {
		if n, err := hardLimit(text); err != nil || n >= 0 && n < enoughFiles {
			say(levelWarning, "LimitNOFILE="+text, "each tunnel takes two files", "LimitNOFILE=1048576")
		}
	}
	if n, err := strconv.Atoi(u.last("TasksMax")); err == nil && n < 256 {
		say(levelWarning, fmt.Sprintf("TasksMax=%d", n), "the daemon ends when it cannot start a thread", "TasksMax=4096")
	}
	wait, bounded := stopTimeout, true
	if text := u.last("TimeoutStopSec"); text != "" {
		wait, bounded = span(text)
	}
	if bounded && wait > 0 && wait <= c.DrainTimeout {
		say(levelWarning, fmt.Sprintf("it is killed %v after SIGTERM, and drain_timeout is %v", wait, c.DrainTimeout),
			"open connections are cut, and rules, routes and addresses stay in the kernel", fmt.Sprintf("TimeoutStopSec=%d", int((c.DrainTimeout+10*time.Second).Seconds())))
	}
	u.examineRights(c, say)
	// Else than most switches it may be a list of controllers too.
	if d := u.last("Delegate"); c.Accounting && slices.Contains([]string{"", "no", "false", "off", "0"}, strings.ToLower(d)) {
		say(levelWarning, "Delegate is off", "systemd may take away the cgroup that wayout makes for its programs", "Delegate=yes")
	}
	if c.Accounting && u.yes("ProtectControlGroups") {
		say(levelBlocker, "ProtectControlGroups="+u.last("ProtectControlGroups"), "wayout cannot make its cgroup", "ProtectControlGroups=no")
	}
	if c.Accounting && u.yes("ProtectKernelTunables") {
		say(levelWarning, "ProtectKernelTunables="+u.last("ProtectKernelTunables"), "/sys is read-only: the guard cannot be pinned, and does not hold while the daemon restarts", "ProtectKernelTunables=no")
	}
	if u.yes("PrivateNetwork") {
		say(levelBlocker, "PrivateNetwork="+u.last("PrivateNetwork"), "the daemon is without the host's interfaces", "PrivateNetwork=no")
	}
	for _, family := range []string{"AF_NETLINK", "AF_UNIX", "AF_INET", "AF_INET6"} {
		if !u.allows("RestrictAddressFamilies", family) {
			say(levelBlocker, "RestrictAddressFamilies= is without "+family, "the daemon cannot open sockets that it needs", "RestrictAddressFamilies=AF_NETLINK AF_UNIX AF_INET AF_INET6")
			break
		}
	}
	return all
}

// examineRights looks at the capabilities that the unit leaves to the daemon.
func (u unit) examineRights(c *config.Config, say func(level, found, means, remedy string)) {
	root := u.last("User") == "" || u.last("User") == "root" || u.last("User") == "0"
	has := func(capability string) bool {
		return u.allows("CapabilityBoundingSet", capability) && (root || len(u["AmbientCapabilities"]) > 0 && u.allows("AmbientCapabilities", capability))
	}
	lacks := func(what, means string) {
		remedy := "CapabilityBoundingSet=" + what
		if !root {
			remedy += " and AmbientCapabilities=" + what
		}
		say(levelBlocker, "the daemon lacks "+what, means, remedy)
	}
	if !has("CAP_NET_ADMIN") {
		lacks("CAP_NET_ADMIN", "it cannot mark sockets, nor change the network")
	}
	if c.Accounting && !has("CAP_BPF") && !has("CAP_SYS_ADMIN") {
		lacks("CAP_BPF", "there are neither counters nor a guard")
	}
	if low := lowPort(procSys, c); low != 0 && !has("CAP_NET_BIND_SERVICE") {
		lacks("CAP_NET_BIND_SERVICE", fmt.Sprintf("it cannot listen on port %d", low))
	}
}
