package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"wayout/bpf"
	"wayout/netcfg"
	"wayout/router"
	"wayout/router/config"
)

// examineKernel looks at what the kernel can do beside eBPF.
func examineKernel() ([]finding, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("read the kernel's version: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	// Without type information it goes by the version; nothing is wrong then.
	btf, _ := os.ReadFile("/sys/kernel/btf/vmlinux")
	all := []finding{examineRelease(release)}
	for _, f := range kernelFeatures(release, btf) {
		all = append(all, f.finding())
	}
	return all, nil
}

// The oldest kernel that wayout is made for.
const (
	leastMajor = 5
	leastMinor = 15
)

func examineRelease(release string) finding {
	x := finding{Name: "kernel", Level: levelOK, Found: "Linux " + release}
	major, minor, ok := parseRelease(release)
	switch {
	case !ok:
		x.Level, x.Means = levelNote, "its version cannot be read; what it can do is tried below"
	case !since2(major, minor, leastMajor, leastMinor):
		x.Level = levelWarning
		x.Means = "older than what wayout is made for; what is missing is below"
		x.Remedy = fmt.Sprintf("run Linux %d.%d or newer", leastMajor, leastMinor)
	}
	return x
}

// parseRelease reads the first two numbers of a release, as uname(2) has it.
func parseRelease(release string) (major, minor int, ok bool) {
	n, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	return major, minor, err == nil && n == 2 && major >= 0 && minor >= 0
}

func since2(major, minor, wantMajor, wantMinor int) bool {
	return major > wantMajor || major == wantMajor && minor >= wantMinor
}

// kernelFeature is a thing that newer kernels have, and that wayout uses where
// it is.
type kernelFeature struct {
	name  string
	since string
	means string // when it is missing
	level string // then
	has   bool
	how   string // it is known
	err   error  // why it is not known
}

func (f kernelFeature) finding() finding {
	x := finding{Name: f.name, Level: levelOK, Found: f.how}
	switch {
	case f.err != nil:
		x.Level, x.Found = levelNote, "cannot be tried: "+f.err.Error()
	case !f.has:
		x.Level, x.Means = f.level, f.means
		x.Found = strings.TrimPrefix(f.how+", missing", ", ")
		x.Remedy = "run Linux " + f.since + " or newer"
	}
	return x
}

// kernelFeatures tries what can be tried, looks for the others among the names
// that the kernel's type information (BTF) has, and without that goes by the
// version.
func kernelFeatures(release string, btf []byte) []kernelFeature {
	tried := func(f kernelFeature, probe func() (bool, error)) kernelFeature {
		f.how = "tried"
		f.has, f.err = probe()
		return f
	}
	known := func(f kernelFeature, name string) kernelFeature {
		if name != "" && len(btf) > 0 {
			f.has, f.how = bytes.Contains(btf, []byte("\x00"+name+"\x00")), "by its type information"
			return f
		}
		major, minor, ok := parseRelease(release)
		wantMajor, wantMinor, _ := parseRelease(f.since)
		f.has, f.how = since2(major, minor, wantMajor, wantMinor), "by its version"
		if !ok {
			f.err = fmt.Errorf("release %q says no version", release)
		}
		return f
	}
	return []kernelFeature{
		tried(kernelFeature{
			name: "a port range for each socket (IP_LOCAL_PORT_RANGE)", since: "6.3", level: levelNote,
			means: "connects to one destination get slow when half of the ports are in use",
		}, probePortRange),
		known(kernelFeature{
			name: "addresses that are marked as ours (IFA_PROTO)", since: "5.18", level: levelNote,
			means: "which addresses are wayout's stands in a file below " + netcfg.DefaultStateDir + " instead",
		}, ""),
		tried(kernelFeature{
			name: "ending connections from outside (INET_DIAG_DESTROY)", since: "4.5, built with CONFIG_INET_DIAG_DESTROY=y,", level: levelWarning,
			means: "pinned processes' connections that do not match cannot be ended, nor what the kernel goes on with after a close",
		}, probeDestroy),
		known(kernelFeature{
			name: "handing connections to a socket (sk_lookup)", since: "5.9", level: levelNote,
			means: "diverted traffic cannot be served (tproxy), nor a prefix in listen",
		}, "BPF_PROG_TYPE_SK_LOOKUP"),
		known(kernelFeature{
			name: "programs on an interface beside others (tcx)", since: "6.6", level: levelNote,
			means: "the programs of tproxy servers and whole IPv6 prefixes go on an interface by clsact, where others may take them off or come first",
		}, "BPF_TCX_INGRESS"),
	}
}

// ipLocalPortRange is IP_LOCAL_PORT_RANGE of linux/in.h.
const ipLocalPortRange = 51

// probePortRange sets the option on a socket that is never used.
func probePortRange() (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_IP, ipLocalPortRange, 0) // 0: none of its own
	missing := errors.Is(err, unix.ENOPROTOOPT)
	if missing {
		err = nil
	}
	return !missing && err == nil, errors.Join(err, unix.Close(fd))
}

// Of sock_diag(7), what x/sys has no name for.
const (
	sockDestroy   = 21 // SOCK_DESTROY
	inetDiagReqV2 = 56 // size of struct inet_diag_req_v2
)

// probeDestroy asks the kernel to end a socket that cannot be: from port 0 to
// port 0, with an impossible cookie. A kernel that ends sockets finds none.
func probeDestroy() (bool, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return false, err
	}
	answer, err := askDestroy(fd)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return false, err
	}
	switch {
	case errors.Is(answer, unix.ENOENT):
		return true, nil
	case errors.Is(answer, unix.EOPNOTSUPP):
		return false, nil
	}
	return false, answer
}

// askDestroy gives what the kernel answers; err is why it was not asked.
func askDestroy(fd int) (answer, err error) {
	const size = unix.SizeofNlMsghdr + inetDiagReqV2
	m := make([]byte, size)
	binary.NativeEndian.PutUint32(m[0:], size)
	binary.NativeEndian.PutUint16(m[4:], sockDestroy)
	binary.NativeEndian.PutUint16(m[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m[unix.SizeofNlMsghdr], m[unix.SizeofNlMsghdr+1] = unix.AF_INET, unix.IPPROTO_TCP
	for i := size - 8; i < size; i++ {
		m[i] = 0xfe // the cookie; all ones would stand for any
	}
	timeout := unix.Timeval{Sec: 5}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}
	if err := unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return nil, err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return nil, fmt.Errorf("an answer of %d bytes that is no status", n)
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))), nil
}

// examineRights looks for the rights of this process.
func examineRights(c *config.Config) ([]finding, error) {
	admin, err := router.Privileged()
	if err != nil {
		return nil, err
	}
	x := finding{Name: "right to mark sockets and to change the network", Level: levelOK}
	if !admin {
		x.Level, x.Found, x.Means = levelBlocker, "this process lacks CAP_NET_ADMIN", "serve, apply and clean refuse to run"
		x.Remedy = "run as root, or give the unit AmbientCapabilities=CAP_NET_ADMIN CAP_BPF"
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return nil, fmt.Errorf("read the capabilities: %w", err)
	}
	return append([]finding{x}, examineMoreRights(data[0].Effective, lowPort(procSys, c))...), nil
}

// lowPort is a port that a server listens on and that not everyone may; 0
// without one.
func lowPort(sys sysctlDir, c *config.Config) uint16 {
	first := 1024
	if n, err := strconv.Atoi(sys.value("net/ipv4/ip_unprivileged_port_start")); err == nil {
		first = n
	}
	for _, s := range c.Servers {
		for _, at := range s.Listen {
			if at.Port() != 0 && int(at.Port()) < first {
				return at.Port()
			}
		}
	}
	return 0
}

// examineMoreRights looks for those that only some of it needs; low is a port
// that takes one, or 0.
func examineMoreRights(effective uint32, low uint16) []finding {
	has := func(capability int) bool { return effective&(1<<capability) != 0 }
	bind := finding{Name: "right to listen on low ports", Level: levelOK}
	if !has(unix.CAP_NET_BIND_SERVICE) {
		bind.Level, bind.Found = levelNote, "this process lacks CAP_NET_BIND_SERVICE"
		if low != 0 {
			bind.Level, bind.Means = levelBlocker, fmt.Sprintf("serve cannot listen on port %d", low)
			bind.Remedy = "run as root, or add CAP_NET_BIND_SERVICE to AmbientCapabilities= of the unit"
		}
	}
	mount := finding{Name: "right to mount", Level: levelOK}
	if !has(unix.CAP_SYS_ADMIN) {
		mount.Level, mount.Found = levelNote, "this process lacks CAP_SYS_ADMIN"
		mount.Means = "serve does not mount the bpf file system where it is missing"
	}
	return []finding{bind, mount}
}

// bpfFileSystem is what bpf.Probe calls it.
const bpfFileSystem = "bpf file system mounted"

// examineFeatures says what counters and guard lack. What is missing for one
// and the same reason is one finding.
func examineFeatures(features []bpf.Feature, accounting bool) []finding {
	var all []finding
	type group struct{ at, more int }
	why := map[string]group{} // by reason
	for _, p := range features {
		x := finding{Name: p.Name, Level: levelOK}
		if p.OK {
			all = append(all, x)
			continue
		}
		if g, ok := why[p.Err.Error()]; ok {
			g.more++
			why[p.Err.Error()] = g
			continue
		}
		x.Level, x.Remedy = levelBlocker, p.Remedy
		if p.Need != bpf.NeedAll || !accounting {
			x.Level = levelWarning
		}
		x.Found, x.Means = p.Err.Error(), fmt.Sprintf("there is no %s (it takes Linux %s)", p.Need, p.Since)
		if errors.Is(p.Err, bpf.ErrNotMounted) { // its text holds the remedy
			x.Found = bpf.ErrNotMounted.Error()
			if name := execNetns(); name != "" {
				x.Remedy = "in `ip netns exec` /sys is a new mount: use `nsenter --net=/run/netns/" + name + "`"
			} else if p.Name == bpfFileSystem {
				x.fix = mountBPF()
			}
		}
		why[p.Err.Error()] = group{at: len(all)}
		all = append(all, x)
	}
	for _, g := range why {
		if g.more > 0 {
			all[g.at].Name += fmt.Sprintf(", and %d more", g.more)
		}
	}
	return all
}

// execNetns names the network namespace that this process was put in by
// `ip netns exec`, which mounts a /sys of that name over the host's, and with
// that hides what is mounted below; "" when it was not.
func execNetns() string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		// ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER
		before, after, _ := strings.Cut(line, " - ")
		b, a := strings.Fields(before), strings.Fields(after)
		if len(b) < 5 || len(a) < 2 || b[4] != "/sys" || a[0] != "sysfs" {
			continue
		}
		if _, err := os.Stat("/run/netns/" + a[1]); err == nil {
			return a[1]
		}
	}
	return ""
}

// enoughFiles is how many descriptors a busy egress router wants: two for each
// tunnel.
const enoughFiles = 65536

func examineFiles() (finding, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return finding{}, fmt.Errorf("read the file limit: %w", err)
	}
	x := finding{Name: "file limit", Level: levelOK, Found: strconv.FormatUint(l.Max, 10)}
	if l.Max < enoughFiles {
		x.Level, x.Remedy = levelWarning, "ulimit -Hn 1048576 before it is started, or LimitNOFILE=1048576 in the unit"
		x.Means = fmt.Sprintf("a daemon that is started from here holds about %d tunnels", l.Max/2)
	}
	return x, nil
}
