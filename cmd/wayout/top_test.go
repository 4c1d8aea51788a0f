package main

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

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
