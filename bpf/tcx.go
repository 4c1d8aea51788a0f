//go:build !clsact

package bpf

// withTCX is false in builds with the tag clsact, which work as on kernels below 6.6:
// so both ways are tested on one kernel.
const withTCX = true
