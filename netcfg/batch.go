package netcfg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// batchSize is how many changes go to the kernel with one system call. Its answers
// have to fit into the socket's buffer, of 208 KiB as a rule, at about 1 KiB each.
const batchSize = 64

// batcher is a Kernel that carries out changes of addresses many at a time.
type batcher interface{ DoAddresses(ops []Op) []error }

// addresses carries out changes that stand next to each other in a plan and are
// about addresses, on which nothing of each other's stands. Without permission it
// stops, and gives fewer errors.
func addresses(k Kernel, ops []Op) []error {
	if b, is := k.(batcher); is {
		return b.DoAddresses(ops)
	}
	errs := make([]error, len(ops))
	for i, o := range ops {
		if errs[i] = k.Do(o); errors.Is(errs[i], unix.EPERM) {
			return errs[:i+1]
		}
	}
	return errs
}

// DoAddresses carries out changes of addresses, in order, and gives the error of
// each, as Do does. Without permission it stops, and gives fewer.
func (k *Netlink) DoAddresses(ops []Op) []error {
	errs := make([]error, len(ops))
	for i := 0; i < len(ops); {
		n := min(batchSize, len(ops)-i)
		if k.journal != nil || n == 1 {
			errs[i], n = k.Do(ops[i]), 1
		} else {
			k.batch(ops[i:i+n], errs[i:i+n])
		}
		if i += n; errors.Is(errs[i-1], unix.EPERM) {
			return errs[:i]
		}
	}
	return errs
}

// batch carries out a few changes of addresses by one message of many.
func (k *Netlink) batch(ops []Op, errs []error) {
	answers, err := k.exchange(ops)
	for i, o := range ops {
		switch errno, answered := answers[i]; {
		case !answered:
			errs[i] = err
		case errno == 0 || o.Verb == Add && errno == unix.EEXIST || o.Verb == Delete && isGone(errno):
			if errno != 0 {
				errs[i] = errno
			}
		default:
			errs[i] = k.Do(o) // it says more of what is wrong
		}
	}
}

// exchange sends changes and gathers what the kernel says of each, by position. With an
// error it has not answered to all.
func (k *Netlink) exchange(ops []Op) (map[int]unix.Errno, error) {
	s := k.sock.Socket
	s.Lock()
	defer s.Unlock()
	last := atomic.AddUint32(&k.sock.Seq, uint32(len(ops)))
	first := last - uint32(len(ops)) + 1
	var out []byte
	for i, o := range ops {
		typ, flags := unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK
		if o.Verb == Delete {
			typ, flags = unix.RTM_DELADDR, unix.NLM_F_ACK
		}
		req := nl.NewNetlinkRequest(typ, flags)
		req.Seq = first + uint32(i)
		req.AddRawData(encodeAddr(o.Addr)) // attributes are padded: the next message begins where it has to
		out = append(out, req.Serialize()...)
	}
	if err := unix.Sendto(s.GetFd(), out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("send %d changes: %w", len(ops), err)
	}
	answers := make(map[int]unix.Errno, len(ops))
	for len(answers) < len(ops) {
		msgs, from, err := s.Receive()
		if err != nil {
			return answers, fmt.Errorf("receive the answers to %d changes: %w", len(ops), err)
		}
		if from.Pid != nl.PidKernel {
			return answers, errors.New("receive the answers to changes: they are not the kernel's")
		}
		for _, m := range msgs {
			if i := m.Header.Seq - first; m.Header.Type == unix.NLMSG_ERROR && i < uint32(len(ops)) && len(m.Data) >= 4 {
				answers[int(i)] = unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			}
		}
	}
	return answers, nil
}
