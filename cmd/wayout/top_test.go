package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"
	"github.com/google/go-cmp/cmp"

	"wayout/router/control"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// pathWith is a path whose counters are all multiples of n.
func pathWith(name string, n uint64) control.Path {
	return control.Path{
		Path: name, State: "up", Since: noon.Add(-time.Minute),
		Bytes: control.InOut{In: 1000 * n, Out: 100 * n}, Packets: control.InOut{In: 10 * n, Out: 20 * n},
		Connections: control.Connections{Made: 5 * n, Failed: 2 * n}, Retransmits: n,
	}
}

func TestRates(t *testing.T) {
	perSecond := func(seconds, n float64) *rates {
		return &rates{Interval: seconds, BitsIn: 8000 * n, BitsOut: 800 * n, Made: 5 * n, Failed: 2 * n, Retransmits: n, PacketsOut: 20 * n, Share: 0.05}
	}
	type step struct {
		after time.Duration // since the step before
		paths []control.Path
		want  []*rates
	}
	for name, steps := range map[string][]step{
		"by the time that went by": {
			{0, []control.Path{pathWith("a", 7)}, []*rates{nil}},
			{2 * time.Second, []control.Path{pathWith("a", 11)}, []*rates{perSecond(2, 2)}},
			{500 * time.Millisecond, []control.Path{pathWith("a", 12)}, []*rates{perSecond(0.5, 2)}},
			{time.Second, []control.Path{pathWith("a", 12)}, []*rates{{Interval: 1}}},
		},
		"too short to tell": {
			{0, []control.Path{pathWith("a", 0)}, []*rates{nil}},
			{time.Millisecond, []control.Path{pathWith("a", 50)}, []*rates{nil}},
			{999 * time.Millisecond, []control.Path{pathWith("a", 100)}, []*rates{perSecond(1, 100)}},
			{time.Millisecond, []control.Path{pathWith("a", 200)}, []*rates{perSecond(1, 100)}},
		},
		"paths come and go": {
			{0, []control.Path{pathWith("a", 0)}, []*rates{nil}},
			{time.Second, []control.Path{pathWith("b", 3), pathWith("a", 1)}, []*rates{nil, perSecond(1, 1)}},
			{time.Second, []control.Path{pathWith("b", 5)}, []*rates{perSecond(1, 2)}},
			{time.Second, []control.Path{pathWith("a", 9), pathWith("b", 5)}, []*rates{nil, {Interval: 1}}},
		},
		"counters that began anew": {
			{0, []control.Path{pathWith("a", 10), pathWith("b", 1)}, []*rates{nil, nil}},
			{time.Second, []control.Path{pathWith("a", 9), pathWith("b", 2)}, []*rates{nil, perSecond(1, 1)}},
			{time.Second, []control.Path{pathWith("a", 10), pathWith("b", 2)}, []*rates{perSecond(1, 1), {Interval: 1}}},
		},
		"a clock that stands still": {
			{0, []control.Path{pathWith("a", 1)}, []*rates{nil}},
			{0, []control.Path{pathWith("a", 2)}, []*rates{nil}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var m meter
			at := noon
			for i, s := range steps {
				at = at.Add(s.after)
				rows := m.add(at, control.Paths{Paths: s.paths})
				var got []*rates
				for j, r := range rows {
					got = append(got, r.Rates)
					if r.Path.Path != s.paths[j].Path {
						t.Errorf("step %d: row %d is %s", i, j, r.Path.Path)
					}
				}
				if d := cmp.Diff(s.want, got); d != "" {
					t.Errorf("step %d: %s", i, d)
				}
			}
		})
	}
}

// TestOneCounterBack: each counter by itself gives away that they began anew.
func TestOneCounterBack(t *testing.T) {
	for i, back := range []func(*control.Path){
		func(p *control.Path) { p.Bytes.In-- },
		func(p *control.Path) { p.Bytes.Out-- },
		func(p *control.Path) { p.Packets.Out-- },
		func(p *control.Path) { p.Connections.Made-- },
		func(p *control.Path) { p.Connections.Failed-- },
		func(p *control.Path) { p.Retransmits-- },
	} {
		now := pathWith("a", 5)
		back(&now)
		if r := ratesOf(pathWith("a", 5), now, time.Second); r != nil {
			t.Errorf("%d: %+v", i, r)
		}
	}
}

func TestTotals(t *testing.T) {
	rows := []row{
		{Path: control.Path{State: "up", Connections: control.Connections{Open: 3}}, Rates: &rates{Interval: 1, BitsIn: 1, BitsOut: 2, Made: 3, Failed: 4, Retransmits: 5, PacketsOut: 50}},
		{Path: control.Path{State: "down", Connections: control.Connections{Open: 4}}},
		{Path: control.Path{State: "up"}, Rates: &rates{Interval: 2, BitsIn: 10, BitsOut: 20, Made: 30, Failed: 40, Retransmits: 5, PacketsOut: 50}},
	}
	want := totals{paths: 3, open: 7, states: map[string]int{"up": 2, "down": 1}, rates: rates{Interval: 2, BitsIn: 11, BitsOut: 22, Made: 33, Failed: 44, Retransmits: 10, PacketsOut: 100, Share: 0.1}}
	if d := cmp.Diff(want, sumUp(rows), cmp.AllowUnexported(totals{})); d != "" {
		t.Error(d)
	}
	if got := sumUp(nil); got.paths != 0 || got.rates != (rates{}) {
		t.Errorf("%+v", got)
	}
}

func names(rows []*row) string {
	var all []string
	for _, r := range rows {
		all = append(all, r.Path.Path)
	}
	return strings.Join(all, " ")
}

func sample() []row {
	text := func(s string) *string { return &s }
	r := func(name, state string, n float64) row {
		return row{
			Path:  control.Path{Path: name, State: state, RTT: control.Quantiles{P50: 1 / (n + 1)}, Connections: control.Connections{Open: int64(n) % 3}, Uplink: text("fra")},
			Rates: &rates{BitsIn: n, BitsOut: -n + 9, Retransmits: math.Mod(n, 2), Failed: math.Mod(n, 4)},
		}
	}
	rows := []row{r("out/p10", "up", 1), r("out/p2", "down", 2), r("dyn/x", "draining", 3), r("out/P1", "expired", 4), r("out/p1", "probing", 5), r("out/p3", "odd", 0)}
	rows[5].Rates = nil
	rows[0].Reason, rows[0].IPv4 = "no carrier", text("198.51.100.10")
	rows[1].IPv6, rows[2].Interface = text("2001:db8::2"), text("eth7")
	return rows
}

func TestChoose(t *testing.T) {
	for _, tt := range []struct {
		o      order
		filter string
		want   string
	}{
		{order{byName, false}, "", "dyn/x out/P1 out/p1 out/p2 out/p3 out/p10"},
		{order{byName, true}, "", "out/p10 out/p3 out/p2 out/p1 out/P1 dyn/x"},
		{order{byState, false}, "", "out/p3 out/p2 out/P1 out/p1 dyn/x out/p10"},
		{order{byIn, true}, "", "out/p1 out/P1 dyn/x out/p2 out/p10 out/p3"},
		{order{byIn, false}, "", "out/p3 out/p10 out/p2 dyn/x out/P1 out/p1"},
		{order{byOut, true}, "", "out/p10 out/p2 dyn/x out/P1 out/p1 out/p3"},
		{order{byConnections, true}, "", "out/p1 out/p2 out/P1 out/p10 dyn/x out/p3"},
		{order{byRTT, true}, "", "out/p3 out/p10 out/p2 dyn/x out/P1 out/p1"},
		{order{byRetransmits, true}, "", "dyn/x out/p1 out/p10 out/P1 out/p2 out/p3"},
		{order{byFailures, true}, "", "dyn/x out/p2 out/p1 out/p10 out/P1 out/p3"},
		{order{byName, false}, "P1", "out/P1 out/p1 out/p10"},
		{order{byName, false}, " out  10 ", "out/p10"},
		{order{byName, false}, "carrier", "out/p10"},
		{order{byName, false}, "down", "out/p2"},
		{order{byName, false}, "2001:DB8", "out/p2"},
		{order{byName, false}, "100.10 up", "out/p10"},
		{order{byName, false}, "eth7", "dyn/x"},
		{order{byName, false}, "fra out/p3", "out/p3"},
		{order{byName, false}, "nothing", ""},
	} {
		if got := names(choose(sample(), tt.filter, tt.o)); got != tt.want {
			t.Errorf("%v %q: got %q, want %q", tt.o, tt.filter, got, tt.want)
		}
	}
}

func TestCompareNames(t *testing.T) {
	sorted := []string{"", "a", "a1", "a1b", "a01", "a2", "a10", "a10/1", "a10/2", "a99999999999999999999998", "a99999999999999999999999", "ab", "b"}
	for i, a := range sorted {
		for j, b := range sorted {
			if got, want := compareNames(a, b), cmpInt(i, j); got != want {
				t.Errorf("%q to %q: %d, want %d", a, b, got, want)
			}
		}
	}
}

func cmpInt(a, b int) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func TestFormats(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.04: "0", 0.05: "0.1", 0.3: "0.3", 1: "1", 9.94: "9.9", 9.96: "10", 42: "42", 999.4: "999", 999.6: "1.00k", 1234: "1.23k", 9994: "9.99k", 9996: "10.0k",
		12345: "12.3k", 99949: "99.9k", 99951: "100k", 123456: "123k", 999600: "1.00M", 1.5e9: "1.50G", 4e11: "400G", 1e13: "10.0T", math.NaN(): "0", -3: "0",
	} {
		if got := quantity(v); got != want {
			t.Errorf("quantity %v: %q, want %q", v, got, want)
		}
	}
	for v, want := range map[float64]string{
		0: "-", 0.00005: "50us", 0.0009994: "999us", 0.0009996: "1.00ms", 0.0123: "12.3ms", 0.25: "250ms", 0.9994: "999ms", 0.9996: "1.00s", 12.5: "12.5s",
	} {
		if got := roundTrip(v); got != want {
			t.Errorf("roundTrip %v: %q, want %q", v, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0%", 0.00001: "0%", 0.0005: "0.05%", 0.00996: "1.0%", 0.123: "12.3%", 0.9996: "100%", 1: "100%"} {
		if got := percent(v); got != want {
			t.Errorf("percent %v: %q, want %q", v, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 3*time.Hour + 2*time.Minute: "3h02m", 72 * time.Hour: "3d"} {
		if got := since(d); got != want {
			t.Errorf("since %v: %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 999999: "999999", 1000000: "1.00M"} {
		if got := whole(n); got != want {
			t.Errorf("whole %d: %q, want %q", n, got, want)
		}
	}
	for _, tt := range []struct {
		width         int
		clip, squeeze string
	}{{20, "out/2001:db8:100::11", "out/2001:db8:100::11"}, {10, "out/2001:~", "out~00::11"}, {1, "~", "~"}, {0, "", ""}} {
		const name = "out/2001:db8:100::11"
		if a, b := clip(name, tt.width), squeeze(name, tt.width); a != tt.clip || b != tt.squeeze {
			t.Errorf("to %d: clip %q, squeeze %q", tt.width, a, b)
		}
	}
	if got := printable("a\x1b[2Jb\nü"); got != "a [2Jb ü" {
		t.Errorf("%q", got)
	}
}

func TestLayout(t *testing.T) {
	for _, tt := range []struct {
		width, longest int
		want           string
	}{
		{80, 9, "PATH16 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6"},
		{80, 40, "PATH16 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6"},
		{79, 9, "PATH16 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 FAIL/s6"},
		{96, 9, "PATH16 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6"},
		{97, 9, "PATH16 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6 REASON16"},
		{97, 20, "PATH20 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6"},
		{160, 20, "PATH20 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6 REASON75"},
		{200, 400, "PATH48 STATE8 IN6 OUT6 OPEN6 NEW/s6 RTT6 RETR/s6 RETR%5 FAIL/s6 REASON87"},
		{40, 9, "PATH16 STATE8 IN6 OUT6"},
		{25, 9, "PATH16 STATE8"},
		{12, 9, "PATH3 STATE8"},
	} {
		var got []string
		for _, f := range layout(tt.width, tt.longest) {
			got = append(got, fmt.Sprint(f.title, f.width))
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%d, %d: got %s", tt.width, tt.longest, s)
		}
	}
}

// bare takes the styles out of a frame.
func bare(lines []string) string {
	text := strings.Join(lines, "\n")
	for _, s := range []string{boldStyle, faintStyle, cursorRow, badStyle, warnStyle, alarmStyle, ""} {
		text = strings.ReplaceAll(text, "\x1b["+s+"m", "")
	}
	return text
}

// TestFrames: whatever the size and the state, no line is wider than the
// screen, there are not more of them than fit, and nothing steers the terminal
// but styles.
func TestFrames(t *testing.T) {
	rows := sample()
	rows[0].Path.Path = "out/" + strings.Repeat("ü", 70)
	rows[0].Reason = strings.Repeat("reason\x1b[2J ", 40)
	for _, change := range []func(*screen){
		func(*screen) {},
		func(s *screen) { s.help = true },
		func(s *screen) { s.filter = "out"; s.prompt = strings.Repeat("prompt ", 40); s.paused = true },
		func(s *screen) { s.lost = strings.Repeat("lost ", 40); s.notice = strings.Repeat("notice ", 40) },
		func(s *screen) { s.filter = "none" },
		func(s *screen) { s.move(100) },
	} {
		for _, size := range [][2]int{{80, 24}, {160, 50}, {60, 10}, {30, 6}, {10, 3}, {1, 1}, {0, 0}} {
			s := screen{width: size[0], height: size[1]}
			s.set(noon, rows)
			change(&s)
			s.arrange()
			lines := s.frame()
			if size[1] > 0 && len(lines) > size[1] {
				t.Errorf("%v: %d lines", size, len(lines))
			}
			text := bare(lines)
			if strings.Contains(text, "\x1b") {
				t.Errorf("%v: %q", size, text)
			}
			if s.help {
				continue // its text is as wide as it is
			}
			for line := range strings.SplitSeq(text, "\n") {
				// The two columns that never go take 10 and their space.
				if utf8.RuneCountInString(line) > max(size[0], 10) {
					t.Errorf("%v: %q", size, line)
				}
			}
		}
	}
}

func TestFrameText(t *testing.T) {
	text := func(s string) *string { return &s }
	var m meter
	paths := func(n uint64) control.Paths {
		a, b := pathWith("out/fra-1", n*1000), pathWith("out/lon-1", 0)
		a.Connections.Open, a.RTT.P50, a.IPv4, a.Uplink, a.Interface = 12, 0.0123, text("198.51.100.11"), text("isp1"), text("eth0")
		b.State, b.Reason = "down", "interface eth1 is down"
		return control.Paths{Paths: []control.Path{b, a}}
	}
	m.add(noon, paths(1))
	s := screen{width: 80, height: 10, order: order{byIn, true}}
	s.set(noon.Add(time.Second), m.add(noon.Add(time.Second), paths(2)))
	want := `wayout  2 paths: 1 up, 1 down
in 8.00M out 800k bit/s open 12 new 5.00k/s failed 2.00k/s resent 1.00k/s 5.0%
sorted by in
PATH             STATE       vIN    OUT   OPEN  NEW/s    RTT RETR/s RETR% FAIL/s
out/fra-1        up        8.00M   800k     12  5.00k 12.3ms  1.00k  5.0%  2.00k
out/lon-1        down          0      0      0      0      -      0     -      0


out/fra-1 up 1m01s; 198.51.100.11; uplink isp1; on eth0
q quit  ? help  / filter  < > sort  r reverse  d drain  space pause`
	got := strings.ReplaceAll(bare(s.frame()), strings.Repeat(" ", 10)+"\n", "\n")
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	s.width, s.dull, s.order = 120, true, order{byName, false}
	s.arrange()
	lines := s.frame()
	if text := strings.Join(lines, "\n"); text != bare(lines) || len(lines) != 6 ||
		!strings.HasPrefix(lines[3], "PATH ^") || !strings.HasSuffix(lines[3], "REASON") || !strings.HasSuffix(lines[5], " interface eth1 is down") {
		t.Errorf("as text:\n%s", text)
	}
}

func many(n int) control.Paths {
	var p control.Paths
	for i := range n {
		p.Paths = append(p.Paths, pathWith(fmt.Sprintf("out/p%d", i), uint64(i*7919%n)))
	}
	return p
}

// TestFrameCost: a frame of many paths costs what its rows cost.
func TestFrameCost(t *testing.T) {
	cost := func(n int) float64 {
		var m meter
		s := screen{width: 160, height: 24}
		s.set(noon, m.add(noon, many(n)))
		s.move(n)
		return testing.AllocsPerRun(10, func() { s.frame() })
	}
	if few, lots := cost(40), cost(4000); lots > few+10 {
		t.Errorf("%v allocations for 40 paths, %v for 4000", few, lots)
	}
}

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
