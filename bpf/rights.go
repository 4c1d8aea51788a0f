package bpf

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// plain makes a refusal of the kernel say what is missing. The library's own
// text blames the memlock limit, which no kernel since 5.11 applies to bpf().
// What is not a refusal stays as it is, but that a verdict of the verifier is
// completed by the right that older kernels want for these programs.
func plain(err error) error {
	// With EFAULT the log of a verdict was too long (seen on 6.12 and 6.14).
	if verdict := (*ebpf.VerifierError)(nil); errors.Is(err, unix.EACCES) || errors.Is(err, unix.EFAULT) || errors.As(err, &verdict) {
		return perfmon(err)
	}
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
	has, err := rights()
	if err != nil {
		return nil, err
	}
	var missing []string
	if !has(unix.CAP_BPF) && !has(unix.CAP_SYS_ADMIN) {
		missing = append(missing, "CAP_BPF")
	}
	if !has(unix.CAP_NET_ADMIN) {
		missing = append(missing, "CAP_NET_ADMIN")
	}
	return missing, nil
}

// perfmon says of a verdict that it may be for want of CAP_PERFMON: without it older
// verifiers (up to 6.14's) refuse to overwrite a part of what is kept on the stack, also
// where that is no pointer, or do not come to an end with loops.
func perfmon(err error) error {
	has, readErr := rights()
	if readErr != nil || has(unix.CAP_PERFMON) || has(unix.CAP_SYS_ADMIN) {
		return err
	}
	return fmt.Errorf("%w (this process lacks CAP_PERFMON, which older kernels want too)", err)
}

// rights tells which capabilities are in effect for the calling thread.
func rights() (has func(capability uint) bool, err error) {
	text, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	caps, err := effective(string(text))
	if err != nil {
		return nil, err
	}
	return func(c uint) bool { return caps>>c&1 != 0 }, nil
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
