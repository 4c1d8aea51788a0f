package selection

import (
	"encoding/binary"
	"net/netip"
)

// The hashes here decide where a key goes, so they are part of what a user sees
// and never change: the same key and IDs give the same path in every process,
// on every machine and in every version.

// KeyString returns the hashing key of a user or a host name: FNV-1a over its
// bytes, then mixed.
func KeyString(s string) uint64 {
	h := uint64(0xcbf29ce484222325)
	for i := range len(s) {
		h ^= uint64(s[i])
		h *= 0x100000001b3
	}
	return mix(h)
}

// KeyAddr returns the hashing key of an address: its 16 bytes, mixed. An IPv4
// address and its ::ffff:a.b.c.d form have one key; a zone does not count.
func KeyAddr(a netip.Addr) uint64 {
	b := a.As16()
	return mix(binary.BigEndian.Uint64(b[:8]) ^ mix(binary.BigEndian.Uint64(b[8:])))
}

// mix spreads every bit of x over all bits of the result, one to one: the
// output step of the SplitMix64 generator.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
