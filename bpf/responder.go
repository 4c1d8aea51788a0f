package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// NeedNeighbours is what a Responder is for, as Feature.Need.
const NeedNeighbours = "whole IPv6 prefixes on a shared link"

// ResponderOptions say for what a Responder answers, and where.
type ResponderOptions struct {
	Interface int              // index, in the network namespace of the calling thread
	MAC       net.HardwareAddr // of the interface: what the answers tell

	// Prefixes are the IPv6 prefixes to answer for. IPv4 needs none of this: the
	// kernel answers ARP for what a local route makes the host's own.
	Prefixes []netip.Prefix

	// Except are addresses in the prefixes that are others': the gateway's.
	Except []netip.Addr

	// Ingress serves where the kernel has no links for it; nil: then nothing does. It
	// knows the Responder by Name. It is of the calling thread's network namespace.
	Ingress Ingress
	Name    string
}

// Responder answers the neighbour solicitations that come in by one interface for
// whole prefixes, in the kernel and without forwarding or proxy_ndp. It leaves to
// the kernel what asks for other addresses, duplicate address detection (an
// answer would keep other hosts from addresses that we may never use), what comes
// with a VLAN tag, and what is not valid (RFC 4861 section 7.1.1).
//
// The interface takes in all multicast while the Responder lives: solicitations go to
// one of 2^24 groups. A switch that filters multicast by what hosts have joined (MLD
// snooping) has to be told to let them through.
//
// Nothing is pinned: the Responder ends with the process. Addresses that nobody
// answers for are not reached then, and nothing leaks. Where an Ingress has it, it goes
// on after a process that was killed, until CleanIngress. It ends with its interface
// too: one that comes back is another, and needs a new Responder.
//
// All methods may be called concurrently.
type Responder struct {
	mu     sync.Mutex
	objs   responderObjects
	link   link.Link
	detach func() error // where there is no link
	fd     int          // of the packet socket that has the interface take all multicast
	set    map[netip.Prefix]bool
	closed bool
}

// NewResponder starts to answer. Without an Ingress the error wraps ErrNoTCX on a
// kernel before 6.6.
func NewResponder(o ResponderOptions) (_ *Responder, err error) {
	if o.Interface <= 0 {
		return nil, fmt.Errorf("answer neighbour solicitations: interface number %d", o.Interface)
	}
	r, err := loadResponderWith(o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.fd, err = allMulticast(o.Interface); err != nil {
		return nil, err
	}
	if err := r.attach(o); err != nil {
		return nil, fmt.Errorf("attach the neighbour responder: %w", err)
	}
	return r, nil
}

// loadResponderWith loads the program without attaching it.
func loadResponderWith(o ResponderOptions) (*Responder, error) {
	if len(o.MAC) != 6 {
		return nil, fmt.Errorf("answer neighbour solicitations: %q is not the address of an Ethernet interface", o.MAC)
	}
	spec, err := loadResponder()
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	if err := spec.Variables[responderVarMac].Set([6]byte(o.MAC)); err != nil {
		return nil, fmt.Errorf("set %s: %w", responderVarMac, err)
	}
	r := &Responder{fd: -1, set: make(map[netip.Prefix]bool)}
	if err := spec.LoadAndAssign(&r.objs, nil); err != nil {
		return nil, fmt.Errorf("load the neighbour responder: %w", plain(err))
	}
	if err := r.Set(o.Prefixes, o.Except); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Responder) attach(o ResponderOptions) (err error) {
	r.link, err = attachTCX(o.Interface, r.objs.Answer)
	if !errors.Is(err, ErrNoTCX) || o.Ingress == nil {
		return err
	}
	if err := o.Ingress.SetIngress(o.Interface, o.Name, r.objs.Answer.FD()); err != nil {
		return err
	}
	r.detach = func() error { return o.Ingress.UnsetIngress(o.Interface, o.Name) }
	return nil
}

// allMulticast has an interface take in all multicast for as long as the packet
// socket is open, which receives nothing itself.
func allMulticast(index int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("open a packet socket: %w (needs CAP_NET_RAW)", err)
	}
	if err != nil {
		return -1, fmt.Errorf("open a packet socket: %w", err)
	}
	m := unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_ALLMULTI}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m); err != nil {
		return -1, errors.Join(fmt.Errorf("take in all multicast on interface %d: %w", index, err), unix.Close(fd))
	}
	return fd, nil
}

// Set changes what is answered for. At no moment is an exception of the new set
// answered for, nor is an address silent that is in the old set and the new. An
// error may leave a part of the change undone; another Set puts that right.
func (r *Responder) Set(prefixes []netip.Prefix, except []netip.Addr) error {
	want := make(map[netip.Prefix]bool, len(prefixes)+len(except))
	for _, p := range prefixes {
		if !p.IsValid() || !p.Addr().Is6() || p.Addr().Is4In6() {
			return fmt.Errorf("answer neighbour solicitations for %s: not an IPv6 prefix", p)
		}
		want[p.Masked()] = true
	}
	for _, a := range except {
		if a = a.WithZone(""); a.Is6() && !a.Is4In6() { // of IPv4 nothing is answered anyway
			want[netip.PrefixFrom(a, 128)] = false
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return fmt.Errorf("answer neighbour solicitations: %w", os.ErrClosed)
	}
	// Exceptions come first and go last.
	for _, answers := range []bool{false, true} {
		for p, yes := range want {
			if old, there := r.set[p]; yes != answers || there && old == yes {
				continue
			}
			if err := r.objs.Prefixes.Put(lpmKey(p), boolValue(yes)); err != nil {
				return fmt.Errorf("answer neighbour solicitations for %s: %w", p, plain(err))
			}
			r.set[p] = yes
		}
	}
	for _, answers := range []bool{true, false} {
		for p, yes := range maps.Clone(r.set) {
			if _, wanted := want[p]; wanted || yes != answers {
				continue
			}
			if err := r.objs.Prefixes.Delete(lpmKey(p)); err != nil {
				return fmt.Errorf("answer no neighbour solicitations for %s any more: %w", p, plain(err))
			}
			delete(r.set, p)
		}
	}
	return nil
}

func lpmKey(p netip.Prefix) *responderPrefix {
	a := p.Addr().As16()
	key := &responderPrefix{Bits: uint32(p.Bits())}
	for i := range key.Addr {
		key.Addr[i] = binary.NativeEndian.Uint32(a[4*i:])
	}
	return key
}

func boolValue(v bool) uint32 {
	if v {
		return 1
	}
	return 0
}

// Answered is the number of answers given, without a system call; after Close too.
func (r *Responder) Answered() uint64 {
	var n uint64
	if err := r.objs.Answered.Get(&n); err != nil {
		return 0 // cannot be: it is mapped memory, of this very size
	}
	return n
}

// Close stops answering.
func (r *Responder) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	var errs []error
	if r.link != nil {
		errs = append(errs, r.link.Close())
	}
	if r.detach != nil {
		errs = append(errs, r.detach())
	}
	if r.fd >= 0 {
		errs = append(errs, unix.Close(r.fd))
	}
	errs = append(errs, r.objs.Close())
	return errors.Join(errs...)
}

// ProbeResponder tries what NewResponder needs of the kernel and changes nothing.
// tryIngress tries it without links.
func ProbeResponder(tryIngress func(prog int) error) Feature {
	f := Feature{
		Name: "answers for whole IPv6 prefixes", Since: "5.15", Need: NeedNeighbours,
		Remedy: remedyIngress + ", have the upstream route the prefix to the host, or name single addresses",
	}
	return f.withRights(func() error {
		r, err := loadResponderWith(ResponderOptions{MAC: make(net.HardwareAddr, 6)})
		if err != nil {
			return err
		}
		return errors.Join(probeIngress(r.objs.Answer, tryIngress), r.Close())
	})
}
