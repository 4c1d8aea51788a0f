package main_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"wayout/router/control"
	"wayout/scripts/lab"
)

// sessionConfig has the paths that are named, of the world's eight, and the
// team, whose sessions are its users' own.
func sessionConfig(t *testing.T, hash string, which ...int) string {
	t.Helper()
	config, _, _ := strings.Cut(nodes(which...), "server:")
	return config + fmt.Sprintf(`user_group:
  - name: team
    users:
      - {name: alice, password: %[1]q}
      - {name: bob, password: %[1]q}
`, hash) + fronts(selects+"user_group: team, username_params: true, escaper: out")
}

// pathOf gives the number of the path whose address of either family it is.
func pathOf(a netip.Addr) int {
	return 1 + max(slices.Index(lab.Egress4(), a), slices.Index(lab.Egress6(), a))
}

// session asks within a session and gives the number of the path that it took.
func (s *scene) session(p protocol, user string, six bool) int {
	s.t.Helper()
	got, err := s.say(p, said{user: user, password: "secret", six: six})
	if err != nil || got.answer != "ok" || got.source.Addr().Is6() != six {
		s.t.Fatalf("%s, %s: %s, %v", user, p, got, err)
	}
	return pathOf(got.source.Addr())
}

// TestSessionsStay: a session has one path, in every protocol and family, after
// a reload and in another process.
func TestSessionsStay(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	h := hashOf(t, "secret")
	all := []int{1, 2, 3, 4, 5, 6, 7, 8}
	s.start(sessionConfig(t, h, all...))
	const sessions = 24
	user := func(i int) string {
		return fmt.Sprintf("alice-%s-job%d", []string{"session", "sessid", "sid", "sessionid"}[i%4], i)
	}
	first, used := make([]int, sessions), map[int]bool{}
	for i := range first {
		first[i] = s.session(forward, user(i), false)
		used[first[i]] = true
	}
	if len(used) < 4 {
		t.Errorf("%d sessions have only the paths %v", sessions, used)
	}
	stays := func(when string) {
		t.Helper()
		for i, want := range first {
			p := protocols()[i%4]
			if path := s.session(p, user(i), i%3 == 0); path != want {
				t.Errorf("%s: session %d took p%d by %s, and p%d before", when, i, path, p, want)
			}
		}
	}
	stays("again")
	for i := range 4 {
		for _, p := range protocols() {
			for _, six := range []bool{false, true} {
				if path := s.session(p, user(i), six); path != first[i] {
					t.Errorf("session %d took p%d by %s (IPv6 %v), and p%d before", i, path, p, six, first[i])
				}
			}
		}
	}
	s.reload(sessionConfig(t, h, all...))
	stays("after a reload")
	// The order of the nodes is none of a session's concern.
	s.reload(sessionConfig(t, h, 5, 1, 8, 3, 2, 7, 6, 4))
	stays("in another order")
	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	s.start(sessionConfig(t, h, all...))
	stays("of another process")

	// Another user's session of the same name is another session.
	same := 0
	for i := range first {
		if s.session(connect, fmt.Sprintf("bob-session-job%d", i), false) == first[i] {
			same++
		}
	}
	if same > sessions/2 {
		t.Errorf("%d of %d sessions have the path of another user's of the same name", same, sessions)
	}
}

// TestSessionsMoveNoMoreThanTheyMust drains one of eight paths: its sessions
// move, or fail where they are strict, all others stay, and all come back.
func TestSessionsMoveNoMoreThanTheyMust(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.serveDatagrams(t)
	s.start(sessionConfig(t, hashOf(t, "secret"), 1, 2, 3, 4, 5, 6, 7, 8))
	const sessions = 64
	user := func(i int) string { return fmt.Sprintf("alice-session-%d", i) }
	ask := func() []int {
		all := make([]int, sessions)
		for i := range all {
			all[i] = s.session([]protocol{forward, connect}[i%2], user(i), i%4 > 1)
		}
		return all
	}
	before := ask()
	gone := before[0]
	path := fmt.Sprint("out/p", gone)
	if _, errs, code := s.command("drain", path, "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	moved, to := 0, map[int]bool{}
	for i, now := range ask() {
		switch {
		case now == gone:
			t.Errorf("session %d takes a draining path", i)
		case before[i] == gone:
			moved++
			to[now] = true
		case now != before[i]:
			t.Errorf("session %d has moved from p%d to p%d, and p%d has gone", i, before[i], now, gone)
		}
	}
	// An eighth of 64 is 8, give or take what hashing does.
	if moved == 0 || moved > sessions*3/8 || moved > 3 && len(to) < 2 {
		t.Errorf("%d of %d sessions have moved, to %v", moved, sessions, to)
	}
	for _, p := range protocols() {
		for i := range 12 {
			got, err := s.say(p, said{user: user(i) + "-strict-on", password: "secret"})
			if err != nil {
				t.Fatal(err)
			}
			want := "ok"
			if before[i] == gone {
				want = map[bool]string{true: "503", false: "reply 0x01"}[p == forward || p == tunnel]
			}
			if got.answer != want || want == "ok" && pathOf(got.source.Addr()) != before[i] {
				t.Errorf("%s, strict session %d: %s, want %s (p%d has gone, it had p%d)", p, i, got, want, gone, before[i])
			}
			if got.answer == "503" && (got.header.Get("Retry-After") != "1" || got.kind != "destination_unavailable") {
				t.Errorf("%s: %v", p, got.header)
			}
			if off := s.session(p, user(i)+"-strict-off", false); off == gone {
				t.Errorf("%s: session %d takes a draining path", p, i)
			}
		}
	}
	if _, errs, code := s.command("undrain", path, "--config", s.config); code != 0 {
		t.Fatal(errs)
	}
	if after := ask(); !slices.Equal(after, before) {
		t.Errorf("with all paths back the sessions have\n%v, and had\n%v", after, before)
	}

	// One family of a path: strict sessions fail in that family alone.
	a := lab.Egress4()[gone-1]
	link := []string{"eth0", "eth1"}[(gone-1)/4]
	if err := s.Host.DelAddr(link, lab.EgressPrefix(a)); err != nil {
		t.Fatal(err)
	}
	s.until(path, func(p control.Path) bool { return strings.Contains(p.Reason, a.String()) })
	if got, err := s.say(connect, said{user: user(0) + "-strict-on", password: "secret"}); err != nil || got.answer != "reply 0x01" {
		t.Errorf("a strict session whose address has gone: %s, %v", got, err)
	}
	if now := s.session(connect, user(0)+"-strict-on", true); now != gone {
		t.Errorf("IPv6 of the strict session moved to p%d", now)
	}
}

// TestSessionLifetime: a session keeps its path for its lifetime, and then has
// another sooner or later; all protocols see the same.
func TestSessionLifetime(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	s.start(sessionConfig(t, hashOf(t, "secret"), 1, 2, 3, 4, 5, 6, 7, 8))
	for _, how := range []string{"lifetime-1s", "sesstime-1s", "sessionlength-1"} {
		const lifetime = time.Second
		user := "alice-session-" + strings.ReplaceAll(how, "-", ".") + "-" + how
		long := "alice-session-long-lifetime-10"
		stays := s.session(forward, long, false)
		begun := time.Now()
		path := s.session(forward, user, false)
		eventually(t, how+": the session has another path", func() bool {
			now := s.session([]protocol{connect, tunnel}[time.Now().UnixNano()%2], user, false)
			if now == path {
				return false
			}
			if age := time.Since(begun); age < lifetime {
				t.Errorf("%s: another path after %v", how, age)
			}
			return true
		})
		if s.session(forward, long, false) != stays && time.Since(begun) < 10*time.Minute {
			t.Errorf("the long session has moved")
		}
	}
}
