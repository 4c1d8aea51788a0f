package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
)

// file is one that the archive holds.
type file struct {
	name string // its path, which does not begin with a slash
	from string // where its content is
}

// writeArchive makes a cpio archive of the "new ASCII" form, which the kernel
// unpacks into its first file system (driver-api/early-userspace/buffer-format.rst of its documentation).
func writeArchive(to string, files []file) (err error) {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriter(f)
	inode := 0
	add := func(name string, mode uint32, content []byte) error {
		inode++
		return entry(w, inode, name, mode, content)
	}
	made := map[string]bool{}
	for _, one := range files {
		content, err := os.ReadFile(one.from)
		if err != nil {
			return err
		}
		for _, dir := range above(one.name) {
			if made[dir] {
				continue
			}
			made[dir] = true
			if err := add(dir, 0o040755, nil); err != nil {
				return err
			}
		}
		if err := add(one.name, 0o100755, content); err != nil {
			return err
		}
	}
	if err := entry(w, 0, "TRAILER!!!", 0, nil); err != nil {
		return err
	}
	return w.Flush()
}

// above lists the directories of a path, from the top.
func above(name string) []string {
	var all []string
	for i, c := range name {
		if c == '/' {
			all = append(all, name[:i])
		}
	}
	return all
}

// entry writes one file: a header of 13 numbers in 8 hexadecimal digits each, the
// name with a zero byte, the content; the latter two end at a multiple of four.
func entry(w io.Writer, inode int, name string, mode uint32, content []byte) error {
	header := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	for _, part := range [][]byte{[]byte(header), content} {
		if _, err := w.Write(append(part, make([]byte, -len(part)&3)...)); err != nil {
			return err
		}
	}
	return nil
}
