package selection_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"wayout/selection"
)

func entry(escaper string, v selection.Value) selection.Entry {
	return selection.Entry{Escaper: escaper, Value: v}
}

func one(v selection.Value) selection.Layer { return selection.Layer{entry("srv", v)} }

// headers are header values and what they mean; a nil layer with an error text
// is a malformed one.
func headers() []struct {
	value string
	want  selection.Layer
	err   string
} {
	idx, id := selection.Index, selection.ID
	return []struct {
		value string
		want  selection.Layer
		err   string
	}{
		{"1", one(idx(1)), ""},
		{"0", one(idx(0)), ""},
		{"007", one(idx(7)), ""},
		{" \t7\t ", one(idx(7)), ""},
		{"18446744073709551615", one(idx(1<<64 - 1)), ""},
		{strings.Repeat("0", 4000) + "5", one(idx(5)), ""},
		{"18446744073709551616", nil, `index "18446744073709551616" is over 64 bits`},
		{strings.Repeat("9", 4096), nil, "over 64 bits"},
		{"", nil, "empty selection"},
		{" \t ", nil, "empty selection"},
		{strings.Repeat("0", 4097), nil, "selection of 4097 bytes, 4096 at most"},
		{"  " + strings.Repeat("0", 4095) + "1  ", one(idx(1)), ""},

		{"fra-2", one(id("fra-2")), ""},
		{"FRA-2", one(id("FRA-2")), ""},
		{"+1", one(id("+1")), ""},
		{"-1", one(id("-1")), ""},
		{"1.0", one(id("1.0")), ""},
		{"1,2", one(id("1,2")), ""},
		{"1 2", one(id("1 2")), ""},
		{"0x10", one(id("0x10")), ""},
		{"1_000", one(id("1_000")), ""},
		{`"1"`, one(id(`"1"`)), ""},
		{"[1]", one(id("[1]")), ""},
		{"null", one(id("null")), ""},
		{"198.51.100.11", one(id("198.51.100.11")), ""},
		{"::ffff:198.51.100.11", one(id("::ffff:198.51.100.11")), ""},
		{strings.Repeat("a", 4096), one(id(strings.Repeat("a", 4096))), ""},
		{strings.Repeat("a", 4097), nil, "4096 at most"},
		{"fra\x002", nil, `id "fra\x002" has a character that is not printable ASCII`},
		{"fra\t2", nil, "printable"},
		{"fra\r\nX: 1", nil, "printable"},
		{"fra\x7f", nil, "printable"},
		{"\xff", nil, "printable"},
		{"größe", nil, "printable"},
		{"\u00a01", nil, "printable"}, // a space, but not one that is trimmed
		{"\u0661", nil, "printable"},  // a digit, but not one that counts
		{"1\n", nil, "printable"},

		{`{"out":1}`, selection.Layer{entry("out", idx(1))}, ""},
		{` {"out":"1"} `, selection.Layer{entry("out", id("1"))}, ""},
		{`{}`, nil, ""},
		{`{`, nil, "map ends early"},
		{`{"out":1},{"dyn":1}`, nil, "nothing after the map"},
		{`{"` + strings.Repeat("a", 4096-6) + `":1}`, nil, ""}, // filled in below
		{`{"` + strings.Repeat("a", 4097-6) + `":1}`, nil, "selection of 4097 bytes"},
	}
}

func TestParseHeader(t *testing.T) {
	for _, c := range headers() {
		if len(c.value) == 4096 && c.value[0] == '{' {
			c.want = selection.Layer{entry(c.value[2:4096-4], selection.Index(1))}
		}
		check(t, "ParseHeader", c.value, c.want, c.err, func() (selection.Layer, error) {
			return selection.ParseHeader(c.value, "srv")
		})
	}
}

// check compares an answer with a layer, or with a part of the error text.
func check(t *testing.T, what, in string, want selection.Layer, text string, f func() (selection.Layer, error)) {
	t.Helper()
	if len(in) > 80 {
		in = fmt.Sprintf("%s... (%d bytes)", in[:80], len(in))
	}
	got, err := f()
	switch {
	case text == "" && err != nil:
		t.Errorf("%s(%q): %v", what, in, err)
	case text == "" && !slices.Equal(got, want):
		t.Errorf("%s(%q) = %v, want %v", what, in, got, want)
	case text != "" && err == nil:
		t.Errorf("%s(%q) = %v, want the error %q", what, in, got, text)
	case text != "" && (!errors.Is(err, selection.ErrMalformed) || !strings.Contains(err.Error(), text) || got != nil):
		t.Errorf("%s(%q) = %v, %v, want the error %q", what, in, got, err, text)
	case err != nil && (len(err.Error()) > 300 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' })):
		t.Errorf("%s(%q): the text is not fit for a header: %q", what, in, err)
	}
}

func maps() []struct {
	json string
	want selection.Layer
	err  string
} {
	idx, id := selection.Index, selection.ID
	l := func(e ...selection.Entry) selection.Layer { return e }
	return []struct {
		json string
		want selection.Layer
		err  string
	}{
		{`{}`, nil, ""},
		{" \t\r\n{ \n} ", nil, ""},
		{`{"out":0}`, l(entry("out", idx(0))), ""},
		{`{"out":18446744073709551615}`, l(entry("out", idx(1<<64-1))), ""},
		{`{"out":"fra-2","by-city":"dyn","nth":2}`, l(entry("out", id("fra-2")), entry("by-city", id("dyn")), entry("nth", idx(2))), ""},
		{"\t{ \"out\" :\r\n 1 , \"dyn\"\t: \"x\" } ", l(entry("out", idx(1)), entry("dyn", id("x"))), ""},
		{`{"":1}`, l(entry("", idx(1))), ""},
		{`{"a,b":1}`, l(entry("a,b", idx(1))), ""},
		{`{"o\u0075t":"\u0066ra"}`, l(entry("out", id("fra"))), ""},
		{`{"\"\\\/\b\f\n\r\t":"x"}`, l(entry("\"\\/\b\f\n\r\t", id("x"))), ""},
		{`{"\ud83d\ude00":"\uD83D\uDE00"}`, l(entry("😀", id("😀"))), ""},
		{`{"größe":1}`, l(entry("größe", idx(1))), ""},
		{`{"a":"\u0000"}`, l(entry("a", id("\x00"))), ""},
		{`{"a":1,"A":2}`, l(entry("a", idx(1)), entry("A", idx(2))), ""},

		{``, nil, "map ends early, want {"},
		{`  `, nil, "map ends early"},
		{`[]`, nil, "want {"},
		{`1`, nil, "want {"},
		{`null`, nil, "want {"},
		{"\ufeff{}", nil, "want {"},
		{`{"out":1`, nil, "want a comma or }"},
		{`{"out":1,}`, nil, "want a name in quotes"},
		{`{,"out":1}`, nil, "want a name in quotes"},
		{`{"out":1 "dyn":2}`, nil, "want a comma or }"},
		{`{"out":1;"dyn":2}`, nil, "want a comma or }"},
		{`{"out"}`, nil, "want a colon"},
		{`{"out":}`, nil, "want an index or an id"},
		{`{"out":`, nil, "map ends early, want an index"},
		{`{out:1}`, nil, "want a name in quotes"},
		{`{'out':1}`, nil, "want a name in quotes"},
		{`{1:1}`, nil, "want a name in quotes"},
		{`{"out":1}x`, nil, "want nothing after the map"},
		{`{"out":1}{}`, nil, "want nothing after the map"},
		{`{"out":1}` + "\x00", nil, "want nothing after the map"},
		{`{/**/}`, nil, "want a name"},
		{`{"out":1,"dyn":2,"out":1}`, nil, `map names "out" twice`},
		{`{"out":1,"o\u0075t":2}`, nil, `map names "out" twice`},
		{`{"out":null}`, nil, `byte 8: want an index or an id in quotes for "out", got "n"`},
		{`{"out":true}`, nil, `got "t"`},
		{`{"out":false}`, nil, `got "f"`},
		{`{"out":[1]}`, nil, `got "["`},
		{`{"out":{"ip":"192.0.2.1"}}`, nil, `got "{"`},
		{`{"out":""}`, nil, `map has an empty id for "out"`},
		{`{"out":-1}`, nil, "negative"},
		{`{"out":-0}`, nil, "negative"},
		{`{"out":+1}`, nil, `got "+"`},
		{`{"out":.5}`, nil, `got "."`},
		{`{"out":1.0}`, nil, "fraction or exponent"},
		{`{"out":1e2}`, nil, "fraction or exponent"},
		{`{"out":1E2}`, nil, "fraction or exponent"},
		{`{"out":007}`, nil, "leading zero"},
		{`{"out":00}`, nil, "leading zero"},
		{`{"out":0x1}`, nil, "want a comma or }"},
		{`{"out":1_0}`, nil, "want a comma or }"},
		{`{"out":18446744073709551616}`, nil, "over 64 bits"},
		{`{"out":NaN}`, nil, `got "N"`},
		{`{"out":"x}`, nil, "want a quote that ends an id"},
		{`{"out`, nil, "want a quote that ends a name"},
		{"{\"o\nt\":1}", nil, "no control character in a name"},
		{"{\"out\":\"\x00\"}", nil, "no control character in an id"},
		{`{"o\qt":1}`, nil, "bad escape in a name"},
		{`{"o\u12":1}`, nil, "bad escape"},
		{`{"o\u12g4":1}`, nil, "bad escape"},
		{`{"o\`, nil, "bad escape"},
		{`{"\ud83d":1}`, nil, "bad escape"},
		{`{"\ude00":1}`, nil, "bad escape"},
		{`{"\ud83dx":1}`, nil, "bad escape"},
		{`{"\ud83d\n":1}`, nil, "bad escape"},
		{`{"\ud83d\ud83d":1}`, nil, "bad escape"},
		{"{\"\xff\":1}", nil, "not UTF-8"},
		{"{\"a\":\"\\n\xc0\x80\"}", nil, "not UTF-8"},
		{"{\"\xed\xa0\x80\":1}", nil, "not UTF-8"}, // a surrogate in UTF-8
	}
}

func TestParseMap(t *testing.T) {
	for _, c := range maps() {
		check(t, "ParseMap", c.json, c.want, c.err, func() (selection.Layer, error) {
			return selection.ParseMap([]byte(c.json))
		})
	}
}

// Duplicates are found among many names too.
func TestParseMapMany(t *testing.T) {
	const n = 500
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `,"e%d":%d`, i, i)
	}
	text := "{" + b.String()[1:]
	l, err := selection.ParseMap([]byte(text + "}"))
	if err != nil || len(l) != n {
		t.Fatalf("%d entries, %v", len(l), err)
	}
	for i, e := range l {
		if e != entry("e"+strconv.Itoa(i), selection.Index(uint64(i))) {
			t.Fatalf("entry %d is %v", i, e)
		}
	}
	for _, i := range []int{0, 15, 16, 17, n - 1} {
		if _, err := selection.ParseMap(fmt.Appendf(nil, `%s,"e%d":1}`, text, i)); !errors.Is(err, selection.ErrMalformed) {
			t.Errorf("a second e%d: %v", i, err)
		}
	}
}

func TestParseHeaderAllocs(t *testing.T) {
	for _, v := range []string{"7", "fra-2", "198.51.100.11", "2001:db8::1", "ca:fe", "10.0"} {
		n := testing.AllocsPerRun(100, func() {
			if _, err := selection.ParseHeader(v, "out"); err != nil {
				t.Fatal(err)
			}
		})
		if n > 1 {
			t.Errorf("ParseHeader(%q) allocates %v times, want the Layer alone", v, n)
		}
	}
}

// oracle reads a map with encoding/json's tokens. strict is false where that
// package is known to be lenient: it mends broken UTF-8 and lone surrogates.
func oracle(text []byte) (l selection.Layer, ok, strict bool) {
	strict = utf8.Valid(text) && !bytes.Contains(bytes.ToLower(text), []byte(`\ud`))
	if !json.Valid(text) {
		return nil, false, strict
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if tok, err := d.Token(); err != nil || tok != json.Delim('{') {
		return nil, false, strict
	}
	seen := map[string]bool{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, false, strict
		}
		value, err := d.Token()
		s, _ := name.(string)
		if err != nil || seen[s] {
			return nil, false, strict
		}
		seen[s] = true
		switch v := value.(type) {
		case string:
			if v == "" {
				return nil, false, strict
			}
			l = append(l, entry(s, selection.ID(v)))
		case json.Number:
			n, isInt := new(big.Int).SetString(v.String(), 10)
			if !isInt || !n.IsUint64() || v.String()[0] == '-' {
				return nil, false, strict
			}
			l = append(l, entry(s, selection.Index(n.Uint64())))
		default:
			return nil, false, strict
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, false, strict
	}
	_, err := d.Token()
	return l, errors.Is(err, io.EOF), strict
}

func judgeMap(t *testing.T, text []byte) {
	t.Helper()
	got, err := selection.ParseMap(text)
	want, ok, strict := oracle(text)
	switch {
	case err != nil && (!errors.Is(err, selection.ErrMalformed) || got != nil):
		t.Fatalf("ParseMap(%q) = %v, %v", text, got, err)
	case err == nil && !ok, err != nil && ok && strict:
		t.Fatalf("ParseMap(%q) = %v, %v; encoding/json: %v", text, got, err, want)
	case err == nil && !slices.Equal(got, want):
		t.Fatalf("ParseMap(%q) = %v; encoding/json: %v", text, got, want)
	}
}

func FuzzParseMap(f *testing.F) {
	for _, c := range maps() {
		f.Add([]byte(c.json))
	}
	f.Fuzz(judgeMap)
}

func FuzzParseHeader(f *testing.F) {
	for _, c := range headers() {
		f.Add(c.value)
	}
	f.Fuzz(func(t *testing.T, value string) {
		got, err := selection.ParseHeader(value, "srv")
		if err != nil && (!errors.Is(err, selection.ErrMalformed) || got != nil) {
			t.Fatalf("ParseHeader(%q) = %v, %v", value, got, err)
		}
		v := strings.Trim(value, "\t ")
		if v == "" || len(v) > selection.MaxHeader {
			if err == nil {
				t.Fatalf("ParseHeader(%q) = %v", value, got)
			}
			return
		}
		if v[0] == '{' {
			judgeMap(t, []byte(v))
			if l, mapErr := selection.ParseMap([]byte(v)); !slices.Equal(l, got) || (mapErr == nil) != (err == nil) {
				t.Fatalf("ParseHeader(%q) = %v, %v; ParseMap: %v, %v", value, got, err, l, mapErr)
			}
			return
		}
		want := one(selection.ID(v))
		if strings.Trim(v, "0123456789") == "" {
			n, _ := new(big.Int).SetString(v, 10)
			if !n.IsUint64() {
				want = nil
			} else {
				want = one(selection.Index(n.Uint64()))
			}
		} else if strings.ContainsFunc(v, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
			want = nil
		}
		if !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Fatalf("ParseHeader(%q) = %v, %v, want %v", value, got, err, want)
		}
	})
}
