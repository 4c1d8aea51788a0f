package main

import (
	"encoding/json"
	"fmt"
	"runtime"
)

// printVersion prints the version of the program.
func printVersion(e *env, args []string) error {
	f := newFlags(e, "version").withJSON()
	if _, err := f.parse(args); err != nil {
		return err
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(map[string]string{"version": version, "go": runtime.Version()})
	}
	fmt.Fprintf(e.stdout, "wayout %s (%s)\n", version, runtime.Version())
	return nil
}
