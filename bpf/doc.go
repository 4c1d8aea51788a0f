// Package bpf counts the traffic of egress paths in the kernel and stops what
// would leave by the wrong one. Its eBPF programs (kernel.c) are attached to a
// leaf cgroup that holds the daemon alone; counters are read from mapped
// memory, without system calls. Others (pin.c) have the processes of a cgroup
// leave by one path.
//
// # Order of calls
//
//	layout, _ := NewLayout(mask)       // what of the mark is ours
//	numbers := NewNumbers(layout.MaxPath())
//	numbers.Hold(PinnedNumbers(pins, layout)...)
//	leaf, _ := MakeLeaf("wayout-...")  // before any socket is made
//	progs, _ := Load(Options{...})     // from here on every socket needs a mark
//	num, _ := numbers.Take()           // for each path, before Load or after
//	progs.SetPath(num, Guard{...})     // before its first socket
//	layout.Mark(ClassPath, uplink, num)
//
// A path that goes: no new sockets, Numbers.Release; when Counters.Open and
// Counters.Connecting of its number are 0 and its datagram sockets are closed,
// ClearPath and Numbers.Free. At the end Close and Leaf.Remove, or Leave so
// that the pinned guard stays.
//
// # The mark
//
// Every socket of the daemon carries a 32-bit mark (SO_MARK) of three fields,
// within a mask that is the operator's choice. With DefaultMask, 0xff01ffff:
//
//	31 30 | 29 28 27 26 25 24 | 23 ... 17 | 16 ... 0
//	class |      uplink       |   others' | path number
//
//	class 1  client side: listeners, and all they accept (it inherits the mark)
//	class 2  control: name lookups, metrics, health
//	class 3  path: connections and datagrams that leave by a path
//
// Routing rules match class and uplink (UplinkMatch), so there is one for each
// uplink and family however many paths there are. Uplink 0 has no rule: the
// host's main routing. Path number 0 is no path's.
//
// Other software has marks as well. Two kinds of overlap are possible, and
// Layout.Taken finds both for a rule that is there:
//
//   - A rule of others matches marks of ours. Kubernetes looks at single bits
//     (0x4000, 0x8000); with DefaultMask these are set in path numbers from
//     16,384 up. Tailscale compares a byte (0xff0000) with 0x04 and 0x08, which
//     under DefaultMask is 0 or 1.
//   - A rule of ours matches marks of others: never where all three of class,
//     uplink and mask are as above, unless their marks have our class bits.
//
// A mask may have gaps, so that bits can be left out: 0xff003fff keeps clear of
// both, and still has 7 uplinks and 131,071 path numbers. Since the programs
// find the path number by two shifts, its bits may lie in two runs at most.
//
// A path number is not given to another path while a socket has it: Numbers.
//
// # What is counted
//
// Packets and bytes as the wire has them: a GSO or GRO packet counts as its
// segments, each with its IP and transport header. An IPv4 header has the
// length it says; of IPv6 no extension header is looked behind but that of BIG
// TCP, so that the segments of a GSO packet with others count their headers
// once. A datagram that IP cuts into fragments counts as one packet. Connections,
// retransmits (segments, as the SNMP counter RetransSegs) and round-trip times
// are TCP's own, told by sockops for sockets that connect.
//
// # What is guarded
//
// A packet of a path's socket leaves only from a source within the path's
// prefix and by the path's interface; one of a socket without a mark of ours,
// or of a number without a guard, not at all. UDP learns it at once (EPERM);
// TCP would only see its SYN go unanswered, so that connect and sendto are
// asked first, before there is a packet: EPERM. What goes to the host itself by
// the loopback interface leaves by no interface; its source is checked all the
// same.
//
// # Pinned processes
//
// Programs.Pin holds the processes of another cgroup to a path (pin.c). Its
// programs have the path as constants and share the tables: sockets get the
// path's mark when they are made, the path's address when they connect or send,
// and every packet is judged by the path's guard and counted under its number,
// whatever the socket's own mark; so it is with sockets that are older than the
// pin. What goes to the host itself by the loopback interface is neither bound
// nor judged nor counted. A Pin lives in a directory of its own in the bpf file
// system, apart from PinDir, and outlives Programs and process; FindPins lists
// what is there, and Pin takes over what it finds in its directory.
//
//	progs.Pin(cgroup, dir, about, Exit{Num: num, Mark: mark, V4: addr})
//	pin.Point(exit)                    // another path, or none
//	pin.Remove()                       // or Leave, and it goes on
//
// LoadTables is for who pins without being a daemon.
//
// # What is neither counted nor guarded
//
// Programs on a cgroup see packets of full sockets of that cgroup. They do not
// see acknowledgements out of TIME_WAIT, resets and ICMP errors of the kernel
// itself, ARP and neighbour discovery, raw frames (AF_PACKET), and sockets made
// before MakeLeaf. They run after netfilter's POSTROUTING: a MASQUERADE of the
// host changes the source first, and everything is dropped.
//
// # Restarts
//
// With a PinDir the links of the programs are pinned, and hold when the daemon
// is killed. Its sockets are then being closed by the kernel, which may send on
// their behalf for minutes, and they stay with the leaf. The next daemon of the
// same name enters the leaf that is still there, so that its first socket is
// guarded already, and Load replaces each program by one atomic update of its
// link. The tables are pinned as well: guards and connection counts of the old
// numbers are carried over, so that what is being closed ends as it should and
// the new daemon knows when a number is free.
//
// # Whole prefixes
//
// A guard's prefix lets each of its addresses pass. For those of an IPv6 prefix on a
// shared link somebody has to answer neighbour solicitations, which the kernel does
// for the addresses of its interfaces alone: a Responder (responder.c), that
// has nothing to do with cgroup, mark and pins.
//
// # Requirements
//
// Linux 5.15, cgroup v2, CAP_BPF and CAP_NET_ADMIN (CAP_SYS_ADMIN to mount the bpf file
// system); CAP_PERFMON as well for the verifiers up to 6.14, which without it let no
// part of what is kept on the stack be overwritten (6.17 does); for a Responder
// CAP_NET_RAW; for it and the fragments of a Diverter Linux 6.6 or an Ingress. The
// objects are for little-endian CPUs and are rebuilt, byte for byte, by go generate with
// clang 14.
package bpf
