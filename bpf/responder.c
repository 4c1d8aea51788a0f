/* clang-format off */
//go:build ignore
/* clang-format on */

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Answers neighbour solicitations (RFC 4861) for whole prefixes, on the way in
 * from one interface.
 *
 * The kernel answers for the addresses of its interfaces alone, not for those
 * that a local route makes the host's own. What is not a valid solicitation for
 * an address of a prefix goes on to the kernel, untouched.
 */
#include "kernel.h"

enum {
	ETH_LEN = 14,
	IP_LEN = 40,
	NS_LEN = 24, /* of a solicitation and an advertisement, without options */
	NA_LEN = NS_LEN + 8,
	MAX_OPTIONS = 32, /* in units of 8 bytes; more is left unanswered */
	SOLICITATION = 135,
	ADVERTISEMENT = 136,
	OPTION_TARGET = 2, /* target link-layer address */
	HOP_LIMIT = 255,
	SOLICITED_OVERRIDE = 0x60000000,
};

/* The longest match decides: whether to answer or not (an exception). */
struct prefix {
	__u32 bits;
	__u32 addr[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct prefix);
	__type(value, __u32);
} prefixes SEC(".maps");

volatile const __u8 mac[6] = {}; /* of the interface */

__u64 answered = 0;

/* The checksum of what was added up; of a whole valid message it is 0. */
static __always_inline __u32 checksum(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum & 0xffff;
}

/* The pseudo-header of RFC 8200 section 8.1: addresses, length, next header. */
static __always_inline __u64 pseudo(const __u32 *ip, __u32 len)
{
	__u64 sum = bpf_htonl(len);

	sum += bpf_htonl(IPPROTO_ICMPV6);
	for (int i = 2; i < 10; i++)
		sum += ip[i];
	return sum;
}

/* Whether a destination is the target itself or its solicited-node group. */
static __always_inline bool meant(const __u32 *dst, const __u32 *target)
{
	if (dst[0] == target[0] && dst[1] == target[1] && dst[2] == target[2] &&
	    dst[3] == target[3])
		return 1;
	return dst[0] == bpf_htonl(0xff020000) && !dst[1] && dst[2] == bpf_htonl(1) &&
	       dst[3] == (bpf_htonl(0xff000000) | (target[3] & bpf_htonl(0x00ffffff)));
}

/*
 * Reads a solicitation and checks it as section 7.1.1 asks. Those without a
 * source address are not answered: they ask whether an address is free.
 */
static __always_inline bool solicitation(struct __sk_buff *skb, __u32 *ip, __u32 *ns)
{
	__u32 len, left = 0;
	__u64 sum;

	if (skb->protocol != bpf_htons(ETH_P_IPV6) || skb->vlan[0] ||
	    skb->pkt_type == PACKET_OTHERHOST)
		return 0;
	if (bpf_skb_load_bytes(skb, ETH_LEN, ip, IP_LEN))
		return 0;
	if ((ip[0] & 0xf0) != 0x60 || ip[1] >> 16 != (HOP_LIMIT << 8 | IPPROTO_ICMPV6))
		return 0;
	if (bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN, ns, NS_LEN))
		return 0;
	if ((ns[0] & 0xffff) != SOLICITATION) /* and code 0 */
		return 0;
	if (!(ip[2] | ip[3] | ip[4] | ip[5]) || (ip[2] & 0xff) == 0xff || !meant(ip + 6, ns + 2))
		return 0;
	len = bpf_htons(ip[1] & 0xffff);
	if (len < NS_LEN || len & 7 || len > NS_LEN + 8 * MAX_OPTIONS)
		return 0;
	sum = pseudo(ip, len);
	for (int i = 0; i < NS_LEN / 4; i++)
		sum += ns[i];
	for (__u32 i = 0; i < MAX_OPTIONS; i++) {
		__u32 option[2] = {};

		if (NS_LEN + 8 * i >= len)
			break;
		if (bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN + NS_LEN + 8 * i, option,
				       sizeof(option)))
			return 0;
		if (!left)
			left = (option[0] >> 8) & 0xff;
		if (!left) /* an option of length 0 */
			return 0;
		left--;
		sum += option[0];
		sum += option[1];
	}
	return !left && !checksum(sum);
}

/*
 * To the sender of the frame, whatever link-layer address the solicitation
 * names: so nobody can have answers sent to others.
 */
SEC("tcx/ingress")
int answer(struct __sk_buff *skb)
{
	__u32 ip[IP_LEN / 4] = {}, ns[NS_LEN / 4] = {}, na[NA_LEN / 4];
	struct prefix key = {.bits = 128};
	__u8 eth[12] = {};
	__u32 *yes;
	__u64 sum;

	if (!solicitation(skb, ip, ns))
		return TCX_NEXT;
	for (int i = 0; i < 4; i++)
		key.addr[i] = ns[2 + i];
	yes = bpf_map_lookup_elem(&prefixes, &key);
	if (!yes || !*yes)
		return TCX_NEXT;
	if (bpf_skb_load_bytes(skb, 0, eth, sizeof(eth)) || eth[6] & 1)
		return TCX_NEXT;
	if (bpf_skb_change_tail(skb, ETH_LEN + IP_LEN + NA_LEN, 0))
		return TCX_NEXT;

	for (int i = 0; i < 6; i++) {
		eth[i] = eth[6 + i];
		eth[6 + i] = mac[i];
	}
	ip[0] = bpf_htonl(0x60000000);
	ip[1] = bpf_htonl(NA_LEN << 16 | IPPROTO_ICMPV6 << 8 | HOP_LIMIT);
	for (int i = 0; i < 4; i++) {
		ip[6 + i] = ip[2 + i];
		ip[2 + i] = ns[2 + i];
		na[2 + i] = ns[2 + i];
	}
	na[0] = ADVERTISEMENT;
	na[1] = bpf_htonl(SOLICITED_OVERRIDE);
	na[6] = OPTION_TARGET | 1 << 8 | mac[0] << 16 | (__u32)mac[1] << 24;
	na[7] = mac[2] | mac[3] << 8 | mac[4] << 16 | (__u32)mac[5] << 24;
	sum = pseudo(ip, NA_LEN);
	for (int i = 0; i < NA_LEN / 4; i++)
		sum += na[i];
	na[0] |= checksum(sum) << 16;
	if (bpf_skb_store_bytes(skb, 0, eth, sizeof(eth), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(skb, ETH_LEN, ip, IP_LEN, BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(skb, ETH_LEN + IP_LEN, na, NA_LEN, BPF_F_RECOMPUTE_CSUM))
		return TCX_DROP;
	__sync_fetch_and_add(&answered, 1);
	return bpf_redirect(skb->ifindex, 0);
}

/* No helper here is reserved to programs under the GPL. */
char license_of_programs[] SEC("license") = "Apache-2.0";
