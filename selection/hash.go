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
	return mix(fnv(fnvBasis, s))
}

// KeyAddr returns the hashing key of an address: its 16 bytes, mixed. An IPv4
// address and its ::ffff:a.b.c.d form have one key; a zone does not count.
func KeyAddr(a netip.Addr) uint64 {
	b := a.As16()
	return mix(binary.BigEndian.Uint64(b[:8]) ^ mix(binary.BigEndian.Uint64(b[8:])))
}

// KeySession returns the hashing key of a session: FNV-1a over user, escaper
// and name, each behind its length in 8 bytes, and over the generation in 8
// bytes, big endian all, then mixed. Two sessions that differ in any part are
// two strings of bytes. The generation is what changes when a session's
// lifetime ends.
func KeySession(user, escaper, name string, generation uint64) uint64 {
	h := uint64(fnvBasis)
	for _, s := range [...]string{user, escaper, name} {
		h = fnv(fnv64(h, uint64(len(s))), s)
	}
	return mix(fnv64(h, generation))
}

const (
	fnvBasis = 0xcbf29ce484222325
	fnvPrime = 0x100000001b3
)

// fnv goes on with FNV-1a over the bytes of s.
func fnv(h uint64, s string) uint64 {
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * fnvPrime
	}
	return h
}

// fnv64 goes on with FNV-1a over the 8 bytes of x, big endian.
func fnv64(h, x uint64) uint64 {
	for shift := 56; shift >= 0; shift -= 8 {
		h = (h ^ x>>shift&0xff) * fnvPrime
	}
	return h
}

// mix spreads every bit of x over all bits of the result, one to one: the
// output step of the SplitMix64 generator.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
