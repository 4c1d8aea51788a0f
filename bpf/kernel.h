/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the programs here need of the kernel's user-space interface, and no more.
 *
 * It stands in for the system's headers so that the object, whose BTF holds
 * these structs, is the same byte for byte whatever headers a machine has. The
 * structs are stable interface of Linux: members may be left out at the end,
 * and offsets are asserted below.
 */
#ifndef WAYOUT_KERNEL_H
#define WAYOUT_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef _Bool bool;

#define NULL ((void *)0)
#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* The integer and the type of a BTF map definition. */
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

/* Objects are little-endian only, so that network order is the swapped one. */
#define bpf_htons(x) ((__u16)__builtin_bswap16(x))
#define bpf_htonl(x) ((__u32)__builtin_bswap32(x))

#define offsetof(type, member) __builtin_offsetof(type, member)

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_SOCKMAP = 15,
	BPF_F_NO_PREALLOC = 1 << 0,
	BPF_F_MMAPABLE = 1 << 10,
};

enum {
	ETH_P_IP = 0x0800,
	ETH_P_IPV6 = 0x86dd,
	ETH_P_8021Q = 0x8100,
	ETH_P_8021AD = 0x88a8,
	IPPROTO_HOPOPTS = 0,
	IPPROTO_TCP = 6,
	IPPROTO_UDP = 17,
	IPPROTO_ROUTING = 43,
	IPPROTO_FRAGMENT = 44,
	IPPROTO_DSTOPTS = 60,
	IPPROTO_ICMP = 1,
	IPPROTO_ICMPV6 = 58,
	IPV6_TLV_JUMBO = 0xc2,
	LOOPBACK_IFINDEX = 1,
	PACKET_OTHERHOST = 3,
};

/* Verdicts of a lookup for a socket. */
enum {
	SK_DROP = 0,
	SK_PASS = 1,
};

/* Verdicts by tcx (by clsact TC_ACT_UNSPEC and SHOT); a flag of bpf_skb_store_bytes. */
enum {
	TCX_NEXT = -1,
	TCX_DROP = 2,
	BPF_F_RECOMPUTE_CSUM = 1 << 0,
};

/* Where bpf_skb_load_bytes_relative counts from. */
enum { BPF_HDR_START_NET = 1 };

enum {
	AF_INET = 2,
	AF_INET6 = 10,
	SOL_SOCKET = 1,
	SO_BINDTODEVICE = 25,
	SO_MARK = 36,
	EADDRNOTAVAIL = 99,
};

enum {
	BPF_SOCK_OPS_TCP_CONNECT_CB = 3,
	BPF_SOCK_OPS_RETRANS_CB = 9,
	BPF_SOCK_OPS_STATE_CB = 10,
	BPF_SOCK_OPS_RTT_CB = 12,
};

enum {
	BPF_SOCK_OPS_RETRANS_CB_FLAG = 1 << 1,
	BPF_SOCK_OPS_STATE_CB_FLAG = 1 << 2,
	BPF_SOCK_OPS_RTT_CB_FLAG = 1 << 3,
};

enum {
	BPF_TCP_ESTABLISHED = 1,
	BPF_TCP_SYN_SENT = 2,
	BPF_TCP_SYN_RECV = 3,
	BPF_TCP_CLOSE = 7,
};

struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
};

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan[3];
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	struct bpf_sock *sk;
	__u32 gso_size;
};

struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	struct bpf_sock *sk;
};

struct bpf_sock_ops {
	__u32 op;
	__u32 args[4];
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 is_fullsock;
	__u32 snd_cwnd;
	__u32 srtt_us;
	__u32 bpf_sock_ops_cb_flags;
	__u32 state;
	__u32 tcp_info[18];
	__u32 sk_txhash;
	__u64 bytes_received;
	__u64 bytes_acked;
	struct bpf_sock *sk;
};

struct bpf_sk_lookup {
	__u64 cookie;
	__u32 family;
	__u32 protocol;
	__u32 remote_ip4;
	__u32 remote_ip6[4];
	__u16 remote_port;
	__u16 reserved;
	__u32 local_ip4;
	__u32 local_ip6[4];
	__u32 local_port;
	__u32 ingress_ifindex;
};

_Static_assert(offsetof(struct bpf_sk_lookup, local_port) == 60, "bpf_sk_lookup");
_Static_assert(offsetof(struct bpf_sock, src_ip6) == 28, "bpf_sock");
_Static_assert(offsetof(struct __sk_buff, ifindex) == 40, "__sk_buff");
_Static_assert(offsetof(struct __sk_buff, data) == 76, "__sk_buff");
_Static_assert(offsetof(struct __sk_buff, gso_segs) == 164, "__sk_buff");
_Static_assert(offsetof(struct __sk_buff, gso_size) == 176, "__sk_buff");
_Static_assert(offsetof(struct bpf_sock_addr, msg_src_ip6) == 44, "bpf_sock_addr");
_Static_assert(offsetof(struct bpf_sock_addr, sk) == 64, "bpf_sock_addr");
_Static_assert(offsetof(struct bpf_sock_ops, srtt_us) == 80, "bpf_sock_ops");
_Static_assert(offsetof(struct bpf_sock_ops, sk) == 184, "bpf_sock_ops");

/* Helpers, by their number in the kernel. */
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_skb_store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from, __u32 len,
				   __u64 flags) = (void *)9;
static long (*bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)23;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) = (void *)26;
static long (*bpf_skb_change_tail)(struct __sk_buff *skb, __u32 len, __u64 flags) = (void *)38;
static long (*bpf_skb_load_bytes_relative)(const void *skb, __u32 offset, void *to, __u32 len,
					   __u32 start) = (void *)68;
static long (*bpf_sock_ops_cb_flags_set)(struct bpf_sock_ops *ops, int flags) = (void *)59;
static long (*bpf_sk_release)(struct bpf_sock *sk) = (void *)86;
static struct bpf_sock *(*bpf_sk_fullsock)(struct bpf_sock *sk) = (void *)95;
static long (*bpf_sk_assign)(struct bpf_sk_lookup *ctx, struct bpf_sock *sk,
			     __u64 flags) = (void *)124;

static long (*bpf_setsockopt)(void *ctx, int level, int name, void *value, int len) = (void *)49;
static long (*bpf_bind)(struct bpf_sock_addr *ctx, void *addr, int len) = (void *)64;
static long (*bpf_set_retval)(int retval) = (void *)187;

/* Addresses of sockets. */
struct sockaddr_in {
	__u16 family;
	__u16 port;
	__u32 addr;
	__u8 zero[8];
};

struct sockaddr_in6 {
	__u16 family;
	__u16 port;
	__u32 flow;
	__u32 addr[4];
	__u32 scope;
};

/* Headers as they lie in a packet. */
struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__u16 len;
	__u16 id;
	__u16 frag;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__u32 saddr;
	__u32 daddr;
};

struct ipv6 {
	__u32 version_flow;
	__u16 len;
	__u8 nexthdr;
	__u8 hop_limit;
	__u32 saddr[4];
	__u32 daddr[4];
};

#endif
