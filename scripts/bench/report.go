package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A summary is a row of a table: medians over the rounds.
type summary struct {
	Mode    string `json:"mode"`
	Peer    string `json:"peer"`
	Unit    string `json:"unit,omitempty"` // of CPU
	CPU     spread `json:"cpu"`
	Rate    spread `json:"rate"` // operations per second, or Gbit/s
	P50     spread `json:"p50_us"`
	P99     spread `json:"p99_us"`
	Memory  spread `json:"kb_per_tunnel"`
	Files   spread `json:"files_per_tunnel"`
	Held    spread `json:"held"`
	ToBase  spread `json:"to_base"`      // CPU, or memory, to the base peer's in the same round
	Faster  spread `json:"rate_to_base"` // rate to the base peer's in the same round
	Direct  spread `json:"to_direct"`    // rate to that without a proxy
	Checked int64  `json:"checked_sources"`
	Wrong   int64  `json:"wrong_sources"`
	Errors  int64  `json:"errors"`
	Failed  int    `json:"failed"` // rounds
	Why     string `json:"why,omitempty"`
}

// A spread is what several rounds gave; N is 0 when none gave anything.
type spread struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	slices.Sort(v)
	k := len(v) / 2
	s := spread{N: len(v), Median: v[k], Min: v[0], Max: v[len(v)-1]}
	if len(v)%2 == 0 {
		s.Median = (v[k-1] + v[k]) / 2
	}
	return s
}

// cost is the CPU for a unit of work, in the mode's unit.
func (s *sample) cost(m *mode) (float64, bool) {
	work := s.Ops + s.Bytes
	return s.CPU / float64(work) * m.scale, m.unit != "" && s.Failed == "" && work > 0
}

func (s *sample) rate() (float64, bool) {
	if s.Failed != "" || s.Seconds == 0 {
		return 0, false
	}
	if s.Bytes > 0 {
		return float64(s.Bytes) * 8 / 1e9 / s.Seconds, true
	}
	return float64(s.Ops) / s.Seconds, s.Ops > 0
}

// perTunnel gives what a tunnel adds in memory (KB) and descriptors.
func (s *sample) perTunnel() (kb, files float64, ok bool) {
	if len(s.Steps) < 2 {
		return 0, 0, false
	}
	from, to := s.Steps[0], s.Steps[len(s.Steps)-1]
	n := float64(to.Tunnels - from.Tunnels)
	if n <= 0 {
		return 0, 0, false
	}
	return float64(to.PssKB-from.PssKB) / n, float64(to.Files-from.Files) / n, true
}

// compared is the figure that peers are compared by.
func (s *sample) compared(m *mode) (float64, bool) {
	if m.job.Kind == "hold" {
		kb, _, ok := s.perTunnel()
		return kb, ok
	}
	return s.cost(m)
}

// line tells a sample in short.
func (s *sample) line(m *mode) string {
	if s.Failed != "" {
		return "FAILED: " + brief(s.Failed)
	}
	var w []string
	if c, ok := s.cost(m); ok && s.Peer != "direct" {
		w = append(w, fmt.Sprintf("%s %s", number(c), m.unit))
	}
	if r, ok := s.rate(); ok {
		w = append(w, number(r)+rateUnit(m))
	}
	if s.Held > 0 {
		w = append(w, fmt.Sprintf("%d held", s.Held))
	}
	if kb, files, ok := s.perTunnel(); ok {
		w = append(w, fmt.Sprintf("%.1f KB and %.1f files each", kb, files))
	}
	if s.Errors > 0 {
		w = append(w, fmt.Sprintf("%d errors: %s", s.Errors, brief(s.Error)))
	}
	if s.Wrong > 0 {
		w = append(w, fmt.Sprintf("WRONG SOURCE %d of %d: %s", s.Wrong, s.Checked, s.WrongAs))
	}
	return strings.Join(w, ", ")
}

// brief is what of an error has room in a table; all of it is in the file.
func brief(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s[:min(len(s), 70)]
}

func rateUnit(m *mode) string {
	if m.job.Kind == "down" || m.job.Kind == "up" {
		return " Gbit/s"
	}
	return "/s"
}

// summarize makes the rows of all tables, the cheapest peer first.
func (b *bench) summarize() []summary {
	var all []summary
	for i := range b.modes {
		m := &b.modes[i]
		find := func(peer string, round int) *sample {
			for k := range b.out.Samples {
				if s := &b.out.Samples[k]; s.Mode == m.name && s.Peer == peer && s.Round == round {
					return s
				}
			}
			return nil
		}
		var rows []summary
		for _, p := range b.proxies {
			if row, ok := b.row(m, p.name, find); ok {
				rows = append(rows, row)
			}
		}
		slices.SortStableFunc(rows, func(x, y summary) int {
			switch kx, ky := x.key(), y.key(); {
			case kx < ky:
				return -1
			case kx > ky:
				return 1
			}
			return 0
		})
		all = append(all, rows...)
	}
	return all
}

// key orders the rows of a mode.
func (r *summary) key() float64 {
	switch {
	case r.CPU.N > 0:
		return r.CPU.Median
	case r.Memory.N > 0:
		return r.Memory.Median
	}
	return -r.Held.Median
}

func (b *bench) row(m *mode, peer string, find func(string, int) *sample) (summary, bool) {
	r := summary{Mode: m.name, Peer: peer, Unit: m.unit}
	var cpu, rate, p50, p99, memory, files, held, toBase, faster, toDirect []float64
	found := false
	for round := 1; round <= b.o.rounds; round++ {
		s := find(peer, round)
		if s == nil {
			continue
		}
		found = true
		r.Checked, r.Wrong, r.Errors = r.Checked+s.Checked, r.Wrong+s.Wrong, r.Errors+s.Errors
		if s.Failed != "" {
			r.Failed++
			r.Why = s.Failed
			continue
		}
		if r.Why == "" {
			r.Why = s.Error
		}
		if v, ok := s.cost(m); ok && peer != "direct" {
			cpu = append(cpu, v)
		}
		if v, ok := s.rate(); ok {
			rate = append(rate, v)
			if d := find("direct", round); d != nil {
				if w, ok := d.rate(); ok {
					toDirect = append(toDirect, v/w)
				}
			}
		}
		if s.P50 > 0 {
			p50, p99 = append(p50, s.P50), append(p99, s.P99)
		}
		if kb, n, ok := s.perTunnel(); ok {
			memory, files = append(memory, kb), append(files, n)
		}
		if s.Held > 0 {
			held = append(held, float64(s.Held))
		}
		if base := find(b.o.base, round); base != nil && peer != "direct" {
			if v, ok := s.compared(m); ok {
				if w, ok := base.compared(m); ok && w > 0 {
					toBase = append(toBase, v/w)
				}
			}
			if v, ok := s.rate(); ok {
				if w, ok := base.rate(); ok {
					faster = append(faster, v/w)
				}
			}
		}
	}
	r.CPU, r.Rate, r.P50, r.P99 = spreadOf(cpu), spreadOf(rate), spreadOf(p50), spreadOf(p99)
	r.Memory, r.Files, r.Held = spreadOf(memory), spreadOf(files), spreadOf(held)
	r.ToBase, r.Faster, r.Direct = spreadOf(toBase), spreadOf(faster), spreadOf(toDirect)
	return r, found
}

// report writes the tables, in Markdown that is legible as it stands.
func (b *bench) report(out io.Writer) error {
	fmt.Fprintf(out, "Kernel %s, %d CPUs, %d rounds: medians, with the range. \"x %s\" and \"x direct\" are medians of the ratios within a round.\n",
		b.out.Kernel, b.out.CPUs, b.out.Rounds, b.o.base)
	if len(b.out.Missing) > 0 {
		fmt.Fprintf(out, "Not installed and left out: %s.\n", strings.Join(b.out.Missing, ", "))
	}
	for i := range b.modes {
		m := &b.modes[i]
		fmt.Fprintf(out, "\n%s: %s\n\n", m.name, m.what)
		w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
		head := []string{"peer", m.unit, "x " + b.o.base, "rate" + rateUnit(m), "x " + b.o.base, "x direct", "p50 us", "p99 us"}
		if m.job.Kind == "hold" {
			head = []string{"peer", "tunnels held", "KB/tunnel", "x " + b.o.base, "files/tunnel"}
		}
		head = append(head, "wrong source", "errors")
		fmt.Fprintf(w, "| %s\t|\n|%s\n", strings.Join(head, "\t| "), strings.Repeat("---\t|", len(head)))
		for k := range b.out.Summary {
			r := &b.out.Summary[k]
			if r.Mode != m.name {
				continue
			}
			cells := []string{r.Peer, r.CPU.ranged(), r.ToBase.ratio(), r.Rate.plain(), r.Faster.ratio(), r.Direct.ratio(), r.P50.plain(), r.P99.plain()}
			if m.job.Kind == "hold" {
				cells = []string{r.Peer, r.Held.plain(), r.Memory.ranged(), r.ToBase.ratio(), r.Files.plain()}
			}
			trouble := strconv.FormatInt(r.Errors, 10)
			if r.Failed > 0 {
				trouble += fmt.Sprintf(", %d rounds failed", r.Failed)
			}
			if r.Why != "" {
				trouble += ": " + brief(r.Why)
			}
			cells = append(cells, fmt.Sprintf("%d of %d", r.Wrong, r.Checked), trouble)
			fmt.Fprintf(w, "| %s\t|\n", strings.Join(cells, "\t| "))
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func (s spread) plain() string {
	if s.N == 0 {
		return "-"
	}
	return number(s.Median)
}

func (s spread) ranged() string {
	if s.N < 2 {
		return s.plain()
	}
	return fmt.Sprintf("%s (%s-%s)", number(s.Median), number(s.Min), number(s.Max))
}

func (s spread) ratio() string {
	if s.N == 0 {
		return "-"
	}
	return strconv.FormatFloat(s.Median, 'f', 2, 64)
}

// number keeps what means something.
func number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
