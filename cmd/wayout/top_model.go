package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	tea "charm.land/bubbletea/v2"

	"wayout/router/control"
)

// update is what the control socket told: paths, or why there are none.
type update struct {
	at    time.Time
	paths control.Paths
	err   error
}

// drained is the outcome of a drain or undrain.
type drained struct {
	path string
	on   bool
	err  error
}

// question is a drain or undrain that waits for its yes. It names its path:
// the cursor's may be another by then.
type question struct {
	path string
	on   bool
}

// model is the program on the terminal: the screen and what the keys do to it.
type model struct {
	screen
	meter meter
	typed *string // the filter before it was being typed
	ask   *question
	drain func(path string, on bool) error
}

func newModel(o order, filter string, drain func(path string, on bool) error) *model {
	return &model{screen: screen{width: 80, height: 24, order: o, filter: filter}, drain: drain}
}

func (m *model) Init() tea.Cmd { return nil }

// Update takes a key, a snapshot, a new size or an outcome.
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
		m.move(0)
	case update:
		m.take(msg)
	case drained:
		m.notice = told(msg)
	case tea.PasteMsg:
		if m.typed != nil {
			m.edit(m.filter + msg.Content)
		}
	case tea.KeyPressMsg:
		return m, m.key(msg)
	}
	return m, nil
}

// View draws the screen.
func (m *model) View() tea.View {
	v := tea.NewView(strings.Join(m.frame(), "\n"))
	v.AltScreen = true
	return v
}

// take shows a snapshot, or that there is none. While the picture is stopped
// the counters go on all the same.
func (m *model) take(u update) {
	if u.err != nil {
		m.lost, m.meter = u.err.Error(), meter{} // what comes next counts anew
		return
	}
	m.lost = ""
	rows := m.meter.add(u.at, u.paths)
	if !m.paused {
		m.set(u.at, rows)
	}
}

func told(d drained) string {
	switch {
	case d.err != nil && d.on:
		return fmt.Sprintf("drain %s: %v", d.path, d.err)
	case d.err != nil:
		return fmt.Sprintf("undrain %s: %v", d.path, d.err)
	case d.on:
		return d.path + " is draining"
	}
	return d.path + " is not draining"
}

// key is what a key does, by what is going on.
func (m *model) key(k tea.KeyPressMsg) tea.Cmd {
	name := k.String()
	switch {
	case name == "ctrl+c":
		return tea.Quit
	case name == "ctrl+z":
		return tea.Suspend
	case m.help:
		m.help = false
		return nil
	case m.ask != nil:
		return m.answer(name)
	case m.typed != nil:
		m.typeFilter(k)
		return nil
	}
	m.notice = ""
	return m.command(name)
}

func (m *model) command(name string) tea.Cmd {
	switch name {
	case "q":
		return tea.Quit
	case "?", "h":
		m.help = true
	case "/":
		before := m.filter
		m.typed = &before
		m.edit(m.filter)
	case "esc":
		m.filter = ""
		m.arrange()
	case "space", "p":
		m.paused = !m.paused
	case "d":
		m.askDrain()
	case "r":
		m.sortBy(m.order.by)
	case "<", "left":
		m.sortBy((m.order.by + columns - 1) % columns)
	case ">", "right":
		m.sortBy((m.order.by + 1) % columns)
	default:
		if c, ok := sortKey(name); ok {
			m.sortBy(c)
			return nil
		}
		m.move(steps(name, m.body(), len(m.shown)))
	}
	return nil
}

// sortKey is the column that a letter sorts by.
func sortKey(name string) (column, bool) {
	i := strings.Index("nsioctxf", name)
	return column(i), len(name) == 1 && i >= 0
}

// steps is how many lines a key moves the cursor by; 0 for any other key.
func steps(name string, page, all int) int {
	switch name {
	case "up", "k":
		return -1
	case "down", "j":
		return 1
	case "pgup":
		return -page
	case "pgdown":
		return page
	case "home", "g":
		return -all
	case "end", "G":
		return all
	}
	return 0
}

// askDrain asks before it drains the cursor's path, or gives it back.
func (m *model) askDrain() {
	r := m.current()
	if r == nil {
		return
	}
	m.ask = &question{path: r.Path.Path, on: r.State != "draining"}
	if m.ask.on {
		m.prompt = fmt.Sprintf("drain %s: no new connections on it? y/n", r.Path.Path)
	} else {
		m.prompt = fmt.Sprintf("undrain %s: new connections on it again? y/n", r.Path.Path)
	}
}

// answer does what was asked about on y, and nothing on any other key.
func (m *model) answer(name string) tea.Cmd {
	q := *m.ask
	m.ask, m.prompt = nil, ""
	if name != "y" && name != "Y" {
		return nil
	}
	return func() tea.Msg { return drained{q.path, q.on, m.drain(q.path, q.on)} }
}

// typeFilter is a key while the filter is being typed; it works at once.
func (m *model) typeFilter(k tea.KeyPressMsg) {
	switch k.String() {
	case "enter":
		m.typed, m.prompt = nil, ""
	case "esc":
		m.filter = *m.typed
		m.typed, m.prompt = nil, ""
		m.arrange()
	case "backspace":
		r := []rune(m.filter)
		m.edit(string(r[:max(0, len(r)-1)]))
	case "ctrl+u":
		m.edit("")
	default:
		m.edit(m.filter + k.Text)
	}
}

func (m *model) edit(filter string) {
	m.filter = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, filter)
	m.prompt = "filter: " + m.filter + "_"
	m.arrange()
}

// errStopped: the daemon has ended the watch.
var errStopped = errors.New("it has stopped")

// Times of the feed.
const (
	frameEvery = 250 * time.Millisecond // between two snapshots at least
	retryEvery = time.Second            // between two attempts to reach a daemon
)

// feed hands the daemon's snapshots to show, at most one each frameEvery and
// then the newest, until ctx ends. When the daemon goes away it says so and
// tries again.
func feed(ctx context.Context, watch func(context.Context, func(control.Paths) error) error, show func(update)) {
	latest := make(chan update, 1)
	put := func(u update) {
		select {
		case <-latest: // not looked at yet, and old now
		default:
		}
		latest <- u
	}
	go func() {
		for ctx.Err() == nil {
			err := watch(ctx, func(p control.Paths) error {
				put(update{at: time.Now(), paths: p})
				return nil
			})
			if err == nil {
				err = errStopped
			}
			put(update{at: time.Now(), err: err})
			rest(ctx, retryEvery)
		}
	}()
	for ctx.Err() == nil {
		select {
		case u := <-latest:
			show(u)
			rest(ctx, frameEvery)
		case <-ctx.Done():
		}
	}
}

// rest waits, or until ctx ends.
func rest(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
