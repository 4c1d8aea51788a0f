package relay

// Tuning lets the benchmarks force one way of moving bytes.
type Tuning struct{ Buffer, Pipe, Passes, Large, Larges, Small, Smalls int }

// NewTuned is New with the figures that are not zero in place of the defaults.
func NewTuned(o Options, t Tuning) (*Engine, error) {
	d := defaultTuning()
	for _, f := range []struct {
		to   *int
		from int
	}{
		{&d.buffer, t.Buffer},
		{&d.pipe, t.Pipe},
		{&d.passes, t.Passes},
		{&d.large, t.Large},
		{&d.larges, t.Larges},
		{&d.small, t.Small},
		{&d.smalls, t.Smalls},
	} {
		if f.from != 0 {
			*f.to = f.from
		}
	}
	return newEngine(o, d)
}

// Pipes returns how many pipes exist.
func (e *Engine) Pipes() int { return int(e.pipes.Load()) }
