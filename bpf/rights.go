package bpf

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// plain makes a refusal of the kernel say what is missing. The library's own
// text blames the memlock limit, which no kernel since 5.11 applies to bpf().
// What is not a refusal stays as it is.
func plain(err error) error {
	if err == nil || !errors.Is(err, unix.EPERM) {
		return err
	}
	missing, readErr := missingRights()
	switch {
	case readErr != nil:
		return fmt.Errorf("%w (needs CAP_BPF and CAP_NET_ADMIN)", unix.EPERM)
	case len(missing) > 0:
		return fmt.Errorf("%w: this process lacks %s", unix.EPERM, strings.Join(missing, " and "))
	}
	return fmt.Errorf("%w although this process has CAP_BPF and CAP_NET_ADMIN: "+
		"they count for a user namespace only, or a security policy (seccomp, lockdown, an LSM) forbids bpf()", unix.EPERM)
}

// missingRights names the capabilities that eBPF needs and that are not in
// effect. CAP_SYS_ADMIN stands for CAP_BPF (capabilities(7)).
func missingRights() ([]string, error) {
	text, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	caps, err := effective(string(text))
	if err != nil {
		return nil, err
	}
	has := func(c uint) bool { return caps>>c&1 != 0 }
	var missing []string
	if !has(unix.CAP_BPF) && !has(unix.CAP_SYS_ADMIN) {
		missing = append(missing, "CAP_BPF")
	}
	if !has(unix.CAP_NET_ADMIN) {
		missing = append(missing, "CAP_NET_ADMIN")
	}
	return missing, nil
}

func effective(status string) (uint64, error) {
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			v, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				return 0, fmt.Errorf("read own capabilities: %w", err)
			}
			return v, nil
		}
	}
	return 0, errors.New("read own capabilities: no line CapEff")
}
