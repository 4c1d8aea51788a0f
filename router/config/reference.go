package config

import (
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"
)

// Reference prints all that can be configured, by the tags that the decoder reads: a Markdown table of name, type, unit,
// default and meaning, in the order of the file, with [] after a list's name.
func Reference(w io.Writer) error {
	rows := [][5]string{{"name", "type", "unit", "default", "meaning"}}
	d := newDecoder("")
	rows = d.reference(rows, "", reflect.TypeFor[Config]())
	var width [5]int
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	width[4] = 0 // the last column is as long as it is
	var b strings.Builder
	line := func(r [5]string) {
		for i, cell := range r {
			fmt.Fprintf(&b, "| %-*s ", width[i], cell)
		}
		b.WriteString("|\n")
	}
	line(rows[0])
	var rule [5]string
	for i := range rule {
		rule[i] = strings.Repeat("-", max(width[i], 3))
	}
	line(rule)
	for _, r := range rows[1:] {
		line(r)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write reference: %w", err)
	}
	return nil
}

func (d *decoder) reference(rows [][5]string, prefix string, t reflect.Type) [][5]string {
	tab := d.table(t)
	for i := range tab.fields {
		f := &tab.fields[i]
		name := prefix + f.key
		word := f.word
		if len(f.of) > 0 {
			word = strings.Join(f.of, ", ")
		}
		if f.ref != "" {
			word = f.ref + " name"
		}
		def := f.def
		if f.required {
			def = "required"
		}
		meaning := f.meaning
		if f.alias != "" {
			meaning += " Alias: " + f.alias + "."
		}
		if f.max != "" {
			meaning += fmt.Sprintf(" From %s to %s.", f.min, f.max)
		}
		rows = append(rows, [5]string{cell(name), cell(word), cell(f.unit), cell(def), cell(meaning)})
		if f.sub != nil {
			down := name + "."
			if f.word != "map" {
				down = name + "[]."
			}
			rows = d.reference(rows, down, f.sub)
		}
	}
	return rows
}

// cell keeps a text within its cell.
func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
