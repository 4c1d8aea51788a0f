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
#include "paths.h"

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

SEC("sockops")
int tcp_events(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;

	if (wanted(ops->op) && sk && of_path(sk->mark))
		tcp_event(ops, slot(number(sk->mark)));
	return PASS;
}

/* No helper here is reserved to programs under the GPL. */
char license_of_programs[] SEC("license") = "Apache-2.0";
