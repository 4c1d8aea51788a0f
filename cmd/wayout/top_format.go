package main

import (
	"fmt"
	"math"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// quantity writes a number with three digits that count, in at most five
// places: 0, 0.3, 512, 1.23k, 12.3M.
func quantity(v float64) string {
	switch {
	case math.IsNaN(v) || v < 0.05:
		return "0"
	case v < 9.95:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0")
	case v < 999.5:
		return fmt.Sprintf("%.0f", v)
	}
	const suffixes = "kMGTPEZY"
	i := -1
	for v >= 999.5 && i+1 < len(suffixes) {
		v, i = v/1000, i+1
	}
	return threeDigits(v) + suffixes[i:i+1]
}

// threeDigits writes 1.23, 12.3 or 123.
func threeDigits(v float64) string {
	switch {
	case v < 9.995:
		return fmt.Sprintf("%.2f", v)
	case v < 99.95:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// whole writes a count: exactly while it has room in six places.
func whole(n int64) string {
	if n < 1_000_000 {
		return fmt.Sprint(n)
	}
	return quantity(float64(n))
}

// roundTrip writes seconds in at most six places; 0 is no sample.
func roundTrip(seconds float64) string {
	switch {
	case seconds <= 0:
		return "-"
	case seconds < 0.0009995:
		return fmt.Sprintf("%.0fus", seconds*1e6)
	case seconds < 0.9995:
		return threeDigits(seconds*1e3) + "ms"
	}
	return threeDigits(seconds) + "s"
}

// percent writes a share of 0 to 1 in at most five places.
func percent(v float64) string {
	switch p := v * 100; {
	case p < 0.005:
		return "0%"
	case p < 0.995:
		return fmt.Sprintf("%.2f%%", p)
	case p < 99.95:
		return fmt.Sprintf("%.1f%%", p)
	default:
		return "100%"
	}
}

// since writes how long something has been so.
func since(d time.Duration) string {
	switch {
	case d < time.Second:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}

// printable takes out what would steer a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// clip cuts a text to a width, at its end.
func clip(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	if width <= 0 {
		return ""
	}
	return string([]rune(s)[:width-1]) + "~"
}

// squeeze cuts a path's name to a width, in its middle: the end is what tells
// paths apart.
func squeeze(s string, width int) string {
	r := []rune(s)
	if len(r) <= width {
		return s
	}
	if width <= 0 {
		return ""
	}
	head := (width - 1) / 3
	return string(r[:head]) + "~" + string(r[len(r)-(width-1-head):])
}

// pad fills a text up with spaces to a width, before it when right.
func pad(s string, width int, right bool) string {
	fill := strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
	if right {
		return fill + s
	}
	return s + fill
}
