package resolve_test

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"wayout/router/resolve"
	"wayout/selection"

	"github.com/miekg/dns"
)

func files(t *testing.T, o *resolve.Options) (resolv, hosts string) {
	t.Helper()
	dir := t.TempDir()
	o.ResolvConf, o.Hosts = filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "hosts")
	return o.ResolvConf, o.Hosts
}

func TestFilesChange(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{
		"192.0.2.1": zone{records: []string{"www.test. 60 A 192.0.2.10"}},
		"192.0.2.2": zone{records: []string{"www.test. 60 A 192.0.2.20"}},
		"127.0.0.1": zone{records: []string{"www.test. 60 A 192.0.2.30"}},
	})
	var log bytes.Buffer
	var resolv, hosts string
	r := n.resolver("", func(o *resolve.Options) {
		resolv, hosts = files(t, o)
		o.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	is := func(step, host, addr string) {
		t.Helper()
		equal(t, step, lookup(t, r, host, selection.V4), resolve.Answer{V4: addrs(addr)})
	}
	is("no files: a server on this host", "www.test", "192.0.2.30")

	write(t, resolv, "nameserver 192.0.2.1\n")
	is("not looked at", "www.test", "192.0.2.30")
	r.Reload()
	is("other server, empty cache", "www.test", "192.0.2.10")

	write(t, resolv, "nameserver 192.0.2.2\n") // same size, and most likely the same tick of the clock
	r.Reload()
	is("the same size", "www.test", "192.0.2.20")

	write(t, hosts, "10.0.0.1 www.test\n")
	r.Reload()
	is("hosts first", "www.test", "10.0.0.1")
	write(t, hosts, "10.0.0.2 www.test\n")
	r.Reload()
	is("hosts changed", "www.test", "10.0.0.2")

	// Replaced by renaming, with its time of change set back: another inode.
	next := write(t, hosts+".new", "10.0.0.3 www.test\n")
	old := time.Now().Add(-time.Hour)
	if err := errors.Join(os.Chtimes(next, old, old), os.Rename(next, hosts)); err != nil {
		t.Fatal(err)
	}
	r.Reload()
	is("hosts renamed", "www.test", "10.0.0.3")
	if err := os.Remove(hosts); err != nil {
		t.Fatal(err)
	}
	n.asked(false)
	r.Reload()
	is("hosts gone", "www.test", "192.0.2.20")
	equal(t, "asked, though the servers are the same", len(n.asked(false)), 0)

	// A file that cannot be read (a link to itself) changes nothing, and is logged once.
	if err := errors.Join(os.Remove(resolv), os.Symlink("resolv.conf", resolv)); err != nil {
		t.Fatal(err)
	}
	r.Reload()
	r.Reload()
	is("unreadable", "www.test", "192.0.2.20")
	equal(t, "times logged", strings.Count(log.String(), "cannot be read"), 1)
	equal(t, "asked with the servers of before", len(n.asked(false)), 0)

	// What is no file holds nothing.
	if err := errors.Join(os.Remove(resolv), os.Mkdir(resolv, 0o700)); err != nil {
		t.Fatal(err)
	}
	r.Reload()
	is("a folder", "www.test", "192.0.2.30")
}

// Unreadable from the start is as missing, and read when it can be.
func TestFileUnreadableAtStart(t *testing.T) {
	n := newNetwork(t, map[string]dns.Handler{"127.0.0.1": good(), "192.0.2.1": zone{records: []string{"www.test. 60 A 192.0.2.99"}}})
	var resolv string
	r := n.resolver("", func(o *resolve.Options) {
		resolv, _ = files(t, o)
		if err := os.Symlink("resolv.conf", resolv); err != nil {
			t.Fatal(err)
		}
	})
	equal(t, "answer", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.10")})
	if err := os.Remove(resolv); err != nil {
		t.Fatal(err)
	}
	write(t, resolv, one)
	r.Reload()
	equal(t, "answer", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("192.0.2.99")})
}

// Without anybody's asking, a change is seen within Refresh.
func TestWatch(t *testing.T) {
	n := newNetwork(t, nil)
	var hosts string
	changed := make(chan struct{}, 16)
	r := n.resolver("", func(o *resolve.Options) {
		var resolv string
		resolv, hosts = files(t, o)
		write(t, resolv, one)
		write(t, hosts, "10.0.0.1 www.test\n")
		o.Refresh = time.Millisecond
		o.Log = slog.New(slog.NewTextHandler(signal(changed), nil))
	})
	equal(t, "before", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("10.0.0.1")})
	<-changed // the first reading's line
	write(t, hosts, "10.0.0.2 www.test\n")
	write(t, filepath.Join(filepath.Dir(hosts), "resolv.conf"), two)
	<-changed  // of the reading that saw resolv.conf, and then hosts
	r.Reload() // waits for that reading
	equal(t, "after", lookup(t, r, "www.test", selection.V4), resolve.Answer{V4: addrs("10.0.0.2")})
}

// signal is a writer that says that something was written.
type signal chan struct{}

func (s signal) Write(b []byte) (int, error) {
	select {
	case s <- struct{}{}:
	default:
	}
	return len(b), nil
}
