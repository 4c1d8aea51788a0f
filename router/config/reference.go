package config

import (
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"
)

// Key is one key that can be configured.
type Key struct {
	Name    string `json:"name"` // escaper[].nodes[].id, with [] after a list's name
	Type    string `json:"type"`
	Unit    string `json:"unit"`    // what a bare number counts
	Default string `json:"default"` // in the words of the file, or required
	Meaning string `json:"meaning"`
}

// Keys lists all that can be configured, by the tags that the decoder reads, in the order of the file.
func Keys() []Key { return newDecoder("").keys(nil, "", reflect.TypeFor[Config]()) }

// Reference prints Keys as a Markdown table.
func Reference(w io.Writer) error {
	rows := [][5]string{{"name", "type", "unit", "default", "meaning"}}
	for _, k := range Keys() {
		rows = append(rows, [5]string{cell(k.Name), cell(k.Type), cell(k.Unit), cell(k.Default), cell(k.Meaning)})
	}
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

func (d *decoder) keys(list []Key, prefix string, t reflect.Type) []Key {
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
		if len(f.types) > 0 {
			meaning += " For " + andList(f.types) + "."
		}
		if f.max != "" {
			meaning += fmt.Sprintf(" From %s to %s.", f.min, f.max)
		}
		list = append(list, Key{name, word, f.unit, def, meaning})
		if f.sub != nil {
			down := name + "."
			if f.word != "map" {
				down = name + "[]."
			}
			list = d.keys(list, down, f.sub)
		}
	}
	return list
}

func andList(words []string) string {
	last := len(words) - 1
	if last == 0 {
		return words[0]
	}
	return strings.Join(words[:last], ", ") + " and " + words[last]
}

// cell keeps a text within its cell.
func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
