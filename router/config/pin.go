package config

import (
	"path"
	"reflect"
	"slices"
	"strings"
)

// Pin holds the processes of a cgroup to a path.
type Pin struct {
	// Cgroup is absolute, below the cgroup v2 mount, and clean.
	Cgroup string `key:"cgroup" type:"cgroup" required:"yes" meaning:"The cgroup, as /proc/PID/cgroup names it (/system.slice/backup.service), with all below it. It need not be there yet."`
	// Path is that of a node that exists.
	Path string `key:"path" type:"path" required:"yes" meaning:"The path that its processes leave by, ESCAPER/ID; loopback addresses stay within reach."`
}

// CleanCgroup is the one spelling of a cgroup's path, or else bad says what is wrong with it.
func CleanCgroup(s string) (clean, bad string) {
	switch {
	case !strings.HasPrefix(s, "/"):
		return "", "want a path below the cgroup v2 mount that begins with /"
	case strings.Contains(s, "\x00"):
		return "", "holds a zero byte"
	case len(s) > 4000: // PATH_MAX, less the mount
		return "", "is over 4000 bytes"
	case slices.Contains(strings.Split(s, "/"), ".."):
		return "", "must not hold .."
	}
	if s = path.Clean(s); s == "/" {
		return "", "is every process of the host, wayout among them"
	}
	return s, ""
}

func (d *decoder) cgroup(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	clean, bad := CleanCgroup(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetString(clean)
}

// Nested says whether of two cgroups one is the other or holds it.
func Nested(a, b string) bool {
	return a == b || strings.HasPrefix(a, b+"/") || strings.HasPrefix(b, a+"/")
}

// checkPins holds pins to paths that are none, and cgroups that are pinned twice.
func (d *decoder) checkPins(c *Config, escapers map[string]*Escaper) {
	for i := range c.Pins {
		pin := &c.Pins[i]
		p := d.places[pin]
		if !c.Accounting && i == 0 {
			d.fail(p, "pins need the eBPF programs that accounting: off does without")
		}
		d.checkPinPath(d.find(p, "path"), pin.Path, escapers)
		at := d.find(p, "cgroup")
		if pin.Cgroup == "" || at == nil {
			continue // said already
		}
		for j := range c.Pins[:i] {
			other := &c.Pins[j]
			if other.Cgroup == "" || !Nested(pin.Cgroup, other.Cgroup) {
				continue
			}
			line := d.find(d.places[other], "cgroup").node.Line
			if pin.Cgroup == other.Cgroup {
				d.fail(at, "is pinned already, see line %d", line)
			} else {
				d.fail(at, "and %s (line %d): a process in both would be pinned twice", other.Cgroup, line)
			}
			break
		}
	}
}

func (d *decoder) checkPinPath(at *place, name string, escapers map[string]*Escaper) {
	escaper, id, ok := strings.Cut(name, "/")
	if at == nil || !ok {
		return // said already
	}
	e := escapers[escaper]
	if e == nil {
		d.fail(at, "no escaper has the name %s", escaper)
		return
	}
	if strings.HasPrefix(e.Type, "proxy_") || strings.HasPrefix(e.Type, "route_") {
		d.fail(at, "escaper %s is a %s: processes are held to an address of this host", escaper, e.Type)
		return
	}
	if slices.ContainsFunc(e.Nodes, func(n Node) bool { return n.ID == id && (n.Net4.IsValid() || n.Net6.IsValid()) }) {
		d.fail(at, "is a whole prefix: processes are held to a single address, so give it a node of its own")
		return
	}
	if b := d.builders[e]; b == nil || b.broken || slices.ContainsFunc(e.Nodes, func(n Node) bool { return n.ID == id }) {
		return // of an escaper that could not be read whole nothing is said
	}
	d.fail(at, "no node of escaper %s has the ID %s", escaper, id)
}
