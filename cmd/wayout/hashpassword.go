package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/term"

	"wayout/router/auth"
)

// maxPassword bounds the line that hash-password reads, in bytes.
const maxPassword = 4096

// hashPassword reads a password from one line of standard input and prints
// its hash as the last line of the output.
func hashPassword(e *env, args []string) error {
	f := newFlags(e, "hash-password").withJSON()
	if _, err := f.parse(args); err != nil {
		return err
	}
	password, err := readPassword(e)
	if err != nil {
		return err
	}
	hash, err := auth.HashPassword(password)
	if err != nil {
		return err
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(map[string]string{"hash": hash})
	}
	fmt.Fprintln(e.stdout, hash)
	return nil
}

func readPassword(e *env) (string, error) {
	if fd := int(e.stdin.Fd()); term.IsTerminal(fd) {
		fmt.Fprint(e.stderr, "Password: ")
		line, err := term.ReadPassword(fd)
		fmt.Fprintln(e.stderr)
		if err != nil {
			return "", fmt.Errorf("read the password: %w", err)
		}
		return checkPassword(string(line))
	}
	line, err := bufio.NewReader(io.LimitReader(e.stdin, maxPassword+2)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read the password: %w", err)
	}
	return checkPassword(strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r"))
}

func checkPassword(p string) (string, error) {
	switch {
	case p == "":
		return "", usageError("the password is empty")
	case len(p) > maxPassword:
		return "", usageError("the password is longer than %d bytes", maxPassword)
	}
	return p, nil
}
