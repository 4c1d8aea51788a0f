/* clang-format off */
//go:build ignore
/* clang-format on */

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hands connections and datagrams for addresses that are not the host's to
 * sockets of the daemon.
 *
 * A rule and a local route (netcfg) have the kernel deliver here what comes in
 * by an interface for a diverted port; this says to which socket. A packet for
 * an address of the host itself comes by the same way as before, and is left
 * alone. Other entries are for whole prefixes of the host's own.
 *
 * Where the socket is gone the lookup ends without one: nobody else's wildcard
 * listener takes what was meant for the daemon. So it does for what comes in by
 * an interface that nobody knew of yet: the rules name interfaces, and go with
 * the name to another one.
 */
#include "kernel.h"

enum {
	MAX_ENTRIES = 384,
	/* Of one set of entries and the next, and 0. */
	MAX_COUNTED = 2 * MAX_ENTRIES + 1,
	MAX_HEADERS = 8, /* of IPv6, before and with the fragment header */
	ANY_PORT = 0xffff,
	/* Of an IPv4 header: more fragments, and the offset. */
	FRAGMENT4 = 0x3fff,
};

/* Places of a server's sockets, from its first one on. */
enum { SOCKET_UDP = 2, SOCKET_V6 = 1 };

/*
 * What is taken: by an interface for any address but the host's, or else for the
 * addresses of a prefix. Of each kind the first that matches decides. Addresses
 * are in network order, IPv4 ones mapped to IPv6.
 */
struct entry {
	__u32 ifindex;
	__u32 socket;
	__u32 addr[4];
	__u32 mask[4];
	__u16 first; /* ports, both included */
	__u16 last;
	__u8 protocol;
	__u8 others; /* not for the host's own addresses */
	__u8 reserved[2];
};

_Static_assert(sizeof(struct entry) == 48, "entry");

/*
 * Nobody writes to them here, and yet they are no constants: the verifier would
 * tell each from the others, and follow every combination of those that match.
 */
volatile struct entry entries[MAX_ENTRIES] = {};
volatile const __u32 count = 0;

/* Whether the kernel says by which interface a packet has come in (5.17). */
volatile const __u32 by_interface = 1;

/* The longest match decides whether an address is the host's own. */
struct net {
	__u32 bits;
	__u32 addr[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct net);
	__type(value, __u32);
} own SEC(".maps");

/* The interfaces that were there when the entries were made. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u32);
} known SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

/* By interface, 0 for entries without one; those of entries are all there. */
struct drops {
	__u64 fragments;
	__u64 unserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_COUNTED);
	__type(key, __u32);
	__type(value, struct drops);
} dropped SEC(".maps");

static __always_inline int drop_unserved(__u32 ifindex)
{
	struct drops *d = bpf_map_lookup_elem(&dropped, &ifindex);

	if (d)
		__sync_fetch_and_add(&d->unserved, 1);
	return SK_DROP;
}

static __always_inline int drop_fragment(__u32 ifindex)
{
	struct drops *d = bpf_map_lookup_elem(&dropped, &ifindex);

	if (d)
		__sync_fetch_and_add(&d->fragments, 1);
	return TCX_DROP;
}

static __always_inline bool is_own(const struct net *key)
{
	__u32 *yes = bpf_map_lookup_elem(&own, key);

	return yes && *yes;
}

static __always_inline void mapped4(struct net *to, __u32 addr)
{
	to->bits = 128;
	to->addr[0] = to->addr[1] = 0;
	to->addr[2] = bpf_htonl(0xffff);
	to->addr[3] = addr;
}

/*
 * Whether an entry has one of some ports of a protocol. It is one condition, by the
 * signs of differences: of several the verifier would follow what each says of the
 * arguments.
 */
static __always_inline bool has_port(volatile struct entry *x, __u32 proto, __u32 first, __u32 last)
{
	return !((x->protocol ^ proto) | ((last - x->first) | (x->last - first)) >> 31);
}

/*
 * The loops are functions of their own, and global ones: the verifier looks at each
 * once, whatever its arguments, and not for every way that leads to it.
 */

/* The first entry for an address of the host's own: its place, and 1; 0: none. */
__noinline int at_prefix(__u32 proto_port, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u32 proto = proto_port >> 16, port = proto_port & 0xffff;

	for (__u32 i = 0; i < MAX_ENTRIES; i++) {
		volatile struct entry *x = &entries[i];

		if (i >= count)
			break;
		if (x->others || !has_port(x, proto, port, port))
			continue;
		if (!(((a & x->mask[0]) ^ x->addr[0]) | ((b & x->mask[1]) ^ x->addr[1]) |
		      ((c & x->mask[2]) ^ x->addr[2]) | ((d & x->mask[3]) ^ x->addr[3])))
			return i + 1;
	}
	return 0;
}

enum { ELSEWHERE = -1 };

/* The first entry for what comes in by an interface likewise; ELSEWHERE: others have one. */
__noinline int at_interface(__u32 proto, __u32 port, __u32 from)
{
	int found = 0;

	for (__u32 i = 0; i < MAX_ENTRIES; i++) {
		volatile struct entry *x = &entries[i];

		if (i >= count)
			break;
		if (!x->others || !has_port(x, proto, port, port))
			continue;
		if (!by_interface || x->ifindex == from)
			return i + 1;
		found = ELSEWHERE;
	}
	return found;
}

/* Whether an entry of an interface has one of some ports of a protocol. */
__noinline int is_taken(__u32 ifindex, __u32 proto, __u32 first, __u32 last)
{
	for (__u32 i = 0; i < MAX_ENTRIES; i++) {
		volatile struct entry *x = &entries[i];

		if (i >= count)
			break;
		if (x->ifindex == ifindex && has_port(x, proto, first, last))
			return 1;
	}
	return 0;
}

/* Whether an entry of an interface has ports, and not all, of a protocol. */
__noinline int has_ports(__u32 ifindex, __u32 proto)
{
	for (__u32 i = 0; i < MAX_ENTRIES; i++) {
		volatile struct entry *x = &entries[i];

		if (i >= count)
			break;
		/* A rule without ports takes fragments too, to be put together. */
		if (x->ifindex == ifindex && x->protocol == proto &&
		    (x->first || x->last != ANY_PORT))
			return 1;
	}
	return 0;
}

__noinline int has_entry(__u32 ifindex)
{
	for (__u32 i = 0; i < MAX_ENTRIES; i++) {
		if (i >= count)
			break;
		if (entries[i].ifindex == ifindex)
			return 1;
	}
	return 0;
}

/* Once for each connection, and for each datagram of no connected socket. */
SEC("sk_lookup")
int divert(struct bpf_sk_lookup *ctx)
{
	__u32 proto = ctx->protocol, port = ctx->local_port, from = 0;
	volatile struct entry *e;
	struct bpf_sock *sk;
	struct net to = {};
	__u32 four, at;
	int found = 0;
	long err;

	/* One load each, or the compiler selects between the two places. */
	four = *(volatile const __u32 *)&ctx->local_ip4;
	to.bits = 128;
	for (int i = 0; i < 4; i++)
		to.addr[i] = *(volatile const __u32 *)&ctx->local_ip6[i];
	if (ctx->family == AF_INET)
		mapped4(&to, four);
	if (by_interface)
		from = *(volatile const __u32 *)&ctx->ingress_ifindex;
	if (!is_own(&to))
		found = at_interface(proto, port, from);
	if (found == ELSEWHERE && from && !bpf_map_lookup_elem(&known, &from))
		return drop_unserved(0);
	if (found <= 0)
		found =
		    at_prefix(proto << 16 | port, to.addr[0], to.addr[1], to.addr[2], to.addr[3]);
	if (found <= 0 || found > MAX_ENTRIES)
		return SK_PASS;
	e = &entries[found - 1];
	at = e->socket + (proto == IPPROTO_UDP ? SOCKET_UDP : 0) +
	     (ctx->family == AF_INET ? 0 : SOCKET_V6);
	sk = bpf_map_lookup_elem(&sockets, &at);
	if (!sk)
		return drop_unserved(e->ifindex);
	err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return err ? drop_unserved(e->ifindex) : SK_PASS;
}

enum { NO_FRAGMENT = 0, FRAGMENT_OF = 256, UNREADABLE = 512 };

/* FRAGMENT_OF and a protocol, of a packet that is a fragment. */
static __always_inline __u32 fragment4(struct __sk_buff *skb, struct net *to)
{
	struct ipv4 ip = {};

	if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
		return NO_FRAGMENT;
	if (!(ip.frag & bpf_htons(FRAGMENT4)))
		return NO_FRAGMENT;
	mapped4(to, ip.daddr);
	return FRAGMENT_OF | ip.protocol;
}

/* Of what is none, the protocol and where it begins are told too. */
static __always_inline __u32 fragment6(struct __sk_buff *skb, struct net *to, __u8 *proto,
				       __u32 *begin)
{
	struct ipv6 ip = {};
	__u32 at = sizeof(ip);
	__u8 next;

	if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
		return NO_FRAGMENT;
	to->bits = 128;
	for (int i = 0; i < 4; i++)
		to->addr[i] = ip.daddr[i];
	next = ip.nexthdr;
	for (int i = 0; i < MAX_HEADERS; i++) {
		__u8 head[2] = {};

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_DSTOPTS) {
			*proto = next;
			*begin = at;
			return NO_FRAGMENT;
		}
		if (bpf_skb_load_bytes_relative(skb, at, head, sizeof(head), BPF_HDR_START_NET))
			return UNREADABLE;
		if (next == IPPROTO_FRAGMENT)
			return FRAGMENT_OF | head[0];
		next = head[0];
		at += (head[1] + 1) * 8;
	}
	return UNREADABLE;
}

/* Of what a client is told by the daemon in others' names. */
volatile const __u32 answers_mark = 0;
volatile const __u32 answers_mask = 0;

/* Beginning of an ICMP message. */
struct icmp {
	__u8 type;
	__u8 code;
	__u16 check;
	__u32 rest;
};

enum {
	UNREACHABLE4 = 3,
	QUENCH4 = 4,
	EXCEEDED4 = 11,
	PARAMETER4 = 12,
	LAST_ERROR6 = 127, /* RFC 4443 section 2.1 */
};

/* Where the IP header is that an ICMP error is about; 0: it is none. */
static __always_inline __u32 error4(struct __sk_buff *skb)
{
	struct icmp icmp = {};
	struct ipv4 ip = {};
	__u32 at;

	if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET) ||
	    ip.protocol != IPPROTO_ICMP)
		return 0;
	at = (ip.version_ihl & 15) * 4;
	if (bpf_skb_load_bytes_relative(skb, at, &icmp, sizeof(icmp), BPF_HDR_START_NET))
		return 0;
	if (icmp.type != UNREACHABLE4 && icmp.type != QUENCH4 && icmp.type != EXCEEDED4 &&
	    icmp.type != PARAMETER4)
		return 0;
	return at + sizeof(icmp);
}

static __always_inline __u32 error6(struct __sk_buff *skb)
{
	struct icmp icmp = {};
	struct ipv6 ip = {};

	if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET) ||
	    ip.nexthdr != IPPROTO_ICMPV6)
		return 0;
	if (bpf_skb_load_bytes_relative(skb, sizeof(ip), &icmp, sizeof(icmp), BPF_HDR_START_NET) ||
	    icmp.type > LAST_ERROR6)
		return 0;
	return sizeof(ip) + sizeof(icmp);
}

/*
 * Whether a packet is an ICMP error of what the daemon has told a client in the
 * name of another host. It is for that host by its address, and for the daemon's
 * socket by what it is about: forwarded, it would show who the client is, and
 * the socket would never learn what the way back carries.
 */
static __always_inline bool is_answered(struct __sk_buff *skb)
{
	struct net from = {};
	__u8 fragment[8] = {};
	__u16 port = 0;
	__u32 at;
	__u8 proto;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 ip = {};

		at = error4(skb);
		if (!at || bpf_skb_load_bytes_relative(skb, at, &ip, sizeof(ip), BPF_HDR_START_NET))
			return 0;
		mapped4(&from, ip.saddr);
		proto = ip.protocol;
		at += (ip.version_ihl & 15) * 4;
		if (ip.frag & bpf_htons(FRAGMENT4 & 0x1fff))
			at = 0;
	} else {
		struct ipv6 ip = {};

		at = error6(skb);
		if (!at || bpf_skb_load_bytes_relative(skb, at, &ip, sizeof(ip), BPF_HDR_START_NET))
			return 0;
		from.bits = 128;
		for (int i = 0; i < 4; i++)
			from.addr[i] = ip.saddr[i];
		proto = ip.nexthdr;
		at += sizeof(ip);
		if (proto == IPPROTO_FRAGMENT) {
			if (bpf_skb_load_bytes_relative(skb, at, fragment, sizeof(fragment),
							BPF_HDR_START_NET))
				return 0;
			proto = fragment[0];
			at += sizeof(fragment);
			if (fragment[2] || fragment[3] & 0xf8)
				at = 0;
		}
	}
	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		return 0;
	/* A later fragment has no ports: any of the protocol will do. */
	if (at && bpf_skb_load_bytes_relative(skb, at, &port, sizeof(port), BPF_HDR_START_NET))
		return 0;
	port = bpf_htons(port);
	return is_taken(skb->ifindex, proto, port, at ? port : ANY_PORT) && !is_own(&from);
}

/* The place of a socket that is there while the daemon serves. */
volatile const __u32 alive = 0;

static __always_inline bool serving(void)
{
	__u32 at = alive;
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &at);

	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

/*
 * Whether a packet of IPv6 is for a daemon that is gone. Where the lookup ends
 * without a socket the kernel refuses such packets, in the name of whom they are
 * for, and by the way that it would take itself: for a client that is in no
 * network of the host's, by an uplink. Of IPv4 it says nothing.
 */
static __always_inline bool is_unserved(struct __sk_buff *skb, const struct net *to, __u8 proto,
					__u32 begin)
{
	__u16 port = 0;

	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		return 0;
	if (likely(serving()))
		return 0;
	if (bpf_htonl(to->addr[0]) >> 24 == 0xff ||
	    bpf_skb_load_bytes_relative(skb, begin + 2, &port, sizeof(port), BPF_HDR_START_NET))
		return 0;
	port = bpf_htons(port);
	return is_taken(skb->ifindex, proto, port, port) && !is_own(to);
}

enum { OWN = 0, VLAN = 1, TAGS = 2 };

/*
 * Whether a frame is a VLAN's, and not the interface's own. One with a priority
 * and no VLAN is its own, which the kernel finds out later than this program
 * runs. It takes off any number of such tags; with a second one nothing is seen
 * of the packet here, and nobody sends that.
 */
static __always_inline int tagged(struct __sk_buff *skb)
{
	__u8 tci[2] = {};

	if (!skb->vlan[0])
		return OWN;
	if (skb->vlan[1] & 0xfff)
		return VLAN;
	if (skb->protocol != bpf_htons(ETH_P_8021Q) && skb->protocol != bpf_htons(ETH_P_8021AD))
		return OWN;
	if (bpf_skb_load_bytes_relative(skb, 0, tci, sizeof(tci), BPF_HDR_START_NET))
		return TAGS;
	return (tci[0] & 0xf) | tci[1] ? VLAN : TAGS;
}

/*
 * A fragment has no ports that a rule could go by, so that the rule for a port
 * lets it through: it is dropped, unless it is for the host itself. One of
 * IPv6 may have more headers before its transport header, which hide that as
 * well.
 */
SEC("tcx/ingress")
int fragments(struct __sk_buff *skb)
{
	__u32 found, first, begin = 0;
	struct net to = {};
	__u8 proto = 0;
	int tag;

	tag = tagged(skb);
	if (unlikely(tag == VLAN))
		return TCX_NEXT;
	if (unlikely(tag == TAGS))
		return drop_fragment(skb->ifindex);
	if (skb->protocol == bpf_htons(ETH_P_IP))
		found = fragment4(skb, &to);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		found = fragment6(skb, &to, &proto, &begin);
	else
		return TCX_NEXT;
	if (likely(found == NO_FRAGMENT)) {
		if (unlikely(is_answered(skb)))
			skb->mark = (skb->mark & ~answers_mask) | answers_mark;
		else if (unlikely(is_unserved(skb, &to, proto, begin))) {
			drop_unserved(skb->ifindex);
			return TCX_DROP;
		}
		return TCX_NEXT;
	}
	proto = found & 0xff;
	if (found == UNREADABLE || proto == IPPROTO_HOPOPTS || proto == IPPROTO_ROUTING ||
	    proto == IPPROTO_FRAGMENT || proto == IPPROTO_DSTOPTS) {
		if (skb->protocol != bpf_htons(ETH_P_IPV6) || !has_entry(skb->ifindex))
			return TCX_NEXT;
	} else if (!has_ports(skb->ifindex, proto)) {
		return TCX_NEXT;
	}
	/* To a group or to all: nothing that is forwarded to one host. */
	first = bpf_htonl(skb->protocol == bpf_htons(ETH_P_IP) ? to.addr[3] : to.addr[0]) >> 24;
	if (first == 0xff || (skb->protocol == bpf_htons(ETH_P_IP) && first >= 0xe0))
		return TCX_NEXT;
	return is_own(&to) ? TCX_NEXT : drop_fragment(skb->ifindex);
}

/* No helper here is reserved to programs under the GPL. */
char license_of_programs[] SEC("license") = "Apache-2.0";
