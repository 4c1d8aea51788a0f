package config

import (
	"reflect"
	"strings"
	"time"
)

// Bounds of a rate and a bandwidth.
const (
	maxCount     = 1_000_000_000
	minBandwidth = 8_000             // a kilobyte a second
	maxBandwidth = 1_000_000_000_000 // a terabit a second
)

// parseRate reads NUMBER/s, NUMBER/m or NUMBER/h, or a bare number a second.
func parseRate(s string) (Rate, string) {
	const want = "want a rate such as 200/s, 60/m or 1000/h"
	count, unit, found := strings.Cut(s, "/")
	per := time.Second
	switch strings.TrimSpace(unit) {
	case "s":
	case "m", "min":
		per = time.Minute
	case "h":
		per = time.Hour
	default:
		if found {
			return Rate{}, want
		}
	}
	n, ok := parseNumber(strings.TrimSpace(count))
	switch {
	case !ok || strings.HasPrefix(count, "0x"):
		return Rate{}, want
	case n < 1 || n > maxCount:
		return Rate{}, "is out of range 1 to 1000000000"
	}
	return Rate{Count: int(n), Per: per}, ""
}

func (d *decoder) rate(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	r, bad := parseRate(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.Set(reflect.ValueOf(r))
}

// parseBandwidth reads bits a second: NUMBER, or with a unit such as kbit, Mbit/s.
func parseBandwidth(s string) (uint64, string) {
	const want = "want a bandwidth such as 100Mbit/s, 500kbit/s or 1Gbit/s"
	i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	unit := uint64(1)
	if i >= 0 {
		switch strings.TrimSuffix(strings.TrimSpace(s[i:]), "/s") {
		case "bit":
		case "kbit":
			unit = 1_000
		case "Mbit":
			unit = 1_000_000
		case "Gbit":
			unit = 1_000_000_000
		default:
			return 0, want
		}
		s = s[:i]
	}
	n, ok := parseNumber(s)
	switch {
	case !ok:
		return 0, want
	case n > maxBandwidth/unit || n*unit < minBandwidth:
		return 0, "is out of range 8kbit/s to 1000Gbit/s"
	}
	return n * unit, ""
}

func (d *decoder) bandwidth(p *place, _ *field, v reflect.Value) {
	s, ok := d.text(p)
	if !ok {
		return
	}
	n, bad := parseBandwidth(s)
	if bad != "" {
		d.fail(p, "%s", bad)
		return
	}
	v.SetUint(n)
}
