package tproxy

import (
	"strings"

	"wayout/router/escaper"
)

// A sight is what the beginning of a client's speech shows.
type sight uint8

const (
	// unclear: more of it may show a name.
	unclear sight = iota
	// nameless: no more of it will.
	nameless
	// named: it shows a name.
	named
)

// mostSniffed is how many bytes are looked at for a name. A TLS record has at
// most that many, and its header.
const mostSniffed = 16<<10 + 5

// sniff looks for the name of the destination at the beginning of a stream: the
// server name of a TLS ClientHello, or the Host of an HTTP/1 request. It is
// asked again with the same bytes and more for as long as it is unclear.
func sniff(b []byte) (string, sight) {
	if len(b) == 0 {
		return "", unclear
	}
	if b[0] == recordHandshake {
		return helloName(b)
	}
	return hostName(b)
}

// hostOf gives a name in lower case, as hosts are compared; false for what is no
// name of a host. Addresses are none: what is dialled is known anyway.
func hostOf(name []byte) (string, bool) {
	addr, ok := escaper.ParseHost(name)
	if !ok || addr.IsValid() {
		return "", false
	}
	return strings.ToLower(strings.TrimSuffix(string(name), ".")), true
}

// found is the sight of what stands where a name is.
func found(name []byte) (string, sight) {
	if s, ok := hostOf(name); ok {
		return s, named
	}
	return "", nameless
}
