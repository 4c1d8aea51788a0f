package netcfg

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ForeignRule is a policy routing rule of somebody else that may take packets
// which are ours.
type ForeignRule struct {
	Rule Rule

	// MarkMatches: it selects by fwmark, and a packet with a mark of ours can match.
	MarkMatches bool

	// Ahead: its priority comes before our rules', so it has the first say.
	Ahead bool
}

// ForeignRules gives the rules of others that a packet of ours may match: those
// with a fwmark that our marks (any within the Layout's MarkMask) can fulfil, and
// those without a fwmark that come before ours. The kernel's own three rules (local,
// main, default) and that of VRFs are not among them.
func (s *Snapshot) ForeignRules(l Layout) []ForeignRule {
	var out []ForeignRule
	for _, r := range s.Rules {
		if l.ownsRule(r) || r.Protocol == protocolKernel {
			continue
		}
		f := ForeignRule{Rule: r, MarkMatches: markMatches(r, l.MarkMask), Ahead: r.Priority < l.RulePriority}
		if f.MarkMatches || r.Mask == 0 && f.Ahead {
			out = append(out, f)
		}
	}
	return out
}

// protocolKernel is RTPROT_KERNEL.
const protocolKernel = 2

// markMatches says whether some mark within mask fulfils the rule's selector. Bits
// outside mask are 0 in our marks.
func markMatches(r Rule, mask uint32) bool {
	if r.Mask == 0 {
		return false
	}
	possible := r.Mark&r.Mask&^mask == 0
	if !r.Invert {
		return possible
	}
	// `not`: it matches unless every mark of ours has exactly the value.
	return r.Mask&mask != 0 || !possible
}

// Sysctl is a kernel setting, as /proc/sys gives it. Set is false when this kernel
// has no such setting or it may not be read.
type Sysctl struct {
	Name  string // "net.ipv4.tcp_tw_reuse"
	Value string
	Set   bool
}

// Sysctls are the settings of the network namespace that matter to wayout.
type Sysctls struct {
	PortRange     Sysctl // net.ipv4.ip_local_port_range: two numbers
	TimeWaitReuse Sysctl // net.ipv4.tcp_tw_reuse
	Timestamps    Sysctl // net.ipv4.tcp_timestamps: reuse needs them
	NonlocalBind4 Sysctl // net.ipv4.ip_nonlocal_bind
	NonlocalBind6 Sysctl // net.ipv6.ip_nonlocal_bind
	Forwarding4   Sysctl // net.ipv4.ip_forward
	Forwarding6   Sysctl // net.ipv6.conf.all.forwarding
	DisableIPv6   Sysctl // net.ipv6.conf.all.disable_ipv6
	SrcValidMark  Sysctl // net.ipv4.conf.all.src_valid_mark
	Conntrack     Sysctl // net.netfilter.nf_conntrack_count: Set says that it is loaded
	ConntrackMax  Sysctl // net.netfilter.nf_conntrack_max

	// ReversePath holds the strictness of the reverse path check of each interface,
	// by name: the larger of its own setting and of conf.all, which is how the
	// kernel takes them. 0 off, 1 strict, 2 loose.
	ReversePath map[string]int

	// ARPIgnore holds, alike, how each interface answers ARP requests. From 1 on the
	// kernel answers for its interfaces' own addresses alone, and for none of a
	// prefix that a local route makes the host's own.
	ARPIgnore map[string]int
}

// Sysctls reads the settings.
func (k *Netlink) Sysctls() (Sysctls, error) {
	var s Sysctls
	err := k.inNamespace(func() (err error) {
		s, err = readSysctls("/proc/sys")
		return err
	})
	return s, err
}

func readSysctls(root string) (Sysctls, error) {
	var errs []error
	get := func(name string) Sysctl {
		b, err := os.ReadFile(filepath.Join(root, strings.ReplaceAll(name, ".", "/")))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			errs = append(errs, fmt.Errorf("read %s: %w", name, err))
		}
		return Sysctl{Name: name, Value: strings.Join(strings.Fields(string(b)), " "), Set: err == nil}
	}
	s := Sysctls{
		PortRange:     get("net.ipv4.ip_local_port_range"),
		TimeWaitReuse: get("net.ipv4.tcp_tw_reuse"),
		Timestamps:    get("net.ipv4.tcp_timestamps"),
		NonlocalBind4: get("net.ipv4.ip_nonlocal_bind"),
		NonlocalBind6: get("net.ipv6.ip_nonlocal_bind"),
		Forwarding4:   get("net.ipv4.ip_forward"),
		Forwarding6:   get("net.ipv6.conf.all.forwarding"),
		DisableIPv6:   get("net.ipv6.conf.all.disable_ipv6"),
		SrcValidMark:  get("net.ipv4.conf.all.src_valid_mark"),
		Conntrack:     get("net.netfilter.nf_conntrack_count"),
		ConntrackMax:  get("net.netfilter.nf_conntrack_max"),
		ReversePath:   make(map[string]int),
		ARPIgnore:     make(map[string]int),
	}
	dir, err := os.ReadDir(filepath.Join(root, "net/ipv4/conf"))
	if err != nil {
		return s, errors.Join(append(errs, fmt.Errorf("list the interfaces' settings: %w", err))...)
	}
	// Interface names may hold dots, so these are read by path.
	number := func(ifname, setting string) (int, bool) {
		b, err := os.ReadFile(filepath.Join(root, "net/ipv4/conf", ifname, setting))
		n, errNum := strconv.Atoi(strings.TrimSpace(string(b)))
		return n, err == nil && errNum == nil
	}
	for setting, to := range map[string]map[string]int{"rp_filter": s.ReversePath, "arp_ignore": s.ARPIgnore} {
		all, _ := number("all", setting)
		for _, e := range dir {
			if n, ok := number(e.Name(), setting); ok && e.Name() != "all" && e.Name() != "default" {
				to[e.Name()] = max(n, all)
			}
		}
	}
	return s, errors.Join(errs...)
}

// NAT says what is known of source address translation on the way out, which
// would change the address that a path promises.
type NAT struct {
	// Rules are those found that translate the source address, as
	// "FAMILY TABLE CHAIN: masquerade" or "...: snat".
	Rules []string

	// Unknown names what could not be looked at, and why; empty when the answer is
	// complete.
	Unknown []string
}

// NAT looks for rules that translate source addresses: in nftables by netlink
// (which takes CAP_NET_ADMIN), in iptables of the old kind only as far as whether
// its nat table is there.
func (k *Netlink) NAT() (NAT, error) {
	var out NAT
	err := k.inNamespace(func() error {
		rules, err := readNFT()
		if err != nil {
			out.Unknown = append(out.Unknown, fmt.Sprintf("nftables cannot be read: %v", err))
		}
		out.Rules = rules
		for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			if errors.Is(err, fs.ErrNotExist) {
				continue // the old iptables was never used
			}
			if err != nil {
				out.Unknown = append(out.Unknown, fmt.Sprintf("%s cannot be read: %v", file, err))
				continue
			}
			if slices.Contains(strings.Fields(string(b)), "nat") {
				program := "iptables"
				if file == "ip6_tables_names" {
					program = "ip6tables"
				}
				out.Unknown = append(out.Unknown, fmt.Sprintf("%s (legacy) has a nat table whose rules only `%s-legacy-save` shows", program, program))
			}
		}
		return nil
	})
	slices.SortFunc(out.Rules, cmp.Compare[string])
	return out, err
}
