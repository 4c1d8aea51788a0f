package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"wayout/router/auth"
	"wayout/router/config"
)

// aHash stands where the documents leave out what a password's hash is.
const aHash = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAA"

// Every whole configuration in the documents is one that `wayout check` takes.
func TestConfigurationsOfTheDocuments(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	for _, file := range append(files, "../../README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line, block := range yamlBlocks(string(text)) {
			if !isWhole(block) {
				continue
			}
			found[filepath.Base(file)]++
			block = strings.ReplaceAll(block, "$argon2id$...", aHash)
			if _, err := (config.Loader{Hash: auth.ValidateHash}).Parse("block", []byte(block)); err != nil {
				t.Errorf("%s, line %d on:\n%v", file, line, err)
			}
		}
	}
	for _, file := range []string{"README.md", "escapers.md", "gateway.md", "kernel.md", "operation.md"} {
		if found[file] == 0 {
			t.Errorf("%s holds no configuration: is it looked for as it is written?", file)
		}
	}
}

// isWhole tells a configuration from an excerpt of one: it has escapers, or is
// about a daemon and its numbers alone.
func isWhole(block string) bool {
	for line := range strings.Lines(block) {
		if strings.HasPrefix(line, "escaper:") || strings.HasPrefix(line, "control:") {
			return true
		}
	}
	return false
}

// yamlBlocks gives the yaml blocks of a document by the line before their first.
func yamlBlocks(text string) map[int]string {
	blocks := map[int]string{}
	begin := 0
	var lines []string
	for i, line := range strings.Split(text, "\n") {
		switch {
		case line == "```yaml":
			begin, lines = i+1, nil
		case line == "```" && begin > 0:
			blocks[begin], begin = strings.Join(lines, "\n")+"\n", 0
		case begin > 0:
			lines = append(lines, line)
		}
	}
	return blocks
}
