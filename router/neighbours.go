package router

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router/config"
	"wayout/router/escaper"
	"wayout/selection"
)

// answering is an interface on which neighbour solicitations are answered for
// whole prefixes.
type answering struct {
	responder *bpf.Responder
	prefixes  []netip.Prefix
	except    []netip.Addr
}

// settlePrefixes brings what goes with prefix nodes in line with a snapshot:
// which of their addresses are not for use, and on which interfaces their
// neighbours are answered.
func (r *Router) settlePrefixes(p *plan, leaving []*escaper.Path, want netcfg.Want, s *netcfg.Snapshot) {
	answer := map[int][]netip.Prefix{}
	except := map[int][]netip.Addr{}
	var whole []*escaper.Path
	for _, h := range append(p.holds(), p.hold(leaving)) {
		whole = append(whole, h.whole...)
	}
	for _, path := range whole {
		var unused []netip.Addr // of both families
		for _, f := range []selection.Family{selection.V4, selection.V6} {
			n := path.Net(f)
			if !n.IsValid() {
				continue
			}
			reserved := want.Reserved(s, n)
			unused = append(unused, reserved...)
			if f == selection.V4 {
				continue // the kernel answers ARP for what a local route makes its own
			}
			for _, l := range p.linksToAnswer(path, n, s) {
				answer[l.Index] = append(answer[l.Index], n)
				except[l.Index] = append(except[l.Index], reserved...)
			}
		}
		path.Reserve(unused)
	}
	if r.kernel == nil {
		return
	}
	for index, a := range r.kernel.answering {
		if len(answer[index]) == 0 || s.Links[index].Name == "" {
			delete(r.kernel.answering, index)
			if err := a.responder.Close(); err != nil {
				r.log.Error("neighbour answers cannot be ended", "err", err)
			}
		}
	}
	for _, index := range slices.Sorted(maps.Keys(answer)) {
		if err := r.answerOn(s.Links[index], answer[index], except[index]); err != nil {
			r.log.Error("neighbour solicitations are not answered", "interface", s.Links[index].Name, "err", err)
		}
	}
}

// linksToAnswer lists the interfaces on which somebody asks for the addresses
// of a path's prefix.
func (p *plan) linksToAnswer(path *escaper.Path, n netip.Prefix, s *netcfg.Snapshot) []netcfg.Link {
	how := "auto"
	if e := findEscaper(p.config, path.Escaper); e != nil && e.Neighbour != "" {
		how = e.Neighbour
	}
	if how == "off" {
		return nil
	}
	device := p.device(path)
	var all []netcfg.Link
	for _, l := range s.Links {
		named := device == l.Name
		onLink := s.OnLink(n, l.Name)
		if l.Loopback || !l.Up || device != "" && !named {
			continue
		}
		if how == "answer" && named || onLink {
			all = append(all, l)
		}
	}
	return all
}

func (r *Router) answerOn(l netcfg.Link, prefixes []netip.Prefix, except []netip.Addr) error {
	slices.SortFunc(prefixes, netip.Prefix.Compare)
	slices.SortFunc(except, netip.Addr.Compare)
	prefixes, except = slices.Compact(prefixes), slices.Compact(except)
	was := r.kernel.answering[l.Index]
	if was != nil && slices.Equal(was.prefixes, prefixes) && slices.Equal(was.except, except) {
		return nil
	}
	if was != nil {
		if err := was.responder.Set(prefixes, except); err != nil {
			return err
		}
		was.prefixes, was.except = prefixes, except
		return nil
	}
	responder, err := bpf.NewResponder(bpf.ResponderOptions{
		Interface: l.Index, MAC: l.MAC[:], Prefixes: prefixes, Except: except, Ingress: r.kernel.net, Name: answersName(r.o.Config),
	})
	if err != nil {
		return err
	}
	if r.kernel.answering == nil {
		r.kernel.answering = map[int]*answering{}
	}
	r.kernel.answering[l.Index] = &answering{responder, prefixes, except}
	r.tally.answer(l.Name, responder)
	r.log.Info("neighbour solicitations are answered", "interface", l.Name, "prefixes", len(prefixes))
	return nil
}

// answersName is what the programs that answer are called on the interfaces.
func answersName(c *config.Config) string { return instance(c) + "-neighbours" }

// cleanAnswers removes those that a killed daemon may have left.
func cleanAnswers(c *config.Config, k *netcfg.Netlink) error {
	return bpf.CleanIngress(k, answersName(c))
}

// stopAnswering ends all answers.
func (k *kernel) stopAnswering() error {
	var errs []error
	for _, a := range k.answering {
		errs = append(errs, a.responder.Close())
	}
	k.answering = nil
	return errors.Join(errs...)
}
