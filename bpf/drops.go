package bpf

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// pinDrops is the name of the pin of what a Diverter's programs count. Among the
// pins it comes after that of the lookup, which says whether they are this
// network namespace's.
const pinDrops = "drops"

// DivertDrops is what diverting has dropped of what came in by one interface.
type DivertDrops struct {
	// Fragments are packets that have no port to be judged by.
	Fragments uint64
	// Unserved are packets that begin connections, and datagrams, for which no
	// server had a socket: it was not running, or not yet.
	Unserved uint64
}

// Drops gives what was dropped on each interface of the present Diversion, by
// index; under 0 for entries without one, Absent ones among them. The programs go
// on counting while no process has a Diverter.
func (d *Diverter) Drops() (map[uint32]DivertDrops, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[uint32]DivertDrops{}
	if d.drops == nil || d.closed {
		return all, nil
	}
	var index uint32
	var n divertDrops
	it := d.drops.Iterate()
	for it.Next(&index, &n) {
		all[index] = DivertDrops{Fragments: n.Fragments, Unserved: n.Unserved}
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read what diverting has dropped: %w", plain(err))
	}
	return all, nil
}

// adoptDrops goes on with the counts of an earlier run, if they are of this
// network namespace and of this make.
func (d *Diverter) adoptDrops(name string) error {
	if name != pinDrops { // a pin that was never finished
		return unpin(d.dir, name)
	}
	path := filepath.Join(d.dir, name)
	spec, err := loadDivert()
	if err != nil {
		return fmt.Errorf("read the eBPF object: %w", err)
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return fmt.Errorf("open pinned map %s: %w", path, plain(err))
	}
	if d.lookup != nil && spec.Maps[divertMapDropped].Compatible(m) == nil {
		d.drops = m
		return nil
	}
	return errors.Join(m.Close(), unpin(d.dir, pinDrops))
}

// count has the programs count for the interfaces of entries.
func (d *Diverter) count(entries []DivertEntry) error {
	if d.drops == nil {
		spec, err := loadDivert()
		if err != nil {
			return fmt.Errorf("read the eBPF object: %w", err)
		}
		m, err := ebpf.NewMap(spec.Maps[divertMapDropped])
		if err != nil {
			return fmt.Errorf("make the map of what diverting drops: %w", plain(err))
		}
		if err := pinAt(d.dir, pinDrops, m); err != nil {
			return errors.Join(err, m.Close())
		}
		d.drops = m
	}
	for index := range counted(entries) {
		err := d.drops.Update(index, divertDrops{}, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("count what is dropped on interface %d: %w", index, plain(err))
		}
	}
	return nil
}

// countOnly forgets the counts of interfaces that entries do not have.
func (d *Diverter) countOnly(entries []DivertEntry) error {
	want := counted(entries)
	var index uint32
	var n divertDrops
	var gone []uint32
	it := d.drops.Iterate()
	for it.Next(&index, &n) {
		if !want[index] {
			gone = append(gone, index)
		}
	}
	err := it.Err()
	for _, index := range gone {
		err = errors.Join(err, d.drops.Delete(index))
	}
	if err != nil {
		return fmt.Errorf("forget what was dropped on other interfaces: %w", plain(err))
	}
	return nil
}

func counted(entries []DivertEntry) map[uint32]bool {
	want := map[uint32]bool{}
	for _, e := range entries {
		want[e.Interface] = true
	}
	return want
}
