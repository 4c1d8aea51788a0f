package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Styles, as the parameters of SGR (ECMA-48, 8.3.117): the eight colours that
// every terminal with colours has.
const (
	plainStyle = ""
	boldStyle  = "1"
	faintStyle = "2"
	cursorRow  = "7" // reverse
	badStyle   = "31"
	warnStyle  = "33"
	alarmStyle = "1;31"
)

// frameLines is how many lines of a frame are not rows.
const frameLines = 6

// screen is what `wayout top` shows. It is changed by its methods alone, and
// frame draws it.
type screen struct {
	width, height int // in characters

	rows  []row // of the snapshot that is shown, as the daemon lists them
	total totals
	at    time.Time // when it came

	order  order
	filter string
	shown  []*row // filtered, sorted
	cursor int    // in shown
	path   string // where the cursor stands
	moved  bool   // by a key: until then it stays on the first line
	offset int    // of the first row on screen

	paused bool
	help   bool
	lost   string // why there is no daemon; "" while there is one
	prompt string // a question, or the filter that is being typed
	notice string // what the last command did
	dull   bool   // no styles, no cursor, no hints: for a file
}

// set shows a snapshot.
func (s *screen) set(at time.Time, rows []row) {
	s.at, s.rows, s.total = at, rows, sumUp(rows)
	s.arrange()
}

// arrange filters and sorts anew. The cursor stays on its path; when that is
// not shown any more, on its line.
func (s *screen) arrange() {
	s.shown = choose(s.rows, s.filter, s.order)
	at := func(r *row) bool { return r.Path.Path == s.path }
	if i := slices.IndexFunc(s.shown, at); i >= 0 && s.moved {
		s.cursor = i
	}
	s.move(0)
}

// move moves the cursor by lines, and what is shown with it.
func (s *screen) move(by int) {
	s.moved = s.moved || by != 0
	s.cursor = max(0, min(s.cursor+by, len(s.shown)-1))
	s.path = ""
	if r := s.current(); r != nil {
		s.path = r.Path.Path
	}
	body := s.body()
	s.offset = min(s.offset, s.cursor)
	s.offset = max(s.offset, s.cursor-body+1)
	s.offset = max(0, min(s.offset, len(s.shown)-body))
}

// body is how many rows have room.
func (s *screen) body() int { return max(1, s.height-frameLines) }

// current is the row under the cursor, nil when there are none.
func (s *screen) current() *row {
	if s.cursor >= len(s.shown) {
		return nil
	}
	return s.shown[s.cursor]
}

// sortBy sorts by a column; by the one that it is sorted by already, the other
// way round.
func (s *screen) sortBy(c column) {
	if s.order.by == c {
		s.order.down = !s.order.down
	} else {
		s.order = order{c, c.descending()}
	}
	s.arrange()
}

// field is one column on screen.
type field struct {
	title  string
	width  int
	right  bool
	sort   column // columns: not sorted by
	rank   int    // those with the lowest go first when there is no room
	text   func(*row) string
	resize bool // takes what is left over
}

// fields are all columns, from the left.
func fields() []field {
	rate := func(f func(*rates) string) func(*row) string {
		return func(r *row) string {
			if r.Rates == nil {
				return "-"
			}
			return f(r.Rates)
		}
	}
	return []field{
		{title: "PATH", width: leastName, sort: byName, rank: 9, text: func(r *row) string { return r.Path.Path }},
		{title: "STATE", width: 8, sort: byState, rank: 9, text: func(r *row) string { return r.State }},
		{title: "IN", width: 6, right: true, sort: byIn, rank: 8, text: rate(func(r *rates) string { return quantity(r.BitsIn) })},
		{title: "OUT", width: 6, right: true, sort: byOut, rank: 7, text: rate(func(r *rates) string { return quantity(r.BitsOut) })},
		{title: "OPEN", width: 6, right: true, sort: byConnections, rank: 6, text: func(r *row) string { return whole(r.Connections.Open) }},
		{title: "NEW/s", width: 6, right: true, sort: columns, rank: 3, text: rate(func(r *rates) string { return quantity(r.Made) })},
		{title: "RTT", width: 6, right: true, sort: byRTT, rank: 5, text: func(r *row) string { return roundTrip(r.RTT.P50) }},
		{title: "RETR/s", width: 6, right: true, sort: byRetransmits, rank: 2, text: rate(func(r *rates) string { return quantity(r.Retransmits) })},
		{title: "RETR%", width: 5, right: true, sort: columns, rank: 1, text: rate(func(r *rates) string {
			if r.PacketsOut == 0 {
				return "-"
			}
			return percent(r.Share)
		})},
		{title: "FAIL/s", width: 6, right: true, sort: byFailures, rank: 4, text: rate(func(r *rates) string { return quantity(r.Failed) })},
		{title: "REASON", sort: columns, resize: true, text: func(r *row) string { return printable(r.Reason) }},
	}
}

const (
	leastName   = 16 // of the column PATH
	mostName    = 48
	leastReason = 16 // narrower it is left out
)

// layout chooses the columns that have room in a width, each a space apart
// from the next, and how wide they are. longest is the longest name of a path.
func layout(width, longest int) []field {
	all := fields()
	reason := all[len(all)-1]
	all = all[:len(all)-1]
	total := func() (n int) {
		for _, f := range all {
			n += f.width + 1
		}
		return n - 1
	}
	for total() > width && len(all) > 2 {
		lowest := 0
		for i, f := range all {
			if f.rank < all[lowest].rank {
				lowest = i
			}
		}
		all = append(all[:lowest], all[lowest+1:]...)
	}
	spare := width - total()
	grow := max(min(longest, mostName)-all[0].width, 0)
	if spare < 0 {
		grow = spare // hardly a terminal
	}
	grow = min(grow, spare)
	all[0].width = max(all[0].width+grow, 1)
	if reason.width = spare - grow - 1; reason.width >= leastReason {
		all = append(all, reason)
	}
	return all
}

// heading is the line above the rows: the column that it is sorted by has a
// mark, v for from the largest.
func heading(fs []field, o order) string {
	var b strings.Builder
	mark := "^"
	if o.down {
		mark = "v"
	}
	for i, f := range fs {
		title, width := f.title, f.width
		if f.sort == o.by && f.right {
			title = mark + title // into the space between, when it must be
		} else if f.sort == o.by {
			title += " " + mark
		}
		if i > 0 && f.right {
			width++
		} else if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(pad(title, width, f.right))
	}
	return strings.TrimRight(b.String(), " ")
}

// line is one row. With styles the state has a colour, and the cursor's row
// is one bar.
func (s *screen) line(fs []field, r *row, cursor bool) string {
	var b strings.Builder
	for i, f := range fs {
		if i > 0 {
			b.WriteByte(' ')
		}
		text := f.text(r)
		if f.sort == byName {
			text = squeeze(text, f.width)
		}
		text = pad(clip(text, f.width), f.width, f.right)
		if f.sort == byState && !cursor {
			text = s.style(stateStyle(r.State), text)
		}
		b.WriteString(text)
	}
	if cursor {
		return s.style(cursorRow, pad(b.String(), s.width, false))
	}
	return strings.TrimRight(b.String(), " ")
}

func stateStyle(state string) string {
	switch state {
	case "up":
		return plainStyle
	case "draining", "probing":
		return warnStyle
	}
	return badStyle
}

func (s *screen) style(code, text string) string {
	if code == plainStyle || s.dull || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[m"
}

// frame draws the screen, a line each. Only the rows on screen cost anything.
func (s *screen) frame() []string {
	if s.help {
		return s.fit(s.helpLines())
	}
	lines := []string{
		s.style(boldStyle, clip(s.headline(), s.width)),
		clip(s.sums(), s.width),
		s.mood(),
	}
	fs := layout(s.width, s.longest())
	lines = append(lines, s.style(boldStyle, clip(heading(fs, s.order), s.width)))
	end := min(s.offset+s.body(), len(s.shown))
	for i := s.offset; i < end; i++ {
		lines = append(lines, s.line(fs, s.shown[i], i == s.cursor && !s.dull))
	}
	if s.dull {
		return lines
	}
	for len(lines) < s.height-2 {
		lines = append(lines, "")
	}
	return s.fit(append(lines, s.style(faintStyle, clip(s.detail(), s.width)), s.bottom()))
}

// fit leaves out what has no room, but not the last line: questions are there.
func (s *screen) fit(lines []string) []string {
	if len(lines) > s.height && s.height > 0 {
		lines = append(lines[:s.height-1], lines[len(lines)-1])
	}
	return lines
}

// longest is the longest name of all paths, so that the columns stay where
// they are while the rows move.
func (s *screen) longest() int {
	n := 0
	for i := range s.rows {
		n = max(n, utf8.RuneCountInString(s.rows[i].Path.Path))
	}
	return n
}

func (s *screen) headline() string {
	var parts []string
	for _, state := range []string{"up", "down", "draining", "expired", "probing"} {
		if n := s.total.states[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	text := fmt.Sprintf("wayout  %d paths", s.total.paths)
	if s.total.paths == 1 {
		text = "wayout  1 path"
	}
	if len(parts) > 0 {
		text += ": " + strings.Join(parts, ", ")
	}
	return text
}

func (s *screen) sums() string {
	r := s.total.rates
	if r.Interval == 0 {
		return fmt.Sprintf("open %s  (rates after the first interval)", whole(s.total.open))
	}
	parts := []string{
		"in " + quantity(r.BitsIn) + " out " + quantity(r.BitsOut) + " bit/s",
		"open " + whole(s.total.open),
		"new " + quantity(r.Made) + "/s",
		"failed " + quantity(r.Failed) + "/s",
		"resent " + quantity(r.Retransmits) + "/s " + percent(r.Share),
	}
	text := strings.Join(parts, "  ")
	if len(text) > s.width {
		text = strings.Join(parts, " ")
	}
	return text
}

// mood is the line that says what the rows below are.
func (s *screen) mood() string {
	if s.lost != "" {
		return s.style(alarmStyle, clip("NO DAEMON, trying again; shown is what was seen last", s.width))
	}
	text := "sorted by " + s.order.by.String()
	if s.filter != "" {
		text += fmt.Sprintf("  filter %q: %d of %d", s.filter, len(s.shown), len(s.rows))
	}
	if body := s.body(); !s.dull && len(s.shown) > body {
		text += fmt.Sprintf("  rows %d to %d of %d", s.offset+1, min(s.offset+body, len(s.shown)), len(s.shown))
	}
	if s.paused {
		return s.style(warnStyle, clip("PAUSED  "+text, s.width))
	}
	return clip(text, s.width)
}

// detail is what is known of the cursor's path beyond its row.
func (s *screen) detail() string {
	r := s.current()
	if r == nil {
		return "no paths"
	}
	text := fmt.Sprintf("%s %s %s", r.Path.Path, r.State, since(s.at.Sub(r.Since)))
	if r.Reason != "" {
		text += ": " + printable(r.Reason)
	}
	for _, p := range []struct {
		name string
		text *string
	}{{"", r.IPv4}, {"", r.IPv6}, {"uplink ", r.Uplink}, {"on ", r.Interface}} {
		if p.text != nil {
			text += "; " + p.name + *p.text
		}
	}
	if r.GuardDrops > 0 {
		text += fmt.Sprintf("; %d guard drops", r.GuardDrops)
	}
	return text
}

// bottom is the last line: a question, else what a command did or why there is no
// daemon, else hints.
func (s *screen) bottom() string {
	switch {
	case s.prompt != "":
		return s.style(boldStyle, clip(s.prompt, s.width))
	case s.notice != "":
		return clip(printable(s.notice), s.width)
	case s.lost != "":
		return clip(printable(s.lost), s.width)
	}
	return s.style(faintStyle, clip("q quit  ? help  / filter  < > sort  r reverse  d drain  space pause", s.width))
}

func (s *screen) helpLines() []string {
	return []string{
		s.style(boldStyle, "wayout top: each path, live"),
		"",
		"up down k j      move, also with page up, page down, home, end (g, G)",
		"< > left right   sort by another column; r the other way round",
		"n s i o          sort by name, state, in, out",
		"c t x f          by connections, round-trip time, retransmits, failures",
		"/                filter: words that stand in name, state, reason, address,",
		"                 uplink or interface; Enter keeps it, Esc clears it",
		"d                drain the path under the cursor, or give it back",
		"space            stop the picture, and let it go on",
		"q                quit",
		"",
		"IN OUT           bits a second, IP with headers; IN is from the far side",
		"OPEN NEW/s       connections: open now, and made in a second",
		"RTT              median round-trip time since the daemon began",
		"RETR/s RETR%     TCP segments sent again, and their share of the packets out",
		"FAIL/s           connections that failed in a second",
		"",
		"Any key goes back.",
	}
}
