/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What counts and judges the traffic of a path, whichever object's programs do
 * it: kernel.c for the daemon, pin.c for the processes of others. Both work on
 * the same two tables.
 */
#ifndef WAYOUT_PATHS_H
#define WAYOUT_PATHS_H

#include "kernel.h"

enum {
	RTT_BUCKETS = 16,
	RTT_SHIFT = 7, /* the first bucket holds round trips of up to 2^7 us */
};

enum {
	GUARD_SET = 1 << 0, /* the entry is in force */
	GUARD_V4 = 1 << 1,  /* the path may use IPv4 */
	GUARD_V6 = 1 << 2,
};

/* What a path may send. Addresses are in network order, already masked. */
struct guard {
	__u32 addr4;
	__u32 mask4;
	__u32 addr6[4];
	__u32 mask6[4];
	__u32 ifindex; /* 0: any */
	__u32 flags;
};

/*
 * One slot for each path number, four cache lines. Slot 0 belongs to no path:
 * it holds what cannot be attributed.
 */
struct counters {
	__u64 bytes_in;
	__u64 bytes_out;
	__u64 packets_in;
	__u64 packets_out;
	__u64 retransmits;
	__u64 tried;
	__u64 made;
	__u64 failed;
	__u64 closed;
	__u64 drop_source;
	__u64 drop_interface;
	__u64 drop_unknown;
	__u64 refused;
	__u64 unmarked;
	__u64 rtt_us; /* sum of the samples */
	__u64 reserved;
	__u64 rtt[RTT_BUCKETS];
};

_Static_assert(sizeof(struct guard) == 48, "guard");
_Static_assert(sizeof(struct counters) == 256, "counters");

/* max_entries of both is set at load: a power of two above the path numbers. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct guard);
} guards SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} slots SEC(".maps");

enum { DROP, PASS };

static __always_inline struct counters *slot(__u32 n)
{
	return bpf_map_lookup_elem(&slots, &n);
}

/* Counts in one field of a slot, or of slot 0 when the number has none. */
#define COUNT(n, field)                                                                            \
	do {                                                                                       \
		struct counters *_c = slot(n);                                                     \
		if (!_c)                                                                           \
			_c = slot(0);                                                              \
		if (_c)                                                                            \
			__sync_fetch_and_add(&_c->field, 1);                                       \
	} while (0)

/* The guard of a number, or NULL when none is in force. */
static __always_inline struct guard *guard_of(__u32 n)
{
	struct guard *g = bpf_map_lookup_elem(&guards, &n);

	return g && (g->flags & GUARD_SET) ? g : NULL;
}

static __always_inline bool right4(const struct guard *g, __u32 a)
{
	return (g->flags & GUARD_V4) && (a & g->mask4) == g->addr4;
}

static __always_inline bool right6(const struct guard *g, __u32 a, __u32 b, __u32 c, __u32 d)
{
	return (g->flags & GUARD_V6) &&
	       !(((a & g->mask6[0]) ^ g->addr6[0]) | ((b & g->mask6[1]) ^ g->addr6[1]) |
		 ((c & g->mask6[2]) ^ g->addr6[2]) | ((d & g->mask6[3]) ^ g->addr6[3]));
}

enum { EXTRA_SHIFT = 16 };

/*
 * Length of the network and transport headers that every segment of a GSO
 * packet repeats, or 0 when the packet is of no kind that is segmented.
 *
 * Extension headers of IPv6 are not looked for but one: the hop-by-hop jumbo
 * header, that the kernel puts before a packet over 64 KiB (BIG TCP) and takes
 * away again when it segments; its length is returned above EXTRA_SHIFT.
 *
 * A function of its own, with loads by offset: pointers on the stack that are
 * overwritten in part, and lengths added to them, would take CAP_PERFMON.
 */
static __attribute__((noinline)) __u32 headers(struct __sk_buff *skb)
{
	__u8 at[8] = {};
	__u32 net, proto, extra = 0;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, offsetof(struct ipv4, version_ihl), at, 1))
			return 0;
		net = (at[0] & 0x0f) * 4;
		if (bpf_skb_load_bytes(skb, offsetof(struct ipv4, protocol), at, 1))
			return 0;
		proto = at[0];
	} else {
		net = sizeof(struct ipv6);
		if (bpf_skb_load_bytes(skb, offsetof(struct ipv6, nexthdr), at, 1))
			return 0;
		proto = at[0];
		if (proto == IPPROTO_HOPOPTS) {
			if (bpf_skb_load_bytes(skb, net, at, sizeof(at)))
				return 0;
			if (at[1] != 0 || at[2] != IPV6_TLV_JUMBO)
				return 0;
			proto = at[0];
			extra = sizeof(at);
		}
	}
	if (proto == IPPROTO_UDP)
		return (net + 8) | extra << EXTRA_SHIFT;
	if (proto != IPPROTO_TCP || bpf_skb_load_bytes(skb, net + extra + 12, at, 1))
		return 0;
	/* The data's offset in words is the upper half of that byte. */
	return (net + (at[0] >> 4) * 4) | extra << EXTRA_SHIFT;
}

/*
 * Counts a packet as the wire has it: a GSO packet holds many, and one header
 * for all of them. A kernel that was handed a GSO packet without the number of
 * its segments (virtio) leaves it to us to work that out.
 */
static __always_inline void count(struct __sk_buff *skb, __u64 *bytes, __u64 *packets)
{
	__u64 len = skb->len;
	__u64 segs = skb->gso_segs;
	__u32 size = skb->gso_size;

	if (unlikely(segs > 1 || size)) {
		__u32 hdr = headers(skb);

		len -= hdr >> EXTRA_SHIFT;
		hdr &= (1 << EXTRA_SHIFT) - 1;
		if (!segs && len > hdr)
			segs = (len - hdr + size - 1) / size;
		if (segs > 1)
			len += (segs - 1) * hdr;
	}
	__sync_fetch_and_add(bytes, len);
	__sync_fetch_and_add(packets, segs ? segs : 1);
}

/* Whether the packet's source is the guard's. */
static __always_inline bool source(const struct __sk_buff *skb, const struct guard *g)
{
	void *data = (void *)(long)*(volatile const __u32 *)&skb->data;
	void *end = (void *)(long)*(volatile const __u32 *)&skb->data_end;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 *ip = data;

		return data + sizeof(*ip) <= end && right4(g, ip->saddr);
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 *ip = data;

		return data + sizeof(*ip) <= end &&
		       right6(g, ip->saddr[0], ip->saddr[1], ip->saddr[2], ip->saddr[3]);
	}
	return 0;
}

static __always_inline bool mapped(const __u32 *ip6)
{
	return !(ip6[0] | ip6[1]) && ip6[2] == bpf_htonl(0xffff);
}

static __always_inline __u32 log2(__u32 v)
{
	__u32 r = 0;

	if (v >> 16) {
		v >>= 16;
		r += 16;
	}
	if (v >> 8) {
		v >>= 8;
		r += 8;
	}
	if (v >> 4) {
		v >>= 4;
		r += 4;
	}
	if (v >> 2) {
		v >>= 2;
		r += 2;
	}
	return r + (v >> 1);
}

/* The bucket of a round trip: i holds what is at most 2^(RTT_SHIFT + i) us. */
static __always_inline __u32 bucket(__u32 us)
{
	__u32 v = us ? (us - 1) >> RTT_SHIFT : 0;
	__u32 b = v ? log2(v) + 1 : 0;

	return b < RTT_BUCKETS ? b : RTT_BUCKETS - 1;
}

static __always_inline void state_changed(struct counters *c, __u32 was, __u32 is)
{
	bool opening = was == BPF_TCP_SYN_SENT || was == BPF_TCP_SYN_RECV;

	/* No branches: the compiler merges them into one pointer and a length (CAP_PERFMON). */
	__sync_fetch_and_add(&c->made, opening && is == BPF_TCP_ESTABLISHED);
	__sync_fetch_and_add(&c->failed, opening && is == BPF_TCP_CLOSE);
	__sync_fetch_and_add(&c->closed, !opening && is == BPF_TCP_CLOSE);
}

/* Whether tcp_event has something to do. */
static __always_inline bool wanted(__u32 op)
{
	return op == BPF_SOCK_OPS_TCP_CONNECT_CB || op == BPF_SOCK_OPS_RETRANS_CB ||
	       op == BPF_SOCK_OPS_STATE_CB || op == BPF_SOCK_OPS_RTT_CB;
}

/* Counts what TCP tells of a socket that connects. c may be NULL. */
static __always_inline void tcp_event(struct bpf_sock_ops *ops, struct counters *c)
{
	__u32 us;

	if (!c)
		return;
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		/* Only a socket that connects is asked about again. */
		bpf_sock_ops_cb_flags_set(
		    ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RETRANS_CB_FLAG |
			     BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG);
		__sync_fetch_and_add(&c->tried, 1);
		break;
	case BPF_SOCK_OPS_RETRANS_CB:
		__sync_fetch_and_add(&c->retransmits, ops->args[1]);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		state_changed(c, ops->args[0], ops->args[1]);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		us = ops->srtt_us >> 3;
		__sync_fetch_and_add(&c->rtt_us, us);
		__sync_fetch_and_add(&c->rtt[bucket(us)], 1);
		break;
	}
}

#endif
