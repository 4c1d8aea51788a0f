package config_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"wayout/router/config"
)

// The reference is what testdata/reference.md has. UPDATE_GOLDEN=1 writes it.
func TestReferenceGolden(t *testing.T) {
	var b bytes.Buffer
	if err := config.Reference(&b); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "reference.md")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), want) {
		t.Errorf("testdata/reference.md is not what Reference prints; UPDATE_GOLDEN=1 go test writes it:\n%s", b.String())
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.ErrUnsupported }

func TestReferenceWriteError(t *testing.T) {
	if err := config.Reference(failing{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}

// referenced returns the reference's rows by name.
func referenced(t *testing.T) map[string][]string {
	t.Helper()
	var b bytes.Buffer
	if err := config.Reference(&b); err != nil {
		t.Fatal(err)
	}
	rows := map[string][]string{}
	for _, line := range strings.Split(strings.TrimSpace(b.String()), "\n")[2:] {
		cells := strings.Split(strings.Trim(line, "|"), " | ")
		if len(cells) != 5 {
			t.Fatalf("%d cells: %s", len(cells), line)
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if _, ok := rows[cells[0]]; ok {
			cells[0] += " again" // of another type
		}
		if _, ok := rows[cells[0]]; ok {
			t.Errorf("%s is there twice", cells[0])
		}
		if cells[1] == "" || !strings.HasSuffix(cells[4], ".") {
			t.Errorf("a type and a sentence are missing: %s", line)
		}
		rows[cells[0]] = cells
	}
	return rows
}

// Every field of every struct can be set by a file, and is in the reference.
func TestReferenceHasEveryField(t *testing.T) {
	rows := referenced(t)
	// These are read as one value, or made of others.
	whole := []reflect.Type{
		reflect.TypeFor[config.Rule](), reflect.TypeFor[config.Rate](), reflect.TypeFor[config.Select](),
		reflect.TypeFor[config.Divert](),
	}
	made := map[reflect.Type][]string{
		reflect.TypeFor[config.User]():   {"Allow", "Inline"}, // of AllowPath and EgressPath
		reflect.TypeFor[config.Node]():   {"Net4", "Net6"},    // of ipv4 and ipv6
		reflect.TypeFor[config.Server](): {"ListenNets"},      // of listen
		reflect.TypeFor[config.Health](): {"On"},              // the key is there
	}
	// The last key of a HostRule is its list's.
	lists := map[string]string{"exact_match": "hosts", "child_match": "domains", "regex_match": "regexes", "user_match": "users"}
	fields := 0
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			if slices.Contains(made[typ], f.Name) {
				continue
			}
			fields++
			key := f.Tag.Get("key")
			if typ == reflect.TypeFor[config.Node]() {
				key = strings.ToLower(f.Name) // read by a struct of its own, because of ranges
			}
			if typ == reflect.TypeFor[config.HostRule]() {
				key = "next"
				if f.Name == "Hosts" {
					key = lists[strings.TrimSuffix(strings.TrimPrefix(prefix, "escaper[]."), "[].")]
				}
			}
			if key == "" || rows[prefix+key] == nil {
				t.Errorf("%s.%s (key %q) is not in the reference", typ.Name(), f.Name, prefix+key)
			}
			sub := f.Type
			if sub.Kind() == reflect.Slice {
				sub, key = sub.Elem(), key+"[]"
			}
			if sub.Kind() == reflect.Struct && sub.PkgPath() == typ.PkgPath() && !slices.Contains(whole, sub) {
				walk(prefix+key+".", sub)
			}
		}
	}
	walk("", reflect.TypeFor[config.Config]())
	if fields != len(rows) {
		t.Errorf("%d fields, %d rows", fields, len(rows))
	}
}

// Every row of the reference is in the example, which TestExample parses, and its default is a value that a file may
// have there.
func TestReferenceIsTrue(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "example.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		t.Fatal(err)
	}
	seen := map[string]*yaml.Node{}
	var walk func(path string, n *yaml.Node)
	walk = func(path string, n *yaml.Node) {
		switch n.Kind {
		case yaml.MappingNode:
			for i := 0; i < len(n.Content); i += 2 {
				key := strings.TrimPrefix(path+"."+n.Content[i].Value, ".")
				seen[key] = n.Content[i+1]
				walk(key, n.Content[i+1])
			}
		case yaml.SequenceNode:
			for _, item := range n.Content {
				walk(path+"[]", item)
			}
		}
	}
	walk("", root.Content[0])
	for name, row := range referenced(t) {
		n := seen[strings.TrimSuffix(name, " again")]
		if n == nil {
			t.Errorf("%s is not in the example", name)
			continue
		}
		if name == "server[].open" {
			continue // the example means it
		}
		if def := row[3]; def != "" && def != "required" && n.Kind == yaml.ScalarNode {
			was, style := n.Value, n.Style
			n.Value, n.Style, n.Tag = def, 0, ""
			text, err := yaml.Marshal(&root)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := config.Parse("w.yaml", text); err != nil {
				t.Errorf("%s: the default %q: %v", name, def, err)
			}
			n.Value, n.Style = was, style
		}
	}
}
