package router_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// allowed is the house's import table: what of our own each package may
// import. Scripts and tests may import all.
//
//	cmd -> router -> {front ends} -> {config, auth, escaper, relay, resolve, control} -> selection
func allowed() map[string][]string {
	return map[string][]string{
		"cmd/wayout": {
			"router", "router/auth", "router/config", "router/control", "router/escaper", "router/resolve",
			"netcfg", "bpf", "selection",
		},
		"router": {
			"router/config", "router/auth", "router/control", "router/escaper", "router/httpproxy", "router/socks", "router/tproxy",
			"router/relay", "router/resolve", "netcfg", "bpf", "selection",
		},
		"router/auth":         {"selection"},
		"router/config":       {"selection"},
		"router/control":      {"selection"},
		"router/escaper":      {"router/escaper/hop", "router/resolve", "selection"},
		"router/escaper/hop":  {"router/socks/client"},
		"router/httpproxy":    {"router/auth", "router/escaper", "router/relay", "selection"},
		"router/relay":        {},
		"router/resolve":      {"selection"},
		"router/socks":        {"router/auth", "router/escaper", "router/relay", "router/socks/client", "selection"},
		"router/tproxy":       {"router/auth", "router/escaper", "router/relay", "selection"},
		"router/socks/client": {},
		"selection":           {},
		"netcfg":              {},
		"bpf":                 {},
	}
}

// TestImportsRunOneWay holds the table above. It reads the sources itself: a
// `go list` in a subprocess would be invisible to the test cache.
func TestImportsRunOneWay(t *testing.T) {
	const root, module = "..", "wayout/"
	table := allowed()
	met := map[string]bool{}
	err := filepath.WalkDir(root, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && (strings.HasPrefix(e.Name(), ".") && e.Name() != ".." || e.Name() == "testdata") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		pkg := path.Dir(filepath.ToSlash(rel))
		if strings.HasPrefix(pkg, "scripts") {
			return nil
		}
		may, known := table[pkg]
		if !known {
			t.Errorf("package %s is not in the import table", pkg)
		}
		met[pkg] = true
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, imp := range f.Imports {
			name, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			ours, is := strings.CutPrefix(name, module)
			if is && !slices.Contains(may, ours) {
				t.Errorf("%s imports %s; %s may import %v", rel, ours, pkg, may)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range table {
		if !met[pkg] {
			t.Errorf("package %s is in the import table and does not exist", pkg)
		}
	}
}
