//go:build clsact

package bpf

const withTCX = false
