package bpf

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// divertFilter names the program for fragments in an Ingress.
func divertFilter(dir string) string { return filepath.Base(dir) }

// watch puts the program for fragments on the interfaces of entries, and takes
// it off others.
func (d *Diverter) watch(entries []DivertEntry) error {
	want := map[uint32]bool{}
	var errs []error
	for _, e := range entries {
		if e.Interface == 0 || want[e.Interface] {
			continue
		}
		want[e.Interface] = true
		if err := d.watchOn(e.Interface); err != nil {
			errs = append(errs, err)
		}
	}
	for index, l := range maps.Clone(d.edges) {
		if !want[index] {
			delete(d.edges, index)
			errs = append(errs, unpin(d.dir, edgePin(index)), l.Close())
		}
	}
	for index := range maps.Clone(d.filters) {
		if want[index] {
			continue
		}
		err := d.in.UnsetIngress(int(index), divertFilter(d.dir))
		if err == nil {
			delete(d.filters, index)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func edgePin(index uint32) string { return pinFragments + strconv.FormatUint(uint64(index), 10) }

func (d *Diverter) watchOn(index uint32) error {
	name := edgePin(index)
	if l := d.edges[index]; l != nil {
		err := l.Update(d.objs.Fragments)
		if err == nil {
			return nil
		}
		delete(d.edges, index)
		if !errors.Is(err, unix.ENOLINK) { // its interface has gone
			return errors.Join(fmt.Errorf("replace the program for fragments: %w", plain(err)), l.Close())
		}
		if err := errors.Join(unpin(d.dir, name), l.Close()); err != nil {
			return err
		}
	}
	if d.filters[index] {
		return d.filter(index)
	}
	l, err := attachTCX(int(index), d.objs.Fragments)
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil // nothing comes in by it either
	case errors.Is(err, ErrNoTCX) && d.in != nil:
		return d.filter(index)
	case err != nil:
		return fmt.Errorf("attach the program for fragments: %w", err)
	}
	if err := pinAt(d.dir, name, l); err != nil {
		return errors.Join(err, l.Close())
	}
	d.edges[index] = l
	return nil
}

// filter puts the program for fragments on an interface by the Ingress.
func (d *Diverter) filter(index uint32) error {
	err := d.in.SetIngress(int(index), divertFilter(d.dir), d.objs.Fragments.FD())
	if errors.Is(err, unix.ENODEV) {
		delete(d.filters, index)
		return nil
	}
	if err != nil {
		return fmt.Errorf("attach the program for fragments: %w", err)
	}
	d.filters[index] = true
	return nil
}

// Restore puts back the programs for fragments that others have taken off an
// interface, which no link lets them do: it says from which.
func (d *Diverter) Restore() (restored []uint32, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.objs == nil || len(d.filters) == 0 {
		return nil, nil
	}
	there, err := d.in.Ingresses(divertFilter(d.dir))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, index := range slices.Sorted(maps.Keys(d.filters)) {
		if slices.Contains(there, int(index)) {
			continue
		}
		if err := d.filter(index); err != nil {
			errs = append(errs, err)
		} else if d.filters[index] {
			restored = append(restored, index)
		}
	}
	return restored, errors.Join(errs...)
}

// ProbeDivert tries what the lookup of a Diverter needs of the kernel and changes
// nothing.
func ProbeDivert() Feature {
	f := Feature{Name: "diverted traffic", Since: "5.15", Need: NeedDivert, Remedy: "run a newer kernel"}
	return f.withRights(func() error {
		objs, err := loadDiversion(Diversion{})
		if err != nil {
			return err
		}
		return objs.Close()
	})
}

// ProbeFragments tries how fragments of diverted traffic can be dropped, and
// changes nothing. tryIngress tries it without links.
func ProbeFragments(tryIngress func(prog int) error) Feature {
	f := Feature{Name: "diverted traffic: its fragments", Since: "5.15", Need: NeedFragments, Remedy: remedyIngress}
	return f.withRights(func() error {
		objs, err := loadDiversion(Diversion{})
		if err != nil {
			return err
		}
		return errors.Join(probeIngress(objs.Fragments, tryIngress), objs.Close())
	})
}
