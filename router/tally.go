package router

import (
	"log/slog"
	"maps"
	"slices"
	"sync"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/control"
)

// tally is what the kernel's programs count by interface, beside paths. Whoever
// looks waits for no reload: it has a lock of its own.
type tally struct {
	mu       sync.Mutex
	diverter *bpf.Diverter     // nil: nothing is diverted
	diverted map[uint32]string // interfaces whose traffic is, by index; 0: "" when there is anything without one
	answers  map[string]*answers
}

// answers are the neighbour answers given on an interface.
type answers struct {
	by     *bpf.Responder
	before uint64 // by others, that have ended
}

// divert takes note of what is diverted.
func (t *tally) divert(d *bpf.Diverter, entries []bpf.DivertEntry, s *netcfg.Snapshot) {
	names := map[uint32]string{}
	for _, e := range entries {
		names[e.Interface] = ""
		if l, ok := s.Links[int(e.Interface)]; ok {
			names[e.Interface] = l.Name
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.diverter, t.diverted = d, names
}

// answer takes note of who answers on an interface from now on.
func (t *tally) answer(name string, by *bpf.Responder) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.answers == nil {
		t.answers = map[string]*answers{}
	}
	now := &answers{by: by}
	if was := t.answers[name]; was != nil {
		now.before = was.total()
	}
	t.answers[name] = now
}

func (a *answers) total() uint64 { return a.before + a.by.Answered() }

// interfaces is all of it, in the order of the names.
func (t *tally) interfaces(log *slog.Logger) []control.Interface {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := map[string]control.Interface{}
	if t.diverter != nil {
		drops, err := t.diverter.Drops()
		if err != nil {
			log.Error("what diverting drops cannot be told", "err", err)
		}
		for index, name := range t.diverted {
			if d, ok := drops[index]; ok {
				all[name] = control.Interface{Interface: name, Diverted: &control.Diverted{FragmentsDropped: d.Fragments, UnservedDropped: d.Unserved}}
			}
		}
	}
	for name, a := range t.answers {
		i := all[name]
		n := a.total()
		i.Interface, i.NeighbourAnswers = name, &n
		all[name] = i
	}
	var list []control.Interface
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, all[name])
	}
	return list
}
