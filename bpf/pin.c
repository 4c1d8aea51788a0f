/* clang-format off */
//go:build ignore
/* clang-format on */

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pins the processes of one cgroup to one path, which they know nothing of.
 *
 * Their sockets get the path's mark when they are made and the path's address
 * when they connect or send; whatever leaves all the same from another source
 * or by another interface is dropped, whoever bound it and whatever its mark.
 * Traffic to the host itself by the loopback interface is none of a path's.
 *
 * Each cgroup has its programs to itself, with the path as constants: a pin
 * that outlives the daemon needs nothing but them and the tables.
 */
#include "paths.h"

/* The path. Number 0 is no path's and has no guard: then nothing leaves. */
volatile const __u32 path = 0;
volatile const __u32 path_mark = 0;
volatile const __u32 has4 = 0;
volatile const __u32 has6 = 0;
volatile const __u32 addr4 = 0; /* addresses in network order */
volatile const __u32 addr6[4] = {};
volatile const __u64 device[2] = {}; /* name to bind to, or zero */

/* Whether the kernel has bpf_set_retval (5.18). */
volatile const __u32 has_retval = 0;

/* TCP connections of this cgroup's processes; their slot has those of others too. */
struct conns {
	__u64 tried;
	__u64 made;
	__u64 failed;
	__u64 closed;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct conns);
} conns SEC(".maps");

/* 127.0.0.0/8, and 0.0.0.0, which the kernel takes for it. */
static __always_inline bool loopback4(__u32 a)
{
	return !a || (a & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

/* ::1 and ::, and the same of IPv4 in mapped form. */
static __always_inline bool loopback6(const __u32 *a)
{
	if (mapped(a))
		return loopback4(a[3]);
	return !(a[0] | a[1] | a[2] | (a[3] & ~bpf_htonl(1)));
}

static __always_inline bool own6(const __u32 *a)
{
	return has6 &&
	       !((a[0] ^ addr6[0]) | (a[1] ^ addr6[1]) | (a[2] ^ addr6[2]) | (a[3] ^ addr6[3]));
}

static __always_inline int refuse(void)
{
	COUNT(path, refused);
	return DROP; /* EPERM */
}

/* The path cannot serve this socket: it has no such family, or lost its address. */
static __always_inline int unavailable(void)
{
	if (has_retval)
		bpf_set_retval(-EADDRNOTAVAIL);
	return refuse();
}

/*
 * Puts the path's mark on a socket that was made before it was this path's, and
 * binds it to the path's interface, unless the process has bound it to another.
 */
static __always_inline bool dress(struct bpf_sock_addr *ctx, const struct bpf_sock *sk)
{
	struct guard *g = guard_of(path);
	__u32 dev = sk->bound_dev_if;
	__u32 mark = path_mark;
	__u64 name[2] = {device[0], device[1]};

	if (!g || (dev && g->ifindex && dev != g->ifindex))
		return 0;
	if (sk->mark != mark && bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return 0;
	if (name[0] && !dev && bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, name, sizeof(name)))
		return 0;
	return 1;
}

SEC("cgroup/sock_create")
int sock_create(struct bpf_sock *ctx)
{
	ctx->mark = path_mark;
	return PASS;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct sockaddr_in from = {.family = AF_INET, .addr = addr4};
	struct bpf_sock *sk = ctx->sk;
	__u32 src = sk->src_ip4;

	if (loopback4(ctx->user_ip4) || (src && loopback4(src)))
		return PASS;
	if (path && !has4)
		return unavailable();
	if ((src && src != addr4) || !dress(ctx, sk))
		return refuse();
	/* Without a port: that is chosen when the destination is known. */
	if (!src && bpf_bind(ctx, &from, sizeof(from)))
		return unavailable();
	return PASS;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 to[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
	__u32 src[4] = {sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]};
	struct sockaddr_in6 from = {.family = AF_INET6};
	bool v4 = mapped(to), bound = src[0] | src[1] | src[2] | src[3], own;

	if (mapped(src) && !src[3])
		bound = 0;
	if (loopback6(to) || (bound && loopback6(src)))
		return PASS;
	if (path && !(v4 ? has4 : has6))
		return unavailable();
	own = mapped(src) ? src[3] == addr4 && has4 : own6(src);
	if ((bound && !own) || !dress(ctx, sk))
		return refuse();
	if (bound)
		return PASS;
	if (v4) {
		from.addr[2] = bpf_htonl(0xffff);
		from.addr[3] = addr4;
	} else {
		from.addr[0] = addr6[0];
		from.addr[1] = addr6[1];
		from.addr[2] = addr6[2];
		from.addr[3] = addr6[3];
	}
	if (bpf_bind(ctx, &from, sizeof(from)))
		return unavailable();
	return PASS;
}

/* For a mapped target of an IPv6 socket the kernel comes here too. */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	__u32 src = ctx->msg_src_ip4;

	if (loopback4(ctx->user_ip4) || (src && loopback4(src)))
		return PASS;
	if (path && !has4)
		return unavailable();
	if ((src && src != addr4) || !dress(ctx, ctx->sk))
		return refuse();
	ctx->msg_src_ip4 = addr4;
	return PASS;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	__u32 to[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
	__u32 src[4] = {ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2],
			ctx->msg_src_ip6[3]};
	bool bound = src[0] | src[1] | src[2] | src[3];

	if (loopback6(to) || (bound && loopback6(src)))
		return PASS;
	if (path && !has6)
		return unavailable();
	if ((bound && !own6(src)) || !dress(ctx, ctx->sk))
		return refuse();
	ctx->msg_src_ip6[0] = addr6[0];
	ctx->msg_src_ip6[1] = addr6[1];
	ctx->msg_src_ip6[2] = addr6[2];
	ctx->msg_src_ip6[3] = addr6[3];
	return PASS;
}

/* A bind to no address, a loopback address or the path's is well; no other. */
SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	__u32 a = ctx->src_ip4;

	return loopback4(a) || (has4 && a == addr4) ? PASS : refuse();
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	__u32 a[4] = {ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3]};

	if (loopback6(a) || (mapped(a) ? has4 && a[3] == addr4 : own6(a)))
		return PASS;
	return refuse();
}

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	struct counters *c;
	struct guard *g;

	if (skb->ifindex == LOOPBACK_IFINDEX)
		return PASS;
	c = slot(path);
	g = guard_of(path);
	if (unlikely(!c || !g)) {
		COUNT(path, drop_unknown);
		return DROP;
	}
	if (unlikely(!source(skb, g))) {
		__sync_fetch_and_add(&c->drop_source, 1);
		return DROP;
	}
	if (unlikely(g->ifindex && skb->ifindex != g->ifindex)) {
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

	if (skb->ifindex == LOOPBACK_IFINDEX)
		return PASS;
	c = slot(path);
	if (c)
		count(skb, &c->bytes_in, &c->packets_in);
	return PASS;
}

static __always_inline void conn_event(struct bpf_sock_ops *ops, struct conns *c)
{
	__u32 was = ops->args[0], is = ops->args[1];
	bool opening = was == BPF_TCP_SYN_SENT || was == BPF_TCP_SYN_RECV;

	if (ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		__sync_fetch_and_add(&c->tried, 1);
		return;
	}
	if (ops->op != BPF_SOCK_OPS_STATE_CB)
		return;
	__sync_fetch_and_add(&c->made, opening && is == BPF_TCP_ESTABLISHED);
	__sync_fetch_and_add(&c->failed, opening && is == BPF_TCP_CLOSE);
	__sync_fetch_and_add(&c->closed, !opening && is == BPF_TCP_CLOSE);
}

SEC("sockops")
int tcp_events(struct bpf_sock_ops *ops)
{
	__u32 zero = 0;
	struct conns *c;

	if (!wanted(ops->op))
		return PASS;
	/* What goes to the host itself is not asked about again. */
	if (ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		__u32 to[4] = {ops->remote_ip6[0], ops->remote_ip6[1], ops->remote_ip6[2],
			       ops->remote_ip6[3]};

		if (ops->family == AF_INET ? loopback4(ops->remote_ip4) : loopback6(to))
			return PASS;
	}
	tcp_event(ops, slot(path));
	c = bpf_map_lookup_elem(&conns, &zero);
	if (c)
		conn_event(ops, c);
	return PASS;
}

/* No helper here is reserved to programs under the GPL. */
char license_of_programs[] SEC("license") = "Apache-2.0";
