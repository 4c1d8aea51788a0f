package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"

	"wayout/router/control"
)

// terminal feeds a model as a terminal would.
type terminal struct {
	t *testing.T
	*model
	drains []string
	fail   error
	quit   bool
	pause  bool
}

func newTerminal(t *testing.T) *terminal {
	x := &terminal{t: t}
	x.model = newModel(order{byName, false}, "", func(path string, on bool) error {
		x.drains = append(x.drains, fmt.Sprint(path, " ", on))
		return x.fail
	})
	return x
}

// send gives it a message, and what the command that comes of it says.
func (x *terminal) send(msg tea.Msg) {
	x.t.Helper()
	_, cmd := x.Update(msg)
	if cmd == nil {
		return
	}
	switch msg := cmd().(type) {
	case tea.QuitMsg:
		x.quit = true
	case tea.SuspendMsg:
		x.pause = true
	default:
		x.send(msg)
	}
}

// keys presses them: a name in <>, else each character.
func (x *terminal) keys(text string) {
	x.t.Helper()
	special := map[string]tea.KeyPressMsg{
		"up": {Code: tea.KeyUp}, "down": {Code: tea.KeyDown}, "pgup": {Code: tea.KeyPgUp}, "pgdown": {Code: tea.KeyPgDown}, "home": {Code: tea.KeyHome}, "end": {Code: tea.KeyEnd},
		"left": {Code: tea.KeyLeft}, "right": {Code: tea.KeyRight}, "enter": {Code: tea.KeyEnter}, "esc": {Code: tea.KeyEscape}, "bs": {Code: tea.KeyBackspace},
		"space": {Code: tea.KeySpace, Text: " "}, "^c": {Code: 'c', Mod: tea.ModCtrl}, "^z": {Code: 'z', Mod: tea.ModCtrl}, "^u": {Code: 'u', Mod: tea.ModCtrl},
	}
	for text != "" {
		if name, rest, ok := strings.Cut(strings.TrimPrefix(text, "["), "]"); ok && text[0] == '[' {
			k, known := special[name]
			if !known {
				x.t.Fatalf("no key %q", name)
			}
			x.send(k)
			text = rest
			continue
		}
		r, n := utf8.DecodeRuneInString(text)
		x.send(tea.KeyPressMsg{Code: r, Text: string(r)})
		text = text[n:]
	}
}

// shows is what the view holds.
func (x *terminal) shows() string { return bare(strings.Split(x.View().Content, "\n")) }

func (x *terminal) want(words ...string) {
	x.t.Helper()
	text := x.shows()
	for _, w := range words {
		if !strings.Contains(text, w) {
			x.t.Errorf("no %q in\n%s", w, text)
		}
	}
}

func (x *terminal) paths(at time.Duration, p control.Paths) {
	x.send(update{at: noon.Add(at), paths: p})
}

func TestModelMoves(t *testing.T) {
	x := newTerminal(t)
	x.want("0 paths", "no paths")
	x.keys("d[up][down][end]y") // nothing to be moved or drained
	x.send(tea.WindowSizeMsg{Width: 100, Height: 16})
	x.paths(0, many(400))
	for _, tt := range []struct {
		keys   string
		cursor int
		offset int
	}{
		{"", 0, 0},
		{"[down]", 1, 0},
		{"jj", 3, 0},
		{"[up]k", 1, 0},
		{"[pgdown]", 11, 2},
		{"[pgup]", 1, 1},
		{"[end]", 399, 390},
		{"[down]", 399, 390},
		{"[home]", 0, 0},
		{"[up]", 0, 0},
		{"G", 399, 390},
		{"g", 0, 0},
	} {
		x.keys(tt.keys)
		if x.cursor != tt.cursor || x.offset != tt.offset {
			t.Errorf("%s: at %d, from %d; want %d, %d", tt.keys, x.cursor, x.offset, tt.cursor, tt.offset)
		}
		x.want(fmt.Sprintf("rows %d to %d of 400", tt.offset+1, tt.offset+10), fmt.Sprintf("out/p%d ", tt.cursor))
	}
	// A smaller terminal still shows the cursor, a larger one has no empty rows.
	x.keys("G")
	x.send(tea.WindowSizeMsg{Width: 80, Height: 8})
	x.want("out/p399 ", "rows 399 to 400")
	x.send(tea.WindowSizeMsg{Width: 80, Height: 46})
	x.want("rows 361 to 400", "q quit")
}

// TestModelCursorStays: sorted anew, filtered or with new paths, the cursor is
// where it was.
func TestModelCursorStays(t *testing.T) {
	x := newTerminal(t)
	x.paths(0, many(50))
	// Until it is moved it stays at the top, whatever is there.
	x.keys("r")
	if x.cursor != 0 || x.path != "out/p49" {
		t.Errorf("before it was moved: at %d, %s", x.cursor, x.path)
	}
	x.keys("r[down][down][down]")
	for i, keys := range []string{"r", "i", "i", "o", "c", "t", "x", "f", "s", "n", "[left]", "[right]", "<", ">", "/p3[enter]", "[esc]"} {
		x.keys(keys)
		x.paths(time.Duration(i+1)*time.Second, many(50+i))
		if r := x.current(); r == nil || r.Path.Path != "out/p3" || x.cursor < x.offset || x.cursor >= x.offset+x.body() {
			t.Errorf("after %s: at %d, from %d", keys, x.cursor, x.offset)
		}
	}
	// Its path goes: the line stays.
	x.keys("n")
	if x.order.down {
		x.keys("n")
	}
	p := many(50)
	p.Paths = slices.Delete(p.Paths, 3, 4)
	x.paths(time.Minute, p)
	if r := x.current(); r.Path.Path != "out/p4" {
		t.Errorf("on %s", r.Path.Path)
	}
	x.keys("/nothing[enter]")
	if x.current() != nil {
		t.Error("a row where there is none")
	}
	x.keys("[esc]")
	if x.current() == nil {
		t.Error("no row where there are some")
	}
}

func TestModelSort(t *testing.T) {
	x := newTerminal(t)
	x.paths(0, many(10))
	for _, tt := range []struct {
		keys string
		want order
	}{
		{"i", order{byIn, true}},
		{"i", order{byIn, false}},
		{"r", order{byIn, true}},
		{"n", order{byName, false}},
		{"[left]", order{byFailures, true}},
		{"[right]", order{byName, false}},
		{">", order{byState, false}},
		{">", order{byIn, true}},
		{"o", order{byOut, true}},
		{"c", order{byConnections, true}},
		{"t", order{byRTT, true}},
		{"x", order{byRetransmits, true}},
		{"f", order{byFailures, true}},
		{"s", order{byState, false}},
		{"z", order{byState, false}},
	} {
		x.keys(tt.keys)
		if x.order != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.keys, x.order, tt.want)
		}
		x.want("sorted by " + tt.want.by.String())
	}
}

func TestModelFilter(t *testing.T) {
	x := newTerminal(t)
	x.paths(0, many(30))
	x.keys("/p2")
	x.want("filter: p2_", `filter "p2": 11 of 30`)
	x.keys("q5[bs][bs]") // letters are letters now
	if x.quit || x.filter != "p2" {
		t.Fatalf("%q, quit %v", x.filter, x.quit)
	}
	x.keys("[enter]")
	x.want("q quit", "11 of 30")
	x.keys("/9[esc]")
	if x.filter != "p2" {
		t.Errorf("Esc leaves %q", x.filter)
	}
	x.keys("/[^u]p7[enter]")
	x.want(`filter "p7": 1 of 30`)
	x.keys("/")
	x.send(tea.PasteMsg{Content: " out\x1b[2J\n"})
	if x.filter != "p7 out[2J" {
		t.Errorf("pasted: %q", x.filter)
	}
	x.keys("[^u][bs][enter]")
	if x.filter != "" || len(x.shown) != 30 {
		t.Errorf("%q, %d rows", x.filter, len(x.shown))
	}
	x.send(tea.PasteMsg{Content: "dy"}) // not asked for
	if x.filter != "" || len(x.drains) > 0 {
		t.Errorf("%q %q", x.filter, x.drains)
	}
}

func TestModelDrain(t *testing.T) {
	x := newTerminal(t)
	x.paths(0, many(5))
	for _, no := range []string{"n", "[esc]", "[enter]", "q", "d"} {
		x.keys("[down]d")
		x.want("drain " + x.path + ": no new connections on it? y/n")
		x.keys(no)
		x.want("q quit")
	}
	if len(x.drains) > 0 || x.quit {
		t.Fatalf("without a yes: %q, quit %v", x.drains, x.quit)
	}
	// What was asked about is done, wherever the cursor is by then.
	x.keys("gd")
	p := many(5)
	p.Paths = p.Paths[1:]
	x.paths(time.Second, p)
	x.keys("y")
	x.want("out/p0 is draining")
	p = many(5)
	p.Paths[1].State = "draining"
	x.paths(2*time.Second, p)
	x.keys("g[down]d")
	x.want("undrain out/p1: new connections on it again? y/n")
	x.keys("Y")
	x.want("out/p1 is not draining")
	x.fail = errors.New("no such path")
	x.keys("gdy")
	x.want("drain out/p0: no such path")
	x.keys("j")
	x.want("q quit")
	x.keys("dy")
	x.want("undrain out/p1: no such path")
	if want := []string{"out/p0 true", "out/p1 false", "out/p0 true", "out/p1 false"}; !slices.Equal(x.drains, want) {
		t.Errorf("%q", x.drains)
	}
}

func TestModelPause(t *testing.T) {
	x := newTerminal(t)
	p := many(10)
	first := func(n int) control.Paths { return control.Paths{Paths: p.Paths[:n]} }
	x.paths(0, first(3))
	x.keys("[space]")
	x.want("PAUSED", "3 paths")
	x.paths(time.Second, first(4))
	x.want("PAUSED", "3 paths")
	x.keys("p")
	x.paths(2*time.Second, first(5))
	x.want("5 paths", "in 0 out 0") // the interval is the last second, not all of the pause
	if strings.Contains(x.shows(), "PAUSED") || x.total.rates.Interval != 1 {
		t.Errorf("%+v\n%s", x.total.rates, x.shows())
	}
}

func TestModelDaemonGone(t *testing.T) {
	x := newTerminal(t)
	x.paths(0, control.Paths{Paths: []control.Path{pathWith("out/a", 1000)}})
	x.paths(time.Second, control.Paths{Paths: []control.Path{pathWith("out/a", 2000)}})
	x.want("8.00M")
	x.send(update{at: noon.Add(2 * time.Second), err: errors.New("control socket /x does not answer")})
	x.want("NO DAEMON, trying again", "/x does not answer", "out/a")
	// Another daemon's counters are not compared with the old one's.
	x.paths(3*time.Second, control.Paths{Paths: []control.Path{pathWith("out/a", 5000)}})
	x.want("rates after the first interval")
	if text := x.shows(); strings.Contains(text, "NO DAEMON") {
		t.Error(text)
	}
	x.paths(4*time.Second, control.Paths{Paths: []control.Path{pathWith("out/a", 6000)}})
	x.want("8.00M")
}

func TestModelEnds(t *testing.T) {
	for _, before := range []string{"", "/", "d", "?"} {
		x := newTerminal(t)
		x.paths(0, many(3))
		x.keys(before + "[^z]")
		if !x.pause {
			t.Errorf("%q and ctrl+z do nothing", before)
		}
		if x.keys("[^c]"); !x.quit {
			t.Errorf("%q and ctrl+c do nothing", before)
		}
	}
	x := newTerminal(t)
	x.keys("?")
	x.want("sort by name, state", "Any key goes back")
	if x.keys("q"); x.quit || x.help {
		t.Error("q ends more than the help")
	}
	if x.keys("q"); !x.quit {
		t.Error("q does nothing")
	}
	if !x.View().AltScreen {
		t.Error("it scribbles over what was on the terminal")
	}
}

// TestFeed: a flood of changes gives four snapshots a second and the newest
// last; an end gives a word and a new attempt.
func TestFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		gone := errors.New("gone")
		calls := 0
		watch := func(ctx context.Context, f func(control.Paths) error) error {
			calls++
			switch calls {
			case 1: // 1000 changes in a second, then quiet
				for i := range 1000 {
					if err := f(control.Paths{Version: i}); err != nil {
						return err
					}
					time.Sleep(time.Millisecond)
				}
				time.Sleep(time.Second)
				return nil
			case 2:
				return gone
			case 3:
				if err := f(control.Paths{Version: 5000}); err != nil {
					return err
				}
			}
			<-ctx.Done()
			return ctx.Err()
		}
		var got []update
		ended := make(chan struct{})
		go func() {
			feed(ctx, watch, func(u update) { got = append(got, u) })
			close(ended)
		}()
		time.Sleep(10 * time.Second)
		cancel()
		<-ended
		var text []string
		for _, u := range got {
			if u.err != nil {
				text = append(text, u.err.Error())
			} else {
				text = append(text, fmt.Sprint(u.paths.Version))
			}
		}
		if n := len(text); n < 7 || n > 9 || text[0] != "0" {
			t.Fatalf("%q", text)
		}
		if want := []string{"999", errStopped.Error(), "gone", "5000"}; !slices.Equal(text[len(text)-4:], want) {
			t.Errorf("%q", text)
		}
		synctest.Wait()
	})
}
