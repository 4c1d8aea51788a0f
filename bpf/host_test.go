package bpf

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const mountinfo = `23 1 254:1 / / rw,relatime - ext4 /dev/root rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 /kube/pod1 /sys/fs/cgroup/memory rw shared:12 master:3 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/uni\040fied rw,relatime shared:9 - cgroup2 cgroup2 rw
cut off
50 23 0:45 / /sys/fs/bpf rw - bpf bpf rw,mode=700
`

func TestParseMounts(t *testing.T) {
	all := parseMounts(mountinfo)
	if len(all) != 5 {
		t.Fatalf("%d mounts: %+v", len(all), all)
	}
	if want := (mount{root: "/kube/pod1", point: "/sys/fs/cgroup/memory", fs: "cgroup"}); all[2] != want {
		t.Errorf("%+v, want %+v", all[2], want)
	}
	if m, ok := lastOf(all, "cgroup2"); !ok || m.point != "/sys/fs/cgroup/uni fied" {
		t.Errorf("cgroup v2 is %+v, %v", m, ok)
	}
	if m, ok := lastOf(all, "btrfs"); ok {
		t.Errorf("btrfs is %+v", m)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`/a\040b`: "/a b", `\134`: `\`, `\`: `\`, `\04`: `\04`, `\09a`: `\09a`, `a\777`: `a\777`, "": "",
	} {
		if got := unescape(in); got != want {
			t.Errorf("%q is read as %q, want %q", in, got, want)
		}
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add(mountinfo)
	f.Add("1 2 3 4 5 6 - ")
	f.Add(`1 2 3 \1 \ 6 - x`)
	f.Fuzz(func(t *testing.T, text string) {
		for _, m := range parseMounts(text) {
			if m.fs == "" {
				t.Errorf("a mount without a type in %q", text)
			}
			if n := strings.Count(text, "\n") + 1; len(parseMounts(text)) > n {
				t.Errorf("more mounts than lines")
			}
		}
	})
}

func TestCgroupDir(t *testing.T) {
	const v1 = "9:name=systemd:/x\n4:memory:/y\n"
	for _, c := range []struct {
		name, root, text, want string
	}{
		{"beside version 1", "/", v1 + "0::/\n", "/mnt"},
		{"a service", "/", "0::/system.slice/wayout.service\n", "/mnt/system.slice/wayout.service"},
		{"with spaces", "/", "0::/a b\n", "/mnt/a b"},
		{"a part is mounted", "/kube/pod1", "0::/kube/pod1/c\n", "/mnt/c"},
		{"that very part", "/kube/pod1", "0::/kube/pod1\n", "/mnt"},
		{"another part", "/kube/pod1", "0::/kube/pod10\n", ""},
		{"outside of the namespace", "/", "0::/../other\n", ""},
		{"removed", "/", "0::/gone (deleted)\n", ""},
		{"only version 1", "/", v1, ""},
	} {
		got, err := cgroupDir(mount{root: c.root, point: "/mnt"}, c.text)
		if got != c.want || errors.Is(err, ErrCgroup) != (c.want == "") {
			t.Errorf("%s: %q, %v, want %q", c.name, got, err, c.want)
		}
	}
}

func TestRefusalIsToldPlainly(t *testing.T) {
	refused := plain(errors.Join(errors.New("MEMLOCK may be too low"), unix.EPERM))
	if !errors.Is(refused, unix.EPERM) || strings.Contains(refused.Error(), "MEMLOCK") || !strings.Contains(refused.Error(), "CAP_BPF") {
		t.Errorf("said as %q", refused)
	}
	if other := errors.New("x"); plain(other) != other || plain(nil) != nil { //nolint:errorlint // the very same
		t.Error("what is no refusal is changed")
	}
}

func TestEffectiveRights(t *testing.T) {
	if v, err := effective("Name:\tx\nCapEff:\t000001fffeffffff\nCapBnd:\t0\n"); err != nil || v != 0x1fffeffffff {
		t.Errorf("%#x, %v", v, err)
	}
	for _, bad := range []string{"", "CapEff:\tzz\n"} {
		if _, err := effective(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestGuardIsRefused(t *testing.T) {
	for name, g := range map[string]Guard{
		"empty":           {},
		"interface only":  {IfIndex: 3},
		"IPv6 as IPv4":    {V4: pfx("2001:db8::/64")},
		"IPv4 as IPv6":    {V6: pfx("192.0.2.0/24")},
		"mapped as IPv6":  {V6: pfx("::ffff:192.0.2.0/120")},
		"right and wrong": {V4: pfx("192.0.2.0/24"), V6: pfx("192.0.2.0/24")},
	} {
		if _, err := g.encode(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}
