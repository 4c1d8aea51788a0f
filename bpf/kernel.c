/* clang-format off */
//go:build ignore
/* clang-format on */

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counters and guard of the egress paths, for the sockets of one cgroup.
 *
 * A socket says by its mark what it is for (the layout is described in doc.go):
 * the client's side and control traffic pass; a socket of a path is counted
 * under the path's number and may only send what the path's guard allows; a
 * socket without a mark of ours may send nothing.
 *
 * Only the user-space interface of the kernel is read: no CO-RE relocations, so
 * that one object serves every kernel since 5.15 and every little-endian CPU.
 */
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

/*
 * The mark's layout. A path number lies in at most two runs of bits:
 * ((mark >> low_shift) & low_mask) | ((mark >> high_shift) & high_mask).
 */
volatile const __u32 class_mask = 0;
volatile const __u32 class_path = 0; /* the class bits of a path's socket */
volatile const __u32 low_shift = 0;
volatile const __u32 low_mask = 0;
volatile const __u32 high_shift = 0;
volatile const __u32 high_mask = 0;

/*
 * For tests alone: BPF_PROG_TEST_RUN brings a socket of its own, whose mark
 * nobody can set, so that the packet's mark has to stand for it.
 */
volatile const __u32 test_run = 0;

static __always_inline __u32 number(__u32 mark)
{
	return ((mark >> low_shift) & low_mask) | ((mark >> high_shift) & high_mask);
}

static __always_inline bool of_path(__u32 mark)
{
	return (mark & class_mask) == class_path;
}

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

/*
 * The mark of the socket, not of the packet: a packet's mark can be changed on
 * its way, and per message. The kernel runs these programs for full sockets
 * only (for a SYN-ACK that is the listener), never for one in TIME_WAIT.
 */
static __always_inline bool mark_of(const struct __sk_buff *skb, __u32 *mark)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 0;
	/* One load each, or the compiler selects between the two addresses. */
	*mark = *(volatile const __u32 *)&sk->mark;
	if (test_run)
		*mark = *(volatile const __u32 *)&skb->mark;
	return 1;
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

enum { DROP, PASS };

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	struct counters *c;
	struct guard *g;
	__u32 mark, n;
	bool right;

	if (!mark_of(skb, &mark))
		return PASS;
	if (!of_path(mark)) {
		if (likely(mark & class_mask))
			return PASS;
		COUNT(0, unmarked);
		return DROP;
	}
	n = number(mark);
	c = slot(n);
	g = guard_of(n);
	if (unlikely(!c || !g)) {
		COUNT(n, drop_unknown);
		return DROP;
	}
	right = source(skb, g);
	if (unlikely(!right)) {
		__sync_fetch_and_add(&c->drop_source, 1);
		return DROP;
	}
	/* What goes to the host itself by lo leaves by no interface. */
	if (unlikely(g->ifindex && skb->ifindex != g->ifindex &&
		     skb->ifindex != LOOPBACK_IFINDEX)) {
		__sync_fetch_and_add(&c->drop_interface, 1);
		return DROP;
	}
	count(skb, &c->bytes_out, &c->packets_out);
	return PASS;
}

SEC("cgroup_skb/ingress")
int ingress(struct __sk_buff *skb)
{
	struct counters *c;
	__u32 mark;

	if (!mark_of(skb, &mark) || !of_path(mark))
		return PASS;
	c = slot(number(mark));
	if (c)
		count(skb, &c->bytes_in, &c->packets_in);
	return PASS;
}

static __always_inline bool mapped(const __u32 *ip6)
{
	return !(ip6[0] | ip6[1]) && ip6[2] == bpf_htonl(0xffff);
}

/*
 * Whether a socket may connect or send from the source it has, asked before a
 * route or a port is taken, so that a wrong dial fails at once (EPERM) and not
 * by a timeout. A source that is not bound yet reads as zero and is right only
 * for a path that may use any address.
 */
static __always_inline int ask(const struct bpf_sock *sk, bool v4, __u32 a, __u32 b, __u32 c,
			       __u32 d)
{
	__u32 mark = sk->mark;
	struct guard *g;
	__u32 n;

	if (!of_path(mark)) {
		if (likely(mark & class_mask))
			return PASS;
		COUNT(0, refused);
		return DROP;
	}
	n = number(mark);
	g = guard_of(n);
	if (g && (v4 ? right4(g, a) : right6(g, a, b, c, d)) &&
	    (!g->ifindex || !sk->bound_dev_if || sk->bound_dev_if == g->ifindex))
		return PASS;
	COUNT(n, refused);
	return DROP;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return ask(sk, 1, sk->src_ip4, 0, 0, 0);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 to[3] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2]};

	if (mapped(to))
		return ask(sk, 1, sk->src_ip4, 0, 0, 0);
	return ask(sk, 0, sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]);
}

/* A datagram's own source (IP_PKTINFO) counts where it names one. */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return ask(ctx->sk, 1, ctx->msg_src_ip4, 0, 0, 0);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return ask(ctx->sk, 0, ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2],
		   ctx->msg_src_ip6[3]);
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

SEC("sockops")
int tcp_events(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct counters *c;
	__u32 us;

	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
	case BPF_SOCK_OPS_RETRANS_CB:
	case BPF_SOCK_OPS_STATE_CB:
	case BPF_SOCK_OPS_RTT_CB:
		break;
	default:
		return PASS;
	}
	if (!sk || !of_path(sk->mark))
		return PASS;
	c = slot(number(sk->mark));
	if (!c)
		return PASS;
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
	return PASS;
}

/* No helper here is reserved to programs under the GPL. */
char license_of_programs[] SEC("license") = "Apache-2.0";
