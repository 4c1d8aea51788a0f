package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// tree is the kernel in a directory that its packages were unpacked into.
type tree struct {
	image   string
	modules map[string]string // by name: the file
	builtin map[string]bool   // that are no files
}

// openTree looks for boot/vmlinuz-* and lib/modules, in the one place or the other.
func openTree(root string) (*tree, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("%s: %d kernels in boot, want one", root, len(images))
	}
	t := &tree{image: images[0], modules: map[string]string{}, builtin: map[string]bool{}}
	for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
		err := filepath.WalkDir(filepath.Join(root, lib), func(at string, e os.DirEntry, err error) error {
			switch {
			case errors.Is(err, os.ErrNotExist):
				return nil
			case err != nil:
				return err
			case e.Name() == "modules.builtin":
				return t.readBuiltin(at)
			case strings.Contains(e.Name(), ".ko"):
				t.modules[moduleName(at)] = at
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (t *tree) readBuiltin(at string) error {
	text, err := os.ReadFile(at)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		t.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return nil
}

// moduleName is that of a file, as the kernel says it.
func moduleName(at string) string {
	name, _, _ := strings.Cut(path.Base(filepath.ToSlash(at)), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// load gives the files of modules in the order to load them, each after what it
// depends on. What is compressed is put into dir as it is without.
func (t *tree) load(ctx context.Context, dir string, names []string) ([]file, error) {
	var all []file
	met := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if name == "" || met[name] || t.builtin[name] {
			return nil
		}
		met[name] = true
		from, ok := t.modules[name]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		from, err := unpack(ctx, dir, from)
		if err != nil {
			return err
		}
		before, err := depends(from)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		for _, one := range before {
			if err := add(one); err != nil {
				return err
			}
		}
		all = append(all, file{name: "modules/" + name + ".ko", from: from})
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// unpack gives a module without compression.
func unpack(ctx context.Context, dir, from string) (string, error) {
	tools := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}
	tool, packed := tools[filepath.Ext(from)]
	if !packed {
		return from, nil
	}
	content, err := exec.CommandContext(ctx, tool, "-dc", from).Output()
	if err != nil {
		return "", fmt.Errorf("%s -dc %s: %w", tool, from, err)
	}
	to := filepath.Join(dir, moduleName(from)+".ko")
	return to, os.WriteFile(to, content, 0o600)
}

// depends reads what a module wants to have been loaded before.
func depends(module string) ([]string, error) {
	f, err := elf.Open(module)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for line := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := strings.CutPrefix(string(line), "depends="); ok {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}

// program is a program of this machine with the libraries that it wants, in the
// places where it looks for them.
func program(name string) ([]file, error) {
	at, err := exec.LookPath(name)
	if err != nil {
		return nil, err
	}
	files := []file{{name: "bin/" + name, from: at}}
	libraries := []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"}
	var add func(from string) error
	add = func(from string) error {
		f, err := elf.Open(from)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		defer f.Close()
		wants, err := f.ImportedLibraries()
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				interp := make([]byte, p.Filesz)
				if _, err := p.ReadAt(interp, 0); err != nil {
					return fmt.Errorf("%s: %w", from, err)
				}
				loader := string(bytes.TrimRight(interp, "\x00"))
				files = append(files, file{name: strings.TrimPrefix(loader, "/"), from: loader})
			}
		}
		for _, want := range wants {
			i := slices.IndexFunc(libraries, func(dir string) bool {
				_, err := os.Stat(filepath.Join(dir, want))
				return err == nil
			})
			if i < 0 {
				return fmt.Errorf("%s wants %s, which is nowhere", from, want)
			}
			to := "lib/x86_64-linux-gnu/" + want
			if slices.ContainsFunc(files, func(f file) bool { return f.name == to }) {
				continue
			}
			library := filepath.Join(libraries[i], want)
			files = append(files, file{name: to, from: library})
			if err := add(library); err != nil {
				return err
			}
		}
		return nil
	}
	return files, add(at)
}
