package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// TestArchive reads an archive back by the form's own rules.
func TestArchive(t *testing.T) {
	dir := t.TempDir()
	const directory = "\x00"
	want := map[string]string{"init": "12345", "m": directory, "m/n": directory, "m/n/a.ko": "", "m/four": "1234"}
	order := []string{"init", "m", "m/n", "m/n/a.ko", "m/four"}
	var files []file
	for _, name := range order {
		if want[name] == directory {
			continue
		}
		from := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(from, []byte(want[name]), 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, file{name: name, from: from})
	}
	to := filepath.Join(dir, "archive")
	if err := writeArchive(to, files); err != nil {
		t.Fatal(err)
	}
	rest, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		var name string
		var content []byte
		name, content, rest = readEntry(t, rest)
		if name == "TRAILER!!!" {
			if i != len(order) || len(rest) != 0 {
				t.Fatalf("ends after %d files with %d bytes left", i, len(rest))
			}
			return
		}
		if i == len(order) || name != order[i] || string(content) != want[name] {
			t.Fatalf("file %d is %q with %q", i, name, content)
		}
	}
}

func readEntry(t *testing.T, b []byte) (name string, content, rest []byte) {
	t.Helper()
	const size = 110
	if len(b) < size || string(b[:6]) != "070701" {
		t.Fatalf("no header: %.120q", b)
	}
	field := func(i int) int {
		v, err := strconv.ParseUint(string(b[6+8*i:14+8*i]), 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		return int(v)
	}
	up := func(n int) int { return (n + 3) / 4 * 4 }
	length, nameLength := field(6), field(11)
	at := up(size + nameLength)
	full := b[size : size+nameLength]
	name, content = string(bytes.TrimSuffix(full, []byte{0})), b[at:at+length]
	switch mode := field(1); {
	case mode == 0o040755 && length == 0:
		content = []byte{0} // told apart from a file without content
	case len(name) != nameLength-1, name != "TRAILER!!!" && mode != 0o100755:
		t.Fatalf("name %q, mode %o", full, mode)
	}
	return name, content, b[at+up(length):]
}
